import warnings

import pytest
import torch

from trl_dgpo.advantages import group_advantages, zero_variance


NAN = float("nan")
ONE = torch.zeros(4, dtype=torch.long)
TWO = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, *expected):
    torch.testing.assert_close(actual, f64(*expected), rtol=0, atol=1e-9)


def group_sums(values, group_index):
    return values.new_zeros(int(group_index.max()) + 1).index_add(0, group_index, values)


@pytest.mark.parametrize(
    ("rewards", "epsilon", "expected"),
    [
        # mean .4375, population deviation .369754986444 (the sample's would be .426956)
        ([1, 0, 0.5, 0.25], 0.0000, [1.521277658511, -1.183215956620, 0.169030850946, -0.507092552837]),
        ([1, 0, 0.5, 0.25], 0.0001, [1.520866341180, -1.182896043140, 0.168985149020, -0.506955447060]),
        ([1, 1, 1, 0.00000], 0.0001, [0.577216966641, +0.577216966641, 0.577216966641, -1.731650899924]),
    ],
)
def test_advantages_of_a_group(rewards, epsilon, expected):
    advantages = group_advantages(f64(*rewards), ONE, epsilon=epsilon)
    close(advantages, *expected)
    assert advantages.sum().abs() < 1e-12
    if epsilon == 0:
        assert advantages.square().sum().item() == pytest.approx(4, abs=1e-12)


def test_sides_weigh_the_same():
    advantages = group_advantages(f64(1, 0, 0.5, 0.25), ONE)
    assert advantages[advantages > 0].sum().item() == pytest.approx(1.689851490200, abs=1e-9)
    assert advantages[advantages <= 0].abs().sum().item() == pytest.approx(1.689851490200, abs=1e-9)


@pytest.mark.parametrize("scale", ["group", True])
def test_group_scale_is_the_default(scale):
    rewards = f64(1, 0, 0.5, 0.25, 0.8, 0.8, 0.6, 0.6)
    assert torch.equal(group_advantages(rewards, TWO, scale=scale), group_advantages(rewards, TWO))
    close(group_advantages(rewards, TWO, epsilon=0)[4:], 1, 1, -1, -1)


def test_batch_scale():
    # mean of each group, deviation .300974978196 of all eight rewards
    advantages = group_advantages(f64(1, 0, 0.5, 0.25, 0.8, 0.8, 0.6, 0.6), TWO, scale="batch")
    close(advantages[:4], 1.868305374863, -1.453126402671, 0.207589486096, -0.622768458288)
    close(advantages[4:], 0.332143177753, 0.332143177753, -0.332143177753, -0.332143177753)
    close(group_sums(advantages, TWO), 0, 0)


@pytest.mark.parametrize("scale", ["none", False])
def test_no_scale(scale):
    advantages = group_advantages(f64(1, 0, 0.5, 0.25, 8, 8, 6, 6), TWO, scale=scale)
    close(advantages, 0.5625, -0.4375, 0.0625, -0.1875, 1, 1, -1, -1)


def test_sign_scale_counts_wins_minus_losses():
    rewards = f64(9, 0.1, 0.5, 0.5, NAN, 3, 2, 1)
    advantages = group_advantages(rewards, TWO, scale="sign", clip=None)
    assert advantages.tolist() == [3, -3, 0, 0, 0, 2, 0, -2]
    assert group_sums(advantages, TWO).tolist() == [0, 0]


def test_unknown_scale():
    with pytest.raises(ValueError, match="`scale` is 'prompt'; it must be 'group', 'batch', 'none', 'sign'"):
        group_advantages(f64(1, 0), ONE[:2], scale="prompt")


def test_one_winner_in_a_hundred():
    rewards, group_index = torch.eye(100, dtype=torch.float64)[0], torch.zeros(100, dtype=torch.long)
    free = group_advantages(rewards, group_index, clip=None)
    assert free[0].item() == pytest.approx(9.939884411353, abs=1e-9)
    clipped = group_advantages(rewards, group_index)
    assert clipped[0] == 5
    assert clipped.sum().item() == pytest.approx(-4.939884411353, abs=1e-9)
    recentred = group_advantages(rewards, group_index, recenter_clipped=True)
    assert recentred.sum().abs() < 1e-12
    torch.testing.assert_close(recentred, clipped - clipped.mean(), rtol=0, atol=1e-12)
    low = group_advantages(-rewards, group_index)
    assert low[0] == -5


@pytest.mark.parametrize(("size", "acts"), [(26, False), (27, True)])  # the largest advantage is sqrt(G - 1)
def test_the_clip_acts_from_groups_of_27_on(size, acts):
    rewards, group_index = torch.eye(size, dtype=torch.float64)[0], torch.zeros(size, dtype=torch.long)
    exact = group_advantages(rewards, group_index, epsilon=0, clip=None)
    assert exact[0].item() == pytest.approx((size - 1) ** 0.5, abs=1e-9)
    assert torch.allclose(group_advantages(rewards, group_index, epsilon=0), exact) is not acts


@pytest.mark.parametrize("scale", ["group", "batch", "none", "sign"])
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(scale, value, dtype):
    # Groups of 7 leave rounding in the mean of such values.
    rewards = torch.cat([torch.full((7,), value), torch.tensor([1.0, 0.0])]).to(dtype)
    group_index = torch.tensor([0] * 7 + [1] * 2)
    advantages = group_advantages(rewards, group_index, scale=scale)
    assert advantages.dtype == dtype
    assert (advantages[:7] == 0).all()
    assert advantages[7] > 0 > advantages[8]
    assert zero_variance(rewards, group_index).tolist() == [True, False]


@pytest.mark.parametrize("scale", ["group", "batch", "none", "sign"])
@pytest.mark.parametrize("recenter", [False, True])
def test_a_failed_reward_was_never_drawn(scale, recenter):
    options = {"scale": scale, "clip": 1.0, "recenter_clipped": recenter}
    rewards = f64(1, NAN, 0.5, 0.25, 0.8, 0.8, NAN, 0.6)
    valid = ~rewards.isnan()
    advantages = group_advantages(rewards, TWO, **options)
    assert advantages[~valid].tolist() == [0, 0]
    torch.testing.assert_close(
        advantages[valid], group_advantages(rewards[valid], TWO[valid], **options), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none", "sign"])
def test_groups_without_two_valid_rewards(scale):
    group_index = torch.tensor([0, 0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rewards in (f64(NAN, NAN, NAN, NAN), f64(NAN, NAN, NAN, 0.3)):
            assert group_advantages(rewards, group_index, scale=scale).tolist() == [0] * 4
            assert zero_variance(rewards, group_index).tolist() == [True, True]


def test_an_infinite_reward_is_not_passed_over():
    assert group_advantages(f64(1, float("inf"), 0.5, 0.25), ONE).isnan().any()


def test_two_groups_of_one_prompt_stay_two():
    rewards = f64(1, 0, 0.9, 0.8)
    apart = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), epsilon=0)
    close(apart, 1, -1, 1, -1)
    assert group_advantages(rewards, ONE, epsilon=0)[3] > 0  # as one group, .8 would be above the mean


@pytest.mark.parametrize("scale", ["group", "batch", "none", "sign"])
def test_order_of_samples_is_free(scale):
    rewards = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group_index = torch.arange(3).repeat_interleave(4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = group_advantages(rewards[order], group_index[order], scale=scale)
    torch.testing.assert_close(
        shuffled, group_advantages(rewards, group_index, scale=scale)[order], rtol=0, atol=1e-12
    )


def test_units_of_the_reward_are_free():
    rewards = f64(1, 0, 0.5, 0.25)
    advantages = group_advantages(rewards, ONE, epsilon=0)
    torch.testing.assert_close(group_advantages(40 * rewards - 7, ONE, epsilon=0), advantages, rtol=0, atol=1e-12)
    torch.testing.assert_close(group_advantages(-rewards, ONE, epsilon=0), -advantages, rtol=0, atol=1e-12)
