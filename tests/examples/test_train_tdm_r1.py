"""The example as a user runs it, cut short."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_random_pipeline
from tiny_trainers import scramble, tiny_trainer

from trl_dgpo.rewards import OCRReward


SCRIPT = Path(__file__).parents[2] / "examples" / "train_tdm_r1.py"
SHORT = ["--num_prompts", "32", "--num_eval_prompts", "8", "--max_steps", "3", "--eval_steps", "3"]
SHORT += ["--prompts_per_round", "2", "--num_generations", "4", "--sample_batch_size", "8"]
SHORT += ["--per_device_train_batch_size", "4"]


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_tdm_r1", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_tdm_r1", module)
    spec.loader.exec_module(module)
    return module


def test_prints_and_saves_what_it_promises(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tdm_r1.py", "--output_dir", str(tmp_path), *SHORT])
    assert example.main() == 0
    printed = capsys.readouterr().out
    assert "8 held-out images in 4 steps" in printed
    assert len(re.search(r"OCR accuracy +(\S+) +(\S+)", printed).groups()) == 2
    assert Image.open(tmp_path / "before_after.png").size > (100, 50)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"}
    assert not names & {"fake", "surrogate"}  # the student alone is for others


def test_a_student_is_where_training_begins(example, monkeypatch, tmp_path):
    base = tmp_path / "base"
    tiny_random_pipeline().save_pretrained(base)
    distilled = tiny_trainer(tmp_path / "student", model=str(base), sampler="euler")
    for view in (None, "ema"):
        scramble(distilled, view)
    distilled.save_model()
    # Pictures of noise are full of what might be words.
    monkeypatch.setattr(example, "OCRReward", lambda recognition_only: OCRReward(recognition_only=True))

    flags = ["--model", str(base), "--student", str(tmp_path / "student"), "--use_cpu", "true", *SHORT]
    flags += ["--resolution", "32", "--max_sequence_length", "4", "--per_device_eval_batch_size", "8"]
    flags += ["--learning_rate", "0", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["train_tdm_r1.py", "--output_dir", str(tmp_path / "run"), *flags])
    assert example.main() == 0
    given, saved = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("student", "run"))
    assert given.keys() == saved.keys()
    assert all((given[name] == saved[name]).all() for name in given)
