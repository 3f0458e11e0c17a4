"""
A reward that is gamed, and what the guards say and when: the tiny SD3, rewarded for small JPEG files.

    python benchmarks/reward_hacking.py            # about 15 minutes on one core; it prints what it expects

Three runs of 100 steps with the settings of `examples/recipes/tiny_ocr.yaml`: rewarded for JPEG compressibility
without a KL term, at a third of the recipe's learning rate; 60 steps of the same with a KL that is held (`kl_target`);
and spelling, as in the recipe, in which no guard may speak. All are evaluated by spelling on held-out prompts; at the
first warning and at the end that is measured with the live weights, and pictures are drawn.

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
from runs import accuracy, be_quiet, commit, machine, pictures, reader, write_between, write_json
from transformers import PrinterCallback, TrainerCallback

from trl_dgpo import DGPOConfig, DGPOTrainer
from trl_dgpo.guards import MEMORY
from trl_dgpo.image_measures import NEAR, thumbnails
from trl_dgpo.policy import lora_config
from trl_dgpo.prompts.text import tiny_ocr_prompts
from trl_dgpo.rewards import JPEGCompressibility, OCRReward


ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "guards.md", ROOT / "docs" / "guards.png"
RECIPE = ROOT / "examples" / "recipes" / "tiny_ocr.yaml"
BEGIN, END = "<!-- written by benchmarks/reward_hacking.py -->", "<!-- until here -->"
NUM_EVAL_PROMPTS, SHOWN = 64, 6

STEPS = 100  # of the recipe's 300: the pictures are gone before
SLOW = {"learning_rate": 1e-3}  # at the recipe's 3e-3 they are gone within six rounds
HELD = {"kl_coef": 0.1, "kl_target": 0.01, "kl_target_rate": 1.0}
RUNS = {
    "JPEG size": ("jpeg", SLOW),
    "JPEG size, KL held": ("jpeg", {**SLOW, **HELD, "max_steps": 60}),
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

    def on_rollout(self, args, state, control, scored, **kwargs):
        if scored.round == 0:  # the base's pictures
            small, group = thumbnails(scored.images), scored.group_index
            others = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool)
            distances = (small[:, None] - small).square().mean(2).sqrt()
            self.seen["base"]["nearest"] = distances[others].min().item()

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


def folder_of(name: str, output: Path) -> Path:
    return output / name.replace(" ", "-").replace(",", "")


def take(name: str, output: Path, *, quick: bool) -> dict:
    """One run, in its folder."""
    reward, fields = RUNS[name]
    folder = folder_of(name, output)
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(RECIPE.read_text())
    settings = {name: value for name, value in recipe.items() if name in DGPOConfig.__dataclass_fields__}
    settings |= {"eval_steps": 20, "divergence_rounds": 5, "num_log_images": 0, "disable_tqdm": True}
    settings |= {"max_steps": STEPS, **fields}
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


def table(results: list[dict]) -> str:
    """One line a run."""
    lines = [
        "| run | steps | reward, first and last round | spelling before | first warning | spelling then | "
        "at the end | divergence at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        log, seen = result["log"], result["seen"]
        rewards = [entry["reward"] for entry in log if "reward" in entry]
        divergences = [entry["divergence"] for entry in log if "divergence" in entry]
        warned = seen.get("warned")
        step, then = (f"step {warned['step']}", f"{warned['ocr']:.3f}") if warned else ("none", "-")
        lines.append(
            f"| {result['name']} | {result['steps']} | {rewards[0]:.3f} to {rewards[-1]:.3f} | "
            f"{seen['base']['ocr']:.3f} | {step} | {then} | {seen['end']['ocr']:.3f} | {divergences[-1]:.4f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict], output: Path) -> None:
    """The first held-out prompts with one noise: the base, and of each run what was seen."""
    strips = [Image.open(folder_of(results[0]["name"], output) / "base.png")]
    for result in results:
        folder = folder_of(result["name"], output)
        strips += [Image.open(folder / f"{name}.png") for name in ("warned", "end") if name in result["seen"]]
    width, height, gap = strips[0].width, strips[0].height, 4
    picture = Image.new("RGB", (width, len(strips) * (height + gap) - gap), "white")
    for number, strip in enumerate(strips):
        picture.paste(strip, (0, number * (height + gap)))
    picture.resize((picture.width * 2, picture.height * 2), Image.NEAREST).save(PICTURES)


def rows_of_picture(results: list[dict]) -> str:
    names = ["the base model"]
    for result in results:
        seen = [("warned", "at the first warning"), ("end", "at the end")]
        names += [f"*{result['name']}* {words}" for name, words in seen if name in result["seen"]]
    return ", ".join(names)


def write_page(results: list[dict]) -> None:
    about = machine()
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers", "transformers", "peft", "trl"))
    curves = [
        "| run | reward | contrast | edges | saturation | held-out spelling | kl | kl_coef |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [curve(result, "reward"), *(curve(result, f"images/{name}") for name in ("contrast", "edges"))]
        cells += [curve(result, "images/saturation"), curve(result, "eval_reward")]
        cells += [curve(result, "kl", digits=4), curve(result, "kl_coef", digits=4)]
        curves.append(f"| {result['name']} | {' | '.join(cells)} |")
    said = "\n\n".join(
        f"*{result['name']}*, {len(result['messages'])} warnings"
        + (
            ":\n\n" + "\n".join(f"> {text}\n>" for text in result["messages"]).rstrip(">\n ")
            if result["messages"]
            else "."
        )
        for result in results
    )
    nearest = results[-1]["seen"]["base"]["nearest"]
    held = ", ".join(f"`{name}={value}`" for name, value in HELD.items())
    commits = ", ".join(dict.fromkeys(result["commit"] for result in results))
    written = f"""
{table(results)}

Spelling is OCR accuracy of {NUM_EVAL_PROMPTS} held-out prompts with the live weights. *KL held* has {held}.

The nearest two of the base's pictures of one prompt, in the first round, differ by
{255 * nearest:.0f} of 255 in their thumbnails; near duplicates by less than {255 * NEAR:.0f}.

![pictures of the runs](guards.png)

From above: {rows_of_picture(results)}; the same prompts and noise.

On the way, evenly over the steps (*held-out spelling* of the averaged weights, every 20 steps):

{chr(10).join(curves)}

What was said:

{said}

`python benchmarks/reward_hacking.py`, {about["date"]}, commit {commits}; {about["cpu"]}, one thread; {versions}.

"""
    write_between(PAGE, BEGIN, END, written)


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
        print(
            json.dumps({key: results[-1][key] for key in ("name", "steps", "seen", "messages")}, indent=1), flush=True
        )
    if not (arguments.quick or arguments.only):
        draw(results, output)
        write_page(results)


if __name__ == "__main__":
    main()
