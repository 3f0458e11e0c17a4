"""
Random, very small pipelines of every family, built in memory: no network, no files. SD3's is in `tiny_models`.

Images are 32 x 32 or 32 x 64 pixels; nothing can be learned from the pictures.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_models import CHARACTERS, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_sd15(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=_unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type),
        vae=_vae(scaling_factor=0.18215),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=_unet(
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """As dev, with a shift that grows with the image; without `guidance_embeds` as schnell, with none."""
    shift = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift if guidance_embeds else {"shift": 1.0}),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def tiny_z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_qwen_encoder(),
        tokenizer=_qwen_tokenizer(),
    )


FAMILIES = {
    "sd15": tiny_sd15,
    "sd15-v": lambda: tiny_sd15("v_prediction"),
    "sdxl": tiny_sdxl,
    "flux-dev": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance_embeds=False),
    "z-image": tiny_z_image,
}


def tiny_family(name: str, seed: int = 0) -> DiffusionPipeline:
    """A family's pipeline, with the same weights in every call; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **config,
        }
    ).eval()


def _vae(**config) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=0,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **config,
    ).eval()


def _qwen_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(CHARACTERS) + 4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
    return Qwen3Model(config).eval()


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<unk>", "<user>", " ", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # a token a character
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %} {{ message['content'] }}{% endfor %}"
    return fast
