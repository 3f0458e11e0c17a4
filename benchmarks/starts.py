"""
Other starts than the bundled model, and pictures that are trained on in place of own rollouts: what the ablations need
beside runs.

The bundled model is the start of noisy captions: it has learned all letters and then lost its confidence. `stopped`
is nearly as accurate because its training stopped early, hence without that knowledge. `stronger` is the bundled model
after some more training on true captions: a better model whose groups still differ in their rewards. Autoencoder and
text encoders are the bundled ones in all.

A folder's name tells what it was made of, so that another number of steps is another folder.
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
from runs import Run, Saved, Start, accuracy, be_quiet, eval_prompts, make_trainer, reader, write_json
from torch import Tensor

from trl_dgpo.tiny import build, tiny_pipeline_path


def starts(*, quick: bool) -> dict[str, Start]:
    """Rates are those of the bundled build."""
    steps, signs = (dict.fromkeys(("stopped", "stronger"), 10), 1000) if quick else ({}, 8000)
    return {
        "stopped": Start("stopped", steps.get("stopped", 550), goes_on=False, signs=signs),
        "stronger": Start("stronger", steps.get("stronger", 40), goes_on=True, signs=signs),
    }


def make_start(start: Start, output: Path) -> dict[str, float]:
    """Train the transformer of a start, unless it is there; what it can and what it took."""
    folder = start.folder(output)
    log = folder.with_suffix(".json")
    if log.exists():
        return json.loads(log.read_text())
    be_quiet()
    began = time.process_time()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    rng = random.Random(f"starts/{start.name}")
    torch.manual_seed(rng.getrandbits(63))
    texts, latents = signs(pipeline, rng, start.signs)
    if not start.goes_on:
        pipeline.transformer = build.new_pipeline().transformer
    ema = torch.optim.swa_utils.AveragedModel(
        pipeline.transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95)
    )
    rate = 1e-3 if start.goes_on else 2e-3
    build.train_transformer(pipeline, ema, latents, texts, start.steps, rate, 0.0, rng, lambda **entries: None)
    pipeline.transformer.load_state_dict(ema.module.state_dict())
    pipeline.transformer.save_pretrained(folder)
    rows = eval_prompts("report")
    images = build.sample(pipeline, [row["prompt"] for row in rows], max_sequence_length=1, guidance_scale=1.0)
    scores = accuracy(reader().read(images), [row["text"] for row in rows])
    result = {"steps": start.steps, **{key: float(np.mean(values)) for key, values in scores.items()}}
    result["cpu_s"] = round(time.process_time() - began, 1)
    write_json(log, result)
    return result


def signs(pipeline: StableDiffusion3Pipeline, rng: random.Random, number: int) -> tuple[list[str], Tensor]:
    """Texts of the training split and the latents of their signs, as the bundled model was trained on."""
    texts = build.training_texts(number, rng)
    pictures = np.stack([np.asarray(build.draw_sign(text, rng)) for text in texts])
    latents = build.encode(pipeline.vae, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    config = pipeline.vae.config
    return texts, (latents - config.shift_factor) * config.scaling_factor


def make_saved(saved: Saved, output: Path) -> None:
    """Rounds of a model's groups with their rewards, or true pictures with captions, unless they are there."""
    folder = saved.folder(output)
    if folder.exists():
        return
    be_quiet()
    if saved.start is None:
        rng = random.Random("signs")
        texts = build.training_texts(saved.number, rng)
        rows = {
            "prompt": [build.CAPTION.format(text) for text in texts],
            "image": [build.draw_sign(text, rng) for text in texts],
        }
        _move_in(folder, lambda path: datasets.Dataset.from_dict(rows).save_to_disk(path))
        return
    run = Run(f"groups of {saved.name}", "dgpo", 0.0, 1.0, saved.config, seed=100, start=saved.start)
    with tempfile.TemporaryDirectory() as spare:
        collected = make_trainer(run, output, spare).collect_rollouts(saved.number)
    _move_in(folder, lambda path: collected.save_to_disk(path))


def _move_in(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    write(partial)
    partial.rename(folder)
