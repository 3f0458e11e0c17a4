"""`report_to` shows the images: a run's pictures are read back from the trackers' own stores."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_trainers import prompt_dataset, tiny_trainer


RUN = {
    "project": "pictures",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 3,
    "num_log_images": 2,
    "log_completions": True,
}
# In its own process: trackio reads its folder's name once, when it is imported. It reads its store there too, since
# importing it takes long.
SCRIPT = """
import json
from pathlib import Path
from test_trackers import run_with

run_with("trackio", "run")

from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import MEDIA_DIR

[run] = SQLiteStorage.get_runs("pictures")
store = {"media": str(MEDIA_DIR), "logs": SQLiteStorage.get_logs("pictures", run)}
Path("trackio.json").write_text(json.dumps(store, default=str))
"""


def run_with(tracker: str, output_dir) -> None:
    held_out = prompt_dataset("held out", "also")
    tiny_trainer(output_dir, report_to=[tracker], eval_dataset=held_out, **RUN).train()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tensorboard")
    run_with("tensorboard", directory / "run")
    return directory


@pytest.fixture(scope="module")
def trackio_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trackio")
    tests = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests / "trainer", tests.parent))),
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(directory / "trackio"),
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory


def grid(run: Path, step: int) -> Image.Image:
    with Image.open(run / "run" / "samples" / f"step-{step:06d}.png") as picture:
        return picture.convert("RGB")


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def test_tensorboard_shows_the_fixed_prompts(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = run.glob("run/runs/*")
    store = EventAccumulator(str(events)).Reload()
    shown = store.Images("samples")
    assert [event.step for event in shown] == [0, 2, 3]
    for event in shown:
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            assert same(picture.convert("RGB"), grid(run, event.step))
    assert [event.step for event in store.Scalars("train/reward")] == [1, 2, 3]


@pytest.mark.slow
def test_trackio_shows_the_fixed_prompts_and_the_table(trackio_run):
    run = trackio_run
    store = json.loads((run / "trackio.json").read_text())
    shown = {log["train/global_step"]: log["samples"] for log in store["logs"] if "samples" in log}
    assert sorted(shown) == [0, 2, 3]
    for step, image in shown.items():
        with Image.open(Path(store["media"]) / image["file_path"]) as picture:
            assert same(picture.convert("RGB"), grid(run, step))
    tables = {log["train/global_step"]: log["completions"]["_value"] for log in store["logs"] if "completions" in log}
    assert sorted(tables) == [0, 1, 2]  # of the rounds that begin there
    assert len(tables[0]) == 16
    row = tables[0][0]
    assert row["prompt"] in ("a", "b", "c")
    assert isinstance(row["rewards/brightness"], float)
    with Image.open(Path(store["media"]) / row["image"]["file_path"]) as picture:
        assert picture.size == (32, 32)


def test_the_page_of_the_run(run):
    from trl_dgpo.report import write_report

    page = write_report(run / "run").read_text()
    assert "at step <b>3</b> of 3" in page
    assert page.count("data:image/png") == 3 * 2
    assert page.count("data:image/jpeg") == 3 * 16
