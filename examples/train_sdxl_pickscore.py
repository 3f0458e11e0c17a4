"""
Raise a UNet's PickScore, or any reward, with DGPO: Stable Diffusion XL, and 1.5 by the same script.

    python examples/train_sdxl_pickscore.py        # a small UNet of SDXL's structure: minutes on two CPU cores
    python examples/train_sdxl_pickscore.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt

The small model draws signs without meaning, and PickScore's weights are 4 GB: there the reward is how red a picture
is. On real weights this script has not been run yet; its settings are `recipes/sdxl_pickscore.yaml` but
for model, prompts, rewards and LoRA, which are this script's. Every field of `DGPOConfig` is a flag too, and overrides
the recipe.
"""

import os
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path


# Threads that spin while they wait for one another lose most of their time where anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import numpy as np
import transformers
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser

from trl_dgpo import DGPOConfig, DGPOTrainer
from trl_dgpo.evaluation import image_grid
from trl_dgpo.prompts import geneval_prompts, ood_prompts, tiny_ocr_prompts
from trl_dgpo.prompts.files import read_prompts
from trl_dgpo.rewards import PickScore


RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ScriptArguments:
    model: str = field(default="tiny", metadata={"help": "'tiny', or a Hub id or folder of a pipeline."})
    prompts: str | None = field(
        default=None, metadata={"help": "File of training prompts, one a line; GenEval's kind if not given."}
    )
    num_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts."})
    tiny_steps: int = field(default=300, metadata={"help": "Optimiser steps in which the small UNet is made, once."})


def redness(images, **kwargs) -> list[float]:
    """How much redder than green and blue a picture is, from -1 to 1."""
    pixels = [np.asarray(image, dtype=np.float32).mean((0, 1)) / 255 for image in images]
    return [float(red - (green + blue) / 2) for red, green, blue in pixels]


def main() -> int:
    start = time.perf_counter()
    script, args = parse()
    tiny = script.model == "tiny"
    if tiny:
        model = Path(args.output_dir) / "base"
        if not (model / "model_index.json").is_file():
            from tiny_sdxl import build_tiny_sdxl

            print(f"Making a small UNet of SDXL's structure in {model}.")
            build_tiny_sdxl(model, num_steps=script.tiny_steps)
        train_dataset = Dataset.from_list(tiny_ocr_prompts("train", 2000))
        eval_dataset = Dataset.from_list(tiny_ocr_prompts("test", script.num_eval_prompts))
        rewards = {"reward_funcs": redness}
    else:
        model = script.model
        train_dataset = read_prompts(Path(script.prompts)) if script.prompts else Dataset.from_list(geneval_prompts())
        eval_dataset = Dataset.from_list(ood_prompts("test", min(script.num_eval_prompts, 88)))
        rewards = {"reward_funcs": PickScore(normalize=True), "eval_reward_funcs": PickScore()}
    rank = 16 if tiny else 64
    trainer = DGPOTrainer(
        model=str(model),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=None
        if args.full_finetuning
        else LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian"),
        **rewards,
    )
    shown = eval_dataset["prompt"][:8]
    pictures = {"before": trainer.generate(shown, view=None)}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        pictures["after"] = trainer.generate(shown)
        image_grid(pictures, shown).save(Path(args.output_dir) / "before_after.png")
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        first, last = evaluations[0], evaluations[-1]
        print(f"\n{first['eval_num_images']} held-out images, fixed noise    before    after")
        for label, key in {
            f"reward ({trainer.eval_scorer.names[0]})": "eval_reward",
            "  its standard error": "eval_reward_stderr",
            "contrast": "eval_images/contrast",
            "colour spread": "eval_images/colour_spread",
        }.items():
            print(f"  {label:<32} {first[key]:8.3f} {last[key]:8.3f}")
        print(f"{time.perf_counter() - start:.0f} s in all. Everything is in {args.output_dir}.")
    return 0


def parse() -> tuple[ScriptArguments, DGPOConfig]:
    """The recipe of the model, with the command line's flags over it."""
    chooser = HfArgumentParser(ScriptArguments, add_help=False)
    script, _ = chooser.parse_args_into_dataclasses(return_remaining_strings=True)
    name = "tiny_sdxl" if script.model == "tiny" else "sdxl_pickscore"
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    names = {of_config.name for of_config in fields(DGPOConfig)}  # model, prompts and LoRA are the script's
    parser = HfArgumentParser((ScriptArguments, DGPOConfig))
    parser.set_defaults(**{key: value for key, value in recipe.items() if key in names}, disable_tqdm=False)
    return parser.parse_args_into_dataclasses()


if __name__ == "__main__":
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # of loading; training has its own
    sys.exit(main())
