"""Guards warn where pictures go bad or held-out prompts get worse: once, in numbers, and not of what is meant."""

import json
import logging

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_dgpo.guards import LEAST, MEMORY, HeldOutGuard, ImageGuard
from trl_dgpo.rollout import ScoredImages


# -- pictures of rounds -----------------------------------------------------------------------------------------------


def pictures(contrast=1.0, seed=0, tint=(1.0, 1.0, 1.0)):
    """Two groups of four pictures, each with bars of its own around grey."""
    stream = torch.Generator().manual_seed(seed)
    bars = torch.randint(2, (8, 1, 8, 8), generator=stream).float().mul(2).sub(1).repeat_interleave(4, 3)
    levels = 127 + contrast * (60 + 40 * torch.rand(8, 1, 1, 1, generator=stream)) * bars
    return (levels * torch.tensor(tint).view(1, 3, 1, 1)).clamp(0, 255).to(torch.uint8)


def scored(round, images, reward=0.5):
    rewards = torch.full((len(images),), reward, dtype=torch.float64)
    rows = [{"prompt": "a"}] * len(images)
    group_index = torch.arange(2).repeat_interleave(len(images) // 2)
    return ScoredImages(round, images, rows, rewards, {}, rewards, group_index, {}, torch.zeros(len(images), 1, 1, 1))


class Rounds:
    """A guard, and the rounds that it sees."""

    def __init__(self, output_dir, state=None, **options):
        self.logged = []
        self.guard = ImageGuard(lambda name, value: self.logged.append((name, value)), **options)
        self.state = state or TrainerState()
        self.args = TrainingArguments(output_dir=str(output_dir), use_cpu=True)
        self.args.num_log_images = 8

    def stops(self):
        control = TrainerControl()
        self.guard.on_step_end(self.args, self.state, control)
        assert control.should_training_stop == control.should_save
        return control.should_training_stop

    def see(self, *rounds, first=0):
        for number, (images, reward) in enumerate(rounds, first):
            self.state.global_step = 2 * number
            self.logged.clear()
            self.guard.on_rollout(self.args, self.state, TrainerControl(), scored=scored(number, images, reward))
        return dict(self.logged)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "trl_dgpo.guards")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_first_round_is_what_all_are_measured_by(tmp_path, warned):
    logs = Rounds(tmp_path).see((pictures(), 0.5))
    assert {f"images/{name}" for name in LEAST} < logs.keys()
    assert {value for name, value in logs.items() if name.startswith("images_vs_base/")} == {0.0}
    assert logs["guard/alarms"] == 0
    assert not warned()


def test_a_shift_is_in_deviations_of_the_bases_pictures(tmp_path):
    def greys(*values):
        return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    # Brightness 0.2 and 0.4: mean 0.3, deviation 0.1; then 0.6, which is 3 of these above.
    logs = Rounds(tmp_path).see((greys(51, 51, 102, 102), 0), (greys(153, 153, 153, 153), 0))
    assert logs["images/brightness"] == pytest.approx(0.6)
    assert logs["images_vs_base/brightness"] == pytest.approx(3, rel=1e-5)
    # Contrast is 0 in all of the base's, where the smallest deviation is that of the table.
    half = greys(0, 0, 0, 0).clone()
    half[..., :4] = 255
    logs = Rounds(tmp_path).see((greys(51, 51, 102, 102), 0), (half, 0))
    assert logs["images_vs_base/contrast"] == pytest.approx(0.5 / LEAST["contrast"])


def test_flat_pictures_are_told_with_their_numbers(tmp_path, warned):
    flat = pictures(contrast=0.2)
    rounds = Rounds(tmp_path)
    rounds.see((pictures(), 0.5), (flat, 0.6))
    assert not warned()
    logs = rounds.see((flat, 0.8), first=2)
    (message,) = warned()
    assert "leave the base model's range while the reward rises" in message
    assert "it was 0.500 in the first round and is 0.800 in round 2, at step 4" in message
    base = rounds.state.stateful_callbacks[MEMORY]
    was, spread = base["means"]["contrast"], base["spreads"]["contrast"]
    assert f"contrast {logs['images/contrast']:.3f}, the base model's {was:.3f} +- {spread:.3f} (flat" in message
    assert logs["guard/alarms"] >= 1
    assert not rounds.stops()
    rounds.see(*[(flat, 0.9)] * 3, first=3)
    assert len(warned()) == 1  # once


def test_rounds_must_be_in_a_row(tmp_path, warned):
    flat, good = (pictures(contrast=0.2), 0.6), (pictures(), 0.6)
    Rounds(tmp_path).see(good, flat, good, flat, good)
    assert not warned()


def test_another_sign_warns_again(tmp_path, warned):
    flat, grey = (pictures(contrast=0.2), 0.6), (torch.full_like(pictures(), 127), 0.7)
    Rounds(tmp_path).see((pictures(), 0.5), flat, flat, flat, grey, grey, grey, grey)
    first, second = warned()
    assert "flat pictures" in first
    assert "near_duplicates" not in first
    assert "near_duplicates 1.000, the base model's 0.000 +- 0.000 (the same picture again" in second
    assert "flat pictures" not in second


def test_noise_is_a_sign_too(tmp_path, warned):
    stream = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (8, 3, 8, 32), generator=stream, dtype=torch.uint8)
    Rounds(tmp_path).see((pictures(), 0.5), *[(noise, 0.6)] * 3)
    (message,) = warned()
    assert "noise or fine patterns" in message


def test_light_and_colour_are_no_signs(tmp_path, warned):
    """A reward for warm colours makes warm pictures, and that is what was asked for."""
    warm = pictures(tint=(1.25, 0.95, 0.55))
    logs = Rounds(tmp_path).see((pictures(), 0.1), *[(warm, 0.5)] * 6)
    assert logs["images_vs_base/saturation"] > 4
    assert not warned()


def test_only_one_way_is_a_sign(tmp_path, warned):
    logs = Rounds(tmp_path).see((pictures(contrast=0.25), 0.1), *[(pictures(contrast=0.5), 0.5)] * 4)
    assert logs["images_vs_base/contrast"] > 3  # and clearer pictures are no worse ones
    assert not warned()


def test_pictures_of_other_prompts_are_no_sign(tmp_path, warned):
    Rounds(tmp_path).see(*[(pictures(seed=seed), 0.5 + seed / 20) for seed in range(8)])
    assert not warned()


@pytest.mark.parametrize(("reward", "stops"), [(0.8, True), (0.4, False)])
def test_it_stops_where_the_reward_has_risen(tmp_path, warned, reward, stops):
    rounds = Rounds(tmp_path, stops=True)
    rounds.see((pictures(), 0.5), *[(pictures(contrast=0.2), reward)] * 3)
    assert rounds.stops() == stops
    (message,) = warned()
    assert ("Training stops after this step, with a checkpoint" in message) == stops
    assert ("while the reward rises" in message) == stops


def test_what_it_remembers_goes_through_a_checkpoint(tmp_path, warned):
    flat = (pictures(contrast=0.2), 0.7)
    rounds = Rounds(tmp_path)
    rounds.see((pictures(), 0.5), flat)
    state = TrainerState(**json.loads(json.dumps({"stateful_callbacks": rounds.state.stateful_callbacks})))
    Rounds(tmp_path, state).see(flat, first=2)
    assert len(warned()) == 1  # the second in a row, of this guard the first
    Rounds(tmp_path).see(flat, first=3)
    assert "knows nothing of the base model's pictures: those of round 3, at step 6, are compared" in warned()[1]


def test_other_processes_decide_alike_and_say_nothing(tmp_path, warned):
    rounds = Rounds(tmp_path, TrainerState(is_world_process_zero=False), stops=True)
    rounds.see((pictures(), 0.5), *[(pictures(contrast=0.2), 0.8)] * 3)
    assert rounds.stops()
    assert not warned()


# -- what is held out -------------------------------------------------------------------------------------------------


def evaluations(*values, metric="eval_reward", rewards=(), stderr=0.0):
    """A log of a training reward at each five steps, and of evaluations after those of the steps 0, 10, 20, ..."""
    history = [{"reward": value, "step": 5 * n + 5} for n, value in enumerate(rewards)]
    history += [{metric: value, f"{metric}_stderr": stderr, "step": 10 * n} for n, value in enumerate(values)]
    return sorted(history, key=lambda entry: entry["step"])


def evaluate(history, guard=None, **args):
    """What the guard decides at each evaluation of a log, as it comes."""
    guard, stops = guard or HeldOutGuard("eval_reward"), []
    arguments = type("Arguments", (), {"load_best_model_at_end": False, **args})
    for number, entry in enumerate(history):
        if guard.metric in entry:
            state = TrainerState(log_history=history[: number + 1], global_step=entry["step"])
            control = TrainerControl()
            guard.on_evaluate(arguments, state, control)
            stops.append(control.should_training_stop)
    return stops


RISING = [0.1 * n for n in range(1, 13)]


def test_a_gamed_reward_is_told_with_the_numbers_of_both(warned):
    evaluate(evaluations(0.5, 0.7, 0.65, 0.6, 0.55, rewards=RISING, stderr=0.02))
    (message,) = warned()
    # Until the best, at step 10, the logs of the steps 5 and 10; since step 30 those of 35 and 40.
    assert "the reward was 0.15 around step 10 and is 0.75; `eval_reward` was 0.7 at step 10" in message
    assert "and is 0.55 at step 40, +- 0.02" in message


def test_worse_than_the_model_before_training_is_told(warned):
    evaluate(evaluations(0.7, 0.6, 0.5, 0.4, rewards=RISING))
    (message,) = warned()
    assert "the reward was 0.15 around step 10 and is 0.55; `eval_reward` was 0.7 at step 0" in message


@pytest.mark.parametrize(
    ("values", "rewards", "stderr"),
    [
        ((0.5, 0.6, 0.7, 0.75), RISING, 0.0),  # both rise
        ((0.7, 0.6, 0.5, 0.4), RISING[::-1], 0.0),  # both fall
        ((0.7, 0.69, 0.68, 0.67), RISING, 0.02),  # within twice the error
        ((0.7, 0.6, 0.5), RISING, 0.0),  # too few
    ],
)
def test_what_is_no_sign_of_gaming(warned, values, rewards, stderr):
    evaluate(evaluations(*values, rewards=rewards, stderr=stderr))
    assert not warned()


def test_smaller_may_be_better(warned):
    guard = HeldOutGuard("eval_fid", greater_is_better=False, patience=2)
    assert evaluate(evaluations(5.0, 4.0, 6.0, 7.0, metric="eval_fid", rewards=RISING), guard) == [False] * 3 + [True]
    assert "`eval_fid` was 4 at step 10 and not better in the 2 evaluations since, the last 7." in warned()[0]


def test_early_stop_counts_from_the_best(warned):
    guard = HeldOutGuard("eval_reward", patience=2)
    values = (0.5, 0.4, 0.6, 0.6, 0.5)  # as good is not better
    assert evaluate(evaluations(*values), guard) == [False, False, False, False, True]
    (message,) = warned()
    assert "Early stop at step 40: `eval_reward` was 0.6 at step 20 and not better in the 2 evaluations" in message
    assert "`load_best_model_at_end` would bring the best one back" in message
    evaluate(evaluations(*values), guard, load_best_model_at_end=True)
    assert "The best checkpoint is loaded." in warned()[1]


def test_where_none_was_better_than_the_start_what_is_loaded_is_told(warned):
    guard = HeldOutGuard("eval_reward", patience=2)
    evaluate(evaluations(0.5, 0.4, 0.3), guard, load_best_model_at_end=True)
    assert "was 0.5 at step 0 and" in warned()[0]
    assert "That is the model before training; loaded is the best checkpoint, of step" in warned()[0]


def test_an_evaluation_without_a_number_does_not_count():
    guard = HeldOutGuard("eval_reward", patience=1)
    history = evaluations(0.5, float("nan"), 0.6)
    assert evaluate(history, guard) == [False] * 3
