"""ImageReward: human preference by BLIP, on transformers' BLIP classes."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .clip import LinearHead
from .model import ModelReward, build, read_checkpoint, renamed


if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig


# Mean and standard deviation of the published model's raw scores.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35
# Width of one attention head, in ViT and BERT of every size. All other sizes are read off the weights.
_HEAD_WIDTH = 64


class ImageReward(ModelReward):
    r"""
    Preference of ImageRewardDB's annotators, `(r - mean) / std`: about -2 to 2 (Xu et al., arXiv 2304.05977). `r` is a
    linear head on the first token of BLIP's text encoder, which sees the picture through cross-attention.

    Pictures are cropped as for CLIP (224 px), prompts are cut to 35 tokens. Departure from the published code: each
    picture is scored with its own prompt alone rather than every picture with every prompt, and the crop of a picture
    that is not square may lie one pixel off. No score was compared with the published code's on the real weights; the
    tests compare small random models. The weights are Apache-2.0, 446 M.

    Args:
        checkpoint (`str`, *optional*, defaults to `"THUDM/ImageReward"`):
            The weights' file, or a folder or Hub repository that has it (`ImageReward.pt`).
        tokenizer (`str`, *optional*, defaults to `"bert-base-uncased"`):
            Hub id or folder of BERT's tokenizer.
        **options:
            `device`, `dtype`, `batch_size` and `offload` of [`ModelReward`].
    """

    __name__ = "image_reward"

    def __init__(self, checkpoint: str = "THUDM/ImageReward", tokenizer: str = "bert-base-uncased", **options: Any):
        super().__init__(**options)
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer

    def _load(self) -> "_BLIP":
        from transformers import BertTokenizer, CLIPImageProcessorPil

        tokenizer = BertTokenizer.from_pretrained(self.tokenizer)
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's own two, last in its vocabulary
        weights = _from_blip(read_checkpoint(self.checkpoint, "ImageReward.pt"))
        try:
            vision, text = _vision_config(weights), _text_config(weights)
        except KeyError as error:
            raise ValueError(f"{self.checkpoint!r} is no checkpoint of ImageReward: it has no {error}.") from error
        if len(tokenizer) != text.vocab_size:
            raise ValueError(
                f"The tokenizer {self.tokenizer!r} has {len(tokenizer)} tokens, BLIP's two included, and the model "
                f"{text.vocab_size}: they do not belong together. Give the tokenizer of `bert-base-uncased`."
            )
        model = build(lambda: _BLIP(vision, text), weights, self.checkpoint)
        model.vision.to(self.dtype)
        model.text.to(self.dtype)
        size = {"height": vision.image_size, "width": vision.image_size}
        model.image_processor = CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=size)
        model.tokenizer = tokenizer
        return model

    def _score(self, model: "_BLIP", pictures, prompts, columns) -> list[float]:
        batches = zip(self._batches(pictures), self._batches(prompts), strict=True)
        raw = torch.cat([model(*batch) for batch in batches])
        return ((raw - _MEAN) / _STD).tolist()


class _BLIP(nn.Module):
    """BLIP's encoders of pictures and of texts that see pictures, and the head, which stays in float32."""

    image_processor: Any = None
    tokenizer: Any = None

    def __init__(self, vision: "BlipVisionConfig", text: "BlipTextConfig"):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearHead(text.hidden_size)

    def forward(self, pictures, prompts) -> Tensor:
        pixels = self.image_processor(list(pictures), return_tensors="pt").pixel_values
        image = self.vision(pixel_values=pixels.to(self.vision.device, self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(self.text.device)
        seen = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image
        ).last_hidden_state
        return self.head(seen[:, 0].float())


def _vision_config(weights: dict[str, Tensor]) -> "BlipVisionConfig":
    from transformers import BlipVisionConfig

    width, _, _, patch = weights["vision.embeddings.patch_embedding.weight"].shape
    patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count_layers(weights, "vision.encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(weights: dict[str, Tensor]) -> "BlipTextConfig":
    from transformers import BlipTextConfig

    vocabulary, width = weights["text.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count_layers(weights, "text.encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # only so that there is cross-attention: the forward, which is not told so, looks both ways
    )


def _count_layers(weights: dict[str, Tensor], beginning: str) -> int:
    return len({name.removeprefix(beginning).split(".")[0] for name in weights if name.startswith(beginning)})


def _from_blip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's weights by the names of `_BLIP`, without what the reward does not use."""
    used = {name: weight for name, weight in weights.items() if not name.startswith(_UNUSED)}
    return {renamed(name, _BEGINNINGS, _PARTS): weight for name, weight in used.items()}


# The numbers of the positions, and BLIP's heads for contrastive learning.
_UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
_BEGINNINGS = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    "mlp.": "head.",
}
_PARTS = {
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
