"""Flow-GRPO: the steps of the rollouts are what is learned from, and their probabilities are those of the Gaussian."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_random_pipeline
from tiny_trainers import (
    Gradient,
    brightness,
    everything,
    prompt_dataset,
    relative_error,
    rewards_by_position,
    run_in_two_processes,
    same,
    scramble,
    tiny_config,
    tiny_trainer,
    weights,
)
from torch.distributions import Normal
from transformers import TrainerCallback

from trl_dgpo.rollout import Trajectory
from trl_dgpo.trainer.flow_grpo_config import FlowGRPOConfig
from trl_dgpo.trainer.flow_grpo_trainer import FlowGRPOTrainer


# Four groups of four: two that learn, one with a failure, one without a preference.
REWARDS = (0.1, 0.9, 0.3, 0.2, 1.0, 0.0, float("nan"), 0.3, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0)
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["attn.to_q", "attn.to_out.0"]}
ALL_STEPS = {"num_train_timesteps": None, "updates_per_round": 1, "max_grad_norm": 0.0}


def flow_trainer(directory, **config):
    peft_config = LoraConfig(**LORA, lora_dropout=config.pop("lora_dropout", 0.0))
    config = {"peft_config": peft_config, **ALL_STEPS, **config}
    return tiny_trainer(directory, FlowGRPOTrainer, **config)


def guided_velocity(trainer, x_t, sigma, conditioning):
    """Of the bare transformer, with the negative side as it is."""
    args, transformer = trainer.args, trainer.backbone.denoiser

    def velocity(rows):
        return transformer(
            hidden_states=x_t, timestep=torch.full((len(x_t),), 1000 * sigma), **rows, return_dict=False
        )[0]

    if args.sample_guidance_scale <= 1:
        return velocity(conditioning)
    empty = trainer.backbone.encode([args.negative_prompt])
    negative = velocity({name: row.expand_as(conditioning[name]) for name, row in empty.items()}).detach()
    return negative + args.sample_guidance_scale * (velocity(conditioning) - negative)


def policy_steps(trainer):
    """Of each level and group with valid samples: group, mask of its rows, mean, reference mean, std and s."""
    args, record = trainer.args, trainer.buffer.record
    grid, levels = trainer.backbone.sigmas(args.sample_num_steps).tolist(), trainer._draw_levels(0, 0)
    edges = [1.0, *trainer.backbone.step_levels(args.sample_num_steps)[1:]]
    for sigma in levels:
        step = grid.index(sigma)
        now, following = edges[step], edges[step + 1]
        s = args.noise_level * math.sqrt(now / (1 - (edges[1] if now == 1 else now)))
        number = record.steps[0].tolist().index(step)
        for group in range(record.num_groups):
            rows = (record.group_index == group) & ~record.rewards.isnan()
            if not rows.any():
                continue
            x_t, delta = record.latents[rows, number], following - now
            conditioning = {
                n: row[group].expand(len(x_t), *row[group].shape) for n, row in record.conditioning.items()
            }
            v = guided_velocity(trainer, x_t, sigma, conditioning)
            with torch.no_grad(), trainer.policy.base():
                base_v = guided_velocity(trainer, x_t, sigma, conditioning)
            mean, base_mean = (
                x_t * (1 + s**2 * delta / (2 * now)) + u * (1 + s**2 * (1 - now) / (2 * now)) * delta
                for u in (v, base_v)
            )
            std = s * math.sqrt(-delta)
            log_prob = Normal(mean, std).log_prob(record.latents[rows, number + 1]).mean((1, 2, 3))
            kl = ((mean - base_mean) ** 2).mean((1, 2, 3)) / (2 * s**2)
            yield group, rows, number, log_prob, kl


def by_hand(trainer) -> dict:
    """Gradient and numbers of the first optimiser step from the definition, group by group."""
    args, record, total, ratios, clips = trainer.args, trainer.buffer.record, 0.0, [], []
    for _, rows, number, log_prob, kl in policy_steps(trainer):
        ratio, advantages = (log_prob - record.log_probs[rows, number]).exp(), record.advantages[rows]
        unclipped = -advantages * ratio
        loss = unclipped
        if args.clip_range is not None:
            clipped = -advantages * ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
            loss = torch.maximum(unclipped, clipped)
            clips += (clipped > unclipped).tolist()
        total = total + (loss + args.kl_coef * kl).mean()
        ratios += ratio.tolist()
    parameters = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    total = total / (record.num_groups * args.num_train_timesteps)
    gradient = torch.autograd.grad(total, list(parameters.values()))
    return {
        "loss": total.item(),
        "ratios": torch.tensor(ratios),
        "clipped": torch.tensor(clips).float(),
        "gradient": dict(zip(parameters, gradient, strict=True)),
    }


def first_step(directory, *, moved=True, **config):
    """One optimiser step of a policy that has moved since its rollouts, so that the clip acts; the same by hand."""
    hand = {}
    gradient = Gradient(lambda: hand.update(by_hand(trainer)))
    config = {"reward_funcs": rewards_by_position(*REWARDS), "clip_range": 2e-3, **config}
    trainer = flow_trainer(directory, callbacks=[gradient], **config)
    scramble(trainer)
    fill = trainer.buffer.fill

    def fill_and_move(*args):
        fill(*args)
        if moved:
            scramble(trainer, seed=1)

    trainer.buffer.fill = fill_and_move
    trainer.train()
    return trainer, gradient.value, hand


# -- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "config"),
    [
        (4, {}),
        (8, {"sample_batch_size": 3}),
        (2, {"kl_coef": 0.5}),  # groups are cut
        (16, {"kl_coef": 0.5, "sample_guidance_scale": 2.0, "sigmas": "dpm"}),
        (1, {"clip_range": None, "scale_rewards": "group", "num_sde_steps": 2, "num_train_timesteps": 1}),
    ],
)
def test_the_gradient_is_the_definitions(tmp_path, batch_size, config):
    trainer, gradient, hand = first_step(tmp_path, per_device_train_batch_size=batch_size, **config)
    assert relative_error(gradient, hand["gradient"]) < 1e-4
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(hand["loss"], abs=1e-6)
    if trainer.args.clip_range is not None:
        assert 0.05 < hand["clipped"].mean() < 0.8
    if trainer.args.kl_coef:  # every valid sample has its forward, and is counted
        assert log["ratio_mean"] == pytest.approx(hand["ratios"].mean().item(), abs=1e-6)
        assert log["clip_ratio"] == pytest.approx(hand["clipped"].mean().item(), abs=1e-6)
        assert log["approx_kl"] == pytest.approx(hand["ratios"].log().square().mean().item() / 2, rel=1e-3)
        assert log["kl"] > 0


def test_the_gradient_does_not_depend_on_the_split(tmp_path):
    config = {"kl_coef": 0.5, "num_train_timesteps": 1}
    whole = first_step(tmp_path, per_device_train_batch_size=16, **config)[1]
    for batch_size in (2, 8):
        part = first_step(tmp_path, per_device_train_batch_size=batch_size, sample_batch_size=batch_size, **config)[1]
        assert relative_error(part, whole) < 1e-5


@pytest.mark.parametrize("config", [{}, {"merge_adapter": False}, {"sample_guidance_scale": 2.0, "sigmas": "dpm"}])
def test_the_ratio_begins_at_one(tmp_path, config):
    trainer, _, hand = first_step(tmp_path, moved=False, clip_range=1e-4, **config)
    assert (hand["ratios"] - 1).abs().max() < 3e-6
    assert trainer.state.log_history[0]["clip_ratio"] == 0
    assert trainer.state.log_history[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_in_half_precision_too_the_ratio_begins_at_one(tmp_path, guidance_scale):
    config = {"bf16": True, "sample_guidance_scale": guidance_scale, "clip_range": 1e-4, "updates_per_round": 2}
    trainer = flow_trainer(tmp_path, **config)
    scramble(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["clip_ratio"] == 0
    assert log["approx_kl"] < 1e-12


def test_steps_to_better_images_become_likelier(tmp_path):
    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            record = trainer.buffer.record
            with torch.no_grad():
                gains.append(
                    sum(
                        (record.advantages[rows] * (log_prob - record.log_probs[rows, number])).sum().item()
                        for _, rows, number, log_prob, _ in policy_steps(trainer)
                    )
                )

    gains = []
    trainer = flow_trainer(
        tmp_path, callbacks=[Progress()], num_iterations=4, max_steps=4, learning_rate=1e-3, clip_range=0.1
    )
    scramble(trainer)
    trainer.train()
    assert 0 < gains[0] < gains[1] < gains[2] < gains[3]


# -- what a round keeps and costs -------------------------------------------------------------------------------------


def test_a_round_keeps_the_steps_and_not_more(tmp_path):
    trainer = flow_trainer(tmp_path, sample_num_steps=5, num_sde_steps=2, sample_batch_size=3)
    trainer._roll_out(0)
    record, args = trainer.buffer.record, trainer.args
    assert isinstance(record, Trajectory)
    assert record.latents.shape == (16, 3, *record.x0.shape[1:])
    assert record.latents.dtype == record.log_probs.dtype == torch.float32
    first = trainer._stochastic_steps(0)[0]
    assert record.steps.tolist() == [[first, first + 1]] * 16
    # Outside the window the rollout is the ODE's: from the start to the window, and from there to the image.
    edges = trainer.backbone.step_levels(args.sample_num_steps)
    grid = trainer.backbone.sigmas(args.sample_num_steps).tolist()
    keys = list(zip(record.group_index.tolist(), record.number_in_group.tolist(), strict=True))
    conditioning = {name: rows[record.local_index] for name, rows in record.conditioning.items()}
    latents = trainer._draw(("latents", 0), keys)
    with torch.no_grad():
        for step in range(args.sample_num_steps):
            if step in (first, first + 1):
                torch.testing.assert_close(record.latents[:, step - first], latents, rtol=0, atol=2e-5)
                latents = record.latents[:, step - first + 1]
            else:
                velocity = guided_velocity(trainer, latents, grid[step], conditioning)
                latents = latents + (edges[step + 1] - edges[step]) * velocity
    torch.testing.assert_close(record.x0, latents, rtol=0, atol=2e-5)


def test_a_round_has_the_memory_of_the_last_and_is_copied_nowhere(tmp_path):
    def looks(images, **kwargs):
        seen.append((trainer.buffer.round, trainer._visited.latents, trainer._visited.log_probs))
        return brightness(images)

    seen = []
    trainer = flow_trainer(tmp_path, max_steps=2, reward_funcs=looks, sample_batch_size=3)
    trainer.train()
    record = trainer.buffer.record
    assert [round for round, *_ in seen] == [None, None]  # while the second is sampled the first is gone
    assert record.latents is seen[1][1]
    assert record.log_probs is seen[1][2]


def test_a_round_that_fails_leaves_nothing(tmp_path):
    def fails(images, **kwargs):
        raise KeyboardInterrupt

    trainer = flow_trainer(tmp_path, reward_funcs=fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not hasattr(trainer, "_visited")


def test_where_the_window_stands(tmp_path):
    trainer = flow_trainer(tmp_path, sample_num_steps=8, num_sde_steps=2)
    drawn = [tuple(trainer._stochastic_steps(round)) for round in range(60)]
    assert set(drawn) == {(i, i + 1) for i in range(6)}  # the last step, 7, is never one
    assert drawn == [tuple(trainer._stochastic_steps(round)) for round in range(60)]
    trainer = flow_trainer(tmp_path, sample_num_steps=8, num_sde_steps=2, sde_window="sliding")
    assert [trainer._stochastic_steps(round)[0] for round in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    # a band of levels: those of at least .5 and at most .8 before the shift, of an even grid of 8
    trainer = flow_trainer(tmp_path, sample_num_steps=8, t_min=0.5, t_max=0.8, sigmas="dpm", num_train_timesteps=3)
    assert trainer._stochastic_steps(0) == [2, 3, 4]


@pytest.mark.parametrize(("config", "trained"), [({}, 7), ({"num_sde_steps": 2}, 2), ({"num_train_timesteps": 3}, 3)])
def test_no_forward_without_use(tmp_path, config, trained):
    trainer = flow_trainer(
        tmp_path, sample_num_steps=8, sample_batch_size=16, per_device_train_batch_size=16, **config
    )
    forwards = []
    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda *_: forwards.append(torch.is_grad_enabled()), with_kwargs=False
    )
    trainer.train()
    assert forwards == [False] * 8 + [True] * trained
    assert trainer.policy.views == ("ema",)


def test_each_pass_draws_its_own_steps(tmp_path):
    trainer = flow_trainer(tmp_path, sample_num_steps=8, num_train_timesteps=3, num_iterations=3)
    trainer._roll_out(0)
    grid = trainer.backbone.sigmas(8).tolist()
    passes = [sorted(grid.index(level) for level in trainer._draw_levels(0, i)) for i in range(3)]
    assert all(len(set(steps)) == 3 and max(steps) < 7 for steps in passes)
    assert len({tuple(steps) for steps in passes}) > 1


def test_the_passes_of_a_round_train_every_step_before_any_again(tmp_path):
    trainer = flow_trainer(tmp_path, sample_num_steps=10, num_train_timesteps=1, sample_batch_size=16)
    trainer._roll_out(0)
    for count, round in itertools.product((1, 2, 3, 4, 6, 9), range(3)):
        trainer.args.num_train_timesteps, times = count, torch.zeros(9)
        for iteration in range(9):
            steps = trainer._draw_steps(round, iteration)
            assert len(set(steps)) == count
            assert trainer._draw_levels(round, iteration) == trainer.backbone.sigmas(10)[steps].tolist()
            times[steps] += 1
            # A pass that ends one walk and begins the next must not have a step twice, which then comes later.
            assert times.max() - times.min() <= (1 if 9 % count == 0 else 2)
        assert times.sum() == 9 * count
    orders = [tuple(trainer._draw_steps(round, 0)) for round in range(9)]
    assert len(set(orders)) > 1


# -- checkpoints ------------------------------------------------------------------------------------------------------


def long_trainer(directory, **config):
    # a round of four optimiser steps, with dropout in the LoRA and a window that moves
    return flow_trainer(
        directory,
        max_steps=6,
        num_iterations=2,
        updates_per_round=2,
        num_sde_steps=2,
        num_train_timesteps=1,
        clip_range=1e-3,
        kl_coef=0.1,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        lora_dropout=0.1,
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        **config,
    )


def test_resumed_within_a_round_is_never_stopped(tmp_path):
    trainer = long_trainer(tmp_path / "whole", save_strategy="steps", save_steps=1)
    trainer.train()
    expected = everything(trainer)
    for step in (1, 3, 4):
        trainer = long_trainer(tmp_path / "again")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert trainer.state.global_step == 6
        assert same(everything(trainer), expected), step


# -- several processes ------------------------------------------------------------------------------------------------

# Groups and images of a micro-batch. Of 3 groups, two processes have a half of the second each.
SHARED = [(3, 6), (3, 3), (4, 8)]


def of_a_split(directory, groups, batch):
    from test_splits import MASKED, active_trainer, table

    gradient = Gradient()
    config = {"method": "FlowGRPO", "kl_coef": 0.5, "sample_num_steps": 4, "timestep_sampling": "grid"}
    config |= {"scale_rewards": "batch", "updates_per_round": 1, "rewards": table(g1=MASKED)}
    trainer = active_trainer(directory, groups, batch, callbacks=[gradient], **config)
    trainer.train()
    log = trainer.state.log_history[0]
    return gradient.value, {name: log[name] for name in ("loss", "kl", "ratio_mean", "reward")}


@pytest.mark.slow
def test_processes_that_share_a_group_have_the_gradient_of_one(tmp_path):
    run_in_two_processes(__file__, tmp_path)
    for number, (groups, _) in enumerate(SHARED):
        whole, whole_log = of_a_split(tmp_path, groups, 4 * groups)
        assert any(value.abs().max() > 0 for value in whole.values())
        for rank in range(2):
            gradient, log = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            gradient = {name.removeprefix("module."): value for name, value in gradient.items()}
            assert relative_error(gradient, whole) < 1e-5
            assert log == pytest.approx(whole_log, rel=1e-4, abs=1e-6)


# -- what a user finds ------------------------------------------------------------------------------------------------


def test_the_papers_numbers_are_the_defaults(tmp_path):
    config = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.prompts_per_round, config.updates_per_round) == (24, 48, 2)
    assert (config.clip_range, config.advantage_clip, config.kl_coef) == (1e-4, 5.0, 0.04)
    assert (config.sample_num_steps, config.num_train_timesteps, config.eval_num_steps) == (10, 9, 40)
    assert (config.noise_level, config.sample_guidance_scale, config.learning_rate) == (0.7, 4.5, 3e-4)
    assert config.reference_guidance_scale == config.eval_guidance_scale == 4.5
    assert (
        FlowGRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "num_sde_steps": 2}).num_train_timesteps == 2
    )
    trainer = tiny_trainer(tmp_path, FlowGRPOTrainer, num_train_timesteps=None)
    lora = trainer.policy.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha) == (32, 64)


def test_a_user_finds_the_same_trainer(tmp_path):
    trainer = flow_trainer(tmp_path, reward_funcs=brightness, clip_range=1e-4, updates_per_round=2)
    before = weights(trainer)
    trainer.train()
    assert not same(weights(trainer), before)
    log = trainer.state.log_history[0]
    assert {"reward", "ratio_mean", "approx_kl", "clip_ratio", "time/rollout", "time/update"} <= log.keys()
    assert not {"gate_mean", "objective"} & log.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sampler": "dpm"}, "`sampler` is 'dpm'; in `FlowGRPOConfig` it must be 'sde'"),
        ({"beta": 0.04}, "`beta` is 0.04; .* must be 100.0: .* the KL weight is `kl_coef`"),
        ({"reference_guidance_scale": 4.5}, r"`reference_guidance_scale` is 4.5; .* `sample_guidance_scale` \(1.0\)"),
        ({"sde_window": "first"}, "`sde_window` is 'first'; it must be one of 'random', 'sliding'"),
        ({"noise_level": 0.0}, "`noise_level` is 0.0; it must be above 0"),
        ({"sample_num_steps": 1}, "`sample_num_steps` is 1; Flow-GRPO needs at least 2"),
        ({"num_sde_steps": 4}, r"`num_sde_steps` is 4; of `sample_num_steps` \(4\) .* in 1..3"),
        ({"num_train_timesteps": 4}, r"`num_train_timesteps` \(4\) is more than the 3 stochastic steps"),
        ({"num_sde_steps": 1}, r"`num_train_timesteps` \(2\) is more than the 1 stochastic steps"),
        (
            {"num_train_timesteps": None, "t_min": 0.4},
            "`t_min` is 0.4 .* Set `num_train_timesteps` .* `num_sde_steps`",
        ),
        ({"num_train_timesteps": None, "t_max": 0.9}, "`t_max` 0.9, which leave out some of the steps"),
        ({"merge_adapter": True, "bf16": True}, "`merge_adapter` is on in bf16, where a merged weight is rounded"),
    ],
)
def test_options_without_sense(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, FlowGRPOConfig, **config)


def test_a_band_with_too_few_steps(tmp_path):
    with pytest.raises(ValueError, match=r"`num_train_timesteps` \(3\) is more than the 2 steps that `t_min` \(0.5\)"):
        flow_trainer(tmp_path, t_min=0.5, num_train_timesteps=3)
    with pytest.raises(ValueError, match=r"`num_sde_steps` \(3\) is more than the 2 steps"):
        flow_trainer(tmp_path, t_min=0.5, num_sde_steps=3, num_train_timesteps=1)


def test_a_finished_configuration_can_be_copied(tmp_path):
    config = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    names = ("output_dir", "use_cpu", "num_train_timesteps", "sampler", "loss_type", "reference_guidance_scale")
    assert FlowGRPOConfig(**{name: getattr(config, name) for name in names}).num_train_timesteps == 9
    unguided = dataclasses.replace(pickle.loads(pickle.dumps(config)), sample_guidance_scale=1.0)
    assert (unguided.sample_guidance_scale, unguided.reference_guidance_scale) == (1.0, 1.0)
    assert json.loads(config.to_json_string())["reference_guidance_scale"] == 4.5
    with pytest.raises(ValueError, match=r"`reference_guidance_scale` is 3\.0"):
        dataclasses.replace(config, reference_guidance_scale=3.0)
    band = FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_sde_steps=2, t_min=0.5)
    assert band.num_train_timesteps == 2


def test_weights_that_merging_would_round(tmp_path):
    pipeline = tiny_random_pipeline()
    pipeline.transformer.bfloat16()
    with pytest.raises(ValueError, match="`merge_adapter` is on, and merging rounds the weights"):
        flow_trainer(tmp_path, model=pipeline, merge_adapter=True)


def test_saved_pictures_have_no_steps(tmp_path):
    trainer = flow_trainer(tmp_path)
    saved = trainer.collect_rollouts(1)
    with pytest.raises(ValueError, match="Flow-GRPO learns from the course of its own sampling"):
        flow_trainer(tmp_path, train_dataset=saved)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = [of_a_split(directory, *split) for split in SHARED]
    torch.save(found, directory / f"{os.environ['RANK']}.pt")
