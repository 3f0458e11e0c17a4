import re
from collections import Counter

import pytest

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.prompts import counting_prompts


@pytest.mark.parametrize(("split", "number"), [("train", 270), ("test", 90)])
class TestEverySplit:
    def test_is_every_class_by_every_count(self, split, number):
        rows = counting_prompts(split)
        assert len({(row["object"], row["count"]) for row in rows}) == len(rows) == number
        assert {row["object"] for row in rows} < set(COCO_CLASSES)
        assert Counter(row["count"] for row in rows) == dict.fromkeys(range(2, 11), number // 9)

    def test_prompts_say_it(self, split, number):
        words = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        for row in counting_prompts(split):
            word, names = re.fullmatch(r"a photo of (\w+) (.+)", row["prompt"]).groups()
            assert words.index(word) + 2 == row["count"]
            assert names == row["object"] + ("es" if row["object"][-1] == "s" else "s")
            assert row["tag"] == f"count {row['count']}"
            assert row.keys() == {"prompt", "tag", "object", "count"}

    def test_a_seed_is_an_order_and_a_part_its_beginning(self, split, number):
        rows = counting_prompts(split, seed=3)
        assert counting_prompts(split, 20, seed=3) == rows[:20]
        assert counting_prompts(split, seed=4) != rows
        assert {row["prompt"] for row in counting_prompts(split, seed=4)} == {row["prompt"] for row in rows}

    def test_bad_input(self, split, number):
        for wrong in (0, number + 1):
            with pytest.raises(ValueError, match=f"`num_prompts` is {wrong}; it must be between 1 and {number}"):
                counting_prompts(split, wrong)


def test_splits_share_no_class():
    train, test = ({row["object"] for row in counting_prompts(split)} for split in ("train", "test"))
    assert not train & test


def test_an_unknown_split():
    with pytest.raises(ValueError, match="`split` is 'dev'"):
        counting_prompts("dev")
