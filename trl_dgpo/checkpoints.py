"""Which of a run's checkpoints stay."""

from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from .run_files import remove_folders


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
