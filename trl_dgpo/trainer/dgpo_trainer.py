"""
DGPO: when things happen in a round.

The mathematics is in `trl_dgpo.losses`, `.advantages` and `.noising`, the model in `trl_dgpo.backbones` and `.policy`,
what all trainers share in `.base_trainer`. This file deals prompts, rolls out, scores, and orders the forwards of an
update.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..advantages import group_advantages, zero_variance
from ..ddpo_compat import DDPOTrainerNames, modern_call
from ..evaluation import nanstd
from ..losses import GroupLoss, clip_errors, denoising_error, dgpo_loss, group_mean
from ..noising import continuous_levels, trainable_levels
from ..rewards.scoring import FailureWindow, RewardFunc, RewardScorer, Scores
from ..rollout import GroupRolloutBuffer, Rollout, ScoredImages
from ..sampler import GroupSampler, StreamSampler, local_groups
from ..seeding import generator
from .base_trainer import REWARD_CONTEXT, DiffusionTrainer, dataset_columns, evaluating, is_stream
from .dgpo_config import DGPOConfig


logger = logging.getLogger(__name__)


class DGPOTrainer(DDPOTrainerNames, DiffusionTrainer):
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
    _config_class = DGPOConfig

    def __init__(
        self,
        config: DGPOConfig | None = None,
        reward_function: Callable | None = None,
        prompt_function: Callable | None = None,
        sd_pipeline: Any = None,
        image_samples_hook: Callable | None = None,
        *,
        model: str | os.PathLike | DiffusionPipeline | PeftModel | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: DGPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | None = None,
        quantization_config: Any = None,
    ):
        call = modern_call(
            config=config,
            reward_function=reward_function,
            prompt_function=prompt_function,
            sd_pipeline=sd_pipeline,
            image_samples_hook=image_samples_hook,
            args=args,
            reward_funcs=reward_funcs,
            model=model,
            train_dataset=train_dataset,
            config_class=self._config_class,
        )
        args, train_dataset = call.args, call.train_dataset
        scorer = RewardScorer(call.reward_funcs, args.reward_weights)
        # A prompt function is not drawn from for a check: its first prompt belongs to the first round.
        known = {"prompt_metadata"} if prompt_function else dataset_columns("train_dataset", train_dataset)
        scorer.check(known, REWARD_CONTEXT)
        if is_stream(train_dataset):
            if args.max_steps <= 0:
                raise ValueError(
                    f"`max_steps` is {args.max_steps}, and `train_dataset` is a stream, whose length is not known. "
                    "Set `max_steps`."
                )
            self.sampler = StreamSampler(train_dataset, args.prompts_per_round)
        else:
            self.sampler = GroupSampler(
                train_dataset, args.prompts_per_round, seed=args.seed, shuffle=args.shuffle_dataset
            )
        self.buffer = GroupRolloutBuffer()
        self._work: deque[_MicroStep] = deque()
        self._failures = FailureWindow()
        super().__init__(
            model=call.model,
            args=args,
            scorer=scorer,
            eval_reward_funcs=eval_reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), *call.callbacks],
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        self._levels = self._train_levels(self.args)
        self._groups = local_groups(
            args.prompts_per_round, args.updates_per_round, self.args.process_index, self.args.world_size
        ).to(self.args.device)

    # -- the round ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """
        One tick a micro-step: the loader is Trainer's clock.

        Which prompts a round has is a function of its number ([`GroupSampler`]), and its number one of the optimiser
        step, so no loader position has to be kept or restored.
        """
        if isinstance(self.sampler, StreamSampler):
            steps = self.args.max_steps
        else:
            steps = self.sampler.rounds_per_epoch * self.args.steps_per_round
        ticks = steps * self.args.gradient_accumulation_steps
        return DataLoader(range(ticks), batch_size=1, collate_fn=list)

    def _forget(self) -> None:
        super()._forget()
        self.buffer.clear()
        self._work.clear()
        self._failures = FailureWindow()

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
        with view, torch.no_grad(), evaluating(self.policy.model):
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
        rows = self.sampler.rows(round, self._groups.tolist())
        conditioning = self.backbone.encode([_checked_prompt(row) for row in rows])
        group_index = self._groups.repeat_interleave(args.num_generations)
        rows = [row for row in rows for _ in range(args.num_generations)]
        x0, images, scores = self._sample_and_score(round, group_index, rows)
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
        for name, values in scores.metrics.items():
            self._metrics[name] += values
        own = slice(args.process_index * len(rows), (args.process_index + 1) * len(rows))
        rollout = Rollout(
            x0=x0,
            conditioning=conditioning,
            rewards=rewards[own].float().to(device),
            advantages=advantages[own].float().to(device),
            group_index=group_index,
        )
        self.buffer.fill(rollout, round)
        self._show(
            ScoredImages(
                round=round,
                images=images,
                rows=rows,
                rewards=scores.rewards,
                by_name=scores.by_name,
                advantages=advantages[own],
                group_index=group_index.cpu(),
                extra=scores.extra,
            )
        )

    def _sample_and_score(self, round: int, group_index: Tensor, rows: list[dict]) -> tuple[Tensor, Tensor, Scores]:
        args = self.args
        use_old = args.old_policy_after is not None and self.state.global_step >= args.old_policy_after
        keys = [(group, number % args.num_generations) for number, group in enumerate(group_index.tolist())]
        streams = [generator(args.seed, "latents", round, *key) for key in keys]
        sampled = self._sample(
            torch.stack([torch.randn(self._latent_shape, generator=stream) for stream in streams]),
            [row["prompt"] for row in rows],
            batch_size=args.sample_batch_size,
            num_steps=args.sample_num_steps,
            guidance_scale=args.sample_guidance_scale,
            step_noise=self._step_noise(round, keys) if args.sampler == "sde" else None,
        )
        x0, images = [], []
        with ThreadPoolExecutor(args.max_workers) as pool:
            scoring = []
            with self._timed("rollout"), self.policy.old() if use_old else nullcontext():
                for part, clean, pictures in sampled:
                    x0.append(clean)
                    images.append(pictures)
                    if args.async_reward_computation:
                        scoring.append(pool.submit(self._score, self.scorer, pictures, rows[part]))
            with self._timed("reward"):
                if args.async_reward_computation:
                    scores = Scores.cat([future.result() for future in scoring])
                else:
                    scores = self._score(self.scorer, torch.cat(images), rows)
        return torch.cat(x0), torch.cat(images), scores

    def _show(self, scored: ScoredImages) -> None:
        listeners = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "on_rollout")]
        with self._timed("show") if listeners else nullcontext():
            for callback in listeners:
                callback.on_rollout(self.args, self.state, self.control, scored=scored, trackers=self.trackers)

    def _step_noise(self, round: int, keys: list[tuple[int, int]]) -> Callable[[slice, int], Tensor]:
        def draw(rows: slice, step: int) -> Tensor:
            streams = [generator(self.args.seed, "step_noise", round, *key, step) for key in keys[rows]]
            return torch.stack([torch.randn(self._latent_shape, generator=s) for s in streams]).to(self.args.device)

        return draw

    def _group_noise(self, groups: Tensor, key: tuple[int, int, int]) -> Tensor:
        streams = [generator(self.args.seed, "noise", *key, group) for group in groups.tolist()]
        return torch.stack([torch.randn(self._latent_shape, generator=s) for s in streams]).to(self.args.device)

    def _log_rewards(self, rewards: Tensor, groups: Tensor, advantages: Tensor, by_name: dict[str, Tensor]) -> None:
        spread = [nanstd(rewards[groups == group]) for group in groups.unique()]
        self._metrics["reward"].append(rewards.nanmean().item())
        self._metrics["reward_std"].append(torch.tensor(spread).nanmean().item())
        self._metrics["frac_reward_zero_std"].append(zero_variance(rewards, groups).float().mean().item())
        self._metrics["rewards_failed"].append(int(rewards.isnan().sum()))
        for name, values in by_name.items():
            self._metrics[f"rewards/{name}/mean"].append(values.nanmean().item())
            self._metrics[f"rewards/{name}/std"].append(nanstd(values))
        if self.args.advantage_clip is not None:
            at_bound = (advantages.abs() >= self.args.advantage_clip).float().mean().item()
            self._metrics["advantage_clip_ratio"].append(at_bound)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = self._buffer_file(resume_from_checkpoint)
        if path.is_file():
            # Not onto the device at once: `torch.load` knows no "cpu:0", which one of two processes has.
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.buffer.load_state_dict(send_to_device(state, self.args.device))
        # A stream is read on to where it stood. Trainer restores the global random state after this, so that a prompt
        # function which draws from it goes on as well as one that counts.
        step = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).global_step
        self.sampler.seek(step // self.args.steps_per_round if self.buffer.round is None else self.buffer.round + 1)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.args.steps_per_round:  # the next step trains on this round again
            torch.save(self.buffer.state_dict(), self._buffer_file(output_dir))

    def _buffer_file(self, directory: str) -> Path:
        return Path(directory) / f"rollout_{self.args.process_index}_of_{self.args.world_size}.pt"

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

    def _views(self, args: DGPOConfig) -> tuple[str, ...]:
        needs_reference = self._needs_reference(args)
        used = {
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


def _checked_prompt(row: Any) -> str:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"A row of `train_dataset` is {row!r:.200}; it needs a column `prompt` of type `str`.")
    return prompt
