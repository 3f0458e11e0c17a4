"""
`kill -9` at random moments, with one process and with two: killed and resumed is never killed, to the bit. And what
two processes do when one of them is killed, is told to end or has a loss that is no number.

The runs are forked from one process that has imported everything, so that a start costs no import.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch


SEED = 0


@pytest.mark.parametrize(
    ("processes", "kills"),
    [
        pytest.param(1, 2, id="1-process-twice", marks=pytest.mark.slow),
        pytest.param(2, 1, id="2-processes-once"),
        pytest.param(1, 10, id="1-process-10-times", marks=pytest.mark.slow),
        pytest.param(2, 10, id="2-processes-10-times", marks=pytest.mark.slow),
        pytest.param(1, 100, id="1-process-100-times", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_resumed_is_never_killed(tmp_path, processes, kills):
    report = in_a_fresh_process("kill", tmp_path, processes, kills)
    print(json.dumps(report))
    assert len(report["kills"]) == kills
    assert all(kill["last_checkpoint"] >= kill["last_checkpoint_before"] for kill in report["kills"])
    assert all(kill["is_whole"] for kill in report["kills"])
    assert report["equal"] == [True] * processes


@pytest.mark.slow
def test_another_number_of_processes_starts_a_fresh_round_and_says_so(tmp_path):
    report = in_a_fresh_process("fewer", tmp_path)
    assert report["steps"] == 7
    assert report["said"] == {"mid-round": True, "at its end": False}
    assert report["finite"]


@pytest.mark.slow
def test_one_process_of_two_dies_and_the_other_says_so(tmp_path):
    report = in_a_fresh_process("lose", tmp_path)
    print(json.dumps(report))
    assert report["code"] == 1
    assert report["seconds"] < 20
    assert "Process 0 of 2 has lost another one at optimiser step" in report["said"]
    assert "Start all of them again with `resume_from_checkpoint=True`" in report["said"]


@pytest.mark.slow
def test_one_process_of_two_dies_under_torchrun(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, "die", tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    seconds = time.time() - (tmp_path / "died").stat().st_mtime
    print(f"{seconds:.1f} s after the kill of one, torchrun had ended")
    assert done.returncode == 1
    assert seconds < 60
    assert "Signal 9 (SIGKILL) received" in done.stderr


@pytest.mark.slow
def test_sigterm_in_one_process_of_two_ends_both_after_the_same_step(tmp_path):
    report = in_a_fresh_process("terminate", tmp_path)
    print(json.dumps(report))
    assert report["codes"] == [143, 143]
    assert report["last_checkpoint"] == 5
    assert report["equal"] == [True, True]


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_of_two_is_left_out_by_both(tmp_path):
    report = in_a_fresh_process("spoil", tmp_path)
    assert report["moved"] == [[True, False, True]] * 2
    assert report["alike"]


def in_a_fresh_process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# -- what that process does -------------------------------------------------------------------------------------------


def trainer_of(output: Path, **config):
    from tiny_trainers import prompt_dataset, scramble, tiny_trainer
    from trl import ModelConfig, get_peft_config

    trainer = tiny_trainer(
        output,
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        eval_dataset=prompt_dataset("x", "y"),
        peft_config=get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.1)),
        **{
            "num_iterations": 2,
            "updates_per_round": 2,  # 4 steps a round
            "max_steps": 7,
            "old_policy_after": 1,
            "clip_range": 1e-3,
            "kl_coef": 0.1,
            "kl_target": 1e-3,
            "kl_target_rate": 2.0,
            "beta": 1e4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "num_log_images": 1,
            **config,
        },
    )
    scramble(trainer)
    return trainer


def run(output: Path, **config) -> None:
    from tiny_trainers import everything
    from transformers.trainer_utils import get_last_checkpoint

    trainer = trainer_of(output, **config)
    begun = output / f"begun-{trainer.args.process_index}"
    last = get_last_checkpoint(output) if output.is_dir() else None
    output.mkdir(exist_ok=True)
    begun.touch()
    trainer.train(resume_from_checkpoint=last)
    torch.save(everything(trainer), f"{output}.{trainer.args.process_index}.pt")


def start(processes: int, output: Path, *, act=None, **config) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for begun in output.glob("begun-*"):
        begun.unlink()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                os.environ["ACCELERATE_USE_CPU"] = "true"
                if processes > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                with open(f"{output}.{rank}.log", "a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                (run if act is None else act)(output, **config)
                os._exit(0)
            except SystemExit as error:
                os._exit(error.code)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def finish(processes: int, output: Path, **config) -> float:
    began = time.monotonic()
    codes = wait(start(processes, output, **config))
    if any(codes):
        raise RuntimeError(Path(f"{output}.0.log").read_text()[-3000:])
    return time.monotonic() - began


def last_step(output: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


def kill(tmp_path: Path, processes: int, kills: int) -> dict:
    from trl_dgpo.checkpoints import damage

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Where there are many kills, a run of many short steps, of which each start gets on by few.
    steps, config = 7, {}
    if kills > 10:
        steps, config = 120, {"max_steps": 120, "num_generations": 2, "prompts_per_round": 2, "num_log_images": 0}
        config |= {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
    seconds = finish(processes, whole, **config)
    stream, done = random.Random(SEED), []
    while len(done) < kills:
        before = last_step(killed)
        began = time.monotonic()
        children = start(processes, killed, **config)
        while len(list(killed.glob("begun-*"))) < processes and time.monotonic() < began + 60:
            time.sleep(0.005)
        # At any moment of what is left of the training, so in the end at many of the whole.
        time.sleep(stream.uniform(0.0, 0.7) * seconds * min(1 - before / steps, 6 / steps if config else 1))
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
        # A run that was done before its kill begins anew: its kill counts for nothing.
        if Path(f"{killed}.0.pt").exists():
            Path(f"{killed}.0.pt").unlink()
            os.rename(killed, f"{killed}.done{len(done)}.{time.monotonic_ns()}")
            continue
        last = last_step(killed)
        is_whole = last == 0 or damage(killed / f"checkpoint-{last}") is None
        done.append({"last_checkpoint_before": before, "last_checkpoint": last, "is_whole": is_whole})
    finish(processes, killed, **config)
    return {"kills": done, "equal": equal(whole, killed, processes)}


def lose(tmp_path: Path) -> dict:
    output = tmp_path / "run"
    first, second = start(2, output)
    wait_for(output / "checkpoint-2")
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    codes = wait([first])
    seconds = time.monotonic() - began
    wait([second])
    return {"code": codes[0], "seconds": round(seconds, 1), "said": Path(f"{output}.0.log").read_text()[-3000:]}


def die(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and args.process_index == 1:
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = trainer_of(tmp_path / "run")
    trainer.add_callback(Die())
    trainer.train()


def terminate(tmp_path: Path) -> dict:
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4 and args.process_index == 1:
                signal.raise_signal(signal.SIGTERM)

    def ending(output: Path) -> None:
        trainer = trainer_of(output, save_steps=7, load_best_model_at_end=False)
        trainer.add_callback(Tell())
        trainer.train()

    whole, ended = tmp_path / "whole", tmp_path / "ended"
    finish(2, whole, load_best_model_at_end=False)
    codes, last = wait(start(2, ended, act=ending)), last_step(ended)
    finish(2, ended, load_best_model_at_end=False)
    return {"codes": codes, "last_checkpoint": last, "equal": equal(whole, ended, 2)}


def spoil(tmp_path: Path) -> dict:
    def spoiling(output: Path) -> None:
        from tiny_trainers import everything
        from transformers import TrainerCallback

        seen = []

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                is_spoiled = state.global_step == 1 and args.process_index == 1
                trainer._loss = lambda *args: loss(*args) * (float("nan") if is_spoiled else 1.0)
                seen.append({name: tensor.clone() for name, tensor in everything(trainer).items()})

        trainer = trainer_of(output, max_steps=3, save_strategy="no", load_best_model_at_end=False)
        loss = trainer._loss
        trainer.add_callback(Look())
        trainer.train()
        torch.save([*seen[1:], everything(trainer)], f"{output}.{trainer.args.process_index}.pt")
        torch.save(seen[0], f"{output}.first.{trainer.args.process_index}.pt")

    output = tmp_path / "run"
    codes = wait(start(2, output, act=spoiling))
    if any(codes):
        raise RuntimeError(Path(f"{output}.1.log").read_text()[-3000:])
    moved, ends = [], []
    for rank in range(2):
        states = [torch.load(f"{output}.first.{rank}.pt"), *torch.load(f"{output}.{rank}.pt")]
        names = [name for name in states[0] if name.startswith("None.")]
        moved.append([any(not torch.equal(a[n], b[n]) for n in names) for a, b in pairwise(states)])
        ends.append(states[-1])
    return {"moved": moved, "alike": all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])}


def wait_for(path: Path) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come about")
        time.sleep(0.005)


def equal(whole: Path, other: Path, processes: int) -> list[bool]:
    pairs = [
        (torch.load(f"{run}.{rank}.pt", weights_only=True) for run in (whole, other)) for rank in range(processes)
    ]
    return [a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs]


def fewer(tmp_path: Path) -> dict:
    said, state = {}, {}
    for name, step in (("mid-round", 3), ("at its end", 4)):
        output = tmp_path / name
        finish(2, output, max_steps=step)
        finish(1, output)
        said[name] = "sampled anew" in Path(f"{output}.0.log").read_text()
        state = json.loads((output / "checkpoint-7" / "trainer_state.json").read_text())
    weights = torch.load(f"{output}.0.pt", weights_only=True)
    return {
        "steps": state["global_step"],
        "said": said,
        "finite": all(weight.isfinite().all().item() for weight in weights.values()),
    }


if __name__ == "__main__":
    import gc

    import tiny_trainers  # noqa: F401
    import trl  # noqa: F401

    gc.freeze()
    torch.set_num_threads(1)
    what, tmp_path, *numbers = sys.argv[1:]
    acts = {"kill": kill, "fewer": fewer, "lose": lose, "die": die, "terminate": terminate, "spoil": spoil}
    print(json.dumps(acts[what](Path(tmp_path), *map(int, numbers))))
