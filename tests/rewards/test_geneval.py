"""GenEval: the rules on hand-made finds, the reward around a detector that finds what it is told, and the real one."""

import json
import pickle

import pytest
import torch
from PIL import Image
from tiny_checkpoints import tiny_clip
from tiny_detectors import FakeDetector, numbered, tiny_mask2former
from torch import nn

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.rewards import GenEvalReward
from trl_dgpo.rewards.clip import load_clip
from trl_dgpo.rewards.geneval import (
    COLOURS,
    VARIANTS,
    ColourClassifier,
    Found,
    Task,
    Wanted,
    official_score,
    read_metadata,
    relative_position,
    soft_score,
    strict_score,
)
from trl_dgpo.rewards.scoring import RewardScorer


LEFT, RIGHT = (0, 0, 10, 10), (40, 0, 50, 10)
DOG = Task("single_object", (Wanted("dog", 1),))
DOGS = Task("counting", (Wanted("dog", 3),), (Wanted("dog", 4),))
BLUE_DOG = Task("colors", (Wanted("dog", 1, "blue"),))
DOG_LEFT_OF_CUP = Task("position", (Wanted("cup", 1), Wanted("dog", 1, None, ("left of", 0))))


def found(**objects: list) -> dict[str, list[Found]]:
    """Objects by class; a colour stands for one of that colour, a box for one there."""
    return {
        name: [Found(LEFT, one) if isinstance(one, str) else Found(one) for one in ones]
        for name, ones in objects.items()
    }


def scores(objects: dict[str, list[Found]], task: Task) -> tuple[float, ...]:
    """Reference, bounded, strict and official score."""
    soft = [soft_score(objects, task, bounded=bounded) for bounded in (False, True)]
    return (*soft, strict_score(objects, task), official_score(objects, task))


class TestRules:
    @pytest.mark.parametrize(
        ("task", "number", "reference", "bounded", "strict", "official"),
        [
            (DOG, 0, 0, 0, 0, 0),
            (DOG, 1, 1, 1, 1, 1),
            (DOG, 2, 0, 0, 0, 1),
            (DOG, 3, -1, 0, 0, 1),
            (DOG, 16, -14, 0, 0, 1),
            (DOGS, 0, 0, 0, 0, 0),
            (DOGS, 1, 1 / 3, 1 / 3, 0, 0),
            (DOGS, 2, 2 / 3, 2 / 3, 0, 0),
            (DOGS, 3, 1, 1, 1, 1),
            (DOGS, 4, 2 / 3, 2 / 3, 0, 0),  # officially spoilt by what is excluded
            (DOGS, 7, -1 / 3, 0, 0, 0),
        ],
    )
    def test_numbers(self, task, number, reference, bounded, strict, official):
        expected = pytest.approx((reference, bounded, strict, official), abs=1e-12)
        assert scores(found(dog=[LEFT] * number), task) == expected

    @pytest.mark.parametrize(
        ("objects", "reference", "bounded", "strict", "official"),
        [
            ({"dog": [LEFT], "cup": [RIGHT]}, 1, 1, 1, 1),
            ({"dog": [RIGHT], "cup": [LEFT]}, 0.75, 2 / 3, 0, 0),  # (1 + 1 + 0 + 1) / 4 and (1 + 1 + 0) / 3
            ({"cup": [RIGHT]}, 1 / 3, 1 / 3, 0, 0),
            ({"dog": [LEFT]}, 1 / 3, 1 / 3, 0, 0),
            ({}, 0, 0, 0, 0),
            ({"dog": [LEFT, RIGHT], "cup": [RIGHT]}, 1 / 3, 1 / 3, 0, 1),  # officially the surest dog alone is asked
            ({"dog": [RIGHT, LEFT], "cup": [RIGHT]}, 1 / 3, 1 / 3, 0, 0),
        ],
    )
    def test_position(self, objects, reference, bounded, strict, official):
        expected = pytest.approx((reference, bounded, strict, official), abs=1e-12)
        assert scores(found(**objects), DOG_LEFT_OF_CUP) == expected

    @pytest.mark.parametrize(
        ("dogs", "reference", "strict", "official"),
        [
            (["blue"], 1, 1, 1),
            (["red"], 0.5, 0, 0),
            ([], 0, 0, 0),
            (["blue", "red"], 0, 0, 1),
            (["red", "blue"], 0, 0, 0),  # officially the surest alone is looked at
        ],
    )
    def test_colour(self, dogs, reference, strict, official):
        assert scores(found(dog=dogs), BLUE_DOG) == (reference, reference, strict, official)

    def test_two_colours(self):
        task = Task("color_attr", (Wanted("dog", 1, "blue"), Wanted("cup", 1, "red")))
        assert scores(found(dog=["blue"], cup=["red"]), task) == (1, 1, 1, 1)
        assert scores(found(dog=["red"], cup=["blue"]), task) == (0.5, 0.5, 0, 0)
        assert scores(found(dog=["blue"], cup=["blue"]), task) == (0.75, 0.75, 0, 0)
        assert scores(found(dog=["blue"]), task) == (0.5, 0.5, 0, 0)

    def test_several_in_colour(self):
        task = Task("colors", (Wanted("dog", 2, "blue"),))
        assert scores(found(dog=["blue", "red"]), task) == (0.75, 0.75, 0, 0)
        assert scores(found(dog=["blue", "blue", "red"]), task) == (0.25, 0.25, 0, 1)

    def test_every_pair_holds_the_relation(self):
        task = Task("position", (Wanted("cup", 2), Wanted("dog", 1, None, ("left of", 0))))
        far = (80, 0, 90, 10)
        assert scores(found(dog=[LEFT], cup=[RIGHT, far]), task) == (1, 1, 1, 1)
        between = found(dog=[RIGHT], cup=[LEFT, far])
        assert scores(between, task) == pytest.approx((0.75, 2 / 3, 0, 0))

    def test_a_colour_in_the_way_of_the_relation(self):
        # A wrong colour ends the entry: its relation has no term, and there is no target for others.
        wrong = [Found(LEFT, "red")]
        task = Task("position", (Wanted("cup", 1), Wanted("dog", 1, "blue", ("left of", 0))))
        assert scores({"dog": wrong, "cup": [Found(RIGHT)]}, task) == pytest.approx((2 / 3, 2 / 3, 0, 0))
        task = Task("position", (Wanted("dog", 1, "blue"), Wanted("cup", 1, None, ("right of", 0))))
        assert scores({"dog": wrong, "cup": [Found(RIGHT)]}, task) == (0.5, 0.5, 0, 0)

    def test_only_the_official_score_excludes(self):
        task = Task("two_object", (Wanted("dog", 1),), (Wanted("cat", 1),))
        assert scores(found(dog=[LEFT]), task) == (1, 1, 1, 1)
        assert scores(found(dog=[LEFT], cat=[LEFT]), task) == (1, 1, 1, 0)


class TestRelativePosition:
    @pytest.mark.parametrize(
        ("offset", "expected"),
        [
            ((0, 0), set()),  # equal boxes
            ((-2, 0), set()),  # within 0.1 (10 + 10)
            ((-3, 0), set()),  # (3 - 2) / 3 = 0.33
            ((-4, 0), set()),  # (4 - 2) / 4 = 0.5, not above
            ((-5, 0), {"left of"}),  # 0.6
            ((5, 0), {"right of"}),
            ((0, -5), {"above"}),  # y downwards
            ((0, 5), {"below"}),
            ((-10, -10), {"left of", "above"}),  # 8 / 14.1 = 0.57 each
            ((10, 10), {"right of", "below"}),
            ((-5, -5), set()),  # 3 / 7.1 = 0.42 each
            ((-10, 20), {"below"}),  # 8 / 22.4 = 0.36 and 18 / 22.4 = 0.80
            ((100, -1), {"right of"}),
        ],
    )
    def test_by_hand(self, offset, expected):
        dx, dy = offset
        assert relative_position((20 + dx, 30 + dy, 30 + dx, 40 + dy), (20, 30, 30, 40)) == expected

    def test_slack_is_of_both_sizes_and_each_axis(self):
        # Widths 10 and 30, heights 2 and 2: slack 4 and 0.4; centres 8 apart: (8 - 4) / 8 = 0.5 and (8 - 0.4) / 8.
        assert relative_position((0, 0, 10, 2), (-2, 0, 28, 2)) == set()
        assert relative_position((0, 0, 10, 2), (-1, 0, 29, 2)) == {"left of"}
        assert relative_position((0, 8, 10, 10), (-10, 0, 20, 2)) == {"below"}


class TestReadMetadata:
    RECORD = {
        "tag": "position",
        "include": [
            {"class": "computer mouse", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}],
        "prompt": "a photo of a dog left of a red computer mouse",
    }

    def test_a_line_or_what_it_holds(self):
        task = Task(
            "position",
            (Wanted("computer mouse", 1, "red"), Wanted("dog", 1, None, ("left of", 0))),
            (Wanted("dog", 2),),
        )
        assert read_metadata(self.RECORD) == read_metadata(json.dumps(self.RECORD)) == task

    def test_columns_of_arrow(self):
        # Arrow gives every record the same keys.
        entry = {"class": "dog", "count": 1, "color": None, "position": None}
        assert read_metadata({"tag": "single_object", "include": [entry], "exclude": None}) == DOG

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"include": []}, "`include` is empty"),
            ({"include": [{"class": "mouse", "count": 1}]}, "there is no class 'mouse'"),
            ({"include": [{"class": "dog"}]}, "it has no 'count'"),
            ({"include": [{"class": "dog", "count": 0}]}, "`count` is 0"),
            ({"include": [{"class": "dog", "count": 1.5}]}, "`count` is 1.5"),
            ({"include": [{"class": "dog", "count": 1, "color": "grey"}]}, "the colour 'grey' is none of"),
            ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "an earlier entry"),
            ({"include": [{"class": "dog", "count": 1, "position": ["on", 0]}]}, "is not one of"),
            ({"include": [{"class": "dog", "count": 1, "position": "left of"}]}, "is no record"),
            ({"include": "dog"}, "is no record"),
            ({"exclude": [{"class": "hound", "count": 1}]}, "there is no class 'hound'"),
        ],
    )
    def test_mistakes(self, changes, reason):
        with pytest.raises(ValueError, match=reason):
            read_metadata(self.RECORD | changes)

    @pytest.mark.parametrize("record", ["a photo of a dog", "[1]", '{"include": []}', 3])
    def test_no_record(self, record):
        with pytest.raises(ValueError, match=r"`metadata` .* is no record of GenEval"):
            read_metadata(record)


class StubColours(nn.Module):
    """Says the colour of a crop's middle pixel, and keeps the crops."""

    def __init__(self):
        super().__init__()
        self.crops = []

    def forward(self, pictures, names):
        self.crops += zip(pictures, names, strict=True)
        middles = [picture.getpixel((0, picture.height // 2)) for picture in pictures]
        return ["red" if red > blue else "blue" for red, _, blue in middles]


class Stubbed(GenEvalReward):
    def _load(self):
        return nn.ModuleDict({"detector": self.detector, "colours": StubColours()})

    @property
    def crops(self):
        return self._model["colours"].crops


def line(tag: str, *include: dict, **others) -> str:
    return json.dumps({"tag": tag, "include": list(include), **others})


ONE_DOG = line("single_object", {"class": "dog", "count": 1})
TWO = line("two_object", {"class": "dog", "count": 1}, {"class": "cup", "count": 1})
THREE_DOGS = line("counting", {"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}])
A_BLUE_DOG = line("colors", {"class": "dog", "count": 1, "color": "blue"})
ABOVE = line("position", {"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]})
ATTRIBUTES = line(
    "color_attr", {"class": "dog", "count": 1, "color": "blue"}, {"class": "cup", "count": 1, "color": "red"}
)


def call(reward, pictures, metadata, **columns):
    return reward(prompts=["a photo"] * len(pictures), completions=pictures, metadata=metadata, **columns)


def one_scene(scene, metadata, picture=None, **options):
    return call(Stubbed(detector=FakeDetector([scene]), **options), [picture or numbered(0)], [metadata])[0]


class TestReward:
    @pytest.mark.parametrize(
        ("metadata", "scene", "values"),  # of each variant
        [
            (ONE_DOG, [("dog", 0.9, LEFT)] * 3, (1, 0, -1, 0)),
            (TWO, [("dog", 0.9, LEFT), ("cup", 0.4, RIGHT)], (1, 1, 1, 1)),
            (TWO, [("dog", 0.9, LEFT), ("cat", 0.4, RIGHT)], (0, 0, 0.5, 0.5)),
            (THREE_DOGS, [("dog", 0.95, LEFT)] * 4, (0, 0, 2 / 3, 2 / 3)),
            (A_BLUE_DOG, [("dog", 0.9, LEFT)], (0, 0, 0.5, 0.5)),
            (A_BLUE_DOG, [("dog", 0.9, RIGHT)], (1, 1, 1, 1)),
            (A_BLUE_DOG, [("dog", 0.9, RIGHT), ("dog", 0.8, LEFT)], (1, 0, 0, 0)),
            (ABOVE, [("dog", 0.9, (0, 0, 9, 9)), ("cup", 0.9, (0, 30, 9, 39))], (1, 1, 1, 1)),
            (ABOVE, [("dog", 0.9, (0, 30, 9, 39)), ("cup", 0.9, (0, 0, 9, 9))], (0, 0, 0.75, 2 / 3)),
            (ATTRIBUTES, [("dog", 0.9, RIGHT), ("cup", 0.9, LEFT)], (1, 1, 1, 1)),
            (ATTRIBUTES, [("dog", 0.9, LEFT), ("cup", 0.9, RIGHT)], (0, 0, 0.5, 0.5)),
        ],
    )
    def test_every_tag(self, metadata, scene, values):
        picture = Image.new("RGB", (64, 48), (0, 0, 255))  # blue, and red on the left
        picture.paste((255, 0, 0), (0, 0, 32, 48))
        picture.putpixel((0, 0), (0, 0, 0))
        for variant, value in zip(VARIANTS, values, strict=True):
            assert one_scene(scene, metadata, picture, variant=variant) == pytest.approx(value, abs=1e-12)

    @pytest.mark.parametrize(("metadata", "threshold"), [(ONE_DOG, 0.5), (THREE_DOGS, 0.75)])
    def test_thresholds_are_passed_not_reached(self, metadata, threshold):
        options = {"variant": "reference", "threshold": 0.5, "counting_threshold": 0.75}
        wanted = 1 if metadata is ONE_DOG else 3
        assert one_scene([("dog", threshold, LEFT)] * wanted, metadata, **options) == 0
        assert one_scene([("dog", threshold + 1e-6, LEFT)] * wanted, metadata, **options) == 1

    def test_thresholds_of_the_paper(self):
        reward = GenEvalReward()
        assert (reward.threshold, reward.counting_threshold) == (0.3, 0.9)

    def test_a_batch_has_both_thresholds(self):
        scene = [("dog", 0.8, LEFT)] * 3
        detector = FakeDetector([scene])
        reward = Stubbed("strict", detector=detector)
        three = line("two_object", {"class": "dog", "count": 3})
        assert call(reward, [numbered(0)] * 2, [THREE_DOGS, three]) == [0, 1]
        assert detector.calls == [(0.3, False)]
        assert call(reward, [numbered(0)], [THREE_DOGS]) == [0]
        assert detector.calls[1:] == [(0.9, False)]

    def test_sixteen_of_a_class(self):
        assert one_scene([("dog", 0.9, LEFT)] * 20, ONE_DOG, variant="reference") == -14
        seventeen = line("two_object", {"class": "dog", "count": 17})
        assert one_scene([("dog", 0.9, LEFT)] * 20, seventeen) == 0

    def test_the_surest_are_judged(self):
        dogs = [("dog", 0.4, (0, 30, 9, 39)), ("cup", 0.9, (0, 20, 9, 25)), ("dog", 0.8, (0, 0, 9, 9))]
        assert one_scene(dogs, ABOVE) == 1
        dogs = [(name, 1.2 - score, box) for name, score, box in dogs]
        assert one_scene(dogs, ABOVE) == 0

    def test_what_clip_sees(self):
        picture = numbered(0, (64, 48))
        picture.paste((250, 10, 20), (10, 5, 30, 25))
        reward = Stubbed(detector=FakeDetector([[("dog", 0.9, (10, 5, 30, 25))]]))
        call(reward, [picture], [A_BLUE_DOG])
        ((crop, name),) = reward.crops
        assert name == "dog"
        assert crop.size == (20, 20)
        assert crop.mode == "RGB"
        assert crop.getpixel((0, 0)) == crop.getpixel((9, 19)) == (250, 10, 20)  # the mask is the left half
        assert crop.getpixel((10, 0)) == crop.getpixel((19, 19)) == (0x99, 0x99, 0x99)

    def test_without_masks_the_background_stays(self):
        class Boxes(FakeDetector):
            def forward(self, pictures, threshold, masks=False):
                return super().forward(pictures, threshold, masks=False)

        reward = Stubbed(detector=Boxes([[("dog", 0.9, (10, 5, 30, 25))]]))
        call(reward, [numbered(0)], [A_BLUE_DOG])
        assert set(reward.crops[0][0].get_flattened_data()) == {(100, 100, 100)}

    @pytest.mark.parametrize(
        ("variant", "dogs", "crops"),
        [("official", 0, 0), ("official", 3, 2), ("strict", 3, 0), ("strict", 2, 2), ("reference", 1, 0)],
    )
    def test_clip_is_spared(self, variant, dogs, crops):
        # Of two blue dogs the official score looks at the two surest, the others at none if there are three.
        reward = Stubbed(variant, detector=FakeDetector([[("dog", 0.9, LEFT)] * dogs]))
        call(reward, [numbered(0)], [line("colors", {"class": "dog", "count": 2, "color": "blue"})])
        assert len(reward.crops) == crops

    def test_a_batch_is_its_pictures(self):
        scenes = [
            [("dog", 0.9, LEFT)],
            [("dog", 0.9, (40, 0, 60, 20)), ("cup", 0.8, LEFT)],
            [("dog", 0.95, LEFT)] * 3,
            [],
        ]
        pictures = [numbered(i, size) for i, size in enumerate([(64, 48), (70, 50), (64, 48), (64, 48)])]
        pictures[1].paste((0, 0, 250), (40, 0, 60, 20))
        pictures[1].paste((250, 0, 0), (0, 1, 20, 20))
        metadata = [A_BLUE_DOG, ATTRIBUTES, THREE_DOGS, ABOVE]
        for variant in VARIANTS:
            alone = [
                call(Stubbed(variant, detector=FakeDetector(scenes)), [picture], [row])[0]
                for picture, row in zip(pictures, metadata, strict=True)
            ]
            for batch_size in (1, 3, 16):
                reward = Stubbed(variant, detector=FakeDetector(scenes), batch_size=batch_size)
                assert call(reward, pictures, metadata) == alone
        assert alone == [1, 1, 1, 0]

    def test_rows_without_metadata_and_the_log(self):
        log = []
        reward = Stubbed("bounded", detector=FakeDetector([[("dog", 0.95, LEFT)] * 2]))
        rows = [ONE_DOG, None, THREE_DOGS, ONE_DOG]
        values = call(reward, [numbered(0)] * 4, rows, log_metric=lambda *entry: log.append(entry))
        assert values == pytest.approx([0, None, 2 / 3, 0])
        names = [f"geneval_bounded/{tag}" for tag in ("single_object", "counting", "single_object")]
        assert log == list(zip(names, (0, values[2], 0), strict=True))  # two variants do not mix in a log

    def test_nothing_asked_nothing_loaded(self):
        reward = GenEvalReward(detector="no/such", clip="no/such")
        assert call(reward, [numbered(0)] * 2, [None, None]) == [None, None]

    def test_a_mistake_in_the_data_stops(self):
        # It is no image's fault: neither retried nor masked.
        reward = Stubbed(detector=FakeDetector([[]]))
        images = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
        scorer = RewardScorer(reward)
        assert scorer(images, ["", ""], {"metadata": [ONE_DOG, ONE_DOG]}).rewards.tolist() == [0, 0]
        with pytest.raises(ValueError, match="there is no class 'hound'"):
            scorer(images, ["", ""], {"metadata": [ONE_DOG, line("colors", {"class": "hound", "count": 1})]})
        with pytest.raises(ValueError, match=r"needs \['metadata'\]"):
            scorer.check([])

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"variant": "soft"}, "`variant` is 'soft'"),
            ({"threshold": 1.0}, "`threshold` is 1.0"),
            ({"counting_threshold": -0.1}, "`counting_threshold` is -0.1"),
        ],
    )
    def test_mistakes(self, arguments, error):
        with pytest.raises(ValueError, match=error):
            GenEvalReward(**arguments)

    def test_one_row_each(self):
        with pytest.raises(ValueError, match="There are 1 `metadata`"):
            call(Stubbed(detector=FakeDetector([[]])), [numbered(0)] * 2, [ONE_DOG])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    return {"detector": str(tiny_mask2former(folder / "detector")), "clip": str(tiny_clip(folder / "clip"))}


class TestColours:
    def test_by_hand(self, checkpoints):
        clip = load_clip(checkpoints["clip"], device="cpu")
        names = ["car", "dog", "car"]
        pictures = [Image.effect_noise((20 + 8 * i, 30), 90).convert("RGB") for i in range(3)]
        expected = []
        with torch.inference_mode():
            for picture, name in zip(pictures, names, strict=True):
                image = clip.images([picture])[0]
                similarity = []
                for colour in COLOURS:
                    texts = clip.texts(
                        [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}"]
                        + [f"a photo of a {colour} object"]
                    )
                    similarity.append((image @ (mean := texts.mean(0)) / mean.norm()).item())
                expected.append(COLOURS[similarity.index(max(similarity))])
            assert ColourClassifier(clip).eval()(pictures, names) == expected

    def test_texts_are_embedded_once_per_class(self, checkpoints):
        clip = load_clip(checkpoints["clip"], device="cpu")
        classifier, calls = ColourClassifier(clip), []
        classifier.clip = nn.Module()
        classifier.clip.images = clip.images
        classifier.clip.texts = lambda texts: (calls.append(len(texts)), clip.texts(texts))[1]
        with torch.inference_mode():
            for _ in range(2):
                classifier([numbered(0)] * 3, ["car", "dog", "car"])
        assert calls == [30, 30]


class TestRealLoading:
    def test_every_part_at_work(self, checkpoints):
        # At a threshold of almost nothing random weights find things; of the ten colours one is theirs.
        reward = GenEvalReward(**checkpoints, threshold=1e-4, device="cpu")
        image = torch.randint(0, 256, (1, 3, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        assert call(reward, image, [ONE_DOG]) in ([0.0], [1.0])
        with torch.inference_mode():
            found = reward._model["detector"]([Image.fromarray(image[0].permute(1, 2, 0).numpy())], 1e-4, masks=True)
        name = COCO_CLASSES[found[0].labels[0]]
        detector = reward._model["detector"]
        detector.forward = lambda pictures, threshold, masks: found * len(pictures)  # once is enough
        rows = [line("colors", {"class": name, "count": 1, "color": colour}) for colour in COLOURS]
        assert sorted(call(reward, image.expand(10, -1, -1, -1), rows)) == [0] * 9 + [1]

    def test_weights_do_not_travel(self):
        reward = Stubbed("bounded", detector=FakeDetector([[("dog", 0.9, LEFT)]]), threshold=0.5)
        assert call(reward, [numbered(0)], [ONE_DOG]) == [1]
        copy = pickle.loads(pickle.dumps(reward))
        assert copy._model is None
        assert call(copy, [numbered(0)], [ONE_DOG]) == [1]
