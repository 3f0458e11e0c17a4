"""
All methods on the tiny SD3: a search of learning rates and level subsets, then three seeds of each method's best.

    python benchmarks/compare.py --output outputs/comparison            # at most an hour on two cores
    python benchmarks/compare.py --output outputs/comparison --quick    # at most six minutes

Start, reward, prompts, LoRA and evaluation are the same for all (see `runs.py`). A method that is searched gets the
same five learning rates and two choices of levels:

- `matched`: six rollout steps of one grid, two levels of its noisy half, two updates a round, for every method;
- `own`: the levels that its authors train on.

The best by the mean of the last two evaluations of a short run goes on to three seeds, none of them the search's.
`flow_grpo_published` and `flow_grpo_fast_published` have their authors' settings and are not searched. The tiny model
is sampled without guidance by all, also where the authors guide.

`python benchmarks/results.py` makes the page from what this writes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from results import best_settings, print_comparison
from runs import COMMON, Run, estimate, machine, take_all, write_json


RATES = (3e-4, 1e-3, 2e-3, 3e-3, 6e-3)
SEARCH_SEED, SEEDS = 0, (1, 2, 3)

# Two updates a round: three groups of twelve each.
_TWO_UPDATES = {"updates_per_round": 2, "per_device_train_batch_size": 36}
_ONE_UPDATE = {"updates_per_round": 1, "per_device_train_batch_size": 72}
_MATCHED = {"sigmas": "dpm", "sample_num_steps": 6, "num_train_timesteps": 2, "t_min": 0.6, **_TWO_UPDATES}
_ODE = {"sampler": "euler", **_MATCHED, "num_iterations": 1}
# Settings of a policy gradient that the prototype of this task found better than the published ones.
_POLICY_GRADIENT = {"clip_range": 1e-3, "scale_rewards": "group"}

# The DPO baseline in Flow-GRPO's code; the configuration's 2000 keeps the policy nearer to the reference.
_PAIRS = {"beta": 100.0}

# Trainer, and what each choice of levels is to it.
METHODS = {
    "dgpo": (
        "dgpo",
        {
            "matched": _ODE,
            "own": {
                "sampler": "euler",
                "sample_num_steps": 10,
                "num_train_timesteps": 4,
                "t_min": 0.4,
                **_TWO_UPDATES,
            },
        },
    ),
    "gpo": (
        "gpo",
        {
            "matched": _ODE,
            # Five of all levels, three passes of one update.
            "own": {
                "sampler": "euler",
                "sample_num_steps": 10,
                "num_train_timesteps": 5,
                "num_iterations": 3,
                **_ONE_UPDATE,
            },
        },
    ),
    "flow_grpo": (
        "flow_grpo",
        {
            "matched": {**_POLICY_GRADIENT, **_MATCHED},
            # All steps but the last; an update for each is much better here than one for all.
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
            "matched": {**_POLICY_GRADIENT, **_MATCHED, "num_sde_steps": 2},
            "own": {
                **_POLICY_GRADIENT,
                "sample_num_steps": 10,
                "num_sde_steps": 2,
                "num_train_timesteps": 2,
                "t_min": 0.5,
                **_TWO_UPDATES,
            },
        },
    ),
    "online_dpo": (
        "diffusion_dpo",
        {
            "matched": {**_ODE, **_PAIRS},
            "own": {
                **_PAIRS,
                "sampler": "euler",
                "sample_num_steps": 10,
                "num_train_timesteps": 4,
                "t_min": 0.0,
                **_TWO_UPDATES,
            },
        },
    ),
}

# Flow-GRPO's released configuration for OCR (arXiv 2505.05470), but for guidance. Its fast form has the same numbers
# with two stochastic steps.
_PUBLISHED = {
    "prompts_per_round": 48,
    "num_generations": 24,
    "learning_rate": 3e-4,
    "clip_range": 1e-4,
    "kl_coef": 0.04,
    "scale_rewards": "batch",
    "updates_per_round": 2,
    "sample_num_steps": 10,
    "per_device_train_batch_size": 72,
}
PUBLISHED = {
    "flow_grpo_published": _PUBLISHED,
    "flow_grpo_fast_published": {**_PUBLISHED, "num_sde_steps": 2, "t_min": 0.5},
}


def search_runs(*, budget: float, every: float, rates: tuple[float, ...], choices: tuple[str, ...]) -> list[Run]:
    """One short run a method, choice of levels and learning rate."""
    return [
        Run(
            name=f"{method}, {choice}, {rate:g}",
            trainer=trainer,
            budget=budget,
            every=every,
            config={**levels[choice], "learning_rate": rate},
            seed=SEARCH_SEED,
        )
        for method, (trainer, levels) in METHODS.items()
        for choice in choices
        for rate in rates
    ]


def seed_runs(
    best: dict[str, Run], seeds: tuple[int, ...], *, budget: float, published_budget: float, every: float
) -> list[Run]:
    """Every method at its best or published settings, with each seed."""
    searched = [replace(run, name=method, budget=budget, every=every) for method, run in best.items()]
    published = [
        Run(method, "flow_grpo", published_budget, 4 * every, config, lora=(32, 64))
        for method, config in PUBLISHED.items()
    ]
    return [replace(run, seed=seed, ends=True) for seed in seeds for run in [*searched, *published]]


def write_record(
    output: Path, searched: list[Run], best: dict[str, Run], taken: list[Run], failures: list[str], *, quick: bool
) -> None:
    """Which runs are the comparison; what came of them is in their own files."""
    record = {
        "machine": machine(),
        "quick": quick,
        "common": COMMON,
        "search": [_entry(run) for run in searched],
        "best": {method: _entry(run) for method, run in best.items()},
        "seeds": [_entry(run) for run in taken],
        "failures": failures,
    }
    write_json(output / "comparison.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--budget", type=float, help="CPU seconds of a seed's run (150)")
    parser.add_argument("--quick", action="store_true", help="few rates, one seed, tiny budgets")
    arguments = parser.parse_args()

    if arguments.quick:
        search = {"budget": 4.0, "every": 2.0, "rates": (1e-3, 3e-3), "choices": ("matched",)}
        seeds, final = SEEDS[:1], {"budget": arguments.budget or 15.0, "published_budget": 15.0, "every": 7.5}
    else:
        budget = arguments.budget or 150.0
        search = {"budget": 0.3 * budget, "every": 0.1 * budget, "rates": RATES, "choices": ("matched", "own")}
        # Published settings get longer, for they have not moved when the others are done.
        seeds, final = SEEDS, {"budget": budget, "published_budget": 8 / 3 * budget, "every": budget / 12}
    output, workers = arguments.output, arguments.workers
    searched = search_runs(**search)
    any_best = {method: next(run for run in searched if run.name.startswith(f"{method},")) for method in METHODS}
    seconds = estimate(searched, workers) + estimate(seed_runs(any_best, seeds, **final), workers)
    print(f"Search and seeds take about {seconds / 60:.0f} minutes with {workers} processes.", flush=True)

    failures = take_all(searched, output, workers)
    best = best_settings(searched, output, list(METHODS))
    taken = seed_runs(best, seeds, **final)
    failures += take_all(taken, output, workers)
    write_record(output, searched, best, taken, failures, quick=arguments.quick)
    print_comparison(output)
    for line in failures:
        print("failed:", line)


def _entry(run: Run) -> dict:
    return {"name": run.name, "key": run.key, "seed": run.seed, "settings": run.settings}


if __name__ == "__main__":
    main()
