"""
Which of a run's checkpoints stay, and which of them are whole.

A checkpoint gets its name when it is finished, so that no kill leaves half of one. What happens to it afterwards, such
as a file that a full disk or a broken copy cut off, is found by its manifest: the size and the CRC-32 of every file,
written last. A CRC finds accidents, not forgeries.
"""

import json
import shutil
import zlib
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from .run_files import remove_folders


MANIFEST = "manifest.json"

_CHUNK = 1 << 22  # bytes read at a time


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
    remove_folders([path for path in checkpoints if path not in protected][:surplus])


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints of a run's folder, by their steps."""
    return [Path(path) for path in reversed(sort_checkpoints(str(directory)))]


def seal(checkpoint: Path) -> None:
    """Write the manifest of a finished checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    entries = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        for file in files
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`Path`):
            Its folder. One without a manifest, which an earlier version or another program wrote, is not looked into.

    Returns:
        `str`, *optional*: the first file that is not as it was written, and in what; `None` for none.
    """
    try:
        return _damage(checkpoint)
    except OSError as error:  # of a disk that is broken
        return f"{checkpoint} cannot be read ({error})"


def _damage(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return f"{checkpoint} is no folder"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return None
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"].items()
        expected = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({type(error).__name__}: {error})"
    for name, (size, _) in expected.items():  # what costs nothing first
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes where {size} were written"
    for name, (_, crc) in expected.items():
        if _crc32(checkpoint / name) != crc:
            return f"{checkpoint / name} has other contents than were written (by its CRC-32)"
    return None


def not_written(checkpoint: Path, staging: Path, error: Exception) -> str:
    """
    Why a checkpoint could not be written, and what to do.

    Args:
        checkpoint (`Path`):
            The folder that it would have become.
        staging (`Path`):
            Where it was being written.
        error (`Exception`):
            What a write ended with.
    """
    earlier, free = newest_first(checkpoint.parent), shutil.disk_usage(checkpoint.parent).free
    size = _mb(earlier[0]) if earlier else f"more than {_mb(staging)}"
    last = f"The last one, {earlier[0]}, is as it was." if earlier else "There is none before it."
    return (
        f"{checkpoint} could not be written ({type(error).__name__}: {error}). {free / 1e6:.1f} MB are free there, "
        f"and a checkpoint takes {size}. {last} Make room (fewer checkpoints: `save_total_limit`) or take another "
        "`output_dir`, then go on with `resume_from_checkpoint`."
    )


def _mb(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
