"""
GenEval's prompts: one or two objects of COCO, counted, coloured or placed (arXiv 2310.11513).

The evaluation set is made here, not copied: the published generator's draws in their order give its 553 records. The
generator is MIT-licensed: github.com/djghosh13/geneval.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from typing import Any, Literal

import numpy as np

from ..coco import COCO_CLASSES


_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_RELATIONS = ("left of", "right of", "above", "below")
_COUNTS = (2, 3, 4)
# A coloured person is never asked for.
_COLORED_CLASSES = tuple(name for name in COCO_CLASSES if name != "person")

_TEST_SEED = 43
_TEST_DRAWS = 100  # of each task, before those that are drawn twice are dropped
_MAX_PROMPTS = 50_000


def geneval_prompts(
    split: Literal["train", "test"], num_prompts: int | None = None, seed: int = 0
) -> list[dict[str, str]]:
    """
    Prompts whose pictures a detector can check, with what it has to find.

    `"test"` is the published evaluation set, line by line: 80 prompts of a single object, 99 of two objects, 80 of
    counting, 94 of colours, 100 of positions, 100 of two colours. `"train"` mixes all but the first in the shares of
    Flow-GRPO (arXiv 2505.05470): positions .7, counting .5, two colours .3, colours .1, two objects .1, over their
    sum. No training prompt asks for a picture that the evaluation asks for, whatever the seed: "a cat left of a dog"
    is out if "a dog right of a cat" is tested, a stricter rule than another text.

    All prompts of one task differ until it has no more. It is then gone through again, so that the shares hold: of
    counting, which has 160 to train on, from about 540 prompts on; of colours (696) from about 12 000 on. The others
    last for the largest set.

    Args:
        split (`str`):
            `"train"` or `"test"`.
        num_prompts (`int`, *optional*):
            Number of rows. For training at most 50 000, and 20 000 if not given; fewer are the beginning of more. For
            the test all 553 if not given, and fewer are spread evenly over them.
        seed (`int`, *optional*, defaults to `0`):
            Of the training prompts. The published set has but one.

    Returns:
        `list[dict]`: rows such as `{"prompt": "a photo of two dogs", "tag": "counting", "metadata": ...}`. `metadata`
        is the line of the published file, a record in JSON: what to find (`include`), and what not (`exclude`).

    Raises:
        ValueError: an unknown split, or a number of prompts outside 1 to 50 000 or 1 to 553.
    """
    if split not in ("train", "test"):
        raise ValueError(f'`split` is {split!r}; it must be "train" or "test".')
    published = _published_records()
    limit = _MAX_PROMPTS if split == "train" else len(published)
    if num_prompts is None:
        num_prompts = 20_000 if split == "train" else limit
    if not 1 <= num_prompts <= limit:
        raise ValueError(f"`num_prompts` is {num_prompts}; it must be between 1 and {limit} for {split!r}.")
    if split == "test":
        records = [published[i * limit // num_prompts] for i in range(num_prompts)]
    else:
        records = _training_records(num_prompts, seed, held_out={_content(record) for record in published})
    return [{"prompt": r["prompt"], "tag": r["tag"], "metadata": json.dumps(r)} for r in records]


def counted(name: str, count: int) -> str:
    """A number of things in words, by GenEval's simple rules: "an apple", "three buses", "two scissorses"."""
    if count == 1:
        return _with_article(name)
    return f"{_NUMBER_WORDS[count]} {name}{'es' if name.endswith('s') else 's'}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _published_records() -> list[dict[str, Any]]:
    # The kind and the order of the draws are what makes it the published set.
    rng = np.random.default_rng(_TEST_SEED)

    def pick(choices: Sequence) -> Any:
        return choices[rng.choice(len(choices))]

    def pick_two(choices: Sequence) -> tuple:
        first, second = rng.choice(len(choices), size=2, replace=False)
        return choices[first], choices[second]

    def pick_count() -> int:
        return int(rng.integers(_COUNTS[0], _COUNTS[-1], endpoint=True))

    tasks: list[Callable[[], dict[str, Any]]] = [
        lambda: _two_objects(pick_two(COCO_CLASSES)),
        lambda: _counting(pick(COCO_CLASSES), pick_count()),
        lambda: _color(pick(_COLORED_CLASSES), pick(_COLORS)),
        lambda: _position(pick_two(COCO_CLASSES), pick(_RELATIONS)),
        lambda: _two_colors(pick_two(_COLORED_CLASSES), pick_two(_COLORS)),
    ]
    order = rng.choice(len(COCO_CLASSES), size=len(COCO_CLASSES), replace=False)
    records = [_single_object(COCO_CLASSES[i]) for i in order]
    records += [draw() for draw in tasks for _ in range(_TEST_DRAWS)]
    return list({json.dumps(record): record for record in records}.values())


def _training_records(number: int, seed: int, held_out: set) -> list[dict[str, Any]]:
    tasks = [
        (0.7, _position, list(product(permutations(COCO_CLASSES, 2), _RELATIONS))),
        (0.5, _counting, list(product(COCO_CLASSES, _COUNTS))),
        (0.3, _two_colors, list(product(permutations(_COLORED_CLASSES, 2), permutations(_COLORS, 2)))),
        (0.1, _color, list(product(_COLORED_CLASSES, _COLORS))),
        (0.1, _two_objects, [(pair,) for pair in permutations(COCO_CLASSES, 2)]),
    ]
    rng = np.random.default_rng(seed)

    def go_through(make: Callable[..., dict[str, Any]], choices: list[tuple], order: np.ndarray) -> Iterator:
        while True:
            for i in order:
                record = make(*choices[i])
                if _content(record) not in held_out:
                    yield record

    pools = [go_through(make, choices, rng.permutation(len(choices))) for _, make, choices in tasks]
    weights = np.array([weight for weight, *_ in tasks])
    return [next(pools[task]) for task in rng.choice(len(tasks), size=number, p=weights / weights.sum())]


def _content(record: dict[str, Any]) -> tuple:
    """What the picture has to show: the same for two prompts that say it in another order."""
    first, *others = record["include"]
    if record["tag"] == "position":
        # The second object is placed relative to the first.
        relation, names = others[0]["position"][0], (others[0]["class"], first["class"])
        mirrored = {"right of": "left of", "below": "above"}
        return (mirrored[relation], *names[::-1]) if relation in mirrored else (relation, *names)
    return record["tag"], frozenset((item["class"], item["count"], item.get("color")) for item in record["include"])


# One function a task. The order of the keys is that of the published file.


def _single_object(name: str) -> dict[str, Any]:
    return _record("single_object", [{"class": name, "count": 1}], _with_article(name))


def _two_objects(names: tuple[str, str]) -> dict[str, Any]:
    include = [{"class": name, "count": 1} for name in names]
    return _record("two_object", include, " and ".join(map(_with_article, names)))


def _counting(name: str, count: int) -> dict[str, Any]:
    one_more = [{"class": name, "count": count + 1}]
    return _record("counting", [{"class": name, "count": count}], counted(name, count), exclude=one_more)


def _color(name: str, color: str) -> dict[str, Any]:
    return _record("colors", [{"class": name, "count": 1, "color": color}], _with_article(f"{color} {name}"))


def _position(names: tuple[str, str], relation: str) -> dict[str, Any]:
    placed, target = names
    include = [{"class": target, "count": 1}, {"class": placed, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{_with_article(placed)} {relation} {_with_article(target)}")


def _two_colors(names: tuple[str, str], colors: tuple[str, str]) -> dict[str, Any]:
    pairs = list(zip(names, colors, strict=True))
    include = [{"class": name, "count": 1, "color": color} for name, color in pairs]
    return _record("color_attr", include, " and ".join(_with_article(f"{color} {name}") for name, color in pairs))


def _record(tag: str, include: list[dict[str, Any]], words: str, **exclude: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {words}"}
