"""
Seeded random configurations and prompts, for the fuzz tests: half as a user might write them, half with anything.

Nothing here depends on the order of a set or on the clock: a number names the same configuration everywhere.
"""

import dataclasses
import math
import random
import typing
from typing import Any

from trl_dgpo import DGPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, FlowGRPOConfig, GPOConfig, TDMR1Config


CONFIGS = (DGPOConfig, GPOConfig, FlowGRPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, TDMR1Config)

# Values that a user might write, where a field's type alone would hardly give one.
PLAUSIBLE: dict[str, tuple] = {
    "output_dir": ("runs/a", "runs/ünï code", "~/runs"),
    "lr_scheduler_type": ("constant", "linear", "cosine", "constant_with_warmup"),
    "lr_scheduler_kwargs": ({}, '{"num_cycles": 2}'),
    "optim": ("adamw_torch", "adamw_torch_fused", "sgd"),
    "optim_args": (None, "lr=1"),
    "optim_target_modules": (None, ["attn"]),
    "warmup_steps": (0, 5, 0.1),
    "adam_beta1": (0.0, 0.5, 0.9),
    "adam_beta2": (0.95, 0.999),
    "adam_epsilon": (1e-8, 1e-6),
    "label_smoothing_factor": (0.0, 0.1),
    "gradient_accumulation_steps": (None,),
    "per_device_train_batch_size": (None, 1, 2),
    "fp16": (False,),
    "bf16": (False, None),
    "bf16_full_eval": (False,),
    "tf32": (None, False),
    "activation_checkpointing_kwargs": (None, {"use_reentrant": False}),
    "gradient_checkpointing_kwargs": (None, {"use_reentrant": False}),
    "torch_compile_backend": (None, "eager"),
    "torch_compile_mode": (None, "default"),
    "logging_strategy": ("no", "steps", "epoch"),
    "logging_steps": (1, 5, 0.5),
    "include_num_input_tokens_seen": (False, "no"),
    "log_level": ("passive", "info"),
    "log_level_replica": ("warning", "error"),
    "report_to": ("none", ["tensorboard"], []),
    "eval_strategy": ("no", "steps", "epoch"),
    "eval_steps": (1, 10, 0.25, None),
    "save_strategy": ("no", "steps", "epoch", "best"),
    "hub_strategy": ("end", "every_save", "checkpoint"),
    "load_best_model_at_end": (False,),
    "metric_for_best_model": (None, "eval_reward"),
    "accelerator_config": (None, {"split_batches": False}, '{"even_batches": true}'),
    "parallelism_config": (None,),
    "dataloader_prefetch_factor": (None,),
    "dataloader_multiprocessing_context": (None, "fork"),
    "train_sampling_strategy": ("random", "sequential"),
    "ddp_backend": (None,),
    "fsdp": (None,),
    "fsdp_config": (None, {}),
    "deepspeed": (None,),
    "debug": ("", []),
    "local_rank": (-1,),
    "torch_empty_cache_steps": (None, 3),
    "resume_from_checkpoint": (None,),
    "trackio_static_space_id": (None, False, "user/space"),
    # DDPO's
    "log_with": ("tensorboard",),
    "tracker_kwargs": ({}, '{"wandb": {}}'),
    "accelerator_kwargs": ({}, "{}"),
    "project_kwargs": ({"total_limit": 2}, "{}"),
    "num_epochs": (1, 100),
    "mixed_precision": ("no",),
    "allow_tf32": (True, False),
    "resume_from": (None, ""),
    "train_timestep_fraction": (1.0, 0.6),
    "train_adv_clip_max": (5, 5.0),
    # GRPO's, which are refused
    "steps_per_generation": (None,),
    "generation_batch_size": (None,),
    "epsilon": (None,),
    # ours
    "model_init_kwargs": (None, {"revision": "main"}, '{"variant": "fp16"}'),
    "num_generations": (2, 3, 4, 8, 24),
    "prompts_per_round": (2, 4, 6, 12, 48),
    "updates_per_round": (1, 2),
    "sampler": ("dpm", "euler", "sde"),
    "sigmas": ("dpm", "model"),
    "sample_num_steps": (4, 10, 20),
    "num_train_timesteps": (1, 2, 4),
    "sample_guidance_scale": (1.0, 4.5, 0),
    "resolution": (32, 64, 512),
    "width": (None, 64),
    "negative_prompt": ("", "blurry", "<b>"),
    "old_policy_after": (None, -1, 0, 200),
    "reward_timeout": (1, 600.0, math.inf),
    "loss_type": ("surrogate", "logsigmoid", "linear", "ppo", "mse"),
    "clip_range": (None, 0, 1e-3),
    "advantage_clip": (None, 0, 5.0),
    "scale_rewards": ("group", "batch", "none", "sign", True, False),
    "reward_weights": (None, [1.0], [0.5, 2]),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "reference": ("frozen", "old", "refreshed"),
    "t_min": (0.0, 0.2, 0.4),
    "t_max": (1.0, 0.9),
    "timestep_sampling": ("grid", "continuous"),
    "prompt_dropout": (0.0, 0.1),
    "beta": (1.0, 100.0, 1000),
    "kl_coef": (0, 1e-3),
    "sde_window": ("random", "sliding"),
    "num_sde_steps": (None, 2),
    "noise_level": (0.7, 0.1),
    "pair_selection": ("max", "min", "all"),
    "reward_weight": (1.0, 0.5),
    "reward_steps": (None, 2),
    "reward_t_min": (0.0, 0.125),
    "surrogate_adam_beta1": (0.0, 0.9),
    "fake_adam_beta1": (0.0, 0.9),
    "train_adam_beta1": (0.0, 0.9),
    "train_adam_beta2": (0.9, 0.999),
    "divergence_limit": (None, 0, 0.05),
}
OF_A_TYPE = {bool: (True, False), int: (1, 2, 8), float: (0.0, 1e-4, 0.5, 1), str: ("a text", "name"), dict: ({},)}
ANYTHING = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 10**30, -(10**30), 2**64),
    *(0.0, -0.0, 0.5, -0.5, 1.0, 3.7, 1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf),
    *("", " ", "abc", "1", "1e-4", "None", "nan", "\0", "\ud800", "ü💥\u202e", "../../etc", "/dev/null", "a" * 10_000),
    *("{", "{}", '{"a": 1}', "[1]", "{0}", "%s %n", "steps", "no", "epoch", "cosine", "adamw_torch", "full_shard"),
    *([], [1.0], [math.nan], ["a", "b"], [None], (), (1, 2), {}, {"a": 1}, {"": None}, {1: 2}, {"version": 2}),
    *(b"bytes", 1j, int, object, len, DGPOConfig),
)


def random_config(number: int) -> tuple[type, dict[str, Any]]:
    """
    Class and arguments of the configuration with this number.

    Up to eight fields, drawn from all of the class, have a value that a user might write; in every other configuration
    one to three more have any value at all.
    """
    rng = random.Random(number)
    config_class = CONFIGS[number % len(CONFIGS)]
    fields = dataclasses.fields(config_class)
    given = {field.name: plausible(config_class, field.name, rng) for field in rng.sample(fields, rng.randint(0, 8))}
    if number // len(CONFIGS) % 2:
        given |= {field.name: rng.choice(ANYTHING) for field in rng.sample(fields, rng.randint(1, 3))}
    return config_class, given


def plausible(config_class: type, name: str, rng: random.Random) -> Any:
    """A value that a user might give to a field."""
    if name in getattr(config_class, "_fixed", {}):
        return config_class.__dataclass_fields__[name].default
    if name == "loss_type":
        return rng.choice(config_class._loss_types)
    if name in PLAUSIBLE:
        return rng.choice(PLAUSIBLE[name])
    hint = typing.get_type_hints(config_class)[name]
    kinds = typing.get_args(hint) or (hint,)
    return rng.choice([value for kind, values in OF_A_TYPE.items() if kind in kinds for value in values] or [None])


# What decides a step of training, with values that fit the tiny pipeline and take no time.
SMALL: dict[str, tuple] = {
    "num_generations": (2, 3, 4),
    "prompts_per_round": (2, 4),
    "updates_per_round": (1, 2),
    "num_iterations": (1, 2),
    "sample_num_steps": (3, 4),
    "num_train_timesteps": (1, 2),
    "sample_batch_size": (None, 1, 3),
    "decode_batch_size": (None, 1),
    "width": (None, 64),
    "max_sequence_length": (4, 8),
    "sample_guidance_scale": (1.0, 4.5),
    "distill_guidance_scale": (1.0, 3.0),
    "reward_guidance_scale": (1.0, 3.0),
    "reference_guidance_scale": (1.0, 2.0),
    "old_policy_after": (None, 0, 1),
    "reward_timeout": (60.0, math.inf),
    "reward_weights": (None, [0.5]),
    "learning_rate": (0.0, 1e-4, 1e-2),
    "weight_decay": (0.0, 0.1),
    "max_grad_norm": (0.0, 1.0, math.inf),
    "ema_every": (1, 2),
    "num_log_images": (0, 1),
    "bf16": (False, True),
    "seed": (0, 42, 2**32 - 1),
    "per_device_train_batch_size": (None, 1, 2),
    "logging_steps": (1,),
}
TRAINED = (
    *SMALL,
    *("lr_scheduler_type", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing"),
    *("offload_text_encoders", "vae_tiling", "offload_reference", "merge_adapter", "sampler", "sigmas"),
    *(
        "negative_prompt",
        "async_reward_computation",
        "max_workers",
        "reward_self_test",
        "beta",
        "loss_type",
        "kl_coef",
    ),
    *("clip_range", "scale_rewards", "advantage_clip", "recenter_clipped", "multi_objective_aggregation", "reference"),
    *("t_min", "t_max", "shared_noise", "timestep_sampling", "prompt_dropout", "full_finetuning", "save_ema"),
    *("shuffle_dataset", "log_completions", "num_completions_to_print", "sde_window", "num_sde_steps", "noise_level"),
    *("pair_selection", "reward_weight", "reward_steps", "reward_t_min", "divergence_limit", "fake_kl_coef"),
)


def random_training(number: int) -> tuple[type, dict[str, Any]]:
    """Class of the configuration with this number, and arguments with which the tiny pipeline may be trained."""
    rng = random.Random(f"training {number}")
    config_class = CONFIGS[number % len(CONFIGS)]
    known = [name for name in TRAINED if name in config_class.__dataclass_fields__]
    given = {}
    for name in rng.sample(known, rng.randint(0, 15)):
        given[name] = rng.choice(SMALL[name]) if name in SMALL else plausible(config_class, name, rng)
    return config_class, given


# -- prompts ----------------------------------------------------------------------------------------------------------

PIECES = (
    *(
        "a lighthouse",
        "Ein schöner Baum",
        "一只猫",
        "كلب أزرق",
        "שלום",
        "👩\u200d👩\u200d👧\u200d👦",
        "e\u0301\u0302\u0323" * 20,
    ),
    *(
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\u0085",
        "\0",
        "\x1b[31m",
        "\x7f",
        "\a\b",
        "\r\n",
        "\t",
        "\n\n",
    ),
    *("\ud800", "\udfff\ud83d", "\U0010ffff", "\ufffe"),
    *("<script>alert(1)</script>", "</script><!--", "<img src=x onerror=alert(1)>", "&lt;&amp;", "\"'`", "]]>"),
    *("../../etc/passwd", "/dev/null", "C:\\con", "~", "${HOME}", "$(id)", "; rm -rf x", "a" * 300),
    *("{}", "{prompt}", "{0.__class__}", "%s%n%d", "%(x)s", "[red]", "[/]", "[link=file:///]x[/link]"),
    *("---", "...", "# title", "| a | b |", "```", "![](x)", "- !!python/object:os.system", ": : &a *a", "|", ">-"),
    *("<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "▁", "null", "NaN", "=1+1", "-1", '{"a": 1}'),
)


def random_prompt(number: int) -> str:
    """The prompt with this number: the first ones are single pieces, the empty one, blanks and one of 100 kB."""
    first = [*PIECES, "", " ", "\n", " \t ", "long " * 20_480, "\ud800" * 100, "é" * 50_000]
    if number < len(first):
        return first[number]
    rng = random.Random(f"prompt {number}")
    drawn = [
        rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 12))
    ]
    return rng.choice(("", " ")).join(drawn)
