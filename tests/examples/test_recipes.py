"""The recipes are valid, say what was published, and train."""

import importlib.util
import json
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_models import tiny_random_pipeline

from trl_dgpo import DGPOConfig, GPOConfig
from trl_dgpo.backbones import load_backbone
from trl_dgpo.cli import main, parse
from trl_dgpo.noising import trainable_levels


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = {path.stem: path for path in sorted((EXAMPLES / "recipes").glob("*.yaml"))}

# One column a recipe, as published; what is the same for all is in `AUTHORS`.
PUBLISHED = {
    "sd35_ocr": {
        "num_generations": 16,
        "prompts_per_round": 8,
        "beta": 100,
        "kl_coef": 0.02,
        "clip_range": 1e-2,
        "scale_rewards": "batch",
        "t_min": 0.4,
        "old_policy_after": 201,
        "sample_guidance_scale": 4.5,
        "reference_guidance_scale": 1.0,
        "reference": "frozen",
        "eval_num_steps": 14,
    },
    "sd35_geneval": {
        "num_generations": 16,
        "prompts_per_round": 8,
        "beta": 100,
        "kl_coef": 0.02,
        "clip_range": 1e-2,
        "scale_rewards": "group",
        "t_min": 0.6,
        "old_policy_after": 501,
        "sample_guidance_scale": 4.5,
        "reference_guidance_scale": 1.0,
        "reference": "frozen",
        "eval_num_steps": 14,
    },
    "sd35_pickscore": {
        "num_generations": 24,
        "prompts_per_round": 8,
        "beta": 10,
        "kl_coef": 0.001,
        "clip_range": 5e-2,
        "scale_rewards": "batch",
        "t_min": 0.4,
        "old_policy_after": 201,
        "sample_guidance_scale": 4.5,
        "reference_guidance_scale": 1.0,
        "reference": "frozen",
        "eval_num_steps": 14,
    },
    "sd35_cfg_free_frozen": {
        "num_generations": 16,
        "prompts_per_round": 8,
        "beta": 100,
        "kl_coef": 0.001,
        "clip_range": 1e-5,
        "scale_rewards": "batch",
        "t_min": 0.4,
        "old_policy_after": 201,
        "sample_guidance_scale": 1.0,
        "reference_guidance_scale": 4.5,
        "reference": "frozen",
        "eval_num_steps": 10,
    },
    "sd35_cfg_free_old": {
        "num_generations": 16,
        "prompts_per_round": 8,
        "beta": 2000,
        "kl_coef": 0.001,
        "clip_range": 1e-5,
        "scale_rewards": "batch",
        "t_min": 0.4,
        "old_policy_after": 201,
        "sample_guidance_scale": 1.0,
        "reference_guidance_scale": 1.0,
        "reference": "old",
        "eval_num_steps": 10,
    },
    "sd35_paper": {
        "num_generations": 24,
        "prompts_per_round": 24,
        "beta": 100,
        "kl_coef": 0.02,
        "clip_range": None,
        "scale_rewards": "group",
        "t_min": 0.4,
        "timestep_sampling": "continuous",
        "prompt_dropout": 0.05,
        "old_policy_after": 200,
        "sample_guidance_scale": 4.5,
        "reference": "frozen",
        "eval_num_steps": 40,
        "advantage_clip": None,
    },
}
AUTHORS = {
    "loss_type": "surrogate",
    "num_train_timesteps": 4,
    "sample_num_steps": 10,
    "sampler": "dpm",
    "resolution": 512,
    "width": 512,
    "max_sequence_length": 128,
    "negative_prompt": "",
    "num_iterations": 1,
    "updates_per_round": 1,
    "advantage_clip": 5.0,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "seed": 42,
    "full_finetuning": False,
}
# Of other papers, or ours.
OTHERS = {"sd35_gpo", "sd35_flow_grpo", "sd35_diffusion_dpo", "sd35_pickapic", "sd35_tdm_r1"}
OTHERS |= {"sdxl_pickscore", "flux_pickscore", "z_image_pickscore"}
# Of the comparison's search: method and schedule.
COMPARED = {"tiny_flow_grpo": ("flow_grpo", "short"), "tiny_diffusion_dpo": ("online_dpo", "short")}
# What the recipe leaves to the command line.
PICKSCORE = ("sd35_pickscore", "sdxl_pickscore", "flux_pickscore", "z_image_pickscore")
REST = dict.fromkeys(PICKSCORE, ("--dataset_name", "prompts.txt"))
# By the first part of a recipe's name.
MODELS = {
    "tiny": "tiny",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "flux": "black-forest-labs/FLUX.1-dev",
    "z": "Tongyi-MAI/Z-Image-Turbo",
}


def read(name: str, *flags: str):
    return parse(["--config", str(RECIPES[name]), *flags])


def config(name: str) -> DGPOConfig:
    return read(name)[1]


def kept_levels(args: DGPOConfig) -> int:
    """Levels of the rollout's grid that are trained on: the random pipeline has SD3.5's scheduler."""
    backbone = load_backbone(tiny_random_pipeline(), sampler=args.sampler, sigmas=args.sigmas)
    return len(trainable_levels(backbone.sigmas(args.sample_num_steps), args.t_min, backbone.shift_factor))


def test_there_are_the_recipes_that_were_promised():
    ours = {"tiny_ocr", "tiny_ocr_jpeg", "tiny_gpo", "tiny_tdm_r1", "tiny_sdxl"}
    assert RECIPES.keys() == PUBLISHED.keys() | OTHERS | COMPARED.keys() | ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    args = config(name)
    expected = AUTHORS | PUBLISHED[name]
    assert {field: getattr(args, field) for field in expected} == expected
    assert type(args) is DGPOConfig
    assert args.eval_guidance_scale == args.sample_guidance_scale


def test_rounds_and_levels_are_those_of_the_authors():
    images = {name: (args := config(name)).prompts_per_round * args.num_generations for name in RECIPES}
    assert images == {
        "sd35_ocr": 128,
        "sd35_geneval": 128,
        "sd35_pickscore": 192,
        "sd35_cfg_free_frozen": 128,
        "sd35_cfg_free_old": 128,
        "sd35_paper": 576,
        "sd35_gpo": 256,
        "sd35_flow_grpo": 1152,
        "sd35_diffusion_dpo": 192,
        "sd35_pickapic": 512,
        "sd35_tdm_r1": 1152,
        "tiny_ocr": 72,
        "tiny_ocr_jpeg": 72,
        "tiny_gpo": 72,
        "tiny_flow_grpo": 72,
        "tiny_diffusion_dpo": 72,
        "sdxl_pickscore": 192,
        "flux_pickscore": 192,
        "z_image_pickscore": 192,
        "tiny_sdxl": 32,
        "tiny_tdm_r1": 72,
    }
    # trunc_steps is the last index that is kept: 6 and 4.
    on_grid = {name: kept_levels(config(name)) for name in ("sd35_ocr", "sd35_geneval", "sd35_pickscore", "sd35_gpo")}
    assert on_grid == {"sd35_ocr": 7, "sd35_geneval": 5, "sd35_pickscore": 7, "sd35_gpo": 10}
    # Whole groups for each of the authors' four processes.
    assert all(config(name).prompts_per_round % 4 == 0 for name in RECIPES if not name.startswith("tiny"))


def test_gpo_is_the_papers_where_it_names_a_number():
    args = config("sd35_gpo")
    named = {"num_generations": 32, "num_train_timesteps": 5, "num_iterations": 3, "t_min": 0.0}
    assert {name: getattr(args, name) for name in named} == named
    assert (type(args), args.reference, args.kl_coef, args.clip_range) == (GPOConfig, "refreshed", 0.0, None)


def test_flow_grpo_is_the_authors():
    args = config("sd35_flow_grpo")
    named = {"num_generations": 24, "prompts_per_round": 48, "updates_per_round": 2, "clip_range": 1e-4}
    named |= {"kl_coef": 0.04, "scale_rewards": "batch", "noise_level": 0.7, "num_train_timesteps": 9, "t_min": 0.0}
    named |= {"sample_num_steps": 10, "sample_guidance_scale": 4.5, "sigmas": "model", "learning_rate": 3e-4}
    assert {name: getattr(args, name) for name in named} == named
    header = RECIPES["sd35_flow_grpo"].read_text()
    words = next(line for line in header.splitlines() if "--num_sde_steps" in line).split("... ")[1].split()
    _, fast, _ = read("sd35_flow_grpo", *words)
    assert (fast.num_train_timesteps, fast.reference_guidance_scale, fast.clip_range) == (3, 1.0, 1e-5)
    assert (fast.kl_coef, fast.noise_level, fast.t_min) == (0.0, 0.8, 0.5)


def test_tdm_r1_is_the_authors():
    args = config("sd35_tdm_r1")
    ours = {"output_dir", "run_name", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"}
    ours |= {"eval_strategy", "eval_steps", "do_eval", "save_steps", "save_total_limit", "save_strategy"}
    ours.add("train_batch_size")  # DDPO's name of the first
    default = type(args)(output_dir="x", prompts_per_round=48)  # whose defaults are theirs
    differing = {f.name for f in fields(args) if getattr(args, f.name) != getattr(default, f.name)}
    assert differing <= ours
    assert args.max_steps % args.steps_per_round == 0


def test_the_tiny_tdm_r1_is_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    benchmark, runs = (importlib.import_module(module) for module in ("tdm_r1", "runs"))
    _, args, model = read("tiny_tdm_r1")
    expected = runs.COMMON | benchmark.GUIDED
    assert {field: getattr(args, field) for field in expected} == expected
    assert (model.lora_r, model.lora_alpha) == runs.Run("", "", 0.0, 0.0).lora


def test_pairs_of_people_need_no_reward():
    script, args, _ = read("sd35_pickapic")
    assert (script.reward_funcs, script.rollouts_name) == (None, "yuvalkirstain/pickapic_v2")
    assert (args.num_generations, args.beta, args.pair_selection) == (2, 2000.0, "max")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_its_model_and_what_it_lacks(name):
    script, args, model = read(name, *REST.get(name, ()))
    # The small SDXL is where the example leaves it.
    expected = "outputs/sdxl-tiny/base" if name == "tiny_sdxl" else MODELS[name.partition("_")[0]]
    assert model.model_name_or_path == expected
    assert script.dataset_name or script.rollouts_name
    assert script.reward_funcs or script.rollouts_name
    if name in REST:
        assert read(name)[0].dataset_name is None
    assert args.output_dir.startswith("outputs/")
    outputs = [config(other).output_dir for other in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_two_rewards_are_the_one_and_another():
    alone, both = (read(name) for name in ("tiny_ocr", "tiny_ocr_jpeg"))
    differing = {f.name for f in fields(alone[1]) if getattr(alone[1], f.name) != getattr(both[1], f.name)}
    assert differing <= {"output_dir", "run_name", "reward_weights", "multi_objective_aggregation"}
    assert len(both[0].reward_funcs) == len(both[1].reward_weights) == 2


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("tiny")])
def test_a_recipe_says_where_its_numbers_are_from(name):
    header = RECIPES[name].read_text().split("\ntrainer:")[0]
    assert "Not run here on the real weights" in header
    assert f"--config examples/recipes/{name}.yaml" in header
    assert "github.com/Luo-Yihong/DGPO" in header or name in OTHERS
    assert "Here: " in header or name in OTHERS
    assert all(line.startswith("#") or not line for line in header.splitlines())


@pytest.mark.parametrize("trainer", ["dgpo", "gpo"])
def test_the_tiny_recipes_are_the_examples(trainer, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_sd35_ocr", EXAMPLES / "train_sd35_ocr.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_sd35_ocr", example)
    spec.loader.exec_module(example)
    monkeypatch.setattr("sys.argv", ["train_sd35_ocr.py", "--trainer", trainer])
    theirs = example.parse()[2]
    _, ours, model = read({"dgpo": "tiny_ocr", "gpo": "tiny_gpo"}[trainer])
    differing = {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert differing <= {"output_dir", "run_name"}
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 32, 0.0)


@pytest.mark.parametrize("name", COMPARED)
def test_the_tiny_baselines_are_the_comparisons(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    compare, runs = (importlib.import_module(module) for module in ("compare", "runs"))
    method, schedule = COMPARED[name]
    _, args, model = read(name)
    expected = runs.COMMON | compare.METHODS[method][1][schedule]
    assert {field: getattr(args, field) for field in expected} == expected
    assert args.learning_rate in compare.RATES
    assert (model.lora_r, model.lora_alpha) == runs.Run("", "", 0.0, 0.0).lora


def test_a_recipe_trains_and_writes_its_outputs(tmp_path, capsys):
    pipeline = tmp_path / "pipeline"
    tiny_random_pipeline().save_pretrained(pipeline)
    (tmp_path / "rewards.py").write_text("def red(images, **kwargs): return [i.getpixel((0, 0))[0] for i in images]")
    flags = {
        "model_name_or_path": pipeline,
        "reward_funcs": f"{tmp_path / 'rewards.py'}:red",
        "output_dir": tmp_path / "run",
        "num_prompts": 8,
        "num_eval_prompts": 4,
        "max_steps": 2,
        "eval_steps": 2,
        "prompts_per_round": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
    }
    words = [str(word) for flag in flags.items() for word in (f"--{flag[0]}", flag[1])]
    assert main(["train", "--config", str(RECIPES["tiny_ocr"]), *words]) == 0
    assert "4 held-out images" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written >= {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["init_lora_weights"]) == (16, 32, "gaussian")
