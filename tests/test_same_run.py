"""One run in four forms: the notebook, a script in TRL's form, one in DDPO's, and the command line."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import HfArgumentParser

from trl_dgpo import DefaultDGPOStableDiffusionPipeline, DGPOConfig, DGPOTrainer
from trl_dgpo.cli import main
from trl_dgpo.prompts import tiny_ocr_prompts
from trl_dgpo.sampler import GroupSampler


NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebooks" / "dgpo_quickstart.ipynb"
STEPS, EVAL_PROMPTS = 2, 2
# The notebook's settings, as flags. What is not here is the default.
SETTINGS = {
    "max_steps": STEPS,
    "prompts_per_round": 4,
    "num_generations": 8,
    "updates_per_round": 2,
    "learning_rate": 1e-3,
    "resolution": 32,
    "width": 64,
    "max_sequence_length": 1,
    "sampler": "euler",
    "sample_num_steps": 6,
    "sample_guidance_scale": 1.0,
    "sample_batch_size": 32,
    "num_train_timesteps": 2,
    "t_min": 0.6,
    "kl_coef": 0.0,
    "clip_range": 0,
    "ema_every": 1,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "num_log_images": 0,
}
REWARD = """
import numpy as np


def blue(images, **kwargs):
    colours = [np.asarray(image).mean((0, 1)) / 255 for image in images]
    return [float(b - (r + g) / 2) for r, g, b in colours]
"""


def blue_of(image):
    """`blue` of a picture as DDPO's rewards get it, exact: the pixels are whole 255ths."""
    r, g, b = (255 * image).round().permute(1, 2, 0).double().mean((0, 1)) / 255
    return float(b - (r + g) / 2)


def lora(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The LoRA that the notebook trains; its cells are run as they stand, down to the one that trains."""
    folder, scope = tmp_path_factory.mktemp("notebook"), {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            scope |= {"MAX_STEPS": STEPS, "NUM_EVAL_PROMPTS": EVAL_PROMPTS, "OUTPUT_DIR": str(folder)}
        if "trainer" in scope:
            break
    return lora(folder)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_trls_form_gives_the_notebooks_weights(tmp_path, notebooks):
    scope = {}
    exec(REWARD, scope)
    trainer = DGPOTrainer(
        model="tiny",
        reward_funcs=scope["blue"],
        args=DGPOConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(tiny_ocr_prompts("train", 500)),
    )
    trainer.train()
    trainer.save_model()
    assert same(lora(tmp_path), notebooks)
    assert any(tensor.abs().max() > 0 for name, tensor in notebooks.items() if "lora_B" in name)


def test_ddpos_form_gives_the_notebooks_weights(tmp_path, notebooks):
    flags = {name: value for name, value in SETTINGS.items() if name not in _SAID_IN_DDPOS_NAMES}
    flags |= {
        "num_epochs": 1,
        "sample_num_batches_per_epoch": 1,
        "train_batch_size": 8,
        "train_gradient_accumulation_steps": 2,
        "train_learning_rate": 1e-3,
        "train_timestep_fraction": 0.4,
        "mixed_precision": "no",
        "output_dir": tmp_path,
    }
    (config,) = HfArgumentParser(DGPOConfig).parse_args_into_dataclasses(
        [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    )
    prompts = [row["prompt"] for row in tiny_ocr_prompts("train", 500)]
    sampler = GroupSampler(prompts, 4, seed=config.seed)
    replayed = iter([prompt for round in range(2) for prompt in sampler.rows(round, range(4))])
    trainer = DGPOTrainer(
        config,
        lambda images, prompts, metadata: (
            torch.tensor([blue_of(image) for image in images], dtype=torch.float64),
            {},
        ),
        lambda: (next(replayed), {}),
        DefaultDGPOStableDiffusionPipeline("tiny"),
    )
    trainer.train()
    trainer.save_pretrained(tmp_path)
    assert same(lora(tmp_path), notebooks)


_SAID_IN_DDPOS_NAMES = {"max_steps", "prompts_per_round", "updates_per_round", "learning_rate", "t_min"}


def test_the_command_line_gives_the_notebooks_weights(tmp_path, notebooks):
    (tmp_path / "rewards.py").write_text(REWARD)
    recipe = {
        "model_name_or_path": "tiny",
        "dataset_name": "tiny-ocr",
        "num_prompts": 500,
        "num_eval_prompts": EVAL_PROMPTS,
        "reward_funcs": f"{tmp_path / 'rewards.py'}:blue",
        "output_dir": str(tmp_path / "run"),
        **{name: value for name, value in SETTINGS.items() if name != "learning_rate"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--learning_rate", "1e-3"]) == 0
    assert same(lora(tmp_path / "run"), notebooks)


def test_another_seed_gives_other_weights(tmp_path, notebooks):
    scope = {}
    exec(REWARD, scope)
    trainer = DGPOTrainer(
        model="tiny",
        reward_funcs=scope["blue"],
        args=DGPOConfig(output_dir=str(tmp_path), **SETTINGS, seed=1),
        train_dataset=list(islice(tiny_ocr_prompts("train", 500), 500)),
    )
    trainer.train()
    trainer.save_model()
    assert not same(lora(tmp_path), notebooks)
