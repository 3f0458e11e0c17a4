"""
What of TRL, transformers and PEFT is used though it is private or a convention: a new release that breaks it fails
here, and says where.
"""

import inspect
import json
import logging

import pytest
import torch
import trl.trainer.base_trainer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tiny_models import tiny_random_pipeline
from tiny_trainers import tiny_trainer, weights
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, get_peft_config
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from trl_dgpo import DGPOConfig, DGPOTrainer, GPOTrainer
from trl_dgpo.callbacks import RewardProgressCallback


OVERRIDDEN = (
    "get_train_dataloader",
    "train",
    "compute_loss",
    "training_step",
    "_get_grad_norm",
    "_maybe_log_save_evaluate",
    "evaluate",
    "log",
    "_send_telemetry",
    "_build_accelerator_args",
    "_save",
    "_save_rng_state",
    "_save_checkpoint",
    "_push_from_checkpoint",
    "push_to_hub",
    "create_model_card",
    "_get_output_dir",
    "_load_from_checkpoint",
    "_load_best_model",
)


def test_bases():
    assert issubclass(_BaseTrainer, Trainer)
    assert issubclass(_BaseConfig, TrainingArguments)
    assert issubclass(DGPOTrainer, _BaseTrainer)
    assert issubclass(DGPOConfig, _BaseConfig)
    assert {"_tag_names", "_name", "_paper"} <= vars(_BaseTrainer).keys()
    assert hasattr(Trainer, "loss_is_scaled_for_ga")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_exist_and_take_what_they_are_given(name):
    theirs = inspect.signature(getattr(_BaseTrainer, name)).parameters
    ours = inspect.signature(getattr(DGPOTrainer, name)).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
    assert takes_any or theirs.keys() <= ours.keys()


def test_our_own_names_hide_none_of_theirs():
    mro = DGPOTrainer.__mro__
    ours = {n for base in mro[: mro.index(_BaseTrainer)] for n in vars(base) if not n.startswith("__")}
    theirs = {name for base in _BaseTrainer.__mro__[:-1] for name in vars(base)}
    conventions = {"_tag_names", "_name", "_paper", "loss_is_scaled_for_ga"}
    assert ours & theirs == {*OVERRIDDEN, *conventions}


def test_attributes_hide_none_of_theirs(tmp_path):
    """What `Trainer.__init__` sets must not be what we set before it."""
    model = torch.nn.Linear(1, 1)
    plain = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    ours = {"scorer", "eval_scorer", "sampler", "backbone", "policy", "buffer", "trackers", "base_model"}
    ours |= {"_staging", "_saved_step", "_signals", "_guard", "_step_loss", "_skips_step"}
    ours |= {"_latent_shape", "_levels", "_work", "_failures", "_metrics", "_stopwatch", "_group_index"}
    assert ours <= vars(tiny_trainer(tmp_path)).keys()
    assert not ours & (vars(plain).keys() | set(dir(Trainer)))


def test_averages_move_before_the_step_is_counted(tmp_path):
    """`on_optimizer_step` comes after the weights moved and before `global_step` does: steps are numbered from 0."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(("before", state.global_step))

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(("after", state.global_step))

    trainer = tiny_trainer(tmp_path, max_steps=2, callbacks=[Watch()])
    trainer.train()
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert trainer.accelerator.optimizer_step_was_skipped is False


def test_the_loss_is_divided_by_the_accumulation_steps(tmp_path):
    trainer = tiny_trainer(tmp_path)
    losses, compute_loss = [], trainer.compute_loss

    def watch(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = watch
    trainer.train()
    assert len(losses) == trainer.args.gradient_accumulation_steps == 8
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(losses).mean().item())


def test_peft_layers_switch_by_two_flags():
    assert {"_disable_adapters", "_active_adapter"} <= vars(BaseTunerLayer).keys()
    assert {"disable_adapters", "active_adapter"} <= {*dir(AuxiliaryTrainingWrapper), *dir(BaseTunerLayer)}


def test_checkpoints_are_told_by_their_name(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / f"{PREFIX_CHECKPOINT_DIR}-1" / "ema").is_dir()


@pytest.mark.parametrize("trainer_class", [DGPOTrainer, GPOTrainer])
def test_construction_and_training_outside_of_ci(tmp_path, trainer_class, monkeypatch, caplog, recwarn):
    """TRL's telemetry, off where `CI` is set, would ask a diffusers model for what it has not. And nothing is sent."""

    def refuse(*args, **kwargs):
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, trainer_class, gradient_checkpointing=True)  # TRL's default
        trainer.train()
    assert trainer.args.activation_checkpointing
    assert trainer.backbone.denoiser.is_gradient_checkpointing
    assert not caplog.records
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_progress_bar_takes_the_place_of_trainers(tmp_path):
    trainer = tiny_trainer(tmp_path, disable_tqdm=False)
    bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(bar) for bar in bars] == [RewardProgressCallback]


def test_loggers_can_read_the_models_configuration(tmp_path):
    config = tiny_trainer(tmp_path).model.config
    assert json.loads(config.to_json_string())["num_layers"] == 2
    assert config.to_dict()["patch_size"] == 2


def test_trls_own_peft_config_is_taken(tmp_path):
    peft_config = get_peft_config(ModelConfig(use_peft=True, lora_r=2))
    assert peft_config.task_type == "CAUSAL_LM"
    trainer = tiny_trainer(tmp_path, peft_config=peft_config)
    assert peft_config.task_type == "CAUSAL_LM"  # the caller's is left alone
    assert any(name.endswith("attn.to_q.lora_A.default.weight") for name in weights(trainer))
    trainer.train()


def test_a_model_given_as_a_path_is_named_in_what_is_saved(tmp_path):
    folder = tmp_path / "model"
    tiny_random_pipeline(third_text_encoder=True).save_pretrained(folder)
    trainer = tiny_trainer(tmp_path / "output", model=folder)
    trainer.save_model()
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
