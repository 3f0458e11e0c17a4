"""
A round of rollouts as a `datasets.Dataset`.

One row an image, with prompt, picture, reward, advantage and group, so that people can look at it in the dataset
viewer, and with latent and conditioning, so that it can be trained on again. It is saved and shared as any other data
set: `save_to_disk`, `push_to_hub`.
"""

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .rollout import Rollout


_PREFIX = "conditioning."


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
