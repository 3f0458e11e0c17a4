"""
The papers' ablations on the tiny SD3, one seed each, against the spread of the comparison's three.

    python benchmarks/ablations.py --comparison outputs/comparison --output outputs/ablations
    python benchmarks/ablations.py --comparison outputs/comparison --output outputs/ablations --quick

Settings are the best of the comparison's search; one thing differs at a time. A difference counts where it is larger
than the spread of three seeds of the method at the same budget.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from results import Comparison, print_ablations
from runs import Run, estimate, in_processes, machine, take_all, write_json
from starts import STARTS, make_start, save_groups, save_signs


SEED = 1  # not the search's
DGPO_PAPER, GPO_PAPER = "2510.08425", "2505.11070"
NO_CLAIM = "no claim"


@dataclass(frozen=True)
class Row:
    """
    A line of a table.

    Args:
        block (`str`):
            Its table.
        run (`Run`):
            What is run.
        baseline (`str`):
            Name of the row of the same table that it is compared with; its own where it is one.
        claim (`str`):
            What the papers say of it.
        expected (`str`, *optional*):
            Sign of the difference that the claim means: `"+"`, `"-"` or `"0"`; `""` without a claim.
        by (`str`, *optional*, defaults to `"after"`):
            Whether what a run reached is compared (`"after"`), or what it gained (`"gain"`), where starts differ.
    """

    block: str
    run: Run
    baseline: str
    claim: str = NO_CLAIM
    expected: str = ""
    by: str = "after"


def dgpo_rows(dgpo: Run, dpo: Run) -> list[Row]:
    """DGPO's ablations (arXiv 2510.08425)."""
    vary = partial(_vary, dgpo)
    two_levels = {"num_train_timesteps": 2, "sampler": "euler"}
    steady = ("OpenReview jymuXl8GYi, authors: stable from 0.3 to 0.6", "0")
    claims = {
        0.0: (f"{DGPO_PAPER}: without the timestep clip OCR .96 falls to .95, and pictures blur", "-"),
        0.3: steady,
    }
    grid = [
        Row(
            f"DGPO, timestep clip, {steps} rollout steps",
            vary(f"t_min {t_min:g}", **two_levels, t_min=t_min, sample_num_steps=steps),
            "t_min 0.6",
            *claims.get(t_min, (NO_CLAIM, "")),
        )
        for steps in (6, 10)
        for t_min in (0.6, 0.0, 0.3, 0.8)
    ]
    sharpness = [
        Row("DGPO, beta", vary(f"beta {beta}", beta=float(beta)), "beta 100", *claim)
        for beta, claim in {
            100: (NO_CLAIM, ""),
            1: ("OpenReview jymuXl8GYi, authors: 1 is unstable", "-"),
            10: ("OpenReview jymuXl8GYi, authors: 10 to 1000 are fine", "0"),
            1000: ("OpenReview jymuXl8GYi, authors: 10 to 1000 are fine", "0"),
        }.items()
    ]
    block, base = "DGPO", "DGPO"
    return [
        Row(block, vary("DGPO"), base),
        Row(block, vary("SDE rollouts", sampler="sde"), base, f"{DGPO_PAPER}: worse than ODE rollouts", "-"),
        Row(block, vary("own noise of each image", shared_noise=False), base),
        Row(block, replace(vary("offline, own groups"), saved="tiny"), base, f"{DGPO_PAPER}: worse than online", "-"),
        Row(block, replace(vary("offline, a stronger model's groups"), saved="stronger"), base),
        Row(block, _vary(dpo, "online DPO"), base, f"{DGPO_PAPER}: worse than DGPO", "-"),
        Row(
            block, replace(_vary(dpo, "offline DPO"), saved="tiny"), base, f"{DGPO_PAPER}: worse than online DGPO", "-"
        ),
        *grid,
        *sharpness,
    ]


def gpo_rows(gpo: Run, dpo: Run, warm_budget: float) -> list[Row]:
    """GPO's ablations (arXiv 2505.11070)."""
    vary = partial(_vary, gpo)
    pairs = [
        Row("Pairs of Diffusion-DPO", _vary(dpo, f"{kind.upper()} pairs", pair_selection=kind), "ALL pairs", *claim)
        for kind, claim in {
            "all": (NO_CLAIM, ""),
            "max": (f"{GPO_PAPER}, figure 2: faster and better", "+"),
            "min": (f"{GPO_PAPER}, figure 2: worse", "-"),
        }.items()
    ]
    weights = [
        Row("GPO, weights", vary(name, scale_rewards=scale), "standardised", *claim)
        for name, scale, claim in (
            ("standardised", "group", (NO_CLAIM, "")),
            ("raw", "none", (f"{GPO_PAPER}: standardising keeps the weights' size, and is steadier", "-")),
            ("hard sign", "sign", (f"{GPO_PAPER}: grows unstable", "-")),
        )
    ]
    # 128 images a round, two passes of one update each.
    whole_round = {"updates_per_round": 1, "num_iterations": 2, "sample_batch_size": 64}
    sizes = [
        Row(
            "GPO, group size",
            vary(
                f"G {size}",
                num_generations=size,
                prompts_per_round=128 // size,
                per_device_train_batch_size=128,
                **whole_round,
            ),
            "G 32",
            *claim,
        )
        for size, claim in {
            32: (NO_CLAIM, ""),
            8: (f"{GPO_PAPER}: larger groups are steadier, at more memory", "-"),
            16: (f"{GPO_PAPER}: larger groups are steadier, at more memory", "-"),
            64: (f"{GPO_PAPER}: larger groups are steadier, at more memory", "+"),
            128: (f"{GPO_PAPER}: beyond 64 an open question", ""),
        }.items()
    ]
    levels = [
        Row(
            "GPO, levels",
            vary(name, sample_num_steps=10, num_train_timesteps=2, t_min=t_min, t_max=t_max),
            "all levels",
            *claim,
        )
        for name, t_min, t_max, claim in (
            ("all levels", 0.0, 1.0, (NO_CLAIM, "")),
            ("low noise only", 0.0, 0.5, (f"{GPO_PAPER}: oscillates", "-")),
            ("high noise only", 0.5, 1.0, (f"{GPO_PAPER}: converges, but slower", "-")),
        )
    ]
    reuse = [
        Row(
            "GPO, reuse of a round",
            vary(
                f"k {k}, tau {tau}",
                sample_num_steps=10,
                t_min=0.0,
                num_train_timesteps=k,
                num_iterations=tau,
                updates_per_round=1,
                per_device_train_batch_size=72,
            ),
            "k 5, tau 3",
            f"{GPO_PAPER} has k 5, tau 3, not optimised",
        )
        for k, tau in ((5, 3), (1, 1), (5, 1), (1, 15))
    ]
    # The linear loss's reference has no gradient: only the logsigmoid one can tell.
    references = [
        Row(
            "GPO, reference (logsigmoid: the linear loss reads none)",
            vary(kind, loss_type="logsigmoid", reference=kind),
            "refreshed",
            claim,
        )
        for kind, claim in (("refreshed", f"{GPO_PAPER} refreshes it every round"), ("frozen", NO_CLAIM))
    ]
    block = "GPO, data and reward"
    data = [
        Row(block, vary("GPO"), "GPO"),
        Row(block, replace(vary("offline, own groups"), saved="tiny"), "GPO", f"{GPO_PAPER}: online is better", "-"),
        Row(block, replace(vary("offline, a stronger model's groups"), saved="stronger"), "GPO"),
        Row(
            block,
            replace(vary("exact reward"), exact=True),
            "GPO",
            f"{GPO_PAPER}: rewards of 0 or 1 leave groups without variance, hence relaxed ones",
            "-",
        ),
    ]
    block, start = "GPO, capability", "GPO from noisy captions"
    warm = {kind: _warm(kind, warm_budget) for kind in ("tiny", "stopped")}
    capability = [
        Row(block, vary(start), start),
        Row(
            block,
            replace(vary("GPO from stopped early"), start="stopped"),
            start,
            f"{GPO_PAPER}: no improvement where the base lacks the capability",
            "-",
            by="gain",
        ),
        Row(block, warm["tiny"], warm["tiny"].name),
        Row(block, replace(vary("warm start, then GPO, from noisy captions"), start=warm["tiny"]), start),
        Row(block, warm["stopped"], warm["stopped"].name),
        Row(
            block,
            replace(vary("warm start, then GPO, from stopped early"), start=warm["stopped"]),
            "GPO from stopped early",
            f"{GPO_PAPER}: proposed as a cure, untested",
            "+",
        ),
    ]
    return [*pairs, *weights, *sizes, *levels, *reuse, *references, *data, *capability]


def _vary(run: Run, name: str, **config) -> Run:
    return replace(run, name=name, config={**run.config, **config})


def _warm(start: str, budget: float) -> Run:
    """Plain denoising of true signs."""
    config = {
        "sampler": "euler",
        "prompts_per_round": 32,
        "num_generations": 1,
        "per_device_train_batch_size": 32,
        "num_train_timesteps": 4,
        "learning_rate": 1e-3,
    }
    where = {"tiny": "noisy captions", "stopped": "stopped early"}[start]
    name = f"warm start alone, from {where}"
    return Run(name, "diffusion_sft", budget, budget / 2, config, SEED, start=start, saved="signs", keep=True)


def prepare(output: Path, workers: int, dgpo: Run, *, steps: dict[str, int | None], rounds: int) -> dict[str, dict]:
    """The other starts and the saved groups, unless they are there."""
    starts = {}
    for name, result in in_processes(partial(_make_start, output=output, steps=steps), list(STARTS), workers):
        if isinstance(result, str):
            raise RuntimeError(f"The start {name!r} could not be made:\n{result}")
        starts[name] = result
        print(f"start {name}: {result}", flush=True)
    config = {name: value for name, value in dgpo.config.items() if name != "learning_rate"}
    jobs: list[Callable[[], None]] = [
        partial(save_groups, start, output, rounds, config) for start in ("tiny", "stronger")
    ]
    for job, result in in_processes(_call, [*jobs, partial(save_signs, output)], workers):
        if isinstance(result, str):
            raise RuntimeError(f"{job} failed:\n{result}")
    return starts


def _make_start(name: str, output: Path, steps: dict[str, int | None]) -> dict[str, float]:
    return make_start(name, output, steps.get(name))


def _call(job: Callable[[], None]) -> None:
    job()


def write_record(
    output: Path, rows: list[Row], budget: float, starts: dict[str, dict], failures: list[str], *, quick: bool
) -> None:
    """Which runs are the ablations; what came of them is in their own files."""
    record = {
        "machine": machine(),
        "quick": quick,
        "budget": budget,
        "starts": starts,
        "rows": [
            {
                "block": row.block,
                "name": row.run.name,
                "key": row.run.key,
                "trainer": row.run.trainer,
                "baseline": row.baseline,
                "claim": row.claim,
                "expected": row.expected,
                "by": row.by,
            }
            for row in rows
        ],
        "failures": failures,
    }
    write_json(output / "ablations.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--comparison", type=Path, default=Path("outputs/comparison"), help="what compare.py wrote")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablations"), help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--budget", type=float, help="CPU seconds of a run (75)")
    parser.add_argument("--quick", action="store_true", help="one row of each table, tiny budgets")
    arguments = parser.parse_args()

    output, workers = arguments.output, arguments.workers
    budget = arguments.budget or (6.0 if arguments.quick else 75.0)
    best = Comparison(arguments.comparison).record["best"]
    taken = {
        name: Run(name, s["trainer"], budget, budget / 4, s["config"], SEED)
        for name, s in ((name, best[name]["settings"]) for name in ("dgpo", "gpo", "online_dpo"))
    }
    rows = [
        *dgpo_rows(taken["dgpo"], taken["online_dpo"]),
        *gpo_rows(taken["gpo"], taken["online_dpo"], warm_budget=budget / 2),
    ]
    if arguments.quick:
        rows = one_of_each_table(rows)
    runs = [row.run for row in rows]
    seconds = estimate(list({run.key: run for run in runs}.values()), workers) + 300 / workers
    print(f"{len(rows)} rows take about {seconds / 60:.0f} minutes with {workers} processes.", flush=True)
    steps = dict.fromkeys(STARTS, 10) if arguments.quick else {}
    starts = prepare(output, workers, taken["dgpo"], steps=steps, rounds=3 if arguments.quick else 40)
    failures = take_all([run for run in runs if run.keep], output, workers)
    failures += take_all([run for run in runs if not run.keep], output, workers)
    write_record(output, rows, budget, starts, failures, quick=arguments.quick)
    print_ablations(output, arguments.comparison)
    for line in failures:
        print("failed:", line)


def one_of_each_table(rows: list[Row]) -> list[Row]:
    """A table's baseline and one other row, and what that starts from."""
    kept: list[Row] = []
    for block in dict.fromkeys(row.block for row in rows):
        of = [row for row in rows if row.block == block]
        other = next(row for row in of if row.run.name != row.baseline)
        kept += [next(row for row in of if row.run.name == other.baseline), other]
    return kept


if __name__ == "__main__":
    main()
