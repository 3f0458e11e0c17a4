"""
One transformer and its views.

The policy is what is trained. A view is another set of weights for the same transformer, borrowed with `with`:
`reference()` (what the preference is measured against), `old()` (fast moving average: the clip's and later the
rollouts'), `ema()` (slow moving average: evaluation and export), `base()` (the frozen model before training: the KL
term's).

With an adapter (PEFT), the base is the adapter switched off and every other view is a frozen adapter beside the
policy's, so that a switch costs a flag a layer. Where training goes on from an adapter, the model before training has
it on, and the base is a frozen adapter too. Without one, a view is a frozen copy of the trainable weights whose
storage is exchanged for theirs. Either way nothing is copied into the policy's weights, and they are back, to the bit,
after the `with`, also after an exception. Only where FSDP2 has sharded the weights are the shards' contents copied to
and fro, since its collectives read them where they lie.

A method may train more than the policy: companions are adapters of the policy's shape that are trained beside it, each
entered like a view, and start as no change to the model. Which of them a backward reaches is decided by the one that
is on, in the forward and, where activations are recomputed, in the backward.

A view can also be entered `merged`: its adapter is added to copies of the adapted weights, which take their place for
the length of the `with`. That spares two small products a layer in every forward.

Enter a view before `autocast`, not inside it: autocast caches the cast weights of the whole of its context.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


_POLICY = "default"
_PREFIX = "base_model.model."  # of a PeftModel's weights, before the transformer's own names
_CONFIG_FILE = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_WEIGHTS_FILE = "weights.safetensors"
_TAKES_FROM_BASE = ("pissa", "corda", "loftq")  # starts of a LoRA
_MERGEABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def old_decay(step: int) -> float:
    """
    Decay of the old policy after the optimiser step of this number (from 0): `min(0.3, 0.001 * step)`.

    From the authors' released code; 0 at the first step makes the old policy an exact copy. The paper copies for 200
    steps and then decays by 0.3.
    """
    return min(0.3, 0.001 * step)


def ema_decay(step: int) -> float:
    """Decay of the evaluation average after the optimiser step of this number: `min((1 + n) / (10 + n), 0.9)`."""
    return min((1 + step) / (10 + step), 0.9)


def lora_config(target_modules: tuple[str, ...], *, r: int = 64, lora_alpha: int = 128) -> LoraConfig:
    """The LoRA of the authors' released code, if no other numbers are given: rank 64, alpha 128, Gaussian start."""
    return LoraConfig(r=r, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=list(target_modules))


@dataclass(frozen=True, eq=False)
class Adapter:
    """
    A LoRA that training goes on from.

    Args:
        config (`peft.LoraConfig`):
            Its configuration.
        weights (`dict[str, torch.Tensor]`):
            Its weights under PEFT's names.
        base_model (`str`, *optional*):
            The pipeline that it was trained on, as its configuration names it.
        scaling (`dict[str, float]`, *optional*):
            Factor of each layer that it was taken from.
    """

    config: LoraConfig
    weights: dict[str, Tensor]
    base_model: str | None = None
    scaling: dict[str, float] | None = None


def read_adapter(source: str | os.PathLike, **access: Any) -> Adapter | None:
    """
    The LoRA of a folder or a repository in PEFT's format.

    Args:
        source (`str` or `os.PathLike`):
            Folder or id on the Hub.
        **access:
            How it is got from the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`Adapter`], or `None` where there is no `adapter_config.json`.

    Raises:
        `ValueError`: if it is another kind of adapter than a LoRA.
    """
    path = Path(source)
    if path.exists() and not (path / _CONFIG_FILE).is_file():
        return None
    where = {} if path.exists() else access
    try:
        config = PeftConfig.from_pretrained(os.fspath(source), **where)
    except ValueError:  # what PEFT makes of every missing file, folder, repository or network
        return None
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{os.fspath(source)!r} is a {config.peft_type}; training goes on from a LoRA only.")
    weights = load_peft_weights(os.fspath(source), device="cpu", **where)
    return Adapter(config, weights, config.base_model_name_or_path)


def take_adapter(transformer: nn.Module) -> tuple[nn.Module, Adapter | None]:
    """
    Take the LoRA off a transformer that carries one.

    Args:
        transformer (`torch.nn.Module`):
            A `PeftModel`, or a diffusers model into which `load_lora_weights` or `add_adapter` put a LoRA. It is
            changed: the LoRA's layers are gone afterwards.

    Returns:
        The bare transformer, and its [`Adapter`] or `None`.

    Raises:
        `ValueError`: if there are several adapters, it is another kind of adapter, or it is merged into the weights.
    """
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        return transformer, None
    configs = transformer.peft_config
    if len(configs) != 1:
        raise ValueError(
            f"The transformer carries several adapters, {sorted(configs)}; training goes on from one. After an "
            "earlier training in this process, load the pipeline anew, and the LoRA that was saved. Otherwise delete "
            "the others (`pipeline.delete_adapters(name)`)."
        )
    ((name, config),) = configs.items()
    if not isinstance(config, LoraConfig):
        raise ValueError(f"The transformer carries a {config.peft_type}; training goes on from a LoRA only.")
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "The transformer's adapter is merged into its weights. To go on from it, undo that first "
            "(`pipeline.unfuse_lora()`); to train a new one on the merged weights, drop it "
            "(`pipeline.unload_lora_weights()`)."
        )
    weights = {
        key if key.startswith(_PREFIX) else _PREFIX + key: tensor.detach().cpu().clone()
        for key, tensor in get_peft_model_state_dict(
            transformer, adapter_name=name, save_embedding_layers=False
        ).items()
    }
    scaling = {key.removeprefix(_PREFIX): layer.scaling[name] for key, layer in layers.items()}
    if isinstance(transformer, PeftModel):
        transformer = transformer.unload()
    else:
        transformer.unload_lora()
    return transformer, Adapter(config, weights, config.base_model_name_or_path, scaling)


class Policy:
    """
    The trained transformer and the views of it that a method uses.

    Args:
        transformer (`torch.nn.Module`):
            The network. PEFT injects its layers in place, so a pipeline that holds it runs the policy too.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter to train. Without it the whole transformer is trained.
        views (`tuple[str, ...]`, *optional*):
            Views to keep among `"ema"`, `"old"`, `"reference"` (one that `refresh_reference` moves; without it the
            reference is the base) and `"base"`, which a new adapter gives for nothing. Each other costs the memory of
            the trainable weights.
        start ([`Adapter`], *optional*):
            Weights of the adapter to start from.
        companions (`tuple[str, ...]`, *optional*):
            Names of adapters to train beside the policy's. The base is then the model without any adapter, which they
            start at, also where the policy starts from an adapter.
        old_of (`str`, *optional*):
            Companion that `"old"` is the average of; the policy if not given.

    Raises:
        `ValueError`: if the transformer still carries an adapter, if `start` does not fit, if companions have no
            adapter to be like, if the LoRA's start would change the frozen weights, or if the whole transformer is to
            be trained in half precision, where small steps round to nothing.
    """

    def __init__(
        self,
        transformer: nn.Module,
        peft_config: PeftConfig | None = None,
        views: tuple[str, ...] = (),
        start: Adapter | None = None,
        *,
        companions: tuple[str, ...] = (),
        old_of: str | None = None,
    ):
        if companions and peft_config is None:
            raise ValueError(
                f"The companions {companions} are adapters, and the whole transformer is to be trained. Give a "
                "`peft_config`."
            )
        if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
            raise ValueError(
                "The transformer already carries an adapter, which training would lose. Take it off with "
                "`take_adapter`, and give it as `start`."
            )
        self.transformer = transformer
        self._class = type(transformer)  # FSDP2 gives it another
        if peft_config is None:
            dtypes = {parameter.dtype for parameter in transformer.parameters()}
            if dtypes & {torch.float16, torch.bfloat16}:
                raise ValueError(
                    f"The transformer's weights are {', '.join(map(str, dtypes))}; trained without an adapter they "
                    "must be float32, or small steps round to nothing. Call `pipeline.transformer.float()` first ("
                    "mixed precision is `bf16=True`), or train a LoRA."
                )
            transformer.requires_grad_(True)
            self.model = transformer
            self._views = _Copies(transformer)
        else:
            kind = getattr(peft_config, "init_lora_weights", None)
            if isinstance(kind, str) and kind.startswith(_TAKES_FROM_BASE):
                raise ValueError(
                    f"`init_lora_weights` is {kind!r}, which takes a part of the frozen weights into the adapter: "
                    "switched off, that would leave another model than the one before training. Take 'gaussian'."
                )
            transformer.requires_grad_(False)
            # A base in bfloat16 still gets float32 adapters: PEFT's autocast_adapter_dtype.
            self.model = get_peft_model(transformer, peft_config, adapter_name=_POLICY)
            self._views = _Adapters(self.model, peft_config)
        self.peft_config = peft_config
        if start is not None:
            self._start_from(start)
        # Switched off, a new adapter is the base.
        self._switch_is_base = peft_config is not None and (start is None or bool(companions))
        self.views = tuple(view for view in dict.fromkeys(views) if view != "base" or not self._switch_is_base)
        self.companions, self._old_of = companions, old_of
        for companion in companions:
            self._views.accompany(companion)
        for view in self.views:
            self._views.add(view, old_of if view == "old" else None)
        for companion in companions:  # PEFT freezes all adapters but the one that it is told to switch on
            for parameter in self.tensors(companion).values():
                parameter.requires_grad_(True)

    @property
    def kept_views(self) -> tuple[str, ...]:
        """Every view that can be entered, companions among them."""
        return (*(("base",) if self._switch_is_base else ()), *self.views, *self.companions)

    @property
    def can_merge(self) -> bool:
        """Whether views can be entered `merged`: a plain LoRA on linear layers, neither quantised nor sharded."""
        return self.peft_config is not None and self._views.unmergeable() is None

    @property
    def merges_exactly(self) -> bool:
        """Whether merging rounds nothing but sums: every adapted weight is float32, the precision of the adapter."""
        return self.can_merge and all(weight.dtype == torch.float32 for weight in self._views.weights())

    def using(self, view: str | None = None, *, merged: bool = False) -> AbstractContextManager[None]:
        """
        Any of the kept views, or the policy itself, also inside another view.

        Args:
            view (`str`, *optional*):
                One of `kept_views`; the policy if not given.
            merged (`bool`, *optional*, defaults to `False`):
                Whether the adapter is added to copies of the weights, for forwards without a gradient and without the
                adapter's dropout. It costs the memory of the adapted layers, and rounds the weights to their own
                dtype. Nothing changes where no adapter is on: in the base of a new one, and without any.

        Raises:
            `ValueError`: if the view is not kept, or its adapter cannot be merged.
        """
        if merged and self.peft_config is not None and (name := self._views.unmergeable()) is not None:
            raise ValueError(
                f"The adapter cannot be merged: {name}. That takes a plain LoRA on linear layers that are neither "
                "quantised nor sharded. Use the view without `merged`."
            )
        return self._views.use(self._kept(view), merged)

    def base(self) -> AbstractContextManager[None]:
        """The model as it was before training."""
        return self.using("base")

    def reference(self) -> AbstractContextManager[None]:
        """What the preference is measured against: the last refresh if there is such a view, else the base."""
        return self.using("reference" if "reference" in self.views else "base")

    def old(self) -> AbstractContextManager[None]:
        """The fast moving average."""
        return self.using("old")

    def ema(self) -> AbstractContextManager[None]:
        """The slow moving average."""
        return self.using("ema")

    def refresh_reference(self) -> None:
        """Make the policy's present weights the reference (GPO, every round)."""
        self._move("reference", 0.0)

    def update_old(self, step: int) -> None:
        """Move the old policy after the optimiser step of this number, from 0."""
        self._move("old", old_decay(step), self._old_of)

    def update_ema(self, step: int) -> None:
        """Move the evaluation average after the optimiser step of this number, from 0."""
        self._move("ema", ema_decay(step))

    def tensors(self, view: str | None = None) -> dict[str, Tensor]:
        """Trainable weights by name, or a view's weights under the same names."""
        return self._views.tensors(self._kept(view))

    def lora_state_dict(self, view: str | None = None) -> dict[str, Tensor]:
        """Adapter weights in PEFT's key format, without an adapter name."""
        # A transformer has no vocabulary; left to itself PEFT looks for one, on the Hub too.
        return get_peft_model_state_dict(
            self.model, adapter_name=self._kept(view) or _POLICY, save_embedding_layers=False
        )

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has sharded the transformer. Then all processes must write at once: see `save`."""
        return isinstance(self.transformer, FSDPModule)

    def save_pretrained(self, directory: str | Path, view: str | None = None, *, write: bool = True) -> None:
        """
        Write one set of weights: a PEFT adapter folder, or without an adapter a diffusers model folder.

        Args:
            directory (`str` or `Path`):
                Where to; made if needed.
            view (`str`, *optional*):
                The view to write; the policy itself if not given.
            write (`bool`, *optional*, defaults to `True`):
                See `save`.
        """
        directory = Path(directory)
        if write:
            directory.mkdir(parents=True, exist_ok=True)
        if self.peft_config is None:
            with self.using(view):
                if self.is_sharded:
                    state = {name: _whole(tensor, write) for name, tensor in self.transformer.state_dict().items()}
                    if write:
                        with torch.device("meta"):  # else it would draw weights first
                            whole = self._class.from_config(self.transformer.config)
                        whole.load_state_dict(state, assign=True)
                        whole.save_pretrained(directory)
                elif write:
                    self.transformer.save_pretrained(directory)
        elif write:
            state = {name: tensor.contiguous().cpu() for name, tensor in self.lora_state_dict(view).items()}
            save_file(state, directory / _ADAPTER_FILE, metadata={"format": "pt"})
            self.peft_config.save_pretrained(directory)

    def save(self, directory: str | Path, *, write: bool = True) -> None:
        """
        Write policy, views and companions for `load`: the policy in `directory`, each other in a folder of its name.

        The base is not among them: it never moves, and whoever resumes starts from the same model.

        Args:
            directory (`str` or `Path`):
                Where to; made if needed.
            write (`bool`, *optional*, defaults to `True`):
                Whether this process writes. Of a sharded policy each process holds a part, and all must call this.
        """
        for view in self._moving():
            target = Path(directory) / (view or "")
            if self.peft_config is not None:
                self.save_pretrained(target, view, write=write)
            else:
                state = {name: _whole(tensor, write) for name, tensor in self.tensors(view).items()}
                if write:
                    target.mkdir(parents=True, exist_ok=True)
                    save_file(state, target / _WEIGHTS_FILE)

    def load(self, directory: str | Path) -> None:
        """
        Restore what `save` wrote, to the bit.

        Raises:
            `FileNotFoundError`: if the policy or one of the views is missing.
            `ValueError`: if a file holds other weights than those that are trained here.
        """
        for view in self._moving():
            path = Path(directory) / (view or "") / (_WEIGHTS_FILE if self.peft_config is None else _ADAPTER_FILE)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: this is not a checkpoint with the views {self.views}.")
            state = load_file(path)
            mine = self.tensors(view) if self.peft_config is None else self.lora_state_dict(view)
            _check_fit(path, state, mine)
            if self.peft_config is None:
                with torch.no_grad():
                    for name, tensor in mine.items():
                        tensor.copy_(_beside(state[name], tensor))
            else:
                set_peft_model_state_dict(self.model, state, adapter_name=view or _POLICY)

    def _start_from(self, start: Adapter) -> None:
        _check_fit("The adapter", start.weights, self.lora_state_dict())
        scaling = {
            name.removeprefix(_PREFIX): module.scaling[_POLICY]
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        if start.scaling not in (None, scaling):
            raise ValueError(
                f"The adapter acts with the factor {max(start.scaling.values())}, its configuration says "
                f"{max(scaling.values())}: its weight was set. Training goes on from weight 1. If that weight was not "
                "meant, undo it (`pipeline.set_adapters(name, 1.0)`); if it was, multiply the `lora_B` weights by it, "
                "and load them with weight 1."
            )
        set_peft_model_state_dict(self.model, start.weights, adapter_name=_POLICY)

    def _moving(self) -> tuple[str | None, ...]:
        return (None, *(view for view in self.views if view != "base"), *self.companions)

    def _kept(self, view: str | None) -> str | None:
        # PEFT passes over an adapter that it does not know, which would make the base of a view that was never kept.
        if view is None or view in self.kept_views:
            return view
        raise ValueError(f"The view {view!r} is not kept; the views are {self.views}. Name it in `views`.")

    def _move(self, view: str, decay: float, to: str | None = None) -> None:
        # view <- decay * view + (1 - decay) * policy, or companion. Lerp with weight 1 is an exact copy.
        mine, theirs = list(self.tensors(view).values()), list(self.tensors(to).values())
        with torch.no_grad():
            torch._foreach_lerp_(mine, [tensor.to(t.dtype) for tensor, t in zip(theirs, mine, strict=True)], 1 - decay)


class _Handles:
    """Where weights stand: looked up once, read anew each time, since FSDP2 puts others in their places."""

    def __init__(self, model: nn.Module, paths: dict[str, str]):
        places = {name: path.rpartition(".") for name, path in paths.items()}
        self.places = {name: (model.get_submodule(module), last) for name, (module, _, last) in places.items()}

    def read(self) -> dict[str, Tensor]:
        return {name: getattr(module, last) for name, (module, last) in self.places.items()}


class _Loan:
    """Other contents for parameters, for the length of a `with`."""

    def __init__(self):
        self.own: list[Tensor] | None = None  # the parameters' own, while others are lent

    @contextmanager
    def lend(self, parameters: list[Tensor], contents: list[Tensor] | None) -> Iterator[None]:
        """Without `contents`, the parameters' own, also inside another loan."""
        if contents is None and self.own is None:
            yield
            return
        before, outer = [_contents(p) for p in parameters], self.own
        if self.own is None:
            self.own = before
        try:
            _put(parameters, self.own if contents is None else contents)
            yield
        finally:
            _put(parameters, before)
            self.own = outer


class _Adapters:
    """Views as frozen PEFT adapters; the base is no adapter at all."""

    def __init__(self, model: PeftModel, config: PeftConfig):
        self.model = model
        self.config = config
        # Setting two flags on these is what PEFT's own set_adapter and disable_adapter come down to, without its walk
        # over every module and without its changes to requires_grad.
        self.layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        self.adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.handles = {_POLICY: self._find(_POLICY)}
        self.loan = _Loan()

    def add(self, view: str, like: str | None = None) -> None:
        self._put(view, self.config)
        with torch.no_grad():
            for mine, theirs in zip(self.tensors(view).values(), self.tensors(like).values(), strict=True):
                mine.copy_(theirs)

    def accompany(self, companion: str) -> None:
        # However the policy's was drawn, or wherever it was taken from, this one is no change to the model.
        config = copy.copy(self.config)
        config.init_lora_weights = "gaussian"
        self._put(companion, config)

    def _put(self, adapter: str, config: PeftConfig) -> None:
        self.model.add_adapter(adapter, config)
        self.model.set_adapter(_POLICY)
        self.handles[adapter] = self._find(adapter)

    def tensors(self, view: str | None = None) -> dict[str, Tensor]:
        return self.handles[view or _POLICY].read()

    @contextmanager
    def use(self, view: str | None, merged: bool = False) -> Iterator[None]:
        name, off = view or _POLICY, view == "base" and "base" not in self.handles
        merged = merged and not off
        weights = self.weights() if merged or self.loan.own is not None else []
        contents = self._merge(name, weights) if merged else None
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        try:
            for layer in self.layers:
                if off:
                    layer._disable_adapters = True
                else:  # what is merged is switched off; a whole saved module is not
                    layer._active_adapter = [name]
                    layer._disable_adapters = merged and isinstance(layer, BaseTunerLayer)
            with self.loan.lend(weights, contents):
                yield
        finally:
            for layer, (active, disabled) in zip(self.layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def weights(self) -> list[Tensor]:
        return [layer.get_base_layer().weight for layer in self.adapted.values()]

    def unmergeable(self) -> str | None:
        """A layer that cannot be merged, in words."""
        for name, layer in self.adapted.items():
            base = layer.get_base_layer()
            if type(layer) is not LoraLinear or not isinstance(base, nn.Linear):
                return f"{name!r} is a {type(layer).__name__} on a {type(base).__name__}"
            if type(base.weight) is not nn.Parameter or base.weight.dtype not in _MERGEABLE:
                return f"the weight of {name!r} is a {type(base.weight).__name__} of {base.weight.dtype}"
            if layer.lora_variant or any(layer.lora_bias.values()):
                return f"the adapter of {name!r} is not a product of two matrices alone"
        return None

    def _merge(self, name: str, weights: list[Tensor]) -> list[Tensor]:
        """New weights. Nothing here waits for the device."""
        merged = []
        own = [weight.data for weight in weights] if self.loan.own is None else self.loan.own
        with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
            for layer, weight in zip(self.adapted.values(), own, strict=True):
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                wide = torch.promote_types(weight.dtype, torch.float32)
                total = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=layer.scaling[name])
                merged.append(total.to(weight.dtype))
        return merged

    def _find(self, adapter: str) -> _Handles:
        # The last part of a name that is the adapter's is the adapter's: before it may be a module of the same name.
        parts = {name: name.rpartition(f".{_POLICY}") for name in self.names}
        return _Handles(self.model, {name: f"{head}.{adapter}{tail}" for name, (head, _, tail) in parts.items()})


class _Copies:
    """Views as frozen copies of all trainable weights."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.handles = _Handles(model, {name: name for name, p in model.named_parameters() if p.requires_grad})
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.loan = _Loan()

    def add(self, view: str, like: str | None = None) -> None:
        self.copies[view] = {name: p.detach().clone() for name, p in self.tensors(like).items()}

    def tensors(self, view: str | None = None) -> dict[str, Tensor]:
        _reshard(self.model)
        parameters = self.handles.read()
        if view is None:
            return parameters
        # The model may have been moved, or sharded, since they were made.
        self.copies[view] = {name: _beside(copy, parameters[name]) for name, copy in self.copies[view].items()}
        return self.copies[view]

    @contextmanager
    def use(self, view: str | None, merged: bool = False) -> Iterator[None]:
        contents = None if view is None else list(self.tensors(view).values())
        with self.loan.lend(list(self.tensors().values()), contents):
            try:
                yield
            finally:
                _reshard(self.model)


def _contents(parameter: Tensor) -> Tensor:
    return parameter.detach().to_local().clone() if isinstance(parameter, DTensor) else parameter.data


def _put(parameters: list[Tensor], contents: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, content in zip(parameters, contents, strict=True):
            if isinstance(parameter, DTensor):  # FSDP2 gathers from this storage, whatever `data` is
                parameter.to_local().copy_(content.to_local() if isinstance(content, DTensor) else content)
            else:
                parameter.data = content.to(parameter.dtype)  # a copy may be wider: DeepSpeed casts what it trains


def _beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor where the parameter is, and sharded as it."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        # Every process has the whole of it, so none needs to send.
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """The tensor on the CPU. All processes must ask for a sharded one, also those that do not keep it."""
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.contiguous().cpu() if keep else None


def _reshard(model: nn.Module) -> None:
    # FSDP2 leaves the root's weights gathered after a forward, and would not gather them again.
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _check_fit(what: object, state: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    if differing := state.keys() ^ mine.keys():
        raise ValueError(
            f"{what} does not fit: {len(differing)} weights are only there or only here, such as {min(differing)!r}. "
            "It was made with another model or `peft_config`."
        )
    if differing := [name for name in mine if state[name].shape != mine[name].shape]:
        name = min(differing)
        raise ValueError(
            f"{what} does not fit: {name!r} has shape {tuple(state[name].shape)} there and {tuple(mine[name].shape)} "
            "here. It was made with another model or `peft_config`."
        )
