r"""
What a run needs of a GPU's memory, and what fits, computed from configurations alone: no weights are read.

Counted are the bytes of one process. \\( N \\) and \\( T \\) are the tokens of an image and of its prompt, \\( J = N
+ T \\), \\( W \\) is the width, \\( H \\) the heads, \\( r \\) the LoRA's rank and \\( c \\) the bytes of a number
in the forward, 2 under autocast and else 4.

- **Weights**: the transformer in the dtype that it is loaded in, or in 4 bits (half a byte a weight of a linear
  layer, and 4 bytes for 64 of them); the VAE in float32; the text encoders, while they encode or always.
- **Training**: trained weights in float32, as much again for each view (`ema`, `old`, ...) and for the gradients;
  the optimiser's moments, 8 or 2 bytes a weight; 2 bytes a weight for the copies that autocast makes.
- **Data**: `x0` in float32 for each image of the round, conditioning for each prompt, one noise a group and level,
  and for the KL term one prediction an image and level of an optimiser step.
- **A forward without gradient**, an image: what is alive in the last feed-forward, \\( W (c (12 N + 2 T) + 4 J) \\),
  or in an attention, \\( W (c (7 N + 10 T) + 4 J) \\), if that is more. Guidance makes two images of one.
- **Saved activations**, an image and block, with a LoRA on the attention. Norms: \\( 8 W J \\). Projections: \\( 2 c
  W J \\) for what goes into them (\\( 4 c W J \\) under autocast, which casts it anew for queries, keys and values)
  and \\( 4 c r J \\) inside the LoRA. Queries and keys before their own norm: \\( 8 W J \\), 12 under autocast.
  Attention: \\( 4 c W J + 4 H J \\). Feed-forward: \\( 4 c W J \\). The image's second attention in SD3.5-Medium
  saves once more what an attention does. A network that is trained as a whole also saves what goes into every other
  layer. With gradient checkpointing each block saves \\( c W J \\), and one at a time the rest.
- **The backward's own**, an image: \\( W (c (8 N + T) + 4 N + c T) \\), the last two terms under autocast.
- **Decoding**, an image of a slice: three times the largest feature map that enters a block, in float32.
- **An allowance** of 1 GiB for the CUDA context and a tenth of the rest for fragments and the workspaces of kernels.

A run needs the largest of its phases, not their sum. Attention is taken to be a kernel that keeps no matrix of \\( J
\times J \\), and layer norms to compute in float32, which is autocast's rule on CUDA. Encoding one prompt costs
little beside the encoders and is left to the allowance.
"""

import copy
import importlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .backbones import access, check_family, read_index
from .backbones.sd3 import SD3Backbone
from .policy import lora_config
from .tiny import tiny_pipeline_path


GIB = 2**30
PHASES = ("encode", "rollout", "decode", "no-grad", "update")
CONTEXT = GIB  # CUDA's own, with its libraries
SLACK = 0.1  # of the rest: fragments of the allocator, workspaces of kernels
BYTES_PER_WEIGHT = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0}
QUANTISED_BLOCK = 64  # weights that share a float32 scale
DECODED_PIXELS = 2**21  # of a slice, where `decode_batch_size` does not say
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class ModelSizes:
    """
    Numbers of a model that memory depends on, read once by [`read_model`].

    Args:
        name (`str`):
            Id, folder or `"tiny"`.
        transformer (`dict[str, Any]`):
            Its configuration.
        weights (`int`), linear_weights (`int`):
            Weights and buffers of the transformer, and those of them that 4-bit loading quantises.
        largest_linear (`int`):
            Weights of its largest layer, which is turned back from 4 bits as a whole.
        trained (`int`):
            Weights that are trained.
        adapted (`tuple[tuple[str, int, int], ...]`):
            Name, input width and rank of each layer with a LoRA; none where everything is trained.
        adapted_weights (`int`):
            Weights of those layers themselves.
        goes_on (`bool`):
            Whether training goes on from a LoRA, which then is a part of the base.
        vae (`dict[str, Any]`), vae_bytes (`int`):
            Its configuration and its size in float32.
        text_weights (`int`):
            Weights of the text encoders.
        text_tokens (`int`):
            Tokens of a prompt, of all encoders.
    """

    name: str
    transformer: dict[str, Any]
    weights: int
    linear_weights: int
    largest_linear: int
    trained: int
    adapted: tuple[tuple[str, int, int], ...]
    adapted_weights: int
    goes_on: bool
    vae: dict[str, Any]
    vae_bytes: int
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
        name (`str`):
            What it is.
        bytes (`int`):
            How much.
        formula (`str`):
            Where the number comes from.
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
        settings (`dict[str, Any]`):
            What was asked for and matters here.
        parts (`tuple[Part, ...]`):
            Everything that is counted but the allowance.
    """

    model: str
    settings: dict[str, Any]
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

    def to_dict(self) -> dict[str, Any]:
        """Everything in GiB, for JSON."""
        return {
            "model": self.model,
            "settings": self.settings,
            "parts": {p.name: {"gib": _gib(p.bytes), "formula": p.formula, "phases": p.phases} for p in self.parts},
            "phases": {phase: _gib(self.total(phase)) for phase in PHASES},
            "peak_phase": self.peak_phase,
            "total": _gib(self.total()),
            "measured": False,
        }

    def title(self) -> str:
        """What is planned, in a few lines."""
        of = self.settings
        dtype = "bfloat16" if of["bf16"] else "float16" if of["fp16"] else "float32"
        trained = "the whole transformer" if of["full_finetuning"] else "a LoRA"
        lines = [
            f"{self.model}: {trained} in {dtype}{', the base in 4 bits' * of['load_in_4bit']}, "
            f"{of['height']} x {of['width']} pixels",
            f"A round of {of['prompts_per_round']} x {of['num_generations']} images: {of['sample_batch_size']} "
            f"sampled and {of['per_device_train_batch_size']} trained on at a time, with"
            f"{'' if of['gradient_checkpointing'] else 'out'} gradient checkpointing",
        ]
        return "\n".join(lines)

    def formulas(self) -> str:
        """The parts, one a line, with where each number comes from."""
        lines = [f"{part.name:<26}{_gib(part.bytes):>8.2f}  {part.formula}" for part in self.parts if part.bytes]
        return "\n".join([f"{'GiB':>34}", *lines])

    def table(self) -> str:
        """Phases across, parts down."""
        rows = [
            (part.name, [part.bytes if phase in part.phases else 0 for phase in PHASES])
            for part in self.parts
            if part.bytes
        ]
        rows.append(("CUDA and slack", [self.allowance(phase) for phase in PHASES]))
        rows.append(("together", [self.total(phase) for phase in PHASES]))
        head = f"{'GiB':<26}" + "".join(f"{phase:>10}" for phase in PHASES)
        lines = [f"{name:<26}" + "".join(f"{_cell(size):>10}" for size in sizes) for name, sizes in rows]
        lines.insert(-1, "-" * len(head))
        mark = f"{'':<26}" + "".join(f"{'^ peak' if phase == self.peak_phase else '':>10}" for phase in PHASES)
        return "\n".join([head, *lines, mark.rstrip()])


@dataclass(frozen=True)
class Saving:
    """
    One way to need less.

    Args:
        flags (`dict[str, Any]`):
            What to set.
        bytes (`int`):
            What it saves, alone, in the phase where it saves most.
        phase (`str`):
            That phase.
        cost (`str`):
            What it costs.
        taken (`bool`):
            Whether it is needed here.
    """

    flags: dict[str, Any]
    bytes: int
    phase: str
    cost: str
    taken: bool


@dataclass(frozen=True)
class Fit:
    """
    What fits a GPU.

    Args:
        vram (`float`):
            Its memory in GiB.
        asked ([`MemoryPlan`]):
            The plan of what was asked for.
        plan ([`MemoryPlan`]):
            That of `changes`; of the smallest configuration where nothing fits.
        changes (`dict[str, Any]`):
            Flags that make it fit, none where it does already.
        savings (`tuple[Saving, ...]`):
            All there is to save, in the order in which it costs.
        largest (`dict[str, int]`):
            The largest batch sizes that fit beside `changes`, each alone; 0 for none.
        largest_unchecked (`int`):
            The largest `per_device_train_batch_size` without gradient checkpointing.
    """

    vram: float
    asked: MemoryPlan
    plan: MemoryPlan
    changes: dict[str, Any]
    savings: tuple[Saving, ...]
    largest: dict[str, int]
    largest_unchecked: int

    @property
    def fits(self) -> bool:
        return self.plan.total() <= self.vram * GIB

    def to_dict(self) -> dict[str, Any]:
        """Everything in GiB, for JSON."""
        return {
            "vram": self.vram,
            "fits": self.fits,
            "changes": self.changes,
            "largest": self.largest,
            "largest_unchecked": self.largest_unchecked,
            "asked": self.asked.to_dict(),
            "plan": self.plan.to_dict(),
            "savings": [
                {"flags": s.flags, "gib": _gib(s.bytes), "phase": s.phase, "cost": s.cost, "taken": s.taken}
                for s in self.savings
            ],
        }

    def verdict(self) -> str:
        """Whether it fits, with what, and what else would."""
        needs, limit = f"{_gib(self.plan.total()):.2f} GiB", f"{self.vram:g} GiB"
        if not self.fits:
            return (
                f"Does not fit {limit}: the smallest configuration, the one above, still needs {needs} "
                f"({self.plan.peak_phase})."
            )
        if not self.changes:
            lines = [f"Fits {limit}: needs {needs} ({self.plan.peak_phase})."]
        else:
            lines = [
                f"What was asked for needs {_gib(self.asked.total()):.2f} GiB ({self.asked.peak_phase}), more than "
                f"{limit}.",
                f"The plan above fits: it needs {needs} ({self.plan.peak_phase}), with the savings marked * below.",
            ]
        largest = self.largest
        lines.append(
            f"Largest that fit: --sample_batch_size {largest['sample_batch_size']}, --per_device_train_batch_size "
            f"{largest['per_device_train_batch_size']}"
        )
        if self.plan.settings["gradient_checkpointing"]:
            lines.append(
                "Without gradient checkpointing, which saves a forward for each backward, the latter is "
                f"{self.largest_unchecked or 'none'}."
            )
        return "\n".join(lines)

    def ladder(self) -> str:
        """The savings, one a line; those that are taken have a mark."""
        lines = [f"{'GiB':>7}  {'in':<8}  {'saved with':<34}at the cost of"]
        for saving in self.savings:
            mark = "*" if saving.taken else " "
            lines.append(f"{_gib(saving.bytes):>7.2f}  {saving.phase:<8}{mark} {words(saving.flags):<34}{saving.cost}")
        return "\n".join(lines)


def read_model(model: str | os.PathLike, args: Any, *, peft_config: LoraConfig | None = None) -> ModelSizes:
    """
    Count a model's weights from its configurations, without reading any.

    Args:
        model (`str` or `os.PathLike`):
            Id on the Hub, folder of a pipeline or of a LoRA, or `"tiny"`.
        args ([`DGPOConfig`]):
            Of which `model_init_kwargs`, `full_finetuning` and `max_sequence_length` are read.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapter in place of the trainer's own.

    Raises:
        `ValueError`: if there is no such model, or it is of a family that is not supported.
    """
    init_kwargs = dict(args.model_init_kwargs or {})
    revision = init_kwargs.pop("revision", None)
    name = os.fspath(model)
    start = None if name == "tiny" else _read_lora(name, revision, access(init_kwargs))
    if start is not None:
        model, revision, peft_config = start.base_model_name_or_path, start.revision, start
    source = tiny_pipeline_path() if os.fspath(model) == "tiny" else os.fspath(model)
    index = read_index(source, revision, access(init_kwargs))
    check_family({index["_class_name"]}, f"{source!r}, a {index['_class_name']}")
    left_out = {name for name, value in init_kwargs.items() if value is None}
    read = partial(_component, source, index, revision=revision, **access(init_kwargs))
    transformer, vae = read("transformer"), read("vae")
    encoders = [read(n) for n in _TEXT_ENCODERS if index.get(n, [None])[0] is not None and n not in left_out]

    linear = [module.weight.numel() for module in transformer.modules() if isinstance(module, nn.Linear)]
    sizes = ModelSizes(
        name=name,
        transformer=dict(transformer.config),
        weights=_numel(transformer),
        linear_weights=sum(linear),
        largest_linear=max(linear),
        trained=sum(p.numel() for p in transformer.parameters()),
        adapted=(),
        adapted_weights=0,
        goes_on=start is not None,
        vae=dict(vae.config),
        vae_bytes=4 * _numel(vae),
        text_weights=sum(map(_numel, encoders)),
        text_tokens=encoders[0].config.max_position_embeddings + args.max_sequence_length,
    )
    if args.full_finetuning:
        return sizes
    peft_config = copy.deepcopy(peft_config) or lora_config(SD3Backbone.LORA_TARGETS)
    peft_config.target_modules = peft_config.target_modules or list(SD3Backbone.LORA_TARGETS)
    peft_config.task_type, peft_config.inference_mode = None, False
    transformer.requires_grad_(False)
    with torch.device("meta"):
        peft_model = get_peft_model(transformer, peft_config)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}
    return replace(
        sizes,
        trained=sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        adapted=tuple((name, layer.in_features, layer.r["default"]) for name, layer in layers.items()),
        adapted_weights=sum(layer.get_base_layer().weight.numel() for layer in layers.values()),
    )


def plan_memory(
    model: str | os.PathLike | ModelSizes,
    args: Any,
    *,
    quantized: bool = False,
    peft_config: LoraConfig | None = None,
) -> MemoryPlan:
    """
    Memory of a run on one GPU, phase by phase.

    Args:
        model (`str`, `os.PathLike` or [`ModelSizes`]):
            Id on the Hub, folder, `"tiny"`, or what [`read_model`] gave.
        args ([`DGPOConfig`]):
            The run's configuration.
        quantized (`bool`, *optional*, defaults to `False`):
            Whether the frozen transformer is loaded in 4 bits.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapter in place of the trainer's own.

    Returns:
        [`MemoryPlan`]

    Raises:
        `ValueError`: for a model, a resolution or an optimiser that no plan can be made for.
    """
    sizes = model if isinstance(model, ModelSizes) else read_model(model, args, peft_config=peft_config)
    if quantized and args.full_finetuning:
        raise ValueError("`full_finetuning` trains all weights, and 4-bit weights cannot be trained. Leave one out.")
    return MemoryPlan(
        model=sizes.name,
        settings=_settings(args, quantized),
        parts=(*_model_parts(sizes, args, quantized), *_data_parts(sizes, args), *_work_parts(sizes, args)),
    )


def fit(
    model: str | os.PathLike | ModelSizes,
    args: Any,
    vram: float,
    *,
    quantized: bool = False,
    peft_config: LoraConfig | None = None,
) -> Fit:
    """
    What has to be changed for a run to fit a GPU, at the least cost, and how large its batches may be.

    Args:
        model, args, quantized, peft_config:
            See [`plan_memory`].
        vram (`float`):
            The GPU's memory in GiB.

    Returns:
        [`Fit`]
    """
    if not vram > 0:
        raise ValueError(f"`vram` is {vram}; it is the GPU's memory in GiB and must be above 0.")
    sizes = model if isinstance(model, ModelSizes) else read_model(model, args, peft_config=peft_config)
    given = _settings(args, quantized) | {"decode_batch_size": _slice(sizes, args)}

    def plan(settings: dict[str, Any]) -> MemoryPlan:
        return plan_memory(sizes, _with(args, settings), quantized=settings["load_in_4bit"])

    def fitting(settings: dict[str, Any]) -> MemoryPlan:
        return plan(_smaller_batches(settings, args, plan, vram * GIB))

    asked = plan(given)
    savings = [s for s in _SAVINGS if all(given[k] != v for k, v in s.flags.items()) and s.acts(sizes, args)]
    taken: list[_Option] = []
    chosen = fitting(given)
    while chosen.total() > vram * GIB and len(taken) < len(savings):
        taken.append(savings[len(taken)])
        chosen = fitting(given | _flags(taken))
    if chosen.total() <= vram * GIB:
        for option in reversed(taken):  # the dearest first: what came later may have made it idle
            without = [other for other in taken if other is not option]
            if (plan_without := fitting(given | _flags(without))).total() <= vram * GIB:
                taken, chosen = without, plan_without

    changes = {name: value for name, value in chosen.settings.items() if value != given[name]}
    listed = []
    for name, cost in _BATCH_COSTS.items():
        flags = {name: chosen.settings[name]} if name in changes else {name: max(1, given[name] // 2)}
        listed.append((flags, cost, name in changes))
    listed += [(option.flags, option.cost, option in taken) for option in savings]
    compared = [_saving(asked, plan(given | flags), flags, cost, used) for flags, cost, used in listed]
    return Fit(
        vram=vram,
        asked=asked,
        plan=chosen,
        changes=changes,
        savings=tuple(saving for saving in compared if saving.bytes),
        largest=_largest_batches(chosen.settings, args, plan, vram * GIB),
        largest_unchecked=_largest_batches(
            chosen.settings | {"gradient_checkpointing": False}, args, plan, vram * GIB
        )["per_device_train_batch_size"],
    )


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
    if not sizes.adapted or quantized:
        return False
    return not _half(args) if args.merge_adapter is None else args.merge_adapter


def _once_training(args: Any) -> tuple[str, ...]:
    """Phases that are of training, to which encoding belongs if it is not all done before."""
    return PHASES[1:] if args.precompute_prompt_embeds else PHASES


def _has_gate(args: Any) -> bool:
    return args.loss_type != "linear"


def _views(sizes: ModelSizes, args: Any) -> list[str]:
    """Views that cost as much as the trained weights; a new adapter's base costs nothing."""
    has_gate = _has_gate(args)
    moved = {
        "ema": args.save_ema or args.eval_strategy != "no" or args.num_log_images > 0,
        "old": args.clip_range is not None
        or args.old_policy_after is not None
        or (has_gate and args.reference == "old"),
        "reference": has_gate and args.reference == "refreshed",
        "base": (sizes.goes_on or args.full_finetuning)
        and bool(args.kl_coef or (has_gate and args.reference == "frozen")),
    }
    return [view for view, is_kept in moved.items() if is_kept]


def _model_parts(sizes: ModelSizes, args: Any, quantized: bool) -> Iterator[Part]:
    size = _load_bytes(args)
    forward = ("rollout", "no-grad", "update")
    if quantized:
        four_bit = sizes.linear_weights // 2 + 4 * math.ceil(sizes.linear_weights / QUANTISED_BLOCK)
        rest = sizes.weights - sizes.linear_weights
        formula = f"{_millions(sizes.linear_weights)} in 4 bits + 4 bytes for 64, {_millions(rest)} x {size}"
        yield Part("transformer", four_bit + size * rest, formula)
        back = size * sizes.largest_linear
        yield Part("one layer out of 4 bits", back, f"{_millions(sizes.largest_linear)} x {size} bytes", forward)
    elif not args.full_finetuning:
        yield Part("transformer", size * sizes.weights, f"{_millions(sizes.weights)} weights x {size} bytes")
    else:
        buffers = sizes.weights - sizes.trained
        yield Part("transformer's constants", size * buffers, f"{_millions(buffers)} x {size} bytes")
    yield Part("VAE", sizes.vae_bytes, f"{_millions(sizes.vae_bytes // 4)} weights x 4 bytes")
    yield Part(
        "text encoders",
        size * sizes.text_weights,
        f"{_millions(sizes.text_weights)} weights x {size} bytes"
        + ", while they encode" * bool(args.offload_text_encoders),
        ("encode",) if args.offload_text_encoders else PHASES,
    )
    trained, views = sizes.trained, _views(sizes, args)
    yield Part("trained weights", 4 * trained, f"{_millions(trained)} x 4 bytes")
    names = ", ".join(views)
    yield Part("views", 4 * trained * len(views), f"{len(views)} ({names}) x {_millions(trained)} x 4 bytes")
    optim = _plain(args.optim)
    if optim not in BYTES_PER_WEIGHT:
        raise ValueError(
            f"`optim` is {optim!r}, whose memory this plan does not know. Take one of {', '.join(BYTES_PER_WEIGHT)}."
        )
    moments = BYTES_PER_WEIGHT[optim]
    formula = f"{_millions(trained)} x {moments:g} bytes"
    if moments == 2:  # a float32 scale for 256 of each moment
        moments += 2 * 4 / 256
        formula += " + 8 for 256"
    yield Part("optimiser's moments", math.ceil(moments * trained), formula, _once_training(args))
    yield Part("gradients", 4 * trained, f"{_millions(trained)} x 4 bytes", ("update",))
    if _half(args):
        yield Part("autocast's copies", 2 * trained, f"{_millions(trained)} x 2 bytes", forward)
    if _merges(sizes, args, quantized):
        merged = sizes.adapted_weights
        phases = ("rollout", "decode", "no-grad")
        yield Part("merged weights", size * merged, f"{_millions(merged)} x {size} bytes", phases)


def _data_parts(sizes: ModelSizes, args: Any) -> Iterator[Part]:
    latent = math.prod(sizes.latent_shape(args.height, args.width))
    row = sizes.text_tokens * sizes.transformer["joint_attention_dim"] + sizes.transformer["pooled_projection_dim"]
    size, forward = _load_bytes(args), 2 if _half(args) else 4
    images = args.prompts_per_round * args.num_generations // args.world_size
    prompts = math.ceil(args.prompts_per_round / args.world_size)
    buffer = 4 * latent * images + size * row * prompts
    formula = f"{images} images x {latent} x 4 bytes + {prompts} prompts x {row} x {size}"
    yield Part("rollouts of the round", buffer, formula, _once_training(args))
    levels, update = args.num_train_timesteps, ("no-grad", "update")
    groups = math.ceil(prompts / args.updates_per_round)
    yield Part(
        "noise", 4 * latent * groups * levels, f"{groups} groups x {levels} levels x {latent} x 4 bytes", update
    )
    if args.kl_coef and not args.offload_reference:
        of_step = images // args.updates_per_round
        formula = f"{of_step} images x {levels} levels x {latent} x {forward} bytes"
        yield Part("base's predictions", forward * latent * of_step * levels, formula, update)


def _work_parts(sizes: ModelSizes, args: Any) -> Iterator[Part]:
    half = _half(args)
    _, h, w = sizes.latent_shape(args.height, args.width)
    image, text = h * w // sizes.transformer["patch_size"] ** 2, sizes.text_tokens
    tokens = f"{image} + {text} tokens, width {sizes.width}"
    # Evaluation samples too, in batches of its own.
    sampled = max(
        args.sample_batch_size * _copies(args.sample_guidance_scale),
        args.per_device_eval_batch_size * _copies(args.eval_guidance_scale),
    )
    one = forward_bytes(sizes, image, text, half=half)
    yield Part("forward of a rollout", sampled * one, f"{sampled} rows of {tokens}", ("rollout",))
    decoded = min(_slice(sizes, args), max(args.sample_batch_size, args.per_device_eval_batch_size))
    yield Part(
        "decoding",
        decoded * decoding_bytes(sizes, h, w, tiled=args.vae_tiling),
        f"{decoded} images at a time, float32" + ", in tiles" * bool(args.vae_tiling),
        ("decode",),
    )
    batch = args.per_device_train_batch_size
    rows = batch * _copies(args.reference_guidance_scale)
    yield Part("forward without gradient", rows * one, f"{rows} rows of {tokens}", ("no-grad",))
    full, checkpointing = args.full_finetuning, args.gradient_checkpointing
    saved = batch * saved_bytes(sizes, image, text, half=half, full=full, checkpointing=checkpointing)
    formula = f"{batch} rows of {tokens}" + ", of one block at a time" * bool(checkpointing)
    yield Part("saved activations", saved, formula, ("update",))
    backward = batch * backward_bytes(sizes, image, text, half=half, full=full)
    yield Part("backward's own", backward, f"{batch} rows of {tokens}", ("update",))


def _copies(guidance_scale: float) -> int:
    return 2 if guidance_scale > 1 else 1


def _slice(sizes: ModelSizes, args: Any) -> int:
    """Images that are decoded at a time."""
    most = max(args.sample_batch_size, args.per_device_eval_batch_size)
    return min(most, args.decode_batch_size or max(1, DECODED_PIXELS // (args.height * args.width)))


# -- activations ------------------------------------------------------------------------------------------------------


def forward_bytes(sizes: ModelSizes, image: int, text: int, *, half: bool) -> int:
    """
    Working set of a row's forward without gradient, with its conditioning.

    Args:
        sizes ([`ModelSizes`]):
            The model.
        image (`int`), text (`int`):
            Tokens.
        half (`bool`):
            Whether under autocast.
    """
    c, last = 2 if half else 4, sizes.transformer["num_layers"] - 1
    dual, rank = sizes.transformer["dual_attention_layers"], max((rank for *_, rank in sizes.adapted), default=0)
    # In the last block the text's attention output keeps the joint one alive.
    feed_forward = c * (12 * image + text) + 4 * image + (c + 4) * text
    if dual:  # the second attention's input and output
        with_second = c * (12 + (last in dual)) * image + 8 * image + (2 * c + 4) * text
        feed_forward = max(feed_forward, with_second)
    attention = c * (7 * image + 10 * text) + 4 * (image + text) + (4 * image + 3 * text) * half
    attention += 4 * image * bool(dual)
    conditioning = c * text * sizes.transformer["joint_attention_dim"]
    return sizes.width * max(feed_forward, attention) + c * rank * (image + text) + conditioning


def backward_bytes(sizes: ModelSizes, image: int, text: int, *, half: bool, full: bool = False) -> int:
    """What a row's backward holds beside what the forward saved; see [`saved_bytes`] for the arguments."""
    c = 2 if half else 4
    held = c * ((2 if full else 8) * image + text) + ((6 if full else 4) * image + c * text) * half
    return sizes.width * held + c * text * sizes.transformer["joint_attention_dim"]


def saved_bytes(
    sizes: ModelSizes, image: int, text: int, *, half: bool, full: bool = False, checkpointing: bool = False
) -> int:
    """
    What a row's forward saves for the backward.

    Args:
        sizes, image, text, half:
            See [`forward_bytes`].
        full (`bool`, *optional*, defaults to `False`):
            Whether all weights are trained.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Whether blocks save their input alone, and the rest one block at a time.
    """
    c, width, layers = 2 if half else 4, sizes.width, sizes.transformer["num_layers"]
    block = _saved_by_all if full else _saved_by_lora
    blocks = [block(sizes, number, image, text, half) for number in range(layers)]
    if checkpointing:  # a block's backward finds its own input and those of the blocks before it
        given = c * width * (image + text)
        return max(block + number * given for number, block in enumerate(blocks, 1))
    head = 4 * width * image
    if full:
        head += (4 + c) * width * image + c * text * sizes.transformer["joint_attention_dim"]
    return head + sum(blocks)


def _saved_by_lora(sizes: ModelSizes, number: int, image: int, text: int, half: bool) -> int:
    c, width, last = 2 if half else 4, sizes.width, number == sizes.transformer["num_layers"] - 1
    dual = number in sizes.transformer["dual_attention_layers"]
    saved = _saved_attention(sizes, image + text, half)
    if dual and number:  # nothing before the first block's first attention has a gradient
        saved += _saved_attention(sizes, image, half)
    norms = (2 if number else 1) * image + ((1 if number else 0) + (0 if last else 1)) * text
    saved += (4 * width + 8) * norms
    saved += 4 * c * width * (image + (0 if last else text))  # the activation function's input
    saved += c * width * ((9 if dual else 6) + (0 if last else 6) + 4)  # scales, shifts and gates
    seen = set()
    for name, features, rank in sizes.adapted:
        if not name.startswith(f"transformer_blocks.{number}."):
            continue
        layer = name.split(".", 2)[2]
        tokens = _tokens(layer, image, text)
        # q, k and v read the same tensor; autocast casts it for each.
        source = layer.replace("to_q", "to_k").replace("to_v", "to_k").replace("q_proj", "k_proj")
        source = layer if half else source.replace("v_proj", "k_proj")
        saved += c * tokens * (rank + (0 if source in seen else features))
        seen.add(source)
    return saved


def _saved_by_all(sizes: ModelSizes, number: int, image: int, text: int, half: bool) -> int:
    c, width, last = 2 if half else 4, sizes.width, number == sizes.transformer["num_layers"] - 1
    dual, normed = number in sizes.transformer["dual_attention_layers"], bool(sizes.transformer["qk_norm"])
    beside = 0 if last else text  # the last block has no use for the text after its attention
    inputs = 3 if half else 1  # autocast casts it for each of q, k and v
    saved = _saved_attention(sizes, image + text, half, full=True)
    saved += (8 * width + 8) * (2 * image + text + beside)  # layer norms: what goes in and what comes out
    saved += 2 * c * width * (image + beside)  # gated
    saved += c * width * (inputs * (image + text) + image + beside)
    saved += c * width * 9 * (image + beside)  # feed-forward: 1 in, 4 before and 4 after its function
    if dual:
        saved += _saved_attention(sizes, image, half, full=True)
        saved += c * width * image * (inputs + 1 + (half and normed))
    return saved + c * width * ((9 if dual else 6) + (0 if last else 6) + 8)


def _saved_attention(sizes: ModelSizes, tokens: int, half: bool, full: bool = False) -> int:
    """Queries, keys, values, output and a number a head; queries and keys before their norm."""
    c, heads = 2 if half else 4, sizes.transformer["num_attention_heads"]
    saved = 4 * c * sizes.width + 4 * heads
    if sizes.transformer["qk_norm"]:
        # In float32 for the square, as they are for the product, and normed where the norm's weight is trained.
        saved += 2 * sizes.width * (4 + (2 if half else 0) + (4 if full else 0)) + 8 * heads
    return saved * tokens


def _tokens(layer: str, image: int, text: int) -> int:
    if layer.startswith(("norm1.", "norm1_context.")):
        return 1
    return text if layer.startswith(("attn.add_", "attn.to_add", "ff_context")) else image


def decoding_bytes(sizes: ModelSizes, height: int, width: int, *, tiled: bool = False) -> int:
    """
    Peak of decoding a latent, in a residual layer of the decoder: its block's input thrice, or once with four outputs.

    Args:
        sizes ([`ModelSizes`]):
            The model.
        height (`int`), width (`int`):
            Of the latent.
        tiled (`bool`, *optional*, defaults to `False`):
            Whether in tiles of the VAE's own sample size.
    """
    whole = 0
    if tiled:
        whole = 3 * 4 * 2 * height * width * sizes.vae_scale**2  # the tiles that are done, and the picture of them
        tile = sizes.vae["sample_size"] // sizes.vae_scale
        height, width = min(height, tile), min(width, tile)
    out = list(reversed(sizes.vae["block_out_channels"]))
    maps = zip([out[0], *out], out, strict=False)
    return whole + 4 * height * width * max(max(3 * a, a + 4 * b) * 4**level for level, (a, b) in enumerate(maps))


# -- fitting ----------------------------------------------------------------------------------------------------------


_SETTINGS = (
    "bf16",
    "fp16",
    "full_finetuning",
    "height",
    "width",
    "num_generations",
    "prompts_per_round",
    "per_device_train_batch_size",
    "sample_batch_size",
    "per_device_eval_batch_size",
    "decode_batch_size",
    "gradient_checkpointing",
    "offload_text_encoders",
    "precompute_prompt_embeds",
    "offload_reference",
    "merge_adapter",
    "optim",
    "vae_tiling",
)
_BATCH_COSTS = {
    "decode_batch_size": "nothing",
    "sample_batch_size": "nothing while the GPU is busy",
    "per_device_train_batch_size": "a forward more a level, once a group is cut",
}


@dataclass(frozen=True)
class _Option:
    flags: dict[str, Any]
    cost: str
    acts: Callable[[ModelSizes, Any], bool] = lambda sizes, args: True


# In the order in which they cost.
_SAVINGS = (
    _Option(
        {"offload_reference": True},
        "copies to the CPU and back",
        lambda sizes, args: bool(args.kl_coef),
    ),
    _Option({"offload_text_encoders": True}, "moving them, where a prompt is new"),
    _Option({"precompute_prompt_embeds": True}, "all prompts are encoded before the first step"),
    _Option(
        {"merge_adapter": False},
        "the LoRA's own layers in rollouts",
        lambda sizes, args: _merges(sizes, args, False),
    ),
    _Option({"gradient_checkpointing": True}, "one more forward for each backward"),
    _Option({"optim": "adamw_bnb_8bit"}, "rounded moments (bitsandbytes)"),
    _Option(
        {"load_in_4bit": True},
        "rounded frozen weights, slower layers",
        lambda sizes, args: not args.full_finetuning,
    ),
    _Option(
        {"vae_tiling": True},
        "other pixels where tiles meet",
        lambda sizes, args: max(args.height, args.width) > sizes.vae["sample_size"],
    ),
)


def _settings(args: Any, quantized: bool) -> dict[str, Any]:
    return {name: _plain(getattr(args, name)) for name in _SETTINGS} | {"load_in_4bit": quantized}


def _plain(value: Any) -> Any:
    """The value of an enumeration's member, which `TrainingArguments` makes of some strings."""
    return getattr(value, "value", value)


def _flags(options: list[_Option]) -> dict[str, Any]:
    return {name: value for option in options for name, value in option.flags.items()}


def _with(args: Any, settings: dict[str, Any]) -> Any:
    """The configuration with other values: what it would check and derive anew is no matter here."""
    changed = copy.copy(args)
    for name, value in settings.items():
        if name not in ("load_in_4bit", "height"):
            setattr(changed, name, value)
    return changed


def _batches(args: Any) -> dict[str, tuple[list[int], tuple[str, ...]]]:
    """Values that each batch size can take, ascending, and the phases that it acts on."""
    images = args.prompts_per_round * args.num_generations // args.world_size
    return {
        "sample_batch_size": (_divisors(images), ("rollout",)),
        "decode_batch_size": (list(range(1, images + 1)), ("decode",)),
        "per_device_train_batch_size": (_divisors(images // args.updates_per_round), ("no-grad", "update")),
    }


def _smaller_batches(settings: dict[str, Any], args: Any, plan: Callable, limit: int) -> dict[str, Any]:
    """Each batch size cut to what its phases have room for."""
    settings = dict(settings)
    for name, (values, phases) in _batches(args).items():
        asked = settings[name]
        for value in [asked, *(value for value in reversed(values) if value < asked)]:
            settings[name] = value
            if name == "sample_batch_size":
                settings["per_device_eval_batch_size"] = min(args.per_device_eval_batch_size, value)
            if all(plan(settings).total(phase) <= limit for phase in phases):
                break
    return settings


def _largest_batches(settings: dict[str, Any], args: Any, plan: Callable, limit: int) -> dict[str, int]:
    largest = {}
    for name, (values, phases) in _batches(args).items():
        if name != "decode_batch_size":
            fitting = [v for v in values if all(plan(settings | {name: v}).total(p) <= limit for p in phases)]
            largest[name] = max(fitting, default=0)
    return largest


def _saving(before: MemoryPlan, after: MemoryPlan, flags: dict[str, Any], cost: str, taken: bool) -> Saving:
    phase = max(PHASES, key=lambda phase: before.total(phase) - after.total(phase))
    return Saving(flags, max(0, before.total(phase) - after.total(phase)), phase, cost, taken)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# -- words ------------------------------------------------------------------------------------------------------------


def _gib(size: int) -> float:
    return round(size / GIB, 2)


def _cell(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else str(number)


def words(flags: dict[str, Any]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name} {str(v).lower() if isinstance(v, bool) else v}" for name, v in flags.items())
