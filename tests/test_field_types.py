"""A configuration's field holds a value of its type, and what it does not is told by the field's name."""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_trainers import tiny_config

from trl_dgpo import DGPOConfig, FlowGRPOConfig


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"beta": "100"}, TypeError, r"`beta` is '100', of type str; it must be a float\.$"),
        ({"beta": None}, TypeError, r"`beta` is None, of type NoneType; it must be a float\.$"),
        ({"beta": True}, TypeError, "`beta` is True, of type bool"),
        ({"num_generations": 4.0}, TypeError, r"`num_generations` is 4\.0, of type float; it must be an int\.$"),
        ({"save_ema": 1}, TypeError, "`save_ema` is 1, of type int; it must be a bool"),
        ({"width": "32"}, TypeError, "`width` is '32', of type str; it must be an int or None"),
        (
            {"reward_weights": ["a"]},
            TypeError,
            r"`reward_weights` is \['a'\], of type list; it must be `list\[float\]` or",
        ),
        ({"learning_rate": math.nan}, ValueError, "`learning_rate` is nan; it must be a finite number"),
        ({"kl_coef": math.inf}, ValueError, "`kl_coef` is inf; it must be a finite number"),
        (
            {"num_generations": 10**18},
            ValueError,
            "`num_generations` is 1000000000000000000; it must be at most 65536",
        ),
        ({"seed": 10**5000}, ValueError, "`seed` is a number of 16610 bits; it must be at most 4294967295"),
        ({"run_name": 10**5000}, TypeError, "`run_name` is a number of 16610 bits, of type int; it must be a str"),
        ({"optim": "adam"}, ValueError, "`optim` is 'adam'; it must be one of .*'adamw_torch'"),
        ({"lr_scheduler_type": "flat"}, ValueError, "`lr_scheduler_type` is 'flat'; it must be one of .*'constant'"),
        ({"log_level": "loud"}, ValueError, "`log_level` is 'loud'; it must be one of .*'info'"),
        ({"debug": "all of it"}, ValueError, r"`debug` has \['all', 'of', 'it'\]; it may have 'tpu_metrics_debug'"),
        ({"output_dir": "a/" + "b" * 256}, ValueError, "`output_dir` is 'a/bbb.*at most 255 bytes"),
        ({"output_dir": "a\0b"}, ValueError, r"`output_dir` is 'a\\x00b', which no folder can be called"),
        ({"accelerator_config": {"split": 1}}, ValueError, r"`accelerator_config` has \['split'\]; it may have 'disp"),
        (
            {"accelerator_config": "no/file.json"},
            ValueError,
            "`accelerator_config` is 'no/file.json', which cannot be",
        ),
        ({"lr_scheduler_kwargs": "{"}, ValueError, "`lr_scheduler_kwargs` is '{', which cannot be read .*a brace"),
        ({"ddp_backend": "gloo"}, ValueError, "`ddp_backend` is 'gloo', and this is one process .*torchrun"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        DGPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **given})


@dataclass(repr=False)
class OwnConfig(DGPOConfig):
    crop: tuple[int, int] | None = None
    hook: Callable[[int], int] | None = None
    choice: Literal["all", "some"] = "all"


def test_a_folder_may_be_a_path(tmp_path):
    assert DGPOConfig(tmp_path, use_cpu=True).output_dir == str(tmp_path)
    with pytest.raises(ValueError, match="which no folder can be called"):
        DGPOConfig(Path("a\0b"))


def test_a_configuration_of_ones_own_may_have_other_types(tmp_path):
    config = OwnConfig(str(tmp_path), use_cpu=True, crop=(1, 2), hook=abs, choice="".join(["so", "me"]))
    assert config.hook(-1) == 1
    with pytest.raises(TypeError, match=r"`choice` is 'none'"):
        OwnConfig(str(tmp_path), choice="none")
    with pytest.raises(TypeError, match=r"`crop` is 3, of type int; it must be `tuple"):
        OwnConfig(str(tmp_path), crop=3)


def test_names_that_only_a_type_checker_imports_are_passed_over(tmp_path):
    later = type("LaterConfig", (DGPOConfig,), {"__annotations__": {"crop": "NotImported | None"}, "crop": None})
    assert dataclass(repr=False)(later)(str(tmp_path), use_cpu=True, crop="anything").crop == "anything"
    with pytest.raises(TypeError, match="`beta` is '100'"):
        dataclass(repr=False)(later)(str(tmp_path), beta="100")


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 100, "kl_coef": 0},
        {"beta": np.float32(10), "num_generations": np.int64(4)},
        {"reward_timeout": math.inf, "advantage_clip": math.inf, "max_grad_norm": math.inf},
        {"reward_weights": (1, 0.5)},
        {"scale_rewards": True},
        {"logging_steps": 10**12, "resume_from_checkpoint": Path("outputs")},
        {"resume_from_checkpoint": True, "save_steps": sys.maxsize},
        {"optim": "sgd", "lr_scheduler_type": "cosine", "debug": "underflow_overflow"},
        {"model_init_kwargs": '{"revision": "main"}', "accelerator_config": '{"even_batches": false}'},
    ],
    ids=str,
)
def test_what_fits_is_taken(tmp_path, given):
    dataclasses.replace(tiny_config(tmp_path, **given))  # whose values are those that the first one settled


def test_a_method_is_asked_before_it_settles_its_own_fields(tmp_path):
    with pytest.raises(TypeError, match="`sample_num_steps` is '4', of type str"):
        tiny_config(tmp_path, FlowGRPOConfig, sample_num_steps="4")


def test_a_tensor_is_no_number(tmp_path):
    with pytest.raises(TypeError, match=r"`beta` is tensor\(1\.\), of type Tensor"):
        tiny_config(tmp_path, beta=torch.tensor(1.0))
