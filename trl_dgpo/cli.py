"""
The command line: `trl-dgpo train|evaluate|sample|collect|plan|report|serve-reward`, or `python -m trl_dgpo`.

`train`, `evaluate`, `sample`, `collect` and `plan` take the same recipe, a YAML file of flags, and the same flags over
it: those of this file, every field of the method's configuration, and those of [`~trl.ModelConfig`]. So what a run was
trained with is what it is evaluated and drawn with, and what a plan is made for.

What a user can get wrong ends as one line and exit code 2, before anything is trained; `TRL_DGPO_DEBUG=1` shows the
traceback. From the first step on errors keep theirs.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prompts import PROMPT_SETS
from .prompts.files import FORMATS, read_prompts
from .rewards import REWARD_FORMS, get_reward


if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
    from trl import ModelConfig, TrlParser

    from .trainer.dgpo_config import DGPOConfig
    from .trainer.dgpo_trainer import DGPOTrainer

# Files `trainer/<name>_trainer.py` and `trainer/<name>_config.py`, and the beginning of the classes in them.
TRAINERS = {
    "dgpo": "DGPO",
    "gpo": "GPO",
    "flow_grpo": "FlowGRPO",
    "diffusion_dpo": "DiffusionDPO",
    "diffusion_sft": "DiffusionSFT",
    "tdm_r1": "TDMR1",
}
_NOT_OF_A_SUITE = {
    *("dataset_name", "dataset_config", "dataset_test_split", "eval_dataset_name"),
    *("reward_funcs", "eval_reward_funcs", "reward_weights", "eval_num_images"),
}


@dataclass
class DGPOScriptArguments:
    r"""
    What a recipe names besides the trainer's configuration and the model.

    Args:
        trainer (`str`, *optional*, defaults to `"dgpo"`):
            The method, a name of `TRAINERS`; decides which configuration's flags there are.
        dataset_name (`str`):
            Prompts: a set of [`trl_dgpo.prompts`] (such as `"ocr"`, `"tiny-ocr"` or `"geneval"`), a `.txt` file of one
            prompt a line, a `.jsonl`, `.json`, `.csv` or `.parquet` file with a column `prompt`, or a data set's id on
            the Hub.
        rollouts_name (`str`, *optional*):
            Saved rollouts, pairs or pictures to train on in place of prompts: a folder or an id on the Hub, see
            [`~trl_dgpo.rollout_dataset.load_rollouts`]. `dataset_name` is then of use for its held-out prompts alone.
        dataset_config (`str`, *optional*):
            Configuration of a data set on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split that is trained on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split that is held out.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Read a data set on the Hub as a stream.
        eval_dataset_name (`str`, *optional*):
            Held-out prompts from elsewhere, in the forms of `dataset_name`.
        num_prompts (`int`, *optional*):
            Training prompts: all, or of a made set as many as it gives by itself, if not set.
        num_eval_prompts (`int`, *optional*):
            Held-out prompts: all, or of a made set as many as it gives by itself, if not set.
        reward_funcs (`list[str]`):
            Rewards, each a name of `trl_dgpo.rewards.BUILT_IN`, a function in a module (`package.module:function`) or
            in a file (`path/to/rewards.py:function`), or the address of a served reward (`http://...`). Built-in ones
            are on the scale of the reference's training, where there is one.
        eval_reward_funcs (`list[str]`, *optional*):
            What evaluation measures, if not the same; built-in ones on the scale that papers print.
    """

    trainer: str = field(default="dgpo", metadata={"help": "The method.", "choices": list(TRAINERS)})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"Prompts: a set made here ({', '.join(PROMPT_SETS)}), a .txt file of one prompt a line, a "
            ".jsonl, .json, .csv or .parquet file with a column `prompt`, or a data set's id on the Hub."
        },
    )
    rollouts_name: str | None = field(
        default=None,
        metadata={
            "help": "Saved rollouts (of `trl-dgpo collect`), pairs or pictures to train on in place of prompts: a "
            "folder or an id on the Hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split that is held out."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read a data set on the Hub as a stream."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out prompts from elsewhere, in the forms of --dataset_name."}
    )
    num_prompts: int | None = field(
        default=None,
        metadata={"help": "Training prompts: all, or of a made set as many as it gives by itself, if not set."},
    )
    num_eval_prompts: int | None = field(
        default=None,
        metadata={"help": "Held-out prompts: all, or of a made set as many as it gives by itself, if not set."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Rewards, each {REWARD_FORMS}. Built-in ones are on the scale of the reference's training, where "
            "there is one."
        },
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "What evaluation measures, if not the same; built-in ones on the scale that papers print."},
    )

    def __post_init__(self):
        # A recipe may say `reward_funcs: ocr`.
        for name in ("reward_funcs", "eval_reward_funcs"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])


@dataclass
class EvaluateArguments(DGPOScriptArguments):
    """
    Arguments of `trl-dgpo evaluate`.

    Args:
        suite (`str`, *optional*):
            Evaluate a suite, a name of [`trl_dgpo.evaluation.suites`], with its own prompts and rewards in place of
            the recipe's.
        lora (`list[str]`, *optional*):
            LoRAs on the model, folders or ids on the Hub, to be compared with it in a suite.
        rewards (`list[str]`, *optional*):
            Rewards in place of the suite's, in the forms of `reward_funcs`; built-in ones on the scale that papers
            print.
        num_images (`int`, *optional*):
            Images of each prompt in a suite, if not as many as the suite says. Without a suite, `eval_num_images`.
        output (`str`, *optional*):
            JSON file for the numbers; of a suite the folder, which an interrupted evaluation goes on in
            (`evaluation/<suite>` if not given).
    """

    suite: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate a suite (geneval, ocr, tiny-ocr, counting or ood), with its own prompts and rewards in "
            "place of the recipe's."
        },
    )
    lora: list[str] | None = field(
        default=None,
        metadata={"help": "LoRAs on the model, folders or ids on the Hub, to be compared with it in a suite."},
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards in place of the suite's, in the forms of --reward_funcs; built-in ones on the scale that "
            "papers print."
        },
    )
    num_images: int | None = field(
        default=None,
        metadata={
            "help": "Images of each prompt in a suite, if not as many as the suite says. Without a suite: "
            "--eval_num_images."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the numbers; of a suite the folder, which an interrupted evaluation goes on in "
            "(evaluation/SUITE if not given)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("lora", "rewards"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        idle = [f"`{name}`" for name in ("lora", "rewards", "num_images") if getattr(self, name) is not None]
        if self.suite is None and idle:
            raise ValueError(f"Only a suite makes use of {', '.join(idle)}. Give --suite.")


@dataclass
class SampleArguments(DGPOScriptArguments):
    """
    Arguments of `trl-dgpo sample`. The noise of a picture depends on its prompt and number alone, as in evaluation.

    Args:
        prompts (`list[str]`):
            What to draw.
        num_images (`int`, *optional*, defaults to `1`):
            Pictures of each prompt.
        output (`str`, *optional*, defaults to `"pictures"`):
            Folder for the pictures and their grid.
    """

    prompts: list[str] | None = field(default=None, metadata={"help": "What to draw."})
    num_images: int = field(default=1, metadata={"help": "Pictures of each prompt."})
    output: str = field(default="pictures", metadata={"help": "Folder for the pictures and their grid."})


@dataclass
class CollectArguments(DGPOScriptArguments):
    """
    Arguments of `trl-dgpo collect`.

    Args:
        num_rounds (`int`, *optional*, defaults to `1`):
            Rounds to roll out, each of `prompts_per_round` x `num_generations` pictures.
        output (`str`, *optional*, defaults to `"rollouts"`):
            Folder for them, which must not be there yet.
    """

    num_rounds: int = field(default=1, metadata={"help": "Rounds to roll out."})
    output: str = field(default="rollouts", metadata={"help": "Folder for them, which must not be there yet."})


@dataclass
class PlanArguments(DGPOScriptArguments):
    """
    Arguments of `trl-dgpo plan`.

    Args:
        vram (`float`, *optional*):
            Memory of the GPU in GiB; without it the plan says what is needed, not what fits.
        fp32 (`bool`, *optional*, defaults to `False`):
            Plan for float32, as `--bf16 false` does. The plan is for a GPU, so bfloat16 is planned otherwise, also
            where there is none.
    """

    vram: float | None = field(default=None, metadata={"help": "Memory of the GPU in GiB."})
    fp32: bool = field(default=False, metadata={"help": "Plan for float32; bfloat16 is planned otherwise."})


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`list[str]`, *optional*):
            The command and its flags; the process's own if not given.

    Returns:
        `int`: 0, 2 for a mistake in what was given, 130 for Ctrl-C.
    """
    # Threads that spin while they wait lose most of their time where anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they warn of packages that nothing here needs
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="trl-dgpo",
        description="Reinforcement learning for text-to-image diffusion models.",
        epilog="`trl-dgpo COMMAND --help` lists the flags of a command. TRL_DGPO_DEBUG=1 shows where an error arose.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in _COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_args(argv[:1]).command
    run = _COMMANDS[command][0]
    try:
        return run(argv[1:])
    except UsageError as error:
        print(f"trl-dgpo {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"trl-dgpo {command}: interrupted", file=sys.stderr)
        return 130


def make_parser(
    config_class: type[DGPOConfig] | None = None,
    script_class: type[DGPOScriptArguments] = DGPOScriptArguments,
    command: str = "train",
) -> TrlParser:
    """The parser of a command that takes recipes: flags, `--config recipe.yaml`, and flags over the recipe."""
    from trl import ModelConfig, TrlParser

    from .trainer.dgpo_config import DGPOConfig

    parser = TrlParser(
        (script_class, config_class or DGPOConfig, ModelConfig),
        prog=f"trl-dgpo {command}",
        allow_abbrev=False,
        usage=f"trl-dgpo {command} [--config RECIPE.yaml] [--FLAG VALUE ...]",
        description=f"{_COMMANDS[command][1]} Each flag may also stand in the recipe; a flag given here wins.",
    )
    if command in ("plan", "evaluate"):
        parser.add_argument("--model", dest="model_name_or_path", help="Short for --model_name_or_path.")
    return parser


def parse(
    argv: list[str], script_class: type[DGPOScriptArguments] = DGPOScriptArguments, command: str = "train"
) -> tuple[DGPOScriptArguments, DGPOConfig, ModelConfig]:
    """
    Read a command's flags and its recipe.

    Args:
        argv (`list[str]`):
            Flags, among them `--config RECIPE.yaml`.
        script_class (`type`, *optional*, defaults to [`DGPOScriptArguments`]):
            The command's own arguments.
        command (`str`, *optional*, defaults to `"train"`):
            Its name, for messages.

    Returns:
        Its own arguments, the method's configuration (a [`DGPOConfig`]), and a [`~trl.ModelConfig`].

    Raises:
        `ValueError`: for flags that do not exist, do not fit or cannot act.
    """
    # Which configuration there is depends on a flag of the same command line or recipe.
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config")
    chooser.add_argument("--trainer")
    known, flags = chooser.parse_known_args(argv)
    recipe = _read_recipe(known.config) if known.config else {}
    trainer = known.trainer or recipe.get("trainer", "dgpo")
    if trainer not in TRAINERS:
        raise ValueError(f"`trainer` is {trainer!r}; it must be one of {', '.join(map(repr, TRAINERS))}.")
    parser = make_parser(_trainer_part(trainer, "config"), script_class, command)
    parser.set_defaults(disable_tqdm=False)  # unset, it follows the verbosity
    flags = [*flags, "--trainer", trainer, *(["--config", known.config] if known.config else [])]
    script, args, model, unknown = parser.parse_args_and_config(flags, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"There is no {' '.join(unknown)}: `trl-dgpo {command} --help` lists what there is.")
    names = {word.split("=")[0].replace("-", "_") for word in flags} | {f"__{name}" for name in recipe}
    _check_model(model, switched="__use_peft" in names)
    if model.model_revision != "main":
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "revision": model.model_revision}
    return script, args, model


def train(argv: list[str]) -> int:
    """`trl-dgpo train`: train, save, and tell what came of it."""
    with _users_mistakes():
        script, args, model = parse(argv)
        checkpoint = _checkpoint(args)
        trainer = _build(
            script.trainer,
            args,
            model,
            train_dataset=_training_set(script),
            eval_dataset=None if args.eval_strategy == "no" else _dataset(script, "test"),
            reward_funcs=_training_rewards(script),
            eval_reward_funcs=script.eval_reward_funcs and _rewards(script.eval_reward_funcs),
            peft_config=_peft_config(model),
        )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        trainer.save_model()
        print(f"\nInterrupted after {trainer.state.global_step} steps; what was learned is in {args.output_dir}.")
        return 130
    if args.push_to_hub:  # which saves first
        trained_on = script.rollouts_name or script.dataset_name
        trainer.push_to_hub(dataset_name=trained_on if _is_on_hub(trained_on) else None)
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        if len(evaluations) > 1:
            first, last = evaluations[0], evaluations[-1]
            _print_table({f"step {entry['step']}": entry for entry in (first, last)})
        print(f"Everything is in {args.output_dir}.")
    trainer.end()
    return 0


def evaluate(argv: list[str]) -> int:
    """`trl-dgpo evaluate`: the numbers of training's own evaluation, or of a suite, under the same noise."""
    with _users_mistakes():
        script, args, model = parse(argv, EvaluateArguments, "evaluate")
        # A recipe has them for training; who types them means something.
        idle = {_flag(word) for word in argv} & _NOT_OF_A_SUITE
        if script.suite is not None and idle:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in sorted(idle))} cannot act with --suite, which has prompts and "
                "rewards of its own. Give --rewards, --num_images and --num_eval_prompts."
            )
    if script.suite is not None:
        return _evaluate_suite(script, args, model)
    with tempfile.TemporaryDirectory() as scratch:
        with _users_mistakes():
            dataset = _dataset(script, "test")
            names = script.eval_reward_funcs or script.reward_funcs
            # On the scale, and with the weights, with which training measures them.
            rewards = _rewards(names, normalize=not script.eval_reward_funcs)
            if script.eval_reward_funcs:
                args.reward_weights = None
            output = None if script.output is None else _writable(Path(script.output))
            trainer = _build_still(args, model, scratch, dataset, rewards)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            _print_table({model.model_name_or_path: metrics})
            if output is not None:
                output.write_text(json.dumps(metrics, indent=2) + "\n")
                print(f"The numbers are in {output}.")
        trainer.end()
    return 0


def _evaluate_suite(script: EvaluateArguments, args: DGPOConfig, model: ModelConfig) -> int:
    with _users_mistakes():
        from accelerate import PartialState
        from trl import get_quantization_config

        from .evaluation.comparison import as_text, table
        from .evaluation.models import check_models, image_settings, labelled, model_record, reward_record
        from .evaluation.suites import BASE, SUITES, SuiteEvaluation, suite_rows

        rows = suite_rows(script.suite, script.num_eval_prompts)
        suite = SUITES[script.suite]
        names = list(dict.fromkeys(script.rewards or suite.rewards))
        loras = labelled(script.lora or [], taken=BASE)
        if loras and args.full_finetuning:
            raise ValueError("`full_finetuning` is set, which has no LoRA, and `lora` is given. Leave one out.")
        base, loading = model.model_name_or_path, args.model_init_kwargs or {}
        check_models(base, list(loras.values()), init_kwargs=loading)
        cache = {"cache_dir": loading.get("cache_dir")}
        model.dtype = _dtype(args)
        quantization = get_quantization_config(model)
        folder = Path(script.output or f"evaluation/{script.suite}")
        evaluation = SuiteEvaluation(
            _writable(folder / "suite.json").parent,
            rows,
            {label: partial(_generating, args, model, lora) for label, lora in {BASE: None, **loras}.items()},
            dict(zip(names, _rewards(names), strict=True)),
            num_images=suite.num_images if script.num_images is None else script.num_images,
            mean_of_tags=suite.mean_of_tags,
            settings={"suite": script.suite, **image_settings(args, quantization and quantization.to_dict())},
            sources={
                BASE: model_record(base, is_lora=False, revision=loading.get("revision"), **cache),
                **{label: model_record(lora, is_lora=True, **cache) for label, lora in loras.items()},
            },
            reward_sources={name: reward_record(name) for name in names},
            reward_timeout=args.reward_timeout,
            show_progress=not args.disable_tqdm,
        )
        if args.reward_self_test:
            evaluation.self_test(args.height, args.width)
    results = evaluation.run()
    PartialState().destroy_process_group()
    if results is not None:
        print(f"\n{as_text(table(results))}\n\nIn brackets 95 % intervals. Everything is in {folder}.")
    return 0


def sample(argv: list[str]) -> int:
    """`trl-dgpo sample`: pictures of prompts, as files and as one grid."""
    with tempfile.TemporaryDirectory() as scratch:
        with _users_mistakes():
            script, args, model = parse(argv, SampleArguments, "sample")
            if not script.prompts:
                raise ValueError("There is nothing to draw. Give --prompts and one or more of them in quotes.")
            if script.num_images < 1:
                raise ValueError(f"`num_images` is {script.num_images}; it must be at least 1.")
            folder = _writable(Path(script.output) / "grid.png").parent
            from datasets import Dataset

            dataset = Dataset.from_dict({"prompt": script.prompts})
            trainer = _build_still(args, model, scratch, dataset)
        if trainer.is_world_process_zero():
            _save_pictures(trainer.generate(script.prompts, num_images=script.num_images), script.prompts, folder)
        trainer.end()
    return 0


def collect(argv: list[str]) -> int:
    """`trl-dgpo collect`: rollouts of a model, scored and kept, for training without rollouts of its own."""
    import torch

    with _users_mistakes():
        script, args, model = parse(argv, CollectArguments, "collect")
        if script.num_rounds < 1:
            raise ValueError(f"`num_rounds` is {script.num_rounds}; it must be at least 1.")
        if script.trainer == "diffusion_sft":
            raise ValueError("diffusion_sft rolls nothing out. Give the trainer whose rounds are to be collected.")
        output = Path(script.output)
        if output.exists():
            raise ValueError(f"{script.output!r} is there already. Give another --output, or remove it.")
        _writable(output)
        rewards = _rewards(script.reward_funcs, normalize=True)
    with tempfile.TemporaryDirectory() as scratch:
        with _users_mistakes():
            trainer = _build_still(args, model, scratch, _dataset(script, "train"), rewards, trainer=script.trainer)
        rollouts = trainer.collect_rollouts(script.num_rounds)
        if trainer.is_world_process_zero():
            rollouts.save_to_disk(output)
            mean = torch.tensor(rollouts["reward"][:], dtype=torch.float64).nanmean()  # of those that did not fail
            print(f"{len(rollouts)} rollouts are in {output}; their mean reward is {mean:.4f}.")
        trainer.end()
    return 0


def plan(argv: list[str]) -> int:
    """`trl-dgpo plan`: what a run needs of a GPU, and what fits."""
    with _users_mistakes():
        from .plan import fit, plan_memory, read_model

        script, args, model = parse([*argv, *_as_on_a_gpu(argv)], PlanArguments, "plan")
        if model.load_in_8bit:
            raise ValueError("`load_in_8bit` is set; plans know frozen weights in 4 bits and in full.")
        if script.fp32:
            args.bf16 = args.fp16 = False
        sizes = read_model(model.model_name_or_path, args, peft_config=_peft_config(model))
        needed = plan_memory(sizes, args, quantized=model.load_in_4bit)
        fitted = None if script.vram is None else fit(sizes, args, script.vram, quantized=model.load_in_4bit)
    command = None if fitted is None or not fitted.fits else _train_command(argv, script, fitted.changes)
    planned = needed if fitted is None else fitted.plan
    print(f"{planned.title()}\n\n{planned.formulas()}\n\n{planned.table()}\n")
    if fitted is not None:
        print(f"{fitted.verdict()}\n\n{fitted.ladder()}\n")
        if command is not None:
            print(f"{command}\n")
    print("Reward models on the GPU are not counted.")
    print("Computed from configurations, not measured: no run on a GPU has confirmed the total.")
    return 0


def report(argv: list[str]) -> int:
    """`trl-dgpo report`: one HTML file of a run."""
    parser = argparse.ArgumentParser(prog="trl-dgpo report", description=_COMMANDS["report"][1])
    parser.add_argument("output_dir", type=Path, help="The run's `output_dir`.")
    parser.add_argument("--output", type=Path, help="The file. OUTPUT_DIR/report.html if not given.")
    flags = parser.parse_args(argv)
    with _users_mistakes():
        from .report import write_report

        if not flags.output_dir.is_dir():
            raise ValueError(f"{str(flags.output_dir)!r} is not a folder; give the `output_dir` of a run.")
        path = flags.output or flags.output_dir / "report.html"
        write_report(flags.output_dir, path)
    print(f"The report is {path}.")
    return 0


def serve_reward(argv: list[str]) -> int:
    """`trl-dgpo serve-reward`: a reward as a server, for trainings elsewhere."""
    parser = argparse.ArgumentParser(prog="trl-dgpo serve-reward", description=_COMMANDS["serve-reward"][1])
    parser.add_argument("reward", metavar="NAME", help=f"What is served: {REWARD_FORMS}.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at. %(default)s if not given.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at. %(default)s if not given.")
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="A built-in reward on the scale of the reference's training, where there is one, as `train "
        "--reward_funcs NAME` has it. On the one that papers print if not given.",
    )
    flags = parser.parse_args(argv)
    with _users_mistakes():
        from .rewards.remote import serve

        logging.basicConfig(format="%(message)s")
        logging.getLogger("trl_dgpo").setLevel(logging.INFO)  # where it is served, and that it is
        serve(get_reward(flags.reward, normalize=flags.normalize), host=flags.host, port=flags.port)
    return 0


class UsageError(Exception):
    """What the user gave cannot be done; the message is all there is to say."""


@contextmanager
def _users_mistakes() -> Iterator[None]:
    """While things are read, checked and built, errors are about what was given: one line is enough."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("TRL_DGPO_DEBUG"):
            raise
        raise UsageError(str(error)) from error


def _read_recipe(path: str) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path!r} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path!r} must hold flags, one `name: value` a line.")
    return recipe


def _check_model(model: ModelConfig, switched: bool) -> None:
    """
    TRL's flags for language models, which nothing here could act on, and LoRA's where nobody has said a word about
    `use_peft` (`switched`); `--use_peft false` turns a recipe's off.
    """
    if model.model_name_or_path is None:
        raise ValueError(
            "There is no model. Give --model_name_or_path: 'tiny', an id on the Hub, a folder of a pipeline, or a "
            "LoRA's folder or id, from which training goes on."
        )
    changed = {f.name for f in fields(model) if getattr(model, f.name) != f.default}
    reasons = {
        "dtype": "frozen weights are kept in the dtype they are used in: set `bf16`, `fp16` or neither",
        "attn_implementation": "diffusers chooses the attention",
        "lora_task_type": "a diffusion model has no such task",
        "lora_target_parameters": "a LoRA in diffusers' format holds layers alone: set `lora_target_modules`",
        "lora_modules_to_save": "a LoRA in diffusers' format holds nothing else",
    }
    for name, reason in reasons.items():
        if name in changed:
            raise ValueError(f"`{name}` is {getattr(model, name)!r}, which cannot act here: {reason}.")
    idle = sorted(name for name in changed if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    if idle and not model.use_peft and not switched:
        raise ValueError(
            f"{idle} are set without `use_peft`. Set it too; without it the LoRA is the trainer's own, of rank 64 and "
            "alpha 128."
        )


def _training_set(script: DGPOScriptArguments) -> Any:
    if script.rollouts_name is None:
        return _dataset(script, "train")
    if script.num_prompts is not None or script.dataset_streaming:
        raise ValueError(
            "`num_prompts` and `dataset_streaming` are of prompts, and --rollouts_name is trained on whole."
        )
    from .rollout_dataset import load_rollouts

    return load_rollouts(script.rollouts_name, split=script.dataset_train_split)


def _training_rewards(script: DGPOScriptArguments) -> Any:
    # Saved rollouts have their rewards with them; where some are named, they are scored anew.
    if script.rollouts_name is not None and script.reward_funcs is None:
        return None
    if script.trainer == "diffusion_sft":
        raise ValueError(
            "diffusion_sft learns from pictures, not from prompts and a reward: give --rollouts_name a set of "
            "pictures with captions or of rollouts, and leave out --reward_funcs."
        )
    return _rewards(script.reward_funcs, normalize=True)


def _peft_config(model: ModelConfig) -> LoraConfig | None:
    from trl import get_peft_config

    if model.use_peft and (Path(model.model_name_or_path) / "adapter_config.json").is_file():
        raise ValueError(
            f"{model.model_name_or_path!r} is a LoRA, from which training goes on as it is, and `use_peft` asks for a "
            "new one. Give --use_peft false."
        )
    peft_config = get_peft_config(model)
    if peft_config is not None:
        peft_config.init_lora_weights = "gaussian"  # as the trainer's own
        peft_config.task_type = None
    return peft_config


def _build(trainer: str, args: DGPOConfig, model: ModelConfig, pipeline: Any = None, **kwargs) -> DGPOTrainer:
    from trl import get_quantization_config

    # TRL takes the quantised layers' arithmetic from `dtype`, which says nothing here.
    model.dtype = _dtype(args)
    return _trainer_part(trainer, "trainer")(
        model=pipeline or model.model_name_or_path,
        args=args,
        quantization_config=get_quantization_config(model),
        **kwargs,
    )


def _trainer_part(trainer: str, part: str) -> type:
    """A method's trainer or configuration: `part` is `"trainer"` or `"config"`."""
    return getattr(import_module(f".trainer.{trainer}_{part}", __package__), TRAINERS[trainer] + part.capitalize())


def _build_still(
    args: DGPOConfig,
    model: ModelConfig,
    scratch: str,
    dataset: Any,
    rewards: Any = None,
    pipeline: Any = None,
    trainer: str = "dgpo",
) -> DGPOTrainer:
    """
    A trainer that trains nothing: it loads the weights as training would and leaves the run's folder alone.

    Pictures are the same with any method's trainer, and DGPO's asks for no other data than prompts.
    """
    args.output_dir, args.push_to_hub, args.report_to, args.num_log_images = scratch, False, [], 0
    if rewards is None:
        rewards, args.reward_weights = _no_reward, None
    return _build(trainer, args, model, pipeline, train_dataset=dataset, eval_dataset=dataset, reward_funcs=rewards)


@contextmanager
def _generating(args: DGPOConfig, model: ModelConfig, lora: str | None) -> Iterator[Callable[..., Tensor]]:
    """What draws pictures with a model, or with a LoRA on it."""
    import torch
    from datasets import Dataset
    from trl import get_quantization_config

    args, model = copy.copy(args), copy.copy(model)
    with tempfile.TemporaryDirectory() as scratch:
        with _users_mistakes():
            pipeline = None
            if lora is not None:
                from .evaluation.models import load_with_lora

                model.dtype = _dtype(args)
                init_kwargs = dict(args.model_init_kwargs or {})
                pipeline = load_with_lora(
                    model.model_name_or_path,
                    lora,
                    revision=init_kwargs.pop("revision", None),
                    init_kwargs=init_kwargs,
                    dtype=getattr(torch, model.dtype),
                    quantization_config=get_quantization_config(model),
                )
                # They have acted.
                args.model_init_kwargs, model.load_in_4bit, model.load_in_8bit = None, False, False
            prompts = Dataset.from_dict({"prompt": [""]})
            trainer = _build_still(args, model, scratch, prompts, pipeline=pipeline)
        yield trainer.generate  # not ended: that would part the processes, before the next model


def _dtype(args: DGPOConfig) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _flag(word: str) -> str | None:
    """The name in `--name` or `--name=value`."""
    return word[2:].split("=")[0].replace("-", "_") if word.startswith("--") else None


def _as_on_a_gpu(flags: list[str]) -> list[str]:
    """Flags with which a configuration is read on any machine as it would be on one with a GPU."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config")
    recipe = chooser.parse_known_args(flags)[0].config
    given = {_flag(word) for word in flags} | set(_read_recipe(recipe) if recipe else ())
    return ["--use_cpu", "true", *([] if given & {"bf16", "fp16"} else ["--bf16", "true"])]


def _train_command(flags: list[str], script: PlanArguments, changes: dict[str, Any]) -> str:
    """The command that trains what was planned."""
    from .plan import words

    if script.fp32:
        changes = {"bf16": False, **changes}
    parts: list[str] = []
    for word in flags:
        if _flag(word) == "model":
            parts.append(word.replace("--model", "--model_name_or_path", 1))
        elif _flag(word) is not None:
            parts.append(word)
        else:
            parts[-1] += f" {shlex.quote(word)}"
    parts = [part for part in parts if _flag(part.split()[0]) not in {"vram", "fp32", *changes}]
    parts += [words({name: value}) for name, value in changes.items()]
    missing = ("rollouts_name",) if script.trainer == "diffusion_sft" else ("dataset_name", "reward_funcs")
    if script.rollouts_name is None:
        parts += [f"--{name} ..." for name in missing if getattr(script, name) is None]
    lines = ["trl-dgpo train"]
    for part in parts:
        if len(lines[-1]) + len(part) < 96:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def _dataset(script: DGPOScriptArguments, split: str) -> Any:
    """Prompts of the split "train" or "test", in the forms that `dataset_name` takes."""
    from datasets import Dataset, load_dataset

    held_out = split == "test"
    if script.dataset_name is None and not (held_out and script.eval_dataset_name):
        raise ValueError(
            f"There are no prompts. Give --dataset_name: a set made here ({', '.join(PROMPT_SETS)}), a file "
            f"({', '.join(FORMATS)}), or a data set's id on the Hub."
        )
    elsewhere = held_out and script.eval_dataset_name is not None
    name = script.eval_dataset_name if elsewhere else script.dataset_name
    number = script.num_eval_prompts if held_out else script.num_prompts
    if name in PROMPT_SETS:
        return Dataset.from_list(PROMPT_SETS[name](split, number))
    if Path(name).suffix in FORMATS:
        if held_out and not elsewhere:
            raise ValueError(
                f"{name!r} has no held-out prompts. Give --eval_dataset_name another file, or train with "
                "--eval_strategy no."
            )
        dataset = read_prompts(Path(name))
    else:
        which = script.dataset_test_split if held_out else script.dataset_train_split
        dataset = load_dataset(name, script.dataset_config, split=which, streaming=script.dataset_streaming)
    if number is None:
        return dataset
    return dataset.take(number) if script.dataset_streaming else dataset.select(range(min(number, len(dataset))))


def _is_on_hub(name: str) -> bool:
    return name not in PROMPT_SETS and Path(name).suffix not in FORMATS and not Path(name).exists()


def _rewards(names: list[str] | None, normalize: bool = False) -> list[Callable]:
    if not names:
        raise ValueError(f"There is no reward. Give --reward_funcs {REWARD_FORMS}.")
    return [get_reward(name, normalize=normalize) for name in names]


def _save_pictures(images: Tensor, prompts: list[str], folder: Path) -> None:
    from PIL import Image

    from .evaluation import image_grid

    copies = len(images) // len(prompts)
    for number, image in enumerate(images):
        prompt, copy = divmod(number, copies)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{prompt:03d}-{copy}.png")
    image_grid({str(copy): images[copy::copies] for copy in range(copies)}, prompts).save(folder / "grid.png")
    print(f"{len(images)} pictures and grid.png are in {folder}.")


def _no_reward(prompts: list[str], **kwargs) -> list[None]:
    return [None] * len(prompts)


def _checkpoint(args: DGPOConfig) -> str | bool | None:
    """`--resume_from_checkpoint true`, `false` or a folder."""
    given = args.resume_from_checkpoint
    if given is None:
        return None
    if str(given).lower() == "false":
        return False  # not None, for which the trainer would look into its configuration
    if str(given).lower() == "true":
        if not any(Path(args.output_dir).glob("*checkpoint-*")):
            raise ValueError(f"There is no checkpoint in {args.output_dir!r} to resume from.")
        return True
    if not Path(given).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {given!r}, which is no folder. Give a checkpoint's folder, or true for the "
            "last one in `output_dir`."
        )
    return given


def _writable(path: Path) -> Path:
    """The path of a file, with its folder made: found out before hours of work, not after."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give a file's name.")
    if taken := [str(folder) for folder in path.parents if folder.exists() and not folder.is_dir()]:
        raise ValueError(f"{taken[0]!r} is a file, and a folder is wanted there. Give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _print_table(columns: dict[str, dict[str, float]]) -> None:
    names = [
        name
        for name in next(iter(columns.values()))
        if name.startswith("eval_") and not name.endswith(("_runtime", "_num_images", "_failed"))
    ]
    left = max(len(name) for name in names) + 2
    width = max(10, *(len(label) + 2 for label in columns))
    count = next(iter(columns.values())).get("eval_num_images")
    print(f"\n{f'{count} held-out images':<{left}}" + "".join(f"{label:>{width}}" for label in columns))
    for name in names:
        cells = (metrics.get(name, float("nan")) for metrics in columns.values())
        print(f"{name.removeprefix('eval_'):<{left}}" + "".join(f"{cell:>{width}.3f}" for cell in cells))


_COMMANDS = {
    "train": (train, "Train a model with a reward."),
    "evaluate": (evaluate, "Measure a model on held-out prompts."),
    "sample": (sample, "Draw pictures of prompts."),
    "collect": (collect, "Roll a model out, score it and keep the rollouts, to train on them later."),
    "plan": (plan, "Compute the GPU memory that a run needs, and what fits."),
    "report": (report, "Write one HTML file that shows a run."),
    "serve-reward": (serve_reward, "Serve a reward over HTTP."),
}
