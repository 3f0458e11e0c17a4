import functools

import numpy as np
import pytest
import torch
from PIL import Image

from trl_dgpo.rewards.scoring import FailureWindow, RewardScorer, Scores


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
        (torch.tensor(1.0), "returned float; it must return a list of 4 numbers"),
        ([1.0, "0.5", 1.0, 1.0], "returned '0.5' of type str; each value must be a number or None"),
        ([1.0, [0.5], 1.0, 1.0], r"returned \[0.5\] of type list"),
        (torch.zeros(4, 1), r"returned \[0.0\] of type list"),
        ([torch.zeros(2)] * 4, r"returned tensor\(\[0., 0.\]\) of type Tensor"),
        (np.zeros((4, 2)), r"returned array\(\[0., 0.\]\) of type ndarray"),
        ({"one": 1, "two": 2, "three": 3, "four": 4}, "returned 'one' of type str"),
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError("no OCR engine")])
def test_what_is_not_the_images_fault_is_raised_at_once(error):
    calls = []

    def reward(**kwargs):
        calls.append(kwargs)
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ImportError):
        score(reward)
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


def test_weights_are_one_each_by_default():
    assert same(score([returns(1, 2, 3, 4, name="a"), returns(1, 1, 1, 1, name="b")]).rewards, 2, 3, 4, 5)


# -- bad input


class Callable:
    def __call__(self, **kwargs):
        return [1.0] * 4


def no_kwargs(prompts, completions):
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
