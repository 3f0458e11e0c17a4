from itertools import islice

import pytest
import torch

from trl_dgpo.sampler import GroupSampler, local_groups


def dealt(sampler, num_rounds):
    return [index for round in range(num_rounds) for index in sampler.deal(round)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3, 8, 9, 100])
def test_nothing_is_dropped_and_epochs_run_on(num_prompts, shuffle):
    sampler = GroupSampler(num_prompts, 8, seed=0, shuffle=shuffle)
    rounds = [sampler.deal(round) for round in range(30)]
    assert all(len(indices) == 8 for indices in rounds)
    sequence = iter(dealt(sampler, 30))
    while len(epoch := list(islice(sequence, num_prompts))) == num_prompts:
        assert sorted(epoch) == list(range(num_prompts))
        if not shuffle:
            assert epoch == sorted(epoch)
    assert set(dealt(sampler, sampler.rounds_per_epoch)) == set(range(num_prompts))


def test_rounds_per_epoch():
    assert [GroupSampler(n, 8, seed=0).rounds_per_epoch for n in (1, 3, 8, 9, 16, 17)] == [1, 1, 1, 2, 2, 3]


def test_three_prompts_fill_a_round_of_eight():
    assert GroupSampler(3, 8, seed=0, shuffle=False).deal(0) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert GroupSampler(3, 8, seed=0, shuffle=False).deal(1) == [2, 0, 1, 2, 0, 1, 2, 0]


def test_a_round_is_a_function_of_seed_and_number():
    torch.manual_seed(1)
    sampler = GroupSampler(50, 8, seed=7)
    in_order = [sampler.deal(round) for round in range(20)]
    torch.manual_seed(2)
    assert [GroupSampler(50, 8, seed=7).deal(round) for round in reversed(range(20))] == in_order[::-1]
    assert GroupSampler(50, 8, seed=8).deal(0) != in_order[0]


def test_epochs_have_their_own_permutations():
    sampler = GroupSampler(8, 8, seed=0)
    assert len({tuple(sampler.deal(round)) for round in range(10)}) > 5


def test_no_prompt_at_all():
    with pytest.raises(ValueError, match="data set is empty; it needs at least one row with a `prompt`"):
        GroupSampler(0, 8, seed=0)


@pytest.mark.parametrize("num_updates", [1, 2, 3, 6])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_share_each_update(num_updates, num_processes):
    groups = [local_groups(24, num_updates, rank, num_processes).tolist() for rank in range(num_processes)]
    assert sorted(group for mine in groups for group in mine) == list(range(24))
    per_update = 24 // num_updates
    for mine in groups:
        assert mine == sorted(mine)
        assert len(mine) == 24 // num_processes
    for update in range(num_updates):
        share = 24 // num_updates // num_processes
        trained = sorted(g for mine in groups for g in mine[update * share : (update + 1) * share])
        assert trained == list(range(update * per_update, (update + 1) * per_update))  # whatever the process count
