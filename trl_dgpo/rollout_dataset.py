"""
Rollouts as a `datasets.Dataset`: written, read back, and read as what to train on.

One row an image, with prompt, picture, reward, advantage and group, so that people can look at it in the dataset
viewer, and with latent and conditioning, so that it can be trained on again. It is saved and shared as any other data
set: `save_to_disk`, `push_to_hub`. [`SavedGroups`] gives the groups of such a set, which may hold many rounds, to a
trainer that samples nothing itself.
"""

import io
import logging
import os
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import torch
from PIL import Image, ImageOps
from pyarrow import parquet
from torch import Tensor

from .rollout import Rollout, ScoredImages


logger = logging.getLogger(__name__)

_OWN = {"prompt", "image", "reward", "advantage", "group", "x0", "x0.shape", "round"}  # columns of a set of rounds
_PREFIX = "conditioning."
_PAIRS = {"caption", "jpg_0", "jpg_1", "label_0"}  # the columns of Pick-a-Pic that are read
_GROUP_KEY = ("round", "group", "prompt")  # where one of them changes, a group ends


def to_dataset(rollout: Rollout, prompts: list[str], images: Tensor) -> datasets.Dataset:
    """
    Rollouts, with prompts and images, as a data set.

    The conditioning of a group stands in its first row alone, and is empty in the others.

    Args:
        rollout ([`Rollout`]):
            The rollouts.
        prompts (`list[str]`):
            Prompt of each group, of length `N`.
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            The pictures, uint8.

    Returns:
        `datasets.Dataset` with the columns `prompt`, `image`, `reward`, `advantage`, `group`, `x0` and one
        `conditioning.*` a tensor of the conditioning; tensors are flat lists of float32 beside their `*.shape`.

    Raises:
        `ValueError`: if prompts or images do not match the rollouts.
    """
    if len(prompts) != rollout.num_groups or len(images) != len(rollout.x0):
        raise ValueError(
            f"{len(prompts)} prompts and {len(images)} images do not fit {rollout.num_groups} groups of "
            f"{len(rollout.x0)} rollouts; give one prompt a group and one image a rollout."
        )
    local = rollout.local_index.tolist()
    first = [i == 0 or local[i] != local[i - 1] for i in range(len(local))]
    columns = {
        "prompt": [prompts[g] for g in local],
        "image": [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()],
        "reward": rollout.rewards.tolist(),
        "advantage": rollout.advantages.tolist(),
        "group": rollout.group_index.tolist(),
        **_flat("x0", list(rollout.x0)),
    }
    for name, value in rollout.conditioning.items():
        columns |= _flat(_PREFIX + name, [value[g] if new else None for g, new in zip(local, first, strict=True)])
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image(),
            "reward": datasets.Value("float64"),
            "advantage": datasets.Value("float32"),
            "group": datasets.Value("int64"),
            **{
                name: datasets.List(datasets.Value("int64" if name.endswith(".shape") else "float32"))
                for name in columns
                if name.startswith((_PREFIX, "x0"))
            },
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def from_dataset(dataset: datasets.Dataset) -> tuple[Rollout, list[str], Tensor]:
    """
    The inverse of `to_dataset`: rollouts, prompts and images, equal to the bit in float32.

    Rows may be a selection, as long as the groups stay whole and in order.

    Returns:
        `tuple` of [`Rollout`], the prompt of each group and the images `(B, 3, H, W)` in uint8.

    Raises:
        `ValueError`: if columns are missing, or a group has lost its first row.
    """
    missing = {"prompt", "image", "reward", "advantage", "group", "x0"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"The data set lacks the columns {sorted(missing)}; it is not one that `to_dataset` made.")
    group = torch.tensor(dataset["group"][:])
    starts = [i for i in range(len(group)) if i == 0 or group[i] != group[i - 1]]
    names = [c for c in dataset.column_names if c.startswith(_PREFIX) and not c.endswith(".shape")]
    conditioning = {}
    for name in names:
        rows = _tensors(dataset.select(starts), name)
        if any(row is None for row in rows):
            raise ValueError(f"A group's first row, which holds its {name!r}, is missing; select whole groups.")
        conditioning[name.removeprefix(_PREFIX)] = torch.stack(rows)
    pictures = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in dataset["image"]]
    rollout = Rollout(
        x0=torch.stack(_tensors(dataset, "x0")),
        conditioning=conditioning,
        rewards=torch.tensor(dataset["reward"][:], dtype=torch.float64),
        advantages=torch.tensor(dataset["advantage"][:], dtype=torch.float32),
        group_index=group,
    )
    return rollout, [dataset[i]["prompt"] for i in starts], torch.stack(pictures)


class RowColumns:
    """
    What a set of rounds keeps of the prompts' own rows: the same columns, of the same types, in every round.

    Where the prompts are a `datasets.Dataset` its features say so, and every column is kept that is made of text,
    numbers, truth values, dates, and lists and records of them. Elsewhere the first round says so: kept are the
    columns in which it has text alone, numbers alone (as float64) or truth values alone, beside `None`. A value that
    is missing in a row, or does not fit its column's type, is null. What is lost so is told in one warning a column,
    but for what is empty; nothing is ever raised, since training is on its way.

    Args:
        features (`datasets.Features`, *optional*):
            Columns of the prompts' data set, or of the set that is added to ([`RowColumns.of_file`]). Anything else,
            which data sets of other libraries may have under this name, tells nothing.
    """

    def __init__(self, features: Any = None):
        self._features: dict[str, Any] | None = None
        if isinstance(features, datasets.Features):
            self._features = {name: f for name, f in features.items() if name not in _OWN and _is_plain(f)}
        self._told: set[str] = set()

    @classmethod
    def of_file(cls, path: Path) -> "RowColumns":
        """The columns of a Parquet file that a set of rounds was written to."""
        return cls(datasets.Features.from_arrow_schema(parquet.read_schema(path)))

    def of(self, rows: list[dict[str, Any]]) -> datasets.Dataset | None:
        """The columns of some rows, one row each; `None` if there are none."""
        names = sorted({name for row in rows for name in row} - _OWN)
        values = {name: [row.get(name) for row in rows] for name in names}
        if self._features is None:
            found = {name: _scalar_feature(column) for name, column in values.items()}
            self._features = {name: feature for name, feature in found.items() if feature is not None}
        lost = {name for name in names if name not in self._features and not all(map(_is_empty, values[name]))}
        kept = []
        for name, feature in self._features.items():
            column = values.get(name, [None] * len(rows))
            part = _column(name, column, feature)
            if part is None:
                fits = [_column(name, [value], feature) is not None for value in column]
                if not all(fit or _is_empty(value) for fit, value in zip(fits, column, strict=True)):
                    lost.add(name)
                column = [value if fit else None for fit, value in zip(fits, column, strict=True)]
                part = _column(name, column, feature)
            kept.append(part)
        if new := sorted(lost - self._told):
            self._told |= lost
            logger.warning(
                "The rollout set leaves out the columns %s of the prompts, or some of their values: it keeps text and "
                "numbers, of one type through all rounds. Give the prompts as a `datasets.Dataset`, whose features "
                "tell the types.",
                new,
            )
        return datasets.concatenate_datasets(kept, axis=1) if kept else None


def rounds_to_dataset(rounds: list[ScoredImages], columns: RowColumns | None = None) -> datasets.Dataset:
    """
    Whole rounds, one after the other, as a data set to train on offline.

    There is no conditioning in it: prompts are encoded by the model that trains.

    Args:
        rounds (`list[ScoredImages]`):
            At least one, with their `x0`.
        columns ([`RowColumns`], *optional*):
            What is kept of the prompts' rows. The same object must be given for all rounds of one set. As the first of
            these rounds says if not given.

    Returns:
        `datasets.Dataset` with the columns of [`to_dataset`], `round`, and the columns that the prompts' data set had
        beside `prompt`, where they have not one of these names, for rewards to read when they score the pictures anew.
    """
    columns, parts = columns or RowColumns(), []
    for scored in rounds:
        rollout = Rollout(scored.x0, {}, scored.rewards, scored.advantages, scored.group_index)
        first = torch.searchsorted(scored.group_index, rollout.groups).tolist()
        part = to_dataset(rollout, [scored.rows[i]["prompt"] for i in first], scored.images)
        part = part.add_column("round", [scored.round] * len(part))
        of_rows = columns.of(scored.rows)
        parts.append(part if of_rows is None else datasets.concatenate_datasets([part, of_rows], axis=1))
    return datasets.concatenate_datasets(parts)


def load_rollouts(path: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """
    A saved rollout set, or any data set of pictures, from where it is.

    Args:
        path (`str` or `os.PathLike`):
            A folder that `save_to_disk` wrote, a folder of Parquet files such as
            [`~trl_dgpo.callbacks.SaveRolloutsCallback`] leaves, one Parquet file, or an id on the Hub. Files whose
            name begins with an underscore are not finished, and are left out.
        split (`str`, *optional*, defaults to `"train"`):
            Which split of a data set that has several.

    Raises:
        `FileNotFoundError`, `ValueError`: as of `datasets`, if there is no such data set or split.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(folder)
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if split not in loaded:
            raise ValueError(f"`split` is {split!r}; {os.fspath(path)!r} has {sorted(loaded)}.")
        return loaded[split]
    found = [folder] if folder.is_file() else sorted(folder.glob("*.parquet"))
    if files := [str(file) for file in found if not file.name.startswith("_")]:
        return datasets.load_dataset("parquet", data_files=files, split="train")
    return datasets.load_dataset(os.fspath(path), split=split)


class SavedImages(NamedTuple):
    """
    Some pictures of a saved group.

    Args:
        images (`list[PIL.Image.Image]`):
            The pictures, RGB.
        rewards (`torch.Tensor` of shape `(B,)`):
            Saved rewards, float64, `NaN` where missing.
        x0 (`list[torch.Tensor | None]`):
            Saved latents, `None` where there is none.
    """

    images: list[Image.Image]
    rewards: Tensor
    x0: list[Tensor | None]


class SavedGroups:
    """
    The groups of a saved data set: a sequence of rows with a `prompt`, one a group, whose pictures are read when asked
    for.

    Three kinds of data sets are told apart by their columns:

    - A rollout set: `prompt` and `image`, with `reward` or `group` or both, as [`to_dataset`] writes it, as another
      model made it, or by hand. Consecutive rows of one prompt and one number in `group` (and in `round`, if there is
      such a column) are a group. `x0` may be missing; `advantage` and `conditioning.*` are not read, since both are
      the trainer's own business. Of sets that are put together the `round`s must be numbered on.
    - Pairs in Pick-a-Pic's columns: `caption`, `jpg_0`, `jpg_1`, `label_0` (1 where the first is preferred, 0 where
      the second is, 0.5 for a tie). A row is a group of two with rewards `label_0` and `label_1`, or 1 - `label_0`
      without that column. Where `has_label` is there and false, the rewards are `NaN`. A column `prompt` is not read.
    - Pictures with captions: `prompt` and `image`, without `reward` and `group`. A row is a group of one.

    Only columns of numbers and text are read to find the groups, no picture is.

    Args:
        dataset (`datasets.Dataset`):
            The rows.

    Attributes:
        sizes (`torch.Tensor` of shape `(len(self),)`):
            Images of each group.
        firsts (`torch.Tensor` of shape `(len(self),)`):
            Number of each group's first image, counted over all groups.
        rewards (`torch.Tensor`):
            Reward of each image, over all groups, float64; `NaN` where it is missing.
        has_rewards (`bool`):
            Whether the set has rewards at all.

    Raises:
        `TypeError`: if `dataset` is not a `datasets.Dataset`.
        `ValueError`: if it is of none of these kinds, is empty, has a label outside of [0, 1], or if the rows of a
            numbered group do not stand together.
    """

    def __init__(self, dataset: datasets.Dataset):
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"`train_dataset` is a {type(dataset).__name__}; saved pictures are read from a `datasets.Dataset`, "
                "which `datasets.Dataset.from_list` makes of rows."
            )
        columns = set(dataset.column_names)
        self.is_pairs = columns >= _PAIRS
        if not (self.is_pairs or columns >= {"prompt", "image"}):
            raise ValueError(
                f"`train_dataset` has the columns {sorted(columns)}; saved pictures need `prompt` and `image`, with "
                f"`reward` where something is to be learned from it, or pairs in the columns {sorted(_PAIRS)}."
            )
        if not len(dataset):
            raise ValueError("`train_dataset` is empty; it needs at least one row.")
        self.has_rewards = self.is_pairs or "reward" in columns
        self._dataset = dataset
        self.rewards = self._read_rewards(columns)
        if self.is_pairs:
            own = {column for column in columns if column.startswith(("jpg_", "label_"))} | {"caption", "prompt"}
            self.sizes = torch.full((len(dataset),), 2)
        else:
            own = {"image", "reward", "advantage", "x0", "x0.shape", *_GROUP_KEY}
            own |= {column for column in columns if column.startswith(_PREFIX)}
            starts = self._group_starts(columns) if columns & {"reward", "group"} else range(len(dataset))
            self.sizes = torch.tensor([*starts, len(dataset)]).diff()
        self.firsts = self.sizes.cumsum(0) - self.sizes
        self._rows = dataset.select_columns(["caption" if self.is_pairs else "prompt", *sorted(columns - own)])

    @staticmethod
    def fits(dataset: Any) -> bool:
        """
        Whether a data set says by its columns that it holds groups of pictures.

        One of `prompt` and `image` alone does not: with rewards it is one of prompts, which come with a picture.
        """
        if not isinstance(dataset, datasets.Dataset):
            return False
        return SavedGroups.may_fit(dataset) and not {"reward", "group", *_PAIRS}.isdisjoint(dataset.column_names)

    @staticmethod
    def may_fit(dataset: Any) -> bool:
        """Whether a data set has pictures with prompts at all."""
        return isinstance(dataset, datasets.Dataset) and (
            set(dataset.column_names) >= _PAIRS or {"prompt", "image"} <= set(dataset.column_names)
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def features(self) -> datasets.Features:
        """Types of what a group's row has."""
        return self._rows.features

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`prompt` of a group, and what its first row has in columns that are not named above."""
        if self.is_pairs:
            row = self._rows[index]
            return {"prompt": row.pop("caption"), **row}
        return self._rows[int(self.firsts[index])]

    def read(self, index: int, numbers: list[int]) -> SavedImages:
        """
        Pictures of a group.

        Args:
            index (`int`):
                Number of the group in the set.
            numbers (`list[int]`):
                Which of its images: no other is read.
        """
        images = self.firsts[index] + torch.tensor(numbers)
        if self.is_pairs:
            row = self._dataset[index]
            pictures, x0 = [row[f"jpg_{number}"] for number in numbers], [None] * len(numbers)
        else:
            rows = self._dataset.select(images.tolist())
            pictures = rows["image"][:]
            has_x0 = {"x0", "x0.shape"} <= set(rows.column_names)
            x0 = _tensors(rows, "x0") if has_x0 else [None] * len(numbers)
        return SavedImages([_picture(picture) for picture in pictures], self.rewards[images], x0)

    def best(self) -> "BestOfGroups":
        """The best image of each group alone, as groups of one."""
        return BestOfGroups(self)

    def _read_rewards(self, columns: set[str]) -> Tensor:
        if not self.is_pairs:
            has_none = torch.full((len(self._dataset),), torch.nan, dtype=torch.float64)
            return _numbers(self._dataset, "reward") if self.has_rewards else has_none
        labels = _numbers(self._dataset, "label_0")
        others = _numbers(self._dataset, "label_1") if "label_1" in columns else 1 - labels
        rewards = torch.stack([labels, others], 1)
        if "has_label" in columns:
            rewards[_numbers(self._dataset, "has_label") == 0] = torch.nan
        if wrong := rewards[(rewards < 0) | (rewards > 1)].tolist():
            raise ValueError(f"`train_dataset` has the label {wrong[0]}; labels of pairs are 1, 0 or 0.5 for a tie.")
        return rewards.flatten()

    def _group_starts(self, columns: set[str]) -> list[int]:
        # As Arrow's own arrays and chunk by chunk, a million rows take a second and not a minute.
        keys = [column for column in _GROUP_KEY if column in columns]
        light, starts, before, seen = self._dataset.select_columns(keys).with_format("arrow"), [], None, set()
        for first in range(0, len(light), 10_000):
            table = light[first : first + 10_000]
            for row, key in enumerate(zip(*(table[name].to_pylist() for name in keys), strict=True), start=first):
                if key != before:
                    starts.append(row)
                    if "group" in columns and key in seen:
                        sort = [name for name in keys if name != "prompt"]
                        raise ValueError(
                            f"The rows of a group of `train_dataset` do not stand together: {dict(zip(keys, key))} "
                            f"comes again in row {row}. If the set was shuffled, undo it with `dataset.sort({sort})`; "
                            "if several were put together, number the `round`s of the later ones on."
                        )
                    seen.add(key)
                before = key
        return starts


class BestOfGroups:
    """
    Of each group of a saved set the image of highest reward, the first of several, as a sequence of groups of one.

    A group without any reward that is a number is left out. Of a set without rewards every image is its group's best,
    and has reward 0.

    Args:
        saved ([`SavedGroups`]):
            The groups.

    Raises:
        `ValueError`: if nothing is left, or there are groups of several images and no rewards.
    """

    def __init__(self, saved: SavedGroups):
        if not saved.has_rewards and int(saved.sizes.max()) > 1:
            raise ValueError(
                f"`train_dataset` has groups of up to {int(saved.sizes.max())} images and no column `reward` that "
                "says which is the best. Add that column, or drop the column `group` to train on every image."
            )
        self._saved, self.has_rewards = saved, saved.has_rewards
        rewards = saved.rewards.nan_to_num(-torch.inf) if saved.has_rewards else torch.zeros(len(saved.rewards))
        # Of each group's rows in falling order, equal ones as they stand, the first: by groups, then by rewards.
        group = torch.arange(len(saved)).repeat_interleave(saved.sizes)
        order = rewards.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        best = order[saved.firsts]
        valid = rewards[best] > -torch.inf
        self._groups, self._numbers = group[best][valid], (best - saved.firsts)[valid]
        if not len(self._groups):
            raise ValueError("`train_dataset` has no reward that is a number; nothing would be learned from it.")
        self.sizes = torch.ones(len(self._groups), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._saved[int(self._groups[index])]

    def read(self, index: int, numbers: list[int]) -> SavedImages:
        best = self._saved.read(int(self._groups[index]), [int(self._numbers[index]) for _ in numbers])
        return best if self.has_rewards else best._replace(rewards=torch.zeros_like(best.rewards))


def fitted(picture: Image.Image, height: int, width: int) -> Tensor:
    """
    A picture as `(3, height, width)`, uint8: as it is where it has this size, else scaled until it covers it and cut
    around the centre, as in the training examples of diffusers.
    """
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _column(name: str, values: list[Any], feature: Any) -> datasets.Dataset | None:
    """A column of a type; `None` if its values do not fit it."""
    try:
        return datasets.Dataset.from_dict({name: values}, features=datasets.Features({name: feature}))
    except (TypeError, ValueError, AttributeError, OverflowError, pyarrow.ArrowException):
        return None


def _is_plain(feature: Any) -> bool:
    """Whether a column's type is of text and numbers, and of lists and records of them."""
    if isinstance(feature, dict):
        return bool(feature) and all(map(_is_plain, feature.values()))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_plain(feature.feature)
    return isinstance(feature, datasets.Value | datasets.ClassLabel)


def _scalar_feature(values: list[Any]) -> datasets.Value | None:
    """Type of a column that no data set tells the type of; `None` if it is empty, mixed, or no text or number."""
    kinds = {
        "bool"
        if isinstance(value, bool)
        else "float64"
        if isinstance(value, Real)
        else isinstance(value, str) and "string"
        for value in values
        if not _is_empty(value)
    }
    return datasets.Value(kinds.pop()) if len(kinds) == 1 and False not in kinds else None


def _is_empty(value: Any) -> bool:
    if isinstance(value, Real):
        return value != value  # NaN: what numpy has for a missing number
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _picture(image: Any) -> Image.Image:
    """A picture of a data set: decoded already, or the bytes of its file."""
    if isinstance(image, dict):
        image = image["bytes"]
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"A picture of `train_dataset` is a {type(image).__name__}; it must be a `PIL.Image` or the bytes of an "
            "image file. `dataset.cast_column(name, datasets.Image())` makes one of the other."
        )
    return image.convert("RGB")


def _numbers(dataset: datasets.Dataset, name: str) -> Tensor:
    """A column of numbers as float64, `NaN` where there is none."""
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    return torch.from_numpy(np.array(column.to_pylist(), dtype=np.float64))


def _flat(name: str, tensors: list[Tensor | None]) -> dict[str, list]:
    return {
        name: [None if t is None else t.detach().float().cpu().flatten().numpy() for t in tensors],
        f"{name}.shape": [None if t is None else list(t.shape) for t in tensors],
    }


def _tensors(dataset: datasets.Dataset, name: str) -> list[Tensor | None]:
    columns = dataset.select_columns([name, f"{name}.shape"]).with_format("numpy")
    return [
        None if row[name] is None else torch.tensor(row[name], dtype=torch.float32).view(row[f"{name}.shape"].tolist())
        for row in columns
    ]
