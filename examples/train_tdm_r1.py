"""
Reinforcement learning of a model that draws in a few steps, with TDM-R1 and a text reader as the reward.

    python examples/train_tdm_r1.py      # the bundled tiny SD3 in four steps: minutes on two CPU cores
    python examples/train_tdm_r1.py --model stabilityai/stable-diffusion-3.5-medium --student path/to/distilled/lora

Every field of `TDMR1Config` is a flag too, and overrides the recipe. Nothing was run on real weights yet.
"""

import os
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path


# Threads that spin while they wait for one another lose most of their time where anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import transformers
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser

from trl_dgpo import TDMR1Config, TDMR1Trainer
from trl_dgpo.evaluation import image_grid
from trl_dgpo.evaluation.models import load_with_lora
from trl_dgpo.prompts import ocr_prompts, tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward


RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ScriptArguments:
    model: str = field(default="tiny", metadata={"help": "'tiny', or a Hub id or folder of a flow-matching pipeline."})
    student: str | None = field(
        default=None,
        metadata={"help": "LoRA with which the model draws in few steps; the model itself starts if not given."},
    )
    num_prompts: int = field(default=20_000, metadata={"help": "Training prompts."})
    num_eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts."})


def main() -> int:
    start = time.perf_counter()
    script, args = parse()
    tiny = script.model == "tiny"
    make_prompts = tiny_ocr_prompts if tiny else ocr_prompts
    eval_dataset = Dataset.from_list(make_prompts("test", script.num_eval_prompts))
    model, peft_config = script.model, None
    if script.student is not None:
        model = load_with_lora(script.model, script.student)  # which the LoRAs beside it take their shape from
    elif tiny:
        peft_config = LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian")
    trainer = TDMR1Trainer(
        model=model,
        reward_funcs=OCRReward(recognition_only=tiny),
        args=args,
        train_dataset=Dataset.from_list(make_prompts("train", script.num_prompts)),
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    shown = eval_dataset.select(range(min(8, len(eval_dataset))))
    pictures = {"before": trainer.generate(shown["prompt"], view=None)}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        pictures["after"] = trainer.generate(shown["prompt"])
        image_grid(pictures, shown["text"]).save(Path(args.output_dir) / "before_after.png")
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        first, last = evaluations[0], evaluations[-1]
        title = f"{first['eval_num_images']} held-out images in {args.eval_num_steps} steps, fixed noise"
        print(f"\n{title:<48}   before    after")
        for label, key in {
            "OCR accuracy": "eval_rewards/ocr/mean",
            "  its standard error": "eval_reward_stderr",
            "exact match": "eval_ocr/exact_match",
            "contrast": "eval_images/contrast",
            "colour spread": "eval_images/colour_spread",
        }.items():
            print(f"  {label:<45} {first[key]:8.3f} {last[key]:8.3f}")
        print(f"{time.perf_counter() - start:.0f} s in all. Everything is in {args.output_dir}.")
    return 0


def parse() -> tuple[ScriptArguments, TDMR1Config]:
    """The recipe of the model, with the command line's flags over it."""
    chooser = HfArgumentParser(ScriptArguments, add_help=False)
    script, _ = chooser.parse_args_into_dataclasses(return_remaining_strings=True)
    name = "tiny_tdm_r1" if script.model == "tiny" else "sd35_tdm_r1"
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    names = {of_config.name for of_config in fields(TDMR1Config)}  # model, prompts and LoRA are the script's
    parser = HfArgumentParser((ScriptArguments, TDMR1Config))
    parser.set_defaults(**{key: value for key, value in recipe.items() if key in names}, disable_tqdm=False)
    return parser.parse_args_into_dataclasses()


if __name__ == "__main__":
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # of loading; training has its own
    sys.exit(main())
