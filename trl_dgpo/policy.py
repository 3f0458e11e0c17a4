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
after the `with`, also after an exception.

Enter a view before `autocast`, not inside it: autocast caches the cast weights of the whole of its context.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


_POLICY = "default"
_PREFIX = "base_model.model."  # of a PeftModel's weights, before the transformer's own names
_CONFIG_FILE = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_WEIGHTS_FILE = "weights.safetensors"


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


def lora_config(target_modules: tuple[str, ...]) -> LoraConfig:
    """The LoRA of the authors' released code: rank 64, alpha 128, Gaussian start."""
    return LoraConfig(r=64, lora_alpha=128, init_lora_weights="gaussian", target_modules=list(target_modules))


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

    Raises:
        `ValueError`: if the transformer still carries an adapter, if `start` does not fit, or if the whole transformer
            is to be trained in half precision, where small steps round to nothing.
    """

    def __init__(
        self,
        transformer: nn.Module,
        peft_config: PeftConfig | None = None,
        views: tuple[str, ...] = (),
        start: Adapter | None = None,
    ):
        if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
            raise ValueError(
                "The transformer already carries an adapter, which training would lose. Take it off with "
                "`take_adapter`, and give it as `start`."
            )
        self.transformer = transformer
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
            transformer.requires_grad_(False)
            # A base in bfloat16 still gets float32 adapters: PEFT's autocast_adapter_dtype.
            self.model = get_peft_model(transformer, peft_config, adapter_name=_POLICY)
            self._views = _Adapters(self.model, peft_config)
        self.peft_config = peft_config
        if start is not None:
            self._start_from(start)
        # Switched off, a new adapter is the base.
        self._switch_is_base = peft_config is not None and start is None
        self.views = tuple(view for view in dict.fromkeys(views) if view != "base" or not self._switch_is_base)
        for view in self.views:
            self._views.add(view)

    @property
    def kept_views(self) -> tuple[str, ...]:
        """Every view that can be entered."""
        return (*(("base",) if self._switch_is_base else ()), *self.views)

    def base(self) -> AbstractContextManager[None]:
        """The model as it was before training."""
        return self._use("base")

    def reference(self) -> AbstractContextManager[None]:
        """What the preference is measured against: the last refresh if there is such a view, else the base."""
        return self._use("reference" if "reference" in self.views else "base")

    def old(self) -> AbstractContextManager[None]:
        """The fast moving average."""
        return self._use("old")

    def ema(self) -> AbstractContextManager[None]:
        """The slow moving average."""
        return self._use("ema")

    def refresh_reference(self) -> None:
        """Make the policy's present weights the reference (GPO, every round)."""
        self._move("reference", 0.0)

    def update_old(self, step: int) -> None:
        """Move the old policy after the optimiser step of this number, from 0."""
        self._move("old", old_decay(step))

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

    def save_pretrained(self, directory: str | Path, view: str | None = None) -> None:
        """
        Write one set of weights: a PEFT adapter folder, or without an adapter a diffusers model folder.

        Args:
            directory (`str` or `Path`):
                Where to; made if needed.
            view (`str`, *optional*):
                The view to write; the policy itself if not given.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.peft_config is None:
            with self._use(view):
                self.transformer.save_pretrained(directory)
        else:
            state = {name: tensor.contiguous().cpu() for name, tensor in self.lora_state_dict(view).items()}
            save_file(state, directory / _ADAPTER_FILE, metadata={"format": "pt"})
            self.peft_config.save_pretrained(directory)

    def save(self, directory: str | Path) -> None:
        """
        Write policy and views for `load`: the policy in `directory`, each view in a folder of its name.

        The base is not among them: it never moves, and whoever resumes starts from the same model.
        """
        for view in self._moving():
            target = Path(directory) / (view or "")
            if self.peft_config is not None:
                self.save_pretrained(target, view)
            else:
                target.mkdir(parents=True, exist_ok=True)
                save_file({n: t.contiguous().cpu() for n, t in self.tensors(view).items()}, target / _WEIGHTS_FILE)

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
                        tensor.copy_(state[name])
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
                f"{max(scaling.values())}: its weight was set. Training goes on from weight 1 "
                "(`pipeline.set_adapters(name, 1.0)`)."
            )
        set_peft_model_state_dict(self.model, start.weights, adapter_name=_POLICY)

    def _use(self, view: str | None) -> AbstractContextManager[None]:
        return self._views.use(self._kept(view))

    def _moving(self) -> tuple[str | None, ...]:
        return (None, *(view for view in self.views if view != "base"))

    def _kept(self, view: str | None) -> str | None:
        # PEFT passes over an adapter that it does not know, which would make the base of a view that was never kept.
        if view is None or view in self.kept_views:
            return view
        raise ValueError(f"The view {view!r} is not kept; the views are {self.views}. Name it in `views`.")

    def _move(self, view: str, decay: float) -> None:
        # view <- decay * view + (1 - decay) * policy. Lerp with weight 1 is an exact copy.
        mine, theirs = self.tensors(view), self.tensors()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(mine.values()), [theirs[name].to(t.dtype) for name, t in mine.items()], 1 - decay
            )


class _Adapters:
    """Views as frozen PEFT adapters; the base is no adapter at all."""

    def __init__(self, model: PeftModel, config: PeftConfig):
        self.model = model
        self.config = config
        # Setting two flags on these is what PEFT's own set_adapter and disable_adapter come down to, without its walk
        # over every module and without its changes to requires_grad.
        self.layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.kept: set[str] = set()

    def add(self, view: str) -> None:
        self.kept.add(view)
        self.model.add_adapter(view, self.config)
        self.model.set_adapter(_POLICY)
        with torch.no_grad():
            for name, tensor in self.tensors(view).items():
                tensor.copy_(self.tensors()[name])

    def tensors(self, view: str | None = None) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        # The last part of a name that is the adapter's is the adapter's: before it may be a module of the same name.
        parts = {name: name.rpartition(f".{_POLICY}") for name in self.names}
        return {name: parameters[f"{head}.{view or _POLICY}{tail}"] for name, (head, _, tail) in parts.items()}

    @contextmanager
    def use(self, view: str | None) -> Iterator[None]:
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        try:
            for layer in self.layers:
                if view == "base" and "base" not in self.kept:
                    layer._disable_adapters = True
                else:
                    layer._active_adapter, layer._disable_adapters = [view or _POLICY], False
            yield
        finally:
            for layer, (active, disabled) in zip(self.layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled


class _Copies:
    """Views as frozen copies of all trainable weights."""

    def __init__(self, model: nn.Module):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies: dict[str, dict[str, Tensor]] = {}

    def add(self, view: str) -> None:
        self.copies[view] = {name: p.detach().clone() for name, p in self.parameters.items()}

    def tensors(self, view: str | None = None) -> dict[str, Tensor]:
        return self.parameters if view is None else self.copies[view]

    @contextmanager
    def use(self, view: str | None) -> Iterator[None]:
        before = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = p.data if view is None else self.copies[view][name]
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = before[name]


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
