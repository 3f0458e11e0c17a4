"""
A reward that is gamed, and what the guards say and when: the tiny SD3, rewarded for small JPEG files.

    python benchmarks/reward_hacking.py            # about 15 minutes on one core; it prints what it expects

Three runs with the settings of `examples/recipes/tiny_ocr.yaml`: rewarded for JPEG compressibility without a KL term;
the same with a KL that is held (`kl_target`); and the recipe itself, spelling, in which no guard may speak. Spelling on
held-out prompts is what all are evaluated by; at the first warning and at the end it is measured with the live
weights, and pictures are drawn.

It writes its part of `docs/guards.md`, and `docs/guards.png`. A run that is there is not taken again.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import mean

import datasets
import torch
import yaml
from PIL import Image
from runs import accuracy, be_quiet, commit, machine, pictures, reader, write_json
from transformers import PrinterCallback, TrainerCallback

from trl_dgpo import DGPOConfig, DGPOTrainer
from trl_dgpo.guards import MEMORY
from trl_dgpo.policy import lora_config
from trl_dgpo.prompts.text import tiny_ocr_prompts
from trl_dgpo.rewards import JPEGCompressibility, OCRReward


ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "guards.md", ROOT / "docs" / "guards.png"
RECIPE = ROOT / "examples" / "recipes" / "tiny_ocr.yaml"
BEGIN, END = "<!-- written by benchmarks/reward_hacking.py -->", "<!-- until here -->"
NUM_EVAL_PROMPTS, SHOWN = 64, 6

JPEG_STEPS = 120
HELD = {"kl_coef": 0.1, "kl_target": 0.01, "kl_target_rate": 1.0}
RUNS = {
    "JPEG size": ("jpeg", {"max_steps": JPEG_STEPS}),
    "JPEG size, KL held": ("jpeg", {"max_steps": JPEG_STEPS, **HELD}),
    "spelling": ("ocr", {}),
}


class Watch(TrainerCallback):
    """
    Spelling and pictures of the live weights at the first warning about pictures, and at the end.

    Args:
        output (`Path`):
            Folder of the pictures.
    """

    def __init__(self, output: Path):
        self.output, self.trainer = output, None
        self.seen: dict[str, dict[str, float]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.stateful_callbacks[MEMORY]["told"] and "warned" not in self.seen:
            self.look("warned", None)

    def look(self, name: str, view: str | None) -> None:
        rows = tiny_ocr_prompts("test", NUM_EVAL_PROMPTS)
        images = self.trainer.generate([row["prompt"] for row in rows], view=view)
        spelled = accuracy(reader().read(pictures(images)), [row["text"] for row in rows])
        self.seen[name] = {"step": self.trainer.state.global_step, "ocr": mean(spelled["ocr"])}
        strip = torch.cat([*images[:SHOWN]], dim=-1).permute(1, 2, 0).numpy()
        Image.fromarray(strip).save(self.output / f"{name}.png")


class Messages(logging.Handler):
    """Keeps what the guards say."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def take(name: str, output: Path, *, quick: bool) -> dict:
    """One run, in its folder."""
    reward, fields = RUNS[name]
    folder = output / name.replace(" ", "-").replace(",", "")
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(RECIPE.read_text())
    settings = {name: value for name, value in recipe.items() if name in DGPOConfig.__dataclass_fields__}
    settings |= {"eval_steps": 20, "divergence_rounds": 5, "num_log_images": 0, "disable_tqdm": True, **fields}
    if quick:
        settings |= {"max_steps": 4, "eval_steps": 2, "divergence_rounds": 1}
    lora = lora_config(())
    lora.r, lora.lora_alpha, lora.target_modules = recipe["lora_r"], recipe["lora_alpha"], None
    spelling = OCRReward(recognition_only=True, num_workers=1)
    watch, messages = Watch(folder), Messages()
    logging.getLogger("trl_dgpo.guards").addHandler(messages)
    trainer = DGPOTrainer(
        model="tiny",
        reward_funcs=spelling if reward == "ocr" else JPEGCompressibility(),
        args=DGPOConfig(**{**settings, "output_dir": str(folder / "run")}),
        train_dataset=datasets.Dataset.from_list(tiny_ocr_prompts("train")),
        eval_dataset=datasets.Dataset.from_list(tiny_ocr_prompts("test", NUM_EVAL_PROMPTS)),
        eval_reward_funcs=spelling,
        callbacks=[watch],
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    watch.trainer = trainer
    watch.look("base", "base")
    trainer.train()
    watch.look("end", None)
    logging.getLogger("trl_dgpo.guards").removeHandler(messages)
    result = {
        "name": name,
        "commit": commit(),
        "steps": trainer.state.global_step,
        "seen": watch.seen,
        "messages": messages.texts,
        "log": trainer.state.log_history,
    }
    write_json(file, result)
    return result


def curve(result: dict, name: str, *, digits: int = 3, points: int = 7) -> str:
    """Some of a run's values of a name in the log, evenly over its steps."""
    values = [(entry["step"], entry[name]) for entry in result["log"] if name in entry]
    shown = [values[round(n * (len(values) - 1) / (points - 1))] for n in range(points)] if values else []
    return " ".join(f"{value:.{digits}f}" for _, value in dict(shown).items()) if shown else "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/reward_hacking, or -quick)")
    parser.add_argument("--quick", action="store_true", help="four steps a run, no page")
    parser.add_argument("--only", choices=list(RUNS), help="this run alone, no page")
    arguments = parser.parse_args(argv)
    output = arguments.output or Path("outputs/reward_hacking-quick" if arguments.quick else "outputs/reward_hacking")
    be_quiet()
    print(f"About {1 if arguments.quick else 15} minutes.", flush=True)
    results = []
    for name in [arguments.only] if arguments.only else RUNS:
        results.append(take(name, output, quick=arguments.quick))
        print(json.dumps({key: results[-1][key] for key in ("name", "steps", "seen", "messages")}, indent=1), flush=True)
    if not (arguments.quick or arguments.only):
        draw(output)
        write_page(results)


if __name__ == "__main__":
    main()
