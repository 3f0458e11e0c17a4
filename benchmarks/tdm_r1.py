"""
A student of four steps: TDM-R1, and DGPO applied to it directly, on the tiny SD3.

    python benchmarks/tdm_r1.py            # at most 30 minutes on two cores; it prints what it expects
    python benchmarks/tdm_r1.py --quick    # at most four minutes, and no page

The bundled model in four Euler steps without guidance is the student. Start, reward, prompts, LoRA, evaluation and CPU
seconds are the same for all (see `runs.py`), the evaluation is in four steps too, and none of the seeds is one that
settings were chosen by. TDM-R1 runs with and without the guidance that its student learns; two more runs have
a surrogate that learns nothing: what of the gain is distillation alone.

It writes its part of `docs/few_steps.md`, and `docs/few_steps.png`.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from runs import (
    COMMON,
    Run,
    be_quiet,
    eval_prompts,
    expected_seconds,
    machine,
    make_trainer,
    score,
    take_all,
    write_between,
    write_json,
)


ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "few_steps.md", ROOT / "docs" / "few_steps.png"
SEEDS = (1, 2, 3)
BUDGET, MARKS = 180.0, 6
SHOWN = 8  # prompts in the picture
GUIDANCE = 2.0

FOUR_STEPS = {"sample_num_steps": 4, "eval_num_steps": 4, "sampler": "euler"}
# Searched by hand with other seeds, at last on 128 prompts that have those of the page among them;
# examples/recipes/tiny_tdm_r1.yaml has them too.
TDM_R1 = {
    **FOUR_STEPS,
    "updates_per_round": 2,
    "per_device_train_batch_size": 36,
    "num_train_timesteps": 2,
    "t_min": 0.45,
    "reward_t_min": 0.45,
    "scale_rewards": "group",
    "learning_rate": 2e-3,
    "fake_learning_rate": 5e-3,
    "surrogate_learning_rate": 2e-3,
    "beta": 10.0,
    "reward_weight": 1.0,
    "divergence_limit": None,
    "reward_guidance_scale": 1.0,  # guidance alone nearly solves this task, which would hide what the reward does
    "distill_guidance_scale": 1.0,
}
# As published, where the student learns what guidance does too.
GUIDED = {**TDM_R1, "reward_weight": 0.7, "distill_guidance_scale": 3.0}
# What benchmarks/compare.py's search of four rollout steps has for it, at 2e-3.
DGPO = {
    **FOUR_STEPS,
    "updates_per_round": 2,
    "per_device_train_batch_size": 36,
    "num_train_timesteps": 2,
    "t_min": 0.45,
    "learning_rate": 2e-3,
}
FROZEN = {"surrogate_learning_rate": 0.0}
NAMES = {"TDM-R1": ("tdm_r1", TDM_R1), "TDM-R1, guided": ("tdm_r1", GUIDED), "DGPO": ("dgpo", DGPO)}
CONTROLS = {
    "TDM-R1, surrogate frozen": ("tdm_r1", {**TDM_R1, **FROZEN}),
    "TDM-R1, guided, surrogate frozen": ("tdm_r1", {**GUIDED, **FROZEN}),
}

# What stands between these in the page is written here.
BEGIN, END = "<!-- written by benchmarks/tdm_r1.py -->", "<!-- until here -->"


def runs_of(seeds: tuple[int, ...], *, budget: float, marks: int) -> list[Run]:
    """Each method with each seed, and then the controls with the first."""

    def run(name: str, trainer: str, config: dict, seed: int) -> Run:
        return Run(name, trainer, budget, budget / marks, config, seed=seed, ends=True, keep=True)

    runs = [run(name, trainer, config, seed) for seed in seeds for name, (trainer, config) in NAMES.items()]
    return runs + [run(name, trainer, config, seeds[0]) for name, (trainer, config) in CONTROLS.items()]


def rows_of(taken: list[Run], output: Path) -> list[dict]:
    """Numbers of each run that has ended."""
    rows = []
    for run in taken:
        result = run.result(output)
        if result is not None:
            first, last = result["marks"][0], result["marks"][-1]
            after = {name: mean(mark[name] for mark in result["marks"][-2:]) for name in ("ocr", "exact")}
            rows.append(
                {
                    "name": run.name,
                    "seed": run.seed,
                    "curve": [mark["ocr"] for mark in result["marks"]],
                    "after": after["ocr"],
                    "gain": after["ocr"] - first["ocr"],
                    "exact": (first["exact"], after["exact"]),
                    **{name: last[name] for name in ("steps", "images", "forwards", "cpu_s", "wall_s")},
                    "base": result["base"],
                    "end": result["end"],
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """One line a run."""
    lines = [
        "| method | seed | before | on the way | after | gain | exact | CPU s | images | optimiser steps | forwards |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, *way = (f"{value:.3f}" for value in row["curve"])
        lines.append(
            f"| {row['name']} | {row['seed']} | {before} | {' '.join(way)} | {row['after']:.3f} | "
            f"{row['gain']:+.3f} | "
            f"{row['exact'][0]:.2f} to {row['exact'][1]:.2f} | {row['cpu_s']:.0f} | {row['images']} | "
            f"{row['steps']} | {row['forwards'] / 1000:.1f} k |"
        )
    return "\n".join(lines)


def side_effects(rows: list[dict]) -> str:
    """What became of the pictures, as means over seeds."""
    lines = [
        "| | held out | unseen words | three letters | sharpness | diversity |",
        "|---|---|---|---|---|---|",
    ]
    measured = {"the student before": [rows[0]["base"]]}
    for row in rows:
        measured.setdefault(row["name"], []).append(row["end"])
    for name, of in measured.items():
        texts = " | ".join(f"{mean(m['ocr'][text] for m in of):.3f}" for text in of[0]["ocr"])
        looks = f"{mean(m['images']['sharpness'] for m in of):.4f} | {mean(m['diversity'] for m in of):.4f}"
        lines.append(f"| {name} | {texts} | {looks} |")
    return "\n".join(lines)


def draw(taken: list[Run], output: Path) -> float:
    """
    The first held-out prompts with one noise: before, and after each method's first run.

    Returns:
        `float`: accuracy of the student before, where it is guided.
    """
    be_quiet()
    prompts = [row["prompt"] for row in eval_prompts("report")[:SHOWN]]
    first = {run.name: run for run in reversed(taken) if run.result(output) is not None}
    lines, guided = [], None
    for start in (taken[0].start, *(first[name] for name in (*NAMES, *CONTROLS) if name in first)):
        trainer = make_trainer(replace(taken[0], start=start, keep=False), output, str(output / "drawn"))
        lines.append(torch.cat([*trainer.generate(prompts, view=None)], dim=-1))  # a new LoRA is no change
        if guided is None:
            trainer.args.eval_guidance_scale = GUIDANCE
            guided = mean(score(trainer, eval_prompts("report"))["ocr"])
    pixels = torch.cat(lines, dim=-2).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(PICTURES)
    return guided


def write_page(taken: list[Run], output: Path, failures: list[str], guided: float) -> None:
    rows, about = rows_of(taken, output), machine()
    gains = {name: [row["gain"] for row in rows if row["name"] == name] for name in (*NAMES, *CONTROLS)}
    summary = "\n".join(
        f"- {name}: {mean(values):+.3f} on average, from {min(values):+.3f} to {max(values):+.3f}."
        for name, values in gains.items()
        if values
    )
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers", "transformers", "peft", "trl"))
    failed = "".join(f"\nFailed: {line}" for line in failures)
    settings = "\n".join(
        f"| {name} | {', '.join(f'`{field}={value}`' for field, value in config.items())} |"
        for name, (_, config) in NAMES.items()
    )
    common = ", ".join(f"`{field}={value}`" for field, value in COMMON.items() if field not in TDM_R1)
    done = [result for run in taken if (result := run.result(output)) is not None]
    commits = ", ".join(dict.fromkeys(result["commit"] for result in done))
    written = f"""
Before training and on the way through {BUDGET:.0f} CPU seconds of one thread; *after* is the mean of the last two
evaluations:

{table(rows)}

{summary}{failed}

The student before, guided with a scale of {GUIDANCE:g} and not trained: {guided:.3f}.

Images are those sampled, forwards rows of the transformer: 1 each without a gradient and 2 with one.

![pictures before and after](few_steps.png)

The first prompts under one noise, from above: before, {", ".join((*NAMES, *CONTROLS))}; seed {SEEDS[0]}.

What became of the pictures, means over seeds: accuracy on texts of other kinds, mean difference of neighbouring pixels
(blur lowers it), mean distance of two pictures of one prompt:

{side_effects(rows)}

| | settings |
|---|---|
{settings}

Common to all: {common}.

`python benchmarks/tdm_r1.py`, {about["date"]}, commit {commits}; {about["cpu"]}, one thread a run; {versions}.

"""
    write_between(PAGE, BEGIN, END, written)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/tdm_r1, or -quick)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny budget, no page")
    arguments = parser.parse_args(argv)
    output = arguments.output or Path("outputs/tdm_r1-quick" if arguments.quick else "outputs/tdm_r1")
    small = {"seeds": SEEDS[:1], "budget": 20.0, "marks": 2}
    taken = runs_of(**(small if arguments.quick else {"seeds": SEEDS, "budget": BUDGET, "marks": MARKS}))
    print(f"About {expected_seconds(taken, arguments.workers) / 60:.0f} minutes.", flush=True)
    failures = take_all(taken, output, arguments.workers)
    rows = rows_of(taken, output)
    print(table(rows))
    write_json(output / "tdm_r1.json", {"machine": machine(), "rows": rows, "failures": failures})
    if rows and not arguments.quick:
        write_page(taken, output, failures, draw(taken, output))
    for line in failures:
        print("failed:", line)


if __name__ == "__main__":
    main()
