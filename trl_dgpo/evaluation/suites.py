"""
Suites: the evaluations that papers print, for a model and LoRAs on it, side by side and with intervals.

A suite's folder holds pictures, scores and results, and can be gone on with: what is there is neither sampled nor
scored again, whether it was interrupted or another reward is asked for later. Pictures are sampled from noise that
depends on prompt and number alone ([`~trl_dgpo.evaluation.evaluation_latents`]), and are scored as they lie on the
disk.
"""

import copy
import gc
import hashlib
import json
import logging
import math
import urllib.parse
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..image_measures import measure_images
from ..rewards.scoring import RewardFunc, RewardScorer
from ..run_files import written_aside
from . import image_grid
from .comparison import MEASURES, as_markdown, compare


logger = logging.getLogger(__name__)

BASE = "base"

Generate = Callable[..., Tensor]

# Sampled and scored at a time: what a kill can cost.
_IMAGES_AT_ONCE = 64
_IN_GRID = 8
_MEASURES = "+statistics"  # no reward's file has a "+" in its name
_VERSIONS = ("trl-dgpo", "torch", "diffusers", "transformers", "rapidocr", "onnxruntime")


@dataclass(frozen=True)
class Suite:
    """
    An evaluation by name: prompts, which are the test split of the prompt set of its name, and rewards.

    Args:
        rewards (`tuple[str, ...]`):
            Built-in rewards, on the scale that papers print.
        num_images (`int`, *optional*, defaults to `1`):
            Images of each prompt.
        num_prompts (`int`, *optional*):
            Prompts, if not as many as the set gives by itself.
        mean_of_tags (`bool`, *optional*, defaults to `False`):
            Whether the result is the mean of the tags' means, not that of the images.
    """

    rewards: tuple[str, ...]
    num_images: int = 1
    num_prompts: int | None = None
    mean_of_tags: bool = False


SUITES = {
    # Four images of each of 553 prompts, and the mean of six tags: GenEval (arXiv 2310.11513).
    "geneval": Suite(("geneval",), num_images=4, mean_of_tags=True),
    # As many prompts as Flow-GRPO (arXiv 2505.05470) tests with, one image each.
    "ocr": Suite(("ocr",), num_prompts=1018),
    "tiny-ocr": Suite(("ocr-recognition",)),
    "counting": Suite(("counting",), num_images=4),
    # Five images of each, as Flow-GRPO draws of DrawBench's prompts.
    "ood": Suite(("clip-score", "pickscore", "aesthetic"), num_images=5),
}


def suite_rows(name: str, num_prompts: int | None = None) -> list[dict[str, Any]]:
    """
    Prompts of a suite.

    Args:
        name (`str`):
            One of `SUITES`.
        num_prompts (`int`, *optional*):
            How many, if not as many as the suite has.

    Returns:
        `list[dict]`.

    Raises:
        `ValueError`: if there is no such suite, or it has not so many prompts.
    """
    from ..prompts import PROMPT_SETS

    if name not in SUITES:
        raise ValueError(f"There is no suite {name!r}; there are {', '.join(SUITES)}.")
    return PROMPT_SETS[name]("test", SUITES[name].num_prompts if num_prompts is None else num_prompts)


class SuiteEvaluation:
    """
    An evaluation in its folder. Made, it has found out what can be wrong with what was given, and has the folder.

    All models are sampled before the first reward is asked, and a model is there for that long only. Failed scores are
    tried again by the next run. Every process takes a share of the prompts; the folder must be one for all.

    Args:
        folder (`Path`):
            Where everything is written: `suite.json`, `<model>/images/00012-3.png` (prompt and number),
            `<model>/scores/<reward>.jsonl`, `results.json`, `results.md` and `grid.png`. Two evaluations at once in it
            would undo each other's files.
        rows (`list[dict]`):
            Prompts: rows with `prompt`, perhaps a `tag`, and the columns that the rewards read.
        models (`dict[str, Callable]`):
            For each label what gives, as a context, `generate(prompts, num_images=...)`: uint8 images `(B, 3, H, W)`.
            Every process enters it or none. The first model is the one that the others are compared with. A label is
            the name of a folder.
        rewards (`dict[str, Callable]`):
            Rewards by name.
        num_images (`int`, *optional*, defaults to `1`):
            Images of each prompt.
        mean_of_tags (`bool`, *optional*, defaults to `False`):
            See [`Suite`].
        settings (`dict`, *optional*):
            What else decides the pictures, as JSON.
        sources (`dict`, *optional*):
            For each label what model it is, as JSON.
        reward_sources (`dict`, *optional*):
            For each reward what it is besides its name, as JSON. Scores of another are not mixed with its own.
        reward_timeout (`float`, *optional*):
            Seconds that a reward may take for a part, see [`~trl_dgpo.rewards.scoring.RewardScorer`].
        processes (`~accelerate.PartialState`, *optional*):
            The processes; as Accelerate knows them if not given.
        show_progress (`bool`, *optional*, defaults to `False`):
            Show bars.

    Raises:
        `ValueError`: if the folder is of another evaluation or has scores of a reward that was another one then, a
            reward lacks a column, a label is no folder's name, or there is nothing to draw.
    """

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        models: dict[str, Callable[[], AbstractContextManager[Generate]]],
        rewards: dict[str, RewardFunc],
        *,
        num_images: int = 1,
        mean_of_tags: bool = False,
        settings: dict[str, Any] | None = None,
        sources: dict[str, Any] | None = None,
        reward_sources: dict[str, Any] | None = None,
        reward_timeout: float | None = None,
        processes: Any = None,
        show_progress: bool = False,
    ):
        if num_images < 1 or not rows:
            raise ValueError(f"There are {len(rows)} prompts of {num_images} images; there must be at least one each.")
        for label in models:
            if label in ("", "..") or Path(label).name != label:
                raise ValueError(f"`models` has the label {label!r}; it must be the name of a folder, without a path.")
        self.models = models
        self.scorers = {name: RewardScorer(func, timeout=reward_timeout) for name, func in rewards.items()}
        for name, scorer in self.scorers.items():
            try:
                scorer.check(rows[0].keys() - {"prompt"}, ("trainer_state",))
            except ValueError as error:
                raise ValueError(f"`{name}` cannot be measured here. {error}") from error
        self.tags = [row["tag"] for row in rows] if "tag" in rows[0] else None
        self.mean_of_tags = mean_of_tags
        if processes is None:
            from accelerate import PartialState

            processes = PartialState()
        self._store = _Store(folder, rows, num_images, processes, show_progress)
        self._store.begin(
            {
                "settings": {
                    **(settings or {}),
                    "num_prompts": len(rows),
                    "prompts_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
                    "num_images": num_images,
                },
                "models": {label: (sources or {}).get(label) for label in models},
                "rewards": {name: (reward_sources or {}).get(name) for name in rewards},
                "versions": _versions(),
            }
        )

    def self_test(self, height: int, width: int) -> None:
        """
        Call the rewards that have yet to score something, once each, before hours of drawing.

        Copies of them are called, whose models go again before the one that draws comes. See
        [`~trl_dgpo.rewards.scoring.RewardScorer.self_test`].

        Args:
            height (`int`):
                Height of the images in pixels.
            width (`int`):
                Width of the images in pixels.

        Raises:
            `RuntimeError`: if a reward raises.
        """
        from transformers import TrainerState

        for name, scorer in self.scorers.items():
            if not all(self._store.is_scored(label, _file_name(name)) for label in self.models):
                tested = RewardScorer([copy.copy(reward) for reward in scorer.funcs])
                tested.self_test(self._store.rows[0], height, width, trainer_state=TrainerState())
                del tested
                _free_memory()

    def run(self) -> dict[str, Any] | None:
        """
        Sample what is missing, score what is missing, and compare.

        Returns:
            `dict` as in `results.json`, with `NaN` where there is `null`; `None` on other processes than the first.

        Raises:
            `RuntimeError`: if a reward fails for all images of a part, of which it was asked for the first time.
        """
        store = self._store
        for label, load in self.models.items():
            store.sample(label, load)
        for label in self.models:
            store.score(label, _MEASURES, _measure)
            for name, scorer in self.scorers.items():
                store.score(label, _file_name(name), _scored_by(scorer))
        if not store.is_first:
            return None
        results = {**store.record(self.models), "mean_of_tags": self.mean_of_tags}
        results |= compare(
            {label: {name: store.read(label, _file_name(name)) for name in self.scorers} for label in self.models},
            {label: store.read(label, _MEASURES) for label in self.models},
            self.tags,
            mean_of_tags=self.mean_of_tags,
        )
        store.write(results)
        return results


class _Store:
    """A suite's folder: what is there, and how it comes there."""

    def __init__(self, folder: Path, rows: list[dict], num_images: int, processes: Any, show_progress: bool):
        self.folder = folder
        self.rows = rows
        self.num_images = num_images
        self.processes = processes
        self.is_first = processes.process_index == 0
        self.show_progress = show_progress and self.is_first
        share = range(processes.process_index, len(rows), processes.num_processes)
        # The parts are the same in every call: a part that was interrupted is sampled anew as a whole, since kernels
        # may round differently in other company. A score can bear that, and may cost money: only what is missing or
        # failed is asked for again.
        size = max(1, _IMAGES_AT_ONCE // num_images)
        self.parts = [share[i : i + size] for i in range(0, len(share), size)]

    def begin(self, record: dict[str, Any]) -> None:
        """Take the folder for this evaluation, or go on with it."""
        record = json.loads(json.dumps(record))
        path = self.folder / "suite.json"
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            self._check(record, known)
            for kind in ("models", "rewards"):
                record[kind] = known[kind] | record[kind]
            for name, earlier in known["versions"].items():
                record["versions"][name] = list(dict.fromkeys([*earlier, *record["versions"].get(name, [])]))
            if several := {name: versions for name, versions in record["versions"].items() if len(versions) > 1}:
                logger.warning(
                    "%s was worked on with several versions: %s. What all of them made is compared as if it were of "
                    "one.",
                    *(self.folder, several),
                )
        self.processes.wait_for_everyone()  # until all have read it
        if self.is_first:
            with written_aside(path) as aside:
                aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.processes.wait_for_everyone()

    def _check(self, record: dict[str, Any], known: dict[str, Any]) -> None:
        """That what is there was made with the same settings, models and rewards."""
        mine, there = record["settings"], known["settings"]
        changed = [
            (name, mine.get(name), there.get(name))
            for name in sorted(mine.keys() | there.keys())
            if mine.get(name) != there.get(name)
        ]
        changed += [
            (f"models/{label}", source, known["models"][label])
            for label, source in record["models"].items()
            if known["models"].get(label, source) != source
        ]
        if changed:
            differences = "; ".join(f"{name} is {now!r}, was {then!r}" for name, now, then in changed)
            raise ValueError(
                f"{str(self.folder)!r} holds another evaluation: {differences}. Give another folder, or remove this "
                "one."
            )
        for name, source in record["rewards"].items():
            if known["rewards"].get(name, source) != source and any(
                self._score_files(folder, _file_name(name)) for folder in self.folder.glob("*/scores")
            ):
                raise ValueError(
                    f"Reward `{name}` has changed since {str(self.folder)!r} got its scores: it is {source!r}, was "
                    f"{known['rewards'][name]!r}. Delete its scores, {self.folder}/*/scores/{_file_name(name)}.jsonl "
                    "(and .rank*.jsonl), or give another folder."
                )

    def record(self, labels: Collection[str]) -> dict[str, Any]:
        known = json.loads((self.folder / "suite.json").read_text(encoding="utf-8"))
        sources = {label: known["models"][label] for label in labels}
        return {"settings": known["settings"], "sources": sources, "versions": known["versions"]}

    def sample(self, label: str, load: Callable[[], AbstractContextManager[Generate]]) -> None:
        there = {path.name for path in (self.folder / label / "images").glob("*.png")}
        self.processes.wait_for_everyone()  # until all have looked
        if all(self._picture(label, *key).name in there for key in self._keys(range(len(self.rows)))):
            return
        with load() as generate:
            for part in self._bar(f"{label}: images"):
                keys = self._keys(part)
                if all(self._picture(label, *key).name in there for key in keys):
                    continue
                images = generate([self.rows[p]["prompt"] for p in part], num_images=self.num_images)
                for key, image in zip(keys, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    if self._picture(label, *key).name not in there:
                        with written_aside(self._picture(label, *key)) as aside:
                            Image.fromarray(image).save(aside, compress_level=1)
        del generate  # and with it the model, before the next one comes
        _free_memory()
        self.processes.wait_for_everyone()

    def score(self, label: str, name: str, score: Callable[[Tensor, list[dict]], list[Any]]) -> None:
        known = self._scores(label, name)
        self.processes.wait_for_everyone()  # until all have read
        title = urllib.parse.unquote(name)
        for part in self._bar(f"{label}: {Path(title).name}"):
            keys = [key for key in self._keys(part) if known.get(key, "nan") == "nan"]
            if not keys:
                continue
            values = score(self.pictures(label, keys), [self.rows[p] for p, _ in keys])
            self._append(label, name, keys, values)
            # One image may be to blame itself, and so may those that failed before.
            if len(keys) > 1 and values == ["nan"] * len(keys) and not known.keys() & set(keys):
                raise RuntimeError(
                    f"Reward `{title}` failed for {len(keys)} images in a row; the log above has the reason. What was "
                    "sampled and scored before is kept: the same command goes on from there."
                )
        self.processes.wait_for_everyone()

    def is_scored(self, label: str, name: str) -> bool:
        return self._scores(label, name).keys() >= set(self._keys(range(len(self.rows))))

    def read(self, label: str, name: str) -> Tensor:
        """Of every image the number or numbers: `NaN` for not applicable, infinite for failed."""
        known = self._scores(label, name)
        values = [known[key] for key in self._keys(range(len(self.rows)))]
        values = [math.nan if value is None else math.inf if value == "nan" else value for value in values]
        return torch.tensor(values, dtype=torch.float64).unflatten(0, (len(self.rows), self.num_images))

    def pictures(self, label: str, keys: list[tuple[int, int]]) -> Tensor:
        """Images `(B, 3, H, W)`, uint8."""
        arrays = [np.array(Image.open(self._picture(label, *key))) for key in keys]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def write(self, results: dict[str, Any]) -> None:
        """`results.json`, `results.md` and `grid.png`."""
        with written_aside(self.folder / "results.json") as aside:
            aside.write_text(json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with written_aside(self.folder / "results.md") as aside:
            aside.write_text(as_markdown(results), encoding="utf-8")
        shown = [(p, 0) for p in range(min(_IN_GRID, len(self.rows)))]
        grid = image_grid(
            {label: self.pictures(label, shown) for label in results["models"]},
            [self.rows[p]["prompt"] for p, _ in shown],
        )
        with written_aside(self.folder / "grid.png") as aside:
            grid.save(aside)

    def _keys(self, prompts: range) -> list[tuple[int, int]]:
        return [(p, i) for p in prompts for i in range(self.num_images)]

    def _bar(self, title: str) -> Iterator[range]:
        from tqdm.auto import tqdm

        return tqdm(self.parts, desc=title, disable=not self.show_progress, leave=False)

    def _picture(self, label: str, prompt: int, image: int) -> Path:
        return self.folder / label / "images" / f"{prompt:05d}-{image}.png"

    def _score_files(self, folder: Path, name: str) -> list[Path]:
        return sorted([*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.rank*.jsonl")])

    def _scores(self, label: str, name: str) -> dict[tuple[int, int], Any]:
        """What all processes wrote, of this call and of earlier ones; a failure counts where there is nothing else."""
        known: dict[tuple[int, int], Any] = {}
        for file in self._score_files(self.folder / label / "scores", name):
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else a kill broke it off
                    entry = json.loads(line)
                    key = entry["prompt"], entry["image"]
                    # Another number of processes writes other files, so the order of the lines says nothing.
                    if entry["value"] != "nan" or key not in known:
                        known[key] = entry["value"]
        return known

    def _append(self, label: str, name: str, keys: list[tuple[int, int]], values: list[Any]) -> None:
        rank = self.processes.process_index
        path = self.folder / label / "scores" / f"{name}{f'.rank{rank}' if rank else ''}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"prompt": prompt, "image": image, "value": value}) + "\n"
            for (prompt, image), value in zip(keys, values, strict=True)
        ]
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode())


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scored_by(scorer: RewardScorer) -> Callable[[Tensor, list[dict]], list[Any]]:
    from transformers import TrainerState

    def score(images: Tensor, rows: list[dict]) -> list[float | str | None]:
        columns = {column: [row[column] for row in rows] for column in rows[0] if column != "prompt"}
        scores = scorer(images, [row["prompt"] for row in rows], columns, trainer_state=TrainerState())
        (values,) = scores.by_name.values()
        pairs = zip(values.tolist(), scores.failed.tolist(), strict=True)
        return ["nan" if failed else None if math.isnan(value) else value for value, failed in pairs]

    return score


def _measure(images: Tensor, rows: list[dict]) -> list[list[float]]:
    measures = measure_images(images)
    return torch.cat([measures[name].reshape(len(images), -1) for name in MEASURES], 1).double().tolist()


def _versions() -> dict[str, list[str]]:
    """Of each package that is here; a list, to which later runs with others add theirs."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = [version(name)]
        except PackageNotFoundError:  # an extra's
            continue
    return versions


def _file_name(reward: str) -> str:
    return urllib.parse.quote(reward, safe="")


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree
