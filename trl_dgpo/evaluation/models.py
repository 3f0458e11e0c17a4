"""What is evaluated: a base, and LoRAs on it, whatever base their own configurations name; and what it is known by."""

import hashlib
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..backbones import access, family, family_of, load_pipeline, read_index
from ..policy import read_adapter
from ..tiny import BUNDLED, pipeline_source


def load_with_lora(model: str, lora: str, *, init_kwargs: dict[str, Any] | None = None, **loading) -> Any:
    """
    A pipeline that carries a LoRA.

    A LoRA in PEFT's format keeps the dtype of its file, as in training; of one in diffusers' format alone the pipeline
    makes what it makes of any, which rounds it to the denoiser's dtype.

    Args:
        model (`str`):
            Id or folder of the base model, or `"tiny"`.
        lora (`str`):
            Id or folder of the LoRA.
        init_kwargs (`dict`, *optional*):
            See [`~trl_dgpo.backbones.load_pipeline`].
        **loading:
            Its `revision` (of the base model), `dtype` and `quantization_config`.

    Returns:
        `diffusers.DiffusionPipeline`: what the trainer takes as `model`.
    """
    from peft import PeftModel

    where = access(init_kwargs or {})
    is_peft = read_adapter(lora, **where) is not None
    pipeline = load_pipeline(pipeline_source(model), init_kwargs=init_kwargs, **loading)
    if is_peft:
        name = family_of(pipeline).DENOISER
        setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), lora, **where))
    else:
        pipeline.load_lora_weights(lora, **where)
    return pipeline


def check_models(model: str, loras: list[str], *, init_kwargs: dict[str, Any] | None = None) -> None:
    """
    Find the models, and load the LoRAs onto the base's denoiser without its weights, which takes seconds.

    So what is missing or does not fit is told before the base has been drawn with for hours.

    Args:
        model (`str`):
            Id or folder of the base model, or `"tiny"`; a LoRA may stand for its base and itself where there are no
            others.
        loras (`list[str]`):
            Ids or folders of the LoRAs.
        init_kwargs (`dict`, *optional*):
            See [`~trl_dgpo.backbones.load_pipeline`]; its `revision` is the base model's.

    Raises:
        `ValueError`: if there is no such model, it is a LoRA that others shall go onto, or a LoRA cannot be read or
            does not fit.
    """
    where, revision = access(init_kwargs or {}), (init_kwargs or {}).get("revision")
    for lora in loras:
        model_record(lora, is_lora=True)  # refuses what is none
    if model != BUNDLED and read_adapter(model, **where) is not None:
        if loras:
            raise ValueError(f"`model` is {model!r}, a LoRA itself. Give its base as `model`, and it among `lora`.")
        return
    source = pipeline_source(model)
    index = read_index(source, revision, where)
    name = family([index["_class_name"]], f"{model!r}, a {index['_class_name']}").DENOISER
    library, class_name = index[name]
    denoiser_class = getattr(import_module(library), class_name)
    pipeline_class = getattr(import_module(library), index["_class_name"])
    config = denoiser_class.load_config(source, subfolder=name, revision=revision, **where)
    for lora in loras:
        with torch.device("meta"):
            denoiser = denoiser_class.from_config(config)
        try:
            given, taken = _put_on(denoiser, name, pipeline_class, lora, where)
        except Exception as error:  # PEFT, diffusers, safetensors and the Hub raise what they like
            reason = " ".join(str(error).split())
            raise ValueError(f"`lora` has {lora!r}, which cannot be put onto {model!r}: {reason[:400]}") from error
        if given != taken or not given:
            raise ValueError(
                f"`lora` has {lora!r}, which does not fit {model!r}: it has {given} tensors for a {name}, and "
                f"{taken} are needed for the same layers here. Give the base that it was trained on."
            )


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
        path = Path(os.path.abspath(lora))  # "." and "checkpoint-5" too have a name and a folder above
        label = name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
        number = 1
        while label in labels or label == taken:
            number += 1
            label = f"{name}-{number}"
        labels[label] = lora
    return labels


def model_record(
    name: str, *, is_lora: bool, revision: str | None = None, cache_dir: str | None = None
) -> dict[str, Any]:
    """
    Which model it is: its name, and what changes when training goes on under that name.

    That is for a LoRA's folder a hash of its weights, for a pipeline's the sizes and times of the denoiser's files
    (hashing gigabytes would take minutes in every call; a copy has to keep the times, as `cp -p` does), and for an id
    the commit in the Hub's cache.

    Args:
        name (`str`):
            Id or folder.
        is_lora (`bool`):
            Whether it has to be a LoRA.
        revision (`str`, *optional*):
            Of an id.
        cache_dir (`str`, *optional*):
            Where the Hub's cache is, if not at its place.

    Returns:
        `dict` with `name` and perhaps `sha256`, `transformer`, `unet` or `commit`.

    Raises:
        `ValueError`: if it has to be a LoRA and is a folder without one, or one that is not there.
    """
    path = Path(name)
    files = [path / file for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    files = [file for file in files if file.is_file()]
    if files:
        return {"name": name, "sha256": _sha256(files[0])}
    if is_lora and path.exists():
        raise ValueError(
            f"`lora` has {name!r}, in which there is no LoRA: neither adapter_model.safetensors nor "
            "pytorch_lora_weights.safetensors."
        )
    for denoiser in ("transformer", "unet"):
        if weights := sorted((path / denoiser).glob("*.safetensors")):
            return {"name": name, denoiser: {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in weights}}
    # An id has the form "owner/name"; anything else can only have been meant as a path.
    is_id = not path.exists() and not path.is_absolute() and len(path.parts) == 2 and name[0] not in "~."
    if is_lora and not is_id:
        raise ValueError(f"`lora` has {name!r}, which does not exist. Give an existing folder or an id on the Hub.")
    commit = _cached_commit(name, revision, cache_dir) if is_id else None
    return {"name": name} if commit is None else {"name": name, "commit": commit}


def reward_record(name: str) -> dict[str, Any]:
    """
    Which reward it is: its name and, for a function in a file or a module, a hash of that file.

    Args:
        name (`str`):
            A reward that has been taken by [`~trl_dgpo.rewards.get_reward`].

    Returns:
        `dict` with `name` and perhaps `sha256`.
    """
    place = name.rpartition(":" if ":" in name else ".")[0]
    file = Path(place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None) or "")
    return {"name": name, "sha256": _sha256(file)} if file.is_file() else {"name": name}


def image_settings(args: Any, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """
    What decides evaluation pictures besides prompts, noise and weights.

    Args:
        args ([`DGPOConfig`]):
            The configuration.
        quantization (`dict`, *optional*):
            How frozen weights are quantised.

    Returns:
        `dict` that can be written as JSON.
    """
    loading = args.model_init_kwargs or {}
    told = {} if args.embedded_guidance is None else {"embedded_guidance": args.embedded_guidance}
    names = ("height", "width", "eval_num_steps", "eval_guidance_scale", "sampler", "sigmas", "max_sequence_length")
    return {
        **{name: getattr(args, name) for name in (*names, "negative_prompt", "vae_tiling")},
        **told,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "quantization": quantization,
        "loading": {name: str(value) for name, value in loading.items() if name not in access(loading)},
    }


def _put_on(denoiser: Any, name: str, pipeline_class: type, lora: str, where: dict[str, Any]) -> tuple[int, int]:
    """Tensors that a LoRA has, and those of it in a denoiser that now carries it. Raises where shapes differ."""
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights which are not there are not written, and have no name
        if (adapter := read_adapter(lora, **where)) is not None:
            with torch.device("meta"):
                model = get_peft_model(denoiser, adapter.config)
            set_peft_model_state_dict(model, adapter.weights)
            return len(adapter.weights), len(get_peft_model_state_dict(model))
        blocks = {"unet_config": denoiser.config} if name == "unet" else {}  # to read other tools' names of them
        weights = pipeline_class.lora_state_dict(lora, **blocks, **where)
        weights, alphas = weights if isinstance(weights, tuple) else (weights, None)  # a UNet's come apart
        given = [key for key in weights if key.startswith(f"{name}.") and not key.endswith(".alpha")]
        if not given:
            return 0, 0
        denoiser.load_lora_adapter(weights, prefix=name, network_alphas=alphas, adapter_name="default")
        return len(given), len(get_peft_model_state_dict(denoiser))


def _cached_commit(name: str, revision: str | None, cache_dir: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("model_index.json", "adapter_config.json", "pytorch_lora_weights.safetensors"):
        cached = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str):  # .../snapshots/COMMIT/file
            return Path(cached).parent.name
    return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
