"""
What a run shows on the Hub: its model card with pictures and curve, and which of its files are uploaded.

What happened is read from the run's folder: `log.jsonl` (one log event a line), `samples/step-N/` (pictures of the
same prompts and noise through training, with `samples.json`) and `scheduler/` (the sampler of the evaluations). What
is not there is left out of the card.
"""

import dataclasses
import html
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainingArguments
from yaml import YAMLError

import trl_dgpo

from .run_files import read_log, written_aside
from .tiny import tiny_pipeline_path


logger = logging.getLogger(__name__)

# What of a run's folder stays at home: unfinished things (`_`), checkpoints (uploaded by themselves where
# `hub_strategy` says so), the whole history of pictures and rollouts, of which the card shows a part, and what names
# this machine, such as Trainer's pickled arguments.
IGNORE_PATTERNS = (
    "_*",
    "*/_*",
    "checkpoint-*",
    "samples/*",
    "completions/*",
    "run.json",
    "report.html",
    "training_args.bin",
    "*/training_args.bin",
)
CARD_MARK = (
    "<!-- Made by trl_dgpo and made anew with every push. Remove this line to keep a text of your own: then only "
    "missing metadata is added. -->"
)

_API = HfApi(library_name="trl_dgpo", library_version=trl_dgpo.__version__)
_SNAPSHOT = "_upload-"
_WORDS = {"transformer": "transformer", "unet": "UNet"}
_NUM_PICTURES = 4  # prompts in the gallery: enough to judge, and few enough to upload with every save
_TRAINER_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)
# What is told to nobody: tokens, and what names this machine or its user.
_PRIVATE_FIELD = re.compile(r"_(token|dir|path|folder)$|^resume_from|^(project|logdir|run_name|model_init_kwargs)$")
_PRIVATE_TEXT = re.compile(r"hf_\w{16,}|^(/|~|[A-Za-z]:\\)")
# Of the method's own fields those that say who watched a run, not how the model came about.
_NOT_SHOWN = re.compile(r"kwargs|name|hub|report|track|async|workers|^log|^num_log|_print$")
_PACKAGES = ("torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
_TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and \
Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """
    What a run is: all that its model card and its `run.json` say and the run's folder does not know.

    Args:
        method (`str`):
            Name of the method, such as `"DGPO"`.
        paper (`dict[str, str]`):
            Its paper: `title`, `id` on arXiv and `citation` in BibTeX.
        config ([`DGPOConfig`]):
            The run's configuration.
        method_fields (`tuple[str, ...]`, *optional*):
            Names of its fields that are the method's own; the card shows them beside the optimiser's.
        base_model (`str`, *optional*):
            Hub id or folder of the pipeline that was trained; a folder is not named in the card.
        pipeline_class (`str`, *optional*, defaults to `"StableDiffusion3Pipeline"`):
            Class of that pipeline.
        denoiser (`str`, *optional*, defaults to `"transformer"`):
            Its component that was trained, `"transformer"` or `"unet"`.
        pipeline_call (`dict[str, Any]`, *optional*):
            Arguments by which it draws as the run's evaluations did, besides the prompt, the size and the steps.
        reward_names (`tuple[str, ...]`, *optional*):
            Names of the training rewards.
        hub_model_id (`str`, *optional*):
            Where the run is uploaded to; without it the card names the folder.
        model_name (`str`, *optional*):
            The card's title; the last part of `hub_model_id` or the folder's name if not given.
        dataset_name (`str`, *optional*):
            Hub id of the prompts.
        license (`str`, *optional*):
            Licence of the trained weights. Without it the card says `other` and refers to the base model's: nothing is
            looked up, so that a card can be written offline.
        tags (`tuple[str, ...]`, *optional*):
            Further tags.
        links (`dict[str, str]`, *optional*):
            Addresses of the run in trackers by their names; see [`tracker_links`].
    """

    method: str
    paper: dict[str, str]
    config: TrainingArguments
    method_fields: tuple[str, ...] = ()
    base_model: str | None = None
    pipeline_class: str = "StableDiffusion3Pipeline"
    denoiser: str = "transformer"
    pipeline_call: dict[str, Any] = dataclasses.field(default_factory=dict)
    reward_names: tuple[str, ...] = ()
    hub_model_id: str | None = None
    model_name: str | None = None
    dataset_name: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    links: dict[str, str] = dataclasses.field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """
        The configuration as far as it may be told: without tokens, and without what names this machine or its user.

        It goes by the names of fields and by what stands in them, however deep. Whatever tells of a run takes its
        settings from here.
        """
        values = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        return {
            name: value
            for name, value in values.items()
            if not _PRIVATE_FIELD.search(name) and not _holds_private_text(value)
        }

    def record(self) -> dict[str, Any]:
        """
        What `run.json` holds.

        Returns:
            `dict` with `method`, `base_model`, `config` (of [`~RunDescription.settings`] the method's own, and those
            of `TrainingArguments` that are not at their defaults), `rewards` and `versions`.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        return {
            "method": self.method,
            "base_model": self.base_model,
            "config": {
                name: value
                for name, value in self.settings().items()
                if name in self.method_fields or value != defaults[name]
            },
            "rewards": list(self.reward_names),
            "versions": _versions(),
        }


def write_model_card(directory: str | os.PathLike, run: RunDescription) -> Path:
    """
    Write `README.md` and the `images/` that it shows.

    A `README.md` that is not one of ours (they carry [`CARD_MARK`]) keeps its text and its metadata; what metadata it
    lacks is added.

    Args:
        directory (`str` or `os.PathLike`):
            The run's folder, which must be there.
        run ([`RunDescription`]):
            The rest.

    Returns:
        `pathlib.Path`: the card.
    """
    directory = Path(directory)
    events = read_log(directory)
    pictures = _copy_pictures(directory)
    if has_curve := any("reward" in event for event in events):
        with written_aside(directory / "images" / "reward_curve.png") as aside:
            _draw_curve(events).save(aside)
    metadata = _metadata(run, pictures)
    path = directory / "README.md"
    if path.is_file() and CARD_MARK not in (text := path.read_text(encoding="utf-8")):
        content = _with_metadata(text, metadata)
        if content == text:
            return path
        logger.info("%s is not of our making: its text is kept, and missing metadata is added.", path)
    else:
        body = "\n\n".join(_body(directory, run, events, pictures, has_curve))
        content = f"---\n{metadata.to_yaml()}\n---\n\n{CARD_MARK}\n\n{body}\n"
    with written_aside(path) as aside:
        aside.write_text(content, encoding="utf-8")
    return path


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str,
    path_in_repo: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future:
    """
    Upload a run's folder, or a checkpoint's, without what [`IGNORE_PATTERNS`] keeps at home.

    Args:
        folder (`str` or `os.PathLike`):
            What to upload.
        repo_id (`str`):
            An existing repository.
        commit_message (`str`):
            Message of the commit.
        path_in_repo (`str`, *optional*):
            Folder in the repository, whose former contents are replaced. If not given, the repository's root, where
            other files stay.
        token (`str`, *optional*):
            Token with the right to write, if not the one that is logged in.
        revision (`str`, *optional*):
            Branch to commit to, made from `main` if it is not there. `main` if not given.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait. If not, the files of this moment are uploaded in the background, one upload after another,
            whatever becomes of the folder meanwhile, and an upload that fails is logged.

    Returns:
        `~huggingface_hub.CommitInfo`, or a `~concurrent.futures.Future` of it if not `blocking`.
    """
    arguments = {"path_in_repo": path_in_repo, "commit_message": commit_message, "token": token, "revision": revision}
    if blocking:
        return _upload(Path(folder), repo_id, arguments)
    snapshot = _snapshot(Path(folder), is_run=path_in_repo is None)
    job = _API.run_as_future(_upload, snapshot, repo_id, arguments)
    job.add_done_callback(partial(_finish, snapshot))
    return job


def remove_snapshots(directory: str | os.PathLike) -> None:
    """Remove what uploads in the background left in a run's folder when they were killed."""
    for snapshot in Path(directory).glob(f"{_SNAPSHOT}*"):
        shutil.rmtree(snapshot)


def is_repo_id(text: str) -> bool:
    """Whether a text has the form `user/repo`, which a commit message hardly has."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def tracker_links() -> dict[str, str]:
    """Addresses of the present run in Weights & Biases and in a Trackio Space, where it has them."""
    links = {}
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    if wandb is not None and wandb.run is not None and wandb.run.url is not None:
        links["Weights & Biases"] = wandb.run.url
    if trackio is not None:
        from trl.trainer.utils import get_trackio_space_url

        if (url := get_trackio_space_url()) is not None:
            links["Trackio"] = url
    return links


# -- uploads ----------------------------------------------------------------------------------------------------------


def _upload(folder: Path, repo_id: str, arguments: dict[str, Any]) -> CommitInfo:
    if (revision := arguments["revision"]) is not None:
        _API.create_branch(repo_id, branch=revision, token=arguments["token"], exist_ok=True)
    return _API.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=list(IGNORE_PATTERNS),
        delete_patterns=None if arguments["path_in_repo"] is None else "*",
        **arguments,
    )


def _snapshot(folder: Path, is_run: bool) -> Path:
    """The files that would be uploaded now: within the run's folder, or beside a checkpoint's, in one like it."""
    snapshot = Path(tempfile.mkdtemp(prefix=_SNAPSHOT, dir=folder if is_run else folder.parent))
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in filter_repo_objects(files, ignore_patterns=list(IGNORE_PATTERNS)):
        target = snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Weights are replaced, never written into, so a link to them costs nothing and lasts; logs grow.
        copy = os.link if target.suffix in (".safetensors", ".pt") else shutil.copyfile
        try:
            copy(folder / name, target)
        except OSError:
            if copy is shutil.copyfile:
                raise
            shutil.copyfile(folder / name, target)  # not every file system has links
    return snapshot


def _finish(snapshot: Path, job: Future) -> None:
    shutil.rmtree(snapshot, ignore_errors=True)
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error("An upload to the Hub failed; training goes on. %s: %s", type(error).__name__, error)


# -- what the folder knows --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Picture:
    """One prompt of the gallery: files below the run's folder, rewards where they are known."""

    prompt: str
    before: str | None
    after: str
    steps: tuple[int, int]
    rewards: tuple[float | None, float | None]


def _copy_pictures(directory: Path) -> list[_Picture]:
    """The first prompts' earliest and latest pictures, copied to where the card shows them."""
    steps = {int(p.parent.name.removeprefix("step-")): p for p in directory.glob("samples/step-*/samples.json")}
    if not steps or max(steps) == 0:
        return []
    first, last = min(steps), max(steps)
    before, after = (json.loads(steps[step].read_text(encoding="utf-8")) for step in (first, last))
    pictures = []
    for number, prompt in enumerate(after["prompts"][:_NUM_PICTURES]):
        # A run that was started anew with other prompts has no picture of this one before training.
        has_before = first != last and before["prompts"][number : number + 1] == [prompt]
        files = {"after": steps[last]} | ({"before": steps[first]} if has_before else {})
        for name, source in files.items():
            with written_aside(directory / "images" / f"{name}-{number:02d}.png") as aside:
                shutil.copyfile(source.with_name(f"{number:02d}.png"), aside)
        pictures.append(
            _Picture(
                prompt=" ".join(prompt.split()),
                before=f"images/before-{number:02d}.png" if has_before else None,
                after=f"images/after-{number:02d}.png",
                steps=(first, last),
                rewards=(before["rewards"][number] if has_before else None, after["rewards"][number]),
            )
        )
    return pictures


# -- the card ---------------------------------------------------------------------------------------------------------


def _metadata(run: RunDescription, pictures: list[_Picture]) -> ModelCardData:
    base = _hub_base(run)
    is_lora = not run.config.full_finetuning
    tags = ["trl", "trl-dgpo", run.method.lower(), "diffusers", "text-to-image"]
    tags += ["lora", "template:sd-lora"] if is_lora else []
    widget = [{"text": picture.prompt, "output": {"url": picture.after}} for picture in pictures]
    widget += [
        {"text": f"{picture.prompt} (before training)", "output": {"url": picture.before}}
        for picture in pictures
        if picture.before
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=run.license or "other",
        license_name=None if run.license else "license-of-the-base-model",
        license_link=None if run.license or base is None else f"https://huggingface.co/{base}",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_lora else "finetune",
        datasets=run.dataset_name,
        tags=list(dict.fromkeys([*tags, *run.tags])),
        widget=widget or None,
    )


def _with_metadata(text: str, ours: ModelCardData) -> str:
    """A foreign card with the metadata that it lacks, its text untouched."""
    try:
        card = ModelCard(text)
    except (ValueError, YAMLError):
        logger.warning("The metadata of README.md cannot be read, so the file is left as it is.")
        return text
    theirs = card.data.to_dict()
    missing = {name: value for name, value in ours.to_dict().items() if name not in theirs}
    if "license" not in missing:  # what belongs to ours does not fit theirs
        missing = {name: value for name, value in missing.items() if not name.startswith("license")}
    if new_tags := [tag for tag in ours.tags if tag not in (theirs.get("tags") or [])]:
        missing["tags"] = [*(theirs.get("tags") or []), *new_tags]
    if not missing:
        return text
    for name, value in missing.items():
        card.data[name] = value
    return f"---\n{card.data.to_yaml(original_order=[*theirs])}\n---\n{card.text}"


def _body(
    directory: Path, run: RunDescription, events: list[dict[str, float]], pictures: list[_Picture], has_curve: bool
) -> Iterable[str]:
    weights = "ema" if run.config.save_ema else "live"
    yield f"# {_text(run.model_name or _repo(directory, run).split('/')[-1])}"
    yield _introduction(run, events)
    if run.links:
        yield " · ".join(f"[{_text(name)}]({url})" for name, url in run.links.items())
    if pictures:
        yield "<Gallery />"
    yield "## How to use it"
    yield _code("python", _snippet(directory, run, pictures))
    yield _files_table(run, weights)
    yield "## Results"
    yield from _results(events)
    if has_curve:
        yield "![Reward through training](images/reward_curve.png)"
    if pictures:
        yield "## Before and after"
        yield _pictures_table(pictures)
    yield "## Training"
    yield from _configuration(run)
    if not run.license:
        yield "## Licence"
        yield "No licence of its own was named for these weights; that of the base model applies to its derivatives."
    yield "## Citations"
    yield f"{run.method}:"
    yield _code("bibtex", run.paper["citation"])
    yield "TRL:"
    yield _code("bibtex", _TRL_CITATION)


def _introduction(run: RunDescription, events: list[dict[str, float]]) -> str:
    base = _hub_base(run)
    if base is not None:
        of = f"[{base}](https://huggingface.co/{base})"
    else:
        of = "the tiny SD3 of `trl_dgpo`" if _is_tiny(run) else f"a local {run.pipeline_class}"
    kind = f"The {_WORDS[run.denoiser]} of" if run.config.full_finetuning else "A LoRA for"
    steps = f" for {events[-1]['step']} optimiser steps" if events else ""
    rewards = f" on the reward{'s' * (len(run.reward_names) > 1)} " + ", ".join(
        f"`{name}`" for name in run.reward_names
    )
    paper = f"[{_text(run.paper['title'])}](https://huggingface.co/papers/{run.paper['id']})"
    prompts = (
        f" with the prompts of [{run.dataset_name}](https://huggingface.co/datasets/{run.dataset_name})"
        if run.dataset_name
        else ""
    )
    return (
        f"{kind} {of}, trained{steps} with **{run.method}** ({paper}){rewards if run.reward_names else ''}{prompts}. "
        "Made with `trl_dgpo`, on [TRL](https://github.com/huggingface/trl)."
    )


def _snippet(directory: Path, run: RunDescription, pictures: list[_Picture]) -> str:
    """Code that draws as the run's evaluations did."""
    config, repo = run.config, _repo(directory, run)
    dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    scheduler = None
    if (path := directory / "scheduler" / "scheduler_config.json").is_file():
        scheduler = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    classes = sorted([run.pipeline_class, *["AutoModel"] * config.full_finetuning, *([scheduler] * bool(scheduler))])
    lines = ["import torch", f"from diffusers import {', '.join(classes)}"]
    base, loading = _quoted(_hub_base(run) or "path/to/the/base/model"), f"dtype=torch.{dtype}"
    if _is_tiny(run):
        lines.append("from trl_dgpo.tiny import tiny_pipeline_path")
        base = "tiny_pipeline_path()"
    for name in ("revision", "variant"):  # which weights of the base model they were
        if name in (run.config.model_init_kwargs or {}):
            base += f", {name}={_quoted(run.config.model_init_kwargs[name])}"
    lines.append("")
    if config.full_finetuning:
        name = run.denoiser
        lines.append(f'{name} = AutoModel.from_pretrained({_quoted(repo)}, subfolder="{name}", {loading})')
        lines.append(f"pipe = {run.pipeline_class}.from_pretrained({base}, {name}={name}, {loading})")
    else:
        lines.append(f"pipe = {run.pipeline_class}.from_pretrained({base}, {loading})")
        lines.append(f"pipe.load_lora_weights({_quoted(repo)})")
    if scheduler:
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained({_quoted(repo)}, subfolder="scheduler")')
    lines.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")')
    call = {"height": config.height, "width": config.width, "num_inference_steps": config.eval_num_steps}
    call |= run.pipeline_call
    prompt = pictures[0].prompt if pictures else "A photo of a lighthouse"
    arguments = "".join(f"    {name}={_quoted(value)},\n" for name, value in call.items())
    lines.append(f"image = pipe(\n    {_quoted(prompt)},\n{arguments}).images[0]")
    lines.append('image.save("image.png")')
    return "\n".join(lines)


def _files_table(run: RunDescription, weights: str) -> str:
    if run.config.full_finetuning:
        files = {f"`{run.denoiser}/`": f"the whole {_WORDS[run.denoiser]}, in diffusers' layout"}
    else:
        files = {
            "`pytorch_lora_weights.safetensors`": "diffusers: `load_lora_weights`, as above",
            "`adapter_model.safetensors`, `adapter_config.json`": "PEFT: to train on from here",
        }
    hold = "It holds" if len(files) == 1 else "Both hold"
    if weights == "ema":
        what = f"{hold} the `ema` weights, the slow moving average of training, which the evaluations used."
    else:
        what = f"{hold} the weights of the last step (`save_ema=False`), not their moving average."
    table = _table([["file", "for"], ["---", "---"], *([name, purpose] for name, purpose in files.items())])
    return f"{table}\n\n{what}"


def _results(events: list[dict[str, float]]) -> Iterable[str]:
    """The first and the last evaluation, or the first and the last reward of training."""
    evaluations = [event for event in events if any(_is_eval_reward(name) for name in event)]
    shown = evaluations or [event for event in events if "reward" in event]
    if not shown:
        yield "There is no log of this run."
        return
    first, last = shown[0], shown[-1]
    if evaluations:
        names = [n for n in last if re.match(r"eval_.*(reward$|rewards/.+/mean$|images/)", n)]
        number = f" of {last['eval_num_images']:g} images" if "eval_num_images" in last else ""
        yield f"Evaluations{number}, with the `ema` weights; ± is the standard error."
    else:
        names = ["reward", *(n for n in last if re.match(r"rewards/.+/mean$", n))]
        yield "There was no evaluation. These are means over the images that were trained on."
    columns = [first, last] if first is not last else [last]
    rows = [["", *(f"step {event['step']}" for event in columns)], ["---"] * (1 + len(columns))]
    rows += [[_text(name.removeprefix("eval_")), *(_value(event, name) for event in columns)] for name in names]
    yield _table(rows)


def _pictures_table(pictures: list[_Picture]) -> str:
    first, last = pictures[0].steps
    has_before = any(picture.before for picture in pictures)
    rows = [["prompt", *[f"step {first}"] * has_before, f"step {last}"], ["---"] * (2 + has_before)]
    for picture in pictures:
        files = [picture.before, picture.after] if has_before else [picture.after]
        rewards = picture.rewards if has_before else picture.rewards[1:]
        cells = [
            "" if file is None else f"![]({file})" + ("" if reward is None else f"<br>reward {reward:.3f}")
            for file, reward in zip(files, rewards, strict=True)
        ]
        rows.append([_text(picture.prompt), *cells])
    prompts = (
        "The run's fixed prompt" if len(pictures) == 1 else f"The first {len(pictures)} of the run's fixed prompts"
    )
    return f"{prompts}, not picked, with the same noise at each step.\n\n{_table(rows)}"


def _configuration(run: RunDescription) -> Iterable[str]:
    values, defaults = _settings(run)
    differing = [name for name, value in values.items() if value != defaults[name]]
    if differing:
        yield f"What differs from the defaults of `{type(run.config).__name__}`:"
        yield _table(
            [["field", "value", "default"], ["---"] * 3]
            + [[f"`{name}`", _code_cell(values[name]), _code_cell(defaults[name])] for name in differing]
        )
    rows = [["field", "value"], ["---"] * 2, *([f"`{name}`", _code_cell(value)] for name, value in values.items())]
    yield f"<details>\n<summary>The whole configuration</summary>\n\n{_table(rows)}\n\n</details>"
    yield f"Versions: {', '.join(f'{name} {number}' for name, number in _versions().items())}."


def _settings(run: RunDescription) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and defaults of the fields that decide what is learned; a default may follow from other fields."""
    config, told, derived = run.config, run.settings(), run.config.derived
    values, defaults = {}, {}
    for field in dataclasses.fields(config):
        name = field.name
        if name not in told or not isinstance(value := _plain(told[name]), str | int | float | None):
            continue
        if name in _TRAINER_FIELDS or (name in run.method_fields and not _NOT_SHOWN.search(name)):
            values[name] = value
            default = None if field.default is dataclasses.MISSING else field.default
            defaults[name] = _plain(derived.get(name, default))
    return values, defaults


def _holds_private_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_private_text, [*value, *value.values()]))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_private_text, value))
    return _PRIVATE_TEXT.search(str(value)) is not None


def _versions() -> dict[str, str]:
    return {"trl_dgpo": trl_dgpo.__version__, **{name: version(name) for name in _PACKAGES}}


def _plain(value: Any) -> Any:
    """A choice (an enum) as its text, a list of numbers as a text."""
    value = getattr(value, "value", value)
    return str(value) if isinstance(value, (list, tuple)) else value


def _hub_base(run: RunDescription) -> str | None:
    """The base model if it is on the Hub: never a folder of this machine."""
    base = run.base_model
    if base is None or _is_tiny(run) or Path(base).exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is None:
        return None
    return base


def _is_tiny(run: RunDescription) -> bool:
    return run.base_model is not None and Path(run.base_model) in (Path("tiny"), tiny_pipeline_path())


def _repo(directory: Path, run: RunDescription) -> str:
    # Without a repository the folder itself is loaded; where it lies on this machine is nobody's business.
    return run.hub_model_id or (directory.resolve().name if directory.is_absolute() else directory.as_posix())


def _is_eval_reward(name: str) -> bool:
    return re.fullmatch(r"eval_(.+_)?reward", name) is not None


def _value(event: dict[str, float], name: str) -> str:
    if name not in event:
        return ""
    error = event.get(f"{name}_stderr")
    return f"{event[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


# -- Markdown ---------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Text that Markdown, its tables and HTML show as it is, on one line."""
    text = re.sub(r"([\\`*_{}\[\]()#|~$])", r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False)


def _code_cell(value: Any) -> str:
    # In HTML: between backticks a table would still be cut at `|`.
    text = html.escape("none" if value is None else str(value) or "''", quote=False)
    return f"<code>{re.sub(r'([|`*_])', lambda m: f'&#{ord(m[0])};', ' '.join(text.split()))}</code>"


def _quoted(value: Any) -> str:
    """A string or number as Python source: JSON's form of them, whose quotes are double ones."""
    return json.dumps(value, ensure_ascii=False)


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code(language: str, code: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


# -- the curve --------------------------------------------------------------------------------------------------------

_INK, _GRID, _PALE, _COLOURS = "#444444", "#e4e4e4", "#b9cfe8", ("#1f5fa8", "#d9622b", "#3a8f4d", "#8b5cb0", "#a08a1c")


def _draw_curve(events: list[dict[str, float]], size: tuple[int, int] = (800, 420)) -> Image.Image:
    """Training reward, its running mean, and the evaluations, over optimiser steps."""
    scale = 2  # drawn large and made small: smooth lines
    train = [(event["step"], event["reward"]) for event in events if "reward" in event]
    width = max(1, len(train) // 20)
    smooth = [
        (step, sum(value for _, value in train[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i, (step, _) in enumerate(train)
    ]
    series = {"training reward": smooth}
    for name in sorted({name for event in events for name in event if _is_eval_reward(name)}):
        series[name] = [(event["step"], event[name]) for event in events if name in event]
    points = [point for line in [train, *series.values()] for point in line]
    left, top, right, bottom = (scale * n for n in (64, 40, size[0] - 20, size[1] - 44))
    x_ticks, y_ticks = _ticks([x for x, _ in points]), _ticks([y for _, y in points])

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + along * (right - left), bottom - up * (bottom - top)

    image = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14 * scale)
    for y in y_ticks:
        draw.line([at(x_ticks[0], y), at(x_ticks[-1], y)], _GRID, scale)
        draw.text((left - 8 * scale, at(0, y)[1]), f"{y:.6g}", _INK, font, anchor="rm")
    for x in x_ticks:
        draw.text((at(x, 0)[0], bottom + 8 * scale), f"{x:.6g}", _INK, font, anchor="mt")
    draw.text(((left + right) / 2, size[1] * scale - 4 * scale), "optimiser step", _INK, font, anchor="mb")
    if width > 1:
        draw.line([at(*point) for point in train], _PALE, scale)
    legend = left
    for (name, line), colour in zip(series.items(), _COLOURS, strict=False):
        places = [at(*point) for point in line]
        draw.line(places, colour, 2 * scale, joint="curve")
        for x, y in places if name != "training reward" or len(places) == 1 else []:
            draw.ellipse([x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale], colour)
        draw.line([(legend, 20 * scale), (legend + 24 * scale, 20 * scale)], colour, 3 * scale)
        draw.text((legend + 32 * scale, 20 * scale), name, _INK, font, anchor="lm")
        legend += 56 * scale + draw.textlength(name, font)
    return image.reduce(scale)


def _ticks(values: list[float]) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(n * power for n in (1, 2, 5, 10) if (high - low) / (n * power) <= 6)
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
