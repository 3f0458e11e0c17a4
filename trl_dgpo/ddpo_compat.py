"""
DDPO's names and forms onto ours.

`DDPOTrainer` left TRL with release 0.24. Its users find their constructor, configuration, reward, prompt function and
image hook here, and no other file knows of them. What GRPO's users bring and cannot be meant here is refused here too.
`docs/migration.md` has it all in tables.
"""

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_tf32_available

from .rewards.scoring import RewardFunc, RewardOutputError, RewardScorer
from .rollout import ScoredImages


logger = logging.getLogger(__name__)

DDPORewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]
DDPOPromptFunction = Callable[[], tuple[str, Any]]

_BARE_FLAG = {"nargs": "?", "const": True}  # `--train_cfg` alone is True, as it was


@dataclass
class DDPOFields:
    """
    Names of `DDPOConfig` that neither `TrainingArguments` nor our configurations have: a mixin for these.

    All are unset by default. [`resolve_names`] hands a set one on to our name for it and unsets it, so that it is
    spent: `dataclasses.replace` and files written from a configuration say everything once. `project_kwargs` and
    `logdir` have no field to go to; the trainer reads them when it is built. `train_batch_size` and `mixed_precision`
    are also attributes that `Trainer` reads, and hold `per_device_train_batch_size` and the precision in the end.

    Parameters:
        exp_name (`str`, *optional*):
            `run_name`, where that is unset.
        log_with (`str`, *optional*):
            `report_to`.
        tracker_kwargs (`dict` or `str`, *optional*):
            Accepted without effect: trackers are set up by environment variables.
        accelerator_kwargs (`dict` or `str`, *optional*):
            Accepted without effect: see `accelerator_config`.
        project_kwargs (`dict` or `str`, *optional*):
            `project_dir` is `output_dir` and `total_limit` is `save_total_limit`, where those are unset;
            `logging_dir` is where TensorBoard's files go.
        tracker_project_name (`str`, *optional*):
            `project`, also for wandb unless `WANDB_PROJECT` is set.
        logdir (`str`, *optional*):
            Where TensorBoard's files go, unless `TENSORBOARD_LOGGING_DIR` is set.
        num_epochs (`int`, *optional*):
            Rounds: `max_steps` is this times the optimiser steps of a round.
        save_freq (`int`, *optional*):
            Rounds between checkpoints: `save_steps` is this times the optimiser steps of a round.
        num_checkpoint_limit (`int`, *optional*):
            `save_total_limit`.
        mixed_precision (`str`, *optional*):
            `"fp16"`, `"bf16"` or `"no"`: the flags `fp16` and `bf16`.
        allow_tf32 (`bool`, *optional*):
            `tf32`, where the device has it.
        resume_from (`str`, *optional*):
            `resume_from_checkpoint`: a checkpoint, or a folder of them, of which the last is taken.
        sample_eta (`float`, *optional*):
            Accepted without effect: rollouts are deterministic unless `sampler="sde"`.
        sample_num_batches_per_epoch (`int`, *optional*):
            With `sample_batch_size`, the images of a round on each process. Those of all processes make
            `prompts_per_round` and, where that is unset, `num_generations`.
        train_batch_size (`int`, *optional*):
            `per_device_train_batch_size`; with `train_gradient_accumulation_steps` it makes `updates_per_round`.
        train_use_8bit_adam (`bool`, *optional*):
            `optim="adamw_bnb_8bit"`.
        train_learning_rate (`float`, *optional*):
            `learning_rate`.
        train_adam_beta1 (`float`, *optional*):
            `adam_beta1`.
        train_adam_beta2 (`float`, *optional*):
            `adam_beta2`.
        train_adam_weight_decay (`float`, *optional*):
            `weight_decay`.
        train_adam_epsilon (`float`, *optional*):
            `adam_epsilon`.
        train_gradient_accumulation_steps (`int`, *optional*):
            With `train_batch_size`, the images of an optimiser step on each process: see there.
        train_max_grad_norm (`float`, *optional*):
            `max_grad_norm`.
        train_num_inner_epochs (`int`, *optional*):
            `num_iterations`.
        train_cfg (`bool`, *optional*):
            Accepted without effect: the policy is trained without guidance, or in Flow-GRPO with that of its rollouts.
        train_adv_clip_max (`float`, *optional*):
            `advantage_clip`.
        train_clip_range (`float`, *optional*):
            In Flow-GRPO `clip_range`. Accepted without effect elsewhere: `clip_range` has another scale.
        train_timestep_fraction (`float`, *optional*):
            The noisy part of the levels that is trained on: `t_min` is 1 minus this.
        per_prompt_stat_tracking (`bool`, *optional*):
            Accepted without effect: advantages are always those within a group, which is one prompt's.
        per_prompt_stat_tracking_buffer_size (`int`, *optional*):
            Accepted without effect: a group is compared with itself alone.
        per_prompt_stat_tracking_min_count (`int`, *optional*):
            Accepted without effect: see `per_prompt_stat_tracking_buffer_size`.
        negative_prompts (`str`, *optional*):
            `negative_prompt`.
    """

    exp_name: str | None = field(default=None, metadata={"help": "DDPO's name: `run_name`, where that is unset."})
    log_with: str | None = field(default=None, metadata={"help": "DDPO's name of `report_to`."})
    tracker_kwargs: dict | str | None = field(
        default=None, metadata={"help": "DDPO's name, without effect: trackers are set up by environment variables."}
    )
    accelerator_kwargs: dict | str | None = field(
        default=None, metadata={"help": "DDPO's name, without effect: see `accelerator_config`."}
    )
    project_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "DDPO's name: its `project_dir`, `total_limit` and `logging_dir` are `output_dir`, "
            "`save_total_limit` and TensorBoard's folder, where those are unset."
        },
    )
    tracker_project_name: str | None = field(default=None, metadata={"help": "DDPO's name of `project`."})
    logdir: str | None = field(default=None, metadata={"help": "DDPO's name: where TensorBoard's files go."})
    num_epochs: int | None = field(
        default=None, metadata={"help": "DDPO's name: rounds; `max_steps` is this times the steps of a round."}
    )
    save_freq: int | None = field(
        default=None,
        metadata={"help": "DDPO's name: rounds between checkpoints; `save_steps` is this times the steps of a round."},
    )
    num_checkpoint_limit: int | None = field(default=None, metadata={"help": "DDPO's name of `save_total_limit`."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "DDPO's name: 'fp16', 'bf16' or 'no'; the flags `fp16` and `bf16`."}
    )
    allow_tf32: bool | None = field(
        default=None, metadata={"help": "DDPO's name: `tf32`, where the device has it.", **_BARE_FLAG}
    )
    resume_from: str | None = field(
        default=None,
        metadata={"help": "DDPO's name of `resume_from_checkpoint`: a checkpoint, or a folder of them."},
    )
    sample_eta: float | None = field(
        default=None, metadata={"help": "DDPO's name, without effect: see `sampler` for stochastic rollouts."}
    )
    sample_num_batches_per_epoch: int | None = field(
        default=None,
        metadata={
            "help": "DDPO's name: times `sample_batch_size`, the images of a round on each process. They make "
            "`prompts_per_round` and, where that is unset, `num_generations`."
        },
    )
    train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "DDPO's name of `per_device_train_batch_size`; with `train_gradient_accumulation_steps` it makes "
            "`updates_per_round`."
        },
    )
    train_use_8bit_adam: bool | None = field(
        default=None, metadata={"help": "DDPO's name of `optim='adamw_bnb_8bit'`.", **_BARE_FLAG}
    )
    train_learning_rate: float | None = field(default=None, metadata={"help": "DDPO's name of `learning_rate`."})
    train_adam_beta1: float | None = field(default=None, metadata={"help": "DDPO's name of `adam_beta1`."})
    train_adam_beta2: float | None = field(default=None, metadata={"help": "DDPO's name of `adam_beta2`."})
    train_adam_weight_decay: float | None = field(default=None, metadata={"help": "DDPO's name of `weight_decay`."})
    train_adam_epsilon: float | None = field(default=None, metadata={"help": "DDPO's name of `adam_epsilon`."})
    train_gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "DDPO's name: times `train_batch_size`, the images of an optimiser step on each process."},
    )
    train_max_grad_norm: float | None = field(default=None, metadata={"help": "DDPO's name of `max_grad_norm`."})
    train_num_inner_epochs: int | None = field(default=None, metadata={"help": "DDPO's name of `num_iterations`."})
    train_cfg: bool | None = field(
        default=None,
        metadata={"help": "DDPO's name, without effect: the method says how the policy is trained.", **_BARE_FLAG},
    )
    train_adv_clip_max: float | None = field(default=None, metadata={"help": "DDPO's name of `advantage_clip`."})
    train_clip_range: float | None = field(
        default=None,
        metadata={"help": "DDPO's name of Flow-GRPO's `clip_range`; that of other methods has another scale."},
    )
    train_timestep_fraction: float | None = field(
        default=None, metadata={"help": "DDPO's name: noisy part of the levels; `t_min` is 1 minus this."}
    )
    per_prompt_stat_tracking: bool | None = field(
        default=None,
        metadata={"help": "DDPO's name, without effect: advantages are always those of a group.", **_BARE_FLAG},
    )
    per_prompt_stat_tracking_buffer_size: int | None = field(
        default=None, metadata={"help": "DDPO's name, without effect: a group is compared with itself alone."}
    )
    per_prompt_stat_tracking_min_count: int | None = field(
        default=None, metadata={"help": "DDPO's name, without effect: a group is compared with itself alone."}
    )
    negative_prompts: str | None = field(default=None, metadata={"help": "DDPO's name of `negative_prompt`."})


@dataclass
class GRPOFields:
    """
    Names of `GRPOConfig` that mean something else here: a mixin whose fields are refused with our name for them.

    Parameters:
        steps_per_generation (`int`, *optional*):
            Refused: `prompts_per_round` sizes a round.
        generation_batch_size (`int`, *optional*):
            Refused: `prompts_per_round` sizes a round.
        epsilon (`float`, *optional*):
            Refused: `clip_range` has another scale, in Flow-GRPO too.
    """

    steps_per_generation: int | None = field(
        default=None, metadata={"help": "GRPO's name, refused: `prompts_per_round` sizes a round."}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "GRPO's name, refused: `prompts_per_round` sizes a round."}
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "GRPO's name, refused: `clip_range` has another scale."}
    )


def resolve_names(config: Any) -> None:
    """
    Hand DDPO's names on to ours, and refuse GRPO's: the first thing in a configuration's `__post_init__`.

    Args:
        config ([`DDPOFields`]):
            Configuration, as given by the user. Changed in place.

    Raises:
        `ValueError`: if a name and ours for it are both set and differ, or a number does not fit.
    """
    _refuse_grpo_names(config)
    for name in ("train_batch_size", "mixed_precision"):
        if isinstance(getattr(config, name), _FilledInt | _FilledStr):
            setattr(config, name, None)  # not the user's: a copy of a finished configuration
    for name in _AT_LEAST_ONE:
        _check(name, getattr(config, name), lambda number: number >= 1, "at least 1")
    _check("train_adv_clip_max", config.train_adv_clip_max, lambda bound: bound > 0, "above 0")
    for alias, target in _RENAMED.items():
        value = _spend(config, alias)
        if value is not None:
            _assign(config, target, value, f"`{alias}` is {value!r}")
    _resolve_precision(config)
    _resolve_rest(config)
    _resolve_round(config)
    _resolve_updates(config)
    _resolve_lengths(config)
    _warn_of_no_effect(config)


def finish_names(config: Any) -> None:
    """
    Set back the two names that `Trainer` reads: the last thing in a configuration's `__post_init__`.

    Args:
        config ([`DDPOFields`]):
            Configuration whose other fields are final. Changed in place.
    """
    config.train_batch_size = _FilledInt(config.per_device_train_batch_size)
    config.mixed_precision = _FilledStr(config.mixed_precision)


class DefaultDGPOStableDiffusionPipeline:
    """
    Which model to train, in DDPO's form. Nothing is loaded before the trainer is built.

    Args:
        pretrained_model_name (`str`):
            Hub id, folder or `"tiny"`.
        pretrained_model_revision (`str`, *optional*, defaults to `"main"`):
            Revision on the Hub.
        use_lora (`bool`, *optional*, defaults to `True`):
            Train a LoRA; `False` trains the whole transformer.
    """

    def __init__(self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True):
        self.pretrained_model_name = pretrained_model_name
        self.pretrained_model_revision = pretrained_model_revision
        self.use_lora = use_lora

    def __getattr__(self, name: str):  # asked only for what is not there
        raise AttributeError(
            f"`DefaultDGPOStableDiffusionPipeline` has no `{name}`: it only says which model to train. The loaded "
            f"pipeline is `trainer.sd_pipeline`."
        )


class TrainerCall(NamedTuple):
    """
    A trainer's arguments in today's form.

    Args:
        args:
            Configuration: the caller's own, or a copy where something had to be filled in.
        reward_funcs:
            Reward or rewards in TRL's keyword form.
        model:
            Hub id, folder, `"tiny"`, or a model.
        train_dataset:
            Data set, or the endless [`PromptStream`] of a `prompt_function`.
        callbacks (`list[~transformers.TrainerCallback]`):
            The `image_samples_hook`, if there is one.
    """

    args: Any
    reward_funcs: Any
    model: Any
    train_dataset: Any
    callbacks: list[TrainerCallback]


def modern_call(
    *,
    config: Any,
    reward_function: DDPORewardFunction | None,
    prompt_function: DDPOPromptFunction | None,
    sd_pipeline: Any,
    image_samples_hook: Callable | None,
    args: Any,
    reward_funcs: RewardFunc | list[RewardFunc] | None,
    model: Any,
    train_dataset: Any,
    config_class: type,
    needs_rewards: bool = True,
) -> TrainerCall:
    """
    A trainer's arguments, given in DDPO's form, in today's, or in a mixture.

    Args:
        config, reward_function, prompt_function, sd_pipeline, image_samples_hook:
            DDPO's five.
        args, reward_funcs, model, train_dataset:
            Today's names of the first four.
        config_class (`type`):
            Class that the configuration must have, and that is made if none is given.
        needs_rewards (`bool`, *optional*, defaults to `True`):
            Whether there must be a reward: not where the data set holds them.

    Returns:
        [`TrainerCall`].

    Raises:
        `TypeError`: if both of a pair are given or neither, or one is of the wrong kind.
        `ValueError`: if one of DDPO's names was set on the configuration after it was built.
    """
    keywords = "`model=`, `reward_funcs=`, `args=` and `train_dataset=`"
    for name, value in (("config", config), ("args", args)):
        if value is not None and not isinstance(value, config_class):
            raise TypeError(
                f"`{name}` is {value!r:.80}, a {type(value).__name__}; it must be a `{config_class.__name__}`. The "
                f"first positional argument is the configuration; give the model and the rest as {keywords}."
            )
    _at_most_one(config=config, args=args)
    args = args if config is None else config
    args = config_class() if args is None else args
    (_exactly_one if needs_rewards else _at_most_one)(reward_function=reward_function, reward_funcs=reward_funcs)
    _exactly_one(prompt_function=prompt_function, train_dataset=train_dataset)
    _exactly_one(sd_pipeline=sd_pipeline, model=model)
    for name, value in (
        ("reward_function", reward_function),
        ("prompt_function", prompt_function),
        ("image_samples_hook", image_samples_hook),
    ):
        if value is not None and not callable(value):
            hint = " Lists of rewards go to `reward_funcs`." * (name == "reward_function")
            raise TypeError(f"`{name}` is {value!r:.80}, a {type(value).__name__}; it must be callable.{hint}")

    model = sd_pipeline if model is None else model
    described = isinstance(model, DefaultDGPOStableDiffusionPipeline)
    if described or args.project_kwargs or args.logdir or prompt_function is not None:
        args = copy.copy(args)  # filled in below; the caller's may serve another trainer
    args = _with_project(args)
    if described:
        args = _with_pipeline(args, model)
        model = model.pretrained_model_name
    if prompt_function is not None:
        train_dataset = PromptStream(prompt_function)
        if args.max_steps <= 0:
            args.max_steps = _DDPO_EPOCHS * args.steps_per_round
            logger.warning(
                "A `prompt_function` never ends and neither `num_epochs` nor `max_steps` is set: training runs for "
                "DDPO's %d rounds, which are %d optimiser steps.",
                _DDPO_EPOCHS,
                args.max_steps,
            )
    return TrainerCall(
        args=args,
        reward_funcs=reward_funcs if reward_function is None else from_ddpo(reward_function),
        model=model,
        train_dataset=train_dataset,
        callbacks=[] if image_samples_hook is None else [ImageSamplesHook(image_samples_hook)],
    )


class PromptStream(IterableDataset):
    """
    The prompts that a function draws, as an endless data set that can be iterated over again.

    Args:
        prompt_function (callable):
            `f() -> (prompt, metadata)`. A call is a group.
    """

    COLUMNS = ("prompt_metadata",)

    def __init__(self, prompt_function: DDPOPromptFunction):
        self.prompt_function = prompt_function

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Rows `{"prompt": prompt, "prompt_metadata": metadata}`.

        Raises:
            `TypeError`: if the function returns something else.
        """
        while True:
            drawn = self.prompt_function()
            if not isinstance(drawn, tuple | list) or len(drawn) != 2 or not isinstance(drawn[0], str):
                raise TypeError(
                    f"`prompt_function` returned {drawn!r:.120}; it must return `(prompt, metadata)`: a string, and "
                    "anything that the reward shall have, `{}` for nothing."
                )
            yield {"prompt": str(drawn[0]), "prompt_metadata": drawn[1]}  # str: numpy draws its own kind


def from_ddpo(reward_function: DDPORewardFunction) -> RewardFunc:
    """
    A reward in DDPO's form as one in TRL's keyword form.

    The metadata of an image is what the `prompt_function` gave with its prompt or, with a data set, the row's other
    columns. The metadata that the function returns goes to the image hook, under `reward_metadata`.

    Args:
        reward_function (callable):
            `f(images, prompts, prompt_metadata) -> (rewards, metadata)`: float images `(B, 3, H, W)` in [0, 1], tuples
            of `B` prompts and of their metadata.

    Returns:
        callable in TRL's keyword form.

    Raises:
        `TypeError`: if it is not callable.
    """
    if not callable(reward_function):
        raise TypeError(
            f"`from_ddpo` got {reward_function!r:.80}, a {type(reward_function).__name__}, not a callable."
        )
    return _DDPOReward(reward_function)


def to_ddpo(reward_func: RewardFunc) -> DDPORewardFunction:
    """
    A reward in TRL's keyword form as one in DDPO's.

    Metadata that are dictionaries become columns. What the reward logs comes back as metadata.

    Args:
        reward_func (callable):
            `f(prompts, completions, **kwargs) -> list[float | None]`.

    Returns:
        callable: `f(images, prompts, prompt_metadata) -> (rewards, metadata)`.
    """
    scorer = RewardScorer(reward_func)

    def in_ddpo_form(images: Tensor, prompts: tuple[str, ...], prompt_metadata: tuple[Any, ...]):
        columns = {"prompt_metadata": list(prompt_metadata)}
        keys = {frozenset(data) if isinstance(data, dict) else None for data in prompt_metadata}
        if len(keys) == 1 and None not in keys:
            columns = {name: [data[name] for data in prompt_metadata] for name in prompt_metadata[0]}
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        scores = scorer(pixels, list(prompts), columns, trainer_state=None)
        return scores.rewards.float(), {**scores.metrics, **scores.extra}

    in_ddpo_form.__name__ = scorer.names[0]
    return in_ddpo_form


class ImageSamplesHook(TrainerCallback):
    """
    DDPO's image hook: called after each round with its images and rewards.

    Args:
        hook (callable):
            `f(prompt_image_data, global_step, tracker)`: a list with an entry `[images, prompts, prompt_metadata,
            rewards, reward_metadata]` for each call of the reward, images as floats `(B, 3, H, W)` in [0, 1]; the
            optimiser step; something with `log` and `log_images`. Called on the main process alone.
    """

    def __init__(self, hook: Callable[[list[list], int, Any], None]):
        self.hook = hook

    def on_rollout(self, args, state, control, scored: ScoredImages, trackers: Any, **kwargs) -> None:
        """Hand a round to the hook."""
        if state.is_world_process_zero:
            self.hook(_in_reward_calls(scored), state.global_step, trackers)


class DDPOTrainerNames:
    """What DDPO's scripts read of their trainer and call on it: a mixin that stands before a `Trainer`."""

    @property
    def config(self) -> Any:
        """`trainer.args`."""
        return self.args

    @property
    def sd_pipeline(self) -> Any:
        """The loaded diffusers pipeline."""
        return self.backbone.pipeline

    @property
    def reward_fn(self) -> Callable:
        """The reward as it was given, or the first of several."""
        return getattr(self.scorer.funcs[0], "reward_function", self.scorer.funcs[0])

    @property
    def prompt_fn(self) -> DDPOPromptFunction | None:
        """The prompt function, `None` where prompts come from a data set."""
        return getattr(self.train_dataset, "prompt_function", None)

    @property
    def image_samples_callback(self) -> Callable | None:
        """The image hook, if there is one."""
        hooks = [call for call in self.callback_handler.callbacks if isinstance(call, ImageSamplesHook)]
        return hooks[0].hook if hooks else None

    def train(self, resume_from_checkpoint: Any = None, *args, epochs: int | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`], or for so many of DDPO's epochs.

        Args:
            resume_from_checkpoint (`str`, `bool` or `int`, *optional*):
                See [`~transformers.Trainer.train`]; a number is taken for `epochs`, DDPO's first argument.
            epochs (`int`, *optional*):
                Rounds to train, in place of `max_steps`.

        Raises:
            `ValueError`: if `epochs` is below 1.
        """
        if isinstance(resume_from_checkpoint, int) and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint, epochs = None, resume_from_checkpoint
        _check("epochs", epochs, lambda number: number >= 1, "at least 1")
        if epochs is not None:
            self.args = copy.copy(self.args)  # the caller's may serve another trainer
            self.args.max_steps = epochs * self.args.steps_per_round
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save what `save_model` saves."""
        self.save_model(os.fspath(save_directory), _internal_call=True)


# -- names ------------------------------------------------------------------------------------------------------------

_DDPO_EPOCHS = 100

_RENAMED = {
    "log_with": "report_to",
    "tracker_project_name": "project",
    "num_checkpoint_limit": "save_total_limit",
    "train_learning_rate": "learning_rate",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_weight_decay": "weight_decay",
    "train_adam_epsilon": "adam_epsilon",
    "train_max_grad_norm": "max_grad_norm",
    "train_num_inner_epochs": "num_iterations",
    "train_adv_clip_max": "advantage_clip",
    "negative_prompts": "negative_prompt",
}

_AT_LEAST_ONE = (
    "num_epochs",
    "save_freq",
    "sample_num_batches_per_epoch",
    "train_batch_size",
    "train_gradient_accumulation_steps",
)

# Read when the trainer is built: scripts set the first after parsing, the second has no field to go to.
_READ_BY_TRAINER = ("project_kwargs", "logdir")

_GRPO_NAMES = {
    "steps_per_generation": "A round is `prompts_per_round` x `num_generations` images; set `prompts_per_round`.",
    "generation_batch_size": (
        "A round is `prompts_per_round` x `num_generations` images; `prompts_per_round` is this divided by "
        "`num_generations`."
    ),
    "epsilon": "It clips a ratio of likelihoods. {clip} (its default is {default}); set that, or 0 for no clip.",
}
_CLIPS = {  # what `clip_range` is, by whether it clips likelihoods too
    True: (
        "So does `clip_range`, but a log-probability is a mean over latent elements here, so that the ratio stays "
        "much nearer to 1"
    ),
    False: "`clip_range` clips a ratio of denoising errors, which stays much nearer to 1",
}


class _FilledInt(int):
    """A number that the configuration filled in, so that a copy of it does not take it for the user's."""


class _FilledStr(str):
    """The same for a string."""


def _refuse_grpo_names(config: Any) -> None:
    for name, way_out in _GRPO_NAMES.items():
        value = getattr(config, name, None)
        if value is not None:
            way_out = way_out.format(clip=_CLIPS[config.clips_likelihoods], default=_default(config, "clip_range"))
            raise ValueError(f"`{name}` is {value!r}; this name of GRPO's means nothing here. {way_out}")


def _resolve_precision(config: Any) -> None:
    value = _spend(config, "mixed_precision")
    if value is None:
        return
    if value not in ("no", "fp16", "bf16"):
        raise ValueError(f"`mixed_precision` is {value!r}; it must be 'no', 'fp16' or 'bf16'.")
    for flag in ("fp16", "bf16"):
        _assign(config, flag, value == flag, f"`mixed_precision` is {value!r}")


def _resolve_rest(config: Any) -> None:
    for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs"):
        setattr(config, name, _dictionary(name, getattr(config, name)))
    exp_name = _spend(config, "exp_name")
    config.run_name = config.run_name or exp_name
    allowed = _spend(config, "allow_tf32")
    if allowed is not None and (not allowed or is_torch_tf32_available()):
        _assign(config, "tf32", allowed, f"`allow_tf32` is {allowed}")
    if _spend(config, "train_use_8bit_adam"):
        _assign(config, "optim", "adamw_bnb_8bit", "`train_use_8bit_adam` is True")
    if config.clips_likelihoods and (clip_range := _spend(config, "train_clip_range")) is not None:
        _assign(config, "clip_range", clip_range, f"`train_clip_range` is {clip_range}")
    fraction = _spend(config, "train_timestep_fraction")
    _check("train_timestep_fraction", fraction, lambda part: 0 < part <= 1, "in (0, 1]")
    if fraction is not None:
        _assign(config, "t_min", round(1 - fraction, 12), f"`train_timestep_fraction` is {fraction}")
    folder = _spend(config, "resume_from")
    if folder:
        _assign(config, "resume_from_checkpoint", _checkpoint(folder), f"`resume_from` is {folder!r}")


def _resolve_round(config: Any) -> None:
    """How many images a round has, from DDPO's two numbers."""
    batches = _spend(config, "sample_num_batches_per_epoch")
    generations = config.num_generations
    size = 1 if config.sample_batch_size is None else config.sample_batch_size  # 1 is DDPO's default
    if batches is None or generations < 2 or size < 1:  # of which the configuration itself refuses the last two
        return
    processes = _processes()
    images = size * batches * processes
    said = (
        f"`sample_batch_size` ({size}) x `sample_num_batches_per_epoch` ({batches}) x processes ({processes}) are "
        f"{_count(images, 'image')} a round"
    )
    default = _default(config, "num_generations")
    if generations == default:
        generations = _largest_divisor(images, default)
        if generations < 2:
            raise ValueError(
                f"{said}, and no group size from 2 to {default} divides them. Choose another number of images."
            )
        if generations != default:
            _warn(f"{said}, which the default `num_generations` of {default} does not divide; it is {generations}.")
        config.num_generations = generations
    elif images % generations:
        raise ValueError(
            f"{said}, which must be a multiple of `num_generations` ({generations}). Change one of the three."
        )
    _assign(config, "prompts_per_round", images // generations, f"{said}, in groups of {generations}")


def _resolve_updates(config: Any) -> None:
    """How many optimiser steps a round has, from DDPO's two numbers: groups stay whole, so perhaps fewer."""
    batch = _spend(config, "train_batch_size")
    accumulation = _spend(config, "train_gradient_accumulation_steps")
    if batch is not None and batch == config.per_device_train_batch_size:
        batch = None  # says nothing new
    generations, groups = config.num_generations, config.prompts_per_round
    images, rest = divmod(groups * generations, _processes())
    if (batch is None and accumulation is None) or rest or images < 1:  # the configuration itself refuses such rounds
        return
    size = batch or config.per_device_train_batch_size or 1  # 1 is DDPO's default
    accumulation = 1 if accumulation is None else accumulation
    said = f"`train_batch_size` ({size}) x `train_gradient_accumulation_steps` ({accumulation})"
    asked = max(1, images // (size * accumulation))
    updates = _largest_divisor(math.gcd(groups, images), asked)  # whole groups, in equal shares of images
    known = config.updates_per_round != _default(config, "updates_per_round")
    _assign(config, "updates_per_round", updates, f"{said} of {images} images a process")
    if asked != updates and not known:
        _warn(
            f"{said}: DDPO would take {_count(asked, 'optimiser step')} over the {images} images of a round on each "
            f"process. Here a group is one term of the objective and is whole in an optimiser step, and a round is "
            f"{_count(groups, 'group')} of {generations} images, so `updates_per_round` is {updates}. For more steps, "
            "set a smaller `num_generations` or more images a round."
        )
    if batch is not None:
        share = images // updates
        fitting = _largest_divisor(share, batch)
        _assign(config, "per_device_train_batch_size", fitting, f"`train_batch_size` is {batch}")
        if fitting != batch:
            _warn(
                f"`train_batch_size` ({batch}) does not divide the {share} images of an optimiser step on each "
                f"process; `per_device_train_batch_size` is {fitting}."
            )


def _resolve_lengths(config: Any) -> None:
    """What DDPO counts in rounds and `Trainer` in optimiser steps."""
    steps = config.num_iterations * config.updates_per_round
    epochs, freq = _spend(config, "num_epochs"), _spend(config, "save_freq")
    if epochs is not None:
        _assign(config, "max_steps", epochs * steps, f"`num_epochs` is {epochs} rounds of {_count(steps, 'step')}")
    if freq is not None:
        said = f"`save_freq` is {freq} rounds of {_count(steps, 'step')}"
        _assign(config, "save_strategy", "steps", said)
        _assign(config, "save_steps", freq * steps, said)


def _warn_of_no_effect(config: Any) -> None:
    """Only where the value would have changed something in DDPO."""
    clip_range = _spend(config, "train_clip_range")
    if clip_range is not None:
        _warn(
            f"`train_clip_range` ({clip_range}) is not used: it clips a ratio of likelihoods, `clip_range` "
            f"({config.clip_range} here) one of denoising errors, on another scale. Set `clip_range`, 0 for no clip."
        )
    train_cfg, is_guided = _spend(config, "train_cfg"), config.train_guidance_scale > 1
    if train_cfg and not is_guided:
        _warn(
            "`train_cfg=True` has no effect: guidance acts in rollouts (`sample_guidance_scale`), and the policy is "
            "trained without. To train without guidance in rollouts too, see `reference_guidance_scale`."
        )
    elif train_cfg is False and is_guided:
        _warn(
            "`train_cfg=False` has no effect: the policy is trained with the guidance that its steps were sampled "
            "with. `sample_guidance_scale=1.0` turns it off in both."
        )
    eta = _spend(config, "sample_eta")
    if eta:
        _warn(
            f"`sample_eta` ({eta}) has no effect: rollouts are deterministic, and no likelihood of a path is needed. "
            "`sampler='sde'` takes stochastic steps."
        )
    tracking = _spend(config, "per_prompt_stat_tracking")
    counts = {
        name: _spend(config, name)
        for name in ("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count")
    }
    if tracking is False:
        _warn(
            "`per_prompt_stat_tracking=False` has no effect: advantages are always against the mean of their group, "
            "which is one prompt's. `scale_rewards='batch'` divides them by the deviation of the whole round."
        )
    beyond = {name: count for name, count in counts.items() if count is not None and count > config.num_generations}
    if tracking and beyond:
        _warn(
            f"{' and '.join(f'`{name}` ({count})' for name, count in beyond.items())} without effect: a group is "
            f"compared with itself alone, never with rewards of earlier rounds. It has {config.num_generations} "
            "images; `num_generations` sets that."
        )
    if _spend(config, "tracker_kwargs"):
        _warn(
            "`tracker_kwargs` has no effect: trackers are set up by their environment variables, such as "
            "`WANDB_ENTITY` and `WANDB_TAGS`; the run's name is `run_name`, its project `project`."
        )
    if _spend(config, "accelerator_kwargs"):
        _warn(
            "`accelerator_kwargs` has no effect: `Trainer` builds its `Accelerator` from its own fields, such as "
            "`accelerator_config`, `bf16` and `ddp_timeout`."
        )


def _spend(config: Any, alias: str) -> Any:
    value = getattr(config, alias)
    setattr(config, alias, None)
    return value


def _assign(config: Any, target: str, value: Any, said: str) -> None:
    present = getattr(config, target)
    if present != _default(config, target) and present != value:
        raise ValueError(
            f"{said}, which makes `{target}` {value!r}; but `{target}` is {present!r}. Give one of them, in one name."
        )
    setattr(config, target, value)


def _default(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default


def _dictionary(name: str, value: Any) -> dict | None:
    """A command line gives JSON."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        parsed = value
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError(f"`{name}` is {value!r}; it must be a dictionary, on a command line as JSON.")
    return parsed


def _checkpoint(folder: str) -> str:
    path = Path(folder).expanduser()
    if (path / "trainer_state.json").is_file():
        return str(path)
    last = get_last_checkpoint(str(path)) if path.is_dir() else None
    if last is None:
        raise ValueError(
            f"`resume_from` is {folder!r}, which is no checkpoint and no folder with a `checkpoint-...` in it. Give "
            "the `output_dir` of an earlier run or one of its checkpoints."
        )
    return last


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))  # `TrainingArguments` does not know it yet


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def _check(name: str, value: Any, rule: Callable[[Any], bool], in_words: str) -> None:
    if value is not None and not rule(value):
        raise ValueError(f"`{name}` is {value}; it must be {in_words}.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # whoever builds the configuration


# -- forms ------------------------------------------------------------------------------------------------------------


def _at_most_one(**pair: Any) -> None:
    if all(value is not None for value in pair.values()):
        first, second = pair
        raise TypeError(f"`{first}` and `{second}` are both given; they are two names of one thing. Give one.")


def _exactly_one(**pair: Any) -> None:
    _at_most_one(**pair)
    if all(value is None for value in pair.values()):
        first, second = pair
        raise TypeError(f"Neither `{second}` (today's form) nor `{first}` (DDPO's) is given. Give one of them.")


def _with_project(args: Any) -> Any:
    """What is in `project_kwargs` and `logdir`, which scripts set after parsing, where nothing else was said."""
    late = [
        name
        for name in (f.name for f in fields(DDPOFields))
        if name not in _READ_BY_TRAINER
        and getattr(args, name) is not None
        and not isinstance(getattr(args, name), _FilledInt | _FilledStr)
    ]
    if late:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in late)} was set after the configuration was built, when DDPO's names "
            "have been read. Give it to the constructor or the command line, or set our name for it."
        )
    project, logdir = _dictionary("project_kwargs", _spend(args, "project_kwargs")) or {}, _spend(args, "logdir")
    if unknown := sorted(project.keys() - _PROJECT_KEYS):
        raise ValueError(f"`project_kwargs` has {unknown}; it may have {sorted(_PROJECT_KEYS)}.")
    if args.output_dir == _DEFAULT_OUTPUT_DIR and project.get("project_dir"):
        args.output_dir = os.path.expanduser(project["project_dir"])
    if args.save_total_limit is None:
        args.save_total_limit = project.get("total_limit")
    folder = project.get("logging_dir") or logdir
    if "tensorboard" in args.report_to and folder:
        _export("TENSORBOARD_LOGGING_DIR", folder)
    if "wandb" in args.report_to and args.project != _default(args, "project"):
        _export("WANDB_PROJECT", args.project)
    return args


def _export(variable: str, value: str) -> None:
    """Set an environment variable that the user has not set: the one way into these trackers' callbacks."""
    if os.environ.get(variable) in (None, _exported.get(variable)):  # the latter is an earlier trainer's
        os.environ[variable] = _exported[variable] = value


_exported: dict[str, str] = {}


_DEFAULT_OUTPUT_DIR = "trainer_output"  # of `TrainingArguments`, which fills it in itself
_PROJECT_KEYS = {
    *("project_dir", "logging_dir", "total_limit"),
    *("automatic_checkpoint_naming", "iteration", "save_on_each_node"),  # `Trainer` has its own ways
}


def _with_pipeline(args: Any, pipeline: DefaultDGPOStableDiffusionPipeline) -> Any:
    revision, given = pipeline.pretrained_model_revision, args.model_init_kwargs or {}
    if revision != "main":
        if given.get("revision", revision) != revision:
            raise ValueError(
                f"`pretrained_model_revision` is {revision!r}, but `model_init_kwargs` has the revision "
                f"{given['revision']!r}. Give one of them."
            )
        args.model_init_kwargs = {**given, "revision": revision}
    if not pipeline.use_lora and not args.full_finetuning:
        args.full_finetuning = True
        logger.warning(
            "`use_lora=False`: the whole transformer is trained, with `learning_rate` %g. That is usually far smaller "
            "than for a LoRA.",
            args.learning_rate,
        )
    return args


class _DDPOReward:
    """A reward in DDPO's form, callable in TRL's."""

    input_type = "pt"
    overlaps = True  # DDPO scores batch by batch in threads, whatever the reward carries

    def __init__(self, reward_function: DDPORewardFunction):
        self.reward_function = reward_function
        self.__name__ = getattr(reward_function, "__name__", type(reward_function).__name__)
        self.check = getattr(reward_function, "check", None)

    def __call__(
        self,
        prompts: list[str],
        completions: Tensor,
        images: Any = None,
        prompt_metadata: list | None = None,
        trainer_state: Any = None,
        log_metric: Callable | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: list,
    ) -> Any:
        if prompt_metadata is None:
            prompt_metadata = [{name: cells[i] for name, cells in columns.items()} for i in range(len(prompts))]
        output = self.reward_function(completions.float() / 255, tuple(prompts), tuple(prompt_metadata))
        form = f"`{self.__name__}` must return `(rewards, metadata)` with {len(prompts)} rewards"
        if not isinstance(output, tuple) or len(output) != 2:
            raise RewardOutputError(
                f"Reward {form}, in DDPO's form, but returned {output!r:.120}. Give a reward in TRL's keyword form as "
                "`reward_funcs`."
            )
        rewards, metadata = output
        shape = tuple(rewards.shape) if hasattr(rewards, "shape") else None
        if shape not in (None, (len(prompts),)):
            raise RewardOutputError(f"Reward {form}, but they have shape {shape}, not ({len(prompts)},).")
        if shape is None and (not isinstance(rewards, list | tuple) or len(rewards) != len(prompts)):
            raise RewardOutputError(f"Reward {form}, but the first of the pair was {rewards!r:.120}.")
        if log_extra is not None:
            log_extra("reward_metadata", [metadata] * len(prompts))
        return rewards


def _in_reward_calls(scored: ScoredImages) -> list[list]:
    """DDPO's entries: rows of one call of the reward have the very same metadata object."""
    returned = scored.extra.get("reward_metadata", [_NO_METADATA] * len(scored.rows))
    entries = []
    for _, run in groupby(range(len(scored.rows)), key=lambda i: id(returned[i])):
        indices = list(run)
        rows = [scored.rows[i] for i in indices]
        entries.append(
            [
                scored.images[indices].float() / 255,
                tuple(row["prompt"] for row in rows),
                tuple(row.get("prompt_metadata", _without_prompt(row)) for row in rows),
                scored.rewards[indices].float(),
                returned[indices[0]],
            ]
        )
    return entries


_NO_METADATA: dict = {}


def _without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {name: cell for name, cell in row.items() if name != "prompt"}
