"""Diffusion-DPO: which pairs it learns from, on any split, and that no other image costs a forward."""

import io
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_trainers import (
    Gradient,
    brightness,
    everything,
    relative_error,
    rewards_by_position,
    run_in_two_processes,
    same,
    scramble,
    tiny_trainer,
    weights,
)

from trl_dgpo import DGPOTrainer, DiffusionDPOConfig, DiffusionDPOTrainer
from trl_dgpo.rollout import Preferences
from trl_dgpo.seeding import generator


NAN = float("nan")
# Four groups of four: two that learn, one of them with a failure, one without a preference, one with ties.
REWARDS = (0.1, 0.9, 0.4, 0.2, 1.0, 0.0, NAN, 0.3, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0)
# (better, worse) of each group, worked by hand
PAIRS = {
    "max": [[(1, 0)], [(0, 1)], [], [(3, 0)]],
    "min": [[(3, 0)], [(3, 1)], [], [(3, 0)]],
    "all": [
        [(1, 0), (1, 2), (1, 3), (2, 0), (2, 3), (3, 0)],
        [(0, 1), (0, 3), (3, 1)],
        [],
        [(3, 0), (3, 1), (3, 2)],
    ],
}
ACTIVE = {"beta": 200.0, "max_grad_norm": 0.0}


# -- the gradient -----------------------------------------------------------------------------------------------------


def by_hand(trainer) -> dict:
    """Gradient and metrics of the first optimiser step from the definition, pair by pair."""
    args, policy, record = trainer.args, trainer.policy, trainer.buffer.record
    transformer = trainer.backbone.denoiser
    total, scores = torch.zeros(()), []
    for level, sigma in enumerate(trainer._draw_levels(0, 0)):
        for group, pairs in enumerate(PAIRS[args.pair_selection]):
            x0 = record.x0[record.group_index == group]
            noise = torch.randn(x0.shape[1:], generator=generator(args.seed, "noise", 0, 0, level, group))
            inputs = {
                "hidden_states": (1 - sigma) * x0 + sigma * noise,
                "timestep": torch.full((len(x0),), 1000 * sigma),
                **{name: row[group].expand(len(x0), *row[group].shape) for name, row in record.conditioning.items()},
            }
            errors = (transformer(**inputs, return_dict=False)[0] - (noise - x0)).square().mean((1, 2, 3))
            with torch.no_grad(), policy.using("old" if args.reference == "old" else "base"):
                reference_velocity = transformer(**inputs, return_dict=False)[0]
            reference_errors = (reference_velocity - (noise - x0)).square().mean((1, 2, 3))
            for w, l in pairs:  # noqa: E741
                excess = errors - reference_errors
                score = args.beta / 2 * (excess[w] - excess[l])
                scores.append(score.item())
                # log(1 + exp(s)) and, for the surrogate, half its slope
                value = (1 + score.exp()).log()
                if args.loss_type == "surrogate":
                    value = score.detach().sigmoid() / 2 * (errors[w] - errors[l])
                total = total + value / len(pairs)
    total = total / (4 * args.num_train_timesteps)
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(total, list(parameters.values()))
    return {"loss": total.item(), "gradient": dict(zip(parameters, gradient, strict=True)), "scores": scores}


def first_step(tmp_path, *, fault=None, trainer_class=DiffusionDPOTrainer, **config):
    hand = {}
    also = (lambda: hand.update(by_hand(trainer))) if trainer_class is DiffusionDPOTrainer else None
    gradient = Gradient(also)
    config = {"reward_funcs": rewards_by_position(*REWARDS), **ACTIVE, **config}
    trainer = tiny_trainer(tmp_path, trainer_class, callbacks=[gradient], **config)
    scramble(trainer)
    if "old" in trainer.policy.views:
        scramble(trainer, "old", seed=1)
    if fault is not None:
        fault(trainer)
    trainer.train()
    return trainer, gradient.value, hand


@pytest.mark.parametrize(
    ("batch_size", "selection", "loss_type", "reference"),
    [
        (4, "max", "surrogate", "frozen"),
        (1, "max", "surrogate", "frozen"),
        (2, "max", "logsigmoid", "frozen"),
        (8, "min", "surrogate", "frozen"),
        (4, "all", "logsigmoid", "frozen"),
        (16, "all", "surrogate", "old"),
        (1, "all", "logsigmoid", "frozen"),
    ],
)
def test_gradient_is_the_definitions_whatever_the_micro_batches(tmp_path, batch_size, selection, loss_type, reference):
    config = {"pair_selection": selection, "loss_type": loss_type, "reference": reference}
    trainer, gradient, hand = first_step(tmp_path, per_device_train_batch_size=batch_size, **config)
    assert relative_error(gradient, hand["gradient"]) < 1e-5
    log, scores = trainer.state.log_history[0], torch.tensor(hand["scores"], dtype=torch.float64)
    assert scores.sigmoid().std() > 0.1  # gates differ
    assert log["loss"] == pytest.approx(hand["loss"], abs=1e-5)
    assert log["objective"] == pytest.approx(torch.nn.functional.softplus(scores).mean().item(), rel=1e-4)
    assert log["gate_mean"] == pytest.approx(scores.sigmoid().mean().item(), rel=1e-4)
    assert log["rewards/accuracies"] == pytest.approx((scores < 0).double().mean().item())
    assert log["rewards/margins"] == pytest.approx(-scores.mean().item(), rel=1e-3)


def no_excess_of_others(trainer):
    whole = trainer._whole_scores
    trainer._whole_scores = lambda *args: (torch.zeros_like(whole(*args)[0]), None)


def better_images_only(trainer):
    moves = trainer._moves
    trainer._moves = lambda rollout: moves(rollout) & (rollout.advantages > 0)


@pytest.mark.parametrize("fault", [no_excess_of_others, better_images_only])
def test_that_comparison_finds_planted_faults(tmp_path, fault):
    _, gradient, hand = first_step(tmp_path, per_device_train_batch_size=2, fault=fault)
    assert relative_error(gradient, hand["gradient"]) > 1e-2


def test_the_kl_term_weighs_alike_with_either_loss(tmp_path):
    _, small, _ = first_step(tmp_path, kl_coef=0.1)
    _, large, _ = first_step(tmp_path, kl_coef=0.1, loss_type="logsigmoid")
    assert relative_error(large, {name: ACTIVE["beta"] * slope for name, slope in small.items()}) < 1e-5


@pytest.mark.parametrize("loss_type", ["surrogate", "logsigmoid"])
def test_groups_of_two_are_dgpos(tmp_path, loss_type):
    # Rewards 1 and 0 have advantages 1 and -1, but for DGPO's epsilon; a tie is no pair, nor is a failed image's.
    rewards = rewards_by_position(1.0, 0.0, 0.0, 1.0, 0.5, 0.5, NAN, 1.0)
    config = {"num_generations": 2, "reward_funcs": rewards, "loss_type": loss_type, "t_min": 0.0}
    _, gradient, _ = first_step(tmp_path, trainer_class=_WithoutEpsilon, **config)
    pairs = tiny_trainer(tmp_path, DiffusionDPOTrainer, callbacks=[kept := Gradient()], **{**ACTIVE, **config})
    scramble(pairs)
    pairs.train()
    assert relative_error(kept.value, gradient) < 1e-5
    log = pairs.state.log_history[0]
    assert (log["num_pairs"], log["pair_margin"]) == (2, 1.0)


class _WithoutEpsilon(DGPOTrainer):
    def _advantages(self, rewards, group_index):
        return {name: values.sign() for name, values in super()._advantages(rewards, group_index).items()}


def test_a_failed_sample_acts_as_if_it_had_not_been_drawn(tmp_path):
    """Its latent may be anything, and its group's pairs are those of the others: `by_hand` never sees it."""

    def spoil(trainer):
        fill = trainer.buffer.fill

        def fill_spoilt(record, round):
            record.x0[record.rewards.isnan()] = 1e3
            fill(record, round)

        trainer.buffer.fill = fill_spoilt

    trainer, gradient, hand = first_step(tmp_path, fault=spoil, pair_selection="all", kl_coef=1e-9)
    assert trainer.buffer.record.x0.max() == 1e3
    assert relative_error(gradient, hand["gradient"]) < 1e-5


def test_a_round_without_pairs_takes_its_step_and_teaches_nothing(tmp_path):
    flat = rewards_by_position(*[0.25] * 16)
    trainer = tiny_trainer(tmp_path, DiffusionDPOTrainer, reward_funcs=flat, weight_decay=0.0)
    scramble(trainer)
    before = weights(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["grad_norm"], log["num_pairs"], log["loss"]) == (0, 0, 0)
    assert not {"objective", "rewards/accuracies", "pair_margin"} & log.keys()
    assert same(weights(trainer), before)


# -- several processes ------------------------------------------------------------------------------------------------

# Groups, images of a micro-batch, selection. Of 3 groups, two processes have a half of the second each.
SHARED = [(3, 6, "all"), (3, 3, "max"), (4, 8, "max")]


def of_a_split(directory, groups, batch, selection):
    from test_splits import active_trainer

    gradient = Gradient()
    config = {"method": "DiffusionDPO", "pair_selection": selection, "beta": 200.0, "loss_type": "logsigmoid"}
    trainer = active_trainer(directory, groups, batch, callbacks=[gradient], **config)
    trainer.train()
    log = trainer.state.log_history[0]
    names = ("loss", "objective", "gate_mean", "rewards/accuracies", "rewards/margins", "num_pairs", "pair_margin")
    return gradient.value, {name: log[name] for name in names}


@pytest.mark.slow
def test_processes_that_share_a_group_have_the_gradient_of_one(tmp_path):
    run_in_two_processes(__file__, tmp_path)
    for number, (groups, _, selection) in enumerate(SHARED):
        whole, whole_log = of_a_split(tmp_path, groups, 4 * groups, selection)
        for rank in range(2):
            gradient, log = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            assert relative_error(gradient, whole) < 1e-5
            assert log == pytest.approx(whole_log, rel=1e-4, abs=1e-6)


# -- how often the transformer is called ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "batch_size", "learned"),
    [
        ("max", 4, [2, 2, 1, 2]),  # one row of a group without a pair stays for the backward's sake, weighing nothing
        ("max", 16, [6]),
        ("min", 8, [4, 2]),
        ("all", 16, [4 + 3 + 4]),
    ],
)
def test_only_images_in_a_pair_cost_forwards(tmp_path, selection, batch_size, learned):
    trainer = tiny_trainer(
        tmp_path,
        DiffusionDPOTrainer,
        reward_funcs=rewards_by_position(*REWARDS),
        per_device_train_batch_size=batch_size,
        pair_selection=selection,
        sample_batch_size=16,
    )
    forwards = []
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: forwards.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    steps, levels = trainer.args.sample_num_steps, trainer.args.num_train_timesteps
    assert forwards[:steps] == [(16, False)] * steps
    assert [rows for rows, graph in forwards if graph] == learned * levels
    in_pairs = sum(len({image for pair in pairs for image in pair}) for pairs in PAIRS[selection])
    assert [rows for rows, graph in forwards[steps:] if not graph] == [in_pairs] * levels


# -- rounds and checkpoints -------------------------------------------------------------------------------------------

LONG = {"num_iterations": 2, "updates_per_round": 2, "max_steps": 5, "learning_rate": 1e-2, "beta": 200.0}


def test_killed_and_resumed_is_never_killed(tmp_path):
    def trainer_in(directory, **config):
        config = {**LONG, "reference": "refreshed", "pair_selection": "all", "reward_funcs": brightness, **config}
        return tiny_trainer(tmp_path / directory, DiffusionDPOTrainer, **config)

    whole = trainer_in("whole", save_strategy="steps", save_steps=1)
    whole.train()
    for step in (1, 4):  # within a round, and at its end
        again = trainer_in(f"again-{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(everything(again), everything(whole))
    record = torch.load(tmp_path / "whole" / "checkpoint-1" / "rollout_0_of_1.pt", weights_only=True)["record"]
    assert Preferences.from_state_dict(record).preferences.shape == (16, 4)


def test_a_refreshed_reference_starts_each_round_at_one_half(tmp_path):
    config = {**LONG, "updates_per_round": 1, "max_steps": 3}
    trainer = tiny_trainer(tmp_path, DiffusionDPOTrainer, reference="refreshed", **config)
    trainer.train()
    gates = [log["gate_mean"] for log in trainer.state.log_history if "gate_mean" in log]
    assert [gate == 0.5 for gate in gates] == [True, False, True]


def test_what_is_logged_of_a_round(tmp_path):
    rewards = rewards_by_position(*REWARDS)
    margins = {"max": (0.8, 1.0, 1.0), "min": (0.1, 0.3, 1.0), "all": (2.6 / 6, 2.0 / 3, 1.0)}
    for selection, expected in margins.items():
        trainer = tiny_trainer(tmp_path, DiffusionDPOTrainer, reward_funcs=rewards, pair_selection=selection)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["num_pairs"] == sum(map(len, PAIRS[selection]))
        assert log["pair_margin"] == pytest.approx(sum(expected) / 3)  # of groups with pairs
        assert log["objective"] == pytest.approx(math.log(2), abs=1e-6)
        assert log["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
        assert log["frac_reward_zero_std"] == 0.25


def test_it_learns_what_is_preferred(tmp_path):
    # Pairs stay those of the first round, as of a data set: the policy comes to prefer their better images.
    config = {"max_steps": 8, "num_iterations": 8, "learning_rate": 1e-2, "beta": 200.0}
    trainer = tiny_trainer(tmp_path, DiffusionDPOTrainer, **config)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective" in log]
    assert logs[0]["objective"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[-1]["objective"] < 0.5
    assert logs[-1]["rewards/accuracies"] > 0.9
    assert logs[-1]["rewards/margins"] > 0.5


def test_pairs_of_a_data_set(tmp_path):
    """Pick-a-Pic's columns: a choice, the other choice, a tie, and the fourth pair out of the first's pictures."""

    def picture(shade):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade, 255 - shade, 60)).save(buffer, "png")
        return buffer.getvalue()

    columns = {
        "caption": ["a", "b", "c", "d"],
        "jpg_0": [picture(shade) for shade in (10, 40, 70, 10)],
        "jpg_1": [picture(shade) for shade in (200, 170, 140, 200)],
        "label_0": [1.0, 0.0, 0.5, 0.0],
        "label_1": [0.0, 1.0, 0.5, 1.0],
    }
    trainer = tiny_trainer(
        tmp_path,
        DiffusionDPOTrainer,
        reward_funcs=None,
        train_dataset=Dataset.from_dict(columns),
        num_generations=2,
        shuffle_dataset=False,
        per_device_train_batch_size=8,
    )
    forwards = []
    trainer.backbone.denoiser.proj_out.register_forward_pre_hook(
        lambda module, inputs: forwards.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    assert [rows for rows, graph in forwards if graph] == [6] * trainer.args.num_train_timesteps
    assert trainer.buffer.record.preferences.tolist() == [
        *[[0, 1], [-1, 0]],
        *[[0, -1], [1, 0]],
        *[[0, 0], [0, 0]],
        *[[0, -1], [1, 0]],
    ]
    log = trainer.state.log_history[0]
    assert (log["num_pairs"], log["pair_margin"]) == (3, 1.0)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_defaults(tmp_path):
    args = DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.pair_selection, args.beta, args.loss_type, args.reference) == ("max", 2000.0, "surrogate", "frozen")
    assert (args.kl_coef, args.clip_range, args.t_min, args.old_policy_after) == (0.0, None, 0.0, None)
    assert args.learning_rate == 3e-4
    assert DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, full_finetuning=True).learning_rate == 2.048e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pair_selection": "best"}, "`pair_selection` is 'best'; it must be one of 'max', 'min', 'all'"),
        ({"scale_rewards": False}, "`scale_rewards` is 'none'; in `DiffusionDPOConfig` it must be 'group': rewards"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, **config)


def test_nothing_is_off_by_zero_or_none(tmp_path):
    args = DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, clip_range=0, advantage_clip=0)
    assert args.clip_range is args.advantage_clip is None


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = [of_a_split(directory, *split) for split in SHARED]
    torch.save(found, directory / f"{os.environ['RANK']}.pt")
