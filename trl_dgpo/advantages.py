r"""
Rewards of a group to advantages, or to preferences within pairs.

A group is the rollouts of one prompt that were drawn together. `NaN` marks a reward that failed: its sample is out of
every statistic and has advantage 0, as if it had not been drawn.
"""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_index: Tensor,
    *,
    scale: str | bool = "group",
    epsilon: float = 1e-4,
    clip: float | None = 5.0,
    recenter_clipped: bool = False,
) -> Tensor:
    r"""
    Centred and scaled reward of each rollout within its group.

    \\( A_i = (r_i - \mathrm{mean}(r)) / (\mathrm{std}(r) + \epsilon) \\) with the population standard deviation (DGPO,
    [2510.08425](https://huggingface.co/papers/2510.08425); the authors' code adds \\( \epsilon = 10^{-4} \\)).
    Since \\( \sum_i A_i = 0 \\), the partition function \\( Z(c) \\) cancels from the group preference; clipping
    breaks that sum for groups of 27 and more, and `recenter_clipped` restores it.

    A group whose valid rewards are all equal has advantages of exactly 0.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Rewards, `NaN` where failed.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each rollout, 0..N-1.
        scale (`str` or `bool`, *optional*, defaults to `"group"`):
            Divide by the standard deviation of the group (`"group"` or `True`), of all valid rewards given (`"batch"`;
            the mean stays the group's), or by nothing (`"none"` or `False`). `"sign"` counts wins minus losses within
            the group instead: GPO's hard-sign ablation ([2505.11070](https://huggingface.co/papers/2505.11070)), of
            sum 0, unlike the sign of \\( A \\).
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Added to the deviation.
        clip (`float` or `None`, *optional*, defaults to `5.0`):
            Bound on \\( |A_i| \\), whatever the scale; `None` for no bound, as in GPO. `"none"` and `"sign"` reach it
            easily: a win over all of a group of 24 counts 23.
        recenter_clipped (`bool`, *optional*, defaults to `False`):
            Subtract the group's mean again after clipping. An advantage may then exceed `clip` by that mean.

    Returns:
        `torch.Tensor` of shape `(B,)`, dtype of `rewards`.

    Raises:
        `ValueError`: for an unknown `scale`.
    """
    scale = {True: "group", False: "none"}.get(scale, scale)
    if scale not in ("group", "batch", "none", "sign"):
        raise ValueError(f"`scale` is {scale!r}; it must be 'group', 'batch', 'none', 'sign', True or False.")
    valid = ~rewards.isnan()
    rewards = rewards.masked_fill(~valid, 0.0)
    centred = _centre(rewards, group_index, valid)
    if scale == "sign":
        rivals = (group_index[:, None] == group_index) & valid[:, None] & valid
        advantages = ((rewards[:, None] - rewards).sign() * rivals).sum(1)
    elif scale == "none":
        advantages = centred
    else:
        pool = group_index if scale == "group" else torch.zeros_like(group_index)
        variance = _group_mean(_centre(rewards, pool, valid).square(), pool, valid)
        advantages = centred / (variance.sqrt() + epsilon)[pool]
    # Equal rewards may leave rounding in the mean; their advantages are 0, not noise over epsilon.
    advantages = advantages.masked_fill(zero_variance(rewards, group_index, valid)[group_index], 0.0)
    if clip is not None:
        clipped = advantages.clamp(-clip, clip)
        advantages = _centre(clipped, group_index, valid) if recenter_clipped else clipped
    return advantages


def preference_pairs(
    rewards: Tensor,
    group_index: Tensor,
    number_in_group: Tensor,
    num_generations: int,
    *,
    selection: str = "max",
) -> Tensor:
    r"""
    Pairs of each group that Diffusion-DPO compares, as the preference of each image over each member of its group.

    \\( p_{ij} = 1 / P_g \\) where image i is preferred to member j in one of the \\( P_g \\) pairs selected from the
    group, \\( -1 / P_g \\) where j is preferred to i, and 0 where they are no pair. So \\( p \\) is antisymmetric
    within the group, the weights of a group's pairs add up to 1, and the sum of a row is the image's advantage: with
    one pair, 1 for the better image and -1 for the worse.

    Images of equal rewards are no pair, nor is one whose reward failed in any. Where rewards tie for a place, the
    image of the lowest number in its group has it; of pairs of equal margin, the one whose better image has the lowest
    number, then that whose worse one has.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Rewards of whole groups, in any order, `NaN` where failed.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each rollout, 0..N-1.
        number_in_group (`torch.Tensor` of shape `(B,)`):
            Number of each rollout within its group, 0..G-1.
        num_generations (`int`):
            G.
        selection (`str`, *optional*, defaults to `"max"`):
            `"max"`: the best against the worst, as in online DPO. `"min"`: the two whose rewards differ least, yet do
            differ. `"all"`: every two whose rewards differ. "max" and "min" are the ends of GPO's check of the pair
            margin ([2505.11070](https://huggingface.co/papers/2505.11070)).

    Returns:
        `torch.Tensor` of shape `(B, G)`, dtype of `rewards`.

    Raises:
        `ValueError`: for an unknown `selection`.
    """
    if selection not in ("max", "min", "all"):
        raise ValueError(f"`selection` is {selection!r}; it must be 'max', 'min' or 'all'.")
    table = rewards.new_full((_count(group_index), num_generations), torch.nan)
    table[group_index, number_in_group] = rewards
    margins = table[:, :, None] - table[:, None]
    wins = margins > 0  # never where one is NaN
    if selection != "all":
        # The first of equal ones, in the order of (better, worse).
        best = margins.where(wins, -torch.inf).flatten(1).argmax(1, keepdim=True)
        closest = margins.where(wins, torch.inf).flatten(1).argmin(1, keepdim=True)
        chosen = torch.zeros_like(wins.flatten(1)).scatter(1, best if selection == "max" else closest, True)
        wins = wins & chosen.view_as(wins)
    preferences = wins.to(rewards.dtype) - wins.mT.to(rewards.dtype)
    preferences = preferences / wins.sum((1, 2)).clamp(min=1)[:, None, None]
    return preferences[group_index, number_in_group]


def normalize_then_sum(
    rewards: Tensor, weights: list[float], group_index: Tensor, valid: Tensor, *, epsilon: float = 1e-4
) -> Tensor:
    r"""
    Several rewards as one, each on the scale of its own spread within the group.

    \\( \tilde r_i = \sum_k w_k (r_{ki} - \mathrm{mean}(r_k)) / (\mathrm{std}(r_k) + \epsilon) \\), mean and population
    standard deviation over the group's valid samples that reward k applies to (GDPO's decoupled normalisation,
    [2601.05242](https://huggingface.co/papers/2601.05242)). A reward weighs what its weight says, whatever its unit
    and spread. It adds 0 where it does not apply and where it holds no preference, so that the sum over a group is 0.

    What is left out, against TRL and the paper: the division of the result by its deviation over the batch, which is
    [`group_advantages`] with `scale="batch"`. TRL takes the sample's standard deviation.

    Args:
        rewards (`torch.Tensor` of shape `(K, B)`):
            Each reward, `NaN` where it does not apply.
        weights (`list[float]`):
            Weight of each reward.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each rollout, 0..N-1.
        valid (`torch.Tensor` of shape `(B,)`):
            Mask of the samples that count: those of which no reward failed.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Added to the deviations.

    Returns:
        `torch.Tensor` of shape `(B,)`, `NaN` where not valid: rewards for [`group_advantages`].
    """
    total = rewards.new_zeros(len(group_index))
    for values, weight in zip(rewards, weights, strict=True):
        counts = valid & ~values.isnan()
        centred = _centre(values, group_index, counts)
        deviation = _group_mean(centred.square(), group_index, counts).sqrt()
        # Equal rewards may leave rounding in the mean, which over epsilon would be noise.
        flat = zero_variance(values, group_index, counts)
        total += weight * (centred / (deviation + epsilon)[group_index]).masked_fill(flat[group_index], 0.0)
    return total.masked_fill(~valid, torch.nan)


def zero_variance(rewards: Tensor, group_index: Tensor, valid: Tensor | None = None) -> Tensor:
    """
    Groups that hold no preference: largest and smallest valid reward are equal, or fewer than two are valid.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Rewards, `NaN` where failed.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each rollout, 0..N-1.
        valid (`torch.Tensor` of shape `(B,)`, *optional*):
            Mask of the rewards that count; those that are not `NaN` if not given.

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.
    """
    valid = ~rewards.isnan() if valid is None else valid
    infinity = torch.full((_count(group_index),), torch.inf, dtype=rewards.dtype, device=rewards.device)
    highest = (-infinity).scatter_reduce(0, group_index, rewards.masked_fill(~valid, -torch.inf), "amax")
    lowest = infinity.scatter_reduce(0, group_index, rewards.masked_fill(~valid, torch.inf), "amin")
    return highest <= lowest


def _centre(values: Tensor, group_index: Tensor, valid: Tensor) -> Tensor:
    return (values - _group_mean(values, group_index, valid)[group_index]).masked_fill(~valid, 0.0)


def _group_mean(values: Tensor, group_index: Tensor, valid: Tensor) -> Tensor:
    zeros = values.new_zeros(_count(group_index))
    total = zeros.index_add(0, group_index, values.masked_fill(~valid, 0.0))
    return total / zeros.index_add(0, group_index, valid.to(values.dtype)).clamp(min=1)


def _count(group_index: Tensor) -> int:
    return int(group_index.max()) + 1 if len(group_index) else 0
