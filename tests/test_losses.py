"""Golden numbers are worked by hand or by an independent calculation in float64."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from trl_dgpo.advantages import group_advantages, preference_pairs
from trl_dgpo.losses import (
    Revision,
    clip_drifted,
    clip_errors,
    denoising_error,
    dgpo_loss,
    diffusion_dpo_loss,
    flow_grpo_loss,
    gpo_loss,
    group_mean,
    group_scores,
    next_kl_coef,
    pairwise_dpo_loss,
    revision_error,
    revisions,
    step_kl,
    step_log_prob,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# A group of four with rewards 1, 0, .5, .25 at beta = 100.
ERRORS = f64(0.40, 0.55, 0.50, 0.45)
REFERENCE = f64(0.42, 0.50, 0.50, 0.44)
OLD = f64(0.43, 0.52, 0.50, 0.45)
EXACT = group_advantages(f64(1, 0, 0.5, 0.25), torch.zeros(4, dtype=torch.long), epsilon=0)
USUAL = group_advantages(f64(1, 0, 0.5, 0.25), torch.zeros(4, dtype=torch.long), epsilon=1e-4)
GROUP = torch.zeros(4, dtype=torch.long)


def close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def gradient(loss, errors, *args, **kwargs):
    errors = errors.clone().requires_grad_()
    out = loss(errors, *args, **kwargs)
    return out, torch.autograd.grad(getattr(out, "loss", out), errors)[0]


# -- denoising error


def test_the_error_is_a_mean_over_latent_elements():
    prediction, target = torch.zeros(2, 1, 2, 2), torch.tensor([[[[1.0, 1], [1, 1]]], [[[4.0, 0], [0, 0]]]])
    assert denoising_error(prediction, target).tolist() == [1.0, 4.0]
    assert denoising_error(torch.zeros(2, 7), torch.ones(2, 7)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("prediction", "target", "error"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_error_is_float32_or_wider(prediction, target, error):
    # 300^2 overflows float16 and rounds in bfloat16.
    out = denoising_error(torch.full((1, 3), 300.0, dtype=prediction), torch.full((1, 3), -1.0, dtype=target))
    assert out.dtype == error
    assert out.item() == 301.0**2


# -- one group


@pytest.mark.parametrize(
    ("advantages", "score", "gate", "objective", "loss", "slope"),
    [
        (
            *(EXACT, -2.366431913240, 0.085768508014, 0.089671466089, -0.003986819071),
            [3.261942876136, -2.537066681439, 0.362438097348, -1.087314292045],
        ),
        (
            *(USUAL, -2.365792086281, 0.085818691598, 0.089726359145, -0.003988073207),
            [3.262968987375, -2.537864767958, 0.362552109708, -1.087656329125],
        ),
    ],
    ids=["epsilon 0", "epsilon 1e-4"],
)
def test_dgpo_of_a_group(advantages, score, gate, objective, loss, slope):
    out, grad = gradient(dgpo_loss, ERRORS, REFERENCE, advantages, GROUP, beta=100.0)
    close(out.score, [score])
    close(out.gate, [gate])
    close(out.objective, objective)
    close(out.loss.detach(), loss)
    close(grad, [s / 100 for s in slope])
    close(group_scores(ERRORS, REFERENCE, advantages, GROUP, beta=100.0), [score])

    out, grad = gradient(dgpo_loss, ERRORS, REFERENCE, advantages, GROUP, beta=100.0, loss_type="logsigmoid")
    close(out.score, [score])
    close(out.objective, objective)
    close(out.loss.detach(), objective)
    close(grad, slope)


@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0, 2000.0])
def test_gradients_in_closed_form(beta):
    surrogate, small = gradient(dgpo_loss, ERRORS, REFERENCE, USUAL, GROUP, beta=beta)
    _, large = gradient(dgpo_loss, ERRORS, REFERENCE, USUAL, GROUP, beta=beta, loss_type="logsigmoid")
    close(large, (torch.sigmoid(surrogate.score) * beta / 4 * USUAL).tolist())
    close(beta * small, large.tolist())


def test_the_sum_over_the_group_is_the_mean_at_a_larger_beta():
    out, grad = gradient(dgpo_loss, ERRORS, REFERENCE, EXACT, GROUP, beta=4.0, loss_type="logsigmoid")  # G = 4
    close(out.score, [-0.094657276530])
    close(out.loss.detach(), 0.646938124411)
    close(grad, [0.724665685193, -0.563628866261, 0.080518409466, -0.241555228398])


def test_policy_at_the_reference():
    out, grad = gradient(dgpo_loss, REFERENCE, REFERENCE, EXACT, GROUP, beta=100.0)
    assert out.score.tolist() == [0]
    assert out.gate.tolist() == [0.5]
    close(out.objective, math.log(2))
    close(out.loss.detach(), -0.011409582439)
    close(grad, [0.19015970731392, -0.14790199457749, 0.02112885636821, -0.06338656910464])
    close(100 * grad, (100 / 8 * EXACT).tolist())


@pytest.mark.parametrize("loss_type", ["surrogate", "logsigmoid"])
def test_equal_rewards_teach_nothing(loss_type):
    advantages = group_advantages(f64(0.7, 0.7, 0.7, 0.7), GROUP)
    out, grad = gradient(dgpo_loss, ERRORS, REFERENCE, advantages, GROUP, beta=100.0, loss_type=loss_type)
    close(out.objective, math.log(2), atol=1e-15)
    assert grad.tolist() == [0] * 4


def test_the_gate_opens_on_a_wrong_preference_and_closes_on_a_learned_one():
    gates = [
        dgpo_loss(REFERENCE + slip * EXACT, REFERENCE, EXACT, GROUP, beta=100.0).gate.item()
        for slip in (-0.05, 0, 0.05)
    ]
    assert gates[0] < 0.01
    assert gates[1] == 0.5
    assert gates[2] > 0.99


# -- the partition function


def with_partition(log_z, advantages):
    # log Z(c) adds one number to every sample's preference beta / G (d_ref - d) of a group.
    return dgpo_loss(ERRORS - log_z * 4 / 100, REFERENCE, advantages, GROUP, beta=100.0).objective


def test_the_partition_function_cancels():
    close(torch.stack([with_partition(log_z, EXACT) for log_z in (0, 3.7, -50)]), [0.089671466089] * 3)


def test_it_does_not_where_advantages_have_a_sum():
    broken = EXACT.clone()
    broken[0] = 0.8
    close(torch.stack([with_partition(log_z, broken) for log_z in (0, 3.7)]), [0.126239217698, 1.078572099075])


# -- Diffusion-DPO


def test_two_samples_are_diffusion_dpo():
    errors, reference = f64(0.40, 0.55), f64(0.42, 0.50)
    dpo = diffusion_dpo_loss(errors[:1], reference[:1], errors[1:], reference[1:], beta=20.0)
    dgpo = dgpo_loss(errors, reference, f64(1, -1), GROUP[:2], beta=20.0).objective
    close(torch.stack([dpo, dgpo]), [0.403186048885] * 2)
    # diffusers' example, which leaves out the 1/2, at half the beta
    close(-F.logsigmoid(-10.0 * ((errors - reference)[0] - (errors - reference)[1])), 0.403186048885)


def test_diffusion_dpo_is_a_mean_over_pairs():
    w, w_ref, l, l_ref = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # noqa: E741
    alone = [diffusion_dpo_loss(w[i], w_ref[i], l[i], l_ref[i], beta=5.0) for i in range(5)]
    close(diffusion_dpo_loss(w, w_ref, l, l_ref, beta=5.0), torch.stack(alone).mean().item())


# -- clip


@pytest.mark.parametrize(
    ("clip_range", "mask", "slope"),
    [
        (0.001, [True, True, False, False], [0, 0, 0.003624380973, -0.010873142920]),
        (0.010, [True, True, False, False], [0, 0, 0.003624380973, -0.010873142920]),
        (0.050, [False] * 4, [0.032619428761, -0.025370666814, 0.003624380973, -0.010873142920]),
    ],
)
def test_clip(clip_range, mask, slope):
    # ratios 1.0304 for a better and .9704 for a worse sample, 1 for the others
    clipped_loss = {}

    def loss(errors):
        errors, clipped_loss["mask"] = clip_errors(errors, OLD, EXACT, clip_range)
        return dgpo_loss(errors, REFERENCE, EXACT, GROUP, beta=100.0)

    out, grad = gradient(loss, ERRORS)
    assert clipped_loss["mask"].tolist() == mask
    close(grad, slope)
    close(out.loss.detach(), -0.003986819071)  # clipped samples keep their value
    close(out.score, [-2.366431913240])


def test_the_clip_holds_one_side_of_each_sign():
    old, advantages = f64(0.5, 0.5, 0.5, 0.5, 0.5), f64(1, 1, -1, -1, 0)
    errors = f64(0.4, 0.6, 0.6, 0.4, 0.6)  # ratio 1.105, .905, .905, 1.105, .905
    assert clip_errors(errors, old, advantages, 0.1)[1].tolist() == [True, False, False, False, False]
    assert clip_errors(errors, old, advantages, 0.05)[1].tolist() == [True, False, True, False, True]
    assert not clip_errors(errors, errors, advantages, 0.0)[1].any()  # the old policy is the policy


# -- several groups


def test_two_groups_with_a_common_deviation():
    group_index = torch.arange(2).repeat_interleave(4)
    advantages = group_advantages(f64(1, 0, 0.5, 0.25, 0.8, 0.8, 0.6, 0.6), group_index, scale="batch")
    errors = torch.cat([ERRORS, f64(0.30, 0.31, 0.33, 0.36)])
    reference = torch.cat([REFERENCE, f64(0.31, 0.31, 0.31, 0.31)])
    out, grad = gradient(dgpo_loss, errors, reference, advantages, group_index, beta=100.0)
    close(out.score, [-2.906252805342, -0.664286355507])
    close(out.objective, 0.234207931072)
    close(out.loss.detach(), -0.002608397410)
    close(grad[:4], [0.012107863295, -0.009417227007, 0.001345318144, -0.004035954432])
    close(grad[4:], [0.014106843153, 0.014106843153, -0.014106843153, -0.014106843153])


def a_round(seed=0):
    """
    Five groups of six: gates far apart, some samples clipped, one NaN, one group of equal rewards, one of NaN alone.
    """
    random = torch.Generator().manual_seed(seed)
    group_index = torch.arange(5).repeat_interleave(6)
    rewards = torch.rand(len(group_index), generator=random, dtype=torch.float64)
    rewards[2] = math.nan
    rewards[group_index == 3] = 0.7
    rewards[group_index == 4] = math.nan
    advantages = group_advantages(rewards, group_index)
    reference = 0.4 + 0.2 * torch.rand(len(rewards), generator=random, dtype=torch.float64)
    # Group 0 has learned its preference, group 1 its reverse.
    learned = torch.tensor([-0.08, 0.08, 0.0, 0.0, 0.0], dtype=torch.float64)[group_index]
    errors = reference + learned * advantages + 0.02 * torch.randn(len(rewards), generator=random, dtype=torch.float64)
    old = errors + 0.03 * torch.randn(len(rewards), generator=random, dtype=torch.float64)
    valid = ~rewards.isnan()
    return SimpleNamespace(
        errors=errors, reference=reference, old=old, advantages=advantages, group_index=group_index, rewards=rewards,
        valid=valid, sizes=torch.zeros(5, dtype=torch.long).index_add(0, group_index, valid.long()),
    )  # fmt: skip


LOSSES = {
    "dgpo surrogate": partial(dgpo_loss, loss_type="surrogate", beta=20.0),
    "dgpo logsigmoid": partial(dgpo_loss, loss_type="logsigmoid", beta=20.0),
    "gpo linear": partial(gpo_loss, loss_type="linear"),
    "gpo logsigmoid": partial(gpo_loss, loss_type="logsigmoid", beta=20.0),
}
ALL = slice(None)


def loss_of(name, errors, r, rows=ALL, **options):
    return LOSSES[name](errors, r.reference[rows], r.advantages[rows], r.group_index[rows], **options)


def test_the_round_acts():
    r = a_round()
    gates = loss_of("dgpo surrogate", r.errors, r, group_sizes=r.sizes).gate[:3].sort().values
    assert (gates.diff() >= 0.2).all()
    _, clipped = clip_errors(r.errors, r.old, r.advantages, 0.01)
    assert 0.2 <= clipped[r.valid].double().mean() <= 0.8


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "parts",
    [
        [slice(0, 6), slice(6, 18), slice(18, 30)],  # whole groups
        [slice(0, 4), slice(4, 16), slice(16, 30)],  # parts of groups
        [slice(0, 30, 3), slice(1, 30, 3), slice(2, 30, 3)],  # a third of every group
        [slice(i, i + 1) for i in range(30)],
    ],
    ids=["whole groups", "split groups", "thirds", "single samples"],
)
def test_parts_add_up_to_the_whole(name, parts):
    r = a_round()

    def clipped(errors, rows=ALL, **options):
        errors, _ = clip_errors(errors, r.old[rows], r.advantages[rows], 0.01)
        return loss_of(name, errors, r, rows, group_sizes=r.sizes, **options)

    whole, expected = gradient(clipped, r.errors)
    beta = 1.0 if name == "gpo linear" else 20.0
    scores = sum(
        group_scores(r.errors[p], r.reference[p], r.advantages[p], r.group_index[p], beta=beta, group_sizes=r.sizes)
        for p in parts
    )
    close(scores, whole.score.tolist(), atol=1e-12)

    def of_parts(scores):
        grad = torch.zeros_like(r.errors)
        for rows in parts:
            out, grad[rows] = gradient(clipped, r.errors[rows], rows=rows, scores=scores)
        return out, grad

    out, grad = of_parts(scores)
    close(grad, expected.tolist(), atol=1e-12)
    close(out.objective, whole.objective.item(), atol=1e-12)
    close(out.gate, whole.gate.tolist(), atol=1e-12)
    if name != "gpo linear" and parts[0] != slice(0, 6):  # a gate from a part alone is another gate
        assert (of_parts(None)[1] - expected).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_samples_is_free(name):
    r, order = a_round(), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    whole, expected = gradient(partial(loss_of, name), r.errors, r, ALL, group_sizes=r.sizes)
    out, grad = gradient(partial(loss_of, name), r.errors[order], r, order, group_sizes=r.sizes)
    close(grad, expected[order].tolist(), atol=1e-12)
    close(out.score, whole.score.tolist(), atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_failed_reward_was_never_drawn(name):
    r = a_round()
    out, grad = gradient(partial(loss_of, name), r.errors, r, ALL, group_sizes=r.sizes)
    without, expected = gradient(partial(loss_of, name), r.errors[r.valid], r, r.valid, group_sizes=r.sizes)
    assert (grad[~r.valid] == 0).all()
    close(grad[r.valid], expected.tolist(), atol=1e-12)
    close(out.loss.detach(), without.loss.item(), atol=1e-12)
    counted = loss_of(name, r.errors[r.valid], r, r.valid, num_groups=5)  # sizes counted from what is there
    close(out.score, counted.score.tolist(), atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_groups_without_a_preference_count_but_do_not_pull(name):
    r = a_round()
    out, grad = gradient(partial(loss_of, name), r.errors, r, ALL, group_sizes=r.sizes)
    assert (grad[r.group_index >= 3] == 0).all()
    assert out.score[3:].tolist() == [0, 0]
    rows = r.group_index < 3
    skipped, expected = gradient(partial(loss_of, name), r.errors[rows], r, rows, group_sizes=r.sizes, num_groups=5)
    close(grad[rows], expected.tolist(), atol=1e-12)
    close(out.objective, skipped.objective.item(), atol=1e-12)
    _, fewer = gradient(partial(loss_of, name), r.errors[rows], r, rows, group_sizes=r.sizes[:3])
    close(grad[rows], (fewer * 3 / 5).tolist(), atol=1e-12)  # N is all groups


def test_group_mean_weighs_as_the_losses_do():
    r = a_round()
    values = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    by_hand = [values[r.valid & (r.group_index == g)].mean() for g in range(4)]  # the fifth group has no valid sample
    mean = group_mean(values * r.valid, r.group_index, group_sizes=r.sizes)
    close(mean, (sum(by_hand) / 5).item(), atol=1e-12)
    parts = [group_mean((values * r.valid)[i::4], r.group_index[i::4], group_sizes=r.sizes) for i in range(4)]
    close(sum(parts), mean.item(), atol=1e-12)
    close(group_mean(f64(1, 3, 8), torch.tensor([0, 0, 1])), 5.0)


def test_advantages_may_be_wider_than_errors():
    r = a_round()
    for loss_type in ("surrogate", "logsigmoid"):
        out = dgpo_loss(
            r.errors.float(),
            r.reference.float(),
            r.advantages,
            r.group_index,
            beta=20.0,
            group_sizes=r.sizes,
            loss_type=loss_type,
        )
        assert out.loss.dtype == out.score.dtype == torch.float32


# -- the paper's own normalisation


def test_the_papers_beta():
    # Its score sums x0-errors over latent elements and group; ours takes the mean of velocity errors over both.
    random, sigma, beta = torch.Generator().manual_seed(0), 0.666, 3.0
    x0, noise, slip, slip_ref = torch.randn(4, 4, 2, 3, 3, dtype=torch.float64, generator=random)
    velocity, num_elements, x_t = noise - x0, x0[0].numel(), (1 - sigma) * x0 + sigma * noise
    x0_error, x0_reference = ((x_t - sigma * (velocity + s) - x0).square().flatten(1).sum(1) for s in (slip, slip_ref))
    paper = beta * (EXACT * (x0_error - x0_reference)).sum()
    errors, reference = (denoising_error(velocity + s, velocity) for s in (slip, slip_ref))
    ours = group_scores(errors, reference, EXACT, GROUP, beta=beta * 4 * num_elements * sigma**2)
    close(ours, [paper.item()])


# -- GPO


def test_linear_gpo_by_hand():
    errors = f64(0.1, -0.2, 0.05, 0.3)
    out, grad = gradient(gpo_loss, errors, torch.zeros(4, dtype=torch.float64), EXACT)
    close(out.loss.detach(), 0.061273683468)
    close(out.objective, 0.061273683468)
    close(grad, (EXACT / 4).tolist())
    assert out.gate.tolist() == [1]


def test_linear_gpo_needs_no_reference():
    out, grad = gradient(gpo_loss, ERRORS, REFERENCE, EXACT, GROUP)
    without, same = gradient(gpo_loss, ERRORS, None, EXACT, GROUP)
    assert torch.equal(grad, same)
    close(out.loss.detach() - without.loss.detach(), (-(EXACT * REFERENCE).mean()).item())


def test_linear_gpo_is_all_pairs_weighted_by_reward_differences():
    rewards, scores = f64(1, 0, 0.5, 0.25), ERRORS - REFERENCE
    pairs = sum((rewards[i] - rewards[j]) * (scores[i] - scores[j]) for i in range(4) for j in range(i + 1, 4))
    plain = group_advantages(rewards, GROUP, scale="none")
    close(16 * gpo_loss(ERRORS, REFERENCE, plain, GROUP).loss, pairs.item())


def test_logsigmoid_gpo_is_dgpo_and_starts_as_linear():
    ours, grad = gradient(gpo_loss, ERRORS, REFERENCE, EXACT, GROUP, loss_type="logsigmoid", beta=100.0)
    dgpo, expected = gradient(dgpo_loss, ERRORS, REFERENCE, EXACT, GROUP, loss_type="logsigmoid", beta=100.0)
    assert torch.equal(grad, expected)
    assert torch.equal(ours.score, dgpo.score)
    # (2 / beta) (L - log 2) goes to the linear loss as beta goes to 0
    errors, zeros, beta = f64(0.1, -0.2, 0.05, 0.3), torch.zeros(4, dtype=torch.float64), 1e-6
    loss = gpo_loss(errors, zeros, EXACT, GROUP, loss_type="logsigmoid", beta=beta).loss
    close(2 / beta * (loss - math.log(2)), 0.061273683468, atol=1e-7)


# -- pairs within groups


NUMBERS = torch.arange(6).repeat(5)  # of `a_round`
SELECTIONS = ("max", "min", "all")


def pair_loss(errors, r, rows=ALL, *, selection="all", rewards=None, beta=20.0, **options):
    preferences = preference_pairs(
        r.rewards if rewards is None else rewards, r.group_index, NUMBERS, 6, selection=selection
    )
    return pairwise_dpo_loss(
        errors,
        r.reference[rows],
        preferences[rows],
        r.group_index[rows],
        NUMBERS[rows],
        beta=beta,
        num_groups=5,
        **options,
    )


@pytest.mark.parametrize("loss_type", ["surrogate", "logsigmoid"])
def test_a_pair_is_diffusion_dpo_and_dgpo(loss_type):
    errors, reference, advantages = f64(0.40, 0.55), f64(0.42, 0.50), f64(1, -1)
    preferences = preference_pairs(f64(1, 0), GROUP[:2], torch.arange(2), 2)
    pair = partial(pairwise_dpo_loss, beta=20.0, loss_type=loss_type)
    out, grad = gradient(pair, errors, reference, preferences, GROUP[:2], torch.arange(2))
    dgpo, expected = gradient(dgpo_loss, errors, reference, advantages, GROUP[:2], beta=20.0, loss_type=loss_type)
    close(out.objective, 0.403186048885)
    close(out.loss.detach(), dgpo.loss.item())
    close(grad, expected.tolist())
    close(out.score, [[0.0, -0.7], [0.7, 0.0]])  # 20 / 2 (-.02 - .05)
    if loss_type == "logsigmoid":
        close(out.loss.detach(), 0.403186048885)
        # sigma(-.7) = .331812227832, times beta / 2
        close(grad, [3.31812227832, -3.31812227832])
    # the other way round: the policy prefers the worse image
    worse = pair(errors, reference, -preferences, GROUP[:2], torch.arange(2))
    close(worse.objective, math.log1p(math.exp(0.7)))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_pairs_of_groups_are_diffusion_dpo_of_each(selection):
    r = a_round()
    out, grad = gradient(pair_loss, r.errors, r, selection=selection, loss_type="logsigmoid")

    def by_hand(errors):
        total = 0.0
        for group in range(3):  # the others have no pair
            rows = [i for i in range(30) if r.group_index[i] == group and r.valid[i]]
            pairs = [(i, j) for i in rows for j in rows if r.rewards[i] > r.rewards[j]]
            pairs.sort(key=lambda pair: r.rewards[pair[0]] - r.rewards[pair[1]])
            pairs = {"max": pairs[-1:], "min": pairs[:1], "all": pairs}[selection]
            w, l = (torch.tensor(side) for side in zip(*pairs, strict=True))  # noqa: E741
            total += diffusion_dpo_loss(errors[w], r.reference[w], errors[l], r.reference[l], beta=20.0)
        return total / 5  # N is all groups

    value, expected = gradient(by_hand, r.errors)
    close(out.loss.detach(), value.item(), atol=1e-12)
    close(out.objective, value.item(), atol=1e-12)
    close(grad, expected.tolist(), atol=1e-12)
    assert (grad[~r.valid | (r.group_index >= 3)] == 0).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("beta", [1.0, 20.0, 2000.0])
def test_the_pairs_surrogate_has_the_gradient_over_beta(selection, beta):
    r = a_round()
    surrogate, small = gradient(pair_loss, r.errors, r, selection=selection, beta=beta)
    logsigmoid, large = gradient(pair_loss, r.errors, r, selection=selection, beta=beta, loss_type="logsigmoid")
    torch.testing.assert_close(beta * small, large, rtol=1e-12, atol=1e-12)
    assert large.norm() > 0.01
    assert torch.equal(surrogate.objective, logsigmoid.objective)
    assert torch.equal(surrogate.score, -surrogate.score.view(5, 6, 6).mT.flatten(0, 1))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_other_rewards_turn_the_gradient_round_at_the_reference(selection):
    r = a_round()
    out, grad = gradient(pair_loss, r.reference, r, selection=selection)
    _, turned = gradient(pair_loss, r.reference, r, selection=selection, rewards=-r.rewards)
    assert torch.equal(grad, -turned)
    close(out.objective, 3 / 5 * math.log(2), atol=1e-15)  # groups without a pair add nothing
    # a quarter of the advantages of wins minus losses: the gate is one half, and so is the surrogate's factor
    preferences = preference_pairs(r.rewards, r.group_index, NUMBERS, 6, selection=selection)
    close(grad, (preferences.sum(1) / 4 / 5).tolist(), atol=1e-15)


@pytest.mark.parametrize("loss_type", ["surrogate", "logsigmoid"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "parts",
    [
        [slice(0, 6), slice(6, 18), slice(18, 30)],  # whole groups
        [slice(0, 4), slice(4, 16), slice(16, 30)],  # parts of groups
        [slice(0, 30, 3), slice(1, 30, 3), slice(2, 30, 3)],  # a third of every group
        [slice(i, i + 1) for i in range(30)],
    ],
    ids=["whole groups", "split groups", "thirds", "single samples"],
)
def test_parts_of_pairs_add_up_to_the_whole(loss_type, selection, parts):
    r = a_round()
    options = {"selection": selection, "loss_type": loss_type}
    whole, expected = gradient(pair_loss, r.errors, r, **options)
    excess = (r.errors - r.reference).view(5, 6)

    def of_parts(excess):
        parted = [gradient(pair_loss, r.errors[p], r, p, excess=excess, **options) for p in parts]
        grad = torch.zeros_like(r.errors)
        for part, (_, slope) in zip(parts, parted, strict=True):
            grad[part] += slope
        return sum(out.loss.detach() for out, _ in parted), sum(out.objective for out, _ in parted), grad

    loss, objective, grad = of_parts(excess)
    close(loss, whole.loss.item(), atol=1e-12)
    close(objective, whole.objective.item(), atol=1e-12)
    close(grad, expected.tolist(), atol=1e-12)
    if parts[0] != slice(0, 6):  # the other image's margin is not 0
        assert (of_parts(None)[2] - expected).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_images_without_a_pair_may_be_left_out(selection):
    r = a_round()
    out, grad = gradient(pair_loss, r.errors, r, selection=selection)
    preferences = preference_pairs(r.rewards, r.group_index, NUMBERS, 6, selection=selection)
    rows = (preferences != 0).any(1)
    assert rows.sum() == (17 if selection == "all" else 6)
    fewer, expected = gradient(pair_loss, r.errors[rows], r, rows, selection=selection)
    close(grad[rows], expected.tolist(), atol=1e-15)
    assert (grad[~rows] == 0).all()
    close(out.objective, fewer.objective.item(), atol=1e-15)


# -- Flow-GRPO

# A stochastic step x' = a x + b v + std z: a, b, s, std.
STEP = (0.755, -0.1245, 2.1, 2.1 * math.sqrt(0.1))


def steps(*shape, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=stream, dtype=torch.float64) for _ in range(4)]


def test_a_steps_log_prob_is_the_gaussians():
    a, b, _, std = STEP
    x, v, other, z = steps(3, 4, 5, 5)
    x_next = a * x + b * v + std * z
    target = (x_next - a * x) / b
    for velocity in (v, other):
        normal = torch.distributions.Normal(a * x + b * velocity, std)
        log_prob = step_log_prob(denoising_error(velocity, target), b, std)
        close(log_prob, normal.log_prob(x_next).mean((1, 2, 3)).tolist(), atol=1e-12)


def test_a_steps_kl_is_that_of_the_means():
    a, b, s, std = STEP
    x, v, reference, _ = steps(3, 4, 5, 5)
    mean, reference_mean = a * x + b * v, a * x + b * reference
    kl = step_kl(denoising_error(v, reference), b, s)
    close(kl, ((mean - reference_mean).square().mean((1, 2, 3)) / (2 * s**2)).tolist(), atol=1e-12)
    whole = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(reference_mean, std)
    )
    close(kl, (whole.mean((1, 2, 3)) * 0.1).tolist(), atol=1e-12)  # times sigma - sigma'


def test_flow_grpo_loss_by_hand():
    # Ratios 1.25, .8, 1.25, .8 at advantages 1, 2, -1, -2: the clip acts where the ratio has gone far enough already.
    old = f64(-0.7, -0.8, -0.9, -1.0)
    log_probs, advantages = old + f64(1.25, 0.8, 1.25, 0.8).log(), f64(1, 2, -1, -2)
    out, grad = gradient(flow_grpo_loss, log_probs, old, advantages, GROUP, clip_range=0.1)
    close(out.ratio, [1.25, 0.8, 1.25, 0.8])
    assert out.clipped.tolist() == [True, False, False, True]
    close(out.loss, (-1.1 - 1.6 + 1.25 + 1.8) / 4)
    close(grad, [0, -1.6 / 4, 1.25 / 4, 0])
    out, grad = gradient(flow_grpo_loss, log_probs, old, advantages, GROUP, clip_range=None)
    assert not out.clipped.any()
    close(grad, [-1.25 / 4, -1.6 / 4, 1.25 / 4, 1.6 / 4])


def test_the_first_gradient_of_flow_grpo_is_the_policy_gradient():
    # ratio 1: value -mean A, here 0, and gradient -A; in errors, A b^2 / 2 std^2
    _, b, _, std = STEP

    def loss(errors):
        log_probs = step_log_prob(errors, b, std)
        return flow_grpo_loss(log_probs, log_probs.detach(), EXACT, GROUP, clip_range=1e-4)

    out, grad = gradient(loss, ERRORS)
    close(out.loss, 0.0)
    close(out.ratio, [1.0] * 4)
    assert not out.clipped.any()
    close(grad, (EXACT * b**2 / (2 * std**2) / 4).tolist())


def test_flow_grpo_in_parts_is_the_whole():
    # Two groups, one with a masked sample; split where a group is cut.
    old, index = torch.zeros(8, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    log_probs, advantages = 0.02 * f64(1, -2, 3, 1, 0.25, 2, 2, 1), f64(1, -1, 0.5, -0.5, 1.2, 0, -1.2, 0)
    sizes = {"group_sizes": torch.tensor([4, 3]), "num_groups": 2, "clip_range": 0.01}
    whole, expected = gradient(flow_grpo_loss, log_probs, old, advantages, index, **sizes)
    assert whole.clipped.tolist() == [True, True, True, False, False, False, False, False]
    parts = [
        gradient(flow_grpo_loss, log_probs[rows], old[rows], advantages[rows], index[rows], **sizes)
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8))
    ]
    close(sum(out.loss for out, _ in parts), whole.loss.item(), atol=1e-15)
    close(torch.cat([grad for _, grad in parts]), expected.tolist(), atol=1e-15)
    rows = advantages != 0
    fewer, grad = gradient(flow_grpo_loss, log_probs[rows], old[rows], advantages[rows], index[rows], **sizes)
    close(fewer.loss, whole.loss.item(), atol=1e-15)
    close(grad, expected[rows].tolist(), atol=1e-15)


# -- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dgpo_loss(ERRORS, REFERENCE, EXACT, GROUP, beta=1.0, loss_type="linear"), "DGPO has 'surrogate'"),
        (lambda: gpo_loss(ERRORS, REFERENCE, EXACT, GROUP, loss_type="surrogate"), "GPO has 'linear'"),
        (lambda: pair_loss(a_round().errors, a_round(), loss_type="linear"), "Diffusion-DPO has 'surrogate'"),
        (lambda: gpo_loss(ERRORS, None, EXACT, GROUP, loss_type="logsigmoid"), "`reference_errors` must be given"),
        (lambda: gpo_loss(ERRORS, REFERENCE), "`advantages` must be given"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- TDM-R1


def test_what_has_gone_far_enough_learns_no_more():
    errors, base = f64(0.4, 0.4, 0.5, 0.5, 0.4, 0.5), f64(0.45, 0.45, 0.45, 0.45, 0.3, 0.6)
    advantages, divergence = f64(1, 1, -1, -1, 1, -1), f64(0.06, 0.04, 0.06, 0.04, 0.06, 0.06)
    errors.requires_grad_()
    clipped, mask = clip_drifted(errors, base, advantages, divergence, 0.05)
    # far and improved; improved but near; the same of a worse sample; and two that went the wrong way
    assert mask.tolist() == [True, False, True, False, False, False]
    close(clipped.detach(), errors.detach())
    assert torch.autograd.grad(clipped.sum(), errors)[0].tolist() == [0, 1, 0, 1, 1, 1]


def test_a_student_moves_in_three_directions():
    x0, base, fake = (f64(*values)[None] for values in ((1, 1, 1, 1), (2, 0, 1, 1), (1, 1, 1, 3)))
    negative, surrogate = f64(0, 0, 1, 1)[None], f64(1, 1, 5, 1)[None]
    found = revisions(x0, base, fake, base_negative=negative, guidance_scale=4.5, surrogate=surrogate)
    # guided: negative + 4.5 (base - negative) = (9, 0, 1, 1), at a mean distance of (8 + 1) / 4
    close(found["kl"].direction, [[1, -1, 0, -2]])
    close(found["cfg"].direction, [[7, 0, 0, 0]])
    close(found["reward"].direction, [[-1, 1, 4, 0]])
    close(found["kl"].scale, [2.25])
    close(found["cfg"].scale, [2.25])
    close(found["reward"].scale, [1.0])
    # the surrogate may be asked elsewhere, and the base with it
    elsewhere = revisions(x0, base, fake, surrogate=surrogate, surrogate_base=f64(0, 1, 5, 1)[None])
    close(elsewhere["reward"].direction, [[1, 0, 0, 0]])
    close(elsewhere["reward"].scale, [1.0])
    # without guidance and surrogate: one direction, measured by the base itself
    found = revisions(x0, base, fake)
    assert found.keys() == {"kl"}
    close(found["kl"].scale, [0.5])
    # where there is nothing between, the scale is not 0
    close(revisions(x0, x0, fake)["kl"].scale, [1e-5])


def test_a_revision_pulls_as_far_as_it_points():
    x0 = f64(1, 1, 1, 1)[None].requires_grad_()
    revision = Revision(f64(1, -1, 0, -2)[None], f64(2.25))
    error = revision_error(x0, revision)
    close(error.detach(), [6 / 4 / 2.25])
    # -2 Delta / (D n)
    close(torch.autograd.grad(error.sum(), x0)[0], [[-2 / 9, 2 / 9, 0, 4 / 9]])
    moved = x0.detach() + 5
    close(revision_error(moved, revision), [6 / 4 / 2.25])  # whatever the student is


# -- a KL to hold


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.5, 2.0),  # on target
        (0.55, 2.0 * (1 + 0.1 * 0.1)),
        (0.45, 2.0 * (1 - 0.1 * 0.1)),
        (50.0, 2.0 * (1 + 0.1 * 0.2)),  # clipped
        (0.0, 2.0 * (1 - 0.1 * 0.2)),
        (math.nan, 2.0),
        (math.inf, 2.0),
    ],
)
def test_the_weight_moves_towards_the_target(kl, expected):
    assert next_kl_coef(2.0, kl, target=0.5, rate=0.1) == pytest.approx(expected, rel=1e-12)


def test_the_weight_holds_a_target():
    """On a loss (x - 1)^2 / 2 + c x^2 with gradient descent: x settles where x^2, the divergence, is the target."""
    x, kl_coef, kls = 0.0, 1e-3, []
    for _ in range(400):
        x -= 0.1 * ((x - 1) + 2 * kl_coef * x)
        kls.append(x * x)
        kl_coef = next_kl_coef(kl_coef, kls[-1], target=0.25, rate=0.5)
    assert max(kls) > 0.8  # the weight began too small
    assert kls[-50:] == pytest.approx([0.25] * 50, rel=0.02)
    assert kl_coef == pytest.approx(0.5, rel=0.05)  # (x - 1) + 2 c x = 0 at x = 0.5
