"""What DDPO's users bring means here what it meant there, or they are told."""

import copy
import json
import re
import warnings
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from trl_dgpo import DGPOConfig, FlowGRPOConfig, GPOConfig, ddpo_compat
from trl_dgpo.ddpo_compat import (
    DDPOFields,
    DefaultDGPOStableDiffusionPipeline,
    GRPOFields,
    ImageSamplesHook,
    PromptStream,
    from_ddpo,
    modern_call,
    resolve_names,
    to_ddpo,
)
from trl_dgpo.rewards.scoring import RewardOutputError, RewardScorer
from trl_dgpo.rollout import ScoredImages


MIGRATION = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()

# Every name of `DDPOConfig` in TRL 0.23, a value as on its command line, and what that makes here.
DDPO = {
    "exp_name": ("first", {"run_name": "first"}),
    "run_name": ("second", {"run_name": "second"}),
    "seed": ("7", {"seed": 7}),
    "log_with": ("tensorboard", {"report_to": ["tensorboard"]}),
    "tracker_kwargs": ('{"wandb": {"entity": "me"}}', {}),
    "accelerator_kwargs": ('{"cpu": true}', {}),
    "project_kwargs": ('{"project_dir": "save"}', {"project_kwargs": {"project_dir": "save"}}),
    "tracker_project_name": ("stable_diffusion_training", {"project": "stable_diffusion_training"}),
    "logdir": ("logs", {"logdir": "logs"}),
    "num_epochs": ("200", {"max_steps": 200}),
    "save_freq": ("3", {"save_steps": 3, "save_strategy": "steps"}),
    "num_checkpoint_limit": ("5", {"save_total_limit": 5}),
    "mixed_precision": ("bf16", {"bf16": True, "fp16": False, "mixed_precision": "bf16"}),
    "allow_tf32": ("True", {"tf32": None}),  # as the device has none
    "resume_from": ("", {"resume_from_checkpoint": None}),
    "sample_num_steps": ("50", {"sample_num_steps": 50}),
    "sample_eta": ("1.0", {}),
    "sample_guidance_scale": ("5.0", {"sample_guidance_scale": 5.0}),
    "sample_batch_size": ("6", {"sample_batch_size": 6}),
    "sample_num_batches_per_epoch": ("48", {"prompts_per_round": 2, "num_generations": 24}),
    "train_batch_size": ("24", {"per_device_train_batch_size": 24, "updates_per_round": 24, "train_batch_size": 24}),
    "train_use_8bit_adam": ("True", {"optim": "adamw_bnb_8bit"}),
    "train_learning_rate": ("1e-4", {"learning_rate": 1e-4}),
    "train_adam_beta1": ("0.8", {"adam_beta1": 0.8}),
    "train_adam_beta2": ("0.99", {"adam_beta2": 0.99}),
    "train_adam_weight_decay": ("1e-3", {"weight_decay": 1e-3}),
    "train_adam_epsilon": ("1e-7", {"adam_epsilon": 1e-7}),
    "train_gradient_accumulation_steps": ("48", {"updates_per_round": 12}),
    "train_max_grad_norm": ("0.5", {"max_grad_norm": 0.5}),
    "train_num_inner_epochs": ("2", {"num_iterations": 2}),
    "train_cfg": ("True", {}),
    "train_adv_clip_max": ("3.0", {"advantage_clip": 3.0}),
    "train_clip_range": ("1e-4", {"clip_range": 1e-3}),
    "train_timestep_fraction": ("0.9", {"t_min": 0.1}),
    "per_prompt_stat_tracking": ("True", {}),
    "per_prompt_stat_tracking_buffer_size": ("32", {}),
    "per_prompt_stat_tracking_min_count": ("16", {}),
    "async_reward_computation": ("True", {"async_reward_computation": True}),
    "max_workers": ("4", {"max_workers": 4}),
    "negative_prompts": ("blurry", {"negative_prompt": "blurry"}),
    "push_to_hub": ("True", {"push_to_hub": True}),
}
UNSPENT = {"project_kwargs", "logdir", "train_batch_size", "mixed_precision"}
WARN = {"tracker_kwargs", "accelerator_kwargs", "sample_eta", "train_cfg", "train_clip_range"}

DOCUMENTED = [
    "--num_epochs=200",
    "--train_gradient_accumulation_steps=1",
    "--sample_num_steps=50",
    "--sample_batch_size=6",
    "--train_batch_size=3",
    "--sample_num_batches_per_epoch=4",
    "--per_prompt_stat_tracking=True",
    "--per_prompt_stat_tracking_buffer_size=32",
    "--tracker_project_name=stable_diffusion_training",
    "--log_with=wandb",
]


@dataclass
class Script:
    pretrained_model: str = "tiny"


def parse(*flags: str, config_class=DGPOConfig):
    parser = HfArgumentParser((Script, config_class))
    return parser.parse_args_into_dataclasses([*flags, "--use_cpu"], look_for_args_file=False)[1]


def build(config_class=DGPOConfig, **config):
    return config_class(use_cpu=True, **config)


@pytest.fixture(autouse=True)
def silence_is_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -- names ------------------------------------------------------------------------------------------------------------


def test_all_of_ddpos_names_are_known():
    assert len(DDPO) == 41
    known = {field.name for field in fields(DGPOConfig)}
    assert DDPO.keys() <= known
    ours = known - {field.name for field in fields(DDPOFields)}
    assert DDPO.keys() - ours == {field.name for field in fields(DDPOFields)}
    assert not {field.name for field in fields(DDPOFields)} & {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize("name", DDPO)
@pytest.mark.parametrize("by", ["command line", "code"])
def test_a_name_means_what_it_meant(name, by):
    text, expected = DDPO[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if by == "command line":
            config = parse(f"--{name}={text}")
        else:
            kind = HfArgumentParser(DGPOConfig)._option_string_actions[f"--{name}"].type
            config = build(**{name: json.loads(text) if text.startswith("{") else kind(text)})
    assert [name for warning in told if f"`{name}" in str(warning.message)] == [name] * (name in WARN)
    assert len(told) == (name in WARN)
    assert {target: getattr(config, target) for target in expected} == expected
    if name in {field.name for field in fields(DDPOFields)} - UNSPENT:
        assert getattr(config, name) is None


def test_defaults_are_ours_and_not_ddpos():
    config = build()
    assert {field.name for field in fields(DDPOFields) if getattr(config, field.name) is not None} == {
        "train_batch_size",
        "mixed_precision",
    }


@pytest.mark.parametrize("name", ["train_use_8bit_adam", "train_cfg", "allow_tf32", "per_prompt_stat_tracking"])
def test_a_switch_may_stand_alone(name):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        config = parse(f"--{name}")
    assert bool(told) == (name == "train_cfg")
    assert (config.optim == "adamw_bnb_8bit") == (name == "train_use_8bit_adam")


def test_trls_parser_and_its_files_know_the_names_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_epochs: 3\ntrain_learning_rate: 1.0e-4\nproject_kwargs: {total_limit: 2}\n")
    (config,) = TrlParser(DGPOConfig).parse_args_and_config(
        ["--config", str(recipe), "--num_epochs", "4", "--use_cpu"]
    )
    assert (config.max_steps, config.learning_rate, config.project_kwargs) == (4, 1e-4, {"total_limit": 2})


def test_help_prints():
    text = HfArgumentParser((Script, DGPOConfig)).format_help()
    assert all(f"--{name}" in text for name in DDPO)
    assert all(field.metadata["help"] for field in [*fields(DDPOFields), *fields(GRPOFields)])
    for cls in (DDPOFields, GRPOFields):
        assert re.findall(r"^        (\w+) \(", cls.__doc__, re.M) == [field.name for field in fields(cls)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train_learning_rate": 1e-4, "learning_rate": 1e-3},
            "`train_learning_rate` is 0.0001.* `learning_rate` is 0.001",
        ),
        (
            {"num_epochs": 3, "max_steps": 5},
            "`num_epochs` is 3 rounds of 1 step, .*`max_steps` 3; but `max_steps` is 5",
        ),
        ({"save_freq": 3, "save_strategy": "no"}, "`save_freq` is 3 .*`save_strategy` 'steps'; but .* is 'no'"),
        ({"save_freq": 3, "save_steps": 50}, "`save_freq` is 3 .*`save_steps` 3; but `save_steps` is 50"),
        ({"log_with": "wandb", "report_to": "trackio"}, "`log_with` is 'wandb'.*`report_to` is 'trackio'"),
        ({"mixed_precision": "fp16", "bf16": True}, "`mixed_precision` is 'fp16'.*`bf16` False; but `bf16` is True"),
        ({"mixed_precision": "no", "fp16": True}, "`mixed_precision` is 'no'.*`fp16` is True"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` is 'fp8'; it must be 'no', 'fp16' or 'bf16'"),
        ({"train_timestep_fraction": 0.5, "t_min": 0.6}, "`train_timestep_fraction` is 0.5.*`t_min` is 0.6"),
        ({"train_timestep_fraction": 0.0}, r"`train_timestep_fraction` is 0.0; it must be in \(0, 1\]"),
        ({"train_use_8bit_adam": True, "optim": "adafactor"}, "`train_use_8bit_adam` is True.*`optim` is 'adafactor'"),
        ({"train_num_inner_epochs": 2, "num_iterations": 3}, "`train_num_inner_epochs` is 2.*`num_iterations` is 3"),
        ({"negative_prompts": "a", "negative_prompt": "b"}, "`negative_prompts` is 'a'.*`negative_prompt` is 'b'"),
        ({"project_kwargs": "save"}, "`project_kwargs` is 'save'; it must be a dictionary, .* JSON"),
        ({"num_epochs": 0}, "`num_epochs` is 0; it must be at least 1"),
        ({"save_freq": 0}, "`save_freq` is 0; it must be at least 1"),
        ({"sample_num_batches_per_epoch": 0}, "`sample_num_batches_per_epoch` is 0; it must be at least 1"),
        ({"train_batch_size": 0}, "`train_batch_size` is 0; it must be at least 1"),
        ({"train_batch_size": 24, "train_gradient_accumulation_steps": 0}, "`train_grad.*` is 0; .* at least 1"),
        ({"train_adv_clip_max": 0.0}, "`train_adv_clip_max` is 0.0; it must be above 0"),
        ({"steps_per_generation": 4}, "`steps_per_generation` is 4; .*`prompts_per_round`"),
        ({"generation_batch_size": 64}, "`generation_batch_size` is 64; .*`prompts_per_round`"),
    ],
)
def test_what_contradicts_itself_is_told_with_both_values(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("train_cfg", False, 0),
        ("sample_eta", 0.0, 0),
        ("per_prompt_stat_tracking", True, 0),
        ("per_prompt_stat_tracking", False, 1),
        ("tracker_kwargs", {}, 0),
        ("accelerator_kwargs", {}, 0),
        ("train_clip_range", 1e-3, 1),
    ],
)
def test_what_would_have_mattered_is_warned_of(name, value, count):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        build(**{name: value})
    assert len(told) == count
    assert all(f"`{name}" in str(warning.message) for warning in told)
    assert all(warning.filename == __file__ for warning in told)  # the caller's line


def test_statistics_over_rounds_are_told_apart():
    build(per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=16)
    with pytest.warns(UserWarning, match=r"`per_prompt_stat_tracking_buffer_size` \(32\) without effect: .* 24"):
        build(per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32)


def test_a_clip_of_likelihoods_maps_only_onto_one():
    with pytest.warns(UserWarning, match=r"`train_clip_range` \(0.2\) is not used: .* `clip_range`"):
        assert build(train_clip_range=0.2).clip_range == 1e-3
    assert build(FlowGRPOConfig, train_clip_range=2e-4).clip_range == 2e-4
    with pytest.raises(ValueError, match=r"`train_clip_range` is 0.0002, .*`clip_range` is 0.001"):
        build(FlowGRPOConfig, train_clip_range=2e-4, clip_range=1e-3)
    with pytest.raises(ValueError, match=r"`epsilon` is 0.2; .* denoising errors, .* default is 0.001"):
        build(epsilon=0.2)
    with pytest.raises(ValueError, match=r"`epsilon` is 0.2; .* So does `clip_range`, .* default is 0.0001"):
        build(FlowGRPOConfig, epsilon=0.2)


def test_training_with_guidance_is_the_methods_own():
    assert build(FlowGRPOConfig, train_cfg=True).train_guidance_scale == 4.5
    with pytest.warns(UserWarning, match="`train_cfg=False` has no effect: .*`sample_guidance_scale=1.0`"):
        build(FlowGRPOConfig, train_cfg=False)
    build(FlowGRPOConfig, train_cfg=False, sample_guidance_scale=1.0)


def test_a_rate_that_a_method_would_choose_can_be_given_by_its_old_name():
    assert build(GPOConfig, train_learning_rate=3e-5).learning_rate == 3e-5


def test_tf32_is_asked_for_only_where_it_is(monkeypatch):
    def tf32(is_there, **config):
        monkeypatch.setattr(ddpo_compat, "is_torch_tf32_available", lambda: is_there)
        bare = bare_config(**config)
        resolve_names(bare)
        return bare.tf32

    assert tf32(True, allow_tf32=True) is True
    assert tf32(False, allow_tf32=True) is None
    assert tf32(True, allow_tf32=False) is False
    assert tf32(True) is None


def test_a_folder_of_checkpoints_means_its_last(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    last = str(tmp_path / "checkpoint-10")
    assert build(resume_from=str(tmp_path)).resume_from_checkpoint == last
    assert build(resume_from=str(tmp_path / "checkpoint-5")).resume_from_checkpoint.endswith("checkpoint-5")
    with pytest.raises(ValueError, match=r"`resume_from` is '.*nowhere', which is no checkpoint.*`output_dir`"):
        build(resume_from=str(tmp_path / "nowhere"))


def test_a_name_of_the_run_wins_over_that_of_the_experiment():
    assert build(exp_name="a", run_name="b").run_name == "b"


def test_a_spent_name_stays_spent():
    config = build(num_epochs=3, train_batch_size=48, mixed_precision="no", save_freq=1, train_learning_rate=1e-4)
    for copied in (replace(config), copy.deepcopy(config), replace(config, seed=1)):
        assert {**copied.to_dict(), "seed": 42} == config.to_dict()
    # The copy's own numbers hold, though the first's are also under DDPO's names in it.
    assert replace(config, bf16=True).mixed_precision == "bf16"
    other = replace(config, per_device_train_batch_size=24, updates_per_round=1, gradient_accumulation_steps=None)
    assert other.train_batch_size == other.per_device_train_batch_size == 24


def test_a_configuration_survives_json():
    config = build(num_epochs=3, train_batch_size=48, mixed_precision="no", project_kwargs={"total_limit": 2})
    (again,) = HfArgumentParser(DGPOConfig).parse_dict(json.loads(config.to_json_string()), allow_extra_keys=True)
    assert again.to_dict() == config.to_dict()


# -- the round --------------------------------------------------------------------------------------------------------


@dataclass
class Bare(GRPOFields, DDPOFields):
    """What `resolve_names` reads and writes, without a device: other numbers of processes can be asked for."""

    num_generations: int = 24
    prompts_per_round: int = 24
    updates_per_round: int = 1
    num_iterations: int = 1
    sample_batch_size: int | None = None
    per_device_train_batch_size: int | None = None
    max_steps: int = -1
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    report_to: str = "none"
    project: str = "huggingface"
    run_name: str | None = None
    fp16: bool = False
    bf16: bool | None = None
    tf32: bool | None = None
    optim: str = "adamw"
    resume_from_checkpoint: str | None = None
    t_min: float = 0.4
    clip_range: float | None = 1e-3
    negative_prompt: str = ""
    advantage_clip: float | None = 5.0
    learning_rate: float = 3e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    clips_likelihoods = False
    train_guidance_scale = 1.0


def bare_config(**config) -> Bare:
    return Bare(**config)


def the_round(**config) -> tuple[int, int, int, int | None]:
    """Group size, groups, optimiser steps, and images of a micro-batch."""
    bare = bare_config(**config)
    resolve_names(bare)
    return (
        bare.num_generations,
        bare.prompts_per_round,
        bare.updates_per_round,
        bare.per_device_train_batch_size,
    )


def test_the_documented_flags_are_one_group_of_24_and_one_update():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = parse(*DOCUMENTED)
    assert (config.num_generations, config.prompts_per_round, config.updates_per_round) == (24, 1, 1)
    assert (config.per_device_train_batch_size, config.sample_batch_size, config.max_steps) == (3, 6, 200)
    assert (config.sample_num_steps, config.project, config.report_to) == (
        50,
        "stable_diffusion_training",
        ["wandb"],
    )
    sizes, statistics = (str(warning.message) for warning in told)
    assert (
        "`train_batch_size` (3) x `train_gradient_accumulation_steps` (1): DDPO would take 8 optimiser steps" in sizes
    )
    assert "1 group of 24 images" in sizes
    assert "`updates_per_round` is 1" in sizes
    assert "`per_device_train_batch_size`" not in sizes
    assert "`per_prompt_stat_tracking_buffer_size` (32)" in statistics


# DDPO's numbers, processes -> group size, groups, optimiser steps, micro-batch
@pytest.mark.parametrize(
    ("given", "processes", "expected", "warned"),
    [
        # 48 images: two groups, of which each can be an update
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 8}, 1, (24, 2, 1, None), False),
        (
            {"sample_batch_size": 6, "sample_num_batches_per_epoch": 8, "train_batch_size": 24},
            1,
            (24, 2, 2, 24),
            False,
        ),
        # 30 images: 15 is their largest divisor up to 24
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 5}, 1, (15, 2, 1, None), True),
        # four processes: as many groups again
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 8}, 4, (24, 8, 1, None), False),
        # four times 30 images are groups of 24, of which no process has a whole number
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 5}, 4, (24, 5, 1, None), False),
        # two groups of 15 on two processes: an optimiser step of one group could not be shared
        (
            {"sample_batch_size": 5, "sample_num_batches_per_epoch": 3, "num_generations": 15, "train_batch_size": 5},
            2,
            (15, 2, 1, 5),
            True,
        ),
        # one group for two processes, 12 images each, in micro-batches of 4
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 2, "train_batch_size": 4}, 2, (24, 1, 1, 4), True),
        # a group size of one's own
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 4, "num_generations": 4}, 1, (4, 6, 1, None), False),
        # 24 images in updates of 12: two of three groups each, micro-batches as they were
        (
            {
                "sample_batch_size": 6,
                "sample_num_batches_per_epoch": 4,
                "num_generations": 4,
                "train_batch_size": 4,
                "train_gradient_accumulation_steps": 3,
            },
            1,
            (4, 6, 2, 4),
            False,
        ),
        # updates of 5 images: at most 4 wished, 3 divide six groups; of their 8 images a micro-batch has 4
        (
            {"sample_batch_size": 6, "sample_num_batches_per_epoch": 4, "num_generations": 4, "train_batch_size": 5},
            1,
            (4, 6, 3, 4),
            True,
        ),
        # DDPO's batch size was 1 where it was not given
        ({"sample_num_batches_per_epoch": 24}, 1, (24, 1, 1, None), False),
        ({"train_gradient_accumulation_steps": 48}, 1, (24, 24, 12, None), False),
        # 24 groups on two processes: 12 each, of which six updates of two
        ({"train_batch_size": 24, "train_gradient_accumulation_steps": 2}, 2, (24, 24, 6, 24), False),
        # micro-batches of 5 do not divide the 24 images of an update, those of 4 do
        ({"train_batch_size": 5, "train_gradient_accumulation_steps": 4}, 1, (24, 24, 24, 4), True),
        # what one has set oneself after reading the warning stands
        ({"train_batch_size": 3, "updates_per_round": 24}, 1, (24, 24, 24, 3), False),
        (
            {"train_batch_size": 5, "updates_per_round": 24, "per_device_train_batch_size": 4},
            1,
            (24, 24, 24, 4),
            True,
        ),
    ],
)
def test_ddpos_numbers_make_a_round(given, processes, expected, warned, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert the_round(**given) == expected
    assert bool(told) == warned


def test_the_warnings_say_what_became_of_ddpos_numbers():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert the_round(train_batch_size=5, train_gradient_accumulation_steps=4) == (24, 24, 24, 4)
    steps, batch = (str(warning.message) for warning in told)
    assert "DDPO would take 28 optimiser steps over the 576 images" in steps
    assert "a round is 24 groups of 24 images, so `updates_per_round` is 24" in steps
    assert "`train_batch_size` (5) does not divide the 24 images" in batch
    assert "`per_device_train_batch_size` is 4" in batch


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_whatever_ddpos_numbers_are_the_trainer_takes_the_split(processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    warnings.simplefilter("ignore")
    for images, batch, accumulation in product((2, 6, 10, 15, 24, 48), (1, 2, 3, 5, 24, 32), (1, 2, 4)):
        size, groups, updates, micro_batch = the_round(
            sample_batch_size=images,
            sample_num_batches_per_epoch=1,
            train_batch_size=batch,
            train_gradient_accumulation_steps=accumulation,
        )
        assert size * groups == images * processes
        assert groups % updates == 0
        assert groups // updates * size % (processes * micro_batch) == 0
        assert 2 <= size <= 24
        assert micro_batch <= batch
        assert updates <= max(1, images // (batch * accumulation))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sample_batch_size": 29, "sample_num_batches_per_epoch": 1},
            "are 29 images a round, .* from 2 to 24 divides them",
        ),
        (
            {"sample_batch_size": 1, "sample_num_batches_per_epoch": 1},
            "are 1 image a round, .* from 2 to 24 divides them",
        ),
        (
            {"sample_batch_size": 6, "sample_num_batches_per_epoch": 4, "num_generations": 5},
            r"are 24 images a round, which must be a multiple of `num_generations` \(5\)",
        ),
        (
            {"sample_batch_size": 6, "sample_num_batches_per_epoch": 4, "prompts_per_round": 3},
            "24 images .*groups of 24, which makes `prompts_per_round` 1; but `prompts_per_round` is 3",
        ),
        (
            {"train_batch_size": 24, "updates_per_round": 2},
            r"`train_batch_size` \(24\).*`updates_per_round` 24; but `updates_per_round` is 2",
        ),
        (
            {"train_batch_size": 24, "per_device_train_batch_size": 48},
            "`train_batch_size` is 24.*`per_device_train_batch_size` is 48",
        ),
    ],
)
def test_a_round_that_cannot_be_is_told(given, message):
    with pytest.raises(ValueError, match=message):
        the_round(**given)


def test_epochs_count_all_of_a_rounds_steps():
    with pytest.warns(UserWarning, match="DDPO would take 12"):
        config = build(
            config_class=GPOConfig,
            num_epochs=10,
            save_freq=2,
            num_generations=4,
            sample_batch_size=6,
            sample_num_batches_per_epoch=4,
            train_batch_size=2,
        )
    assert (config.num_iterations, config.updates_per_round, config.steps_per_round) == (3, 6, 18)
    assert (config.max_steps, config.save_steps) == (180, 36)


# -- forms ------------------------------------------------------------------------------------------------------------


def ddpo_reward(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {"seen": len(prompts)}


def keyword_reward(completions, **kwargs):
    return [0.0] * len(completions)


def draw():
    return "a lemon", {"n": 1}


def call(**given):
    names = ("config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook")
    names += ("args", "reward_funcs", "model", "train_dataset")
    return modern_call(**{**dict.fromkeys(names), **given}, config_class=DGPOConfig)


DDPO_FORM = {"reward_function": ddpo_reward, "prompt_function": draw, "sd_pipeline": "tiny"}
TODAY = {"reward_funcs": keyword_reward, "train_dataset": [{"prompt": "a"}], "model": "tiny"}


def test_todays_form_goes_through():
    args = build()
    result = call(**TODAY, args=args)
    assert (result.reward_funcs, result.model, result.train_dataset) == (keyword_reward, "tiny", [{"prompt": "a"}])
    assert result.callbacks == []
    assert result.args.to_dict() == args.to_dict()


def test_ddpos_form_becomes_todays():
    def hook(data, step, tracker):
        pass

    args = build(num_epochs=3)
    result = call(**DDPO_FORM, config=args, image_samples_hook=hook)
    assert isinstance(result.train_dataset, PromptStream)
    assert result.reward_funcs.__name__ == "ddpo_reward"
    assert result.model == "tiny"
    assert [callback.hook for callback in result.callbacks] == [hook]
    assert result.args.max_steps == 3


def test_a_configuration_is_made_where_there_is_none():
    assert isinstance(call(**TODAY).args, DGPOConfig)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**TODAY, "config": "tiny"}, "`config` is 'tiny', a str; it must be a `DGPOConfig`.*`model=`"),
        ({**TODAY, "args": TrainingArguments}, "`args` is .*; it must be a `DGPOConfig`"),
        ({**TODAY, "config": 1, "args": 1}, "`config` is 1, a int"),
        ({**TODAY, "reward_function": ddpo_reward}, "`reward_function` and `reward_funcs` are both given"),
        ({**TODAY, "prompt_function": draw}, "`prompt_function` and `train_dataset` are both given"),
        ({**TODAY, "sd_pipeline": "tiny"}, "`sd_pipeline` and `model` are both given"),
        ({**TODAY, "reward_funcs": None}, r"Neither `reward_funcs` \(today's form\) nor `reward_function` \(DDPO's\)"),
        ({**TODAY, "train_dataset": None}, "Neither `train_dataset` .* nor `prompt_function`"),
        ({**TODAY, "model": None}, "Neither `model` .* nor `sd_pipeline`"),
        ({**DDPO_FORM, "reward_function": [ddpo_reward]}, "`reward_function` is .* a list; .*go to `reward_funcs`"),
        ({**DDPO_FORM, "prompt_function": ["a"]}, "`prompt_function` is .* a list; it must be callable"),
        ({**TODAY, "image_samples_hook": "log"}, "`image_samples_hook` is 'log', a str; it must be callable"),
    ],
)
def test_a_call_that_cannot_be_is_told(given, message):
    with pytest.raises(TypeError, match=message):
        call(**given)


def test_two_configurations_are_one_too_many():
    with pytest.raises(TypeError, match="`config` and `args` are both given"):
        call(**TODAY, config=build(), args=build())


def test_gpo_wants_its_own_configuration():
    with pytest.raises(TypeError, match="a DGPOConfig; it must be a `GPOConfig`"):
        modern_call(
            **dict.fromkeys(("config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook")),
            **TODAY,
            args=build(),
            config_class=GPOConfig,
        )


def test_an_endless_stream_gets_ddpos_epochs(caplog):
    args = build(config_class=DGPOConfig, num_iterations=2)
    assert call(**DDPO_FORM, config=args).args.max_steps == 200
    assert "DDPO's 100 rounds, which are 200 optimiser steps" in caplog.text
    assert args.max_steps == -1


def test_project_kwargs_set_after_parsing_are_read(tmp_path):
    args = build()
    args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    result = call(**DDPO_FORM, config=args).args
    assert (result.output_dir, result.save_total_limit, result.project_kwargs) == ("./save", 5, None)
    assert (args.output_dir, args.save_total_limit, len(args.project_kwargs)) == ("trainer_output", None, 4)
    named = build(output_dir=str(tmp_path), num_checkpoint_limit=2, project_kwargs=args.project_kwargs)
    result = call(**DDPO_FORM, config=named).args
    assert (result.output_dir, result.save_total_limit) == (str(tmp_path), 2)


def test_project_kwargs_are_checked():
    with pytest.raises(ValueError, match=r"`project_kwargs` has \['limit'\]; it may have .*total_limit"):
        call(**DDPO_FORM, config=build(project_kwargs={"limit": 5}))


def test_other_names_set_after_parsing_are_refused():
    args = build()
    args.num_epochs = 5
    with pytest.raises(ValueError, match="`num_epochs` was set after the configuration was built"):
        call(**DDPO_FORM, config=args)


@pytest.mark.parametrize(
    ("config", "variable", "value"),
    [
        ({"log_with": "wandb", "tracker_project_name": "mine"}, "WANDB_PROJECT", "mine"),
        ({"log_with": "wandb"}, "WANDB_PROJECT", None),
        ({"tracker_project_name": "mine"}, "WANDB_PROJECT", None),
        ({"log_with": "tensorboard", "logdir": "there"}, "TENSORBOARD_LOGGING_DIR", "there"),
        ({"log_with": "tensorboard", "project_kwargs": {"logging_dir": "x"}}, "TENSORBOARD_LOGGING_DIR", "x"),
        ({"logdir": "there"}, "TENSORBOARD_LOGGING_DIR", None),
    ],
)
def test_trackers_are_told_where_to_go(config, variable, value, monkeypatch):
    environment = {}
    monkeypatch.setattr(ddpo_compat.os, "environ", environment)
    call(**DDPO_FORM, config=build(**config))
    assert environment.get(variable) == value
    call(
        **DDPO_FORM, config=build(**{**config, "tracker_project_name": "next", "logdir": "next", "project_kwargs": {}})
    )
    assert environment.get(variable) in ("next", None)  # another trainer, another place
    environment[variable] = "the user's"
    call(**DDPO_FORM, config=build(**config))
    assert environment[variable] == "the user's"


def test_the_light_pipeline_says_what_to_train(caplog):
    args = build(model_init_kwargs={"variant": "fp16"})
    pipeline = DefaultDGPOStableDiffusionPipeline("me/sd", pretrained_model_revision="v2", use_lora=False)
    for name in ("sd_pipeline", "model"):
        result = call(**{**DDPO_FORM, "sd_pipeline": None, name: pipeline}, config=args)
        assert result.model == "me/sd"
        assert result.args.model_init_kwargs == {"variant": "fp16", "revision": "v2"}
        assert result.args.full_finetuning
    assert "the whole transformer is trained, with `learning_rate` 0.0003" in caplog.text
    assert args.model_init_kwargs == {"variant": "fp16"}
    assert not args.full_finetuning
    plain = call(**{**DDPO_FORM, "sd_pipeline": DefaultDGPOStableDiffusionPipeline("tiny")}, config=args).args
    assert plain.model_init_kwargs == {"variant": "fp16"}
    with pytest.raises(ValueError, match=r"`pretrained_model_revision` is 'v2', .* revision 'v1'"):
        call(**{**DDPO_FORM, "sd_pipeline": pipeline}, config=build(model_init_kwargs={"revision": "v1"}))


def test_the_light_pipeline_has_nothing_loaded():
    pipeline = DefaultDGPOStableDiffusionPipeline("tiny")
    with pytest.raises(AttributeError, match=r"no `unet`: .*`trainer.sd_pipeline`"):
        _ = pipeline.unet
    assert copy.deepcopy(pipeline).pretrained_model_name == "tiny"


def test_a_prompt_function_is_an_endless_stream():
    drawn = iter(range(9))
    stream = PromptStream(lambda: (np.str_(f"prompt {next(drawn)}"), {"n": 1}))
    first, second = list(islice(stream, 2))
    assert first == {"prompt": "prompt 0", "prompt_metadata": {"n": 1}}
    assert type(first["prompt"]) is str
    assert second["prompt"] == "prompt 1"
    assert next(iter(stream))["prompt"] == "prompt 2"


@pytest.mark.parametrize("drawn", ["ab", ("a", "b", "c"), (1, {}), None])
def test_a_prompt_function_that_returns_something_else_is_told(drawn):
    with pytest.raises(TypeError, match=re.escape(f"returned {drawn!r}") + r"; it must return `\(prompt, metadata\)`"):
        next(iter(PromptStream(lambda: drawn)))


IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


def test_ddpos_reward_gets_what_it_got():
    seen = {}

    def reward(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return torch.tensor([1.0, 2.0]), "whatever"

    scorer = RewardScorer(from_ddpo(reward))
    scores = scorer(IMAGES, ["a", "b"], {"prompt_metadata": ["x", "y"], "more": [1, 2]}, trainer_state=None)
    assert scores.rewards.tolist() == [1.0, 2.0]
    assert list(scores.by_name) == ["reward"]
    assert torch.equal(seen["images"], IMAGES.float() / 255)
    assert (seen["prompts"], seen["metadata"]) == (("a", "b"), ("x", "y"))
    assert scores.extra == {"reward_metadata": ["whatever", "whatever"]}
    scorer(IMAGES, ["a", "b"], {"n": [1, 2], "m": [3, 4]}, trainer_state=None)
    assert seen["metadata"] == ({"n": 1, "m": 3}, {"n": 2, "m": 4})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.randn(2), r"must return `\(rewards, metadata\)` with 2 rewards, .* `reward_funcs`"),
        ([0.0, 1.0], "but returned .*0.0, 1.0"),
        ((torch.randn(1), {}), r"have shape \(1,\), not \(2,\)"),
        ((torch.randn(2, 1), {}), r"have shape \(2, 1\), not \(2,\)"),
        ((np.zeros(3), {}), r"have shape \(3,\), not \(2,\)"),
        (([0.0], {}), r"the first of the pair was \[0.0\]"),
        ((0.5, 0.5), "the first of the pair was 0.5"),
        (("ab", {}), "the first of the pair was 'ab'"),
    ],
)
def test_ddpos_reward_that_returns_something_else_is_told_at_once(returned, message):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(prompts))
        return returned

    with pytest.raises(RewardOutputError, match=message):
        RewardScorer(from_ddpo(reward))(IMAGES, ["a", "b"], {})
    assert calls == [2]


def test_from_ddpo_wants_a_function():
    with pytest.raises(TypeError, match="`from_ddpo` got 1, a int, not a callable"):
        from_ddpo(1)


def test_a_ddpo_reward_is_asked_whether_it_can_be_called():
    class Served:
        def __call__(self, images, prompts, prompt_metadata):
            return images.mean((1, 2, 3)), {}

        def check(self):
            raise ConnectionError("nobody there")

    with pytest.raises(RuntimeError, match="nobody there"):
        RewardScorer(from_ddpo(Served())).self_test(None, 8, 8)


def test_there_and_back_is_the_same():
    def brightness(completions, n, log_extra, **kwargs):
        log_extra("seen", list(n))
        return [None if number == 2 else image.getpixel((0, 0))[0] / 255 for image, number in zip(completions, n)]

    reward = to_ddpo(brightness)
    rewards, metadata = reward(IMAGES.float() / 255, ("a", "b"), ({"n": 1}, {"n": 2}))
    assert rewards[0] == IMAGES[0, 0, 0, 0] / 255
    assert rewards[1].isnan()
    assert metadata == {"seen": [1, 2]}
    again = RewardScorer(from_ddpo(reward))
    torch.testing.assert_close(again(IMAGES, ["a", "b"], {"n": [1, 3]}).rewards, IMAGES[:, 0, 0, 0].double() / 255)
    assert again.names == ["brightness"]


def test_to_ddpo_hands_on_other_metadata_as_a_column():
    seen = []

    def reward(prompt_metadata, **kwargs):
        seen.extend(prompt_metadata)
        return [0.0, 0.0]

    to_ddpo(reward)(IMAGES.float() / 255, ("a", "b"), ("x", {"n": 1}))
    assert seen == ["x", {"n": 1}]


# -- the hook ---------------------------------------------------------------------------------------------------------


def scored(rows, extra):
    return ScoredImages(
        round=0,
        images=torch.cat([IMAGES, IMAGES]),
        rows=rows,
        rewards=torch.tensor([1.0, 2.0, 3.0, torch.nan], dtype=torch.float64),
        by_name={},
        advantages=torch.zeros(4),
        group_index=torch.tensor([0, 0, 1, 1]),
        extra=extra,
        x0=torch.zeros(4, 4, 1, 1),
    )


def run_hook(images, main=True):
    calls = []
    hook = ImageSamplesHook(lambda *given: calls.append(given))
    state = SimpleNamespace(is_world_process_zero=main, global_step=6)
    hook.on_rollout(None, state, None, scored=images, trackers="trackers", model=None)
    return calls


def test_the_hook_gets_an_entry_for_each_call_of_the_reward():
    first, second = {"a": 1}, {"a": 1}  # equal and yet two calls
    rows = [{"prompt": p, "prompt_metadata": p.upper()} for p in "aabb"]
    images = scored(rows, {"reward_metadata": [first, second, second, second]})
    ((data, step, tracker),) = run_hook(images)
    assert (step, tracker) == (6, "trackers")
    assert [len(entry) for entry in data] == [5, 5]
    pictures, prompts, metadata, rewards, reward_metadata = data[1]
    assert torch.equal(pictures, images.images[1:].float() / 255)
    assert (prompts, metadata) == (("a", "b", "b"), ("A", "B", "B"))
    assert rewards.dtype == torch.float32
    assert rewards[1].item() == 3.0
    assert rewards[2].isnan()
    assert reward_metadata is second


def test_the_hook_works_with_todays_rewards_and_data_sets():
    ((data, _, _),) = run_hook(scored([{"prompt": "a", "n": i} for i in range(4)], {}))
    ((_, _, metadata, _, reward_metadata),) = data
    assert metadata == tuple({"n": i} for i in range(4))
    assert reward_metadata == {}


def test_the_hook_is_the_main_processs():
    assert not run_hook(scored([{"prompt": "a"}] * 4, {}), main=False)


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted({*DDPO, *(field.name for field in [*fields(DDPOFields), *fields(GRPOFields)])})
)
def test_the_migration_page_has_every_name(name):
    assert f"`{name}`" in MIGRATION
