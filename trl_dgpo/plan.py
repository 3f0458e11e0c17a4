r"""
What a run needs of a GPU's memory, and what fits, computed from configurations alone: no weights are read.

Counted are the bytes of one process. \( N \) and \( T \) are the tokens of an image and of its prompt, \( J = N
+ T \), \( W \) is the width, \( H \) the heads, \( r \) the LoRA's rank and \( c \) the bytes of a number
in the forward, 2 under autocast and else 4.

- **Weights**: the transformer in the dtype that it is loaded in, or in 4 bits (half a byte a weight of a linear
  layer, and 4 bytes for 64 of them); the VAE in float32; the text encoders, while they encode or always.
- **Training**: trained weights in float32, as much again for each view (`ema`, `old`, ...), for the gradients and, on
  several GPUs, for DDP's buckets of them; the optimiser's moments, 8 or 2 bytes a weight; 2 bytes a weight for the
  copies that autocast makes. Where several LoRAs are trained in turn (TDM-R1), weights, buckets and moments are those
  of all, gradients and copies those of one.
- **Data**: `x0` in float32 for each image of the round, conditioning for each prompt, one noise a group and level,
  and for the KL term one prediction an image and level of an optimiser step, or for TDM-R1's student, if that is more,
  the directions in which it moves.
- **A forward without gradient**, a row: what is alive in the last feed-forward, \( c W (12 N + 2 T) \), or in an
  attention, \( c W (7 N + 10 T) \) and under autocast \( W (4 N + 3 T) \), if that is more; \( 4 W J \) beside, \( 4
  W N \) for a second attention, and the conditioning. Guidance makes two rows of an image, in the update too where
  the guided prediction is what is trained.
- **Saved activations**, a row and block, with a LoRA on the attention. Norms: \( 8 W J \). Projections: \( 2 c
  W J \) for what goes into them (\( 4 c W J \) under autocast, which casts it anew for queries, keys and values)
  and \( 4 c r J \) inside the LoRA. Feed-forward: \( 4 c W J \). Attention: \( 4 c W J + 4 H J \), and for queries
  and keys before a norm of their own \( 8 W J \), 12 under autocast. The image's second attention in SD3.5-Medium
  saves once more what an attention does. A network that is trained as a whole saves 1.75 times as much. With gradient
  checkpointing each block saves \( c W J \), and one at a time the rest. At the sizes of SD3 and SD3.5 this is within
  3 % of a count layer by layer, and within 5 % for a whole network; a LoRA on other layers saves more.
- **The backward's own**, a row: \( W (c (8 N + T) + 4 N + c T) \), the last two terms under autocast, and the
  conditioning; less for a whole network.
- **Decoding**, an image of a slice: three times the largest feature map that enters a block, in float32.
- **An allowance** of 1 GiB for the CUDA context and a tenth of the rest for fragments and the workspaces of kernels.

A run needs the largest of its phases, not their sum. Attention is taken to be a kernel that keeps no matrix of \( J
\times J \), and layer norms to compute in float32, which is autocast's rule on CUDA. Encoding one prompt costs
little beside the encoders and is left to the allowance. Reward models on the GPU are not counted.
"""

import copy
import importlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .backbones import access, family, read_index
from .backbones.base import DECODED_PIXELS
from .backbones.sd3 import SD3Backbone
from .policy import lora_config
from .tiny import BUNDLED, pipeline_source


GIB = 2**30
PHASES = ("encode", "rollout", "decode", "no-grad", "update")
CONTEXT = GIB  # CUDA's own, with its libraries
SLACK = 0.1  # of the rest: fragments of the allocator, workspaces of kernels
BYTES_PER_WEIGHT = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0}
QUANTISED_BLOCK = 64  # weights that share a float32 scale
WHOLE_NETWORK = 1.75  # what training it saves, in what training a LoRA saves
# What is tried to need less, and at what cost. A batch size is cut to what its phases allow; an update needs more than
# a forward of as many rows, so that the rollout's batch alone decides on those without gradient.
_BATCH_SIZES = {
    "decode_batch_size": (("decode",), "nothing"),
    "per_device_train_batch_size": (("update",), "a forward more a level, once a group is cut"),
    "sample_batch_size": (("rollout", "no-grad"), "nothing while the GPU is busy"),
}
_SWITCHES = {  # the cheapest first
    "offload_reference": (True, "copies to the CPU and back"),
    "offload_text_encoders": (True, "moving them, where a prompt is new"),
    "precompute_prompt_embeds": (True, "all prompts are encoded before the first step"),
    "merge_adapter": (False, "the LoRA's own layers in rollouts"),
    "gradient_checkpointing": (True, "one more forward for each backward"),
    "optim": ("adamw_bnb_8bit", "rounded moments (bitsandbytes)"),
    "load_in_4bit": (True, "rounded frozen weights, slower layers"),
    "vae_tiling": (True, "other pixels where tiles meet"),
}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class ModelSizes:
    """
    Numbers of a model that memory depends on, read once by [`read_model`].

    Args:
        name (`str`):
            Id, folder or `"tiny"`.
        transformer (`dict[str, Any]`), vae (`dict[str, Any]`):
            Their configurations.
        weights (`int`), linear_weights (`int`):
            Weights and buffers of the transformer, and those of them that 4-bit loading quantises.
        trained (`int`):
            Weights that are trained.
        rank (`int`), adapted_weights (`int`):
            The LoRA's rank and the weights of the layers that it adapts; 0 where everything is trained.
        goes_on (`bool`):
            Whether training goes on from a LoRA, which then is a part of the base.
        vae_weights (`int`), text_weights (`int`):
            Weights of the VAE and of the text encoders.
        text_tokens (`int`):
            Tokens of a prompt, of all encoders.
    """

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    weights: int
    linear_weights: int
    trained: int
    rank: int
    adapted_weights: int
    goes_on: bool
    vae_weights: int
    text_weights: int
    text_tokens: int

    @property
    def width(self) -> int:
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of an image's latent."""
        patch = self.vae_scale * self.transformer["patch_size"]
        for name, size in (("resolution", height), ("width", width)):
            if size % patch or not patch <= size <= patch * self.transformer["pos_embed_max_size"]:
                raise ValueError(
                    f"`{name}` is {size}; this model takes multiples of {patch} from {patch} to "
                    f"{patch * self.transformer['pos_embed_max_size']} pixels."
                )
        return self.transformer["in_channels"], height // self.vae_scale, width // self.vae_scale


@dataclass(frozen=True)
class Part:
    """
    One line of a plan.

    Args:
        name (`str`), bytes (`int`), formula (`str`):
            What it is, how much, and where the number comes from.
        phases (`tuple[str, ...]`):
            When it is there, among `PHASES`.
    """

    name: str
    bytes: int
    formula: str
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class MemoryPlan:
    """
    Memory of a run on one GPU.

    Args:
        model (`str`):
            The model's name.
        args ([`DGPOConfig`]), quantized (`bool`):
            What is planned.
        parts (`tuple[Part, ...]`):
            Everything that is counted but the allowance.
    """

    model: str
    args: Any
    quantized: bool
    parts: tuple[Part, ...]

    def allowance(self, phase: str) -> int:
        """CUDA's context and the allocator's slack in a phase."""
        return CONTEXT + math.ceil(SLACK * self.counted(phase))

    def counted(self, phase: str) -> int:
        """Bytes of a phase without the allowance."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    def total(self, phase: str | None = None) -> int:
        """Bytes that a phase needs, or the run: those of its largest phase."""
        phase = self.peak_phase if phase is None else phase
        return self.counted(phase) + self.allowance(phase)

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.counted)

    def title(self) -> str:
        """What is planned, in a few lines."""
        args = self.args
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        trained = "the whole transformer" if args.full_finetuning else "a LoRA"
        return (
            f"{self.model}: {trained} in {dtype}{', the base in 4 bits' * self.quantized}, "
            f"{args.height} x {args.width} pixels\n"
            f"A round of {args.prompts_per_round} x {args.num_generations} images: {args.sample_batch_size} "
            f"sampled and {args.per_device_train_batch_size} trained on at a time, "
            f"with{'' if args.gradient_checkpointing else 'out'} gradient checkpointing"
        )

    def formulas(self) -> str:
        """The parts, one a line, with where each number comes from."""
        lines = [f"{part.name:<26}{_gib(part.bytes):>8.2f}  {part.formula}" for part in self.parts if part.bytes]
        return "\n".join([f"{'GiB':>34}", *lines])

    def table(self) -> str:
        """Phases across, parts down."""

        def row(name: str, cells: Iterable[Any]) -> str:
            cells = (cell if isinstance(cell, str) else f"{cell / GIB:.2f}" if cell else "-" for cell in cells)
            return f"{name:<26}" + "".join(f"{cell:>10}" for cell in cells)

        lines = [row("GiB", PHASES)]
        for part in self.parts:
            if part.bytes:
                lines.append(row(part.name, (part.bytes * (phase in part.phases) for phase in PHASES)))
        lines += [row("CUDA and slack", map(self.allowance, PHASES)), "-" * len(lines[0])]
        lines += [row("together", map(self.total, PHASES))]
        return "\n".join([*lines, row("", ("^ peak" * (phase == self.peak_phase) for phase in PHASES)).rstrip()])


@dataclass(frozen=True)
class Option:
    """
    One way to need less.

    Args:
        flag (`dict[str, Any]`):
            What to set.
        bytes (`int`), phase (`str`):
            What it saves, alone, in the phase where it saves most.
        cost (`str`):
            What it costs.
    """

    flag: dict[str, Any]
    bytes: int
    phase: str
    cost: str


@dataclass(frozen=True)
class Fit:
    """
    What fits a GPU.

    Args:
        vram (`float`):
            Its memory in GiB.
        asked ([`MemoryPlan`]), plan ([`MemoryPlan`]):
            The plan of what was asked for, and that of `changes`: the smallest there is where nothing fits.
        changes (`dict[str, Any]`):
            Flags that make it fit, none where it does already.
        options (`tuple[Option, ...]`):
            All that would save something, whether it is among `changes` or not.
        largest (`dict[str, int]`):
            The largest batch sizes that fit beside `changes`, each alone; 0 for none.
    """

    vram: float
    asked: MemoryPlan
    plan: MemoryPlan
    changes: dict[str, Any]
    options: tuple[Option, ...]
    largest: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.plan.total() <= self.vram * GIB

    def verdict(self) -> str:
        """Whether it fits, with what, and what else would."""
        needs, limit = f"{_gib(self.plan.total()):.2f} GiB ({self.plan.peak_phase})", f"{self.vram:g} GiB"
        if not self.fits:
            return f"Does not fit {limit}: the smallest configuration, the one above, still needs {needs}."
        text = f"Fits {limit}: needs {needs}."
        if self.changes:
            text = (
                f"What was asked for needs {_gib(self.asked.total()):.2f} GiB ({self.asked.peak_phase}), more than "
                f"{limit}.\nThe plan above fits: it needs {needs}, with what is marked * below."
            )
        return f"{text}\nLargest that fit: {', '.join(words({name: size}) for name, size in self.largest.items())}"

    def ladder(self) -> str:
        """What would save something, one a line; what is taken has a mark."""
        lines = [f"{'GiB':>7}  {'in':<8}  {'saved with':<34}at the cost of"]
        for option in self.options:
            mark = "*" if option.flag.keys() <= self.changes.keys() else " "
            lines.append(f"{_gib(option.bytes):>7.2f}  {option.phase:<8}{mark} {words(option.flag):<34}{option.cost}")
        return "\n".join(lines)


def read_model(model: str | os.PathLike, args: Any, *, peft_config: LoraConfig | None = None) -> ModelSizes:
    """
    Count a model's weights from its configurations, without reading any.

    Args:
        model (`str` or `os.PathLike`):
            Id on the Hub, folder of a pipeline or of a LoRA, or `"tiny"`.
        args ([`DGPOConfig`]):
            Of which `model_init_kwargs`, `full_finetuning`, `default_lora` and `max_sequence_length` are read.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapter in place of the trainer's own.

    Raises:
        `ValueError`: if there is no such model, or it is of a family that is not supported.
    """
    init_kwargs = dict(args.model_init_kwargs or {})
    revision = init_kwargs.pop("revision", None)
    name = os.fspath(model)
    start = None if name == BUNDLED else _read_lora(name, revision, access(init_kwargs))
    if start is not None:
        model, revision, peft_config = start.base_model_name_or_path, start.revision, start
    source = pipeline_source(os.fspath(model))
    index = read_index(source, revision, access(init_kwargs))
    described = f"{source!r}, a {index['_class_name']}"
    if family([index["_class_name"]], described) is not SD3Backbone:
        raise ValueError(
            f"`model` is {described}, which can be trained; a plan counts what the blocks of {SD3Backbone.PIPELINE} "
            "save, and no others. Watch `torch.cuda.max_memory_allocated()` in a run of one round instead."
        )
    left_out = {name for name, value in init_kwargs.items() if value is None}
    read = partial(_component, source, index, revision=revision, **access(init_kwargs))
    transformer, vae = read("transformer"), read("vae")
    encoders = [read(n) for n in _TEXT_ENCODERS if index.get(n, [None])[0] is not None and n not in left_out]

    linear = (module.weight.numel() for module in transformer.modules() if isinstance(module, nn.Linear))
    sizes = ModelSizes(
        name=name,
        transformer=dict(transformer.config),
        vae=dict(vae.config),
        weights=_numel(transformer),
        linear_weights=sum(linear),
        trained=sum(p.numel() for p in transformer.parameters()),
        rank=0,
        adapted_weights=0,
        goes_on=start is not None,
        vae_weights=_numel(vae),
        text_weights=sum(map(_numel, encoders)),
        text_tokens=encoders[0].config.max_position_embeddings + args.max_sequence_length,
    )
    if args.full_finetuning:
        return sizes
    peft_config = copy.deepcopy(peft_config) or lora_config(SD3Backbone.LORA_TARGETS, **args.default_lora)
    peft_config.target_modules = peft_config.target_modules or list(SD3Backbone.LORA_TARGETS)
    peft_config.task_type, peft_config.inference_mode = None, False
    transformer.requires_grad_(False)
    with torch.device("meta"):
        peft_model = get_peft_model(transformer, peft_config)
    layers = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    return replace(
        sizes,
        trained=sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        rank=max(layer.r["default"] for layer in layers),
        adapted_weights=sum(layer.get_base_layer().weight.numel() for layer in layers),
    )


def plan_memory(sizes: ModelSizes, args: Any, *, quantized: bool = False) -> MemoryPlan:
    """
    Memory of a run on one GPU, phase by phase.

    Args:
        sizes ([`ModelSizes`]):
            What [`read_model`] gave.
        args ([`DGPOConfig`]):
            The run's configuration.
        quantized (`bool`, *optional*, defaults to `False`):
            Whether the frozen transformer is loaded in 4 bits.

    Raises:
        `ValueError`: for a resolution or an optimiser that no plan can be made for.
    """
    if quantized and args.full_finetuning:
        raise ValueError("`full_finetuning` trains all weights, and 4-bit weights cannot be trained. Leave one out.")
    parts = (*_model_parts(sizes, args, quantized), *_data_parts(sizes, args), *_work_parts(sizes, args))
    return MemoryPlan(sizes.name, args, quantized, parts)


def fit(sizes: ModelSizes, args: Any, vram: float, *, quantized: bool = False) -> Fit:
    """
    What has to be changed for a run to fit a GPU, at the least cost, and how large its batches may be.

    Args:
        sizes, args, quantized:
            See [`plan_memory`].
        vram (`float`):
            The GPU's memory in GiB.
    """
    if not vram > 0:
        raise ValueError(f"`vram` is {vram}; it is the GPU's memory in GiB and must be above 0.")
    limit, images, args = vram * GIB, _images(args), copy.copy(args)
    args.decode_batch_size = _decoded(args)
    batch_sizes = {
        "decode_batch_size": range(1, args.decode_batch_size + 1),
        "per_device_train_batch_size": _divisors(images // args.updates_per_round),
        "sample_batch_size": _divisors(images),
    }

    def plan(changes: dict[str, Any]) -> MemoryPlan:
        changed = copy.copy(args)
        vars(changed).update(changes)  # what the configuration would check and derive anew is no matter here
        return plan_memory(sizes, changed, quantized=changes.get("load_in_4bit", quantized))

    def fits(changes: dict[str, Any]) -> bool:
        return plan(changes).total() <= limit

    def cut(changes: dict[str, Any]) -> dict[str, Any]:
        """With each batch size cut to what its phases have room for."""
        changes = dict(changes)
        for name, (phases, _) in _BATCH_SIZES.items():
            smaller = [size for size in batch_sizes[name] if size < getattr(args, name)]
            while smaller and any(plan(changes).total(phase) > limit for phase in phases):
                changes[name] = smaller.pop()
                if name == "sample_batch_size" and changes[name] < args.per_device_eval_batch_size:
                    changes["per_device_eval_batch_size"] = changes[name]
        return changes

    asked = plan({})

    def option(name: str, value: Any, cost: str) -> Option:
        after = plan({name: value})
        by_phase = {phase: asked.total(phase) - after.total(phase) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: (by_phase[phase], phase == asked.peak_phase))
        return Option({name: value}, by_phase[phase], phase, cost)

    # What is trained as a whole cannot be in 4 bits.
    names = [name for name in _SWITCHES if not (name == "load_in_4bit" and args.full_finetuning)]
    switches = [switch for name in names if (switch := option(name, *_SWITCHES[name])).bytes > 0]
    taken: dict[str, Any] = {}
    for switch in switches:
        if not fits(cut(taken)):
            taken |= switch.flag
    for name in reversed(list(taken)):  # the dearest first: what came later may have made it idle
        rest = {other: value for other, value in taken.items() if other != name}
        if fits(cut(rest)):
            taken = rest
    changes = cut(taken)
    options = [
        option(name, changes.get(name, max(1, getattr(args, name) // 2)), cost)
        for name, (_, cost) in _BATCH_SIZES.items()
    ] + switches
    options = [option for option in options if _gib(option.bytes) or option.flag.keys() <= changes.keys()]
    largest = {
        name: max((size for size in batch_sizes[name] if fits(changes | {name: size})), default=0)
        for name in ("sample_batch_size", "per_device_train_batch_size")
    }
    return Fit(vram, asked, plan(changes), changes, tuple(options), largest)


def what_would_fit(
    model: str | None, args: Any, vram: float | None, peft_config: LoraConfig | None = None, *, quantized: bool = False
) -> str:
    """
    What to say to a run that ran out of memory.

    Args:
        model (`str`, *optional*):
            What [`read_model`] can read, if the run has it.
        args ([`DGPOConfig`]), quantized (`bool`):
            See [`plan_memory`].
        vram (`float`, *optional*):
            The GPU's memory in GiB, if there is one.
        peft_config (`~peft.LoraConfig`, *optional*):
            The run's adapter.

    Returns:
        `str`: flags that would make it fit by a plan; where none can be made, all that saves, the cheapest first.
    """
    knobs = {
        **{name: max(1, size // 2) for name in _BATCH_SIZES if (size := getattr(args, name)) not in (None, 1)},
        **{name: value for name, (value, _) in _SWITCHES.items() if getattr(args, name, None) != value},
    }
    if args.decode_batch_size is None:
        knobs = {"decode_batch_size": 1, **knobs}
    if quantized or args.full_finetuning:
        knobs.pop("load_in_4bit", None)
    least = f"What saves memory, the cheapest first: {', '.join(words({k: v}) for k, v in knobs.items())}."
    if not model or vram is None:
        return least
    try:
        fitted = fit(read_model(model, args, peft_config=peft_config), args, vram, quantized=quantized)
    except Exception as error:  # nothing in the advice may stand in the way of the fault that it is for
        return f"{least} (There is no plan: {error})"
    need = f"{_gib(fitted.asked.total()):.2f} GiB ({fitted.asked.peak_phase})"
    if fitted.fits and fitted.changes:
        return f"By `trl-dgpo plan` this run needs {need} of {vram:.1f} GiB, and fits with {words(fitted.changes)}."
    if fitted.fits:
        return (
            f"By `trl-dgpo plan` this run needs {need} of {vram:.1f} GiB: something else is on the GPU, such as a "
            f"reward's model or another process. {least}"
        )
    return f"By `trl-dgpo plan` this run needs {need}, and no configuration of it fits {vram:.1f} GiB. {least}"


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_lora(name: str, revision: str | None, access: dict[str, Any]) -> LoraConfig | None:
    """The configuration of a LoRA that training would go on from."""
    path = Path(name)
    if path.exists() and not (path / "adapter_config.json").is_file():
        return None
    try:
        config = PeftConfig.from_pretrained(name, **({} if path.exists() else {"revision": revision, **access}))
    except ValueError:  # what PEFT makes of every missing file, folder, repository or network
        return None
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{name!r} is a {config.peft_type}; training goes on from a LoRA only.")
    if config.base_model_name_or_path is None:
        raise ValueError(f"The LoRA {name!r} does not name the pipeline that it belongs to; give that as the model.")
    return config


def _component(source: str, index: dict, name: str, **where: Any) -> nn.Module:
    """A pipeline's component without its weights. Its class is what the pipeline's index names."""
    library, class_name = index[name]
    cls = getattr(importlib.import_module(library), class_name)
    try:
        if library == "transformers":
            config = cls.config_class.from_pretrained(source, subfolder=name, **where)
        else:
            config = cls.load_config(source, subfolder=name, **where)
    except OSError as error:
        raise ValueError(f"`model`={source!r} has no configuration of its {name}: {error}") from error
    with torch.device("meta"):
        return cls(config) if library == "transformers" else cls.from_config(config)


def _numel(module: nn.Module) -> int:
    """Weights, and buffers of numbers: they are cast like weights."""
    return sum(t.numel() for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())


# -- parts ------------------------------------------------------------------------------------------------------------


def _half(args: Any) -> bool:
    return bool(args.bf16 or args.fp16)


def _load_bytes(args: Any) -> int:
    """Of a weight as it is loaded: what is trained as a whole is in float32."""
    return 2 if _half(args) and not args.full_finetuning else 4


def _merges(sizes: ModelSizes, args: Any, quantized: bool) -> bool:
    if not sizes.rank or quantized:
        return False
    return not _half(args) if args.merge_adapter is None else args.merge_adapter


def _once_training(args: Any) -> tuple[str, ...]:
    """Phases that are of training, to which encoding belongs if it is not all done before."""
    return PHASES[1:] if args.precompute_prompt_embeds else PHASES


def _views(sizes: ModelSizes, args: Any) -> list[str]:
    """Views that cost as much as the trained weights, by the trainer's rules; a new adapter's base costs nothing."""
    reference = args.reference if args.reads_reference else None
    kept = {
        "ema": args.save_ema or args.eval_strategy != "no" or args.num_log_images > 0,
        "old": args.clips_errors or args.old_policy_after is not None or reference == "old",
        "reference": reference == "refreshed",
        "base": (sizes.goes_on or args.full_finetuning)
        and args.num_adapters == 1
        and (args.kl_coef or reference == "frozen"),
    }
    return [view for view, is_kept in kept.items() if is_kept]


def _weights(name: str, number: int, size: float, phases: tuple[str, ...] = PHASES, note: str = "") -> Part:
    return Part(name, math.ceil(number * size), f"{_millions(number)} x {size:g} bytes{note}", phases)


def _model_parts(sizes: ModelSizes, args: Any, quantized: bool) -> Iterator[Part]:
    size, trained, views = _load_bytes(args), sizes.trained, _views(sizes, args)
    if quantized:
        linear, rest = sizes.linear_weights, sizes.weights - sizes.linear_weights
        four_bit = linear // 2 + 4 * math.ceil(linear / QUANTISED_BLOCK)
        formula = f"{_millions(linear)} in 4 bits + 4 bytes for {QUANTISED_BLOCK}, {_millions(rest)} x {size} bytes"
        yield Part("transformer", four_bit + size * rest, formula)
    elif args.full_finetuning:
        yield _weights("transformer's constants", sizes.weights - trained, size)
    else:
        yield _weights("transformer", sizes.weights, size)
    yield _weights("VAE", sizes.vae_weights, 4)
    offloaded = (("encode",), ", while they encode") if args.offload_text_encoders else ()
    yield _weights("text encoders", sizes.text_weights, size, *offloaded)
    all_trained = args.num_adapters * trained
    yield _weights("trained weights", all_trained, 4)
    yield _weights("views", trained, 4 * len(views), note=f" ({', '.join(views)})")
    optim = getattr(args.optim, "value", args.optim)  # `TrainingArguments` makes an enumeration's member of some
    if optim not in BYTES_PER_WEIGHT:
        raise ValueError(
            f"`optim` is {optim!r}, whose memory this plan does not know. Take one of {', '.join(BYTES_PER_WEIGHT)}."
        )
    yield _weights("optimiser's moments", all_trained, BYTES_PER_WEIGHT[optim], _once_training(args))
    yield _weights("gradients", trained, 4, ("update",))
    if args.world_size > 1:
        yield _weights("DDP's buckets", all_trained, 4, _once_training(args))
    if _half(args):
        yield _weights("autocast's copies", trained, 2, ("rollout", "no-grad", "update"))
    if _merges(sizes, args, quantized):
        yield _weights("merged weights", sizes.adapted_weights, size, ("rollout", "decode", "no-grad"))


def _data_parts(sizes: ModelSizes, args: Any) -> Iterator[Part]:
    latent = math.prod(sizes.latent_shape(args.height, args.width))
    row = sizes.text_tokens * sizes.transformer["joint_attention_dim"] + sizes.transformer["pooled_projection_dim"]
    size, images, prompts = _load_bytes(args), _images(args), math.ceil(args.prompts_per_round / args.world_size)
    kept = images * args.latents_per_image
    formula = f"{kept} latents x {latent} x 4 bytes + {prompts} prompts x {row} x {size} bytes"
    yield Part("rollouts of the round", 4 * latent * kept + size * row * prompts, formula, _once_training(args))
    noises = math.ceil(args.noises_per_update / args.world_size)
    each_its_own = args.noises_per_update == args.groups_per_update * args.num_generations
    drawn = {"noise": (noises, "images" if each_its_own else "groups", 4)}
    if args.num_directions:
        drawn["directions"] = (images // args.updates_per_round, "images", 4 * args.num_directions)
    elif args.kl_coef and not args.offload_reference:
        drawn["base's predictions"] = (images // args.updates_per_round, "images", 2 if _half(args) else 4)
    for name, (number, of, size) in drawn.items():
        formula = f"{number} {of} x {args.num_train_timesteps} levels x {latent} x {size} bytes"
        yield Part(name, number * args.num_train_timesteps * latent * size, formula, ("no-grad", "update"))


def _work_parts(sizes: ModelSizes, args: Any) -> Iterator[Part]:
    _, h, w = sizes.latent_shape(args.height, args.width)
    tokens = h * w // sizes.transformer["patch_size"] ** 2, sizes.text_tokens
    half, full, checkpointing = _half(args), args.full_finetuning, args.gradient_checkpointing

    def of_rows(name: str, rows: int, size: int, phase: str, note: str = "") -> Part:
        formula = f"{rows} rows of {tokens[0]} + {tokens[1]} tokens, width {sizes.width}{note}"
        return Part(name, rows * size, formula, (phase,))

    guided = _copies(args.no_grad_guidance_scale)
    sampled = args.sample_batch_size * _copies(args.sample_guidance_scale)
    evaluated = args.per_device_eval_batch_size * _copies(args.eval_guidance_scale)
    batch, decoded = args.per_device_train_batch_size, _decoded(args)
    forward = forward_bytes(sizes, *tokens, half=half)
    yield of_rows("forward of a rollout", max(sampled, evaluated), forward, "rollout")
    decoding = decoded * decoding_bytes(sizes, h, w, tiled=args.vae_tiling)
    yield Part("decoding", decoding, f"{decoded} images at a time, float32", ("decode",))
    # As many rows as a rollout's forward has, if the optimiser step has them.
    rows = min(max(batch * guided, sampled), _images(args) // args.updates_per_round * guided)
    yield of_rows("forward without gradient", rows, forward, "no-grad")
    saved = saved_bytes(sizes, *tokens, half=half, full=full, checkpointing=checkpointing)
    learned = batch * _copies(args.train_guidance_scale)
    yield of_rows("saved activations", learned, saved, "update", ", of one block at a time" * bool(checkpointing))
    yield of_rows("backward's own", learned, backward_bytes(sizes, *tokens, half=half), "update")


def _copies(guidance_scale: float) -> int:
    return 2 if guidance_scale > 1 else 1


def _images(args: Any) -> int:
    """Images of this process in a round."""
    return args.prompts_per_round * args.num_generations // args.world_size


def _decoded(args: Any) -> int:
    """Images that are decoded at a time."""
    most = max(args.sample_batch_size, args.per_device_eval_batch_size)
    return min(most, args.decode_batch_size or max(1, DECODED_PIXELS // (args.height * args.width)))


# -- activations ------------------------------------------------------------------------------------------------------


def forward_bytes(sizes: ModelSizes, image: int, text: int, *, half: bool) -> int:
    """Working set of a row's forward without gradient: its tokens, and whether under autocast."""
    c = 2 if half else 4
    largest = max(c * (12 * image + 2 * text), c * (7 * image + 10 * text) + (4 * image + 3 * text) * half)
    beside = 4 * (image + text) + 4 * image * bool(sizes.transformer["dual_attention_layers"])
    return sizes.width * (largest + beside) + c * text * sizes.transformer["joint_attention_dim"]


def backward_bytes(sizes: ModelSizes, image: int, text: int, *, half: bool) -> int:
    """What a row's backward holds beside what the forward saved."""
    c = 2 if half else 4
    held = c * (8 * image + text) + (4 * image + c * text) * half
    return sizes.width * held + c * text * sizes.transformer["joint_attention_dim"]


def saved_bytes(
    sizes: ModelSizes, image: int, text: int, *, half: bool, full: bool = False, checkpointing: bool = False
) -> int:
    """What a row's forward saves, of a LoRA or in `full`, for the backward of all blocks or of one at a time."""
    c, joint, width, config = 2 if half else 4, image + text, sizes.width, sizes.transformer
    attention = 4 * c * width + 4 * config["num_attention_heads"]
    attention += (12 if half else 8) * width * bool(config["qk_norm"])
    projections = (4 if half else 2) * c * width + 4 * c * sizes.rank
    block = joint * (8 * width + projections + 4 * c * width + attention)
    blocks = [block + image * attention * (n in config["dual_attention_layers"]) for n in range(config["num_layers"])]
    if full:
        blocks = [math.ceil(WHOLE_NETWORK * block) for block in blocks]
    if checkpointing:  # a block's backward finds its own input and those of the blocks before it
        return max(block + number * c * width * joint for number, block in enumerate(blocks, 1))
    return sum(blocks)


def decoding_bytes(sizes: ModelSizes, height: int, width: int, *, tiled: bool = False) -> int:
    """Peak of decoding a latent: in a residual layer, its block's input thrice, or once with four outputs."""
    whole, tile = 0, sizes.vae["sample_size"] // sizes.vae_scale
    if tiled and max(height, width) > tile:
        whole = 3 * 4 * 2 * height * width * sizes.vae_scale**2  # the tiles that are done, and the picture of them
        height, width = min(height, tile), min(width, tile)
    out = list(reversed(sizes.vae["block_out_channels"]))
    maps = zip([out[0], *out], out, strict=False)
    return whole + 4 * height * width * max(max(3 * a, a + 4 * b) * 4**level for level, (a, b) in enumerate(maps))


# -- fitting and words ------------------------------------------------------------------------------------------------


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _gib(size: int) -> float:
    return round(size / GIB, 2)


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else str(number)


def words(flags: dict[str, Any]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name} {str(v).lower() if isinstance(v, bool) else v}" for name, v in flags.items())
