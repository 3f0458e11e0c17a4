"""
The papers' ablations on the tiny SD3, one seed each, against the spread of the comparison's three.

    python benchmarks/ablations.py            # at most 90 minutes on two cores, about 45; it prints what it expects
    python benchmarks/ablations.py --quick    # at most six minutes, from compare.py --quick

Settings are the best of the comparison's search, its learning rate included; one thing differs at a time. A difference
counts where it is larger than the spread of three seeds of the method at the same budget.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from results import Comparison, print_ablations
from runs import BUNDLED, Run, Saved, Start, expected_seconds, in_processes, machine, take_all, write_json
from starts import make_saved, make_start, starts


SEED = 1  # not the search's
DGPO_PAPER, GPO_PAPER = "2510.08425", "2505.11070"
AUTHORS = "OpenReview jymuXl8GYi, authors, as digested"
OFF_THE_CLOCK = "(whose rollouts are on the clock, while a saved group's are not)"
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
            Sign of the difference that the claim means: `"+"`, `"-"` or `"0"` for not worse; `""` without a claim.
        by (`str`, *optional*, defaults to `"after"`):
            What is compared: what a run reached (`"after"`), what it gained (`"gain"`), where starts differ, or what
            it reached with its own start (`"start"`).
    """

    block: str
    run: Run
    baseline: str
    claim: str = NO_CLAIM
    expected: str = ""
    by: str = "after"


def dgpo_rows(dgpo: Run, dpo: Run, saved: dict[str, Saved]) -> list[Row]:
    """DGPO's ablations (arXiv 2510.08425)."""
    return [*_online_and_groups(dgpo, dpo, saved), *_timestep_clip(dgpo), *_sharpness(dgpo)]


def gpo_rows(gpo: Run, dpo: Run, saved: dict[str, Saved], stopped: Start) -> list[Row]:
    """GPO's ablations (arXiv 2505.11070)."""
    return [
        *_pairs(dpo),
        *_weights(gpo),
        *_group_sizes(gpo),
        *_levels(gpo),
        *_reuse(gpo),
        *_references(gpo),
        *_data_and_reward(gpo, saved),
        *_capability(gpo, saved["signs"], stopped),
    ]


# -- a function a table -----------------------------------------------------------------------------------------------


def _online_and_groups(dgpo: Run, dpo: Run, saved: dict[str, Saved]) -> list[Row]:
    row, vary = partial(Row, "DGPO"), partial(_vary, dgpo)
    offline = replace(vary("offline, own groups"), saved=saved["own"])
    against_start = replace(offline, name="offline, own groups, against its start")
    return [
        row(vary("DGPO"), "DGPO"),
        row(vary("SDE rollouts", sampler="sde"), "DGPO", f"{DGPO_PAPER}: worse than ODE rollouts", "-"),
        row(vary("own noise of each image", shared_noise=False), "DGPO"),
        row(offline, "DGPO", f"{DGPO_PAPER}: worse than online {OFF_THE_CLOCK}", "-"),
        row(against_start, against_start.name, f"{DGPO_PAPER}: better than the base", "+", by="start"),
        row(replace(vary("offline, a stronger model's groups"), saved=saved["stronger"]), "DGPO"),
        row(_vary(dpo, "online DPO"), "DGPO", f"{DGPO_PAPER}: worse than DGPO", "-"),
        row(
            replace(_vary(dpo, "offline DPO"), saved=saved["own"]),
            offline.name,
            f"{DGPO_PAPER}: worse than DGPO offline",
            "-",
        ),
    ]


def _timestep_clip(dgpo: Run) -> list[Row]:
    steady = (f"{AUTHORS}: stable from 0.3 to 0.6", "0")
    claims = {
        0.0: (f"{DGPO_PAPER}: OCR .96 falls to .95, and pictures degrade: look at the last columns", "-"),
        0.3: steady,
    }
    return [
        Row(
            f"DGPO, timestep clip, {steps} rollout steps",
            replace(
                _vary(dgpo, f"t_min {t_min:g}", num_train_timesteps=2, t_min=t_min, sample_num_steps=steps), ends=True
            ),
            "t_min 0.6",
            *claims.get(t_min, ()),
        )
        for steps in (6, 10)
        for t_min in (0.6, 0.0, 0.3, 0.8)
    ]


def _sharpness(dgpo: Run) -> list[Row]:
    claims = {
        100: (),
        1: (f"{AUTHORS}: 1 is unstable (judged by its end alone)", "-"),
        10: (f"{AUTHORS}: 10 to 1000 are fine", "0"),
        1000: (f"{AUTHORS}: 10 to 1000 are fine", "0"),
    }
    return [
        Row("DGPO, beta", _vary(dgpo, f"beta {beta}", beta=float(beta)), "beta 100", *claim)
        for beta, claim in claims.items()
    ]


def _pairs(dpo: Run) -> list[Row]:
    claims = {
        "all": (),
        "max": (f"{GPO_PAPER}, figure 2: faster and better (it trains on two images of a group)", "+"),
        "min": (f"{GPO_PAPER}, figure 2: worse than MAX, with ALL between", "-"),
    }
    return [
        Row(
            "Pairs of Diffusion-DPO",
            _vary(dpo, f"{kind.upper()} pairs", pair_selection=kind),
            "MAX pairs" if kind == "min" else "ALL pairs",
            *claim,
        )
        for kind, claim in claims.items()
    ]


def _weights(gpo: Run) -> list[Row]:
    return [
        Row("GPO, weights", _vary(gpo, name, scale_rewards=scale), "standardised", *claim)
        for name, scale, claim in (
            ("standardised", "group", ()),
            ("raw", "none", (f"{GPO_PAPER}: standardising keeps the weights' size, and is steadier", "-")),
            ("hard sign", "sign", (f"{GPO_PAPER}: grows unstable", "-")),
        )
    ]


def _group_sizes(gpo: Run) -> list[Row]:
    """128 images a round in two passes of one update; a group is what is sampled and trained on at once."""
    steadier = (f"{GPO_PAPER}: larger groups are steadier, at more memory; 32 as balance", "-")
    claims = {
        32: (),
        8: steadier,
        16: steadier,
        64: (f"{GPO_PAPER}: 32 as balance, larger ones need more memory", ""),
        128: (f"{GPO_PAPER}: beyond 64 an open question", ""),
    }
    return [
        Row(
            "GPO, group size",
            _vary(
                gpo,
                f"G {size}",
                num_generations=size,
                prompts_per_round=128 // size,
                per_device_train_batch_size=size,
                sample_batch_size=size,
                updates_per_round=1,
                num_iterations=2,
            ),
            "G 32",
            *claim,
        )
        for size, claim in claims.items()
    ]


def _levels(gpo: Run) -> list[Row]:
    return [
        Row(
            "GPO, levels",
            _vary(gpo, name, sample_num_steps=10, num_train_timesteps=2, t_min=t_min, t_max=t_max),
            "all levels",
            *claim,
        )
        for name, t_min, t_max, claim in (
            ("all levels", 0.0, 1.0, ()),
            ("low noise only", 0.0, 0.5, (f"{GPO_PAPER}: oscillates (judged by its end alone)", "-")),
            ("high noise only", 0.5, 1.0, (f"{GPO_PAPER}: converges, but slower", "-")),
        )
    ]


def _reuse(gpo: Run) -> list[Row]:
    return [
        Row(
            "GPO, reuse of a round",
            _vary(
                gpo,
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


def _references(gpo: Run) -> list[Row]:
    """The linear loss's reference has no gradient: only the logsigmoid one can tell."""
    return [
        Row(
            "GPO, reference (logsigmoid: the linear loss reads none)",
            _vary(gpo, kind, loss_type="logsigmoid", reference=kind),
            "refreshed",
            claim,
        )
        for kind, claim in (("refreshed", f"{GPO_PAPER} refreshes it every round"), ("frozen", NO_CLAIM))
    ]


def _data_and_reward(gpo: Run, saved: dict[str, Saved]) -> list[Row]:
    row = partial(Row, "GPO, data and reward")
    return [
        row(_vary(gpo, "GPO"), "GPO"),
        row(
            replace(_vary(gpo, "offline, own groups"), saved=saved["own"]),
            "GPO",
            f"{GPO_PAPER}: worse than online {OFF_THE_CLOCK}",
            "-",
        ),
        row(replace(_vary(gpo, "offline, a stronger model's groups"), saved=saved["stronger"]), "GPO"),
        row(
            replace(_vary(gpo, "exact reward"), exact=True),
            "GPO",
            f"{GPO_PAPER}: rewards of 0 or 1 leave groups without variance, hence relaxed ones",
            "-",
        ),
    ]


def _capability(gpo: Run, signs: Saved, stopped: Start) -> list[Row]:
    """GPO, plain denoising of true signs, and half a budget of the one after half a budget of the other."""
    config = {
        "sampler": "euler",
        "prompts_per_round": 32,
        "num_generations": 1,
        "per_device_train_batch_size": 32,
        "num_train_timesteps": 4,
        "learning_rate": 1e-3,
    }
    half, rows = gpo.budget / 2, []
    for start, where in ((BUNDLED, "from noisy captions"), (stopped, "from stopped early")):
        alone = replace(_vary(gpo, f"GPO, {where}"), start=start)
        supervised = Run("supervised", "diffusion_sft", gpo.budget, gpo.every, config, SEED, start=start, saved=signs)
        warm = replace(supervised, budget=half, keep=True)
        then_gpo = replace(gpo, name=f"supervised, then GPO, {where}", start=warm, budget=half)
        row = partial(Row, "GPO, capability")
        rows += [
            row(alone, alone.name),
            row(replace(supervised, name=f"supervised alone, {where}"), alone.name),
            row(then_gpo, alone.name),
        ]
    first, _, _, second, _, last = rows
    lacks = f"{GPO_PAPER}: no improvement where the base lacks the capability"
    rows[3] = replace(second, baseline=first.run.name, claim=lacks, expected="-", by="gain")
    rows[5] = replace(last, claim=f"{GPO_PAPER}: proposed as a cure, untested", expected="+")
    return rows


def _vary(run: Run, name: str, **config) -> Run:
    return replace(run, name=name, config={**run.config, **config})


# -- what they need ---------------------------------------------------------------------------------------------------


def saved_sets(dgpo: Run, stronger: Start, *, quick: bool) -> dict[str, Saved]:
    """Groups of the start and of a stronger model, drawn as DGPO's best settings draw them, and true signs."""
    config = {name: value for name, value in dgpo.config.items() if name != "learning_rate"}
    rounds = 3 if quick else 40
    return {
        "own": Saved("own", rounds, BUNDLED, config),
        "stronger": Saved("stronger", rounds, stronger, config),
        "signs": Saved("signs", 200 if quick else 2000),
    }


def prepare(output: Path, workers: int, to_start: dict[str, Start], saved: dict[str, Saved]) -> dict[str, dict]:
    """Make the starts and then the saved pictures, unless they are there; what each start can."""
    found = {}
    for name, result in _made(make_start, to_start, output, workers):
        found[name] = result
        print(f"start {name}: {result}", flush=True)
    for _ in _made(make_saved, saved, output, workers):
        pass
    return found


def _made(make: Callable, of: dict, output: Path, workers: int):
    for name, result in in_processes(partial(_make_named, make=make, of=of, output=output), list(of), workers):
        if isinstance(result, str):
            raise RuntimeError(f"{name!r} could not be made:\n{result}")
        yield name, result


def _make_named(name: str, make: Callable, of: dict, output: Path):
    return make(of[name], output)


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


def one_of_each_table(rows: list[Row]) -> list[Row]:
    """A table's last row that is compared with another, and that one."""
    kept: list[Row] = []
    for block in dict.fromkeys(row.block for row in rows):
        of = [row for row in rows if row.block == block]
        other = next(row for row in reversed(of) if row.run.name != row.baseline)
        kept += [next(row for row in of if row.run.name == other.baseline), other]
    return kept


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--comparison", type=Path, help="what compare.py wrote (outputs/comparison, or -quick)")
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/ablations, or -quick)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="two rows of each table, tiny budgets")
    arguments = parser.parse_args(argv)

    quick, workers = arguments.quick, arguments.workers
    output = arguments.output or Path("outputs/ablations-quick" if quick else "outputs/ablations")
    comparison = arguments.comparison or Path("outputs/comparison-quick" if quick else "outputs/comparison")
    budget = 4.0 if quick else 75.0
    best = Comparison(comparison).record["best"]
    dgpo, gpo, dpo = (
        Run(name, best[name]["settings"]["trainer"], budget, budget / 4, best[name]["settings"]["config"], SEED)
        for name in ("dgpo", "gpo", "online_dpo")
    )
    if quick:
        dgpo, gpo, dpo = (replace(run, every=budget) for run in (dgpo, gpo, dpo))
    to_start = starts(quick=quick)
    saved = saved_sets(dgpo, to_start["stronger"], quick=quick)
    rows = [*dgpo_rows(dgpo, dpo, saved), *gpo_rows(gpo, dpo, saved, to_start["stopped"])]
    if quick:
        rows = one_of_each_table(rows)
    runs = {row.run.key: row.run for row in rows}
    warm = {run.start.key: run.start for run in runs.values() if isinstance(run.start, Run)}
    seconds = sum(expected_seconds(list(some.values()), workers) for some in (warm, runs))
    print(
        f"{len(rows)} rows take about {seconds / 60 + 3 - 2 * quick:.0f} minutes with {workers} processes.", flush=True
    )
    found = prepare(output, workers, to_start, saved)
    failures = take_all(warm.values(), output, workers)
    failures += take_all(runs.values(), output, workers)
    write_record(output, rows, budget, found, failures, quick=quick)
    print_ablations(output, comparison)
    for line in failures:
        print("failed:", line)


if __name__ == "__main__":
    main()
