"""GPO: DGPO's rounds with another group loss."""

from __future__ import annotations

from torch import Tensor

from ..losses import GroupLoss, gpo_loss
from .dgpo_trainer import DGPOTrainer
from .gpo_config import GPOConfig


class GPOTrainer(DGPOTrainer):
    r"""
    Trainer for Group Preference Optimization (GPO) of text-to-image diffusion models, introduced in
    [Towards Self-Improvement of Diffusion Models via Group Preference
    Optimization](https://huggingface.co/papers/2505.11070).

    It differs from [`DGPOTrainer`] in its configuration ([`GPOConfig`]: all levels, several passes, a reference that
    is refreshed every round) and in one function, the group loss ([`~trl_dgpo.losses.gpo_loss`]). With the linear loss
    no reference is computed at all, since it has no gradient.

    Args: as [`DGPOTrainer`], with `args` a [`GPOConfig`].
    """

    _tag_names = ["trl", "gpo", "text-to-image", "diffusers"]
    _name = "GPO"
    _paper = {
        "title": "Towards Self-Improvement of Diffusion Models via Group Preference Optimization",
        "id": "2505.11070",
        "citation": (
            "@article{chen2025gpo,\n"
            "    title  = {{Towards Self-Improvement of Diffusion Models via Group Preference Optimization}},\n"
            "    author = {Renjie Chen and others},\n"
            "    year   = 2025,\n"
            "    eprint = {arXiv:2505.11070},\n"
            "}"
        ),
    }
    _config_class = GPOConfig

    def _group_loss(
        self, errors: Tensor, reference_errors: Tensor | None, advantages: Tensor, group_index: Tensor, **sizes
    ) -> GroupLoss:
        return gpo_loss(
            errors,
            reference_errors,
            advantages,
            group_index,
            loss_type=self.args.loss_type,
            beta=self.args.beta,
            **sizes,
        )
