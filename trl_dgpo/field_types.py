"""That each field of a configuration holds a value of its type, before anything is made of it."""

import dataclasses
import enum
import json
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType


# Beyond this no count, size or seed means anything: it is that of numpy's and the samplers' seeds.
_LARGEST = 2**32 - 1
# Counts of images, whose divisors are searched for.
_MOST_IMAGES = 2**16
_IMAGES = (
    "num_generations",
    "prompts_per_round",
    "updates_per_round",
    "sample_batch_size",
    "per_device_train_batch_size",
    "train_batch_size",
    "sample_num_batches_per_epoch",
    "train_gradient_accumulation_steps",
)
# Where "no bound" is a meaning.
_MAY_BE_INFINITE = ("advantage_clip", "clip_range", "max_grad_norm", "reward_timeout", "train_max_grad_norm")
# What is taken beside what is annotated.
_ALSO = {
    "accelerator_config": (AcceleratorConfig,),
    "debug": (type(None),),
    "fsdp": (bool,),
    "logdir": (os.PathLike,),
    "output_dir": (os.PathLike,),
    "resume_from": (os.PathLike,),
    "resume_from_checkpoint": (bool, os.PathLike),
    "scale_rewards": (bool,),
}
_PATHS = ("logdir", "output_dir", "resume_from", "resume_from_checkpoint")
# Where a number beyond all steps means never.
_STEPS = ("eval_steps", "logging_steps", "max_steps", "save_steps")
_LONGEST_NAME = 255
# Given as a dictionary or a file that holds one.
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def check_types(config: Any) -> None:
    """
    Refuse a value that is not of its field's type, and a number that is none.

    Python holds nobody to a field's annotation: a text where a number belongs would be met in a comparison or a
    forward, by words that name no field. A whole number may stand for a float, not a truth value for a number. What is
    annotated as a choice must be one of it.

    Args:
        config (dataclass):
            Configuration, as given by the user.

    Raises:
        `TypeError`: for a value of another type.
        `ValueError`: for NaN; for infinity, where the field's meaning has no room for it; for a number that is beyond
            all use; for a choice that there is not; for a dictionary's text or file that cannot be read.
    """
    for name, annotation in _annotations(type(config)).items():
        value = getattr(config, name)
        accepted = (*annotation, *_ALSO.get(name, ()))
        if not any(_fits(value, kind) for kind in accepted):
            choices = [choice.value for kind in accepted if _is_choice(kind) for choice in kind]
            if choices and isinstance(value, str):
                raise ValueError(f"`{name}` is {_shown(value)}; it must be one of {', '.join(map(repr, choices))}.")
            kinds = " or ".join(dict.fromkeys(_in_words(kind) for kind in accepted))
            raise TypeError(f"`{name}` is {_shown(value)}, of type {type(value).__name__}; it must be {kinds}.")
        choices = type(config).__dataclass_fields__[name].metadata.get("choices")
        if choices is not None and value is not None and value not in choices and name not in config._fixed:
            raise ValueError(f"`{name}` is {_shown(value)}; it must be one of {', '.join(map(repr, choices))}.")
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            _check_number(name, value)
        if name in _PATHS and isinstance(value, str | os.PathLike):
            check_path(name, os.fspath(value))
        if name in config._VALID_DICT_FIELDS and isinstance(value, str):
            value = _read_dictionary(name, value)
        if name == "accelerator_config" and isinstance(value, Mapping):
            _check_names(name, value, {field.name for field in dataclasses.fields(AcceleratorConfig)})
        if name == "debug" and isinstance(value, str):
            _check_names(name, value.split(), {option.value for option in DebugOption})


@cache
def _annotations(config_class: type) -> dict[str, tuple[Any, ...]]:
    hints = _hints(config_class)
    hints["lr_scheduler_type"] = SchedulerType  # annotated as any text
    return {field.name: _members(hints.get(field.name, Any)) for field in dataclasses.fields(config_class)}


def _hints(config_class: type) -> dict[str, Any]:
    for each in config_class.__mro__:
        try:
            return typing.get_type_hints(each)
        except NameError:  # of a subclass whose annotations are of names that only a type checker imports
            continue
    return {}


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    # `OptimizerNames | str`: the text must be one of the names.
    return tuple(m for m in members if m is not str) if any(map(_is_choice, members)) else members


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if kind is Any:  # some of the base class's, in some of its versions
        return True
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if _is_choice(kind):
        return isinstance(value, kind) or (isinstance(value, str) and value in {choice.value for choice in kind})
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if origin is list:
        [item] = typing.get_args(kind)
        return isinstance(value, list | tuple) and all(_fits(each, item) for each in value)
    if origin is dict or kind is dict:
        return isinstance(value, Mapping)
    kind = origin or kind
    return not isinstance(kind, type) or isinstance(value, kind)  # of a form that is not known here: taken


def _in_words(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if _is_choice(kind):
        return f"one of {', '.join(repr(choice.value) for choice in kind)}"
    if typing.get_origin(kind) is None:
        return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
    return f"`{str(kind).replace('typing.', '')}`"


def _shown(value: Any) -> str:
    # Python writes no integer of more than 4300 digits.
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.200}"


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, numbers.Integral):  # whose greatest are beyond all floats
        most = _MOST_IMAGES if name in _IMAGES else sys.maxsize if name in _STEPS else _LARGEST
        if abs(value) > most:
            raise ValueError(f"`{name}` is {_shown(value)}; it must be at most {most}.")
    elif math.isnan(value) or (math.isinf(value) and name not in _MAY_BE_INFINITE):
        raise ValueError(f"`{name}` is {value}; it must be a finite number.")


def check_path(name: str, value: str) -> None:
    """A `ValueError` that names `name`, for a text that no file system takes for a path."""
    try:
        parts = os.fsencode(value).split(os.sep.encode())
    except UnicodeEncodeError:
        parts = [b"\0"]  # a lone surrogate is in no file's name either
    if any(b"\0" in part or len(part) > _LONGEST_NAME for part in parts):
        raise ValueError(
            f"`{name}` is {_shown(value)}, which no folder can be called: a name has at most {_LONGEST_NAME} bytes "
            "and neither NUL nor half a character."
        )


def _read_dictionary(name: str, value: str) -> dict:
    try:
        text = value if value.startswith("{") or name not in _FILES else Path(value).read_text(encoding="utf-8")
        parsed = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` is {_shown(value)}, which cannot be read ({type(error).__name__}: {error!s:.200}). Give a "
            f"dictionary, or {'the name of a JSON file' if name in _FILES else 'its JSON, which begins with a brace'}."
        ) from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`{name}` is {_shown(value)}, which holds no dictionary.")
    return parsed


def _check_names(name: str, given: Iterable[Any], known: set[str]) -> None:
    if unknown := [each for each in given if each not in known]:
        raise ValueError(f"`{name}` has {_shown(unknown)}; it may have {', '.join(map(repr, sorted(known)))}.")
