"""
Runs that are compared: one method, one start, one seed, a budget of CPU seconds.

All have the same model, prompts, reward, evaluation and, unless they say so, LoRA. The learning rate is constant in
all of them: a schedule over a number of steps that a budget of seconds does not know would favour somebody.

The clock is the process's CPU time, of all its threads, OCR included; setting up and evaluating stand still on it. A
run is a process of its own with one thread of torch and one of OCR, and its result is a file, named by what was run:
an interrupted comparison goes on where it stopped, and a result is taken again only if its file is deleted.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import diffusers
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from out_of_distribution import measure, pictures
from peft import LoraConfig, PeftModel
from step_cost import _peak_memory, _reset_peak_memory
from transformers import PrinterCallback, TrainerCallback

import trl_dgpo
from trl_dgpo.cli import TRAINERS
from trl_dgpo.policy import lora_config
from trl_dgpo.prompts.text import tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward
from trl_dgpo.rewards.ocr import text_accuracy
from trl_dgpo.tiny import BUNDLED, tiny_pipeline_path


# What all runs have in common; a run's own settings come on top.
COMMON = {
    "sigmas": "dpm",  # one grid and one ODE solver for every evaluation: they decide the start's accuracy
    "resolution": 32,
    "width": 64,
    "max_sequence_length": 1,
    "prompts_per_round": 6,
    "num_generations": 12,
    "sample_batch_size": 72,
    "sample_guidance_scale": 1.0,
    "kl_coef": 0.0,
    "clip_range": None,
    "lr_scheduler_type": "constant",
    "ema_every": 1,
    "eval_num_steps": 10,
    "eval_guidance_scale": 1.0,
    "per_device_eval_batch_size": 96,
}
_UNATTENDED = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "offload_text_encoders": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "num_log_images": 0,
    "divergence_rounds": 0,  # forwards are counted
    "max_steps": 1_000_000,  # the budget ends it
}
NUM_EVAL_PROMPTS = 96


def key_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Start:
    """
    A transformer to start from other than the bundled one; `starts.py` trains it.

    Args:
        name (`str`):
            What it is called.
        steps (`int`):
            Optimiser steps of its training.
        goes_on (`bool`):
            Whether from the bundled weights, else from new ones.
        signs (`int`):
            Pictures that it is trained on.
    """

    name: str
    steps: int
    goes_on: bool
    signs: int

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def folder(self, output: Path) -> Path:
        return output / "starts" / f"{self.name}-{key_of(self.settings)}"


@dataclass(frozen=True)
class Saved:
    """
    Pictures that are trained on in place of own rollouts; `starts.py` makes them.

    Args:
        name (`str`):
            What they are called.
        number (`int`):
            Rounds of a model's groups, or true pictures.
        start (`str` or `Start`, *optional*):
            The model that drew the groups; true pictures, each with its caption, without one.
        config (`dict`, *optional*):
            How they were drawn, on top of `COMMON`.
    """

    name: str
    number: int
    start: "str | Start | None" = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def folder(self, output: Path) -> Path:
        return output / "groups" / f"{self.name}-{key_of(self.settings)}"


@dataclass(frozen=True)
class Run:
    """
    What is run. Everything but `name` is part of its `key`.

    Args:
        name (`str`):
            What it is called in a table.
        trainer (`str`):
            One of `trl_dgpo.cli.TRAINERS`.
        budget (`float`):
            CPU seconds.
        every (`float`):
            CPU seconds between two evaluations.
        config (`dict`):
            Fields of the trainer's configuration on top of `COMMON`.
        seed (`int`, *optional*, defaults to `0`):
            Of the run: prompts, latents, levels, the LoRA's start.
        lora (`tuple[int, int]`, *optional*, defaults to `(16, 32)`):
            Rank and alpha.
        start (`str`, [`Start`] or `Run`, *optional*, defaults to `"tiny"`):
            The bundled model, another one, or what a run ended with.
        saved ([`Saved`], *optional*):
            What is trained on in place of own rollouts.
        exact (`bool`, *optional*, defaults to `False`):
            The reward is 1 where the whole text is right and else 0.
        evaluated_on (`str`, *optional*, defaults to `"report"`):
            Held-out prompts, of [`eval_prompts`].
        ends (`bool`, *optional*, defaults to `False`):
            Whether the end is measured out of distribution too.
        keep (`bool`, *optional*, defaults to `False`):
            Whether the weights are kept, for a run that starts from them.
    """

    name: str
    trainer: str
    budget: float
    every: float
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    lora: tuple[int, int] = (16, 32)
    start: "str | Start | Run" = BUNDLED
    saved: Saved | None = None
    exact: bool = False
    evaluated_on: str = "report"
    ends: bool = False
    keep: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        made = {
            name: value if value is None or isinstance(value, str) else value.settings
            for name, value in (("start", self.start), ("saved", self.saved))
        }
        return {**settings, **made, "lora": list(self.lora), "config": {**COMMON, **self.config}}

    @property
    def key(self) -> str:
        return key_of({**self.settings, "eval_prompts": NUM_EVAL_PROMPTS})

    def file(self, output: Path) -> Path:
        return output / "runs" / f"{self.key}.json"

    def result(self, output: Path) -> dict[str, Any] | None:
        """What came of it, if it was run."""
        file = self.file(output)
        return json.loads(file.read_text()) if file.exists() else None


# -- one run ----------------------------------------------------------------------------------------------------------


def take(run: Run, output: Path) -> dict[str, Any]:
    """Run it, in this process, and write its file."""
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, output, folder)
        clock = Clock(trainer, run.budget, run.every, eval_prompts(run.evaluated_on))
        trainer.add_callback(clock)
        trainer.train()
        result = {
            "name": run.name,
            "settings": run.settings,
            "commit": commit(),
            "marks": clock.marks,
            "ocr_of_prompts": clock.ocr_of_prompts,
            "steps_per_round": trainer.args.steps_per_round,
            "round_bytes": clock.round_bytes,
            "peak_bytes": clock.peak_bytes,
        }
        if run.keep:
            trainer.policy.save_pretrained(output / "weights" / run.key, "ema")
        write_json(run.file(output), result)  # what follows can fail without losing the run
        if run.ends:
            texts = [row["text"] for row in eval_prompts(run.evaluated_on)]
            base = output / "bases" / f"{key_of({'start': run.settings['start']})}.json"
            if not base.exists():
                write_json(base, measure(trainer, "base", texts))
            result |= {"base": json.loads(base.read_text()), "end": measure(trainer, "ema", texts)}
            write_json(run.file(output), result)
    return result


def be_quiet() -> None:
    """One thread, and no news of models that are loaded."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_trainer(run: Run, output: Path, folder: str) -> Any:
    """The trainer of a run, which writes to `folder` and finds other models in `output`."""
    trainer_class, args = getattr(trl_dgpo, f"{TRAINERS[run.trainer]}Trainer"), configuration(run, folder)
    if run.saved is None:
        data = datasets.Dataset.from_list(tiny_ocr_prompts("train"))
        rewards = OCRReward(recognition_only=True, exact_match=run.exact, num_workers=1)
    else:
        data, rewards = datasets.load_from_disk(run.saved.folder(output)), None
    rank, alpha = run.lora
    pipeline = pipeline_of(run.start, output)
    lora: LoraConfig = lora_config(())
    lora.r, lora.lora_alpha, lora.target_modules = rank, alpha, None  # the family's own
    trainer = trainer_class(model=pipeline, reward_funcs=rewards, args=args, train_dataset=data, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    return trainer


def configuration(run: Run, folder: str) -> Any:
    config = {**_UNATTENDED, **COMMON, **run.config}
    return configuration_class(run)(output_dir=folder, seed=run.seed, **config)


def configuration_class(run: Run) -> type:
    return getattr(trl_dgpo, f"{TRAINERS[run.trainer]}Config")


def pipeline_of(start: str | Start | Run, output: Path) -> StableDiffusion3Pipeline | str:
    """A start's, or the one that a run has made, its LoRA merged."""
    if start == BUNDLED:
        return BUNDLED
    if isinstance(start, Start):
        transformer = SD3Transformer2DModel.from_pretrained(start.folder(output))
        return StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path(), transformer=transformer)
    pipeline = pipeline_of(start.start, output)
    if pipeline == BUNDLED:
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    adapted = PeftModel.from_pretrained(pipeline.transformer, output / "weights" / start.key)
    pipeline.transformer = adapted.merge_and_unload()
    return pipeline


class Clock(TrainerCallback):
    """
    Stops a run when its budget is spent, and evaluates at marks on the way.

    Args:
        trainer ([`DGPOTrainer`]):
            The trainer.
        budget (`float`):
            CPU seconds of training.
        every (`float`):
            CPU seconds between two evaluations, each at the first optimiser step's end after its mark.
        prompts (`list[dict]`):
            Held-out prompts of the evaluations.

    Attributes:
        marks (`list[dict]`):
            Of each evaluation what was spent until then: `cpu_s`, `wall_s`, `images` sampled, `steps` of the
            optimiser, `forwards` (rows that the transformer was called with: 1 each without gradient and 2 with one,
            for its backward, counted as they happen), and `ocr` and `exact` of the held-out prompts.
        ocr_of_prompts (`list[float]`):
            OCR accuracy of each held-out prompt at the last mark.
        round_bytes (`int`):
            Memory of a round's record.
        peak_bytes (`float`):
            The process's largest memory between evaluations.
    """

    def __init__(self, trainer: Any, budget: float, every: float, prompts: list[dict[str, str]]):
        self.trainer, self.budget, self.every, self.prompts = trainer, budget, every, prompts
        self.marks: list[dict[str, float]] = []
        self.ocr_of_prompts: list[float] = []
        self.round_bytes, self.peak_bytes = 0, 0.0
        self._images = self._forwards = 0
        self._counts = True
        # The last layer, for PEFT goes by the transformer's own hooks.
        trainer.backbone.denoiser.proj_out.register_forward_pre_hook(self._count)

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate(state.global_step, 0.0, 0.0)
        self._next = self.every
        self._start = self._now()

    def on_rollout(self, args, state, control, scored, **kwargs):
        if self.trainer.saved is None:
            self._images += len(scored.images)

    def on_step_end(self, args, state, control, **kwargs):
        cpu, wall = (now - start for now, start in zip(self._now(), self._start, strict=True))
        is_over = cpu >= self.budget
        if cpu >= self._next or is_over:
            before = self._now()
            self.peak_bytes = max(self.peak_bytes, _peak_memory())
            self._evaluate(state.global_step, cpu, wall)
            self._next = (cpu // self.every + 1) * self.every
            after = self._now()
            self._start = tuple(s + a - b for s, a, b in zip(self._start, after, before, strict=True))
        if is_over:
            control.should_training_stop = True

    def _evaluate(self, step: int, cpu: float, wall: float) -> None:
        if self.trainer.buffer.round is not None:
            self.round_bytes = max(self.round_bytes, _num_bytes(self.trainer.buffer.record))
        self._counts = False
        scores = score(self.trainer, self.prompts)
        self._counts = True
        _reset_peak_memory()
        self.ocr_of_prompts = scores["ocr"]
        self.marks.append(
            {
                "cpu_s": round(cpu, 3),
                "wall_s": round(wall, 3),
                "images": self._images,
                "steps": step,
                "forwards": self._forwards,
                **{name: sum(values) / len(values) for name, values in scores.items()},
            }
        )

    def _count(self, module: torch.nn.Module, inputs: tuple) -> None:
        if self._counts:
            self._forwards += len(inputs[0]) * (2 if torch.is_grad_enabled() else 1)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


def eval_prompts(name: str) -> list[dict[str, str]]:
    """Held-out prompts: those of the figures (`"report"`), or others, by which settings are searched (`"search"`)."""
    report = tiny_ocr_prompts("test", NUM_EVAL_PROMPTS)
    if name == "report":
        return report
    texts = {row["text"] for row in report}
    others = [row for row in tiny_ocr_prompts("test", 4 * NUM_EVAL_PROMPTS, seed=1) if row["text"] not in texts]
    return others[:NUM_EVAL_PROMPTS]


def score(trainer: Any, prompts: list[dict[str, str]]) -> dict[str, list[float]]:
    """OCR accuracy of each prompt, and whether it is exact: `ema` weights, fixed noise."""
    images = pictures(trainer.generate([row["prompt"] for row in prompts]))
    return accuracy(reader().read(images), [row["text"] for row in prompts])


def accuracy(read: list[str], texts: list[str]) -> dict[str, list[float]]:
    pairs = list(zip(read, texts, strict=True))
    return {
        "ocr": [text_accuracy(found, text) for found, text in pairs],
        "exact": [float("".join(found.split()).casefold() == text.casefold()) for found, text in pairs],
    }


@cache
def reader() -> OCRReward:
    return OCRReward(recognition_only=True, num_workers=1)


def _num_bytes(record: Any) -> int:
    total = 0
    for value in (getattr(record, f.name) for f in dataclasses.fields(record)):
        tensors = value.values() if isinstance(value, dict) else [value]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return total


# -- many runs --------------------------------------------------------------------------------------------------------


def take_all(runs: Iterable[Run], output: Path, workers: int) -> list[str]:
    """
    Take those that have no result yet, each in a process of its own, `workers` at once; a line for each.

    Returns:
        `list[str]`: what failed, a line each. It has no file, so that the next call takes it again.
    """
    todo = list({run.key: run for run in runs if not run.file(output).exists()}.values())
    failures: list[str] = []
    start, cost = time.perf_counter(), sum(run.budget for run in todo)
    if todo:
        print(f"{len(todo)} runs, about {expected_seconds(todo, workers) / 60:.0f} minutes", flush=True)
    spent = 0.0
    for run, result in in_processes(partial(take, output=output), todo, workers):
        spent += run.budget
        ahead = (time.perf_counter() - start) * (cost / spent - 1) / 60
        if isinstance(result, str):
            failures.append(f"{run.name}, seed {run.seed}: {result.strip().splitlines()[-1]}")
            print(f"FAILED {run.name}, seed {run.seed}\n{result}", flush=True)
            continue
        curve = " ".join(f"{mark['ocr']:.3f}" for mark in result["marks"])
        last = result["marks"][-1]
        spent_on = f"{last['cpu_s']:6.1f} s {last['steps']:5d} steps {last['images']:6d} images"
        print(f"{run.name:<44} seed {run.seed} {spent_on}  {curve}  ({ahead:.0f} min left)", flush=True)
    return failures


def in_processes(function: Any, items: list, workers: int) -> Iterable[tuple[Any, Any]]:
    """Each item with what `function` returns of it, or the text of what it raised, as they end."""
    # The server does not look where this script lies before Python 3.13.
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    if here not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, path]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])  # a process is then up at once
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(_told, function, item): item for item in items}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _told(function: Any, item: Any) -> Any:
    """An exception's text in its place: not every exception can be sent to another process."""
    try:
        return function(item)
    except Exception:
        return traceback.format_exc()


def expected_seconds(runs: list[Run], workers: int) -> float:
    """Seconds that runs will take: of each its budget, about 3 s an evaluation, 6 s to begin and 9 s at the end."""
    each = [run.budget + 3 * (1 + run.budget / run.every) + 6 + 9 * run.ends for run in runs]
    return max(sum(each) / workers, max(each, default=0.0))


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What a table of figures has to name."""
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "onnxruntime", "rapidocr")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": 1,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def write_between(page: Path, begin: str, end: str, written: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{written}{end}{rest.partition(end)[2]}")


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(f".{os.getpid()}.partial")  # two processes may write the same
    partial_file.write_text(json.dumps(value, indent=1) + "\n")
    partial_file.replace(file)
