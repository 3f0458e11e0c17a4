"""The example as a user runs it, cut short."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tiny_families import tiny_family

from trl_dgpo import DGPOConfig
from trl_dgpo.cli import parse


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python itself looks for what a script imports
    spec = importlib.util.spec_from_file_location("train_sdxl_pickscore", EXAMPLES / "train_sdxl_pickscore.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_sdxl_pickscore", module)
    spec.loader.exec_module(module)
    return module


def test_makes_a_small_model_and_trains_it(example, monkeypatch, tmp_path, capsys):
    def run():
        flags = ["--tiny_steps", "2", "--num_eval_prompts", "4", "--max_steps", "2", "--eval_steps", "2"]
        flags += ["--learning_rate", "0.1"]
        monkeypatch.setattr(sys, "argv", ["train_sdxl_pickscore.py", "--output_dir", str(tmp_path), *flags])
        assert example.main() == 0
        return capsys.readouterr().out

    printed = run()
    assert "Making a small UNet" in printed
    before, after = map(float, re.search(r"reward \(redness\) +(\S+) +(\S+)", printed).groups())
    assert -1 < before != after < 1
    assert Image.open(tmp_path / "before_after.png").size > (100, 50)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    pipeline.load_lora_weights(tmp_path)
    assert "Making a small UNet" not in run()  # it is there


def test_redness(example):
    def picture(*colour):
        return Image.fromarray(np.full((2, 2, 3), colour, dtype=np.uint8))

    pictures = [picture(255, 0, 0), picture(0, 255, 255), picture(90, 90, 90), picture(51, 0, 102)]
    assert example.redness(pictures) == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=1e-6)


def test_real_weights_are_asked_for_pickscore(example, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    tiny_family("sdxl").save_pretrained(tmp_path / "model")
    given = {}

    class Asked(Exception):
        pass

    def trainer(**arguments):
        given.update(arguments)
        raise Asked

    monkeypatch.setattr(example, "DGPOTrainer", trainer)
    flags = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--output_dir", str(tmp_path)])
    with pytest.raises(Asked):
        example.main()
    assert given["train_dataset"]["prompt"] == ["a cat", "a dog"]
    assert (given["reward_funcs"].__name__, given["reward_funcs"].normalize) == ("pickscore", True)
    assert not given["eval_reward_funcs"].normalize
    _, recipe, _ = parse(["--config", str(EXAMPLES / "recipes" / "sdxl_pickscore.yaml")])
    ours = {name: getattr(given["args"], name) for name in ("resolution", "beta", "sample_num_steps", "learning_rate")}
    assert ours == {name: getattr(recipe, name) for name in ours}
    assert type(given["args"]) is DGPOConfig
