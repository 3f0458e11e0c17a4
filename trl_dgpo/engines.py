"""
On how many processes, and by which engine, a training may run.

`ENGINES` says of each what was run and where. One that was not run is refused until it is asked for by
`allow_unverified_engine=True`; one of which we know that it would go wrong, or would be passed over without a word, is
refused always.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

from transformers.trainer_utils import HubStrategy


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """
    A way to run a training.

    Args:
        name (`str`):
            What people call it.
        state (`str`):
            `"run"`, `"not run"` (refused until it is asked for) or `"refused"`.
        note (`str`):
            What was run, and where, or why not.
    """

    name: str
    state: str
    note: str


ENGINES = {
    "one": Engine("one process", "run", "a CPU"),
    "ddp": Engine("DDP, one node", "run", "two processes on a CPU, over gloo; on GPUs, over NCCL, not run"),
    "ddp_nodes": Engine(
        "DDP, several nodes", "run", "two agents of one process on one machine's loopback; on two machines not run"
    ),
    "fsdp2": Engine(
        "FSDP2", "not run", "on GPUs; two processes on a CPU, made to use it in a test, learn and resume as one"
    ),
    "zero2": Engine("DeepSpeed ZeRO-1 and 2", "not run", "nothing of it was tried"),
    "fsdp1": Engine("FSDP1", "refused", "its flat parameters have no views; FSDP2 takes its place"),
    "zero3": Engine(
        "DeepSpeed ZeRO-3", "refused", "views do not reach its parts: each would be the policy itself; use FSDP2"
    ),
    "parallel": Engine(
        "tensor, context, sequence or pipeline parallelism",
        "refused",
        "rollouts and losses know data parallelism only",
    ),
}

_PLAIN = (
    "Leave it out: plain DDP (`accelerate launch --multi_gpu` or `torchrun`) trains a LoRA on any number of "
    "processes, and `quantization_config` makes a frozen model small."
)


def check_installed(deepspeed: Any) -> None:
    """
    Say what DeepSpeed needs, before `TrainingArguments` fails for want of it.

    Args:
        deepspeed (`str` or `dict`, *optional*):
            The argument of that name.

    Raises:
        `ValueError`: if it is asked for, here or by `accelerate launch`, and not installed.
    """
    if (deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED")) and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is asked for and not installed. `pip install deepspeed`, or leave it out.")


def check_engine(args: Any) -> str:
    """
    Refuse what was not run, what goes wrong, and what accelerate would pass over silently.

    Args:
        args ([`DGPOConfig`]):
            The arguments, of which `allow_unverified_engine` lets through, with a warning, what was not run. The
            environment, where `accelerate launch` leaves its configuration, is read too.

    Returns:
        Key of the engine in `ENGINES`.

    Raises:
        `ValueError`: if it is refused.
    """
    key = _engine(args)
    engine = ENGINES[key]
    if engine.state == "refused":
        raise ValueError(f"{engine.name} is refused: {engine.note}.")
    if key in ("fsdp2", "zero2"):
        _check_effective(args, engine)
    if key == "fsdp2":
        _check_fsdp(args)
    if key == "zero2":
        _check_deepspeed(args)
    if engine.state == "not run":
        if not args.allow_unverified_engine:
            advice = "" if args.full_finetuning else f"{_PLAIN} "
            raise ValueError(
                f"{engine.name} was not run with this package: {engine.note}. {advice}To try it all the same, set "
                "`allow_unverified_engine=True`, and compare its first rounds with those of one process."
            )
        logger.warning("%s was not run with this package: %s.", engine.name, engine.note)
    if key == "one" and _was_meant_for_several():
        logger.warning(
            "`accelerate launch` was asked for several processes and started one, as it does with `--cpu`, and where "
            "it sees one GPU. On a CPU use `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2`."
        )
    return key


def _engine(args: Any) -> str:
    if _is_on("ACCELERATE_USE_MEGATRON_LM") or any(size > 1 for size in _parallel_sizes(args)):
        return "parallel"
    if args.fsdp or _is_on("ACCELERATE_USE_FSDP"):
        version = args.fsdp_plugin_args["fsdp_version"] if args.fsdp else int(os.environ.get("FSDP_VERSION", 1))
        return "fsdp2" if version == 2 else "fsdp1"
    if args.deepspeed_plugin is not None:
        return "zero3" if args.deepspeed_plugin.zero_stage == 3 else "zero2"
    if args.world_size == 1:
        return "one"
    return "ddp" if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) else "ddp_nodes"


def _parallel_sizes(args: Any) -> list[int]:
    names = ("tp_size", "cp_size", "sp_size")
    if args.parallelism_config is not None:
        return [getattr(args.parallelism_config, name) for name in names]
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return [int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", 1)) for name in names]
    return []


def _check_effective(args: Any, engine: Engine) -> None:
    # accelerate says nothing in either case, and trains without it.
    if args.device.type == "cpu":
        raise ValueError(
            f"{engine.name} was asked for on a CPU, where it is passed over. Leave it out: DDP runs there."
        )
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"{engine.name} was asked for in a process that no launcher started, where it is passed over. Use "
            "`accelerate launch --config_file ...` or `torchrun`."
        )


def _check_fsdp(args: Any) -> None:
    if not args.full_finetuning:
        raise ValueError(f"FSDP2 would shard a frozen model, and a LoRA's views with it. {_PLAIN}")
    if args.num_log_images:
        raise ValueError(
            f"`num_log_images` is {args.num_log_images}: the first process draws them alone, and under FSDP2 would "
            "wait for the others' parts of the model for ever. Set `num_log_images=0`."
        )
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"`hub_strategy` is {args.hub_strategy}: the first process uploads with each checkpoint, alone, and under "
            "FSDP2 would wait for the others' parts of the model for ever. Set `hub_strategy='end'`."
        )
    given = args.fsdp_plugin_args["state_dict_type"] if args.fsdp else os.environ.get("FSDP_STATE_DICT_TYPE")
    if given != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP2's state dict type is {given}, with which checkpoints would hold no views. Set it to "
            "FULL_STATE_DICT (`fsdp_state_dict_type`)."
        )


def _check_deepspeed(args: Any) -> None:
    if args.deepspeed:
        raise ValueError(
            f"`deepspeed` is {args.deepspeed!r}: it is read before the round is divided, and would take an optimiser "
            "step with each micro-batch. Give it by `accelerate launch --config_file ...` instead, with "
            "`gradient_accumulation_steps: auto`."
        )
    steps = args.deepspeed_plugin.get_value("gradient_accumulation_steps")
    if steps not in ("auto", args.gradient_accumulation_steps):
        raise ValueError(
            f"DeepSpeed's `gradient_accumulation_steps` is {steps}, but the round makes it "
            f"{args.gradient_accumulation_steps}. Set it to `auto`."
        )


def _was_meant_for_several() -> bool:
    # For several processes it sets a port, but the launcher that it then takes numbers none.
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "RANK" not in os.environ


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"  # as accelerate reads them
