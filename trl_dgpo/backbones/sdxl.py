"""Stable Diffusion XL: the only file that knows this family."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

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
            rows = {name: torch.zeros_like(tensor) for name, tensor in rows.items()}
        return rows

    def decode(self, x0: Tensor) -> Tensor:
        """Images of clean latents; see [`~trl_dgpo.backbones.base.Backbone.decode`]."""
        with self._upcast():
            return super().decode(x0)

    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents of images; see [`~trl_dgpo.backbones.base.Backbone.encode_images`]."""
        with self._upcast():
            return super().encode_images(images)

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        hidden_states, pooled = (conditioning[name] for name in self.CONDITIONING)
        height, width = (self.pipeline.vae_scale_factor * size for size in x_t.shape[-2:])
        # Original size, upper left corner of the crop, target size.
        time_ids = self._time_ids((height, width, 0, 0, height, width), pooled.dtype, x_t.device)
        return model(
            x_t,
            timestep,
            encoder_hidden_states=hidden_states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.expand(len(x_t), -1)},
            return_dict=False,
        )[0]

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def _time_ids(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor([sizes], dtype=dtype, device=device)  # once: from the host to the device

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """The VAE in float32 where it overflows in half precision and says so, as the pipeline has it."""
        upcasts = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        try:
            if upcasts:
                self.vae.float()
            yield
        finally:
            if upcasts:
                self.vae.half()
