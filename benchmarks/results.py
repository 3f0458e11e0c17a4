"""
docs/results.md, its plots and docs/results.json, from what `compare.py` and `ablations.py` wrote.

    python benchmarks/results.py --comparison outputs/comparison --ablations outputs/ablations

Nothing is run here: every number of the page is read or computed from their files, which `results.json` holds too.
What the papers claim, and what we make of a disagreement, is text of this script.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from trl_dgpo.evaluation.comparison import estimate


TARGETS = (0.70, 0.75, 0.80, 0.85, 0.90)
AXES = {
    "cpu_s": "CPU seconds of training",
    "forwards": "transformer forwards (a backward counts as one)",
    "images": "images sampled",
}


# -- pure parts -------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """
    A number, or only a bound on it.

    Args:
        value (`float`):
            The number.
        sign (`str`):
            `""` where it is known, `">"` where it is larger than `value`, `"<"` where it is smaller, and `"?"` where
            nothing is known.
    """

    value: float
    sign: str = ""

    def text(self, digits: int) -> str:
        return "-" if self.sign == "?" else f"{self.sign + ' ' if self.sign else ''}{self.value:.{digits}f}"


def smooth(marks: list[dict[str, float]], axis: str) -> list[tuple[float, float]]:
    """The first evaluation, then the means of two neighbours at the middle between them, which are less noisy."""
    points = [(mark[axis], mark["ocr"]) for mark in marks]
    halves = [((x0 + x1) / 2, (y0 + y1) / 2) for (x0, y0), (x1, y1) in pairwise(points)]
    return [points[0], *halves]


def time_to_target(marks: list[dict[str, float]], target: float, axis: str = "cpu_s") -> Bound:
    """
    Where a run reaches a target for good.

    The curve is that of [`smooth`]. The first of its points that is at or above the target, and is followed by
    another such or by none (the last one needs no confirmation), is where it is reached; between it and the point
    before, a straight line.

    Args:
        marks (`list[dict]`):
            A run's evaluations.
        target (`float`):
            OCR accuracy.
        axis (`str`, *optional*, defaults to `"cpu_s"`):
            What is spent: a key of the marks.

    Returns:
        [`Bound`]: more than what the run had spent at its end, if it did not get there.
    """
    points = smooth(marks, axis)
    for i, (x, y) in enumerate(points):
        if y >= target and (i + 1 == len(points) or points[i + 1][1] >= target):
            if i == 0:
                return Bound(x)
            x0, y0 = points[i - 1]
            # The point before is below the target, but where it is a peak that was not kept.
            return Bound(x0 + (x - x0) * (target - y0) / (y - y0) if y0 < target else x)
    return Bound(marks[-1][axis], ">")


def ratio(baseline: Bound, ours: Bound) -> Bound:
    """How many times longer the baseline took; a bound where one of the two never got there."""
    if ours.sign and baseline.sign:
        return Bound(math.nan, "?")
    if not ours.value:
        return Bound(math.nan, "?")  # both start above the target
    return Bound(baseline.value / ours.value, ">" if baseline.sign else "<" if ours.sign else "")


def mean_of(values: list[Bound]) -> Bound:
    """A bound where any of them is one; unknown where they bound it from both sides or one is unknown."""
    signs = {value.sign for value in values} - {""}
    if len(signs) > 1 or not values or "?" in signs:
        return Bound(math.nan, "?")
    return Bound(mean(value.value for value in values), signs.pop() if signs else "")


def mean_and_range(values: list[Bound] | list[float], digits: int = 3) -> str:
    """`mean (smallest to largest)`, with the sign of a bound where any of them is one."""
    bounds = [value if isinstance(value, Bound) else Bound(value) for value in values]
    known = sorted(value for value in bounds if value.sign != "?")
    if not known:
        return "-"
    whole = mean_of(known)
    if whole.sign == "?":  # larger than one and smaller than the other: no mean
        said, notes = ", ".join(value.text(digits) for value in known), []
    else:
        said = whole.text(digits)
        notes = [f"{known[0].text(digits)} to {known[-1].text(digits)}"] if known[0] != known[-1] else []
    notes += [f"{len(bounds) - len(known)} unknown"] if len(known) < len(bounds) else []
    return f"{said} ({', '.join(notes)})" if notes else said


def search_score(marks: list[dict[str, float]]) -> float:
    """What a search is decided by: the mean of the last two evaluations."""
    return mean(mark["ocr"] for mark in marks[-2:])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def at_budget(marks: list[dict[str, float]], budget: float) -> float:
    """What [`search_score`] would have been of a run that ended at `budget` and was evaluated at 3/4 of it."""
    return mean(_interpolated(marks, at) for at in (0.75 * budget, budget))


def _interpolated(marks: list[dict[str, float]], at: float) -> float:
    for left, right in pairwise(marks):
        if left["cpu_s"] <= at <= right["cpu_s"]:
            part = (at - left["cpu_s"]) / (right["cpu_s"] - left["cpu_s"])
            return left["ocr"] + part * (right["ocr"] - left["ocr"])
    return marks[-1]["ocr"]


# -- the comparison ---------------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """What a run of the search (`"method, schedule, rate"`) is called with its seeds."""
    method, schedule, _ = name.split(", ")
    return f"{method} ({schedule})"


def ranked(runs: list[Any], output: Path, method: str) -> list[tuple[float, Any]]:
    """A method's runs of the search that ended, with their scores, best first."""
    scored = [
        (search_score(result["marks"]), run)
        for run in runs
        if run.name.startswith(f"{method},") and (result := run.result(output)) is not None
    ]
    return sorted(scored, key=lambda pair: pair[0], reverse=True)


class Comparison:
    """What `compare.py` wrote, its runs by method."""

    def __init__(self, output: Path):
        self.output = output
        self.record = json.loads((output / "comparison.json").read_text())
        self.methods: dict[str, list[dict]] = {}
        for entry in self.record["seeds"]:
            if (result := self.read(entry)) is not None:
                self.methods.setdefault(entry["name"], []).append({**result, "seed": entry["seed"]})
        self.names = {method: label(entry["name"]) for method, entry in self.record["best"].items()}
        self.dgpo = self.names.get("dgpo", "dgpo")
        self.published = [name for name in self.methods if name.endswith("_published")]
        self.searched = [name for name in self.methods if name not in self.published]

    def read(self, entry: dict) -> dict | None:
        file = self.output / "runs" / f"{entry['key']}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def runs(self) -> dict[str, dict]:
        """Every run that ended, by its key."""
        entries = [*self.record["search"], *self.record["finalists"], *self.record["seeds"]]
        return {entry["key"]: result for entry in entries if (result := self.read(entry)) is not None}

    def _searched_scores(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """By method, schedule and rate; `None` where a run failed."""
        scores: dict[str, dict[str, dict[str, float | None]]] = {}
        for entry in self.record["search"]:
            method, schedule, rate = entry["name"].split(", ")
            result = self.read(entry)
            score = None if result is None else search_score(result["marks"])
            scores.setdefault(method, {}).setdefault(schedule, {})[rate] = score
        return scores

    def _went_on(self) -> set[str]:
        """Names in the search of what was run with three seeds."""
        taken = {(entry["name"], entry["settings"]["config"]["learning_rate"]) for entry in self.record["seeds"]}
        return {
            entry["name"]
            for entry in self.record["search"]
            if (label(entry["name"]), entry["settings"]["config"]["learning_rate"]) in taken
        }

    def search_table(self) -> str:
        """Methods and schedules by learning rate."""
        chosen = self._went_on()
        rates = [f"{rate:g}" for rate in self.record["rates"]]

        def cell(name: str, score: float | None) -> str:
            said = "failed" if score is None else f"{score:.3f}"
            return f"**{said}**" if name in chosen else said

        rows = [
            [method, schedule, *(cell(f"{method}, {schedule}, {rate}", by_rate[rate]) for rate in rates)]
            for method, schedules in self._searched_scores().items()
            for schedule, by_rate in schedules.items()
        ]
        return markdown(["method", "schedule", *rates], rows)

    def choice_table(self) -> str:
        """The runs that the choice was made from, and whether the rates end where it fell."""
        rates, rows = self.record["rates"], []
        chosen = self._went_on()
        for entry in self.record["finalists"]:
            if (result := self.read(entry)) is None:
                continue
            method, schedule, rate = entry["name"].split(", ")
            curve = " ".join(f"{mark['ocr']:.3f}" for mark in result["marks"])
            is_chosen = entry["name"] in chosen
            score = f"{search_score(result['marks']):.3f}"
            edge = "**at the edge of the rates**" if is_chosen and float(rate) in (rates[0], rates[-1]) else ""
            rows.append([method, schedule, rate, curve, f"**{score}**" if is_chosen else score, edge])
        return markdown(["method", "schedule", "rate", "OCR", "score", ""], rows)

    def summary_table(self) -> str:
        """Of each method the end of its runs."""
        rows = []
        for method, runs in self.methods.items():
            ends = [run["marks"][-1] for run in runs]
            config = runs[0]["settings"]["config"]
            rows.append(
                [
                    method,
                    f"{config['learning_rate']:g}",
                    f"{runs[0]['marks'][0]['ocr']:.3f}",
                    mean_and_range([search_score(run["marks"]) for run in runs]),
                    mean_and_range([end["exact"] for end in ends]),
                    *(f"{mean(end[name] for end in ends):.0f}" for name in ("cpu_s", "steps", "images", "forwards")),
                ]
            )
        head = ["method", "rate", "OCR before", "OCR after", "exact after", "CPU s", "steps", "images", "forwards"]
        return markdown(head, rows)

    def times(self, method: str, target: float, axis: str = "cpu_s") -> dict[int, Bound]:
        """Time to a target by seed."""
        return {run["seed"]: time_to_target(run["marks"], target, axis) for run in self.methods.get(method, [])}

    def target_table(self) -> str:
        rows = [
            [method, *(mean_and_range(list(self.times(method, target).values()), 0) for target in TARGETS)]
            for method in self.methods
        ]
        return markdown(["method", *(f"to {target:.2f}" for target in TARGETS)], rows)

    def ratios(self, baseline: str, ours: str, target: float, axis: str = "cpu_s") -> list[Bound]:
        """How many times longer a baseline took, one for each seed that both have."""
        theirs, mine = self.times(baseline, target, axis), self.times(ours, target, axis)
        return [ratio(theirs[seed], mine[seed]) for seed in mine if seed in theirs]

    def ratio_of_means(self, baseline: str, ours: str, target: float, axis: str = "cpu_s") -> Bound:
        theirs, mine = (list(self.times(method, target, axis).values()) for method in (baseline, ours))
        return ratio(mean_of(theirs), mean_of(mine))

    def ratio_table(self, baselines: list[str], ours: str, axis: str = "cpu_s") -> str:
        """Seed by seed, and of the mean times."""

        def cell(baseline: str, target: float) -> str:
            said = mean_and_range(self.ratios(baseline, ours, target, axis), 1)
            return said if said == "-" else f"{said}; {self.ratio_of_means(baseline, ours, target, axis).text(1)}"

        rows = [[name, *(cell(name, target) for target in TARGETS)] for name in baselines if name != ours]
        return markdown([f"times that of {ours}", *(f"to {target:.2f}" for target in TARGETS)], rows)

    def interval_table(self) -> str:
        """DGPO's last evaluation against that of the others with the same budget, of the same prompts and seeds."""
        rows = []
        ours = {run["seed"]: run for run in self.methods.get(self.dgpo, [])}
        for method, runs in self.methods.items():
            pairs = [(ours[run["seed"]], run) for run in runs if run["seed"] in ours]
            if method == self.dgpo or any(a["settings"]["budget"] != b["settings"]["budget"] for a, b in pairs):
                continue
            differences = torch.tensor(
                [[x - y for x, y in zip(a["ocr_of_prompts"], b["ocr_of_prompts"], strict=True)] for a, b in pairs]
            ).T
            whole = estimate(differences)
            rows.append([method, f"{whole.mean:+.3f}", f"{whole.low:+.3f} to {whole.high:+.3f}"])
        return markdown([f"{self.dgpo} minus", "OCR", "95 % interval"], rows)

    def beyond_table(self) -> str:
        """What was not rewarded."""
        columns = {
            "held out": lambda end: end["ocr"]["held out"],
            "unseen words": lambda end: end["ocr"]["unseen words"],
            "three letters": lambda end: end["ocr"]["three letters"],
            "tesseract, held out": lambda end: end["tesseract"],
            **{
                name.replace("_", " "): lambda end, name=name: end["images"][name]
                for name in ("darkness", "contrast", "saturation", "colour_spread", "sharpness")
            },
            "diversity": lambda end: end["diversity"],
        }

        def cell(values: list[float | None]) -> str:
            return "tesseract not installed" if None in values else mean_and_range(values)

        measured = {method: [run for run in runs if "end" in run] for method, runs in self.methods.items()}
        base = next((run["base"] for runs in measured.values() for run in runs), None)
        if base is None:
            return "No run's end was measured."
        rows = [["base", *(cell([column(base)]) for column in columns.values())]]
        for method, runs in measured.items():
            if not runs:
                continue
            cells = [cell([column(run["end"]) for run in runs]) for column in columns.values()]
            relative = mean(run["end"]["diversity"] for run in runs) / base["diversity"]
            rows.append([method, *cells[:-1], f"{cells[-1]}, {relative:.2f} of the base's"])
        return markdown(["method", *columns], rows)


# -- the ablations ----------------------------------------------------------------------------------------------------


def verdict(difference: float, spread: float, expected: str) -> str:
    """What a difference says of a claim of its sign (`"+"`, `"-"`, `"0"` for not worse, `""` without a claim)."""
    if not expected:
        return "-"
    if expected == "0":
        return "agrees" if difference >= -spread else "disagrees"
    if abs(difference) <= spread:
        return "within spread"
    return "agrees" if expected == ("+" if difference > 0 else "-") else "disagrees"


class Ablations:
    """What `ablations.py` wrote, its rows with what came of them, and the comparison's spread at their budget."""

    def __init__(self, output: Path, comparison: Comparison):
        self.output, self.comparison = output, comparison
        self.record = json.loads((output / "ablations.json").read_text())
        self.budget = self.record["budget"]
        self.rows = []
        for row in self.record["rows"]:
            file = output / "runs" / f"{row['key']}.json"
            self.rows.append({**row, "result": json.loads(file.read_text()) if file.exists() else None})
        for row in self.rows:
            row |= self._judged(row)

    def row(self, block: str, name: str) -> dict | None:
        return next((row for row in self.rows if (row["block"], row["name"]) == (block, name)), None)

    def runs(self) -> dict[str, dict]:
        return {row["key"]: row["result"] for row in self.rows if row["result"] is not None}

    def spread_of(self, trainer: str) -> float:
        """Largest minus smallest OCR of the comparison's seeds of a method at the budget; DGPO's if it has none."""
        comparison = self.comparison
        name = comparison.names.get({"diffusion_dpo": "online_dpo"}.get(trainer, trainer), comparison.dgpo)
        runs = comparison.methods.get(name) or comparison.methods[comparison.dgpo]
        values = [at_budget(run["marks"], self.budget) for run in runs]
        return max(values) - min(values)

    def blocks(self) -> dict[str, str]:
        """A table for each block; with memory where sizes differ, and with pictures where they were measured."""
        tables = {}
        for block in dict.fromkeys(row["block"] for row in self.rows):
            rows = [row for row in self.rows if row["block"] == block]
            head = ["", "OCR before", "OCR after", "difference", "spread", "beyond", "claim", "verdict"]
            columns = {"steps": lambda r: r["marks"][-1]["steps"], "images": lambda r: r["marks"][-1]["images"]}
            if "size" in block:
                columns["process, MiB"] = lambda r: f"{r['peak_bytes'] / 2**20:.0f}"
                columns["round, MiB"] = lambda r: f"{r['round_bytes'] / 2**20:.1f}"
            if any(row["result"] is not None and "end" in row["result"] for row in rows):
                for name in ("contrast", "sharpness"):
                    columns[name] = lambda r, name=name: f"{r['end']['images'][name]:.3f}"
                columns["diversity"] = lambda r: f"{r['end']['diversity']:.3f}"
            cells = [
                [
                    *self._cells(row),
                    *("-" if row["result"] is None else str(of(row["result"])) for of in columns.values()),
                ]
                for row in rows
            ]
            tables[block] = markdown([*head, *columns], cells)
        return tables

    def _judged(self, row: dict) -> dict[str, Any]:
        here, base = row["result"], self._baseline(row)
        is_compared = row["by"] == "start" or row["name"] != row["baseline"]
        if here is None or base is None or not is_compared:
            return {"difference": None}
        before, after = here["marks"][0]["ocr"], search_score(here["marks"])
        compared_with = {
            "after": search_score(base["marks"]),
            "gain": search_score(base["marks"]) - base["marks"][0]["ocr"] + before,
            "start": before,
        }
        difference, around = after - compared_with[row["by"]], self.spread_of(row["trainer"])
        return {"difference": difference, "spread": around, "verdict": verdict(difference, around, row["expected"])}

    def _baseline(self, row: dict) -> dict | None:
        found = self.row(row["block"], row["baseline"])
        return found and found["result"]

    def _cells(self, row: dict) -> list[str]:
        if row["result"] is None:
            return [row["name"], *["failed"] * 5, row["claim"], "-"]
        marks = row["result"]["marks"]
        cells = [row["name"], f"{marks[0]['ocr']:.3f}", f"{search_score(marks):.3f}"]
        if row["difference"] is None:
            is_baseline = row["name"] == row["baseline"]
            return [*cells, "baseline" if is_baseline else "baseline failed", "-", "-", row["claim"], "-"]
        of = {"after": "", "gain": ", of the gains", "start": ", to its start"}[row["by"]]
        if row["by"] == "after" and row["baseline"] != next(
            r["name"] for r in self.rows if r["block"] == row["block"]
        ):
            of = f", to {row['baseline']}"
        beyond = "yes" if abs(row["difference"]) > row["spread"] else "no"
        return [*cells, f"{row['difference']:+.3f}{of}", f"{row['spread']:.3f}", beyond, row["claim"], row["verdict"]]


def print_ablations(output: Path, comparison: Path) -> None:
    for block, table in Ablations(output, Comparison(comparison)).blocks().items():
        print(f"\n{block}\n\n{table}")


# -- the page ---------------------------------------------------------------------------------------------------------


# What the papers print, and what of ours is nearest to it: a method, a row of the ablations, or two methods, whose
# times are divided.
PAPERS = [
    ("SD3.5-M, OCR", "0.59", "base", "2510.08425"),
    ("Flow-GRPO, OCR", "0.92", "flow_grpo", "2505.05470, as in 2510.08425"),
    ("DGPO, OCR", "0.96", "dgpo", "2510.08425"),
    (
        "DGPO without the timestep clip, OCR",
        "0.95, 0.01 less than with it",
        ("DGPO, timestep clip, 10 rollout steps", "t_min 0"),
        "2510.08425",
    ),
    ("Flow-GRPO's time to DGPO's, OCR", "19 times", ("flow_grpo_published", "dgpo_published"), "2510.08425"),
    ("the same, our settings searched", "-", ("flow_grpo", "dgpo"), "-"),
    ("the same, DGPO's searched alone", "-", ("flow_grpo_published", "dgpo"), "-"),
    ("Flow-GRPO's time to DGPO's, GenEval", "30 times", "", "2510.08425"),
    ("Flow-GRPO's time to DGPO's, PickScore", "17 times", "", "2510.08425"),
    ("GPO on SD3.5-M, OCR and counting", "+20 points", "gpo (own)", "2505.11070"),
]
# Of the papers (arXiv 2510.08425): aesthetic, DeQA, ImageReward, PickScore, UnifiedReward on DrawBench.
PAPERS_BEYOND = [
    ["SD3.5-M", "-", "5.39", "4.07", "0.87", "22.34", "3.33"],
    ["Flow-GRPO", "GenEval", "5.25", "4.01", "1.03", "22.37", "3.51"],
    ["DGPO", "GenEval", "5.31", "4.03", "1.08", "22.41", "3.60"],
    ["Flow-GRPO", "OCR", "5.32", "4.06", "0.95", "22.44", "3.42"],
    ["DGPO", "OCR", "5.37", "4.09", "1.02", "22.52", "3.48"],
    ["Flow-GRPO", "PickScore", "5.92", "4.22", "1.28", "23.53", "3.66"],
    ["DGPO", "PickScore", "6.08", "4.40", "1.32", "23.91", "3.74"],
]
PUBLISHED_NOTES = (
    "What is called *published* has its authors' batch, rates, clip, KL weight and LoRA (`compare.py`). DGPO's "
    "is the first mode of its released code's README with 24 groups of 24, 576 images an update; the OCR entry "
    "of its configuration (8 x 16 images, clip 1e-2, KL 0.02), which would have made over four times as many "
    "updates, was not run. It has not their guidance (the tiny model is sampled without), and like all others "
    "it has DPM-Solver++'s grid of levels, Euler's steps where they are no stochastic ones, an EMA that moves "
    "every optimiser step, a constant learning rate and ten evaluation steps. Flow-GRPO-Fast's authors also "
    "have another form of noise (CPS), which is not offered here. GPO's published rate (2e-8, the whole "
    "network) does not move a LoRA, so GPO has no such run."
)
FAVOURS = (
    "Rounds of 6 x 12 images, which the prototype of this task tuned for DGPO, are in every schedule of every "
    "method, and `matched` has the levels that it tuned too; another method may want others. Not searched: the "
    "pairs' beta (100) and their choice (the best against the worst), the policy gradient's clip (1e-3, the "
    "best that the prototype found, at every rate and schedule), DGPO's own clip and KL term (off, which saves "
    "forwards), round and group sizes. Thirty seconds hardly move Flow-GRPO, so its finalists are nearly drawn "
    "by chance. The OCR reward takes a share of the clock that is the same for an image of any method, so it "
    "pulls ratios of seconds towards ratios of images; a larger model and a cheaper reward would weigh "
    "forwards more, and ratios in forwards carry over better than those in seconds. The base model with a "
    "guidance of 3 reads .985 already: what training without guidance learns here is in part what guidance "
    "gives."
)
# What we make of a verdict or a ratio, by a row's (block, name) or by ("ratios", what is compared). Written by hand,
# of the runs of one commit; of others the page has none.
EXPLAINED = "8f307e2"
EXPLANATIONS: dict[tuple[str, str], str] = {
    ("ratios", "published"): (
        "Nothing can be said: a round of theirs has 576 or 1152 images, so that a budget holds three to seven "
        "optimiser steps, at a tenth of the rate that this small model's LoRA wants. Neither has left the "
        "evaluation's own error of 0.02. The papers' runs are of many GPUs and days."
    ),
    ("ratios", "DGPO's search, the other published"): (
        "Bounds from below, the budget over DGPO's time, so they grow with the budget. They measure settings, "
        "not methods: DGPO at its published ones does not get there either. What the methods differ by is the "
        "next line."
    ),
    ("ratios", "searched"): (
        "This is what is left when both have small rounds and a rate that fits. Of the papers' 19 times a "
        "part is what the published settings differ in: with guidance an image costs Flow-GRPO 10 x 2 "
        "forwards to sample, 9 x 2 for the KL term and 9 x 2 x 2 to train (a backward counts as one), 74 in "
        "all, and DGPO 10 x 2, 4 x 2 for reference and old policy and 4 x 2, 36 in all; and an update of "
        "Flow-GRPO's is of 576 images, one of DGPO's OCR configuration of 128 (not the 576 of "
        "`dgpo_published`). Here all have the same rounds and no guidance, and all train on few levels, which "
        "Flow-GRPO's authors do in the fast form alone. The rest of the gap may come with scale; this task "
        "cannot tell."
    ),
    ("ratios", "GPO"): (
        "GPO's best schedule here is `matched` (six steps, two noisy levels), DGPO's is its authors' (ten "
        "steps, four of the seven noisiest levels): schedule and rate differ as well as gate and reference. "
        "GPO is quicker to 0.70 and 0.75 in the mean, the ranges overlap from 0.80 on, its seeds end further "
        "apart, and the difference at the end may be zero. In its own paper's levels it takes longer. Where "
        "DGPO's smaller spread comes from was not taken apart: no run has DGPO without its gate."
    ),
    ("ratios", "online DPO"): (
        "Its pairs are the best against the worst of a group (MAX), its authors' choice, which trains on two "
        "of twelve images. The ablation of pairs has ALL ahead of MAX by about as much as DGPO is ahead here, "
        "so the lead may be one over this choice. In forwards it needs fewer than DGPO, since what it leaves "
        "out is training."
    ),
    ("DGPO", "offline, a stronger model's groups"): (
        "Nearly all of its pictures are right (see its start below the title of the ablations): few groups "
        "hold a preference, standardising makes their few worse pictures weigh much, and pushing those away "
        "is not what the student lacks. That is our reading; it was not taken apart."
    ),
    ("DGPO", "offline DPO"): (
        "We do not know why. After as many steps (about 70, its first evaluation) it is ahead too. Neither "
        "rate was searched for saved data, which comes again and again, and the pairs' rate is the lower one."
    ),
    ("DGPO, beta", "beta 1000"): (
        "Our reading: a sharper gate closes earlier on what is learned already, so less is learned from the "
        "same images; it is not unstable. One seed, and hardly beyond the spread."
    ),
    ("Pairs of Diffusion-DPO", "MAX pairs"): (
        "One seed, and 0.001 beyond the spread. All twelve images of a group are sampled and scored, and MAX "
        "trains on two of them; ALL learns from each, and is ahead in fewer steps. What the paper's figure "
        "counts is not in what we have of it."
    ),
    ("GPO, reuse of a round", "k 1, tau 15"): (
        "The linear loss has no bound below: fifteen passes over the same images push the worse ones away "
        "without end. At a rate searched for few passes it collapses."
    ),
    ("GPO, data and reward", "offline, own groups"): (
        "The same: saved groups are passes without a fresh rollout, and nothing of the linear loss holds the "
        'policy near the model that drew them. `loss_type="logsigmoid"` does; it was not run here.'
    ),
    ("GPO, data and reward", "offline, a stronger model's groups"): ("The same again."),
    ("GPO, capability", "supervised, then GPO, from stopped early"): (
        "The cure was not given: half the budget of supervised training moves this start by 0.04, and the "
        "whole of it by no more."
    ),
}


def write_page(comparison: Comparison, ablations: Ablations | None, docs: Path) -> Path:
    """docs/results.md, its plots and docs/results.json."""
    docs.mkdir(parents=True, exist_ok=True)
    record, ours = comparison.record, comparison.dgpo
    others = [name for name in comparison.searched if name != ours]
    others_published = [name for name in comparison.published if name != "dgpo_published"]
    parts = [
        "# Results: the family compared on the tiny SD3",
        *(
            ["**Reduced runs (`--quick`): these figures show that the scripts work and nothing else.**"]
            * record["quick"]
        ),
        _summary(comparison, ablations),
        f"Written by `benchmarks/results.py` from runs of `benchmarks/compare.py` and `benchmarks/ablations.py` on "
        f"{record['machine']['date']}. {_sentence(record['machine'])} {_commits(comparison, ablations)} All numbers, "
        "of every run: [results.json](results.json).",
        _method_notes(comparison),
        PUBLISHED_NOTES,
        "## What favours whom",
        FAVOURS,
        "## Reward against cost",
        *(f"![OCR against {AXES[axis]}]({file})" for axis, file in _plots(comparison, docs).items()),
        f"## After {_budgets(comparison)} CPU seconds",
        "Mean of the seeds and, in brackets, the smallest and the largest. *OCR after* is the mean of a run's last "
        "two evaluations. In brackets after a method: its schedule, see the search.",
        comparison.summary_table(),
        f"The last evaluation alone of {ours} (above is the mean of the last two) against that of each method with "
        "the same budget, on the same prompts. Intervals are of a bootstrap over prompts with the seeds as they are: "
        "what other seeds would change is not in them.",
        comparison.interval_table(),
        "## Time to target",
        "CPU seconds until the mean of two neighbouring evaluations reaches an accuracy and is there at the next too, "
        "by a straight line between them; the last mean of a run counts without confirmation. `>`: not all runs got "
        f"there, and those that did not count with all that they spent. {_evaluated(comparison)} A time before the "
        "first of them is by a straight line from the start.",
        comparison.target_table(),
        "How many times longer others take, seed by seed (mean, smallest to largest), and after the semicolon the "
        "ratio of the mean times. First as the papers compare, each at its published settings:",
        comparison.ratio_table(others_published, "dgpo_published"),
        "Each at the best of its search:",
        comparison.ratio_table(others, ours),
        "DGPO's search against the others' published settings:",
        comparison.ratio_table(comparison.published, ours),
        "The same of transformer forwards, and of images:",
        *(comparison.ratio_table([*others, *comparison.published], ours, axis) for axis in ("forwards", "images")),
        "## The search",
        f"OCR at the end of runs of {_seconds_of(comparison)} CPU seconds (mean of the last two evaluations), one "
        "seed that no later run has, on held-out prompts that no later figure is of. Bold: what went on. Schedules: "
        "*matched*, six rollout steps, two levels of the noisy half, two updates a round; *short*, the same with four "
        "rollout steps; *own*, the authors' levels.",
        comparison.search_table(),
        "The best two of each method, and of GPO in its authors' levels, run for as long as the seeds were, with the "
        "search's seed and prompts; the better one of each (again by the last two evaluations) went on:",
        comparison.choice_table(),
        "Settings of the runs above:",
        _settings_table(comparison),
        "## What was not rewarded",
        _beyond_notes(comparison),
        comparison.beyond_table(),
        "The papers' own such table (arXiv 2510.08425, DrawBench): other measures, for want of a large model here.",
        markdown(["papers", "task", "Aesthetic", "DeQA", "ImageReward", "PickScore", "UnifiedReward"], PAPERS_BEYOND),
        "## The papers' numbers beside ours",
        "On Stable Diffusion 3.5 Medium, another task of the same kind, and many GPUs: directions can be compared, "
        "numbers cannot.",
        _papers_table(comparison, ablations),
    ]
    if ablations is not None:
        parts += ["## Ablations", _ablation_notes(ablations)]
        for block, table in ablations.blocks().items():
            parts += [f"### {block}", table]
    parts += ["## Where ours disagrees with the papers, and what else needs a word"]
    parts += _disagreements(comparison, ablations)
    failures = [*record["failures"], *(ablations.record["failures"] if ablations else [])]
    if failures:
        parts += ["## Runs that failed", "\n".join(f"- {line}" for line in failures)]
    file = docs / "results.md"
    file.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _write_numbers(comparison, ablations, docs / "results.json")
    return file


def _write_numbers(comparison: Comparison, ablations: Ablations | None, file: Path) -> None:
    """All that the page is computed from."""
    numbers = {"comparison": {**comparison.record, "runs": comparison.runs()}}
    if ablations is not None:
        numbers["ablations"] = {**ablations.record, "runs": ablations.runs()}
    file.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


def _summary(comparison: Comparison, ablations: Ablations | None) -> str:
    """What was found, in lines that are computed."""
    ours, lines = comparison.dgpo, []
    for target in (0.80, 0.85):
        times = {name: mean_and_range(list(comparison.times(name, target).values()), 0) for name in comparison.methods}
        lines.append(f"CPU seconds to {target:.2f}: {'; '.join(f'{name} {said}' for name, said in times.items())}.")
    searched = [name for name in comparison.searched if name != ours]
    bounds = " (bounds that grow with the budget)"
    for title, axis, baselines, mine in (
        ("Published against published settings", "cpu_s", comparison.published[1:], "dgpo_published"),
        ("Searched against searched", "cpu_s", searched, ours),
        ("The same in transformer forwards", "forwards", searched, ours),
        (f"DGPO searched against published{bounds}", "cpu_s", comparison.published, ours),
    ):
        said = [f"{name}: {_ratios_said(comparison, name, mine, TARGETS[1:3], axis)}" for name in baselines]
        lines.append(f"{title}, a multiple of DGPO's (its paper: 19 for Flow-GRPO on OCR): {'; '.join(said)}.")
    if ablations is not None:
        lines.append(_counted(ablations))
    return "\n".join(f"- {line}" for line in lines)


def _ratios_said(
    comparison: Comparison,
    baseline: str,
    ours: str,
    targets: tuple[float, ...] = TARGETS,
    axis: str = "cpu_s",
) -> str:
    ratios = {target: comparison.ratios(baseline, ours, target, axis) for target in targets}
    said = [f"{mean_and_range(r, 1)} to {t:.2f}" for t, r in ratios.items() if any(x.sign != "?" for x in r)]
    return ", ".join(said) or "neither reaches a target"


def _counted(ablations: Ablations) -> str:
    judged = [row["verdict"] for row in ablations.rows if row["difference"] is not None]
    counts = {name: judged.count(name) for name in ("agrees", "within spread", "disagrees", "-")}
    return (
        f"Of {len(judged)} rows of the ablations that are compared (one seed each, by a rule that chance alone breaks "
        f"three times in ten) {counts['agrees']} agree with a claim, those of *fine* or *stable* by being no worse "
        f"than the spread; {counts['within spread']} of a claimed direction are within the spread and decide nothing; "
        f"{counts['disagrees']} disagree; of {counts['-']} the papers claim nothing."
    )


def _sentence(machine: dict[str, Any]) -> str:
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "rapidocr", "onnxruntime")
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    return f"{machine['cpu']}, {machine['cores']} cores, one thread a run; Python {machine['python']}, {versions}."


def _commits(comparison: Comparison, ablations: Ablations | None) -> str:
    runs = [*comparison.runs().values(), *(ablations.runs().values() if ablations else [])]
    commits = sorted({run["commit"] for run in runs})
    return f"Runs were taken at commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def _method_notes(comparison: Comparison) -> str:
    common = comparison.record["common"]
    settings = comparison.record["seeds"][0]["settings"]
    return (
        "All runs have the bundled model as their start, `ocr-recognition` as the reward, the training split of "
        f"`tiny-ocr`, and, but for the published ones, a LoRA of rank {settings['lora'][0]} and alpha "
        f"{settings['lora'][1]}, {common['prompts_per_round']} prompts x {common['num_generations']} images a round "
        "and no KL term. None has guidance. The learning rate is constant, since a schedule over a number of steps "
        "that a budget of seconds does not know would favour somebody. Evaluation is of the `ema` weights on held-out "
        "prompts under fixed noise. Neither it nor setting up is on the clock, which is CPU time of the process, OCR "
        "included. Forwards are rows that the transformer was called with, counted as they happen, twice where a "
        "backward follows."
    )


def _evaluated(comparison: Comparison) -> str:
    every: dict[float, list[str]] = {}
    for method, runs in comparison.methods.items():
        every.setdefault(runs[0]["settings"]["every"], []).append(method)
    most = max(every, key=lambda seconds: len(every[seconds]))
    rest = [f"{', '.join(names)} every {seconds:g}" for seconds, names in every.items() if seconds != most]
    return f"Runs are evaluated every {most:g} CPU seconds{''.join(f', {said}' for said in rest)}."


def _plots(comparison: Comparison, docs: Path) -> dict[str, str]:
    """A picture for each axis: a thin line a seed, a thick one the mean where all seeds have gone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    files = {}
    for axis, label in AXES.items():
        figure, plot = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
        for number, (method, runs) in enumerate(comparison.methods.items()):
            curves = [np.array(smooth(run["marks"], axis)).T for run in runs]
            for x, y in curves:
                plot.plot(x, y, color=f"C{number}", linewidth=0.6, alpha=0.5)
            grid = np.linspace(0, min(x[-1] for x, _ in curves), 100)
            means = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
            plot.plot(grid, means, color=f"C{number}", linewidth=2, label=method)
        plot.set(xlabel=label, ylabel="OCR accuracy, held-out prompts", xlim=(0, None))
        # What runs long or samples much is far to the right.
        plot.set_xscale("symlog", linthresh=_first_step(comparison, axis))
        plot.grid(alpha=0.3)
        figure.legend(fontsize="small", loc="outside right upper")
        files[axis] = f"results_{axis.removesuffix('_s')}.png"
        figure.savefig(docs / files[axis], dpi=110)
        plt.close(figure)
    return files


def _first_step(comparison: Comparison, axis: str) -> float:
    return min(run["marks"][1][axis] for runs in comparison.methods.values() for run in runs)


def _seconds_of(comparison: Comparison) -> str:
    """Budget of the search's runs."""
    return f"{comparison.record['search'][0]['settings']['budget']:g}"


def _budgets(comparison: Comparison) -> str:
    budgets = sorted({run["settings"]["budget"] for runs in comparison.methods.values() for run in runs})
    return " or ".join(f"{budget:g}" for budget in budgets)


def _settings_table(comparison: Comparison) -> str:
    common = comparison.record["common"]
    rows = []
    for method, runs in comparison.methods.items():
        settings = runs[0]["settings"]
        config = {name: value for name, value in settings["config"].items() if common.get(name, ...) != value}
        rows.append([method, ", ".join(f"`{name}={value!r}`" for name, value in config.items())])
    return markdown(["method", "beside what is common"], rows)


def _beyond_notes(comparison: Comparison) -> str:
    versions = {
        run["end"]["tesseract_version"] for runs in comparison.methods.values() for run in runs if "end" in run
    }
    version = next(filter(None, versions), "tesseract, which was not installed")
    return (
        "*Held out* are texts of the evaluation, *unseen words* the English words of the held-out split alone, *three "
        "letters* are codes of a length that neither the model nor its training has had. The second OCR engine is "
        f"{version}, on pictures enlarged four times. *Darkness*, *contrast*, *saturation* and *colour spread* are "
        "those of `trl_dgpo.evaluation`; *sharpness* is the mean difference of neighbouring pixels; *diversity* is "
        "the root mean square difference of two pictures of one prompt."
    )


def _papers_table(comparison: Comparison, ablations: Ablations | None) -> str:
    rows = []
    for what, number, nearest, source in PAPERS:
        if nearest == "base":
            ours = f"{next(run['marks'][0]['ocr'] for runs in comparison.methods.values() for run in runs):.3f}"
        elif isinstance(nearest, str):
            runs = comparison.methods.get(comparison.names.get(nearest, nearest), [])
            ours = _gained(runs) if runs else "not measured"
        elif nearest[0] in comparison.names or nearest[0] in comparison.methods:
            ours = _ratios_said(comparison, *(comparison.names.get(name, name) for name in nearest))
        else:
            row = ablations and ablations.row(*nearest)
            has_any = row and row["difference"] is not None
            ours = f"{row['difference']:+.3f}, spread {row['spread']:.3f}" if has_any else "not measured"
        rows.append([what, number, ours, source if source == "-" else f"arXiv {source}"])
    return markdown(["papers", "", "ours", "source"], rows)


def _gained(runs: list[dict]) -> str:
    before, after = runs[0]["marks"][0]["ocr"], [search_score(run["marks"]) for run in runs]
    return f"{mean_and_range(after)}, {100 * (mean(after) - before):+.0f} points"


def _ablation_notes(ablations: Ablations) -> str:
    starts = "; ".join(
        f"`{name}` ({start['steps']} steps) reads {start['ocr']:.3f}, {start['exact']:.3f} exactly"
        for name, start in ablations.record["starts"].items()
    )
    return (
        f"One seed, {ablations.budget:g} CPU seconds each; all else as in the best settings of the comparison, the "
        "learning rate too, which was not searched again for a row. *Spread* is the largest minus the smallest of the "
        "comparison's three seeds of the method at that budget, *beyond* whether the difference is larger. That is a "
        "coarse rule: pairs of runs that differ by chance alone lie beyond it three times in ten, and where the "
        "spread is wide, as GPO's can be, it sees collapses alone. A claim of *fine* or *stable* is taken as not "
        "worse. Rows that cost less a round have more rounds: see their steps and images. Saved groups were drawn "
        "before the clock started; a supervised start is on it, half of the budget. "
        f"Other starts: {starts}."
    )


def _disagreements(comparison: Comparison, ablations: Ablations | None) -> list[str]:
    """What does not agree, and what something is written of by hand."""
    lines = []
    of_flow_grpo = "arXiv 2510.08425: 19 times on OCR"
    for what, baseline, ours, claim in (
        ("published", "flow_grpo_published", "dgpo_published", of_flow_grpo),
        ("DGPO's search, the other published", "flow_grpo_published", comparison.dgpo, of_flow_grpo),
        ("searched", comparison.names.get("flow_grpo", "flow_grpo"), comparison.dgpo, of_flow_grpo),
        ("GPO", comparison.names.get("gpo", "gpo"), comparison.dgpo, "no claim"),
        ("online DPO", comparison.names.get("online_dpo", "online_dpo"), comparison.dgpo, "no number claimed"),
    ):
        said = _ratios_said(comparison, baseline, ours)
        lines.append(f"- Time of {baseline} to that of {ours} ({claim}): {said}.")
        lines += _explained(comparison, "ratios", what)
    if ablations is not None:
        for row in ablations.rows:
            explained = _explained(comparison, row["block"], row["name"])
            if row["difference"] is not None and (explained or row["verdict"] not in ("-", "agrees")):
                verdict = f": **{row['verdict']}**" if row["expected"] else ""
                lines.append(
                    f"- {row['block']}, {row['name']}: {row['difference']:+.3f} against {row['baseline']}, spread "
                    f"{row['spread']:.3f}{verdict} ({row['claim']})."
                )
                lines += explained
        lines.append(f"\n{_counted(ablations)}")
    return ["\n".join(lines)]


def _explained(comparison: Comparison, block: str, name: str) -> list[str]:
    is_ours = comparison.record["machine"]["commit"] == EXPLAINED and not comparison.record["quick"]
    return [f"  {EXPLANATIONS[block, name]}"] if is_ours and (block, name) in EXPLANATIONS else []


def print_comparison(output: Path) -> None:
    comparison = Comparison(output)
    for title, table in (
        ("Search: mean of the last two evaluations", comparison.search_table()),
        ("Chosen", comparison.choice_table()),
        ("Seeds", comparison.summary_table()),
        ("CPU seconds to an OCR accuracy", comparison.target_table()),
        ("Published settings", comparison.ratio_table(comparison.published, "dgpo_published")),
        ("Searched settings", comparison.ratio_table(comparison.searched, comparison.dgpo)),
        ("DGPO searched, others published", comparison.ratio_table(comparison.published, comparison.dgpo)),
        ("DGPO against the others, at each one's end", comparison.interval_table()),
        ("What was not rewarded", comparison.beyond_table()),
    ):
        print(f"\n{title}\n\n{table}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--comparison", type=Path, default=Path("outputs/comparison"), help="what compare.py wrote")
    parser.add_argument("--ablations", type=Path, help="what ablations.py wrote; a page without them if not given")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs", help="where the page goes")
    arguments = parser.parse_args(argv)
    comparison = Comparison(arguments.comparison)
    ablations = arguments.ablations and Ablations(arguments.ablations, comparison)
    print(write_page(comparison, ablations, arguments.docs))


if __name__ == "__main__":
    main()
