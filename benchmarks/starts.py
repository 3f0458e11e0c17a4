"""
Other starts than the bundled model, and groups that other models made: what the ablations need beside runs.

The bundled model is the start of noisy captions: it has learned all letters and then lost its confidence. `stopped`
is as accurate because its training stopped early, hence without that knowledge. `stronger` is the bundled model after
some more training on true captions: a better model whose groups still differ in their rewards. Autoencoder and text
encoders are the bundled ones in all.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from runs import NUM_EVAL_PROMPTS, Run, accuracy, be_quiet, make_trainer, reader, write_json
from torch import Tensor

from trl_dgpo.prompts.text import tiny_ocr_prompts
from trl_dgpo.tiny import build, tiny_pipeline_path


NUM_SIGNS = 8000
# Optimiser steps, and whether from the bundled weights (else from new ones); rates are those of the bundled build.
STARTS = {"stopped": (550, False), "stronger": (40, True)}


def make_start(name: str, output: Path, num_steps: int | None = None) -> dict[str, float]:
    """Train the transformer of a start, unless it is there; what it can and what it took."""
    folder, log = output / "starts" / name, output / "starts" / f"{name}.json"
    if log.exists():
        return json.loads(log.read_text())
    be_quiet()
    steps, goes_on = STARTS[name]
    steps = num_steps or steps
    began = time.process_time()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    rng = random.Random(f"starts/{name}")
    torch.manual_seed(rng.getrandbits(63))
    texts, latents = signs(pipeline, rng)
    if not goes_on:
        pipeline.transformer = build.new_pipeline().transformer
    ema = torch.optim.swa_utils.AveragedModel(
        pipeline.transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95)
    )
    rate = 1e-3 if goes_on else 2e-3
    build.train_transformer(pipeline, ema, latents, texts, steps, rate, 0.0, rng, lambda **entries: None)
    pipeline.transformer.load_state_dict(ema.module.state_dict())
    pipeline.transformer.save_pretrained(folder)
    rows = tiny_ocr_prompts("test", NUM_EVAL_PROMPTS)
    images = build.sample(pipeline, [row["prompt"] for row in rows], max_sequence_length=1, guidance_scale=1.0)
    scores = accuracy(reader().read(images), [row["text"] for row in rows])
    result = {"steps": steps, **{key: float(np.mean(values)) for key, values in scores.items()}}
    result["cpu_s"] = round(time.process_time() - began, 1)
    write_json(log, result)
    return result


def signs(pipeline: StableDiffusion3Pipeline, rng: random.Random, number: int = NUM_SIGNS) -> tuple[list[str], Tensor]:
    """Texts of the training split and the latents of their signs, as the bundled model was trained on."""
    texts = build.training_texts(number, rng)
    pictures = np.stack([np.asarray(build.draw_sign(text, rng)) for text in texts])
    latents = build.encode(pipeline.vae, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    config = pipeline.vae.config
    return texts, (latents - config.shift_factor) * config.scaling_factor


def save_signs(output: Path, number: int = 2000) -> None:
    """True pictures with captions, for a supervised warm start."""
    folder = output / "groups" / "signs"
    if folder.exists():
        return
    rng = random.Random("signs")
    texts = build.training_texts(number, rng)
    rows = {
        "prompt": [build.CAPTION.format(text) for text in texts],
        "image": [build.draw_sign(text, rng) for text in texts],
    }
    _move_in(folder, lambda path: datasets.Dataset.from_dict(rows).save_to_disk(path))


def save_groups(start: str, output: Path, rounds: int, config: dict) -> None:
    """Rounds of a model's own groups with their rewards."""
    folder = output / "groups" / start
    if folder.exists():
        return
    be_quiet()
    run = Run(f"groups of {start}", "dgpo", 0.0, 1.0, config, seed=100, start=start)
    with tempfile.TemporaryDirectory() as spare:
        collected = make_trainer(run, output, spare).collect_rollouts(rounds)
    _move_in(folder, lambda path: collected.save_to_disk(path))


def _move_in(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    write(partial)
    partial.rename(folder)
