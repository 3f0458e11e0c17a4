import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trl_dgpo.rollout import Rollout, ScoredImages
from trl_dgpo.rollout_dataset import (
    RowColumns,
    SavedGroups,
    fitted,
    from_dataset,
    load_rollouts,
    rounds_to_dataset,
    to_dataset,
)


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


# -- what is trained on -----------------------------------------------------------------------------------------------


def picture(shade: int, size=(4, 4)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 255 - shade))


def shades(read) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in read.images]


def encoded(image: Image.Image, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def round_of(number: int, prompts=("a", "b"), size=2, **columns) -> ScoredImages:
    count = len(prompts) * size
    rows = [{"prompt": prompt, **columns} for prompt in prompts for _ in range(size)]
    return ScoredImages(
        round=number,
        images=(10 * number + torch.arange(count, dtype=torch.uint8)).view(-1, 1, 1, 1).repeat(1, 3, 8, 8),
        rows=rows,
        rewards=torch.arange(count, dtype=torch.float64) / 3,
        by_name={},
        advantages=torch.zeros(count, dtype=torch.float64),
        group_index=torch.arange(len(prompts)).repeat_interleave(size),
        extra={},
        x0=torch.arange(count).view(-1, 1, 1, 1).expand(-1, 4, 1, 1) + 0.5,
    )


def test_rounds_are_read_as_they_were_made():
    rounds = [round_of(0, text="T"), round_of(1, ("b", "b"), text="U")]
    dataset = rounds_to_dataset(rounds)
    saved = SavedGroups(dataset)
    # Two groups of one prompt stand together, one of them at the seam of the rounds.
    assert [saved[i] for i in range(len(saved))] == [
        {"prompt": prompt, "text": text} for prompt, text in (("a", "T"), ("b", "T"), ("b", "U"), ("b", "U"))
    ]
    assert saved.sizes.tolist() == [2, 2, 2, 2]
    for index in range(4):
        of, rows = rounds[index // 2], slice(2 * (index % 2), 2 * (index % 2) + 2)
        read = saved.read(index, [0, 1])
        assert torch.equal(
            torch.stack([fitted(image, 8, 8) for image in read.images]), of.images[rows].to(torch.uint8)
        )
        assert torch.equal(read.rewards, of.rewards[rows])
        assert torch.equal(torch.stack(read.x0), of.x0[rows])
    assert shades(saved.read(3, [1])) == [13]  # one image alone, as a process has it that shares a group


def test_one_prompt_of_two_rounds_is_two_groups():
    one_group = [round_of(0, ("a",)), round_of(1, ("a",))]
    dataset = rounds_to_dataset(one_group)
    assert SavedGroups(dataset).sizes.tolist() == [2, 2]
    assert SavedGroups(dataset.remove_columns("round")).sizes.tolist() == [4]  # what the column is for


def test_columns_that_hold_nothing_are_left_out(caplog):
    dataset = rounds_to_dataset([round_of(0, metadata={}, missing=None, none=[], reward="clash")])
    assert SavedGroups(dataset)[0] == {"prompt": "a"}
    assert not caplog.messages


def through_files(rounds, columns, folder) -> datasets.Dataset:
    folder.mkdir()
    for scored in rounds:
        rounds_to_dataset([scored], columns).to_parquet(folder / f"round-{scored.round:06d}.parquet")
    return load_rollouts(folder)


def test_rounds_of_which_each_has_other_values_are_one_set(tmp_path, caplog):
    nothing = {"text": None, "count": None, "yes": None, "words": []}
    rounds = [
        round_of(0, text="T", count=1, yes=True, words=[], picture=picture(1), grid=np.ones((2, 2)), record={"a": 1}),
        round_of(1, **nothing, picture=None, grid=np.zeros(2), record={}, new="later"),
        round_of(2, text="U", count=2.5, yes=False, words=["w"]),
        round_of(3, ("b",), count="many", yes=None),
        round_of(4, ("b",)),
    ]
    rounds[2].rows[0].clear()
    rounds[2].rows[0]["prompt"] = "a"  # a stream need not give the same columns in every row
    for dataset in (through_files(rounds, RowColumns(), tmp_path / "files"), rounds_to_dataset(rounds)):
        assert dataset["text"][:] == ["T"] * 4 + [None] * 5 + ["U"] * 3 + [None] * 4
        assert dataset["count"][:] == [1.0] * 4 + [None] * 5 + [2.5] * 3 + [None] * 4
        assert dataset["yes"][:] == [True] * 4 + [None] * 5 + [False] * 3 + [None] * 4
        assert {"picture", "grid", "record", "words", "new"}.isdisjoint(dataset.column_names)
    told = [message for message in caplog.messages if "leaves out the columns" in message]
    assert [message.split("columns ")[1].split(" of the prompts")[0] for message in told[:4]] == [
        *("['grid', 'picture', 'record']", "['new']", "['words']", "['count']")
    ]
    assert len(told) == 8  # four for each of the two sets


def test_features_of_the_prompts_say_what_is_kept(tmp_path, caplog):
    prompts = datasets.Dataset.from_dict(
        {
            "prompt": ["a", "b", "c"],
            "text": [None, None, "T"],
            "points": [1, None, 3],
            "include": [[{"class": "cat", "count": 2}], [], None],
            "words": [[], ["w"], []],
            "picture": [picture(1), None, picture(2)],
            "nothing": [None, None, None],
        }
    )
    for rows in (prompts, prompts.with_format("numpy")):
        columns = RowColumns(rows.features)
        rounds = [round_of(n, ("x",), size=1, **{k: v for k, v in rows[n].items() if k != "prompt"}) for n in range(3)]
        caplog.clear()
        dataset = through_files(rounds, columns, tmp_path / str(rows.format["type"]))
        saved = SavedGroups(dataset)
        assert [saved[n] for n in range(3)] == [
            {"prompt": "x", **{k: v for k, v in row.items() if k not in ("prompt", "picture")}} for row in prompts
        ]
        [told] = [message for message in caplog.messages if "leaves out" in message]
        assert "['picture']" in told
        kept = {name: dataset.features[name] for name in saved.features.keys() - {"prompt"}}
        assert kept == {name: prompts.features[name] for name in kept}
        assert RowColumns.of_file(sorted((tmp_path / str(rows.format["type"])).iterdir())[2])._features == kept


def hand_made(**columns) -> datasets.Dataset:
    rows = {"prompt": ["a", "a", "a", "b"], "image": [picture(shade) for shade in (1, 2, 3, 4)], **columns}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_a_set_made_by_hand_needs_neither_latents_nor_numbers():
    saved = SavedGroups(hand_made(reward=[0.5, None, 2, 1]))
    assert saved.sizes.tolist() == [3, 1]
    read = saved.read(0, [0, 1, 2])
    assert shades(read) == [1, 2, 3]
    assert read.x0 == [None] * 3
    assert read.rewards.isnan().tolist() == [False, True, False]
    assert SavedGroups(hand_made(group=[0, 0, 1, 1])).sizes.tolist() == [2, 1, 1]  # ends with the prompt as well


def test_latents_of_some_images():
    dataset = hand_made(reward=[0, 1, 2, 3], x0=[None, [1.0, 2.0], None, None])
    dataset = dataset.add_column("x0.shape", [None, [2, 1, 1], None, None])
    assert [None if x0 is None else x0.tolist() for x0 in SavedGroups(dataset).read(0, [0, 1]).x0] == [
        None,
        [[[1.0]], [[2.0]]],
    ]


def pairs(**columns) -> datasets.Dataset:
    rows = {
        "caption": ["a", "b", "c"],
        "jpg_0": [encoded(picture(shade)) for shade in (1, 3, 5)],
        "jpg_1": [encoded(picture(shade)) for shade in (2, 4, 6)],
        "label_0": [1.0, 0.5, 0.0],
        "ranking_id": [7, 8, 9],
        **columns,
    }
    return datasets.Dataset.from_dict(rows)


def test_pairs_are_groups_of_two():
    saved = SavedGroups(pairs())
    assert saved.sizes.tolist() == [2, 2, 2]
    assert saved[2] == {"prompt": "c", "ranking_id": 9}
    assert [shades(saved.read(i, [0, 1])) for i in range(3)] == [[1, 2], [3, 4], [5, 6]]
    assert [saved.read(i, [0, 1]).rewards.tolist() for i in range(3)] == [[1, 0], [0.5, 0.5], [0, 1]]
    assert shades(saved.read(1, [1])) == [4]
    both = SavedGroups(pairs(label_1=[0.0, 0.25, 1.0]))
    assert both.read(1, [0, 1]).rewards.tolist() == [0.5, 0.25]
    unlabelled = SavedGroups(pairs(has_label=[True, False, True]))
    assert unlabelled.read(1, [0, 1]).rewards.isnan().all()
    assert unlabelled.read(0, [0, 1]).rewards.tolist() == [1, 0]


def test_the_caption_of_pairs_is_their_prompt():
    saved = SavedGroups(pairs(prompt=["another", "column", None]))
    assert saved[1] == {"prompt": "b", "ranking_id": 8}


def test_rows_of_a_group_that_do_not_stand_together():
    dataset = rounds_to_dataset([round_of(0), round_of(1)])
    with pytest.raises(ValueError, match=r"do not stand together: .*'group': 1.*dataset.sort\(\['round', 'group'\]\)"):
        SavedGroups(dataset.select([0, 2, 1, 3, 4, 5, 6, 7]).select([1, 0, 3, 2, 4, 5, 6, 7]))
    shuffled = dataset.shuffle(seed=0)
    with pytest.raises(ValueError, match="do not stand together"):
        SavedGroups(shuffled)
    assert SavedGroups(shuffled.sort(["round", "group"])).sizes.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"dataset.sort\(\['group'\]\)"):
        SavedGroups(hand_made(reward=[1] * 4, group=[0, 1, 0, 1]))
    # Without numbers a prompt may well come twice.
    assert SavedGroups(hand_made(reward=[1] * 4).select([0, 3, 1, 2])).sizes.tolist() == [1, 1, 2]


def test_pictures_with_captions_are_groups_of_one():
    saved = SavedGroups(hand_made())
    assert saved.sizes.tolist() == [1] * 4
    assert saved.rewards.isnan().all()
    assert not saved.has_rewards


@pytest.mark.parametrize("dataset", [hand_made(reward=[1, 2, 3, 4]), pairs()])
def test_no_picture_is_decoded_before_it_is_asked_for(dataset, monkeypatch):
    def decoded(*args, **kwargs):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", decoded)
    monkeypatch.setattr(Image, "open", decoded)
    saved = SavedGroups(dataset)
    assert saved[0]["prompt"] == "a"
    assert len(saved.best()) == len(saved)
    with pytest.raises(AssertionError):
        saved.read(0, [0])


def test_the_best_of_each_group():
    best = SavedGroups(hand_made(reward=[1, 2, 2, None], group=[0, 0, 0, 1])).best()
    assert len(best) == 1  # of the last group nothing is known
    assert best.sizes.tolist() == [1]
    assert shades(best.read(0, [0])) == [2]  # the first of two
    labels = SavedGroups(pairs()).best()
    assert [shades(labels.read(i, [0])) for i in range(3)] == [[1], [3], [6]]
    assert [labels[i]["prompt"] for i in range(3)] == ["a", "b", "c"]
    every = SavedGroups(hand_made()).best()
    assert [shades(every.read(i, [0])) for i in range(4)] == [[1], [2], [3], [4]]
    assert every.read(0, [0]).rewards.tolist() == [0]  # none of them is masked


def test_the_best_without_rewards():
    with pytest.raises(ValueError, match="groups of up to 2 images and no column `reward`"):
        SavedGroups(hand_made(group=[0, 0, 1, 1])).best()
    with pytest.raises(ValueError, match="no reward that is a number"):
        SavedGroups(hand_made(reward=[None] * 4)).best()


def test_which_data_sets_hold_groups():
    assert SavedGroups.fits(pairs())
    assert SavedGroups.fits(hand_made(reward=[1] * 4))
    assert SavedGroups.fits(hand_made(group=[1] * 4))
    assert not SavedGroups.fits(hand_made())  # with rewards: prompts that come with a picture
    assert SavedGroups.may_fit(hand_made())
    assert not SavedGroups.may_fit(datasets.Dataset.from_dict({"prompt": ["a"]}))
    assert not SavedGroups.may_fit([{"prompt": "a", "image": picture(1)}])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([{"prompt": "a"}], TypeError, "`train_dataset` is a list; saved pictures are read from"),
        (datasets.Dataset.from_dict({"prompt": ["a"]}), ValueError, r"has the columns \['prompt'\]; saved pictures"),
        (hand_made().select([]), ValueError, "`train_dataset` is empty"),
        (pairs(label_0=[1.0, 7.0, 0.0]), ValueError, "has the label 7.0; labels of pairs are"),
    ],
)
def test_data_sets_that_hold_no_groups(dataset, error, message):
    with pytest.raises(error, match=message):
        SavedGroups(dataset)


def test_what_is_no_picture():
    saved = SavedGroups(datasets.Dataset.from_dict({"prompt": ["a"], "image": ["a.png"]}))
    with pytest.raises(TypeError, match="A picture of `train_dataset` is a str"):
        saved.read(0, [0])


def test_pictures_of_another_size_are_scaled_and_cut_around_the_centre():
    wide = Image.fromarray(np.repeat(np.arange(160, dtype=np.uint8)[None, :, None], 80, 0).repeat(3, 2))
    same, square = fitted(wide, 80, 160), fitted(wide, 40, 40)
    assert torch.equal(same[0], torch.arange(160, dtype=torch.uint8).expand(80, -1))
    # The middle half of the width, every other pixel's neighbourhood.
    assert square.shape == (3, 40, 40)
    assert (square[0, 20].float() - (40.5 + 2 * torch.arange(40))).abs().max() <= 1


def test_sets_are_loaded_from_where_they_are(tmp_path):
    dataset = rounds_to_dataset([round_of(0), round_of(1)])
    dataset.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "shards").mkdir()
    for number in (0, 1):
        part = dataset.filter(lambda rounds, number=number: rounds == number, input_columns="round")
        part.to_parquet(tmp_path / "shards" / f"round-{number:06d}.parquet")
    (tmp_path / "shards" / "_round-000002.parquet").write_bytes(b"PAR1 half of one")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for place in ("disk", "splits", "shards", "hub"):
        loaded = load_rollouts(tmp_path / place)
        assert loaded.features == dataset.features, place
        assert loaded.remove_columns("image").to_dict() == dataset.remove_columns("image").to_dict()
        assert torch.equal(SavedGroups(loaded).read(3, [1]).x0[0], round_of(1).x0[3])
    assert len(load_rollouts(tmp_path / "shards" / "round-000001.parquet")) == 4
    assert len(load_rollouts(tmp_path / "splits", split="test")) == 1
    with pytest.raises(ValueError, match=r"`split` is 'dev'; .* has \['test', 'train'\]"):
        load_rollouts(tmp_path / "splits", split="dev")
