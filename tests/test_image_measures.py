"""Measures of pictures say what they are named for: numbers worked by hand."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from trl_dgpo.image_measures import image_statistics, measure_images, near_duplicates, thumbnails


def flat(*colours):
    return torch.stack([torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8) for colour in colours])


def grey(rows):
    """A picture of grey values."""
    return torch.tensor(rows, dtype=torch.uint8).expand(1, 3, -1, -1)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (flat((0, 0, 0)), {"brightness": 0, "darkness": 1, "saturation": 0}),
        (flat((255, 255, 255)), {"brightness": 1, "darkness": 0, "saturation": 0}),
        (flat((255, 0, 0)), {"brightness": 0.299, "darkness": 0, "saturation": 1}),
        (flat((0, 0, 255)), {"brightness": 0.114, "darkness": 1, "saturation": 1}),
        (
            flat((0, 0, 0), (255, 255, 255)),
            {"brightness": 0.5, "darkness": 0.5, "saturation": 0, "colour_spread": 0.5},
        ),
    ],
)
def test_statistics_of_flat_pictures(images, expected):
    nothing = {"contrast": 0, "edges": 0, "colour_entropy": 0, "colour_spread": 0}
    assert image_statistics(measure_images(images)) == pytest.approx(nothing | expected, abs=1e-6)


def test_contrast_is_within_a_picture():
    half = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    half[..., :4] = 255
    assert image_statistics(measure_images(half))["contrast"] == pytest.approx(0.5)
    assert image_statistics(measure_images(half))["darkness"] == pytest.approx(0.5)


def test_edges_are_counted_in_both_directions():
    # 6 pairs side by side, of which 2 differ by more than a tenth of 255; 4 one above the other, of which 1.
    picture = grey([[0, 0, 200], [0, 25, 200], [0, 0, 0]])
    expected = {"side by side": [(0, 0), (0, 200), (0, 25), (25, 200), (0, 0), (0, 0)]}
    expected["above"] = [(0, 0), (0, 25), (200, 200), (0, 0), (25, 0), (200, 0)]
    edges = [abs(a - b) > 25.5 for pairs in expected.values() for a, b in pairs]
    assert sum(edges) == 3
    assert measure_images(picture)["edges"].item() == pytest.approx(3 / 12)


def test_entropy_is_the_bits_of_a_colour():
    four = torch.cat([flat((0, 0, 0)), flat((255, 0, 0)), flat((0, 255, 0)), flat((0, 0, 255))], dim=3)
    assert measure_images(four)["colour_entropy"].item() == pytest.approx(2)
    # Three quarters of one colour and a quarter of another; 31 and 0 are one of the 8 levels, 32 is the next.
    some = grey([[0, 31], [0, 32]])
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert measure_images(some)["colour_entropy"].item() == pytest.approx(bits)
    every = torch.cartesian_prod(*[torch.arange(0, 256, 32, dtype=torch.uint8)] * 3).T.reshape(1, 3, 16, 32)
    assert measure_images(every)["colour_entropy"].item() == pytest.approx(9)


def test_each_picture_is_measured_alone():
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, 6, 9), generator=stream, dtype=torch.uint8)
    whole = measure_images(images)
    for number, image in enumerate(images):
        for name, value in measure_images(image[None]).items():
            torch.testing.assert_close(whole[name][number], value[0])


def test_pictures_of_any_size_are_measured_alike():
    stream = torch.Generator().manual_seed(0)
    small = torch.randint(256, (2, 3, 32, 64), generator=stream, dtype=torch.uint8)
    large = interpolate(small.float(), scale_factor=8).to(torch.uint8)
    for name, value in measure_images(small).items():
        if name != "edges":  # by whole factors, most neighbours are of one pixel
            torch.testing.assert_close(value, measure_images(large)[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thumbnails(small), thumbnails(large))


# -- near duplicates --------------------------------------------------------------------------------------------------


def test_the_same_picture_again_is_a_duplicate_within_its_group_alone():
    images = flat((10, 10, 10), (10, 10, 10), (200, 0, 0), (10, 10, 10), (0, 200, 0))
    shares = near_duplicates(thumbnails(images), torch.tensor([0, 0, 0, 1, 1]))
    assert shares.tolist() == [0.5, 0.5, 0, 0, 0]


def test_the_limit_is_five_of_255():
    near, far = flat((100, 100, 100), (105, 105, 105)), flat((100, 100, 100), (106, 106, 106))
    group = torch.tensor([7, 7])
    assert near_duplicates(thumbnails(near), group).tolist() == [1, 1]
    assert near_duplicates(thumbnails(far), group).tolist() == [0, 0]


def test_fine_noise_makes_no_other_picture():
    stream = torch.Generator().manual_seed(0)
    picture = torch.randint(60, 190, (1, 3, 8, 8), generator=stream).float()
    large = interpolate(picture, scale_factor=32)
    noise = 20 * torch.randn(2, 3, 256, 256, generator=stream)
    images = (large + noise).clamp(0, 255).to(torch.uint8)
    assert (images[0].float() - images[1].float()).square().mean().sqrt() > 20
    assert near_duplicates(thumbnails(images), torch.zeros(2)).tolist() == [1, 1]


def test_an_image_alone_in_its_group_has_no_share():
    assert near_duplicates(thumbnails(flat((1, 1, 1))), torch.tensor([0])).isnan().all()
