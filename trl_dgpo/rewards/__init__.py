"""
Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, one file per kind.

A new one is a file of its own and a line in each table below.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
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
    "ocr-penalize-extra": ("OCRReward", {"penalize_extra": True}),
    "ocr-recognition": ("OCRReward", {"recognition_only": True}),
    "pickscore": ("PickScore", {}),
}

REWARD_FORMS = (
    f"a name ({', '.join(BUILT_IN)}), a function in a module (package.module:function) or in a file "
    "(path/to/rewards.py:function), or the address of a served reward (http://...)"
)

__all__ = [
    "BUILT_IN",
    "REWARD_FORMS",
    "AestheticScore",
    "CLIPScore",
    "ChatJudge",
    "CountingReward",
    "DeQAScore",
    "GenEvalReward",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "OCRReward",
    "PickScore",
    "RemoteReward",
    "UnifiedReward",
    "get_reward",
]


def get_reward(name: str, *, normalize: bool = False) -> Callable:
    """
    A reward by what it is called on the command line.

    Args:
        name (`str`):
            One of `BUILT_IN`, a function in a module (`package.module:function`, or `package.module.function` as TRL
            writes it) or in a file (`path/to/rewards.py:function`), or the address of a served reward (`http://...`).
        normalize (`bool`, *optional*, defaults to `False`):
            A built-in one on the scale of the reference's training, where there is one; else on the scale that papers
            print.

    Returns:
        A reward.

    Raises:
        `ImportError`: if the module cannot be imported.
        `ValueError`: if there is none of that name.
    """
    if name in BUILT_IN:
        export, arguments = BUILT_IN[name]
        reward_class = __getattr__(export)
        if normalize and "normalize" in inspect.signature(reward_class).parameters:
            arguments = arguments | {"normalize": True}
        return reward_class(**arguments)
    if name.startswith(("http://", "https://")):
        return __getattr__("RemoteReward")(name)
    place, _, function = name.rpartition(":" if ":" in name else ".")
    if not place:
        raise ValueError(f"There is no reward {name!r}. Give {REWARD_FORMS}.")
    module = _module(place)
    if not hasattr(module, function):
        raise ValueError(f"{name!r} is asked for as a reward, but {place!r} has no {function!r}.")
    return getattr(module, function)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # an installed command does not look where it is called
        return import_module(place)
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"There is no file {place!r} to take a reward from.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where pickle looks for what the file defines
    spec.loader.exec_module(module)
    return module
