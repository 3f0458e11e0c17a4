from itertools import islice

import pytest
import torch

from trl_dgpo.sampler import GroupSampler, StreamSampler, local_rollouts


def dealt(sampler, num_rounds):
    return [index for round in range(num_rounds) for index in sampler.deal(round)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3, 8, 9, 100])
def test_nothing_is_dropped_and_epochs_run_on(num_prompts, shuffle):
    sampler = GroupSampler(range(num_prompts), 8, seed=0, shuffle=shuffle)
    rounds = [sampler.deal(round) for round in range(30)]
    assert all(len(indices) == 8 for indices in rounds)
    sequence = iter(dealt(sampler, 30))
    while len(epoch := list(islice(sequence, num_prompts))) == num_prompts:
        assert sorted(epoch) == list(range(num_prompts))
        if not shuffle:
            assert epoch == sorted(epoch)
    assert set(dealt(sampler, sampler.rounds_per_epoch)) == set(range(num_prompts))


def test_rounds_per_epoch():
    assert [GroupSampler(range(n), 8, seed=0).rounds_per_epoch for n in (1, 3, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


def test_three_prompts_fill_a_round_of_eight():
    assert GroupSampler(range(3), 8, seed=0, shuffle=False).deal(0) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert GroupSampler(range(3), 8, seed=0, shuffle=False).deal(1) == [2, 0, 1, 2, 0, 1, 2, 0]


def test_a_round_is_a_function_of_seed_and_number():
    torch.manual_seed(1)
    sampler = GroupSampler(range(50), 8, seed=7)
    in_order = [sampler.deal(round) for round in range(20)]
    torch.manual_seed(2)
    assert [GroupSampler(range(50), 8, seed=7).deal(round) for round in reversed(range(20))] == in_order[::-1]
    assert GroupSampler(range(50), 8, seed=8).deal(0) != in_order[0]


def test_epochs_have_their_own_permutations():
    sampler = GroupSampler(range(8), 8, seed=0)
    assert len({tuple(sampler.deal(round)) for round in range(10)}) > 5


def test_no_prompt_at_all():
    with pytest.raises(ValueError, match="data set is empty; it needs at least one row with a `prompt`"):
        GroupSampler(range(0), 8, seed=0)


@pytest.mark.parametrize("num_updates", [1, 2, 3, 6])
@pytest.mark.parametrize("num_processes", [1, 2, 4, 8])
def test_processes_share_each_update(num_updates, num_processes):
    prompts, generations = 6, 8
    shares = [local_rollouts(prompts, generations, num_updates, rank, num_processes) for rank in range(num_processes)]
    for groups, numbers in shares:
        assert len(groups) == len(numbers) == prompts * generations // num_processes
        assert groups.tolist() == sorted(groups.tolist())
    size, per_update = prompts * generations // num_updates // num_processes, prompts // num_updates
    for update in range(num_updates):
        part = slice(update * size, (update + 1) * size)
        trained = [pair for groups, numbers in shares for pair in zip(groups[part].tolist(), numbers[part].tolist())]
        of_update = range(update * per_update, (update + 1) * per_update)
        assert trained == [(group, number) for group in of_update for number in range(generations)]


def test_no_row_is_read_but_those_asked_for():
    class Rows:
        read = []

        def __len__(self):
            return 5

        def __getitem__(self, index):
            self.read.append(index)
            return index

    sampler = GroupSampler(Rows(), 8, seed=3)
    deal = sampler.deal(2)
    assert sampler.rows(2, [1, 6]) == Rows.read == [deal[1], deal[6]]


# -- streams


class Stream:
    """Five rows, in another order each epoch."""

    def __init__(self, length=5):
        self.length, self.epoch, self.begun = length, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.begun += 1
        return iter([(self.epoch, (row + self.epoch) % self.length) for row in range(self.length)])


def test_a_stream_is_dealt_in_its_order_and_runs_on():
    sampler = StreamSampler(Stream(), 4)
    assert [sampler.rows(round, [0, 1, 2, 3]) for round in range(3)] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4), (1, 1), (1, 2), (1, 3)],
        [(1, 4), (1, 0), (2, 2), (2, 3)],
    ]


def test_processes_read_the_same_stream_and_keep_their_own_groups():
    whole = StreamSampler(Stream(), 4)
    halves = [StreamSampler(Stream(), 4) for _ in range(2)]
    for round in range(5):
        first, second = (halves[rank].rows(round, [2 * rank, 2 * rank + 1]) for rank in range(2))
        assert first + second == whole.rows(round, [0, 1, 2, 3])


@pytest.mark.parametrize("round", [0, 1, 2, 7])
def test_any_round_of_a_stream_can_be_sought(round):
    in_order = StreamSampler(Stream(), 4)
    expected = [in_order.rows(number, [0, 3]) for number in range(round + 1)][-1]
    sought = StreamSampler(Stream(), 4)
    sought.rows(4, [0])  # further on, or before: both ways
    sought.seek(round)
    assert sought.rows(round, [0, 3]) == expected


def test_a_stream_is_not_begun_again_without_need():
    stream = Stream(length=100)
    sampler = StreamSampler(stream, 4)
    for round in range(10):
        sampler.rows(round, [0])
    assert stream.begun == 1


def test_an_empty_stream():
    with pytest.raises(ValueError, match="data set is empty"):
        StreamSampler([], 4).rows(0, [0])
