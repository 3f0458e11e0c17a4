"""The model card and what of a run is uploaded: everything that needs no Hub."""

import dataclasses
import json
import logging
import re
import sys
import types
from concurrent.futures import Future

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import save_file
from tiny_trainers import tiny_config
from trl.trainer.base_config import _BaseConfig

from trl_dgpo import DGPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, FlowGRPOConfig, GPOConfig, TDMR1Config, hub
from trl_dgpo.ddpo_compat import DDPOFields, GRPOFields
from trl_dgpo.hub import CARD_MARK, IGNORE_PATTERNS, RunDescription, is_repo_id, upload, write_model_card
from trl_dgpo.tiny import tiny_pipeline_path


PAPER = {"title": "A *Paper* on | Preference", "id": "2510.08425", "citation": "@article{a2025,\n  title = {A}\n}"}
SD35 = "stabilityai/stable-diffusion-3.5-medium"
EVIL = 'a "b" | <img src=x>\n---\n`c`: *d* # [e](f) & \\ ```'
SECRET = "hf_" + "abcdefghij" * 3


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (32, 16), (red, 80, 80))


def write_samples(directory, step, prompts, rewards=None):
    folder = directory / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for number in range(len(prompts)):
        picture(step + number).save(folder / f"{number:02d}.png")
    about = {"step": step, "prompts": prompts, "rewards": rewards or [0.5] * len(prompts), "by_name": {}}
    (folder / "samples.json").write_text(json.dumps(about))


def write_log(directory, *events):
    (directory / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def describe(directory, **about) -> RunDescription:
    config = about.pop("config", {})
    about = {"method": "DGPO", "paper": PAPER, "base_model": SD35, "hub_model_id": "someone/some-lora", **about}
    return RunDescription(config=tiny_config(directory, **config), **about)


def write_card(directory, **about) -> ModelCard:
    return ModelCard.load(write_model_card(directory, describe(directory, **about)))


def table(card: ModelCard, *head: str) -> dict[str, list[str]]:
    """Rows of the table with this head, by their first cell."""
    lines = card.text.split(f"\n| {' | '.join(head)} |\n", 1)[1].splitlines()[1:]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[: lines.index("")]]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


# Metadata


def test_metadata(tmp_path):
    data = write_card(tmp_path, tags=("letters", "trl"), dataset_name="someone/prompts").data.to_dict()
    tags = ["trl", "trl-dgpo", "dgpo", "diffusers", "text-to-image", "lora", "template:sd-lora", "letters"]
    assert data == {
        "base_model": SD35,
        "base_model_relation": "adapter",
        "datasets": "someone/prompts",
        "library_name": "diffusers",
        "license": "other",
        "license_link": f"https://huggingface.co/{SD35}",
        "license_name": "license-of-the-base-model",
        "pipeline_tag": "text-to-image",
        "tags": tags,
    }


def test_a_licence_that_is_given(tmp_path):
    card = write_card(tmp_path, license="apache-2.0")
    assert card.data.license == "apache-2.0"
    assert "license_name" not in card.data.to_dict()
    assert "## Licence" not in card.text


def test_a_whole_transformer_is_no_lora(tmp_path):
    card = write_card(tmp_path, config={"full_finetuning": True})
    assert card.data.base_model_relation == "finetune"
    assert "lora" not in card.content.replace("someone/some-lora", "").replace("# some-lora", "").lower()
    assert "`transformer/`" in card.text


@pytest.mark.parametrize("base", ["a folder", "tiny", tiny_pipeline_path(), None])
def test_a_base_model_that_is_not_on_the_hub_is_not_named(tmp_path, base):
    if base == "a folder":
        base = tmp_path / "my_model"
        base.mkdir()
    card = write_card(tmp_path, base_model=None if base is None else str(base))
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert str(base) not in card.content or base == "tiny"
    assert ("tiny_pipeline_path()" in card.text) == (base in ("tiny", tiny_pipeline_path()))


# Pictures


def test_gallery_of_the_first_and_the_last_pictures(tmp_path):
    prompts = ["one", "two", "three", "four", "five"]
    for step in (0, 20, 40):
        write_samples(tmp_path, step, prompts, [0.25, None, 0.5, 0.75, 1.0])
    card = write_card(tmp_path)
    after = [{"text": p, "output": {"url": f"images/after-0{i}.png"}} for i, p in enumerate(prompts[:4])]
    before = [
        {"text": f"{p} (before training)", "output": {"url": f"images/before-0{i}.png"}}
        for i, p in enumerate(prompts[:4])
    ]
    assert card.data.widget == after + before
    assert "<Gallery />" in card.text
    shown = table(card, "prompt", "step 0", "step 40")
    assert shown["one"] == [
        "![](images/before-00.png)<br>reward 0.250",
        "![](images/after-00.png)<br>reward 0.250",
    ]
    assert shown["two"] == ["![](images/before-01.png)", "![](images/after-01.png)"]
    for step, name in ((0, "before"), (40, "after")):
        original = tmp_path / "samples" / f"step-{step:06d}" / "02.png"
        assert (tmp_path / "images" / f"{name}-02.png").read_bytes() == original.read_bytes()
    assert not list((tmp_path / "images").glob("_*"))


def test_without_pictures_of_before_there_are_those_of_after(tmp_path):
    write_samples(tmp_path, 20, ["one", "two"])
    card = write_card(tmp_path)
    assert [entry["text"] for entry in card.data.widget] == ["one", "two"]
    assert "| prompt | step 20 |" in card.text


def test_other_prompts_are_not_the_same_pictures_before_training(tmp_path):
    write_samples(tmp_path, 0, ["one"])
    write_samples(tmp_path, 20, ["one", "two"])
    assert table(write_card(tmp_path), "prompt", "step 0", "step 20")["two"] == [
        "",
        "![](images/after-01.png)<br>reward 0.500",
    ]


def test_a_folder_of_pictures_that_is_not_finished_is_not_there(tmp_path):
    write_samples(tmp_path, 20, ["one"])
    write_samples(tmp_path, 40, ["one"])
    (tmp_path / "samples" / "step-000040").rename(tmp_path / "samples" / "_step-000040")
    assert "| prompt | step 20 |" in write_card(tmp_path).text


def test_a_run_that_only_began_shows_no_gallery(tmp_path):
    write_samples(tmp_path, 0, ["one"])
    card = write_card(tmp_path)
    assert "widget" not in card.data.to_dict()
    assert "<Gallery />" not in card.text


# Numbers


def test_results_of_the_first_and_the_last_evaluation(tmp_path):
    def evaluation(step, reward):
        numbers = {"eval_reward": reward, "eval_reward_stderr": 0.0125, "eval_reward_std": 0.1, "eval_runtime": 3.0}
        return {**numbers, "eval_rewards/ocr/mean": reward, "eval_images/contrast": 0.25, "step": step}

    training = [{"loss": 0.1, "reward": 0.5 + step / 10, "step": step} for step in (1, 2, 3, 4)]
    write_log(tmp_path, evaluation(0, 0.5), *training, evaluation(2, 0.7), evaluation(4, 0.9))
    card = write_card(tmp_path)
    assert table(card, "", "step 0", "step 4") == {
        "reward": ["0.5 ± 0.013", "0.9 ± 0.013"],
        "rewards/ocr/mean": ["0.5", "0.9"],
        "images/contrast": ["0.25", "0.25"],
    }
    assert "trained for 4 optimiser steps" in card.text


def test_several_evaluation_sets(tmp_path):
    write_log(
        tmp_path, {"eval_easy_reward": 0.5, "eval_hard_reward": 0.25, "step": 0}, {"eval_easy_reward": 1, "step": 4}
    )
    assert table(write_card(tmp_path), "", "step 0", "step 4") == {"easy\\_reward": ["0.5", "1"]}
    assert (tmp_path / "images" / "reward_curve.png").exists() is False  # nothing was trained


def test_without_an_evaluation_the_training_rewards(tmp_path):
    write_log(tmp_path, {"loss": 0, "reward": 0.5, "step": 1}, {"loss": 0, "reward": 0.75, "step": 2})
    card = write_card(tmp_path)
    assert table(card, "", "step 1", "step 2") == {"reward": ["0.5", "0.75"]}
    assert "There was no evaluation" in card.text


def test_of_a_resumed_run_the_last_line_of_a_step_holds(tmp_path, caplog):
    lines = [{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}, {"reward": 0.3, "step": 2}]
    write_log(tmp_path, *lines, {"reward": None, "step": 3})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"reward": 0.9, "st')
    card = write_card(tmp_path)
    assert table(card, "", "step 1", "step 2") == {"reward": ["0.1", "0.3"]}
    assert "Line 5" in caplog.text


def test_a_run_of_which_nothing_is_known(tmp_path):
    card = write_card(tmp_path, base_model=None, hub_model_id=None)
    assert "There is no log" in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_curve_shows_training_and_evaluations(tmp_path):
    def colours() -> set:
        image = Image.open(tmp_path / "images" / "reward_curve.png")
        assert image.size == (800, 420)
        return {colour for _, colour in image.getcolors(maxcolors=100_000)}

    blue, orange = ((31, 95, 168), (217, 98, 43))
    training = [{"loss": 0.1, "reward": 0.5 + step / 100, "step": step} for step in range(1, 50)]
    write_log(tmp_path, *training)
    write_card(tmp_path)
    assert blue in colours()
    assert orange not in colours()
    write_log(tmp_path, *training, {"eval_reward": 0.2, "step": 0}, {"eval_reward": 0.9, "step": 49})
    write_card(tmp_path)
    assert {blue, orange} <= colours()


@pytest.mark.parametrize("rewards", [[0.5], [0.0, 0.0], [-3e5, 2e6], [1e-7, 2e-7], [-0.25, 0.75]])
def test_ticks_are_round_and_enclose(rewards):
    ticks = hub._ticks(rewards)
    assert ticks[0] <= min(rewards)
    assert ticks[-1] >= max(rewards)
    assert 2 <= len(ticks) <= 8
    assert all(len(f"{tick:.6g}") <= 7 for tick in ticks)


# The snippet


class FakePipeline:
    made = []

    def __init__(self, *arguments, **keywords):
        self.calls = [("from_pretrained", arguments, keywords)]
        self.made.append(self)

    @classmethod
    def from_pretrained(cls, *arguments, **keywords):
        return cls(*arguments, **keywords)

    def load_lora_weights(self, *arguments, **keywords):
        self.calls.append(("load_lora_weights", arguments, keywords))

    def to(self, device):
        self.calls.append(("to", (device,), {}))

    def __call__(self, *arguments, **keywords):
        self.calls.append(("call", arguments, keywords))
        return types.SimpleNamespace(images=[picture(0)])


def run_snippet(card: ModelCard, monkeypatch, tmp_path) -> dict[str, tuple]:
    names = ("StableDiffusion3Pipeline", "AutoModel", "DPMSolverMultistepScheduler")
    fake = types.ModuleType("diffusers")
    for name in names:
        setattr(fake, name, type(name, (FakePipeline,), {"made": []}))
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"(`{3,})python\n(.*?)\n\1(?!`)", card.text, re.DOTALL)[2], {})
    assert (tmp_path / "image.png").is_file()
    pipeline = fake.StableDiffusion3Pipeline.made[0]
    models = {name: getattr(fake, name).made for name in names[1:]}
    return {name: (arguments, keywords) for name, arguments, keywords in pipeline.calls} | {"models": models}


def test_the_snippet_draws_as_the_evaluations_did(tmp_path, monkeypatch):
    sizes = {"resolution": 32, "width": 64, "eval_num_steps": 7, "eval_guidance_scale": 2.5, "max_sequence_length": 9}
    write_samples(tmp_path, 20, [EVIL])
    (tmp_path / "scheduler").mkdir()
    about = {"_class_name": "DPMSolverMultistepScheduler"}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    loading = {"model_init_kwargs": {"revision": "fp32", "token": SECRET}, "negative_prompt": "grey"}
    told = {"guidance_scale": 2.5, "max_sequence_length": 9, "negative_prompt": "grey"}
    card = write_card(tmp_path, config=sizes | loading, pipeline_call=told)
    calls = run_snippet(card, monkeypatch, tmp_path)
    assert calls["from_pretrained"] == ((SD35,), {"dtype": torch.float32, "revision": "fp32"})
    assert calls["load_lora_weights"] == (("someone/some-lora",), {})
    asked = {"height": 32, "width": 64, "num_inference_steps": 7, "guidance_scale": 2.5, "max_sequence_length": 9}
    assert calls["call"] == ((" ".join(EVIL.split()),), {**asked, "negative_prompt": "grey"})
    (scheduler,) = calls["models"]["DPMSolverMultistepScheduler"]
    assert scheduler.calls == [("from_pretrained", ("someone/some-lora",), {"subfolder": "scheduler"})]


def test_the_snippet_of_a_whole_transformer(tmp_path, monkeypatch):
    calls = run_snippet(write_card(tmp_path, config={"full_finetuning": True}), monkeypatch, tmp_path)
    (transformer,) = calls["models"]["AutoModel"]
    source = ("from_pretrained", ("someone/some-lora",), {"subfolder": "transformer", "dtype": torch.float32})
    assert transformer.calls == [source]
    assert calls["from_pretrained"][1]["transformer"] is transformer
    assert "load_lora_weights" not in calls


# What is said and what is not


def test_weights_that_the_files_hold(tmp_path):
    assert "hold the `ema` weights" in write_card(tmp_path).text
    assert "hold the weights of the last step" in write_card(tmp_path, config={"save_ema": False}).text


def test_text_stays_text(tmp_path):
    write_samples(tmp_path, 20, [EVIL])
    card = write_card(tmp_path, config={"negative_prompt": EVIL}, reward_names=("<lambda>", "a|b"), model_name=EVIL)
    flat = " ".join(EVIL.split())
    assert card.data.widget[0]["text"] == flat
    outside = re.sub(r"(`{3,}).*?\n\1(?!`)", "", card.text, flags=re.DOTALL)
    assert "<img" not in outside
    escaped = r'a "b" \| &lt;img src=x&gt; --- \`c\`: \*d\* \# \[e\]\(f\) &amp; \\ \`\`\`'
    assert f"\n# {escaped}\n" in outside
    assert outside.count("\n---\n") == 0
    assert list(table(card, "prompt", "step 20")) == [escaped]
    assert "A \\*Paper\\* on \\| Preference" in outside


def test_configuration(tmp_path):
    config = {"beta": 50.0, "clip_range": 0.0, "learning_rate": 0.01, "negative_prompt": "a|b", "hub_token": SECRET}
    fields = ("beta", "clip_range", "negative_prompt", "width", "model_init_kwargs", "hub_token", "output_dir")
    card = write_card(tmp_path, config=config, method_fields=fields)
    differing = table(card, "field", "value", "default")
    assert differing["`beta`"] == ["<code>50.0</code>", "<code>100.0</code>"]
    assert differing["`clip_range`"] == ["<code>none</code>", "<code>0.001</code>"]
    assert differing["`negative_prompt`"] == ["<code>a&#124;b</code>", "<code>''</code>"]
    assert differing["`learning_rate`"] == ["<code>0.01</code>", "<code>0.0003</code>"]
    assert not {"`width`", "`gradient_accumulation_steps`", "`hub_token`"} & differing.keys()
    everything = table(card, "field", "value")
    assert everything["`width`"] == ["<code>32</code>"]
    assert "trl 1." in card.text


@pytest.mark.parametrize(
    "config_class", [DGPOConfig, GPOConfig, FlowGRPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, TDMR1Config]
)
def test_what_follows_from_other_fields_differs_from_no_default(tmp_path, config_class):
    above = (name for base in (_BaseConfig, DDPOFields, GRPOFields) for name in base.__dataclass_fields__)
    own = set(config_class.__dataclass_fields__).difference(above)

    def differing(**given):
        config = config_class(output_dir=str(tmp_path), use_cpu=True, **given)
        run = RunDescription(method="", paper=PAPER, config=config, method_fields=tuple(own), base_model=SD35)
        card = ModelCard.load(write_model_card(tmp_path, run))
        return {name.strip("`") for name in table(card, "field", "value", "default")}

    if "sample_guidance_scale" not in config_class._fixed:
        assert differing(sample_guidance_scale=3.0) == {"sample_guidance_scale"}
    assert differing(prompts_per_round=12, learning_rate=0.02) == {"prompts_per_round", "learning_rate"}


def test_neither_token_nor_folder(tmp_path):
    loading = {"model_init_kwargs": {"token": SECRET}, "hub_token": SECRET, "logging_dir": str(tmp_path / "logs")}
    loading = {name: value for name, value in loading.items() if hasattr(tiny_config(tmp_path), name)}
    config = tiny_config(tmp_path, **loading, negative_prompt=f"with {SECRET}", run_name=str(tmp_path))
    fields = tuple(vars(config))
    run = RunDescription(
        method="DGPO", paper=PAPER, config=config, method_fields=fields, base_model=str(tmp_path), license=None
    )
    content = write_model_card(tmp_path, run).read_text()
    assert f"load_lora_weights({json.dumps(tmp_path.name)})" in content
    assert str(tmp_path) not in content
    # a prompt that holds a token is the user's own; nothing else shows one
    assert SECRET not in content.split("## Training")[1]


def test_the_record_of_a_run_has_what_tells_it_apart(tmp_path):
    config = {"beta": 50.0, "learning_rate": 0.01, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    run = describe(tmp_path, config=config, method_fields=("beta", "prompt_dropout"), reward_names=("red", "blue"))
    record = run.record()
    assert list(record) == ["method", "base_model", "config", "rewards", "versions"]
    assert (record["method"], record["base_model"], record["rewards"]) == ("DGPO", SD35, ["red", "blue"])
    assert config.items() <= record["config"].items()
    assert record["config"]["prompt_dropout"] == 0.0  # the method's own are there at their defaults too
    assert not {"adam_beta1", "output_dir"} & record["config"].keys()
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hub_token", "any"),
        ("output_dir", "any"),
        ("project", "any"),
        ("run_name", "any"),
        ("resume_from_checkpoint", "any"),
        ("model_init_kwargs", {"revision": "any"}),
        ("negative_prompt", f"with {SECRET}"),
        ("lr_scheduler_kwargs", {"deep": [{"er": SECRET}]}),
        ("lr_scheduler_kwargs", {SECRET: 1}),
        ("report_to", ["wandb", SECRET]),
        ("label_names", ["/home/me/labels"]),
        ("deepspeed", "~/zero.json"),
        ("deepspeed", "C:\\zero.json"),
        ("fsdp_config", types.SimpleNamespace(token=SECRET)),
    ],
)
def test_no_setting_tells_of_tokens_users_or_folders(tmp_path, field, value):
    run = describe(tmp_path)
    run = dataclasses.replace(run, method_fields=tuple(vars(run.config)))
    assert "negative_prompt" in run.settings()
    setattr(run.config, field, value)
    assert field not in run.settings()
    assert field not in run.record()["config"]
    content = write_model_card(tmp_path, run).read_text()
    assert SECRET not in content.split("## Training")[1]
    assert f"`{field}`" not in content


def test_citations_and_links(tmp_path):
    card = write_card(tmp_path, links={"Weights & Biases": "https://wandb.example/run"})
    assert PAPER["citation"] in card.text
    assert "@software{vonwerra2020trl" in card.text
    assert "[Weights &amp; Biases](https://wandb.example/run)" in card.text
    assert "https://huggingface.co/papers/2510.08425" in card.text


# A card that is not ours


def test_our_own_card_is_made_anew(tmp_path):
    first = write_model_card(tmp_path, describe(tmp_path, model_name="First"))
    assert CARD_MARK in first.read_text()
    assert "# Second" in write_card(tmp_path, model_name="Second").text
    assert "First" not in first.read_text()


def test_a_foreign_card_keeps_its_text_and_its_metadata(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\nbase_model: other/base\n---\n# My words\n\nAnd *more*.\n")
    card = write_card(tmp_path)
    assert card.text == "# My words\n\nAnd *more*.\n"
    assert (card.data.license, card.data.base_model) == ("mit", "other/base")
    assert card.data.library_name == "diffusers"
    assert card.data.tags[:2] == ["mine", "trl"]
    assert "license_name" not in card.data.to_dict()
    assert "text is kept" in caplog.text
    before = path.read_text()
    write_card(tmp_path)
    assert path.read_text() == before


def test_a_foreign_text_without_metadata(tmp_path):
    (tmp_path / "README.md").write_text("Only words.\n")
    card = write_card(tmp_path)
    assert card.text.strip() == "Only words."
    assert card.data.base_model == SD35


def test_a_foreign_card_that_cannot_be_read_is_left_alone(tmp_path, caplog):
    text = "---\ntags: [unclosed\n---\nWords.\n"
    (tmp_path / "README.md").write_text(text)
    write_model_card(tmp_path, describe(tmp_path))
    assert (tmp_path / "README.md").read_text() == text
    assert "left as it is" in caplog.text


# Uploads


def test_what_stays_at_home():
    files = [
        "README.md",
        "adapter_model.safetensors",
        "images/after-00.png",
        "runs/events.out.tfevents.1",
        "training_args.bin",
        "sub/training_args.bin",
        "run.json",
        "report.html",
        "_export/adapter_model.safetensors",
        "images/_after-00.png",
        "checkpoint-10/optimizer.pt",
        "samples/step-000000/00.png",
        "completions/completions-000001.parquet",
    ]
    assert list(filter_repo_objects(files, ignore_patterns=list(IGNORE_PATTERNS))) == files[:4]


@pytest.mark.parametrize("links", [True, False])
def test_an_upload_in_the_background_has_the_files_of_its_moment(tmp_path, monkeypatch, caplog, links):
    sent, uploads = [], []

    class Later:
        def run_as_future(self, function, *arguments):
            uploads.append((function, arguments, Future()))
            return uploads[-1][-1]

        def upload_folder(self, *, folder_path, **arguments):
            files = {
                path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*") if path.is_file()
            }
            sent.append({name: path.read_bytes() for name, path in files.items()})

    def no_links(*_):
        raise OSError

    monkeypatch.setattr(hub, "_API", Later())
    if not links:
        monkeypatch.setattr(hub.os, "link", no_links)
    save_file({"a": torch.zeros(3)}, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "log.jsonl").write_text("1\n")
    (tmp_path / "training_args.bin").write_bytes(b"secret")
    upload(tmp_path, "someone/repo", commit_message="now", blocking=False)
    # training goes on
    save_file({"a": torch.ones(3)}, tmp_path / "_w.safetensors")
    (tmp_path / "_w.safetensors").replace(tmp_path / "w.safetensors")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("2\n")
    function, arguments, future = uploads[0]
    function(*arguments)
    assert sent == [{"w.safetensors": before, "log.jsonl": b"1\n"}]
    future.set_exception(ConnectionError("no network"))
    assert "ConnectionError: no network" in caplog.text
    assert not list(tmp_path.glob("_upload*"))


def test_what_a_killed_upload_left_is_removed(tmp_path):
    (tmp_path / "_upload-x").mkdir()
    (tmp_path / "_upload-x" / "w.safetensors").write_bytes(b"")
    (tmp_path / "_export").mkdir()
    hub.remove_snapshots(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["_export"]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("someone/some-lora", True), ("a.b/c_d", True), ("End of training", False), ("fix: a/b", False), ("lora", False)],
)
def test_repository_or_message(text, is_one):
    assert is_repo_id(text) is is_one


def test_tracker_links(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=types.SimpleNamespace(url="https://w/run")))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert hub.tracker_links() == {"Weights & Biases": "https://w/run"}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    assert hub.tracker_links() == {}
