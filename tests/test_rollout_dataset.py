import datasets
import pytest
import torch

from trl_dgpo.rollout import Rollout
from trl_dgpo.rollout_dataset import from_dataset, to_dataset


PROMPTS = ['A sign that says "CAFÉ"', "a cat", "a cat"]  # groups 2, 5 and 6; two groups of one prompt
SIZES = [2, 3, 2]


def record(conditioning_dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    rewards = torch.rand(7, dtype=torch.float64, generator=random)
    rewards[3] = float("nan")
    return Rollout(
        x0=torch.randn(7, 4, 2, 3, generator=random),
        conditioning={
            "encoder_hidden_states": torch.randn(3, 5, 6, generator=random).to(conditioning_dtype),
            "pooled_projections": torch.randn(3, 4, generator=random),
            "scale": torch.randn(3, generator=random),
        },
        rewards=rewards,
        advantages=torch.randn(7, generator=random),
        group_index=torch.tensor([2, 5, 6]).repeat_interleave(torch.tensor(SIZES)),
    )


def images():
    return torch.randint(0, 256, (7, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Rollout, expected: Rollout):
    for name in ("x0", "rewards", "advantages", "group_index"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
        assert torch.equal(a.isnan(), b.isnan())
    assert actual.conditioning.keys() == expected.conditioning.keys()
    assert all(torch.equal(value, expected.conditioning[name]) for name, value in actual.conditioning.items())


@pytest.mark.parametrize("saved", [False, True])
def test_round_trip_to_the_bit(saved, tmp_path):
    dataset = to_dataset(record(), PROMPTS, images())
    if saved:
        dataset.save_to_disk(tmp_path / "round")
        dataset = datasets.load_from_disk(tmp_path / "round")
    rollout, prompts, pictures = from_dataset(dataset)
    assert_same(rollout, record())
    assert prompts == PROMPTS
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures, images())


def test_rows_for_people():
    dataset = to_dataset(record(), PROMPTS, images())
    assert dataset["prompt"][:] == [prompt for prompt, size in zip(PROMPTS, SIZES, strict=True) for _ in range(size)]
    assert dataset["group"][:] == [2, 2, 5, 5, 5, 6, 6]
    assert dataset[0]["image"].size == (16, 8)
    assert dataset["reward"][0] == record().rewards[0].item()
    assert dataset["x0"][0] == record().x0[0].flatten().tolist()
    stored = [row is not None for row in dataset["conditioning.pooled_projections"]]
    assert stored == [True, False, True, False, False, True, False]  # once a group


def test_narrow_conditioning_is_widened():
    rollout, _, _ = from_dataset(to_dataset(record(torch.bfloat16), PROMPTS, images()))
    stored = rollout.conditioning["encoder_hidden_states"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, record(torch.bfloat16).conditioning["encoder_hidden_states"].float())


def test_a_selection_of_whole_groups():
    dataset = to_dataset(record(), PROMPTS, images())
    rollout, prompts, pictures = from_dataset(dataset.select([0, 1, 5, 6]))
    rows = torch.tensor([0, 1, 5, 6])
    expected = Rollout(
        x0=record().x0[rows],
        conditioning={name: value[[0, 2]] for name, value in record().conditioning.items()},
        rewards=record().rewards[rows],
        advantages=record().advantages[rows],
        group_index=record().group_index[rows],
    )
    assert_same(rollout, expected)
    assert prompts == [PROMPTS[0], PROMPTS[2]]
    assert torch.equal(pictures, images()[rows])


def test_a_group_without_its_first_row():
    dataset = to_dataset(record(), PROMPTS, images())
    with pytest.raises(ValueError, match=r"first row, which holds its 'conditioning.*is missing; select whole groups"):
        from_dataset(dataset.select([0, 1, 3, 4]))


def test_groups_out_of_order():
    dataset = to_dataset(record(), PROMPTS, images())
    with pytest.raises(ValueError, match="`group_index` must ascend"):
        from_dataset(dataset.select([5, 6, 0, 1]))


def test_another_data_set():
    with pytest.raises(ValueError, match=r"lacks the columns \['advantage', 'group', 'image', 'reward', 'x0'\]"):
        from_dataset(datasets.Dataset.from_dict({"prompt": ["a cat"]}))


@pytest.mark.parametrize(("prompts", "rows"), [(PROMPTS[:2], 7), (PROMPTS, 6), (PROMPTS + PROMPTS[:1] * 4, 7)])
def test_prompts_or_images_that_do_not_fit(prompts, rows):
    with pytest.raises(
        ValueError, match=f"{len(prompts)} prompts and {rows} images do not fit 3 groups of 7 rollouts"
    ):
        to_dataset(record(), prompts, images()[:rows])
