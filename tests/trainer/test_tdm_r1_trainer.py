"""TDM-R1: three adapters on one frozen model, each learning in its turn what the definition says."""

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import tiny_family
from tiny_models import tiny_random_pipeline
from tiny_trainers import (
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
from transformers import TrainerCallback

from trl_dgpo.noising import unshift
from trl_dgpo.rollout import Walk
from trl_dgpo.trainer.tdm_r1_config import ROLES, TDMR1Config
from trl_dgpo.trainer.tdm_r1_trainer import TDMR1Trainer


# Four groups of four: two that learn, one with a failure, one without a preference.
REWARDS = (0.1, 0.9, 0.3, 0.2, 1.0, 0.0, float("nan"), 0.3, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0)
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["attn.to_q", "attn.to_out.0"]}
ADAPTERS = {"fake": "fake", "surrogate": "surrogate", "student": None}  # by role, as the policy calls them
ACTIVE = {
    "clip_range": 0.02,
    "kl_coef": 0.3,
    "beta": 30.0,
    "divergence_limit": 0.01,
    "fake_kl_coef": 0.5,
    "reward_guidance_scale": 2.0,
    "distill_guidance_scale": 3.0,
    "reward_steps": 3,
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "logging_steps": 1,
}


class Watch(TrainerCallback):
    """Keeps the gradient of each optimiser step, and calls `also` at the weights that it was taken at."""

    def __init__(self, also=None):
        self.gradients, self.also = [], also

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({name: value.detach().clone() for name, value in found.items()})
        if self.also is not None:
            self.also()


def tdm_trainer(directory, *, lora=LORA, lora_dropout=0.0, **config):
    if config.get("model") is None:
        config["peft_config"] = LoraConfig(**lora, lora_dropout=lora_dropout)
    return tiny_trainer(directory, TDMR1Trainer, **{**ACTIVE, **config})


def scramble_all(trainer, scale=0.5):
    for seed, view in enumerate((None, "fake", "surrogate", *trainer.policy.views)):
        scramble(trainer, view, seed=seed, scale=scale)


def velocity(trainer, view, x, sigma, conditioning, guidance=1.0):
    """Of the bare transformer with an adapter, or with none."""

    def of(rows):
        return trainer.backbone.denoiser(
            hidden_states=x, timestep=torch.full((len(x),), 1000 * sigma), **rows, return_dict=False
        )[0]

    with trainer.policy.using(view):
        positive = of(conditioning)
        if guidance == 1.0:
            return positive
        empty = trainer.backbone.encode([trainer.args.negative_prompt])
        negative = of({name: row.expand_as(conditioning[name]) for name, row in empty.items()})
    return negative + guidance * (positive - negative)


def by_hand(trainer) -> dict:
    """Loss, gradient and masks of the present optimiser step from the definition, group by group."""
    args, record, role = trainer.args, trainer.buffer.record, trainer._role
    edges, told = trainer.backbone.step_levels(args.sample_num_steps), trainer.backbone.sigmas(args.sample_num_steps)
    steps, levels = trainer._draw_steps(0, 0), trainer._draw_levels(0, 0)
    total, seen = 0.0, {"clipped": [], "drifted": [], "gates": [], "terms": {}}
    for number, (step, tau) in enumerate(zip(steps, levels, strict=True)):
        now, sigma = edges[step], edges[step + 1]
        noise = trainer._noise(record, (0, 0, number))
        for group in range(record.num_groups):
            rows = (record.group_index == group) & ~record.rewards.isnan()
            x_j, x_k = record.latents[rows, step], record.latents[rows, step + 1]
            cond = {n: row[group].expand(len(x_j), *row[group].shape) for n, row in record.conditioning.items()}
            eps = noise[[group] * len(x_j)] if role == "surrogate" else noise[rows]
            alpha = (1 - tau) / (1 - sigma)
            b = (tau**2 - (sigma * alpha) ** 2) ** 0.5
            x_tau = alpha * x_k + b * eps
            x0 = x_j - now * (x_j - x_k) / (now - sigma)
            mean = lambda t: t.flatten(1).mean(1)  # noqa: E731
            if role == "fake":
                v = velocity(trainer, "fake", x_tau, tau, cond)
                base = velocity(trainer, "base", x_tau, tau, cond).detach()
                errors = mean((v - (x_tau - x0) / tau) ** 2) + args.fake_kl_coef * mean((v - base) ** 2)
                total = total + errors.mean()
            elif role == "surrogate":
                u = -x_k / (1 - sigma) + eps / b * (tau + sigma**2 * alpha / (1 - sigma))
                v = velocity(trainer, "surrogate", x_tau, tau, cond)
                base, old = (velocity(trainer, view, x_tau, tau, cond).detach() for view in ("base", "old"))
                d, d_base, d_old = (mean((w - u) ** 2) for w in (v, base, old))
                divergence, advantages = mean((v - base) ** 2), record.advantages[rows]
                score = args.beta * (advantages * (d - d_base)).mean().detach()
                ratio = (d_old - d).exp()
                clipped = torch.where(advantages > 0, ratio > 1 + args.clip_range, ratio < 1 - args.clip_range)
                better = torch.where(advantages > 0, d < d_base, d > d_base)
                drifted = better & (divergence > args.divergence_limit)
                d = torch.where(clipped | drifted, d.detach(), d)
                loss = score.sigmoid() * (advantages * d).mean() + args.kl_coef * divergence.mean()
                total = total + (step + 1) / args.sample_num_steps * loss
                seen["clipped"] += clipped.tolist()
                seen["drifted"] += drifted.tolist()
                seen["gates"].append(score.sigmoid().item())
            else:
                with torch.no_grad():
                    clean = lambda view, scale: x_tau - tau * velocity(trainer, view, x_tau, tau, cond, scale)  # noqa
                    base, guided = clean("base", 1.0), clean("base", args.distill_guidance_scale)
                    fake = clean("fake", 1.0)
                    # the surrogate is asked at a level and with a noise of its own
                    level = trainer._renoising_levels("reward", args.reward_t_min, 0, 0)[number]
                    eps = trainer._reward_noise(record, (0, 0, number))[[group] * len(x_j)]
                    alpha = (1 - level) / (1 - sigma)
                    there = alpha * x_k + (level**2 - (sigma * alpha) ** 2) ** 0.5 * eps
                    surrogate, its_base = (
                        there - level * velocity(trainer, view, there, level, cond, scale)
                        for view, scale in (("surrogate", args.reward_guidance_scale), ("base", 1.0))
                    )
                x0_now = x_j - now * velocity(trainer, None, x_j, told[step].item(), cond)
                w = args.reward_weight
                terms = {"kl": (base - fake, guided, 1.0), "cfg": (guided - base, guided, 1 - w)}
                if step < args.reward_steps:
                    terms["reward"] = (surrogate - its_base, surrogate, w)
                else:
                    terms["kl"] = (base - fake, guided, 1 - w)
                for name, (direction, distant, weight) in terms.items():
                    error = mean((x0_now - (x0_now + direction).detach()) ** 2) / mean((x0 - distant).abs())
                    total = total + weight * error.mean()
                    seen["terms"].setdefault(name, []).append(error.mean().item())
    total = total / (record.num_groups * len(steps))
    parameters = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    gradient = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
    return {"loss": total.item(), "gradient": gradient, "steps": steps, **seen}


def one_update(directory, **config):
    """The first three optimiser steps, from weights that are all different, and the same by hand."""
    hand = []
    watch = Watch(lambda: hand.append(by_hand(trainer)))
    config = {"reward_funcs": rewards_by_position(*REWARDS), "learning_rate": 1e-9, **config}
    rates = {"fake_learning_rate": 1e-9, "surrogate_learning_rate": 1e-9}
    trainer = tdm_trainer(directory, callbacks=[watch], **{**rates, **config})
    scramble_all(trainer)
    trainer.train()
    return trainer, watch.gradients, hand


# -- the gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 4, 16])  # a half of a group, a group, all
def test_the_gradients_are_the_definitions(tmp_path, batch_size):
    trainer, gradients, hand = one_update(tmp_path, per_device_train_batch_size=batch_size, num_train_timesteps=3)
    for role, gradient, expected, log in zip(ROLES, gradients, hand, trainer.state.log_history, strict=False):
        assert relative_error(gradient, expected["gradient"]) < 1e-4, role
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5), role
        assert log[f"loss/{role}"] == pytest.approx(expected["loss"], abs=1e-5), role
    # it is tested where everything acts
    surrogate, student = hand[1], hand[2]
    learning = torch.tensor(REWARDS).view(4, 4).nan_to_num(0.0).std(1) > 0
    assert 0.1 < torch.tensor(surrogate["clipped"]).float().mean() < 0.9
    assert 0.1 < torch.tensor(surrogate["drifted"]).float().mean() < 0.9
    gates = torch.tensor(surrogate["gates"]).view(3, 4)[:, learning]
    assert gates.max() - gates.min() > 0.2
    assert student["terms"].keys() == {"kl", "cfg", "reward"}
    assert student["terms"]["kl"][0] > 1e-4


def test_the_gradients_do_not_depend_on_the_split(tmp_path):
    config = {"train_dataset": prompt_dataset("a", "b", "c", "d")}
    whole = one_update(tmp_path, per_device_train_batch_size=16, **config)[1]
    for batch_size in (1, 2, 8):
        part = one_update(tmp_path, per_device_train_batch_size=batch_size, sample_batch_size=batch_size, **config)[1]
        for role, mine, theirs in zip(ROLES, part, whole, strict=True):
            assert relative_error(mine, theirs) < 1e-5, (role, batch_size)


def test_steps_without_a_reward_learn_without_it(tmp_path):
    _, gradients, hand = one_update(tmp_path, reward_steps=1, num_train_timesteps=4)
    assert len(hand[2]["terms"]["reward"]) == 4  # of one step, four groups
    assert len(hand[2]["terms"]["kl"]) == 16
    assert relative_error(gradients[2], hand[2]["gradient"]) < 1e-4


def test_without_guidance_limit_and_clip(tmp_path):
    config = {"distill_guidance_scale": 1.0, "reward_guidance_scale": 1.0, "divergence_limit": None}
    config |= {"clip_range": None, "kl_coef": 0.0, "fake_kl_coef": 0.0}
    forwards = []
    trainer = tdm_trainer(tmp_path, sample_batch_size=16, per_device_train_batch_size=16, **config)
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: forwards.append((trainer._role, torch.is_grad_enabled(), len(inputs[0])))
    )
    trainer.train()
    assert forwards == [
        *[("fake", False, 16)] * 4,  # the rollout
        *[("fake", True, 16)] * 2,
        *[("surrogate", False, 16)] * 2,  # the base's errors
        *[("surrogate", True, 16)] * 2,
        *[("student", False, 16)] * 8,  # base and fake, and surrogate and base elsewhere
        *[("student", True, 16)] * 2,
    ]
    assert not {"kl", "clip_ratio", "drift_ratio", "loss/student_cfg"} & trainer.state.log_history[1].keys()


def test_guidance_costs_what_its_second_side_does(tmp_path):
    forwards = []
    trainer = tdm_trainer(
        tmp_path, sample_batch_size=16, per_device_train_batch_size=16, num_train_timesteps=4, reward_steps=3
    )
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: forwards.append((trainer._role, torch.is_grad_enabled(), len(inputs[0])))
    )
    trainer.train()
    student = [(grad, rows) for role, grad, rows in forwards if role == "student"]
    # Both sides of the base, and of the surrogate for three of the four steps; one of the fake score, and of the base
    # where the surrogate is asked.
    assert sorted(student) == sorted([*[(False, 32)] * (4 + 3), *[(False, 16)] * (4 + 3), *[(True, 16)] * 4])


# -- turns ------------------------------------------------------------------------------------------------------------


def test_each_moves_in_its_turn_alone(tmp_path):
    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now = {role: weights(trainer, view) for role, view in ADAPTERS.items()}
            moved.append({role for role in ROLES if not same(now[role], before[role])})
            before.update(now)
            averages = {view: weights(trainer, view) for view in ("old", "ema")}
            followed.append({view for view in averages if not same(averages[view], before.get(view, {}))})
            before.update(averages)
            steps = {  # a parameter's own optimiser steps
                role: {int(trainer.optimizer.state[p]["step"]) for p in trainer.policy.tensors(view).values()}
                if next(iter(trainer.policy.tensors(view).values())) in trainer.optimizer.state
                else set()
                for role, view in ADAPTERS.items()
            }
            counts.append(steps)

    moved, followed, counts, before = [], [], [], {}
    watch = Watch()
    trainer = tdm_trainer(tmp_path, max_steps=6, weight_decay=0.1, callbacks=[Turns(), watch], learning_rate=1e-3)
    scramble_all(trainer)
    before.update({role: weights(trainer, view) for role, view in ADAPTERS.items()})
    before.update({view: weights(trainer, view) for view in ("old", "ema")})
    trainer.train()
    assert moved == [{role} for role in ROLES] * 2
    assert followed == [set(), {"old"}, {"ema"}] * 2
    assert counts[0] == {"fake": {1}, "surrogate": set(), "student": set()}
    assert counts[-1] == {role: {2} for role in ROLES}
    for number, gradient in enumerate(watch.gradients):
        name = ADAPTERS[ROLES[number % 3]] or "default"
        assert gradient
        assert all(key.endswith(f".{name}.weight") for key in gradient)


def test_three_rates_and_betas(tmp_path):
    config = {"learning_rate": 1e-3, "fake_learning_rate": 2e-3, "surrogate_learning_rate": 3e-3}
    trainer = tdm_trainer(
        tmp_path, lr_scheduler_type="linear", surrogate_adam_beta1=0.8, adam_beta2=0.99, weight_decay=0.1, **config
    )
    trainer.train()
    groups = trainer.optimizer.param_groups
    for group, (role, rate, beta1) in zip(
        groups, (("student", 1e-3, 0.0), ("fake", 2e-3, 0.0), ("surrogate", 3e-3, 0.8)), strict=True
    ):
        assert group["initial_lr"] == rate
        assert group["betas"] == (beta1, 0.99)
        assert group["weight_decay"] == 0.1
        mine = trainer.policy.tensors(ADAPTERS[role]).values()
        assert {id(p) for p in group["params"]} == {id(p) for p in mine}
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)


def test_averages_follow_their_own(tmp_path):
    trainer = tdm_trainer(tmp_path, ema_every=2)
    scramble_all(trainer)
    surrogate, student = (weights(trainer, view) for view in ("surrogate", None))
    for step in range(12):
        old, ema = weights(trainer, "old"), weights(trainer, "ema")
        trainer.move_averages(step)
        turn, role = divmod(step, 3)
        decay = {1: min(0.3, 0.001 + 0.001 * turn)}.get(role, 1.0)
        for name, value in weights(trainer, "old").items():
            torch.testing.assert_close(value, decay * old[name] + (1 - decay) * surrogate[name])
        decay = min((1 + turn) / (10 + turn), 0.9) if role == 2 and turn % 2 else 1.0
        for name, value in weights(trainer, "ema").items():
            torch.testing.assert_close(value, decay * ema[name] + (1 - decay) * student[name])


def test_the_backward_is_of_the_same_adapter_where_it_computes_anew(tmp_path):
    plain = one_update(tmp_path)[1]
    again = one_update(tmp_path, gradient_checkpointing=True)[1]
    for mine, theirs in zip(again, plain, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_what_fails_leaves_the_student_on(tmp_path):
    def fails(images, **kwargs):
        raise KeyboardInterrupt

    trainer = tdm_trainer(tmp_path, reward_funcs=fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {layer._active_adapter[0] for layer in trainer.policy._views.layers} == {"default"}


# -- the rollouts -----------------------------------------------------------------------------------------------------


def test_a_round_keeps_where_the_student_was(tmp_path):
    trainer = tdm_trainer(tmp_path, sample_batch_size=3)
    scramble_all(trainer)
    trainer._roll_out(0)
    record, edges = trainer.buffer.record, trainer.backbone.step_levels(4)
    assert isinstance(record, Walk)
    assert record.latents.shape == (16, 5, *record.x0.shape[1:])
    assert record.latents.dtype == torch.float32
    assert torch.equal(record.latents[:, 4], record.x0)
    part = trainer._part(0, 0, 0)
    conditioning = part.conditioning_of(slice(None))
    for level, step in enumerate(part.steps):
        x_t, told = record.latents[:, step], trainer.backbone.sigmas(4)[step].item()
        with torch.no_grad():
            x0 = x_t - edges[step] * velocity(trainer, None, x_t, told, conditioning)
        torch.testing.assert_close(trainer._student_x0(part, slice(None), level), x0, rtol=0, atol=2e-5)


def test_a_round_has_latents_that_half_precision_did_not_touch(tmp_path):
    trainer = tdm_trainer(tmp_path, bf16=True)
    trainer._roll_out(0)
    latents = trainer.buffer.record.latents
    assert not torch.equal(latents, latents.bfloat16().float())
    trainer.train()


def test_which_steps_are_drawn(tmp_path):
    trainer = tdm_trainer(tmp_path, num_train_timesteps=1)
    drawn = {}
    for number, role in enumerate(ROLES):
        trainer.state.global_step = number
        draws = [(trainer._draw_steps(round, 0), trainer._draw_levels(round, 0)) for round in range(400)]
        drawn[role] = torch.tensor([step for (step,), _ in draws]).bincount(minlength=4) / 400
        edges = trainer.backbone.step_levels(4)
        assert all(edges[step + 1] < tau <= 1 for (step,), (tau,) in draws)
        assert draws[3] == (trainer._draw_steps(3, 0), trainer._draw_levels(3, 0))
    for role in ("fake", "student"):
        torch.testing.assert_close(drawn[role], torch.full((4,), 0.25), rtol=0, atol=0.08)
    torch.testing.assert_close(drawn["surrogate"], torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.08)
    trainer.args.num_train_timesteps = 4
    for number, role in enumerate(ROLES):
        trainer.state.global_step = number
        steps = trainer._draw_steps(0, 0)
        assert len(steps) == 4
        assert role == "surrogate" or sorted(steps) == [0, 1, 2, 3]  # the surrogate's come back


def test_levels_are_each_roles_own(tmp_path):
    trainer = tdm_trainer(tmp_path, num_train_timesteps=4, t_min=0.5, reward_t_min=0.7)
    lowest, first = {}, set()
    for number, role in enumerate(ROLES):
        trainer.state.global_step = number
        found = {}
        for round in range(60):
            for step, tau in zip(trainer._draw_steps(round, 0), trainer._draw_levels(round, 0), strict=True):
                found.setdefault(step, []).append(unshift(tau, trainer.backbone.shift_factor))
        lowest[role] = min(found[3])  # of what the last step led to, which is clean
        first.add(round_to(found[3][0]))
    assert len(first) == 3
    assert lowest["fake"] < 0.2
    assert lowest["student"] < 0.2
    assert 0.52 <= lowest["surrogate"] < 0.6
    trainer.state.global_step = 2
    draws = [trainer._renoising_levels("reward", 0.7, round, 0) for round in range(60)]
    asked = [unshift(tau, trainer.backbone.shift_factor) for levels in draws for tau in levels]
    assert 0.72 <= min(asked) < 0.76


def round_to(number: float) -> float:
    return round(number, 9)


def test_noise_is_shared_where_images_are_compared(tmp_path):
    trainer = tdm_trainer(tmp_path)
    trainer._roll_out(0)
    record = trainer.buffer.record
    noises = []
    for number in range(3):
        trainer.state.global_step = number
        noises.append(trainer._noise(record, (0, 0, 0)))
    assert [len(noise) for noise in noises] == [16, 4, 16]
    assert not torch.equal(noises[0], noises[2])
    trainer.args.shared_noise = False
    trainer.state.global_step = 1
    assert len(trainer._noise(record, (0, 0, 0))) == 16


# -- where it begins and what it leaves -------------------------------------------------------------------------------


def test_a_student_that_comes_with_a_lora(tmp_path):
    pipeline = tiny_random_pipeline()
    pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(**LORA, inference_mode=False))
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=stream))
    own = {n: p.detach().clone() for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    trainer = tdm_trainer(tmp_path, model=pipeline)
    x, cond = torch.randn(2, 4, 8, 8), trainer.backbone.encode(["a", "b"])
    with torch.no_grad():
        outputs = {v: velocity(trainer, v, x, 0.7, cond) for v in (None, "ema", "base", "fake", "surrogate", "old")}
        plain = velocity_of(tiny_random_pipeline().transformer, x, 0.7, cond)
    for view in ("base", "fake", "surrogate", "old"):
        assert torch.equal(outputs[view], plain), view
    assert torch.equal(outputs["ema"], outputs[None])
    assert not torch.allclose(outputs[None], plain, atol=1e-2)
    assert all(torch.equal(t, own[n]) for n, t in weights(trainer).items())
    assert trainer.policy.views == ("ema", "old")  # the base costs nothing
    trainer.train()


def velocity_of(transformer, x, sigma, conditioning):
    timestep = torch.full((len(x),), 1000 * sigma)
    return transformer(hidden_states=x, timestep=timestep, **conditioning, return_dict=False)[0]


def test_what_is_saved_is_the_student(tmp_path):
    trainer = tdm_trainer(tmp_path, save_strategy="steps", save_steps=2)
    scramble_all(trainer)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_random_pipeline().transformer, tmp_path)
    mine = {n.removesuffix(".weight"): t for n, t in weights(trainer, "ema").items()}
    theirs = {n.removesuffix(".weight"): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert len(theirs) == len(mine)
    assert all(torch.equal(a, b) for a, b in zip(mine.values(), theirs.values(), strict=True))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("adapter_model.safetensors")}
    folders = ("checkpoint-2", "checkpoint-3")
    views = ("", "ema/", "old/", "fake/", "surrogate/")
    expected = {f"{folder}/{view}adapter_model.safetensors" for folder in folders for view in views}
    assert files == expected | {"adapter_model.safetensors"}


def long_trainer(directory, **config):
    # a round of two passes with two updates each, twelve optimiser steps, with dropout in the LoRAs
    return tdm_trainer(
        directory,
        max_steps=15,
        num_iterations=2,
        updates_per_round=2,
        learning_rate=1e-2,
        fake_learning_rate=1e-2,
        surrogate_learning_rate=1e-2,
        lr_scheduler_type="linear",
        lora_dropout=0.1,
        max_grad_norm=1.0,
        num_train_timesteps=1,
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        **config,
    )


def test_resumed_between_two_turns_is_never_stopped(tmp_path):
    trainer = long_trainer(tmp_path / "whole", save_strategy="steps", save_steps=1)
    trainer.train()
    expected = everything(trainer)
    assert any(name.startswith("fake.") for name in expected)
    for step in (1, 2, 7, 12):
        trainer = long_trainer(tmp_path / "again")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert trainer.state.global_step == 15
        assert same(everything(trainer), expected), step


def test_a_checkpoint_that_lacks_one_of_them(tmp_path):
    trainer = long_trainer(tmp_path / "whole", save_strategy="steps", save_steps=1)
    trainer.args.max_steps = 1
    trainer.train()
    (tmp_path / "whole" / "checkpoint-1" / "fake" / "adapter_model.safetensors").unlink()
    (tmp_path / "whole" / "checkpoint-1" / "manifest.json").unlink()  # as of a version that wrote none
    with pytest.raises(FileNotFoundError, match="fake"):
        long_trainer(tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


@pytest.mark.slow
def test_the_fake_score_learns_what_the_student_draws(tmp_path):
    config = {"fake_learning_rate": 1e-2, "learning_rate": 1e-9, "surrogate_learning_rate": 1e-9, "max_steps": 60}
    trainer = tdm_trainer(tmp_path, num_train_timesteps=4, fake_kl_coef=0.0, lora={**LORA, "r": 16}, **config)
    scramble(trainer, scale=1.0)  # far from the base
    trainer.train()
    part = trainer._part(19, 0, 0)  # of a turn of the fake score that it has not had
    errors = {view: trainer._no_grad_pass(trainer.policy.using(view), part)[0] for view in ("base", "fake")}
    assert (errors["fake"] < errors["base"]).float().mean() > 0.8  # of all images and levels
    assert errors["fake"].mean() < 0.99 * errors["base"].mean()


def test_a_user_finds_the_same_trainer(tmp_path):
    trainer = tdm_trainer(tmp_path, eval_dataset=prompt_dataset("x"), learning_rate=1e-3)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate().keys() == before.keys()
    images = {view: trainer.generate(["x"], view=view) for view in ("export", None, "base", "fake", "surrogate")}
    assert {tuple(image.shape) for image in images.values()} == {(1, 3, 32, 32)}
    logs = trainer.state.log_history
    assert {"reward", "loss/fake", "time/rollout"} <= logs[1].keys()
    rollouts = trainer.collect_rollouts(2)
    assert len(rollouts) == 32
    with pytest.raises(ValueError, match="TDM-R1 learns from the course of its own sampling"):
        tdm_trainer(tmp_path, train_dataset=rollouts)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2603.07700" in card
    assert "num_inference_steps=" in card


@pytest.mark.parametrize("name", ["flux-dev", "z-image"])
def test_other_families_of_flow_matching(tmp_path, name):
    own = {"sigmas": "model"} if name == "z-image" else {}
    trainer = tiny_trainer(tmp_path, TDMR1Trainer, **{**ACTIVE, **own, "model": tiny_family(name), "max_steps": 6})
    before = [weights(trainer, view) for view in ADAPTERS.values()]
    trainer.train()
    assert not any(same(weights(trainer, v), w) for v, w in zip(ADAPTERS.values(), before, strict=True))


# -- what has no sense ------------------------------------------------------------------------------------------------


def test_the_authors_numbers_are_the_defaults(tmp_path):
    config = TDMR1Config(output_dir=str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.prompts_per_round, config.num_train_timesteps) == (24, 48, 2)
    assert (config.sample_num_steps, config.eval_num_steps, config.sample_guidance_scale) == (4, 4, 1.0)
    assert (config.learning_rate, config.fake_learning_rate, config.surrogate_learning_rate) == (7.5e-5, 3e-4, 3e-4)
    assert (config.adam_beta1, config.fake_adam_beta1, config.surrogate_adam_beta1) == (0.0, 0.0, 0.9)
    assert (config.beta, config.clip_range, config.kl_coef, config.fake_kl_coef) == (10.0, 1e-3, 0.001, 0.02)
    assert (config.reward_weight, config.reward_guidance_scale, config.distill_guidance_scale) == (0.7, 4.5, 4.5)
    assert (config.divergence_limit, config.t_min, config.reward_t_min) == (0.05, 0.125, 0.125)
    assert (config.reference, config.scale_rewards, config.ema_every) == ("frozen", "batch", 1)
    assert config.steps_per_round == 3
    lora = tiny_trainer(tmp_path, TDMR1Trainer).policy.model.peft_config
    assert {name: (of.r, of.lora_alpha) for name, of in lora.items()} == dict.fromkeys(
        ("default", "fake", "surrogate", "ema"), (32, 64)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sampler": "dpm"}, "`sampler` is 'dpm'; in `TDMR1Config` it must be 'euler'"),
        ({"sample_guidance_scale": 4.5}, "`sample_guidance_scale` is 4.5; .* `distill_guidance_scale`"),
        ({"old_policy_after": 3}, "`old_policy_after` is 3; .* must be None"),
        ({"full_finetuning": True}, "`full_finetuning` is True; .* LoRAs beside the student's"),
        ({"prompt_dropout": 0.1}, "`prompt_dropout` is 0.1"),
        ({"timestep_sampling": "continuous"}, "`timestep_sampling` is 'continuous'"),
        ({"reference": "refreshed"}, "`reference` is 'refreshed'; it must be one of 'frozen', 'old'"),
        ({"num_train_timesteps": 5}, r"`num_train_timesteps` \(5\) levels cannot be drawn"),
        ({"reward_steps": 5}, r"`reward_steps` is 5; .* in 1..4"),
        ({"reward_weight": 0.0}, r"`reward_weight` is 0.0; it must be in \(0, 1\]"),
        ({"fake_adam_beta1": 1.0}, r"`fake_adam_beta1` is 1.0; it must be in \[0, 1\)"),
        ({"surrogate_learning_rate": -1.0}, "`surrogate_learning_rate` is -1.0; it must be 0 or more"),
        ({"divergence_limit": -0.1}, "`divergence_limit` is -0.1; it must be above 0"),
        ({"optim": "adafactor"}, "`optim` is 'adafactor'; .* Take one of 'adamw_torch'"),
    ],
)
def test_options_without_sense(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, TDMR1Config, **config)


def test_off_is_off(tmp_path):
    assert tiny_config(tmp_path, TDMR1Config, divergence_limit=0.0).divergence_limit is None


def test_a_model_that_predicts_noise(tmp_path):
    with pytest.raises(ValueError, match="`model` is a StableDiffusionPipeline, which predicts noise"):
        tiny_trainer(tmp_path, TDMR1Trainer, model=tiny_family("sd15"))


def test_an_optimiser_that_knows_nothing_of_three(tmp_path):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="`optimizers` is given, and TDM-R1 makes its own"):
        TDMR1Trainer(
            model=tiny_random_pipeline(),
            reward_funcs=brightness,
            args=tiny_config(tmp_path, TDMR1Config),
            train_dataset=prompt_dataset("a"),
            optimizers=(optimiser, None),
        )


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_engines_that_shard(tmp_path, monkeypatch, engine):
    monkeypatch.setattr("trl_dgpo.trainer.base_trainer.check_engine", lambda args: engine)
    with pytest.raises(ValueError, match=r"TDM-R1 trains several adapters, .* Use plain DDP"):
        tdm_trainer(tmp_path)


def test_steps_above_which_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"would be noised on to at least .* take fewer sampling steps"):
        tdm_trainer(tmp_path, sample_num_steps=80)


# -- several processes ------------------------------------------------------------------------------------------------

# Groups and images of a micro-batch. Of 3 groups, two processes have a half of the second each.
SHARED = [(3, 3), (4, 8)]


def of_a_split(directory, groups, batch):
    from test_splits import MASKED, by_table, table

    watch = Watch()
    rates = {"learning_rate": 1e-9, "fake_learning_rate": 1e-9, "surrogate_learning_rate": 1e-9}
    config = {"prompts_per_round": groups, **rates}
    trainer = tdm_trainer(
        directory,
        per_device_train_batch_size=batch,
        sample_batch_size=1,
        reward_funcs=by_table(table(g1=MASKED)[:groups], config),
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        callbacks=[watch],
        **config,
    )
    scramble_all(trainer)
    trainer.train()
    return watch.gradients, [log["loss"] for log in trainer.state.log_history[:3]]


@pytest.mark.slow
def test_processes_that_share_a_group_have_the_gradients_of_one(tmp_path):
    run_in_two_processes(__file__, tmp_path)
    for number, (groups, _) in enumerate(SHARED):
        whole, losses = of_a_split(tmp_path, groups, 4 * groups)
        for rank in range(2):
            gradients, their_losses = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            for role, mine, theirs in zip(ROLES, gradients, whole, strict=True):
                assert relative_error(mine, theirs) < 1e-5, role
            assert their_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = [of_a_split(directory, *split) for split in SHARED]
    torch.save(found, directory / f"{os.environ['RANK']}.pt")
