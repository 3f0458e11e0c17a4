import re

import pytest

from trl_dgpo.prompts import ocr_prompts, tiny_ocr_prompts


SMALL_WORDS = {"the", "and", "for", "of", "your", "since", "no"}
GENERATORS = [ocr_prompts, tiny_ocr_prompts]


def words_of(rows: list[dict[str, str]]) -> set[str]:
    return {word for row in rows for word in re.findall(r"[a-z]+|\d+", row["text"].lower())} - SMALL_WORDS


@pytest.mark.parametrize("generator", GENERATORS)
class TestEverySet:
    def test_rows_quote_their_text(self, generator):
        rows = generator("test", 300)
        assert len(rows) == 300
        for row in rows:
            assert row.keys() == {"prompt", "text"}
            assert row["prompt"].count(f'"{row["text"]}"') == 1
            assert row["prompt"].count('"') == 2

    def test_texts_differ(self, generator):
        assert len({row["text"].lower() for row in generator("train", 4000)}) == 4000

    @pytest.mark.parametrize("seeds", [(0, 0), (1, 7)])
    def test_splits_share_no_word(self, generator, seeds):
        assert not words_of(generator("train", 4000, seed=seeds[0])) & words_of(generator("test", 1000, seed=seeds[1]))

    def test_a_seed_is_a_set(self, generator):
        assert generator("train", 50, seed=3) == generator("train", 50, seed=3)
        assert generator("train", 50, seed=3) != generator("train", 50, seed=4)

    def test_bad_input(self, generator):
        with pytest.raises(ValueError, match="`split` is 'dev'"):
            generator("dev", 10)
        for number in (0, 20_001):
            with pytest.raises(ValueError, match=f"`num_prompts` is {number}"):
                generator("train", number)


def test_ocr_phrases_have_one_to_five_words_and_a_fifth_a_number():
    texts = [row["text"] for row in ocr_prompts("train", 4000)]
    lengths = [len(text.split()) for text in texts]
    shares = [lengths.count(length) / 4000 for length in range(1, 6)]
    assert sum(shares) == 1
    assert shares[2] == max(shares)
    assert all(share > 0.02 for share in shares)
    assert sum(any(c.isdigit() for c in text) for text in texts) / 4000 == pytest.approx(0.2, abs=0.03)


def test_ocr_scenes_vary():
    rows = ocr_prompts("train", 1000)
    assert len({row["prompt"].replace(row["text"], "") for row in rows}) == 40


def test_tiny_texts_are_four_letters_without_those_that_look_like_zero():
    for split in ("train", "test"):
        assert all(re.fullmatch("[A-NPR-Z]{4}", row["text"]) for row in tiny_ocr_prompts(split, 2000))


def test_tiny_sets_hold_words():
    texts = {row["text"] for split in ("train", "test") for row in tiny_ocr_prompts(split, 1500)}
    assert texts >= {"CAKE", "BIRD", "FISH", "LAMP", "KITE", "MENU", "TAXI", "STAR", "MILK", "RAIN"}


def test_the_same_in_every_process():
    assert [row["text"] for row in tiny_ocr_prompts("test", 4, seed=1)] == ["DLMB", "FEED", "AWKD", "BYWX"]
