"""The example as a user runs it, cut short."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from trl_dgpo.rewards import OCRReward


SCRIPT = Path(__file__).parents[2] / "examples" / "train_sd35_ocr.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("train_sd35_ocr", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_sd35_ocr"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_sd35_ocr"]


def run(example, monkeypatch, tmp_path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_sd35_ocr.py", "--output_dir", str(tmp_path), *flags])
    return example.main()


SHORT = ["--num_prompts", "32", "--num_eval_prompts", "8", "--max_steps", "2"]
SHORT += ["--prompts_per_round", "2", "--num_generations", "4", "--sample_batch_size", "8"]


def accuracy(printed: str) -> tuple[float, float]:
    """The table's first row: before and after."""
    return tuple(map(float, re.search(r"OCR accuracy +(\S+) +(\S+)", printed).groups()))


@pytest.mark.parametrize("trainer", ["dgpo", "gpo"])
def test_prints_and_saves_what_it_promises(example, monkeypatch, tmp_path, capsys, trainer):
    batch = {"dgpo": "4", "gpo": "8"}[trainer]
    assert (
        run(example, monkeypatch, tmp_path, *SHORT, "--trainer", trainer, "--per_device_train_batch_size", batch) == 0
    )
    printed = capsys.readouterr().out
    assert "OCR accuracy" in printed
    assert "exact match" in printed
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).is_file()
    for name in ("before_after.png", "reward_curve.png"):
        assert Image.open(tmp_path / name).size > (100, 50)


def test_ctrl_c_saves_what_was_learned(example, monkeypatch, tmp_path, capsys):
    calls = []
    score = OCRReward.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 5:  # the self-test, pictures and evaluation at the start, the first round, then the second
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(OCRReward, "__call__", interrupted)
    flags = (*SHORT, "--per_device_train_batch_size", "4", "--updates_per_round", "1")
    assert run(example, monkeypatch, tmp_path, *flags) == 130
    assert "Interrupted after 1 steps" in capsys.readouterr().out
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_sd35_recipe_is_a_valid_configuration(example, monkeypatch, tmp_path):
    model = "stabilityai/stable-diffusion-3.5-medium"
    for trainer in ("dgpo", "gpo"):
        monkeypatch.setattr(sys, "argv", ["x", "--model", model, "--trainer", trainer, "--output_dir", str(tmp_path)])
        script, trainer_class, args = example.parse()
        assert script.model == model
        assert (trainer_class, type(args)) == example.TRAINERS[trainer]
        assert args.resolution == 512
        assert args.sample_guidance_scale == 4.5


def test_dgpo_teaches_the_tiny_model_to_spell(example, monkeypatch, tmp_path, capsys):
    # 15 rounds. The standard error of the difference is about 0.02 with 128 images, so chance is five of them away.
    assert run(example, monkeypatch, tmp_path, "--max_steps", "30", "--num_eval_prompts", "128") == 0
    before, after = accuracy(capsys.readouterr().out)
    assert 0.55 < before < 0.75
    assert after > before + 0.10


@pytest.mark.slow
def test_gpo_teaches_the_tiny_model_to_spell(example, monkeypatch, tmp_path, capsys):
    flags = ("--trainer", "gpo", "--max_steps", "60", "--num_eval_prompts", "128")
    assert run(example, monkeypatch, tmp_path, *flags) == 0
    before, after = accuracy(capsys.readouterr().out)
    assert after > before + 0.10
