"""
DGPO on TRL's base trainer: when things happen.

The mathematics is in `trl_dgpo.losses`, `.advantages` and `.noising`, the model in `trl_dgpo.backbones` and `.policy`.
This file deals prompts, rolls out, scores, and orders the forwards of an update.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer

from ..advantages import group_advantages, zero_variance
from ..backbones import load_backbone
from ..callbacks import RewardProgressCallback
from ..evaluation import evaluation_latents, image_statistics
from ..losses import GroupLoss, clip_errors, denoising_error, dgpo_loss, group_mean
from ..noising import continuous_levels, trainable_levels
from ..policy import Policy, lora_config
from ..rewards.scoring import FailureWindow, RewardFunc, RewardScorer, Scores
from ..rollout import GroupRolloutBuffer, Rollout
from ..sampler import GroupSampler, local_groups
from ..seeding import generator
from ..tiny import tiny_pipeline_path
from .dgpo_config import DGPOConfig


logger = logging.getLogger(__name__)

_REWARD_CONTEXT = ("trainer_state", "log_metric")


class DGPOTrainer(_BaseTrainer):
    r"""
    Trainer for Direct Group Preference Optimization (DGPO) of text-to-image diffusion models, introduced in
    [Reinforcing Diffusion Models by Direct Group Preference Optimization](https://huggingface.co/papers/2510.08425).

    Each round samples groups of images with a deterministic ODE sampler, scores them, and raises the likelihood that
    the better images of a group are preferred to the worse ones. See [`~trl_dgpo.losses.dgpo_loss`] for the objective
    and [`DGPOConfig`] for every default and its source.

    Example:

    ```python
    from datasets import Dataset
    from trl_dgpo import DGPOConfig, DGPOTrainer


    def brightness(images, **kwargs):
        return [sum(image.convert("L").resize((1, 1)).getdata()) / 255 for image in images]


    trainer = DGPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=brightness,
        args=DGPOConfig(output_dir="sd35-bright", max_steps=100),
        train_dataset=Dataset.from_dict({"prompt": ["a lighthouse", "a lemon tree"]}),
    )
    trainer.train()
    ```

    Args:
        model (`str`, `os.PathLike` or `~diffusers.DiffusionPipeline`):
            Hub id, folder, `"tiny"` (the bundled model) or pipeline. A pipeline's transformer is changed in place.
        reward_funcs (callable or `list` of callables):
            Rewards in TRL's keyword form: `f(prompts, completions, **kwargs) -> list[float | None]`, where
            `completions`, also given as `images`, is a list of `PIL.Image` and each other column of the data set comes
            by its name. `None` means not applicable, `NaN` failed: such an image is masked.
        args ([`DGPOConfig`], *optional*):
            Configuration.
        train_dataset (`datasets.Dataset` or other map-style data set):
            Rows with a `prompt`.
        eval_dataset (map-style data set or `dict` of them, *optional*):
            Held-out rows.
        eval_reward_funcs (callable or `list` of callables, *optional*):
            What evaluation measures; `reward_funcs` if not given.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler in place of those of `args`.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapter to train in place of the default LoRA. Without `target_modules` it is put on the
            family's attention projections.

    Attributes:
        policy ([`~trl_dgpo.policy.Policy`]):
            The transformer and its views.
        backbone:
            The pipeline behind the family's protocol.
        buffer ([`GroupRolloutBuffer`]):
            The present round.

    Raises:
        `TypeError`, `ValueError`: for data sets, rewards, models or numbers that do not fit, before anything is
        trained.
    """

    _tag_names = ["trl", "dgpo", "text-to-image", "diffusers"]
    _name = "DGPO"
    _paper = {
        "title": "Reinforcing Diffusion Models by Direct Group Preference Optimization",
        "id": "2510.08425",
        "citation": (
            "@inproceedings{luo2026dgpo,\n"
            "    title  = {{Reinforcing Diffusion Models by Direct Group Preference Optimization}},\n"
            "    author = {Yihong Luo and others},\n"
            "    year   = 2026,\n"
            "    booktitle = {International Conference on Learning Representations},\n"
            "}"
        ),
    }
    # The loss is a mean over a micro-batch: Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    _config_class = DGPOConfig

    def __init__(
        self,
        *,
        model: str | os.PathLike | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DGPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        args = self._config_class() if args is None else args
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start one process a GPU (`accelerate launch`), or "
                "show it one (`CUDA_VISIBLE_DEVICES=0`)."
            )
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "FSDP and DeepSpeed are not supported: rollouts call the unwrapped transformer. A LoRA needs neither; "
                "use plain `accelerate launch` or `torchrun`."
            )
        if args.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` cannot divide groups; set `per_device_train_batch_size` and "
                "`sample_batch_size`."
            )
        if peft_config is not None and args.full_finetuning:
            raise ValueError("`peft_config` is given and `full_finetuning` is set; choose one of them.")
        if peft_config is not None and not isinstance(peft_config, LoraConfig):
            raise TypeError(
                f"`peft_config` is a {type(peft_config).__name__}; it must be a `LoraConfig`, which diffusers loads."
            )
        if args.eval_on_start and eval_dataset is None:
            args = copy.copy(args)  # the caller's may serve another trainer
            args.eval_on_start = False
        _check_dataset("train_dataset", train_dataset)
        for name, dataset in _named(eval_dataset).items():
            _check_dataset(name, dataset)
        self.scorer = RewardScorer(reward_funcs, args.reward_weights)
        self.eval_scorer = self.scorer if eval_reward_funcs is None else RewardScorer(eval_reward_funcs)
        self.scorer.check(train_dataset[0].keys() - {"prompt"}, _REWARD_CONTEXT)
        for dataset in _named(eval_dataset).values():
            self.eval_scorer.check(dataset[0].keys() - {"prompt"}, _REWARD_CONTEXT)
        self.sampler = GroupSampler(
            len(train_dataset), args.prompts_per_round, seed=args.seed, shuffle=args.shuffle_dataset
        )

        set_seed(args.seed)  # before the adapter draws its start
        self.backbone = load_backbone(
            tiny_pipeline_path() if model == "tiny" else model,
            sampler=args.sampler,
            sigmas=args.sigmas,
            max_sequence_length=args.max_sequence_length,
            negative_prompt=args.negative_prompt,
            dtype=None if isinstance(model, DiffusionPipeline) else self._load_dtype(args),
        )
        self._latent_shape = self.backbone.latent_shape(args.height, args.width)
        self._levels = self._train_levels(args)
        if not args.full_finetuning:
            peft_config = copy.deepcopy(peft_config) or lora_config(self.backbone.LORA_TARGETS)
            peft_config.target_modules = peft_config.target_modules or list(self.backbone.LORA_TARGETS)
            peft_config.task_type = None  # TRL's own `get_peft_config` says CAUSAL_LM, which PEFT takes at its word
        self.backbone.transformer._internal_dict = _ModelConfig(self.backbone.transformer.config)
        self.policy = Policy(self.backbone.transformer, peft_config, self._views(args, eval_dataset is not None))
        if peft_config is not None:  # PEFT asks the transformer, which is only a part of the model
            peft_config.base_model_name_or_path = self.backbone.pipeline.config.get("_name_or_path")
        # Trainer asks the model for this; diffusers has it under another name.
        self.policy.model.activation_checkpointing_enable = lambda **_: self.backbone.enable_gradient_checkpointing()

        self.buffer = GroupRolloutBuffer()
        self._work: deque[_MicroStep] = deque()
        self._failures = FailureWindow()
        self._metrics: dict[str, list[Tensor | float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)

        super().__init__(
            model=self.policy.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.backbone.pipeline.to(self.args.device)
        self._groups = local_groups(
            args.prompts_per_round, args.updates_per_round, args.process_index, args.world_size
        ).to(args.device)
        self.add_callback(_MoveAverages(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback)
        if 0 < args.max_steps < args.ema_every and "ema" in self.policy.views:
            logger.warning(
                "`max_steps` (%d) is below `ema_every` (%d): the `ema` weights, which are evaluated%s, will not "
                "move. Lower `ema_every`.",
                args.max_steps,
                args.ema_every,
                " and saved" if args.save_ema else "",
            )

    # -- the round ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """
        One tick a micro-step: the loader is Trainer's clock.

        Which prompts a round has is a function of its number ([`GroupSampler`]), and its number one of the optimiser
        step, so no loader position has to be kept or restored.
        """
        ticks = self.sampler.rounds_per_epoch * self.args.steps_per_round * self.args.gradient_accumulation_steps
        return DataLoader(range(ticks), batch_size=1, collate_fn=list)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train from the start, or go on from a checkpoint: see [`~transformers.Trainer.train`]."""
        # Nothing of an earlier call, which may have been interrupted anywhere, goes on.
        self.buffer.clear()
        self._failures = FailureWindow()
        for left_over in (self._work, self._metrics, self._seconds):
            left_over.clear()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        before = dict(self._seconds)
        start = self._clock()
        loss = super().training_step(model, inputs, num_items_in_batch)
        elapsed = self._clock() - start
        # What this step did besides updating has its own clock.
        self._seconds["update"] += elapsed - sum(s - before.get(name, 0.0) for name, s in self._seconds.items())
        if not self._work:
            for name, seconds in self._seconds.items():
                self._metrics[f"time/{name}"].append(seconds)
            self._seconds.clear()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not self._work:
            self._begin_update()
        step = self._work.popleft()
        batch, args = step.batch, self.args
        prediction, target = self._predict(batch, model=model)
        errors = denoising_error(prediction, target)
        if args.clip_range is not None:
            errors, clipped = clip_errors(errors, step.old_errors, batch.advantages, args.clip_range)
            self._metrics["clip_ratio"].append(clipped[batch.counts].float().mean())
        group = self._group_loss(errors, step.reference_errors, batch.advantages, batch.group_index, **batch.sizes)
        loss = group.loss
        if args.kl_coef:
            divergence = denoising_error(prediction, step.base_prediction) * batch.counts
            kl = group_mean(divergence, batch.group_index, **batch.sizes)
            # "logsigmoid" has a factor beta in its gradient; the KL term gets it too, to weigh the same.
            loss = loss + args.kl_coef * (args.beta if args.loss_type == "logsigmoid" else 1.0) * kl
            self._metrics["kl"].append(kl.detach())
        self._metrics["objective"].append(group.objective)
        self._metrics["gate_mean"].append(group.gate[batch.learns].mean())
        return loss

    def _group_loss(
        self, errors: Tensor, reference_errors: Tensor | None, advantages: Tensor, group_index: Tensor, **sizes
    ) -> GroupLoss:
        return dgpo_loss(
            errors,
            reference_errors,
            advantages,
            group_index,
            beta=self.args.beta,
            loss_type=self.args.loss_type,
            **sizes,
        )

    @staticmethod
    def _needs_reference(args: DGPOConfig) -> bool:
        """Whether the group loss reads `reference_errors`."""
        return True

    def _begin_update(self) -> None:
        """Roll out where a round begins, then compute all that does not move during the optimiser step."""
        args = self.args
        round, step = divmod(self.state.global_step, args.steps_per_round)
        iteration, update = divmod(step, args.updates_per_round)
        if self.buffer.round != round:
            if step:
                logger.warning(
                    "Training goes on at step %d, within a round whose rollouts the checkpoint does not hold for this "
                    "number of processes. They are sampled anew, so the run is not the one that was interrupted.",
                    self.state.global_step,
                )
            if "reference" in self.policy.views:
                self.policy.refresh_reference()
            self._roll_out(round)
        sigmas = self._draw_levels(round, iteration)
        batches = [
            self._noisy_batch(rollout, sigma, (round, iteration, level))
            for rollout in self.buffer.micro_batches(update, args.updates_per_round, args.micro_batches_per_update)
            for level, sigma in enumerate(sigmas)
        ]
        with self._timed("reference"):
            self._work.extend(self._with_fixed(batches))

    def _draw_levels(self, round: int, iteration: int) -> list[float]:
        """The levels of a pass, the same for every group."""
        args = self.args
        stream = generator(args.seed, "levels", round, iteration)
        if args.timestep_sampling == "grid":
            drawn = self._levels[torch.randperm(len(self._levels), generator=stream)[: args.num_train_timesteps]]
        else:
            uniform = torch.rand(args.num_train_timesteps, generator=stream)
            drawn = continuous_levels(uniform, args.t_min, self.backbone.shift_factor)
        return drawn.tolist()

    def _noisy_batch(self, rollout: Rollout, sigma: float, key: tuple[int, int, int]) -> _NoisyBatch:
        # Without a KL term a sample of advantage 0 (masked, or of a group without preference) changes nothing. One row
        # always stays, weighing nothing, so that every process takes part in every backward.
        counts = rollout.valid if self.args.kl_coef else rollout.advantages != 0
        rows = counts if counts.any() else torch.arange(len(counts), device=counts.device) == 0
        index = rollout.local_index[rows]
        return _NoisyBatch(
            rollout=rollout,
            rows=rows,
            sigma=sigma,
            noise=self._group_noise(rollout.groups, key),
            conditioning=self._conditioning(rollout, key),
            advantages=rollout.advantages[rows],
            group_index=index,
            counts=counts[rows],
            learns=~zero_variance(rollout.rewards, rollout.local_index),
            sizes={"group_sizes": rollout.group_sizes, "num_groups": rollout.num_groups},
        )

    def _conditioning(self, rollout: Rollout, key: tuple[int, int, int]) -> dict[str, Tensor]:
        if not self.args.prompt_dropout:
            return rollout.conditioning
        draws = [
            torch.rand(1, generator=generator(self.args.seed, "dropout", *key[:2], g)) for g in rollout.groups.tolist()
        ]
        dropped = (torch.cat(draws) < self.args.prompt_dropout).to(rollout.x0.device)
        empty = self.backbone.encode([self.args.negative_prompt])
        return {
            name: torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), empty[name].to(rows), rows)
            for name, rows in rollout.conditioning.items()
        }

    def _with_fixed(self, batches: list[_NoisyBatch]) -> list[_MicroStep]:
        """The no-grad predictions of an optimiser step, one pass a view, so that weights are switched once a pass."""
        args, policy = self.args, self.policy
        reference = args.reference if self._needs_reference(args) else None
        base_errors = old_errors = reference_errors = base_predictions = [None] * len(batches)
        if args.kl_coef or reference == "frozen":
            base_errors, base_predictions = self._no_grad_pass(policy.base(), batches, args.reference_guidance_scale)
        if args.clip_range is not None or reference == "old":
            old_errors, _ = self._no_grad_pass(policy.old(), batches)
        if reference == "refreshed":
            reference_errors, _ = self._no_grad_pass(policy.reference(), batches)
        elif reference is not None:
            reference_errors = {"frozen": base_errors, "old": old_errors}[reference]
        return [
            _MicroStep(*fixed) for fixed in zip(batches, reference_errors, old_errors, base_predictions, strict=True)
        ]

    def _no_grad_pass(
        self, view: AbstractContextManager, batches: list[_NoisyBatch], guidance_scale: float = 1.0
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        errors, predictions = [], []
        with view, torch.no_grad(), _evaluating(self.policy.model):
            for batch in batches:
                prediction, target = self._predict(batch, guidance_scale=guidance_scale)
                errors.append(denoising_error(prediction, target))
                predictions.append(prediction if self.args.kl_coef else None)
        return errors, predictions

    def _predict(
        self, batch: _NoisyBatch, *, model: nn.Module | None = None, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target of a batch, which is noised here and now: kept for all batches it would fill a GPU."""
        x0, noise = batch.rollout.x0[batch.rows], batch.noise[batch.group_index]
        x_t = self.backbone.noise(x0, noise, batch.sigma)
        conditioning = {name: rows[batch.group_index] for name, rows in batch.conditioning.items()}
        # The prepared model casts by itself; the bare transformer does not.
        with self.accelerator.autocast() if model is None else nullcontext():
            prediction = self.backbone.predict(
                x_t, batch.sigma, conditioning, model=model, guidance_scale=guidance_scale
            )
        return prediction, self.backbone.target(x0, noise, batch.sigma)

    def _roll_out(self, round: int) -> None:
        """Sample, score and keep one round: this process's groups of it."""
        args, device = self.args, self.args.device
        deal = self.sampler.deal(round)
        rows = [self.train_dataset[deal[group]] for group in self._groups.tolist()]
        local = torch.arange(len(rows)).repeat_interleave(args.num_generations)
        group_index = self._groups.repeat_interleave(args.num_generations)
        use_old = args.old_policy_after is not None and self.state.global_step >= args.old_policy_after
        with self._timed("rollout"):
            latents = torch.stack(
                [
                    torch.randn(self._latent_shape, generator=generator(args.seed, "latents", round, group, number))
                    for group in self._groups.tolist()
                    for number in range(args.num_generations)
                ]
            )
            conditioning = self.backbone.encode([row["prompt"] for row in rows])
            step_noise = self._step_noise(round, group_index) if args.sampler == "sde" else None
            x0, images = self._sample(
                latents,
                [rows[i]["prompt"] for i in local.tolist()],
                view=self.policy.old() if use_old else nullcontext(),
                batch_size=args.sample_batch_size,
                num_steps=args.sample_num_steps,
                guidance_scale=args.sample_guidance_scale,
                step_noise=step_noise,
            )
        with self._timed("reward"):
            rows = [rows[i] for i in local.tolist()]
            scores = self._score(self.scorer, images, rows, self._metrics)
        # Every process sees all rewards: batch statistics, the log and the decision to stop are the same in each.
        rewards, groups = self._gather(scores.rewards), self._gather(group_index)
        self._failures.update(self._gather(scores.failed))
        if rewards.isnan().all():
            logger.warning("No reward applies to any image of round %d: nothing is learned from it.", round)
        advantages = group_advantages(
            rewards,
            groups,
            scale=args.scale_rewards,
            clip=args.advantage_clip,
            recenter_clipped=args.recenter_clipped,
        )
        self._log_rewards(rewards, groups, advantages, {n: self._gather(v) for n, v in scores.by_name.items()})
        own = slice(args.process_index * len(local), (args.process_index + 1) * len(local))
        rollout = Rollout(
            x0=x0,
            conditioning=conditioning,
            rewards=rewards[own].float().to(device),
            advantages=advantages[own].float().to(device),
            group_index=group_index,
        )
        self.buffer.fill(rollout, round)

    def _sample(
        self,
        latents: Tensor,
        prompts: list[str],
        *,
        view: AbstractContextManager,
        batch_size: int,
        num_steps: int,
        guidance_scale: float,
        step_noise: Callable[[slice, int], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clean latents on the device and uint8 images on the CPU, one a latent and prompt, a sub-batch at a time."""
        x0, images = [], []
        with view, torch.no_grad():
            for start in range(0, len(latents), batch_size):
                rows = slice(start, start + batch_size)
                with self.accelerator.autocast():
                    clean = self.backbone.sample(
                        latents[rows].to(self.args.device),
                        self.backbone.encode(prompts[rows]),
                        num_steps=num_steps,
                        guidance_scale=guidance_scale,
                        step_noise=None if step_noise is None else lambda step, rows=rows: step_noise(rows, step),
                    )
                x0.append(clean.float())
                images.append(self.backbone.decode(clean).cpu())
        return torch.cat(x0), torch.cat(images)

    def _step_noise(self, round: int, group_index: Tensor) -> Callable[[slice, int], Tensor]:
        numbers = torch.arange(len(group_index)) % self.args.num_generations
        keys = list(zip(group_index.tolist(), numbers.tolist(), strict=True))

        def draw(rows: slice, step: int) -> Tensor:
            streams = [generator(self.args.seed, "step_noise", round, *key, step) for key in keys[rows]]
            return torch.stack([torch.randn(self._latent_shape, generator=s) for s in streams]).to(self.args.device)

        return draw

    def _group_noise(self, groups: Tensor, key: tuple[int, int, int]) -> Tensor:
        streams = [generator(self.args.seed, "noise", *key, group) for group in groups.tolist()]
        return torch.stack([torch.randn(self._latent_shape, generator=s) for s in streams]).to(self.args.device)

    def _score(
        self, scorer: RewardScorer, images: Tensor, rows: list[dict], metrics: dict[str, list[Tensor | float]]
    ) -> Scores:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return scorer(
            images,
            [row["prompt"] for row in rows],
            columns,
            trainer_state=self.state,
            log_metric=lambda name, value: metrics[name].append(float(value)),
        )

    def _gather(self, values: Tensor) -> Tensor:
        # One process keeps its float64, which not every device has.
        return (
            values.cpu() if self.args.world_size == 1 else self.accelerator.gather(values.to(self.args.device)).cpu()
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[str], *, view: str | None = "ema", num_images: int = 1) -> Tensor:
        """
        Evaluation images of prompts: fixed noise, `eval_num_steps`, no process but this one.

        Args:
            prompts (`list[str]`):
                The prompts.
            view (`str`, *optional*, defaults to `"ema"`):
                Weights to sample from: `"ema"`, `"base"`, another view of the policy, or `None` for the policy.
            num_images (`int`, *optional*, defaults to `1`):
                Images of each prompt.

        Returns:
            `torch.Tensor` of shape `(len(prompts) * num_images, 3, H, W)`, uint8, on the CPU.

        Raises:
            `ValueError`: if there is no such view.
        """
        args, views = self.args, (*(("base",) if self.policy.peft_config else ()), *self.policy.views)
        if view is not None and view not in views:
            raise ValueError(f"`view` is {view!r}; this run has {views}, and `None` for the policy itself.")
        _, images = self._sample(
            evaluation_latents(prompts, num_images, self._latent_shape),
            [prompt for prompt in prompts for _ in range(num_images)],
            view=nullcontext() if view is None else getattr(self.policy, view)(),
            batch_size=args.per_device_eval_batch_size,
            num_steps=args.eval_num_steps,
            guidance_scale=args.eval_guidance_scale,
        )
        return images

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Rewards and image statistics on held-out prompts, with the `ema` weights.

        Args:
            eval_dataset (map-style data set or `dict` of them, *optional*):
                The trainer's `eval_dataset` if not given.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the names.

        Returns:
            `dict[str, float]` with `eval_reward`, its standard deviation and standard error over images,
            `eval_rewards/<name>/mean` and `/std`, and `eval_images/<statistic>`.
        """
        datasets = _named(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if not datasets:
            raise ValueError("There is nothing to evaluate: give `eval_dataset` here or to the trainer.")
        metrics = {}
        for prefix, dataset in datasets.items():
            _check_dataset(prefix, dataset)
            metrics |= self._evaluate_one(dataset, prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_one(self, dataset: Any, prefix: str) -> dict[str, float]:
        args, start = self.args, time.perf_counter()
        rows = [dataset[i] for i in range(args.process_index, len(dataset), args.world_size)]
        images, scores, extra = None, None, defaultdict(list)
        if rows:
            view = "ema" if "ema" in self.policy.views else None
            images = self.generate([row["prompt"] for row in rows], view=view, num_images=args.eval_num_images)
            rows = [row for row in rows for _ in range(args.eval_num_images)]
            scores = self._score(self.eval_scorer, images, rows, extra)
        shards = [shard for shard in gather_object([(scores, images, dict(extra))]) if shard[0] is not None]
        failed = int(sum(scores.failed.sum() for scores, *_ in shards))
        rewards = torch.cat([scores.rewards for scores, *_ in shards])
        if rewards.isnan().all():
            raise RuntimeError(
                f"No evaluation image has a reward: {failed} of {len(rewards)} failed, to the others no reward "
                "applies. The log above has the reason."
            )
        metrics = {f"{prefix}_reward": rewards.nanmean().item(), f"{prefix}_reward_std": _nanstd(rewards)}
        metrics[f"{prefix}_reward_stderr"] = _nanstd(rewards) / (~rewards.isnan()).sum().sqrt().item()
        for name in self.eval_scorer.names:
            values = torch.cat([scores.by_name[name] for scores, *_ in shards])
            metrics[f"{prefix}_rewards/{name}/mean"] = values.nanmean().item()
            metrics[f"{prefix}_rewards/{name}/std"] = _nanstd(values)
        for name in sorted({name for *_, extra in shards for name in extra}):  # from the rewards' `log_metric`
            values = [value for *_, extra in shards for value in extra.get(name, [])]
            metrics[f"{prefix}_{name}"] = sum(values) / len(values)
        for name, value in image_statistics(torch.cat([images for _, images, _ in shards])).items():
            metrics[f"{prefix}_images/{name}"] = value
        metrics[f"{prefix}_num_images"] = len(rewards)
        metrics[f"{prefix}_failed"] = failed
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - start, 4)
        return metrics

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: the means since the last one, NaN dropped
            for name, values in self._metrics.items():
                mean = torch.tensor([float(value) for value in values], dtype=torch.float64).nanmean().item()
                if mean == mean:
                    logs[name] = mean
            self._metrics.clear()
        super().log(logs, start_time)

    def _log_rewards(self, rewards: Tensor, groups: Tensor, advantages: Tensor, by_name: dict[str, Tensor]) -> None:
        spread = [_nanstd(rewards[groups == group]) for group in groups.unique()]
        self._metrics["reward"].append(rewards.nanmean().item())
        self._metrics["reward_std"].append(torch.tensor(spread).nanmean().item())
        self._metrics["frac_reward_zero_std"].append(zero_variance(rewards, groups).float().mean().item())
        self._metrics["rewards_failed"].append(int(rewards.isnan().sum()))
        for name, values in by_name.items():
            self._metrics[f"rewards/{name}/mean"].append(values.nanmean().item())
            self._metrics[f"rewards/{name}/std"].append(_nanstd(values))
        if self.args.advantage_clip is not None:
            at_bound = (advantages.abs() >= self.args.advantage_clip).float().mean().item()
            self._metrics["advantage_clip_ratio"].append(at_bound)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._clock()
        yield
        self._seconds[name] += self._clock() - start

    def _clock(self) -> float:
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _send_telemetry(self) -> None:
        """Nothing is sent: TRL's report reads a transformers configuration, which a diffusers model has not."""

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # A checkpoint holds what training goes on from: the live policy, and the views in folders of their names.
        # Elsewhere stands what is used: the evaluated weights, as a PEFT adapter and as diffusers' LoRA file.
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.args, directory / "training_args.bin")
        if directory.name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
            self.policy.save(directory)
            view = None
        else:
            view = "ema" if self.args.save_ema and "ema" in self.policy.views else None
            self.policy.save_pretrained(directory if self.policy.peft_config else directory / "transformer", view)
        if self.policy.peft_config is not None:
            self.backbone.save_lora(directory, self.policy.lora_state_dict(view), self.policy.peft_config.to_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load(resume_from_checkpoint)
        path = self._buffer_file(resume_from_checkpoint)
        if path.is_file():
            self.buffer.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _load_best_model(self) -> None:
        logger.info("Loading the best model from %s (%s).", self.state.best_model_checkpoint, self.state.best_metric)
        self.policy.load(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.args.steps_per_round:  # the next step trains on this round again
            torch.save(self.buffer.state_dict(), self._buffer_file(output_dir))

    def _buffer_file(self, directory: str) -> Path:
        return Path(directory) / f"rollout_{self.args.process_index}_of_{self.args.world_size}.pt"

    # -- construction -------------------------------------------------------------------------------------------------

    @staticmethod
    def _load_dtype(args: DGPOConfig) -> torch.dtype:
        # Frozen weights are kept in the dtype that they are used in; trained ones in float32.
        if args.full_finetuning:
            return torch.float32
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32

    def _train_levels(self, args: DGPOConfig) -> Tensor:
        sigmas = self.backbone.sigmas(args.sample_num_steps)
        kept = sigmas[trainable_levels(sigmas, args.t_min, self.backbone.shift_factor)]
        if args.timestep_sampling == "grid" and args.num_train_timesteps > len(kept):
            raise ValueError(
                f"`num_train_timesteps` ({args.num_train_timesteps}) is more than the {len(kept)} levels that `t_min` "
                f"({args.t_min}) leaves of `sample_num_steps` ({args.sample_num_steps}): "
                f"{[round(sigma, 3) for sigma in kept.tolist()]}. Lower `num_train_timesteps` or `t_min`, raise "
                "`sample_num_steps`, or use `timestep_sampling='continuous'`."
            )
        return kept

    def _views(self, args: DGPOConfig, evaluates: bool) -> tuple[str, ...]:
        needs_reference = self._needs_reference(args)
        used = {
            "ema": args.save_ema or evaluates,
            "old": args.clip_range is not None
            or args.old_policy_after is not None
            or (needs_reference and args.reference == "old"),
            "reference": needs_reference and args.reference == "refreshed",
            "base": bool(args.kl_coef) or (needs_reference and args.reference == "frozen"),
        }
        return tuple(view for view, is_used in used.items() if is_used)


@dataclass(frozen=True)
class _NoisyBatch:
    """The rows of one micro-batch that are trained on, at one level."""

    rollout: Rollout
    rows: Tensor  # mask of the rollouts that are trained on
    sigma: float
    noise: Tensor  # one draw a group and level
    conditioning: dict[str, Tensor]  # one row a group, expanded when it is used: a row of SD3 has megabytes
    advantages: Tensor
    group_index: Tensor
    counts: Tensor  # rows that weigh in the loss; a row kept for the backward's sake does not
    learns: Tensor  # (N,), groups with a preference
    sizes: dict[str, Any]


@dataclass(frozen=True)
class _MicroStep:
    """A batch and what stays fixed while the policy learns from it; `None` where the loss has no use for it."""

    batch: _NoisyBatch
    reference_errors: Tensor | None
    old_errors: Tensor | None
    base_prediction: Tensor | None


class _ModelConfig(FrozenDict):
    """What Trainer's logging integrations ask of a model's configuration, which diffusers' own has not."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str)


class _MoveAverages(TrainerCallback):
    """Moves the averaged weights after every optimiser step that was taken."""

    def __init__(self, trainer: DGPOTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        policy, step = self.trainer.policy, state.global_step
        if self.trainer.accelerator.optimizer_step_was_skipped:
            return
        if "old" in policy.views:
            policy.update_old(step)
        if "ema" in policy.views and (step + 1) % args.ema_every == 0:
            policy.update_ema(step)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _named(dataset: Any, name: str = "eval_dataset") -> dict[str, Any]:
    if isinstance(dataset, dict):
        return {f"{name}_{key}": value for key, value in dataset.items()}
    return {} if dataset is None else {name: dataset}


def _check_dataset(name: str, dataset: Any) -> None:
    if isinstance(dataset, dict):
        raise TypeError(f"`{name}` is a dict of {sorted(dataset)}; give one of them, such as `dataset['train']`.")
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"`{name}` is {type(dataset).__name__}; it must have a length and rows by index, as `datasets.Dataset`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; it needs at least one row with a `prompt`.")
    row = dataset[0]
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        shape = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"The rows of `{name}` ({shape}) need a column `prompt` of type `str`; rename the column that holds it."
        )


def _nanstd(values: Tensor) -> float:
    values = values[~values.isnan()]
    return values.std(correction=0).item() if len(values) else float("nan")
