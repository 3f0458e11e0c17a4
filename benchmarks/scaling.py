"""
Two processes against two independent ones: what sharing a round costs.

    python benchmarks/scaling.py --model mid

Each process has one thread. "shared": two processes with gloo between them do one round together, as under
`torchrun --nproc_per_node 2` (the same variables are set here). "independent": two processes at once that know nothing
of one another do half that round each. "alone": one of them, while all others stand still. The three alternate, so
that what else the machine does weighs on all.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


GROUPS = 2  # of the shared round: one a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="mid")
    parser.add_argument("--num_layers", type=int, help="fewer layers of mid or sd35, for a try")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="that a measurement takes; 1, but 10 for the tiny model")
    parser.add_argument("--output", help="JSON file to write the figures to")
    parser.add_argument("--groups", type=int, help=argparse.SUPPRESS)  # in a process that was started here
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (10 if arguments.model == "tiny" else 1)
    if arguments.groups:
        work(arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(arguments, folder)


def compare(arguments: argparse.Namespace, folder: str) -> None:
    """Start all processes, and let them do rounds by turns."""
    together = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    shared = [
        Worker(GROUPS, f"{folder}/shared", {**together, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        for rank in range(2)
    ]
    independent = [Worker(GROUPS // 2, f"{folder}/{number}", {}) for number in range(2)]
    try:
        seconds: dict[str, list[float]] = {"shared": [], "independent": [], "alone": []}
        turns = {"shared": shared, "independent": independent, "alone": independent[:1]}
        for pair in range(1 + arguments.pairs):
            for name, workers in turns.items():
                for worker in workers:
                    worker.begin(1 if pair == 0 else arguments.rounds)
                taken = [worker.end() for worker in workers]
                if pair:  # the first warms up
                    # Of independent processes each has its own rate; those that share a round end it together.
                    seconds[name].append(len(taken) / sum(1 / s for s in taken))
    finally:
        for worker in (*shared, *independent):
            worker.process.kill()
            worker.process.wait()
    from rounds import machine, median, spread

    ratios = [i / s for i, s in zip(seconds["independent"], seconds["shared"], strict=True)]
    print(json.dumps(machine()))
    for name, values in seconds.items():
        done = "the round" if name == "shared" else "half of it each" if name == "independent" else "half of it"
        print(f"{name:<12} {median(values) / arguments.rounds:8.3f} s, {done}")
    print(f"throughput, shared / independent: {spread(ratios)}")
    twice = [2 * a / s for a, s in zip(seconds["alone"], seconds["shared"], strict=True)]
    print(f"throughput, two processes / one alone: {spread(twice)}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")


class Worker:
    """A process that does rounds when it is told to."""

    def __init__(self, groups: int, folder: str, variables: dict[str, str]):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "ACCELERATE_USE_CPU": "true",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--groups", str(groups), "--folder", folder],
            env={**environment, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, rounds: int) -> None:
        self.process.stdin.write(f"{rounds}\n")
        self.process.stdin.flush()

    def end(self) -> float:
        """Seconds that the rounds took."""
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("A process ended before its rounds did; what it wrote is above.")


def work(arguments: argparse.Namespace) -> None:
    """The other end of a `Worker`."""
    import torch
    from models import MODELS, build_pipeline
    from rounds import Rounds, make_trainer

    torch.set_num_threads(1)
    options = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    pipeline = build_pipeline(arguments.model, **options)
    config = {"prompts_per_round": arguments.groups, "use_cpu": True, **MODELS[arguments.model].sizes}
    with Rounds(make_trainer(pipeline, arguments.folder, **config)) as rounds:
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                rounds.next()
            print(f"seconds {time.perf_counter() - start}", flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main()
