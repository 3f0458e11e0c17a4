"""Stable Diffusion 1.5, and 2.x of the same pipeline: the only file that knows this family."""

from torch import Tensor, nn

from .ddpm import DDPMBackbone


class SD15Backbone(DDPMBackbone):
    r"""
    Encode, sample, decode and predict with one `StableDiffusionPipeline`; see
    [`~trl_dgpo.backbones.ddpm.DDPMBackbone`].

    Its text encoder has a fixed length, so `max_sequence_length` is not read. Pictures are those of the pipeline
    without its safety checker.
    """

    PIPELINE = "StableDiffusionPipeline"
    ENCODERS = ("text_encoder",)
    TOKENIZERS = ("tokenizer",)
    CONDITIONING = ("encoder_hidden_states",)
    LOADING = {"safety_checker": None, "requires_safety_checker": False}
    # Self- and cross-attention of every block.
    LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the latent of an image; see [`~trl_dgpo.backbones.base.Backbone.latent_shape`]."""
        scale = self.pipeline.vae_scale_factor
        self._check_size(height, width, scale)
        return self.denoiser.config.in_channels, height // scale, width // scale

    def _encode_row(self, prompt: str) -> dict[str, Tensor]:
        hidden_states, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden_states[0]}

    def _forward(self, model: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return model(x_t, timestep, **conditioning, return_dict=False)[0]
