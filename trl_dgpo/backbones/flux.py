"""FLUX.1 (dev and schnell): the only file that knows this family."""

import functools
import logging
import math
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline, SchedulerMixin
from torch import Tensor, nn

from .flow import JOINT_ATTENTION, SHIFTS, FlowBackbone


PATCH = 2

logger = logging.getLogger(__name__)


class FluxBackbone(FlowBackbone):
    r"""
    Encode, sample, decode and predict with one `FluxPipeline`; see [`~trl_dgpo.backbones.base.Backbone`].

    Latents are pictures `(B, C, h, w)` here and are packed into tokens only where the transformer is called. In dev
    guidance is distilled into the weights: the strength that it is told, `embedded_guidance` here and `guidance_scale`
    in the pipeline, is a part of the condition, in rollouts, training and evaluation alike. `guidance_scale` is
    guidance by a negative prompt, which the pipeline calls `true_cfg_scale` and which neither needs: set it to 1.

    The levels of dev depend on `image_size`.
    """

    PIPELINE = "FluxPipeline"
    ENCODERS = ("text_encoder", "text_encoder_2")
    TOKENIZERS = ("tokenizer", "tokenizer_2")
    CONDITIONING = ("encoder_hidden_states", "pooled_projections")
    # Of the double blocks, and the queries, keys and values of the single ones.
    LORA_TARGETS = JOINT_ATTENTION

    _warned = False  # of guidance that is hardly meant

    @staticmethod
    def _embeds_guidance(pipeline: DiffusionPipeline) -> bool:
        return pipeline.transformer.config.guidance_embeds

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the latent of an image; see [`~trl_dgpo.backbones.base.Backbone.latent_shape`]."""
        scale = self.pipeline.vae_scale_factor
        self._check_size(height, width, PATCH * scale)
        return self.denoiser.config.in_channels // PATCH**2, height // scale, width // scale

    def pipeline_call(self, guidance_scale: float) -> dict[str, Any]:
        """A plain pipeline's arguments; see [`~trl_dgpo.backbones.base.Backbone.pipeline_call`]."""
        arguments: dict[str, Any] = {"max_sequence_length": self.max_sequence_length}
        if self._embeds_guidance(self.pipeline):
            arguments["guidance_scale"] = self.embedded_guidance
        if guidance_scale > 1:  # without a negative prompt, be it an empty one, the pipeline does not guide
            arguments |= {"true_cfg_scale": guidance_scale, "negative_prompt": self.negative_prompt}
        return arguments

    def _walk(self, sampler: str, sigmas: str, image_size: tuple[int, int] | None) -> tuple[float, SchedulerMixin]:
        shift_factor, scheduler = super()._walk(sampler, sigmas, image_size)
        if sigmas == "dpm":  # the pipeline always tells the scheduler a shift, which it works out from these
            own, fixed = self.pipeline.scheduler.config, math.log(shift_factor)
            dynamic = own.get("use_dynamic_shifting")
            ends = {name: own.get(name, default) if dynamic else fixed for name, default in SHIFTS.items()}
            scheduler.register_to_config(use_dynamic_shifting=True, **ends)
        return shift_factor, scheduler

    def _guided(self, conditioning: dict[str, Tensor], num_latents: int, guidance_scale: float) -> dict[str, Tensor]:
        if guidance_scale > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "`guidance_scale` is %g: with FLUX.1 that is guidance by a negative prompt, at twice the cost, on top "
                "of what these weights were distilled from. Set `sample_guidance_scale=1.0` if it is not meant.",
                guidance_scale,
            )
        return super()._guided(conditioning, num_latents, guidance_scale)

    def _steps(self, num_steps: int) -> dict[str, Any]:
        steps = super()._steps(num_steps)
        if not self.scheduler.config.get("use_flow_sigmas"):  # its own grid, as the pipeline asks for it
            steps["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        return steps

    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        hidden_states, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return dict(zip(self.CONDITIONING, (hidden_states[0], pooled[0]), strict=True))

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        hidden_states, pooled = (conditioning[name] for name in self.CONDITIONING)
        rows, (channels, height, width) = len(x_t), x_t.shape[1:]
        guidance = None
        if self._embeds_guidance(self.pipeline):
            guidance = torch.full((rows,), self.embedded_guidance, dtype=torch.float32, device=x_t.device)
        packed = self.pipeline._pack_latents(x_t, rows, channels, height, width)
        positions = self._positions(height // PATCH, width // PATCH, x_t.device, hidden_states.dtype)
        velocity = model(
            hidden_states=packed,
            timestep=timestep.to(x_t.dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=hidden_states,
            txt_ids=hidden_states.new_zeros(hidden_states.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        scale = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(velocity, height * scale, width * scale, scale)

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def _positions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return FluxPipeline._prepare_latent_image_ids(1, height, width, device, dtype)  # built on the host: once
