"""What every trainer has: loading, checkpoints, what is kept of a run."""

import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_random_pipeline
from tiny_trainers import brightness, prompt_dataset, same, tiny_config, tiny_trainer, weights
from trl import ModelConfig, get_quantization_config

from trl_dgpo import DefaultDGPOStableDiffusionPipeline, DGPOTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_random_pipeline(third_text_encoder=True).save_pretrained(path)
    return path


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loading(monkeypatch):
    """Arguments of `DiffusionPipeline.from_pretrained`."""
    seen, from_pretrained = {}, diffusers.DiffusionPipeline.from_pretrained.__func__

    def watch(cls, *args, **kwargs):
        seen.update(kwargs)
        kwargs.pop("quantization_config", None)  # no device here quantises
        return from_pretrained(cls, *args, **kwargs)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(watch))
    return seen


def test_model_init_kwargs_reach_from_pretrained(tmp_path, folder, loading):
    trainer = tiny_trainer(
        tmp_path, model=folder, model_init_kwargs={"revision": "abc", "text_encoder_3": None, "tokenizer_3": None}
    )
    assert loading["revision"] == "abc"
    assert trainer.backbone.pipeline.text_encoder_3 is None


def test_ddpo_pipeline_names_model_and_revision(tmp_path, folder, loading):
    model = DefaultDGPOStableDiffusionPipeline(str(folder), pretrained_model_revision="abc", use_lora=False)
    config = tiny_config(tmp_path)
    trainer = DGPOTrainer(config, lambda images, *_: (images.mean((1, 2, 3)), {}), lambda: ("a", {}), model)
    assert loading["revision"] == "abc"
    assert trainer.policy.peft_config is None
    assert trainer.base_model == str(folder)
    assert not config.full_finetuning  # the caller's is left alone


@pytest.mark.parametrize("kind", ["trl", "diffusers"])
def test_quantisation_is_of_the_transformer_alone(tmp_path, folder, loading, monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = {
        "trl": get_quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16")),
        "diffusers": diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }[kind]
    DGPOTrainer(
        model=str(folder),
        reward_funcs=brightness,
        args=tiny_config(tmp_path),
        train_dataset=prompt_dataset("a"),
        quantization_config=config,
    )
    ((name, given),) = loading["quantization_config"].quant_mapping.items()
    assert name == "transformer"
    assert isinstance(given, diffusers.BitsAndBytesConfig)
    assert given.load_in_4bit
    assert given.bnb_4bit_quant_type == "nf4"
    assert given.bnb_4bit_use_double_quant


@pytest.mark.parametrize(
    ("arguments", "config", "error", "message"),
    [
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}, {}, ValueError, "needs a CUDA"),
        (
            {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "model": "pipeline"},
            {},
            ValueError,
            "while a named model is loaded, but `model` is a StableDiffusion3Pipeline",
        ),
        (
            {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)},
            {"full_finetuning": True},
            ValueError,
            "`full_finetuning` trains them",
        ),
        ({"model": "pipeline"}, {"model_init_kwargs": {"variant": "fp16"}}, ValueError, "is loaded already"),
        ({"model": 3}, {}, TypeError, "an id on the Hub, a folder or a diffusers pipeline"),
    ],
)
def test_loading_that_cannot_be_is_told(tmp_path, folder, arguments, config, error, message):
    model = arguments.pop("model", str(folder))
    with pytest.raises(error, match=message):
        DGPOTrainer(
            model=tiny_random_pipeline() if model == "pipeline" else model,
            reward_funcs=brightness,
            args=tiny_config(tmp_path, **config),
            train_dataset=prompt_dataset("a"),
            **arguments,
        )


# -- the two forms of the call ----------------------------------------------------------------------------------------


def test_what_ddpo_scripts_read_and_call(tmp_path):
    pipeline, config, shown = tiny_random_pipeline(), tiny_config(tmp_path, num_iterations=2), []

    def reward(images, prompts, metadata):
        return images.mean((1, 2, 3)), {}

    def prompt():
        return "a", {}

    def hook(data, step, tracker):
        shown.append((len(data), step))

    trainer = DGPOTrainer(config, reward, prompt, pipeline, hook)
    assert trainer.config is trainer.args
    assert (trainer.reward_fn, trainer.prompt_fn) == (reward, prompt)
    assert (trainer.sd_pipeline, trainer.image_samples_callback) == (pipeline, hook)
    trainer.train(2)
    assert trainer.state.global_step == 4  # 2 epochs of 2 steps
    assert shown == [(1, 0), (1, 2)]
    trainer.save_pretrained(tmp_path / "saved")
    trainer.save_model(str(tmp_path / "again"))
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("saved", "again")]
    assert same(*(load_file(file) for file in files))
    trainer.train(epochs=1)
    assert trainer.state.global_step == 2
    assert config.max_steps == 1  # the caller's is left alone
    with pytest.raises(ValueError, match="`epochs` is 0"):
        trainer.train(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Neither `reward_funcs`"),
        ({"reward_funcs": brightness, "reward_function": brightness}, "`reward_function` and `reward_funcs` are both"),
        ({"reward_funcs": brightness}, "Neither `train_dataset`"),
        ({"config": "tiny"}, "give the model and the rest as"),
    ],
)
def test_half_a_call_is_told(arguments, message):
    with pytest.raises(TypeError, match=message):
        DGPOTrainer(**arguments)


# -- what is kept of a run --------------------------------------------------------------------------------------------


def test_the_best_metric_must_exist(tmp_path):
    evaluation = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    evaluation["save_steps"] = 1
    assert tiny_config(tmp_path, **evaluation).metric_for_best_model == "eval_reward"
    assert tiny_config(tmp_path, **evaluation).greater_is_better
    with pytest.raises(ValueError, match=r"'loss', which no evaluation has. Choose `eval_reward`"):
        tiny_trainer(tmp_path, eval_dataset=prompt_dataset("x"), metric_for_best_model="loss", **evaluation)
    named = {"easy": prompt_dataset("x"), "hard": prompt_dataset("y")}
    with pytest.raises(ValueError, match=r"Choose `eval_easy_reward` or `eval_hard_reward`"):
        tiny_trainer(tmp_path, eval_dataset=named, **evaluation)
    trainer = tiny_trainer(tmp_path, eval_dataset=named, metric_for_best_model="eval_hard_reward", **evaluation)
    trainer.train()
    assert trainer.state.best_metric in [log.get("eval_hard_reward") for log in trainer.state.log_history]


def test_the_best_checkpoint_survives_rotation_and_is_loaded(tmp_path):
    rewards = iter([0.5, 0.9, 0.1, 0.2])

    def reward(images, trainer_state, **kwargs):
        return [next(rewards)] * len(images) if len(images) == 1 else brightness(images)

    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=reward,
        eval_dataset=prompt_dataset("x"),
        max_steps=4,
        learning_rate=1e-2,
        eval_on_start=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    best = tiny_trainer(tmp_path / "best")
    best.policy.load(tmp_path / "checkpoint-2")
    assert same(weights(trainer), weights(best))
    assert same(weights(trainer, "ema"), weights(best, "ema"))


def test_nothing_unfinished_is_left(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, num_log_images=1)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.rglob("_*"))


def test_a_run_says_what_it_is_and_no_secrets(tmp_path):
    trainer = tiny_trainer(tmp_path, hub_token="hf_secret", learning_rate=1e-2)
    trainer.train()
    trainer.args.model_init_kwargs = {"token": "hf_other"}
    assert "hf_other" not in str(trainer.describe())
    text = (tmp_path / "run.json").read_text()
    run = json.loads(text)
    assert (run["method"], run["rewards"]) == ("DGPO", ["brightness"])
    assert run["config"]["num_generations"] == 4
    assert run["config"]["learning_rate"] == 1e-2
    assert run["versions"]["torch"] == torch.__version__
    assert "hf_secret" not in text
    assert str(Path.home()) not in text


def test_trackers_are_told_no_token(tmp_path):
    config = tiny_config(tmp_path, model_init_kwargs={"token": "hf_secret", "variant": "fp16"})
    assert config.to_dict()["model_init_kwargs"] == {"token": "<TOKEN>", "variant": "fp16"}
    assert "hf_secret" not in config.to_json_string()
    assert config.model_init_kwargs["token"] == "hf_secret"


def test_a_resumed_run_does_not_evaluate_its_start_again(tmp_path):
    config = {"eval_dataset": prompt_dataset("x"), "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, max_steps=1, **config).train()
    trainer = tiny_trainer(tmp_path, max_steps=2, **config)
    trainer.train(resume_from_checkpoint=True)
    assert [log["step"] for log in trainer.state.log_history if "eval_reward" in log] == [0]
    assert trainer.args.eval_on_start


def test_a_lora_remembers_the_revision_of_its_base(tmp_path, folder, loading):
    trainer = tiny_trainer(tmp_path / "first", model=str(folder), model_init_kwargs={"revision": "abc"})
    trainer.save_model()
    loading.clear()
    tiny_trainer(tmp_path / "second", model=tmp_path / "first")
    assert loading["revision"] == "abc"


def test_pictures_through_training_are_the_evaluations(tmp_path):
    trainer = tiny_trainer(
        tmp_path, eval_dataset=prompt_dataset("x", "y", "z"), num_log_images=2, max_steps=2, learning_rate=1e-2
    )
    before = trainer.generate(["x", "y"])
    trainer.train()
    after = trainer.generate(["x", "y"])
    assert not torch.equal(before, after)
    for step, images in ((0, before), (2, after)):
        for number, image in enumerate(images):
            picture = np.asarray(Image.open(tmp_path / "samples" / f"step-{step:06}" / f"{number:02}.png"))
            assert np.array_equal(picture, image.permute(1, 2, 0).numpy())


def test_a_callback_sees_each_round(tmp_path, caplog):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_rollout(self, args, state, control, scored, trackers, **kwargs):
            seen.append((state.global_step, scored))

    trainer = tiny_trainer(tmp_path, max_steps=4, num_iterations=2, callbacks=[Look()])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [(step, scored.round) for step, scored in seen] == [(0, 0), (2, 1)]
    scored = seen[-1][1]
    assert torch.equal(scored.group_index, torch.arange(4).repeat_interleave(4))
    assert torch.equal(scored.rewards.float(), trainer.buffer.record.rewards)
    assert torch.equal(scored.advantages.float(), trainer.buffer.record.advantages)
    expected = [trainer.train_dataset[i]["prompt"] for i in trainer.sampler.deal(1)]
    assert [row["prompt"] for row in scored.rows[::4]] == expected
    assert torch.equal(scored.images, trainer.backbone.decode(trainer.buffer.record.x0))
