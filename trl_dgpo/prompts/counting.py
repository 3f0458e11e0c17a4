"""Prompts that ask for two to ten things of one class, in GenEval's words: the task of GPO (arXiv 2505.11070)."""

import random
from typing import Any, Literal

from .geneval import counted


# Whole, separate things that detectors trained on COCO find well: no people, nothing that is a part of something else,
# comes in heaps (books, carrots) or is easily taken for its neighbour in the list (fork and spoon, cup and bowl). A
# quarter of each kind of thing is kept for the test.
_CLASSES = {
    "train": (
        *("cat", "horse", "cow", "elephant", "giraffe", "bird"),
        *("airplane", "bus", "motorcycle", "fire hydrant", "parking meter", "bench"),
        *("suitcase", "umbrella", "frisbee", "skateboard", "surfboard", "backpack"),
        *("apple", "pizza", "cake", "bottle", "wine glass", "bowl"),
        *("laptop", "computer mouse", "cell phone", "tv", "toilet", "clock"),
    ),
    "test": (
        *("dog", "zebra"),
        *("bicycle", "stop sign"),
        *("kite", "tennis racket"),
        *("donut", "hot dog"),
        *("teddy bear", "vase"),
    ),
}
_COUNTS = range(2, 11)


def counting_prompts(
    split: Literal["train", "test"], num_prompts: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """
    A number of things of one class.

    The splits share no class: what was practised on cats is measured on dogs, so that
    it is the counting that is measured.
    All prompts differ.

    Args:
        split (`str`):
            `"train"` or `"test"`.
        num_prompts (`int`, *optional*):
            Number of rows. All 270 of `"train"` or 90 of `"test"` if not given.
        seed (`int`, *optional*, defaults to `0`):
            Another seed, another order, and other rows where not all are asked for.

    Returns:
        `list[dict]`: rows such as `{"prompt": "a photo of two cats", "tag": "count 2", "object": "cat", "count": 2}`.

    Raises:
        ValueError: an unknown split, or a number of prompts outside 1 to 270 or 1 to 90.
    """
    if split not in _CLASSES:
        raise ValueError(f'`split` is {split!r}; it must be "train" or "test".')
    pairs = [(name, count) for name in _CLASSES[split] for count in _COUNTS]
    if num_prompts is None:
        num_prompts = len(pairs)
    if not 1 <= num_prompts <= len(pairs):
        raise ValueError(f"`num_prompts` is {num_prompts}; it must be between 1 and {len(pairs)} for {split!r}.")
    random.Random(f"counting/{split}/{seed}").shuffle(pairs)
    return [
        {"prompt": f"a photo of {counted(name, count)}", "tag": f"count {count}", "object": name, "count": count}
        for name, count in pairs[:num_prompts]
    ]
