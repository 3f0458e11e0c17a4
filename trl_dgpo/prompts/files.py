"""Prompts from files."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def read_prompts(path: Path) -> "Dataset":
    """
    A file of prompts.

    Args:
        path (`Path`):
            A `.txt` file of one prompt a line, empty lines apart, or a `.jsonl`, `.json`, `.csv` or `.parquet` file
            with a column `prompt`.

    Returns:
        `datasets.Dataset`.

    Raises:
        `ValueError`: if there is no such file, or it is of another format.
    """
    from datasets import Dataset

    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    if path.suffix not in FORMATS:
        raise ValueError(f"{str(path)!r} is of no known format; there are {', '.join(FORMATS)}.")
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return Dataset.from_dict({"prompt": [line for line in lines if line]})
    read = {".csv": Dataset.from_csv, ".parquet": Dataset.from_parquet}.get(path.suffix, Dataset.from_json)
    return read(str(path))
