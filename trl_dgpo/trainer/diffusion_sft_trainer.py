"""Supervised training on pictures: the loss that diffusion models are made with, on DGPO's engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import group_mean
from ..rewards.scoring import Scores
from ..rollout_dataset import BestOfGroups, SavedGroups
from .dgpo_trainer import DGPOTrainer, Fixed, MicroBatch, Part
from .diffusion_sft_config import DiffusionSFTConfig


class DiffusionSFTTrainer(DGPOTrainer):
    r"""
    Trainer for supervised fine-tuning of text-to-image diffusion models, such as a warm start before reinforcement:
    what a model never draws, no reward can bring out.

    The loss is the mean over pictures of the denoising error \\( d_i \\) of
    [`~trl_dgpo.losses.denoising_error`], conditional flow matching
    ([2403.03206](https://huggingface.co/papers/2403.03206)) with every level before the shift weighing the same; the
    paper draws levels from a logit-normal distribution. Latents are the mode of the VAE's distribution and not a draw
    from it, levels are shared by the pictures of a pass. There is no reference, and no forward but the policy's own.

    What is trained on are pictures with captions, or the best of each saved group, such as a stronger model's: see
    [`~trl_dgpo.rollout_dataset.BestOfGroups`].

    Example:

    ```python
    from trl_dgpo import DiffusionSFTConfig, DiffusionSFTTrainer
    from trl_dgpo.rollout_dataset import load_rollouts

    trainer = DiffusionSFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=DiffusionSFTConfig(output_dir="sd35-warm", max_steps=100),
        train_dataset=load_rollouts("rollouts"),
    )
    trainer.train()
    ```

    Args:
        train_dataset (`datasets.Dataset`):
            Pictures: columns `prompt` and `image`, a rollout set, or pairs in Pick-a-Pic's columns, as
            [`~trl_dgpo.rollout_dataset.SavedGroups`] tells them apart.
        eval_reward_funcs (callable or `list` of callables, *optional*):
            What evaluation measures; needed with an `eval_dataset`.
        model, args, eval_dataset, callbacks, optimizers, peft_config, quantization_config:
            As of [`DGPOTrainer`]. Training takes no `reward_funcs`.
    """

    _tag_names = ["trl", "diffusion-sft", "text-to-image", "diffusers"]
    _name = "Diffusion-SFT"
    _paper = {
        "title": "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        "id": "2403.03206",
        "citation": (
            "@inproceedings{esser2024scaling,\n"
            "    title  = {{Scaling Rectified Flow Transformers for High-Resolution Image Synthesis}},\n"
            "    author = {Patrick Esser and others},\n"
            "    year   = 2024,\n"
            "    booktitle = {International Conference on Machine Learning},\n"
            "}"
        ),
    }
    _config_class = DiffusionSFTConfig

    def _saved_groups(self, train_dataset: Any, has_reward_funcs: bool) -> BestOfGroups:
        if has_reward_funcs:
            raise ValueError(
                "`reward_funcs` are given, and supervised training asks no reward. Leave them out; what evaluation "
                "measures are `eval_reward_funcs`, and of saved groups the column `reward` says which image is the "
                "best."
            )
        return SavedGroups(train_dataset).best()

    def _read_and_score(self, round: int, rows: list[dict]) -> tuple[dict[str, Tensor], Tensor, Scores]:
        sampled, images, scores = super()._read_and_score(round, rows)
        return sampled, images, scores._replace(by_name={})  # of the best images alone they say nothing

    def _advantages(self, rewards: Tensor, group_index: Tensor) -> dict[str, Tensor]:
        return {"advantages": torch.ones_like(rewards)}

    def _preference_loss(self, errors: Tensor, part: Part, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        return batch.share * group_mean(errors, batch.group_index, **batch.sizes)

    def _log_rewards(self, rewards: Tensor, *of_groups: Any) -> None:
        if self.saved.has_rewards:
            self._metrics["reward"].append(rewards.mean().item())
