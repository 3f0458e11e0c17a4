"""
The trainer against what it should do, on the random tiny pipeline.

Tests of equality start where things act: LoRA weights away from zero, so that gates differ and the clip acts on some
rows.
"""

import dataclasses
import json
import logging
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import IA3Config, LoraConfig, PeftModel
from tiny_models import tiny_random_pipeline
from tiny_trainers import (
    Gradient,
    Interrupt,
    brightness,
    everything,
    prompt_dataset,
    relative_error,
    rewards_by_position,
    same,
    scramble,
    tiny_trainer,
    weights,
)

from trl_dgpo import DGPOTrainer, GPOTrainer
from trl_dgpo.evaluation import evaluation_latents
from trl_dgpo.seeding import generator


# Four groups of four: two that learn, one with a failure, one without a preference.
REWARDS = (0.1, 0.9, 0.3, 0.2, 1.0, 0.0, float("nan"), 0.3, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0)
ACTIVE = {"beta": 100.0, "clip_range": 1e-3, "max_grad_norm": 0.0}


def with_dropout(dropout: float = 0.1) -> LoraConfig:
    # dropout draws from torch's global generator, which a resumed run has to restore too
    targets = ["attn.to_q", "attn.to_out.0"]
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=targets)


# -- the gradient -----------------------------------------------------------------------------------------------------


def by_hand(trainer) -> dict:
    """
    Gradient and metrics of the first optimiser step from the definition: group by group, level by level, without
    failed samples, with advantages worked out anew.
    """
    args, policy, record = trainer.args, trainer.policy, trainer.buffer.record
    transformer = trainer.backbone.denoiser
    num_groups = record.num_groups
    total, found = torch.zeros(()), defaultdict(list)
    for level, sigma in enumerate(trainer._draw_levels(0, 0)):
        objective = kl = 0.0
        for group in range(num_groups):
            rows = (record.group_index == group) & ~record.rewards.isnan()
            if not rows.any():
                continue
            x0, rewards = record.x0[rows], record.rewards[rows]
            advantages = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)).float()
            noise = torch.randn(x0.shape[1:], generator=generator(args.seed, "noise", 0, 0, level, group))
            inputs = {
                "hidden_states": (1 - sigma) * x0 + sigma * noise,
                "timestep": torch.full((len(x0),), 1000 * sigma),
                **{name: row[group].expand(len(x0), *row[group].shape) for name, row in record.conditioning.items()},
            }
            velocity = transformer(**inputs, return_dict=False)[0]
            with torch.no_grad(), policy.base():
                base_velocity = transformer(**inputs, return_dict=False)[0]
            errors = (velocity - (noise - x0)).square().mean((1, 2, 3))
            reference_errors = (base_velocity - (noise - x0)).square().mean((1, 2, 3))
            learned = errors
            if args.clip_range is not None:
                with torch.no_grad(), policy.old():
                    old_velocity = transformer(**inputs, return_dict=False)[0]
                ratio = ((old_velocity - (noise - x0)).square().mean((1, 2, 3)) - errors.detach()).exp()
                clipped = torch.where(advantages > 0, ratio > 1 + args.clip_range, ratio < 1 - args.clip_range)
                learned = torch.where(clipped, errors.detach(), errors)
                if advantages.any() or args.kl_coef:
                    found["clipped"] += clipped.tolist()
            score = args.beta * (advantages * (learned - reference_errors)).mean()
            if args.loss_type == "logsigmoid":
                total = total - torch.nn.functional.logsigmoid(-score)
            else:
                total = total + score.detach().sigmoid() * (advantages * learned).mean()
            divergence = (velocity - base_velocity).square().mean()
            total = total + args.kl_coef * (args.beta if args.loss_type == "logsigmoid" else 1) * divergence
            objective, kl = objective + math.log1p(score.exp().item()), kl + divergence.item()
            if advantages.any():
                found["gates"].append(score.sigmoid().item())
        found["objective"].append(objective / num_groups)
        found["kl"].append(kl / num_groups)
    total = total / (num_groups * args.num_train_timesteps)
    parameters = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(total, list(parameters.values()))
    return {"loss": total.item(), "gradient": dict(zip(parameters, gradient, strict=True)), **found}


def first_step(tmp_path, *, scrambled=True, fault=None, **config):
    """One optimiser step of an active policy: the trainer, its gradient, and the same by hand."""
    hand = {}
    gradient = Gradient(lambda: hand.update(by_hand(trainer)))
    config = {"reward_funcs": rewards_by_position(*REWARDS), **ACTIVE, **config}
    trainer = tiny_trainer(tmp_path, callbacks=[gradient], **config)
    if scrambled:
        scramble(trainer)
        if "old" in trainer.policy.views:
            scramble(trainer, "old", seed=1)
    if fault is not None:
        fault(trainer)
    trainer.train()
    return trainer, gradient.value, hand


@pytest.mark.parametrize(
    ("batch_size", "sample_batch_size", "loss_type", "kl_coef"),
    [
        (4, 4, "surrogate", 0.0),
        (8, 3, "surrogate", 0.0),
        (16, 16, "surrogate", 0.0),
        (4, 4, "surrogate", 0.1),
        (16, 4, "surrogate", 0.1),
        (4, 4, "logsigmoid", 0.0),
        (8, 4, "logsigmoid", 0.1),
        (1, 4, "surrogate", 0.0),
        (2, 4, "surrogate", 0.1),
        (1, 4, "logsigmoid", 0.1),
    ],
)
def test_gradient_is_the_definitions_whatever_the_micro_batches(
    tmp_path, batch_size, sample_batch_size, loss_type, kl_coef
):
    _, gradient, hand = first_step(
        tmp_path,
        per_device_train_batch_size=batch_size,
        sample_batch_size=sample_batch_size,
        loss_type=loss_type,
        kl_coef=kl_coef,
    )
    assert max(hand["gates"]) - min(hand["gates"]) >= 0.2
    assert 0.2 < np.mean(hand["clipped"]) < 0.8
    assert relative_error(gradient, hand["gradient"]) < 1e-5


def fixed_gate(trainer):
    honest = trainer._group_loss

    def fault(errors, reference_errors, *args, **kwargs):
        return honest(errors, errors.detach(), *args, **kwargs)  # score 0, gate 0.5

    trainer._group_loss = fault


def noise_of_micro_batch(trainer):
    honest = trainer._predict

    def fault(part, rows, level, **how):
        first = int(part.group_index[rows][0])  # numbered within what is predicted at once
        return honest(dataclasses.replace(part, noise=[t.roll(first, 0) for t in part.noise]), rows, level, **how)

    trainer._predict = fault


@pytest.mark.parametrize("fault", [fixed_gate, noise_of_micro_batch])
def test_that_comparison_finds_planted_faults(tmp_path, fault):
    _, gradient, hand = first_step(tmp_path, fault=fault)
    assert relative_error(gradient, hand["gradient"]) > 1e-2


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_logsigmoid_has_beta_times_the_surrogates_gradient(tmp_path, kl_coef):
    gradients = [first_step(tmp_path, kl_coef=kl_coef, loss_type=kind)[1] for kind in ("logsigmoid", "surrogate")]
    scaled = {name: ACTIVE["beta"] * gradient for name, gradient in gradients[1].items()}
    assert relative_error(gradients[0], scaled) < 1e-5


def test_a_failed_sample_acts_as_if_it_had_not_been_drawn(tmp_path):
    """Its latent may be anything, and its group's gradient is that of the others: `by_hand` never sees it."""

    def spoil(trainer):
        fill = trainer.buffer.fill

        def fill_spoilt(record, round):
            record.x0[record.rewards.isnan()] = 1e3
            fill(record, round)

        trainer.buffer.fill = fill_spoilt

    trainer, gradient, hand = first_step(tmp_path, fault=spoil, kl_coef=0.1)
    assert trainer.buffer.record.x0.max() == 1e3
    assert relative_error(gradient, hand["gradient"]) < 1e-5


@pytest.mark.parametrize(("batch_size", "kl_coef"), [(4, 0.1), (4, 0.0), (8, 0.1)])
def test_a_group_to_which_no_reward_applies_teaches_nothing(tmp_path, batch_size, kl_coef):
    rewards = (*REWARDS[:8], *[None] * 4, *REWARDS[12:])
    config = {"per_device_train_batch_size": batch_size, "kl_coef": kl_coef}
    _, gradient, hand = first_step(tmp_path, reward_funcs=rewards_by_position(*rewards), **config)
    assert relative_error(gradient, hand["gradient"]) < 1e-5


@pytest.mark.parametrize(("kl_coef", "weight_decay"), [(0.0, 0.0), (0.0, 0.1)])
def test_a_round_without_preferences_takes_its_step_and_teaches_nothing(tmp_path, kl_coef, weight_decay):
    flat = rewards_by_position(*[0.25] * 16)
    config = {"kl_coef": kl_coef, "weight_decay": weight_decay, "learning_rate": 0.1, "clip_range": 1e-3}
    trainer = tiny_trainer(tmp_path, reward_funcs=flat, **config)
    scramble(trainer)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1
    assert trainer.state.log_history[0]["grad_norm"] == 0
    assert "gate_mean" not in trainer.state.log_history[0]
    decayed = {name: tensor * (1 - 0.1 * weight_decay) for name, tensor in before.items()}
    assert same(weights(trainer), decayed)


# -- how often the transformer is called ------------------------------------------------------------------------------


def count_forwards(trainer) -> list[tuple[int, bool]]:
    """Rows of each forward, and whether it keeps a graph: of the last layer, which no block's recomputation calls."""
    forwards = []
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, args: forwards.append((len(args[0]), torch.is_grad_enabled()))
    )
    return forwards


ROLLOUT, LEVELS = 4, 2  # steps of a rollout, levels of a pass


@pytest.mark.parametrize(
    ("trainer_class", "config", "no_grad_passes"),
    [
        (DGPOTrainer, {}, 1),
        (DGPOTrainer, {"kl_coef": 0.1}, 1),
        (DGPOTrainer, {"clip_range": 1e-3}, 2),
        (DGPOTrainer, {"reference": "old", "clip_range": 1e-3}, 1),
        (DGPOTrainer, {"reference": "old", "clip_range": 1e-3, "kl_coef": 0.1}, 2),
        (DGPOTrainer, {"reference": "refreshed"}, 1),
        (GPOTrainer, {}, 0),
        (GPOTrainer, {"kl_coef": 0.1}, 1),
        (GPOTrainer, {"loss_type": "logsigmoid"}, 1),
        (
            DGPOTrainer,
            {"num_iterations": 2, "updates_per_round": 2, "max_steps": 4, "gradient_checkpointing": True},
            1,
        ),
    ],
)
def test_forwards_of_a_round(tmp_path, trainer_class, config, no_grad_passes):
    fixed = {"per_device_train_batch_size": 8, "sample_batch_size": 8, "sample_guidance_scale": 4.5}
    trainer = tiny_trainer(tmp_path, trainer_class, reward_funcs=rewards_by_position(*range(16)), **fixed, **config)
    forwards = count_forwards(trainer)
    trainer.train()
    passes = config.get("num_iterations", 1)
    rollout = [(16, False)] * 2 * ROLLOUT  # two sub-batches of 8, doubled by guidance
    assert forwards[: len(rollout)] == rollout
    learning = [rows for rows, with_graph in forwards if with_graph]
    fixed = [rows for rows, with_graph in forwards[len(rollout) :] if not with_graph]
    # Rewards 0, 1, 2, 3 of a group: no advantage is 0, so every row counts, 16 a level: 8 at a time with a graph, and
    # without one as many as a rollout's forward has, of one optimiser step.
    updates = config.get("updates_per_round", 1)
    assert learning == [8] * 2 * LEVELS * passes
    assert fixed == [16 // updates] * updates * LEVELS * passes * no_grad_passes


def test_forwards_without_guidance_and_with_a_guided_reference(tmp_path):
    trainer = tiny_trainer(tmp_path, reference_guidance_scale=2.0, reward_funcs=rewards_by_position(*range(16)))
    forwards = count_forwards(trainer)
    trainer.train()
    no_graph, graph = (sum(rows for rows, g in forwards if g is kept) for kept in (False, True))
    assert no_graph == 16 * ROLLOUT + 2 * 16 * LEVELS
    assert graph == 16 * LEVELS


def test_no_forward_for_rows_that_change_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=rewards_by_position(*REWARDS), per_device_train_batch_size=16)
    forwards = count_forwards(trainer)
    trainer.train()
    assert [rows for rows, with_graph in forwards if with_graph] == [4 + 3 + 4] * LEVELS


# -- random draws -----------------------------------------------------------------------------------------------------


def train_and_read(tmp_path, **config):
    trainer = tiny_trainer(tmp_path, **{"max_steps": 2, **config})
    trainer.train()
    return everything(trainer)


def test_equal_seeds_give_equal_bits(tmp_path):
    first = train_and_read(tmp_path, seed=3)
    torch.rand(5)  # the global generator is no part of it
    assert same(first, train_and_read(tmp_path, seed=3))
    assert not same(first, train_and_read(tmp_path, seed=4))


def test_every_rollout_starts_from_its_own_latent(tmp_path):
    """With one prompt and a policy that stands still, seeds, rounds, groups and images differ in nothing else."""
    x0 = []
    for seed in (0, 1):
        trainer = tiny_trainer(
            tmp_path,
            seed=seed,
            train_dataset=prompt_dataset("a"),
            learning_rate=0.0,
            max_steps=2,
            full_finetuning=True,
        )
        fill = trainer.buffer.fill
        trainer.buffer.fill = lambda rollout, round, fill=fill: x0.append(rollout.x0) or fill(rollout, round)
        trainer.train()
    assert len(torch.cat(x0).flatten(1).unique(dim=0)) == 2 * 2 * 16


def test_noise_is_shared_by_a_group_and_by_nothing_else(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        num_iterations=2,
        max_steps=4,
        reward_funcs=rewards_by_position(*range(16)),
        per_device_train_batch_size=8,
    )
    honest, draws, sigmas = trainer.backbone.noise, [], []

    def spy(x0, noise, sigma):
        for group in noise.split(4):
            assert all(torch.equal(row, group[0]) for row in group)
            draws.append(group[0])
        sigmas.append(sigma)
        return honest(x0, noise, sigma)

    trainer.backbone.noise = spy
    trainer.train()
    # 2 rounds x 2 passes, each the reference's forwards and then the policy's, of 2 levels x 4 groups
    draws = torch.stack(draws).view(4, 2, 8, -1)
    assert torch.equal(draws[:, 0], draws[:, 1])
    assert len(draws[:, 0].flatten(0, 1).unique(dim=0)) == 32
    # Four passes of two levels of two micro-batches: the same for both, none twice, all of the noisy prefix.
    levels = torch.tensor(sigmas, dtype=torch.float64).view(4, 2, 2, 2)[:, 0]
    assert torch.equal(levels[..., 0], levels[..., 1])
    assert (levels[:, 0, 0] != levels[:, 1, 0]).all()
    assert len(levels[..., 0].unique(dim=0)) > 1
    assert set(levels.flatten().tolist()) <= set(trainer._levels.tolist())
    assert trainer._levels.tolist() == trainer.backbone.sigmas(4)[: len(trainer._levels)].tolist()


def test_noise_is_each_images_own_where_it_is_not_shared(tmp_path):
    trainer = tiny_trainer(tmp_path, shared_noise=False, per_device_train_batch_size=2, num_train_timesteps=1)
    honest, draws = trainer.backbone.noise, []

    def spy(x0, noise, sigma):
        draws.append(noise)
        return honest(x0, noise, sigma)

    trainer.backbone.noise = spy
    trainer.train()
    record = trainer.buffer.record
    own = [
        torch.randn(record.x0.shape[1:], generator=generator(trainer.args.seed, "noise", 0, 0, 0, group, number))
        for group in range(4)
        for number in range(4)
    ]
    # Reference and policy see the same 16, in whatever micro-batches: cut groups here, so the gates have a pass too.
    assert len(torch.cat(draws)) % 16 == 0
    assert torch.equal(torch.cat(draws).unique(dim=0), torch.stack(own).unique(dim=0))
    assert len(torch.stack(own).unique(dim=0)) == 16


def test_levels_of_a_band(tmp_path):
    trainer = tiny_trainer(tmp_path, sample_num_steps=10, num_train_timesteps=3, t_min=0.2, t_max=0.5)
    drawn = {level for round in range(20) for level in trainer._draw_levels(round, 0)}
    assert drawn == set(trainer.backbone.sigmas(10)[5:9].tolist())


def test_levels_are_all_of_the_prefix_where_all_are_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, sample_num_steps=10, num_train_timesteps=7, t_min=0.4)
    drawn = [trainer._draw_levels(round, 0) for round in range(3)]
    assert all(sorted(levels, reverse=True) == trainer.backbone.sigmas(10)[:7].tolist() for levels in drawn)
    assert drawn[0] != drawn[1]


def test_continuous_levels_stay_above_the_clip(tmp_path):
    trainer = tiny_trainer(tmp_path, timestep_sampling="continuous", num_train_timesteps=5, t_min=0.4)
    levels = [level for round in range(20) for level in trainer._draw_levels(round, 0)]
    assert len(set(levels)) == 100
    assert 3 * 0.4 / (1 + 2 * 0.4) <= min(levels) < max(levels) <= 1
    trainer.train()


def test_prompt_dropout_gives_some_groups_the_negative_prompt(tmp_path):
    trainer = tiny_trainer(tmp_path, prompt_dropout=0.5, prompts_per_round=8, num_generations=2)
    trainer.train()
    rollout = trainer.buffer.record
    empty = trainer.backbone.encode([""])["pooled_projections"]

    def dropped(*key):
        return (trainer._conditioning(rollout, key)["pooled_projections"] == empty).all(1)

    assert 0 < dropped(0, 0).sum() < 8
    assert torch.equal(dropped(0, 0), dropped(0, 0))
    assert not torch.equal(dropped(0, 0), dropped(0, 1))


@pytest.mark.parametrize("num_prompts", [1, 3, 9])
def test_any_number_of_prompts_fills_a_round(tmp_path, num_prompts):
    seen = []

    def reward(prompts, **kwargs):
        seen.extend(prompts[::2])
        return list(range(len(prompts)))

    names = [f"p{i}" for i in range(num_prompts)]
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=reward,
        train_dataset=prompt_dataset(*names),
        prompts_per_round=8,
        num_generations=2,
        max_steps=2,
    )
    trainer.train()
    counts = [seen.count(name) for name in names]
    assert sum(counts) == 16
    assert max(counts) - min(counts) <= 1
    assert len(seen[:8]) == 8
    if num_prompts == 1:  # two groups of one prompt are two groups
        x0 = trainer.buffer.record.x0.flatten(1)
        assert len(x0.unique(dim=0)) == 16


def test_rollouts_come_from_the_old_policy_when_it_is_time(tmp_path):
    trainer = tiny_trainer(tmp_path, old_policy_after=2, num_iterations=2, max_steps=4)
    uses, using = [], trainer.policy.using

    def watch(view=None, **how):
        uses.append((trainer.state.global_step, view))
        return using(view, **how)

    trainer.policy.using = watch
    trainer.train()
    assert [use for use in uses if use[1] != "base"] == [(0, None), (2, "old")]


def test_lora_dropout_is_off_but_where_the_policy_learns(tmp_path):
    seen = {}
    for dropout in (0.0, 0.9):
        trainer = tiny_trainer(
            tmp_path,
            peft_config=with_dropout(dropout),
            clip_range=1e-3,
            reward_funcs=rewards_by_position(*range(16)),
        )
        scramble(trainer)
        scramble(trainer, "old", seed=1)
        fixed, fix = [], trainer._fix
        trainer._fix = lambda part, fixed=fixed, honest=fix: fixed.append(honest(part)) or fixed[-1]
        trainer.train()
        old_errors = fixed[0].old_errors
        seen[dropout] = {"x0": trainer.buffer.record.x0, "old": old_errors}, trainer.state.log_history[0]["loss"]
    assert same(seen[0.0][0], seen[0.9][0])
    assert seen[0.0][1] != seen[0.9][1]


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_have_the_values_they_are_named_for(tmp_path):
    trainer, _, hand = first_step(tmp_path, per_device_train_batch_size=16, kl_coef=0.1, advantage_clip=1.5)
    log = trainer.state.log_history[0]
    rewards = np.array(REWARDS)
    groups = rewards.reshape(4, 4)
    assert log["reward"] == pytest.approx(np.nanmean(rewards))
    assert log["reward_std"] == pytest.approx(np.nanmean(np.nanstd(groups, 1)))
    assert log["frac_reward_zero_std"] == 0.25
    assert log["rewards_failed"] == 1
    assert log["rewards/by_position/mean"] == pytest.approx(np.nanmean(rewards))
    assert log["rewards/by_position/std"] == pytest.approx(np.nanstd(rewards))
    assert (
        log["advantage_clip_ratio"] == 2 / 16
    )  # 1.62 in the first group, 1.73 in the last, at most 1.35 in the second
    assert log["kl"] == pytest.approx(np.mean(hand["kl"]), rel=1e-4)
    for phase in ("rollout", "reward", "reference", "update"):
        assert log[f"time/{phase}"] >= 0
    assert log["time/rollout"] > log["time/reward"]


def test_objective_gate_and_clip_are_those_of_the_definition(tmp_path):
    trainer, _, hand = first_step(tmp_path, per_device_train_batch_size=16)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(hand["loss"], rel=1e-4)
    assert log["objective"] == pytest.approx(np.mean(hand["objective"]), rel=1e-4)
    assert log["gate_mean"] == pytest.approx(np.mean(hand["gates"]), rel=1e-4)
    assert log["clip_ratio"] == pytest.approx(np.mean(hand["clipped"]), rel=1e-4)
    assert "kl" not in log


def test_a_log_is_the_mean_since_the_last_one(tmp_path):
    means = iter([0.1, 0.3, 0.5, 0.9])

    def reward(images, **kwargs):
        mean = next(means)
        return [mean - 0.1, mean + 0.1] * 8

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, max_steps=8, num_iterations=2, logging_steps=4)
    trainer.train()
    assert [log["reward"] for log in trainer.state.log_history[:2]] == pytest.approx([0.2, 0.7])


def test_rewards_are_logged_by_name_and_log_what_they_like(tmp_path):
    def spelled(images, log_metric, trainer_state, **kwargs):
        log_metric("letters", len(images))
        return [0.0, 1.0] * (len(images) // 2)

    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=[spelled, brightness],
        reward_weights=[2.0, 0.5],
        eval_dataset=prompt_dataset("x", "y"),
        eval_reward_funcs=spelled,
    )
    trainer.train()
    evaluation, training = trainer.state.log_history[:2]
    assert training["rewards/spelled/mean"] == 0.5
    assert training["reward"] == pytest.approx(2 * 0.5 + 0.5 * training["rewards/brightness/mean"])
    assert training["letters"] == 16
    assert evaluation["eval_letters"] == 2
    assert "letters" not in evaluation


# -- checkpoints and resume -------------------------------------------------------------------------------------------


LONG = {
    "num_iterations": 2,
    "updates_per_round": 2,  # 4 steps a round
    "prompts_per_round": 2,  # of three prompts: 2 rounds an epoch
    "max_steps": 11,
    "old_policy_after": 1,
    "ema_every": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
}
KINDS = {
    "lora": {"peft_config": with_dropout, "clip_range": 1e-3, "kl_coef": 0.1, "sample_guidance_scale": 4.5},
    "full": {"full_finetuning": True, "kl_coef": 0.1},
    "gpo": {"trainer_class": GPOTrainer, "loss_type": "logsigmoid", "scale_rewards": "sign"},
}


def long_trainer(output_dir, kind, **config):
    config = {**LONG, **KINDS[kind], **config}
    if "peft_config" in config:
        config["peft_config"] = config["peft_config"]()
    return tiny_trainer(output_dir, **config)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """Runs that saved at every step, made when first asked for: what they end with, and where they saved it."""
    runs = {}

    def get(kind):
        if kind not in runs:
            directory = tmp_path_factory.mktemp(kind)
            trainer = long_trainer(directory, kind, save_strategy="steps", save_steps=1)
            trainer.train()
            runs[kind] = everything(trainer), trainer.state.log_history, directory
        return runs[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("lora", 4),  # at a round's boundary
        ("lora", 3),  # between two steps of one pass
        ("lora", 8),  # at an epoch's boundary
        ("lora", 10),  # between two passes of a later epoch
        ("full", 7),
        ("gpo", 6),
        ("gpo", 8),
    ],
)
def test_killed_and_resumed_is_never_killed(tmp_path, never_killed, kind, step):
    expected, history, directory = never_killed(kind)
    trainer = long_trainer(tmp_path, kind)
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    assert trainer.state.global_step == 11
    assert same(everything(trainer), expected)
    kept = ("step", "loss", "reward", "objective", "learning_rate", "grad_norm")
    logs, expected_logs = (
        [{name: log[name] for name in kept if name in log} for log in entries if "loss" in log and log["step"] > step]
        for entries in (trainer.state.log_history, history)
    )
    assert logs == expected_logs


@pytest.mark.parametrize("lost", ["ema", "round"])
def test_that_comparison_finds_what_is_not_restored(tmp_path, never_killed, lost, monkeypatch, caplog):
    expected, _, directory = never_killed("lora")
    trainer = long_trainer(tmp_path, "lora")
    load = trainer._load_from_checkpoint

    def forgetful(checkpoint, model=None):
        before = weights(trainer, "ema")
        load(checkpoint, model)
        if lost == "round":
            trainer.buffer.clear()
        else:
            for name, tensor in trainer.policy.tensors("ema").items():
                tensor.copy_(before[name])

    monkeypatch.setattr(trainer, "_load_from_checkpoint", forgetful)
    with caplog.at_level(logging.WARNING, "trl_dgpo"):
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-10"))
    assert not same(everything(trainer), expected)
    assert ("sampled anew" in caplog.text) is (lost == "round")


def test_interrupted_in_a_micro_step_and_resumed_in_the_same_process(tmp_path, never_killed):
    expected, _, _ = never_killed("lora")
    trainer = long_trainer(tmp_path, "lora", save_strategy="steps", save_steps=1, callbacks=[Interrupt(after=6)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step > 0
    assert trainer._work
    trainer.train(resume_from_checkpoint=True)
    assert same(everything(trainer), expected)


def test_a_second_call_starts_afresh(tmp_path, never_killed):
    expected, _, _ = never_killed("full")
    trainer = long_trainer(tmp_path, "full", callbacks=[Interrupt(after=2)])
    rounds, roll_out = [], trainer._roll_out
    trainer._roll_out = lambda round: rounds.append(round) or roll_out(round)
    trainer.policy.save(tmp_path / "start")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.policy.load(tmp_path / "start")
    trainer.optimizer = None
    trainer.train()
    assert rounds == [0, 0, 1, 2]
    assert trainer.state.global_step == 11
    assert same(everything(trainer), expected)


def test_checkpoint_of_another_run_is_refused(tmp_path, never_killed):
    _, _, directory = never_killed("lora")
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors is missing"):
        long_trainer(tmp_path, "full").train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"does not fit.*`peft_config`"):
        long_trainer(tmp_path, "lora", peft_config=lambda: None).train(
            resume_from_checkpoint=str(directory / "checkpoint-1")
        )


# -- what is saved ----------------------------------------------------------------------------------------------------


def pictures(pipeline, trainer, prompts, **call):
    """uint8 images (B, 3, H, W) of a plain pipeline call for the trainer's evaluation latents."""
    pipeline.scheduler = trainer.backbone.scheduler
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=prompts,
        latents=evaluation_latents(prompts, 1, (4, 8, 8)),
        num_inference_steps=trainer.args.eval_num_steps,
        height=32,
        width=32,
        max_sequence_length=trainer.args.max_sequence_length,
        **call,
    ).images
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


@pytest.mark.parametrize(("save_ema", "guidance_scale"), [(True, 4.5), (True, 1.0), (False, 4.5)])
def test_plain_diffusers_draws_the_trainers_pictures(tmp_path, save_ema, guidance_scale):
    # A folder whose name is almost a checkpoint's holds what is used, not what training goes on from.
    output_dir, prompts = tmp_path / "checkpoints", ["a red cat", "b"]
    trainer = tiny_trainer(output_dir, save_ema=save_ema, eval_guidance_scale=guidance_scale)
    scramble(trainer)
    view = None
    if save_ema:
        scramble(trainer, "ema", seed=1, scale=0.5)
        view = "ema"
    trainer.save_model()
    mine = trainer.generate(prompts, view=view)
    assert not torch.equal(mine, trainer.generate(prompts, view="base"))
    if save_ema:
        assert not torch.equal(mine, trainer.generate(prompts, view=None))

    pipeline = tiny_random_pipeline()
    pipeline.load_lora_weights(output_dir)
    assert torch.equal(pictures(pipeline, trainer, prompts, guidance_scale=guidance_scale), mine)

    pipeline = tiny_random_pipeline()
    adapted = PeftModel.from_pretrained(pipeline.transformer, output_dir)
    pipeline.transformer = adapted.get_base_model()
    assert torch.equal(pictures(pipeline, trainer, prompts, guidance_scale=guidance_scale), mine)


def test_full_fine_tuning_is_saved_as_a_transformer(tmp_path):
    trainer = tiny_trainer(tmp_path, full_finetuning=True, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    pipeline = tiny_random_pipeline()
    pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path / "transformer")
    assert torch.equal(
        pictures(pipeline, trainer, ["a"], guidance_scale=trainer.args.eval_guidance_scale), trainer.generate(["a"])
    )
    assert not list(tmp_path.glob("pytorch_lora*"))


def test_a_checkpoint_holds_the_live_policy_and_its_views(tmp_path):
    trainer = tiny_trainer(
        tmp_path, save_strategy="steps", save_steps=1, clip_range=1e-3, learning_rate=1e-2, max_steps=2, ema_every=2
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    for folder in (checkpoint, checkpoint / "ema", checkpoint / "old"):
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 64
    live = PeftModel.from_pretrained(tiny_random_pipeline().transformer, checkpoint)
    ema = PeftModel.from_pretrained(tiny_random_pipeline().transformer, checkpoint / "ema")
    moved, still = (
        sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n) for model in (live, ema)
    )
    assert moved > 0 == still
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt") and "adapter" in path.name]


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_comes_before_the_first_step_and_every_eval_steps(tmp_path):
    trainer = tiny_trainer(
        tmp_path, eval_dataset=prompt_dataset("x", "y", "z"), eval_strategy="steps", eval_steps=2, max_steps=4
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert [log["step"] for log in evaluations] == [0, 2, 4]
    for name in ("reward_std", "reward_stderr", "rewards/brightness/mean", "images/darkness", "images/contrast"):
        assert math.isfinite(evaluations[0][f"eval_{name}"])
    assert evaluations[0]["eval_num_images"] == 3
    assert evaluations[0]["eval_failed"] == 0


def test_evaluation_images_depend_on_prompt_and_number_alone(tmp_path):
    config = {"per_device_eval_batch_size": 2}
    trainer = tiny_trainer(tmp_path, **config)
    scramble(trainer, "ema")
    images = trainer.generate(["p", "q", "r", "s"], num_images=2).view(4, 2, 3, 32, 32)
    assert torch.equal(trainer.generate(["s", "q"], num_images=2).view(2, 2, 3, 32, 32), images[[3, 1]])
    assert torch.equal(trainer.generate(["s", "q", "p", "r"]), images[[3, 1, 0, 2], 0])
    assert len(images.flatten(0, 1).flatten(1).unique(dim=0)) == 8
    other = tiny_trainer(tmp_path, seed=7, **config)
    assert torch.equal(other.generate(["p", "q"], view="base"), trainer.generate(["p", "q"], view="base"))


def test_evaluation_uses_the_ema_weights_and_its_own_rewards(tmp_path):
    seen = []

    def look(images, **kwargs):
        seen.append(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))
        return [1.0, None, float("nan")]

    trainer = tiny_trainer(tmp_path, eval_dataset=prompt_dataset("x", "y", "z"), eval_reward_funcs=look)
    scramble(trainer, "ema")
    metrics = trainer.evaluate()
    assert torch.equal(seen[0], trainer.generate(["x", "y", "z"]))
    assert not torch.equal(seen[0], trainer.generate(["x", "y", "z"], view=None))
    assert metrics["eval_reward"] == 1
    assert metrics["eval_failed"] == 1
    assert metrics["eval_num_images"] == 3


def test_evaluation_of_several_data_sets(tmp_path):
    datasets = {"short": prompt_dataset("x"), "long": prompt_dataset("x y", "z")}
    trainer = tiny_trainer(tmp_path, eval_dataset=datasets, eval_num_images=2)
    metrics = trainer.evaluate()
    assert metrics["eval_short_num_images"] == 2
    assert metrics["eval_long_num_images"] == 4
    assert (
        trainer.evaluate(prompt_dataset("x"), metric_key_prefix="test")["test_reward"] == metrics["eval_short_reward"]
    )


def test_the_best_checkpoint_can_be_had_by_its_reward(tmp_path):
    scores = iter([0.0, 0.2, 0.9, 0.4])
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=prompt_dataset("x"),
        eval_reward_funcs=lambda images, **kwargs: [next(scores)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        max_steps=3,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = tiny_trainer(tmp_path)
    best.policy.load(tmp_path / "checkpoint-2")
    assert all(same(weights(trainer, view), weights(best, view)) for view in (None, "ema"))


def test_generate_says_which_views_there_are(tmp_path):
    trainer = tiny_trainer(tmp_path, save_ema=False)
    scramble(trainer)
    assert torch.equal(trainer.generate(["a"]), trainer.generate(["a"], view=None))
    assert not torch.equal(trainer.generate(["a"]), trainer.generate(["a"], view="base"))
    with pytest.raises(ValueError, match=r"`view` is 'ema'; this run has \('base',\), and `None`"):
        trainer.generate(["a"], view="ema")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        trainer.evaluate()


# -- ways to train ----------------------------------------------------------------------------------------------------


def lora_gradient(tmp_path, **config):
    gradient = Gradient()
    trainer = tiny_trainer(tmp_path, callbacks=[gradient], reward_funcs=rewards_by_position(*range(16)), **config)
    scramble(trainer)
    trainer.train()
    return trainer, gradient.value


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, gradient = lora_gradient(tmp_path)
    trainer, same_gradient = lora_gradient(tmp_path, gradient_checkpointing=True)
    assert trainer.backbone.denoiser.is_gradient_checkpointing
    assert not plain.backbone.denoiser.is_gradient_checkpointing
    assert same(same_gradient, gradient)


def test_bf16_trains_in_float32_weights(tmp_path):
    _, gradient = lora_gradient(tmp_path)
    tiny_random_pipeline().save_pretrained(tmp_path / "model")
    trainer, half = lora_gradient(tmp_path, bf16=True, model=str(tmp_path / "model"))
    assert trainer.backbone.denoiser.proj_out.weight.dtype == torch.bfloat16
    assert trainer.backbone.vae.dtype == torch.float32
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert relative_error(half, gradient) < 0.5


def test_8_bit_adam(tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = tiny_trainer(tmp_path, optim="adamw_bnb_8bit", learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__
    assert not same(weights(trainer), before)


def test_full_fine_tuning_leaves_the_frozen_model_alone(tmp_path):
    trainer = tiny_trainer(
        tmp_path, full_finetuning=True, kl_coef=0.1, clip_range=1e-3, learning_rate=1e-2, max_steps=2
    )
    start = weights(trainer)
    trainer.train()
    assert same(weights(trainer, "base"), start)
    assert not any(torch.equal(tensor, start[name]) for name, tensor in weights(trainer).items() if "to_q" in name)
    assert not same(weights(trainer, "ema"), start)


def test_lora_leaves_the_frozen_model_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, kl_coef=0.1, learning_rate=1e-2)
    start = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters() if "lora_" not in name}
    trainer.train()
    now = dict(trainer.policy.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in start.items())
    assert any(tensor.any() for name, tensor in weights(trainer).items() if "lora_B" in name)


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_other_samplers(tmp_path, sampler):
    trainer = tiny_trainer(tmp_path, sampler=sampler, eval_dataset=prompt_dataset("x"))
    trainer.train()
    x0 = trainer.buffer.record.x0
    again = tiny_trainer(tmp_path, sampler=sampler, sample_batch_size=16)
    again.train()
    torch.testing.assert_close(again.buffer.record.x0, x0, atol=1e-4, rtol=1e-4)  # step noise is an image's own
    # Evaluation is the noise-free ODE on the same levels, also for the stochastic sampler.
    euler = tiny_trainer(tmp_path, sampler="euler")
    assert torch.equal(trainer.generate(["x"], view="base"), euler.generate(["x"], view="base"))


def test_a_guided_reference_is_what_the_kl_is_measured_against(tmp_path):
    kl = {}
    for scale in (1.0, 3.0):
        trainer = tiny_trainer(tmp_path, kl_coef=0.1, reference_guidance_scale=scale)
        trainer.train()
        kl[scale] = trainer.state.log_history[0]["kl"]
    assert kl[1.0] == 0  # a fresh LoRA is the base
    assert kl[3.0] > 0


@pytest.mark.parametrize("reference", ["frozen", "old", "refreshed"])
def test_references_differ_once_the_policy_has_moved(tmp_path, reference):
    config = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "reference": reference,
        "reward_funcs": rewards_by_position(*range(16)),
    }
    trainer = tiny_trainer(tmp_path, **config)
    trainer.train()
    gate = trainer.state.log_history[1]["gate_mean"]
    # After one step the old policy is a copy, and a refreshed one too: only the frozen one has been left behind.
    assert (abs(gate - 0.5) > 1e-4) is (reference == "frozen")


def test_averages_that_cannot_move_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_dgpo"):
        tiny_trainer(tmp_path, ema_every=8)
    assert "`max_steps` (1) gives the policy fewer steps than `ema_every` (8)" in caplog.text


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_dataset": prompt_dataset()}, ValueError, "`train_dataset` is empty; it needs at least one row"),
        (
            {"train_dataset": [{"text": "a"}]},
            ValueError,
            r"\(\['text'\]\) need a column `prompt` of type `str`; rename",
        ),
        ({"train_dataset": [{"prompt": 3}]}, ValueError, "need a column `prompt` of type `str`"),
        ({"train_dataset": [{"prompt": "a", "images": 1}]}, ValueError, r"columns \['images'\].*rename the columns"),
        ({"train_dataset": iter("ab")}, TypeError, "`train_dataset` is str_.*iterator; it must have a length"),
        ({"train_dataset": {"train": []}}, TypeError, r"dict of \['train'\]; give one of them"),
        ({"eval_dataset": {"x": prompt_dataset()}}, ValueError, "`eval_dataset_x` is empty"),
        ({"reward_funcs": []}, ValueError, "`reward_funcs` is empty"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "2 numbers for 1 rewards"),
        ({"model": "no/such/folder/here"}, ValueError, "does not exist. Give an existing folder or an id"),
        ({"reward_funcs": lambda images, text, **kwargs: [0.0]}, ValueError, r"needs \['text'\], but the data set"),
        ({"peft_config": LoraConfig(r=2), "full_finetuning": True}, ValueError, "choose one of them"),
        ({"peft_config": IA3Config()}, TypeError, "is a IA3Config; it must be a `LoraConfig`"),
        ({"auto_find_batch_size": True}, ValueError, "cannot divide groups"),
        ({"resolution": 33}, ValueError, "`height` is 33; this model takes multiples of"),
        ({"num_train_timesteps": 4}, ValueError, r"\(4\) is more than the 3 levels that `t_min` \(0.4\).*Lower"),
    ],
)
def test_bad_input_is_told_before_training(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_trainer(tmp_path, **arguments)


def test_a_pipeline_of_another_family_is_told(tmp_path):
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    with pytest.raises(ValueError, match=r"a DDPMPipeline, which is not supported\. Supported: StableDiffusion3"):
        tiny_trainer(tmp_path, model=DDPMPipeline(unet, DDPMScheduler()))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*accelerate launch"):
        tiny_trainer(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5] * 15, "returned 15 values for 16 images"),
        (["good"] * 16, "returned 'good' of type str"),
        ([float("nan")] * 16, r"failed for 16 of the last 16 images.*\(16 of the last 16\)"),
        ([float("nan")] * 2 + [1.0] * 14, "failed for 2 of the last 16 images"),
    ],
)
def test_rewards_that_make_no_sense_stop_the_run(tmp_path, values, message):
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda images, **kwargs: values)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.train()


def test_a_reward_that_raises_for_one_image_costs_that_image(tmp_path, caplog):
    calls = []

    def touchy(images, prompts, **kwargs):
        calls.append(len(images))
        if len(images) > 1 or len(calls) == 4:
            raise OSError("unreadable picture")
        return brightness(images)

    trainer = tiny_trainer(tmp_path, reward_funcs=touchy)
    with caplog.at_level(logging.WARNING, "trl_dgpo"):
        trainer.train()
    assert calls == [16] + [1] * 16
    assert trainer.state.log_history[0]["rewards_failed"] == 1
    assert trainer.buffer.record.rewards.isnan().nonzero().flatten().tolist() == [2]
    assert "unreadable picture" in caplog.text


def test_an_evaluation_without_any_reward_is_an_error(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=prompt_dataset("x", "y"),
        eval_reward_funcs=lambda images, **kwargs: [None, float("nan")],
    )
    with pytest.raises(RuntimeError, match="No evaluation image has a reward: 1 of 2 failed"):
        trainer.evaluate()
