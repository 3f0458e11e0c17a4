"""Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, one file per kind."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .ocr import OCRReward


_EXPORTS = {"OCRReward": ".ocr"}

__all__ = ["OCRReward"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
