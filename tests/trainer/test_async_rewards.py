"""Rewards in threads: the run is that of rewards in turn, a mistake in one stops it, and the next run is sound."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from pyarrow import parquet
from tiny_trainers import brightness, same, tiny_trainer, weights

from trl_dgpo.trainer import dgpo_trainer


ASYNC = {"async_reward_computation": True, "max_workers": 2, "sample_batch_size": 4, "learning_rate": 1e-2}
SUB_BATCHES = 4


class Reward:
    """Brightness, with a mistake in some of its calls while it is broken."""

    __name__ = "brightness"

    def __init__(self, mistake=None):
        self.mistake = mistake

    def __call__(self, images, prompts, log_metric, log_extra, **kwargs):
        values = brightness(images)
        if self.mistake is not None:
            return self.mistake(values, log_extra)
        log_metric("darkest", sum(min(image.convert("L").tobytes()) for image in images) / len(images))
        log_extra("asked_for", [prompt.upper() for prompt in prompts])
        return [None if prompt == "b" else value for prompt, value in zip(prompts, values, strict=True)]


def too_few(values, log_extra):
    return values[1:]


def no_numbers(values, log_extra):
    return [str(value) for value in values]


def extra_too_long(values, log_extra):
    log_extra("asked_for", ["?"] * 17)
    return values


def lacking_a_package(values, log_extra):
    raise ImportError("No module named 'some_scorer'")


MISTAKES = {
    too_few: (ValueError, "returned 3 values for 4 images"),
    no_numbers: (TypeError, "each value must be a number or None"),
    extra_too_long: (ValueError, "17 values of 'asked_for' for 4 images"),
    lacking_a_package: (ImportError, "some_scorer"),
}


def numbers(log: dict) -> dict:
    """A log without what the clock has a part in."""
    return {name: value for name, value in log.items() if "time" not in name and "per_second" not in name}


def test_the_log_and_the_table_are_the_same(tmp_path):
    for folder, config in (("in turn", {}), ("in threads", {"async_reward_computation": True})):
        config = {**ASYNC, "async_reward_computation": False, **config}
        tiny_trainer(
            tmp_path / folder,
            reward_funcs=[Reward(), lambda images, **kwargs: [0.5] * len(images)],
            max_steps=2,
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=1,
            **config,
        ).train()
    turn, threads = (
        [numbers(json.loads(line)) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        for folder in ("in turn", "in threads")
    )
    assert [list(log) for log in turn] == [list(log) for log in threads]
    assert "darkest" in turn[0]
    for mine, theirs in zip(turn, threads, strict=True):
        # One call's mean over 16 images is the mean of four calls' over 4, but for the last bit.
        assert mine == {name: pytest.approx(value, rel=1e-12) for name, value in theirs.items()}
        assert {**mine, "darkest": 0} == {**theirs, "darkest": 0}
    for step in (0, 1):
        turn, threads = (
            parquet.read_table(tmp_path / folder / "completions" / f"completions-{step:06d}.parquet")
            for folder in ("in turn", "in threads")
        )
        assert turn.equals(threads)
        rows = turn.to_pylist()
        assert len(rows) == 16
        assert [row["asked_for"] for row in rows] == [row["prompt"].upper() for row in rows]
        assert {row["prompt"] for row in rows if row["rewards/brightness"] is None} <= {"b"}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_thread_stops_training_and_the_next_run_is_sound(tmp_path, mistake):
    untouched = tiny_trainer(tmp_path / "untouched", reward_funcs=Reward(), **ASYNC)
    reward = Reward(mistake)
    trainer = tiny_trainer(tmp_path / "stopped", reward_funcs=reward, **ASYNC)
    before, threads = weights(trainer), threading.active_count()
    error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same(weights(trainer), before)
    assert threading.active_count() == threads
    reward.mistake = None
    for each in (trainer, untouched):
        each.train()
    assert trainer.state.global_step == 1
    assert not same(weights(trainer), before)
    assert same(weights(trainer), weights(untouched))
    mine, theirs = (numbers(each.state.log_history[0]) for each in (trainer, untouched))
    assert mine == theirs


class InTurn(ThreadPoolExecutor):
    """Threads that are waited for one by one, so that it is known when each is done."""

    def submit(self, *args, **kwargs):
        job = super().submit(*args, **kwargs)
        wait([job])
        return job


@pytest.mark.parametrize("first_mistake", [1, 2, SUB_BATCHES])
def test_nothing_more_is_sampled_after_a_mistake(tmp_path, monkeypatch, first_mistake):
    monkeypatch.setattr(dgpo_trainer, "ThreadPoolExecutor", InTurn)
    calls, sampled = [], []

    def reward(images, **kwargs):
        calls.append(len(images))
        return brightness(images)[len(calls) >= first_mistake :]

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, **ASYNC)
    sample = trainer.backbone.sample
    trainer.backbone.sample = lambda *args, **kwargs: sampled.append(1) or sample(*args, **kwargs)
    with pytest.raises(ValueError, match="returned 3 values for 4 images"):
        trainer.train()
    assert len(calls) == len(sampled) == first_mistake


def test_the_weights_are_unmerged_after_a_mistake(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=Reward(too_few), merge_adapter=True, **ASYNC)
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    with pytest.raises(ValueError, match="returned 3 values"):
        trainer.train()
    after = trainer.policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "name",
    ["kl", "gate_mean", "objective", "reward", "clip_ratio", "loss", "rewards/brightness/mean", "time/reward"],
)
def test_a_reward_cannot_log_under_the_trainers_names(tmp_path, name, is_async):
    def reward(images, log_metric, **kwargs):
        log_metric("fine", 1.0)
        log_metric(name, 1.0)
        return brightness(images)

    config = {**ASYNC, "async_reward_computation": is_async}
    with pytest.raises(ValueError, match=rf"^A reward logs \['{name}'\]"):
        tiny_trainer(tmp_path, reward_funcs=reward, **config).train()
