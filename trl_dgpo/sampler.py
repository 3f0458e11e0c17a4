"""
Which prompts a round is made of.

Groups are dealt in whole rounds from an endless sequence of permutations of the data set. Each permutation is a pure
function of seed and epoch, so any round can be dealt at any time, in any process, without having dealt the ones
before.
"""

import torch

from .seeding import generator


class GroupSampler:
    """
    Deals the prompts of each round: one dataset index a group.

    A round that reaches the end of one permutation runs on into the next, so no prompt is dropped and three prompts
    can fill a round of eight. A prompt that a round holds twice makes two groups.

    Args:
        num_prompts (`int`):
            Length of the data set.
        prompts_per_round (`int`):
            Groups of a round, over all processes.
        seed (`int`):
            Seed of the permutations.
        shuffle (`bool`, *optional*, defaults to `True`):
            Deal in the data set's order if `False`.

    Raises:
        `ValueError`: if there is no prompt.
    """

    def __init__(self, num_prompts: int, prompts_per_round: int, *, seed: int, shuffle: bool = True):
        if num_prompts < 1:
            raise ValueError("The training data set is empty; it needs at least one row with a `prompt`.")
        self.num_prompts = num_prompts
        self.prompts_per_round = prompts_per_round
        self.seed = seed
        self.shuffle = shuffle

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds, from the first on, after which every prompt has been dealt at least once."""
        return -(-self.num_prompts // self.prompts_per_round)

    def deal(self, round: int) -> list[int]:
        """
        Dataset indices of a round's groups, in the order of the group numbers.

        Args:
            round (`int`):
                Number of the round, from 0.

        Returns:
            `list[int]` of length `prompts_per_round`.
        """
        start = round * self.prompts_per_round
        positions = range(start, start + self.prompts_per_round)
        epochs = {position // self.num_prompts for position in positions}
        orders = {epoch: self._permutation(epoch) for epoch in epochs}
        return [orders[position // self.num_prompts][position % self.num_prompts] for position in positions]

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_prompts))
        return torch.randperm(self.num_prompts, generator=generator(self.seed, "prompts", epoch)).tolist()


def local_groups(prompts_per_round: int, num_updates: int, process_index: int, num_processes: int) -> torch.Tensor:
    """
    Numbers of the groups that one process rolls out and trains on.

    Each of the round's `num_updates` parts is divided among the processes, so that every optimiser step sees the same
    groups whatever the number of processes.

    Returns:
        `torch.Tensor` of shape `(prompts_per_round / num_processes,)`, int64, ascending.
    """
    groups = torch.arange(prompts_per_round).view(num_updates, num_processes, -1)
    return groups[:, process_index].flatten()
