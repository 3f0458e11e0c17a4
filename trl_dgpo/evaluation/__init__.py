"""
Held-out prompts under fixed noise: the latents of an evaluation, its numbers and its pictures.
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..image_measures import image_statistics
from ..rewards.scoring import RewardsFailedError, Scores
from ..seeding import generator


def evaluation_latents(prompts: list[str], num_images: int, shape: tuple[int, ...]) -> Tensor:
    """
    Initial latents of evaluation images.

    They depend on the prompt's text and the image's number alone: not on the run's seed, on the other prompts, on
    their order or on the machine. So any two evaluations of a prompt differ by the weights and nothing else.

    Args:
        prompts (`list[str]`):
            The prompts.
        num_images (`int`):
            Images of each.
        shape (`tuple[int, ...]`):
            Shape of one latent.

    Returns:
        `torch.Tensor` of shape `(len(prompts) * num_images, *shape)`, float32, on the CPU; the images of a prompt
        stand together.
    """
    return torch.stack(
        [
            torch.randn(shape, generator=generator(0, "evaluation", prompt, index))
            for prompt in prompts
            for index in range(num_images)
        ]
    )


def evaluation_metrics(scores: Scores, measures: dict[str, Tensor], prefix: str = "eval") -> dict[str, float]:
    """
    The numbers of an evaluation.

    Args:
        scores ([`~trl_dgpo.rewards.scoring.Scores`]):
            Of all images.
        measures (`dict[str, torch.Tensor]`):
            Of all images, see [`~trl_dgpo.image_measures.measure_images`].
        prefix (`str`, *optional*, defaults to `"eval"`):
            Prefix of the names.

    Returns:
        `dict[str, float]` with `eval_reward`, `eval_reward_std` and `eval_reward_stderr` over images,
        `eval_rewards/<name>/mean` and `/std`, the means of what rewards gave to `log_metric`,
        `eval_images/<statistic>` (see [`~trl_dgpo.image_measures.image_statistics`]), `eval_num_images` and
        `eval_failed`.

    Raises:
        `RewardsFailedError`: if no image has a reward.
        `ValueError`: if a reward's own metric has the name of one of these.
    """
    rewards = scores.rewards
    failed = int(scores.failed.sum())
    if rewards.isnan().all():
        raise RewardsFailedError(
            f"No evaluation image has a reward: {failed} of {len(rewards)} failed, to the others no reward applies. "
            "The log above has the reason."
        )
    metrics = {"reward": rewards.nanmean().item(), "reward_std": nanstd(rewards)}
    metrics["reward_stderr"] = nanstd(rewards) / (~rewards.isnan()).sum().sqrt().item()
    for name, values in scores.by_name.items():
        metrics[f"rewards/{name}/mean"] = values.nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(values)
    for name, value in image_statistics(measures).items():
        metrics[f"images/{name}"] = value
    metrics |= {"num_images": len(rewards), "failed": failed}
    if taken := sorted(metrics.keys() & scores.metrics.keys()):
        raise ValueError(f"A reward logs {taken} by `log_metric`, which are the evaluation's own names. Rename them.")
    metrics |= {name: sum(values) / len(values) for name, values in sorted(scores.metrics.items())}
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def nanstd(values: Tensor) -> float:
    """Population standard deviation of the numbers that are not `NaN`."""
    values = values[~values.isnan()]
    return values.std(correction=0).item() if len(values) else float("nan")


def image_grid(rows: dict[str, Tensor], captions: list[str], *, min_height: int = 96) -> Image.Image:
    """
    Pictures side by side: one labelled row a model, one captioned column a prompt.

    Args:
        rows (`dict[str, torch.Tensor]`):
            For each label, uint8 images `(K, 3, H, W)`.
        captions (`list[str]`):
            K captions.
        min_height (`int`, *optional*, defaults to `96`):
            Smaller images are enlarged to about this many pixels, by a whole factor.

    Returns:
        `PIL.Image.Image`.
    """
    _, _, height, width = next(iter(rows.values())).shape
    factor = max(1, -(-min_height // height))
    height, width, gap, line = height * factor, width * factor, 6, 16
    left = 8 + 7 * max(len(label) for label in rows)
    grid = Image.new("RGB", (left + len(captions) * (width + gap), line + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        draw.text((left + column * (width + gap), 2), caption[: width // 7], fill="black")
    for row, (label, images) in enumerate(rows.items()):
        top = line + row * (height + gap)
        draw.text((4, top + height // 2 - 6), label, fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((width, height), Image.NEAREST)
            grid.paste(picture, (left + column * (width + gap), top))
    return grid
