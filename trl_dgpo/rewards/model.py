"""Base of the rewards that carry a model of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class ModelReward:
    """
    Reward by a model.

    The model is loaded at the first call, frozen, onto `device`. Pictures go through it under `torch.inference_mode`,
    outside autocast. A subclass says what the model is (`_load`) and what it makes of pictures (`_score`).

    Args:
        device (`str` or `torch.device`, *optional*):
            Where the model runs; the process's GPU if there is one, else the CPU.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of its weights.
        batch_size (`int`, *optional*, defaults to `16`):
            Pictures per forward.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the model on the CPU between calls: a round then pays two copies for the memory that training gets.

    Raises:
        `ValueError`: if `batch_size` is below 1.
    """

    input_type = "pt"

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        offload: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.offload = offload
        self._model: nn.Module | None = None

    def __call__(
        self, prompts: list[str], completions: "Tensor | Sequence[Image.Image]", **columns: Any
    ) -> list[float | None]:
        pictures = as_pictures(completions)
        if len(pictures) != len(prompts):
            raise ValueError(f"There are {len(pictures)} images for {len(prompts)} prompts; give one prompt each.")
        if not pictures:
            return []
        if self._model is None:
            self._model = self._load().requires_grad_(False).eval()
        device = torch.device(self.device or default_device())
        model = self._model.to(device)
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                return self._score(model, pictures, prompts, columns)
        finally:
            if self.offload:
                model.to("cpu")

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not travel: the copy loads its own.
        return self.__dict__ | {"_model": None}

    def _load(self) -> nn.Module:
        """The model, on the CPU or wherever it was made."""
        raise NotImplementedError

    def _score(
        self, model: nn.Module, pictures: list[Image.Image], prompts: list[str], columns: dict[str, Any]
    ) -> list[float | None]:
        """One number a picture."""
        raise NotImplementedError

    def _batches(self, items: Sequence) -> Iterator[Sequence]:
        return (items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size))


def default_device() -> str:
    """The process's GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_pictures(images: "Tensor | Sequence[Image.Image]") -> list[Image.Image]:
    """
    Images in either form of the contract as RGB pictures.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)` or sequence of `PIL.Image.Image`):
            uint8 images, or pictures.

    Returns:
        `list[PIL.Image.Image]`.
    """
    if isinstance(images, Tensor):
        return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return [image.convert("RGB") for image in images]
