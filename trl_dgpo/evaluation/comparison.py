"""
What an evaluation says: means with intervals, models against their base, and tables of both.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..seeding import generator
from . import image_statistics


_NUM_RESAMPLES = 2000
_COVERAGE = 0.95


class Estimate(NamedTuple):
    """A mean and its interval; `NaN` where there is none."""

    mean: float
    low: float
    high: float


def estimate(values: Tensor, strata: Tensor | None = None, *, mean_of_strata: bool = False) -> Estimate:
    r"""
    Mean over images with a 95 % interval: percentiles of a bootstrap over prompts (Efron, 1979).

    Prompts are drawn, not images, for images of one prompt are no independent evidence; they are drawn within strata,
    whose sizes are the suite's choice and not chance. With \\( w_p \\) the times that prompt \\( p \\) was drawn, \\(
    s_p \\) the sum and \\( n_p \\) the number of its values, a resample's mean is \\( \sum w_p s_p / \sum w_p n_p \\).
    For a difference of two models give the differences of their values: that is the paired bootstrap. The draws are
    the same in every call.

    Args:
        values (`torch.Tensor` of shape `(P, N)`):
            For each prompt the values of its images, `NaN` where there is none.
        strata (`torch.Tensor` of shape `(P,)`, *optional*):
            For each prompt the number of its stratum; one for all if not given.
        mean_of_strata (`bool`, *optional*, defaults to `False`):
            The mean of the strata's means in place of the images' mean.

    Returns:
        [`Estimate`]: without an interval where no stratum has two prompts with a value. A stratum without any is left
        out of the mean of strata.
    """
    valid = ~values.isnan()
    some = valid.any(1)
    if not some.any():
        return Estimate(math.nan, math.nan, math.nan)
    strata = torch.zeros(len(values), dtype=torch.long) if strata is None else strata
    values, valid, strata = values[some].double(), valid[some], strata[some]
    origin = values[valid][0]  # equal values are then equal to the bit in every resample
    sums, counts = (values - origin).nan_to_num(0.0).sum(1), valid.sum(1).double()
    parts = strata.unique() if mean_of_strata else strata[:1]
    member = strata[:, None] == parts if mean_of_strata else torch.ones(len(strata), 1, dtype=torch.bool)

    def mean(weights: Tensor) -> Tensor:
        return ((weights @ (sums[:, None] * member)) / (weights @ (counts[:, None] * member))).mean(1) + origin

    center = mean(torch.ones(1, len(values), dtype=torch.float64)).item()
    if strata.unique(return_counts=True)[1].max() < 2:
        return Estimate(center, math.nan, math.nan)
    tails = torch.tensor([(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2], dtype=torch.float64)
    low, high = torch.quantile(mean(_draws(strata)), tails).tolist()
    return Estimate(center, low, high)


def compare(
    scores: dict[str, dict[str, Tensor]],
    measures: dict[str, Tensor],
    tags: list[str] | None = None,
    *,
    mean_of_tags: bool = False,
) -> dict[str, Any]:
    """
    The numbers of models, and their differences from the first.

    Args:
        scores (`dict[str, dict[str, torch.Tensor]]`):
            For each model and reward `(P, N)`: infinite where the reward failed, `NaN` where it does not apply.
        measures (`dict[str, torch.Tensor]`):
            For each model `(P, N, 6)`: darkness, contrast, saturation and the mean colour, see
            [`~trl_dgpo.evaluation.measure_images`].
        tags (`list[str]`, *optional*):
            Tag of each prompt.
        mean_of_tags (`bool`, *optional*, defaults to `False`):
            See [`~trl_dgpo.evaluation.suites.Suite`].

    Returns:
        `dict` with `models` (for each label `rewards` and `images`) and `differences`. A reward has `mean`,
        `interval`, `num_images` (those with a value), `failed`, `not_applicable`, `tags` (the same of each) and, where
        every value is 0 or 1, `correct` (images) and `prompts_correct` (share of the prompts with at least one such
        image). A difference is over the images that both models have a value of.
    """
    names = list(dict.fromkeys(tags or []))
    strata = torch.tensor([names.index(tag) for tag in tags]) if tags else None

    def summary(values: Tensor, *, detailed: bool = True) -> dict[str, Any]:
        numbers = _numbers(values)
        whole = _described(estimate(numbers, strata, mean_of_strata=mean_of_tags and strata is not None), numbers)
        if detailed:
            whole |= {"failed": int(values.isinf().sum()), "not_applicable": int(values.isnan().sum())}
            some = ~numbers.isnan().all(1)
            if is_binary := bool(some.any() and ((numbers == 0) | (numbers == 1) | numbers.isnan()).all()):
                whole["correct"] = int((numbers == 1).sum())
                whole["prompts_correct"] = (numbers[some] == 1).any(1).double().mean().item()
        if strata is not None:
            whole["tags"] = {}
            for number, tag in enumerate(names):
                part = numbers[strata == number]
                whole["tags"][tag] = _described(estimate(part), part)
                if detailed and is_binary:
                    whole["tags"][tag]["correct"] = int((part == 1).sum())
        return whole

    base = next(iter(scores))
    models, differences = {}, {}
    for label, by_name in scores.items():
        models[label] = {
            "rewards": {name: summary(values) for name, values in by_name.items()},
            "images": _image_summary(measures[label], strata),
        }
    for label in [label for label in scores if label != base]:
        differences[label] = {
            "rewards": {
                name: summary(_numbers(values) - _numbers(scores[base][name]), detailed=False)
                for name, values in scores[label].items()
            },
            "images": _image_difference(measures[label], measures[base], strata),
        }
    return {"models": models, "differences": differences}


def table(results: dict[str, Any]) -> list[list[str]]:
    """
    The results as rows of text: a head, then for each reward the whole, its tags and what is missing, then the image
    statistics.

    Args:
        results (`dict`):
            As [`~trl_dgpo.evaluation.suites.SuiteEvaluation`] returns them.

    Returns:
        `list[list[str]]`: one column for each model, and one for each difference after its model.
    """
    models, differences = results["models"], results["differences"]
    base = next(iter(models))
    head = [f"{results['settings']['num_prompts']} prompts x {results['settings']['num_images']}"]
    for label in models:
        head += [label] if label == base else [label, f"{label} - {base}"]

    def row(name: str, cell: Callable[[dict], str], difference: Callable[[dict], str] | None = None) -> list[str]:
        cells = [name]
        for label, model in models.items():
            cells.append(cell(model))
            if label != base:
                cells.append(difference(differences[label]) if difference else "")
        return cells

    rows = [head]
    for name, first in models[base]["rewards"].items():
        of = _getter("rewards", name)
        title = Path(name).name
        if results["mean_of_tags"] and "tags" in first:
            title += f", mean of {_tags_with_values([of(model)['tags'] for model in models.values()])}"
        rows.append(row(title, lambda m, of=of: _cell(of(m)), lambda d, of=of: _cell(of(d), "+")))
        is_binary = all("correct" in of(model) for model in models.values())
        for tag in first.get("tags", ()):
            of = _getter("rewards", name, "tags", tag)
            shown = _counted if is_binary else _cell
            rows.append(
                row(f"  {tag}", lambda m, of=of, shown=shown: shown(of(m)), lambda d, of=of: _cell(of(d), "+"))
            )
        of = _getter("rewards", name)
        if is_binary:
            rows.append(row("  images correct", lambda m, of=of: _counted(of(m))))
            rows.append(row("  prompts with one correct", lambda m, of=of: f"{of(m)['prompts_correct']:.3f}"))
        for kind in ("failed", "not_applicable"):
            if any(of(model)[kind] for model in models.values()):
                rows.append(row(f"  images {kind.replace('_', ' ')}", lambda m, of=of, kind=kind: str(of(m)[kind])))
    for name in models[base]["images"]:
        of = _getter("images", name)
        rows.append(row(name, lambda m, of=of: _cell(of(m)), lambda d, of=of: _cell(of(d), "+")))
    return rows


def as_text(rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def as_markdown(results: dict[str, Any]) -> str:
    """The table as a page, with what was evaluated below it."""
    head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in table(results)]
    rows = [[re.sub("^ +", "&emsp;", name), *cells] for name, *cells in rows]
    lines = ["# Evaluation", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"In brackets {_COVERAGE:.0%} intervals: bootstrap over prompts, {_NUM_RESAMPLES} resamples.", ""]
    for title in ("settings", "sources", "versions"):
        lines += [f"- {name}: `{json.dumps(value)}`" for name, value in results[title].items()]
    return "\n".join(lines) + "\n"


def _draws(strata: Tensor) -> Tensor:
    """How often each prompt is drawn: `(R, P)`, whole strata of as many draws as they have prompts."""
    stream = generator(0, "bootstrap")
    weights = torch.zeros(_NUM_RESAMPLES, len(strata), dtype=torch.float64)
    for number in strata.unique():
        members = (strata == number).nonzero().squeeze(1)
        drawn = members[torch.randint(len(members), (_NUM_RESAMPLES, len(members)), generator=stream)]
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return weights


def _numbers(values: Tensor) -> Tensor:
    return values.masked_fill(values.isinf(), math.nan)


def _described(whole: Estimate, numbers: Tensor) -> dict[str, Any]:
    return {"mean": whole.mean, "interval": [whole.low, whole.high], "num_images": int((~numbers.isnan()).sum())}


def _statistics(measures: Tensor) -> dict[str, float]:
    flat = measures.flatten(0, 1)
    names = ("darkness", "contrast", "saturation")
    return image_statistics({**{name: flat[:, i] for i, name in enumerate(names)}, "colour": flat[:, 3:]})


def _image_summary(measures: Tensor, strata: Tensor | None) -> dict[str, dict[str, Any]]:
    summary = {}
    for i, (name, value) in enumerate(_statistics(measures).items()):
        # The spread of colours is no mean of numbers of single images.
        interval = [math.nan, math.nan] if name == "colour_spread" else list(estimate(measures[..., i], strata)[1:])
        summary[name] = {"mean": value, "interval": interval}
    return summary


def _image_difference(measures: Tensor, base: Tensor, strata: Tensor | None) -> dict[str, dict[str, Any]]:
    difference = _image_summary(measures - base, strata)
    spreads = [_statistics(m)["colour_spread"] for m in (measures, base)]
    return difference | {"colour_spread": {"mean": spreads[0] - spreads[1], "interval": [math.nan, math.nan]}}


def _getter(*path: str) -> Callable[[dict], dict]:
    def get(tree: dict) -> dict:
        for name in path:
            tree = tree[name]
        return tree

    return get


def _cell(summary: dict[str, Any], sign: str = "") -> str:
    mean, (low, high) = summary["mean"], summary["interval"]
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.3f}" + ("" if math.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _counted(summary: dict[str, Any]) -> str:
    """Correct images of all that have a value."""
    correct, total = summary["correct"], summary["num_images"]
    return f"{correct / total:.3f} ({correct}/{total})" if total else "-"


def _tags_with_values(tags: list[dict[str, dict]]) -> str:
    """What a mean of tags is over, in any of the models: a tag without a value is not in it."""
    numbers = sorted({sum(part["num_images"] > 0 for part in of_model.values()) for of_model in tags})
    return "tags" if numbers == [len(tags[0])] else f"{' or '.join(map(str, numbers))} of {len(tags[0])} tags"
