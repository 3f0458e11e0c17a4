import pytest
from datasets import Dataset

from trl_dgpo.prompts import PROMPT_SETS


COLUMNS = {
    "counting": {"prompt", "tag", "object", "count"},
    "geneval": {"prompt", "tag", "metadata"},
    "ocr": {"prompt", "text"},
    "ood": {"prompt", "tag"},
    "tiny-ocr": {"prompt", "text"},
}
TRAINED_ON = COLUMNS.keys() - {"ood"}
SIZES = {"counting": (270, 90), "geneval": (20_000, 553), "ocr": (20_000, 256), "tiny-ocr": (20_000, 256)}


def test_these_are_all():
    assert PROMPT_SETS.keys() == COLUMNS.keys()


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_make_a_data_set(name):
    rows = PROMPT_SETS[name]("test", 30)
    dataset = Dataset.from_list(rows)
    assert set(dataset.column_names) == COLUMNS[name]
    assert dataset.to_list() == rows


@pytest.mark.parametrize("name", sorted(TRAINED_ON))
def test_own_sizes_and_disjoint_splits(name):
    train, test = (PROMPT_SETS[name](split, None) for split in ("train", "test"))
    assert (len(train), len(test)) == SIZES[name]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
