"""Diffusion-DPO: DGPO's rounds with pairs in place of groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..advantages import preference_pairs
from ..backbones import to_device
from ..losses import pairwise_dpo_loss
from ..rollout import Preferences
from .dgpo_trainer import DGPOTrainer, Fixed, MicroBatch, Part
from .diffusion_dpo_config import DiffusionDPOConfig


class DiffusionDPOTrainer(DGPOTrainer):
    r"""
    Trainer for Diffusion-DPO of text-to-image diffusion models, introduced in
    [Diffusion Model Alignment Using Direct Preference Optimization](https://huggingface.co/papers/2311.12908).

    Online, pairs are chosen from groups of the policy's own images by their rewards (`pair_selection`); offline they
    come with the data set. It differs from [`DGPOTrainer`] in that choice and in the loss
    ([`~trl_dgpo.losses.pairwise_dpo_loss`]): the images of a pair are compared with one another alone, and the others
    are not trained on.

    Departures from the paper: pairs can be the policy's own images, the error is that of the velocity, and a level is
    shared by all pairs of a pass. As in the paper, the two images of a pair are noised alike.

    The log has, as means over pairs, `objective` (log 2 where the policy is the reference), `gate_mean`,
    `rewards/accuracies` (share of the pairs whose better image the policy prefers, more than the reference does) and
    `rewards/margins` (by how much, \\( \frac{\beta}{2} (e_l - e_w) \\)): TRL's names, which mean the rewards that are
    implicit in the policy. Of each round it has `num_pairs` and `pair_margin`, the difference of a pair's own rewards,
    averaged over groups with pairs.

    Args: as [`DGPOTrainer`], with `args` a [`DiffusionDPOConfig`].
    """

    _tag_names = ["trl", "diffusion-dpo", "text-to-image", "diffusers"]
    _name = "Diffusion-DPO"
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": (
            "@inproceedings{wallace2024diffusion,\n"
            "    title  = {{Diffusion Model Alignment Using Direct Preference Optimization}},\n"
            "    author = {Bram Wallace and others},\n"
            "    year   = 2024,\n"
            "    booktitle = {Conference on Computer Vision and Pattern Recognition},\n"
            "}"
        ),
    }
    _config_class = DiffusionDPOConfig
    _record_type = Preferences

    def _advantages(self, rewards: Tensor, group_index: Tensor) -> dict[str, Tensor]:
        numbers = self._gather(self._number_in_group)
        preferences = preference_pairs(
            rewards, group_index, numbers, self.args.num_generations, selection=self.args.pair_selection
        )
        # The weights of a group's pairs add up to 1, and an image's to its advantage.
        advantages = preferences.sum(1)
        total = (advantages * rewards.nan_to_num(0.0)).sum()
        self._metrics["pair_margin"].append((total / preferences.clamp(min=0).sum()).item())
        self._metrics["num_pairs"].append((preferences > 0).sum().item())
        return {"advantages": advantages, "preferences": preferences}

    def _moves(self, rollout: Preferences) -> Tensor:
        # Not by the advantage, which is 0 too where wins and losses are equally many.
        return (rollout.preferences != 0).any(1)

    def _micro_batches(self, part: Part) -> list[_PairBatch]:
        preferences = to_device(part.rollout.preferences, self.args.device)
        numbers = to_device(part.rollout.number_in_group, self.args.device)
        return [
            _PairBatch(
                **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)},
                preferences=preferences[batch.rows],
                number_in_group=numbers[batch.rows],
            )
            for batch in super()._micro_batches(part)
        ]

    def _whole_scores(self, part: Part, errors: Tensor, reference_errors: Tensor) -> tuple[Tensor, None]:
        """Excess errors of the part's groups over all micro-batches and processes, `(levels, groups, G)`."""
        args = self.args
        excess = torch.zeros(len(errors), args.groups_per_update, args.num_generations, device=args.device)
        numbers = to_device(part.rollout.number_in_group, args.device)
        excess[:, part.first_group + part.group_index, numbers] = errors - reference_errors
        if args.is_group_shared:
            excess = self.accelerator.reduce(excess, "sum")
        return excess[:, part.first_group : part.first_group + part.rollout.num_groups], None

    def _preference_loss(self, errors: Tensor, part: Part, fixed: Fixed, batch: _PairBatch, level: int) -> Tensor:
        pairs = pairwise_dpo_loss(
            errors,
            fixed.reference_errors[level, batch.rows],
            batch.preferences,
            batch.group_index,
            batch.number_in_group,
            beta=self.args.beta,
            num_groups=batch.sizes["num_groups"],
            excess=None if fixed.scores is None else fixed.scores[level, batch.groups],
            loss_type=self.args.loss_type,
        )
        # A pair is counted with its better image, wherever the other one is.
        is_pair = batch.preferences > 0
        for name, values in {
            "objective": softplus(pairs.score),
            "gate_mean": pairs.score.sigmoid(),
            "rewards/accuracies": (pairs.score < 0).float(),
            "rewards/margins": -pairs.score,
        }.items():
            self._metrics[name].append(values.where(is_pair, torch.nan).flatten())
        return batch.share * pairs.loss


@dataclass(frozen=True)
class _PairBatch(MicroBatch):
    """A micro-batch and what its images are preferred to, on the device."""

    preferences: Tensor
    number_in_group: Tensor
