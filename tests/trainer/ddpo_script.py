"""
A training script as `DDPOTrainer`'s users have it: only the imported names are of today.

    python ddpo_script.py --pretrained_model=path --num_epochs=200 --sample_batch_size=6 --train_batch_size=3
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import HfArgumentParser

from trl_dgpo import DefaultDGPOStableDiffusionPipeline, DGPOConfig, DGPOTrainer


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "Model."})
    pretrained_revision: str = field(default="main", metadata={"help": "Its revision."})
    hf_hub_model_id: str = field(default="me/dgpo-finetuned-stable-diffusion", metadata={"help": "Where it goes."})
    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA."})


class WarmthScorer(torch.nn.Module):
    """How much redder than blue a picture is."""

    def forward(self, images):
        red, _, blue = images.float().mean(dim=(2, 3)).unbind(1)
        return (red - blue) / 255


def warmth_scorer():
    scorer = WarmthScorer().eval()

    def _fn(images, prompts, metadata):
        assert len(prompts) == len(metadata) == len(images)
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        return scorer(images), {}

    return _fn


animals = ["ant", "bear", "crab", "dove", "eel"]


def prompt_fn():
    return np.random.choice(animals), {}


def image_outputs_logger(image_data, global_step, accelerate_logger):
    images, prompts, _, rewards, _ = image_data[-1]
    result = {}
    for i, image in enumerate(images):
        result[f"{i}: {prompts[i]:.25} | {rewards[i].item():.2f}"] = image.unsqueeze(0).float()
    accelerate_logger.log_images(result, step=global_step)


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, DGPOConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDGPOStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
    trainer = DGPOTrainer(
        training_args,
        warmth_scorer(),
        prompt_fn,
        pipeline,
        image_samples_hook=image_outputs_logger,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(script_args.hf_hub_model_id)
