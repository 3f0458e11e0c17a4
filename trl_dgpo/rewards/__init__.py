"""
Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, one file per kind.

A new one is a file of its own and a line in each table below.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .chat import ChatJudge, DeQAScore, UnifiedReward
    from .clip import AestheticScore, CLIPScore, HPSv2, PickScore
    from .counting import CountingReward
    from .geneval import GenEvalReward
    from .image_reward import ImageReward
    from .jpeg import JPEGCompressibility, JPEGIncompressibility
    from .ocr import OCRReward
    from .remote import RemoteReward


_EXPORTS = {
    "AestheticScore": ".clip",
    "CLIPScore": ".clip",
    "ChatJudge": ".chat",
    "CountingReward": ".counting",
    "DeQAScore": ".chat",
    "GenEvalReward": ".geneval",
    "HPSv2": ".clip",
    "ImageReward": ".image_reward",
    "JPEGCompressibility": ".jpeg",
    "JPEGIncompressibility": ".jpeg",
    "OCRReward": ".ocr",
    "PickScore": ".clip",
    "RemoteReward": ".remote",
    "UnifiedReward": ".chat",
}

# Names on the command line: those that need nothing but themselves.
BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "aesthetic": ("AestheticScore", {}),
    "clip-score": ("CLIPScore", {}),
    "counting": ("CountingReward", {}),
    "counting-relaxed": ("CountingReward", {"relaxed": True}),
    "geneval": ("GenEvalReward", {}),
    "geneval-bounded": ("GenEvalReward", {"variant": "bounded"}),
    "geneval-reference": ("GenEvalReward", {"variant": "reference"}),
    "geneval-strict": ("GenEvalReward", {"variant": "strict"}),
    "hpsv2": ("HPSv2", {}),
    "image-reward": ("ImageReward", {}),
    "jpeg-compressibility": ("JPEGCompressibility", {}),
    "jpeg-incompressibility": ("JPEGIncompressibility", {}),
    "ocr": ("OCRReward", {}),
    "ocr-recognition": ("OCRReward", {"recognition_only": True}),
    "pickscore": ("PickScore", {}),
}

__all__ = [*_EXPORTS, "BUILT_IN", "get_reward"]


def get_reward(name: str, *, normalize: bool = False) -> Any:
    """
    A built-in reward by its name on the command line.

    Args:
        name (`str`):
            One of `BUILT_IN`.
        normalize (`bool`, *optional*, defaults to `False`):
            On the scale of the reference's training, where there is one; else on the scale that papers print.

    Returns:
        A reward.

    Raises:
        `ValueError`: if there is none of that name.
    """
    if name not in BUILT_IN:
        raise ValueError(f"There is no reward {name!r}; there are {', '.join(BUILT_IN)}.")
    export, arguments = BUILT_IN[name]
    reward_class = __getattr__(export)
    if normalize and "normalize" in inspect.signature(reward_class).parameters:
        arguments = arguments | {"normalize": True}
    return reward_class(**arguments)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
