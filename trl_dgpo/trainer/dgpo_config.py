"""What can be set of a DGPO run, and every check that needs no model."""

import copy
import dataclasses
import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl.trainer.base_config import _BaseConfig

from ..ddpo_compat import DDPOFields, GRPOFields, finish_names, resolve_names
from ..engines import check_installed
from ..field_types import check_types


@dataclass(repr=False)
class DGPOConfig(GRPOFields, DDPOFields, _BaseConfig):
    r"""
    Configuration class for the [`DGPOTrainer`].

    Only the parameters specific to DGPO, and those of `TrainingArguments` whose default or meaning differs here, are
    listed. Defaults are those of the authors' released code in its first published mode unless another source is
    named.

    A round is `prompts_per_round` x `num_generations` images over all processes: these two decide what is learned.
    `per_device_train_batch_size` and `sample_batch_size` are memory knobs and change nothing but rounding.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision` or `variant`,
            where `model` is a name.

        > Parameters that control memory

        offload_text_encoders (`bool`, *optional*, defaults to `True`):
            Keep the text encoders on the CPU and move them to the device only while they encode prompts that were not
            encoded before. They stay there after training: `pipeline.to(device)` before you call the pipeline.
        precompute_prompt_embeds (`bool`, *optional*, defaults to `False`):
            Encode every prompt of the data sets before training, and keep the embeddings on disk in the cache of
            `datasets`, where a later run finds them. 1.7 MB a prompt for SD3.5 in bfloat16. With several processes one
            encodes and the others wait: `ddp_timeout` must be longer than that takes.
        decode_batch_size (`int`, *optional*):
            Images decoded at a time, and saved pictures encoded: as many as make two megapixels if not set.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Decode in overlapping tiles, for images beyond what the device decodes whole. Tiles change pixels a little.
        offload_reference (`bool`, *optional*, defaults to `False`):
            Keep the frozen model's predictions, which the KL term needs until their micro-batch has its turn, on the
            CPU.

        > Parameters that control the rollouts

        num_generations (`int`, *optional*, defaults to `24`):
            Images of a group, at least 2.
        prompts_per_round (`int`, *optional*, defaults to `24`):
            Groups of a round, over all processes. Must be a multiple of `updates_per_round`.
        sample_batch_size (`int`, *optional*):
            Images sampled at a time on one device. `num_generations` if not set.
        merge_adapter (`bool`, *optional*):
            Merge the LoRA into the weights while rollouts are sampled, which saves its layers' time; the weights
            themselves stay as they are. If not set: where the forward computes in float32, so that nothing is lost,
            and there for the old policy's predictions too. In half precision a merged weight rounds the LoRA's small
            part off.
        sampler (`str`, *optional*, defaults to `"dpm"`):
            `"dpm"` (second-order DPM-Solver++), `"euler"` on the same levels, or `"sde"` (Flow-GRPO's stochastic
            steps, an ablation).
        sigmas (`str`, *optional*, defaults to `"dpm"`):
            Levels of the rollouts: `"dpm"`, DPM-Solver++'s own grid, or `"model"`, that of the pipeline's scheduler,
            which `"euler"` and `"sde"` alone can walk.
        sample_num_steps (`int`, *optional*, defaults to `10`):
            Sampling steps of a rollout.
        sample_guidance_scale (`float`, *optional*, defaults to `4.5`):
            Classifier-free guidance of rollouts. 1 or less turns it off and halves their cost.
        resolution (`int`, *optional*, defaults to `512`):
            Height of the images in pixels, and width unless `width` is set.
        width (`int`, *optional*):
            Width of the images in pixels.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            Tokens of the third text encoder.
        negative_prompt (`str`, *optional*, defaults to `""`):
            The unconditional side of guidance.
        embedded_guidance (`float`, *optional*):
            What a model with guidance distilled into its weights (FLUX.1-dev) is told, in rollouts, training and
            evaluation; 3.5 if not set. Refused with any other model.
        old_policy_after (`int`, *optional*, defaults to `200`):
            Optimiser steps after which rollouts come from the old policy, from the next round on. `None` or -1 for
            never.

        async_reward_computation (`bool`, *optional*, defaults to `False`):
            Score each sub-batch of `sample_batch_size` images in a thread while the next one is sampled. Rewards must
            then look at each image alone and be safe to call from several threads. Those with `input_type = "pt"`,
            which carry a model, are still called once for the whole round.
        max_workers (`int`, *optional*, defaults to `2`):
            Threads of `async_reward_computation`.
        reward_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a call of a reward may take, and those of a retry all together. One that takes longer has
            failed for all its images, which are masked, and its thread is left behind. With several processes
            `ddp_timeout` must be longer than all rewards' limits together. `inf` for no limit; rewards are then called
            in the trainer's own thread, which some insist on.
        reward_self_test (`bool`, *optional*, defaults to `True`):
            Call every reward once before the model is loaded, with a white image and the first row of its data set, so
            that a broken one is found at once. To a reward that keeps count this is one more call. It has no time
            limit, since a first call may download a model. Prompts of a `prompt_function` are not drawn for it:
            rewards are only asked by their `check()`, and the first call of training is the one without a limit.

        > Parameters that control the objective

        beta (`float`, *optional*, defaults to `100.0`):
            Sharpness of the gate. Larger values close it sooner and keep the policy nearer to the reference. Not
            GRPO's `beta`, which is `kl_coef` here.
        loss_type (`str`, *optional*, defaults to `"surrogate"`):
            `"surrogate"` or `"logsigmoid"`: the same gradient up to the factor `beta`. See
            [`~trl_dgpo.losses.dgpo_loss`].
        kl_coef (`float`, *optional*, defaults to `0.001`):
            Weight of the squared velocity difference to the frozen base model. 0 for none. With `"logsigmoid"` it is
            multiplied by `beta`, to mean the same.
        kl_target (`float`, *optional*):
            Hold the logged `kl` here: `kl_coef`, above 0, is then where its weight starts, which moves after each
            optimiser step ([`~trl_dgpo.losses.next_kl_coef`]), within a factor of 1000, and is logged as `kl_coef`. In
            the units of `kl`, which a run without a target shows.
        kl_target_rate (`float`, *optional*, defaults to `0.1`):
            How fast that weight moves, in (0, 5): in each step by at most a fifth of this, as a share of itself, which
            is 2 % by default. A short run needs more.
        clip_range (`float`, *optional*, defaults to `1e-3`):
            Clip of \\( \exp(d^{\mathrm{old}} - d) \\), see [`~trl_dgpo.losses.clip_errors`]. `None` or 0 for no clip,
            which saves a forward a level.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`):
            What advantages are divided by: `"group"` or `True`, `"batch"`, `"none"` or `False`; `"sign"` for wins
            minus losses. See [`~trl_dgpo.advantages.group_advantages`].
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Bound on advantages, `None` or 0 for none.
        recenter_clipped (`bool`, *optional*, defaults to `False`):
            Restore the advantages' sum of 0 where that bound acted.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, 1 each if not set.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several rewards become one. `"sum_then_normalize"`: the weighted sum, of which advantages are made.
            `"normalize_then_sum"`: each is first divided by its own deviation within the group, so that the weights
            decide and not the units (GDPO, [2601.05242](https://huggingface.co/papers/2601.05242)); GDPO and TRL then
            normalise over the batch, which is `scale_rewards="batch"` here. See
            [`~trl_dgpo.advantages.normalize_then_sum`]. `reward` in the log is the weighted sum in either case.
        reference (`str`, *optional*, defaults to `"frozen"`):
            What the preference is measured against: `"frozen"` (the model before training), `"old"` (the old policy)
            or `"refreshed"` (the policy at the round's start, as in GPO).
        reference_guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance of the frozen model's predictions, for training without guidance in rollouts.

        > Parameters that control the levels that are trained on

        num_train_timesteps (`int`, *optional*, defaults to `4`):
            Levels a pass, the same for all groups.
        t_min (`float`, *optional*, defaults to `0.4`):
            Smallest level before the shift, in [0, 1): the timestep clip. 0 trains on all levels.
        t_max (`float`, *optional*, defaults to `1.0`):
            Largest level before the shift, in (t_min, 1]. Below 1 it leaves out the noisiest levels, an ablation of
            GPO's.
        shared_noise (`bool`, *optional*, defaults to `True`):
            Noise the images of a group alike (the paper and the released code). `False` draws each image's own, an
            ablation.
        timestep_sampling (`str`, *optional*, defaults to `"grid"`):
            `"grid"`: drawn without replacement from the rollout's own levels (the released code). `"continuous"`:
            uniform in [t_min, t_max], then shifted (the paper, whose largest is 1).
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that a group is trained with the negative prompt in a pass. The paper has 0.05.

        > Parameters that control the updates

        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over a round, each with its own levels and noise.
        updates_per_round (`int`, *optional*, defaults to `1`):
            Optimiser steps of a pass: equal parts, in whole groups.
        full_finetuning (`bool`, *optional*, defaults to `False`):
            Train the whole transformer in place of a LoRA (rank 64, alpha 128, the joint blocks' attention
            projections; `peft_config` for another).
        ema_every (`int`, *optional*, defaults to `8`):
            Optimiser steps between two moves of the `ema` weights, which are evaluated and saved.
        save_ema (`bool`, *optional*, defaults to `True`):
            Save the `ema` weights in `output_dir`; `False` saves the live ones.
        per_device_train_batch_size (`int`, *optional*):
            Images of a micro-batch: any divisor of a process's images of an optimiser step. One group, or the next
            smaller divisor, if not set. Where a micro-batch does not hold whole groups, the gates are computed
            beforehand, at the cost of one more forward a level and image.
        gradient_accumulation_steps (`int`, *optional*):
            Derived: `prompts_per_round * num_generations / (updates_per_round * processes *
            per_device_train_batch_size) * num_train_timesteps`. Setting another value is an error.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Deal the prompts in a new order each epoch.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Optimiser steps in a row that are left out, because their gradient is not finite or above
            `skip_grad_norm`, after which training stops with its state saved. A step that is left out moves no weight,
            moment or average, but counts as a step; `skipped_steps` in the log is how many there were. With fp16 a
            gradient that is not finite is the loss scaling's, which lowers its scale, as long as that is 1 or more.
            Under DeepSpeed nothing is left out.
        skip_grad_norm (`float`, *optional*):
            Largest gradient norm, before clipping by `max_grad_norm`, of an optimiser step that is taken. Any finite
            one if not set.

        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Peak learning rate.
        weight_decay (`float`, *optional*, defaults to `1e-4`):
            Weight decay of AdamW.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule.
        logging_steps (`float`, *optional*, defaults to `1`):
            Optimiser steps between two logs. A step is hundreds of images, so 1.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Compile the transformer's blocks, each once for all, for rollouts and updates; `torch_compile_backend` and
            `torch_compile_mode` say how.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Hide losses that are no numbers from the log. That waits for the device in every micro-step.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Every trained weight has a part in every backward, so there is nothing to find.
        ddp_broadcast_buffers (`bool`, *optional*, defaults to `False`):
            The buffers are frozen and alike everywhere; sending SD3.5-Medium's would be 906 MB an optimiser step.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Columns of the data set are handed to the rewards, so all are kept.
        allow_unverified_engine (`bool`, *optional*, defaults to `False`):
            Try an engine (FSDP2, DeepSpeed) that nobody has run this trainer with yet.

        > Parameters that control evaluation

        eval_num_steps (`int`, *optional*, defaults to `40`):
            Sampling steps of evaluation images.
        eval_guidance_scale (`float`, *optional*):
            Guidance of evaluation images, `sample_guidance_scale` if not set.
        eval_num_images (`int`, *optional*, defaults to `1`):
            Images of each evaluation prompt.
        eval_on_start (`bool`, *optional*, defaults to `True`):
            Evaluate before the first step, where there is an `eval_dataset`.

        > Parameters that control the guards

        image_guard (`str`, *optional*, defaults to `"warn"`):
            Measure each round's pictures against the base model's (contrast, edges, colours, near duplicates), log it,
            and `"warn"` where they leave its range, or `"stop"` then if the reward has risen, with a checkpoint;
            `"off"` measures nothing. See [`~trl_dgpo.guards.ImageGuard`]. Saved pictures are not measured.
        divergence_rounds (`int`, *optional*, defaults to `10`):
            Rounds between two measures of the distance to the base model, logged as `divergence`: the mean squared
            difference of both predictions, on one image of each of eight groups, at four levels, whatever `kl_coef`
            is. 0 for none; none either where the base is not at hand, which is so in full fine-tuning, and where
            training goes on from a LoRA, unless the loss uses it.
        early_stopping_patience (`int`, *optional*):
            Evaluations after the best one, by `metric_for_best_model`, at which training stops. With an `eval_dataset`
            a warning is given in any case where that metric falls while the training reward rises
            ([`~trl_dgpo.guards.HeldOutGuard`]).

        > Parameters that control what people look at

        num_log_images (`int`, *optional*, defaults to `8`):
            Prompts, the first of `eval_dataset` or else of `train_dataset`, that are drawn through training under
            fixed noise with the `ema` weights: kept in `output_dir/samples` and sent to the trackers of `report_to`. 0
            for none.
        log_images_steps (`int`, *optional*):
            Optimiser steps between two such drawings. If not set: at the start, with every evaluation and at the end.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print a table of prompts, rewards and advantages with each log, and keep it with small images in
            `output_dir/completions`.
        num_completions_to_print (`int`, *optional*, defaults to `16`):
            Rows of the printed table, `None` for all.

    Raises:
        `ValueError`: for a value that there is not, and for numbers that do not fit one another, with the nearest ones
        that do.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Overridden defaults of TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(
        default=1, metadata={"help": "Optimiser steps between two logs. A step is hundreds of images, so 1."}
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every trained weight has a part in every backward, so there is nothing to find."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The buffers are frozen and alike everywhere; there is nothing to send."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide losses that are no numbers. That waits for the device in every micro-step."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Dataset columns are handed to the rewards, so all are kept."}
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images of a micro-batch: any divisor of a process's share. One group if not set."},
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Derived from the round; leave it unset."}
    )

    # Parameters that control the model
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, such as `revision`."},
    )

    # Parameters that control memory
    offload_text_encoders: bool = field(
        default=True, metadata={"help": "Keep the text encoders on the CPU but while they encode."}
    )
    precompute_prompt_embeds: bool = field(
        default=False, metadata={"help": "Encode all prompts before training and keep the embeddings on disk."}
    )
    decode_batch_size: int | None = field(
        default=None, metadata={"help": "Images decoded or encoded at a time, two megapixels of them if not set."}
    )
    vae_tiling: bool = field(default=False, metadata={"help": "Decode in overlapping tiles."})
    offload_reference: bool = field(
        default=False, metadata={"help": "Keep the frozen model's predictions on the CPU until they are needed."}
    )

    # Parameters that control the rollouts
    num_generations: int = field(default=24, metadata={"help": "Images of a group, at least 2."})
    prompts_per_round: int = field(default=24, metadata={"help": "Groups of a round, over all processes."})
    sample_batch_size: int | None = field(
        default=None, metadata={"help": "Images sampled at a time on one device. `num_generations` if not set."}
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Merge the LoRA into the weights for rollouts. If not set: where that loses nothing."},
    )
    sampler: str = field(default="dpm", metadata={"help": "Rollout sampler.", "choices": ["dpm", "euler", "sde"]})
    sigmas: str = field(default="dpm", metadata={"help": "Levels of the rollouts.", "choices": ["dpm", "model"]})
    sample_num_steps: int = field(default=10, metadata={"help": "Sampling steps of a rollout."})
    sample_guidance_scale: float = field(
        default=4.5, metadata={"help": "Classifier-free guidance of rollouts. 1 or less turns it off."}
    )
    resolution: int = field(default=512, metadata={"help": "Height of the images in pixels, and width unless set."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    max_sequence_length: int = field(default=128, metadata={"help": "Tokens of a text encoder of any length."})
    negative_prompt: str = field(default="", metadata={"help": "The unconditional side of guidance."})
    embedded_guidance: float | None = field(
        default=None, metadata={"help": "What FLUX.1-dev is told of its distilled guidance, 3.5 if not set."}
    )
    old_policy_after: int | None = field(
        default=200,
        metadata={"help": "Optimiser steps after which rollouts come from the old policy. -1 for never."},
    )

    async_reward_computation: bool = field(
        default=False, metadata={"help": "Score each sub-batch in a thread while the next one is sampled."}
    )
    max_workers: int = field(default=2, metadata={"help": "Threads of `async_reward_computation`."})
    reward_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that a call of a reward may take. inf for no limit."}
    )
    reward_self_test: bool = field(
        default=True, metadata={"help": "Call every reward once with a white image before the model is loaded."}
    )

    # Parameters that control the objective
    beta: float = field(
        default=100.0, metadata={"help": "Sharpness of the gate; not GRPO's beta, which is `kl_coef`."}
    )
    loss_type: str = field(default="surrogate", metadata={"help": "'surrogate' or 'logsigmoid'."})
    kl_coef: float = field(default=0.001, metadata={"help": "Weight of the squared velocity difference to the base."})
    kl_target: float | None = field(default=None, metadata={"help": "The `kl` that its weight is moved to hold."})
    kl_target_rate: float = field(default=0.1, metadata={"help": "How fast the weight moves to hold `kl_target`."})
    clip_range: float | None = field(
        default=1e-3, metadata={"help": "Clip of the error ratio to the old policy. 0 for none."}
    )
    scale_rewards: str = field(
        default="group", metadata={"help": "What advantages are divided by: 'group', 'batch', 'none' or 'sign'."}
    )
    advantage_clip: float | None = field(default=5.0, metadata={"help": "Bound on advantages. 0 for none."})
    recenter_clipped: bool = field(
        default=False, metadata={"help": "Restore the advantages' sum of 0 where that bound acted."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward, 1 if not set."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "How several rewards become one.",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    reference: str = field(
        default="frozen",
        metadata={"help": "What the preference is measured against.", "choices": ["frozen", "old", "refreshed"]},
    )
    reference_guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance of the frozen model's predictions."}
    )

    # Parameters that control the levels that are trained on
    num_train_timesteps: int = field(default=4, metadata={"help": "Levels a pass, the same for all groups."})
    t_min: float = field(default=0.4, metadata={"help": "Smallest level before the shift, in [0, 1)."})
    t_max: float = field(default=1.0, metadata={"help": "Largest level before the shift, in (t_min, 1]."})
    shared_noise: bool = field(default=True, metadata={"help": "Noise the images of a group alike."})
    timestep_sampling: str = field(
        default="grid", metadata={"help": "Where levels are drawn from.", "choices": ["grid", "continuous"]}
    )
    prompt_dropout: float = field(
        default=0.0, metadata={"help": "Probability that a group is trained with the negative prompt in a pass."}
    )

    # Parameters that control the updates
    num_iterations: int = field(default=1, metadata={"help": "Passes over a round."})
    updates_per_round: int = field(default=1, metadata={"help": "Optimiser steps of a pass."})
    full_finetuning: bool = field(default=False, metadata={"help": "Train the whole transformer in place of a LoRA."})
    ema_every: int = field(default=8, metadata={"help": "Optimiser steps between two moves of the `ema` weights."})
    save_ema: bool = field(default=True, metadata={"help": "Save the `ema` weights; the live ones otherwise."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Deal the prompts in a new order each epoch."})
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Optimiser steps in a row, left out for their gradient, after which training stops."},
    )
    skip_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Largest gradient norm of an optimiser step that is taken, any finite one if not set."},
    )
    allow_unverified_engine: bool = field(
        default=False, metadata={"help": "Try FSDP2 or DeepSpeed, with which nobody has run this trainer yet."}
    )

    # Parameters that control evaluation
    eval_num_steps: int = field(default=40, metadata={"help": "Sampling steps of evaluation images."})
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of evaluation images, `sample_guidance_scale` if not set."}
    )
    eval_num_images: int = field(default=1, metadata={"help": "Images of each evaluation prompt."})

    # Parameters that control the guards
    image_guard: str = field(
        default="warn",
        metadata={
            "help": "What happens where pictures leave the base model's range.",
            "choices": ["warn", "stop", "off"],
        },
    )
    divergence_rounds: int = field(
        default=10, metadata={"help": "Rounds between two measures of the distance to the base model. 0 for none."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations after the best one at which training stops."}
    )

    # Parameters that control what people look at
    num_log_images: int = field(
        default=8, metadata={"help": "Prompts that are drawn through training under fixed noise. 0 for none."}
    )
    log_images_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between two such drawings. If not set: at the start, with every evaluation and "
            "at the end."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print and keep a table of prompts, rewards and advantages with each log."}
    )
    num_completions_to_print: int | None = field(
        default=16, metadata={"help": "Rows of the printed table, all if None."}
    )

    _loss_types: ClassVar[tuple[str, ...]] = ("surrogate", "logsigmoid")
    # Fields in which a method has nothing to choose, and why: what differs from their defaults is refused.
    _fixed: ClassVar[dict[str, str]] = {}
    # What the default LoRA has in place of `lora_config`'s own numbers.
    default_lora: ClassVar[dict[str, int]] = {}
    # Whether `clip_range` is PPO's.
    clips_likelihoods: ClassVar[bool] = False

    def __post_init__(self):
        check_types(self)
        resolve_names(self)
        if self.learning_rate is None:
            self.learning_rate = self._default_learning_rate
        if self.bf16 is None and not self.fp16:
            # TRL's default of bf16 everywhere raises on machines that have none; there we train in float32.
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # A command line has no None.
        self.clip_range = None if self.clip_range == 0 else self.clip_range
        self.advantage_clip = None if self.advantage_clip == 0 else self.advantage_clip
        self.old_policy_after = None if self.old_policy_after == -1 else self.old_policy_after
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, str(self.scale_rewards).lower())
        self.scale_rewards = {"true": "group", "false": "none"}.get(self.scale_rewards, self.scale_rewards)
        if self.width is None:
            self.width = self.resolution
        wants_best = (
            self.load_best_model_at_end or self.save_strategy == "best" or self.early_stopping_patience is not None
        )
        if wants_best and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"  # Trainer's own default is a loss, which no evaluation has
        if self.activation_checkpointing is None:
            # Its old name, in which TRL's default stands, warns.
            self.activation_checkpointing = self.gradient_checkpointing
        self._check_fixed()
        self._check_objective()
        self._check_rollouts()
        given_accumulation, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        given_batch_size = self.per_device_train_batch_size
        self.per_device_train_batch_size = given_batch_size or self._default_batch_size
        if self.sample_batch_size is None:
            self.sample_batch_size = self.num_generations
        if self.eval_guidance_scale is None:
            self.eval_guidance_scale = self.sample_guidance_scale
        check_installed(self.deepspeed)
        if self.ddp_backend is not None and "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"`ddp_backend` is {self.ddp_backend!r}, and this is one process alone, which Accelerate then cannot "
                "set up. Leave it unset, or start with `accelerate launch` or `torchrun`."
            )
        super().__post_init__()
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError(
                f"`early_stopping_patience` is {self.early_stopping_patience} evaluations, and `eval_strategy` is "
                "'no'. Set `eval_strategy='steps'` and `eval_steps`, and give an `eval_dataset`."
            )
        self._check_split(given_batch_size, given_accumulation)
        finish_names(self)

    def to_dict(self) -> dict[str, Any]:
        """As of `TrainingArguments`, which blanks its own tokens: what goes to trackers and files."""
        values = super().to_dict()
        if isinstance(values["model_init_kwargs"], dict) and "token" in values["model_init_kwargs"]:
            values["model_init_kwargs"] = {**values["model_init_kwargs"], "token": "<TOKEN>"}
        return values

    def without_tokens(self) -> "DGPOConfig":
        """A copy to be shown or saved, with a mark in place of each token."""
        shown = copy.copy(self)
        for each in dataclasses.fields(self):
            if each.name.endswith("_token") and getattr(self, each.name) is not None:
                setattr(shown, each.name, f"<{each.name.upper()}>")
        if isinstance(self.model_init_kwargs, dict) and "token" in self.model_init_kwargs:
            shown.model_init_kwargs = {**self.model_init_kwargs, "token": "<TOKEN>"}
        return shown

    def __repr__(self) -> str:
        # Not a dataclass's own, which would show tokens in every traceback and log that shows a configuration.
        shown = self.without_tokens()
        values = (f"{each.name}={getattr(shown, each.name)!r},\n" for each in dataclasses.fields(self))
        return f"{type(self).__name__}(\n{''.join(values)})"

    __str__ = __repr__

    @property
    def height(self) -> int:
        """Height of the images in pixels."""
        return self.resolution

    @property
    def reads_reference(self) -> bool:
        """Whether the loss reads the reference's errors."""
        return True

    @property
    def clips_errors(self) -> bool:
        """Whether errors are clipped against the old policy's, which takes a forward of its own."""
        return self.clip_range is not None

    @property
    def keeps_base(self) -> bool:
        """Whether the loss reads the frozen model's predictions, and not only its errors."""
        return bool(self.kl_coef)

    @property
    def latents_per_image(self) -> int:
        """Latents that the record of a round keeps of each image."""
        return 1

    @property
    def num_adapters(self) -> int:
        """LoRAs that are trained, where any is."""
        return 1

    @property
    def num_directions(self) -> int:
        """Latents in which each image of an optimiser step is told, at each level, where to move."""
        return 0

    @property
    def no_grad_guidance_scale(self) -> float:
        """Largest guidance of the forwards without gradient that an optimiser step begins with."""
        return self.reference_guidance_scale

    @property
    def train_guidance_scale(self) -> float:
        """Guidance of the predictions that are learned from."""
        return 1.0

    @property
    def noises_per_update(self) -> int:
        """Draws of noise of an optimiser step for each level, over all processes."""
        return self.groups_per_update * (1 if self.shared_noise else self.num_generations)

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps of a round."""
        return self.num_iterations * self.updates_per_round

    @property
    def groups_per_update(self) -> int:
        """Groups of an optimiser step, over all processes."""
        return self.prompts_per_round // self.updates_per_round

    @property
    def is_group_cut(self) -> bool:
        """Whether a group may lie in several micro-batches."""
        return self.per_device_train_batch_size % self.num_generations != 0

    @property
    def is_group_shared(self) -> bool:
        """Whether a group may lie on several processes."""
        return self._images_per_update % self.num_generations != 0

    @property
    def micro_batches_per_update(self) -> int:
        """Micro-batches of an optimiser step on one process, each of which is passed over once a level."""
        return self.gradient_accumulation_steps // self.num_train_timesteps

    @property
    def derived(self) -> dict[str, Any]:
        """What fields are that follow from others, where they are left out."""
        return {
            "bf16": self.bf16,
            "eval_guidance_scale": self.sample_guidance_scale,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "learning_rate": self._default_learning_rate,
            "per_device_train_batch_size": _largest_divisor(self._images_per_update, self._default_batch_size),
            "sample_batch_size": self.num_generations,
            "width": self.resolution,
        }

    @property
    def _default_batch_size(self) -> int:
        """Images of a micro-batch, where they divide the step's."""
        return self.num_generations

    @property
    def _default_learning_rate(self) -> float:
        return self.__dataclass_fields__["learning_rate"].default

    @property
    def _images_per_update(self) -> int:
        """Images of an optimiser step on one process."""
        return self.groups_per_update * self.num_generations // self.world_size

    def _check_fixed(self) -> None:
        for name, reason in self._fixed.items():
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"`{name}` is {value!r}; in `{type(self).__name__}` it must be {default!r}: {reason}. Leave it "
                    "unset."
                )

    def _check_objective(self) -> None:
        _check_choice("loss_type", self.loss_type, self._loss_types)
        _check_choice("sampler", self.sampler, ("dpm", "euler", "sde"))
        _check_choice("sigmas", self.sigmas, ("dpm", "model"))
        _check_choice("reference", self.reference, ("frozen", "old", "refreshed"))
        _check_choice("timestep_sampling", self.timestep_sampling, ("grid", "continuous"))
        _check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none", "sign"))
        _check_choice("image_guard", self.image_guard, ("warn", "stop", "off"))
        _check_choice(
            "multi_objective_aggregation",
            self.multi_objective_aggregation,
            ("sum_then_normalize", "normalize_then_sum"),
        )
        if not 0 <= self.t_min < 1:
            raise ValueError(
                f"`t_min` is {self.t_min}; it is a level before the shift and must be in [0, 1). 0 trains on all "
                "levels, 0.4 is the default."
            )
        if not self.t_min < self.t_max <= 1:
            raise ValueError(
                f"`t_max` is {self.t_max}; it is a level before the shift and must be at most 1 and above `t_min` "
                f"({self.t_min})."
            )
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"`prompt_dropout` is {self.prompt_dropout}; it is a probability and must be in [0, 1).")
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"`reward_weights` is {self.reward_weights}; each must be a finite number.")
        for name in ("beta", "clip_range", "advantage_clip"):
            value = getattr(self, name)
            optional = name != "beta"
            if value is None and optional:
                continue
            if value is None or not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0{'; None turns it off' * optional}.")
        if not self.kl_coef >= 0:
            raise ValueError(f"`kl_coef` is {self.kl_coef}; it must be 0 (no KL term) or more.")
        if self.kl_target is not None and not (0 < self.kl_target < math.inf):
            raise ValueError(
                f"`kl_target` is {self.kl_target}; it is a mean squared difference and must be above 0 and finite. "
                "None for a fixed `kl_coef`."
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                f"`kl_target` is {self.kl_target} and `kl_coef` is 0, where its weight would start and stay. Set "
                "`kl_coef`, such as 0.001."
            )
        if not 0 < self.kl_target_rate < 5:
            raise ValueError(
                f"`kl_target_rate` is {self.kl_target_rate}; it must be above 0 and below 5. The weight changes by at "
                "most a fifth of this, as a share of itself, in each step."
            )
        if self.beta < 1 and self.reads_reference:
            default = self.__dataclass_fields__["beta"].default
            warnings.warn(
                f"`beta` is {self.beta}: in `{type(self).__name__}` it is the gate's sharpness, {default:g} by "
                "default, and below 1 the gate hardly moves. GRPO's `beta`, the KL weight, is `kl_coef` here.",
                stacklevel=4,  # whoever builds the configuration
            )

    def _check_rollouts(self) -> None:
        if self.num_generations < 2 and "num_generations" not in self._fixed:
            raise ValueError(
                f"`num_generations` is {self.num_generations}; a group needs at least 2 images to compare."
            )
        for name in (
            "prompts_per_round",
            "sample_num_steps",
            "eval_num_steps",
            "eval_num_images",
            "num_train_timesteps",
            "num_iterations",
            "updates_per_round",
            "ema_every",
            "resolution",
            "width",
            "max_sequence_length",
            "sample_batch_size",
            "decode_batch_size",
            "per_device_train_batch_size",
            "max_workers",
            "log_images_steps",
            "num_completions_to_print",
            "early_stopping_patience",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if not self.reward_timeout > 0:
            raise ValueError(
                f"`reward_timeout` is {self.reward_timeout}; it is a number of seconds and must be above 0, `inf` for "
                "no limit."
            )
        for name in ("num_log_images", "divergence_rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be 0 (none) or more.")
        if self.skip_grad_norm is not None and not self.skip_grad_norm > 0:
            raise ValueError(
                f"`skip_grad_norm` is {self.skip_grad_norm}; it must be above 0. Leave it unset for no limit."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` is set, whose checkpoints are written in the middle of an optimiser step, by "
                "each process for itself. Leave it out: SIGTERM is answered without it, with a checkpoint to resume "
                "from."
            )
        if self.old_policy_after is not None and self.old_policy_after < 0:
            raise ValueError(
                f"`old_policy_after` is {self.old_policy_after}; it is a number of optimiser steps, 0 or more. None "
                "for never."
            )
        if self.timestep_sampling == "grid" and self.num_train_timesteps > self.sample_num_steps:
            raise ValueError(
                f"`num_train_timesteps` ({self.num_train_timesteps}) levels cannot be drawn without replacement from "
                f"a rollout of `sample_num_steps` ({self.sample_num_steps}). Lower the first, raise the second, or "
                "use `timestep_sampling='continuous'`."
            )

    def _check_split(self, given_batch_size: int | None, given_accumulation: int | None) -> None:
        processes, updates, prompts = self.world_size, self.updates_per_round, self.prompts_per_round
        if prompts % updates:
            raise ValueError(
                f"`prompts_per_round` ({prompts}) must be a multiple of `updates_per_round` ({updates}): an optimiser "
                f"step has whole groups. Use `prompts_per_round={_near_multiples(prompts, updates)}`, or "
                f"`updates_per_round={_largest_divisor(prompts, updates)}`."
            )
        images = prompts // updates * self.num_generations
        if images % processes:
            unit = updates * processes // math.gcd(processes, self.num_generations)
            raise ValueError(
                f"An optimiser step has {images} images ({prompts} groups / {updates} updates x "
                f"{self.num_generations} images), which {processes} processes cannot share equally. Use "
                f"`prompts_per_round={_near_multiples(prompts, unit)}`, or {_largest_divisor(images, processes)} "
                "processes."
            )
        share = images // processes
        if given_batch_size is None:
            self.per_device_train_batch_size = _largest_divisor(share, self._default_batch_size)
        batch = self.per_device_train_batch_size
        if share % batch:
            near = [n for n in (_largest_divisor(share, batch), _smallest_divisor(share, batch)) if n]
            raise ValueError(
                f"`per_device_train_batch_size` ({batch}) must divide a process's images of an optimiser step "
                f"({share}: {prompts} groups / {updates} updates x {self.num_generations} images / {processes} "
                f"processes). Use {' or '.join(map(str, near))}."
            )
        derived = share // batch * self.num_train_timesteps
        if given_accumulation not in (None, derived):
            raise ValueError(
                f"`gradient_accumulation_steps` is {given_accumulation}, but the round makes it {derived}: {prompts} "
                f"groups x {self.num_generations} images / ({updates} updates x {processes} processes x {batch} "
                f"images of a micro-batch) x {self.num_train_timesteps} levels. Leave it unset; `updates_per_round` "
                "sets the size of an optimiser step."
            )
        self.gradient_accumulation_steps = derived


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def _smallest_divisor(number: int, limit: int) -> int | None:
    return next((n for n in range(limit, number + 1) if number % n == 0), None)


def _near_multiples(number: int, unit: int) -> str:
    return " or ".join(str(n) for n in (number // unit * unit, (number // unit + 1) * unit) if n)
