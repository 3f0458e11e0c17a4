"""
What a run does when something goes wrong around it or in it: signals, steps that would spoil the weights, processes
that are gone.

`docs/faults.md` has the whole table. What is written to disk is `trl_dgpo.run_files`' and `trl_dgpo.checkpoints`'
matter, failing rewards are that of `trl_dgpo.rewards.scoring`.
"""

import logging
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch


logger = logging.getLogger(__name__)

# SIGTERM is what clusters send, SIGUSR1 what people let Slurm send some time before (`--signal=USR1@120`).
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
PASSED_ON = 5.0  # seconds within which a launcher passes on the signal that its processes got too


class StopSignals:
    """
    Context in which the first SIGTERM or SIGUSR1 is a request, and one more, seconds later, ends the process at once,
    as it would have without this. One that comes at the first's heels is the same, passed on by a launcher.

    A child that is forked inside ends as it would have without this. Only the main thread can handle signals: in
    another, as in some notebooks, nothing changes. A handler that somebody else has installed, and a signal that is
    ignored, stay as they are.

    Attributes:
        received (`int`):
            The signal that came, 0 if none did.
    """

    def __init__(self):
        self.received = 0
        self._since, self._process = 0.0, 0
        self._taken: list[int] = []

    def __enter__(self) -> "StopSignals":
        self.received, self._process = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._note)
                    self._taken.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._taken:
            signal.signal(self._taken.pop(), signal.SIG_DFL)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if os.getpid() != self._process or (self.received and now - self._since > PASSED_ON):
            self.__exit__(None, None, None)
            signal.raise_signal(number)
        if self.received:
            return
        self.received, self._since = number, now
        # Not by `logging`: the main thread may be in the middle of writing a line.
        name = signal.Signals(number).name
        os.write(2, f"{name}: the run ends after the present optimiser step; once more ends it now.\n".encode())


@dataclass
class StepGuard:
    """
    Decides which optimiser steps are not taken, and when there have been too many.

    Args:
        max_skipped (`int`):
            Steps in a row after which there is no use in going on.
        max_norm (`float`, *optional*):
            Largest gradient norm, before clipping, of a step that is taken; any finite one if `None`.
        total (`int`), in_a_row (`int`):
            Steps that were not taken, in the run and since the last that was.
    """

    max_skipped: int
    max_norm: float | None = None
    total: int = 0
    in_a_row: int = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    @property
    def is_exhausted(self) -> bool:
        return self.in_a_row >= self.max_skipped

    def skips(self, step: int, loss: float, norm: float, is_scaled: bool = False) -> bool:
        """
        Whether an optimiser step is to be left out; it is counted, and the log tells why.

        The gradient's norm decides, which is the same in every process: what one process's loss spoils is in the
        gradient that all of them have.

        Args:
            step (`int`):
                Its number, from 1.
            loss (`float`):
                This process's loss.
            norm (`float`):
                Norm of the gradient.
            is_scaled (`bool`, *optional*, defaults to `False`):
                Whether a gradient that is not finite is the affair of fp16's loss scaling, which leaves such a step
                out by itself and tries a smaller scale.
        """
        if not math.isfinite(norm) and is_scaled:
            return False
        if norm <= (sys.float_info.max if self.max_norm is None else self.max_norm):
            self.in_a_row = 0
            return False
        self.total += 1
        self.in_a_row += 1
        logger.warning(
            "Optimiser step %d is left out, the %d. in a row: loss %.3g, gradient norm %.3g%s. Weights, moments and "
            "averages stay as they are; after %d in a row the run stops (`max_skipped_steps`).",
            *(step, self.in_a_row, loss, norm),
            "" if self.max_norm is None else f" (at most {self.max_norm:g}, `skip_grad_norm`)",
            self.max_skipped,
        )
        return True

    def exhausted(self, step: int) -> str:
        """What to say when there have been too many."""
        return (
            f"The last {self.in_a_row} optimiser steps, up to step {step}, were left out, because their "
            "gradient was not finite or above `skip_grad_norm`; the log above has the numbers. A lower "
            "`learning_rate`, a smaller `max_grad_norm`, bf16 in place of fp16, or an earlier checkpoint may help; "
            "`max_skipped_steps` says how many are borne."
        )


def random_states() -> Callable[[], None]:
    """Keep the global random states of Python, numpy and torch; what is returned brings them back when called."""
    python, arrays, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)

    return restore


def check_output_dir(directory: str | os.PathLike) -> None:
    """
    Find out whether a run can write, before its model is loaded.

    Args:
        directory (`str` or `os.PathLike`):
            `output_dir`, which need not exist: nothing is left in it, or above it.

    Raises:
        `ValueError`: if nothing can be written there.
    """
    place = Path(directory).absolute()
    while not os.path.exists(place) and place != place.parent:  # `Path.exists` raises where it may not look
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {os.fspath(directory)!r}, and nothing can be written in {str(place)!r} "
            f"({type(error).__name__}: {error}). A run keeps its log, its checkpoints and what it learned there: take "
            "a folder that this user can write to, on a disk that is not full."
        ) from error


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone or silent."""
    # NCCL's errors have a class; gloo's, when an end of a connection is gone or silent, the file that raised them.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
