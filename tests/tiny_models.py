"""
Random, very small Stable Diffusion 3 pipelines, built in memory in a fraction of a second: no network, no files.

Images are 32 x 32 or 32 x 64 pixels (latents 4 x 8 x 8 or 4 x 8 x 16). Weights are drawn large enough for prompts,
levels and positions to matter in the output; nothing can be learned from the pictures.
"""

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


TEXT_LENGTH = 16  # tokens of the CLIP encoders
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def tiny_random_pipeline(
    seed: int = 0, third_text_encoder: bool = False, sd35: bool = False
) -> StableDiffusion3Pipeline:
    """
    Pipeline with random weights, the same for the same arguments; torch's global generator is left as it was.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of all weights.
        third_text_encoder (`bool`, *optional*, defaults to `False`):
            Whether there is a T5.
        sd35 (`bool`, *optional*, defaults to `False`):
            Whether the transformer has what SD3.5-Medium added: a second attention in the first block and RMS norm of
            queries and keys.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(sd35),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder() if third_text_encoder else None,
            tokenizer_3=t5_tokenizer() if third_text_encoder else None,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(sd35: bool) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,) if sd35 else (),
        qk_norm="rms_norm" if sd35 else None,
    )
    return transformer.eval()


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=0,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return vae.eval()


def clip_encoder(model_class: type[CLIPTextModel] = CLIPTextModelWithProjection) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=2 * len(CHARACTERS) + 2,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=TEXT_LENGTH,
        initializer_factor=6.0,  # at 1.0 all prompts look alike
        bos_token_id=2 * len(CHARACTERS),
        eos_token_id=2 * len(CHARACTERS) + 1,
        pad_token_id=2 * len(CHARACTERS) + 1,
    )
    return model_class(config).eval()


def clip_tokenizer() -> CLIPTokenizer:
    tokens = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=TEXT_LENGTH)


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=len(CHARACTERS) + 4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(c, -3.0) for c in CHARACTERS], extra_ids=0)
