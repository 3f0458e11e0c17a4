"""Stable Diffusion 3 and 3.5: the only file that knows this family."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .flow import JOINT_ATTENTION, FlowBackbone


class SD3Backbone(FlowBackbone):
    r"""
    Encode, sample, decode and predict with one `StableDiffusion3Pipeline`; see [`~trl_dgpo.backbones.base.Backbone`].

    SD3, SD3.5-Medium and -Large, with or without the third text encoder. Without it diffusers puts as many zero rows
    in its place, so `max_sequence_length` counts there too.
    """

    PIPELINE = "StableDiffusion3Pipeline"
    ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
    TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
    CONDITIONING = ("encoder_hidden_states", "pooled_projections")
    # Of every block. The image-only second attention of SD3.5-Medium (`attn2`) is left alone, as in the authors' code.
    LORA_TARGETS = JOINT_ATTENTION

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the latent of an image; see [`~trl_dgpo.backbones.base.Backbone.latent_shape`]."""
        config, scale = self.denoiser.config, self.pipeline.vae_scale_factor
        patch = scale * config.patch_size
        self._check_size(height, width, patch, largest=patch * config.pos_embed_max_size)
        return config.in_channels, height // scale, width // scale

    def pipeline_call(self, guidance_scale: float) -> dict[str, Any]:
        """A plain pipeline's arguments; see [`~trl_dgpo.backbones.base.Backbone.pipeline_call`]."""
        return {**super().pipeline_call(guidance_scale), "max_sequence_length": self.max_sequence_length}

    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        hidden_states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return dict(zip(self.CONDITIONING, (hidden_states[0], pooled[0]), strict=True))

    def _describe_embeds(self) -> list:
        return [self.denoiser.config.joint_attention_dim]  # width of the zeros in place of a third text encoder

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return model(hidden_states=x_t, timestep=timestep, **conditioning, return_dict=False)[0]

    def _blocks(self) -> Iterator[nn.Module]:
        return iter(self.denoiser.transformer_blocks)
