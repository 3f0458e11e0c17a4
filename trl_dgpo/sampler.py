"""
Which prompts a round is made of.

`GroupSampler` deals a data set with rows by index from an endless sequence of permutations. Each permutation is a pure
function of seed and epoch, so any round can be dealt at any time, in any process, without having dealt the ones
before. `StreamSampler` deals a stream, which can only be read on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .seeding import generator


class GroupSampler:
    """
    Deals the prompts of each round: one row of the data set a group.

    A round that reaches the end of one permutation runs on into the next, so no prompt is dropped and three prompts
    can fill a round of eight. A prompt that a round holds twice makes two groups.

    Args:
        dataset (sequence):
            Rows by index, such as a `datasets.Dataset`.
        prompts_per_round (`int`):
            Groups of a round, over all processes.
        seed (`int`):
            Seed of the permutations.
        shuffle (`bool`, *optional*, defaults to `True`):
            Deal in the data set's order if `False`.

    Raises:
        `ValueError`: if there is no prompt.
    """

    def __init__(self, dataset: Sequence[Any], prompts_per_round: int, *, seed: int, shuffle: bool = True):
        if len(dataset) < 1:
            raise ValueError("The training data set is empty; it needs at least one row with a `prompt`.")
        self.dataset = dataset
        self.prompts_per_round = prompts_per_round
        self.seed = seed
        self.shuffle = shuffle

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds, from the first on, after which every prompt has been dealt at least once."""
        return -(-len(self.dataset) // self.prompts_per_round)

    def deal(self, round: int) -> list[int]:
        """
        Dataset indices of a round's groups, in the order of the group numbers.

        Args:
            round (`int`):
                Number of the round, from 0.

        Returns:
            `list[int]` of length `prompts_per_round`.
        """
        start, num_prompts = round * self.prompts_per_round, len(self.dataset)
        positions = range(start, start + self.prompts_per_round)
        epochs = {position // num_prompts for position in positions}
        orders = {epoch: self._permutation(epoch) for epoch in epochs}
        return [orders[position // num_prompts][position % num_prompts] for position in positions]

    def rows(self, round: int, groups: list[int]) -> list[Any]:
        """Rows of some of a round's groups; no other row is read."""
        deal = self.deal(round)
        return [self.dataset[deal[group]] for group in groups]

    def seek(self, round: int) -> None:
        """Nothing to do: a round can be dealt without the ones before."""

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        return torch.randperm(len(self.dataset), generator=generator(self.seed, "prompts", epoch)).tolist()


class StreamSampler:
    """
    Deals the prompts of each round from a stream, in its own order: every process reads all of it.

    At its end the stream is begun again, after `set_epoch` if it has that method (as `datasets.IterableDataset`, whose
    shuffling then differs from epoch to epoch).

    Args:
        stream (iterable):
            Rows in an order that is the same in every process and every time it is begun.
        prompts_per_round (`int`):
            Groups of a round, over all processes.
    """

    def __init__(self, stream: Iterable[Any], prompts_per_round: int):
        self.stream = stream
        self.prompts_per_round = prompts_per_round
        self._begin()

    def rows(self, round: int, groups: list[int]) -> list[Any]:
        """
        Rows of some of a round's groups.

        Raises:
            `ValueError`: if the stream is empty.
        """
        self.seek(round)
        dealt = [self._next() for _ in range(self.prompts_per_round)]
        return [dealt[group] for group in groups]

    def seek(self, round: int) -> None:
        """Read on to a round's first row, from the stream's beginning if that row has passed."""
        target = round * self.prompts_per_round
        if target < self._position:
            self._begin()
        while self._position < target:
            self._next()

    def _begin(self) -> None:
        self._position, self._epoch, self._iterator = 0, 0, None

    def _next(self) -> Any:
        if self._iterator is None:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(self._epoch)
            self._iterator, self._fresh = iter(self.stream), True
        for row in self._iterator:
            self._fresh = False
            self._position += 1
            return row
        if self._fresh:
            raise ValueError("The training data set is empty; it needs at least one row with a `prompt`.")
        self._epoch, self._iterator = self._epoch + 1, None
        return self._next()


def local_rollouts(
    prompts_per_round: int, num_generations: int, num_updates: int, process_index: int, num_processes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which of a round's rollouts one process samples and trains on.

    Each of the round's `num_updates` parts, whole groups, is divided equally among the processes in the order of its
    rollouts, so that every optimiser step sees the same groups whatever the number of processes. A group may lie on
    two processes or more.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(prompts_per_round * num_generations / num_processes,)`, int64: number
        of each rollout's group, ascending, and its own number within the group.
    """
    rollouts = torch.arange(prompts_per_round * num_generations).view(num_updates, num_processes, -1)
    own = rollouts[:, process_index].flatten()
    return own // num_generations, own % num_generations
