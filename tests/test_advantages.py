import warnings

import pytest
import torch

from trl_dgpo.advantages import group_advantages, normalize_then_sum, preference_pairs, zero_variance


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


# -- several rewards, each normalised before they are summed

TWO_REWARDS = torch.stack([f64(0, 1, 0, 1), f64(10, 20, 30, 40)])
EVERY = torch.ones(4, dtype=torch.bool)


def test_each_reward_is_measured_by_its_own_spread():
    # 0, 1, 0, 1: mean .5, deviation .5; 10..40: mean 25, deviation sqrt(125) = 11.180339887499
    close(
        normalize_then_sum(TWO_REWARDS, [1, 1], ONE, EVERY, epsilon=0),
        *(-1 - 1.341640786500, 1 - 0.447213595500, -1 + 0.447213595500, 1 + 1.341640786500),
    )
    # .5 / .5001 = .999800039992 and 15 / 11.180439887499 = 1.341628786615
    close(
        normalize_then_sum(TWO_REWARDS, [3, 0.5], ONE, EVERY)[:1],
        -3 * 0.999800039992 - 0.5 * 1.341628786615,
    )


def test_summed_first_the_wider_reward_decides_alone():
    summed = group_advantages(TWO_REWARDS.sum(0), ONE)
    apart = group_advantages(normalize_then_sum(TWO_REWARDS, [1, 1], ONE, EVERY), ONE)
    assert summed.argsort().tolist() == [0, 1, 2, 3]
    assert apart.argsort().tolist() == [0, 2, 1, 3]


def several(seed=0):
    """Three rewards of 5 groups of 6, not applicable everywhere, one of them flat in a group; some samples failed."""
    stream = torch.Generator().manual_seed(seed)
    rewards = torch.rand(3, 30, dtype=torch.float64, generator=stream)
    rewards[torch.rand(3, 30, generator=stream) < 0.2] = NAN
    group_index = torch.arange(5).repeat_interleave(6)
    rewards[1, group_index == 2] = 0.1
    valid = torch.rand(30, generator=stream) < 0.8
    return rewards, group_index, valid


def test_normalised_rewards_sum_to_zero_over_a_group():
    rewards, group_index, valid = several()
    normalised = normalize_then_sum(rewards, [1.0, 0.5, -2.0], group_index, valid)
    assert group_sums(normalised.nan_to_num(0), group_index).abs().max() < 1e-12
    assert torch.equal(normalised.isnan(), ~valid)
    assert normalised.nan_to_num(0).abs().max() > 1


def test_the_units_of_each_reward_are_free():
    rewards, group_index, valid = several()
    units = torch.tensor([1000.0, 1e-3, 7.0]).double()[:, None]
    for epsilon, tolerance in ((0, 1e-12), (1e-9, 1e-6)):
        one, other = (
            normalize_then_sum(r, [1.0, 0.5, 2.0], group_index, valid, epsilon=epsilon).nan_to_num(0)
            for r in (rewards, units * rewards + 3)
        )
        assert ((one - other).norm() / one.norm()).item() < tolerance
    # With the default epsilon, against a deviation of about .3, it is a thousandth of the weight.
    one, other = (
        group_advantages(normalize_then_sum(r, [1.0, 0.5, 2.0], group_index, valid), group_index)
        for r in (rewards, units.clamp(min=1) * rewards)
    )
    assert ((one - other).norm() / one.norm()).item() < 1e-3


def test_of_one_reward_both_orders_are_the_same():
    rewards, group_index, _ = several()
    first, valid = rewards[0], ~rewards[0].isnan()
    normalised = normalize_then_sum(first[None], [2.0], group_index, valid, epsilon=0)
    torch.testing.assert_close(
        group_advantages(normalised, group_index, epsilon=0),
        group_advantages(first, group_index, epsilon=0),
        rtol=0,
        atol=1e-12,
    )


def test_a_masked_sample_is_in_no_rewards_statistics():
    rewards, group_index, valid = several()
    weights = [1.0, 0.5, 2.0]
    normalised = normalize_then_sum(rewards, weights, group_index, valid)
    undrawn = normalize_then_sum(rewards[:, valid], weights, group_index[valid], valid[valid])
    torch.testing.assert_close(normalised[valid], undrawn, rtol=0, atol=1e-12)
    assert torch.equal(normalize_then_sum(rewards.where(valid, 1e9), weights, group_index, valid)[valid], undrawn)


def test_where_a_reward_does_not_apply_it_adds_nothing_and_the_others_are_compared_without_it():
    rewards = torch.stack([f64(0, 4, NAN, 2), f64(1, 3, 1, 3)])
    close(
        normalize_then_sum(rewards, [1, 1], ONE, EVERY, epsilon=0),
        *(-1.224744871392 - 1, 1.224744871392 + 1, -1, 0 + 1),  # 0, 4, 2: mean 2, deviation sqrt(8/3)
    )


def test_a_reward_without_a_preference_adds_exactly_nothing():
    # Groups of 7 leave rounding in the mean of .1.
    rewards = torch.stack([torch.arange(7).double(), torch.full((7,), 0.1, dtype=torch.float64), f64(5, *[NAN] * 6)])
    group_index, every = torch.zeros(7, dtype=torch.long), torch.ones(7, dtype=torch.bool)
    alone = normalize_then_sum(rewards[:1], [1], group_index, every)
    assert torch.equal(normalize_then_sum(rewards, [1, 9, 9], group_index, every), alone)
    nothing = normalize_then_sum(rewards[1:], [9, 9], group_index, every)
    assert nothing.tolist() == [0] * 7
    assert zero_variance(nothing, group_index).tolist() == [True]


def test_the_batch_scale_makes_it_what_grpos_users_know():
    # Each reward over its group, their sum over its deviation in the batch, as TRL does with the sample's deviations.
    rewards = torch.stack([f64(0, 1, 0, 1, 2, 2, 0, 4), f64(10, 20, 30, 40, 1, 5, 2, 3)])
    total = sum(
        (r.view(2, 4) - r.view(2, 4).mean(1, keepdim=True)) / (r.view(2, 4).std(1, correction=0, keepdim=True) + 1e-4)
        for r in rewards
    ).flatten()
    expected = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    normalised = normalize_then_sum(rewards, [1, 1], TWO, torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(group_advantages(normalised, TWO, scale="batch"), expected, rtol=0, atol=1e-12)


# -- pairs


def pairs_of(preferences: torch.Tensor) -> dict[tuple[int, int], float]:
    """Weight of each pair (better, worse) of one group."""
    return {tuple(pair): preferences[tuple(pair)].item() for pair in (preferences > 0).nonzero().tolist()}


def preferences_of(*rewards, selection):
    count = len(rewards)
    index = torch.zeros(count, dtype=torch.long)
    return preference_pairs(f64(*rewards), index, torch.arange(count), count, selection=selection)


@pytest.mark.parametrize(
    ("rewards", "selection", "pairs"),
    [
        ([1, 0, 0.5, 0.25], "max", {(0, 1): 1}),
        ([1, 0, 0.5, 0.25], "min", {(2, 3): 1}),  # margins .25 twice: the better image of (3, 1) has a larger number
        ([1, 0.1, 0.5, 0.25], "min", {(3, 1): 1}),
        (
            *([1, 0, 0.5, 0.25], "all"),
            {(0, 1): 1 / 6, (0, 2): 1 / 6, (0, 3): 1 / 6, (2, 1): 1 / 6, (2, 3): 1 / 6, (3, 1): 1 / 6},
        ),
        # ties for a place: the lowest number has it; images of equal rewards are no pair
        ([0, 1, 0, 1], "max", {(1, 0): 1}),
        ([0, 1, 0, 1], "min", {(1, 0): 1}),
        ([0, 1, 0, 1], "all", {(1, 0): 1 / 4, (1, 2): 1 / 4, (3, 0): 1 / 4, (3, 2): 1 / 4}),
        ([0.2, 0.2, 0.2, 0.9], "min", {(3, 0): 1}),
        # a failed reward is in no pair
        ([NAN, 0.3, 0.1, 0.2], "max", {(1, 2): 1}),
        ([NAN, 0.5, 0.125, 0.25], "min", {(3, 2): 1}),
        ([0.7, NAN, NAN, 0.1], "all", {(0, 3): 1}),
        # a person's choice
        ([0, 1], "max", {(1, 0): 1}),
        *[(rewards, s, {}) for rewards in ([0.5, 0.5], [NAN, 1], [NAN, NAN]) for s in ("max", "min", "all")],
    ],
)
def test_pairs_of_a_group(rewards, selection, pairs):
    preferences = preferences_of(*rewards, selection=selection)
    assert pairs_of(preferences) == pairs
    assert torch.equal(preferences, -preferences.mT)


@pytest.mark.parametrize("selection", ["max", "min", "all"])
def test_pairs_of_several_groups_in_any_order(selection):
    random = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 4, (5, 6), generator=random).double()  # with ties
    rewards[1, 2], rewards[2], rewards[3] = NAN, 0.5, NAN
    alone = torch.stack([preferences_of(*row.tolist(), selection=selection) for row in rewards])
    order = torch.randperm(30, generator=random)
    together = preference_pairs(rewards.flatten()[order], order // 6, order % 6, 6, selection=selection)
    assert torch.equal(together, alone.flatten(0, 1)[order])
    weights = alone.clamp(min=0).sum((1, 2))
    torch.testing.assert_close(weights, f64(1, 1, 0, 0, 1), rtol=0, atol=1e-12)  # 1 a group, if it has a pair


def test_the_sum_of_all_preferences_is_wins_minus_losses():
    rewards = f64(1, 0, 0.5, 0.25, 0.8, 0.8, 0.6, NAN)
    preferences = preference_pairs(rewards, TWO, torch.arange(8) % 4, 4, selection="all")
    pairs = torch.tensor([6, 6, 6, 6, 2, 2, 2, 2])
    signs = group_advantages(rewards, TWO, scale="sign")
    torch.testing.assert_close(preferences.sum(1) * pairs, signs, rtol=0, atol=1e-12)


def test_an_unknown_selection_is_told():
    with pytest.raises(ValueError, match="`selection` is 'best'; it must be 'max', 'min' or 'all'"):
        preferences_of(1, 0, selection="best")
