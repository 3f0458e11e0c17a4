"""
Where the time and the memory of a round go, and how near it is to the cost of its forwards alone.

    python benchmarks/step_cost.py --model tiny
    python benchmarks/step_cost.py --model mid --clip_range 0
    python benchmarks/step_cost.py --model sd35 --bf16 --num_generations 24 --torch_compile     # a GPU
    python benchmarks/step_cost.py --model sd35 --num_layers 2 --resolution 64 --rounds 1       # a CPU, to try it

The floor is what a round costs on paper: how often each forward, each backward, encoding, decoding, the reward and the
optimiser step are needed, times what each costs alone. The parts are measured before and after every round, on the
trainer's own weights and with as many rows, so that what else the machine does weighs on both.

"authors' settings" is the floor of the same round with the adapter's layers on in every forward, the old policy's
forward also where nothing is clipped, and every image's prompt encoded. The difference is what this package saves:
counted in floating point operations, and measured in seconds.
"""

import argparse
import json
import os
import re
import resource
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from models import MODELS, build_pipeline
from peft import LoraConfig, get_peft_model
from rounds import ROUND, Rounds, machine, make_trainer, median, now, spread
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from trl_dgpo import DGPOTrainer


# Dense bfloat16, from the makers' data sheets.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
PHASES = ("rollout", "reward", "reference", "update")


def main() -> None:
    arguments = parse()
    if arguments.vram_cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.vram_cap * 2**30 / total)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(arguments, folder)
        result = measure(trainer, arguments.rounds)
    result = {"arguments": vars(arguments), "machine": machine(), **result}
    report(result, arguments.peak_tflops or peak_tflops())
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


def parse(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=8, help="after one that warms up")
    for name in ("num_generations", "prompts_per_round", "num_train_timesteps", "sample_num_steps"):
        parser.add_argument(f"--{name}", type=int, default=ROUND[name])
    for name in ("clip_range", "kl_coef", "sample_guidance_scale"):
        parser.add_argument(f"--{name}", type=float, default=ROUND[name])
    parser.add_argument("--per_device_train_batch_size", type=int, help="one group if not given")
    parser.add_argument("--sample_batch_size", type=int, help="one group if not given")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--num_layers", type=int, help="fewer layers of mid or sd35, for a try")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--load_in_4bit", action="store_true", help="the frozen transformer, by bitsandbytes")
    parser.add_argument("--vram_cap", type=float, help="GiB of GPU memory that this process may take")
    parser.add_argument("--peak_tflops", type=float, help="of the device, where its name is not known here")
    parser.add_argument("--output", help="JSON file to write the figures to")
    return parser.parse_args(command)


def build_trainer(arguments: argparse.Namespace, folder: str) -> DGPOTrainer:
    fields = (
        "num_generations",
        "prompts_per_round",
        "num_train_timesteps",
        "sample_num_steps",
        "clip_range",
        "kl_coef",
        "sample_guidance_scale",
        "per_device_train_batch_size",
        "sample_batch_size",
        "bf16",
        "torch_compile",
        "gradient_checkpointing",
    )
    config = {**MODELS[arguments.model].sizes, **{name: getattr(arguments, name) for name in fields}}
    if arguments.resolution:
        config["resolution"] = arguments.resolution
    options = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, quantization_config = build_pipeline(arguments.model, dtype=dtype, device=device, **options), None
    if arguments.load_in_4bit:  # only what is loaded from a folder can be quantised
        from diffusers import BitsAndBytesConfig

        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        model.save_pretrained(f"{folder}/model")
        model = f"{folder}/model"
    return make_trainer(model, f"{folder}/run", quantization_config=quantization_config, **config)


def measure(trainer: DGPOTrainer, num_rounds: int) -> dict[str, Any]:
    """
    Rounds of a trainer, and before and after each the parts of one, alone.

    Returns:
        `dict` with the seconds of every round, of its phases and of every part, counts, operations and peak memory.
    """
    memory = PhaseMemory(trainer)
    parts = round_parts(trainer)
    with Rounds(trainer) as rounds:
        rounds.next()  # warms up
        memory.peaks.clear()
        alone, seconds = [time_parts(trainer, parts)], []
        for _ in range(num_rounds):
            seconds.append(rounds.next())
            alone.append(time_parts(trainer, parts))
        log = rounds.close()
    args = trainer.args
    return {
        "images": args.prompts_per_round * args.num_generations,
        "merges_adapter": trainer.merges_adapter,
        "round": seconds,
        "phases": {phase: [entry[f"time/{phase}"] for entry in log[1:]] for phase in PHASES},
        "memory": {phase: peak / 2**30 for phase, peak in memory.peaks.items()},
        "parts": [
            {
                **{
                    name: getattr(part, name)
                    for name in ("name", "phase", "count", "authors_count", "flops", "saving")
                },
                "seconds": [times[part.name] for times in alone],
            }
            for part in parts
        ],
    }


# -- the parts of a round ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """
    A piece of work that a round does some times.

    Args:
        name (`str`):
            What it is.
        phase (`str`):
            Phase of the round that it belongs to, or `"merging"`: no part of the floor, but taken off what it saves.
        count (`int`):
            How often a round of this trainer needs it.
        authors_count (`int`):
            How often a round needs it at the authors' settings.
        run (`Callable`):
            Does it once.
        flops (`int`, *optional*, defaults to `0`):
            Floating point operations of doing it once, those of matrix products and convolutions.
        within (`Callable`, *optional*):
            Context that is entered once for all its runs, as the trainer does.
        saving (`str`, *optional*, defaults to `""`):
            What it is called to do it at other times, or at other costs, than the authors' settings do.
    """

    name: str
    phase: str
    count: int
    authors_count: int
    run: Callable[[], Any]
    flops: int = 0
    within: Callable[[], AbstractContextManager] = nullcontext
    saving: str = ""


def round_parts(trainer: DGPOTrainer) -> list[Part]:
    """What a round of one process is made of, in its order."""
    args, using = trainer.args, trainer.policy.using
    size, batch, trained = args.num_generations, args.sample_batch_size, args.per_device_train_batch_size
    prompts, images = args.prompts_per_round, args.prompts_per_round * size
    sampled = batch * (2 if args.sample_guidance_scale > 1 else 1)
    rollouts, levels = args.sample_num_steps * images // batch, args.num_train_timesteps * images // trained
    passed = min(max(trained, sampled), images)  # rows of a forward without gradient, in an update
    passes = args.num_train_timesteps * images // passed
    clips, merges = args.clip_range is not None, trainer.merges_adapter
    old = "old" if clips else None  # as expensive, where there is none
    work, flops = _Work(trainer), _Flops(trainer)

    encoded = "a prompt is encoded once, not for each image"
    in_rollouts = "adapter merged while sampling"
    in_reference = "reference: more rows at once"
    in_old = "old policy: adapter merged, more rows at once" if clips else "no forward of the old policy"
    one, same = work.encode(1), work.encode(size)
    runs = {rows: work.forward(rows) for rows in {sampled, trained, passed}}

    def forward(name: str, rows: int, view: str | None, *, is_merged: bool = False, **part: Any) -> Part:
        title = f"{name}, {rows} rows{', merged' * is_merged}"
        has_adapter = view != "base" and not is_merged
        part |= {"run": runs[rows], "flops": flops.forward(rows, has_adapter)}
        return Part(title, within=lambda: using(view, merged=is_merged), **part)

    parts = [
        Part("encode a prompt", "rollout", prompts, 0, one, _count(one), saving=encoded),
        Part(f"encode {size} equal prompts", "rollout", 0, prompts, same, _count(same), saving=encoded),
    ]
    sampling = {"rows": sampled, "view": None, "phase": "rollout", "saving": in_rollouts}
    if merges:
        parts.append(forward("sampling", count=rollouts, authors_count=0, is_merged=True, **sampling))
    parts += [
        forward("sampling", count=0 if merges else rollouts, authors_count=rollouts, **sampling),
        Part(f"decode {batch}", "rollout", images // batch, images // batch, work.decode(batch), flops.decode(batch)),
        Part(f"reward of {images}", "reward", 1, 1, work.reward(images)),
    ]
    reference = {"view": "base", "phase": "reference", "saving": in_reference}
    before = {"view": old, "phase": "reference", "saving": in_old}
    is_same = passed == trained
    parts.append(forward("reference", passed, count=passes, authors_count=levels * is_same, **reference))
    if clips and not (is_same and not merges):
        parts.append(forward("old", passed, count=passes, authors_count=0, is_merged=merges, **before))
    if args.is_group_cut:
        gates = {"view": None, "phase": "reference", "count": passes, "authors_count": 0}
        parts.append(forward("gates", passed, **gates))
    parts += [
        *([] if is_same else [forward("reference", trained, count=0, authors_count=levels, **reference)]),
        forward("old", trained, count=levels * (clips and is_same and not merges), authors_count=levels, **before),
        Part("policy, with backward", "update", levels, levels, work.update(trained), flops.update(trained)),
        Part("optimiser step", "update", 1, 1, work.optimiser()),
    ]
    if merges:
        parts.append(Part("merge policy", "merging", 1, 0, work.merge(None), saving=in_rollouts))
    if merges and clips:
        parts.append(Part("merge old", "merging", 1, 0, work.merge("old"), saving=in_old))
    return parts


class _Work:
    """Functions that do a part of a round once, on a trainer's own weights."""

    def __init__(self, trainer: DGPOTrainer):
        self.trainer = trainer
        self.backbone, self.policy = trainer.backbone, trainer.policy
        self.stream = torch.Generator().manual_seed(0)

    def encode(self, count: int) -> Callable:
        def run():
            with torch.no_grad():
                self.backbone.pipeline.encode_prompt(
                    prompt=["ab"] * count,
                    prompt_2=None,
                    prompt_3=None,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.trainer.args.max_sequence_length,
                )

        return run

    def forward(self, rows: int) -> Callable:
        transformer, inputs = self.policy.transformer, self._inputs(rows)

        def run():
            with torch.no_grad(), self.trainer.accelerator.autocast():
                transformer(**inputs)

        return run

    def update(self, rows: int) -> Callable:
        transformer, inputs = self.policy.transformer, self._inputs(rows)

        def run():
            with self.trainer.accelerator.autocast():
                prediction = transformer(**inputs)[0]
            prediction.float().square().mean().backward()

        return run

    def decode(self, count: int) -> Callable:
        latents = self._latents(count)
        return lambda: self.backbone.decode(latents)

    def reward(self, count: int) -> Callable:
        args = self.trainer.args
        images = torch.randint(256, (count, 3, args.height, args.width), dtype=torch.uint8, generator=self.stream)
        return lambda: self.trainer.scorer(images, ["a"] * count, {}, trainer_state=self.trainer.state)

    def optimiser(self) -> Callable:
        # On copies: the weights themselves are not to move.
        args = self.trainer.args
        weights = [p.detach().clone().requires_grad_() for p in self.policy.model.parameters() if p.requires_grad]
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=self.stream).to(weight)
        optimiser_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, self.policy.model)
        optimiser = optimiser_class(weights, **settings)

        def run():
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimiser.step()

        return run

    def merge(self, view: str | None) -> Callable:
        def run():
            with self.policy.using(view, merged=True):
                pass

        return run

    def _inputs(self, rows: int) -> dict[str, Any]:
        conditioning = self.backbone.encode(["ab"])
        latents = self._latents(rows)
        return {
            "hidden_states": latents.to(conditioning["encoder_hidden_states"].dtype),
            "timestep": torch.full((rows,), 666.0, device=latents.device),
            **{name: row.repeat(rows, *[1] * (row.ndim - 1)) for name, row in conditioning.items()},
            "return_dict": False,
        }

    def _latents(self, count: int) -> torch.Tensor:
        args = self.trainer.args
        shape = (count, *self.backbone.latent_shape(args.height, args.width))
        return torch.randn(shape, generator=self.stream).to(args.device)


class _Flops:
    """
    Floating point operations, counted on networks without weights.

    So neither compiled blocks nor quantised layers, which the counter does not see into, matter: the work is the same.
    """

    def __init__(self, trainer: DGPOTrainer):
        self.work, config = _Work(trainer), trainer.policy.peft_config
        with torch.device("meta"):
            self.bare = SD3Transformer2DModel.from_config(dict(trainer.policy.transformer.config))
            self.adapted = SD3Transformer2DModel.from_config(dict(trainer.policy.transformer.config))
            self.vae = AutoencoderKL.from_config(dict(trainer.backbone.vae.config))
            settings = LoraConfig(r=config.r, target_modules=config.target_modules)
            self.adapted = get_peft_model(self.adapted.requires_grad_(False), settings)
        self.bare.requires_grad_(False)

    def forward(self, rows: int, has_adapter: bool) -> int:
        inputs = _on_meta(self.work._inputs(rows))
        with torch.no_grad():
            return _count(lambda: (self.adapted if has_adapter else self.bare)(**inputs))

    def update(self, rows: int) -> int:
        inputs = _on_meta(self.work._inputs(rows))
        return _count(lambda: self.adapted(**inputs)[0].sum().backward())

    def decode(self, count: int) -> int:
        latents = self.work._latents(count).to("meta")
        with torch.no_grad():
            return _count(lambda: self.vae.decode(latents))


def _count(run: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to("meta", torch.float32) if torch.is_tensor(value) else value for name, value in inputs.items()
    }


def time_parts(trainer: DGPOTrainer, parts: list[Part], least: int = 3, enough: float = 0.3) -> dict[str, float]:
    """Mean seconds of each part: at least so many runs, and more until they take `enough` seconds."""
    model = trainer.policy.model
    was_training, result = model.training, {}
    for part in parts:
        model.train(part.phase == "update")
        with part.within():
            part.run()
            start, runs = now(), 0
            while runs < least or now() - start < enough:
                part.run()
                runs += 1
            result[part.name] = (now() - start) / runs
    model.zero_grad()
    model.train(was_training)
    return result


class PhaseMemory:
    """
    Peak memory of each phase of a trainer's rounds: allocated on the GPU, or resident in this process.

    Args:
        trainer ([`DGPOTrainer`]):
            The trainer, whose stopwatch tells when a phase ends.
    """

    def __init__(self, trainer: DGPOTrainer):
        self.peaks: dict[str, float] = defaultdict(float)
        watch = trainer._stopwatch
        start = watch.start

        def start_and_look(phase: str | None) -> None:
            if watch._phase is not None:
                self.peaks[watch._phase] = max(self.peaks[watch._phase], _peak_memory())
            start(phase)
            _reset_peak_memory()

        watch.start = start_and_look


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * float(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process, so far


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


# -- what is printed --------------------------------------------------------------------------------------------------


def floors(result: dict[str, Any], count: str = "count") -> list[float]:
    """The floor at each round's time: the mean of the parts' measurements before and after it."""
    parts = [part for part in result["parts"] if part["phase"] != "merging"]
    sums = [sum(part[count] * part["seconds"][i] for part in parts) for i in range(len(result["round"]) + 1)]
    return [(before + after) / 2 for before, after in pairwise(sums)]


def savings(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What this trainer does not do of a round at the authors' settings: counted and measured shares of that round."""
    flops = sum(part["authors_count"] * part["flops"] for part in result["parts"])
    seconds = median(floors(result, "authors_count"))
    shares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in result["parts"]:
        fewer = part["authors_count"] - part["count"]
        shares[part["saving"]][0] += fewer * part["flops"] / flops
        shares[part["saving"]][1] += fewer * median(part["seconds"]) / seconds
    return {saving: (counted, measured) for saving, (counted, measured) in shares.items() if saving}


def report(result: dict[str, Any], peak: float | None) -> None:
    print(json.dumps(result["machine"]))
    print(json.dumps({name: value for name, value in result["arguments"].items() if value not in (None, False)}))
    floor, rounds = floors(result), result["round"]
    print(f"\n{'part':<34} {'count':>6} {'authors':>8} {'ms each':>10} {'total s':>9} {'share':>7}")
    for part in result["parts"]:
        each = median(part["seconds"])
        total = part["count"] * each
        print(
            f"{part['name']:<34} {part['count']:>6} {part['authors_count']:>8} {1000 * each:>10.2f} {total:>9.3f} "
            f"{'-' if part['phase'] == 'merging' else format(total / median(floor), '.1%'):>7}"
        )
    print(f"{'floor':<34} {'':>26} {median(floor):>9.3f}")
    print(f"{'round':<34} {'':>26} {median(rounds):>9.3f}")
    print(f"round / floor: {spread(r / f for r, f in zip(rounds, floor, strict=True))}")

    print(f"\n{'phase':<12} {'s':>9} {'floor s':>9} {'peak GiB':>9}")
    for phase in PHASES:
        alone = sum(part["count"] * median(part["seconds"]) for part in result["parts"] if part["phase"] == phase)
        memory = result["memory"].get(phase, float("nan"))
        print(f"{phase:<12} {median(result['phases'][phase]):>9.3f} {alone:>9.3f} {memory:>9.2f}")
    print(f"\nimages per second: {result['images'] / median(rounds):.2f}")
    for phase in ("rollout", "update"):
        flops = sum(part["count"] * part["flops"] for part in result["parts"] if part["phase"] == phase)
        rate = flops / median(result["phases"][phase]) / 1e12
        share = "" if peak is None else f", {rate / peak:.1%} of {peak:g}"
        print(f"{phase}: {flops / 1e12:.3g} TFLOP, {rate:.3g} TFLOP/s{share}")

    authors = floors(result, "authors_count")
    print(f"\nfloor at the authors' settings: {median(authors):.3f} s")
    print(f"of which is saved: {'counted':>36} {'measured':>9}")
    rows = savings(result)
    for title, (counted, measured) in rows.items():
        print(f"  {title:<44} {counted:>7.2%} {measured:>9.2%}")
    counted, measured = (sum(column) for column in zip(*rows.values(), strict=True))
    print(f"  {'in all':<44} {counted:>7.2%} {measured:>9.2%}   measured / counted: {measured / counted:.2f}")


def peak_tflops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for device, peak in PEAK_TFLOPS.items() if device in name), None)


if __name__ == "__main__":
    main()
