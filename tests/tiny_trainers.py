"""Trainers on the random tiny pipeline: rounds of seconds, and the ways that tests look into them."""

import gc
import os
import subprocess
import sys

import torch
from datasets import Dataset
from tiny_models import tiny_random_pipeline
from transformers import TrainerCallback

from trl_dgpo import DGPOConfig, DGPOTrainer, GPOTrainer


gc.freeze()  # every `train` collects garbage: a quarter of its time here, without this

CONFIG = {
    "num_generations": 4,
    "prompts_per_round": 4,
    "num_train_timesteps": 2,
    "num_iterations": 1,
    "sample_num_steps": 4,
    "sample_guidance_scale": 1.0,
    "eval_num_steps": 2,
    "resolution": 32,
    "max_sequence_length": 4,
    "old_policy_after": None,
    "clip_range": None,
    "kl_coef": 0.0,
    "ema_every": 1,
    "num_log_images": 0,
    "reward_self_test": False,
    "max_steps": 1,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def brightness(images, **kwargs):
    """A reward that every pixel has a part in."""
    return [sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]


def rewards_by_position(*values):
    """A reward that knows only where an image stands in the round."""

    def by_position(images, **kwargs):
        return list(values)

    return by_position


def prompt_dataset(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def tiny_config(output_dir, config_class=DGPOConfig, **config) -> DGPOConfig:
    return config_class(output_dir=str(output_dir), **{**CONFIG, **config})


def tiny_trainer(
    output_dir,
    trainer_class: type[DGPOTrainer] = DGPOTrainer,
    *,
    model=None,
    reward_funcs=brightness,
    train_dataset=None,
    eval_dataset=None,
    eval_reward_funcs=None,
    callbacks=None,
    peft_config=None,
    **config,
) -> DGPOTrainer | GPOTrainer:
    return trainer_class(
        model=tiny_random_pipeline() if model is None else model,
        reward_funcs=reward_funcs,
        args=tiny_config(output_dir, trainer_class._config_class, **config),
        train_dataset=prompt_dataset("a", "b", "c") if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        eval_reward_funcs=eval_reward_funcs,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def scramble(trainer, view: str | None = None, *, seed: int = 0, scale: float = 0.3) -> None:
    """Moves a view's weights to where errors differ from the base's: a fresh LoRA is no change at all."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trainer.policy.tensors(view).items():
            if "lora_B" in name:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=stream))


def weights(trainer, view: str | None = None) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.policy.tensors(view).items()}


def everything(trainer) -> dict[str, torch.Tensor]:
    """Weights of policy, views and companions, and the optimiser's moments."""
    views = (None, *trainer.policy.views, *trainer.policy.companions)
    state = {f"{view}.{name}": t for view in views for name, t in weights(trainer, view).items()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimiser.{number}.{name}": value for name, value in moments.items()}
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    a, b = (torch.cat([tensors[name].flatten().double() for name in sorted(tensors)]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


class Gradient(TrainerCallback):
    """Keeps the first step's gradient, and calls `also` while the weights are still those that it was taken at."""

    def __init__(self, also=None):
        self.value, self.also = None, also

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.value is None:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.value = {name: p.grad.detach().clone() for name, p in trained.items()}
            if self.also is not None:
                self.also()


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of an optimiser step: after so many micro-steps."""

    def __init__(self, after: int):
        self.left = after

    def on_substep_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def run_in_two_processes(script: str, *arguments) -> str:
    """What a test file does as a script, in two processes of one machine without a GPU; returns what they told."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
