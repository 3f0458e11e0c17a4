"""Base of the rewards that carry a model of their own."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .scoring import RewardOutputError


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
        `ValueError`: if `batch_size` is below 1; when called, if the model cannot be loaded.
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
            self._model = self._loaded()
        device = torch.device(self.device or default_device())
        model = self._model.to(device)
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                return self._score(model, pictures, prompts, columns)
        finally:
            if self.offload:
                model.to("cpu")

    def __getstate__(self) -> dict[str, Any]:
        # Weights that were loaded do not travel: the copy loads its own.
        return self.__dict__ | {"_model": None}

    def _loaded(self) -> nn.Module:
        try:
            return self._load().requires_grad_(False).eval()
        except ImportError:
            raise
        except Exception as error:  # no image is to blame: loading it again for each would only take time
            name = getattr(self, "__name__", type(self).__name__)
            raise RewardOutputError(f"The model of reward `{name}` cannot be loaded: {error}") from error

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

    Raises:
        `ValueError`: if the tensor is of another dtype or shape.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"The images are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 and (B, 3, H, W)."
            )
        return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return [image if image.mode == "RGB" else image.convert("RGB") for image in images]


def read_checkpoint(source: str, filename: str) -> dict[str, Any]:
    """
    What a `torch.save`d file of tensors holds. Nothing in it is run.

    Args:
        source (`str`):
            The file, a folder that has it, or the Hub id of a repository that has it.
        filename (`str`):
            Its name in the folder or repository.

    Returns:
        `dict`.

    Raises:
        `FileNotFoundError`: if the folder lacks the file.
        `ValueError`: if the file holds more than tensors in plain containers.
    """
    path = Path(source)
    if path.is_dir():
        path = path / filename
        if not path.is_file():
            raise FileNotFoundError(f"The folder {source!r} has no {filename!r}; give the file's own path.")
    elif not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, filename))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of tensors alone, and what else is in it would be run by loading it. Save its "
            "tensors again with `torch.save` where you trust it, and give that file."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; it must hold a dict of tensors.")
    return checkpoint


def build(make: Callable[[], nn.Module], weights: dict[str, Tensor], source: str) -> nn.Module:
    """
    A module with given weights in float32: exactly its own, none missing and none over. None are drawn before.

    Args:
        make (callable):
            Returns the module.
        weights (`dict[str, torch.Tensor]`):
            Its state dict.
        source (`str`):
            Where they are from, for the error.

    Returns:
        `torch.nn.Module`.

    Raises:
        `ValueError`: if the weights are not the module's; it names those missing, over and of another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = make()
    try:
        module.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights in {source!r} are not those of this reward's model. {error}") from error
    return module


def renamed(name: str, beginnings: dict[str, str], parts: dict[str, str]) -> str:
    """
    A weight's name in another library.

    Args:
        name (`str`):
            Its name.
        beginnings (`dict[str, str]`):
            Beginnings and what they become; the first that fits counts.
        parts (`dict[str, str]`):
            Parts anywhere in the name and what they become.

    Returns:
        `str`.
    """
    for old, new in beginnings.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts.items():
        name = name.replace(old, new)
    return name
