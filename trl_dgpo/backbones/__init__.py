"""
Backbones: one file per family of diffusion models, and nothing else in the package knows a pipeline.

A backbone turns prompts into conditioning (`encode`), noise into clean latents (`sample`), latents into images
(`decode`) and noised latents into predictions (`predict`), and says what its family is trained on (`noise`, `target`,
`sigmas`, `LORA_TARGETS`). All families answer to the same names, so that a trainer takes any of them; how to add one
is told in docs/new_backbone.md.
"""

import importlib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .base import Backbone


# Of each pipeline what it is of, and the file and class of its backbone.
SUPPORTED_PIPELINES = {
    "StableDiffusion3Pipeline": ("Stable Diffusion 3, 3.5 Medium and 3.5 Large", "sd3", "SD3Backbone"),
    "StableDiffusionPipeline": ("Stable Diffusion 1 and 2", "sd15", "SD15Backbone"),
    "StableDiffusionXLPipeline": ("Stable Diffusion XL", "sdxl", "SDXLBackbone"),
    "FluxPipeline": ("FLUX.1 dev and schnell", "flux", "FluxBackbone"),
    "ZImagePipeline": ("Z-Image and Z-Image-Turbo", "z_image", "ZImageBackbone"),
}


def load_backbone(
    model: "str | os.PathLike | DiffusionPipeline",
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    denoiser: torch.nn.Module | None = None,
    **options,
) -> "Backbone":
    """
    Backbone of a model given by name, by folder or as a pipeline.

    Args:
        model, revision, dtype, init_kwargs, quantization_config, denoiser:
            See [`load_pipeline`].
        **options:
            Arguments of the family's backbone, such as `sampler`, `max_sequence_length` and `offload_text_encoders` of
            [`~trl_dgpo.backbones.base.Backbone`].

    Raises:
        `TypeError`, `ValueError`: as [`load_pipeline`], and what the backbone refuses.
    """
    pipeline = load_pipeline(
        model,
        revision=revision,
        dtype=dtype,
        init_kwargs=init_kwargs,
        quantization_config=quantization_config,
        denoiser=denoiser,
    )
    return family_of(pipeline)(pipeline, **options)


def load_pipeline(
    model: "str | os.PathLike | DiffusionPipeline",
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    denoiser: torch.nn.Module | None = None,
) -> "DiffusionPipeline":
    """
    Pipeline of a family that there is a backbone for.

    Args:
        model (`str`, `os.PathLike` or `diffusers.DiffusionPipeline`):
            Id on the Hub, folder in diffusers' layout (components that its `model_index.json` lists as null, such as a
            left-out third text encoder, are left out), or a pipeline, which is used as it is, not copied.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`torch.dtype`, *optional*):
            Dtype of the denoiser and the text encoders. Without it a named model is loaded in float32 and a
            pipeline keeps its own. The VAE of a named model stays in float32 whatever is asked for, since it loses
            quality below; that of a pipeline is never touched.
        init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `DiffusionPipeline.from_pretrained`, such as `variant`, or a component by its name.
        quantization_config (`~diffusers.BitsAndBytesConfig` or `~transformers.BitsAndBytesConfig`, *optional*):
            How the denoiser of a named model is quantised.
        denoiser (`torch.nn.Module`, *optional*):
            What stands in the place of a named model's transformer or UNet.

    Raises:
        `TypeError`: if `model` or `quantization_config` is none of these.
        `ValueError`: if nothing is found under this name, if it is of a family that is not supported, or if loading
            arguments are given with a pipeline. All are found out before any weights are read.
    """
    from diffusers import DiffusionPipeline

    if isinstance(model, DiffusionPipeline):
        family_of(model)
        loading = {"revision": revision, "init_kwargs": init_kwargs, "quantization_config": quantization_config}
        if given := [name for name, value in loading.items() if value]:
            raise ValueError(f"{given} say how a model is loaded, but `model` is a pipeline that is loaded already.")
        for name, component in model.components.items():
            if dtype is not None and name != "vae" and isinstance(component, torch.nn.Module):
                component.to(dtype)
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"`model` is a {type(model).__name__}; it must be an id on the Hub, a folder or a diffusers pipeline."
        )

    index = read_index(model, revision, access(init_kwargs or {}))
    backbone_class = family([index["_class_name"]], f"{os.fspath(model)!r}, a {index['_class_name']}")
    arguments = {name: None for name, entry in index.items() if entry == [None, None]} | backbone_class.LOADING
    if denoiser is not None:
        arguments[backbone_class.DENOISER] = denoiser
    if quantization_config is not None:
        arguments["quantization_config"] = _quantization(quantization_config, backbone_class.DENOISER)
    # As a string: diffusers keeps the name in its configuration, and a `Path` there cannot be written to JSON.
    return DiffusionPipeline.from_pretrained(
        os.fspath(model),
        revision=revision,
        **{"dtype": {"default": dtype or torch.float32, "vae": torch.float32}, **arguments, **(init_kwargs or {})},
    )


def _quantization(config: Any, denoiser: str) -> Any:
    """diffusers' form of a quantisation of the denoiser alone."""
    import transformers
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig

    if isinstance(config, transformers.BitsAndBytesConfig):  # as TRL's `get_quantization_config` makes it
        names = inspect.signature(BitsAndBytesConfig.__init__).parameters.keys() - {"self", "kwargs"}
        config = BitsAndBytesConfig(**{name: v for name, v in config.to_dict().items() if name in names})
    if not isinstance(config, BitsAndBytesConfig):
        raise TypeError(
            f"`quantization_config` is a {type(config).__name__}; it must be a `BitsAndBytesConfig` of diffusers or "
            "transformers."
        )
    return PipelineQuantizationConfig(quant_mapping={denoiser: config})


def access(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say how a file is got from the Hub, whatever the file."""
    return {name: init_kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in init_kwargs}


def read_index(model: str | os.PathLike, revision: str | None, access: dict[str, Any]) -> dict:
    """
    A pipeline's `model_index.json`, from a folder or from the Hub.

    Raises:
        `ValueError`: if nothing is found under this name.
    """
    from diffusers import DiffusionPipeline

    path = Path(model)
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"`model`={os.fspath(model)!r} has no model_index.json. A folder must be a whole pipeline, as "
                "`pipeline.save_pretrained(folder)` writes it; single files and LoRA folders are not pipelines."
            )
    # A Hub id has the form "name" or "owner/name"; anything else can only have been meant as a path.
    elif isinstance(model, os.PathLike) or path.is_absolute() or len(path.parts) > 2 or os.fspath(model)[:1] in "~.":
        raise ValueError(f"`model`={os.fspath(model)!r} does not exist. Give an existing folder or an id on the Hub.")
    try:
        return DiffusionPipeline.load_config(model, revision=revision, **access)
    except OSError as error:
        raise ValueError(
            f"`model`={os.fspath(model)!r} is not a folder here, and the Hub gave no pipeline of this id. Check the "
            "spelling, the network, and for gated models `hf auth login`."
        ) from error


def family(class_names: list[str], what: str) -> "type[Backbone]":
    """
    The backbone of a pipeline, by the names of its class and of those that it is derived from, nearest first.

    Raises:
        `ValueError`: if none of them is supported.
    """
    for name in class_names:
        if name in SUPPORTED_PIPELINES:
            _, module, backbone = SUPPORTED_PIPELINES[name]
            return getattr(importlib.import_module(f".{module}", __name__), backbone)
    supported = "; ".join(f"{name} ({models})" for name, (models, *_) in SUPPORTED_PIPELINES.items())
    raise ValueError(f"`model` is {what}, which is not supported. Supported: {supported}.")


def family_of(pipeline: "DiffusionPipeline") -> "type[Backbone]":
    """
    The backbone of a pipeline's class.

    Raises:
        `ValueError`: if it is not supported.
    """
    return family([cls.__name__ for cls in type(pipeline).__mro__], f"a {type(pipeline).__name__}")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy for which the host does not wait until the device has done its work, as from pageable memory it would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
