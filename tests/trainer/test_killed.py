"""
`kill -9` at random moments, with one process and with two: killed and resumed is never killed, to the bit.

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


def start(processes: int, output: Path, **config) -> list[int]:
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
                run(output, **config)
                os._exit(0)
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
        steps, config = 60, {"max_steps": 60, "num_generations": 2, "prompts_per_round": 2, "eval_steps": 5}
        config["save_steps"] = 1
        config["load_best_model_at_end"] = False
    seconds = finish(processes, whole, **config)
    stream, done = random.Random(SEED), []
    while len(done) < kills:
        before = last_step(killed)
        began = time.monotonic()
        children = start(processes, killed, **config)
        while len(list(killed.glob("begun-*"))) < processes and time.monotonic() < began + 60:
            time.sleep(0.005)
        # At any moment of what is left of the training, so in the end at many of the whole.
        time.sleep(stream.uniform(0.0, 0.7) * seconds * min(1 - before / steps, 3 / steps if config else 1))
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
    pairs = [
        (torch.load(f"{run}.{rank}.pt", weights_only=True) for run in (whole, killed)) for rank in range(processes)
    ]
    equal = [a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs]
    return {"kills": done, "equal": equal}


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
    print(json.dumps({"kill": kill, "fewer": fewer}[what](Path(tmp_path), *map(int, numbers))))
