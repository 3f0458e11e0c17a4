"""
A small pipeline of SDXL's structure, made in a minute or two on two CPU cores: for `train_sdxl_pickscore.py`.

Tokenizers, text encoders and VAE are those of the bundled tiny SD3; the UNet is new, and learns to draw the signs that
the bundled model learned from. It gets their colours and their inking, not their letters: enough for a preference.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from trl_dgpo.backbones import load_backbone
from trl_dgpo.losses import denoising_error
from trl_dgpo.prompts import tiny_ocr_prompts
from trl_dgpo.tiny import tiny_pipeline_path
from trl_dgpo.tiny.build import CAPTION, draw_sign


def build_tiny_sdxl(folder: Path, *, num_steps: int = 300, num_signs: int = 1024, batch_size: int = 32) -> None:
    """
    Make the pipeline and save it.

    Args:
        folder (`Path`):
            Where to.
        num_steps (`int`, *optional*, defaults to `300`):
            Optimiser steps of the UNet.
        num_signs (`int`, *optional*, defaults to `1024`):
            Pictures that it learns from.
        batch_size (`int`, *optional*, defaults to `32`):
            Pictures of a step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _new_pipeline()
        _teach(pipeline, num_steps, num_signs, batch_size)
    pipeline.save_pretrained(folder)


def _new_pipeline() -> StableDiffusionXLPipeline:
    parts = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    width = parts.text_encoder.config.hidden_size + parts.text_encoder_2.config.hidden_size
    text_encoder = CLIPTextModel(parts.text_encoder.config)  # SDXL's first one is without a projection
    text_encoder.load_state_dict(parts.text_encoder.state_dict(), strict=False)
    size_width = 8
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=parts.vae.config.latent_channels,
        out_channels=parts.vae.config.latent_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + parts.text_encoder_2.config.projection_dim,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=parts.vae,
        text_encoder=text_encoder,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
        add_watermarker=False,
    )


def _teach(pipeline: StableDiffusionXLPipeline, num_steps: int, num_signs: int, batch_size: int) -> None:
    backbone, rng = load_backbone(pipeline, sampler="euler"), random.Random(0)
    texts = [row["text"] for row in tiny_ocr_prompts("train", num_signs)]
    pictures = np.stack([np.asarray(draw_sign(text, rng)) for text in texts])
    latents = backbone.encode_images(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    unet = backbone.denoiser.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    for _ in range(num_steps):
        chosen = torch.randint(num_signs, (batch_size,))
        conditioning = backbone.encode([CAPTION.format(texts[i]) for i in chosen])
        x0, levels = latents[chosen], torch.rand(batch_size)
        noise = torch.randn_like(x0)
        prediction = backbone.predict(backbone.noise(x0, noise, levels), levels, conditioning)
        denoising_error(prediction, backbone.target(x0, noise, levels)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    unet.requires_grad_(False).eval()
