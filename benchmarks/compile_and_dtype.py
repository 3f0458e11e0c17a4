"""
What bfloat16 and `torch_compile` add, each alone: rounds of three trainers, by turns.

    python benchmarks/compile_and_dtype.py --model tiny
    python benchmarks/compile_and_dtype.py --model sd35 --base bf16       # a GPU: compile and float32 against bfloat16

The first round of each, with compilation, is printed apart.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from models import MODELS, build_pipeline
from rounds import ROUND, Rounds, machine, make_trainer, median, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--base", choices=("float32", "bf16"), default="float32", help="what the others differ from")
    parser.add_argument("--rounds", type=int, default=3, help="of each, after the first")
    parser.add_argument("--num_generations", type=int, default=ROUND["num_generations"])
    parser.add_argument("--num_layers", type=int, help="fewer layers of mid or sd35, for a try")
    parser.add_argument("--output", help="JSON file to write the figures to")
    arguments = parser.parse_args()

    is_bf16 = arguments.base == "bf16"
    variants = {
        arguments.base: {"bf16": is_bf16},
        "float32" if is_bf16 else "bf16": {"bf16": not is_bf16},
        f"{arguments.base}, compiled": {"bf16": is_bf16, "torch_compile": True},
    }
    options = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with ExitStack() as stack:
        taken = {}
        for name, config in variants.items():
            dtype = torch.bfloat16 if config["bf16"] else torch.float32
            pipeline = build_pipeline(arguments.model, dtype=dtype, device=device, **options)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = {"num_generations": arguments.num_generations, **MODELS[arguments.model].sizes, **config}
            taken[name] = stack.enter_context(Rounds(make_trainer(pipeline, folder, **config)))
        for _ in range(1 + arguments.rounds):
            for name, rounds in taken.items():
                seconds[name].append(rounds.next())

    print(json.dumps(machine()))
    base = seconds[arguments.base][1:]
    for name, (first, *others) in seconds.items():
        faster = spread(b / s for b, s in zip(base, others, strict=True))
        print(
            f"{name:<20} {median(others):8.3f} s a round, the first {first:8.3f} s; {arguments.base} / this: {faster}"
        )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
