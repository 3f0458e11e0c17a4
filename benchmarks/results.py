"""
docs/results.md and its plots, from what `compare.py` and `ablations.py` wrote.

    python benchmarks/results.py --comparison outputs/comparison --ablations outputs/ablations

Nothing is run here: every number of the page is read or computed from their files. What the papers claim, and what we
make of a disagreement, is text of this script.
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
BASELINES = ("flow_grpo", "flow_grpo_published", "flow_grpo_fast", "flow_grpo_fast_published")
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


def smooth(marks: list[dict[str, float]], axis: str, score: str = "ocr") -> list[tuple[float, float]]:
    """The first evaluation, then the means of two neighbours at the middle between them, which are less noisy."""
    points = [(mark[axis], mark[score]) for mark in marks]
    halves = [((x0 + x1) / 2, (y0 + y1) / 2) for (x0, y0), (x1, y1) in pairwise(points)]
    return [points[0], *halves]


def time_to_target(marks: list[dict[str, float]], target: float, axis: str = "cpu_s") -> Bound:
    """
    Where a run reaches a target for good.

    The curve is that of [`smooth`]. The first of its points that is at or above the target, and is followed by
    another such or by none, is where it is reached; between it and the point before, a straight line.

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


def mean_and_spread(values: list[Bound], digits: int) -> str:
    """`mean (smallest to largest)`, with the sign of a bound where any of them is one."""
    known = [value for value in values if value.sign != "?"]
    if not known:
        return "-"
    signs = {value.sign for value in known} - {""}
    if len(signs) > 1:  # larger than one and smaller than the other: no mean
        return ", ".join(value.text(digits) for value in known)
    whole = Bound(mean(value.value for value in known), signs.pop() if signs else "").text(digits)
    lowest, highest = min(known), max(known)
    if lowest == highest:
        return whole
    missing = f", {len(values) - len(known)} unknown" if len(known) < len(values) else ""
    return f"{whole} ({lowest.text(digits)} to {highest.text(digits)}{missing})"


def spread(values: list[float], digits: int = 3) -> str:
    return mean_and_spread([Bound(value) for value in values], digits)


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


def best_settings(runs: list[Any], output: Path, methods: list[str]) -> dict[str, Any]:
    """Of each method the run of the search that scored best."""
    best = {}
    for method in methods:
        scored = [
            (search_score(result["marks"]), run)
            for run in runs
            if run.name.startswith(f"{method},") and (result := run.result(output)) is not None
        ]
        if scored:
            best[method] = max(scored, key=lambda pair: pair[0])[1]
        else:
            print(f"{method}: no run of the search ended, so it is not compared.")
    return best


class Comparison:
    """What `compare.py` wrote, its runs by method."""

    def __init__(self, output: Path):
        self.output = output
        self.record = json.loads((output / "comparison.json").read_text())
        self.methods: dict[str, list[dict]] = {}
        for entry in self.record["seeds"]:
            if (result := self.read(entry)) is not None:
                self.methods.setdefault(entry["name"], []).append({**result, "seed": entry["seed"]})

    def read(self, entry: dict) -> dict | None:
        file = self.output / "runs" / f"{entry['key']}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def search_table(self) -> str:
        """Methods and choices of levels by learning rate."""
        scores: dict[tuple[str, str], dict[str, str]] = {}
        chosen = {entry["key"] for entry in self.record["best"].values()}
        rates = []
        for entry in self.record["search"]:
            method, choice, rate = entry["name"].split(", ")
            rates += [rate] if rate not in rates else []
            result = self.read(entry)
            cell = "failed" if result is None else f"{search_score(result['marks']):.3f}"
            scores.setdefault((method, choice), {})[rate] = f"**{cell}**" if entry["key"] in chosen else cell
        rows = [[*pair, *(by_rate.get(rate, "-") for rate in rates)] for pair, by_rate in scores.items()]
        return markdown(["method", "levels", *rates], rows)

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
                    spread([run["marks"][0]["ocr"] for run in runs[:1]]),
                    spread([search_score(run["marks"]) for run in runs]),
                    spread([end["exact"] for end in ends]),
                    *(f"{mean(end[name] for end in ends):.0f}" for name in ("cpu_s", "steps", "images", "forwards")),
                ]
            )
        head = ["method", "rate", "OCR before", "OCR after", "exact after", "CPU s", "steps", "images", "forwards"]
        return markdown(head, rows)

    def target_table(self, axis: str = "cpu_s") -> str:
        rows = [
            [
                method,
                *(
                    mean_and_spread([time_to_target(run["marks"], target, axis) for run in runs], 0)
                    for target in TARGETS
                ),
            ]
            for method, runs in self.methods.items()
        ]
        return markdown(["method", *(f"to {target:.2f}" for target in TARGETS)], rows)

    def ratios(self, baseline: str, target: float, ours: str = "dgpo", axis: str = "cpu_s") -> list[Bound]:
        """One for each seed that both have."""
        by_seed = {run["seed"]: run for run in self.methods.get(baseline, [])}
        return [
            ratio(
                time_to_target(by_seed[run["seed"]]["marks"], target, axis), time_to_target(run["marks"], target, axis)
            )
            for run in self.methods.get(ours, [])
            if run["seed"] in by_seed
        ]

    def ratio_table(self, axis: str = "cpu_s") -> str:
        """How many times longer the others take than DGPO."""
        others = [method for method in self.methods if method != "dgpo"]
        rows = [
            [method, *(mean_and_spread(self.ratios(method, target, axis=axis), 1) for target in TARGETS)]
            for method in others
        ]
        return markdown(["times DGPO's", *(f"to {target:.2f}" for target in TARGETS)], rows)

    def interval_table(self) -> str:
        """DGPO's last evaluation against the others', of the same prompts and seeds."""
        rows = []
        ours = {run["seed"]: run["ocr_of_prompts"] for run in self.methods.get("dgpo", [])}
        for method, runs in self.methods.items():
            pairs = [(ours[run["seed"]], run["ocr_of_prompts"]) for run in runs if run["seed"] in ours]
            if method == "dgpo" or not pairs:
                continue
            differences = torch.tensor([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]).T
            whole = estimate(differences)
            rows.append([method, f"{whole.mean:+.3f}", f"{whole.low:+.3f} to {whole.high:+.3f}"])
        return markdown(["DGPO minus", "OCR", "95 % interval"], rows)

    def beyond_table(self) -> str:
        """What was not rewarded."""
        columns = {
            "held out": lambda end: end["ocr"]["held out"],
            "unseen words": lambda end: end["ocr"]["unseen words"],
            "three letters": lambda end: end["ocr"]["three letters"],
            "tesseract, held out": lambda end: end["tesseract"],
            **{
                name.replace("_", " "): lambda end, name=name: end["images"][name]
                for name in ("darkness", "contrast", "saturation", "colour_spread")
            },
            "diversity": lambda end: end["diversity"],
        }

        def cell(values: list[float | None]) -> str:
            return "tesseract not installed" if None in values else spread(values)

        base = next(run["base"] for runs in self.methods.values() for run in runs)
        rows = [["base", *(cell([column(base)]) for column in columns.values())]]
        for method, runs in self.methods.items():
            cells = [cell([column(run["end"]) for run in runs]) for column in columns.values()]
            relative = mean(run["end"]["diversity"] for run in runs) / base["diversity"]
            rows.append([method, *cells[:-1], f"{cells[-1]}, {relative:.2f} of the base's"])
        return markdown(["method", *columns], rows)


# -- the ablations ----------------------------------------------------------------------------------------------------


def verdict(difference: float, spread: float, expected: str) -> str:
    """What a difference says of a claim of its sign (`"+"`, `"-"`, `"0"` for none, `""` without a claim)."""
    if not expected:
        return "-"
    if abs(difference) <= spread:
        return "agrees" if expected == "0" else "within spread"
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

    def spread_of(self, trainer: str) -> float:
        """Largest minus smallest OCR of the comparison's seeds of a method at the budget; DGPO's if it has none."""
        methods = self.comparison.methods
        runs = methods.get({"diffusion_dpo": "online_dpo"}.get(trainer, trainer)) or methods["dgpo"]
        values = [at_budget(run["marks"], self.budget) for run in runs]
        return max(values) - min(values)

    def blocks(self) -> dict[str, str]:
        """A table for each block."""
        tables = {}
        for block in dict.fromkeys(row["block"] for row in self.rows):
            rows = [row for row in self.rows if row["block"] == block]
            head = ["", "OCR before", "OCR after", "difference", "spread", "beyond", "claim", "verdict"]
            has_memory = "size" in block
            cells = [self._cells(row) for row in rows]
            if has_memory:
                head += ["process, MiB", "round, MiB"]
                for row, line in zip(rows, cells, strict=True):
                    result = row["result"]
                    names = ("peak_bytes", "round_bytes")
                    line += ["-", "-"] if result is None else [f"{result[name] / 2**20:.1f}" for name in names]
            tables[block] = markdown(head, cells)
        return tables

    def _judged(self, row: dict) -> dict[str, Any]:
        here, base = row["result"], self._baseline(row)
        if here is None or base is None or row["name"] == row["baseline"]:
            return {"difference": None}
        before = row["by"] == "gain"
        values = [search_score(r["marks"]) - before * r["marks"][0]["ocr"] for r in (here, base)]
        difference, around = values[0] - values[1], self.spread_of(row["trainer"])
        return {
            "difference": difference,
            "spread": around,
            "verdict": verdict(difference, around, row["expected"]),
        }

    def _baseline(self, row: dict) -> dict | None:
        return next(r["result"] for r in self.rows if r["block"] == row["block"] and r["name"] == row["baseline"])

    def _cells(self, row: dict) -> list[str]:
        if row["result"] is None:
            return [row["name"], *["failed"] * 5, row["claim"], "-"]
        marks = row["result"]["marks"]
        cells = [row["name"], f"{marks[0]['ocr']:.3f}", f"{search_score(marks):.3f}"]
        if row["difference"] is None:
            is_baseline = row["name"] == row["baseline"]
            return [*cells, "baseline" if is_baseline else "baseline failed", "-", "-", row["claim"], "-"]
        of_gains = ", of the gains" if row["by"] == "gain" else ""
        beyond = "yes" if abs(row["difference"]) > row["spread"] else "no"
        judged = [f"{row['difference']:+.3f}{of_gains}", f"{row['spread']:.3f}", beyond, row["claim"], row["verdict"]]
        return [*cells, *judged]


def print_ablations(output: Path, comparison: Path) -> None:
    for block, table in Ablations(output, Comparison(comparison)).blocks().items():
        print(f"\n{block}\n\n{table}")


# -- the page ---------------------------------------------------------------------------------------------------------


# What the papers print, each beside the row of ours that is nearest to it.
PAPERS = [
    ["SD3.5-M, OCR", "0.59", "before", "2510.08425"],
    ["Flow-GRPO, OCR", "0.92", "flow_grpo_published", "2505.05470, as in 2510.08425"],
    ["DGPO, OCR", "0.96", "dgpo", "2510.08425"],
    ["DGPO without the timestep clip, OCR", "0.95", "ablations below", "2510.08425"],
    ["Flow-GRPO's time to DGPO's, OCR", "19 times", "ratios below", "2510.08425"],
    ["Flow-GRPO's time to DGPO's, GenEval", "30 times", "not comparable", "2510.08425"],
    ["GPO on SD3.5-M, OCR and counting", "+20 points", "gpo", "2505.11070"],
]

# Lines that explain a verdict, by a row's name: written by hand, shown with the verdict that is computed.
EXPLANATIONS: dict[str, str] = {}


def write_page(comparison: Comparison, ablations: Ablations | None, docs: Path) -> Path:
    """docs/results.md."""
    record = comparison.record
    parts = [
        "# Results: the family compared on the tiny SD3",
        f"Written by `benchmarks/results.py` from runs of `benchmarks/compare.py` and `benchmarks/ablations.py` on "
        f"{record['machine']['date']}. {_sentence(record['machine'])}",
        *(
            ["**Reduced runs (`--quick`): these figures show that the scripts work and nothing else.**"]
            * record["quick"]
        ),
        _method_notes(comparison),
        "## Reward against cost",
        *(f"![OCR against {AXES[axis]}]({file})" for axis, file in _plots(comparison, docs).items()),
        f"## After {_budgets(comparison)} CPU seconds",
        "Mean of the seeds and, in brackets, the smallest and the largest. *OCR after* is the mean of a run's last "
        "two evaluations.",
        comparison.summary_table(),
        "DGPO's end against each other method's, on the same prompts, over all seeds; intervals are of a bootstrap "
        "over prompts.",
        comparison.interval_table(),
        "## Time to target",
        "CPU seconds until the mean of two neighbouring evaluations reaches an accuracy and is there at the next too, "
        "by a straight line between them. `>`: not all runs got there, and those that did not count with all that "
        "they spent.",
        comparison.target_table(),
        "How many times longer each takes than DGPO, seed by seed:",
        comparison.ratio_table(),
        "The same of transformer forwards and of images:",
        comparison.ratio_table("forwards"),
        comparison.ratio_table("images"),
        "## The search",
        "OCR at the end of short runs (mean of the last two evaluations), one seed that no later run has. Bold: what "
        "went on.",
        comparison.search_table(),
        "Settings that went on:",
        _settings_table(comparison),
        "## What was not rewarded",
        _beyond_notes(comparison),
        comparison.beyond_table(),
        "## The papers' numbers beside ours",
        "On Stable Diffusion 3.5 Medium, another task of the same kind, and many GPUs: directions can be compared, "
        "numbers cannot.",
        _papers_table(comparison),
    ]
    if ablations is not None:
        parts += [
            "## Ablations",
            f"One seed, {ablations.budget:g} CPU seconds each; all else as in the best settings of the comparison. "
            "*Spread* is the largest minus the smallest of the comparison's seeds of the method at that budget, "
            f"*beyond* whether the difference is larger. {_starts_sentence(ablations)}",
        ]
        for block, table in ablations.blocks().items():
            parts += [f"### {block}", table]
    parts += ["## Where ours disagrees with the papers", *_disagreements(comparison, ablations)]
    failures = [*record["failures"], *(ablations.record["failures"] if ablations else [])]
    if failures:
        parts += ["## Runs that failed", "\n".join(f"- {line}" for line in failures)]
    file = docs / "results.md"
    file.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return file


def _sentence(machine: dict[str, Any]) -> str:
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "rapidocr", "onnxruntime")
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, one thread a run; commit {machine['commit']}; Python "
        f"{machine['python']}, {versions}."
    )


def _method_notes(comparison: Comparison) -> str:
    common = comparison.record["common"]
    settings = comparison.record["seeds"][0]["settings"]
    return (
        "All runs have the bundled model as their start, `ocr-recognition` as the reward, the training split of "
        f"`tiny-ocr`, a LoRA of rank {settings['lora'][0]} and alpha {settings['lora'][1]}, "
        f"{common['prompts_per_round']} prompts x {common['num_generations']} images a round, no guidance, no KL "
        "term, and a constant learning rate, since a schedule over a number of steps that a budget of seconds does "
        "not know would favour somebody. What the runs called *published* have of their authors instead is in "
        "`compare.py`; guidance they have not, for the tiny model is sampled without. Evaluation is of the `ema` "
        "weights on held-out prompts under fixed noise. Neither it nor setting up is on the clock, which is CPU time "
        "of the process, OCR included. Forwards are rows that the transformer was called with, counted as they "
        "happen, twice where a backward follows."
    )


def _plots(comparison: Comparison, docs: Path) -> dict[str, str]:
    """A picture for each axis: a thin line a seed, a thick one the mean where all seeds have gone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    files = {}
    for axis, label in AXES.items():
        figure, plot = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
        for number, (method, runs) in enumerate(comparison.methods.items()):
            curves = [np.array(smooth(run["marks"], axis)).T for run in runs]
            for x, y in curves:
                plot.plot(x, y, color=f"C{number}", linewidth=0.6, alpha=0.5)
            grid = np.linspace(0, min(x[-1] for x, _ in curves), 100)
            means = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
            plot.plot(grid, means, color=f"C{number}", linewidth=2, label=method)
        plot.set(xlabel=label, ylabel="OCR accuracy, held-out prompts", xlim=(0, None))
        if axis != "cpu_s":  # what samples much is far to the right
            plot.set_xscale("symlog", linthresh=_first_step(comparison, axis))
        plot.grid(alpha=0.3)
        plot.legend(fontsize="small")
        files[axis] = f"results_{axis.removesuffix('_s')}.png"
        figure.savefig(docs / files[axis], dpi=110)
        plt.close(figure)
    return files


def _first_step(comparison: Comparison, axis: str) -> float:
    return min(run["marks"][1][axis] for runs in comparison.methods.values() for run in runs)


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
    run = next(iter(comparison.methods.values()))[0]
    version = run["end"]["tesseract_version"] or "tesseract, which was not installed"
    return (
        "*Held out* are texts of the evaluation's kind, *unseen words* the English words of the held-out split alone, "
        "*three letters* are codes of a length that neither the model nor its training has had. The second OCR engine "
        f"is {version}, on pictures enlarged four times. *Darkness*, *contrast*, *saturation* and *colour spread* are "
        "those of `trl_dgpo.evaluation`; *diversity* is the root mean square difference of two pictures of one prompt."
    )


def _papers_table(comparison: Comparison) -> str:
    rows = []
    for what, number, method, source in PAPERS:
        ours = method
        if method == "before":
            ours = f"{next(run['marks'][0]['ocr'] for runs in comparison.methods.values() for run in runs):.3f}"
        elif method in comparison.methods:
            runs = comparison.methods[method]
            before, after = runs[0]["marks"][0]["ocr"], [search_score(run["marks"]) for run in runs]
            ours = f"{spread(after)}, {100 * (mean(after) - before):+.0f} points"
        rows.append([what, number, ours, f"arXiv {source}"])
    return markdown(["papers", "", "ours", "source"], rows)


def _starts_sentence(ablations: Ablations) -> str:
    said = [
        f"`{name}` ({start['steps']} steps) reads {start['ocr']:.3f}, {start['exact']:.3f} exactly"
        for name, start in ablations.record["starts"].items()
    ]
    return f"Other starts: {'; '.join(said)}."


def _disagreements(comparison: Comparison, ablations: Ablations | None) -> list[str]:
    """Computed verdicts, with what is written of them by hand."""
    lines = []
    for baseline, claimed in (("flow_grpo_published", "19 times"), ("flow_grpo", "19 times")):
        ratios = {target: comparison.ratios(baseline, target) for target in TARGETS}
        said = ", ".join(
            f"{mean_and_spread(r, 1)} to {t:.2f}" for t, r in ratios.items() if any(x.sign != "?" for x in r)
        )
        lines.append(
            f"- Time against `{baseline}` (arXiv 2510.08425: {claimed} on OCR): {said or 'no target reached'}."
        )
        lines += _explained(baseline)
    if ablations is not None:
        for row in ablations.rows:
            if row["difference"] is not None and row["verdict"] not in ("-", "agrees"):
                lines.append(
                    f"- {row['block']}, {row['name']}: {row['difference']:+.3f} against {row['baseline']}, spread "
                    f"{row['spread']:.3f}: **{row['verdict']}** ({row['claim']})."
                )
                lines += _explained(row["name"])
        judged = [row["verdict"] for row in ablations.rows if row["difference"] is not None]
        counts = {name: judged.count(name) for name in ("agrees", "within spread", "disagrees", "-")}
        lines.append(
            f"\nOf {len(judged)} rows that are compared, {counts['agrees']} agree with a claim, "
            f"{counts['within spread']} differ by no more than the seeds do, {counts['disagrees']} disagree, and of "
            f"{counts['-']} the papers claim nothing."
        )
    return ["\n".join(lines)]


def _explained(name: str) -> list[str]:
    return [f"  {EXPLANATIONS[name]}"] if name in EXPLANATIONS else []


def print_comparison(output: Path) -> None:
    comparison = Comparison(output)
    for title, table in (
        ("Search: mean of the last two evaluations", comparison.search_table()),
        ("Seeds", comparison.summary_table()),
        ("CPU seconds to an OCR accuracy", comparison.target_table()),
        ("Times DGPO's CPU seconds", comparison.ratio_table()),
        ("DGPO against the others, at each one's end", comparison.interval_table()),
        ("What was not rewarded", comparison.beyond_table()),
    ):
        print(f"\n{title}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--comparison", type=Path, default=Path("outputs/comparison"), help="what compare.py wrote")
    parser.add_argument("--ablations", type=Path, help="what ablations.py wrote; a page without them if not given")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs", help="where the page goes")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.comparison)
    ablations = arguments.ablations and Ablations(arguments.ablations, comparison)
    print(write_page(comparison, ablations, arguments.docs))


if __name__ == "__main__":
    main()
