"""Z-Image and Z-Image-Turbo: the only file that knows this family."""

from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from .flow import FlowBackbone


PATCH = 2


class ZImageBackbone(FlowBackbone):
    r"""
    Encode, sample, decode and predict with one `ZImagePipeline`; see [`~trl_dgpo.backbones.base.Backbone`].

    Captions have as many rows as tokens; here they are filled up to `max_sequence_length`, and cut again where the
    transformer is called. It predicts from noise to data, with a time that runs from 0 to 1; both are turned round
    here. The pipeline itself tells its scheduler the levels, which only Euler's takes (`sampler="euler"`,
    `sigmas="model"`). `guidance_scale` is 1 without guidance, as for all families: the pipeline's own is smaller by
    one.
    """

    PIPELINE = "ZImagePipeline"
    ENCODERS = ("text_encoder",)
    TOKENIZERS = ("tokenizer",)
    CONDITIONING = ("encoder_hidden_states", "num_tokens")
    LORA_TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    LATENTS_DTYPE = torch.float32

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the latent of an image; see [`~trl_dgpo.backbones.base.Backbone.latent_shape`]."""
        scale = self.pipeline.vae_scale_factor
        self._check_size(height, width, PATCH * scale)
        return self.denoiser.config.in_channels, height // scale, width // scale

    def pipeline_call(self, guidance_scale: float) -> dict[str, Any]:
        """A plain pipeline's arguments; see [`~trl_dgpo.backbones.base.Backbone.pipeline_call`]."""
        return {
            **super().pipeline_call(guidance_scale),
            "guidance_scale": max(guidance_scale - 1, 0.0),
            "max_sequence_length": self.max_sequence_length,
        }

    def _steps(self, num_steps: int) -> dict[str, Any]:
        return {**super()._steps(num_steps), "sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist()}

    def _walk(self, sampler: str, sigmas: str, image_size: tuple[int, int] | None) -> tuple[float, SchedulerMixin]:
        if sigmas == "dpm":
            raise ValueError(
                f"`sigmas` is 'dpm', and a {self.PIPELINE} tells its scheduler the levels, which DPM-Solver++ "
                "does not take: no plain pipeline could draw what was trained. Take `sampler='euler'` and "
                "`sigmas='model'`."
            )
        return super()._walk(sampler, sigmas, image_size)

    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        [rows], _ = self.pipeline.encode_prompt(
            prompt=[prompt],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        filled = rows.new_zeros(self.max_sequence_length, rows.shape[1])
        filled[: len(rows)] = rows
        return {"encoder_hidden_states": filled, "num_tokens": torch.tensor(len(rows))}

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        hidden_states, lengths = (conditioning[name] for name in self.CONDITIONING)
        captions = [rows[:number] for rows, number in zip(hidden_states, lengths.tolist(), strict=True)]
        frames = list(x_t.to(self.denoiser.dtype).unsqueeze(2).unbind())  # one each
        [predicted] = model(frames, (1000 - timestep) / 1000, captions, return_dict=False)
        return -torch.stack([velocity.float() for velocity in predicted]).squeeze(2)
