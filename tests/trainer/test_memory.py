"""Host memory is flat: what a round has made is gone when the next one is done."""

import ctypes
import gc
import sys
from collections import Counter

import psutil
import pytest
import torch
from tiny_trainers import brightness, prompt_dataset, tiny_trainer
from transformers import TrainerCallback


FIRST, LAST = 40, 200  # rounds; what is made once is made by the first, at multiples of `EVERY`
EVERY = 20  # rounds between two evaluations and checkpoints
# Of growth in 160 rounds: `log_history` has 1.5 kB a round, bounded caches of `rich` and the allocator's fragments the
# rest. 1.5 were measured.
MEGABYTES = 4.0


class Inventory(TrainerCallback):
    """What the process holds after some rounds, each of one optimiser step."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, **kwargs):
        # At the step's end, before its evaluation and checkpoint: 20 rounds after those before.
        if state.global_step in (FIRST, LAST):
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # what was freed, but not given back, is no leak
            objects = gc.get_objects()
            tensors = [thing for thing in objects if isinstance(thing, torch.Tensor)]
            self.found[state.global_step] = {
                "megabytes": psutil.Process().memory_info().rss / 2**20,
                "tensors": len(tensors),
                "elements": sum(tensor.numel() for tensor in tensors),
                "objects": Counter(type(thing).__name__ for thing in objects),
            }

    def growth(self) -> dict:
        first, last = self.found[FIRST], self.found[LAST]
        return {name: last[name] - first[name] for name in first}


class Hoarder(TrainerCallback):
    """A planted leak: it keeps each round's images, as tensors and as bytes, seen in the process's size alone."""

    def __init__(self):
        self.kept = []

    def on_rollout(self, args, state, control, scored, **kwargs):
        self.kept.append((scored.images, scored.images.double().numpy().tobytes()))  # 6 and 48 kB


def growth_over_rounds(output_dir, *callbacks) -> dict:
    inventory = Inventory()
    trainer = tiny_trainer(
        output_dir,
        reward_funcs=brightness,
        train_dataset=prompt_dataset("a", "b", "c"),
        eval_dataset=prompt_dataset("x", "y"),
        callbacks=[*callbacks, inventory],
        prompts_per_round=1,
        num_generations=2,
        per_device_train_batch_size=1,
        max_steps=LAST,
        # All that a run may keep something for: both averages, every pass, the frozen predictions, pictures, files.
        old_policy_after=1,
        clip_range=1e-3,
        kl_coef=0.1,
        sample_guidance_scale=4.5,
        num_log_images=1,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
    )
    trainer.train()
    return inventory.growth()


@pytest.mark.slow
def test_memory_is_flat_over_200_rounds(tmp_path):
    growth = growth_over_rounds(tmp_path)
    print(growth)
    assert growth["tensors"] == growth["elements"] == 0
    assert max(growth["objects"].values()) < LAST - FIRST  # nothing is kept once a round
    assert growth["megabytes"] < MEGABYTES


@pytest.mark.slow
def test_that_a_leak_is_found(tmp_path):
    growth = growth_over_rounds(tmp_path, Hoarder())
    print(growth)
    assert growth["tensors"] == LAST - FIRST
    assert growth["megabytes"] > MEGABYTES
