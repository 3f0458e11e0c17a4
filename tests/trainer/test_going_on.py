"""Training goes on from a LoRA: given as a folder, in a pipeline, or as a PeftModel."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_random_pipeline
from tiny_trainers import prompt_dataset, same, scramble, tiny_trainer, weights


PEFT_CONFIG = LoraConfig(r=4, lora_alpha=2, init_lora_weights="gaussian")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model's folder, a LoRA's folder, its weights and its pictures."""
    base, lora = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("lora")
    tiny_random_pipeline().save_pretrained(base)
    trainer = tiny_trainer(lora, model=load(base), peft_config=PEFT_CONFIG, save_ema=False)
    trainer.policy.peft_config.base_model_name_or_path = str(base)
    scramble(trainer)
    trainer.save_model()
    return base, lora, weights(trainer), trainer.generate(["a"], view=None), trainer.generate(["a"], view="base")


def load(folder):
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def given_as(kind, base, lora):
    if kind == "folder":
        return lora
    pipeline = load(base)
    if kind == "pipeline":
        pipeline.load_lora_weights(lora)
        return pipeline
    peft_model = PeftModel.from_pretrained(pipeline.transformer, lora)
    if kind == "peft model":
        return peft_model
    pipeline.transformer = peft_model
    return pipeline


@pytest.mark.parametrize("kind", ["folder", "pipeline", "peft model", "pipeline of a peft model"])
def test_training_goes_on_from_its_weights(tmp_path, trained, kind):
    base, lora, start, pictures, pictures_of_base = trained
    trainer = tiny_trainer(
        tmp_path, model=given_as(kind, base, lora), kl_coef=0.1, clip_range=1e-3, learning_rate=1e-2, max_steps=2
    )
    assert same(weights(trainer), start)
    assert same(weights(trainer, "ema"), start)
    assert (trainer.policy.peft_config.r, trainer.policy.peft_config.lora_alpha) == (4, 2)
    assert torch.equal(trainer.generate(["a"], view=None), pictures)
    # The model before training has the LoRA on.
    assert torch.equal(trainer.generate(["a"], view="base"), pictures)
    assert not torch.equal(pictures, pictures_of_base)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0
    assert not same(weights(trainer), start)
    assert torch.equal(trainer.generate(["a"], view="base"), pictures)
    trainer.save_model()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    pipeline = load(base)
    pipeline.load_lora_weights(tmp_path)
    again = tiny_trainer(tmp_path / "again", model=pipeline)
    assert same(weights(again), weights(trainer, "ema"))


def test_all_ways_give_the_same_run(tmp_path, trained):
    runs = []
    for kind in ("folder", "pipeline", "peft model"):
        model = given_as(kind, *trained[:2])
        trainer = tiny_trainer(tmp_path / kind, model=model, kl_coef=0.1, learning_rate=1e-2, max_steps=2)
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_a_resumed_run_keeps_the_model_before_training(tmp_path, trained):
    arguments = {"kl_coef": 0.1, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", model=trained[1], max_steps=3, **arguments)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", model=trained[1], max_steps=3, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(weights(resumed), weights(whole))
    assert torch.equal(resumed.generate(["a"], view="base"), trained[3])


def two_adapters(base, lora):
    pipeline = load(base)
    pipeline.load_lora_weights(lora, adapter_name="one")
    pipeline.load_lora_weights(lora, adapter_name="two")
    return pipeline


def other_weight(base, lora):
    pipeline = load(base)
    pipeline.load_lora_weights(lora, adapter_name="one")
    pipeline.set_adapters("one", 0.5)
    return pipeline


def fused(base, lora):
    pipeline = load(base)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    return pipeline


def nameless(base, lora):
    return get_peft_model(load(base).transformer, LoraConfig(r=2, target_modules=["attn.to_q"]))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (two_adapters, {}, r"several adapters, \['one', 'two'\]"),
        (other_weight, {}, "its weight was set"),
        (fused, {}, r"merged into its weights.*unfuse_lora"),
        (nameless, {}, "does not name the pipeline"),
        (lambda base, lora: lora, {"peft_config": LoraConfig(r=2)}, "`peft_config` asks for something else"),
        (lambda base, lora: lora, {"full_finetuning": True}, "`full_finetuning` asks for something else"),
    ],
)
def test_what_cannot_be_gone_on_from_is_told(tmp_path, trained, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=model(*trained[:2]), **arguments)


def test_fused_and_unloaded_a_lora_is_part_of_the_base(tmp_path, trained):
    pipeline = fused(*trained[:2])
    pipeline.unload_lora_weights()
    trainer = tiny_trainer(tmp_path, model=pipeline, train_dataset=prompt_dataset("a"))
    difference = trainer.generate(["a"], view="base").int() - trained[3].int()
    assert difference.abs().max() <= 2
