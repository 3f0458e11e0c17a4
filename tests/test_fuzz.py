"""
Anything as configuration, argument or prompt: it works, or a documented error says which field or argument was wrong.

Configurations and prompts are drawn from seeds (`fuzz.py`), so that a failure names the number to repeat.
"""

import dataclasses
import json
import logging
import math
import os
import re
import warnings

import datasets
import numpy as np
import pytest
import torch
from fault_server import running
from fuzz import ANYTHING, CONFIGS, random_config, random_prompt, random_training
from huggingface_hub import ModelCard
from PIL import Image
from pyarrow import parquet
from tiny_models import tiny_random_pipeline
from tiny_trainers import CONFIG, brightness, prompt_dataset, tiny_config, tiny_trainer

from trl_dgpo import (
    DGPOConfig,
    DGPOTrainer,
    DiffusionDPOTrainer,
    DiffusionSFTTrainer,
    FlowGRPOTrainer,
    GPOTrainer,
    TDMR1Trainer,
)
from trl_dgpo.backbones import load_backbone
from trl_dgpo.report import write_report
from trl_dgpo.rewards.remote import RemoteReward, make_server


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


@pytest.fixture(scope="module")
def pipeline():
    """For what is refused before it is touched."""
    return tiny_random_pipeline()


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
    valid = fuzzed(range(250))
    print(f"{valid:.0%} of 250 random configurations are valid")
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
    assert sum(train_once(tmp_path / str(number), number) for number in range(4)) >= 2


@pytest.mark.slow
def test_100_random_trainings(tmp_path, quiet):
    trained, number = 0, 0
    while trained < 100:
        trained += train_once(tmp_path / str(number), number)
        number += 1
    print(f"100 of {number} random trainings made their steps; the others were refused")
    assert number <= 300


# -- prompts ----------------------------------------------------------------------------------------------------------


def is_whole(prompt: str) -> bool:
    """Whether a prompt is text: Python lets half a character stand in one."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


def scored_elsewhere(prompts, completions, note, **columns):
    return [len(prompt) % 7 + 0.1 * len(text) % 3 for prompt, text in zip(prompts, note, strict=True)]


def sees_every_prompt(folder, prompts: list[str]) -> None:
    """
    A run with these prompts, from the cache of embeddings to the report, its reward on a server of its own: what it
    leaves can be read, and says the prompts as they are.
    """
    with running(make_server(scored_elsewhere, port=0)) as server:
        trainer = tiny_trainer(
            folder,
            reward_funcs=RemoteReward(f"http://127.0.0.1:{server.server_port}", name="</script>|`*"),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "note": prompts[::-1]}),
            eval_dataset=datasets.Dataset.from_dict({"prompt": prompts[::4], "note": prompts[::4]}),
            eval_on_start=False,
            precompute_prompt_embeds=True,
            log_completions=True,
            num_log_images=len(prompts[::4]),
            log_images_steps=5,
            prompts_per_round=len(prompts),
            num_generations=2,
            sample_num_steps=2,
            eval_num_steps=1,
            num_train_timesteps=1,
            per_device_train_batch_size=len(prompts),
            shuffle_dataset=False,
        )
        trainer.train()
    trainer.create_model_card()
    page = write_report(folder).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    [kept] = folder.glob("completions/*.parquet")
    rows = parquet.read_table(kept).to_pylist()
    assert {row["prompt"] for row in rows} == set(prompts)
    assert {row["note"] for row in rows} == set(prompts)
    [read] = datasets.load_dataset("parquet", data_files=str(kept), split="train").unique("step")
    assert read == 0
    for step in folder.glob("samples/step-*/samples.json"):
        assert json.loads(step.read_text(encoding="utf-8"))["prompts"] == prompts[::4]
    assert [image["prompt"] for image in data["samples"]["steps"][0]["images"]] == prompts[::4]
    shown = {group["prompt"] for step in data["groups"]["steps"] for group in step["groups"]}
    assert shown
    assert shown <= set(prompts)
    assert page.count("<script") == 2  # the data and the page's own
    assert not re.search(r"<(img|!--)", page)
    card = ModelCard.load(folder / "README.md")
    assert [entry["text"] for entry in card.data.widget[:4]] == [" ".join(p.split()) for p in prompts[::4][:4]]
    left = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert left <= {"README.md", "completions", "images", "log.jsonl", "report.html", "run.json", "samples", "tmp"}


def test_random_prompts(tmp_path, quiet, capsys):
    prompts = list(dict.fromkeys(random_prompt(number) for number in range(0, 84, 3)))
    sees_every_prompt(tmp_path, [prompt for prompt in prompts if is_whole(prompt)])


@pytest.mark.slow
def test_1000_random_prompts(tmp_path, quiet, capsys):
    drawn = dict.fromkeys(random_prompt(number) for number in range(1500))
    prompts = [prompt for prompt in drawn if is_whole(prompt)]
    assert len(prompts) >= 1000
    for start in range(0, len(prompts), 100):
        sees_every_prompt(tmp_path / str(start), prompts[start : start + 100])


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfff b", "\ud83d\ude00"])
def test_half_a_character_is_told(pipeline, prompt):
    backbone = load_backbone(pipeline, sampler="dpm", sigmas="dpm", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"prompt '.*\\ud.*half a character"):
        backbone.encode(["whole", prompt])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "`train_dataset` is empty"),
        ({}, TypeError, "`train_dataset` is a dict"),
        ([{}], ValueError, "column `prompt`"),
        ([{"prompt": None}], ValueError, "column `prompt`"),
        ([{"prompt": b"bytes"}], ValueError, "column `prompt`"),
        ([{"Prompt": "a"}], ValueError, "column `prompt`"),
        (["a"], ValueError, "column `prompt`"),
        ("prompts", ValueError, "column `prompt`"),
        (3, TypeError, "`train_dataset` is int"),
        (iter([{"prompt": "a"}]), TypeError, "`train_dataset`"),
        (None, TypeError, "`train_dataset`"),
        (datasets.Dataset.from_dict({"text": ["a"]}), ValueError, "column `prompt`"),
        (datasets.Dataset.from_dict({"prompt": []}), ValueError, "`train_dataset` is empty"),
        (datasets.Dataset.from_dict({"prompt": [[1]]}), ValueError, "column `prompt`"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a"]})}), TypeError, "`train_dataset`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_data_sets_are_told(tmp_path, pipeline, dataset, error, message):
    with pytest.raises(error, match=message):
        DGPOTrainer(model=pipeline, reward_funcs=brightness, args=tiny_config(tmp_path), train_dataset=dataset)


@pytest.mark.parametrize(
    "rewards",
    [None, [], 3, "ocr?", [None], [3], {}, b"x", brightness(images=[])],
    ids=lambda value: type(value).__name__,
)
def test_other_rewards_are_told(tmp_path, pipeline, rewards):
    with pytest.raises((TypeError, ValueError), match=r"[Rr]eward"):
        DGPOTrainer(
            model=pipeline,
            reward_funcs=rewards,
            args=tiny_config(tmp_path),
            train_dataset=prompt_dataset("a"),
        )


@pytest.mark.parametrize(
    "model",
    [None, 3, b"tiny", "", " ", "no/such/model", "../../etc", "\0", "a" * 5000, [], object(), torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_other_models_are_told(tmp_path, model):
    with pytest.raises((TypeError, ValueError), match=r"model|pipeline"):
        DGPOTrainer(
            model=model, reward_funcs=brightness, args=tiny_config(tmp_path), train_dataset=prompt_dataset("a")
        )


@pytest.mark.parametrize("args", [3, {}, "config", object(), DGPOConfig], ids=lambda value: type(value).__name__)
def test_another_configuration_is_told(tmp_path, pipeline, args):
    with pytest.raises((TypeError, ValueError), match=r"args|config"):
        DGPOTrainer(model=pipeline, reward_funcs=brightness, args=args, train_dataset=prompt_dataset("a"))
