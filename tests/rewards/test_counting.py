"""Counting: numbers by hand, and the real detectors on tiny random checkpoints."""

import pickle

import pytest
import torch
from tiny_detectors import FakeDetector, numbered, tiny_rt_detr, tiny_yolos

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.rewards import CountingReward
from trl_dgpo.rewards.scoring import RewardScorer


BOX = (0, 0, 9, 9)


def dogs(number: int, score: float = 0.9) -> list:
    return [("dog", score, BOX)] * number


def call(reward, numbers, counts, name="dog", log_metric=None):
    """Of pictures with so many dogs each."""
    return reward(
        prompts=["dogs"] * len(numbers),
        completions=[numbered(number) for number in numbers],
        object=[name] * len(numbers),
        count=counts,
        log_metric=log_metric,
    )


@pytest.fixture
def detector() -> FakeDetector:
    """Finds as many dogs as the picture's number, and always a cat."""
    return FakeDetector([[*dogs(number), ("cat", 0.9, BOX)] for number in range(12)])


class TestCountingReward:
    def test_by_hand(self, detector):
        numbers, counts = [0, 1, 2, 3, 4, 6, 7, 11], [3] * 8
        assert call(CountingReward(detector=detector), numbers, counts) == [0, 0, 0, 1, 0, 0, 0, 0]
        relaxed = call(CountingReward(relaxed=True, detector=detector), numbers, counts)
        assert relaxed == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 0, 0, 0])

    def test_only_the_class_asked_for(self, detector):
        reward = CountingReward(detector=detector)
        assert call(reward, [2, 5], [1, 1], name="cat") == [1, 1]
        assert call(reward, [2, 5], [1, 1], name="cow") == [0, 0]

    def test_threshold_is_passed_not_reached(self):
        scenes = [dogs(1, 0.5), dogs(1, 0.5 + 1e-6), dogs(1, 0.75), dogs(1, 0.75 + 1e-6)]
        for threshold, expected in ((0.5, [0, 1, 1, 1]), (0.75, [0, 0, 0, 1])):
            reward = CountingReward(detector=FakeDetector(scenes), threshold=threshold)
            assert call(reward, [0, 1, 2, 3], [1] * 4) == expected

    def test_log(self, detector):
        log = []
        reward = CountingReward(relaxed=True, detector=detector)
        values = call(reward, [2, 5, 7], [2, None, 4], log_metric=lambda *entry: log.append(entry))
        assert values == [1, None, 0.25]
        assert log == [
            ("counting/exact_match", 1),
            ("counting/absolute_error", 0),
            ("counting/exact_match", 0),
            ("counting/absolute_error", 3),
        ]

    def test_a_batch_is_its_pictures(self, detector):
        numbers, counts = [0, 3, 5, 2, 9], [1, 3, 4, None, 10]
        for batch_size in (1, 2, 16):
            reward = CountingReward(relaxed=True, detector=detector, batch_size=batch_size)
            assert call(reward, numbers, counts) == pytest.approx([0, 1, 0.75, None, 0.9])

    def test_nothing_asked_nothing_loaded(self):
        assert call(CountingReward(detector="no/such"), [1, 2], [None, None]) == [None, None]

    @pytest.mark.parametrize(
        ("name", "count", "error"),
        [
            ("mouse", 1, "`object` is 'mouse'"),  # "computer mouse"
            (None, 1, "`object` is None"),
            ("dog", 0, "`count` of 'dog' is 0"),
            ("dog", 2.5, "`count` of 'dog' is 2.5"),
        ],
    )
    def test_a_mistake_in_the_data_stops(self, detector, name, count, error):
        # It is no image's fault: neither retried nor masked.
        scorer = RewardScorer(CountingReward(detector=detector))
        images = torch.ones(2, 3, 8, 8, dtype=torch.uint8)
        with pytest.raises(ValueError, match=error):
            scorer(images, ["", ""], {"object": ["dog", name], "count": [1, count]})
        with pytest.raises(ValueError, match=r"needs .*count"):
            scorer.check(["object"])

    def test_one_row_each(self, detector):
        with pytest.raises(ValueError, match="1 `count`"):
            call(CountingReward(detector=detector), [1, 2], [1])

    @pytest.mark.parametrize("threshold", [-0.1, 1.0])
    def test_thresholds_are_checked(self, threshold):
        with pytest.raises(ValueError, match="`threshold` is"):
            CountingReward(threshold=threshold)

    @pytest.mark.parametrize("make", [tiny_rt_detr, tiny_yolos])
    def test_real_loading(self, make, tmp_path):
        # The number is the detector's own: found by asking for it.
        reward = CountingReward(detector=str(make(tmp_path / "detector")), threshold=0.0, device="cpu")
        images = torch.randint(0, 256, (2, 3, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        arguments = {"prompts": ["", ""], "completions": images, "object": ["dog", "dog"]}
        assert set(reward(**arguments, count=[1, 2])) <= {0.0, 1.0}
        with torch.inference_mode():
            found = reward._model([numbered(1)], 0.0)[0]
        best = found.labels.bincount().argmax().item()
        number = int((found.labels == best).sum())
        assert number > 0
        assert call(reward, [1, 1], [number, number + 1], name=COCO_CLASSES[best]) == [1, 0]
        assert pickle.loads(pickle.dumps(reward))._model is None
