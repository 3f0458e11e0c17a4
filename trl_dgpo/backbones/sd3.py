r"""
Stable Diffusion 3 and 3.5: the only file that knows this family.

Conventions: latents are in the transformer's space (scaled and shifted); `sigma` in [0, 1] is the noise level, 1 is
noise; `timestep` = 1000 `sigma` exists only where the transformer is called; the transformer predicts the velocity \\(
\epsilon - x_0 \\) ([2403.03206](https://huggingface.co/papers/2403.03206)). A conditioning is a dict of tensors with
one row a prompt or a latent, named as the transformer names them. Moving modules and autocast are the caller's
business.
"""

import copy
import functools
import os
from collections.abc import Callable

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from .. import noising


SAMPLERS = ("dpm", "euler", "sde")
SIGMAS = ("dpm", "model")
ENCODE_CACHE_SIZE = 512  # prompts kept in host memory: 1.7 MB each for SD3.5 with T5 in bfloat16


class SD3Backbone:
    r"""
    Encode, sample, decode and predict with one `StableDiffusion3Pipeline`.

    `sample` and `decode` give the bits of the pipeline's own call for the same embeddings, latents and scheduler;
    `scheduler` is the one to put into a plain pipeline for that (`pipe.scheduler = backbone.scheduler`).

    Args:
        pipeline (`diffusers.StableDiffusion3Pipeline`):
            SD3, SD3.5-Medium or -Large, with or without the third text encoder. It is used in place; VAE and text
            encoders are frozen, what is trained of the transformer is not decided here.
        sampler (`str`, *optional*, defaults to `"dpm"`):
            `"dpm"`: second-order multistep DPM-Solver++ ([2211.01095](https://huggingface.co/papers/2211.01095)), the
            rollouts of DGPO ([2510.08425](https://huggingface.co/papers/2510.08425)). `"euler"`: Euler's method on the
            same ODE. `"sde"`: the stochastic steps of Flow-GRPO
            ([2505.05470](https://huggingface.co/papers/2505.05470)).
        sigmas (`str`, *optional*, defaults to `"dpm"`):
            The grid of levels. `"dpm"`: the DPM-Solver scheduler's flow sigmas, the authors' grid, whole timesteps.
            `"model"`: that of the pipeline's own scheduler, which only `"euler"` and `"sde"` can walk.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            Tokens of the third text encoder. Without this encoder diffusers puts as many zero rows in its place, so
            the number counts there too.
        negative_prompt (`str`, *optional*, defaults to `""`):
            The prompt that guidance leads away from.

    Raises:
        `ValueError`: for an unknown `sampler` or `sigmas` or a pair of them that does not go together, and for a
            pipeline whose scheduler has no fixed shift.
    """

    # The attention over image and text of every block. The image-only second attention of SD3.5-Medium (`attn2`) is
    # left alone, as in the authors' code.
    LORA_TARGETS = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        sampler: str = "dpm",
        sigmas: str = "dpm",
        max_sequence_length: int = 128,
        negative_prompt: str = "",
    ):
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` is {sampler!r}; it must be one of {', '.join(map(repr, SAMPLERS))}.")
        if sigmas not in SIGMAS:
            raise ValueError(f"`sigmas` is {sigmas!r}; it must be one of {', '.join(map(repr, SIGMAS))}.")
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.sampler = sampler
        self.max_sequence_length = max_sequence_length
        self.negative_prompt = negative_prompt
        self.shift_factor = _shift_factor(pipeline.scheduler)
        self.scheduler = _scheduler(pipeline.scheduler, sampler, sigmas, self.shift_factor)
        for module in (self.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval()
        # a cache of this object's own, by prompt
        self._encode_one = functools.lru_cache(maxsize=ENCODE_CACHE_SIZE)(self._encode_one)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """
        Conditioning of prompts, one row each.

        Every distinct prompt goes through the text encoders once, alone and outside autocast, and is then kept on the
        host: its row has the same bits whatever the order and the company of prompts. The encoders run where they are,
        which need not be the transformer's device.

        Args:
            prompts (`list[str]`):
                P prompts, repetitions allowed.

        Returns:
            `dict[str, torch.Tensor]`: `encoder_hidden_states` of shape `(P, L, D)` and `pooled_projections` of shape
            `(P, E)`, on the backbone's device and in the text encoders' dtype.
        """
        rows = {prompt: self._encode_one(prompt) for prompt in dict.fromkeys(prompts)}
        return {
            name: torch.cat([rows[prompt][name] for prompt in prompts]).to(self.device)
            for name in ("encoder_hidden_states", "pooled_projections")
        }

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """
        Shape `(C, h, w)` of the latent of an image.

        Args:
            height (`int`):
                Image height in pixels.
            width (`int`):
                Image width in pixels.

        Raises:
            `ValueError`: if a side is no whole number of patches or has more of them than the model has positions.
        """
        config = self.transformer.config
        scale = self.pipeline.vae_scale_factor
        patch = scale * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < patch or size % patch or size > patch * config.pos_embed_max_size:
                raise ValueError(
                    f"`{name}` is {size}; this model takes multiples of {patch} from {patch} to "
                    f"{patch * config.pos_embed_max_size} pixels."
                )
        return config.in_channels, height // scale, width // scale

    def sigmas(self, num_steps: int) -> Tensor:
        """
        Noise levels at which a rollout of `num_steps` steps calls the transformer, noisiest first.

        They are what the transformer is told, timestep / 1000, in float64 so that whole timesteps come back exactly:
        on DPM-Solver's grid the timesteps are cut to integers, so its first level is 0.999, not the 0.99967 it steps
        from.

        Returns:
            `torch.Tensor` of shape `(num_steps,)`, float64, on the CPU.
        """
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler.timesteps.double() / 1000

    @torch.no_grad()
    def sample(
        self,
        latents: Tensor,
        conditioning: dict[str, Tensor],
        *,
        num_steps: int,
        guidance_scale: float,
        step_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """
        Clean latents from noise, without gradient and with the transformer in evaluation mode.

        Costs one forward of the transformer a step, of twice the batch (negative, then positive) where
        `guidance_scale` is above 1. Latents are kept in the conditioning's dtype, as the pipeline does.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Standard normal noise.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.
            num_steps (`int`):
                Steps of the sampler.
            guidance_scale (`float`):
                Classifier-free guidance ([2207.12598](https://huggingface.co/papers/2207.12598)); at most 1 is
                without.
            step_noise (`Callable[[int], torch.Tensor]`, *optional*):
                For the `"sde"` sampler alone: standard normal noise of shape `(B, C, h, w)` for step i, asked for all
                steps but the last. Without it that sampler walks its noise-free ODE, by Euler on the same levels.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`.

        Raises:
            `ValueError`: if `step_noise` is given in vain, or the conditioning's rows do not match.
        """
        if step_noise is not None and self.sampler != "sde":
            raise ValueError(
                f"`step_noise` is given and `sampler` is {self.sampler!r}, which draws nothing; only 'sde' takes it."
            )
        scheduler = copy.deepcopy(self.scheduler)  # it counts steps and keeps predictions: a fresh one for each call
        scheduler.set_timesteps(num_steps, device=self.device)
        # The start is pure noise, level 1, also where the grid says 0.99967: there the SDE's 1 / (1 - sigma) explodes.
        levels = [1.0, *scheduler.sigmas.tolist()[1:]]
        latents = latents.to(self.device, conditioning["encoder_hidden_states"].dtype)
        conditioning = self._guided(conditioning, len(latents), guidance_scale)

        was_training = self.transformer.training
        self.transformer.eval()
        try:
            for i, timestep in enumerate(scheduler.timesteps):
                velocity = self._velocity(
                    self.transformer, latents, timestep.expand(len(latents)), conditioning, guidance_scale
                )
                if step_noise is not None:
                    latents = _sde_step(latents, velocity, levels, i, step_noise)
                else:
                    latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        finally:
            self.transformer.train(was_training)
        return latents

    @torch.no_grad()
    def decode(self, x0: Tensor, *, slice_size: int | None = None) -> Tensor:
        """
        Images of clean latents: those of the pipeline's PIL output to the bit.

        Runs in the VAE's own dtype and outside autocast, since SD3's VAE loses quality in half precision.

        Args:
            x0 (`torch.Tensor` of shape `(B, C, h, w)`):
                Clean latents.
            slice_size (`int`, *optional*):
                Latents decoded at a time, a matter of memory: as many as make two megapixels if not given, 8 images of
                512 x 512. Kernels may round differently for another batch size.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, uint8, on the VAE's device.
        """
        if slice_size is None:
            slice_size = max(1, 2**21 // (x0[0, 0].numel() * self.pipeline.vae_scale_factor**2))
        processor = self.pipeline.image_processor
        images = []
        with torch.autocast(self.vae.device.type, enabled=False):
            for latents in x0.to(self.vae.device, self.vae.dtype).split(slice_size):
                latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
                image = processor.postprocess(self.vae.decode(latents, return_dict=False)[0], output_type="pt")
                images.append((image.float() * 255).round().to(torch.uint8))
        return torch.cat(images)

    def predict(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: dict[str, Tensor],
        *,
        model: torch.nn.Module | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """
        Predicted velocity at a noised latent.

        Args:
            x_t (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents; cast to the conditioning's dtype, as the pipeline does.
            sigma (`float` or `torch.Tensor` of shape `(B,)`):
                Noise level in [0, 1], of all latents or of each.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.
            model (`torch.nn.Module`, *optional*):
                What is called in the transformer's place, such as its DDP wrapper.
            guidance_scale (`float`, *optional*, defaults to `1.0`):
                Above 1 the guided velocity, for which the negative prompt is encoded and the batch doubled.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`, in the dtype of the forward.

        Raises:
            `ValueError`: if the conditioning's rows do not match.
        """
        # float64 until it is multiplied: 0.874 * 1000 is not 874 in float32
        timestep = (1000 * torch.as_tensor(sigma, dtype=torch.float64)).float().to(self.device).expand(len(x_t))
        x_t = x_t.to(self.device, conditioning["encoder_hidden_states"].dtype)
        conditioning = self._guided(conditioning, len(x_t), guidance_scale)
        return self._velocity(model or self.transformer, x_t, timestep, conditioning, guidance_scale)

    def noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Noised latent of this family: [`~trl_dgpo.noising.flow_noise`]."""
        return noising.flow_noise(x0, noise, sigma)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What `predict` should give there: [`~trl_dgpo.noising.flow_target`], the same at every level."""
        return noising.flow_target(x0, noise)

    def save_lora(self, directory: str | os.PathLike, state_dict: dict[str, Tensor], metadata: dict) -> None:
        """
        Writes a LoRA as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` reads.

        Args:
            directory (`str` or `os.PathLike`):
                Folder; made if it is not there.
            state_dict (`dict[str, torch.Tensor]`):
                LoRA tensors as `peft.get_peft_model_state_dict` names them.
            metadata (`dict`):
                `LoraConfig.to_dict()`; without it the loader would not know alpha.
        """
        StableDiffusion3Pipeline.save_lora_weights(
            directory,
            transformer_lora_layers={
                name.removeprefix("base_model.model."): tensor.contiguous() for name, tensor in state_dict.items()
            },
            transformer_lora_adapter_metadata=dict(metadata),
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward: diffusers' name, which `Trainer` does not know."""
        self.transformer.enable_gradient_checkpointing()

    def _encode_one(self, prompt: str) -> dict[str, Tensor]:
        device = self.pipeline.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            hidden_states, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"encoder_hidden_states": hidden_states.cpu(), "pooled_projections": pooled.cpu()}

    def _guided(self, conditioning: dict[str, Tensor], num_latents: int, guidance_scale: float) -> dict[str, Tensor]:
        """The conditioning of a forward: doubled, negative rows first, where there is guidance."""
        for name, rows in conditioning.items():
            if len(rows) != num_latents:
                raise ValueError(
                    f"`conditioning` has {len(rows)} rows of {name} for {num_latents} latents; give one each."
                )
        if guidance_scale <= 1:
            return conditioning
        negative = self.encode([self.negative_prompt])
        return {
            name: torch.cat([negative[name].to(rows.dtype).expand_as(rows), rows])
            for name, rows in conditioning.items()
        }

    @staticmethod
    def _velocity(
        model: torch.nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance_scale: float
    ) -> Tensor:
        """One forward; `conditioning` comes from `_guided` with the same `guidance_scale`."""
        copies = 2 if guidance_scale > 1 else 1
        velocity = model(
            hidden_states=torch.cat([x_t] * copies),
            timestep=torch.cat([timestep] * copies),
            **conditioning,
            return_dict=False,
        )[0]
        if guidance_scale <= 1:
            return velocity
        negative, positive = velocity.chunk(2)
        return negative + guidance_scale * (positive - negative)


def _shift_factor(scheduler: SchedulerMixin) -> float:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "The pipeline's scheduler has `use_dynamic_shifting=True`, a shift that depends on the image size; "
            "training needs a fixed one. Replace it: "
            "`pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`."
        )
    shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
    if shift is None:
        raise ValueError(
            f"The pipeline's scheduler is a {type(scheduler).__name__} without a flow shift, so it is not one of flow "
            "matching. Replace it: `pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`."
        )
    return float(shift)


def _scheduler(own: SchedulerMixin, sampler: str, sigmas: str, shift_factor: float) -> SchedulerMixin:
    """The scheduler that walks the grid; for the SDE it gives the grid alone."""
    if sigmas == "model":
        if sampler == "dpm":
            raise ValueError(
                "`sigmas` is 'model' and `sampler` is 'dpm', which has a grid of its own; take `sampler='euler'` or "
                "'sde', or `sigmas='dpm'`."
            )
        if not isinstance(own, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"`sigmas` is 'model' and the pipeline's scheduler is a {type(own).__name__}; only the grid of a "
                "FlowMatchEulerDiscreteScheduler can be walked. Replace the scheduler or take `sigmas='dpm'`."
            )
        return copy.deepcopy(own)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        # of order one DPM-Solver++ is Euler's method here: x + (sigma' - sigma) v
        solver_order=2 if sampler == "dpm" else 1,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift_factor,
        lower_order_final=True,
        euler_at_final=False,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )


def _sde_step(
    latents: Tensor, velocity: Tensor, levels: list[float], i: int, step_noise: Callable[[int], Tensor]
) -> Tensor:
    """Flow-GRPO's step; unlike there the last one is Euler's, since its noise would stay in the image."""
    x_t, v = latents.float(), velocity.float()
    if i == len(levels) - 2:
        x_next = x_t - levels[i] * v
    else:
        z = step_noise(i).to(x_t.device, x_t.dtype)
        x_next, _, _ = noising.flow_sde_step(x_t, v, levels[i], levels[i + 1], z, max_sigma=levels[1])
    return x_next.to(velocity.dtype)
