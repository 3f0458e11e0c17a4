"""Of a run's checkpoints those stay that are asked for, each of them whole."""

import os
from pathlib import Path

import pytest

from trl_dgpo.checkpoints import rotate
from trl_dgpo.run_files import restore_replaced


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (5, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (1, 2, [2, 4]),
        (2, 2, [2, 4]),
        (3, 1, [1, 3, 4]),
        (1, 4, [4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, kept):
    for step in (3, 1, 4, 2):  # the order of making says nothing, their time does
        os.utime(folder(tmp_path / f"checkpoint-{step}", ""), (step, step))
    rotate(tmp_path, limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in kept]


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        os.utime(folder(tmp_path / f"checkpoint-{step}", ""), (step, step))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    restore_replaced(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
