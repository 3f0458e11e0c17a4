import numpy as np
import pytest
import torch

from trl_dgpo.seeding import generator


def test_the_seed_is_pinned():
    # printf "(0, 'noise', 1, 'a')" | sha256sum: the first 8 bytes, halved. It decides every run.
    assert generator(0, "noise", 1, "a").initial_seed() == 0x56F294CDF7DCB2B0 >> 1


def test_every_part_of_the_name_counts():
    names = [(0, "noise"), (1, "noise"), (0, "latents"), (0, "noise", 1), (0, "noise", "1"), (0, "noise", 1, 2)]
    names += [(0, "noise", 2, 1), (0, "noise", 12), (0, "noise", -1), (-1, "noise")]
    draws = {torch.randn(4, generator=generator(*name)).numpy().tobytes() for name in names}
    assert len(draws) == len(names)


def test_a_draw_does_not_depend_on_earlier_ones():
    torch.manual_seed(1)
    first = torch.randn(4, generator=generator(3, "noise", 7))
    torch.randn(9, generator=generator(3, "noise", 6))
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(4, generator=generator(3, "noise", 7)))


@pytest.mark.parametrize("seven", [np.int64(7), torch.tensor(7), torch.tensor([6, 7])[1]])
def test_integers_of_numpy_and_torch_name_the_same_stream(seven):
    assert generator(0, "noise", seven).initial_seed() == generator(0, "noise", 7).initial_seed()


def test_a_float_is_no_name():
    with pytest.raises(TypeError):
        generator(0, "noise", 0.5)
