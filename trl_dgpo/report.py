"""
A run as one page: curves, the same prompts through training, and the groups that were trained on.

The page is one HTML file that asks nothing of any network: images are data URIs, style and script stand in it, and a
content security policy forbids the rest. It is made of the files that `trl_dgpo.callbacks` leaves in `output_dir`, so
a run that is still going on, or was killed, has one too.
"""

import base64
import html
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from .run_files import read_log, written_aside


SAMPLE_STEPS = 24  # steps of fixed prompts on the page, at most
GROUP_STEPS = 12  # rounds in the browser of groups, at most
GROUP_IMAGES = 900  # and images in it, at most
POINTS = 1000  # of a curve, at most
PICTURE = 320  # pixels of the longer side of a fixed prompt's image, at most


def write_report(output_dir: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """
    Write a run's page.

    Args:
        output_dir (`str` or `os.PathLike`):
            The run's `output_dir`.
        path (`str` or `os.PathLike`, *optional*):
            The file to write, `report.html` in `output_dir` if not given.

    Returns:
        `Path` of the file.

    Raises:
        `FileNotFoundError`: if there is no such folder.
        `ValueError`: if a run left nothing in it.
    """
    directory = Path(output_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"`output_dir` is {str(directory)!r}, which is no folder; give a run's `output_dir`.")
    run, log = _read_run(directory), read_log(directory)
    samples, groups = _read_samples(directory), _read_groups(directory)
    if not (run or log or samples or groups):
        raise ValueError(
            f"`output_dir` is {str(directory)!r}, which holds none of `run.json`, `log.jsonl`, `samples/step-*/` and "
            "`completions/*.parquet`: no run of this package wrote there. Give the `output_dir` of one that did."
        )
    path = directory / "report.html" if path is None else Path(path)
    page = _page(directory, run, log, samples, groups)
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


# -- what a run left --------------------------------------------------------------------------------------------------


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_samples(directory: Path) -> dict[str, Any]:
    folders = sorted(path.parent for path in (directory / "samples").glob("step-*/samples.json"))
    steps, pixels = [], 0
    for folder in _evenly(folders, SAMPLE_STEPS):
        record = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        images = []
        for number, prompt in enumerate(record["prompts"]):
            uri, longer = _png_uri(folder / f"{number:02d}.png")
            images.append({"src": uri, "prompt": prompt, "reward": record["rewards"][number]})
            pixels = max(pixels, longer)
        steps.append({"step": record["step"], "images": images})
    return {"steps": steps, "of": len(folders), "pixels": pixels} if steps else {}


def _read_groups(directory: Path) -> dict[str, Any]:
    files = sorted((directory / "completions").glob("completions-*.parquet"))
    if not files:
        return {}
    from pyarrow import parquet

    steps, pixels, most = [], 0, 0
    chosen = _evenly(files, GROUP_STEPS)
    for file in chosen:
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in parquet.read_table(file).to_pylist():
            groups.setdefault(row["group"], []).append(row)
        most = max(most, len(groups))
        size = max(map(len, groups.values()))
        shown = _evenly(sorted(groups), max(1, GROUP_IMAGES // (len(chosen) * size)))
        first = groups[shown[0]][0]
        steps.append(
            {
                "step": first["step"],
                "round": first["round"],
                "groups": [
                    {"group": group, "prompt": groups[group][0]["prompt"], "images": _ranked(groups[group])}
                    for group in shown
                ],
            }
        )
        with Image.open(io.BytesIO(first["image"]["bytes"])) as picture:
            pixels = max(pixels, *picture.size)
    shown = max(len(step["groups"]) for step in steps)
    return {"steps": steps, "of": len(files), "groups": shown, "groups_of": most, "pixels": pixels}


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first, and what has no reward last."""
    rows = sorted(rows, key=lambda row: math.inf if row["reward"] is None else -row["reward"])
    names = [name for name in rows[0] if name.startswith("rewards/")]
    return [
        {
            "src": _uri(row["image"]["bytes"], "jpeg"),
            "reward": row["reward"],
            "advantage": row["advantage"],
            "rewards": {name.removeprefix("rewards/"): row[name] for name in names} if len(names) > 1 else {},
        }
        for row in rows
    ]


def _evenly(items: list, limit: int) -> list:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return items
    if limit == 1:
        return items[:1]
    return [items[round(number * (len(items) - 1) / (limit - 1))] for number in range(limit)]


def _png_uri(path: Path) -> tuple[str, int]:
    with Image.open(path) as picture:
        longer = max(picture.size)
        if longer <= PICTURE:
            return _uri(path.read_bytes(), "png"), longer
        picture = picture.convert("RGB")
        picture.thumbnail((PICTURE, PICTURE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        return _uri(buffer.getvalue(), "jpeg"), PICTURE


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# -- curves -----------------------------------------------------------------------------------------------------------

_EVAL = r"eval_(?:.+_)?"
# Title, the log's names, what is said of it. What no pattern matches is drawn under "More curves".
_CHARTS = [
    ("Reward", rf"(?:{_EVAL})?reward", "band: standard error over images"),
    ("Each reward", rf"(?:{_EVAL})?rewards/.+/mean", ""),
    ("Loss", r"loss", ""),
    ("Objective", r"objective", "mean of -log sigmoid(-score)"),
    ("KL to the base model", r"kl", "squared velocity difference"),
    ("Weight of the KL term", r"kl_coef", "moved to hold kl_target"),
    ("Distance to the base model", r"divergence", "squared difference of predictions, same levels and noise"),
    ("Gates", r"gate_mean|clip_ratio", "0.5 where policy and reference agree"),
    ("Groups without a preference", r"frac_reward_zero_std", "part of a round's groups"),
    ("Spread of rewards within groups", r"reward_std", "standard deviation"),
    (
        "Rollouts against the base model",
        r"images_vs_base/.+",
        "in deviations of its pictures; guards warn beyond 2 and of some",
    ),
    ("Signs out of range", r"guard/alarms", "of the guard of pictures"),
    (
        "Statistics of evaluation images",
        rf"{_EVAL}images/(?!colour_entropy).+",
        "a reward that is gamed shows here first",
    ),
    ("Statistics of rollouts", r"images/(?!colour_entropy).+", ""),
    ("Colour entropy", rf"(?:{_EVAL})?images/colour_entropy", "bits"),
    ("Seconds by phase", r"time/.+", "of a step"),
    ("Learning rate", r"learning_rate", ""),
    ("Gradient norm", r"grad_norm", "before clipping"),
]
_NO_CURVE = re.compile(
    rf"step|epoch|total_flos|train_.+|{_EVAL}(runtime|num_images|failed|reward_stderr|reward_std|rewards/.+/std)"
    r"|rewards/.+/std|num_input_tokens_seen"
)


def _charts(log: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """The charts of the page's first rank, and the others."""
    names = {name: None for entry in log for name in entry}
    names = sorted(names, key=lambda name: name.startswith("eval_"))  # held-out prompts are drawn over rollouts
    charts = []
    for title, pattern, note in _CHARTS:
        matching = [name for name in names if re.fullmatch(pattern, name)]
        if title == "Each reward" and len({name.split("rewards/")[1] for name in matching}) == 1:
            continue  # alone, it is the sum of all
        if matching:
            charts.append(
                {
                    "title": title,
                    "note": note,
                    "series": [_series(log, name, _label(title, name)) for name in matching],
                }
            )
    known = [re.compile(pattern) for _, pattern, _ in _CHARTS] + [_NO_CURVE]
    others = [name for name in names if not any(pattern.fullmatch(name) for pattern in known)]
    more: dict[str, list[dict]] = {}
    for name in others:
        label = "held-out prompts" if name.startswith("eval_") else "rollouts"
        more.setdefault(name.removeprefix("eval_"), []).append(_series(log, name, label))
    return charts, [{"title": title, "note": "", "series": more[title]} for title in sorted(more)]


def _series(log: list[dict[str, Any]], name: str, label: str) -> dict[str, Any]:
    errors = f"{name}_stderr"
    points = [[entry["step"], _rounded(entry[name]), _rounded(entry.get(errors))] for entry in log if name in entry]
    return {"name": label, "points": _evenly(points, POINTS)}


def _label(title: str, name: str) -> str:
    if title == "Reward":
        held_out = re.fullmatch(r"eval_(?:(.+)_)?reward", name)
        return "rollouts" if held_out is None else f"held-out prompts{f' ({held_out[1]})' if held_out[1] else ''}"
    if title == "Colour entropy":
        return "held-out prompts" if name.startswith("eval_") else "rollouts"
    if title == "Each reward":
        return ("held-out " if name.startswith("eval_") else "") + re.sub(r"(.*_)?rewards/(.+)/mean", r"\2", name)
    if "/" in name:
        prefix = re.fullmatch(r"eval_(.+)_images/.+", name)
        return name.split("/", 1)[1] + (f" ({prefix[1]})" if prefix else "")
    return name


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(directory: Path, run: dict, log: list[dict], samples: dict, groups: dict) -> str:
    charts, more = _charts(log)
    data = {"charts": charts, "more": more, "samples": samples, "groups": groups}
    title = f"{run.get('method', 'Run')}: {directory.resolve().name}"
    body = [_head(directory, run, log), _tiles(log), _before_after(log)]
    body.append("<section><h2>Curves</h2>")
    if not log:
        body.append(_missing("This run has no <code>log.jsonl</code> yet: it has not come to its first log."))
    elif not any(re.fullmatch(rf"{_EVAL}reward", name) for entry in log for name in entry):
        body.append(
            _missing(
                "No held-out reward was measured: give the trainer an <code>eval_dataset</code> and set "
                '<code>eval_strategy="steps"</code>.'
            )
        )
    if charts:
        body.append('<p class="note">By optimiser steps; point at a curve to read its numbers.</p>')
    body.append('<div class="charts" id="charts"></div>')
    if more:
        body.append('<details><summary>More curves</summary><div class="charts" id="more"></div></details>')
    body.append("</section><section id='samples'><h2>The same prompts through training</h2>")
    if not samples:
        body.append(
            _missing(
                "No fixed prompts were drawn: <code>num_log_images</code> above 0 draws them at the start, with every "
                "evaluation or every <code>log_images_steps</code>, and at the end."
            )
        )
    else:
        body.append(f'<p class="note">Same noise at every step.{_left_out(samples, "steps")}</p>')
    body.append("</section><section id='groups'><h2>Groups that were trained on</h2>")
    if not groups:
        body.append(_missing("No groups were kept: <code>log_completions=True</code> keeps them."))
    else:
        left_out = _left_out(groups, "rounds")
        if groups["groups"] < groups["groups_of"]:
            left_out += f" Of each at most {groups['groups']} of {groups['groups_of']} groups are shown."
        body.append(
            '<p class="note">Best first. <span class="key up">above</span> and <span class="key down">below</span> '
            "the group's mean by advantage, stronger colour for a larger one; "
            f'<span class="key masked">masked</span> where a reward failed.{left_out}</p>'
        )
    body.append("</section>")
    if run.get("config"):
        body.append(_config(run))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{_escaped(title)}</title>\n<style>{_CSS}</style></head>\n'
        "<body><main>\n"
        "<noscript><p class='missing'>Curves and images are drawn by the script in this page, which is turned off "
        "here.</p></noscript>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="data">{_embedded(data)}</script>\n<script>{_JS}</script>\n'
        "</body></html>\n"
    )


def _head(directory: Path, run: dict, log: list[dict]) -> str:
    facts = []
    if run.get("base_model"):
        facts.append(f"base model <b>{_escaped(run['base_model'])}</b>")
    if run.get("rewards"):
        facts.append(f"reward{'s' * (len(run['rewards']) > 1)} <b>{_escaped(', '.join(run['rewards']))}</b>")
    if not run:
        facts.append("no <code>run.json</code> here, so method, model and settings are not known")
    done = max((entry["step"] for entry in log), default=0)
    planned = run.get("config", {}).get("max_steps") or 0
    # Logged when training ends by itself.
    ended = any("train_runtime" in entry and entry["step"] == done for entry in log)
    state = "ended" if ended else "going on, or stopped,"
    if log:
        facts.append(f"{state} at step <b>{done}</b>{f' of {planned}' if planned >= done and planned > 0 else ''}")
    return (
        f'<header><p class="method">{_escaped(run.get("method", "run"))}</p>'
        f"<h1>{_escaped(directory.resolve().name)}</h1><p>{' &middot; '.join(facts)}</p></header>"
    )


def _tiles(log: list[dict]) -> str:
    tiles = []
    for name in {name: None for entry in log for name in entry if re.fullmatch(rf"{_EVAL}reward", name)}:
        first, last = _ends(log, name)
        error, images = last.get(f"{name}_stderr"), last.get(f"{name.removesuffix('reward')}num_images")
        notes = [f"{images:.0f} images"] if images is not None else []
        notes += [f"standard error {error:.3f}"] if error is not None else []
        title = f"Reward, {_escaped(_label('Reward', name))}"
        tiles.append(_tile(title, _from_to(first, last, name), ", ".join(notes)))
    if any("reward" in entry for entry in log):
        first, last = _ends(log, "reward")
        tiles.append(_tile("Reward, rollouts", _from_to(first, last, "reward"), "first and last log"))
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    if seconds is not None:
        tiles.append(_tile("Time", _duration(seconds), "since training was last started"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(title: str, content: str, note: str) -> str:
    return f'<div class="tile"><p>{title}</p><p class="big">{content}</p><p class="note">{note}</p></div>'


def _from_to(first: dict, last: dict, name: str) -> str:
    if first is last:
        return f"{last[name]:.3f}"
    change = last[name] - first[name]
    way = "up" if change > 0 else "down" if change < 0 else ""
    before = f'<span class="from">{first[name]:.3f}</span>'
    return f'{before} &rarr; {last[name]:.3f} <span class="change {way}">{change:+.3f}</span>'


def _before_after(log: list[dict]) -> str:
    names = {name: None for entry in log for name in entry if name.startswith("eval_")}
    shown = [name for name in names if not _NO_CURVE.fullmatch(name) and not re.fullmatch(rf"{_EVAL}reward", name)]
    rows = []
    for name in shown:
        first, last = _ends(log, name)
        if first is not last:
            rows.append(
                f"<tr><th>{_escaped(name.removeprefix('eval_'))}</th><td>{first[name]:.4g}</td>"
                f"<td>{last[name]:.4g}</td><td>{last[name] - first[name]:+.3g}</td></tr>"
            )
    if not rows:
        return ""
    steps = [entry["step"] for entry in log if any(name in entry for name in shown)]
    return (
        f"<details open><summary>Evaluation before and after</summary><table><tr><th></th><th>step {min(steps)}</th>"
        f"<th>step {max(steps)}</th><th>change</th></tr>{''.join(rows)}</table></details>"
    )


def _config(run: dict) -> str:
    settings = {**run["config"], **run.get("versions", {})}
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    rows = [f"<tr><th>{_escaped(name)}</th><td>{_escaped(cell)}</td></tr>" for name, cell in cells.items()]
    return f'<details><summary>Settings and versions</summary><table class="config">{"".join(rows)}</table></details>'


def _ends(log: list[dict], name: str) -> tuple[dict, dict]:
    entries = [entry for entry in log if name in entry]
    return entries[0], entries[-1]


def _left_out(part: dict, what: str) -> str:
    shown = len(part["steps"])
    return f" {shown} of {part['of']} {what} are on this page, evenly spaced." if shown < part["of"] else ""


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def _missing(sentence: str) -> str:
    return f'<p class="missing">{sentence}</p>'


def _escaped(text: Any) -> str:
    return html.escape(str(text))


def _embedded(data: dict) -> str:
    # Without "<" nothing in it can end the script element or begin a comment.
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


_CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --text: #1d1d1f; --soft: #63636a; --line: #dededa;
  --up: #1f6fd0; --down: #c8590c; --s0: #1f6fd0; --s1: #d9730d; --s2: #23875a; --s3: #8b4fc4; --s4: #c43655;
  --s5: #0e8a96; --s6: #7a6a12; --s7: #5a6270 }
@media (prefers-color-scheme: dark) {
  :root { --page: #161618; --card: #212124; --text: #ececee; --soft: #a3a3ab; --line: #3a3a3f; --up: #6fadff;
    --down: #ff9d5c; --s0: #6fadff; --s1: #ffa552; --s2: #5ccf98; --s3: #c39bf5; --s4: #ff859c; --s5: #55cfdb;
    --s6: #d9c562; --s7: #a9b1bf } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px }
header p { margin: 0; color: var(--soft) } header b { color: var(--text); font-weight: 600 }
h1 { margin: 0; font-size: 28px; line-height: 1.25; overflow-wrap: anywhere }
.method { font-weight: 600; letter-spacing: .06em; font-size: 13px }
h2 { margin: 36px 0 10px; font-size: 19px }
code { font-size: .92em } .note { color: var(--soft); font-size: 13px; margin: 0 }
.missing { color: var(--soft); border: 1px dashed var(--line); border-radius: 8px; padding: 10px 14px; margin: 8px 0 }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 12px }
.tile, .chart, .card, .shot { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 18px; min-width: 210px } .tile p { margin: 0 }
.big { font-size: 25px; font-weight: 600; font-variant-numeric: tabular-nums } .from { color: var(--soft) }
.change { font-size: .8em; margin-left: 6px } .up { color: var(--up) } .down { color: var(--down) }
details { margin: 14px 0 } summary { cursor: pointer; color: var(--soft) }
table { border-collapse: collapse; margin: 8px 0; font-size: 14px; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500 } td { text-align: right } tr:first-child th { color: var(--soft) }
th, td { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line) }
.config td { text-align: left; overflow-wrap: anywhere } .config tr:first-child th { color: inherit }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 14px; margin-top: 10px }
.chart { padding: 12px 14px 8px; position: relative; min-width: 0 }
.chart h3 { margin: 0; font-size: 14px; font-weight: 600 } .chart h3 span { color: var(--soft); font-weight: 400 }
.chart svg { width: 100%; height: auto; display: block; overflow: visible }
.chart text { fill: var(--soft); font-size: 11px } .grid { stroke: var(--line) } .cursor { stroke: var(--soft) }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); min-height: 20px }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 5px }
.legend b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 10px 14px; margin: 10px 0 14px }
.bar input[type=range] { flex: 1 1 220px; max-width: 520px; accent-color: var(--up) }
.bar output { font-weight: 600; font-variant-numeric: tabular-nums; min-width: 8.5em }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 4px 12px; cursor: pointer; max-width: 100% }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px }
.shots.pair { grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)) }
.shot { margin: 0; padding: 8px; min-width: 0 } .pictures { display: flex; gap: 6px }
.pictures img { flex: 1; width: 100%; min-width: 0; border-radius: 5px; display: block }
.small img { image-rendering: pixelated } figcaption { margin-top: 6px; font-size: 13px }
figcaption p { margin: 0; overflow-wrap: anywhere } .words { color: var(--soft) }
.number { font-weight: 600; font-variant-numeric: tabular-nums }
.group { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; margin-top: 12px }
.card { margin: 0; padding: 5px; border: 3px solid var(--line) }
.card img { width: 100%; display: block; border-radius: 4px } .card figcaption { margin: 4px 3px 1px }
.card .number { display: flex; justify-content: space-between }
.masked { border-style: dashed; color: var(--soft) }
.key { border: 2px solid currentColor; border-radius: 5px; padding: 0 5px } .key.masked { border-style: dashed }
.prompt { font-size: 16px; margin: 0; overflow-wrap: anywhere }
"""

_JS = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Text is only ever set as text: a prompt may hold anything.
function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
function svg(tag, options = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}
const shown = (value) => (value === null || value === undefined ? "-" : value.toFixed(3));
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(4)));
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

function chart(spec) {
  const W = 400, H = 190, left = 46, right = 10, top = 10, bottom = 22;
  const all = spec.series.flatMap((s) => s.points);
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  let [x0, x1] = [xs[0], xs[xs.length - 1]];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  let y0 = Math.min(...all.map((p) => p[1] - (p[2] || 0))), y1 = Math.max(...all.map((p) => p[1] + (p[2] || 0)));
  if (y0 === y1) { const room = Math.abs(y0) * 0.1 || 1; y0 -= room; y1 += room; }
  else { const room = (y1 - y0) * 0.05; y0 -= y0 >= 0 && y0 < room ? y0 : room; y1 += room; }
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (W - left - right);
  const Y = (y) => H - bottom - ((y - y0) / (y1 - y0)) * (H - top - bottom);
  const names = spec.series.map((s) => s.name).join(", ");
  const plot = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${spec.title}: ${names}` });
  for (const y of ticks(y0, y1, 5)) {
    plot.append(svg("line", { x1: left, x2: W - right, y1: Y(y), y2: Y(y), class: "grid" }));
    plot.append(svg("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, 5).filter(Number.isInteger))
    plot.append(svg("text", { x: X(x), y: H - 5, "text-anchor": "middle" }, String(x)));
  spec.series.forEach((series, index) => {
    const colour = `var(--s${index % 8})`, points = series.points;
    if (points.some((p) => p[2] !== null)) {
      const upper = points.map((p) => `${X(p[0])},${Y(p[1] + (p[2] || 0))}`);
      const lower = points.map((p) => `${X(p[0])},${Y(p[1] - (p[2] || 0))}`).reverse();
      plot.append(svg("polygon", { points: upper.concat(lower).join(" "), fill: colour, opacity: 0.18 }));
    }
    const line = points.map((p) => `${X(p[0])},${Y(p[1])}`).join(" ");
    plot.append(svg("polyline", { points: line, class: "curve", stroke: colour }));
    if (points.length <= 25)
      for (const p of points) plot.append(svg("circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.6, fill: colour }));
  });
  const cursor = svg("line", { y1: top, y2: H - bottom, class: "cursor", visibility: "hidden" });
  const dots = spec.series.map((_, i) => svg("circle", { r: 4, fill: `var(--s${i % 8})`, visibility: "hidden" }));
  plot.append(cursor, ...dots);

  const legend = el("div", { class: "legend" });
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  function label(x) {
    legend.replaceChildren();
    if (x !== null) legend.append(el("span", {}, "step ", el("b", { text: x })));
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) { cursor.setAttribute("x1", X(x)); cursor.setAttribute("x2", X(x)); }
    spec.series.forEach((series, i) => {
      dots[i].setAttribute("visibility", x === null ? "hidden" : "visible");
      if (x === null && spec.series.length === 1) return;
      const item = el("span", {}, el("i", { style: `background: var(--s${i % 8})` }), series.name);
      if (x !== null) {
        const [at, value, error] = nearest(series.points, x);
        item.append(" ", el("b", { text: short(value) + (error ? ` \u00b1 ${short(error)}` : "") }));
        if (at !== x) item.append(` (step ${at})`);
        dots[i].setAttribute("cx", X(at));
        dots[i].setAttribute("cy", Y(value));
      }
      legend.append(item);
    });
  }
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
    label(xs.reduce((best, x) => (Math.abs(X(x) - at) < Math.abs(X(best) - at) ? x : best)));
  });
  plot.addEventListener("pointerleave", () => label(null));
  label(null);
  const heading = el("h3", { text: spec.title });
  if (spec.note) heading.append(el("span", { text: `  ${spec.note}` }));
  return el("div", { class: "chart" }, heading, plot, legend);
}

function slider(steps, name, onmove) {
  const range = el("input", { type: "range", min: 0, max: steps.length - 1, value: 0, "aria-label": name });
  range.addEventListener("input", () => onmove(Number(range.value)));
  return range;
}
const signed = (value, digits) => (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(digits);
const picture = (step, image) => el("img", { src: image.src, alt: `step ${step}: ${image.prompt}` });
const mean = (values) => {
  const known = values.filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};

function samples(section, part) {
  const steps = part.steps, say = el("output"), shots = el("div", { class: "shots" });
  if (part.pixels < 160) shots.classList.add("small");
  const beside = el("input", { type: "checkbox", id: "beside" });
  let timer = null;
  function show(index) {
    range.value = index;
    const first = steps[0], now = steps[index], average = mean(now.images.map((image) => image.reward));
    say.textContent = `step ${now.step}` + (average === null ? "" : `, mean reward ${shown(average)}`);
    shots.classList.toggle("pair", beside.checked);
    shots.replaceChildren(...now.images.map((image, i) => {
      const before = first.images[i], same = before && before.prompt === image.prompt;
      const pictures = el("div", { class: "pictures" });
      if (beside.checked && same) pictures.append(picture(first.step, before));
      pictures.append(picture(now.step, image));
      const reward = el("p", { class: "number", text: shown(image.reward) });
      if (index && same && image.reward !== null && before.reward !== null) {
        const change = image.reward - before.reward;
        const way = change < 0 ? "down" : change > 0 ? "up" : "";
        reward.append(el("span", { class: `change ${way}`, text: signed(change, 3) }));
      }
      const words = el("p", { class: "words", text: image.prompt });
      return el("figure", { class: "shot" }, pictures, el("figcaption", {}, reward, words));
    }));
  }
  function stop() { clearInterval(timer); timer = null; play.textContent = "▶ Play"; }
  function toggle() {
    if (timer !== null) return stop();
    if (Number(range.value) === steps.length - 1) show(0);
    play.textContent = "❚❚ Stop";
    timer = setInterval(() => {
      show(Number(range.value) + 1);
      if (Number(range.value) === steps.length - 1) stop();
    }, 700);
  }
  const play = el("button", { type: "button", text: "▶ Play", onclick: toggle });
  const range = slider(steps, "step of the fixed prompts", (index) => { stop(); show(index); });
  beside.addEventListener("change", () => show(Number(range.value)));
  const choice = el("label", {}, beside, ` beside step ${steps[0].step}`);
  if (steps.length > 1) section.append(el("div", { class: "bar" }, play, range, say, choice), shots);
  else section.append(el("div", { class: "bar" }, say), shots);
  show(steps.length - 1);
}

function groups(section, part) {
  const steps = part.steps, say = el("output"), grid = el("div", { class: "group" });
  if (part.pixels < 120) grid.classList.add("small");
  const prompt = el("p", { class: "prompt" }), numbers = el("p", { class: "note" });
  const choice = el("select", { "aria-label": "group" });
  let at = 0;
  function pick(index) {
    at = index;
    const step = steps[at], kept = choice.selectedIndex;
    range.value = at;
    say.textContent = `step ${step.step}, round ${step.round}`;
    choice.replaceChildren(...step.groups.map((g, i) => {
      const words = g.prompt.length > 60 ? g.prompt.slice(0, 57) + "..." : g.prompt;
      return el("option", { value: i, text: `group ${g.group}: ${words}` });
    }));
    choice.selectedIndex = Math.min(Math.max(kept, 0), step.groups.length - 1);
    show();
  }
  function move(by) {
    const count = steps[at].groups.length;
    choice.selectedIndex = (choice.selectedIndex + by + count) % count;
    show();
  }
  function show() {
    const group = steps[at].groups[choice.selectedIndex], rewards = group.images.map((i) => i.reward);
    const known = rewards.filter((r) => r !== null);
    const most = Math.max(...group.images.map((i) => Math.abs(i.advantage || 0)), 1e-9);
    prompt.textContent = group.prompt;
    const span = known.length ? `${shown(Math.min(...known))} to ${shown(Math.max(...known))}` : "";
    numbers.textContent = `${group.images.length} images, `
      + (known.length ? `reward ${shown(mean(rewards))} on average, ${span}` : "none with a reward")
      + (known.length && most <= 1e-9 ? "; no preference, so nothing is learned from it" : "");
    grid.replaceChildren(...group.images.map((image) => {
      const masked = image.reward === null, a = image.advantage || 0;
      const card = el("figure", { class: masked ? "card masked" : "card" });
      const strength = Math.round(20 + (80 * Math.abs(a)) / most), colour = `var(--${a > 0 ? "up" : "down"})`;
      if (a) card.style.borderColor = `color-mix(in srgb, ${colour} ${strength}%, var(--line))`;
      const caption = el("figcaption", {}, el("p", { class: "number" },
        el("span", { text: masked ? "masked" : shown(image.reward), title: "reward" }),
        el("span", { class: a > 0 ? "up" : a < 0 ? "down" : "", title: "advantage",
          text: masked ? "" : signed(a, 2) })));
      for (const [name, value] of Object.entries(image.rewards))
        caption.append(el("p", { class: "words", text: `${name} ${shown(value)}` }));
      card.append(el("img", { src: image.src, alt: `reward ${shown(image.reward)}` }), caption);
      return card;
    }));
  }
  const range = slider(steps, "step of the groups", pick);
  choice.addEventListener("change", show);
  const bar = el("div", { class: "bar" });
  if (steps.length > 1) bar.append(range);
  const turn = (text, name, by) => el("button", { type: "button", text, "aria-label": name, onclick: () => move(by) });
  bar.append(say, turn("\u2039", "previous group", -1), choice, turn("\u203a", "next group", 1));
  section.append(bar, prompt, numbers, grid);
  pick(steps.length - 1);
}

document.getElementById("charts").append(...data.charts.map(chart));
if (data.more.length) document.getElementById("more").append(...data.more.map(chart));
if (data.samples.steps) samples(document.getElementById("samples"), data.samples);
if (data.groups.steps) groups(document.getElementById("groups"), data.groups);
"""
