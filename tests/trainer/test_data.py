"""Where prompts come from: data sets, streams and functions, and that all of them give the same run."""

import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_random_pipeline
from tiny_trainers import brightness, everything, prompt_dataset, same, tiny_config, tiny_trainer, weights
from transformers import TrainerCallback

from trl_dgpo import DGPOTrainer


PROMPTS = ["a", "b", "c", "d", "e"]


def trained(trainer):
    trainer.train()
    return everything(trainer)


def with_prompt_function(output_dir, prompt_function, **config):
    def reward(images, prompts, metadata):
        return images.mean((1, 2, 3)), {}

    return DGPOTrainer(
        tiny_config(output_dir, **config),
        reward,
        prompt_function,
        tiny_random_pipeline(),
    )


def mean(images, **kwargs):
    """The DDPO form's reward above in TRL's form, to the bit."""
    return (images.float() / 255).mean((1, 2, 3))


mean.input_type = "pt"


def test_data_set_stream_and_function_give_the_same_run(tmp_path):
    config = {"max_steps": 4, "num_iterations": 2, "prompts_per_round": 4, "learning_rate": 1e-2}
    of_rows = tiny_trainer(tmp_path / "rows", train_dataset=prompt_dataset(*PROMPTS), reward_funcs=mean, **config)
    order = [PROMPTS[i] for round in range(3) for i in of_rows.sampler.deal(round)]
    stream = Dataset.from_dict({"prompt": order}).to_iterable_dataset()
    of_stream = tiny_trainer(tmp_path / "stream", train_dataset=stream, reward_funcs=mean, **config)
    draws = iter(order)
    of_function = with_prompt_function(tmp_path / "function", lambda: (next(draws), {}), **config)
    expected = trained(of_rows)
    assert same(trained(of_stream), expected)
    assert same(trained(of_function), expected)
    assert not same(trained(tiny_trainer(tmp_path / "other", reward_funcs=mean, **config)), expected)


def counting():
    numbers = itertools.count()
    return lambda: (PROMPTS[next(numbers) % 5], {})


def drawing():
    return lambda: (PROMPTS[(random.randrange(5) + np.random.randint(5) + int(torch.randint(5, ()))) % 5], {})


def both():
    numbers = itertools.count()
    return lambda: (PROMPTS[(next(numbers) + random.randrange(5)) % 5], {})


@pytest.mark.parametrize(
    ("step", "make"),
    [
        (2, both),
        (3, both),
        *(pytest.param(step, make, marks=pytest.mark.slow) for step in (2, 3) for make in (counting, drawing)),
    ],
)
def test_a_prompt_function_goes_on_where_it_stood(tmp_path, make, step):
    config = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    whole = with_prompt_function(tmp_path, make(), **config)
    expected = trained(whole)
    resumed = with_prompt_function(tmp_path / "resumed", make(), **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(everything(resumed), expected)


@pytest.mark.parametrize("step", [2, 3])
def test_a_stream_goes_on_where_it_stood(tmp_path, step):
    stream = (
        Dataset.from_dict({"prompt": PROMPTS * 3}).to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4)
    )
    config = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    whole = tiny_trainer(tmp_path, train_dataset=stream, **config)
    expected = trained(whole)
    resumed = tiny_trainer(tmp_path / "resumed", train_dataset=stream, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(everything(resumed), expected)


def test_that_comparison_finds_a_stream_that_begins_again(tmp_path, monkeypatch):
    stream = Dataset.from_dict({"prompt": PROMPTS * 3}).to_iterable_dataset()
    config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    expected = trained(tiny_trainer(tmp_path, train_dataset=stream, **config))
    resumed = tiny_trainer(tmp_path / "resumed", train_dataset=stream, **config)
    monkeypatch.setattr(resumed.sampler, "seek", lambda round: None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not same(everything(resumed), expected)


def test_streams_can_be_evaluated(tmp_path):
    rows = prompt_dataset("x", "y")
    metrics = [
        tiny_trainer(tmp_path, eval_dataset=dataset).evaluate() for dataset in (rows, rows.to_iterable_dataset())
    ]
    assert metrics[0]["eval_num_images"] == metrics[1]["eval_num_images"] == 2
    assert metrics[0]["eval_reward"] == metrics[1]["eval_reward"]


def test_the_first_prompt_of_a_function_is_not_spent_on_checks(tmp_path):
    drawn = []

    def prompt_function():
        drawn.append(None)
        return "a", {"number": len(drawn)}

    trainer = with_prompt_function(tmp_path, prompt_function, num_log_images=2)
    assert not drawn
    trainer.train()
    assert len(drawn) == trainer.args.prompts_per_round


def test_columns_reach_a_reward_from_a_stream(tmp_path):
    seen = []

    def reward(images, text, **kwargs):
        seen.extend(text)
        return brightness(images)

    stream = Dataset.from_dict({"prompt": PROMPTS[:4], "text": list("ABCD")}).to_iterable_dataset()
    tiny_trainer(tmp_path, train_dataset=stream, reward_funcs=reward).train()
    assert seen == [letter for letter in "ABCD" for _ in range(4)]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset().take(0), ValueError, "empty"),
        (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), ValueError, "need a column `prompt`"),
        (iter([{"prompt": "a"}]), TypeError, "begun anew"),
        ((row for row in [{"prompt": "a"}]), TypeError, "begun anew"),
    ],
)
def test_streams_that_do_not_fit_are_told_before_training(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        tiny_trainer(tmp_path, train_dataset=dataset)


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"`max_steps` is -1, and `train_dataset` is a stream"):
        tiny_trainer(tmp_path, train_dataset=prompt_dataset("a").to_iterable_dataset(), max_steps=-1)


class Look(TrainerCallback):
    def __init__(self):
        self.shown = []

    def on_rollout(self, args, state, control, scored, **kwargs):
        self.shown.append(scored)


def test_rewards_in_threads_give_the_same_run(tmp_path):
    def reward(images, prompts, log_metric, log_extra, **kwargs):
        log_metric("images", len(images))
        log_extra("prompt_again", prompts)
        return brightness(images)

    runs = []
    for is_async in (False, True):
        look = Look()
        trainer = tiny_trainer(
            tmp_path,
            reward_funcs=reward,
            async_reward_computation=is_async,
            max_workers=3,
            sample_batch_size=3,
            max_steps=2,
            learning_rate=1e-2,
            callbacks=[look],
        )
        trainer.train()
        runs.append((weights(trainer), look.shown, trainer.state.log_history[0]["images"]))
    (one, shown, images), (other, shown_async, images_async) = runs
    assert same(one, other)
    assert (images, images_async) == (16, pytest.approx(16 / 6))  # calls of 3, and one of 1
    for mine, theirs in zip(shown, shown_async, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert mine.extra == theirs.extra == {"prompt_again": [row["prompt"] for row in mine.rows]}


def test_a_reward_that_raises_in_a_thread_is_told(tmp_path):
    def reward(images, **kwargs):
        return [0.0]

    with pytest.raises(ValueError, match="returned 1 values for 4 images"):
        tiny_trainer(tmp_path, reward_funcs=reward, async_reward_computation=True).train()
