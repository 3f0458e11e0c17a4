"""Options that save memory or time: what is learned stays the same, to the bit where nothing is rounded otherwise."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig
from tiny_trainers import (
    Interrupt,
    prompt_dataset,
    relative_error,
    rewards_by_position,
    same,
    scramble,
    tiny_trainer,
    weights,
)

from trl_dgpo import GPOTrainer


REWARDS = rewards_by_position(0.1, 0.9, 0.3, 0.2, 1.0, 0.0, 0.4, 0.3, 0.5, 0.2, 0.6, 0.1, 0.0, 0.0, 0.0, 1.0)
ACTIVE = {"reward_funcs": REWARDS, "clip_range": 1e-3, "kl_coef": 0.1, "old_policy_after": 1, "max_steps": 2}
ACTIVE["sample_batch_size"] = 16  # rewards by position want all images in one call


def trained(tmp_path, trainer_class=None, **config):
    trainer = tiny_trainer(tmp_path, *([trainer_class] if trainer_class else []), **{**ACTIVE, **config})
    scramble(trainer)
    if "old" in trainer.policy.views:
        scramble(trainer, "old", seed=1)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return weights(trained(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(
    "option",
    [
        {"offload_reference": True},
        {"offload_text_encoders": False},
        {"decode_batch_size": 1},
        {"async_reward_computation": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_the_same_to_the_bit(tmp_path, plain, option):
    assert same(weights(trained(tmp_path, **option)), plain)


def test_merging_rounds_and_nothing_else(tmp_path, plain):
    unmerged = weights(trained(tmp_path, merge_adapter=False))
    assert relative_error(unmerged, plain) < 1e-5
    assert not same(unmerged, plain)  # so the plain one was merged


@pytest.mark.parametrize(
    ("config", "merges"),
    [
        ({}, True),
        ({"bf16": True}, False),
        ({"bf16": True, "merge_adapter": True}, True),
        ({"merge_adapter": False}, False),
        ({"full_finetuning": True}, False),
        ({"peft_config": LoraConfig(r=2, use_dora=True)}, False),
    ],
)
def test_the_adapter_is_merged_where_that_loses_nothing(tmp_path, config, merges):
    assert tiny_trainer(tmp_path, **config).merges_adapter is merges


def test_what_cannot_be_merged_is_told_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match=r"The adapter cannot be merged: .*Use the view without `merged`"):
        tiny_trainer(tmp_path, merge_adapter=True, peft_config=LoraConfig(r=2, use_dora=True))


def test_half_precision_never_merges_what_is_compared(tmp_path):
    # The old policy is the policy here: with its adapter merged its errors would differ by rounding, and be clipped.
    trainer = tiny_trainer(
        tmp_path, bf16=True, merge_adapter=True, reward_funcs=REWARDS, clip_range=1e-5, sample_batch_size=16
    )
    for view in (None, "old"):
        scramble(trainer, view)
    trainer.train()
    assert trainer.state.log_history[0]["clip_ratio"] == 0


def test_modules_switch_modes_by_themselves_again_after_training(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, lora_dropout=0.5))
    trainer.train()
    transformer = trainer.backbone.denoiser
    copied = copy.deepcopy(trainer.policy.model)
    copied.eval()
    assert not any(module.training for module in copied.modules())
    assert all(module.training for module in trainer.policy.model.modules())
    transformer.add_module("newcomer", torch.nn.Dropout())
    assert not any(module.training for module in transformer.eval().modules())


def test_an_interrupted_training_leaves_no_switch_behind(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[Interrupt(1)], num_train_timesteps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "train" not in vars(trainer.policy.model)
    assert "train" not in vars(trainer.backbone.denoiser)


def test_resuming_under_deepspeed_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="under DeepSpeed would bring back the weights and not their averages"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_evaluation_under_fsdp2_wants_equal_shares(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, eval_dataset=prompt_dataset("x", "y", "z"))
    monkeypatch.setattr(type(trainer.policy), "is_sharded", True)
    monkeypatch.setattr("trl_dgpo.trainer.base_trainer.gather_object", lambda mine: [*mine, 2])
    with pytest.raises(ValueError, match="`eval` has no equal shares for 1 processes"):
        trainer.evaluate()


def test_compiled_are_the_blocks_and_nothing_around_them(tmp_path):
    trainer = tiny_trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert all(block._compiled_call_impl is not None for block in trainer.backbone.denoiser.transformer_blocks)
    assert trainer.backbone.denoiser._compiled_call_impl is None
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)


def encoder_calls(trainer) -> list:
    calls = []
    trainer.backbone.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_prompts_encoded_before_training_are_never_encoded_again(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for run in ("first", "second"):
        trainer = tiny_trainer(tmp_path / run, precompute_prompt_embeds=True, **ACTIVE)
        trainer.backbone._encoded.clear()  # what is remembered besides
        calls = encoder_calls(trainer)
        scramble(trainer)
        scramble(trainer, "old", seed=1)
        trainer.train()
        assert not calls
        assert same(weights(trainer), plain)


def test_a_stream_cannot_be_encoded_beforehand(tmp_path):
    stream = datasets.Dataset.from_dict({"prompt": ["a", "b"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`precompute_prompt_embeds` .* only as it goes on"):
        tiny_trainer(tmp_path, train_dataset=stream, precompute_prompt_embeds=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_gpos_linear_loss_needs_no_gates_whatever_the_micro_batches(tmp_path, batch_size):
    config = {"prompts_per_round": 3, "reward_funcs": rewards_by_position(*range(12)), "kl_coef": 0, "max_steps": 1}
    config["clip_range"] = None
    whole = trained(tmp_path, GPOTrainer, per_device_train_batch_size=12, **config)
    split = trained(tmp_path, GPOTrainer, per_device_train_batch_size=batch_size, **config)
    assert relative_error(weights(split), weights(whole)) < 1e-5
    for name in ("loss", "objective", "reward", "grad_norm"):
        assert split.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-4)
