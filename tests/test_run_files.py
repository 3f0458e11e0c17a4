"""What is written is whole or not there, and a log is read as the run meant it."""

import json
import logging
import math
from pathlib import Path

import pytest

from trl_dgpo.run_files import aside, publish, publish_files, read_log, restore_replaced, written_aside


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").write_text(text)
    return path


def write_log(directory: Path, *entries: dict, cut: str = "") -> None:
    (directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + cut)


# Writing


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    for text in ("old", "new"):
        with written_aside(target) as path:
            assert path == target.with_name("_file.txt")
            assert not path.exists()
            path.write_text(text)
            assert target.exists() == (text == "new")
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    for text in ("old", "new"):
        with written_aside(tmp_path / "target") as path:
            folder(path, text)
        assert (tmp_path / "target" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail():
        with written_aside(tmp_path / "file") as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("left", ["a file", "a folder"])
def test_what_a_kill_left_is_not_written_into(tmp_path, left):
    unfinished = tmp_path / "_target"
    folder(unfinished, "") if left == "a folder" else unfinished.write_text("half")
    with written_aside(tmp_path / "target") as path:
        assert not path.exists()
        folder(path, "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "file"]


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
    calls, replace = [], Path.replace

    def killed(self, other):
        calls.append(self)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return replace(self, other)

    def killed_cleanup(*args, **kwargs):
        if len(calls) >= killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    monkeypatch.setattr("shutil.rmtree", killed_cleanup)
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


# Reading


def test_a_run_without_a_log_logged_nothing(tmp_path):
    assert read_log(tmp_path) == []


def test_of_a_step_and_the_same_names_the_last_entry_counts(tmp_path):
    first, redone = {"reward": 0.2, "loss": 1.0, "step": 2}, {"reward": 0.3, "loss": 1.0, "step": 2}
    evaluated = {"eval_reward": 0.5, "step": 2}
    write_log(tmp_path, {"reward": 0.1, "step": 1}, first, evaluated, {"reward": 0.4, "step": 3}, redone)
    assert read_log(tmp_path) == [{"reward": 0.1, "step": 1}, evaluated, redone, {"reward": 0.4, "step": 3}]


def test_only_finite_numbers_are_read_and_one_that_failed_hides_its_predecessor(tmp_path):
    before, failed = {"reward": 0.2, "step": 2}, {"reward": None, "step": 2}
    write_log(
        tmp_path, before, failed, {"loss": math.nan, "kl": math.inf, "gate": 0, "note": "x", "on": True, "step": 3}
    )
    assert read_log(tmp_path) == [{"step": 2}, {"gate": 0, "step": 3}]


def test_a_line_that_was_cut_off_is_told_and_passed_over(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_log(tmp_path, {"reward": 0.1, "step": 1}, cut='{"reward": 0.9, "st')
    assert read_log(tmp_path) == [{"reward": 0.1, "step": 1}]
    assert "Line 2 of" in caplog.text
    assert caplog.records[0].name == "trl_dgpo.run_files"
