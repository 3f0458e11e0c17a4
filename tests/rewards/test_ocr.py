import logging
import math
import pickle
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from trl_dgpo.rewards import OCRReward
from trl_dgpo.rewards.ocr import text_accuracy


def draw(text: str, size: tuple[int, int] = (128, 64), font_size: int = 36) -> Image.Image:
    image = Image.new("RGB", size, "white")
    centre = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(image).text(
        centre, text, fill="black", font=ImageFont.load_default(font_size), anchor="mm", stroke_width=1
    )
    return image


@pytest.fixture(scope="module")
def readers() -> dict[bool, OCRReward]:
    """With and without detection; engines take seconds to build."""
    return {only: OCRReward(recognition_only=only, num_workers=2) for only in (False, True)}


class Broken(Image.Image):
    """A picture that cannot be decoded."""

    size = (64, 32)

    def convert(self, *args, **kwargs):
        raise OSError("truncated file")

    resize = convert


class TestTextAccuracy:
    @pytest.mark.parametrize(
        ("recognised", "target", "expected"),
        [
            ("CAFE", "CAFE", 1.0),
            ("CAFF", "CAFE", 3 / 4),
            ("CAE", "CAFE", 3 / 4),
            ("CXAFE", "CAFE", 3 / 4),
            ("the CAFE is open", "CAFE", 1.0),  # contained: everything else is free
            ("", "CAFE", 0.0),
            ("something else entirely", "CAFE", 0.0),  # the distance counts up to the target's length
            ("open 24 hours", "OPEN  24HOURS", 1.0),
            ("STRASSE", "Straße", 1.0),
            ("\uff23\uff21\uff26\uff25", "cafe", 1.0),  # full-width letters
            ("kitten", "sitting", 4 / 7),
        ],
    )
    def test_by_hand(self, recognised, target, expected):
        assert text_accuracy(recognised, target) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("recognised", "target", "expected"),
        [
            ("CAFE", "CAFE", 1.0),
            ("cafe", "C A F E", 1.0),
            ("SALESALESALE", "SALE", 0.0),  # eight to delete, of four
            ("CAFES", "CAFE", 3 / 4),
            ("my CAFE", "CAFE", 2 / 4),
            ("CAFENOW", "CAFE", 1 / 4),
            ("the CAFE is open", "CAFE", 0.0),
        ],
    )
    def test_extra_text_costs_if_asked(self, recognised, target, expected):
        assert text_accuracy(recognised, target, penalize_extra=True) == pytest.approx(expected)
        assert text_accuracy(recognised, target) == 1.0

    @pytest.mark.parametrize("recognised", ["CAFF", "CAE", "CXAFE", "", "something else entirely", "FACE", "ACFEX"])
    def test_no_extra_text_no_difference(self, recognised):
        assert text_accuracy(recognised, "CAFE", penalize_extra=True) == text_accuracy(recognised, "CAFE") < 1

    def test_empty_target_is_refused(self):
        with pytest.raises(ValueError, match="`target` is empty"):
            text_accuracy("CAFE", "  ")


class TestOCRReward:
    @pytest.mark.parametrize(("recognition_only", "width"), [(True, 64), (True, 256), (False, 128), (False, 512)])
    def test_reads_what_is_drawn(self, readers, recognition_only, width):
        texts = ["CAFE", "HOTEL", "BIKE"]
        assert (
            readers[recognition_only].read([draw(text, (width, width * 3 // 4), width // 4) for text in texts])
            == texts
        )

    def test_scores_each_image_by_its_own_target(self):
        reward = OCRReward(recognition_only=True, num_workers=2)
        images = [draw(text) for text in ("CAFE", "HOTEL", "BIKE")]
        assert reward([""] * 3, images, text=["CAFE", "HOSEL", "TAXI"]) == pytest.approx([1.0, 0.8, 0.0])

    def test_joins_all_lines(self, readers):
        image = draw("OPEN", (512, 512), 90)
        image.paste(draw("LATE", (512, 200), 90), (0, 312))
        assert readers[False].read([image]) == ["OPENLATE"]

    def test_reads_lines_of_any_width_in_one_batch(self):
        images = [draw("AB", (64, 32), 24), draw("WONDERFUL", (256, 32), 28), draw("MILK", (120, 60), 40)]
        assert OCRReward(recognition_only=True, num_workers=1).read(images) == ["AB", "WONDERFUL", "MILK"]

    def test_exact_match_counts_whole_texts_only(self):
        reward = OCRReward(recognition_only=True, exact_match=True)
        images = [draw("CAFE"), draw("CAFES"), draw("CAFE")]
        assert reward([""] * 3, images, text=["cafe", "CAFE", "CAVE"]) == [1.0, 0.0, 0.0]
        assert reward.__name__ == "ocr_exact_match"

    def test_penalised_text_is_another_reward(self):
        reward = OCRReward(recognition_only=True, penalize_extra=True)
        assert reward([""] * 2, [draw("CAFE"), draw("CAFES")], text=["CAFE"] * 2) == [1.0, 0.75]
        assert reward.__name__ == "ocr_penalize_extra"

    def test_target_falls_back_to_the_first_quoted_span(self):
        reward = OCRReward(recognition_only=True)
        prompts = ['A sign that says "CAFE", not "HOTEL"', "A mug with “CAFE”", "No text asked for", 'Empty ""']
        assert reward(prompts, [draw("CAFE")] * 4) == [1.0, 1.0, None, None]

    def test_no_target_is_not_applicable(self):
        reward = OCRReward(recognition_only=True, target_column="sign")
        assert reward(["", "", ""], [draw("CAFE")] * 3, sign=["CAFE", None, " "]) == [1.0, None, None]

    @pytest.mark.parametrize("recognition_only", [True, False])
    def test_a_failing_image_fails_alone_and_loudly(self, readers, recognition_only, caplog):
        reward = readers[recognition_only]
        image = draw("CAFE", (512, 256), 120)
        images = [image, Broken(), image]
        with caplog.at_level(logging.WARNING, logger="trl_dgpo"):
            rewards = reward([""] * 3, images, text=["CAFE"] * 3)
        assert rewards[0] == rewards[2] == 1.0
        assert math.isnan(rewards[1])
        assert [record.getMessage() for record in caplog.records] == ["OCR failed on 1 of 3 images; they get NaN."]
        with pytest.raises(OSError, match="truncated file"):
            reward.read(images)

    def test_reads_a_slanted_line(self, readers):
        image = draw("GARDEN", (256, 256), 48).rotate(20, fillcolor="white")
        assert readers[False].read([image]) == ["GARDEN"]

    @pytest.mark.parametrize(("recognition_only", "side"), [(True, 64), (False, 128), (False, 512)])
    def test_noise_is_no_text_and_no_failure(self, readers, recognition_only, side):
        noise = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
        assert readers[recognition_only]([""], [Image.fromarray(noise)], text=["CAFE"]) == [0.0]

    def test_nothing_to_read(self):
        assert OCRReward().read([]) == []
        assert OCRReward(recognition_only=True).read([Image.new("RGB", (64, 32), "white")]) == [""]

    def test_survives_pickling_after_use(self):
        reward = OCRReward(recognition_only=True, num_workers=1)
        reward.read([draw("CAFE")])
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.__name__ == "ocr"
        assert copy.read([draw("CAFE")]) == ["CAFE"]

    def test_missing_engine_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rapidocr", None)
        with pytest.raises(ImportError, match=r"pip install trl-dgpo\[ocr\]"):
            OCRReward()([""], [draw("CAFE")], text=["CAFE"])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="`num_workers` is 0"):
            OCRReward(num_workers=0)
        with pytest.raises(ValueError, match="leave `penalize_extra` out"):
            OCRReward(exact_match=True, penalize_extra=True)
        with pytest.raises(ValueError, match="1 targets for 2 images"):
            OCRReward()(["", ""], [draw("CAFE")] * 2, text=["CAFE"])
