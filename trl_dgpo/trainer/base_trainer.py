"""
What every trainer of this package has in common: a diffusion model in the place of a language model.

The model and its views, checkpoints, evaluation, pictures, logging and the Hub are here; what a round is and what is
learned from it is the method's own trainer's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from ..backbones import access, family_of, load_backbone, to_device
from ..callbacks import (
    CompletionsCallback,
    RewardProgressCallback,
    RunLogCallback,
    SampleImagesCallback,
    Trackers,
)
from ..checkpoints import damage, newest_first, not_written, rotate, seal
from ..ddpo_compat import DDPOFields, GRPOFields, PromptStream
from ..engines import ENGINES, check_engine
from ..evaluation import evaluation_latents, evaluation_metrics
from ..faults import StepGuard, StopSignals, check_output_dir, is_lost_process, random_states
from ..field_types import check_path
from ..guards import HeldOutGuard
from ..hub import (
    RunDescription,
    is_repo_id,
    remove_snapshots,
    tracker_links,
    upload,
    write_model_card,
)
from ..image_measures import measure_images
from ..plan import what_would_fit
from ..policy import Adapter, Policy, lora_config, read_adapter, take_adapter
from ..prompt_embeds import precompute
from ..rewards.scoring import RewardFunc, RewardScorer, RewardsFailedError, Scores
from ..run_files import aside, publish, publish_files, restore_replaced
from ..tiny import BUNDLED, pipeline_source
from .dgpo_config import DGPOConfig


logger = logging.getLogger(__name__)

# Other libraries' names are spent by now, or copies of another field's value.
_NOT_OF_THE_METHOD = {
    field.name for base in (_BaseConfig, DDPOFields, GRPOFields) for field in dataclasses.fields(base)
}

Model = str | os.PathLike | DiffusionPipeline | PeftModel

PROMPTS_AHEAD = 256  # encoded at once before they are sampled from
REWARD_CONTEXT = ("trainer_state",)

_SKIPPED_STEPS = "skipped_steps.json"  # in a checkpoint, once there is any


class DiffusionTrainer(_BaseTrainer):
    r"""
    Base of the trainers: Trainer around a diffusion pipeline's transformer or UNet.

    Args:
        model (`str`, `os.PathLike`, `~diffusers.DiffusionPipeline` or `~peft.PeftModel`):
            See [`DGPOTrainer`].
        args ([`DGPOConfig`]):
            Configuration.
        scorer ([`~trl_dgpo.rewards.scoring.RewardScorer`], *optional*):
            Training rewards, if any are computed.
        eval_reward_funcs (callable or `list` of callables, *optional*):
            Evaluation rewards in place of those.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, peft_config, quantization_config:
            See [`DGPOTrainer`].
    """

    # The loss is a mean over a micro-batch: Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    _config_class = DGPOConfig
    _companions: ClassVar[tuple[str, ...]] = ()  # adapters that a method trains beside the policy
    _old_of: ClassVar[str | None] = None  # the one whose average `old` is, or the policy

    def __init__(
        self,
        *,
        model: Model,
        args: DGPOConfig,
        scorer: RewardScorer | None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | None = None,
        quantization_config: Any = None,
    ):
        _check_arguments(model, args, peft_config, quantization_config)
        self._check_companions(args, optimizers)
        if args.should_save:
            check_output_dir(args.output_dir)
        if args.eval_on_start and eval_dataset is None:
            args = copy.copy(args)  # the caller's may serve another trainer
            args.eval_on_start = False
        self.scorer = scorer
        self.eval_scorer = (
            scorer if eval_reward_funcs is None else RewardScorer(eval_reward_funcs, timeout=args.reward_timeout)
        )
        if eval_dataset is not None and self.eval_scorer is None:
            raise ValueError(
                "`eval_dataset` is given and nothing that measures its images: give `eval_reward_funcs`, or leave out "
                "`eval_dataset`."
            )
        _check_reward_limits(args, *filter(None, (self.scorer, self.eval_scorer)))
        for name, dataset in _named(eval_dataset).items():
            self.eval_scorer.check(dataset_columns(name, dataset), REWARD_CONTEXT)
        _check_best_metric(args, eval_dataset)
        if args.precompute_prompt_embeds and is_stream(train_dataset):
            raise ValueError(
                "`precompute_prompt_embeds` encodes every prompt before training, and `train_dataset` gives them only "
                "as it goes on. Turn that off, or give a `datasets.Dataset`."
            )
        if args.reward_self_test:
            self._test_rewards(args, train_dataset, eval_dataset)

        set_seed(args.seed)  # before the adapter draws its start, and after rewards may have drawn something
        start = self._load(model, args, quantization_config)
        self._latent_shape = self.backbone.latent_shape(args.height, args.width)
        peft_config = self._adapter_config(args, peft_config, start)
        self.backbone.denoiser._internal_dict = _ModelConfig(self.backbone.denoiser.config)
        shown = args.num_log_images > 0
        views = (*(("ema",) if args.save_ema or eval_dataset is not None or shown else ()), *self._views(args))
        self.policy = Policy(
            self.backbone.denoiser, peft_config, views, start, companions=self._companions, old_of=self._old_of
        )
        if peft_config is not None:  # PEFT has asked the denoiser, which is only a part of the model
            peft_config.base_model_name_or_path, peft_config.revision = self.base_model, self._base_revision
        if args.merge_adapter:
            self.policy.using(merged=True)  # which says why, where it cannot be
        if args.torch_compile:
            self.backbone.compile_blocks(args.torch_compile_backend, args.torch_compile_mode)
        # Trainer asks the model for this; diffusers has it under another name.
        self.policy.model.activation_checkpointing_enable = lambda **_: self.backbone.enable_gradient_checkpointing()

        self._metrics: dict[str, list[Tensor | float]] = defaultdict(list)
        self._stopwatch = _Stopwatch(args.device)
        self._staging: Path | None = None  # where a checkpoint is being written
        self._saved_step: int | None = None  # of the last checkpoint of this call of `train`
        self._resumed_from: Path | None = None
        self._signals, self._guard = StopSignals(), StepGuard(args.max_skipped_steps, args.skip_grad_norm)
        self._step_loss: Tensor | float = 0.0  # of the micro-steps so far
        self._skips_step = False

        super().__init__(
            model=self.policy.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.backbone.place(self.args.device)
        if self.args.precompute_prompt_embeds:
            self._precompute_prompt_embeds()
        self.add_callback(_MoveAverages(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback)
        self._add_pictures()
        self._watch_evaluations()
        own_steps = args.max_steps // args.num_adapters
        if args.max_steps > 0 and own_steps < args.ema_every and "ema" in self.policy.views:
            logger.warning(
                "`max_steps` (%d) gives the policy fewer steps than `ema_every` (%d): the `ema` weights, which are "
                "evaluated%s, will not move. Lower `ema_every`.",
                args.max_steps,
                args.ema_every,
                " and saved" if args.save_ema else "",
            )

    @property
    def merges_adapter(self) -> bool:
        """Whether rollouts run with the LoRA merged into the weights."""
        return self.merges_exactly if self.args.merge_adapter is None else self.args.merge_adapter

    @property
    def merges_exactly(self) -> bool:
        """Whether merging rounds no more than a forward does; elsewhere errors would move by it, not by learning."""
        return self.policy.merges_exactly and not (self.args.bf16 or self.args.fp16)

    def _views(self, args: DGPOConfig) -> tuple[str, ...]:
        """Views of the policy that the method uses, besides `ema`."""
        raise NotImplementedError

    def _check_companions(self, args: DGPOConfig, optimizers: tuple) -> None:
        if not self._companions:
            return
        if optimizers != (None, None):
            raise ValueError(
                f"`optimizers` is given, and {self._name} makes its own: it trains adapters that do not exist yet, "
                "each at a rate of its own. Leave it out, and set the rates in `args`."
            )
        if (engine := check_engine(args)) in ("fsdp2", "zero2"):
            raise ValueError(
                f"{ENGINES[engine].name} is asked for, and {self._name} trains several adapters, one of them in each "
                "optimiser step; what shards gradients or moments needs all of them in each. Use plain DDP "
                "(`accelerate launch --multi_gpu` or `torchrun`)."
            )

    def _add_pictures(self) -> None:
        """The callbacks by which a run is looked at, while it goes on and afterwards."""
        args = self.args
        self.trackers = Trackers(self.callback_handler.callbacks, lambda: self.state.global_step)
        self.add_callback(RunLogCallback(self.describe()))
        if args.log_completions:
            self.add_callback(CompletionsCallback(args.num_completions_to_print))
        dataset, scorer = self.train_dataset, self.scorer
        if evaluated := _named(self.eval_dataset):
            dataset, scorer = next(iter(evaluated.values())), self.eval_scorer
        if rows := _first_rows(dataset, args.num_log_images):
            score = _unscored if scorer is None else partial(self._score, scorer)
            self.add_callback(SampleImagesCallback(self.generate, score, rows, self.trackers, args.log_images_steps))

    def _watch_evaluations(self) -> None:
        args = self.args
        if prefixes := list(_named(self.eval_dataset, "eval")):
            metric = _name_in_log(args.metric_for_best_model or f"{prefixes[0]}_reward")
            self.add_callback(HeldOutGuard(metric, args.greater_is_better is not False, args.early_stopping_patience))

    def describe(self) -> dict[str, Any]:
        """
        What this run is, for `run.json`, the report and the model card.

        Returns:
            `dict` with `method`, `base_model`, `config` (every field of this package's, and those of
            `TrainingArguments` that are not at their defaults, without tokens and folders), `rewards` and `versions`.
        """
        return self._description().record()

    def _description(self, **more) -> RunDescription:
        return RunDescription(
            method=self._name,
            paper=self._paper,
            config=self.args,
            method_fields=tuple(sorted({f.name for f in dataclasses.fields(self.args)} - _NOT_OF_THE_METHOD)),
            base_model=self.base_model,
            pipeline_class=type(self.backbone.pipeline).__name__,
            denoiser=self.backbone.DENOISER,
            pipeline_call=self.backbone.pipeline_call(self.args.eval_guidance_scale),
            reward_names=() if self.scorer is None else tuple(self.scorer.names),
            hub_model_id=self.hub_model_id,
            **more,
        )

    # -- the model ----------------------------------------------------------------------------------------------------

    def _load(self, model: Model, args: DGPOConfig, quantization_config: Any) -> Adapter | None:
        """Make `self.backbone`; return the LoRA that the model brings."""
        init_kwargs = dict(args.model_init_kwargs or {})
        revision = init_kwargs.pop("revision", None)
        start = denoiser = None
        if isinstance(model, PeftModel):
            denoiser, start = take_adapter(model)
        elif isinstance(model, DiffusionPipeline):
            name = family_of(model).DENOISER
            bare, start = take_adapter(getattr(model, name))
            setattr(model, name, bare)
        elif model != BUNDLED and isinstance(model, (str, os.PathLike)):
            start = read_adapter(model, revision=revision, **access(init_kwargs))
        if start is not None and not isinstance(model, DiffusionPipeline):
            # On the Hub the revision given is the LoRA's; its configuration names the base model's.
            is_here = isinstance(model, PeftModel) or Path(model).exists()
            revision = (revision if is_here else None) or start.config.revision
            if start.base_model is None:
                raise ValueError(
                    f"The LoRA {model if isinstance(model, (str, os.PathLike)) else 'in `model`'} does not name the "
                    "pipeline that it belongs to (`base_model_name_or_path`). Load that pipeline, give it the LoRA "
                    "(`pipeline.load_lora_weights(...)`, or the `PeftModel` as its transformer or UNet), and pass it "
                    "as `model`."
                )
            model = start.base_model
        self.backbone = load_backbone(
            pipeline_source(model),
            revision=revision,
            dtype=None if isinstance(model, DiffusionPipeline) else _load_dtype(args),
            init_kwargs=init_kwargs,
            quantization_config=quantization_config,
            denoiser=denoiser,
            sampler=args.sampler,
            sigmas=args.sigmas,
            image_size=(args.height, args.width),
            max_sequence_length=args.max_sequence_length,
            negative_prompt=args.negative_prompt,
            embedded_guidance=args.embedded_guidance,
            offload_text_encoders=args.offload_text_encoders,
            decode_batch_size=args.decode_batch_size,
            vae_tiling=args.vae_tiling,
        )
        # A folder of this installation would name nothing elsewhere.
        self._base_revision = revision
        name = BUNDLED if model == BUNDLED else self.backbone.pipeline.config.get("_name_or_path")
        self.base_model = None if name is None else os.fspath(name)
        return start

    def _precompute_prompt_embeds(self) -> None:
        datasets = [self.train_dataset, *_named(self.eval_dataset).values()]
        prompts = [prompt for dataset in datasets for prompt in _prompts(dataset)]
        with self.args.main_process_first(desc="encoding prompts"):  # the others find them on disk
            self.backbone.prompt_embeds = precompute(
                [*prompts, self.args.negative_prompt], self.backbone.encode, key=self.backbone.embeds_key()
            )

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        # `torch_compile` is of the blocks here, in place, for rollouts too; not of what Accelerate wraps.
        arguments.pop("dynamo_plugin", None)
        return arguments

    def _adapter_config(
        self, args: DGPOConfig, peft_config: LoraConfig | None, start: Adapter | None
    ) -> LoraConfig | None:
        if start is not None:
            given = {"`full_finetuning`": args.full_finetuning, "`peft_config`": peft_config is not None}
            if conflict := [name for name, is_given in given.items() if is_given]:
                raise ValueError(
                    f"`model` brings a LoRA that training goes on from, with its own configuration, and {conflict[0]} "
                    "asks for something else. Leave that out, or merge the LoRA into the weights first "
                    "(`pipeline.fuse_lora()`, then `pipeline.unload_lora_weights()`)."
                )
            peft_config = copy.deepcopy(start.config)
            peft_config.inference_mode = False
        elif args.full_finetuning:
            return None
        else:
            peft_config = copy.deepcopy(peft_config) or lora_config(self.backbone.LORA_TARGETS, **args.default_lora)
            peft_config.target_modules = peft_config.target_modules or list(self.backbone.LORA_TARGETS)
        peft_config.task_type = None  # TRL's own `get_peft_config` says CAUSAL_LM, which PEFT takes at its word
        peft_config.base_model_name_or_path = None
        return peft_config

    def _sample(
        self,
        draw: Callable[[slice], Tensor],
        prompts: list[str],
        *,
        batch_size: int,
        num_steps: int,
        guidance_scale: float,
        step_noise: Callable[[slice, int], Tensor | None] | None = None,
        **options,
    ) -> Iterator[tuple[slice, Tensor, OnTheWay]]:
        """
        A sub-batch at a time, from the latents that `draw` gives for its rows: those rows, clean latents on the device
        and uint8 images on their way to the CPU. Further `options` are those of the backbone's `sample`.

        The view to sample from is entered around the loop over this, not here: a generator that is left by an
        exception keeps what it has entered.
        """
        ahead = batch_size * max(1, PROMPTS_AHEAD // batch_size)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            if start % ahead == 0:
                self.backbone.remember(prompts[start : start + ahead])
            with torch.no_grad(), self.accelerator.autocast():
                clean = self.backbone.sample(
                    to_device(draw(rows), self.args.device),
                    self.backbone.encode(prompts[rows]),
                    num_steps=num_steps,
                    guidance_scale=guidance_scale,
                    step_noise=None if step_noise is None else lambda step, rows=rows: step_noise(rows, step),
                    **options,
                )
            with torch.no_grad():
                images = OnTheWay.send(self.backbone.decode(clean))
            yield rows, clean.float(), images

    def _test_rewards(self, args: DGPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
        tested = {self.scorer: [train_dataset]}  # once, where evaluation has the same
        tested.setdefault(self.eval_scorer, []).extend(_named(eval_dataset).values())
        for scorer, datasets in tested.items():
            row = next((row for dataset in datasets for row in _first_rows(dataset, 1)), None)
            if scorer is not None and datasets:
                scorer.self_test(row, args.height, args.width, trainer_state=TrainerState())

    def _score(self, scorer: RewardScorer, images: Tensor, rows: list[dict], **options) -> Scores:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return scorer(images, [row["prompt"] for row in rows], columns, trainer_state=self.state, **options)

    @contextmanager
    def _raising_together(self, what: str = "Scoring") -> Iterator[None]:
        """What is raised in here by one process is told to all, which would wait for it at the next gathering."""
        if self.args.world_size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        told = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        if others := [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
            raise RuntimeError(f"{what} failed in {len(others)} of {len(told)} processes. " + "; ".join(others))

    def _gather(self, values: Tensor) -> Tensor:
        # One process keeps its float64, which not every device has.
        return (
            values.cpu() if self.args.world_size == 1 else self.accelerator.gather(values.to(self.args.device)).cpu()
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[str], *, view: str | None = "export", num_images: int = 1) -> Tensor:
        """
        Evaluation images of prompts: fixed noise, `eval_num_steps`, no process but this one.

        Args:
            prompts (`list[str]`):
                The prompts.
            view (`str`, *optional*, defaults to `"export"`):
                Weights to sample from: `"export"` (what is evaluated: `ema`, or the policy in a run that keeps no
                `ema`), `"base"`, `"ema"` or another view of the policy, or `None` for the policy.
            num_images (`int`, *optional*, defaults to `1`):
                Images of each prompt.

        Returns:
            `torch.Tensor` of shape `(len(prompts) * num_images, 3, H, W)`, uint8, on the CPU.

        Raises:
            `ValueError`: if there is no such view.
        """
        args, kept = self.args, self.policy.kept_views
        if view == "export":
            view = "ema" if "ema" in kept else None
        if view is not None and view not in kept:
            raise ValueError(f"`view` is {view!r}; this run has {kept}, and `None` for the policy itself.")
        with self.policy.using(view):
            sampled = self._sample(
                evaluation_latents(prompts, num_images, self._latent_shape).__getitem__,
                [prompt for prompt in prompts for _ in range(num_images)],
                batch_size=args.per_device_eval_batch_size,
                num_steps=args.eval_num_steps,
                guidance_scale=args.eval_guidance_scale,
            )
            sent = [images for *_, images in sampled]
        return torch.cat([images.wait() for images in sent])

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Rewards and image statistics on held-out prompts, with the `ema` weights.

        Args:
            eval_dataset (data set or `dict` of them, *optional*):
                The trainer's `eval_dataset` if not given.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the names.

        Returns:
            `dict[str, float]`, see [`~trl_dgpo.evaluation.evaluation_metrics`].
        """
        datasets = _named(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if not datasets:
            raise ValueError("There is nothing to evaluate: give `eval_dataset` here or to the trainer.")
        metrics = {}
        for prefix, dataset in datasets.items():
            dataset_columns(prefix, dataset)
            metrics |= self._evaluate_one(dataset, prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_one(self, dataset: Any, prefix: str) -> dict[str, float]:
        args, start = self.args, time.perf_counter()
        rows = list(islice(iter_rows(dataset), args.process_index, None, args.world_size))
        if self.policy.is_sharded and len(set(gather_object([len(rows)]))) > 1:
            raise ValueError(
                f"`{prefix}` has no equal shares for {args.world_size} processes, and under FSDP2 each takes part in "
                "every forward. Add or leave out rows."
            )
        mine = []
        if rows:
            images = self.generate([row["prompt"] for row in rows], num_images=args.eval_num_images)
            rows = [row for row in rows for _ in range(args.eval_num_images)]
        with self._raising_together():
            if rows:
                # Numbers alone: not the pictures, and not `extra`, which may be anything.
                mine = [(self._score(self.eval_scorer, images, rows)._replace(extra={}), measure_images(images))]
        shards = gather_object(mine)
        measures = {name: torch.cat([shard[name] for _, shard in shards]) for name in shards[0][1]}
        metrics = evaluation_metrics(Scores.cat([scores for scores, _ in shards]), measures, prefix)
        return metrics | {f"{prefix}_runtime": round(time.perf_counter() - start, 4)}

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: the means since the last one, over all processes, NaN dropped
            own = {}
            for name, values in self._metrics.items():
                if isinstance(values[0], Tensor):  # of one number or several, waited for all at once
                    numbers = torch.cat([value.reshape(-1) for value in values]).cpu().double()
                else:
                    numbers = torch.tensor(values, dtype=torch.float64)
                own[name] = (numbers.nansum().item(), (~numbers.isnan()).sum().item())
            self._metrics.clear()
            shards = gather_object([own])
            for name in dict.fromkeys(name for shard in shards for name in shard):
                sums, counts = zip(*(shard[name] for shard in shards if name in shard), strict=True)
                if any(counts):
                    logs[name] = sum(sums) / sum(counts)
            if self._guard.total:
                logs["skipped_steps"] = self._guard.total
        super().log(logs, start_time)

    def move_averages(self, step: int) -> None:
        """Move the averaged weights after the optimiser step of this number, from 0."""
        if "old" in self.policy.views:
            self.policy.update_old(step)
        if "ema" in self.policy.views and (step + 1) % self.args.ema_every == 0:
            self.policy.update_ema(step)

    def end_update(self) -> None:
        """Log the seconds of an optimiser step, with those of the round that it began."""
        self._stopwatch.start(None)
        for name, seconds in self._stopwatch.seconds.items():
            self._metrics[f"time/{name}"].append(seconds)
        self._stopwatch.reset()

    def _send_telemetry(self) -> None:
        """Nothing is sent: TRL's report reads a transformers configuration, which a diffusers model has not."""

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train from the start, or go on from a checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the last in `output_dir`, or if that is damaged the last that is
                not, with a warning; `args.resume_from_checkpoint` if not given. What follows is, to the bit on a CPU,
                what would have followed without the interruption, given the same number of processes and rewards and
                prompts that keep no state of their own.
            **kwargs:
                As of [`~transformers.Trainer.train`].

        The first SIGTERM or SIGUSR1, in any process, ends the run after the present optimiser step, with a checkpoint
        and `SystemExit(128 + signal)`.

        Raises:
            `ValueError`: if a file of the checkpoint is damaged, with its name and that of a whole checkpoint.
            `RewardsFailedError`: if too many rewards failed, with a checkpoint written first.
            `RuntimeError`: if `max_skipped_steps` optimiser steps in a row were not taken, with a checkpoint written
                first; if another process is gone.
            `OSError`: if a checkpoint cannot be written; earlier ones are as they were.
            `torch.OutOfMemoryError`: with what would fit.
        """
        # Nothing of an earlier call, which may have been interrupted anywhere, goes on.
        self._forget()
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if self.args.should_save:
            restore_replaced(Path(self.args.output_dir))
            remove_snapshots(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        self._look_for_shared_folder()
        args = self.args
        if resume_from_checkpoint and self.is_deepspeed_enabled:
            raise ValueError(
                "`resume_from_checkpoint` under DeepSpeed would bring back the weights and not their averages, nor "
                "the round. Start anew from what was saved, or resume with DDP or FSDP2."
            )
        self._restore_random = random_states()  # those between two optimiser steps
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
            self._resumed_from = Path(resume_from_checkpoint).absolute()
            self.args = copy.copy(args)
            self.args.eval_on_start = False  # that start was an earlier call's
        try:
            with (
                _switching_modes_quickly(self.policy.model),
                _switching_modes_quickly(self.backbone.denoiser),
                self._explaining_faults(),
                self._signals,
            ):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args = args
        if self._signals.received:  # after the last step, where nothing is left to be saved
            raise SystemExit(128 + self._signals.received)
        return output

    def _look_for_shared_folder(self) -> None:
        if self.args.world_size == 1 or self.args.save_on_each_node:
            return
        mark = Path(self.args.output_dir) / "_shared"
        if self.args.should_save:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.accelerator.wait_for_everyone()
        if not mark.exists():
            logger.warning(
                "`output_dir` (%s) on %s is not the folder that the first process writes to: checkpoints would lack "
                "this process's part, and could not be resumed. Share the folder, or set `save_on_each_node=True`.",
                *(self.args.output_dir, platform.node()),
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark.unlink(missing_ok=True)  # another run may have begun in this folder

    def _forget(self) -> None:
        self._metrics.clear()
        self._stopwatch.reset()
        self._saved_step, self._resumed_from, self._step_loss, self._skips_step = None, None, 0.0, False
        self._guard = StepGuard(self.args.max_skipped_steps, self.args.skip_grad_norm)

    def _whole_checkpoint(self, asked: str | os.PathLike | bool) -> str:
        """The checkpoint that is asked for, or of a run's the newest that is whole for every process that reads it."""
        if asked is not True:
            if (wrong := self._damage(Path(asked))) is None:
                return os.fspath(asked)
            others = [path for path in self._checkpoints(Path(asked).parent) if path.name != Path(asked).name]
            whole = next((path for path in others if self._damage(path) is None), None)
            way_out = "There is no whole one beside it."
            if whole is not None:
                way_out = f"The newest that is whole is {os.fspath(whole)!r}."
            raise ValueError(f"The checkpoint {os.fspath(asked)!r} is damaged: {wrong}. {way_out}")
        found, broken = self._checkpoints(Path(self.args.output_dir)), {}
        for path in found:
            if (wrong := self._damage(path)) is None:
                for name, what in broken.items():
                    logger.warning(
                        "%s is damaged: %s. Training goes on from %s, and repeats the steps after it.",
                        *(name, what, path),
                    )
                return os.fspath(path)
            broken[path.name] = wrong
        raise ValueError(
            f"There is no {'whole ' if found else ''}checkpoint in {self.args.output_dir!r} to resume from"
            + "".join(f"; {what}" for what in broken.values())
            + ". Start anew, without `resume_from_checkpoint`."
        )

    def _checkpoints(self, directory: Path) -> list[Path]:
        """Those of a folder, newest first, as the first process sees it: all look at the same ones."""
        return [directory / name for name in gather_object([[path.name for path in newest_first(directory)]])[0]]

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, as the processes that wrote it see it, the same in all."""
        told = gather_object([damage(checkpoint) if self.args.should_save else None])
        return next((what for what in told if what is not None), None)

    # -- faults -------------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Trainer asks for it between the last backward and the optimiser's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # whose engine has taken the step already
            self._check_step(model, grad_norm)
        return grad_norm

    def _check_step(self, model: nn.Module, grad_norm: Tensor) -> None:
        """Leave out a step that would spoil the weights: without gradients no optimiser of torch moves anything."""
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        on_device = {"dtype": torch.float32, "device": self.args.device}
        # One wait for both.
        loss, norm = torch.stack([torch.as_tensor(value, **on_device) for value in (self._step_loss, norm)]).tolist()
        self._step_loss = 0.0
        scaler = self.accelerator.scaler
        # Below a scale of 1 it is not the scale that makes gradients overflow.
        is_scaled = scaler is not None and not math.isfinite(norm) and scaler.get_scale() >= 1
        self._skips_step = self._guard.skips(self.state.global_step + 1, loss, norm, is_scaled)
        if self._skips_step:
            model.zero_grad()

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # The end of an optimiser step, where everything is as a checkpoint keeps it.
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._guard.is_exhausted:
            text = self._guard.exhausted(self.state.global_step)
            # Whoever goes on from here has changed something; a checkpoint of this step may have the old count.
            self._guard.in_a_row, self._saved_step, self._resumed_from = 0, None, None
            raise RuntimeError(f"{text} {self._save_to_go_on()}")
        number = int(self._gather(torch.tensor([self._signals.received])).max())
        if number:
            where = self._save_to_go_on()
            if self.is_world_process_zero():
                logger.warning(
                    "%s: the run ends after optimiser step %d, with exit code %d. %s",
                    *(signal.Signals(number).name, self.state.global_step, 128 + number, where),
                )
            raise SystemExit(128 + number)
        self._restore_random = random_states()

    def _save_to_go_on(self) -> str:
        """Write a checkpoint of the present step, unless there is one, and say where the state is."""
        args, step = self.args, self.state.global_step
        if args.save_strategy == SaveStrategy.NO or args.save_only_model:
            return "Its state is not kept, since `save_strategy` is 'no' or `save_only_model` is set."
        if step == 0:
            return "No optimiser step was taken, so there is nothing to keep."
        place = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_step != step and self._resumed_from != place.absolute():
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
        return f"Its state is in {place}: go on with `resume_from_checkpoint=True`."

    @contextmanager
    def _explaining_faults(self) -> Iterator[None]:
        """What ends a training that the user can do something about is told with what to do."""
        try:
            yield
        except RewardsFailedError:
            self._restore_random()  # as before the round that failed: it is drawn again
            where = self._save_to_go_on()
            if self.is_world_process_zero():
                logger.error("Training stops after optimiser step %d. %s", self.state.global_step, where)
            raise
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"Out of memory {self._stopwatch.where()} of optimiser step {self.state.global_step + 1}: {error} "
                f"{self._what_would_fit()}"
            ) from error
        except RuntimeError as error:
            if self.args.world_size == 1 or not is_lost_process(error):
                raise
            raise RuntimeError(
                f"Process {self.args.process_index} of {self.args.world_size} has lost another one at optimiser step "
                f"{self.state.global_step + 1}: that one ended, was killed (as by the kernel, for want of memory) or "
                "was silent for `ddp_timeout` seconds. What it wrote last, or the machine's log, has the reason. "
                f"Start all of them again with `resume_from_checkpoint=True`. ({error})"
            ) from error

    def _what_would_fit(self) -> str:
        device, vram = self.args.device, None
        if device.type == "cuda":
            vram = torch.cuda.get_device_properties(device).total_memory / 2**30
        is_quantized = getattr(self.backbone.denoiser, "is_quantized", False)
        return what_would_fit(self.base_model, self.args, vram, self.policy.peft_config, quantized=is_quantized)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Trainer writes into a folder aside, which gets its name when every process is done with it.
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / "_checkpoints"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # left by a kill
        self.accelerator.wait_for_everyone()
        with self._writing(run_dir / name, staging):
            # Without it Trainer meets nobody while it writes, so that one process's full disk lets no other wait.
            best_step, self.state.best_global_step = self.state.best_global_step, None
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging, self.state.best_global_step = None, best_step
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run_dir / name)
        with self._writing(run_dir / name, staging):
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))  # with that name
                if self._guard.total:
                    (staging / name / _SKIPPED_STEPS).write_text(json.dumps(self._guard.state()) + "\n")
                seal(staging / name)
                publish(staging / name, run_dir / name)
                staging.rmdir()
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run_dir / name))
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step

    @contextmanager
    def _writing(self, checkpoint: Path, staging: Path) -> Iterator[None]:
        """What one process cannot write ends all, says what to do and leaves no part of a checkpoint."""
        try:
            with self._raising_together("Writing a checkpoint"):
                try:
                    yield
                except torch.OutOfMemoryError:
                    raise
                except (OSError, RuntimeError, SafetensorError) as error:  # the latter two are writers' own
                    raise OSError(not_written(checkpoint, staging, error)) from error
        except Exception:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # A checkpoint holds what training goes on from: the live policy, and the views in folders of their names.
        # Elsewhere stands what is used: the evaluated weights, as a PEFT adapter and as diffusers' LoRA file.
        write = self.args.should_save
        if not (write or self.policy.is_sharded):  # of a sharded policy every process has a part
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)  # another process may have come first
        if directory.parent == self._staging:
            self.policy.save(directory, write=write)
            if write:
                self._save_export(directory, None)
            return
        view = "ema" if self.args.save_ema and "ema" in self.policy.views else None
        finished = aside(directory / "export") if write else directory
        self.policy.save_pretrained(
            finished if self.policy.peft_config else finished / self.backbone.DENOISER, view, write=write
        )
        if write:
            self._save_export(finished, view)
            self.backbone.scheduler.save_pretrained(finished / "scheduler")  # the sampler of the evaluations
            publish_files(finished, directory)

    def _save_export(self, directory: Path, view: str | None) -> None:
        torch.save(self.args.without_tokens(), directory / TRAINING_ARGS_NAME)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        if self.policy.peft_config is not None:
            self.backbone.save_lora(directory, self.policy.lora_state_dict(view), self.policy.peft_config.to_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load(resume_from_checkpoint)
        counts = Path(resume_from_checkpoint) / _SKIPPED_STEPS
        if counts.is_file():
            self._guard = dataclasses.replace(self._guard, **json.loads(counts.read_text()))

    def _load_best_model(self) -> None:
        if (wrong := self._damage(Path(self.state.best_model_checkpoint))) is not None:
            raise RuntimeError(
                f"The best checkpoint is damaged: {wrong}. Training is done; the last checkpoint has what it learned."
            )
        logger.info(
            "The best model of the run is loaded: `%s` was %.4g at step %s (%s).",
            *(self.args.metric_for_best_model, self.state.best_metric, self.state.best_global_step),
            self.state.best_model_checkpoint,
        )
        self.policy.load(self.state.best_model_checkpoint)

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Write the model card of `output_dir`, with the reward curve and a gallery.

        Args:
            model_name (`str`, *optional*):
                Title; the repository's or the folder's name if not given.
            dataset_name (`str`, *optional*):
                Hub id of the prompts.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            license (`str`, *optional*):
                Licence of the trained weights.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else tags or []
        run = self._description(
            model_name=model_name,
            dataset_name=dataset_name,
            license=license,
            tags=(*self._tag_names, *tags),
            links=tracker_links(),
        )
        write_model_card(self.args.output_dir, run)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        repo_id: str | None = None,
        **kwargs,
    ):
        """
        Save, write the model card and upload both to the Hub.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit. A text of the form `user/repo` is taken for `repo_id`.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload.
            token (`str`, *optional*):
                Token in place of `args.hub_token`.
            revision (`str`, *optional*):
                Branch in place of `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a new repository is private, in place of `args.hub_private_repo`.
            repo_id (`str`, *optional*):
                Repository in place of `args.hub_model_id`.
            **kwargs:
                As of [`~DiffusionTrainer.create_model_card`].

        Returns:
            `~huggingface_hub.CommitInfo`, or a future of it if not `blocking`; `None` on other processes than the main
            one.
        """
        if repo_id is None and is_repo_id(commit_message or ""):
            commit_message, repo_id = "End of training", commit_message
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if repo_id is not None:
            self.args = copy.copy(self.args)  # the caller's may serve another trainer
            self.args.hub_model_id = repo_id
        if self.hub_model_id is None or repo_id is not None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return upload(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            blocking=blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer calls this while the checkpoint is being written; `_save_checkpoint` does when it has its name.
        strategy = self.args.hub_strategy
        if self._staging is not None or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save(self.args.output_dir)
        self.create_model_card()
        if self.args.save_strategy == SaveStrategy.EPOCH:
            message = f"Training in progress, epoch {int(self.state.epoch)}"
        else:
            message = f"Training in progress, step {self.state.global_step}"
        send = partial(
            upload,
            repo_id=self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            blocking=False,
        )
        jobs = [send(self.args.output_dir, commit_message=message)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(send(checkpoint_folder, commit_message=f"{message}, checkpoint", path_in_repo=place))
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)


@dataclass(frozen=True)
class OnTheWay:
    """Images whose copy to the host goes on while the device works."""

    images: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def send(cls, images: Tensor) -> OnTheWay:
        if not images.is_cuda:
            return cls(images.cpu(), None)
        host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
        host.copy_(images, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(images.device))
        return cls(host, arrived)

    def wait(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.images


_PHASES = {
    "rollout": "in the rollout (encoding, sampling, decoding)",
    "reward": "while the images were scored",
    "show": "while a callback looked at the round",
    "reference": "in the forwards without gradient",
    "update": "in the update (forward and backward)",
}


class _Stopwatch:
    """Seconds of each phase. It waits for the device where a phase ends, and nowhere else."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase: str | None = None

    def start(self, phase: str | None) -> None:
        """End the present phase and begin another, or none."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def where(self) -> str:
        """The present phase in words."""
        return _PHASES.get(self._phase, "outside of the phases (evaluation, pictures, a checkpoint)")


class _ModelConfig(FrozenDict):
    """What Trainer's logging integrations ask of a model's configuration, which diffusers' own has not."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str)


class _MoveAverages(TrainerCallback):
    """Moves the averaged weights after every optimiser step that was taken."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not (self.trainer.accelerator.optimizer_step_was_skipped or self.trainer._skips_step):
            self.trainer.move_averages(state.global_step)
        self.trainer.end_update()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _switching_modes_quickly(model: nn.Module) -> Iterator[None]:
    # Trainer puts the model into training mode in every micro-step, a walk over thousands of modules that mostly finds
    # them there already.
    if "train" in vars(model):  # the denoiser, trained as a whole, is the model
        yield
        return
    model.train(model.training)  # all of them: an adapter's modules come in training mode
    modules = list(model.modules())

    def train(mode: bool = True) -> nn.Module:
        if model.training != mode:
            for module in modules:
                module.training = mode
        return model

    model.train = train
    try:
        yield
    finally:
        del model.train


def dataset_columns(name: str, dataset: Any) -> set[str]:
    """
    Names of a data set's columns other than `prompt`.

    Args:
        name (`str`):
            What the user calls the data set.
        dataset:
            Rows by index with a length, or a stream that can be begun anew.

    Raises:
        `TypeError`: if it is neither.
        `ValueError`: if it is empty or its rows have no `prompt`.
    """
    if isinstance(dataset, PromptStream):
        return set(PromptStream.COLUMNS)
    if isinstance(dataset, dict):
        raise TypeError(f"`{name}` is a dict of {sorted(dataset)}; give one of them, such as `dataset['train']`.")
    if is_stream(dataset):
        row = next(iter(dataset), None)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        row = dataset[0] if len(dataset) else None
    else:
        raise TypeError(
            f"`{name}` is {type(dataset).__name__}; it must have a length and rows by index, as `datasets.Dataset`, "
            "or be a stream that can be begun anew, as `datasets.IterableDataset`."
        )
    if row is None:
        raise ValueError(f"`{name}` is empty; it needs at least one row with a `prompt`.")
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        shape = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"The rows of `{name}` ({shape}) need a column `prompt` of type `str`; rename the column that holds it."
        )
    return row.keys() - {"prompt"}


def iter_rows(dataset: Any) -> Iterator[dict]:
    """The rows of a data set, in its order."""
    return iter(dataset) if is_stream(dataset) else (dataset[i] for i in range(len(dataset)))


def _prompts(dataset: Any) -> Iterable[str]:
    # By column, where there are columns: of a row every picture would be decoded.
    return dataset["prompt"] if hasattr(dataset, "column_names") else (row["prompt"] for row in iter_rows(dataset))


def _first_rows(dataset: Any, count: int) -> list[dict]:
    # A prompt function is not drawn from but for a round: its first prompt belongs to the first.
    return [] if isinstance(dataset, PromptStream) else list(islice(iter_rows(dataset), count))


def _unscored(images: Tensor, rows: list[dict]) -> Scores:
    """Of pictures that no reward looks at."""
    nothing = torch.full((len(images),), torch.nan, dtype=torch.float64)
    return Scores(nothing, {}, torch.zeros(len(images), dtype=torch.bool), {}, {})


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read in order."""
    # An iterator could be read but once, and a check would take its first row away.
    is_iterator = isinstance(dataset, Iterator)
    return isinstance(dataset, Iterable) and not hasattr(dataset, "__len__") and not is_iterator


def _named(dataset: Any, name: str = "eval_dataset") -> dict[str, Any]:
    if isinstance(dataset, dict):
        return {f"{name}_{key}": value for key, value in dataset.items()}
    return {} if dataset is None else {name: dataset}


def _check_arguments(model: Any, args: DGPOConfig, peft_config: Any, quantization_config: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process. Start one process a GPU (`accelerate launch`), or show it "
            "one (`CUDA_VISIBLE_DEVICES=0`)."
        )
    check_engine(args)
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` cannot divide groups; set `per_device_train_batch_size` and `sample_batch_size`."
        )
    if peft_config is not None and args.full_finetuning:
        raise ValueError("`peft_config` is given and `full_finetuning` is set; choose one of them.")
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; it must be a `LoraConfig`, which diffusers loads."
        )
    if isinstance(model, str):
        check_path("model", model)
    is_loaded = isinstance(model, (DiffusionPipeline, PeftModel))
    if is_loaded and args.model_init_kwargs:
        raise ValueError(
            f"`model_init_kwargs` ({sorted(args.model_init_kwargs)}) say how a model is loaded, but `model` is a "
            f"{type(model).__name__}, which is loaded already. Load it with them, or give its name."
        )
    if quantization_config is not None and (is_loaded or args.full_finetuning):
        why = "`full_finetuning` trains them" if args.full_finetuning else f"`model` is a {type(model).__name__}"
        raise ValueError(
            f"`quantization_config` quantises frozen weights while a named model is loaded, but {why}. Give a name, "
            "and train a LoRA."
        )
    if quantization_config is not None and not torch.cuda.is_available():
        raise ValueError(
            "`quantization_config` needs a CUDA device: diffusers quantises nowhere else. Leave it out here."
        )


def _check_reward_limits(args: DGPOConfig, *scorers: RewardScorer) -> None:
    number = max((len(scorer.funcs) for scorer in scorers), default=0)
    if args.world_size > 1 and number * args.reward_timeout >= args.ddp_timeout:
        logger.warning(
            "The rewards' limits together (%d x `reward_timeout`, %g seconds) are no shorter than `ddp_timeout` (%g): "
            "where rewards hang in one process, the others end before it gives them up. Lower the first or raise the "
            "second.",
            number,
            args.reward_timeout,
            args.ddp_timeout,
        )


def _name_in_log(metric: str) -> str:
    """Of `metric_for_best_model`, which may leave out the prefix."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def _check_best_metric(args: DGPOConfig, eval_dataset: Any) -> None:
    metric, prefixes = args.metric_for_best_model, list(_named(eval_dataset, "eval"))
    if metric is not None and prefixes:
        full = _name_in_log(metric)
        if not any(full.startswith(prefix + "_") for prefix in prefixes) or full == "eval_loss":
            raise ValueError(
                f"`metric_for_best_model` is {metric!r}, which no evaluation has. Choose "
                f"{' or '.join(f'`{prefix}_reward`' for prefix in prefixes)}, or another number of theirs."
            )


def _load_dtype(args: DGPOConfig) -> torch.dtype:
    # Frozen weights are kept in the dtype that they are used in; trained ones in float32.
    if args.full_finetuning:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
