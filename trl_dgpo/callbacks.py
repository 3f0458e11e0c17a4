"""
Trainer callbacks: what people look at during a run, and the files that it leaves of it in `output_dir`.

    run.json, log.jsonl                               RunLogCallback
    samples/step-000040/, samples/step-000040.png     SampleImagesCallback
    completions/completions-000040.parquet            CompletionsCallback
    (a folder of your choice) round-000040.parquet    SaveRolloutsCallback

`trl_dgpo.report` makes a page of them. All is done by the main process alone; the others wait at their next
collective operation.
"""

import dataclasses
import io
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .rewards.scoring import Scores
from .rollout import ScoredImages
from .rollout_dataset import RowColumns, rounds_to_dataset
from .run_files import LOG, written_aside


THUMBNAIL = 128  # pixels of the longer side, in tables
PICTURE = 384  # and in grids


class RewardProgressCallback(ProgressCallback):
    """A progress bar that carries the reward, and a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}", loss=f"{logs['loss']:.2e}")
        means = re.compile(r"eval_(.+_)?reward(s/.+/mean)?")
        evaluated = [f"{name} {value:.3f}" for name, value in logs.items() if means.fullmatch(name)]
        if evaluated:
            self.training_bar.write(f"step {state.global_step}: {', '.join(evaluated)}")


class Trackers:
    """
    The runs that Trainer opened for `report_to`, and numbers, images and tables sent to them.

    Images go to wandb, trackio and TensorBoard, tables to wandb and trackio. Other trackers, which transformers feeds
    with numbers alone, get nothing from here; nor does one whose run is not open: before training, after its end, and
    on processes other than the main one.

    Names are kept as they are given. wandb and trackio count their logs by themselves; as Trainer does, each is given
    its `train/global_step`, by which wandb's charts are drawn.

    Args:
        callbacks (`list[~transformers.TrainerCallback]`):
            The trainer's callbacks, `trainer.callback_handler.callbacks`. The list is read when something is sent.
        current_step (`Callable[[], int]`):
            The optimiser step for what is sent without one, such as `lambda: trainer.state.global_step`.
    """

    def __init__(self, callbacks: list[TrainerCallback], current_step: Callable[[], int]):
        self._callbacks, self._current_step = callbacks, current_step

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """
        Send numbers.

        Args:
            values (`dict[str, float]`):
                Name and number.
            step (`int`, *optional*):
                Optimiser step; the present one if not given.
        """
        step = self._step(step)
        for writer in self._tensorboards():
            for name, value in values.items():
                writer.add_scalar(name, float(value), step)
            writer.flush()
        for module in self._modules():
            module.log({**{name: float(value) for name, value in values.items()}, "train/global_step": step})

    def log_images(self, images: dict[str, Tensor | Image.Image], step: int | None = None) -> None:
        """
        Send images.

        Args:
            images (`dict[str, torch.Tensor | PIL.Image.Image]`):
                Label and image: a picture, or a tensor of shape `(3, H, W)`, `(1, H, W)` or one more axis of length 1
                before, either uint8 or float in [0, 1].
            step (`int`, *optional*):
                Optimiser step; the present one if not given.

        Raises:
            `TypeError`, `ValueError`: for what is not one image.
        """
        step = self._step(step)
        pictures = {label: _picture(image, label) for label, image in images.items()}
        for writer in self._tensorboards():
            for label, picture in pictures.items():
                writer.add_image(label, _pixels(picture), step)
            writer.flush()
        for module in self._modules():
            shown = {label: module.Image(picture, caption=label) for label, picture in pictures.items()}
            module.log({**shown, "train/global_step": step})

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int | None = None) -> None:
        """
        Send a table.

        Args:
            name (`str`):
                Its name.
            rows (`list[dict[str, Any]]`):
                The rows, all with the same columns. A `PIL.Image` is shown as such.
            step (`int`, *optional*):
                Optimiser step; the present one if not given.
        """
        step = self._step(step)
        for module in self._modules():
            cells = [
                [module.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row.values()]
                for row in rows
            ]
            table = module.Table(columns=list(rows[0]) if rows else [], data=cells)
            module.log({name: table, "train/global_step": step})

    def _step(self, step: int | None) -> int:
        return self._current_step() if step is None else step

    def _tensorboards(self) -> Iterator[Any]:
        for callback in self._callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                yield callback.tb_writer

    def _modules(self) -> Iterator[Any]:
        """`wandb` and `trackio` where they have a run: what is used of them here has the same names in both."""
        for callback in self._callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
                yield callback._wandb
            if isinstance(callback, TrackioCallback) and callback._trackio.context_vars.current_run.get() is not None:
                yield callback._trackio


class RunLogCallback(TrainerCallback):
    """
    Keeps what the run is in `run.json`, and each of its logs as a line of `log.jsonl`, both in `output_dir`.

    A line is an entry of Trainer's `log_history`, with `null` for a number that is not finite. A run that is resumed
    adds to the file, so steps may recur: the last line of a step and of the same keys holds. A run that begins anew in
    a folder where there was another moves the other's log, samples and completions to `_earlier-1` (`-2`, ...).

    It must stand before the other callbacks of this file, which write where the earlier run's files are.

    Args:
        run (`dict[str, Any]`):
            What the run is: `method` (`str`), `base_model` (`str`), `config` (`dict`), `rewards` (names, `list[str]`),
            `versions` (`dict[str, str]`). Any of them may be missing; what JSON does not know is written as its `str`.
    """

    FILES = ("run.json", LOG, "samples", "completions")

    def __init__(self, run: dict[str, Any]):
        self.run = run
        self._file: Path | None = None  # evaluations before any training are not of this run

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir)
        if state.global_step == 0:
            _move_aside(directory, [directory / name for name in self.FILES])
        with written_aside(directory / "run.json") as path:
            path.write_text(json.dumps(self.run, indent=2, default=str) + "\n", encoding="utf-8")
        self._file = directory / LOG
        if self._file.is_file() and not self._file.read_bytes().endswith(b"\n"):
            self._append("")  # the last line was cut off by a kill

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._file is not None:
            self._append(json.dumps({**_finite(logs), "step": state.global_step}, default=float))

    def _append(self, line: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class SampleImagesCallback(TrainerCallback):
    """
    Draws the same prompts through training.

    It draws before the first step, then with every evaluation or every `every` steps, and after the last step; never
    twice for one step, and not outside of training. Each time leaves `samples/step-000040/` with `00.png`, `01.png`,
    ... and `samples.json` (`step`, `prompts`, `rewards`, `by_name`; a reward that failed or does not apply is `null`),
    and the captioned grid `samples/step-000040.png`, which goes to the trackers as `samples`.

    Args:
        generate (`Callable[[list[str]], torch.Tensor]`):
            Images of prompts, uint8 `(B, 3, H, W)`, each time from the same noise.
        score (`Callable[[torch.Tensor, list[dict]], Scores]`):
            Rewards of images and rows.
        rows (`list[dict[str, Any]]`):
            Rows of a data set, with their `prompt`.
        trackers ([`Trackers`]):
            Where the grid is sent.
        every (`int`, *optional*):
            Optimiser steps between two drawings; with every evaluation if not given.
    """

    def __init__(
        self,
        generate: Callable[[list[str]], Tensor],
        score: Callable[[Tensor, list[dict[str, Any]]], Scores],
        rows: list[dict[str, Any]],
        trackers: Trackers,
        every: int | None = None,
    ):
        if every is not None and every < 1:
            raise ValueError(f"`every` is {every}; it must be at least 1 step, or None for every evaluation.")
        self.generate, self.score, self.rows, self.trackers, self.every = generate, score, rows, trackers, every
        self._training = False
        self._drawn: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._drawn = True, None
        if state.global_step == 0:
            self._draw(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last step is drawn here: at the end of training the trackers have closed their runs already.
        if control.should_training_stop or (self.every is not None and state.global_step % self.every == 0):
            self._draw(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._training and self.every is None:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)  # where another callback stopped training between two steps: files alone
        self._training = False

    def _draw(self, args, state) -> None:
        step = state.global_step
        if not (state.is_world_process_zero and self.rows) or self._drawn == step:
            return
        self._drawn = step
        prompts = [row["prompt"] for row in self.rows]
        images = self.generate(prompts)
        scores = self.score(images, self.rows)
        rewards = _numbers(scores.rewards)
        pictures = [_picture(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        grid = _captioned_grid(f"step {step}", pictures, prompts, rewards)

        directory = Path(args.output_dir) / "samples"
        with written_aside(directory / f"step-{step:06d}") as folder:
            folder.mkdir()
            for number, picture in enumerate(pictures):
                picture.save(folder / f"{number:02d}.png")
            record = {
                "step": step,
                "prompts": prompts,
                "rewards": rewards,
                "by_name": {name: _numbers(values) for name, values in scores.by_name.items()},
            }
            (folder / "samples.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        with written_aside(directory / f"step-{step:06d}.png") as path:
            grid.save(path)
        self.trackers.log_images({"samples": grid}, step)


class CompletionsCallback(TrainerCallback):
    """
    Shows and keeps the images that are trained on: a table of prompts, rewards and advantages.

    It acts on the rounds in which Trainer logs: where a multiple of `logging_steps` is among the round's optimiser
    steps, and in the first round with `logging_first_step`. All images of the main process, of at most 128 pixels,
    are written to `completions/completions-000040.parquet`, 40 being the step at which the round begins; `datasets`
    and the Hub's viewer show them. Its columns are `step`, `round`, `group`, `prompt`, the data set's other columns
    of text or numbers, what rewards gave to `log_extra`, `reward`, `rewards/<name>` for each reward alone,
    `advantage` and `image`. A column of the data set that has one of these names is left out. A table of some rows is
    printed, and sent to wandb and trackio as `completions`.

    Args:
        num_completions_to_print (`int`, *optional*, defaults to `16`):
            Rows of the table that is printed and sent, from all groups alike, best to worst within a group. `None` for
            all.

    Raises:
        `ImportError`: if rich is not installed.
    """

    def __init__(self, num_completions_to_print: int | None = 16):
        try:
            import rich  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "`log_completions` prints its table with rich, which is not installed: `pip install rich`, or "
                "`pip install trl-dgpo[examples]`."
            ) from error
        self.num_completions_to_print = num_completions_to_print

    def on_rollout(self, args, state, control, scored: ScoredImages, trackers: Trackers, **kwargs):
        if not (state.is_world_process_zero and _logs_in_round(args, state)):
            return
        step = state.global_step
        rows = _completion_rows(scored, step)
        with written_aside(Path(args.output_dir) / "completions" / f"completions-{step:06d}.parquet") as path:
            _write_parquet(rows, path)
        shown = _spread(rows, self.num_completions_to_print)
        if shown:
            _print_table(shown, f"Step {step}, round {scored.round}: {len(shown)} of {len(rows)} images")
            trackers.log_table("completions", shown, step)


class SaveRolloutsCallback(TrainerCallback):
    """
    Keeps every round of a run as a rollout set to train on offline.

    Round 40 is `round-000040.parquet` in the folder, with the columns of
    [`~trl_dgpo.rollout_dataset.rounds_to_dataset`]; [`~trl_dgpo.rollout_dataset.load_rollouts`] reads all of them as
    one data set. A file stands there whole or not at all. Training moves rounds that are not its own to `_earlier-1`
    (`-2`, ...) in the folder when it begins: all of another run, and where it is resumed those since its checkpoint,
    which it will not make again in the same way.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder. On several machines the main process alone writes.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir)
        self._columns: RowColumns | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._columns = None
        if not state.is_world_process_zero:
            return
        files = {int(path.stem.removeprefix("round-")): path for path in self.output_dir.glob("round-*.parquet")}
        # Rounds that began before the checkpoint are this run's; one at its step is still to be rolled out.
        own = {round for round in files if state.global_step and round * args.steps_per_round < state.global_step}
        _move_aside(self.output_dir, [files[round] for round in sorted(files.keys() - own)])
        if own:
            self._columns = RowColumns.of_file(files[max(own)])

    def on_rollout(self, args, state, control, scored: ScoredImages, train_dataset: Any = None, **kwargs):
        scored = whole_round(scored)
        if not state.is_world_process_zero:
            return
        if self._columns is None:
            self._columns = RowColumns(getattr(train_dataset, "features", None))
        with written_aside(self.output_dir / f"round-{scored.round:06d}.parquet") as path:
            rounds_to_dataset([scored], self._columns).to_parquet(path)


def whole_round(scored: ScoredImages) -> ScoredImages:
    """
    A round's images of all processes, in the order of their groups: every process must call this.

    Args:
        scored ([`ScoredImages`]):
            This process's images.
    """
    names = ("images", "rewards", "advantages", "group_index", "x0")
    own = {name: getattr(scored, name).cpu() for name in names}
    parts = gather_object([dataclasses.replace(scored, **own)])
    # A group may lie on several processes, its first images on the first.
    order = torch.cat([part.group_index for part in parts]).argsort(stable=True)
    rows = [row for part in parts for row in part.rows]
    extra = {
        name: [value for part in parts for value in part.extra.get(name, [None] * len(part.rows))]
        for name in dict.fromkeys(name for part in parts for name in part.extra)
    }
    return dataclasses.replace(
        scored,
        **{name: torch.cat([getattr(part, name) for part in parts])[order] for name in names},
        rows=[rows[i] for i in order],
        by_name={name: torch.cat([part.by_name[name] for part in parts])[order] for name in scored.by_name},
        extra={name: [values[i] for i in order] for name, values in extra.items()},
    )


# -- files ------------------------------------------------------------------------------------------------------------


def _move_aside(directory: Path, earlier: list[Path]) -> None:
    """Move an earlier run's files out of a new one's way."""
    earlier = [path for path in earlier if path.exists()]
    if not earlier:
        return
    number = 1
    while (directory / f"_earlier-{number}").exists():
        number += 1
    aside = directory / f"_earlier-{number}"
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    numbers = {name for name in rows[0] if name in ("reward", "advantage") or name.startswith("rewards/")}
    columns = {  # the type of numbers is given: where all are missing, it would be another from file to file
        name: pyarrow.array([row[name] for row in rows], pyarrow.float64() if name in numbers else None)
        for name in rows[0]
        if name != "image"
    }
    features = {
        name: {"dtype": _DTYPES.get(str(values.type), str(values.type)), "_type": "Value"}
        for name, values in columns.items()
    }
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    thumbnails = [{"bytes": _jpeg(row["image"]), "path": None} for row in rows]
    table = pyarrow.table({**columns, "image": pyarrow.array(thumbnails, image)})
    # Where `datasets` looks for the types, without which an image is a struct of bytes.
    info = {"info": {"features": {**features, "image": {"_type": "Image"}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


_DTYPES = {"double": "float64"}  # Arrow's name of a type and that of `datasets`, where they differ


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# -- tables -----------------------------------------------------------------------------------------------------------


def _logs_in_round(args, state) -> bool:
    begin, end = state.global_step, state.global_step + args.steps_per_round
    if begin == 0 and args.logging_first_step:
        return True
    return args.logging_strategy == "steps" and end // state.logging_steps > begin // state.logging_steps


def _completion_rows(scored: ScoredImages, step: int) -> list[dict[str, Any]]:
    own = {"step", "round", "group", "prompt", "reward", "advantage", "image"}
    extra = {name: values for name, values in scored.extra.items() if name not in own}
    columns = {
        name: [row.get(name) for row in scored.rows]
        for name in scored.rows[0]
        if name not in own | extra.keys() and not name.startswith("rewards/")
    }
    columns = {name: _scalars(values) for name, values in (columns | extra).items()}
    rewards, advantages = _numbers(scored.rewards), _numbers(scored.advantages)
    by_name = {name: _numbers(values) for name, values in scored.by_name.items()}
    return [
        {
            "step": step,
            "round": scored.round,
            "group": group,
            "prompt": scored.rows[i]["prompt"],
            **{name: values[i] for name, values in columns.items() if values is not None},
            "reward": rewards[i],
            **{f"rewards/{name}": values[i] for name, values in by_name.items()},
            "advantage": advantages[i],
            "image": _thumbnail(scored.images[i]),
        }
        for i, group in enumerate(scored.group_index.tolist())
    ]


def _scalars(values: list[Any]) -> list[Any] | None:
    """A column as a table can hold it: numbers or text as they are, both mixed as text, anything else not at all."""
    given = [value for value in values if value is not None]
    if not all(isinstance(value, (bool, int, float, str)) for value in given):
        return None
    if len({str if isinstance(value, str) else bool if isinstance(value, bool) else float for value in given}) > 1:
        return [None if value is None else str(value) for value in values]
    if any(isinstance(value, float) for value in given):
        return [None if value is None else float(value) for value in values]
    return values


def _spread(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most so many rows, evenly over groups and, within them, over rewards."""
    worst = -math.inf
    order = sorted(rows, key=lambda row: (row["group"], -(worst if row["reward"] is None else row["reward"])))
    if limit is None or limit >= len(order):
        return order
    return [order[int((number + 0.5) * len(order) / limit)] for number in range(limit)]


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rewards = [name for name in rows[0] if name.startswith("rewards/")]
    table = Table(title=title, title_justify="left", row_styles=None)
    table.add_column("group", justify="right")
    table.add_column("prompt", ratio=1, overflow="fold")
    for name in rewards:
        table.add_column(name.removeprefix("rewards/"), justify="right", style="cyan")
    table.add_column("reward", justify="right", style="bold")
    table.add_column("advantage", justify="right", style="magenta")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        numbers = [_shown(row[name]) for name in (*rewards, "reward", "advantage")]
        # Text, because rich reads "[red]" in a plain string as markup.
        cells = [Text(cell) for cell in (str(row["group"]), row["prompt"], *numbers)]
        table.add_row(*cells, end_section=after is not None and after["group"] != row["group"])
    Console().print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.double().tolist()]


def _finite(logs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()
    }


# -- pictures ---------------------------------------------------------------------------------------------------------


def _picture(image: Tensor | Image.Image, label: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, Tensor):
        raise TypeError(f"Image {label!r} is a {type(image).__name__}; it must be a tensor or a `PIL.Image`.")
    pixels = image.squeeze(0) if image.ndim == 4 and len(image) == 1 else image
    if pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise ValueError(
            f"Image {label!r} has shape {tuple(image.shape)}; it must be one image, (3, H, W), (1, H, W) or one more "
            "axis of length 1 before. Give each image of a batch its own label."
        )
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().contiguous().numpy())


def _pixels(picture: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)


def _thumbnail(image: Tensor) -> Image.Image:
    picture = _picture(image, "image")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def _captioned_grid(
    title: str, pictures: list[Image.Image], prompts: list[str], rewards: list[float | None]
) -> Image.Image:
    """Pictures with prompt and reward below each, in rows of about 1600 pixels that are equally long."""
    width, height = _shown_size(pictures[0])
    margin, gap, head, line = 14, 12, 34, 17
    cell = max(width, 150)
    fit = max(1, (1600 - 2 * margin + gap) // (cell + gap))
    rows = -(-len(pictures) // fit)
    columns = -(-len(pictures) // rows)
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    captions = [_wrapped(prompt, font, cell) for prompt in prompts]
    caption = max(map(len, captions)) * line + 24
    size = (2 * margin + columns * (cell + gap) - gap, head + rows * (height + caption + gap) + 4)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    known = [reward for reward in rewards if reward is not None]
    mean = f"   mean reward {sum(known) / len(known):.3f}" if known else ""
    draw.text((margin, 9), title + mean, fill="#222222", font=bold)
    for number, picture in enumerate(pictures):
        left = margin + number % columns * (cell + gap)
        top = head + number // columns * (height + caption + gap)
        resampling = Image.NEAREST if picture.width < width else Image.LANCZOS
        grid.paste(picture.resize((width, height), resampling), (left, top))
        draw.text((left, top + height + 4), f"reward {_shown(rewards[number])}", fill="#0b57a4", font=font)
        for index, words in enumerate(captions[number]):
            draw.text((left, top + height + 4 + line * (index + 1)), words, fill="#444444", font=font)
    return grid


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    """Small images are enlarged by a whole factor to about 160 pixels, large ones made smaller."""
    longer = max(picture.size)
    if longer > PICTURE:
        return tuple(max(1, side * PICTURE // longer) for side in picture.size)
    factor = max(1, 160 // longer)
    return tuple(side * factor for side in picture.size)


def _wrapped(text: str, font: ImageFont.ImageFont, width: int, lines: int = 2) -> list[str]:
    return textwrap.wrap(text, max(8, int(width / font.getlength("n"))), max_lines=lines, placeholder=" ...")
