"""The evaluation set is the published one, and training prompts keep away from it."""

import hashlib
import json
import time
from collections import Counter

import pytest

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.prompts import geneval_prompts


# Of `evaluation_metadata.jsonl` and `generation_prompts.txt` in github.com/djghosh13/geneval.
PUBLISHED = {
    "metadata": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    "prompt": "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
}
SHARES = {"position": 0.7, "counting": 0.5, "color_attr": 0.3, "colors": 0.1, "two_object": 0.1}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def pictures(rows: list[dict[str, str]]) -> set:
    """What the rows ask for: things, and who is how far to the right of and below whom."""
    asked = set()
    for row in rows:
        include = json.loads(row["metadata"])["include"]
        things = frozenset((thing["class"], thing["count"], thing.get("color")) for thing in include)
        places = set()
        for thing in include:
            if "position" in thing:
                relation, number = thing["position"]
                x, y = RELATIONS[relation]
                places = {(thing["class"], x, y), (include[number]["class"], -x, -y)}
        asked.add((things, frozenset(places)))
    return asked


class TestTest:
    @pytest.mark.parametrize("column", PUBLISHED)
    def test_is_the_published_file_line_by_line(self, column):
        lines = "\n".join(row[column] for row in geneval_prompts("test")) + "\n"
        assert hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED[column]

    def test_tags(self):
        tags = {
            "single_object": 80,
            "two_object": 99,
            "counting": 80,
            "colors": 94,
            "position": 100,
            "color_attr": 100,
        }
        assert Counter(row["tag"] for row in geneval_prompts("test")) == tags

    def test_a_part_has_all_tags_in_their_shares(self):
        whole, part = geneval_prompts("test"), geneval_prompts("test", 60)
        counts = Counter(row["tag"] for row in part)
        assert len({row["prompt"] for row in part}) == 60
        assert {row["prompt"] for row in part} <= {row["prompt"] for row in whole}
        for tag, count in Counter(row["tag"] for row in whole).items():
            assert abs(counts[tag] - count * 60 / 553) <= 1

    def test_has_one_seed(self):
        assert geneval_prompts("test", seed=1) == geneval_prompts("test")


class TestTrain:
    @pytest.mark.parametrize("seed", [0, 1, 43])
    def test_asks_for_no_picture_of_the_test(self, seed):
        train, test = geneval_prompts("train", 20_000, seed=seed), geneval_prompts("test")
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
        assert not pictures(train) & pictures(test)

    def test_shares_are_flow_grpos(self):
        counts = Counter(row["tag"] for row in geneval_prompts("train", 20_000))
        assert counts.keys() == SHARES.keys()
        for tag, share in SHARES.items():
            assert counts[tag] / 20_000 == pytest.approx(share / 1.7, abs=0.015)

    def test_prompts_differ_until_a_task_has_no_more(self):
        rows = geneval_prompts("train", 50_000)
        times = {tag: Counter(row["prompt"] for row in rows if row["tag"] == tag) for tag in SHARES}
        assert len(times["counting"]) == 3 * 80 - 80
        assert len(times["colors"]) == 10 * 79 - 94
        for tag, prompts in times.items():
            assert max(prompts.values()) - min(prompts.values()) <= 1
            assert (max(prompts.values()) == 1) == (tag in ("position", "two_object", "color_attr"))
        first = [row["prompt"] for row in rows[:500]]
        assert len(set(first)) == 500

    def test_records_are_of_the_published_form(self):
        train, test = ({row["tag"]: row for row in geneval_prompts(split)} for split in ("train", "test"))
        for tag in SHARES:
            records = [json.loads(rows[tag]["metadata"]) for rows in (train, test)]
            assert records[0]["prompt"] == train[tag]["prompt"]
            assert records[0]["tag"] == tag
            assert list(records[0]) == list(records[1])  # the order of the keys too
            assert [list(thing) for thing in records[0]["include"]] == [list(thing) for thing in records[1]["include"]]

    def test_nothing_impossible_is_asked(self):
        for row in geneval_prompts("train", 20_000):
            include = json.loads(row["metadata"])["include"]
            names, colors = [[thing.get(key) for thing in include] for key in ("class", "color")]
            assert set(names) <= set(COCO_CLASSES)
            assert len(set(names)) == len(names)
            if row["tag"] in ("colors", "color_attr"):
                assert len(set(colors)) == len(colors)
                assert "person" not in names

    def test_a_seed_is_a_set_and_a_part_its_beginning(self):
        rows = geneval_prompts("train", 300, seed=5)
        assert geneval_prompts("train", 100, seed=5) == rows[:100]
        assert geneval_prompts("train", 300, seed=6) != rows

    def test_the_same_on_every_machine(self):
        assert [row["prompt"] for row in geneval_prompts("train", 3)] == [
            "a photo of two scissorses",
            "a photo of a white bear and a purple wine glass",
            "a photo of a toilet left of a laptop",
        ]

    def test_the_largest_set_is_quick(self):
        start = time.process_time()
        assert len(geneval_prompts("train", 50_000)) == 50_000
        assert time.process_time() - start < 5  # 0.8 s here


def test_defaults():
    assert len(geneval_prompts("train")) == 20_000
    assert len(geneval_prompts("test")) == 553


@pytest.mark.parametrize(("split", "limit"), [("train", 50_000), ("test", 553)])
def test_bad_input(split, limit):
    for number in (0, limit + 1):
        with pytest.raises(ValueError, match=f"`num_prompts` is {number}; it must be between 1 and {limit}"):
            geneval_prompts(split, number)
    with pytest.raises(ValueError, match="`split` is 'dev'"):
        geneval_prompts("dev")
