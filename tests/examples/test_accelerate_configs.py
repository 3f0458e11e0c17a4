"""`accelerate launch` reads the configurations as they are meant, and the page of engines says what holds of them."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from trl_dgpo.engines import ENGINES, check_engine


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
ENGINE = {"ddp": "ddp", "ddp_multi_node": "ddp_nodes", "fsdp2": "fsdp2", "zero2": "zero2"}
PREPARE = {
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1],
    "simple_launcher": lambda args: prepare_simple_launcher_cmd_env(args)[1],
}


def environment(monkeypatch, *flags) -> tuple[str, dict[str, str]]:
    """The launcher that `accelerate launch` takes, and what it would leave to the processes."""
    taken = {}
    for name in PREPARE:
        monkeypatch.setattr(launch, name, lambda args, name=name: taken.update({name: args}))
    launch.launch_command(launch.launch_command_parser().parse_args([*flags, "train.py"]))
    ((name, args),) = taken.items()
    return name, PREPARE[name](args)


def arguments(left, **changes):
    plugin = None
    if left.get("ACCELERATE_USE_DEEPSPEED") == "true":
        given = {"gradient_accumulation_steps": left["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]}
        plugin = SimpleNamespace(zero_stage=int(left["ACCELERATE_DEEPSPEED_ZERO_STAGE"]), get_value=given.__getitem__)
    defaults = {
        "device": torch.device("cuda", 0),
        "world_size": 16,
        "full_finetuning": True,
        "gradient_accumulation_steps": 96,
        "num_log_images": 0,
        "fsdp": None,
        "deepspeed": None,
        "deepspeed_plugin": plugin,
        "parallelism_config": None,
        "allow_unverified_engine": False,
        "push_to_hub": False,
    }
    return SimpleNamespace(**defaults | changes)


def test_each_file_is_known():
    assert [file.stem for file in FILES] == sorted(ENGINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_what_the_file_says(file, monkeypatch):
    config = load_config_from_file(os.fspath(file))
    assert type(config) is ClusterConfig
    launcher, left = environment(monkeypatch, "--config_file", os.fspath(file))
    assert launcher == ("deepspeed_launcher" if file.stem == "zero2" else "multi_gpu_launcher")
    assert left["ACCELERATE_MIXED_PRECISION"] == "no"
    for variable, value in left.items():
        monkeypatch.setenv(variable, value)
    nodes = 2 if file.stem == "ddp_multi_node" else 1
    assert config.num_machines == nodes
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(16 // nodes))
    engine = ENGINES[ENGINE[file.stem]]
    assert check_engine(arguments(left, allow_unverified_engine=True)) == ENGINE[file.stem]
    if engine.state == "not run":
        with pytest.raises(ValueError, match=f"{engine.name} was not run"):
            check_engine(arguments(left))
    assert re.search("not run", file.read_text(), re.IGNORECASE)  # none of them was: they are for GPUs


def test_fsdp2_wraps_a_block_that_is_there(monkeypatch):
    _, left = environment(monkeypatch, "--config_file", os.fspath(ROOT / "examples/accelerate_configs/fsdp2.yaml"))
    assert left["FSDP_TRANSFORMER_CLS_TO_WRAP"] == JointTransformerBlock.__name__
    assert left["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    transformer = SD3Transformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    assert type(transformer.transformer_blocks[0]) is JointTransformerBlock


def test_accelerate_starts_one_process_on_a_cpu(monkeypatch, caplog):
    launcher, left = environment(monkeypatch, "--cpu", "--num_processes", "2")
    assert launcher == "simple_launcher"
    for variable in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in left.items():
        monkeypatch.setenv(variable, value)
    check_engine(arguments(left, world_size=1, device=torch.device("cpu")))
    assert "asked for several processes and started one" in caplog.text


def test_the_page_has_a_row_for_each_engine():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", (ROOT / "docs" / "distributed.md").read_text(), re.M)
    states = {name.strip(): (state.strip(), note.strip()) for name, state, note in rows}
    for engine in ENGINES.values():
        assert states[engine.name] == (engine.state, engine.note)
    # A command names a file that is there.
    page = (ROOT / "docs" / "distributed.md").read_text()
    for name in re.findall(r"accelerate_configs/(\w+)\.yaml", page):
        assert name in ENGINE
