"""Detectors: post-processing by hand-made masks, and the real loading code on tiny random checkpoints."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_detectors import tiny_d_fine, tiny_mask2former, tiny_rt_detr, tiny_yolos

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.rewards.detect import Detections, find_instances, load_detector


OUT = -20.0
TINY = {"mask2former": tiny_mask2former, "rt_detr": tiny_rt_detr, "d_fine": tiny_d_fine, "yolos": tiny_yolos}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Each architecture, loaded from disk as it would be from the Hub."""
    folder = tmp_path_factory.mktemp("detectors")
    return {kind: load_detector(str(make(folder / kind))).eval() for kind, make in TINY.items()}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def classes(*rows: list[float]) -> torch.Tensor:
    """Logits of given probabilities; what is left is "none"."""
    rows = [[*row, 1 - sum(row)] for row in rows]
    return torch.tensor(rows, dtype=torch.float64).log().float()


def squares(*boxes: tuple[int, int, int, int] | None, size=(8, 8), inside: float = 20.0) -> torch.Tensor:
    """Mask logits: `inside` in the box, strongly outside elsewhere."""
    masks = torch.full((len(boxes), *size), OUT)
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            x0, y0, x1, y1 = box
            mask[y0:y1, x0:x1] = inside
    return masks


class TestFindInstances:
    def test_score_is_of_class_times_mask(self):
        # A query that is sure of its mask, and one whose mask has 3/4 in each of its pixels.
        masks = torch.cat([squares((0, 0, 4, 4)), squares((4, 4, 8, 8), inside=math.log(3))])
        found = find_instances(classes([0.6, 0.1], [0.1, 0.9]), masks, (8, 8), threshold=0.3)
        assert found.labels.tolist() == [1, 0]
        torch.testing.assert_close(found.scores, torch.tensor([0.9 * 0.75, 0.6]), rtol=0, atol=1e-6)
        assert found.boxes.tolist() == [[4, 4, 8, 8], [0, 0, 4, 4]]

    def test_the_mask_may_change_the_order(self):
        masks = torch.cat([squares((0, 0, 4, 4)), squares((4, 4, 8, 8), inside=math.log(3))])
        found = find_instances(classes([0.65, 0.1], [0.1, 0.8]), masks, (8, 8), threshold=0.3)
        assert found.labels.tolist() == [0, 1]
        torch.testing.assert_close(found.scores, torch.tensor([0.65, 0.6]), rtol=0, atol=1e-6)
        assert found.boxes.tolist() == [[0, 0, 4, 4], [4, 4, 8, 8]]

    def test_masks_and_boxes_overlap_freely(self):
        boxes = [(0, 0, 4, 4), (2, 3, 8, 5), (7, 7, 8, 8), (0, 0, 8, 8)]
        found = find_instances(classes([0.9], [0.8], [0.7], [0.6]), squares(*boxes), (8, 8), threshold=0.3)
        assert found.boxes.tolist() == [list(map(float, box)) for box in boxes]
        for mask, (x0, y0, x1, y1) in zip(found.masks, boxes, strict=True):
            assert mask.dtype == torch.bool
            assert mask.sum() == (x1 - x0) * (y1 - y0)
            assert mask[y0:y1, x0:x1].all()

    def test_box_spans_separate_parts(self):
        mask = squares((1, 0, 2, 1)).maximum(squares((5, 6, 7, 8)))
        assert find_instances(classes([0.9]), mask, (8, 8), 0.3).boxes.tolist() == [[1, 0, 7, 8]]

    @pytest.mark.parametrize("size", [(16, 32), (32, 16), (12, 20)])
    def test_masks_are_of_the_pictures_size(self, size):
        # Logits of 4 x 4 cells; between equal ones of either sign the edge stays where it was.
        mask = squares((1, 2, 3, 4), size=(4, 4))
        found = find_instances(classes([0.9]), mask, size, threshold=0.3)
        height, width = size
        assert found.masks.shape == (1, height, width)
        assert found.boxes.tolist() == [[width / 4, height / 2, width * 3 / 4, height]]

    @pytest.mark.parametrize("threshold", [0.0, 0.3])
    def test_an_empty_mask_is_nothing(self, threshold):
        found = find_instances(classes([0.9], [0.8]), squares(None, (0, 0, 1, 1)), (8, 8), threshold)
        assert found.boxes.tolist() == [[0, 0, 1, 1]]

    def test_nothing_at_all(self):
        found = find_instances(classes([0.1], [0.2]), squares((0, 0, 4, 4), None), (8, 8), threshold=0.3)
        assert [len(value) for value in (found.scores, found.labels, found.boxes, found.masks)] == [0, 0, 0, 0]

    def test_equal_scores_keep_the_queries_order(self):
        boxes = [(x, 0, x + 1, 1) for x in range(8)]
        logits = torch.zeros(8, 3)  # every class 1/3 of every query
        found = find_instances(logits, squares(*boxes), (8, 8), threshold=0.1)
        assert found.boxes[:, 0].tolist() == [x for x in range(8) for _ in range(2)]
        assert found.labels.tolist() == [0, 1] * 8

    def test_threshold_is_not_reached_by_equality(self):
        # Class 1/2 exactly, mask 3/4 exactly: one half is certain, the other just above 0.
        mask = torch.full((1, 8, 8), 100.0)
        mask[:, :4] = 1e-8
        for logits, score in ((mask.abs() * 1e10, 0.5), (mask, 0.375)):
            arguments = torch.zeros(1, 2), logits, (8, 8)
            assert find_instances(*arguments, threshold=0.0).scores.tolist() == [score]
            assert len(find_instances(*arguments, threshold=score).scores) == 0
            assert len(find_instances(*arguments, threshold=math.nextafter(score, 0) - 1e-7).scores) == 1

    def test_the_best_pairs_of_query_and_class(self):
        # One query may be two classes; with the pairs that are looked at used up, a query may be none.
        found = find_instances(
            classes([0.5, 0.4], [0.3, 0.01]), squares((0, 0, 1, 1), (1, 1, 2, 2)), (8, 8), threshold=0.0, top=2
        )
        assert found.labels.tolist() == [0, 1]
        assert found.boxes.tolist() == [[0, 0, 1, 1]] * 2

    @pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2])
    def test_a_threshold_only_leaves_out(self, threshold):
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(20, 31, generator=generator), torch.randn(20, 9, 7, generator=generator)
        every, some = (find_instances(*logits, (30, 20), value) for value in (0.0, threshold))
        kept = every.scores > threshold
        assert 0 < kept.sum() < len(kept)
        assert_same(Detections(every.scores[kept], every.labels[kept], every.boxes[kept], every.masks[kept]), some)

    def test_equals_transformers_at_its_size(self):
        from transformers import Mask2FormerImageProcessorPil

        generator = torch.Generator().manual_seed(0)
        class_logits = 3 * torch.randn(1, 40, 81, generator=generator)
        mask_logits = 2 * torch.randn(1, 40, 24, 24, generator=generator)
        ours = find_instances(class_logits[0], mask_logits[0], (384, 384), threshold=0.0, top=40)
        output = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
            output, threshold=0.0, return_binary_maps=True
        )[0]
        info = sorted(theirs["segments_info"], key=lambda segment: -segment["score"])
        assert len(ours.scores) == len(info) == 40
        assert ours.labels.tolist() == [segment["label_id"] for segment in info]
        expected = torch.tensor([segment["score"] for segment in info])
        torch.testing.assert_close(ours.scores, expected, rtol=0, atol=1e-6)  # theirs are rounded
        masks = torch.stack([theirs["segmentation"][segment["id"]] for segment in info])
        assert (ours.masks == masks.bool()).all()


class TestLoadDetector:
    @pytest.mark.parametrize("kind", TINY)
    def test_finds(self, detectors, kind):
        picture = noise((60, 40))
        with torch.inference_mode():
            found = detectors[kind]([picture], 0.0, masks=True)[0]
        number = len(found.scores)
        assert number > 0
        assert (found.scores.diff() <= 0).all()
        assert found.scores.min() > 0
        assert found.scores.max() <= 1
        assert found.labels.shape == (number,)
        assert found.labels.min() >= 0
        assert found.labels.max() < len(COCO_CLASSES)
        assert found.boxes.shape == (number, 4)
        if kind == "mask2former":
            assert found.masks.shape == (number, 40, 60)
            for mask, (x0, y0, x1, y1) in zip(found.masks, found.boxes.int().tolist(), strict=True):
                ys, xs = mask.nonzero(as_tuple=True)
                assert [x0, y0, x1, y1] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        else:
            assert found.masks is None

    def test_masks_are_given_on_demand(self, detectors):
        with torch.inference_mode():
            assert detectors["mask2former"]([noise((32, 32))], 0.0)[0].masks is None

    @pytest.mark.parametrize("kind", TINY)
    def test_no_picture_depends_on_the_others(self, detectors, kind):
        pictures = [noise((60, 40), 0), noise((40, 60), 1), noise((60, 40), 2)]
        with torch.inference_mode():
            together = detectors[kind](pictures, 0.0, masks=True)
            alone = [detectors[kind]([picture], 0.0, masks=True)[0] for picture in pictures]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-2)
        assert not torch.equal(together[0].scores, together[2].scores)

    @pytest.mark.parametrize(
        ("kind", "size", "shape", "red"),
        [
            ("mask2former", (512, 512), (800, 800), ((1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
            ("mask2former", (96, 48), (672, 1344), ((1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
            ("rt_detr", (96, 48), (64, 64), (1, 0, 0)),
            ("d_fine", (96, 48), (64, 64), (1, 0, 0)),
            ("yolos", (96, 48), (64, 128), ((1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
        ],
    )
    def test_what_the_model_sees(self, detectors, kind, size, shape, red, monkeypatch):
        # Red first; Mask2Former's size is ours, not its file's; of COCO's 1333 px the next multiple of 32 is 1344.
        seen = []

        class Stop(Exception):
            pass

        def look(pixel_values):
            seen.append(pixel_values)
            raise Stop

        monkeypatch.setattr(detectors[kind].model, "forward", look)
        with pytest.raises(Stop):
            detectors[kind]([Image.new("RGB", size, (255, 0, 0))], 0.5)
        assert seen[0].shape == (1, 3, *shape)
        torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(red, dtype=torch.float32), rtol=1e-5, atol=1e-5)

    def test_rt_detr_by_hand(self, detectors):
        detector, picture = detectors["rt_detr"], noise((60, 40))
        pixels = torch.from_numpy(np.array(picture.resize((64, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            output = detector.model(pixel_values=pixels[None])
            scores, places = output.logits[0].sigmoid().flatten().sort(descending=True)
            threshold = scores[4].item()  # the fifth is not above itself
            found = detector([picture], threshold)[0]
        x, y, width, height = output.pred_boxes[0, places[:4] // 80].unbind(1)
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
        torch.testing.assert_close(found.scores, scores[:4])
        assert found.labels.tolist() == (places[:4] % 80).tolist()
        torch.testing.assert_close(found.boxes, corners * torch.tensor([60, 40, 60, 40]))

    @pytest.mark.parametrize(
        ("coco_id", "name"),
        [
            *((1, "person"), (3, "car"), (11, "fire hydrant"), (13, "stop sign"), (18, "dog"), (25, "giraffe")),
            *((27, "backpack"), (44, "bottle"), (47, "cup"), (62, "chair"), (63, "couch"), (67, "dining table")),
            *(
                (70, "toilet"),
                (72, "tv"),
                (74, "computer mouse"),
                (77, "cell phone"),
                (84, "book"),
                (90, "toothbrush"),
            ),
            *((0, None), (12, None), (26, None), (45, None), (66, None), (68, None), (83, None)),
        ],
    )
    def test_yolos_counts_to_91(self, detectors, coco_id, name):
        # One class is made certain; of the unused numbers nothing is found.
        detector = detectors["yolos"]
        bias = detector.model.class_labels_classifier.layers[-1].bias
        before = bias.detach().clone()
        try:
            with torch.inference_mode():
                bias[coco_id] += 100
                found = detector([noise((64, 64))], 0.5)[0]
        finally:
            with torch.no_grad():
                bias.copy_(before)
        assert [COCO_CLASSES[label] for label in found.labels] == ([] if name is None else [name] * 6)

    @pytest.mark.parametrize("kind", TINY)
    def test_nan_is_not_an_empty_picture(self, kind, tmp_path):
        detector = load_detector(str(TINY[kind](tmp_path / kind)))
        with torch.inference_mode():
            for name, weight in detector.model.named_parameters():
                if "class" in name:
                    weight.fill_(math.nan)
            with pytest.raises(RuntimeError, match="gave NaN or infinite numbers"):
                detector([noise((32, 32))], 0.5)

    @pytest.mark.parametrize("make", [tiny_mask2former, tiny_rt_detr])
    def test_other_classes_are_refused(self, make, tmp_path):
        with pytest.raises(ValueError, match=r"has 3 classes; COCO's are 80"):
            load_detector(str(make(tmp_path / "detector", num_labels=3)))

    def test_other_architectures_are_refused(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "detr", "num_labels": 91, "use_timm_backbone": false}')
        with pytest.raises(ValueError, match="is a 'detr'; give a mask2former or one of"):
            load_detector(str(tmp_path))

    @pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
    def test_missing_weights_are_refused(self, kind, tmp_path):
        folder = TINY[kind](tmp_path / kind)
        weights = load_file(folder / "model.safetensors")
        lost = min(name for name in weights if "encoder" in name and name.endswith("weight"))
        del weights[lost]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 weights of its architecture"):
            load_detector(str(folder))

    def test_scipy_is_named(self, tmp_path, monkeypatch):
        folder = tiny_mask2former(tmp_path / "mask2former")
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(ImportError, match=r"pip install trl-dgpo\[geneval\]"):
            load_detector(str(folder))


def assert_same(one: Detections, other: Detections) -> None:
    assert one.labels.tolist() == other.labels.tolist()
    torch.testing.assert_close(one.scores, other.scores)
    assert one.boxes.tolist() == other.boxes.tolist()
    assert (one.masks == other.masks).all()
