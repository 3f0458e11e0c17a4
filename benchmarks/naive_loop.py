"""
The same round written the straightforward way, against the trainer's, alternately in one run.

    python benchmarks/naive_loop.py --model mid
    python benchmarks/naive_loop.py --model tiny --pairs 20

The straightforward way, with diffusers, PEFT and torch: every image's prompt is encoded; the adapter's layers are on
while sampling; the old policy's forward is always there; its weights are copied in, and the policy's own out to the
CPU and back, for every micro-batch and level. Both loops compute the same thing in the same dtype: a test has them end
with the same weights.
"""

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from models import MODELS, build_pipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from rounds import ROUND, Rounds, brightness, machine, make_trainer, median, now, prompts_of, spread
from torch import Tensor

from trl_dgpo.seeding import generator


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
NUM_TRAINED_LEVELS = 7  # of ten: those from 0.4 on, before the shift


class NaiveLoop:
    """
    DGPO's round, with a micro-batch of one group.

    Args:
        pipeline (`~diffusers.StableDiffusion3Pipeline`):
            The model; its transformer gets a LoRA.
        settings (`dict`):
            `rounds.ROUND`, and the sizes of `models.MODELS`.
        bf16 (`bool`, *optional*, defaults to `False`):
            Forwards under autocast.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, settings: dict, *, bf16: bool = False):
        self.pipeline, self.settings = pipeline, settings
        self.device = pipeline.transformer.device
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        pipeline.transformer.requires_grad_(False)
        targets = [f"attn.{name}" for name in ATTENTION]
        lora = LoraConfig(r=64, lora_alpha=128, init_lora_weights="gaussian", target_modules=targets)
        self.model = get_peft_model(pipeline.transformer, lora)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.old, self.ema = ([p.detach().cpu().clone() for p in self.trained] for _ in range(2))
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, weight_decay=1e-4)
        self.negative = self.encode([""] * settings["num_generations"])

    def round(self, number: int) -> None:
        """Sample, score and learn: one optimiser step."""
        s = self.settings
        group_size, seed = s["num_generations"], s["seed"]
        prompts = prompts_of(number, s["prompts_per_round"])
        groups = []
        for group, prompt in enumerate(prompts):
            conditioning = self.encode([prompt] * group_size)
            latents = [self.noise("latents", number, group, i) for i in range(group_size)]
            x0 = self.sample(torch.stack(latents), conditioning)
            rewards = torch.tensor(brightness(self.decode(x0)), dtype=torch.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
            groups.append((x0.float(), conditioning, advantages.clamp(-5, 5).float().to(self.device)))
        kept = self.scheduler().timesteps[:NUM_TRAINED_LEVELS].double() / 1000
        order = torch.randperm(len(kept), generator=generator(seed, "levels", number, 0))
        for group, (x0, conditioning, advantages) in enumerate(groups):
            for level, sigma in enumerate(kept[order[: s["num_train_timesteps"]]].tolist()):
                noise = self.noise("noise", number, 0, level, group).to(self.device)
                loss = self.loss(x0, noise, sigma, conditioning, advantages)
                (loss / (len(groups) * s["num_train_timesteps"])).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average(self.old, min(0.3, 0.001 * number))
        if (number + 1) % 8 == 0:
            self.average(self.ema, min((1 + number) / (10 + number), 0.9))

    def loss(self, x0: Tensor, noise: Tensor, sigma: float, conditioning: dict, advantages: Tensor) -> Tensor:
        s = self.settings
        x_t, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        with torch.no_grad():
            self.model.eval()
            with self.model.disable_adapter():
                reference = self.velocity(x_t, 1000 * sigma, conditioning)
            with self.swapped_in(self.old):
                old = self.velocity(x_t, 1000 * sigma, conditioning)
            self.model.train()
        velocity = self.velocity(x_t, 1000 * sigma, conditioning)
        error, reference_error, old_error = (
            (v.float() - target).square().mean((1, 2, 3)) for v in (velocity, reference, old)
        )
        gate = torch.sigmoid(s["beta"] * (advantages * (error.detach() - reference_error)).mean())
        if s["clip_range"]:
            ratio = torch.exp(old_error - error.detach())
            far = torch.where(advantages > 0, ratio > 1 + s["clip_range"], ratio < 1 - s["clip_range"])
            error = torch.where(far, error.detach(), error)
        divergence = (velocity.float() - reference.float()).square().mean()
        return (gate * advantages * error).mean() + s["kl_coef"] * divergence

    def velocity(self, x_t: Tensor, timestep: float, conditioning: dict) -> Tensor:
        timesteps = torch.full((len(x_t),), timestep, device=self.device)
        with self.autocast():
            x_t = x_t.to(conditioning["encoder_hidden_states"].dtype)
            return self.model(hidden_states=x_t, timestep=timesteps, **conditioning, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, latents: Tensor, conditioning: dict) -> Tensor:
        self.model.eval()
        both = {name: torch.cat([self.negative[name], rows]) for name, rows in conditioning.items()}
        latents = latents.to(self.device, both["encoder_hidden_states"].dtype)
        scheduler = self.scheduler()
        for timestep in scheduler.timesteps:
            negative, positive = self.velocity(torch.cat([latents] * 2), timestep.item(), both).chunk(2)
            velocity = negative + self.settings["sample_guidance_scale"] * (positive - negative)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def scheduler(self) -> DPMSolverMultistepScheduler:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.pipeline.scheduler.config.shift
        )
        scheduler.set_timesteps(self.settings["sample_num_steps"])
        return scheduler

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False,
            max_sequence_length=self.settings["max_sequence_length"],
        )  # fmt: skip
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    @torch.no_grad()
    def decode(self, x0: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        latents = x0.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipeline.image_processor.postprocess(vae.decode(latents).sample, output_type="pil")

    @contextmanager
    def swapped_in(self, weights: list[Tensor]) -> Iterator[None]:
        own = [p.detach().cpu().clone() for p in self.trained]
        for p, other in zip(self.trained, weights, strict=True):
            p.data.copy_(other)
        yield
        for p, other in zip(self.trained, own, strict=True):
            p.data.copy_(other)

    def average(self, weights: list[Tensor], decay: float) -> None:
        for mean, p in zip(weights, self.trained, strict=True):
            mean.lerp_(p.detach().cpu(), 1 - decay)

    def noise(self, *name: str | int) -> Tensor:
        """The trainer's own draws, so that both loops do the same round."""
        s, scale = self.settings, self.pipeline.vae_scale_factor
        size = (s["resolution"] // scale, s.get("width", s["resolution"]) // scale)
        shape = (self.pipeline.transformer.config.in_channels, *size)
        return torch.randn(shape, generator=generator(s["seed"], *name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mid")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", help="JSON file to write the figures to")
    arguments = parser.parse_args()

    sizes = {**MODELS[arguments.model].sizes, **({"resolution": arguments.resolution} if arguments.resolution else {})}
    result = {"arguments": vars(arguments), "machine": machine()}
    print(json.dumps(result["machine"]))
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if arguments.bf16 else torch.float32
    for clip_range in (ROUND["clip_range"], None):
        pipeline = build_pipeline(arguments.model, dtype=dtype, device=device)
        other = pipeline_with_own_transformer(pipeline)
        config = {"clip_range": clip_range, **sizes}
        naive = NaiveLoop(other, {**ROUND, **config}, bf16=arguments.bf16)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(pipeline, folder, bf16=arguments.bf16, **config)
            with Rounds(trainer) as rounds:
                pairs = []
                for number in range(1 + arguments.pairs):  # the first warms up
                    seconds, start = rounds.next(), now()
                    naive.round(number)
                    pairs.append((seconds, now() - start))
        name = "clipping" if clip_range else "no clipping"
        result[name] = pairs[1:]
        for loop, seconds in zip(("trainer", "naive loop"), zip(*pairs[1:], strict=True), strict=True):
            print(f"{name}: {loop:<10} {median(seconds):8.2f} s")
        print(f"{name}: naive loop / trainer: {spread(b / a for a, b in pairs[1:])}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


def pipeline_with_own_transformer(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """The same pipeline with a copy of the transformer, which a LoRA can be put into."""
    return StableDiffusion3Pipeline(**{**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)})


if __name__ == "__main__":
    main()
