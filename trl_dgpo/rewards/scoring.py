"""
Calling reward functions.

A reward is any callable in TRL's keyword form, `async` or not. It gets the images as `completions` (and, under the
same content, as `images`), the `prompts`, every other column of the data set by its name, `log_metric(name, value)`
and `log_extra(column, values)`, and `**kwargs` for what it does not read. It returns one number an image: `None` where
it does not apply, `NaN` where it failed. An infinite number is a failure too. It must not change what it is given: all
rewards get the same pictures and lists, several at once perhaps (`image.copy()` before `image.thumbnail(...)`).

It may say of itself, by attributes: `__name__`, its name in the log; `input_type`, `"pil"` or `"pt"`; `overlaps`,
whether it can be called for a part of a round from any thread; `check()`, which raises if it cannot be called now.
"""

import asyncio
import inspect
import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
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
            Where a reward raised, did not return in time, or returned `NaN` or an infinite number, or where the sum is
            no finite number, bool.
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

    Asynchronous rewards (an `async def` function, or an object with an `async __call__`) begin all together when a
    batch does, and are waited for when the others have computed: one that only waits costs nothing beside them. They
    run on one event loop, the process's for good, so that a client which they keep open stays usable; they must not
    block it.

    Rewards are called without gradients and outside autocast.

    Args:
        reward_funcs (callable or `list` of callables):
            Rewards in TRL's keyword form. One with `input_type = "pt"` gets the images as a uint8 tensor of shape
            `(B, 3, H, W)`, any other as a list of `PIL.Image`.
        weights (`list[float]`, *optional*):
            Weight of each reward in the sum; 1 each if not given.
        timeout (`float`, *optional*):
            Seconds that a call may take, and those of a retry all together. One that takes longer has failed for all
            its images and is not retried. It is left to itself, in a thread of its own that does not keep the
            interpreter from ending, and what it logs or returns later is not read. If not given or infinite, there is
            no limit, and calls are made in the caller's thread.

    Raises:
        `TypeError`: if a reward is not callable, or cannot be called by keyword alone with more than it reads.
        `ValueError`: if there is no reward, two have one name, an `input_type` is unknown, or the weights do not match
            or are not finite.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        weights: list[float] | None = None,
        timeout: float | None = None,
    ):
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
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"`reward_weights` is {self.weights}; each must be a finite number.")
        self.timeout = None if timeout == math.inf else timeout
        self._traced: set[str] = set()  # rewards whose first traceback is in the log
        self._untried: set[str] = set()  # rewards whose first call has no time limit

    def __call__(
        self,
        images: Tensor,
        prompts: list[str],
        columns: dict[str, list],
        *,
        given_up: set[str] | None = None,
        **context,
    ) -> Scores:
        """
        Score a batch.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`):
                uint8: what a user would save.
            prompts (`list[str]`):
                Prompt of each image.
            columns (`dict[str, list]`):
                The other columns of the data set, one value an image.
            given_up (`set[str]`, *optional*):
                Rewards that ran out of time in another batch of the round: they are not called and fail at once, lest
                every batch waits as long. Those that run out of time now are added.
            **context:
                Handed on to the rewards, e.g. `trainer_state`.

        Returns:
            [`Scores`].

        Raises:
            `RewardOutputError`: if a reward returns the wrong kind or number of results, or changes the images' tensor
                (a `ValueError`).
            `ValueError`: if a reward lacks a column, or a column has the name of what rewards are given anyway.
        """
        self.check(columns, context)
        given_up = set() if given_up is None else given_up
        batch = self._batch(images, prompts, columns, context)
        called = [(f, name) for f, name in zip(self.funcs, self.names, strict=True) if name not in given_up]
        limits = {name: self._no_limit if name in self._untried else self.timeout for name in self.names}
        calls = {name: _Call(func, batch, limits[name]) for func, name in called}  # asynchronous ones run from here on
        outcomes = {name: ([math.nan] * len(prompts), _Log(len(prompts))) for name in self.names}
        version = _version(images)
        for func, name in sorted(called, key=lambda pair: _is_async(pair[0])):
            outcomes[name] = self._score(func, name, batch, calls[name], given_up)
            if _version(images) != version:
                raise RewardOutputError(f"Reward `{name}` changed the images in place; let it work on a copy.")

        log, failed = _Log(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        for values, of_reward in outcomes.values():
            failed |= torch.tensor([value is not None and math.isnan(value) for value in values])
            log.add(of_reward, 0)
        by_name = {
            name: torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
            for name, (values, _) in outcomes.items()
        }
        return self._summed(by_name, failed, log.metrics, log.extra)

    def split(self) -> "tuple[RewardScorer | None, RewardScorer | None]":
        """
        Two scorers of a part of the rewards each, `None` for a part that is empty.

        The first has those that can be called for a part of a round while the next is sampled: of pictures, and
        asynchronous ones. The second has those of tensors, which carry models, to be called once for a whole round by
        the thread that samples. An attribute `overlaps` of a reward decides otherwise. [`~RewardScorer.merge`] joins
        what they give.
        """
        parts = []
        for overlaps in (True, False):
            chosen = [i for i, func in enumerate(self.funcs) if _overlaps(func) == overlaps]
            part = None
            if chosen:
                part = RewardScorer([self.funcs[i] for i in chosen], [self.weights[i] for i in chosen], self.timeout)
                part._traced, part._untried = self._traced, self._untried
            parts.append(part)
        return parts[0], parts[1]

    def merge(self, parts: Sequence[Scores]) -> Scores:
        """
        Scores of the same images by parts of the rewards as those by all of them.

        Args:
            parts (sequence of [`Scores`]):
                Of disjoint rewards, together all.

        Returns:
            [`Scores`], equal to what scoring at once gives.
        """
        log = _Log(len(parts[0].rewards))
        for part in parts:
            log.add(_Log(log.size, part.metrics, part.extra), 0)
        by_name = {name: values for part in parts for name, values in part.by_name.items()}
        failed = torch.stack([part.failed for part in parts]).any(0)
        return self._summed({name: by_name[name] for name in self.names}, failed, log.metrics, log.extra)

    def self_test(self, row: dict[str, Any] | None, height: int, width: int, **context) -> None:
        """
        Call each reward once, with a white image and without the time limit: a first call may download a model.

        Those that have a method `check()` are asked by that first. Nothing is kept of what rewards return or log.
        Without a row there is no call; then calls have no time limit until the reward's first has come to an end.

        Args:
            row (`dict[str, Any]`, *optional*):
                A row of the data set, with its `prompt`.
            height (`int`):
                Height of the image in pixels.
            width (`int`):
                Width of the image in pixels.
            **context:
                Handed on to the rewards, e.g. `trainer_state`.

        Raises:
            `RuntimeError`: if a reward raises.
            `ImportError`: if it says that a package is missing.
            `RewardOutputError`, `ValueError`: as of [`~RewardScorer.__call__`].
        """
        for func, name in zip(self.funcs, self.names, strict=True):
            health = _attribute(func, "check", None)
            try:
                if callable(health):
                    health()
            except _NOT_THE_IMAGES_FAULT:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"Reward `{name}` raised {error!r} when it was asked by its `check()` whether it can be called. "
                    "Mend that; `reward_self_test=False` does not ask."
                ) from error
        if row is None:
            self._untried.update(self.names)
            return
        columns = {name: [cell] for name, cell in row.items() if name != "prompt"}
        self.check(columns, context)
        white = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
        batch = self._batch(white, [row["prompt"]], columns, context)
        for func, name in zip(self.funcs, self.names, strict=True):
            try:
                [value] = _checked(_Call(func, batch, self._no_limit).result(), name, 1)
            except _NOT_THE_IMAGES_FAULT:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"Reward `{name}` raised {error!r} in its self-test: one white image of {width}x{height} for the "
                    f"first prompt, {row['prompt']!r:.80}. Mend it; `reward_self_test=False` leaves the test out for "
                    "a reward that cannot judge a blank image."
                ) from error
            if value is not None and not math.isfinite(value):
                logger.warning(
                    "Reward `%s` returned %s in its self-test, for one white image: such an image is masked. If all "
                    "are, training stops.",
                    name,
                    value,
                )

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

    @property
    def _no_limit(self) -> float | None:
        # In a thread where training calls rewards in one: not every reward can be.
        return None if self.timeout is None else math.inf

    def _batch(self, images: Tensor, prompts: list[str], columns: dict[str, list], context: dict) -> "_Batch":
        forms: dict[str, Sequence] = {"pt": images}
        if any(_input_type(func) == "pil" for func in self.funcs):
            forms["pil"] = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return _Batch(forms, prompts, columns, context)

    def _summed(self, by_name: dict[str, Tensor], failed: Tensor, metrics: dict, extra: dict) -> Scores:
        total, applies = torch.zeros(len(failed), dtype=torch.float64), torch.zeros_like(failed)
        for values, weight in zip(by_name.values(), self.weights, strict=True):
            total += weight * values.nan_to_num(0.0)
            applies |= ~values.isnan()
        too_large = applies & ~failed & ~total.isfinite()
        if too_large.any():
            logger.warning(
                "The weighted sum of %s is no finite number for %d images; they are masked.",
                self.names,
                int(too_large.sum()),
            )
        failed = failed | too_large
        return Scores(total.masked_fill(~applies | failed, math.nan), by_name, failed, dict(metrics), extra)

    def _score(
        self, func: RewardFunc, name: str, batch: "_Batch", call: "_Call", given_up: set[str]
    ) -> tuple[list[float | None], "_Log"]:
        """One reward's values, `NaN` where it failed, and what it logged."""
        size = len(batch.prompts)
        log = _Log(size)
        try:
            return self._take(call, name, batch, log, 0), log
        except _NOT_THE_IMAGES_FAULT:
            raise
        except _OutOfTime:
            self._give_up(name, f"a batch of {size}", given_up)
            return [math.nan] * size, log
        except Exception as error:
            logger.warning(
                "Reward `%s` raised %r for a batch of %d; it is retried image by image.",
                name,
                error,
                size,
                exc_info=None if name in self._traced else error,
            )
            self._traced.add(name)
        finally:
            self._untried.discard(name)
        values: list[float | None] = []
        images = [batch.image(i) for i in range(size)]
        calls = [_Call(func, image, self.timeout) for image in images]
        began = time.monotonic()
        for i, (image, call) in enumerate(zip(images, calls, strict=True)):
            try:
                if self.timeout is not None and not _is_async(func):  # those have all begun, and their time runs
                    call.timeout = self.timeout - (time.monotonic() - began)
                    if name in given_up or call.timeout <= 0:
                        raise _OutOfTime
                values += self._take(call, name, image, log, i)
            except _NOT_THE_IMAGES_FAULT:
                raise
            except _OutOfTime:
                values.append(math.nan)
                self._give_up(name, f"{size} images, one by one", given_up)
            except Exception as error:
                logger.warning(
                    "Reward `%s` raised %r for prompt %r; the image is masked.", name, error, *image.prompts
                )
                values.append(math.nan)
        return values, log

    def _take(self, call: "_Call", name: str, batch: "_Batch", log: "_Log", start: int) -> list[float | None]:
        values = _checked(call.result(), name, len(batch.prompts))
        log.add(call.log, start)
        for prompt, value in zip(batch.prompts, values, strict=True):
            if value is not None and not math.isfinite(value):
                logger.warning("Reward `%s` returned %s for prompt %r; the image is masked.", name, value, prompt)
        return [math.nan if value is not None and not math.isfinite(value) else value for value in values]

    def _give_up(self, name: str, asked: str, given_up: set[str]) -> None:
        if name not in given_up:
            logger.error(
                "Reward `%s` did not return within %g seconds (`reward_timeout`) for %s: the images are masked, "
                "and it is not called again in this round. Raise `reward_timeout` if it is only slow.",
                name,
                self.timeout,
                asked,
            )
        given_up.add(name)


@dataclass(frozen=True)
class _Batch:
    """What rewards are called with."""

    forms: dict[str, Sequence]  # the images, by input type
    prompts: list[str]
    columns: dict[str, list]
    context: dict[str, Any]

    def image(self, i: int) -> "_Batch":
        one = slice(i, i + 1)
        return _Batch(
            {form: images[one] for form, images in self.forms.items()},
            self.prompts[one],
            {column: cells[one] for column, cells in self.columns.items()},
            self.context,
        )


class _Log:
    """What the rewards of one batch log."""

    def __init__(self, size: int, metrics: dict[str, list[float]] | None = None, extra: dict | None = None):
        self.size = size
        self.metrics: dict[str, list[float]] = defaultdict(list, metrics or {})
        self.extra: dict[str, list[Any]] = extra or {}

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


class _Call:
    """
    A call of a reward: an asynchronous one runs from now on, any other when its result is asked for.

    It has a log of its own, which is read when it has returned: a call that raises or never ends has logged nothing.
    """

    def __init__(self, func: RewardFunc, batch: _Batch, timeout: float | None):
        images = batch.forms[_input_type(func)]
        self.log = _Log(len(batch.prompts))
        self.timeout = timeout
        self._call = partial(
            func,
            prompts=batch.prompts,
            completions=images,
            images=images,
            log_metric=self.log.log_metric,
            log_extra=self.log.log_extra,
            **batch.columns,
            **batch.context,
        )
        self._begun: Future | None = None
        if _is_async(func):
            self._begun = asyncio.run_coroutine_threadsafe(self._awaited(_same_device()), _event_loop())
            self._deadline = time.monotonic() + (math.inf if timeout is None else timeout)

    def result(self) -> Any:
        """
        What the reward returns.

        Raises:
            `_OutOfTime`: if it does not in time.
            `Exception`: what the reward raises.
        """
        if self._begun is not None:
            wait([self._begun], max(0.0, min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX)))
            if not self._begun.done():
                self._begun.cancel()
                raise _OutOfTime
            return self._begun.result()
        if self.timeout is None:
            return self._plain()
        # A thread that nobody waits for: those of a pool would be joined when the interpreter ends.
        outcome, same_device = Future(), _same_device()

        def run() -> None:
            try:
                same_device()
                outcome.set_result(self._plain())
            except BaseException as error:  # Ctrl-C too belongs to the caller
                outcome.set_exception(error)

        thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)
        thread.start()
        thread.join(min(self.timeout, threading.TIMEOUT_MAX))
        if thread.is_alive():
            raise _OutOfTime
        return outcome.result()

    def _plain(self) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self._call()

    async def _awaited(self, same_device: Callable[[], None]) -> Any:
        same_device()
        try:
            return await self._call()
        except (KeyboardInterrupt, SystemExit) as error:  # either would leave the loop, with the others' calls on it
            raise RuntimeError(f"an asynchronous reward raised {error!r}") from error


class _OutOfTime(Exception):
    """A call did not return in time."""


class RewardOutputError(ValueError, TypeError):
    """
    A mistake that no image is to blame for: results that are not one number an image, columns that cannot be read, a
    model that cannot be loaded. Scoring stops.
    """


class RewardsFailedError(RuntimeError):
    """So many rewards failed that training stops: in all processes, and between two optimiser steps."""


class FailureWindow:
    """
    Stops a run whose rewards keep failing.

    It is not part of a checkpoint: a resumed run begins to count anew.

    Args:
        size (`int`, *optional*, defaults to `100`):
            Scored images that are looked back upon; a batch that has more is looked at wholly.
        max_rate (`float`, *optional*, defaults to `0.1`):
            Largest tolerated part of them.
    """

    def __init__(self, size: int = 100, max_rate: float = 0.1):
        self.size, self.max_rate = size, max_rate
        self._failures: list[bool] = []

    def update(self, failed: Tensor) -> None:
        """
        Count a batch, the same in every process.

        Args:
            failed (`torch.Tensor` of shape `(B,)`):
                Failures of all processes' images, bool.

        Raises:
            `RewardsFailedError`: if all of the batch failed, or two or more and above `max_rate` of the last images.
        """
        self._failures = [*self._failures, *failed.tolist()][-max(self.size, len(failed)) :]
        count = sum(self._failures)
        if failed.all() or (count >= 2 and count > self.max_rate * len(self._failures)):
            raise RewardsFailedError(
                f"Rewards failed for {count} of the last {len(self._failures)} images ({int(failed.sum())} of the "
                f"last {len(failed)}); training stops when all fail, or at least 2 and more than {self.max_rate:.0%}. "
                "The log above has the reason. Mend the reward, or let it return None where it does not apply."
            )


class ConstantWatch:
    """
    Warns of a reward that tells nothing: one and the same number for every image, for rounds on end.

    It warns once, and again only after the reward has varied. A round in which it applies to no image does not count.

    Args:
        rounds (`int`, *optional*, defaults to `3`):
            Rounds running after which it warns.
    """

    def __init__(self, rounds: int = 3):
        self.rounds = rounds
        self._seen: dict[str, tuple[float, int]] = {}  # of each reward that is constant: the number, and for how long

    def update(self, by_name: dict[str, Tensor]) -> None:
        """
        Look at a round.

        Args:
            by_name (`dict[str, torch.Tensor]`):
                Each reward of all processes' images, `NaN` where failed or not applicable.
        """
        for name, values in by_name.items():
            given = values[~values.isnan()].unique().tolist()
            if not given:
                continue
            number, count = self._seen.pop(name, (given[0], 0))
            if len(given) > 1:
                continue
            count = count + 1 if number == given[0] else 1
            self._seen[name] = (given[0], count)
            if count == self.rounds:
                logger.warning(
                    "Reward `%s` gave %s to every image of the last %d rounds: nothing can be learned from it. Look "
                    "at what it is given (`log_completions=True`). It may be broken; if it is not, easier or harder "
                    "prompts or a graded score would tell images apart.",
                    name,
                    given[0],
                    count,
                )


# A wrong kind of result, or a missing package, would be the same for every image.
_NOT_THE_IMAGES_FAULT = (RewardOutputError, ImportError)


def _checked(output: object, name: str, expected: int) -> list[float | None]:
    kind, shape = type(output).__name__, getattr(output, "shape", (expected,))
    if inspect.iscoroutine(output):
        output.close()  # Python would warn that nobody awaited it
        raise RewardOutputError(
            f"Reward `{name}` returned a coroutine; declare it `async def`, so that it is awaited."
        )
    if isinstance(output, Iterator):
        raise RewardOutputError(
            f"Reward `{name}` returned a {kind}, which gives its values one by one; return a list."
        )
    # An order is part of the answer; bytes would pass for numbers.
    if isinstance(output, (str, bytes, Mapping, Set)) or not hasattr(output, "__len__"):
        raise RewardOutputError(f"Reward `{name}` returned {kind}; it must return a list of {expected} numbers.")
    if len(shape) != 1:
        raise RewardOutputError(
            f"Reward `{name}` returned {kind} of shape {tuple(shape)}; it must return one number an image, of shape "
            f"({expected},)."
        )
    if isinstance(output, Tensor):
        output = output.tolist()
    if len(output) != expected:
        raise RewardOutputError(
            f"Reward `{name}` returned {len(output)} values for {expected} images; it must return one each."
        )
    return [None if value is None else _number(value, name) for value in output]


def _number(value: object, name: str) -> float:
    try:
        return value.__float__()  # not float(value), which would read a string
    except OverflowError:  # an integer beyond any float
        return math.inf
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
        raise ValueError(f"Reward `{_name(func)}` has `input_type` {_input_type(func)!r}; it must be 'pil' or 'pt'.")
    parameters = inspect.signature(func).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if by_position := [parameter.name for parameter in required if parameter.kind is parameter.POSITIONAL_ONLY]:
        raise TypeError(
            f"Reward `{_name(func)}` takes {by_position} by position alone, and rewards are called by keyword; leave "
            "out the `/`."
        )
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


def _version(images: Tensor) -> int:
    """A number that grows when a tensor is changed; inference tensors keep none."""
    return 0 if images.is_inference() else images._version


def _name(func: object) -> str:
    return _attribute(func, "__name__", type(_unwrapped(func)).__name__)


def _input_type(func: object) -> str:
    return _attribute(func, "input_type", "pil")


def _overlaps(func: object) -> bool:
    return _attribute(func, "overlaps", _is_async(func) or _input_type(func) == "pil")


def _attribute(func: object, name: str, default: Any) -> Any:
    """An attribute of a reward, or of what it is a `functools.partial` of."""
    return getattr(func, name, getattr(_unwrapped(func), name, default))


def _unwrapped(func: Any) -> Any:
    while isinstance(func, partial):
        func = func.func
    return func


def _is_async(func: Any) -> bool:
    func = _unwrapped(func)
    # An instance is not asynchronous itself; its `__call__` may be.
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__)


def _same_device() -> Callable[[], None]:
    """What moves another thread, which begins on the first GPU, to this thread's."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork inherits the loop without its thread
_loops_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The process's loop for asynchronous rewards, in a thread that does not keep the interpreter from ending."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()

            def run() -> None:
                torch.set_grad_enabled(False)  # of this thread
                while True:
                    try:
                        loop.run_forever()
                    except BaseException as error:  # of a task that a reward began; calls under way must not hang
                        logger.error("%r left the event loop of asynchronous rewards, which goes on.", error)

            threading.Thread(target=run, daemon=True).start()
        return loop
