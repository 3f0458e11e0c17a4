"""Counting: is there the number of objects that a prompt asks for?"""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..coco import COCO_CLASSES
from .detect import load_detector
from .model import ModelReward, as_pictures
from .scoring import RewardOutputError


class CountingReward(ModelReward):
    r"""
    Reward for numbers: with `n` objects found and `k` asked for

    $$ r = 1[n = k], \qquad r_{\text{relaxed}} = \max(0, 1 - |n - k| / k) $$

    both in [0, 1]. GPO (arXiv 2505.11070) trains on counting; its detector's version, threshold and relaxed formula
    were not at hand, so these are ours: the relaxed one is Flow-GRPO's term for numbers (arXiv 2505.05470), bounded.
    With a large `k` the exact reward is the same for most groups, which then teach nothing: train on the relaxed one
    and evaluate with the exact one. `counting/exact_match` and `counting/absolute_error` are logged beside either.

    Reads the columns `object` (a class name) and `count`. A row without a count gets `None`.

    Model: `PekingU/rtdetr_r50vd` (43 M parameters, Apache-2.0 by its card, not verified); any other of
    [`~trl_dgpo.rewards.detect.load_detector`], e.g. `hustvl/yolos-tiny`, which is quicker and finds less. A number
    belongs to its detector: state it.

    Args:
        relaxed (`bool`, *optional*, defaults to `False`):
            The relaxed reward, else the exact one.
        detector (`str` or `nn.Module`, *optional*, defaults to `"PekingU/rtdetr_r50vd"`):
            Hub id or folder, or a module in the form of [`~trl_dgpo.rewards.detect.Detector`].
        threshold (`float`, *optional*, defaults to `0.5`):
            Objects of a larger score count.
        **options:
            `device`, `dtype`, `batch_size` and `offload`, see [`~trl_dgpo.rewards.model.ModelReward`].

    Raises:
        `ValueError`: if `threshold` is outside [0, 1).
    """

    def __init__(
        self,
        relaxed: bool = False,
        *,
        detector: str | nn.Module = "PekingU/rtdetr_r50vd",
        threshold: float = 0.5,
        **options: Any,
    ):
        super().__init__(**options)
        if not 0 <= threshold < 1:
            raise ValueError(f"`threshold` is {threshold}; it must be at least 0 and below 1.")
        self.__name__ = "counting_relaxed" if relaxed else "counting"
        self.relaxed = relaxed
        self.detector = detector
        self.threshold = threshold

    def __call__(
        self,
        prompts: list[str],
        completions: Tensor | Sequence[Image.Image],
        object: Sequence[str | None],
        count: Sequence[int | None],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if not len(prompts) == len(completions) == len(object) == len(count):
            raise ValueError(
                f"There are {len(object)} `object`, {len(count)} `count` and {len(prompts)} prompts for "
                f"{len(completions)} images; give one each."
            )
        asked = [i for i, number in enumerate(count) if number is not None]
        for i in asked:
            _check(object[i], count[i])
        pictures = as_pictures(completions)
        numbers = super().__call__(
            [prompts[i] for i in asked], [pictures[i] for i in asked], names=[object[i] for i in asked]
        )
        rewards: list[float | None] = [None] * len(count)
        for i, number in zip(asked, numbers, strict=True):
            error = abs(number - count[i])
            rewards[i] = max(0.0, 1 - error / count[i]) if self.relaxed else float(error == 0)
            if log_metric is not None:
                log_metric("counting/exact_match", float(error == 0))
                log_metric("counting/absolute_error", error)
        return rewards

    def _load(self) -> nn.Module:
        if isinstance(self.detector, str):
            return load_detector(self.detector, dtype=self.dtype)
        return self.detector

    def _score(
        self, model: nn.Module, pictures: list[Image.Image], prompts: list[str], columns: dict[str, Any]
    ) -> list[float]:
        """How many there are of each picture's class."""
        found = [one for batch in self._batches(pictures) for one in model(batch, self.threshold)]
        labels = [COCO_CLASSES.index(name) for name in columns["names"]]
        return [
            int(((one.labels == label) & (one.scores > self.threshold)).sum())
            for one, label in zip(found, labels, strict=True)
        ]


def _check(name: str | None, count: int) -> None:
    if name not in COCO_CLASSES:
        raise RewardOutputError(f"`object` is {name!r}; it must be one of `trl_dgpo.coco.COCO_CLASSES`.")
    if not isinstance(count, int) or count < 1:
        raise RewardOutputError(f"`count` of {name!r} is {count!r}; it must be a whole number from 1 on, or None.")
