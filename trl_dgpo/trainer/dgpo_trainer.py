"""
DGPO: when things happen in a round.

The mathematics is in `trl_dgpo.losses`, `.advantages` and `.noising`, the model in `trl_dgpo.backbones` and `.policy`,
what all trainers share in `.base_trainer`. This file deals prompts, rolls out, scores, and orders the forwards of an
update.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import shutil
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..advantages import group_advantages, normalize_then_sum, zero_variance
from ..backbones import to_device
from ..callbacks import whole_round
from ..ddpo_compat import DDPOTrainerNames, modern_call
from ..evaluation import nanstd
from ..guards import ImageGuard
from ..losses import GroupLoss, clip_errors, denoising_error, dgpo_loss, group_mean, group_scores, next_kl_coef
from ..noising import continuous_levels, trainable_levels
from ..rewards.scoring import ConstantWatch, FailureWindow, RewardFunc, RewardScorer, Scores
from ..rollout import GroupRolloutBuffer, Rollout, ScoredImages
from ..rollout_dataset import RowColumns, SavedGroups, fitted, rounds_to_dataset
from ..sampler import GroupSampler, StreamSampler, local_rollouts
from ..seeding import generator
from .base_trainer import (
    REWARD_CONTEXT,
    DiffusionTrainer,
    OnTheWay,
    dataset_columns,
    evaluating,
    is_stream,
)
from .dgpo_config import DGPOConfig


logger = logging.getLogger(__name__)

# Names in the log that a reward cannot give to numbers of its own.
_OWN_METRICS = {
    *("loss", "learning_rate", "grad_norm", "epoch", "step", "objective", "gate_mean", "clip_ratio", "kl"),
    *("kl_coef", "divergence", "ratio_mean", "approx_kl", "drift_ratio"),
    *("reward", "reward_std", "frac_reward_zero_std", "rewards_failed", "advantage_clip_ratio"),
    *("num_pairs", "pair_margin", "skipped_steps"),
}
_OWN_PREFIXES = ("rewards/", "time/", "loss/", "eval_", "train_", "images/", "images_vs_base/", "guard/")

_KL_COEF = "trl_dgpo.kl_coef"  # where Trainer's state keeps it, beside what callbacks keep
_KL_COEF_RANGE = 1000.0  # factor by which it may leave `kl_coef`
_DIVERGENCE_GROUPS, _DIVERGENCE_LEVELS = 8, 4
_LATENT_TOLERANCE = 16  # mean difference of a picture and its decoded latent; a JPEG's is below 5


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
            Hub id, folder, `"tiny"` (the bundled model) or pipeline. A pipeline's transformer or UNet is changed in
            place.
        reward_funcs (callable or `list` of callables, *optional*):
            Rewards in TRL's keyword form: `f(prompts, completions, **kwargs) -> list[float | None]`, `async` or not,
            where `completions`, also given as `images`, is a list of `PIL.Image` and each other column of the data set
            comes by its name. `None` means not applicable, `NaN` failed: such an image is masked. Needed unless
            `train_dataset` holds pictures with their rewards.
        args ([`DGPOConfig`], *optional*):
            Configuration.
        train_dataset (`datasets.Dataset` or other map-style data set):
            Rows with a `prompt`; or pictures to train on offline, without sampling any: a rollout set, such as
            [`~DGPOTrainer.collect_rollouts`] makes, or pairs, in the columns that
            [`~trl_dgpo.rollout_dataset.SavedGroups`] tells of. Its own rewards are used, and it is scored anew where
            `reward_funcs` are given. A picture of another size than the configuration's is scaled and cut.
        eval_dataset (map-style data set or `dict` of them, *optional*):
            Held-out rows.
        eval_reward_funcs (callable or `list` of callables, *optional*):
            What evaluation measures; `reward_funcs` if not given. Needed with an `eval_dataset` where those are not.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler in place of those of `args`.
        peft_config (`~peft.LoraConfig`, *optional*):
            Adapter to train in place of the default LoRA. Without `target_modules` it is put on the
            family's attention projections.

    Attributes:
        policy ([`~trl_dgpo.policy.Policy`]):
            The transformer or UNet, and its views.
        backbone:
            The pipeline behind the family's protocol.
        buffer ([`GroupRolloutBuffer`]):
            The present round.
        saved ([`~trl_dgpo.rollout_dataset.SavedGroups`], *optional*):
            The groups that are trained on offline; `None` where `train_dataset` has prompts.

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
    _record_type = Rollout
    _trains_offline = True  # whether pictures and their latents are enough to train on

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
        has_rewards = not (reward_function is None and reward_funcs is None)
        self.saved = self._saved_groups(train_dataset, has_rewards)
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
            needs_rewards=self.saved is None,
        )
        args, train_dataset = call.args, call.train_dataset if self.saved is None else self.saved
        columns = dataset_columns("train_dataset", train_dataset)
        if self.saved is not None:
            _check_saved_groups(args, self.saved, has_rewards)
        scorer = None
        if has_rewards:
            scorer = RewardScorer(call.reward_funcs, args.reward_weights, args.reward_timeout)
            scorer.check(columns, REWARD_CONTEXT)
        elif args.reward_weights is not None:
            raise ValueError(
                f"`reward_weights` is {args.reward_weights}, and there are no `reward_funcs` to weigh: the saved "
                "rewards are used as they are. Leave it out."
            )
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
        self.buffer = GroupRolloutBuffer(self._record_type)
        self._work: deque[tuple[Part, Fixed, MicroBatch, int]] = deque()
        self._failures, self._constants = FailureWindow(), ConstantWatch()
        self._step_kls: list[Tensor] = []  # of the optimiser step
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
        self._warned_of_size = False
        if self.saved is not None:
            self._check_saved_latent()
        if self.args.image_guard != "off" and self.saved is None:  # saved pictures tell nothing of the policy
            self.add_callback(ImageGuard(self._log_metric, stops=self.args.image_guard == "stop"))
        self._levels = self._train_levels(self.args)
        self._group_index, self._number_in_group = local_rollouts(
            args.prompts_per_round,
            args.num_generations,
            args.updates_per_round,
            self.args.process_index,
            self.args.world_size,
        )

    def _saved_groups(self, train_dataset: Any, has_reward_funcs: bool) -> SavedGroups | None:
        """The groups of a data set of pictures, or `None` if it is one of prompts."""
        if not (SavedGroups.fits(train_dataset) or (not has_reward_funcs and SavedGroups.may_fit(train_dataset))):
            if SavedGroups.may_fit(train_dataset):
                logger.warning(
                    "`train_dataset` has pictures without `reward` or `group`, and `reward_funcs` are given: it is "
                    "taken for one of prompts. Images are sampled for them, and its pictures are rewards' to read."
                )
            return None
        if not self._trains_offline:
            name = "prompt" if "prompt" in train_dataset.column_names else "caption"
            prompts = f"dataset.select_columns(['{name}'])"
            if name != "prompt":
                prompts += f".rename_column('{name}', 'prompt')"
            raise ValueError(
                f"`train_dataset` holds saved pictures, and {self._name} learns from the course of its own sampling. "
                f"Give prompts, with `{prompts}`."
            )
        saved = SavedGroups(train_dataset)
        if not (saved.has_rewards or has_reward_funcs):
            way_out = "a column `reward`, or give `reward_funcs` to score the pictures"
            if "group" not in train_dataset.column_names:
                way_out = "the columns `reward` and `group`: a group is the images of one prompt that are compared"
            raise ValueError(
                f"`train_dataset` holds pictures without rewards: its columns are {train_dataset.column_names}. Add "
                f"{way_out}."
            )
        return saved

    def collect_rollouts(self, num_rounds: int) -> datasets.Dataset:
        """
        Roll out and score the first rounds of a run with the policy as it is, and learn nothing.

        The images are those that training would make if its policy stayed as it is, never the old one: same prompts,
        same noise. Training that is on its way, if a callback asks, goes on as if nothing had been. Kept with
        `save_to_disk` or `push_to_hub` they are a `train_dataset` to train on offline, any trainer of the family and
        any model of the same latents; for a model of others, and to make the set smaller, remove the columns `x0` and
        `x0.shape`.

        One round at a time is in memory. The others are on the disk of each machine, in the cache of `datasets`, until
        the process ends.

        Args:
            num_rounds (`int`):
                Rounds, of `prompts_per_round` groups of `num_generations` images.

        Returns:
            `datasets.Dataset`, see [`~trl_dgpo.rollout_dataset.rounds_to_dataset`], of the images of all processes, on
            each of them.

        Raises:
            `ValueError`: for `num_rounds` below 1, or if this trainer itself trains on saved pictures.
        """
        if self.saved is not None:
            raise ValueError(
                "`train_dataset` holds saved pictures, so nothing is rolled out. To collect rollouts, make a "
                "trainer with prompts."
            )
        if num_rounds < 1:
            raise ValueError(f"`num_rounds` is {num_rounds}; it must be at least 1.")
        columns, folder = RowColumns(getattr(self.train_dataset, "features", None)), self._spare_folder()
        # What a round leaves beside its rollouts is not training's.
        kept = self._metrics, self._stopwatch, self._failures, self._constants
        self._metrics, self._stopwatch = defaultdict(list), type(self._stopwatch)(self.args.device)
        self._failures, self._constants = FailureWindow(), ConstantWatch()
        try:
            for round in range(num_rounds):
                scored = whole_round(self._scored_round(round)[1])
                with self._raising_together("Writing rollouts"):
                    if self.is_local_process_zero():
                        rounds_to_dataset([scored], columns).save_to_disk(folder / str(round))
                del scored  # before the next one is made
        finally:
            self._metrics, self._stopwatch, self._failures, self._constants = kept
        return datasets.concatenate_datasets([datasets.load_from_disk(folder / str(r)) for r in range(num_rounds)])

    def _spare_folder(self) -> Path:
        """One folder for the processes of a machine, as long as this one lives."""
        folder = None
        with self._raising_together("Making a folder"):
            if self.is_local_process_zero():
                cache = Path(datasets.config.HF_DATASETS_CACHE)
                cache.mkdir(parents=True, exist_ok=True)
                folder = tempfile.mkdtemp(prefix="trl_dgpo-rollouts-", dir=cache)
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(gather_object([folder])[self.args.process_index - self.args.local_process_index])

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
        self._step_kls.clear()
        self._failures, self._constants = FailureWindow(), ConstantWatch()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not self._work:
            self._begin_update()
        return self._loss(model, *self._work.popleft())

    def _loss(self, model: nn.Module, part: Part, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        """The loss of a micro-batch at one level."""
        args, rows = self.args, batch.rows
        prediction, target = self._predict(part, rows, level, model=model)
        errors = self._errors(prediction, target, fixed, batch, level)
        loss = self._preference_loss(errors, part, fixed, batch, level)
        if args.kl_coef:
            kl = prediction.new_zeros((), dtype=torch.float32)
            if batch.weighs:
                divergence = denoising_error(prediction, self._base_prediction(fixed, rows, level))
                kl = batch.share * group_mean(self._kl(divergence, part, level), batch.group_index, **batch.sizes)
            # "logsigmoid" has a factor beta in its gradient; the KL term gets it too, to weigh the same.
            loss = loss + self.kl_coef * (args.beta if args.loss_type == "logsigmoid" else 1.0) * kl
            self._metrics["kl"].append(kl.detach())
            if args.kl_target is not None:
                self._step_kls.append(kl.detach())
        return loss

    @property
    def kl_coef(self) -> float:
        """Weight of the KL term: that of `args`, or where the controller of `kl_target` has moved it."""
        if self.args.kl_target is None:
            return self.args.kl_coef
        return self.state.stateful_callbacks.get(_KL_COEF, self.args.kl_coef)

    def end_update(self) -> None:
        """Move the KL term's weight where it holds a target."""
        if self._step_kls:  # not in a step of a method whose loss then has no such term
            args, kl = self.args, torch.stack(self._step_kls).mean()
            self._step_kls.clear()
            self._metrics["kl_coef"].append(self.kl_coef)
            kl = self.accelerator.reduce(kl, "mean").item()
            moved = next_kl_coef(self.kl_coef, kl, target=args.kl_target, rate=args.kl_target_rate)
            # A long time on one side of the target must not take as long to be undone.
            bounds = args.kl_coef / _KL_COEF_RANGE, args.kl_coef * _KL_COEF_RANGE
            self.state.stateful_callbacks[_KL_COEF] = min(max(moved, bounds[0]), bounds[1])
        super().end_update()

    def _errors(self, prediction: Tensor, target: Tensor, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        """The errors that are learned from."""
        return denoising_error(prediction, target)

    def _preference_loss(self, errors: Tensor, part: Part, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        """The loss of a micro-batch at one level, but for the KL term."""
        args, rows = self.args, batch.rows
        if args.clips_errors:
            errors, clipped = clip_errors(errors, fixed.old_errors[level, rows], batch.advantages, args.clip_range)
            self._metrics["clip_ratio"].append(clipped.float() if batch.weighs else clipped[:0].float())
        group = self._group_loss(
            errors,
            None if fixed.reference_errors is None else fixed.reference_errors[level, rows],
            batch.advantages,
            batch.group_index,
            scores=None if fixed.scores is None else fixed.scores[level, batch.groups],
            **batch.sizes,
        )
        loss = batch.share * group.loss
        if fixed.scores is None:
            self._metrics["objective"].append(batch.share * group.objective)
            self._metrics["gate_mean"].append(group.gate[batch.learns])
        elif args.loss_type == "logsigmoid":
            loss = loss - loss.detach() + fixed.objectives[level]  # the value in the log, whatever the micro-batches
        return loss

    def _base_prediction(self, fixed: Fixed, rows: slice | Tensor, level: int) -> Tensor:
        """The frozen model's predictions of some rows, wherever they wait."""
        predictions = fixed.base_predictions[level]
        return predictions[_like(rows, predictions)].to(self.args.device, non_blocking=True)

    def _kl(self, divergence: Tensor, part: Part, level: int) -> Tensor:
        """KL term of each sample, of its squared velocity difference to the base."""
        return divergence

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

    def _begin_update(self) -> None:
        """Roll out where a round begins, then compute all that does not move during the optimiser step."""
        args = self.args
        round, step = divmod(self.state.global_step, args.steps_per_round)
        iteration, update = divmod(self._update_of(step), args.updates_per_round)
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
        self._stopwatch.start("reference")
        part = self._part(round, iteration, update)
        fixed = self._fix(part)
        batches = self._micro_batches(part)
        self._work.extend((part, fixed, batch, level) for level in range(len(part.sigmas)) for batch in batches)
        self._stopwatch.start("update")

    def _update_of(self, step: int) -> int:
        """Which of a round's updates one of its optimiser steps is."""
        return step

    @property
    def _trained(self) -> str | None:
        """The view that learns in this optimiser step, which is the policy if there is none."""
        return None

    @property
    def _shares_noise(self) -> bool:
        """Whether the images of a group are noised alike."""
        return self.args.shared_noise

    def _draw_levels(self, round: int, iteration: int) -> list[float]:
        """The levels of a pass, the same for every group."""
        args = self.args
        stream = generator(args.seed, "levels", round, iteration)
        if args.timestep_sampling == "grid":
            drawn = self._levels[torch.randperm(len(self._levels), generator=stream)[: args.num_train_timesteps]]
        else:
            uniform = torch.rand(args.num_train_timesteps, generator=stream)
            drawn = continuous_levels(uniform, args.t_min, self.backbone.shift_factor, t_max=args.t_max)
        return drawn.tolist()

    def _part(self, round: int, iteration: int, update: int) -> Part:
        """This process's part of an optimiser step."""
        args, device = self.args, self.args.device
        rollout = self.buffer.record.part(update, args.updates_per_round)
        sigmas = self._draw_levels(round, iteration)
        return Part(
            rollout=dataclasses.replace(rollout, conditioning=self._conditioning(rollout, (round, iteration))),
            first_group=int(rollout.groups[0]) - update * args.groups_per_update,
            learned_from=self._learned_from(rollout),
            sigmas=sigmas,
            noise=[self._noise(rollout, (round, iteration, level)) for level in range(len(sigmas))],
            advantages=to_device(rollout.advantages, device),
            group_index=to_device(rollout.local_index, device),
            group_sizes=to_device(rollout.group_sizes, device),
        )

    def _learned_from(self, rollout: Rollout) -> Tensor:
        """Mask of the samples that have a forward."""
        return rollout.valid if self.args.kl_coef else self._moves(rollout)

    def _moves(self, rollout: Rollout) -> Tensor:
        """
        Mask of the samples that change anything where there is no KL term.

        One of advantage 0 (masked, or of a group without preference) does not.
        """
        return rollout.advantages != 0

    def _micro_batches(self, part: Part) -> list[MicroBatch]:
        args, rollout, batches = self.args, part.rollout, []
        for block, rows, weighs in self._blocks(part, args.per_device_train_batch_size):
            index = rollout.local_index[block]
            groups = slice(int(index[0]), int(index[-1]) + 1)
            count = groups.stop - groups.start
            preference = torch.zeros(count).index_add(0, index - groups.start, self._moves(rollout)[block].float())
            batches.append(
                MicroBatch(
                    rows=rows,
                    weighs=weighs,
                    groups=groups,
                    learns=to_device(preference.nonzero()[:, 0], args.device),
                    advantages=part.advantages[rows],
                    group_index=part.group_index[rows] - groups.start,
                    sizes={"group_sizes": part.group_sizes[groups], "num_groups": count},
                    # Trainer takes the mean over micro-steps, DDP over processes, the loss over its call's groups.
                    share=count * args.world_size * args.micro_batches_per_update / args.groups_per_update,
                )
            )
        return batches

    def _blocks(self, part: Part, size: int) -> list[tuple[slice, slice | Tensor, bool]]:
        """
        Consecutive blocks of images, and of each the rows that are learned from, and whether there are any.

        One row always stays, weighing nothing, so that every process takes part in every forward and backward.
        """
        blocks, count = [], len(part.learned_from)
        for start in range(0, count, size):
            block = slice(start, min(start + size, count))
            rows = part.learned_from[block].nonzero()[:, 0] + start
            if len(rows) == block.stop - start:
                blocks.append((block, block, True))  # a view where nothing is left out
            elif len(rows):
                blocks.append((block, to_device(rows, self.args.device), True))
            else:
                blocks.append((block, slice(start, start + 1), False))
        return blocks

    def _conditioning(self, rollout: Rollout, key: tuple[int, int]) -> dict[str, Tensor]:
        if not self.args.prompt_dropout:
            return rollout.conditioning
        draws = [
            torch.rand(1, generator=generator(self.args.seed, "dropout", *key, g)) for g in rollout.groups.tolist()
        ]
        dropped = to_device(torch.cat(draws) < self.args.prompt_dropout, rollout.x0.device)
        empty = self.backbone.negative()
        return {
            name: torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), empty[name].to(rows), rows)
            for name, rows in rollout.conditioning.items()
        }

    def _fix(self, part: Part) -> Fixed:
        """What does not move during an optimiser step, one pass a view, so that weights are switched once a pass."""
        args, using = self.args, self.policy.using
        reference = args.reference if args.reads_reference else None
        merged = self.merges_exactly and args.merge_adapter is not False
        base_errors = old_errors = reference_errors = base_predictions = scores = objectives = None
        if args.keeps_base or reference == "frozen":
            guidance_scale = args.reference_guidance_scale
            base_errors, base_predictions = self._no_grad_pass(
                using("base"), part, guidance_scale, keep=args.keeps_base
            )
        if args.clips_errors or reference == "old":
            old_errors, _ = self._no_grad_pass(using("old", merged=merged), part)
        if reference == "refreshed":
            reference_errors, _ = self._no_grad_pass(using("reference"), part)
        elif reference is not None:
            reference_errors = {"frozen": base_errors, "old": old_errors}[reference]
        if reference is not None and args.is_group_cut:
            errors, _ = self._no_grad_pass(using(self._trained), part)
            scores, objectives = self._whole_scores(part, errors, reference_errors)
        return Fixed(reference_errors, old_errors, base_predictions, scores, objectives)

    def _whole_scores(self, part: Part, errors: Tensor, reference_errors: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the part's groups over all micro-batches and processes, and each level's objective."""
        args, num_groups = self.args, part.rollout.num_groups
        here = slice(part.first_group, part.first_group + num_groups)
        scores = torch.zeros(len(errors) + 1, args.groups_per_update, device=args.device)
        for level in range(len(errors)):
            scores[level, here] = group_scores(
                errors[level],
                reference_errors[level],
                part.advantages,
                part.group_index,
                beta=args.beta,
                group_sizes=part.group_sizes,
                num_groups=num_groups,
            )
        moves = to_device(self._moves(part.rollout).float(), args.device)
        scores[-1, here].index_add_(0, part.group_index, moves)  # whether a group has a preference
        if args.is_group_shared:
            scores, seen = self.accelerator.reduce(scores, "sum"), slice(None)
        else:
            seen = here
        scores, preference = scores[:-1], scores[-1]
        objectives = softplus(scores[:, seen]).mean(1)
        self._metrics["objective"].append(objectives)
        gates = scores[:, seen].sigmoid()
        self._metrics["gate_mean"].append(gates.where(preference[seen] > 0, torch.nan).flatten())
        return scores[:, here], objectives

    def _no_grad_pass(
        self, view: AbstractContextManager, part: Part, guidance_scale: float = 1.0, *, keep: bool = False
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Errors `(levels, images)`, and the predictions of each level if they are to be kept."""
        args, size = self.args, self._rows_without_gradient(guidance_scale)
        errors = torch.zeros(len(part.sigmas), len(part.learned_from), device=args.device)
        blocks = [rows for _, rows, _ in self._blocks(part, size)]
        predictions: list[Tensor] = []
        with view, torch.no_grad(), evaluating(self.policy.model):
            for level in range(len(part.sigmas)):
                for rows in blocks:
                    prediction, target = self._predict(part, rows, level, guidance_scale=guidance_scale)
                    errors[level, rows] = denoising_error(prediction, target)
                    if keep:
                        if len(predictions) == level:
                            predictions.append(_room_for(part.rollout.x0, prediction, args.offload_reference))
                        if isinstance(rows, slice):
                            predictions[level][rows].copy_(prediction, non_blocking=True)
                        else:
                            predictions[level][_like(rows, predictions[level])] = prediction.to(predictions[level])
        return errors, predictions if keep else None

    def _rows_without_gradient(self, guidance_scale: float) -> int:
        """As many as a rollout's forward has: nothing is saved for a backward."""
        rows_at_once = self.args.sample_batch_size * (2 if self.args.sample_guidance_scale > 1 else 1)
        return max(self.args.per_device_train_batch_size, rows_at_once // (2 if guidance_scale > 1 else 1))

    def _predict(
        self,
        part: Part,
        rows: slice | Tensor,
        level: int,
        *,
        model: nn.Module | None = None,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target of some rows, noised here and now: kept for all of them it would fill a GPU."""
        x0, index, sigma = part.rollout.x0[rows], part.group_index[rows], part.sigmas[level]
        noise = part.noise[level][index if self._shares_noise else rows]
        x_t = self.backbone.noise(x0, noise, sigma)
        # The prepared model casts by itself; the bare transformer does not.
        with self.accelerator.autocast() if model is None else nullcontext():
            prediction = self.backbone.predict(
                x_t, sigma, part.conditioning_of(rows), model=model, guidance_scale=guidance_scale
            )
        return prediction, self.backbone.target(x0, noise, sigma)

    def _roll_out(self, round: int) -> None:
        """Sample, score and keep one round: this process's rollouts of it."""
        self.buffer.clear()  # the last round's memory is this one's
        use_old = self.args.old_policy_after is not None and self.state.global_step >= self.args.old_policy_after
        rollout, scored = self._scored_round(round, "old" if use_old else None)
        self.buffer.fill(rollout.to(self.args.device), round)
        self._stopwatch.start("show")
        self._show(scored)
        every = self.args.divergence_rounds
        if every and round and round % every == 0 and "base" in self.policy.kept_views:  # the first has none
            self._metrics["divergence"].append(self._divergence())

    def _divergence(self) -> Tensor:
        """
        Squared distances of the policy's predictions to the base's: of each level, for the first image of each of the
        round's first groups; `NaN` for one that stands for those which other processes have.

        Levels and noise are the same in every round, and nothing is drawn from a stream that training draws from.
        """
        args, rollout, size = self.args, self.buffer.record, self._rows_without_gradient(1.0)
        grid = self.backbone.sigmas(args.sample_num_steps)
        numbers = torch.linspace(0, len(grid) - 1, min(_DIVERGENCE_LEVELS, len(grid))).round().long()
        distances = []
        for start in range(0, _DIVERGENCE_GROUPS, size):  # as many forwards in every process
            groups = range(start, min(start + size, _DIVERGENCE_GROUPS))
            rows = [
                row
                for row, (group, number) in enumerate(zip(rollout.group_index, rollout.number_in_group, strict=True))
                if number == 0 and group in groups
            ]
            here = to_device(torch.tensor(rows or [0]), args.device)
            keys = [(group,) for group in rollout.group_index[rows or [0]].tolist()]
            of_group = to_device(rollout.local_index[rows or [0]], args.device)
            conditioning = {name: values[of_group] for name, values in rollout.conditioning.items()}
            for number, level in enumerate(grid[numbers].tolist()):
                noise = to_device(self._draw(("divergence", number), keys), args.device)
                x_t, predictions = self.backbone.noise(rollout.x0[here], noise, level), []
                for view in ("base", None):
                    with self.policy.using(view), torch.no_grad(), evaluating(self.policy.model):
                        with self.accelerator.autocast():
                            predictions.append(self.backbone.predict(x_t, level, conditioning))
                distance = denoising_error(*predictions)
                distances.append(distance if rows else torch.full_like(distance, torch.nan))
        return torch.cat(distances)

    def _scored_round(self, round: int, view: str | None = None) -> tuple[Rollout, ScoredImages]:
        """This process's rollouts of a round from a view, as they are trained on and as they are looked at."""
        args = self.args
        self._stopwatch.start("rollout")
        groups, index = self._group_index.unique(return_inverse=True)
        rows = self.sampler.rows(round, groups.tolist())
        conditioning = self.backbone.encode([_checked_prompt(row) for row in rows])
        rows = [rows[i] for i in index.tolist()]
        if self.saved is None:
            sampled, images, scores = self._sample_and_score(round, rows, view)
        else:
            sampled, images, scores = self._read_and_score(round, rows)
        # Every process sees all rewards: batch statistics, the log and the decision to stop are the same in each.
        rewards, group_index = self._gather(scores.rewards), self._gather(self._group_index)
        self._failures.update(self._gather(scores.failed))
        if rewards.isnan().all():
            logger.warning("No reward applies to any image of round %d: nothing is learned from it.", round)
        by_name = {name: self._gather(values) for name, values in scores.by_name.items()}
        if self.is_world_process_zero():
            self._constants.update(by_name)
        weighed = self._weighed(rewards, by_name, group_index)
        learned = self._advantages(weighed, group_index)
        advantages = learned["advantages"]
        frac_zero_std = zero_variance(weighed, group_index).float().mean().item()
        self._log_rewards(rewards, group_index, frac_zero_std, advantages, by_name)
        for name, values in scores.metrics.items():
            self._metrics[name] += values
        own = slice(args.process_index * len(rows), (args.process_index + 1) * len(rows))
        rollout = self._record_type(
            **sampled,
            conditioning=conditioning,
            rewards=rewards[own].float(),
            group_index=self._group_index,
            number_in_group=self._number_in_group,
            group_sizes=group_index[~rewards.isnan()].bincount(minlength=args.prompts_per_round)[groups],
            **{name: values[own].float() for name, values in learned.items()},
        )
        scored = ScoredImages(
            round=round,
            images=images,
            rows=rows,
            rewards=scores.rewards,
            by_name=scores.by_name,
            advantages=advantages[own],
            group_index=self._group_index,
            extra=scores.extra,
            x0=sampled["x0"],
        )
        return rollout, scored

    def _advantages(self, rewards: Tensor, group_index: Tensor) -> dict[str, Tensor]:
        """What the record keeps that follows from a round's rewards: one row for each image of all processes."""
        args = self.args
        advantages = group_advantages(
            rewards,
            group_index,
            scale=args.scale_rewards,
            clip=args.advantage_clip,
            recenter_clipped=args.recenter_clipped,
        )
        return {"advantages": advantages}

    def _sample_and_score(
        self, round: int, rows: list[dict], view: str | None, **options
    ) -> tuple[dict[str, Tensor], Tensor, Scores]:
        """
        Of this process's images: what the record keeps of their sampling, pictures and scores.

        Further `options` are those of the backbone's `sample`.
        """
        args = self.args
        keys = list(zip(self._group_index.tolist(), self._number_in_group.tolist(), strict=True))
        sampled = self._sample(
            lambda part: self._draw(("latents", round), keys[part]),
            [row["prompt"] for row in rows],
            batch_size=args.sample_batch_size,
            num_steps=args.sample_num_steps,
            guidance_scale=args.sample_guidance_scale,
            step_noise=self._step_noise(round, keys) if args.sampler == "sde" else None,
            **options,
        )
        # What carries a model is called once, for the whole round; what only needs a CPU, or waits, as images arrive.
        arriving, whole = self.scorer.split() if args.async_reward_computation else (None, self.scorer)
        given_up: set[str] = set()
        x0, images = [], []
        # A thread begins on the first device, whichever this process has.
        on_device = (
            {"initializer": torch.cuda.set_device, "initargs": (args.device,)} if args.device.type == "cuda" else {}
        )
        pool = ThreadPoolExecutor(args.max_workers, **on_device)
        try:
            scoring, scores = [], []
            with self.policy.using(view, merged=self.merges_adapter):
                for part, clean, pictures in sampled:
                    x0.append(clean)
                    images.append(pictures)
                    if arriving is not None:
                        scoring.append(pool.submit(self._score_arriving, arriving, pictures, rows[part], given_up))
                    if args.world_size == 1:  # else the others sample on, and some engines need every process for it
                        for failed in (job for job in scoring if job.done() and job.exception()):
                            failed.result()  # now, not when all is sampled
            self._stopwatch.start("reward")
            images = torch.cat([pictures.wait() for pictures in images])
            with self._raising_together():
                if whole is not None:
                    scores.append(self._score(whole, images, rows))
                if arriving is not None:
                    scores.append(Scores.cat([job.result() for job in scoring]))
                scores = _checked_log(self.scorer.merge(scores))
        finally:
            pool.shutdown(cancel_futures=True)  # where an exception leaves, what has not begun is dropped
        return {"x0": torch.cat(x0)}, images, scores

    def _read_and_score(self, round: int, rows: list[dict]) -> tuple[dict[str, Tensor], Tensor, Scores]:
        """The same of saved images: read, encoded where their latents are not saved, and scored where rewards are."""
        args, deal, saved = self.args, self.sampler.deal(round), []
        with self._raising_together():
            for group in self._group_index.unique().tolist():
                numbers = self._number_in_group[self._group_index == group].tolist()
                saved.append(self.saved.read(deal[group], numbers))
            pictures = [picture for part in saved for picture in part.images]
            self._warn_of_size(pictures)
            images = torch.stack([fitted(picture, args.height, args.width) for picture in pictures])
            x0 = self._latents_of(images, [latent for part in saved for latent in part.x0])
        self._stopwatch.start("reward")
        with self._raising_together():
            if self.scorer is not None:
                return {"x0": x0}, images, _checked_log(self._score(self.scorer, images, rows))
        rewards = torch.cat([part.rewards for part in saved])
        by_name = {"saved": rewards} if self.saved.has_rewards else {}
        return {"x0": x0}, images, Scores(rewards, by_name, torch.zeros(len(rewards), dtype=torch.bool), {}, {})

    def _latents_of(self, images: Tensor, x0: list[Tensor | None]) -> Tensor:
        """Saved latents, and the VAE's of images without one, on the device in float32."""
        if wrong := [
            tuple(latent.shape) for latent in x0 if latent is not None and latent.shape != self._latent_shape
        ]:
            raise ValueError(
                f"`train_dataset` has latents `x0` of shape {wrong[0]}, and those of this model and `resolution` have "
                f"{self._latent_shape}. Set the size of the pictures, or remove the columns `x0` and `x0.shape`: the "
                "pictures are then encoded by this model."
            )
        missing = [i for i, latent in enumerate(x0) if latent is None]
        if missing:
            encoded = self.backbone.encode_images(images[missing]).float()
            if len(missing) == len(x0):
                return encoded
            for i, latent in zip(missing, encoded, strict=True):
                x0[i] = latent.cpu()
        return to_device(torch.stack(x0), self.args.device)

    def _check_saved_latent(self) -> None:
        """Latents of another VAE may have the same shape, and would teach nothing but noise: one is decoded."""
        read = self.saved.read(0, [0])
        if read.x0[0] is None:
            return
        images = torch.stack([fitted(read.images[0], self.args.height, self.args.width)])
        decoded = self.backbone.decode(self._latents_of(images, read.x0)).cpu()
        distance = (decoded.float() - images.float()).abs().mean().item()
        if distance > _LATENT_TOLERANCE:
            raise ValueError(
                f"The first latent `x0` of `train_dataset`, decoded, is {distance:.0f} of 255 away from its picture: "
                "another VAE has made it. Remove the columns `x0` and `x0.shape`: the pictures are then encoded by "
                "this model."
            )

    def _warn_of_size(self, pictures: list[Image.Image]) -> None:
        size = (self.args.width, self.args.height)
        others = {picture.size for picture in pictures} - {size}
        if others and not self._warned_of_size:
            self._warned_of_size = True
            logger.warning(
                "Pictures of `train_dataset` are scaled and cut around their centre to %d x %d, the first from %d x "
                "%d: `resolution` and `width` say what is trained on.",
                *(*size, *min(others)),
            )

    def _score_arriving(
        self, scorer: RewardScorer, pictures: OnTheWay, rows: list[dict], given_up: set[str]
    ) -> Scores:
        return self._score(scorer, pictures.wait(), rows, given_up=given_up)

    def _show(self, scored: ScoredImages) -> None:
        also = {"scored": scored, "trackers": self.trackers, "train_dataset": self.train_dataset}
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_rollout"):
                with self._raising_together("A callback"):  # many act in the main process alone
                    callback.on_rollout(self.args, self.state, self.control, **also)

    def _step_noise(self, round: int, keys: list[tuple[int, int]]) -> Callable[[slice, int], Tensor]:
        return lambda rows, step: to_device(
            self._draw(("step_noise", round), [(*key, step) for key in keys[rows]]), self.args.device
        )

    def _noise(self, rollout: Rollout, key: tuple[int, int, int]) -> Tensor:
        """Noise of a level: one draw a group, or where noise is not shared one an image."""
        if self._shares_noise:
            keys = [(group,) for group in rollout.groups.tolist()]
        else:
            keys = list(zip(rollout.group_index.tolist(), rollout.number_in_group.tolist(), strict=True))
        return to_device(self._draw(("noise", *key), keys), self.args.device)

    def _draw(self, stream: tuple, keys: list[tuple[int, ...]]) -> Tensor:
        """Standard normal latents, one a key: neither micro-batch nor process is ever part of one."""
        return torch.stack(
            [torch.randn(self._latent_shape, generator=generator(self.args.seed, *stream, *key)) for key in keys]
        )

    def _weighed(self, rewards: Tensor, by_name: dict[str, Tensor], group_index: Tensor) -> Tensor:
        """What advantages are made of: the rewards' weighted sum, or that of their normalised values."""
        if self.args.multi_objective_aggregation == "sum_then_normalize" or self.scorer is None:
            return rewards
        return normalize_then_sum(
            torch.stack([*by_name.values()]), self.scorer.weights, group_index, valid=~rewards.isnan()
        )

    def _log_metric(self, name: str, value: float) -> None:
        """A number for the next log, the same in every process."""
        self._metrics[name].append(value)

    def _log_rewards(
        self,
        rewards: Tensor,
        groups: Tensor,
        frac_zero_std: float,
        advantages: Tensor,
        by_name: dict[str, Tensor],
    ) -> None:
        spread = [nanstd(rewards[groups == group]) for group in groups.unique()]
        self._metrics["reward"].append(rewards.nanmean().item())
        self._metrics["reward_std"].append(torch.tensor(spread).nanmean().item())
        self._metrics["frac_reward_zero_std"].append(frac_zero_std)
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
            self.buffer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), self.args.device)
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
        kept = sigmas[trainable_levels(sigmas, args.t_min, self.backbone.shift_factor, t_max=args.t_max)]
        if args.timestep_sampling == "grid" and args.num_train_timesteps > len(kept):
            raise ValueError(
                f"`num_train_timesteps` ({args.num_train_timesteps}) is more than the {len(kept)} levels that `t_min` "
                f"({args.t_min}) and `t_max` ({args.t_max}) leave of `sample_num_steps` ({args.sample_num_steps}): "
                f"{[round(sigma, 3) for sigma in kept.tolist()]}. Lower `num_train_timesteps` or `t_min`, raise "
                "`sample_num_steps`, or use `timestep_sampling='continuous'`."
            )
        return kept

    def _views(self, args: DGPOConfig) -> tuple[str, ...]:
        used = {
            "old": args.clips_errors
            or (args.old_policy_after is not None and self.saved is None)
            or (args.reads_reference and args.reference == "old"),
            "reference": args.reads_reference and args.reference == "refreshed",
            "base": args.keeps_base or (args.reads_reference and args.reference == "frozen"),
        }
        return tuple(view for view, is_used in used.items() if is_used)


@dataclass(frozen=True)
class Part:
    """One process's part of an optimiser step: the images' own tensors are views of the round's."""

    rollout: Rollout
    first_group: int  # of its groups, among those of the whole step
    learned_from: Tensor  # mask of the images that change anything, on the CPU
    sigmas: list[float]
    noise: list[Tensor]  # of each level, one draw a group
    advantages: Tensor  # this and the rest on the device
    group_index: Tensor
    group_sizes: Tensor

    @classmethod
    def extending(cls, part: Part, **fields: Any) -> Part:
        """A part, with what a subclass adds to it."""
        return cls(**{field.name: getattr(part, field.name) for field in dataclasses.fields(part)}, **fields)

    def conditioning_of(self, rows: slice | Tensor) -> dict[str, Tensor]:
        """One row an image, of those kept one a group."""
        index = self.group_index[rows]
        return {name: of_groups[index] for name, of_groups in self.rollout.conditioning.items()}


@dataclass(frozen=True)
class Fixed:
    """What stays as it is while the policy learns from a part; `None` where the loss has no use for it."""

    reference_errors: Tensor | None  # (levels, images)
    old_errors: Tensor | None
    base_predictions: list[Tensor] | None  # of each level
    scores: Tensor | None  # (levels, groups, ...) of whole groups, where a micro-batch may have only parts of them
    objectives: Tensor | None  # (levels,)


@dataclass(frozen=True)
class MicroBatch:
    """What is trained on at once, of a part's images and groups."""

    rows: slice | Tensor
    weighs: bool  # a row that is there for the backward's sake alone does not
    groups: slice
    learns: Tensor  # groups with a preference
    advantages: Tensor
    group_index: Tensor
    sizes: dict[str, Any]
    share: float  # factor that makes the mean over all micro-batches the mean over all groups


def _room_for(x0: Tensor, prediction: Tensor, is_offloaded: bool) -> Tensor:
    """Memory for one prediction an image, where copies to and from the device make nobody wait."""
    if not is_offloaded:
        return torch.empty_like(x0, dtype=prediction.dtype, device=prediction.device)
    return torch.empty(x0.shape, dtype=prediction.dtype, pin_memory=prediction.is_cuda)


def _like(rows: slice | Tensor, other: Tensor) -> slice | Tensor:
    """Rows as an index of a tensor that may wait on the CPU."""
    return rows if isinstance(rows, slice) else rows.to(other.device)


def _check_saved_groups(args: DGPOConfig, saved: SavedGroups, has_reward_funcs: bool) -> None:
    smallest, largest = int(saved.sizes.min()), int(saved.sizes.max())
    if smallest < args.num_generations:
        count = int((saved.sizes < args.num_generations).sum())
        raise ValueError(
            f"`num_generations` is {args.num_generations}, and {count} of the {len(saved)} groups of `train_dataset` "
            f"are smaller (its groups have {smallest} to {largest} images; of larger ones the first are taken). Set "
            f"`num_generations={smallest}`, or leave out the smaller groups."
        )
    size = f"{smallest} to {largest}" if largest > smallest else smallest
    left = f", of which the first {args.num_generations} are taken" if largest > args.num_generations else ""
    rewards = "rewards computed anew" if has_reward_funcs else f"{'their own' if saved.has_rewards else 'no'} rewards"
    logger.log(
        logging.WARNING if left or has_reward_funcs else logging.INFO,
        "Training on %d saved groups of %s images%s, with %s; nothing is sampled.",
        *(len(saved), size, left, rewards),
    )


def _checked_log(scores: Scores) -> Scores:
    if taken := [name for name in scores.metrics if name in _OWN_METRICS or name.startswith(_OWN_PREFIXES)]:
        raise ValueError(f"A reward logs {taken} by `log_metric`, which are the trainer's own names. Rename them.")
    return scores


def _checked_prompt(row: Any) -> str:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"A row of `train_dataset` is {row!r:.200}; it needs a column `prompt` of type `str`.")
    return prompt
