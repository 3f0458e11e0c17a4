"""Supervised training is the plain denoising loss, on pictures or on the best of saved groups."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_trainers import (
    Gradient,
    Interrupt,
    brightness,
    everything,
    prompt_dataset,
    relative_error,
    same,
    scramble,
    tiny_config,
    tiny_trainer,
)

from trl_dgpo import DiffusionSFTConfig, DiffusionSFTTrainer
from trl_dgpo.seeding import generator


CONFIG = {"num_generations": 1, "shuffle_dataset": False, "max_grad_norm": 0.0, "reward_funcs": None}


def pictures(prompts="abcd", **columns) -> datasets.Dataset:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in prompts]
    rows = {"prompt": list(prompts), "image": images, **columns}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def mean_squared_error(trainer) -> dict[str, torch.Tensor]:
    """Gradient of the first step, of the definition."""
    record, seed, total = trainer.buffer.record, trainer.args.seed, 0.0
    sigmas = trainer._draw_levels(0, 0)
    for level, sigma in enumerate(sigmas):
        for i, x0 in enumerate(record.x0):
            noise = torch.randn(x0.shape, generator=generator(seed, "noise", 0, 0, level, i))
            velocity = trainer.backbone.denoiser(
                hidden_states=((1 - sigma) * x0 + sigma * noise)[None],
                timestep=torch.tensor([1000 * sigma]),
                **{name: row[i : i + 1] for name, row in record.conditioning.items()},
                return_dict=False,
            )[0]
            total = total + torch.nn.functional.mse_loss(velocity[0], noise - x0)
    parameters = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(total / (len(sigmas) * len(record.x0)), list(parameters.values()))
    return dict(zip(parameters, gradient, strict=True))


def train(tmp_path, dataset, *, resume=None, **given):
    given = {**CONFIG, **given}
    trainer = tiny_trainer(tmp_path, DiffusionSFTTrainer, train_dataset=dataset, **given)
    scramble(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_gradient_is_that_of_the_mean_squared_error(tmp_path, batch_size):
    hand = {}
    gradient = Gradient(lambda: hand.update(mean_squared_error(trainer)))
    given = {"train_dataset": pictures(), "callbacks": [gradient], "per_device_train_batch_size": batch_size}
    trainer = tiny_trainer(tmp_path, DiffusionSFTTrainer, **given, **CONFIG)
    scramble(trainer)
    trainer.train()
    assert relative_error(gradient.value, hand) < 1e-5
    assert len(trainer.buffer.record.x0) == 4
    log = trainer.state.log_history[0]
    assert log["loss"] > 0
    assert {"reward", "gate_mean", "objective", "frac_reward_zero_std"}.isdisjoint(log)


def test_of_saved_groups_the_best_pictures_are_trained_on(tmp_path):
    rewards = [0.1, 0.9, 0.5, 0.5, None, 0.2, None, None]
    groups = pictures("aabbccdd", reward=rewards)
    best = groups.select([1, 2, 5]).remove_columns("reward")
    from_groups = train(tmp_path / "groups", groups, prompts_per_round=3, per_device_train_batch_size=3)
    from_best = train(tmp_path / "best", best, prompts_per_round=3, per_device_train_batch_size=3)
    assert same(everything(from_groups), everything(from_best))
    assert from_groups.state.log_history[0]["reward"] == pytest.approx((0.9 + 0.5 + 0.2) / 3)


def test_no_forward_but_the_policys_is_taken(tmp_path, monkeypatch):
    def taken(*args, **kwargs):
        raise AssertionError("a forward without gradient")

    monkeypatch.setattr(DiffusionSFTTrainer, "_no_grad_pass", taken)
    monkeypatch.setattr(DiffusionSFTTrainer, "_sample", taken)
    trainer = train(tmp_path, pictures())
    assert trainer.policy.views == ("ema",)


def test_it_learns(tmp_path):
    # One picture and one caption, at the same levels and noise before and after.
    trainer = train(tmp_path, pictures("a"), prompts_per_round=1, max_steps=30, learning_rate=1e-2)
    part = trainer._part(0, 0, 0)
    errors = {view: trainer._no_grad_pass(trainer.policy.using(view), part)[0] for view in (None, "base")}
    assert errors[None].mean() < 0.9 * errors["base"].mean()


def test_runs_go_on_exactly(tmp_path):
    given = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    given |= {"per_device_train_batch_size": 4, "shuffle_dataset": True}
    whole = train(tmp_path / "whole", pictures("abcdef"), **given)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", pictures("abcdef"), callbacks=[Interrupt(2)], **given)
    resumed = train(tmp_path / "run", pictures("abcdef"), resume=str(tmp_path / "run" / "checkpoint-1"), **given)
    assert same(everything(resumed), everything(whole))


def test_evaluation_has_rewards_of_its_own(tmp_path):
    trainer = train(tmp_path, pictures(), eval_dataset=prompt_dataset("x"), eval_reward_funcs=brightness)
    assert "eval_rewards/brightness/mean" in trainer.state.log_history[0]


def test_defaults(tmp_path):
    config = DiffusionSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.prompts_per_round, config.per_device_train_batch_size) == (1, 32, 16)
    assert (config.timestep_sampling, config.num_train_timesteps, config.t_min) == ("continuous", 4, 0.0)
    assert config.gradient_accumulation_steps == 2 * 4
    assert config.learning_rate == 1e-4
    assert DiffusionSFTConfig(output_dir=str(tmp_path), use_cpu=True, full_finetuning=True).learning_rate == 1e-5
    assert tiny_config(tmp_path, DiffusionSFTConfig, **{"num_generations": 1}).per_device_train_batch_size == 4


def test_what_does_not_fit_is_told_before_the_model_is_loaded(tmp_path):
    def make(**given):
        given = {"num_generations": 1, "train_dataset": pictures(), "reward_funcs": None, **given}
        return tiny_trainer(tmp_path, DiffusionSFTTrainer, model="not loaded", **given)

    with pytest.raises(ValueError, match="`reward_funcs` are given, and supervised training asks no reward"):
        make(reward_funcs=brightness)
    with pytest.raises(ValueError, match=r"`num_generations` is 4; .* must be 1: it takes one picture of each group"):
        make(num_generations=4)
    with pytest.raises(ValueError, match=r"columns \['prompt'\]; saved pictures need"):
        make(train_dataset=prompt_dataset("a"))
    with pytest.raises(ValueError, match="no column `reward` that says which is the best"):
        make(train_dataset=pictures("aabb", group=[0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"`loss_type` is 'surrogate'; .* must be 'mse': it has one loss"):
        make(loss_type="surrogate")
