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
    margin = (errors_w - reference_errors_w) - (errors_l - reference_errors_l)
    return F.softplus(beta / 2 * margin).mean()


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


def _sample_weights(values: Tensor, group_index: Tensor, group_sizes: Tensor | None, num_groups: int | None) -> Tensor:
    # A group without a valid sample has size 0 and only zero values: any divisor will do.
    if group_sizes is None:
        group_sizes = torch.bincount(group_index, minlength=_num_groups(group_index, None, num_groups))
    return values / group_sizes.to(values.dtype).clamp(min=1)[group_index]


def _num_groups(group_index: Tensor, group_sizes: Tensor | None, num_groups: int | None) -> int:
    if num_groups is not None:
        return num_groups
    return len(group_sizes) if group_sizes is not None else int(group_index.max()) + 1
