"""
Seconds a phase and peak memory of DGPO at the size of Stable Diffusion 3.5 Medium, with random weights.

    python benchmarks/sd35_random_weights.py                                             # a GPU, bf16, 512 px, G = 16
    python benchmarks/sd35_random_weights.py --num_layers 2 --resolution 64 --num_generations 2 --steps 1   # a CPU

Transformer and autoencoder have the published configuration. The text encoders are stand-ins of one layer and the
right widths, so that encoding, and their memory, are not part of the figures.
"""

import argparse
import string

import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from trl_dgpo import DGPOConfig, DGPOTrainer


PHASES = ("time/rollout", "time/reward", "time/reference", "time/update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--prompts_per_round", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = DGPOTrainer(
        model=build_pipeline(arguments.num_layers, "cuda" if on_gpu else "cpu", dtype),
        reward_funcs=redness,
        args=DGPOConfig(
            output_dir="outputs/sd35-random",
            resolution=arguments.resolution,
            num_generations=arguments.num_generations,
            prompts_per_round=arguments.prompts_per_round,
            max_steps=arguments.steps,
            save_strategy="no",
            report_to="none",
            ema_every=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a lighthouse", "a lemon tree"]}),
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()

    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, torch {torch.__version__}, {dtype}, {vars(arguments)}")
    rounds = [entry for entry in trainer.state.log_history if "time/rollout" in entry]
    for phase in PHASES:  # the first round warms up
        seconds = [entry[phase] for entry in rounds[1:] or rounds]
        print(f"{phase:<16} {sum(seconds) / len(seconds):8.2f} s")
    if on_gpu:
        print(f"{'peak memory':<16} {torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB")


def redness(images, **kwargs):
    """A reward that costs next to nothing."""
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


def build_pipeline(num_layers: int, device: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=num_layers,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(min(13, num_layers))),
            qk_norm="rms_norm",
        ).to(dtype)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=build_text_encoder(768, len(tokenizer)).to(dtype),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(1280, len(tokenizer)).to(dtype),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_text_encoder(width: int, vocab_size: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModelWithProjection(config).eval()


def build_tokenizer() -> CLIPTokenizer:
    characters = string.ascii_lowercase
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


if __name__ == "__main__":
    main()
