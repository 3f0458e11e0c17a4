"""
The host never waits for the device while there is work to give it, and no tensor meets one of another device.

A GPU's stand-in is the meta device, whose tensors have shapes and no numbers: a round is sampled on the CPU, then
model and rollouts are moved there, and the loops run under watch, forward and backward.
"""

import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_trainers import rewards_by_position, scramble, tiny_trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trl_dgpo
from trl_dgpo import DGPOConfig, DGPOTrainer, GPOTrainer
from trl_dgpo.backbones import to_device
from trl_dgpo.trainer import base_trainer, dgpo_trainer


AWAY = torch.device("meta")
PACKAGE = str(Path(trl_dgpo.__file__).parent)
# Whoever calls these copies from pinned memory on a GPU, which the host need not wait for.
QUICK_COPIES = {"to_device"}

# Their results, or the sizes of their results, are numbers that the host has to know.
READ_BY_THE_HOST = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
MADE_OF_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
SUBSCRIPTS = {Tensor.__getitem__, Tensor.__setitem__}

NAN = float("nan")
# One image is masked, and one group has no preference.
REWARDS = rewards_by_position(0.1, 0.9, 0.3, 0.2, 0.0, NAN, 0.4, 0.7, *[0.5] * 4, 0.7, 0.2, 0.9, 0.1)


class Fault(NamedTuple):
    """What would make the host wait, or be refused, on a GPU."""

    kind: str
    operator: str
    place: str


class Watch(TorchDispatchMode):
    """Finds the faults of all operators within the context, those of the backward too."""

    def __init__(self):
        super().__init__()
        self.found: list[Fault] = []
        self._calls = _Calls(self)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kind := _fault(name, tensors, args, kwargs):
            self.note(kind, name)
        if name == "_local_scalar_dense" and tensors[0].device == AWAY:
            return 0.0  # a number as good as any, to go on with
        return func(*args, **kwargs)

    def note(self, kind: str, operator: str) -> None:
        place, frame = [], sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE):
                if kind == "copy" and code.co_name in QUICK_COPIES:
                    return
                place.append(f"{Path(code.co_filename).name}:{frame.f_lineno}")
            frame = frame.f_back
        self.found.append(Fault(kind, operator, " < ".join(place[:3]) or "outside the package"))


class _Calls(TorchFunctionMode):
    """Copies that the meta device, which needs no numbers, leaves out before any operator is called."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MADE_OF_NUMBERS:
            device = kwargs.get("device", args[0].device if func is Tensor.new_tensor else None)
            source = args[1] if func is Tensor.new_tensor else args[0]
            if device is not None and torch.device(device) == AWAY and not isinstance(source, Tensor):
                self.watch.note("copy", func.__name__)
        elif func in SUBSCRIPTS and args[0].device == AWAY:
            subscript = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in subscript):
                self.watch.note("copy", func.__name__)
        return func(*args, **kwargs)


def _fault(name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> str | None:
    devices = {tensor.device for tensor in tensors}
    if name == "_to_copy":
        devices.add(torch.device(kwargs.get("device") or args[0].device))
    if AWAY not in devices:
        return None
    if name in ("_to_copy", "copy_"):
        return "copy" if len(devices) > 1 else None
    if name in READ_BY_THE_HOST or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return "read"
    if name in INDEXING:
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return "read"
        return "mixed" if len(devices) > 1 else None
    # A number in a CPU tensor goes along with the call.
    return "mixed" if any(tensor.device != AWAY and tensor.ndim for tensor in tensors) else None


@contextmanager
def watched():
    with Watch() as watch:
        yield
    assert not watch.found, "\n".join(map(str, watch.found))


@pytest.fixture
def trainer_away(tmp_path, monkeypatch):
    """Makes a trainer with a round on the CPU, and moves all that a GPU would hold to the stand-in."""

    def make(trainer_class: type[DGPOTrainer] = DGPOTrainer, **config) -> DGPOTrainer:
        config = {"reward_funcs": REWARDS, "sample_batch_size": 16, "sample_guidance_scale": 4.5, **config}
        trainer = tiny_trainer(tmp_path, trainer_class, **config)
        scramble(trainer)
        trainer.model.train()
        trainer._roll_out(0)
        trainer._metrics.clear()
        for module in (trainer.policy.model, trainer.backbone.vae):
            _move(module)
        for view in trainer.policy.views:
            trainer.policy.tensors(view)  # copies of all weights follow these when they are asked for
        trainer.buffer.fill(trainer.buffer.record.to(AWAY), 0)
        monkeypatch.setattr(DGPOConfig, "device", property(lambda _: AWAY))
        monkeypatch.setattr(torch, "autocast", _Autocast)
        return trainer

    return make


def _move(module: torch.nn.Module) -> None:
    # `Module.to` would do, but for weights that are tied or looked up by PEFT.
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.empty_like(parameter, device=AWAY)
                part._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=AWAY)


class _Autocast(torch.autocast):
    """Autocast, which the stand-in has not; it is only ever switched off here."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == AWAY.type else device_type, *args, **kwargs)


@pytest.mark.parametrize(
    ("sampler", "merge_adapter"),
    [
        ("dpm", True),
        ("sde", False),
        pytest.param("dpm", False, marks=pytest.mark.slow),
        pytest.param("euler", True, marks=pytest.mark.slow),
        pytest.param("euler", False, marks=pytest.mark.slow),
        pytest.param("sde", True, marks=pytest.mark.slow),
    ],
)
def test_sampling_and_decoding(trainer_away, monkeypatch, sampler, merge_adapter):
    trainer = trainer_away(sampler=sampler, merge_adapter=merge_adapter, decode_batch_size=1)
    monkeypatch.setattr(base_trainer.OnTheWay, "send", lambda images: images)

    def sample() -> list[Tensor]:
        sampled = trainer._sample(
            lambda rows: torch.zeros(len(range(3)[rows]), *trainer._latent_shape),
            ["a", "b", "a"],
            batch_size=2,
            num_steps=3,
            guidance_scale=4.5,
            step_noise=trainer._step_noise(0, [(0, i) for i in range(3)]) if sampler == "sde" else None,
        )
        return [images for *_, images in sampled]

    with trainer.policy.using(merged=merge_adapter):
        sample()  # the schedule and the negative prompt are brought once
        with watched():
            images = sample()
    assert [(i.device, tuple(i.shape)) for i in images] == [(AWAY, (2, 3, 32, 32)), (AWAY, (1, 3, 32, 32))]


UPDATES = {
    "dgpo": (DGPOTrainer, {}),
    "kl and clip": (DGPOTrainer, {"kl_coef": 0.1, "clip_range": 1e-3}),
    "cut groups": (DGPOTrainer, {"kl_coef": 0.1, "clip_range": 1e-3, "per_device_train_batch_size": 2}),
    "cut groups, logsigmoid": (DGPOTrainer, {"loss_type": "logsigmoid", "per_device_train_batch_size": 2}),
    "guided reference": (DGPOTrainer, {"reference_guidance_scale": 4.5, "kl_coef": 0.1}),
    "full": (DGPOTrainer, {"full_finetuning": True, "kl_coef": 0.1}),
    "gpo": (GPOTrainer, {"num_train_timesteps": 2, "num_iterations": 1}),
}


QUICK = ("cut groups", "guided reference", "gpo")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in UPDATES]
)
def test_an_update(trainer_away, case):
    trainer_class, config = UPDATES[case]
    trainer = trainer_away(trainer_class, **config)
    part = trainer._part(0, 0, 0)
    assert not part.learned_from.all()
    with watched():
        fixed = trainer._fix(part)
    batches = trainer._micro_batches(part)
    work = [(part, fixed, batch, level) for level in range(len(part.sigmas)) for batch in batches]
    assert len(work) == trainer.args.gradient_accumulation_steps
    trainer._work.extend(work)
    with watched():
        while trainer._work:
            loss = trainer.compute_loss(trainer.model, [0])
            loss.backward()
        for view in set(trainer.policy.views) & {"old", "ema"}:
            getattr(trainer.policy, f"update_{view}")(3)
    assert loss.device == AWAY
    assert all(tensor.grad.device == AWAY for tensor in trainer.policy.tensors().values())
    logged = [value for values in trainer._metrics.values() for value in values]
    assert logged
    assert all(value.device == AWAY for value in logged)


FAULTS = {
    "item": ("read", lambda errors: errors.mean().item()),
    "float": ("read", lambda errors: float(errors.sum())),
    "if": ("read", lambda errors: 1 if errors.sum() > 0 else 0),
    "nonzero": ("read", lambda errors: errors.nonzero()),
    "where": ("read", lambda errors: torch.where(errors > 0)),
    "mask": ("read", lambda errors: errors[errors > 0]),
    "masked assignment": ("read", lambda errors: errors.clone().__setitem__(errors > 0, errors)),
    "masked_select": ("read", lambda errors: errors.masked_select(errors > 0)),
    "unique": ("read", lambda errors: errors.unique()),
    "bincount": ("read", lambda errors: errors.long().bincount()),
    "to the host": ("copy", lambda errors: errors.cpu()),
    "list": ("copy", lambda errors: errors.tolist()),
    "copy to the host": ("copy", lambda errors: torch.zeros(len(errors)).copy_(errors)),
    "to the device": ("copy", lambda errors: torch.zeros(len(errors)).to(errors.device)),
    "number": ("copy", lambda errors: torch.tensor(0.5, device=errors.device)),
    "numbers": ("copy", lambda errors: torch.as_tensor([0.5, 1.0], device=errors.device)),
    "new tensor": ("copy", lambda errors: errors.new_tensor([0.5])),
    "list as index": ("copy", lambda errors: errors[[0]]),
    "mixed": ("mixed", lambda errors: errors + torch.zeros(len(errors))),
    "index on the host": ("mixed", lambda errors: errors[torch.tensor([0])]),
    "assignment by an index on the host": ("mixed", lambda errors: errors.clone().__setitem__(torch.tensor([0]), 1.0)),
    "index on the device": ("mixed", lambda errors: torch.zeros(len(errors))[torch.zeros_like(errors).long()]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_that_a_fault_is_found(fault):
    kind, planted = FAULTS[fault]
    # Some are impossible with tensors that have no numbers.
    with Watch() as watch, suppress(NotImplementedError, RuntimeError):
        planted(torch.ones(4, device=AWAY))
    assert kind in [found.kind for found in watch.found]


def test_that_the_innocent_go_free():
    with watched():
        x = torch.ones(4, 2, device=AWAY, requires_grad=True)
        y = (
            (x[1:] * 0.5 + torch.tensor(2.0))
            .where(x[1:] > 0, torch.nan)
            .index_select(0, torch.zeros(1, dtype=torch.long, device=AWAY))
        )
        y[0, 0] = 1.0
        y.to(torch.bfloat16).float().mean().backward()
        assert torch.zeros(3).cumsum(0)[-1].item() == 0  # on the CPU nobody waits


@pytest.mark.parametrize("fault", ["item", "to the device", "mixed"])
def test_that_a_fault_in_the_loss_is_found(trainer_away, monkeypatch, fault):
    kind, planted = FAULTS[fault]
    right = dgpo_trainer.denoising_error
    trainer = trainer_away()
    trainer._begin_update()

    def faulty(prediction, target):
        errors = right(prediction, target)
        planted(errors)
        return errors

    monkeypatch.setattr(dgpo_trainer, "denoising_error", faulty)
    with Watch() as watch, suppress(RuntimeError):
        trainer.compute_loss(trainer.model, [0]).backward()
    assert {(found.kind, found.place.split(":")[0]) for found in watch.found} == {(kind, "dgpo_trainer.py")}


def test_that_rows_on_the_wrong_device_are_found(trainer_away):
    trainer = trainer_away()
    trainer._begin_update()
    part, fixed, batch, level = trainer._work[0]
    trainer._work[0] = (part, fixed, replace(batch, rows=torch.arange(4)), level)
    with Watch() as watch:
        trainer.compute_loss(trainer.model, [0])
    assert {(found.kind, found.operator) for found in watch.found} == {("mixed", "index")}


class HostTensor:
    """What a copy to a GPU asks of a tensor."""

    is_in_pinned_memory = False

    def pin_memory(self):
        pinned = HostTensor()
        pinned.is_in_pinned_memory = True
        return pinned

    def is_pinned(self):
        return self.is_in_pinned_memory

    def to(self, device, non_blocking=False):
        assert self.is_in_pinned_memory
        assert non_blocking
        return device


def test_copies_to_a_gpu_leave_from_pinned_memory():
    gpu = torch.device("cuda")
    assert to_device(HostTensor(), gpu) == gpu
