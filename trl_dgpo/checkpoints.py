"""
Folders that a kill cannot halve: written aside under a name with an underscore, then renamed.

A reader therefore never meets a checkpoint that is not whole, and uploads leave out what begins with an underscore.
"""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints


_REPLACED = "_replaced-"
_REMOVED = "_removed-"


def aside(directory: Path) -> Path:
    """An empty folder beside the one that is to be written, on the same file system."""
    path = directory.with_name(f"_{directory.name}")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish(finished: Path, target: Path) -> None:
    """
    Give a finished folder its name.

    A folder that has the name already is replaced: at every moment one of the two is there, under its name or under
    that from which [`restore_replaced`] takes it back.
    """
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    finished.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def publish_files(finished: Path, target: Path) -> None:
    """Move every file of a finished folder into another, each in one step, over those of the same names."""
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        place = target / file.relative_to(finished)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(finished)


def rotate(directory: Path, limit: int | None, best: str | None = None) -> None:
    """
    Remove the oldest checkpoints above `save_total_limit`; never the newest, nor the best.

    Args:
        directory (`Path`):
            The run's folder.
        limit (`int`, *optional*):
            How many to keep; all if `None` or below 1.
        best (`str`, *optional*):
            Folder of the best one.
    """
    if limit is None or limit < 1:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(directory), use_mtime=True)]
    # By name: the folder may have another spelling since, or another place.
    names = {checkpoints[-1].name, *([Path(best).name] if best else [])}
    protected = [path for path in checkpoints if path.name in names]
    surplus = max(0, len(checkpoints) - max(limit, len(protected)))
    for path in [path for path in checkpoints if path not in protected][:surplus]:
        path.rename(path.with_name(_REMOVED + path.name))
    _remove_left_over(directory)


def restore_replaced(directory: Path) -> None:
    """Take back what a kill in the middle of [`publish`] left without its name, and remove what it left over."""
    _remove_left_over(directory)
    for replaced in directory.glob(_REPLACED + "*"):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)


def _remove_left_over(directory: Path) -> None:
    for path in directory.glob(_REMOVED + "*"):
        shutil.rmtree(path, ignore_errors=True)
