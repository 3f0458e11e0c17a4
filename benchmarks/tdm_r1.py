"""
A student of four steps: TDM-R1, and DGPO applied to it directly, on the tiny SD3.

    python benchmarks/tdm_r1.py            # at most 30 minutes on two cores; it prints what it expects
    python benchmarks/tdm_r1.py --quick    # at most four minutes, and no page

The bundled model in four Euler steps without guidance is the student. Start, reward, prompts, LoRA, evaluation and CPU
seconds are the same for all (see `runs.py`), the evaluation is in four steps too, and none of the seeds or prompts is
one that settings were chosen by. A third row is TDM-R1 with a surrogate that learns nothing: what of the gain is
distillation alone.

It writes `docs/few_steps.md` with `docs/few_steps.png`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from runs import COMMON, Run, be_quiet, eval_prompts, expected_seconds, machine, make_trainer, take_all, write_json


ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "few_steps.md", ROOT / "docs" / "few_steps.png"
SEEDS = (1, 2, 3)
BUDGET, MARKS = 150.0, 5
SHOWN = 8  # prompts in the picture

FOUR_STEPS = {"sample_num_steps": 4, "eval_num_steps": 4, "sampler": "euler"}
# Searched by hand, on other prompts and another seed; examples/recipes/tiny_tdm_r1.yaml has them too.
TDM_R1 = {
    **FOUR_STEPS,
    "updates_per_round": 2,
    "per_device_train_batch_size": 36,
    "num_train_timesteps": 2,
    "t_min": 0.45,
    "learning_rate": 2e-3,
    "fake_learning_rate": 2e-3,
    "surrogate_learning_rate": 3e-3,
    "beta": 10.0,
    "reward_weight": 0.9,
    "divergence_limit": None,
    "reward_guidance_scale": 1.0,  # guidance alone nearly solves this task, which would hide what the reward does
    "distill_guidance_scale": 1.0,
}
# What benchmarks/compare.py's search of four rollout steps has for it, at 2e-3.
DGPO = {
    **FOUR_STEPS,
    "updates_per_round": 2,
    "per_device_train_batch_size": 36,
    "num_train_timesteps": 2,
    "t_min": 0.45,
    "learning_rate": 2e-3,
}
NAMES = {"TDM-R1": ("tdm_r1", TDM_R1), "DGPO": ("dgpo", DGPO)}
CONTROL = "TDM-R1, surrogate frozen"

TEXT = """\
# Models of few steps: TDM-R1

A distilled model draws in four steps or so, and the losses of [the other methods](methods.md) teach it to denoise, which is not what its steps do. TDM-R1 ([2603.07700](https://huggingface.co/papers/2603.07700)) keeps the two apart: another model learns what is preferred, and the student learns from that one. `TDMR1Trainer` trains three LoRAs on one frozen model, the base:

| role | learns | from |
|---|---|---|
| `fake` | to denoise what the student draws | the latents that the student's steps lead to, noised on, and the clean latents that its steps point to |
| `surrogate` | what is preferred, by DGPO's group objective | the same latents, their groups' advantages, the base as the reference |
| the student (`default`) | to draw what the base and the surrogate would draw | base minus fake score (`kl`), what guidance adds (`cfg`), surrogate minus base (`reward`) |

The student alone is rolled out, evaluated and saved. It starts at the base, or from the LoRA that `model` brings, such as a distilled one; fake score and surrogate always start at the base.

```python
from trl_dgpo import TDMR1Config, TDMR1Trainer

trainer = TDMR1Trainer(
    model=pipeline,  # with the LoRA of a few-step student loaded into it
    reward_funcs=reward,
    args=TDMR1Config("outputs/tdm-r1"),
    train_dataset=prompts,
)
```

An update is three optimiser steps, one of each role, so that `max_steps`, `eval_steps` and `save_steps` count three times as many as DGPO's. Each has a learning rate of its own (`learning_rate`, the student's; `fake_learning_rate`; `surrogate_learning_rate`). `old` is the surrogate's fast average, `ema` the student's slow one. DDP is supported; DeepSpeed, FSDP2 and full fine-tuning are not.

An image costs K forwards for the rollout of K steps, and for each of M levels 3 for the fake score, 3 for the surrogate (4 with a clip) and 5 for the student, up to 7 with guidance. A backward of a LoRA counts as one.

## What is ours

- The level, and the step of the rollout that it is drawn for, is shared by all images of a pass.
- The surrogate's second clip (`divergence_limit`) looks at each sample's own divergence, not at the batch's mean, so that the division into micro-batches changes nothing.
- The latents of the rollout are kept in float32; the student's own prediction there needs no second forward.
- The scales by which the student's errors are divided are each sample's own.
- Images whose reward failed are masked in all three roles.
- Only text rendering's numbers are defaults. Nothing was run on SD3.5 here.

## On the tiny SD3

The student is the bundled model in four Euler steps without guidance. OCR accuracy of 96 held-out prompts with fixed noise, in four steps, before and after {seconds} CPU seconds of one thread:

{summary}

{table}

`on the way` are evaluations at equal distances. Images are those sampled; forwards are rows of the transformer, 2 with a gradient.

![before, TDM-R1, DGPO, TDM-R1 with a frozen surrogate](few_steps.png)

The first prompts under one noise, from above: before, TDM-R1, DGPO, TDM-R1 with a frozen surrogate; seed 1.

What became of the pictures, means over seeds: accuracy on texts of other kinds, mean difference of neighbouring pixels (blur lowers it) and mean distance of two pictures of one prompt:

{side_effects}

What it shows and what not:

{findings}

| | settings |
|---|---|
{settings}

Common to all: {common}.

`python benchmarks/tdm_r1.py`, {date}, commit {commit}; {cpu}, one thread a run; {versions}.
"""


def runs_of(seeds: tuple[int, ...], *, budget: float, marks: int) -> list[Run]:
    """Each method with each seed, and the control."""
    methods = {**NAMES, CONTROL: ("tdm_r1", {**TDM_R1, "surrogate_learning_rate": 0.0})}
    return [
        Run(name, trainer, budget, budget / marks, config, seed=seed, ends=True, keep=True)
        for seed in seeds
        for name, (trainer, config) in methods.items()
    ]


def rows_of(taken: list[Run], output: Path) -> list[dict]:
    """Numbers of each run that has ended."""
    rows = []
    for run in taken:
        result = run.result(output)
        if result is not None:
            first, last = result["marks"][0], result["marks"][-1]
            rows.append(
                {
                    "name": run.name,
                    "seed": run.seed,
                    "curve": [mark["ocr"] for mark in result["marks"]],
                    "gain": last["ocr"] - first["ocr"],
                    "exact": (first["exact"], last["exact"]),
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
        before, *way, after = (f"{value:.3f}" for value in row["curve"])
        lines.append(
            f"| {row['name']} | {row['seed']} | {before} | {' '.join(way)} | {after} | {row['gain']:+.3f} | "
            f"{row['exact'][0]:.2f} to {row['exact'][1]:.2f} | {row['cpu_s']:.0f} | {row['images']} | {row['steps']} | "
            f"{row['forwards'] / 1000:.1f} k |"
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


def draw(taken: list[Run], output: Path) -> None:
    """The first held-out prompts with one noise: before, and after each method's first run."""
    be_quiet()
    prompts = [row["prompt"] for row in eval_prompts("report")[:SHOWN]]
    first = {run.name: run for run in reversed(taken) if run.result(output) is not None}
    lines = []
    for start in (taken[0].start, *(first[name] for name in (*NAMES, CONTROL) if name in first)):
        trainer = make_trainer(replace(taken[0], start=start, keep=False), output, str(output / "drawn"))
        lines.append(torch.cat([*trainer.generate(prompts, view=None)], dim=-1))  # a new LoRA is no change
    pixels = torch.cat(lines, dim=-2).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(PICTURES)


def write_page(taken: list[Run], output: Path, failures: list[str]) -> None:
    rows, about = rows_of(taken, output), machine()
    gains = {name: [row["gain"] for row in rows if row["name"] == name] for name in (*NAMES, CONTROL)}
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
    PAGE.write_text(
        TEXT.format(
            summary=summary + failed,
            table=table(rows),
            side_effects=side_effects(rows),
            settings=settings,
            common=common,
            seconds=f"{BUDGET:.0f}",
            findings=FINDINGS,
            date=about["date"],
            commit=rows and json.loads(taken[0].file(output).read_text())["commit"],
            cpu=about["cpu"],
            versions=versions,
        )
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/tdm_r1, or -quick)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny budget, no page")
    arguments = parser.parse_args(argv)
    output = arguments.output or Path("outputs/tdm_r1-quick" if arguments.quick else "outputs/tdm_r1")
    small = {"seeds": SEEDS[:1], "budget": 20.0, "marks": 1}
    taken = runs_of(**(small if arguments.quick else {"seeds": SEEDS, "budget": BUDGET, "marks": MARKS}))
    print(f"About {expected_seconds(taken, arguments.workers) / 60:.0f} minutes.", flush=True)
    failures = take_all(taken, output, arguments.workers)
    rows = rows_of(taken, output)
    print(table(rows))
    write_json(output / "tdm_r1.json", {"machine": machine(), "rows": rows, "failures": failures})
    if rows and not arguments.quick:
        draw(taken, output)
        write_page(taken, output, failures)
    for line in failures:
        print("failed:", line)


if __name__ == "__main__":
    main()
