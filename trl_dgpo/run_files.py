"""
A run's files: written so that a kill cannot halve them, and its log read again.

What is written stands under a name with an underscore until it is whole, and is then renamed. A reader therefore never
meets half a file or folder, and uploads leave out what begins with an underscore.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

LOG = "log.jsonl"

_REPLACED = "_replaced-"
_REMOVED = "_removed-"


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """
    A path to write a file or a folder to, which becomes `target` at the end of the context, unless that is an error's.

    Args:
        target (`Path`):
            The file or folder. Folders above it are made, and what has its name is replaced.

    Yields:
        `Path` at which nothing is yet, on the same file system.
    """
    finished = _cleared(target)
    yield finished
    publish(finished, target)


def aside(directory: Path) -> Path:
    """An empty folder beside the one that is to be written, on the same file system."""
    path = _cleared(directory)
    path.mkdir()
    return path


def publish(finished: Path, target: Path) -> None:
    """
    Give a finished file or folder its name.

    A folder that has the name already is replaced: at every moment one of the two is there, under its name or under
    that from which [`restore_replaced`] takes it back.
    """
    replaced = target.with_name(_REPLACED + target.name)
    if target.is_dir():  # a folder, unlike a file, is not replaced in one step
        shutil.rmtree(replaced, ignore_errors=True)
        target.replace(replaced)
    finished.replace(target)
    shutil.rmtree(replaced, ignore_errors=True)


def publish_files(finished: Path, target: Path) -> None:
    """Move every file of a finished folder into another, each in one step, over those of the same names."""
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        place = target / file.relative_to(finished)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(finished)


def remove_folders(folders: list[Path]) -> None:
    """Remove folders, each of which loses its name before its files: half of one is never there under it."""
    removed = [folder.replace(folder.with_name(_REMOVED + folder.name)) for folder in folders]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)


def restore_replaced(directory: Path) -> None:
    """
    Take back what a kill in the middle of [`publish`] left without its name, and remove what one in the middle of
    [`remove_folders`] left over.
    """
    for removed in directory.glob(_REMOVED + "*"):
        shutil.rmtree(removed, ignore_errors=True)
    for replaced in directory.glob(_REPLACED + "*"):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.replace(target)


def read_log(directory: Path) -> list[dict[str, float]]:
    """
    What a run logged, by step.

    Of entries with the same step and the same names the last counts, for the run was resumed before it. A number that
    was not finite is left out of its entry, and a line that a kill broke off is passed over with a warning.

    Args:
        directory (`Path`):
            The run's folder; without a `log.jsonl` in it nothing was logged.

    Returns:
        `list[dict[str, float]]`: entries, each with its `step`.
    """
    path = directory / LOG
    if not path.is_file():
        return []
    entries: dict[tuple, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("Line %d of %s is broken off, as by a killed run; it is passed over.", number, path)
            continue
        key = (entry["step"], frozenset(entry))
        entries.pop(key, None)  # the later one stands where it was written
        entries[key] = {name: value for name, value in entry.items() if _is_finite(value)}
    return sorted(entries.values(), key=lambda entry: entry["step"])


def _cleared(target: Path) -> Path:
    """Where `target` is written to, without what a run that was killed left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f"_{target.name}")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
