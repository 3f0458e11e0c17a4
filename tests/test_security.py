"""What `docs/security.md` promises: no file is run, no token is told, and text from outside stays text."""

import ast
import dataclasses
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fault_server import faults, reply
from tiny_trainers import brightness, prompt_dataset, tiny_config, tiny_trainer
from transformers import TrainerCallback

import trl_dgpo.rewards.http as client_http
from trl_dgpo import DGPOTrainer, load_rollouts
from trl_dgpo.checkpoints import MANIFEST
from trl_dgpo.prompts.files import read_prompts
from trl_dgpo.report import write_report
from trl_dgpo.rewards.chat import ChatJudge
from trl_dgpo.rewards.model import read_checkpoint
from trl_dgpo.rewards.remote import RemoteReward


REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("trl_dgpo", "examples", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
)


# -- no file that is loaded is run ------------------------------------------------------------------------------------

_RUN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "eval", "exec", "compile", "os.system"),
    *("os.popen", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "__import__"),
}


def dangers(source: str) -> list[str]:
    """Calls in a source that would run what a file or a name says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name in _RUN:
            found.append(name)
        if name in ("torch.load", "load") and name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name.endswith(("np.load", "numpy.load")) and options.get("allow_pickle", "False") != "False":
            found.append("numpy.load with allow_pickle")
        found += [option for option in ("trust_remote_code", "shell") if options.get(option, "False") != "False"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_source_runs_what_it_reads(path):
    source = path.read_text(encoding="utf-8")
    assert not dangers(source)
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not imported & {"dill", "joblib", "cloudpickle", "shelve", "marshal"}


@pytest.mark.parametrize(
    "planted",
    [
        "pickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_search_sees_a_planted_danger(planted):
    assert dangers(planted)


class Trap:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_trap_works(tmp_path):
    torch.save({"state": Trap(tmp_path / "run")}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "run").is_dir()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint in the middle of a round, with all the files that there can be."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, **MIDDLE, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


MIDDLE = {"updates_per_round": 2, "prompts_per_round": 2, "num_generations": 2, "num_train_timesteps": 1}
FILES = {  # name, and whether the run goes on without it or what is in it
    "optimizer.pt": False,
    "scheduler.pt": False,
    "rng_state.pth": False,
    "rollout_0_of_1.pt": False,
    "training_args.bin": True,
    "adapter_model.safetensors": False,
    "ema/adapter_model.safetensors": False,
    "pytorch_lora_weights.safetensors": True,
    "adapter_model.bin": True,
    "trainer_state.json": False,
}


@pytest.mark.parametrize(("name", "is_unread"), FILES.items())
def test_a_trap_in_a_checkpoint_is_not_run(checkpoint, tmp_path, name, is_unread):
    trapped, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "mark"
    shutil.copytree(checkpoint, trapped)
    assert (trapped / name).is_file() or name == "adapter_model.bin"
    torch.save({"state": Trap(mark), "param_groups": Trap(mark)}, trapped / name)
    (trapped / MANIFEST).unlink()  # with it the file is refused unread, and a stranger's checkpoint need not have one
    trainer = tiny_trainer(tmp_path / "run", **{**MIDDLE, "max_steps": 2})
    if is_unread:
        trainer.train(resume_from_checkpoint=str(trapped))
        assert trainer.state.global_step == 2
    else:
        with pytest.raises(Exception) as error:  # of pickle, safetensors or json
            trainer.train(resume_from_checkpoint=str(trapped))
        assert not isinstance(error.value, AssertionError)
        assert "is damaged" not in str(error.value)  # it was read
    assert not mark.exists()


def test_every_file_of_a_checkpoint_has_its_trap(checkpoint):
    binary = {".pt", ".pth", ".bin", ".safetensors", ".pkl"}
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.suffix in binary}
    assert {name for name in there if not name.startswith("ema/pytorch")} <= FILES.keys()


def test_a_trap_in_an_adapter_a_reward_or_a_data_set_is_not_run(checkpoint, tmp_path):
    mark = tmp_path / "mark"
    adapter = tmp_path / "adapter"
    shutil.copytree(checkpoint, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Trap(mark)}, adapter / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):  # PEFT's older format, which is pickled
        tiny_trainer(tmp_path / "run", model=adapter)
    torch.save({"weight": Trap(mark)}, tmp_path / "reward.pt")
    with pytest.raises(ValueError, match="tensors"):
        read_checkpoint(str(tmp_path / "reward.pt"), "reward.pt")
    for name in ("prompts.json", "prompts.jsonl", "prompts.csv", "prompts.parquet"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(mark)))
        with pytest.raises(Exception) as error:  # of `datasets` and Arrow
            list(read_prompts(tmp_path / name))
        assert not isinstance(error.value, AssertionError)
    for name in ("rollouts.parquet", "state.json"):
        folder = tmp_path / f"folder of {name}"
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
        (folder / "run.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")  # an old loading script
        with pytest.raises(Exception) as error:
            load_rollouts(folder)
    assert not mark.exists()


# -- no token is told -------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheEnvironment1",
    "WANDB_API_KEY": "wandbPlanted0123456789abcdef0123456789abc",
    "JUDGE_KEY": "sk-planted-key-of-a-judge-0123456789",
}
HUB_TOKEN = "hf_PlantedTokenOfAConfiguration2"
LOADING_TOKEN = "plantedTokenOfLoadingAModel3"
ALL = (*SECRETS.values(), HUB_TOKEN, LOADING_TOKEN)


def told(text: str | bytes) -> list[str]:
    text = text.encode() if isinstance(text, str) else text
    return [secret for secret in ALL if secret.encode() in text]


class KeepsTheConfiguration(TrainerCallback):
    """What a tracker is given of a configuration."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.told = json.dumps(args.to_dict(), default=str) + args.to_json_string() + str(args.to_sanitized_dict())


def test_no_token_is_told(tmp_path, monkeypatch, caplog, capfd):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(client_http, "_BACKOFF", 0.01)
    caplog.set_level(logging.DEBUG)
    shown = []
    bearer = f"bad key: {SECRETS['JUDGE_KEY']}".encode()
    with faults(reply(bearer, 503), reply(bearer, 400)) as server:
        judge = ChatJudge(server.url, "judge", "Is it {prompt}?", api_key_env="JUDGE_KEY", retries=1)
        keeps = KeepsTheConfiguration()
        trainer = tiny_trainer(
            tmp_path / "run",
            reward_funcs=[brightness, judge],
            reward_weights=[1.0, 0.0],
            callbacks=[keeps],
            train_dataset=prompt_dataset("a"),
            eval_dataset=prompt_dataset("b"),
            eval_reward_funcs=brightness,
            hub_token=HUB_TOKEN,
            num_log_images=1,
            log_completions=True,
            save_strategy="steps",
            save_steps=1,
            prompts_per_round=2,
            num_generations=2,
        )
        trainer.args.model_init_kwargs = {"token": LOADING_TOKEN, "revision": "main"}
        with pytest.raises(RuntimeError) as error:  # the judge fails for every image
            trainer.train()
        shown += [str(error.value), repr(error.value.__cause__)]
        trainer.scorer.funcs[:] = trainer.scorer.funcs[:1] * 2
        trainer.train()
        shown += [keeps.told, json.dumps(trainer.describe(), default=str), repr(judge), repr(vars(judge))]
    trainer.save_model()
    trainer.create_model_card()
    write_report(tmp_path / "run")
    shown += [repr(trainer.args), str(trainer.args), f"{trainer.args!r}", caplog.text, *capfd.readouterr()]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "log.jsonl", "README.md", "report.html", "training_args.bin", "trainer_state.json"} <= names
    assert {str(path): told(path.read_bytes()) for path in files if told(path.read_bytes())} == {}
    assert [told(text) for text in shown if told(text)] == []


@pytest.mark.parametrize("trainer_class", [DGPOTrainer, *DGPOTrainer.__subclasses__()])
def test_a_configuration_is_shown_without_its_tokens(tmp_path, trainer_class):
    config = tiny_config(
        tmp_path,
        trainer_class._config_class,
        hub_token=HUB_TOKEN,
        model_init_kwargs={"token": LOADING_TOKEN, "revision": "main"},
        num_generations=trainer_class._config_class.num_generations,
    )
    for text in (repr(config), str(config), json.dumps(config.to_dict(), default=str)):
        assert not told(text)
        assert "'revision'" in text or '"revision"' in text
    assert dataclasses.replace(config).hub_token == config.hub_token == HUB_TOKEN
    assert config.model_init_kwargs["token"] == LOADING_TOKEN


def test_a_refused_model_is_told_without_its_token(tmp_path):
    with pytest.raises(ValueError, match=r"`model_init_kwargs` \(\['revision', 'token'\]\)") as error:
        tiny_trainer(tmp_path, model_init_kwargs={"token": LOADING_TOKEN, "revision": "main"})
    assert not told(str(error.value))


@pytest.mark.parametrize(
    "url", ["http://user:{}@127.0.0.1:1", "http://127.0.0.1:1/?key={}", "http://127.0.0.1:1/#{}", "ftp://{}@x", "{}"]
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    url = url.format(SECRETS["JUDGE_KEY"])
    for make in (lambda: RemoteReward(url), lambda: ChatJudge(url, "judge", "?")):
        with pytest.raises(ValueError, match="`url`") as error:
            make()
        assert not told(str(error.value))
