"""Runs with guards: they change nothing, they come through an interruption, and what they are to stop stops."""

import json
import logging
from itertools import count
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_trainers import (
    brightness,
    everything,
    prompt_dataset,
    rewards_by_position,
    same,
    scramble,
    tiny_config,
    tiny_trainer,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from trl_dgpo.guards import MEMORY
from trl_dgpo.losses import denoising_error, next_kl_coef
from trl_dgpo.trainer.dgpo_trainer import _KL_COEF


SMALL = {"num_generations": 2, "prompts_per_round": 2, "num_train_timesteps": 1, "sample_num_steps": 2}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_guarded_run_is_the_run_without(tmp_path):
    runs = []
    for name, guards in (
        ("without", {"image_guard": "off", "divergence_rounds": 0}),
        ("with", {"divergence_rounds": 1}),
    ):
        trainer = tiny_trainer(tmp_path / name, **SMALL, max_steps=3, learning_rate=1e-2, **guards)
        scramble(trainer)
        trainer.train()
        runs.append((everything(trainer), torch.get_rng_state(), logged(trainer, "loss")))
        assert len(logged(trainer, "divergence")) == (2 if name == "with" else 0)
        assert len(logged(trainer, "images/contrast")) == (3 if name == "with" else 0)
    (without, without_rng, without_loss), (guarded, guarded_rng, guarded_loss) = runs
    assert same(without, guarded)
    assert torch.equal(without_rng, guarded_rng)
    assert without_loss == guarded_loss


# -- the distance to the base -----------------------------------------------------------------------------------------


def divergences(tmp_path, scale, **config):
    small = {**SMALL, "prompts_per_round": 3, "sample_num_steps": 4, "max_steps": 2, "learning_rate": 0.0}
    trainer = tiny_trainer(tmp_path, divergence_rounds=1, **small, **config)
    scramble(trainer, scale=scale)
    trainer.train()
    return trainer, logged(trainer, "divergence")


def test_the_base_is_at_no_distance_from_itself(tmp_path):
    assert divergences(tmp_path, 0.0)[1] == [0.0]


def test_the_distance_is_what_it_is_called(tmp_path):
    trainer, (divergence,) = divergences(tmp_path, 0.3)
    rollout, backbone, distances = trainer.buffer.record, trainer.backbone, []
    grid = backbone.sigmas(trainer.args.sample_num_steps).tolist()  # four steps: all of them
    for number, level in enumerate(grid):
        for group in range(3):
            noise = trainer._draw(("divergence", number), [(group,)])
            x_t = backbone.noise(rollout.x0[2 * group][None], noise, level)
            conditioning = {name: rows[group][None] for name, rows in rollout.conditioning.items()}
            predictions = []
            for view in ("base", None):
                with torch.no_grad(), trainer.policy.using(view):
                    predictions.append(backbone.predict(x_t, level, conditioning))
            distances.append(denoising_error(*predictions).item())
    assert divergence == pytest.approx(sum(distances) / 12, rel=1e-5)
    assert divergence > 1e-3


def test_the_distance_knows_no_sub_batches(tmp_path):
    _, (whole,) = divergences(tmp_path / "whole", 0.3, sample_batch_size=6)
    _, (parts,) = divergences(tmp_path / "parts", 0.3, sample_batch_size=1, per_device_train_batch_size=2)
    assert parts == pytest.approx(whole, rel=1e-4)


# -- a KL to hold -----------------------------------------------------------------------------------------------------


KL = {**SMALL, "max_steps": 4, "kl_coef": 0.1, "kl_target": 0.01, "kl_target_rate": 2.0, "learning_rate": 1e-2}


def test_the_weight_follows_the_logged_kl(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path, **KL, **saving)
    scramble(trainer)
    trainer.train()
    used, expected = logged(trainer, "kl_coef"), [0.1]
    for kl in logged(trainer, "kl"):
        expected.append(next_kl_coef(expected[-1], kl, target=0.01, rate=2.0))
    assert used == pytest.approx(expected[:-1], rel=1e-5)
    assert used[1] == pytest.approx(0.14)  # a scrambled policy is far from its base
    assert trainer.kl_coef == pytest.approx(expected[-1], rel=1e-5)

    # Interrupted in between, and the same again.
    other = tiny_trainer(tmp_path / "other", **KL, **saving)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(other, "kl_coef") == used
    assert other.kl_coef == trainer.kl_coef
    assert same(everything(other), everything(trainer))
    assert other.state.stateful_callbacks[MEMORY] == trainer.state.stateful_callbacks[MEMORY]

    # A run that begins anew begins with its own weight.
    other.args.max_steps = 1
    other.train()
    assert logged(other, "kl_coef") == [0.1]


def test_the_weight_weighs(tmp_path):
    ends = []
    for name, fields in (("fixed", {"kl_target": None}), ("held", {})):
        trainer = tiny_trainer(tmp_path / name, **{**KL, "max_steps": 2, **fields})
        scramble(trainer)
        trainer.train()
        ends.append(everything(trainer))
    assert not same(*ends)  # by the second step, the first whose weight has moved


def test_without_a_target_nothing_moves(tmp_path):
    trainer = tiny_trainer(tmp_path, **{**KL, "max_steps": 2, "kl_target": None})
    trainer.train()
    assert trainer.kl_coef == 0.1
    assert not logged(trainer, "kl_coef")
    trainer.state.stateful_callbacks[_KL_COEF] = 0.5  # of an earlier part of the run, which had one
    assert trainer.kl_coef == 0.1


@pytest.mark.parametrize(("target", "factor"), [(1e9, 1e-3), (1e-30, 1e3)])
def test_the_weight_stays_within_reach(tmp_path, target, factor):
    trainer = tiny_trainer(tmp_path, **{**KL, "kl_target": target, "max_steps": 1})
    trainer.train()
    for _ in range(100):  # a long time on one side
        trainer._step_kls.append(torch.tensor(1.0))
        trainer.end_update()
    assert trainer.kl_coef == pytest.approx(0.1 * factor)


# -- pictures ---------------------------------------------------------------------------------------------------------


class Ruin(TrainerCallback):
    """Takes the contrast out of all pictures from a step on."""

    def __init__(self, step):
        self.step, self.backbone = step, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            decode = self.backbone.decode
            self.backbone.decode = lambda latents: (110 + decode(latents).float() / 10).to(torch.uint8)


def guarded_ruin(tmp_path, resume=None, **config):
    ruin, rewards = Ruin(2), count()
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=lambda images, **kwargs: [float(next(rewards)) for _ in images],
        callbacks=[ruin],
        **{**SMALL, "max_steps": 6, "learning_rate": 0.0, **config},
    )
    ruin.backbone = trainer.backbone
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_ruined_policy_is_stopped_and_kept(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trl_dgpo.guards")
    trainer = guarded_ruin(tmp_path, image_guard="stop")
    # Ruined for the rounds 2 and 3, the last of which is at step 3 and trained on before the end.
    assert logged(trainer, "guard/alarms")[:3] == [0, 0, 0]
    assert logged(trainer, "guard/alarms")[3] >= 1
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4").is_dir()
    assert "Training stops after this step" in caplog.text
    # It can be gone on from: what was told once stops no more.
    again = guarded_ruin(tmp_path / "again", str(tmp_path / "checkpoint-4"), image_guard="stop")
    assert again.state.global_step == 6


def test_a_warning_alone_stops_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trl_dgpo.guards")
    trainer = guarded_ruin(tmp_path, max_steps=5)
    assert trainer.state.global_step == 5
    assert caplog.text.count("leave the base model's range while the reward rises") == 1
    (line,) = [
        line for line in map(json.loads, (tmp_path / "log.jsonl").open()) if line["step"] == 4 and "loss" in line
    ]
    assert line["guard/alarms"] >= 1
    assert abs(line["images_vs_base/contrast"]) + abs(line["images_vs_base/edges"]) > 2


def test_saved_pictures_are_not_measured(tmp_path):
    rows = [
        {
            "prompt": "ab"[group],
            "image": Image.new("RGB", (32, 32), (60 * i, 9, 9)),
            "reward": float(i),
            "group": group,
        }
        for group in range(2)
        for i in range(4)
    ]
    trainer = tiny_trainer(tmp_path, reward_funcs=None, train_dataset=Dataset.from_list(rows), prompts_per_round=2)
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("images/")]


def test_the_guards_names_are_not_a_rewards(tmp_path):
    def reward(images, log_metric, **kwargs):
        log_metric("images/contrast", 1.0)
        return brightness(images)

    with pytest.raises(ValueError, match=r"A reward logs \['images/contrast'\]"):
        tiny_trainer(tmp_path, reward_funcs=reward).train()


# -- early stop -------------------------------------------------------------------------------------------------------


def held_out(tmp_path, values, resume=None, **config):
    """A run whose evaluations give these rewards, that before training among them."""
    values = iter(values)
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=rewards_by_position(*range(4)),
        eval_dataset=prompt_dataset("x"),
        eval_reward_funcs=lambda images, **kwargs: [next(values)],
        **{
            **SMALL,
            "max_steps": 6,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-2,
            **config,
        },
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_training_stops_after_the_best_and_brings_it_back(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trl_dgpo.guards")
    trainer = held_out(
        tmp_path, [0.1, 0.5, 0.9, 0.4, 0.3, 0.2], early_stopping_patience=2, load_best_model_at_end=True
    )
    assert trainer.state.global_step == 4
    assert "Early stop at step 4: `eval_reward` was 0.9 at step 2 and not better in the 2 evaluations" in caplog.text
    best = tiny_trainer(tmp_path / "best")
    best.policy.load(tmp_path / "checkpoint-2")
    for view in (None, "ema"):
        assert all(
            torch.equal(tensor, best.policy.tensors(view)[name])
            for name, tensor in trainer.policy.tensors(view).items()
        )


def test_the_count_comes_through_an_interruption(tmp_path):
    held_out(tmp_path, [0.1, 0.9, 0.4], max_steps=2)
    trainer = held_out(tmp_path / "on", [0.3, 0.2, 0.2], str(tmp_path / "checkpoint-2"), early_stopping_patience=2)
    assert trainer.state.global_step == 3


def test_transformers_own_early_stop_works_too(tmp_path):
    values = iter([0.1, 0.5, 0.9, 0.4, 0.3, 0.2])
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=prompt_dataset("x"),
        eval_reward_funcs=lambda images, **kwargs: [next(values)],
        callbacks=[EarlyStoppingCallback(2)],
        **SMALL,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"


def test_the_metric_can_be_another_of_the_evaluations(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trl_dgpo.guards")
    trainer = held_out(
        tmp_path,
        [0.1, 0.2, 0.3, 0.4],  # by which it would not stop
        max_steps=3,
        learning_rate=0.0,  # so that the pictures stay as they are
        early_stopping_patience=1,
        metric_for_best_model="images/contrast",
        greater_is_better=False,
        save_strategy="no",
    )
    assert trainer.state.global_step == 1
    assert "Early stop at step 1: `eval_images/contrast` was" in caplog.text
    trainer = held_out(tmp_path / "too", [0.5] * 5, max_steps=2, early_stopping_patience=1, save_strategy="no")
    assert trainer.state.global_step == 1  # as good is not better


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"kl_target": 0.0, "kl_coef": 0.1},
            "`kl_target` is 0.0; it is a mean squared difference and must be above 0",
        ),
        ({"kl_target": float("nan"), "kl_coef": 0.1}, "`kl_target` is nan"),
        ({"kl_target": 0.1}, "`kl_target` is 0.1 and `kl_coef` is 0, where its weight would start and stay"),
        ({"kl_target_rate": 0.0}, "`kl_target_rate` is 0.0; it must be above 0 and below 5"),
        ({"kl_target_rate": 5.0}, "`kl_target_rate` is 5.0"),
        ({"divergence_rounds": -1}, "`divergence_rounds` is -1; it must be 0"),
        ({"early_stopping_patience": 0, "eval_strategy": "steps", "eval_steps": 1}, "`early_stopping_patience` is 0"),
        ({"early_stopping_patience": 2}, "`early_stopping_patience` is 2 evaluations, and `eval_strategy` is 'no'"),
        ({"image_guard": "shout"}, "`image_guard` is 'shout'; it must be one of 'warn', 'stop', 'off'"),
    ],
)
def test_nonsense_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **config)
