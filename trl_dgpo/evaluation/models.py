"""The models of an evaluation: a base, and LoRAs on it, whatever base their own configurations name."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ..backbones import access, load_backbone
from ..policy import read_adapter
from ..tiny import tiny_pipeline_path


def load_with_lora(model: str, lora: str, *, init_kwargs: dict[str, Any] | None = None, **loading) -> Any:
    """
    A pipeline that carries a LoRA.

    A LoRA in PEFT's format keeps the dtype of its file, as in training; of one in diffusers' format alone the pipeline
    makes what it makes of any, which rounds it to the transformer's dtype.

    Args:
        model (`str`):
            Id or folder of the base model, or `"tiny"`.
        lora (`str`):
            Id or folder of the LoRA.
        init_kwargs (`dict`, *optional*):
            See [`~trl_dgpo.backbones.load_backbone`].
        **loading:
            Its `revision` (of the base model), `dtype` and `quantization_config`.

    Returns:
        `diffusers.DiffusionPipeline`: what the trainer takes as `model`.
    """
    from peft import PeftModel

    where = access(init_kwargs or {})
    is_peft = read_adapter(lora, **where) is not None
    source = tiny_pipeline_path() if model == "tiny" else model
    pipeline = load_backbone(source, init_kwargs=init_kwargs, **loading).pipeline
    if is_peft:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, lora, **where)
    else:
        pipeline.load_lora_weights(lora, **where)
    return pipeline


def labelled(loras: list[str], taken: str) -> dict[str, str]:
    """
    Short names of LoRAs: a run's folder or, with it, a checkpoint's.

    Args:
        loras (`list[str]`):
            Folders or ids.
        taken (`str`):
            A name that none may have.

    Returns:
        `dict[str, str]`: LoRA by name.
    """
    labels: dict[str, str] = {}
    for lora in loras:
        path = Path(os.path.normpath(lora))
        label = name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
        number = 1
        while label in labels or label == taken:
            number += 1
            label = f"{name}-{number}"
        labels[label] = lora
    return labels


def model_record(name: str, *, is_lora: bool) -> dict[str, Any]:
    """
    Which model it is: its name and, for a LoRA's folder, a hash of its weights, since training may have gone on in it.

    Args:
        name (`str`):
            Id or folder.
        is_lora (`bool`):
            Whether it has to be a LoRA.

    Returns:
        `dict` with `name` and perhaps `sha256`.

    Raises:
        `ValueError`: if it has to be a LoRA and is a folder without one, or one that is not there.
    """
    path = Path(name)
    files = [path / file for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    files = [file for file in files if file.is_file()]
    if files:
        return {"name": name, "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest()}
    if is_lora and path.exists():
        raise ValueError(
            f"`lora` has {name!r}, in which there is no LoRA: neither adapter_model.safetensors nor "
            "pytorch_lora_weights.safetensors."
        )
    # An id has the form "owner/name"; anything else can only have been meant as a path.
    if is_lora and (path.is_absolute() or len(path.parts) != 2 or name[0] in "~."):
        raise ValueError(f"`lora` has {name!r}, which does not exist. Give an existing folder or an id on the Hub.")
    return {"name": name}


def image_settings(args: Any, quantized: bool) -> dict[str, Any]:
    """
    What decides evaluation pictures besides prompts, noise and weights.

    Args:
        args ([`DGPOConfig`]):
            The configuration.
        quantized (`bool`):
            Whether frozen weights are.

    Returns:
        `dict` that can be written as JSON.
    """
    loading = args.model_init_kwargs or {}
    names = ("height", "width", "eval_num_steps", "eval_guidance_scale", "sampler", "sigmas", "max_sequence_length")
    return {
        **{name: getattr(args, name) for name in (*names, "negative_prompt", "vae_tiling")},
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "quantized": quantized,
        "loading": {name: str(value) for name, value in loading.items() if name not in access(loading)},
    }
