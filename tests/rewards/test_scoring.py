import asyncio
import contextvars
import functools
import re
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from trl_dgpo.rewards.scoring import ConstantWatch, FailureWindow, RewardScorer, Scores


NAN, INF = float("nan"), float("inf")
IMAGES = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one", "two", "three", "four"]
COLUMNS = {"text": ["1", "2", "3", "4"]}


def score(funcs, weights=None, images=IMAGES, columns=COLUMNS, **context):
    return RewardScorer(funcs, weights)(images, PROMPTS, columns, **context)


def returns(*values, name="reward"):
    """Reward that looks its values up by prompt, so that it can be called image by image."""

    def reward(prompts, **kwargs):
        return [values[PROMPTS.index(prompt)] for prompt in prompts]

    reward.__name__ = name
    return reward


def same(tensor, *expected):
    return np.array_equal(
        tensor.numpy(), np.array(expected, dtype=tensor.numpy().dtype), equal_nan=tensor.is_floating_point()
    )


# -- what a reward is given


@pytest.mark.parametrize("input_type", [None, "pil", "pt"])
def test_what_a_reward_is_called_with(input_type):
    calls = []

    def reward(prompts, completions, images, text, trainer_state, log_metric, log_extra, **kwargs):
        calls.append((prompts, completions, images, text, trainer_state, kwargs))
        return [0.0] * 4

    if input_type:
        reward.input_type = input_type
    score(reward, trainer_state="state", columns=COLUMNS | {"more": [1, 2, 3, 4]})
    [(prompts, completions, images, text, state, kwargs)] = calls
    assert (prompts, text, state) == (PROMPTS, COLUMNS["text"], "state")
    assert kwargs == {"more": [1, 2, 3, 4]}
    assert completions is images
    if input_type == "pt":
        assert torch.equal(images, IMAGES)
        assert images.dtype == torch.uint8
    else:
        assert all(isinstance(image, Image.Image) and image.size == (6, 5) for image in images)
        assert np.array_equal(np.stack([np.array(image) for image in images]), IMAGES.permute(0, 2, 3, 1).numpy())


def test_rewards_of_both_kinds_see_the_same_pixels():
    def by_pil(images, **kwargs):
        return [np.array(image).mean() for image in images]

    def by_pt(images, **kwargs):
        return images.double().mean((1, 2, 3))

    by_pt.input_type = "pt"
    scores = score([by_pil, by_pt])
    torch.testing.assert_close(scores.by_name["by_pil"], scores.by_name["by_pt"])


# -- what it may return


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, 0.5, True],
        (1.0, 0.0, 0.5, 1.0),
        np.array([1, 0, 0.5, 1], dtype=np.float32),
        torch.tensor([1, 0, 0.5, 1], dtype=torch.bfloat16),
        [np.float32(1), torch.tensor(0), torch.tensor([0.5]), np.int64(1)],
    ],
    ids=["list", "tuple", "numpy", "tensor", "scalars"],
)
def test_forms_of_a_result(values):
    def reward(**kwargs):
        return values

    scores = score(reward)
    assert scores.rewards.dtype == scores.by_name["reward"].dtype == torch.float64
    assert same(scores.rewards, 1, 0, 0.5, 1)
    assert same(scores.failed, False, False, False, False)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0, 2.0, 3.0], "returned 3 values for 4 images"),
        ([1.0] * 5, "returned 5 values for 4 images"),
        ([], "returned 0 values for 4 images"),
        ("1234", "returned str; it must return a list of 4 numbers"),
        (None, "returned NoneType; it must return a list of 4 numbers"),
        (1.0, "returned float; it must return a list of 4 numbers"),
        (torch.tensor(1.0), r"returned Tensor of shape \(\); it must return one number an image, of shape \(4,\)"),
        (b"1234", "returned bytes; it must return a list of 4 numbers"),
        ({0.1, 0.2, 0.3, 0.4}, "returned set; it must return a list of 4 numbers"),
        (dict.fromkeys([0.1, 0.2, 0.3, 0.4]).keys(), "returned dict_keys; it must return a list of 4 numbers"),
        (dict.fromkeys([0.1, 0.2, 0.3, 0.4]), "returned dict; it must return a list of 4 numbers"),
        (map(float, [1, 1, 1, 1]), "returned a map, which gives its values one by one; return a list"),
        ((1.0 for _ in range(4)), "returned a generator, which gives its values one by one; return a list"),
        ([1.0, "0.5", 1.0, 1.0], "returned '0.5' of type str; each value must be a number or None"),
        ([1.0, [0.5], 1.0, 1.0], r"returned \[0.5\] of type list"),
        (torch.zeros(4, 1), r"returned Tensor of shape \(4, 1\); it must return one number an image, of shape \(4,\)"),
        (np.zeros((4, 1)), r"returned ndarray of shape \(4, 1\)"),
        ([torch.zeros(2)] * 4, r"returned tensor\(\[0., 0.\]\) of type Tensor"),
        (np.zeros((4, 2)), r"returned ndarray of shape \(4, 2\)"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_a_wrong_result_is_the_functions_mistake_and_not_retried(output, message, kind):
    calls = []

    def reward(**kwargs):
        calls.append(kwargs)
        return output

    with pytest.raises(kind, match=f"`reward` {message}"):
        score(reward)
    assert len(calls) == 1


def test_a_coroutine_that_nobody_awaits_is_closed_and_told():
    async def answers():
        return [1.0] * 4

    def reward(**kwargs):
        return answers()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="`reward` returned a coroutine; declare it `async def`"):
            score(reward)


def test_an_integer_beyond_any_float_is_an_infinite_number():
    calls = []

    def reward(**kwargs):
        calls.append(1)
        return [1, 10**400, 1, -(10**5000)]

    assert same(score(reward).rewards, 1, NAN, 1, NAN)
    assert len(calls) == 1


def test_a_reward_that_changes_the_tensor_is_told():
    def changes(images, **kwargs):
        images[:, 0] = 0
        return [1.0] * 4

    changes.input_type = "pt"
    with pytest.raises(ValueError, match="`changes` changed the images in place; let it work on a copy"):
        score([typed("pt"), changes, Callable()], images=IMAGES.clone())
    with torch.inference_mode():
        images = IMAGES.clone()  # keeps no account of its changes
    assert same(score(typed("pt"), images=images).rewards, 1, 1, 1, 1)


# -- failures


@pytest.mark.parametrize("bad", [NAN, INF, -INF, torch.tensor(NAN)])
def test_one_failed_value_masks_one_image(bad, caplog):
    scores = score(returns(1.0, bad, 3.0, 4.0))
    assert same(scores.rewards, 1, NAN, 3, 4)
    assert same(scores.by_name["reward"], 1, NAN, 3, 4)
    assert same(scores.failed, False, True, False, False)
    assert "for prompt 'two'; the image is masked" in caplog.text


def test_none_means_not_applicable_and_is_no_failure(caplog):
    scores = score(returns(1.0, None, 3.0, 4.0))
    assert same(scores.rewards, 1, NAN, 3, 4)
    assert not scores.failed.any()
    assert not caplog.records


def test_one_raising_image_costs_one_reward(caplog):
    sizes = []

    def reward(prompts, images, text, **kwargs):
        sizes.append((len(prompts), len(images), len(text)))
        if "three" in prompts:
            raise OSError("broken picture")
        return [float(t) for t in text]

    scorer = RewardScorer(reward)
    scores = scorer(IMAGES, PROMPTS, COLUMNS)
    assert same(scores.rewards, 1, 2, NAN, 4)
    assert same(scores.failed, False, False, True, False)
    assert sizes == [(4, 4, 4)] + [(1, 1, 1)] * 4
    assert "raised OSError('broken picture') for prompt 'three'; the image is masked" in caplog.text
    assert [record.exc_info is not None for record in caplog.records if record.exc_info] == [True]
    scorer(IMAGES, PROMPTS, COLUMNS)  # a traceback the first time alone
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_the_first_traceback_is_logged_also_after_a_nan(caplog):
    outcomes = iter([[NAN, 1.0, 1.0, 1.0]])

    def reward(**kwargs):
        return next(outcomes)

    scorer = RewardScorer(reward)
    scorer(IMAGES, PROMPTS, COLUMNS)
    assert not any(record.exc_info for record in caplog.records)
    assert scorer(IMAGES, PROMPTS, COLUMNS).failed.all()
    assert any(record.exc_info for record in caplog.records)


def test_a_tensor_reward_is_retried_image_by_image():
    def reward(images, **kwargs):
        if len(images) > 1:
            raise MemoryError
        assert images.shape == (1, 3, 5, 6)
        return images.double().mean((1, 2, 3))

    reward.input_type = "pt"
    assert torch.equal(score(reward).rewards, IMAGES.double().mean((1, 2, 3)))


def test_wrong_results_in_a_retry_are_raised():
    def reward(prompts, **kwargs):
        if len(prompts) > 1:
            raise OSError
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="returned 2 values for 1 images"):
        score(reward)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError("no OCR engine")])
def test_what_is_not_the_images_fault_is_raised_at_once(error, timeout):
    calls = []

    def reward(**kwargs):
        calls.append(kwargs)
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ImportError):
        RewardScorer(reward, timeout=timeout)(IMAGES, PROMPTS, {})
    assert len(calls) == 1


# -- several rewards


def test_weighted_sum_of_what_applies():
    scores = score(
        [
            returns(1.0, None, 1.0, None, name="a"),
            returns(2.0, 2.0, NAN, None, name="b"),
        ],
        weights=[10, 0.5],
    )
    assert same(scores.rewards, 11, 1, NAN, NAN)
    assert same(scores.failed, False, False, True, False)
    assert list(scores.by_name) == ["a", "b"]
    assert same(scores.by_name["a"], 1, NAN, 1, NAN)
    assert same(scores.by_name["b"], 2, 2, NAN, NAN)


def test_a_sum_that_no_float_holds_has_failed(caplog):
    rewards = [returns(1e308, 1e308, None, 1, name="a"), returns(1e308, -1e308, 1e308, 1, name="b")]
    for weights, failed in ([1, 1], [True, False, False, False]), ([10, 10], [True, True, True, False]):
        caplog.clear()
        scores = score(rewards, weights)
        assert scores.failed.tolist() == scores.rewards.isnan().tolist() == failed
        assert f"of ['a', 'b'] is no finite number for {sum(failed)} images; they are masked" in caplog.text


def test_weights_are_one_each_by_default():
    assert same(score([returns(1, 2, 3, 4, name="a"), returns(1, 1, 1, 1, name="b")]).rewards, 2, 3, 4, 5)


# -- bad input


class Callable:
    def __call__(self, **kwargs):
        return [1.0] * 4


def no_kwargs(prompts, completions):
    return [1.0] * 4


def by_position(prompts, unused=None, /, **kwargs):
    return [1.0] * 4


def typed(input_type):
    func = returns(1, 1, 1, 1)
    func.input_type = input_type
    return func


def test_names():
    named = functools.partial(returns(1, 1, 1, 1))
    named.__name__ = "named"
    assert RewardScorer([returns(1, 1, 1, 1), Callable(), named]).names == ["reward", "Callable", "named"]
    assert RewardScorer(Callable()).names == ["Callable"]


@pytest.mark.parametrize(
    ("funcs", "weights", "kind", "message"),
    [
        ([], None, ValueError, "`reward_funcs` is empty"),
        (["ocr"], None, TypeError, "has 'ocr', which is not callable"),
        (no_kwargs, None, TypeError, r"`no_kwargs` must take `\*\*kwargs`"),
        (
            [returns(1), returns(2)],
            None,
            ValueError,
            r"two rewards of one name: \['reward', 'reward'\]. Set `__name__`",
        ),
        (returns(1), [1.0, 2.0], ValueError, "`reward_weights` has 2 numbers for 1 rewards"),
        (returns(1), [NAN], ValueError, r"`reward_weights` is \[nan\]; each must be a finite number"),
        (returns(1), [INF], ValueError, r"`reward_weights` is \[inf\]; each must be a finite number"),
        (by_position, None, TypeError, r"`by_position` takes \['prompts'\] by position alone.*leave out the `/`"),
        (typed("np"), None, ValueError, "`input_type` 'np'; it must be 'pil' or 'pt'"),
    ],
)
def test_bad_rewards(funcs, weights, kind, message):
    with pytest.raises(kind, match=message):
        RewardScorer(funcs, weights)


def test_a_column_that_the_data_set_lacks_is_no_failing_image():
    def reward(prompts, answer, hint=None, **kwargs):
        return [1.0] * 4

    with pytest.raises(
        ValueError, match=r"`reward` needs \['answer'\], but the data set's other columns are \['text'\]"
    ):
        score(reward)
    assert same(score(reward, columns={"answer": ["a"] * 4}).rewards, 1, 1, 1, 1)


@pytest.mark.parametrize("name", ["images", "prompts", "completions", "trainer_state"])
def test_a_column_with_a_taken_name(name):
    with pytest.raises(ValueError, match=rf"columns \['{name}'\] have names that rewards are called with"):
        score(returns(1, 1, 1, 1), columns={name: [0] * 4}, trainer_state=None)


# -- when to stop


def flags(failed, total):
    return torch.arange(total) < failed


@pytest.mark.parametrize(
    ("batches", "stops"),
    [
        ([(0, 16)], False),
        ([(1, 2)], False),  # one failure is never enough, unless it is all
        ([(1, 1)], True),
        ([(16, 16)], True),
        ([(2, 20)], False),  # exactly a tenth
        ([(2, 19)], True),
        ([(1, 8), (1, 8)], True),
        ([(0, 100), (10, 50)], False),  # 10 of the last 100
        ([(0, 100), (10, 50), (1, 50)], True),
        ([(10, 100), (0, 100), (10, 100)], False),  # old failures are forgotten
        ([(0, 90), (2, 2)], True),  # all of a batch
        ([(476, 576)], True),  # all of a batch that is larger than the window count, in whichever order
        ([(58, 576)], True),
        ([(57, 576)], False),
        ([(57, 576), (9, 50)], False),  # and the next batch is judged with the 100 last of it
        ([(57, 576), (11, 50)], True),
    ],
)
def test_failure_window(batches, stops):
    window = FailureWindow()
    for failed, total in batches[:-1]:
        window.update(flags(failed, total))
    failed, total = batches[-1]
    if not stops:
        window.update(flags(failed, total))
        return
    with pytest.raises(RuntimeError, match=rf"failed for \d+ of the last \d+ images \({failed} of the last {total}\)"):
        window.update(flags(failed, total))


# -- what rewards log besides


def test_metrics_and_extra_columns_come_with_the_scores():
    def reward(images, log_metric, log_extra, **kwargs):
        log_metric("sharpness", 2)
        log_extra("read", list("abcd"))
        return [0.0] * 4

    scores = score(reward)
    assert scores.metrics == {"sharpness": [2.0]}
    assert scores.extra == {"read": list("abcd")}


def test_a_batch_that_raises_has_logged_nothing():
    def reward(prompts, log_metric, log_extra, **kwargs):
        log_metric("calls", len(prompts))
        log_extra("read", prompts)
        if PROMPTS[2] in prompts:
            raise RuntimeError("broken")
        return [0.0] * len(prompts)

    scores = score(reward)
    assert scores.metrics == {"calls": [1.0] * 3}
    assert scores.extra == {"read": [PROMPTS[0], PROMPTS[1], None, PROMPTS[3]]}


def test_extra_columns_need_one_value_an_image():
    def reward(log_extra, **kwargs):
        log_extra("read", ["a"])
        return [0.0] * 4

    with pytest.raises(ValueError, match="1 values of 'read' for 4 images"):
        score(reward)


def test_scores_of_batches_are_the_scores_of_one():
    def reward(prompts, images, log_metric, log_extra, **kwargs):
        log_metric("first", PROMPTS.index(prompts[0]))
        log_extra("prompt_again", prompts)
        return [None if prompt == PROMPTS[1] else float(PROMPTS.index(prompt)) for prompt in prompts]

    scorer = RewardScorer(reward)
    whole = scorer(IMAGES, PROMPTS, {})
    parts = Scores.cat([scorer(IMAGES[:1], PROMPTS[:1], {}), scorer(IMAGES[1:], PROMPTS[1:], {})])
    assert torch.equal(parts.rewards.nan_to_num(-1), whole.rewards.nan_to_num(-1))
    assert torch.equal(parts.failed, whole.failed)
    assert parts.by_name.keys() == whole.by_name.keys()
    assert parts.extra == whole.extra == {"prompt_again": PROMPTS}
    assert parts.metrics == {"first": [0.0, 1.0]}


# -- asynchronous rewards


def asynchronous(reward):
    """The same reward as an `async def`."""

    @functools.wraps(reward)
    async def call(**kwargs):
        return reward(**kwargs)

    return call


class AsyncCallable:
    async def __call__(self, prompts, scale=1, **kwargs):
        return [scale * float(PROMPTS.index(prompt)) for prompt in prompts]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_asynchronous_reward_is_awaited(timeout):
    rewards = [
        asynchronous(returns(0, 1, 2, 3)),
        AsyncCallable(),
        functools.partial(AsyncCallable(), scale=2),
    ]
    rewards[2].__name__ = "doubled"
    scores = RewardScorer(rewards, timeout=timeout)(IMAGES, PROMPTS, {})
    assert list(scores.by_name) == ["reward", "AsyncCallable", "doubled"]
    assert same(scores.by_name["reward"], 0, 1, 2, 3)
    assert same(scores.rewards, 0, 4, 8, 12)


def test_asynchronous_rewards_run_beside_one_another_and_beside_the_others():
    marks = {name: threading.Event() for name in ("first", "second", "computed")}

    async def until(*names):
        for _ in range(3000):
            if all(marks[name].is_set() for name in names):
                return
            await asyncio.sleep(0.001)
        raise TimeoutError(names)

    async def first(**kwargs):
        marks["first"].set()
        await until("second", "computed")
        return [1.0] * 4

    def computes(**kwargs):
        assert marks["first"].wait(3)
        assert marks["second"].wait(3)
        marks["computed"].set()
        return [1.0] * 4

    async def second(**kwargs):
        marks["second"].set()
        await until("first", "computed")
        return [1.0] * 4

    assert same(score([first, computes, second]).rewards, 3, 3, 3, 3)


def test_asynchronous_rewards_share_one_loop_for_good():
    loops = set()

    async def reward(**kwargs):
        loops.add((asyncio.get_running_loop(), threading.current_thread(), torch.is_grad_enabled()))
        return [1.0] * 4

    for _ in range(2):
        score(reward)
    [(loop, thread, has_gradients)] = loops
    assert not has_gradients
    assert loop.is_running()
    assert thread.daemon


def test_an_asynchronous_batch_that_raises_is_retried_image_by_image_at_once(caplog):
    sizes, waiting = [], []

    async def reward(prompts, log_metric, **kwargs):
        sizes.append(len(prompts))
        log_metric("calls", 1)
        if len(prompts) == 1:
            waiting.append(prompts)
            while len(waiting) < 4:  # all four calls are under way
                await asyncio.sleep(0.001)
        if "three" in prompts:
            raise OSError("broken picture")
        return [1.0] * len(prompts)

    scores = RewardScorer(reward, timeout=10.0)(IMAGES, PROMPTS, {})
    assert same(scores.rewards, 1, 1, NAN, 1)
    assert same(scores.failed, False, False, True, False)
    assert sizes == [4, 1, 1, 1, 1]
    assert scores.metrics == {"calls": [1.0] * 3}
    assert "raised OSError('broken picture') for prompt 'three'; the image is masked" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_an_asynchronous_reward_cannot_end_the_loop(error, caplog):
    async def leaves(prompts, **kwargs):
        if "two" in prompts:
            raise error
        return [1.0] * len(prompts)

    scores = RewardScorer([leaves, AsyncCallable()], timeout=5.0)(IMAGES, PROMPTS, {})
    assert same(scores.rewards, 1, NAN, 3, 4)
    assert f"an asynchronous reward raised {error!r}" in caplog.text
    assert "did not return" not in caplog.text


def test_nor_can_a_task_of_its_own(caplog):
    async def ends():
        raise SystemExit(1)

    async def leaves(prompts, **kwargs):
        if "two" in prompts:
            await asyncio.create_task(ends())
        return [1.0] * len(prompts)

    scores = RewardScorer([leaves, AsyncCallable()], timeout=5.0)(IMAGES, PROMPTS, {})
    assert same(scores.rewards, 1, NAN, 3, 4)
    assert "SystemExit(1) left the event loop of asynchronous rewards, which goes on" in caplog.text
    assert "did not return" not in caplog.text


def test_nor_can_stopping_it():
    async def stops(**kwargs):
        asyncio.get_running_loop().stop()
        return [1.0] * 4

    for _ in range(2):
        assert same(RewardScorer(stops, timeout=5.0)(IMAGES, PROMPTS, {}).rewards, 1, 1, 1, 1)


# -- how a reward is called


@pytest.mark.parametrize("timeout", [None, INF, 60.0])
@pytest.mark.parametrize("input_type", ["pil", "pt"])
def test_without_gradients_outside_autocast_in_the_callers_context(timeout, input_type):
    variable, threads = contextvars.ContextVar("variable"), []

    def reward(images, **kwargs):
        threads.append(threading.current_thread())
        weight = torch.ones(3, 3, requires_grad=True)
        product = weight @ weight
        assert not product.requires_grad
        assert product.dtype == torch.float32
        assert variable.get() == "the caller's"
        return [1.0] * 4

    reward.input_type = input_type
    variable.set("the caller's")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(RewardScorer(reward, timeout=timeout)(IMAGES, PROMPTS, {}).rewards, 1, 1, 1, 1)
    [thread] = threads
    assert (thread is threading.current_thread()) == (timeout in (None, INF))
    assert thread is threading.current_thread() or (thread.daemon and not thread.is_alive())


def test_an_attribute_of_what_a_partial_is_of():
    def reward(images, **kwargs):
        assert isinstance(images, torch.Tensor)
        return [1.0] * 4

    reward.input_type = "pt"
    scorer = RewardScorer([functools.partial(reward, more=1), functools.partial(Callable())])
    assert scorer.names == ["reward", "Callable"]
    assert same(scorer(IMAGES, PROMPTS, {}).rewards, 2, 2, 2, 2)


# -- the time limit


@pytest.fixture
def hang():
    """Hangs until the test ends."""
    end = threading.Event()
    yield end.wait
    end.set()


LIMIT = 0.2


@pytest.mark.parametrize("kind", ["in a thread", "asynchronous", "blocking its loop"])
def test_a_call_that_hangs_has_failed_for_all_its_images(kind, hang, caplog):
    calls, stopped = [], threading.Event()

    def begun(log_metric):
        calls.append(threading.current_thread())
        log_metric("began", 1.0)

    def sync(log_metric, **kwargs):
        begun(log_metric)
        hang()

    async def asynchronously(log_metric, **kwargs):
        begun(log_metric)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.set()
            raise

    async def blocking(log_metric, **kwargs):
        begun(log_metric)
        hang(3)

    stuck = {"in a thread": sync, "asynchronous": asynchronously, "blocking its loop": blocking}[kind]
    stuck.__name__ = "stuck"
    start = time.monotonic()
    scores = RewardScorer([stuck, returns(1, 2, 3, 4)], timeout=LIMIT)(IMAGES, PROMPTS, {})
    assert LIMIT <= time.monotonic() - start < 2
    assert same(scores.failed, True, True, True, True)
    assert same(scores.rewards, NAN, NAN, NAN, NAN)
    assert same(scores.by_name["reward"], 1, 2, 3, 4)
    assert scores.metrics == {}
    [thread] = calls  # not retried
    assert thread.daemon
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert "Reward `stuck` did not return within 0.2 seconds (`reward_timeout`) for a batch of 4" in record.message
    assert kind != "asynchronous" or stopped.wait(3)


def test_what_a_call_left_behind_does_later_is_not_read(caplog):
    goes_on, done = threading.Event(), threading.Event()

    def reward(log_metric, log_extra, **kwargs):
        goes_on.wait(10)
        log_metric("late", 1.0)
        log_extra("late", list("abcd"))
        done.set()
        raise OSError("nobody asked")

    scores = RewardScorer(reward, timeout=0.05)(IMAGES, PROMPTS, {})
    [record] = caplog.records
    goes_on.set()
    assert done.wait(10)
    assert (scores.metrics, scores.extra) == ({}, {})
    assert scores.failed.all()
    assert caplog.records == [record]


@pytest.mark.parametrize(("is_async", "expected"), [(False, [1, 1, NAN, NAN]), (True, [1, 1, NAN, 1])])
def test_an_image_that_hangs_in_a_retry(is_async, expected, hang, caplog):
    calls = []

    def known(prompts):
        calls.append(prompts)
        if len(prompts) > 1:
            raise OSError("broken picture")

    def sync(prompts, **kwargs):
        known(prompts)
        if prompts == ["three"]:
            hang()
        return [1.0]

    async def asynchronously(prompts, **kwargs):
        known(prompts)
        if prompts == ["three"]:
            await asyncio.sleep(60)
        return [1.0]

    start = time.monotonic()
    scores = RewardScorer(asynchronously if is_async else sync, timeout=LIMIT)(IMAGES, PROMPTS, {})
    assert time.monotonic() - start < 2
    assert same(scores.rewards, *expected)
    # No second image waits as long; those that ran already are read.
    assert calls == [PROMPTS, *([prompt] for prompt in (PROMPTS if is_async else PROMPTS[:3]))]
    assert caplog.text.count("did not return within") == 1


def test_the_images_of_a_retry_have_one_limit_together(caplog):
    calls = []

    def reward(prompts, **kwargs):
        calls.append(prompts)
        if len(prompts) > 1:
            raise OSError("broken picture")
        time.sleep(0.15)
        return [1.0]

    scores = RewardScorer(reward, timeout=0.4)(IMAGES, PROMPTS, {})
    assert same(scores.rewards[2:], NAN, NAN)
    assert scores.rewards[0] == 1
    assert len(calls) <= 4
    assert "did not return within 0.4 seconds (`reward_timeout`) for 4 images, one by one" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_is_given_up_for_the_rest_of_a_round(is_async, hang):
    calls = []

    def sync(**kwargs):
        calls.append(1)
        hang()

    async def asynchronously(**kwargs):
        calls.append(1)
        await asyncio.sleep(60)

    scorer = RewardScorer([asynchronously if is_async else sync, returns(1, 2, 3, 4)], timeout=LIMIT)
    given_up = set()
    for _ in range(3):
        scores = scorer(IMAGES, PROMPTS, {}, given_up=given_up)
        assert scores.failed.all()
        assert same(scores.by_name["reward"], 1, 2, 3, 4)
    assert len(calls) == 1
    scorer(IMAGES, PROMPTS, {})  # another round
    assert len(calls) == 2


def test_a_time_out_of_the_rewards_own_is_an_error_like_any(caplog):
    def reward(prompts, **kwargs):
        if "two" in prompts:
            raise TimeoutError("the server is slow")
        return [1.0] * len(prompts)

    for func in (reward, asynchronous(reward)):
        assert same(RewardScorer(func, timeout=60.0)(IMAGES, PROMPTS, {}).rewards, 1, NAN, 1, 1)
    assert "did not return" not in caplog.text


SCRIPT = """
import asyncio, time
import torch
from trl_dgpo.rewards.scoring import RewardScorer

def sleeps(**kwargs):
    time.sleep(60)

async def waits(**kwargs):
    await asyncio.sleep(60)

scores = RewardScorer([sleeps, waits], timeout=0.1)(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"], {})
print(scores.failed.tolist())
"""


def test_an_interpreter_ends_whatever_hangs():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, "[True]\n")
    assert "Exception" not in done.stderr
    assert time.monotonic() - start < 50


# -- in two parts


def test_two_parts_give_what_one_call_gives():
    def pil(images, prompts, log_metric, log_extra, **kwargs):
        log_metric("pil", len(images))
        log_extra("read", prompts)
        return [0.1, None, NAN, None]

    def pt(images, log_metric, **kwargs):
        assert isinstance(images, torch.Tensor)
        log_metric("pt", len(images))
        return [0.2, 0.7, 1.0, None]

    async def awaited(log_extra, **kwargs):
        log_extra("answer", [*range(4)])
        return [1e16, 0.3, 1.0, None]

    def chosen(images, **kwargs):
        return [0.3, None, INF, None]

    pt.input_type = chosen.input_type = "pt"
    chosen.overlaps = True
    weights = [0.1, 0.7, 1.3, -2.0]
    scorer = RewardScorer([pil, pt, awaited, functools.partial(chosen)], weights, timeout=60.0)
    arriving, whole = scorer.split()
    assert (arriving.names, arriving.weights) == (["pil", "awaited", "chosen"], [0.1, 1.3, -2.0])
    assert (whole.names, whole.weights) == (["pt"], [0.7])
    assert arriving.timeout == whole.timeout == 60.0
    at_once = scorer(IMAGES, PROMPTS, {})
    merged = scorer.merge([whole(IMAGES, PROMPTS, {}), arriving(IMAGES, PROMPTS, {})])
    assert same(merged.rewards, *at_once.rewards.tolist())
    assert same(merged.failed, *at_once.failed.tolist())
    assert same(merged.failed, False, False, True, False)
    assert list(merged.by_name) == list(at_once.by_name)
    assert all(same(values, *at_once.by_name[name].tolist()) for name, values in merged.by_name.items())
    assert (merged.metrics, merged.extra) == (at_once.metrics, at_once.extra)
    assert merged.extra == {"read": PROMPTS, "answer": [0, 1, 2, 3]}


def test_a_part_may_be_empty():
    assert RewardScorer(returns(1)).split()[1] is None
    assert RewardScorer(typed("pt")).split()[0] is None


# -- the self-test

ROW = {"prompt": "one", "text": "1"}


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_self_test_is_one_call_with_a_white_image(timeout):
    calls = []

    class Served(Callable):
        def check(self):
            calls.append("check")

        def __call__(self, images, prompts, text, trainer_state, log_metric, log_extra, **kwargs):
            [image] = images
            calls.append((image.size, image.getextrema(), prompts, text, trainer_state, threading.current_thread()))
            log_metric("called", 1)
            log_extra("seen", ["?"])
            return [None]

    RewardScorer(Served(), timeout=timeout).self_test(ROW, 5, 6, trainer_state="state")
    check, (*call, thread) = calls
    assert check == "check"
    assert call == [(6, 5), ((255, 255),) * 3, ["one"], ["1"], "state"]
    assert (thread is threading.current_thread()) == (timeout is None)  # as in training


def test_a_self_test_has_no_time_limit():
    def slow(**kwargs):
        time.sleep(0.1)
        return [1.0]

    RewardScorer([slow, asynchronous(returns(1))], timeout=0.01).self_test(ROW, 4, 4)


@pytest.mark.parametrize("is_async", [False, True])
def test_without_a_row_the_first_call_has_no_time_limit(is_async, hang):
    checked, calls = [], []

    def seconds():
        calls.append(1)
        return 0.1 if len(calls) == 1 else 1.0

    def loads(**kwargs):
        time.sleep(seconds())
        return [1.0] * 4

    async def loads_async(**kwargs):
        await asyncio.sleep(seconds())
        return [1.0] * 4

    reward = loads_async if is_async else loads
    reward.check = lambda: checked.append(1)
    scorer = RewardScorer(reward, timeout=0.02)
    scorer.self_test(None, 4, 4)
    assert (checked, calls) == ([1], [])
    part = next(part for part in scorer.split() if part is not None)
    assert part(IMAGES, PROMPTS, {}).rewards.tolist() == [1.0] * 4
    assert scorer(IMAGES, PROMPTS, {}).failed.all()  # the second has


def test_without_a_row_a_reward_that_cannot_be_called_is_told():
    class Served(Callable):
        def check(self):
            raise ConnectionError("nobody at localhost:8000")

    with pytest.raises(
        RuntimeError, match=r"`Served` raised ConnectionError\('nobody.*`check\(\)`.*`reward_self_test"
    ):
        RewardScorer([Callable(), Served()]).self_test(None, 4, 4)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_broken_reward_fails_its_self_test(is_async):
    def broken(**kwargs):
        raise OSError("no such model")

    with pytest.raises(
        RuntimeError,
        match=r"`broken` raised OSError\('no such model'\) in its self-test: one white image of 6x5 for the first "
        "prompt, 'one'.*`reward_self_test=False`",
    ) as raised:
        RewardScorer(asynchronous(broken) if is_async else broken).self_test(ROW, 5, 6)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_reward_whose_server_is_down_is_not_called():
    class Served(Callable):
        def check(self):
            raise ConnectionError("nobody at localhost:8000")

        def __call__(self, **kwargs):
            raise AssertionError

    with pytest.raises(RuntimeError, match=r"`Served` raised ConnectionError\('nobody at localhost:8000'\)"):
        RewardScorer(Served()).self_test(ROW, 4, 4)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "`reward` returned 2 values for 1 images"),
        (["1"], TypeError, "`reward` returned '1' of type str"),
        (ImportError("pip install it"), ImportError, "^pip install it"),
    ],
)
def test_mistakes_in_a_self_test_are_the_usual_errors(output, error, message):
    def reward(**kwargs):
        if isinstance(output, Exception):
            raise output
        return output

    with pytest.raises(error, match=message):
        RewardScorer(reward).self_test(ROW, 4, 4)


def test_a_column_that_is_missing_in_a_self_test():
    def reward(answer, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match=r"needs \['answer'\]"):
        RewardScorer(reward).self_test(ROW, 4, 4)


@pytest.mark.parametrize(("value", "warns"), [(NAN, True), (INF, True), (None, False), (0.0, False)])
def test_what_a_self_test_warns_of(value, warns, caplog):
    RewardScorer(returns(value)).self_test(ROW, 4, 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert not warns or f"`reward` returned {value} in its self-test" in caplog.text


# -- rewards that say nothing


def warnings_of(caplog, *rounds):
    """After which rounds a watch warns, given what a reward gave in each."""
    watch, warned = ConstantWatch(), []
    for number, values in enumerate(rounds):
        caplog.clear()
        watch.update({"varies": torch.tensor([0.0, 1.0]), "x": torch.tensor(values, dtype=torch.float64)})
        warned += [number] * len(caplog.records)
        assert not caplog.records or f"Reward `x` gave {values[0]} to every image of the last 3 rounds" in caplog.text
    return warned


@pytest.mark.parametrize(
    ("rounds", "warned"),
    [
        ([[0.0, 0.0]] * 2, []),
        ([[0.0, 0.0]] * 3, [2]),
        ([[0.0, 0.0]] * 7, [2]),  # once
        ([[0.0, NAN], [0.0, 0.0], [0.0, 0.0]], [2]),  # of those that are valid
        ([[0.0, 0.0]] * 2 + [[0.0, 1.0]] + [[0.0, 0.0]] * 2, []),
        ([[0.0, 0.0]] * 4 + [[0.0, 1.0]] + [[0.0, 0.0]] * 3, [2, 7]),  # again when it has varied
        ([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], []),  # one and the same number
        ([[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3, [2, 5]),
        ([[0.0, 0.0], [NAN, NAN], [0.0, 0.0]], []),  # a round without it neither counts
        ([[0.0, 0.0], [NAN, NAN], [0.0, 0.0], [0.0, 0.0]], [3]),  # nor ends anything
    ],
)
def test_a_constant_reward_is_told_once(rounds, warned, caplog):
    assert warnings_of(caplog, *rounds) == warned


# -- the table of faults: what one reward's fault costs a batch of four that another reward scores 1 each

ONE, ALL = [1, 1, NAN, 1], [NAN] * 4


def raises_for(*broken):
    def fault(prompts, **kwargs):
        if set(prompts) & set(broken):
            raise OSError("broken")
        return [0.0] * len(prompts)

    return fault


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("fault", "rewards", "level", "message"),
    [
        (raises_for("three"), ONE, "WARNING", r"raised OSError\('broken'\) for prompt 'three'; the image is masked"),
        (raises_for(*PROMPTS), ALL, "WARNING", r"raised OSError\('broken'\) for prompt 'four'; the image is masked"),
        (returns(0, 0, NAN, 0), ONE, "WARNING", "returned nan for prompt 'three'; the image is masked"),
        (returns(0, 0, INF, 0), ONE, "WARNING", "returned inf for prompt 'three'; the image is masked"),
        (returns(0, 0, -INF, 0), ONE, "WARNING", "returned -inf for prompt 'three'; the image is masked"),
        (returns(0, 0, None, 0), [1] * 4, None, None),
        (lambda **kwargs: [0.0] * 3, ValueError, None, "returned 3 values for 4 images"),
        (lambda **kwargs: "0000", TypeError, None, "returned str; it must return a list of 4 numbers"),
        (lambda **kwargs: ["0"] * 4, TypeError, None, "returned '0' of type str"),
        ("hangs", ALL, "ERROR", "did not return within 0.2 seconds .* the images are masked"),
    ],
)
def test_faults(fault, rewards, level, message, is_async, hang, caplog):
    if fault == "hangs":

        async def fault(**kwargs):
            await asyncio.sleep(60)

        fault = fault if is_async else lambda **kwargs: hang()
    elif is_async:
        fault = asynchronous(fault)
    fault.__name__ = "fault"
    scorer = RewardScorer([fault, returns(1, 1, 1, 1)], timeout=LIMIT if message and "0.2" in message else 60.0)
    if isinstance(rewards, type):
        with pytest.raises(rewards, match=f"`fault` {message}"):
            scorer(IMAGES, PROMPTS, {})
        assert not caplog.records
        return
    scores = scorer(IMAGES, PROMPTS, {})
    assert same(scores.rewards, *rewards)
    assert scores.failed.tolist() == [value != 1 for value in rewards]
    assert {record.levelname for record in caplog.records} == ({level} if level else set())
    assert message is None or re.search(f"Reward `fault` {message}", caplog.text)
