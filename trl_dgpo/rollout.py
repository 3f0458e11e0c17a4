"""
What a round of rollouts leaves behind for training.

`Rollout` holds exactly what an update reads: clean latents, conditioning, rewards, advantages and groups. The group
objectives noise `x0` afresh, so where it came from is not kept; `Walk` and `Trajectory` add that for methods which
learn from the steps of the sampler themselves.
`GroupRolloutBuffer` keeps one record for the length of a round. A process may hold only some rollouts of a group: what
concerns the whole group (its advantages, its size) is settled before the record is made.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rollout:
    """
    Rollouts of some groups, one row an image.

    What the model reads lies on its device, the bookkeeping on the CPU, where it can be looked at without waiting for
    that device.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, H, W)`):
            Clean latents in the transformer's space.
        conditioning (`dict[str, torch.Tensor]`):
            What the backbone encoded, one row a group, each tensor of shape `(N, ...)`.
        rewards (`torch.Tensor` of shape `(B,)`):
            Rewards, `NaN` where scoring failed: such a sample is masked.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 where masked.
        group_index (`torch.Tensor` of shape `(B,)`):
            Number of each rollout's group within the round, over all processes, in ascending order. Two groups of one
            prompt have two numbers.
        number_in_group (`torch.Tensor` of shape `(B,)`, *optional*):
            Each rollout's own number within its group. Counted here if not given, which is right only where no group
            is cut.
        group_sizes (`torch.Tensor` of shape `(N,)`, *optional*):
            Valid rollouts of each whole group, wherever they are. Counted here if not given, which is right only where
            no group is cut.

    Raises:
        `ValueError`: if the shapes do not fit one another or the groups are not in order.
    """

    x0: Tensor
    conditioning: dict[str, Tensor]
    rewards: Tensor
    advantages: Tensor
    group_index: Tensor
    number_in_group: Tensor | None = None
    group_sizes: Tensor | None = None

    def __post_init__(self):
        if self.number_in_group is None:
            counts = torch.unique_consecutive(self.group_index, return_counts=True)[1].tolist()
            numbers = [torch.arange(count) for count in counts]
            object.__setattr__(self, "number_in_group", torch.cat(numbers) if numbers else self.group_index)
        sizes = {name: len(getattr(self, name)) for name in self._per_image()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"A rollout needs one row an image in every field, but the lengths are {sizes}.")
        shapes = {name: tuple(getattr(self, name).shape) for name in ("rewards", "advantages", "group_index")}
        if any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"A rollout needs one number an image, of shape (B,), but the shapes are {shapes}.")
        if (self.group_index.diff() < 0).any():
            raise ValueError("`group_index` must ascend, so that the rows of a group stand together.")
        if self.group_sizes is None:
            counted = torch.zeros_like(self.groups).index_add(0, self.local_index, self.valid.to(self.groups.dtype))
            object.__setattr__(self, "group_sizes", counted)
        rows = {name: len(value) for name, value in {**self.conditioning, "group_sizes": self.group_sizes}.items()}
        if any(count != self.num_groups for count in rows.values()):
            raise ValueError(
                "`conditioning` and `group_sizes` need one row a group: there are "
                f"{self.num_groups} groups, but the rows are {rows}."
            )

    @cached_property
    def groups(self) -> Tensor:
        """Group numbers, ascending, `(N,)`."""
        return self.group_index.unique()

    @cached_property
    def local_index(self) -> Tensor:
        """Position of each rollout's group among `groups`, `(B,)`: what the losses take as `group_index`."""
        return torch.searchsorted(self.groups, self.group_index)

    @cached_property
    def valid(self) -> Tensor:
        """Mask of the rollouts whose reward did not fail, `(B,)`."""
        return ~self.rewards.isnan()

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def part(self, index: int, num_parts: int) -> "Rollout":
        """
        One of `num_parts` equal parts, consecutive rows; a group may be cut. The tensors are views.

        Raises:
            `ValueError`: if the rollouts do not divide.
        """
        count = len(self.group_index)
        if count % num_parts:
            raise ValueError(f"{count} rollouts cannot be divided into {num_parts} equal parts.")
        size = count // num_parts
        rows = slice(index * size, (index + 1) * size)
        groups = slice(int(self.local_index[rows][0]), int(self.local_index[rows][-1]) + 1)
        return replace(
            self,
            conditioning={name: value[groups] for name, value in self.conditioning.items()},
            group_sizes=self.group_sizes[groups],
            **{name: getattr(self, name)[rows] for name in self._per_image()},
        )

    def to(self, device: torch.device | str) -> "Rollout":
        """The same with what the model reads on a device."""
        conditioning = {name: value.to(device) for name, value in self.conditioning.items()}
        return replace(self, x0=self.x0.to(device), conditioning=conditioning)

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _per_image(self) -> list[str]:
        return [field.name for field in fields(self) if field.name not in ("conditioning", "group_sizes")]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Rollout":
        return cls(**state)


@dataclass(frozen=True, eq=False, kw_only=True)
class Walk(Rollout):
    """
    Rollouts with K consecutive steps of their sampling, in float32: what is left of a small step in half precision is
    mostly rounding.

    Args:
        latents (`torch.Tensor` of shape `(B, K + 1, C, H, W)`):
            Latents before each of these steps, and after the last.
    """

    latents: Tensor

    def to(self, device: torch.device | str) -> "Walk":
        return replace(super().to(device), latents=self.latents.to(device))


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory(Walk):
    """
    Rollouts with K consecutive stochastic steps of their sampling.

    Args:
        log_probs (`torch.Tensor` of shape `(B, K)`):
            Log-probability of each step under the policy that took it, a mean over latent elements.
        steps (`torch.Tensor` of shape `(B, K)`):
            Numbers of these steps in the sampler's grid, the same for all images.

    Raises:
        `ValueError`: as [`Rollout`], or if the numbers of steps do not fit one another.
    """

    log_probs: Tensor
    steps: Tensor

    def __post_init__(self):
        super().__post_init__()
        count = self.latents.shape[1] - 1
        shapes = {name: tuple(getattr(self, name).shape) for name in ("log_probs", "steps")}
        if any(shape[1:] != (count,) for shape in shapes.values()):
            raise ValueError(f"A trajectory of {count + 1} latents has {count} steps, but the shapes are {shapes}.")

    def to(self, device: torch.device | str) -> "Trajectory":
        return replace(super().to(device), log_probs=self.log_probs.to(device))


@dataclass
class Visited:
    """
    Where a round's latents are written while they are sampled, some rows after the other: one piece of memory from the
    start, that nothing is ever copied together from.

    Args:
        latents (`torch.Tensor` of shape `(B, K + 1, C, H, W)`):
            Room for those of all images.
        done (`int`, *optional*, defaults to `0`):
            Rows that are filled.
    """

    latents: Tensor
    done: int = 0

    def add(self, number: int, x_t: Tensor, x_next: Tensor) -> slice:
        """Write what some images' step of this number came from and led to; the rows that they have."""
        rows = slice(self.done, self.done + len(x_t))
        if number == 0:
            self.latents[rows, 0] = x_t
        self.latents[rows, number + 1] = x_next
        if number == self.latents.shape[1] - 2:
            self.done = rows.stop
        return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Preferences(Rollout):
    """
    Rollouts with what each is preferred to: Diffusion-DPO's record.

    Args:
        preferences (`torch.Tensor` of shape `(B, G)`):
            Preference of each image over each member of its whole group, by its number, wherever that member is. From
            [`~trl_dgpo.advantages.preference_pairs`].
    """

    preferences: Tensor


class Record(Protocol):
    """What a buffer can hold: rollouts that can be divided, moved, saved and restored."""

    def part(self, index: int, num_parts: int) -> "Record": ...

    def to(self, device: torch.device | str) -> "Record": ...

    def state_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Record": ...


RecordT = TypeVar("RecordT", bound=Record)


class GroupRolloutBuffer(Generic[RecordT]):
    """
    The rollouts of the present round.

    Generic over its record, so that a method that trains on more than `x0` brings a record of its own.

    Args:
        record_type (`type`, *optional*, defaults to `Rollout`):
            Class of the records, needed to restore one.
    """

    def __init__(self, record_type: type[RecordT] = Rollout):
        self.record_type = record_type
        self.round: int | None = None
        self._record: RecordT | None = None

    @property
    def record(self) -> RecordT:
        if self._record is None:
            raise ValueError("The buffer is empty: `fill` it with a round of rollouts first.")
        return self._record

    def fill(self, record: RecordT, round: int) -> None:
        """Hold the rollouts of a round in place of those of the last."""
        self._record, self.round = record, round

    def clear(self) -> None:
        self._record = self.round = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers alone, fit for `torch.save` and `torch.load(weights_only=True)`."""
        record = None if self._record is None else self._record.state_dict()
        return {"round": self.round, "record": record}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Restore what `state_dict` gave, with what the model reads on a device."""
        record = state["record"]
        self.round = state["round"]
        self._record = None if record is None else self.record_type.from_state_dict(record).to(device)


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """
    One process's images of a round as a person would look at them: what callbacks with an `on_rollout` method get.

    Args:
        round (`int`):
            Number of the round.
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            uint8 images, on the CPU.
        rows (`list[dict[str, Any]]`):
            Row of the data set, with its `prompt`, of each image.
        rewards (`torch.Tensor` of shape `(B,)`):
            Weighted rewards, float64, `NaN` where masked.
        by_name (`dict[str, torch.Tensor]`):
            Each reward alone, `(B,)`.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, 0 where masked.
        group_index (`torch.Tensor` of shape `(B,)`):
            Group of each image, ascending.
        extra (`dict[str, list]`):
            What rewards gave to `log_extra`, one value an image.
        x0 (`torch.Tensor` of shape `(B, C, h, w)`):
            The images' clean latents.
    """

    round: int
    images: Tensor
    rows: list[dict[str, Any]]
    rewards: Tensor
    by_name: dict[str, Tensor]
    advantages: Tensor
    group_index: Tensor
    extra: dict[str, list]
    x0: Tensor
