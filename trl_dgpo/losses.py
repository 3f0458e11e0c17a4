r"""
The objectives, as functions of denoising errors.

One convention: `error` is `(B,)`, the mean over latent elements of a squared prediction error, smaller for a likelier
sample; a `loss` is a scalar to minimise. With advantages \\( A_i \\) of sum 0 in each group, the score

\\( s_g = \frac{\beta}{G_g} \sum_{i \in g} A_i \, (d_i - d_i^{\mathrm{ref}}) \\)

is negative where the policy denoises the better rollouts of group \\( g \\) better than the reference does, and \\(
-\log \sigma(-s_g) \\) is the group preference objective of DGPO
([2510.08425](https://huggingface.co/papers/2510.08425), Eq. 17). \\( \sigma(s_g) \\) is called the gate: it closes as
the preference is learned.

Departures from the paper, as in the authors' released code: errors are in the network's own prediction space
(velocity), averaged over latent elements and over the group, with time weight 1. The paper multiplies sums of squared
x0-errors over group and \\( D \\) latent elements; its \\( \beta' \\) is \\( \beta = \beta' G D \sigma^2 \\) here,
since the squared x0-error is \\( \sigma^2 \\) times that of the velocity.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupLoss(NamedTuple):
    """
    A group objective and what it was made of.

    Args:
        loss (`torch.Tensor`):
            Scalar with gradient.
        objective (`torch.Tensor`):
            Scalar without gradient: mean over groups of \\( -\\log \\sigma(-s_g) \\) (for linear GPO, of the group's
            weighted error).
        score (`torch.Tensor` of shape `(N,)`):
            \\( s_g \\), without gradient.
        gate (`torch.Tensor` of shape `(N,)`):
            \\( \\sigma(s_g) \\), without gradient; 1 for linear GPO, which has none.
    """

    loss: Tensor
    objective: Tensor
    score: Tensor
    gate: Tensor


class PairLoss(NamedTuple):
    """
    A pairwise objective and what it was made of.

    Args:
        loss (`torch.Tensor`):
            Scalar with gradient.
        objective (`torch.Tensor`):
            Scalar without gradient: mean over groups of the mean over the group's pairs of \\( -\\log \\sigma(-s)
            \\).
        score (`torch.Tensor` of shape `(B, G)`):
            \\( s_{ij} \\) of each image against each member of its group, without gradient. It has a meaning only
            where there is a pair.
    """

    loss: Tensor
    objective: Tensor
    score: Tensor


class PolicyGradientLoss(NamedTuple):
    """
    A clipped policy-gradient loss and what it was made of.

    Args:
        loss (`torch.Tensor`):
            Scalar with gradient.
        ratio (`torch.Tensor` of shape `(B,)`):
            Probability of each sample's step over that at sampling time, without gradient.
        clipped (`torch.Tensor` of shape `(B,)`):
            Mask of the samples that the clip takes the gradient from.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class Revision(NamedTuple):
    """
    Where clean latents should move, and what the move is measured by.

    Args:
        direction (`torch.Tensor` of shape `(B, ...)`):
            The move, without gradient.
        scale (`torch.Tensor` of shape `(B,)`):
            What its squared error is divided by.
    """

    direction: Tensor
    scale: Tensor


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    r"""
    Denoising error of each sample, \\( d_i = \mathrm{mean} (v_\theta(x_t, \sigma, c) - v)^2 \\) over latent elements.

    The mean, not the sum: \\( \beta \\) and the clip range have meaning only with this choice.

    Args:
        prediction (`torch.Tensor` of shape `(B, ...)`):
            The network's prediction, of any float dtype.
        target (`torch.Tensor` of shape `(B, ...)`):
            What it should predict.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def clip_errors(errors: Tensor, old_errors: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    r"""
    Detach the errors of samples that have already moved far enough from the old policy.

    With \\( \rho_i = \exp(d_i^{\mathrm{old}} - d_i) \\), a sample is clipped iff \\( A_i > 0 \\) and \\( \rho_i > 1 +
    c \\), or \\( A_i \le 0 \\) and \\( \rho_i < 1 - c \\). It keeps its value, hence its part in the group's score,
    and loses its gradient. From the authors' released code; the paper has no clip.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The policy's errors.
        old_errors (`torch.Tensor` of shape `(B,)`):
            The old policy's errors at the same noise and level.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages.
        clip_range (`float`):
            \\( c \\). Errors are means over latent elements and move by 1e-3 to 1e-2, so useful values are 1e-5 to
            5e-2.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B,)`: the errors, and the bool mask of the clipped ones.
    """
    ratio = torch.exp(old_errors - errors.detach())
    clipped = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return torch.where(clipped, errors.detach(), errors), clipped


def clip_drifted(
    errors: Tensor, base_errors: Tensor, advantages: Tensor, divergence: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    r"""
    Detach the errors of samples that have gone far from the base, and in the right direction.

    A sample is detached iff \\( \mathrm{mean} (v - v_{\mathrm{base}})^2 > l \\) and it has improved already: \\( A_i >
    0 \\) and \\( d_i < d_i^{\mathrm{base}} \\), or \\( A_i \le 0 \\) and \\( d_i > d_i^{\mathrm{base}} \\). As with
    [`clip_errors`] it keeps its value. It is TDM-R1's second clip
    ([2603.07700](https://huggingface.co/papers/2603.07700), released code), with one departure: the divergence is the
    sample's own, there it is the batch's mean, so that here no division into batches changes anything.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The trained model's errors.
        base_errors (`torch.Tensor` of shape `(B,)`):
            The frozen base's errors at the same noise and level.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages.
        divergence (`torch.Tensor` of shape `(B,)`):
            Mean squared difference of the two predictions.
        limit (`float`):
            \\( l > 0 \\).

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B,)`: the errors, and the bool mask of the detached ones.
    """
    improved = torch.where(advantages > 0, errors.detach() < base_errors, errors.detach() > base_errors)
    drifted = improved & (divergence.detach() > limit)
    return torch.where(drifted, errors.detach(), errors), drifted


def group_scores(
    errors: Tensor,
    reference_errors: Tensor,
    advantages: Tensor,
    group_index: Tensor,
    *,
    beta: float,
    group_sizes: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    r"""
    Score of each group, \\( s_g = \frac{\beta}{G_g} \sum_{i \in g} A_i (d_i - d_i^{\mathrm{ref}}) \\).

    A plain sum over samples: with `group_sizes` given, the scores of the parts of a group (micro-batches, processes)
    add up to the score of the whole.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The policy's errors.
        reference_errors (`torch.Tensor` of shape `(B,)`):
            The reference's errors at the same noise and level.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 for a masked sample.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each sample, 0..N-1.
        beta (`float`):
            Sharpness of the gate.
        group_sizes (`torch.Tensor` of shape `(N,)`, *optional*):
            Valid samples of each whole group. Counted from `group_index` if not given, which is right only where every
            group is whole and no sample is masked.
        num_groups (`int`, *optional*):
            N. The largest index plus 1 if not given.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    weights = _sample_weights(advantages.to(errors.dtype), group_index, group_sizes, num_groups)
    scores = errors.new_zeros(_num_groups(group_index, group_sizes, num_groups))
    return beta * scores.index_add(0, group_index, weights * (errors - reference_errors))


def dgpo_loss(
    errors: Tensor,
    reference_errors: Tensor,
    advantages: Tensor,
    group_index: Tensor,
    *,
    beta: float,
    group_sizes: Tensor | None = None,
    num_groups: int | None = None,
    scores: Tensor | None = None,
    loss_type: str = "surrogate",
) -> GroupLoss:
    r"""
    DGPO's loss ([2510.08425](https://huggingface.co/papers/2510.08425), Eq. 17, in the released code's normalisation).

    `"surrogate"`: \\( \frac{1}{N} \sum_g \frac{1}{G_g} \sum_{i \in g} \sigma(s_g) A_i d_i \\) with the gate \\(
    \sigma(s_g) \\) held constant. Its gradient is exactly \\( 1 / \beta \\) times that of `"logsigmoid"`, \\(
    \frac{1}{N} \sum_g -\log \sigma(-s_g) \\). So \\( \beta \\) shapes the gate alone, and learning rate, gradient
    clipping and KL weight keep their meaning whatever it is. The surrogate's value is near 0 and says nothing; watch
    `objective`.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The policy's errors, after `clip_errors` where clipping is on.
        reference_errors (`torch.Tensor` of shape `(B,)`):
            The reference's errors at the same noise and level.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 for a masked sample.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each sample, 0..N-1.
        beta (`float`):
            Sharpness of the gate.
        group_sizes (`torch.Tensor` of shape `(N,)`, *optional*):
            Valid samples of each whole group; needed where a group is split or a sample is masked.
        num_groups (`int`, *optional*):
            N, skipped groups included.
        scores (`torch.Tensor` of shape `(N,)`, *optional*):
            Scores of the whole groups, where `errors` holds only parts of them. The gate is then theirs; the gradients
            of the parts add up to that of the whole. `"logsigmoid"` has the value of the whole in every part.
        loss_type (`str`, *optional*, defaults to `"surrogate"`):
            `"surrogate"` or `"logsigmoid"`.

    Returns:
        [`GroupLoss`].

    Raises:
        `ValueError`: for an unknown `loss_type`.
    """
    sizes = {"group_sizes": group_sizes, "num_groups": num_groups}
    part = group_scores(errors, reference_errors, advantages, group_index, beta=beta, **sizes)
    score = part.detach() if scores is None else scores.detach()
    gate = score.sigmoid()
    objective = F.softplus(score).mean()  # -log sigmoid(-s) = softplus(s)
    if loss_type == "surrogate":
        weights = _sample_weights(advantages.to(errors.dtype), group_index, group_sizes, num_groups)
        loss = (gate[group_index] * weights * errors).sum() / len(gate)
    elif loss_type == "logsigmoid":
        # The whole's value, the part's gradient.
        loss = F.softplus(score + part - part.detach()).mean()
    else:
        raise ValueError(f"`loss_type` is {loss_type!r}; DGPO has 'surrogate' and 'logsigmoid'.")
    return GroupLoss(loss, objective, score, gate)


def gpo_loss(
    errors: Tensor,
    reference_errors: Tensor | None = None,
    advantages: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    loss_type: str = "linear",
    beta: float = 1.0,
    group_sizes: Tensor | None = None,
    num_groups: int | None = None,
    scores: Tensor | None = None,
) -> GroupLoss:
    r"""
    GPO's loss ([2505.11070](https://huggingface.co/papers/2505.11070), Eq. 5, in our reading).

    `"linear"`: \\( \frac{1}{N} \sum_g \frac{1}{G_g} \sum_{i \in g} A_i (d_i - d_i^{\mathrm{ref}}) \\), what remains of
    all pairwise Diffusion-DPO scores of a group weighted by their reward differences: \\( \sum_{i<j} (r_i - r_j)(s_i -
    s_j) = G \sum_i (r_i - \bar r) s_i \\). The reference has no gradient here, so `reference_errors` may be left out,
    and then only the value changes. `"logsigmoid"` puts the same sum, times \\( \beta \\), into \\( -\log \sigma(-s_g)
    \\): DGPO's objective. The paper's time weight is not known to us; it is 1.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The policy's errors.
        reference_errors (`torch.Tensor` of shape `(B,)`, *optional*):
            The reference's errors; needed by `"logsigmoid"`.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 for a masked sample.
        group_index (`torch.Tensor` of shape `(B,)`, *optional*):
            Group of each sample, 0..N-1; one group if not given.
        loss_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"logsigmoid"`.
        beta (`float`, *optional*, defaults to `1.0`):
            Sharpness of the gate of `"logsigmoid"`.
        group_sizes, num_groups, scores:
            As in [`dgpo_loss`].

    Returns:
        [`GroupLoss`].

    Raises:
        `ValueError`: for an unknown `loss_type`, or without `advantages`, or `"logsigmoid"` without
        `reference_errors`.
    """
    if advantages is None:
        raise ValueError("`advantages` must be given: they are the weights of the errors.")
    if group_index is None:
        group_index = torch.zeros(len(errors), dtype=torch.long, device=errors.device)
    sizes = {"group_sizes": group_sizes, "num_groups": num_groups}
    if loss_type == "logsigmoid":
        if reference_errors is None:
            raise ValueError(
                "`reference_errors` must be given with `loss_type='logsigmoid'`: the gate depends on them."
            )
        return dgpo_loss(
            errors, reference_errors, advantages, group_index, beta=beta, scores=scores, loss_type=loss_type, **sizes
        )
    if loss_type != "linear":
        raise ValueError(f"`loss_type` is {loss_type!r}; GPO has 'linear' and 'logsigmoid'.")
    if reference_errors is None:
        reference_errors = torch.zeros_like(errors)
    part = group_scores(errors, reference_errors, advantages, group_index, beta=1.0, **sizes)
    score = part.detach() if scores is None else scores.detach()
    return GroupLoss(part.mean(), score.mean(), score, torch.ones_like(score))


def diffusion_dpo_loss(
    errors_w: Tensor, reference_errors_w: Tensor, errors_l: Tensor, reference_errors_l: Tensor, *, beta: float
) -> Tensor:
    r"""
    Diffusion-DPO's loss ([2311.12908](https://huggingface.co/papers/2311.12908), Eq. 14), with the authors' 1/2.

    \\( -\log \sigma(-\frac{\beta}{2} [(d_w - d_w^{\mathrm{ref}}) - (d_l - d_l^{\mathrm{ref}})]) \\), averaged over
    pairs. It equals DGPO's objective with groups of two and advantages 1 and -1.

    Args:
        errors_w, reference_errors_w (`torch.Tensor` of shape `(P,)`):
            Errors of the preferred samples under policy and reference.
        errors_l, reference_errors_l (`torch.Tensor` of shape `(P,)`):
            Errors of the other samples of each pair, at the same noise and level.
        beta (`float`):
            Strength of the reference.

    Returns:
        `torch.Tensor`, scalar.
    """
    difference = (errors_w - reference_errors_w) - (errors_l - reference_errors_l)
    return F.softplus(beta / 2 * difference).mean()


def pairwise_dpo_loss(
    errors: Tensor,
    reference_errors: Tensor,
    preferences: Tensor,
    group_index: Tensor,
    number_in_group: Tensor,
    *,
    beta: float,
    num_groups: int | None = None,
    excess: Tensor | None = None,
    loss_type: str = "surrogate",
) -> PairLoss:
    r"""
    Diffusion-DPO's loss ([2311.12908](https://huggingface.co/papers/2311.12908), Eq. 14) of pairs within groups.

    With the excess of an error over the reference's, \\( e_i = d_i - d_i^{\mathrm{ref}} \\), and scores \\( s_{ij} =
    \frac{\beta}{2} (e_i - e_j) \\), `"logsigmoid"` is \\( \frac{1}{N} \sum_g \frac{1}{P_g} \sum_{(w, l) \in g} -\log
    \sigma(-s_{wl}) \\): [`diffusion_dpo_loss`] of each pair, its mean over the \\( P_g \\) pairs of a group and then
    over groups. A group without a pair adds 0, but is one of the N.

    `"surrogate"` is \\( \frac{1}{N} \sum_g \frac{1}{2} \sum_{i \in g} c_i d_i \\), \\( c_i = \frac{1}{P_g} \sum_j
    \pm\sigma(\pm s_{ij}) \\) over i's pairs, with plus where i is preferred and minus where j is, and \\( c_i \\) held
    constant. Its gradient is exactly \\( 1 / \beta \\) times that of `"logsigmoid"`, as in [`dgpo_loss`], to which
    both are equal for groups of two with advantages 1 and -1.

    The losses, objectives and gradients of parts of a group (micro-batches, processes) add up to those of the whole:
    half of a pair's value stands with each of its two images.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            The policy's errors.
        reference_errors (`torch.Tensor` of shape `(B,)`):
            The reference's errors at the same noise and level.
        preferences (`torch.Tensor` of shape `(B, G)`):
            Preference of each image over each member of its group, from
            [`~trl_dgpo.advantages.preference_pairs`].
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each sample, 0..N-1.
        number_in_group (`torch.Tensor` of shape `(B,)`):
            Number of each sample within its group, 0..G-1.
        beta (`float`):
            Strength of the reference.
        num_groups (`int`, *optional*):
            N, groups without a pair included. The largest index plus 1 if not given.
        excess (`torch.Tensor` of shape `(N, G)`, *optional*):
            \\( e \\) of the whole groups, where `errors` may lack a member of a pair. If not given, those of the
            samples that are here.
        loss_type (`str`, *optional*, defaults to `"surrogate"`):
            `"surrogate"` or `"logsigmoid"`.

    Returns:
        [`PairLoss`].

    Raises:
        `ValueError`: for an unknown `loss_type`.
    """
    num_groups = _num_groups(group_index, None, num_groups)
    own = errors - reference_errors
    if excess is None:
        excess = own.new_zeros(num_groups, preferences.shape[1])
        excess[group_index, number_in_group] = own.detach()
    excess, preferences = excess.detach().to(errors.dtype), preferences.to(errors.dtype)
    score = beta / 2 * (excess[group_index, number_in_group][:, None] - excess[group_index])
    sign, weights = preferences.sign(), preferences.abs() / num_groups
    objective = (weights * F.softplus(sign * score)).sum() / 2  # -log sigmoid(-s) = softplus(s)
    if loss_type == "surrogate":
        coefficients = (sign * weights * (sign * score).sigmoid()).sum(1)
        loss = (coefficients * errors).sum() / 2
    elif loss_type == "logsigmoid":
        # Half of a pair's value, but the whole of the gradient that it has through this image: the other image's
        # excess is a constant here, as this one's is in the other's row.
        moving = (weights * F.softplus(sign * (score + beta / 2 * (own - own.detach())[:, None]))).sum()
        loss = moving - moving.detach() + objective
    else:
        raise ValueError(f"`loss_type` is {loss_type!r}; Diffusion-DPO has 'surrogate' and 'logsigmoid'.")
    return PairLoss(loss, objective, score)


def step_log_prob(errors: Tensor, velocity_coefficient: float, std: float) -> Tensor:
    r"""
    Log-probability of a stochastic step, from the error of the predicted velocity.

    The step's mean \\( \mu = a x + b v \\) is affine in the velocity, so that with \\( v^* = (x' - a x) / b \\), the
    velocity that would have led exactly to where the step went, \\( x' - \mu = b (v^* - v) \\) and

    \\( \log p(x' | x) = -\frac{b^2}{2\,\mathrm{std}^2} \, d - \log \mathrm{std} - \tfrac12 \log 2\pi, \quad d =
    \mathrm{mean}(v - v^*)^2 \\).

    A mean over latent elements where a density has their sum, as in Flow-GRPO's code: the clip range has meaning only
    with this choice.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            \\( d \\), the [`denoising_error`] against \\( v^* \\).
        velocity_coefficient (`float`):
            \\( b \\).
        std (`float`):
            Standard deviation of the step.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return -((velocity_coefficient / std) ** 2) / 2 * errors - math.log(std * math.sqrt(2 * math.pi))


def step_kl(divergence: Tensor, velocity_coefficient: float, diffusion: float) -> Tensor:
    r"""
    Flow-GRPO's KL term of a stochastic step, \\( \mathrm{mean}(\mu - \mu_{\mathrm{ref}})^2 / 2 s^2 = \frac{b^2}{2
    s^2} \, \mathrm{mean}(v - v_{\mathrm{ref}})^2 \\).

    As in the authors' code it divides by the square of the diffusion \\( s \\), not by that of the step's deviation
    \\( s \sqrt{\sigma - \sigma'} \\): it is the KL divergence of the two steps times \\( \sigma - \sigma' \\).

    Args:
        divergence (`torch.Tensor` of shape `(B,)`):
            Mean squared difference of the velocities of policy and reference.
        velocity_coefficient (`float`):
            \\( b \\).
        diffusion (`float`):
            \\( s \\).

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return (velocity_coefficient / diffusion) ** 2 / 2 * divergence


def flow_grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    group_index: Tensor,
    *,
    clip_range: float | None,
    group_sizes: Tensor | None = None,
    num_groups: int | None = None,
) -> PolicyGradientLoss:
    r"""
    Flow-GRPO's loss ([2505.05470](https://huggingface.co/papers/2505.05470), Eq. 5): PPO's, over the steps of the
    sampler.

    \\( \frac{1}{N} \sum_g \frac{1}{G_g} \sum_{i \in g} \max(-A_i \rho_i,\, -A_i \,\mathrm{clip}(\rho_i, 1 - c, 1 +
    c)) \\) with \\( \rho_i = \exp(\log p_\theta - \log p_{\mathrm{old}}) \\).

    Args:
        log_probs (`torch.Tensor` of shape `(B,)`):
            Log-probability of each sample's step, see [`step_log_prob`].
        old_log_probs (`torch.Tensor` of shape `(B,)`):
            The same when it was sampled.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 for a masked sample.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each sample, 0..N-1.
        clip_range (`float`, *optional*):
            \\( c \\). Log-probabilities are means over latent elements, so useful values are 1e-5 to 1e-2. `None` for
            no clip.
        group_sizes, num_groups:
            As in [`dgpo_loss`].

    Returns:
        [`PolicyGradientLoss`].
    """
    ratio = (log_probs - old_log_probs).exp()
    weights = _sample_weights(advantages.to(ratio.dtype), group_index, group_sizes, num_groups)
    losses, clipped = -weights * ratio, torch.zeros_like(ratio, dtype=torch.bool)
    if clip_range is not None:
        losses = torch.maximum(losses, -weights * ratio.clamp(1 - clip_range, 1 + clip_range))
        passed = ratio.detach()
        clipped = ((weights > 0) & (passed > 1 + clip_range)) | ((weights < 0) & (passed < 1 - clip_range))
    loss = losses.sum() / _num_groups(group_index, group_sizes, num_groups)
    return PolicyGradientLoss(loss, ratio.detach(), clipped)


def revisions(
    x0: Tensor,
    base: Tensor,
    fake: Tensor,
    *,
    base_negative: Tensor | None = None,
    guidance_scale: float = 1.0,
    surrogate: Tensor | None = None,
    surrogate_base: Tensor | None = None,
) -> dict[str, Revision]:
    r"""
    In which directions TDM-R1 ([2603.07700](https://huggingface.co/papers/2603.07700)) moves the clean latents that a
    few-step student predicts.

    All are clean latents: \\( \hat x_0 \\) the student's, the others those that a model predicts where the student's
    step led, noised on; for the surrogate and the base beside it that may be another noise at another level.

    - `"kl"`: \\( \hat x^{\mathrm{base}} - \hat x^{\mathrm{fake}} \\), from what the student draws to what the base
      would, where the fake score has learned what the student draws;
    - `"cfg"`: \\( (w - 1) (\hat x^{\mathrm{base}} - \hat x^{\mathrm{base}}_\varnothing) \\), what guidance of scale
      \\( w \\) adds;
    - `"reward"`: \\( \hat x^{\mathrm{surrogate}} - \hat x^{\mathrm{base}} \\), to what the surrogate would draw, which
      has learned the preference.

    The first two have the scale \\( \mathrm{mean} |\hat x_0 - \hat x^{\mathrm{base}}_w| \\) with the guided base, the
    last \\( \mathrm{mean} |\hat x_0 - \hat x^{\mathrm{surrogate}}| \\), each a sample's own and at least 1e-5.

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            The student's.
        base (`torch.Tensor` of shape `(B, ...)`), fake (`torch.Tensor` of shape `(B, ...)`):
            Those of the frozen base and of the fake score, without guidance.
        base_negative (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The base's for the negative prompt; without it there is no `"cfg"`.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            \\( w \\).
        surrogate (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The surrogate's, guided where its guidance is wanted too; without it there is no `"reward"`.
        surrogate_base (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The base's without guidance, where the surrogate's is taken; `base` if not given.

    Returns:
        `dict[str, Revision]`, by the names above.
    """
    guided = base
    if base_negative is not None:
        guided = base_negative + guidance_scale * (base - base_negative)
    scale = _mean_distance(x0, guided)
    directions = {"kl": Revision(base - fake, scale)}
    if base_negative is not None:
        directions["cfg"] = Revision(guided - base, scale)
    if surrogate is not None:
        there = base if surrogate_base is None else surrogate_base
        directions["reward"] = Revision(surrogate - there, _mean_distance(x0, surrogate))
    return directions


def revision_error(x0: Tensor, revision: Revision) -> Tensor:
    r"""
    Error whose gradient moves a student's clean latents in a direction, \\( \mathrm{mean} (\hat x_0 -
    \mathrm{sg}[\hat x_0 + \Delta])^2 / n \\), of each sample.

    Its value says how far there is to go, and nothing of how far the student has come: the target goes before it.

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            The student's, with gradient.
        revision ([`Revision`]):
            \\( \Delta \\) and \\( n \\).

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return denoising_error(x0, x0.detach() + revision.direction) / revision.scale


def group_mean(
    values: Tensor, group_index: Tensor, *, group_sizes: Tensor | None = None, num_groups: int | None = None
) -> Tensor:
    r"""
    Mean over groups of the mean over samples, \\( \frac{1}{N} \sum_g \frac{1}{G_g} \sum_{i \in g} x_i \\).

    The same weighting as the group losses, for a term that stands beside them: with \\( x_i = \mathrm{mean}(v_\theta -
    v_{\mathrm{ref}})^2 \\), the denoising error of the policy against the frozen base, it is the KL term. Masked
    samples must be given as 0 and left out of `group_sizes`.

    Args:
        values (`torch.Tensor` of shape `(B,)`):
            One value a sample.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each sample, 0..N-1.
        group_sizes, num_groups:
            As in [`dgpo_loss`].

    Returns:
        `torch.Tensor`, scalar.
    """
    weights = _sample_weights(torch.ones_like(values), group_index, group_sizes, num_groups)
    return (weights * values).sum() / _num_groups(group_index, group_sizes, num_groups)


def next_kl_coef(kl_coef: float, kl: float, *, target: float, rate: float) -> float:
    r"""
    Weight of the KL term after one step towards a target.

    \\( \beta_{t+1} = \beta_t (1 + K \, e_t) \\) with \\( e_t = \mathrm{clip}((\mathrm{KL}_t - \mathrm{KL}^*) /
    \mathrm{KL}^*, -0.2, 0.2) \\): Ziegler et al., Fine-Tuning Language Models from Human Preferences
    ([1909.08593](https://huggingface.co/papers/1909.08593)), Section 2.2, with \\( K = 0.1 \\) there.

    Args:
        kl_coef (`float`):
            The weight, above 0.
        kl (`float`):
            What was measured with it. Where it is no finite number, the weight stays.
        target (`float`):
            What it should be, above 0.
        rate (`float`):
            \\( K \\), in (0, 5): a step changes the weight by at most \\( 0.2 K \\) times itself.

    Returns:
        `float`.
    """
    if not math.isfinite(kl):
        return kl_coef
    return kl_coef * (1 + rate * min(max((kl - target) / target, -0.2), 0.2))


def _mean_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1).clamp(min=1e-5)


def _sample_weights(values: Tensor, group_index: Tensor, group_sizes: Tensor | None, num_groups: int | None) -> Tensor:
    # A group without a valid sample has size 0 and only zero values: any divisor will do.
    if group_sizes is None:
        group_sizes = torch.bincount(group_index, minlength=_num_groups(group_index, None, num_groups))
    return values / group_sizes.to(values.dtype).clamp(min=1)[group_index]


def _num_groups(group_index: Tensor, group_sizes: Tensor | None, num_groups: int | None) -> int:
    if num_groups is not None:
        return num_groups
    return len(group_sizes) if group_sizes is not None else int(group_index.max()) + 1
