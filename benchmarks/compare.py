"""
All methods on the tiny SD3: a search of learning rates and schedules, then three seeds of each method's best.

    python benchmarks/compare.py            # at most 90 minutes on two cores, about 85; it prints what it expects
    python benchmarks/compare.py --quick    # at most six minutes

Start, reward, prompts, LoRA and evaluation are the same for all (see `runs.py`). A method that is searched gets the
same five learning rates and three schedules:

- `matched`: six rollout steps of one grid, two levels of its noisy half, two updates a round, for every method;
- `short`: the same with four rollout steps;
- `own`: the levels that its authors train on.

The best two of each method, by the mean of the last two evaluations of a short run, are run for as long as the seeds
will be, since a rate that begins well may collapse later. The better one then goes on to three seeds, none of them the
search's, on held-out prompts that are not the search's either. GPO does so in its authors' levels too.
What is called *published* has its authors' settings and is not searched. The tiny model is sampled without guidance by
all, also where the authors guide.

`python benchmarks/results.py` makes the page from what this writes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from results import label, print_comparison, ranked
from runs import COMMON, Run, expected_seconds, machine, take_all, write_json


RATES = (3e-4, 1e-3, 2e-3, 3e-3, 6e-3)
SCHEDULES = ("matched", "short", "own")
SEARCH_SEED, SEEDS = 0, (1, 2, 3)

# Updates of a round of six groups of twelve, in whole groups.
_ONE_UPDATE = {"updates_per_round": 1, "per_device_train_batch_size": 72}
_TWO_UPDATES = {"updates_per_round": 2, "per_device_train_batch_size": 36}

# Three levels are left of either, and two are drawn.
_MATCHED = {"sample_num_steps": 6, "t_min": 0.6, "num_train_timesteps": 2, "num_iterations": 1, **_TWO_UPDATES}
_SHORT = {**_MATCHED, "sample_num_steps": 4, "t_min": 0.45}

_ODE = {"sampler": "euler"}
# What the prototype of this task found better for a policy gradient than the published settings.
_POLICY_GRADIENT = {"clip_range": 1e-3, "scale_rewards": "group"}
_TWO_SDE_STEPS = {**_POLICY_GRADIENT, "num_sde_steps": 2}
# The DPO baseline in Flow-GRPO's code; the configuration's 2000 keeps the policy nearer to the reference.
_PAIRS = {**_ODE, "beta": 100.0}

# Trainer, and what each schedule is to it.
METHODS = {
    "dgpo": (
        "dgpo",
        {
            "matched": {**_ODE, **_MATCHED},
            "short": {**_ODE, **_SHORT},
            "own": {**_ODE, "sample_num_steps": 10, "num_train_timesteps": 4, "t_min": 0.4, **_TWO_UPDATES},
        },
    ),
    "gpo": (
        "gpo",
        {
            "matched": {**_ODE, **_MATCHED},
            "short": {**_ODE, **_SHORT},
            # Five of all levels, three passes of one update.
            "own": {
                **_ODE,
                "sample_num_steps": 10,
                "num_train_timesteps": 5,
                "t_min": 0.0,
                "num_iterations": 3,
                **_ONE_UPDATE,
            },
        },
    ),
    "flow_grpo": (
        "flow_grpo",
        {
            "matched": {**_POLICY_GRADIENT, **_MATCHED},
            "short": {**_POLICY_GRADIENT, **_SHORT},
            # All steps but the last: the passes of a round walk each of them once, with an update for each.
            "own": {
                **_POLICY_GRADIENT,
                "sample_num_steps": 10,
                "num_train_timesteps": 1,
                "num_iterations": 9,
                **_ONE_UPDATE,
            },
        },
    ),
    "flow_grpo_fast": (
        "flow_grpo",
        {
            "matched": {**_TWO_SDE_STEPS, **_MATCHED},
            "short": {**_TWO_SDE_STEPS, **_SHORT},
            "own": {
                **_TWO_SDE_STEPS,
                "sample_num_steps": 10,
                "num_train_timesteps": 2,
                "t_min": 0.5,
                **_TWO_UPDATES,
            },
        },
    ),
    "online_dpo": (
        "diffusion_dpo",
        {
            "matched": {**_PAIRS, **_MATCHED},
            "short": {**_PAIRS, **_SHORT},
            "own": {**_PAIRS, "sample_num_steps": 10, "num_train_timesteps": 4, "t_min": 0.0, **_TWO_UPDATES},
        },
    ),
}

_FLOW_GRPO = {
    "prompts_per_round": 48,
    "num_generations": 24,
    "learning_rate": 3e-4,
    "scale_rewards": "batch",
    "updates_per_round": 2,
    "sample_num_steps": 10,
    "per_device_train_batch_size": 72,
}
# Trainer, what its authors released for OCR but for guidance, and the LoRA's rank and alpha.
PUBLISHED = {
    # arXiv 2510.08425, first mode of the released code.
    "dgpo_published": (
        "dgpo",
        {
            "prompts_per_round": 24,
            "num_generations": 24,
            "sampler": "euler",  # evaluations are by a run's own solver, which has to be the same in all
            "sample_num_steps": 10,
            "num_train_timesteps": 4,
            "t_min": 0.4,
            "learning_rate": 3e-4,
            "clip_range": 1e-3,
            "kl_coef": 1e-3,
            "beta": 100.0,
            "old_policy_after": 200,
            "per_device_train_batch_size": 72,
        },
        (64, 128),
    ),
    # arXiv 2505.05470.
    "flow_grpo_published": ("flow_grpo", {**_FLOW_GRPO, "clip_range": 1e-4, "kl_coef": 0.04}, (32, 64)),
    # Its fast form without guidance: three stochastic steps of the first half. The authors' have another form of
    # noise (CPS), which is not offered here.
    "flow_grpo_fast_published": (
        "flow_grpo",
        {**_FLOW_GRPO, "clip_range": 1e-5, "kl_coef": 0.0, "noise_level": 0.8, "num_sde_steps": 3, "t_min": 0.6},
        (32, 64),
    ),
}
# The papers' own comparison is with this one, which has not moved when the others are done.
LONGEST = "flow_grpo_published"
OWN_GPO = "gpo, own"  # the paper's


def search_runs(
    *, budget: float, rates: tuple[float, ...] = RATES, schedules: tuple[str, ...] = SCHEDULES
) -> list[Run]:
    """One short run a method, schedule and learning rate, evaluated at two thirds and at the end."""
    return [
        Run(
            name=f"{method}, {schedule}, {rate:g}",
            trainer=trainer,
            budget=budget,
            every=2 / 3 * budget,
            config={**configs[schedule], "learning_rate": rate},
            seed=SEARCH_SEED,
            evaluated_on="search",
        )
        for method, (trainer, configs) in METHODS.items()
        for schedule in schedules
        for rate in rates
    ]


def finalists(searched: list[Run], output: Path, *, number: int, budget: float) -> list[Run]:
    """The search's best of each method, and of GPO in its authors' levels, to be run for longer."""
    runs = [run for of in (*METHODS, OWN_GPO) for _, run in ranked(searched, output, of)[:number]]
    return list({run.key: replace(run, budget=budget, every=budget / 4) for run in runs}.values())


def best_runs(runs: list[Run], output: Path) -> dict[str, Run]:
    """Of each method the run that scored best."""
    best = {}
    for method in METHODS:
        if of := ranked(runs, output, method):
            best[method] = of[0][1]
        else:
            print(f"{method}: no run of the search ended, so it is not compared.")
    return best


def seed_runs(
    going_on: list[Run], seeds: tuple[int, ...], *, budget: float, longest: float, marks: int, **smaller
) -> list[Run]:
    """Methods at their best and at their published settings, with each seed; `smaller` is a reduced run's rounds."""
    searched = [replace(run, name=label(run.name), budget=budget, every=budget / marks) for run in going_on]
    published = []
    for method, (trainer, config, lora) in PUBLISHED.items():
        spent = longest if method == LONGEST else budget
        published.append(Run(method, trainer, spent, spent / marks, {**config, **smaller}, lora=lora))
    runs = [*searched, *published]
    return [replace(run, seed=seed, evaluated_on="report", ends=True) for seed in seeds for run in runs]


def write_record(
    output: Path,
    searched: list[Run],
    final: list[Run],
    best: dict[str, Run],
    taken: list[Run],
    failures: list[str],
    *,
    quick: bool,
) -> None:
    """Which runs are the comparison; what came of them is in their own files."""
    record = {
        "machine": machine(),
        "quick": quick,
        "common": COMMON,
        "rates": sorted({run.config["learning_rate"] for run in searched}),
        "search": [_entry(run) for run in searched],
        "finalists": [_entry(run) for run in final],
        "best": {method: _entry(run) for method, run in best.items()},
        "seeds": [_entry(run) for run in taken],
        "failures": failures,
    }
    write_json(output / "comparison.json", record)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/comparison, or -quick)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="few rates, one seed, tiny budgets")
    arguments = parser.parse_args(argv)

    if arguments.quick:
        searched = search_runs(budget=4.0, rates=(1e-3, 3e-3), schedules=("matched",))
        seeds, number = SEEDS[:1], 1
        long = {"budget": 8.0, "longest": 8.0, "marks": 1, "prompts_per_round": 6}
    else:
        searched = search_runs(budget=30.0)
        seeds, number, long = SEEDS, 2, {"budget": 120.0, "longest": 300.0, "marks": 10}
    output = arguments.output or Path("outputs/comparison-quick" if arguments.quick else "outputs/comparison")
    workers = arguments.workers
    some = [next(run for run in searched if run.name.startswith(f"{method},")) for method in [*METHODS, "gpo"]]
    longer = [replace(run, budget=long["budget"], every=long["budget"] / 4) for run in number * some] * (number > 1)
    seconds = sum(expected_seconds(runs, workers) for runs in (searched, longer, seed_runs(some, seeds, **long)))
    print(f"Search and seeds take about {seconds / 60:.0f} minutes with {workers} processes.", flush=True)

    failures, final = take_all(searched, output, workers), searched
    if number > 1:  # else there is nothing to choose
        final = finalists(searched, output, number=number, budget=long["budget"])
        failures += take_all(final, output, workers)
    best = best_runs(final, output)
    going_on = [*best.values(), *(run for _, run in ranked(final, output, OWN_GPO)[:1])]
    taken = seed_runs(list({run.key: run for run in going_on}.values()), seeds, **long)
    failures += take_all(taken, output, workers)
    write_record(output, searched, final, best, taken, failures, quick=arguments.quick)
    print_comparison(output)
    for line in failures:
        print("failed:", line)


def _entry(run: Run) -> dict:
    return {"name": run.name, "key": run.key, "seed": run.seed, "settings": run.settings}


if __name__ == "__main__":
    main()
