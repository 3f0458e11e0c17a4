"""The command line as a user types it: recipes, flags, prompts, rewards, and what a mistake looks like."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_random_pipeline
from tiny_trainers import CONFIG, tiny_trainer
from trl import ModelConfig

from trl_dgpo import DGPOConfig, DiffusionDPOConfig, FlowGRPOConfig, GPOConfig, cli
from trl_dgpo.cli import (
    CollectArguments,
    DGPOScriptArguments,
    EvaluateArguments,
    PlanArguments,
    SampleArguments,
    main,
    parse,
)
from trl_dgpo.evaluation import evaluation_latents
from trl_dgpo.prompts import PROMPT_SETS


REPOSITORY = Path(__file__).parents[1]

REWARDS = """
import json

calls = []

def brightness(images, **kwargs):
    calls.append(len(images))
    return [sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]

def interrupted(images, **kwargs):
    if len(calls) == 1:
        raise KeyboardInterrupt
    return brightness(images)
"""


@pytest.fixture(autouse=True)
def _logging_as_before():
    yield
    logging.getLogger("trl_dgpo").setLevel(logging.NOTSET)  # `serve-reward` says where it serves


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, pipeline_folder) -> Path:
    """A whole recipe of seconds: a random pipeline, two files of prompts and a reward in a file."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a\nb\n\nc\n")
    (tmp_path / "held_out.txt").write_text("d\ne\n")
    flags = {
        **{name: value for name, value in CONFIG.items() if value is not None},
        "old_policy_after": -1,
        "model_name_or_path": str(pipeline_folder),
        "dataset_name": str(tmp_path / "prompts.txt"),
        "eval_dataset_name": str(tmp_path / "held_out.txt"),
        "reward_funcs": f"{tmp_path / 'rewards.py'}:brightness",
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "clip_range": None,
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in flags.items()))
    return path


def error(capsys, *argv: str) -> str:
    """The one line that a mistake gets."""
    assert main([str(word) for word in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


# -- flags and recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script_class", [DGPOScriptArguments, EvaluateArguments, SampleArguments, CollectArguments, PlanArguments]
)
@pytest.mark.parametrize("config_class", [DGPOConfig, GPOConfig, FlowGRPOConfig, DiffusionDPOConfig])
def test_no_flag_has_two_meanings(script_class, config_class):
    names = [f.name for cls in (script_class, config_class, ModelConfig) for f in fields(cls)]
    assert len(set(names)) == len(names)


def test_help_of_the_command_is_quick():
    code = (
        "import sys\nfrom trl_dgpo.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")
    for command in ("train", "evaluate", "sample", "collect", "plan", "report", "serve-reward"):
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize(
    ("command", "trainer"),
    [
        *((command, "dgpo") for command in ("train", "evaluate", "sample", "collect", "plan", "report")),
        ("serve-reward", "dgpo"),
        *(("train", trainer) for trainer in ("gpo", "flow_grpo", "diffusion_dpo", "diffusion_sft", "tdm_r1")),
    ],
)
def test_help_of_every_command_renders(command, trainer, capsys):
    own = {"report": "output_dir", "serve-reward": "--port"}
    flags = [] if command in own else ["--trainer", trainer]
    with pytest.raises(SystemExit) as stopped:
        main([command, *flags, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    if command in own:
        assert own[command] in printed
    else:
        assert all(f"--{name}" in printed for name in ("kl_coef", "learning_rate", "lora_r", "reward_funcs"))
        assert ("'linear' or 'logsigmoid'" in printed) == (trainer == "gpo")
        assert ("--num_sde_steps" in printed) == (trainer == "flow_grpo")
        assert ("--pair_selection" in printed) == (trainer == "diffusion_dpo")


def test_a_flag_beats_the_recipe_and_the_recipe_the_default(recipe):
    script, args, model = parse(["--config", str(recipe), "--beta", "7", "--num_generations=2"])
    assert (args.beta, args.num_generations, args.prompts_per_round, args.kl_coef) == (7.0, 2, 4, 0.0)
    assert args.clip_range is None
    assert args.max_grad_norm == DGPOConfig(output_dir="x", use_cpu=True).max_grad_norm
    assert script.reward_funcs == [f"{recipe.parent / 'rewards.py'}:brightness"]
    assert not model.use_peft


def test_the_trainer_decides_which_configuration_there_is(recipe):
    assert type(parse(["--config", str(recipe)])[1]) is DGPOConfig
    assert type(parse([f"--config={recipe}", "--trainer=gpo"])[1]) is GPOConfig
    recipe.write_text(recipe.read_text() + "\ntrainer: gpo")
    script, args, _ = parse(["--config", str(recipe)])
    assert (script.trainer, type(args), args.loss_type) == ("gpo", GPOConfig, "linear")
    assert type(parse(["--config", str(recipe), "--trainer", "dgpo"])[1]) is DGPOConfig


def test_a_revision_reaches_the_loading(recipe):
    _, args, _ = parse(["--config", str(recipe), "--model_revision", "v2"])
    assert args.model_init_kwargs == {"revision": "v2"}


def test_a_lora_from_the_command_line_starts_as_the_trainers_own(recipe):
    _, _, model = parse(["--config", str(recipe), "--use_peft", "--lora_r", "8", "--lora_alpha", "4"])
    peft_config = cli._peft_config(model)
    assert (peft_config.r, peft_config.lora_alpha, peft_config.init_lora_weights) == (8, 4, "gaussian")
    assert peft_config.task_type is None
    assert cli._peft_config(parse(["--config", str(recipe)])[2]) is None


def test_a_recipes_lora_can_be_turned_off(recipe):
    recipe.write_text(recipe.read_text() + "\nuse_peft: true\nlora_r: 8")
    assert cli._peft_config(parse(["--config", str(recipe)])[2]).r == 8
    for off in (["--use_peft", "false"], ["--use-peft=false"]):
        assert cli._peft_config(parse(["--config", str(recipe), *off])[2]) is None


def test_a_lora_is_not_put_upon_a_lora(recipe, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = ["--use_peft", "true", "--model_name_or_path", tmp_path]
    assert "is a LoRA, from which training goes on" in error(capsys, "train", "--config", recipe, *flags)


@pytest.mark.parametrize(("flags", "dtype"), [(["--bf16", "true"], "bfloat16"), ([], "float32")])
def test_quantisation_computes_in_the_dtype_of_training(recipe, monkeypatch, flags, dtype):
    pytest.importorskip("bitsandbytes")
    given = {}
    monkeypatch.setattr("trl_dgpo.trainer.dgpo_trainer.DGPOTrainer", lambda **kwargs: given.update(kwargs))
    script, args, model = parse(["--config", str(recipe), "--load_in_4bit", "true", *flags])
    cli._build(script.trainer, args, model)
    assert given["quantization_config"].load_in_4bit
    assert given["quantization_config"].bnb_4bit_compute_dtype is getattr(torch, dtype)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bate", "7"], "There is no --bate 7: `trl-dgpo train --help`"),
        (["stray"], "There is no stray"),
        (["--beta", "0"], "`beta` is 0.0; it must be above 0."),
        (["--loss_type", "linear"], "`loss_type` is 'linear'; it must be one of 'surrogate', 'logsigmoid'"),
        (["--trainer", "ppo"], "`trainer` is 'ppo'; it must be one of 'dgpo', 'gpo'"),
        (["--dtype", "bfloat16"], "`dtype` is 'bfloat16', which cannot act here: .*set `bf16`"),
        (["--attn_implementation", "sdpa"], "`attn_implementation` is 'sdpa', which cannot act here"),
        (["--lora_modules_to_save", "proj_out"], "`lora_modules_to_save` is .*, which cannot act here"),
        (["--lora_r", "8"], r"\['lora_r'\] are set without `use_peft`"),
        (
            ["--reward_funcs", "nonsense"],
            "There is no reward 'nonsense'. Give a name .* ocr, .*ocr-recognition, pickscore",
        ),
        (["--reward_funcs", "json:nothing"], "'json' has no 'nothing'"),
        (["--reward_funcs", "no/such/file.py:f"], "There is no file 'no/such/file.py'"),
        (["--reward_funcs", "no.such.module:f"], "No module named 'no'"),
        (["--dataset_name", "none.txt"], "There is no file 'none.txt'"),
        (["--model_name_or_path", "/no/where"], "'/no/where' does not exist"),
        (["--resume_from_checkpoint", "true"], "There is no checkpoint in .*run' to resume from"),
        (["--resume_from_checkpoint", "/no/where"], "'/no/where', which is no folder"),
    ],
)
def test_a_mistake_is_one_line(recipe, capsys, flags, message):
    assert re.search(message, error(capsys, "train", "--config", recipe, *flags))
    assert not list((recipe.parent).glob("run/*.safetensors"))


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("model_name_or_path", "There is no model. Give --model_name_or_path: 'tiny', an id on the Hub"),
        ("dataset_name", "There are no prompts. Give --dataset_name: a set made here (counting, geneval, ocr,"),
        ("eval_dataset_name", "has no held-out prompts. Give --eval_dataset_name"),
        ("reward_funcs", "There is no reward. Give --reward_funcs a name (aesthetic, clip-score, counting,"),
    ],
)
def test_what_is_missing_is_asked_for(recipe, capsys, left_out, message):
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(f"{left_out}:")]
    recipe.write_text("\n".join(lines))
    assert message in error(capsys, "train", "--config", recipe)


@pytest.mark.parametrize(
    ("text", "message"), [("bate: 7", "There is no --bate 7"), ("a: [", "is not YAML"), ("- a", "must hold flags")]
)
def test_a_wrong_recipe_is_told(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_that_is_not_there(capsys):
    assert "No such file or directory: 'none.yaml'" in error(capsys, "train", "--config", "none.yaml")


def test_debugging_shows_the_traceback(recipe, monkeypatch):
    monkeypatch.setenv("TRL_DGPO_DEBUG", "1")
    with pytest.raises(ValueError, match=r"`beta` is 0\.0"):
        main(["train", "--config", str(recipe), "--beta", "0"])


# -- prompts and rewards ----------------------------------------------------------------------------------------------


def prompts(split="train", **fields):
    return cli._dataset(DGPOScriptArguments(**fields), split)


def test_made_prompts_are_held_out_by_themselves():
    train = prompts(dataset_name="tiny-ocr", num_prompts=50)
    test = prompts("test", dataset_name="tiny-ocr")
    assert (len(train), len(test)) == (50, 256)
    assert set(train.column_names) == {"prompt", "text"}
    assert not set(train["prompt"]) & set(test["prompt"])
    assert len(prompts(dataset_name="ocr", num_prompts=3)) == 3


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
def test_prompts_from_files(tmp_path, suffix):
    import pandas

    path = tmp_path / f"prompts.{suffix}"
    frame = pandas.DataFrame({"prompt": ["a", "b", "c"], "count": [1, 2, 3]})
    {
        "txt": lambda: path.write_text("a\n\n  b\nc\n"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    read = prompts(dataset_name=str(path))
    assert read["prompt"][:] == ["a", "b", "c"]
    assert suffix == "txt" or read["count"][:] == [1, 2, 3]
    assert len(prompts(dataset_name=str(path), num_prompts=2)) == 2
    assert len(prompts("test", dataset_name="ocr", eval_dataset_name=str(path), num_eval_prompts=9)) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_of_a_data_set_with_splits(tmp_path, streaming):
    for split, rows in {"train": "abc", "test": "de"}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"prompt": row}) for row in rows))
    source = {"dataset_name": str(tmp_path), "dataset_streaming": streaming}
    assert [row["prompt"] for row in prompts(**source)] == ["a", "b", "c"]
    assert [row["prompt"] for row in prompts("test", **source)] == ["d", "e"]
    assert [row["prompt"] for row in prompts(num_prompts=2, **source)] == ["a", "b"]
    assert [row["prompt"] for row in prompts(dataset_train_split="test", **source)] == ["d", "e"]


def test_rewards_by_their_three_names(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)  # an installed command does not look there by itself
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    builtin, small, by_colon, by_dot, by_file = cli._rewards(
        ["ocr", "ocr-recognition", "my_rewards:brightness", "my_rewards.brightness", "my_rewards.py:brightness"]
    )
    assert (builtin.recognition_only, small.recognition_only) == (False, True)
    assert by_colon is by_dot
    assert by_file([Image.new("RGB", (2, 2), "white")]) == [1.0]
    del sys.modules["my_rewards"]


# -- the commands -----------------------------------------------------------------------------------------------------


def test_train_then_evaluate_then_sample(recipe, capsys, tmp_path):
    assert main(["train", "--config", str(recipe), "--max_steps", "2", "--learning_rate", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "step 0    step 2" in printed
    run = tmp_path / "run"
    assert f"Everything is in {run}." in printed
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (run / name).is_file()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    # The saved run measures what its last evaluation measured, and so does its start.
    scores = {}
    for name, model in {"after": ["--model_name_or_path", str(run)], "before": []}.items():
        output = tmp_path / "numbers" / f"{name}.json"
        flags = [*model, "--output", str(output), "--output_dir", str(tmp_path / "none")]
        assert main(["evaluate", "--config", str(recipe), *flags]) == 0
        scores[name] = json.loads(output.read_text())["eval_reward"]
        assert f"{scores[name]:.3f}" in capsys.readouterr().out
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rewards = {entry["step"]: entry["eval_reward"] for entry in logged if "eval_reward" in entry}
    assert scores["before"] == pytest.approx(rewards[0], abs=1e-6)
    assert scores["after"] == pytest.approx(rewards[2], abs=1e-6)
    assert abs(scores["after"] - scores["before"]) > 1e-4

    pictures = tmp_path / "pictures"
    flags = ["--model_name_or_path", str(run), "--prompts", "d", "an e", "--num_images", "2"]
    assert main(["sample", "--config", str(recipe), *flags, "--output", str(pictures)]) == 0
    names = {"000-0.png", "000-1.png", "001-0.png", "001-1.png", "grid.png"}
    assert {path.name for path in pictures.iterdir()} == names
    assert Image.open(pictures / "001-1.png").size == (32, 32)
    assert (pictures / "000-0.png").read_bytes() != (pictures / "000-1.png").read_bytes()

    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "the run's folder was written to"
    assert not (tmp_path / "none").exists()

    # Training goes on from it, too.
    flags = ["--model_name_or_path", str(run), "--output_dir", str(tmp_path / "on")]
    assert main(["train", "--config", str(recipe), *flags]) == 0
    logged = [json.loads(line) for line in (tmp_path / "on" / "log.jsonl").read_text().splitlines()]
    assert next(entry["eval_reward"] for entry in logged) == pytest.approx(scores["after"], abs=1e-6)


def test_rollouts_are_collected_as_their_trainer_makes_them(recipe, capsys, tmp_path):
    # Flow-GRPO's stochastic steps are its own: with almost no noise they are nearly the ODE's.
    flags = ["--config", str(recipe), "--trainer", "flow_grpo", "--num_train_timesteps", "1"]
    x0 = {}
    for level in (1e-3, 0.7):
        folder = tmp_path / str(level)
        assert main(["collect", *flags, "--noise_level", str(level), "--output", str(folder)]) == 0
        x0[level] = torch.tensor(load_from_disk(folder)["x0"][:])
    folder = tmp_path / "ode"
    euler = ["--sampler", "euler", "--sigmas", "model", "--output", str(folder)]
    assert main(["collect", "--config", str(recipe), *euler]) == 0
    ode = torch.tensor(load_from_disk(folder)["x0"][:])
    assert (x0[1e-3] - ode).abs().max() < 0.02 < 0.2 < (x0[0.7] - ode).abs().max()
    capsys.readouterr()
    assert "rolls nothing out" in error(
        capsys, "collect", "--config", recipe, "--trainer", "diffusion_sft", "--num_generations", "1"
    )


def test_supervised_training_asks_for_pictures(recipe, capsys):
    told = error(capsys, "train", "--config", recipe, "--trainer", "diffusion_sft", "--num_generations", "1")
    assert "--rollouts_name" in told
    assert "leave out --reward_funcs" in told


def test_collected_rollouts_are_trained_on_by_every_method_that_can(recipe, capsys, tmp_path):
    rollouts = tmp_path / "made" / "rollouts"
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert main(["collect", *flags, "--num_rounds", "2", "--output", str(rollouts)]) == 0
    kept = load_from_disk(rollouts)
    assert len(kept) == 2 * 16
    told = f"32 rollouts are in {rollouts}; their mean reward is {sum(kept['reward']) / 32:.4f}."
    assert told in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert f"{str(rollouts)!r} is there already" in error(capsys, "collect", *flags, "--output", rollouts)
    assert "`num_rounds` is 0" in error(capsys, "collect", *flags, "--num_rounds", "0")

    # The recipe's reward scores the pictures anew; without one their own rewards count.
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("reward_funcs")]
    recipe.write_text("\n".join([*lines, f"eval_reward_funcs: {tmp_path / 'rewards.py'}:brightness"]))
    flags = ["--config", str(recipe), "--rollouts_name", str(rollouts), "--learning_rate", "0.01"]
    for trainer in ("dgpo", "gpo", "diffusion_dpo"):
        run = tmp_path / trainer
        assert main(["train", "--trainer", trainer, *flags, "--output_dir", str(run)]) == 0
        logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert any("eval_reward" in entry for entry in logged)
        assert (run / "pytorch_lora_weights.safetensors").is_file()
    capsys.readouterr()
    assert "`num_prompts`" in error(capsys, "train", *flags, "--num_prompts", "2")
    flags += ["--trainer", "diffusion_sft", "--num_generations", "1", "--output_dir", str(tmp_path / "sft")]
    assert main(["train", *flags]) == 0
    capsys.readouterr()
    told = error(capsys, "train", *flags, "--trainer", "flow_grpo", "--num_generations", "4")
    assert "Flow-GRPO learns from the course of its own sampling" in told


def test_a_recipe_of_two_weighted_rewards_is_evaluated_and_drawn(recipe, tmp_path):
    rewards = str(tmp_path / "rewards.py") + ":brightness"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("reward_funcs")]
    lines += [f"reward_funcs: [{json.dumps(rewards)}, jpeg-incompressibility]", "reward_weights: [2, 3]"]
    recipe.write_text("\n".join(lines))
    flags = ["--config", str(recipe)]
    output = tmp_path / "numbers.json"
    assert main(["evaluate", *flags, "--output", str(output)]) == 0
    weighted = json.loads(output.read_text())
    bright, size = (weighted[f"eval_rewards/{name}/mean"] for name in ("brightness", "jpeg_incompressibility"))
    assert weighted["eval_reward"] == pytest.approx(2 * bright + 3 * size)
    # Evaluation's own rewards have no weights, as in training; drawing has no rewards at all.
    own = ["--eval_reward_funcs", "jpeg-incompressibility"]
    assert main(["evaluate", *flags, *own, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["eval_reward"] == pytest.approx(500 * size)
    assert main(["sample", *flags, "--prompts", "d", "--output", str(tmp_path / "drawn")]) == 0
    suite = ["--suite", "ood", "--num_eval_prompts", "2", "--num_images", "1", "--rewards", rewards]
    assert main(["evaluate", *flags, *suite, "--output", str(tmp_path / "suite")]) == 0


def pictures_of(folder: Path) -> torch.Tensor:
    files = sorted(folder.glob("images/*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pipeline_folder) -> Path:
    """A run of two steps, large enough to be seen."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = tiny_trainer(folder / "run", model=str(pipeline_folder), learning_rate=0.1, max_steps=2)
    trainer.train()
    trainer.save_model()
    return folder / "run"


def suite(recipe, pipeline_folder, *flags) -> list[str]:
    """The flags of a small suite: four prompts, a reward in a file."""
    given = {
        "config": recipe,
        "model": pipeline_folder,
        "suite": "tiny-ocr",
        "output": recipe.parent / "suite",
        "num_eval_prompts": 4,
        "eval_num_steps": 2,
        "eval_guidance_scale": 4.5,
        "per_device_eval_batch_size": 1,
        "rewards": f"{recipe.parent}/rewards.py:brightness",
    }
    return [
        "evaluate",
        *(word for name, value in given.items() for word in (f"--{name}", str(value))),
        *map(str, flags),
    ]


def test_a_suite_compares_a_lora_with_its_base(recipe, pipeline_folder, trained, capsys, monkeypatch):
    from diffusers import DPMSolverMultistepScheduler

    from trl_dgpo import DGPOTrainer

    folder = recipe.parent / "suite"
    monkeypatch.setattr(DGPOTrainer, "end", None)  # it would part the processes, before the next model
    assert main(suite(recipe, pipeline_folder, "--lora", trained)) == 0
    printed = capsys.readouterr().out
    lines = [re.split("  +", line) for line in printed.splitlines()]
    assert ["4 prompts x 1", "base", "run", "run - base"] in lines
    results = json.loads((folder / "results.json").read_text())
    (name,) = results["models"]["run"]["rewards"]
    assert name.endswith("rewards.py:brightness")
    change = results["differences"]["run"]["rewards"][name]
    (line,) = [line for line in lines if line[0] == "rewards.py:brightness"]
    assert line[3] == f"{change['mean']:+.3f} [{change['interval'][0]:+.3f}, {change['interval'][1]:+.3f}]"
    assert abs(change["mean"]) > 1e-4

    # What was measured is what plain diffusers draws, with the LoRA and without it.
    prompts = [row["prompt"] for row in PROMPT_SETS["tiny-ocr"]("test", 4)]
    plain = tiny_random_pipeline()
    plain.scheduler = DPMSolverMultistepScheduler.from_pretrained(trained / "scheduler")

    def draw() -> torch.Tensor:
        settings = {"num_inference_steps": 2, "guidance_scale": 4.5, "height": 32, "width": 32}
        images = [
            plain(prompt, latents=latent[None], max_sequence_length=4, output_type="pt", **settings).images
            for prompt, latent in zip(prompts, evaluation_latents(prompts, 1, (4, 8, 8)), strict=True)
        ]
        return (torch.cat(images) * 255).round().to(torch.uint8)

    assert torch.equal(pictures_of(folder / "base"), draw())
    plain.load_lora_weights(trained)
    assert torch.equal(pictures_of(folder / "run"), draw())
    expected = torch.einsum("bchw,c->b", draw().double(), torch.tensor([0.299, 0.587, 0.114]).double()) / (255 * 1024)
    assert results["models"]["run"]["rewards"][name]["mean"] == pytest.approx(expected.mean().item(), abs=2e-3)

    # Another reward later draws nothing.
    monkeypatch.setattr(DGPOTrainer, "__init__", None)
    (recipe.parent / "more.py").write_text(
        "def redness(images, **kwargs): return [i.getpixel((0, 0))[0] for i in images]"
    )
    flags = [
        "--lora",
        trained,
        "--rewards",
        f"{recipe.parent}/rewards.py:brightness",
        f"{recipe.parent}/more.py:redness",
    ]
    assert main(suite(recipe, pipeline_folder, *flags)) == 0
    printed = capsys.readouterr().out
    assert "\nmore.py:redness " in printed
    assert f"\n{'  '.join(line)}" in re.sub("  +", "  ", printed)
    # Another setting does not go into the same folder, and neither does a LoRA that has changed since.
    told = error(capsys, *suite(recipe, pipeline_folder, "--lora", trained, "--eval_num_steps", 3))
    assert "holds another evaluation: eval_num_steps is 3, was 2" in told


@pytest.mark.parametrize("kept", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_lora_of_either_format_goes_onto_the_base_that_is_given(recipe, pipeline_folder, trained, tmp_path, kept):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/where"}))
    for name in {"adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json"} - {
        kept,
        "adapter_config.json" if kept == "adapter_model.safetensors" else "",
    }:
        (other / name).unlink()
    assert main(suite(recipe, pipeline_folder, "--lora", other)) == 0
    alone = [*suite(recipe, trained), "--output", str(tmp_path / "alone")]
    assert main(alone) == 0
    drawn = pictures_of(tmp_path / "suite" / "other")
    assert torch.equal(drawn, pictures_of(tmp_path / "alone" / "base"))
    assert not torch.equal(drawn, pictures_of(tmp_path / "suite" / "base"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "genval"], "There is no suite 'genval'; there are geneval, ocr"),
        (["--suite", "geneval", "--num_eval_prompts", "554"], "554"),
        (["--lora", "x/y"], "Only a suite makes use of `lora`. Give --suite"),
        (["--rewards", "ocr", "--num_images", "2"], "Only a suite makes use of `rewards`, `num_images`"),
        (["--suite", "ocr", "--lora", "/no/where"], "`lora` has '/no/where', which does not exist"),
        (["--suite", "ocr", "--lora", "x/y", "--full_finetuning", "true"], "`full_finetuning` is set"),
        (["--suite", "ocr", "--num_images", "0"], "1018 prompts of 0 images"),
        (["--suite", "ood", "--rewards", "counting"], "`counting` cannot be measured here"),
        (["--suite", "tiny-ocr", "--rewards", "math:sqrt"], "rewards are called by keyword"),
        (["--suite", "ocr", "--reward_funcs", "ocr"], r"`reward_funcs` cannot act with --suite.* Give --rewards"),
        (["--suite", "ocr", "--output", "recipe.yaml"], "'recipe.yaml' is a file, and a folder is wanted there"),
        (["--output", "."], "'.' is a folder; give a file's name"),
        (["--suite", "tiny-ocr", "--model", "/no/where"], "'/no/where' does not exist"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line(recipe, capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    if "--rewards" not in flags and "--suite" in flags:
        flags = [*flags, "--rewards", "rewards.py:brightness"]
    assert re.search(message, error(capsys, "evaluate", "--config", recipe, *flags))


def test_ctrl_c_has_its_exit_code(recipe, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    assert main(["evaluate", "--config", str(recipe)]) == 130
    assert capsys.readouterr().err == "trl-dgpo evaluate: interrupted\n"


def test_a_reward_that_raises_is_told_in_one_line(recipe, capsys):
    (recipe.parent / "broken.py").write_text("def broken(images, **kwargs): return 1 / 0")
    flags = ["--reward_funcs", f"{recipe.parent}/broken.py:broken", "--reward_self_test", "true"]
    assert "Reward `broken` raised ZeroDivisionError" in error(capsys, "train", "--config", recipe, *flags)


def test_a_reward_that_cannot_be_asked_is_told_before_anything_is_drawn(recipe, pipeline_folder, capsys, monkeypatch):
    (recipe.parent / "gone.py").write_text("def gone(images, **kwargs): import no_such_package")
    flags = ["--rewards", f"{recipe.parent}/gone.py:gone", "--reward_self_test", "true"]
    told = error(capsys, *suite(recipe, pipeline_folder, *flags))
    assert "No module named 'no_such_package'" in told
    assert not list((recipe.parent / "suite").rglob("*.png"))


def test_rewards_are_on_the_scale_of_their_use(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "get_reward", lambda name, normalize: asked.append((name, normalize)))
    monkeypatch.setattr(cli, "_build", lambda *args, **kwargs: sys.exit())
    flags = ["--config", str(recipe), "--reward_funcs", "jpeg-compressibility"]
    for argv in (["train", *flags, "--eval_reward_funcs", "pickscore"], ["evaluate", *flags]):
        with pytest.raises(SystemExit):
            main(argv)
    # What evaluates a run alone measures what the run's own evaluation does.
    assert asked == [("jpeg-compressibility", True), ("pickscore", False), ("jpeg-compressibility", True)]


def test_a_served_reward_has_an_address():
    from trl_dgpo.rewards import RemoteReward

    (reward,) = cli._rewards(["http://127.0.0.1:8000"])
    assert isinstance(reward, RemoteReward)


def test_a_reward_is_served_without_the_trainer():
    code = (
        "import sys\nfrom trl_dgpo import cli\nfrom trl_dgpo.rewards import remote\n"
        "remote.serve = lambda reward, **where: print(reward.__name__, where)\n"
        "cli.main(['serve-reward', 'ocr', '--port', '9'])\n"
        "print({'trl', 'diffusers', 'transformers', 'accelerate', 'datasets', 'peft', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ocr {'host': '127.0.0.1', 'port': 9}", "set()"]


def test_a_reward_that_cannot_be_served(capsys):
    assert "There is no reward 'nonsense'" in error(capsys, "serve-reward", "nonsense")


def test_training_goes_on(recipe, tmp_path):
    flags = ["--config", str(recipe), "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]
    weights = {}
    for name, rest in {
        "whole": ["--max_steps", "2"],
        "half": ["--max_steps", "1"],
        "resumed": ["--max_steps", "2", "--resume_from_checkpoint", "true"],
    }.items():
        output_dir = tmp_path / ("whole" if name == "whole" else "interrupted")
        assert main(["train", *flags, "--output_dir", str(output_dir), *rest]) == 0
        weights[name] = load_file(output_dir / "adapter_model.safetensors")
    assert all(torch.equal(weights["whole"][key], weights["resumed"][key]) for key in weights["whole"])
    assert not all(torch.equal(weights["whole"][key], weights["half"][key]) for key in weights["whole"])


def test_ctrl_c_saves_what_was_learned(recipe, capsys, tmp_path):
    flags = ["--reward_funcs", f"{tmp_path / 'rewards.py'}:interrupted", "--max_steps", "9", "--eval_strategy", "no"]
    # The second round's rewards are interrupted.
    assert main(["train", "--config", str(recipe), *flags]) == 130
    assert "Interrupted after 1 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(("dataset", "told"), [("user/prompts", "user/prompts"), ("tiny-ocr", None)])
def test_the_result_is_pushed(recipe, monkeypatch, dataset, told):
    from trl_dgpo import DGPOTrainer

    pushed = []
    monkeypatch.setattr(DGPOTrainer, "init_hf_repo", lambda self, *args: None)
    monkeypatch.setattr(DGPOTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(cli, "_dataset", lambda script, split: Dataset.from_dict({"prompt": ["a"]}))
    flags = ["--push_to_hub", "true", "--eval_strategy", "no", "--dataset_name", dataset]
    assert main(["train", "--config", str(recipe), *flags]) == 0
    assert pushed == [{"dataset_name": told}]


def test_what_was_trained_on_is_named_where_it_is_pushed(recipe, monkeypatch):
    from trl_dgpo import DGPOTrainer, rollout_dataset

    pushed, loaded = [], []
    saved = {
        "prompt": ["a"] * 4,
        "image": [Image.new("RGB", (32, 32), (n, 0, 0)) for n in range(4)],
        "reward": range(4),
    }
    monkeypatch.setattr(DGPOTrainer, "init_hf_repo", lambda self, *args: None)
    monkeypatch.setattr(DGPOTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(
        rollout_dataset, "load_rollouts", lambda name, split: loaded.append(name) or Dataset.from_dict(saved)
    )
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(("reward_funcs", "dataset_name"))]
    recipe.write_text("\n".join(lines))
    flags = ["--push_to_hub", "true", "--eval_strategy", "no", "--rollouts_name", "user/rollouts"]
    assert main(["train", "--config", str(recipe), *flags]) == 0
    assert loaded == ["user/rollouts"]
    assert pushed == [{"dataset_name": "user/rollouts"}]


def test_an_error_in_training_keeps_its_traceback(recipe, tmp_path):
    (tmp_path / "wrong.py").write_text("def wrong(images, **kwargs): return [1.0]")
    with pytest.raises(ValueError, match="`wrong` returned 1 values for 16 images"):
        main(
            ["train", "--config", str(recipe), "--eval_strategy", "no", "--reward_funcs", f"{tmp_path}/wrong.py:wrong"]
        )


def test_nothing_to_draw(recipe, capsys):
    assert "There is nothing to draw. Give --prompts" in error(capsys, "sample", "--config", recipe)
    flags = ["--prompts", "a", "--num_images", "0"]
    assert "`num_images` is 0; it must be at least 1" in error(capsys, "sample", "--config", recipe, *flags)


def test_report_is_written_where_it_is_told(tmp_path, monkeypatch, capsys):
    from trl_dgpo import report

    written = []
    monkeypatch.setattr(report, "write_report", lambda run, path: written.append((run, path)))
    assert main(["report", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path), "--output", "there.html"]) == 0
    assert written == [(tmp_path, tmp_path / "report.html"), (tmp_path, Path("there.html"))]
    assert "there.html" in capsys.readouterr().out
    assert "'nowhere' is not a folder" in error(capsys, "report", "nowhere")


def test_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trl_dgpo", "report", str(tmp_path / "none")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("trl-dgpo report: error:")


def test_not_resuming_can_be_said(tmp_path):
    from trl_dgpo.cli import _checkpoint

    config = DGPOConfig(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="false")
    assert _checkpoint(config) is False


# -- plans ------------------------------------------------------------------------------------------------------------


def plan(capsys, *argv) -> str:
    assert main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def train_command(printed: str) -> str:
    """The flags of the command at a plan's end, on one line."""
    return printed.split("\ntrl-dgpo train ")[1].split("\n\n")[0].replace("\\\n   ", "")


def test_a_plan_is_for_a_gpu_wherever_it_is_made(pipeline_folder, recipe, capsys):
    model = ["--model", pipeline_folder, "--resolution", 32]
    assert ": a LoRA in bfloat16, 32 x 32 pixels" in plan(capsys, *model)
    for float32 in (["--fp32"], ["--bf16", "false"]):
        assert ": a LoRA in float32" in plan(capsys, *model, *float32)
    assert "in bfloat16" in plan(capsys, "--config", recipe)
    recipe.write_text(recipe.read_text() + "\nbf16: false")
    assert "in float32" in plan(capsys, "--config", recipe)


def test_a_plan_is_text_of_a_terminals_width(pipeline_folder, capsys):
    printed = plan(capsys, "--model", pipeline_folder, "--resolution", 32, "--vram", 24)
    assert max(map(len, printed.replace(str(pipeline_folder), "model").splitlines())) <= 100
    assert "Fits 24 GiB" in printed
    assert printed.endswith("Computed from configurations, not measured: no run on a GPU has confirmed the total.\n")


def test_a_plan_ends_in_the_command_that_trains(recipe, capsys):
    given = ["--config", recipe, "--vram", 24, "--fp32", "--negative_prompt", "two words"]
    command = train_command(plan(capsys, *given))
    _, args, _ = parse(shlex.split(command))
    assert (args.negative_prompt, args.bf16, args.num_generations) == ("two words", False, CONFIG["num_generations"])
    assert "..." not in command


def test_a_plan_changes_flags_and_asks_for_those_that_are_missing(pipeline_folder, capsys):
    model = ["--model", pipeline_folder, "--resolution", 64, "--sample_batch_size=576", "--decode_batch_size", 1]
    roomy = plan(capsys, *model, "--vram", 24)
    assert "--sample_batch_size=576" in train_command(roomy)
    needed = float(re.search(r"Fits 24 GiB: needs ([\d.]+) GiB", roomy)[1])
    command = train_command(plan(capsys, *model, "--vram", needed - 0.05))
    (batch_size,) = re.findall(r"sample_batch_size.(\d+)", command)
    assert 0 < int(batch_size) < 576
    assert "--dataset_name ... --reward_funcs ..." in " ".join(command.split())  # wherever the line is broken
    nothing = plan(capsys, *model, "--vram", 1)
    assert "Does not fit 1 GiB" in nothing
    assert "trl-dgpo train" not in nothing


def test_a_plan_takes_the_recipes_trainer_and_its_own_lora(recipe, capsys):
    for trainer in ("dgpo", "gpo"):
        round_ = f"A round of {CONFIG['prompts_per_round']} x {CONFIG['num_generations']} images"
        assert round_ in plan(capsys, "--config", recipe, "--trainer", trainer)
    small = plan(capsys, "--config", recipe, "--use_peft", "--lora_r", 4)
    large = plan(capsys, "--config", recipe, "--use_peft", "--lora_r", 16)
    assert small != large


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "There is no model"),
        (["--model", "/no/where"], "'/no/where' does not exist"),
        (["--model", "tiny", "--resolution", "32", "--vram", "0"], "`vram` is 0.0; it is the GPU's memory in GiB"),
        (["--model", "tiny", "--resolution", "36"], "`resolution` is 36; this model takes multiples of"),
        (["--model", "tiny", "--load_in_8bit", "true"], "`load_in_8bit` is set; plans know"),
        (["--model", "tiny", "--vrma", "24"], "There is no --vrma 24: `trl-dgpo plan --help`"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line(capsys, flags, message):
    assert re.search(message, error(capsys, "plan", *flags))
