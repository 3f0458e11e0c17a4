"""Stable Diffusion XL: the only file that knows this family."""

import torch
from torch import Tensor, nn

from .sd15 import SD15Backbone


class SDXLBackbone(SD15Backbone):
    r"""
    Encode, sample, decode and predict with one `StableDiffusionXLPipeline`; see
    [`~trl_dgpo.backbones.ddpm.DDPMBackbone`].

    Its size conditioning (`time_ids`) is that of uncropped images of the size that is drawn, as the pipeline's
    default. An empty negative prompt is rows of zeros where the model was trained so (`force_zeros_for_empty_prompt`),
    as in the pipeline when none is given. There is no watermark.
    """

    PIPELINE = "StableDiffusionXLPipeline"
    ENCODERS = ("text_encoder", "text_encoder_2")
    TOKENIZERS = ("tokenizer", "tokenizer_2")
    CONDITIONING = ("encoder_hidden_states", "text_embeds")

    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        hidden_states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return dict(zip(self.CONDITIONING, (hidden_states[0], pooled[0]), strict=True))

    def _encode_negative(self) -> dict[str, Tensor]:
        rows = super()._encode_negative()
        if not self.negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in rows.items()}
        return rows

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        hidden_states, pooled = (conditioning[name] for name in self.CONDITIONING)
        height, width = (self.pipeline.vae_scale_factor * size for size in x_t.shape[-2:])
        # Original size, upper left corner of the crop, target size.
        sizes = (height, width, 0, 0, height, width)
        time_ids = torch.stack(
            [torch.full((len(x_t),), size, dtype=pooled.dtype, device=x_t.device) for size in sizes], 1
        )
        return model(
            x_t,
            timestep,
            encoder_hidden_states=hidden_states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]

    def _to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def _to_latents(self, encoded: Tensor) -> Tensor:
        mean, std = self._statistics(encoded)
        return (encoded - mean) * self.vae.config.scaling_factor / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation of the VAE's latents, which a few of SDXL's kin have (Playground 2.5)."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return 0.0, 1.0
        return tuple(
            torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
