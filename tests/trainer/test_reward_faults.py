"""
What a fault of a reward costs a run.

| fault | what happens |
|---|---|
| raises for an image, returns NaN or an infinite number | that image is masked, counted and logged; the run goes on |
| the same for more than a tenth of the images | the run stops, on every process in the same step |
| hangs | the images of that call are masked and the reward is given up for the round: as above |
| returns a short list, a string, a list of strings | the run stops at once, on every process |
| raises, or any of these, in its self-test | there is no run: the model is not even loaded |
| gives one number to every image | a warning after three rounds |

The mistakes in a result are in `test_async_rewards.py` too, several processes in `test_two_processes.py`, and what a
masked image does not change in `test_dgpo_trainer.py`.
"""

import asyncio
import itertools
import math
import re
import threading
import time

import pytest
import torch
from tiny_models import tiny_random_pipeline
from tiny_trainers import (
    brightness,
    everything,
    prompt_dataset,
    rewards_by_position,
    same,
    tiny_config,
    tiny_trainer,
    weights,
)

from trl_dgpo import DGPOTrainer
from trl_dgpo.advantages import group_advantages, normalize_then_sum, zero_variance
from trl_dgpo.trainer import base_trainer


IN_THREADS = {"async_reward_computation": True, "sample_batch_size": 4}
QUICK = {"sample_num_steps": 1, "num_train_timesteps": 1}
LIMIT = 0.2


@pytest.fixture
def hang():
    """Hangs until the test ends."""
    end = threading.Event()
    yield end.wait
    end.set()


def asynchronous(reward):
    async def call(**kwargs):
        return reward(**kwargs)

    return call


def bad_for_one(fault):
    """Brightness, but for the third image that it ever sees."""
    bad = []

    def reward(images, **kwargs):
        if not bad:
            bad.append(images[2].tobytes())
        values = brightness(images)
        for i, image in enumerate(images):
            if image.tobytes() == bad[0]:
                if isinstance(fault, Exception):
                    raise fault
                values[i] = fault
        return values

    return reward


# -- a fault in a run


def test_most_of_a_large_round_failing_stops_the_run(tmp_path):
    fails = [math.nan] * 30 + [0.5] * 98
    trainer = tiny_trainer(tmp_path, reward_funcs=rewards_by_position(*fails), num_generations=32, **QUICK)
    with pytest.raises(RuntimeError, match=r"failed for 30 of the last 128 images \(30 of the last 128\)"):
        trainer.train()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError("broken"), r"raised OSError\('broken'\) for prompt '.'; the image is masked"),
        (math.nan, "returned nan for prompt '.'; the image is masked"),
        (math.inf, "returned inf for prompt '.'; the image is masked"),
    ],
)
def test_one_image_is_masked_and_the_run_goes_on(tmp_path, caplog, fault, message, is_async):
    reward = bad_for_one(fault)
    trainer = tiny_trainer(tmp_path, reward_funcs=asynchronous(reward) if is_async else reward, **QUICK)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["rewards_failed"] == 1
    record = trainer.buffer.record
    assert record.rewards.isnan().nonzero().flatten().tolist() == [2]
    assert record.advantages[2] == 0
    assert record.group_sizes.tolist() == [3, 4, 4, 4]
    assert len(re.findall(message, caplog.text)) == 1


@pytest.mark.parametrize(
    ("kind", "is_async", "config"),
    [
        ("raises", False, {}),
        ("raises", True, IN_THREADS),
        ("NaN", False, {}),
        ("hangs", False, {}),
        ("hangs", True, {}),
        ("hangs", False, IN_THREADS),
        ("hangs", True, IN_THREADS),
    ],
)
def test_a_reward_that_fails_for_all_stops_the_run(tmp_path, caplog, hang, kind, is_async, config):
    calls, goes_wrong = [], True

    def reward(images, **kwargs):
        calls.append(len(images))
        if goes_wrong and kind == "raises":
            raise OSError("broken")
        if goes_wrong and kind == "hangs":
            hang()
        return [math.nan] * len(images) if goes_wrong else brightness(images)

    async def waits(images, **kwargs):
        if goes_wrong and kind == "hangs":
            calls.append(len(images))
            await asyncio.sleep(60)
        return reward(images)

    trainer = tiny_trainer(
        tmp_path, reward_funcs=waits if is_async else reward, reward_timeout=LIMIT, max_workers=1, **config
    )
    before = weights(trainer)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"failed for 16 of the last 16 images \(16 of the last 16\).*The log above"
    ):
        trainer.train()
    assert time.monotonic() - start < 5
    assert trainer.state.global_step == 0
    assert same(weights(trainer), before)
    expected = {
        "raises": r"raised OSError\('broken'\) for prompt",
        "NaN": "returned nan for prompt",
        "hangs": r"ERROR.*did not return within 0.2 seconds \(`reward_timeout`\) for a batch of",
    }
    assert re.search(expected[kind], caplog.text)
    if kind == "hangs":  # not image by image, and not for the next sub-batch again
        assert calls == [4 if config else 16]
    if kind == "hangs" and config:
        goes_wrong = False
        trainer.train()  # and the next run is sound
        assert trainer.state.global_step == 1


def test_a_hang_in_the_middle_of_a_run_stops_it_there(tmp_path, hang):
    calls = []

    def reward(images, **kwargs):
        calls.append(len(images))
        if len(calls) == 6:  # the second sub-batch of the second round
            hang()
        return brightness(images)

    trainer = tiny_trainer(
        tmp_path, reward_funcs=reward, reward_timeout=LIMIT, max_steps=3, max_workers=1, **IN_THREADS
    )
    with pytest.raises(RuntimeError, match=r"failed for 12 of the last 32 images \(12 of the last 16\)"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert len(calls) == 6


def test_a_hang_in_an_evaluation_is_told(tmp_path, hang, caplog):
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=prompt_dataset("x", "y"),
        eval_reward_funcs=lambda **kwargs: hang(),
        reward_timeout=LIMIT,
    )
    with pytest.raises(RuntimeError, match="No evaluation image has a reward: 2 of 2 failed"):
        trainer.evaluate()
    assert "did not return within 0.2 seconds" in caplog.text


def test_failures_in_an_evaluation_are_counted(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=prompt_dataset("x", "y", "z"),
        eval_reward_funcs=[lambda **kwargs: [0.5, math.nan, 0.7], brightness],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_failed"] == 1
    assert metrics["eval_rewards/<lambda>/mean"] == pytest.approx(0.6)


@pytest.mark.parametrize("output", [[0.5] * 15, "0" * 16, ["0"] * 16])
def test_an_asynchronous_result_of_another_kind_stops_the_run_at_once(tmp_path, output):
    calls = []

    def reward(**kwargs):
        calls.append(1)
        return output

    trainer = tiny_trainer(tmp_path, reward_funcs=asynchronous(reward), **QUICK)
    with pytest.raises((ValueError, TypeError), match=r"15 values for 16 images|returned str|of type str"):
        trainer.train()
    assert len(calls) == 1
    assert trainer.state.global_step == 0


# -- the self-test


@pytest.mark.parametrize("broken", ["reward_funcs", "eval_reward_funcs"])
def test_a_broken_reward_is_found_before_the_model_is_loaded(tmp_path, monkeypatch, broken):
    def not_reached(*args, **kwargs):
        raise AssertionError("the model is loaded")

    def bad(**kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(base_trainer, "load_backbone", not_reached)
    with pytest.raises(RuntimeError, match=r"`bad` raised OSError\('no such file'\).*`reward_self_test=False`"):
        tiny_trainer(
            tmp_path,
            model="tiny",
            eval_dataset=prompt_dataset("x"),
            reward_self_test=True,
            **{"eval_reward_funcs": brightness, broken: bad},
        )


def look(calls, name):
    def reward(images, prompts, log_metric, trainer_state, **kwargs):
        calls.append((name, images[0].size, images[0].getextrema()[0], prompts, trainer_state.global_step))
        log_metric(name, 1.0)
        return brightness(images)

    reward.__name__ = name
    return reward


def test_each_reward_is_called_once_with_the_first_row_of_its_own_data(tmp_path):
    def built(eval_reward_funcs, **config):
        calls.clear()
        return tiny_trainer(
            tmp_path,
            reward_funcs=[look(calls, "one"), look(calls, "two")],
            train_dataset=prompt_dataset("a", "b"),
            eval_dataset={"first": prompt_dataset("x", "y"), "second": prompt_dataset("z")},
            eval_reward_funcs=eval_reward_funcs,
            width=48,
            **config,
        )

    calls = []
    trainer = built(look(calls, "three"), reward_self_test=True)
    white = ((48, 32), (255, 255))
    assert calls == [("one", *white, ["a"], 0), ("two", *white, ["a"], 0), ("three", *white, ["x"], 0)]
    assert not trainer._metrics
    assert not (tmp_path / "log.jsonl").exists()
    built(None, reward_self_test=True)
    assert [call[0] for call in calls] == ["one", "two"]
    built(look(calls, "three"), reward_self_test=False)
    assert not calls


def test_a_prompt_function_is_not_drawn_from(tmp_path):
    drawn, scored = [], []

    def prompts():
        drawn.append(1)
        return "a", {}

    def reward(images, prompts, metadata):
        scored.append(len(images))
        return torch.zeros(len(images)), {}

    config = tiny_config(tmp_path, reward_self_test=True)
    DGPOTrainer(config, reward, prompts, tiny_random_pipeline())
    assert (drawn, scored) == ([], [])


def test_with_a_prompt_function_rewards_are_asked_and_the_first_call_may_load(tmp_path):
    calls = []

    class Served:
        def check(self):
            calls.append("check")

        def __call__(self, images, **kwargs):
            calls.append(len(images))
            time.sleep(2 * LIMIT if len(calls) == 2 else 0)
            return brightness(images)

    config = tiny_config(tmp_path, reward_self_test=True, reward_timeout=LIMIT, max_steps=2, **QUICK)
    trainer = DGPOTrainer(
        config, prompt_function=lambda: ("a", {}), reward_funcs=Served(), sd_pipeline=tiny_random_pipeline()
    )
    assert calls == ["check"]
    trainer.train()
    assert calls == ["check", 16, 16]
    assert [log["rewards_failed"] for log in trainer.state.log_history[:2]] == [0, 0]


class Draws:
    """A reward that draws random numbers, and says how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, log_metric, **kwargs):
        self.calls += 1
        log_metric("drawn", torch.rand(1).item())
        return [value + 0.01 * torch.rand(1).item() for value in brightness(images)]


def numbers(trainer):
    return [
        {name: value for name, value in log.items() if "time" not in name and "per_second" not in name}
        for log in trainer.state.log_history
    ]


def test_the_self_test_changes_nothing_of_a_run(tmp_path):
    config = {"eval_dataset": prompt_dataset("x", "y"), "learning_rate": 1e-2, **QUICK}
    runs = []
    for is_tested in (False, True):
        reward = Draws()
        trainer = tiny_trainer(tmp_path / str(is_tested), reward_funcs=reward, reward_self_test=is_tested, **config)
        assert reward.calls == int(is_tested)
        trainer.train()
        runs.append((everything(trainer), numbers(trainer)))
    (one, log), (other, other_log) = runs
    assert same(one, other)
    assert log == other_log


def test_a_run_resumed_with_a_self_test_is_the_one_that_was_not_killed(tmp_path):
    config = {
        "max_steps": 3,
        "num_iterations": 2,
        "reward_self_test": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        **QUICK,
    }
    whole = tiny_trainer(tmp_path, reward_funcs=Draws(), **config)
    whole.train()
    again = tiny_trainer(tmp_path / "again", reward_funcs=Draws(), **config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # within the first of two rounds
    assert same(everything(again), everything(whole))
    assert numbers(again)[:3] == numbers(whole)[:3]


# -- rewards that say nothing


def test_a_constant_reward_is_told_after_three_rounds(tmp_path, caplog):
    rounds = itertools.count(1)

    def flat(images, **kwargs):
        return [0.0] * len(images)

    def late(images, **kwargs):
        return [0.5] * len(images) if next(rounds) > 2 else brightness(images)

    trainer = tiny_trainer(tmp_path, reward_funcs=[flat, late, brightness], max_steps=4, **QUICK)
    trainer.train()
    warned = [record.message for record in caplog.records if "every image" in record.message]
    assert len(warned) == 1
    assert warned[0].startswith("Reward `flat` gave 0.0 to every image of the last 3 rounds")
    trainer.train()
    assert sum("every image" in record.message for record in caplog.records) == 3  # both, in a run of their own


# -- several rewards


def test_each_reward_is_normalised_first_where_that_is_asked_for(tmp_path):
    wide = [float(100 * i % 170) for i in range(16)]
    narrow = [None if i % 5 == 0 else math.nan if i == 7 else i % 3 / 10 for i in range(16)]
    wide[8:12], narrow[8:12] = [0.0, 2.0, 0.0, 2.0], [1.0, 0.0, 1.0, 0.0]  # one whose sums are equal
    wide[12:], narrow[12:] = [1.0] * 4, [0.5] * 4  # one without any preference
    rewards = [rewards_by_position(*wide), rewards_by_position(*narrow)]
    rewards[0].__name__, rewards[1].__name__ = "wide", "narrow"
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=rewards,
        reward_weights=[1.0, 2.0],
        **QUICK,
        multi_objective_aggregation="normalize_then_sum",
    )
    trainer.train()
    raw = torch.tensor([wide, [math.nan if value is None else value for value in narrow]], dtype=torch.float64)
    index, valid = torch.arange(4).repeat_interleave(4), torch.arange(16) != 7
    expected = normalize_then_sum(raw, [1.0, 2.0], index, valid)
    record, log = trainer.buffer.record, trainer.state.log_history[0]
    torch.testing.assert_close(record.advantages.double(), group_advantages(expected, index), rtol=0, atol=1e-6)
    total = (raw[0] + 2 * raw[1].nan_to_num(0)).where(valid, math.nan)
    assert log["reward"] == pytest.approx(total.nanmean().item())
    torch.testing.assert_close(record.rewards.double(), total, rtol=0, atol=1e-4, equal_nan=True)
    assert log["frac_reward_zero_std"] == zero_variance(expected, index).double().mean().item() == 0.25
    assert log["rewards_failed"] == 1
    summed = tiny_trainer(tmp_path, reward_funcs=rewards, reward_weights=[1.0, 2.0], **QUICK)
    summed.train()
    assert torch.equal(summed.buffer.record.advantages, group_advantages(total, index).float())
    assert not torch.allclose(summed.buffer.record.advantages, record.advantages, atol=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reward_timeout": 0}, "`reward_timeout` is 0; it is a number of seconds and must be above 0, `inf` for"),
        ({"reward_timeout": math.nan}, "`reward_timeout` is nan"),
        (
            {"multi_objective_aggregation": "mean"},
            "`multi_objective_aggregation` is 'mean'; it must be one of 'sum_th",
        ),
    ],
)
def test_settings_that_mean_nothing(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **config)


# -- what is scored while images are sampled, and what is not


def test_models_score_a_round_at_once_and_the_rest_as_images_arrive(tmp_path):
    runs, calls = [], []

    def of_pictures(images, prompts, log_extra, **kwargs):
        calls.append(("pil", len(images)))
        log_extra("asked_for", prompts)
        return brightness(images)

    def of_tensors(images, log_metric, **kwargs):
        calls.append(("pt", len(images)))
        log_metric("brightest", images.max().item())
        return [None if value > 0.55 else value for value in images.double().mean((1, 2, 3)).tolist()]

    async def awaited(images, **kwargs):
        calls.append(("async", len(images)))
        return [image.getpixel((0, 0))[0] for image in images]

    of_tensors.input_type = "pt"
    for config in ({"sample_batch_size": 4}, IN_THREADS):
        calls.clear()
        trainer = tiny_trainer(
            tmp_path,
            reward_funcs=[of_tensors, of_pictures, awaited],
            reward_weights=[1.0, 0.3, 0.7],
            max_steps=2,
            learning_rate=1e-2,
            **QUICK,
            **config,
        )
        trainer.train()
        runs.append((everything(trainer), numbers(trainer)))
        at_once = [("pil", 16), ("pt", 16), ("async", 16)] * 2
        arriving = [("pil", 4), ("async", 4)] * 8 + [("pt", 16)] * 2
        assert sorted(calls) == sorted(arriving if config is IN_THREADS else at_once)
    (one, log), (other, other_log) = runs
    assert same(one, other)
    assert log == other_log


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_waits_costs_no_time_of_the_sampling(tmp_path, is_async):
    sampled, begun = [threading.Event() for _ in range(4)], itertools.count()

    def reward(images, **kwargs):
        number = next(begun)
        assert sampled[min(number + 1, 3)].wait(10)  # the next images are there, and these are still waited for
        return brightness(images)

    async def waits(images, **kwargs):
        number = next(begun)
        while not sampled[min(number + 1, 3)].is_set():
            await asyncio.sleep(0.001)
        return brightness(images)

    trainer = tiny_trainer(
        tmp_path, reward_funcs=waits if is_async else reward, reward_timeout=20.0, max_workers=1, **IN_THREADS
    )
    sample, numbered = trainer.backbone.sample, itertools.count()

    def marked(*args, **kwargs):
        clean = sample(*args, **kwargs)
        sampled[next(numbered)].set()
        return clean

    trainer.backbone.sample = marked
    trainer.train()
    assert trainer.state.log_history[0]["rewards_failed"] == 0
