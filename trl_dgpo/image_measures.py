"""
What can be told of pictures without a model: pure functions of uint8 pixels.

All are shares, means or bits, and none counts pixels, so that pictures of any size are measured alike.
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


EDGE = 0.1  # difference of neighbouring lumas that the eye takes for an edge
COLOUR_LEVELS = 8  # of each channel, in the histogram of colours
THUMBNAIL = 8  # pixels of a side of what near duplicates are compared by
NEAR = 0.02  # root mean square difference below which two thumbnails are one picture


def measure_images(images: Tensor) -> dict[str, Tensor]:
    r"""
    What [`image_statistics`] needs to know of each image.

    Luma is \\( 0.299 R + 0.587 G + 0.114 B \\) with channels in [0, 1].

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            uint8 images, of at least 2 pixels.

    Returns:
        `dict[str, torch.Tensor]`, `(B,)` each:

        - `brightness`: mean luma;
        - `darkness`: part of the pixels whose luma is below 0.25;
        - `contrast`: standard deviation of luma;
        - `saturation`: mean of a pixel's largest minus smallest channel;
        - `edges`: part of the pairs of neighbouring pixels, side by side or one above the other, whose lumas differ by
          more than 0.1;
        - `colour_entropy`: \\( -\sum_c p_c \log_2 p_c \\) in bits, where \\( p_c \\) is the part of the pixels of a
          colour and each channel has 8 levels: 0 for one colour, 9 where all 512 are as frequent;
        - `colour` of shape `(B, 3)`: the mean colour.

        All but the entropy are in [0, 1].
    """
    pixels = images.float() / 255
    luma = torch.einsum("bchw,c->bhw", pixels, torch.tensor([0.299, 0.587, 0.114], device=images.device))
    steps = [luma.diff(dim=axis).abs().flatten(1) for axis in (1, 2)]
    return {
        "brightness": luma.mean((1, 2)),
        "darkness": (luma < 0.25).float().mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
        "saturation": (pixels.amax(1) - pixels.amin(1)).mean((1, 2)),
        "edges": (torch.cat(steps, 1) > EDGE).float().mean(1),
        "colour_entropy": _colour_entropy(images),
        "colour": pixels.mean((2, 3)),
    }


def _colour_entropy(images: Tensor) -> Tensor:
    number = COLOUR_LEVELS**3
    red, green, blue = (images // (256 // COLOUR_LEVELS)).long().flatten(2).unbind(1)
    colours = (red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue
    first = number * torch.arange(len(images), device=images.device)[:, None]
    counts = (colours + first).flatten().bincount(minlength=number * len(images)).view(len(images), number)
    return torch.special.entr(counts / colours.shape[1]).sum(1) / torch.tensor(2.0).log().item()


def image_statistics(measures: dict[str, Tensor]) -> dict[str, float]:
    """
    Free signs of what a reward does to pictures: a run that blanks, bleaches or greys them shows here first.

    Args:
        measures (`dict[str, torch.Tensor]`):
            Of each image, see [`measure_images`]; any of them, `colour` among them.

    Returns:
        `dict[str, float]`: the means over images, and `colour_spread`, the standard deviation of the images' mean
        colours over the images, averaged over channels: it falls when all pictures take one tint.
    """
    means = {name: values.mean().item() for name, values in measures.items() if name != "colour"}
    return means | {"colour_spread": measures["colour"].std(0, correction=0).mean().item()}


def thumbnails(images: Tensor) -> Tensor:
    """
    Images as 8 x 8 mean colours, by which [`near_duplicates`] compares them.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            uint8 images.

    Returns:
        `torch.Tensor` of shape `(B, 192)`, float32 in [0, 1].
    """
    return adaptive_avg_pool2d(images.float() / 255, THUMBNAIL).flatten(1)


def near_duplicates(thumbnails: Tensor, group_index: Tensor) -> Tensor:
    """
    Part of the other images of its group that an image can hardly be told from.

    Two images are near duplicates where the root mean square difference of their thumbnails, over all 8 x 8 x 3
    numbers, is below 0.02, which is 5 of 255. A mean over a 64th of a picture forgets its fine noise, so that pictures
    of 32 and of 512 pixels are compared alike.

    Args:
        thumbnails (`torch.Tensor` of shape `(B, D)`):
            Of whole groups, see [`thumbnails`].
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each image.

    Returns:
        `torch.Tensor` of shape `(B,)` in [0, 1], `NaN` where an image is alone in its group. The mean over a group is
        the part of its pairs that are near duplicates.
    """
    shares = torch.full((len(thumbnails),), torch.nan)
    for group in group_index.unique():
        members = (group_index == group).nonzero()[:, 0]
        if len(members) > 1:
            of_group = thumbnails[members].double()
            # The differences themselves: products of the thumbnails would lose small ones to rounding.
            distances = (of_group[:, None] - of_group[None]).square().mean(2).sqrt()
            near = (distances < NEAR).sum(1) - 1  # but itself
            shares[members] = (near / (len(members) - 1)).float()
    return shares
