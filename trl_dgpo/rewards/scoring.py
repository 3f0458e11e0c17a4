"""
Calling reward functions.

A reward is any callable in TRL's keyword form. It gets the images as `completions` (and, under the same content, as
`images`), the `prompts`, every other column of the data set by its name, `log_metric(name, value)` and
`log_extra(column, values)`, and `**kwargs` for what it does not read. It returns one number an image: `None` where it
does not apply, `NaN` where it failed. An infinite number is a failure too.
"""

import inspect
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor


logger = logging.getLogger(__name__)

RewardFunc = Callable[..., Sequence[float | None] | Tensor]


class Scores(NamedTuple):
    """
    Rewards of a batch of images.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Weighted sum of the rewards that apply, float64; `NaN` where one failed or none applies.
        by_name (`dict[str, torch.Tensor]`):
            Each reward alone, `(B,)`, `NaN` where failed or not applicable.
        failed (`torch.Tensor` of shape `(B,)`):
            Where a reward raised or returned `NaN` or an infinite number, bool.
        metrics (`dict[str, list[float]]`):
            What the rewards gave to `log_metric`.
        extra (`dict[str, list]`):
            What the rewards gave to `log_extra`, one value an image; `None` where it failed.
    """

    rewards: Tensor
    by_name: dict[str, Tensor]
    failed: Tensor
    metrics: dict[str, list[float]]
    extra: dict[str, list[Any]]

    @classmethod
    def cat(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of several batches, of the same rewards, as those of one."""
        metrics = defaultdict(list)
        for part in parts:
            for name, values in part.metrics.items():
                metrics[name] += values
        columns = dict.fromkeys(column for part in parts for column in part.extra)
        return cls(
            torch.cat([part.rewards for part in parts]),
            {name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
            torch.cat([part.failed for part in parts]),
            dict(metrics),
            {c: [v for part in parts for v in part.extra.get(c, [None] * len(part.rewards))] for c in columns},
        )


class RewardScorer:
    """
    Several reward functions as one.

    A batch that raises is retried image by image, so that one bad image costs one reward and not all. A wrong number
    or type of results is a mistake in the function, not in an image, and is raised at once.

    Args:
        reward_funcs (callable or `list` of callables):
            Rewards in TRL's keyword form. One with `input_type = "pt"` gets the images as a uint8 tensor of shape
            `(B, 3, H, W)`, any other as a list of `PIL.Image`.
        weights (`list[float]`, *optional*):
            Weight of each reward in the sum; 1 each if not given.

    Raises:
        `TypeError`: if a reward is not callable or does not take `**kwargs`.
        `ValueError`: if there is no reward, two have one name, an `input_type` is unknown or the weights do not match.
    """

    def __init__(self, reward_funcs: RewardFunc | list[RewardFunc], weights: list[float] | None = None):
        self.funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not self.funcs:
            raise ValueError("`reward_funcs` is empty; give at least one callable.")
        for func in self.funcs:
            _check_callable(func)
        self.names = [_name(func) for func in self.funcs]
        if len(set(self.names)) != len(self.names):
            raise ValueError(
                f"`reward_funcs` has two rewards of one name: {self.names}. Set `__name__` on one of them."
            )
        self.weights = [1.0] * len(self.funcs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.funcs):
            raise ValueError(
                f"`reward_weights` has {len(self.weights)} numbers for {len(self.funcs)} rewards ({self.names}); give "
                "one each."
            )
        self._traced: set[str] = set()  # rewards whose first traceback is in the log

    def __call__(self, images: Tensor, prompts: list[str], columns: dict[str, list], **context) -> Scores:
        """
        Score a batch.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`):
                uint8: what a user would save.
            prompts (`list[str]`):
                Prompt of each image.
            columns (`dict[str, list]`):
                The other columns of the data set, one value an image.
            **context:
                Handed on to the rewards, e.g. `trainer_state`.

        Returns:
            [`Scores`].

        Raises:
            `RewardOutputError`: if a reward returns the wrong kind or number of results (a `ValueError`).
            `ValueError`: if a reward lacks a column, or a column has the name of what rewards are given anyway.
        """
        self.check(columns, context)
        pictures = None
        if any(_input_type(func) == "pil" for func in self.funcs):
            pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        total = torch.zeros(len(prompts), dtype=torch.float64)
        applies = torch.zeros(len(prompts), dtype=torch.bool)
        failed = torch.zeros(len(prompts), dtype=torch.bool)
        by_name, log = {}, _Log(len(prompts))
        for func, name, weight in zip(self.funcs, self.names, self.weights, strict=True):
            completions = pictures if _input_type(func) == "pil" else images
            values = self._score(func, name, completions, prompts, columns, context, log)
            by_name[name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
            total += weight * by_name[name].nan_to_num(0.0)
            applies |= torch.tensor([value is not None for value in values])
            failed |= torch.tensor([value is not None and math.isnan(value) for value in values])
        return Scores(total.masked_fill(~applies | failed, math.nan), by_name, failed, dict(log.metrics), log.extra)

    def check(self, columns: Iterable[str], context: Iterable[str] = ()) -> None:
        """
        Whether the rewards can be called at all.

        Args:
            columns (iterable of `str`):
                Names of the data set's columns other than `prompt`.
            context (iterable of `str`):
                Names of what is handed on to the rewards besides.

        Raises:
            `ValueError`: if a reward lacks a column, or a column has the name of what rewards are given anyway.
        """
        given = {"prompts", "completions", "images", "log_metric", "log_extra", *context}
        if clash := sorted(given & set(columns)):
            raise ValueError(
                f"The data set's columns {clash} have names that rewards are called with; rename the columns."
            )
        for func, name in zip(self.funcs, self.names, strict=True):
            if missing := [parameter for parameter in _required(func) if parameter not in given | set(columns)]:
                raise ValueError(
                    f"Reward `{name}` needs {missing}, but the data set's other columns are {sorted(columns)}."
                )

    def _score(self, func, name, completions, prompts, columns, context, log: "_Log") -> list[float | None]:
        try:
            return self._call(func, name, completions, prompts, columns, context, log, 0)
        except _NOT_THE_IMAGES_FAULT:
            raise
        except Exception as error:
            logger.warning(
                "Reward `%s` raised %r for a batch of %d; it is retried image by image.",
                *(name, error, len(prompts)),
                exc_info=name not in self._traced,
            )
            self._traced.add(name)
        values = []
        for i, prompt in enumerate(prompts):
            one = {column: [cells[i]] for column, cells in columns.items()}
            try:
                values += self._call(func, name, completions[i : i + 1], [prompt], one, context, log, i)
            except _NOT_THE_IMAGES_FAULT:
                raise
            except Exception as error:
                logger.warning("Reward `%s` raised %r for prompt %r; the image is masked.", name, error, prompt)
                values.append(math.nan)
        return values

    def _call(self, func, name, completions, prompts, columns, context, log: "_Log", start: int):
        mine = _Log(len(prompts))  # a call that raises has logged nothing
        output = func(
            prompts=prompts,
            completions=completions,
            images=completions,
            log_metric=mine.log_metric,
            log_extra=mine.log_extra,
            **columns,
            **context,
        )
        values = _checked(output, name, len(prompts))
        log.add(mine, start)
        for prompt, value in zip(prompts, values, strict=True):
            if value is not None and not math.isfinite(value):
                logger.warning("Reward `%s` returned %s for prompt %r; the image is masked.", name, value, prompt)
        return [math.nan if value is not None and not math.isfinite(value) else value for value in values]


class _Log:
    """What the rewards of one batch log."""

    def __init__(self, size: int):
        self.size = size
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.size:
            raise RewardOutputError(
                f"A reward gave `log_extra` {len(values)} values of {column!r} for {self.size} images; it must give "
                "one each."
            )
        self.extra[column] = list(values)

    def add(self, part: "_Log", start: int) -> None:
        for name, values in part.metrics.items():
            self.metrics[name] += values
        for column, values in part.extra.items():
            self.extra.setdefault(column, [None] * self.size)[start : start + part.size] = values


class RewardOutputError(ValueError, TypeError):
    """A reward returned something that is not one number an image."""


class FailureWindow:
    """
    Stops a run whose rewards keep failing.

    Args:
        size (`int`, *optional*, defaults to `100`):
            Scored images that are looked back upon.
        max_rate (`float`, *optional*, defaults to `0.1`):
            Largest tolerated part of them.
    """

    def __init__(self, size: int = 100, max_rate: float = 0.1):
        self.max_rate = max_rate
        self._failures: deque[bool] = deque(maxlen=size)

    def update(self, failed: Tensor) -> None:
        """
        Count a batch, the same in every process.

        Args:
            failed (`torch.Tensor` of shape `(B,)`):
                Failures of all processes' images, bool.

        Raises:
            `RuntimeError`: if all of the batch failed, or two or more and above `max_rate` of the last images did.
        """
        self._failures.extend(failed.tolist())
        count = sum(self._failures)
        if failed.all() or (count >= 2 and count > self.max_rate * len(self._failures)):
            raise RuntimeError(
                f"Rewards failed for {count} of the last {len(self._failures)} images ({int(failed.sum())} of the "
                f"last {len(failed)}); training stops when all fail, or at least 2 and more than {self.max_rate:.0%}. "
                "The log above has the first traceback. Mend the reward, or let it return None where it does not "
                "apply."
            )


# A wrong kind of result, or a missing package, would be the same for every image.
_NOT_THE_IMAGES_FAULT = (RewardOutputError, ImportError)


def _checked(output: object, name: str, expected: int) -> list[float | None]:
    if isinstance(output, Tensor):
        output = output.tolist()
    if isinstance(output, str) or not hasattr(output, "__len__"):
        raise RewardOutputError(
            f"Reward `{name}` returned {type(output).__name__}; it must return a list of {expected} numbers."
        )
    if len(output) != expected:
        raise RewardOutputError(
            f"Reward `{name}` returned {len(output)} values for {expected} images; it must return one each."
        )
    return [None if value is None else _number(value, name) for value in output]


def _number(value: object, name: str) -> float:
    try:
        return value.__float__()  # not float(value), which would read a string
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise RewardOutputError(
            f"Reward `{name}` returned {value!r} of type {type(value).__name__}; each value must be a number or None."
        ) from error


def _check_callable(func: object) -> None:
    if not callable(func):
        raise TypeError(
            f"`reward_funcs` has {func!r}, which is not callable; give a function or an object with `__call__`."
        )
    if _input_type(func) not in ("pil", "pt"):
        raise ValueError(f"Reward `{_name(func)}` has `input_type` {func.input_type!r}; it must be 'pil' or 'pt'.")
    parameters = inspect.signature(func).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise TypeError(
            f"Reward `{_name(func)}` must take `**kwargs`: it is called with `prompts`, `completions`, `images`, "
            "every column of the data set and the trainer's state."
        )


def _required(func: object) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(func).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]


def _name(func: object) -> str:
    return getattr(func, "__name__", type(func).__name__)


def _input_type(func: object) -> str:
    return getattr(func, "input_type", "pil")
