"""
The pipelines that are measured, with random weights but for the bundled one.

`tiny` is the bundled model. `sd35` has the published configuration of Stable Diffusion 3.5 Medium, but for the text
encoders: they are stand-ins of one layer and the right widths, so that encoding, and the memory of T5-XXL, are not
part of its figures. `mid` has that structure at a size that two CPU cores carry, 103 million parameters of the
transformer: RMS norm of queries and keys, a second attention in the first half of the layers, four to five image
tokens a text token, and all three text encoders.

What one prompt's encoding costs `mid`, as a share of one forward of the transformer for one image, is what it costs
SD3.5-Medium at 512 px, where the count of multiplications and additions is

- transformer: 24 layers of width 1536 with 12 x 1536^2 weights a token of the image (16 x 1536^2 in the 13 layers of
  two attentions) and 12 x 1536^2 a token of the text (3 x 1536^2 in the last layer), for 1024 tokens of the image and
  77 + 128 of the text: 1.91 TFLOP; attention over the 1229 tokens (and over the 1024 again in 13 layers): 0.31 TFLOP;
  2.22 TFLOP in all;
- text encoders: T5-XXL has 4.76 billion parameters, 4.63 billion of them outside its vocabulary, for 128 tokens:
  1.19 TFLOP; CLIP-L 123 million (85 outside) and CLIP-G 695 million (632 outside) for 77 tokens: 0.11 TFLOP; 1.30
  TFLOP in all.

The share is 0.58, 0.53 of it T5's. `mid` takes 3.2 GFLOP for a forward of an image of 96 px (36 + 8 tokens), so its T5
has 207 million parameters for 4 tokens and its CLIP encoders 19 million for 4: 1.8 GFLOP, a share of 0.56.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trl_dgpo.tiny import tiny_pipeline_path


diffusers.logging.set_verbosity_error()  # about weights that were never trained, and prompts of nonsense
diffusers.logging.disable_progress_bar()
transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class Model:
    """
    A pipeline and the size of its images.

    Args:
        build (`Callable`):
            Makes the pipeline, of float32 weights, on torch's default device; the same weights every time. Takes
            `num_layers` where the transformer is drawn.
        sizes (`dict[str, int]`):
            The fields of `DGPOConfig` that say how large images and prompts are.
    """

    build: Callable[..., StableDiffusion3Pipeline]
    sizes: dict[str, int] = field(default_factory=dict)


def build_tiny() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())


def build_mid(num_layers: int = 10) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(length=4)
    return StableDiffusion3Pipeline(
        transformer=sd35_transformer(
            width=512,
            num_layers=num_layers,
            num_dual_layers=num_layers // 2,
            joint_attention_dim=1280,
            pooled_projection_dim=640,
            sample_size=12,
            pos_embed_max_size=48,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=sd35_vae((24, 48, 96, 96), norm_num_groups=8),
        text_encoder=clip_encoder(tokenizer, width=256, num_layers=3),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, width=384, num_layers=9),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder(width=1280, num_layers=11),
        tokenizer_3=t5_tokenizer(),
    )


def build_sd35(num_layers: int = 24) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(length=77)
    return StableDiffusion3Pipeline(
        transformer=sd35_transformer(
            width=1536,
            num_layers=num_layers,
            num_dual_layers=min(13, num_layers),
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            sample_size=128,
            pos_embed_max_size=384,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=sd35_vae((128, 256, 512, 512), norm_num_groups=32),
        text_encoder=clip_encoder(tokenizer, width=768, num_layers=1),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, width=1280, num_layers=1),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


MODELS = {
    "tiny": Model(build_tiny, {"resolution": 32, "width": 64, "max_sequence_length": 1}),
    "mid": Model(build_mid, {"resolution": 96, "max_sequence_length": 4}),
    "sd35": Model(build_sd35, {"resolution": 512, "max_sequence_length": 128}),
}


def build_pipeline(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any
) -> StableDiffusion3Pipeline:
    """
    One of `MODELS`, its transformer and text encoders in `dtype` and the VAE in float32.

    Args:
        name (`str`):
            `"tiny"`, `"mid"` or `"sd35"`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of what the forwards compute in.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where weights are drawn.
        **options:
            Of the model's own function, such as `num_layers`.
    """
    with torch.device(device):
        pipeline = MODELS[name].build(**options)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval().to(device=device, dtype=torch.float32 if part == "vae" else dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd35_transformer(*, width: int, num_dual_layers: int, **sizes: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_attention_heads=width // 64,
        attention_head_dim=64,
        caption_projection_dim=width,
        dual_attention_layers=tuple(range(num_dual_layers)),
        qk_norm="rms_norm",
        **sizes,
    )


def sd35_vae(widths: tuple[int, ...], norm_num_groups: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def clip_encoder(tokenizer: CLIPTokenizer, *, width: int, num_layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def clip_tokenizer(length: int) -> CLIPTokenizer:
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def t5_encoder(*, width: int, num_layers: int) -> T5EncoderModel:
    # T5-XXL's shape: gated, with 2.5 times the width inside.
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=64,
        num_heads=width // 64,
        d_ff=5 * width // 2,
        num_layers=num_layers,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(letter, -3.0) for letter in string.ascii_lowercase], extra_ids=0)
