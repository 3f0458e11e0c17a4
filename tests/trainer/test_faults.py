"""What a run does when something goes wrong around it: the rows of `docs/faults.md`, and that each has its test."""

import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_random_pipeline
from tiny_trainers import brightness, everything, same, scramble, tiny_config, tiny_trainer, weights
from transformers import TrainerCallback

from trl_dgpo import DGPOTrainer, checkpoints, faults
from trl_dgpo.checkpoints import MANIFEST, damage, newest_first
from trl_dgpo.faults import PASSED_ON, StepGuard, StopSignals, check_output_dir
from trl_dgpo.rewards.scoring import RewardsFailedError


ROOT = Path(__file__).parent.parent.parent

SMALL = {"num_generations": 2, "prompts_per_round": 2, "num_train_timesteps": 1, "sample_num_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def small_trainer(output_dir, *, is_scrambled=True, **config):
    trainer = tiny_trainer(output_dir, **{**SMALL, "learning_rate": 1e-2, **config})
    if is_scrambled:
        scramble(trainer)
    return trainer


class At(TrainerCallback):
    """Calls something at the beginning of an optimiser step, counted from 1."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.act()


class Spoil(TrainerCallback):
    """A loss that is no number, or far too large, in some optimiser steps, counted from 1."""

    def __init__(self, steps, factor=float("nan")):
        self.steps, self.factor, self.trainer = steps, factor, None

    def on_step_begin(self, args, state, control, **kwargs):
        loss = type(self.trainer)._loss
        factor = self.factor if state.global_step + 1 in self.steps else 1.0
        self.trainer._loss = lambda *args: factor * loss(self.trainer, *args)


def spoiled_trainer(output_dir, steps, factor=float("nan"), **config):
    spoil = Spoil(steps, factor)
    spoil.trainer = small_trainer(output_dir, callbacks=[spoil], **config)
    return spoil.trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps, each with a checkpoint, and what it has at the end."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = small_trainer(folder, **SAVING)
    trainer.train()
    return folder, everything(trainer)


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """No file can grow beyond so many bytes: a write that fails, in whatever language it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_any_file_of_a_checkpoint(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    trainer = small_trainer(tmp_path, **{**SAVING, "max_steps": 4})
    files = [file for file in (tmp_path / "checkpoint-3").rglob("*") if file.is_file()]
    sizes = {file.stat().st_size for file in files}
    failed = set()

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for size in sorted(sizes):
                with files_of_at_most(size - 1), pytest.raises(OSError, match="MB are free there") as caught:
                    trainer._save_checkpoint(trainer.model, None)
                failed.add(str(caught.value.__cause__))
                assert f"{tmp_path}/checkpoint-4 could not be written" in str(caught.value)
                assert f"The last one, {tmp_path}/checkpoint-3, is as it was" in str(caught.value)
                assert [path.name for path in newest_first(tmp_path)] == [
                    "checkpoint-3",
                    "checkpoint-2",
                    "checkpoint-1",
                ]
                assert not list(tmp_path.glob("_*"))

    trainer.add_callback(Full())
    trainer.train(resume_from_checkpoint=True)  # which afterwards finds room for its checkpoint
    assert damage(tmp_path / "checkpoint-4") is None
    assert len(failed) > 1  # more than one writer


def test_a_run_on_a_full_disk_ends_with_its_last_checkpoint(whole, tmp_path):
    folder, end = whole
    trainer = small_trainer(tmp_path, **SAVING)
    limit = (folder / "checkpoint-1" / "optimizer.pt").stat().st_size - 1
    full = files_of_at_most(limit)
    trainer.add_callback(At(2, full.__enter__))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-2 could not be written \(.*go on with `resume_from_checkpoint`"
        ):
            trainer.train()
    finally:
        full.__exit__(None, None, None)
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-1"]
    again = small_trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same(everything(again), end)


@pytest.mark.slow
def test_a_file_system_that_is_full(whole, tmp_path):
    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], capture_output=True
        ).returncode

    if os.geteuid() != 0 or mount("size=1m") != 0:
        pytest.skip("only root may mount a small file system")
    try:
        trainer = small_trainer(tmp_path, **SAVING)
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* a checkpoint takes 0\.7 MB"):
            trainer.train()
        assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-1"]
        assert damage(tmp_path / "checkpoint-1") is None
        assert mount("remount,size=9m") == 0
        again = small_trainer(tmp_path, **SAVING)
        again.train(resume_from_checkpoint=True)
        assert same(everything(again), whole[1])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# -- a damaged checkpoint ---------------------------------------------------------------------------------------------


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def garbled(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncated, emptied, Path.unlink, garbled])
def test_every_file_of_a_checkpoint_is_looked_at(whole, tmp_path, spoil):
    folder, _ = whole
    files = [file for file in (folder / "checkpoint-3").rglob("*") if file.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST} <= {f.name for f in files}
    assert damage(folder / "checkpoint-3") is None
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(folder / "checkpoint-3", copy)
        spoil(copy / file.relative_to(folder / "checkpoint-3"))
        if file.name == MANIFEST and spoil is Path.unlink:
            assert damage(copy) is None  # as of a version that wrote none: nothing is lost with it
        elif file.name == MANIFEST and spoil is garbled:
            assert damage(copy) is not None
        else:
            assert str(copy / file.relative_to(folder / "checkpoint-3")) in damage(copy)


def test_a_file_that_cannot_be_read_is_damage(whole, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints, "_crc32", broken)
    assert "checkpoint-3 cannot be read ([Errno 5] Input/output error: " in damage(whole[0] / "checkpoint-3")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(whole, tmp_path, caplog):
    folder, end = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    truncated(tmp_path / "checkpoint-3" / "optimizer.pt")
    garbled(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    trainer = small_trainer(tmp_path, **SAVING)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"checkpoint-3' is damaged: .*optimizer.pt has .* bytes where") as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert f"The newest that is whole is '{tmp_path}/checkpoint-1'" in str(caught.value)
    assert same(weights(trainer), before)
    trainer.train(resume_from_checkpoint=True)
    assert same(everything(trainer), end)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "damaged" in r.getMessage()]
    assert [re.findall(r"checkpoint-\d", text)[-1] for text in warnings] == ["checkpoint-1", "checkpoint-1"]
    assert "checkpoint-3" in warnings[0]
    assert "checkpoint-2" in warnings[1]


def test_no_whole_checkpoint_is_told_with_every_file(whole, tmp_path):
    folder, _ = whole
    trainer = small_trainer(tmp_path, **SAVING)
    with pytest.raises(ValueError, match=r"There is no checkpoint in .*Start anew"):
        trainer.train(resume_from_checkpoint=True)
    for step in (1, 2):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        emptied(tmp_path / f"checkpoint-{step}" / "rng_state.pth")
    with pytest.raises(ValueError, match=r"no whole checkpoint.*checkpoint-2/rng_state.*checkpoint-1/rng_state"):
        trainer.train(resume_from_checkpoint=True)


# -- a folder that cannot be written to -------------------------------------------------------------------------------


def test_an_output_dir_that_cannot_be_made_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_dgpo.trainer.base_trainer.load_backbone", lambda *args, **kwargs: pytest.fail("loaded"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"`output_dir` is '.*/run', and nothing can be written in '.*file'"):
        tiny_trainer(file / "run")
    with pytest.raises(ValueError, match="take a folder that this user can write to"):
        tiny_trainer("/proc/run")


def test_a_read_only_output_dir_is_refused_and_a_good_one_left_as_it_was(tmp_path):
    check_output_dir(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    folder = Path(tempfile.mkdtemp())  # whose parents are open to all
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)  # root writes where it likes
            check_output_dir(folder / "run")
            os._exit(0)
        except ValueError as error:
            os._exit(42 if "PermissionError" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    folder.rmdir()


# -- loss and gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30], ids=["NaN", "infinite", "exploding"])
def test_a_step_that_would_spoil_the_weights_is_left_out(tmp_path, caplog, factor):
    states = []
    trainer = spoiled_trainer(tmp_path, {2}, factor, max_steps=3, skip_grad_norm=1e6, ema_every=1, clip_range=1e-3)
    trainer.add_callback(At(2, lambda: states.append(everything(trainer))))
    trainer.add_callback(At(3, lambda: states.append(everything(trainer))))
    trainer.train()
    assert same(*states)
    assert not same(everything(trainer), states[1])  # the third step is taken
    assert all(tensor.isfinite().all() for tensor in everything(trainer).values())
    [warning] = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert re.search(r"step 2 is left out, the 1. in a row: loss \S+, gradient norm \S+ \(at most 1e\+06", warning)
    assert [log.get("skipped_steps") for log in trainer.state.log_history if "loss" in log] == [None, 1, 1]


@pytest.mark.parametrize("save_steps", [1, 10])  # also where the last of them has had its checkpoint already
def test_too_many_in_a_row_stop_the_run_with_its_state_saved(tmp_path, save_steps):
    config = {**SAVING, "max_steps": 6, "save_steps": save_steps}
    trainer = spoiled_trainer(tmp_path, {3, 4}, **config, max_skipped_steps=2)
    with pytest.raises(RuntimeError, match=r"last 2 optimiser steps, up to step 4, .*checkpoint-4: go on with"):
        trainer.train()
    left = everything(trainer)
    again = spoiled_trainer(tmp_path, {5}, **{**SAVING, "max_steps": 5}, max_skipped_steps=2)
    again.train(resume_from_checkpoint=True)  # which has a fresh try: one more is not two
    assert same(everything(again), left)
    assert again.state.log_history[-2]["skipped_steps"] == 3


def test_the_count_goes_through_a_checkpoint(tmp_path):
    spoiled_trainer(tmp_path, {2}, **{**SAVING, "max_steps": 2}, max_skipped_steps=2).train()
    again = spoiled_trainer(tmp_path, {3}, **SAVING, max_skipped_steps=2)
    with pytest.raises(RuntimeError, match="The last 2 optimiser steps, up to step 3"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("loss", "norm", "is_scaled", "skips"),
    [
        (0.1, 1.0, False, False),
        (0.1, 10.0, False, False),
        (0.1, 11.0, False, True),
        (0.1, float("nan"), False, True),  # the loss of another process
        (0.1, float("inf"), False, True),
        (0.1, float("inf"), True, False),  # fp16's scaling, which leaves it out by itself
        (0.1, 11.0, True, True),
        (float("inf"), 1.0, False, False),  # of what has no gradient: it spoils nothing
    ],
)
def test_what_is_left_out(loss, norm, is_scaled, skips):
    guard = StepGuard(max_skipped=2, max_norm=10.0, in_a_row=1, total=1)
    assert guard.skips(7, loss, norm, is_scaled) is skips
    assert guard.total == 1 + skips
    assert guard.is_exhausted is skips
    # What scaling leaves out is no step that was taken, nor one of ours.
    assert guard.in_a_row == (2 if skips else 1 if is_scaled else 0)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "told"),
    [("_sample", "in the rollout"), ("_fix", "in the forwards without"), ("_loss", "in the update")],
)
def test_out_of_memory_says_where_and_what_would_save_some(tmp_path, monkeypatch, where, told):
    trainer = small_trainer(tmp_path, max_steps=2)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.add_callback(At(2, lambda: monkeypatch.setattr(trainer, where, full)))
    with pytest.raises(torch.OutOfMemoryError, match=f"Out of memory {told}.* of optimiser step 2: CUDA") as caught:
        trainer.train()
    assert "the cheapest first: --decode_batch_size 1, --per_device_train_batch_size 1" in str(caught.value)
    assert "Tried to allocate 2.00 GiB." in str(caught.value.__cause__)


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_to_the_bit(whole, tmp_path, caplog, name):
    _, end = whole
    number = getattr(signal, name)
    trainer = small_trainer(tmp_path, **{**SAVING, "save_steps": 10})
    trainer.add_callback(At(2, lambda: signal.raise_signal(number)))
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 128 + number
    assert trainer.state.global_step == 2
    assert f"{name}: the run ends after optimiser step 2, with exit code {128 + number}" in caplog.text
    assert f"{tmp_path}/checkpoint-2: go on with `resume_from_checkpoint=True`" in caplog.text
    assert signal.getsignal(number) is signal.SIG_DFL
    again = small_trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same(everything(again), end)


def test_without_checkpoints_a_signal_says_that_nothing_is_kept(tmp_path, caplog):
    trainer = small_trainer(tmp_path, max_steps=2)
    trainer.add_callback(At(1, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        trainer.train()
    assert "Its state is not kept, since `save_strategy` is 'no'" in caplog.text
    assert not newest_first(tmp_path)


def exit_code_of(act) -> int:
    """That of a process of its own."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("seconds", "code"), [(PASSED_ON + 1, -signal.SIGTERM), (0.1, 0)], ids=["later", "passed on"])
def test_a_second_signal_ends_at_once(monkeypatch, seconds, code):
    now = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(faults.time, "monotonic", lambda: next(now))

    def twice():
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            if signals.received == signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)

    assert exit_code_of(twice) == code


def test_a_forked_child_ends_by_the_first_signal():
    with StopSignals() as signals:
        assert exit_code_of(lambda: signal.raise_signal(signal.SIGTERM)) == -signal.SIGTERM
    assert not signals.received


def test_a_signal_after_the_last_step_ends_the_process_too(tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer = small_trainer(tmp_path, max_steps=1, callbacks=[Late()])
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143


def test_another_handler_and_another_thread_keep_theirs():
    def theirs(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGTERM) is theirs
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL

    def in_a_thread():
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_rewards_that_stay_away_stop_the_run_with_its_state_saved(whole, tmp_path, caplog):
    _, end = whole
    calls = []

    def reward(images, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise ConnectionError("the server is gone")
        return brightness(images)

    trainer = small_trainer(tmp_path, reward_funcs=reward, **{**SAVING, "save_steps": 10})
    with pytest.raises(RewardsFailedError, match="Rewards failed for 4 of the last"):
        trainer.train()
    assert f"stops after optimiser step 2. Its state is in {tmp_path}/checkpoint-2" in caplog.text
    again = small_trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same(everything(again), end)


def test_prompts_drawn_at_random_are_drawn_again_after_rewards_that_failed(tmp_path):
    def trained(folder, limit):
        prompts = []

        def prompt_function():
            return random.choice("abcdefgh"), {}

        def reward(images, prompts_of_images, metadata):
            if len(images) > 1:  # else one that failed before is tried alone
                prompts.append(tuple(prompts_of_images))
            if len(prompts) == limit:
                raise ConnectionError("the server is gone")
            return images.float().mean((1, 2, 3)), {}

        config = {**SAVING, "save_steps": 10, "reward_self_test": False, "num_log_images": 0}
        random.seed(0)
        args = tiny_config(folder, **{**SMALL, **config})
        return DGPOTrainer(args, reward, prompt_function, tiny_random_pipeline()), prompts

    whole, drawn = trained(tmp_path / "whole", None)
    whole.train()
    assert len(drawn) == 3
    failing, _ = trained(tmp_path, 3)
    with pytest.raises(RewardsFailedError):
        failing.train()
    again, drawn_again = trained(tmp_path, None)
    again.train(resume_from_checkpoint=True)
    assert drawn_again == drawn[2:]
    assert same(everything(again), everything(whole))


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_test_in_the_table_exists():
    table = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) >= 15
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
