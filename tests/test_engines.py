"""What may run where, told from the arguments and from what `accelerate launch` leaves in the environment."""

import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers import SD3Transformer2DModel
from tiny_trainers import prompt_dataset, relative_error, same, scramble, tiny_config, tiny_trainer
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import HubStrategy

from trl_dgpo import engines
from trl_dgpo.engines import ENGINES, check_engine, check_installed


LAUNCHED = {"LOCAL_RANK": "0", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}
FSDP = LAUNCHED | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
FSDP_ARGS = {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def arguments(**changes):
    """As on two GPUs."""
    defaults = {
        "device": torch.device("cuda", 0),
        "world_size": 2,
        "full_finetuning": True,
        "gradient_accumulation_steps": 8,
        "num_log_images": 0,
        "fsdp": None,
        "deepspeed": None,
        "deepspeed_plugin": None,
        "parallelism_config": None,
        "allow_unverified_engine": False,
        "push_to_hub": False,
    }
    return SimpleNamespace(**defaults | changes)


def zero(stage, steps="auto"):
    return SimpleNamespace(zero_stage=stage, get_value={"gradient_accumulation_steps": steps}.__getitem__)


def check(monkeypatch, args, environment=LAUNCHED):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return check_engine(args)


@pytest.mark.parametrize("full_finetuning", [False, True])
def test_data_parallelism_is_let_through(full_finetuning, monkeypatch, caplog):
    args = arguments(full_finetuning=full_finetuning)
    assert check(monkeypatch, arguments(world_size=1), {}) == "one"
    assert check(monkeypatch, args) == "ddp"
    assert check(monkeypatch, args, LAUNCHED | {"LOCAL_WORLD_SIZE": "1"}) == "ddp_nodes"
    assert all(ENGINES[key].state == "run" for key in ("one", "ddp", "ddp_nodes"))
    assert not caplog.records


def test_arguments_of_a_real_configuration(tmp_path):
    assert check_engine(tiny_config(tmp_path)) == "one"


@pytest.mark.parametrize(
    ("changes", "environment", "key"),
    [
        ({}, FSDP, "fsdp2"),
        (FSDP_ARGS, LAUNCHED, "fsdp2"),
        ({"deepspeed_plugin": zero(2)}, LAUNCHED, "zero2"),
        ({"deepspeed_plugin": zero(1, 8)}, LAUNCHED, "zero2"),
    ],
)
def test_what_was_not_run_is_refused_until_it_is_asked_for(changes, environment, key, monkeypatch, caplog):
    with pytest.raises(ValueError, match=r"was not run with this package.*`allow_unverified_engine=True`"):
        check(monkeypatch, arguments(**changes), environment)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert check(monkeypatch, arguments(**changes, allow_unverified_engine=True), environment) == key
    assert f"{ENGINES[key].name} was not run" in caplog.text


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({}, FSDP | {"FSDP_VERSION": "1"}, "FSDP1 is refused"),
        ({}, LAUNCHED | {"ACCELERATE_USE_FSDP": "true"}, "FSDP1 is refused"),  # accelerate's default version
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, LAUNCHED, "FSDP1 is refused"),
        ({"deepspeed_plugin": zero(3)}, LAUNCHED, "ZeRO-3 is refused.*use FSDP2"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, LAUNCHED, "tensor, context.* is refused"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, FSDP, "tensor, context.* is refused"),
        (
            {},
            FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"},
            "tensor, context.* is refused",
        ),
        ({}, LAUNCHED | {"ACCELERATE_USE_MEGATRON_LM": "true"}, "tensor, context.* is refused"),
        ({"full_finetuning": False}, FSDP, "shard a frozen model.*plain DDP"),
        ({"device": torch.device("cpu")}, FSDP, "FSDP2 was asked for on a CPU, where it is passed over"),
        (
            {"device": torch.device("cpu"), "deepspeed_plugin": zero(2)},
            LAUNCHED,
            "ZeRO-1 and 2 was asked for on a CPU",
        ),
        ({"num_log_images": 8}, FSDP, "`num_log_images` is 8.*Set `num_log_images=0`"),
        ({"push_to_hub": True, "hub_strategy": HubStrategy.EVERY_SAVE}, FSDP, "Set `hub_strategy='end'`"),
        ({}, FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "type is SHARDED_STATE_DICT.*Set it to FULL"),
        (FSDP_ARGS, {}, "a process that no launcher started"),
        ({"deepspeed_plugin": zero(2), "deepspeed": "ds.json"}, LAUNCHED, "`deepspeed` is 'ds.json'.*auto"),
        ({"deepspeed_plugin": zero(2, 1)}, LAUNCHED, "is 1, but the round makes it 8. Set it to `auto`"),
    ],
)
def test_what_goes_wrong_is_refused_always(changes, environment, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        check(monkeypatch, arguments(**changes, allow_unverified_engine=True), environment)


def test_data_may_be_parallel_by_a_parallelism_config(monkeypatch):
    config = ParallelismConfig(dp_replicate_size=2)
    assert check(monkeypatch, arguments(parallelism_config=config)) == "ddp"


def test_zero_for_a_lora_says_what_does_it(monkeypatch):
    with pytest.raises(ValueError, match=r"plain DDP.*`allow_unverified_engine=True`"):
        check(monkeypatch, arguments(full_finetuning=False, deepspeed_plugin=zero(2)))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_on_a_cpu(version, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # `TrainingArguments` sets it; to be put back
    args = tiny_config(tmp_path, fsdp=True, fsdp_config={"version": version}, full_finetuning=True)
    args.allow_unverified_engine = True
    with pytest.raises(ValueError, match="FSDP1 is refused" if version == 1 else "asked for on a CPU"):
        check_engine(args)


def test_a_launcher_that_starts_one_process_of_several(monkeypatch, caplog):
    # What `accelerate launch --cpu --num_processes 2` leaves: tests/examples/test_accelerate_configs.py asks it.
    check(monkeypatch, arguments(world_size=1), {"ACCELERATE_MIXED_PRECISION": "no"})
    assert not caplog.records
    check(monkeypatch, arguments(world_size=1), {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})
    assert "asked for several processes and started one" in caplog.text


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    check_installed(None)
    with pytest.raises(ValueError, match="asked for and not installed"):
        check_installed({"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="asked for and not installed"):
        check_installed(None)


# -- trainings


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_learns(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "first", "second")}
    start([[sys.executable, __file__, folders["one"]]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    agent = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *where]
    nodes = [
        [*agent, "--node_rank", str(rank), __file__, folders[name]] for rank, name in enumerate(("first", "second"))
    ]
    start(nodes)
    one, first, second = (learned(folders["one"]), learned(folders["first"]), learned(folders["second"], 1))
    assert same(first, second)
    assert relative_error(first, one) < 1e-5
    for name in ("first", "second"):
        shutil.rmtree(folders[name] / "checkpoint-5")
    start([[*node, "--resume"] for node in nodes])  # from step 3, in the middle of a round of 4
    assert same(learned(folders["first"]), first)
    assert same(learned(folders["second"], 1), first)


@pytest.mark.slow
def test_fsdp2_learns_what_one_process_learns(tmp_path):
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "JointTransformerBlock",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    start([[sys.executable, __file__, tmp_path / "one", "--full"]])
    two = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", __file__, tmp_path / "two", "--full"]
    start([two], fsdp)
    one, first, second = learned(tmp_path / "one"), learned(tmp_path / "two"), learned(tmp_path / "two", 1)
    assert same(first, second)
    assert relative_error(first, one) < 1e-5
    exported = SD3Transformer2DModel.from_pretrained(tmp_path / "two" / "transformer").state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in learned(tmp_path / "two", view="ema").items())
    shutil.rmtree(tmp_path / "two" / "checkpoint-5")
    start([[*two, "--resume"]], fsdp)
    assert same(learned(tmp_path / "two"), first)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(commands, environment=None):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def learned(folder: Path, rank: int = 0, view: str | None = None) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights_{rank}.pt")[view]


def train(folder: Path, resume: bool, full: bool) -> None:
    """One of the processes. A LoRA's group of four spans both."""
    trainer = tiny_trainer(
        folder,
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        per_device_train_batch_size=4 if full else 2,
        prompts_per_round=4 if full else 2,
        num_iterations=2,
        updates_per_round=2,
        max_steps=5,
        kl_coef=0.1,
        clip_range=1e-3,
        old_policy_after=2,
        beta=1e4,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        save_on_each_node=not full,
        full_finetuning=full,
        allow_unverified_engine=full,
    )
    scramble(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    views = {view: trainer.policy.tensors(view) for view in (None, *trainer.policy.views)}
    whole = {
        view: {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()
        }
        for view, tensors in views.items()
    }
    torch.save(whole, folder / f"weights_{trainer.args.process_index}.pt")


def lift_the_bar() -> None:
    """Let accelerate use FSDP on a CPU, where it otherwise passes over it, and us too."""
    plain = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    engines._check_effective = lambda args, engine: None


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        lift_the_bar()
    train(Path(sys.argv[1]), "--resume" in sys.argv, "--full" in sys.argv)
