"""
The round that is measured, and a way to take a trainer's rounds one at a time.

Two groups of eight images, ten steps with guidance, four levels, clip and KL on, a LoRA of rank 64, brightness as the
reward, a group a micro-batch, no gradient checkpointing, no pictures in the log.
"""

import itertools
import string
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from transformers import PrinterCallback, TrainerCallback

from trl_dgpo import DGPOConfig, DGPOTrainer


ROUND = {
    "num_generations": 8,
    "prompts_per_round": 2,
    "sample_num_steps": 10,
    "sample_guidance_scale": 4.5,
    "num_train_timesteps": 4,
    "clip_range": 1e-3,
    "kl_coef": 1e-3,
    "beta": 100.0,
    "seed": 42,
}
_UNATTENDED = {
    "old_policy_after": None,
    "shuffle_dataset": False,
    "offload_text_encoders": False,
    "gradient_checkpointing": False,
    "num_log_images": 0,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 10_000,
}
_WORDS = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=2)]


def brightness(images, **kwargs) -> list[float]:
    """A reward that costs next to nothing."""
    return [np.asarray(image).mean() / 255 for image in images]


def prompts_of(round: int, prompts_per_round: int) -> list[str]:
    """Prompts that no other round has: each has to be encoded."""
    return [_WORDS[i % len(_WORDS)] for i in range(round * prompts_per_round, (round + 1) * prompts_per_round)]


def make_trainer(
    model: StableDiffusion3Pipeline | str, output_dir: str, *, quantization_config: Any = None, **config: Any
) -> DGPOTrainer:
    """A trainer of this round; `config` overrides it."""
    config = {"use_cpu": not torch.cuda.is_available(), "bf16": False, **ROUND, **_UNATTENDED, **config}
    trainer = DGPOTrainer(
        model=model,
        reward_funcs=brightness,
        args=DGPOConfig(output_dir=output_dir, **config),
        train_dataset=Dataset.from_dict({"prompt": _WORDS}),
        quantization_config=quantization_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Rounds:
    """
    A trainer's rounds, taken one at a time.

    `train` runs in a thread that stands still but for the round that is asked for, so that rounds of two trainers, or
    rounds and other measurements, can alternate. A round lasts from one optimiser step's end to the next one's: the
    log between the two is in it.

    Args:
        trainer ([`DGPOTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: DGPOTrainer):
        self.trainer = trainer
        self._turn = _Turn()
        trainer.add_callback(self._turn)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def next(self) -> float:
        """Seconds of one more round."""
        self._turn.give()
        if self._error is not None:
            raise self._error
        return self._turn.seconds

    def close(self) -> list[dict[str, float]]:
        """End the training; its log, one entry a round."""
        self._turn.stop = True
        self._turn.give()
        self._thread.join()
        return [entry for entry in self.trainer.state.log_history if "time/rollout" in entry]

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *_) -> None:
        if self._thread.is_alive():
            self.close()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:  # it belongs to whoever asked for the round
            self._error = error
        self._turn.over()


class _Turn(TrainerCallback):
    """Holds training still until it is its turn."""

    def __init__(self):
        self.seconds = 0.0
        self.stop = False
        self._given, self._taken = threading.Semaphore(0), threading.Semaphore(0)

    def give(self) -> None:
        self._given.release()
        self._taken.acquire()

    def over(self) -> None:
        self._taken.release()

    def on_train_begin(self, args, state, control, **kwargs):
        self._wait(control)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = now() - self._start
        self._taken.release()
        self._wait(control)

    def _wait(self, control) -> None:
        self._given.acquire()
        control.should_training_stop = self.stop
        self._start = now()


def now() -> float:
    """Seconds, when the device has done all it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def spread(values: Iterable[float]) -> str:
    """Median, and the smallest and the largest value."""
    values = list(values)
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} pairs)"


def machine() -> dict[str, Any]:
    """What a table of figures has to name."""
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "threads": torch.get_num_threads(), **{name: version(name) for name in names}}
