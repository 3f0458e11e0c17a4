"""
Anything as configuration, argument or prompt: it works, or a documented error says which field or argument was wrong.

Configurations and prompts are drawn from seeds (`fuzz.py`), so that a failure names the number to repeat.
"""

import dataclasses
import logging
import math
import os
import re
import warnings

import datasets
import numpy as np
import pytest
from fuzz import ANYTHING, CONFIGS, random_config, random_training
from PIL import Image
from tiny_trainers import CONFIG, tiny_trainer

from trl_dgpo import (
    DGPOConfig,
    DGPOTrainer,
    DiffusionDPOTrainer,
    DiffusionSFTTrainer,
    FlowGRPOTrainer,
    GPOTrainer,
    TDMR1Trainer,
)


TRAINERS = {
    trainer._config_class: trainer
    for trainer in (
        DGPOTrainer,
        GPOTrainer,
        FlowGRPOTrainer,
        DiffusionDPOTrainer,
        DiffusionSFTTrainer,
        TDMR1Trainer,
    )
}


@pytest.fixture
def quiet():
    """Configurations warn, and write environment variables."""
    environment = dict(os.environ)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    os.environ.clear()
    os.environ.update(environment)


# -- configurations ---------------------------------------------------------------------------------------------------


def undocumented(config_class: type, given: dict) -> str | None:
    """What is wrong with the way in which a configuration is refused; `""` if nothing is, `None` if it is taken."""
    try:
        config_class(**given)
    except (TypeError, ValueError) as error:
        text = str(error)
        is_named = any(re.search(rf"(?<!\w){name}(?!\w)", text) for name in given) or any(
            f"`{name}`" in text or ("_" in name and name in text) for name in config_class.__dataclass_fields__
        )
        return "" if is_named else f"{type(error).__name__} names no field: {text[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return None


def fuzzed(numbers: range) -> float:
    """Part of the configurations with these numbers that is valid; fails if another ends in anything undocumented."""
    outcomes = {number: undocumented(*random_config(number)) for number in numbers}
    failures = {number: outcome for number, outcome in outcomes.items() if outcome}
    assert not failures, failures
    return sum(outcome is None for outcome in outcomes.values()) / len(outcomes)


def test_random_configurations(quiet):
    valid = fuzzed(range(400))
    print(f"{valid:.0%} of 400 random configurations are valid")
    assert valid >= 0.3


@pytest.mark.slow
def test_5000_random_configurations(quiet):
    valid = fuzzed(range(5000))
    print(f"{valid:.0%} of 5000 random configurations are valid")
    assert valid >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_with_anything(quiet, config_class):
    fields = dataclasses.fields(config_class) if config_class is DGPOConfig else config_class.__annotations__
    names = [getattr(field, "name", field) for field in fields]
    names = [name for name in names if name in config_class.__dataclass_fields__]
    failures = {}
    for name in names:
        for value in ANYTHING:
            if outcome := undocumented(config_class, {name: value}):
                failures[name, repr(value)[:50]] = outcome
    assert not failures, failures


def test_the_detector_sees_an_error_that_names_no_field(monkeypatch):
    def planted(self):
        raise ValueError("it does not fit")

    monkeypatch.setattr(DGPOConfig, "__post_init__", planted)
    assert undocumented(DGPOConfig, {"beta": 1.0}).startswith("ValueError names no field")


# -- training ---------------------------------------------------------------------------------------------------------


def pictures() -> datasets.Dataset:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(4)]
    rows = {"prompt": list("abcd"), "image": images}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def train_once(folder, number: int) -> bool:
    """Whether the training with this number can be; if so, it makes its steps."""
    config_class, given = random_training(number)
    trainer_class = TRAINERS[config_class]
    given = {**CONFIG, **given, "max_steps": 3 if trainer_class is TDMR1Trainer else 1}
    given |= {name: config_class.__dataclass_fields__[name].default for name in config_class._fixed}
    try:
        if trainer_class is DiffusionSFTTrainer:
            trainer = tiny_trainer(folder, trainer_class, reward_funcs=None, train_dataset=pictures(), **given)
        else:
            trainer = tiny_trainer(folder, trainer_class, **given)
    except (TypeError, ValueError) as error:
        if "`" not in str(error):
            raise AssertionError(f"training {number} with {given} is refused by words that name nothing") from error
        return False
    try:
        trainer.train()
    except Exception as error:
        raise AssertionError(f"training {number} of {trainer_class.__name__} with {given}") from error
    assert trainer.state.global_step == given["max_steps"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses)), (number, given, losses)
    return True


def test_random_trainings(tmp_path, quiet):
    assert sum(train_once(tmp_path / str(number), number) for number in range(5)) >= 3


@pytest.mark.slow
def test_100_random_trainings(tmp_path, quiet):
    trained, number = 0, 0
    while trained < 100:
        trained += train_once(tmp_path / str(number), number)
        number += 1
    print(f"100 of {number} random trainings made their steps; the others were refused")
    assert number <= 300
