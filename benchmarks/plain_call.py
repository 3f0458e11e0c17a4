"""
OCR accuracy of a saved LoRA in plain diffusers: the README's call, nothing of the trainer.

    python benchmarks/plain_call.py outputs/ocr-tiny-dgpo
    python benchmarks/plain_call.py --guidance_scale 3        # the bundled model, without a LoRA, with guidance
"""

import argparse

import torch
from diffusers import StableDiffusion3Pipeline

from trl_dgpo.evaluation import evaluation_latents
from trl_dgpo.prompts import tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward
from trl_dgpo.tiny import tiny_pipeline_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("lora", nargs="?", help="folder that the example saved to")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_prompts", type=int, default=256)
    arguments = parser.parse_args()

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    if arguments.lora:
        pipe.load_lora_weights(arguments.lora)
    pipe.set_progress_bar_config(disable=True)
    rows = tiny_ocr_prompts("test", arguments.num_prompts)
    prompts, texts = [row["prompt"] for row in rows], [row["text"] for row in rows]
    latents = evaluation_latents(prompts, 1, (pipe.transformer.config.in_channels, 8, 16))
    images = []
    for start in range(0, len(prompts), 32):
        images += pipe(
            prompts[start : start + 32],
            latents=latents[start : start + 32],
            num_inference_steps=10,
            guidance_scale=arguments.guidance_scale,
            height=32,
            width=64,
        ).images
    scores = torch.tensor(OCRReward(recognition_only=True)(prompts, images, text=texts))
    error = scores.std() / len(scores) ** 0.5
    print(f"OCR accuracy {scores.mean():.3f}, standard error {error:.3f}, {len(scores)} images")


if __name__ == "__main__":
    main()
