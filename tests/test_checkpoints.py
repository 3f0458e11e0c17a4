import os
from pathlib import Path

import pytest

from trl_dgpo.checkpoints import aside, publish, publish_files, restore_replaced, rotate


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").write_text(text)
    return path


def test_a_folder_aside_is_empty_and_beside_its_target(tmp_path):
    folder(tmp_path / "_target", "left by a kill")
    path = aside(tmp_path / "target")
    assert path == tmp_path / "_target"
    assert not list(path.iterdir())


def test_publishing_gives_the_name(tmp_path):
    publish(folder(tmp_path / "_new", "new"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_publishing_replaces(tmp_path):
    folder(tmp_path / "target", "old")
    publish(folder(tmp_path / "_new", "new"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch, killed_at):
    """Whichever of the renames is the last that happened, a whole folder is there after `restore_replaced`."""
    target = folder(tmp_path / "target", "old")
    new = folder(tmp_path / "_new", "new")
    calls, rename = [], Path.rename

    def killed(self, other):
        calls.append(self)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return rename(self, other)

    def killed_cleanup(*args, **kwargs):
        if len(calls) >= killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr("trl_dgpo.checkpoints.shutil.rmtree", killed_cleanup)
    with pytest.raises(KeyboardInterrupt):
        publish(new, target)
    monkeypatch.undo()
    assert len(calls) >= killed_at
    restore_replaced(tmp_path)
    assert (target / "file").read_text() == {1: "old", 2: "new"}[killed_at]
    assert not list(tmp_path.glob("_replaced-*"))


def test_files_are_moved_over_those_of_their_names_and_no_others(tmp_path):
    target = folder(tmp_path / "target", "old")
    (target / "user.txt").write_text("kept")
    new = folder(tmp_path / "_new", "new")
    folder(new / "deep" / "er", "new")
    publish_files(new, target)
    assert {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()} == {
        "file": "new",
        "user.txt": "kept",
        "deep/er/file": "new",
    }
    assert not new.exists()


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

    monkeypatch.setattr("trl_dgpo.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    restore_replaced(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
