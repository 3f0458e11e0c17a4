"""
What a run leaves on the Hub and what becomes of it there.

Run as a script, this file is the client: it trains, pushes to the server of `hub_server` and loads back. That is one
process, since the imports take longer than all runs together; the tests look at what the server has then.
"""

import json
import logging
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load, load_file, save_file
from tiny_models import tiny_random_pipeline
from tiny_trainers import prompt_dataset, tiny_trainer
from transformers import TrainerCallback

from trl_dgpo import DGPOTrainer
from trl_dgpo.evaluation import evaluation_latents


PROMPTS = ["a", "b|c"]
LORA = "someone/some-lora"
EXPORT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
FOREIGN = re.compile(r"(^|/)(_|checkpoint-)|^(samples|completions)/|training_args.bin|^run.json")


# -- the client -------------------------------------------------------------------------------------------------------


def client() -> None:
    """All runs of this file, in the present folder."""
    tiny_random_pipeline(third_text_encoder=True).save_pretrained("base")
    errors = _Errors()
    logging.getLogger("trl_dgpo").addHandler(errors)
    results = {"every_save": _every_save(), "loaded": _loaded(), "trained_on": _trained_on()}
    api = HfApi()
    api.create_repo("someone/checkpoint")
    stale = {"path_or_fileobj": b"of an earlier run", "repo_id": "someone/checkpoint"}
    api.upload_file(path_in_repo="last-checkpoint/stale.pt", **stale)
    api.upload_file(path_in_repo="notes.txt", **stale)
    for strategy in ("checkpoint", "all_checkpoints", "end"):
        trainer = _trainer(strategy, max_steps=2, hub_strategy=strategy, hub_always_push=True, hub_private_repo=None)
        trainer.train()
        if strategy == "end":
            trainer.save_model()
    _ddpo_form()
    _full()
    assert not errors.lines, errors.lines
    trainer = _trainer("refused", max_steps=2)
    trainer.train()
    results["refused"] = {"steps": trainer.state.global_step, "errors": errors.lines}
    Path("results.json").write_text(json.dumps(results))


def _trainer(name: str, *, model=None, **config) -> DGPOTrainer:
    return tiny_trainer(
        name,
        model=str(Path("base").resolve()) if model is None else model,
        train_dataset=prompt_dataset("a", "b"),
        eval_dataset=prompt_dataset(*PROMPTS) if config.get("num_log_images") else None,
        **{
            "learning_rate": 0.3,  # large enough to be seen in the pictures
            "push_to_hub": True,
            "hub_model_id": f"someone/{name}",
            "hub_strategy": "every_save",
            "hub_token": TOKEN,
            "hub_private_repo": True,
            "save_strategy": "steps",
            "save_steps": 1,
            **config,
        },
    )


def _every_save() -> dict:
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "num_log_images": 2}
    trainer = _trainer("run", hub_model_id=LORA, max_steps=3, hub_always_push=True, log_completions=True, **evaluation)
    pushes = _Pushes()
    trainer.add_callback(pushes)
    trainer.train()
    (Path("run") / "_unfinished").mkdir()
    (Path("run") / "_unfinished" / "file.json").write_text("{}")
    url = trainer.push_to_hub(tags=["letters"], dataset_name="someone/prompts").commit_url
    save_file(trainer.policy.lora_state_dict("ema"), "ema.safetensors")
    save_file(trainer.policy.lora_state_dict(), "live.safetensors")
    # One prompt at a time, as `_draw` does: kernels may round differently for another batch size.
    own = {
        str(view): torch.cat([trainer.generate([prompt], view=view) for prompt in PROMPTS])
        for view in ("ema", "base", None)
    }
    save_file(own, "own.safetensors")
    left = sorted(path.name for path in Path("run").glob("_upload*"))
    return {"url": url, "left": left, "pushes": pushes.steps}


def _loaded() -> dict:
    """Pictures of plain diffusers and of PEFT with what the Hub has, and the card's own snippet."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
    from huggingface_hub import hf_hub_download
    from peft import PeftModel

    by_diffusers = StableDiffusion3Pipeline.from_pretrained("base")
    by_diffusers.load_lora_weights(LORA)
    by_peft = StableDiffusion3Pipeline.from_pretrained("base")
    by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, LORA)
    images = {}
    for name, pipe in {"diffusers": by_diffusers, "peft": by_peft}.items():
        pipe.scheduler = DPMSolverMultistepScheduler.from_pretrained(LORA, subfolder="scheduler")
        images[name] = _draw(pipe)
    save_file(images, "loaded.safetensors")
    return _run_snippet(hf_hub_download(LORA, "README.md"))


def _draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    latents = evaluation_latents(PROMPTS, 1, (4, 8, 8))
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "max_sequence_length": 4}
    images = [
        pipe(prompt, latents=latent[None], output_type="pt", **arguments).images
        for prompt, latent in zip(PROMPTS, latents, strict=True)
    ]
    return (torch.cat(images) * 255).round().to(torch.uint8)


def _run_snippet(card: str) -> dict:
    """The snippet as it stands, but that the card cannot know where the base model's folder is."""
    code = re.search(r"```python\n(.*?)\n```", Path(card).read_text(), re.DOTALL)[1]
    place = Path("path/to/the/base/model")
    if not place.exists():
        place.parent.mkdir(parents=True)
        place.symlink_to(Path("base").resolve())
    names = {}
    exec(code, names)
    pipe = names["pipe"]
    return {
        "size": names["image"].size,
        "adapters": pipe.get_active_adapters(),
        "scheduler": str(type(pipe.scheduler)),
    }


def _trained_on() -> dict:
    trainer = _trainer("on", model=LORA, push_to_hub=False)
    save_file(trainer.policy.lora_state_dict(), "start.safetensors")
    trainer.train()
    return {"base_model": trainer.base_model, "steps": trainer.state.global_step}


def _ddpo_form() -> None:
    trainer = _trainer("ddpo", push_to_hub=False, save_strategy="no", hub_model_id=None, hub_private_repo=None)
    trainer.train()
    trainer.push_to_hub("someone/ddpo-form")
    trainer.push_to_hub("on a branch", revision="run-1", token=TOKEN, license="mit")
    Path("ddpo/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    trainer.push_to_hub(commit_message="with a card of my own", blocking=False).result()


def _full() -> None:
    from huggingface_hub import hf_hub_download

    trainer = _trainer("full", full_finetuning=True, save_strategy="no", learning_rate=1e-3)
    trainer.train()
    trainer.push_to_hub()
    _run_snippet(hf_hub_download("someone/full", "README.md"))


class _Pushes(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_push_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class _Errors(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        server.refused.add("someone/refused")
        yield server


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    server.run(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def hub(server, folder):
    """The server after all that the client did."""
    return server


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def card(hub, repo_id, revision="main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_peft(lora: dict) -> dict:
    return {f"base_model.model.{name.removeprefix('transformer.')}": tensor for name, tensor in lora.items()}


def test_both_formats_hold_the_ema_weights(hub, folder):
    files, ema = hub.files(LORA), load_file(folder / "ema.safetensors")
    assert same(load(files["adapter_model.safetensors"]), ema)
    assert same(as_peft(load(files["pytorch_lora_weights.safetensors"])), ema)
    assert not same(ema, load_file(folder / "live.safetensors"))


def test_what_is_uploaded_and_what_stays_at_home(hub, folder, results):
    files = hub.files(LORA)
    images = {f"images/{name}.png" for name in ("before-00", "before-01", "after-00", "after-01", "reward_curve")}
    assert files.keys() == EXPORT | images | {"log.jsonl", "scheduler/scheduler_config.json"}
    for repo_id in hub.repos:
        uploaded = [path for path in hub.files(repo_id) if repo_id != "someone/all_checkpoints"]
        assert not [path for path in uploaded if FOREIGN.search(path)], repo_id
    # all of these were there
    for path in ("samples", "completions", "_unfinished", "training_args.bin", "run.json", "checkpoint-3"):
        assert (folder / "run" / path).exists(), path
    assert results["every_save"]["left"] == []


def test_the_token_and_the_folder_are_in_nothing_that_was_sent(hub, folder):
    sent = [
        *hub.bodies,
        *(c for repo in hub.repos.values() for b in repo.branches.values() for x in b for c in x.files.values()),
    ]
    assert TOKEN.encode() not in (folder / "run" / "training_args.bin").read_bytes()  # where transformers writes it
    assert not [body[:80] for body in sent if TOKEN.encode() in body]
    names = [path for path, content in hub.files(LORA).items() if str(folder).encode() in content]
    # a base model that is a folder has no other name
    assert set(names) <= {"adapter_config.json", "pytorch_lora_weights.safetensors"}


def test_plain_diffusers_and_peft_draw_the_trainers_pictures(folder, results):
    own, loaded = load_file(folder / "own.safetensors"), load_file(folder / "loaded.safetensors")
    assert torch.equal(loaded["diffusers"], own["ema"])
    assert torch.equal(loaded["peft"], own["ema"])
    assert not any(torch.equal(own[other], own["ema"]) for other in ("base", "None"))


def test_the_cards_snippet_runs(results):
    assert results["loaded"]["size"] == [32, 32]
    assert results["loaded"]["adapters"] == ["default_0"]
    assert "DPMSolverMultistepScheduler" in results["loaded"]["scheduler"]


def test_training_goes_on_from_the_hub(folder, results):
    assert same(load_file(folder / "start.safetensors"), load_file(folder / "ema.safetensors"))
    assert results["trained_on"] == {"base_model": str((folder / "base").resolve()), "steps": 1}


def test_every_save_pushes_the_weights_of_its_step(hub, results):
    assert results["every_save"]["pushes"] == [1, 2, 3, 3]
    *saves, last = hub.repos[LORA].branches["main"][1:]
    assert [commit.message for commit in saves] == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert last.message == "End of training"
    for step, commit in enumerate(saves, start=1):
        assert commit.files.keys() >= EXPORT
        logged = [json.loads(line)["step"] for line in commit.files["log.jsonl"].decode().splitlines()]
        assert max(logged) == step
    weights = [commit.files["adapter_model.safetensors"] for commit in saves]
    assert len({*weights}) == 3
    assert weights[-1] == last.files["adapter_model.safetensors"]


def test_the_card_on_the_hub(hub, results):
    made = card(hub, LORA)
    assert made.data.library_name == "diffusers"
    assert made.data.pipeline_tag == "text-to-image"
    assert {"dgpo", "lora", "letters"} <= {*made.data.tags}
    assert made.data.datasets == "someone/prompts"
    assert [entry["text"] for entry in made.data.widget][:2] == PROMPTS
    assert {entry["output"]["url"] for entry in made.data.widget} <= hub.files(LORA).keys()
    assert f'load_lora_weights("{LORA}")' in made.text
    assert "| reward |" in made.text
    assert results["every_save"]["url"].endswith(hub.repos[LORA].branches["main"][-1].oid)


def test_the_last_checkpoint_or_all_of_them(hub):
    last, every = hub.files("someone/checkpoint"), hub.files("someone/all_checkpoints")
    state = json.loads(last["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 2
    for files, names in ((last, {"last-checkpoint"}), (every, {"checkpoint-1", "checkpoint-2"})):
        assert {path.split("/")[0] for path in files if "checkpoint" in path} == names
        for name in names:
            assert {f"{name}/{file}" for file in ("optimizer.pt", "adapter_model.safetensors")} <= files.keys()
            assert f"{name}/ema/adapter_model.safetensors" in files
    assert not [path for path in (*last, *every) if path.endswith(("training_args.bin", "stale.pt"))]
    assert "notes.txt" in last
    checkpoint = load(every["checkpoint-2/ema/adapter_model.safetensors"])
    assert same(checkpoint, load(every["adapter_model.safetensors"]))


def test_at_the_end_only(hub):
    assert hub.messages("someone/end") == ["Model save"]


def test_private_repositories(hub, folder):
    private = {repo_id for repo_id, repo in hub.repos.items() if repo.private}
    assert {LORA, "someone/full"} <= private
    assert not private & {"someone/ddpo-form", "someone/end"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{hub.url}/api/models/{LORA}")


def test_ddpos_form_names_the_repository(hub):
    assert hub.messages("someone/ddpo-form") == ["End of training", "with a card of my own"]
    assert hub.messages("someone/ddpo-form", "run-1")[-1] == "on a branch"
    assert card(hub, "someone/ddpo-form", "run-1").data.license == "mit"


def test_a_card_of_ones_own_is_kept(hub):
    mine = card(hub, "someone/ddpo-form")
    assert mine.text.strip() == "# Mine"
    assert (mine.data.license, mine.data.library_name) == ("mit", "diffusers")


def test_a_whole_transformer(hub):
    files = hub.files("someone/full")
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= files.keys()
    assert not [path for path in files if "adapter" in path or "lora" in path]
    assert "lora" not in card(hub, "someone/full").data.tags


def test_a_failed_upload_is_said_and_training_goes_on(hub, results):
    assert results["refused"]["steps"] == 2
    assert "403" in results["refused"]["errors"][0]
    assert hub.messages("someone/refused") == []


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    client()
