from collections import Counter

import pytest

from trl_dgpo.prompts import ood_prompts


def test_eight_prompts_in_each_of_eleven_categories():
    rows = ood_prompts()
    assert [row.keys() for row in rows] == [{"prompt", "tag"}] * 88
    assert set(Counter(row["tag"] for row in rows).values()) == {8}
    assert len({row["tag"] for row in rows}) == 11


def test_prompts_differ_and_are_whole():
    prompts = [row["prompt"] for row in ood_prompts()]
    assert len({prompt.lower() for prompt in prompts}) == 88
    assert all(prompt == prompt.strip() and prompt.endswith(".") for prompt in prompts)


def test_a_prompt_with_text_quotes_it():
    for row in ood_prompts():
        assert row["prompt"].count('"') == (2 if row["tag"] == "text" else 0)


def test_a_part_has_all_categories():
    assert len({row["tag"] for row in ood_prompts("test", 11)}) == 11


def test_there_is_nothing_to_train_on():
    with pytest.raises(ValueError, match="`split` is 'train'; the out-of-distribution prompts are for evaluation"):
        ood_prompts("train")


def test_bad_number():
    for number in (0, 89):
        with pytest.raises(ValueError, match=f"`num_prompts` is {number}; it must be between 1 and 88"):
            ood_prompts("test", number)
