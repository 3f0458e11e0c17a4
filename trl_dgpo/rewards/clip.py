"""
Rewards by CLIP: CLIPScore, PickScore, the LAION aesthetic predictor and HPSv2.

All run on transformers' `CLIPModel`, whatever library their weights were published for. No score here was compared
with the published code's on the real weights; the tests compare small random models.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from .model import ModelReward, build, default_device, read_checkpoint, renamed


if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CLIPEncoder(nn.Module):
    """
    Pictures and texts as unit vectors.

    Args:
        model (`CLIPModel`):
            Both towers.
        tokenizer (`CLIPTokenizer`):
            Texts are cut to the model's length (77 tokens), their end token kept.
        preprocess (callable):
            RGB pictures -> `pixel_values` of shape `(B, 3, H, W)`.

    Raises:
        `ValueError`: if the model looks for another end token than the tokenizer writes.
    """

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "CLIPTokenizer",
        preprocess: Callable[[Sequence[Image.Image]], Tensor],
    ):
        super().__init__()
        _check_end_token(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.scale = model.logit_scale.float().exp().item()  # read before the weights are rounded to a short dtype

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of RGB pictures, `(B, D)`, float32."""
        pixels = self.preprocess(pictures).to(self.model.device, self.model.dtype)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, `(B, D)`, float32."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        ids = tokens.input_ids.to(self.model.device)  # attention is causal: what follows the end token is not seen
        return _unit(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))


def load_clip(
    model: str,
    *,
    processor: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> CLIPEncoder:
    """
    A CLIP from the Hub or a folder. Those who ask for the same one share it, for as long as one of them holds it.

    Args:
        model (`str`):
            Hub id or folder of a `CLIPModel`.
        processor (`str`, *optional*):
            Hub id or folder of its tokenizer and image processor; `model` if not given.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights.
        device (`str` or `torch.device`, *optional*):
            Where it is going to run: it is shared on one device. The process's GPU if there is one, else the CPU.

    Returns:
        [`CLIPEncoder`], wherever it is now.

    Raises:
        `ValueError`: if weights are missing or over, or the tokenizer is not the model's.
    """
    processor = processor or model
    key = (model, processor, dtype, torch.device(device or default_device()))
    encoder = _shared.get(key)
    if encoder is None:
        tokenizer, image_processor = _load_processors(processor)
        preprocess = partial(_crop, image_processor=image_processor)
        encoder = _shared[key] = CLIPEncoder(_load_model(model), tokenizer, preprocess).to(dtype)
    return encoder


class _CLIPReward(ModelReward):
    """A CLIP's cosine between picture and prompt, scaled."""

    def __init__(self, model: str, processor: str | None = None, **options: Any):
        super().__init__(**options)
        self.model = model
        self.processor = processor

    def _load(self) -> CLIPEncoder:
        return load_clip(self.model, processor=self.processor, dtype=self.dtype, device=self.device)

    def _score(self, model: CLIPEncoder, pictures, prompts, columns) -> list[float]:
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}  # a group shares its prompt: one forward
        texts = torch.cat([model.texts(batch) for batch in self._batches(list(row))])
        images = torch.cat([model.images(batch) for batch in self._batches(pictures)])
        cosines = (images * texts[[row[prompt] for prompt in prompts]]).sum(-1)
        return (self._scale(model) * cosines).tolist()

    def _scale(self, model: CLIPEncoder) -> float:
        raise NotImplementedError


class CLIPScore(_CLIPReward):
    r"""
    How well the picture fits its prompt, `100 cos(image, text)` by OpenAI's CLIP ViT-L/14: about 10 to 40.

    Others scale it otherwise: Hessel et al. (arXiv 2104.08718) print `2.5 max(cos, 0)` of ViT-B/32, torchmetrics
    `max(100 cos, 0)`, DiffusionNFT trains on `cos`. Prompts are cut to 77 tokens. The weights are MIT, 428 M.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a `CLIPModel` with tokenizer and image processor.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide by 30, as DGPO trains.
        **options:
            `device`, `dtype`, `batch_size` and `offload` of [`ModelReward`].
    """

    __name__ = "clip_score"

    def __init__(self, model: str = CLIP_L, *, normalize: bool = False, **options: Any):
        super().__init__(model, **options)
        self.normalize = normalize

    def _scale(self, model: CLIPEncoder) -> float:
        return 100 / 30 if self.normalize else 100.0


class PickScore(_CLIPReward):
    r"""
    Preference of Pick-a-Pic's users, `exp(logit_scale) cos(image, text)` by a CLIP ViT-H/14 trained on it (Kirstain et
    al., arXiv 2305.01569): about 16 to 26; papers print this number.

    Prompts are cut to 77 tokens. The weights are 986 M; their licence (MIT, as the code's) was not verified.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of a `CLIPModel`.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of its tokenizer and image processor.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide by 26, as Flow-GRPO and DGPO train.
        **options:
            `device`, `dtype`, `batch_size` and `offload` of [`ModelReward`].
    """

    __name__ = "pickscore"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = CLIP_H,
        *,
        normalize: bool = False,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        self.normalize = normalize

    def _scale(self, model: CLIPEncoder) -> float:
        return model.scale / (26 if self.normalize else 1)


class HPSv2(_CLIPReward):
    r"""
    Preference of HPDv2's annotators, `cos(image, text)` by a CLIP ViT-H/14 trained on it (Wu et al., arXiv
    2306.09341): about 0.2 to 0.35; the benchmark's tables print it times 100.

    The picture's *longer* side becomes 224 px and the rest is black. Departures from the published code: pictures are
    resized by Pillow in 8 bits rather than as float tensors; prompts go through transformers' tokenizer, which leaves
    HTML entities and broken Unicode as they are; weights and maths are float32 unless `dtype` says otherwise, rather
    than under autocast. Prompts are cut to 77 tokens. The weights are Apache-2.0, 986 M.

    Args:
        version (`str`, *optional*, defaults to `"v2.1"`):
            `"v2.1"` or `"v2.0"`.
        checkpoint (`str`, *optional*, defaults to `"xswu/HPSv2"`):
            The version's file, or a folder or Hub repository that has it (`HPS_v2.1_compressed.pt`,
            `HPS_v2_compressed.pt`).
        model (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder with the configuration, tokenizer and image processor of its CLIP.
        **options:
            `device`, `dtype`, `batch_size` and `offload` of [`ModelReward`].

    Raises:
        `ValueError`: if there is no such version.
    """

    __name__ = "hpsv2"
    _files = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

    def __init__(self, version: str = "v2.1", *, checkpoint: str = "xswu/HPSv2", model: str = CLIP_H, **options: Any):
        super().__init__(model, **options)
        if version not in self._files:
            raise ValueError(f"`version` is {version!r}; it must be one of {', '.join(map(repr, self._files))}.")
        self.version = version
        self.checkpoint = checkpoint

    def _load(self) -> CLIPEncoder:
        from transformers import CLIPConfig, CLIPModel

        tokenizer, image_processor = _load_processors(self.model)
        config = CLIPConfig.from_pretrained(self.model)
        checkpoint = read_checkpoint(self.checkpoint, self._files[self.version])
        if "state_dict" not in checkpoint:
            raise ValueError(
                f"{self.checkpoint!r} is no checkpoint of HPSv2: it has no `state_dict`, only {list(checkpoint)[:5]}."
            )
        weights = _from_open_clip(checkpoint["state_dict"])
        model = build(lambda: CLIPModel(config), weights, self.checkpoint).to(self.dtype)
        preprocess = partial(_letterbox, size=config.vision_config.image_size, image_processor=image_processor)
        return CLIPEncoder(model, tokenizer, preprocess)

    def _scale(self, model: CLIPEncoder) -> float:
        return 1.0


class AestheticScore(ModelReward):
    r"""
    LAION's aesthetic predictor (v2): a linear head on the unit image embedding of OpenAI's CLIP ViT-L/14; about 1 to
    10, typically 5 to 6. Prompts are not read. DDPO's aesthetic task (arXiv 2305.13301) is this score.

    The head is that of TRL's DDPO example; it was not verified to equal `sac+logos+ava1-l14-linearMSE.pth` of
    github.com/christophschuhmann/improved-aesthetic-predictor, a file that can be given too. CLIP is MIT, 428 M; the
    head's licence (Apache-2.0) was not verified.

    Args:
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            The head's file, or a folder or Hub repository that has it (`aesthetic-model.pth`).
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the `CLIPModel` that it was trained on.
        **options:
            `device`, `dtype`, `batch_size` and `offload` of [`ModelReward`].
    """

    __name__ = "aesthetic"

    def __init__(self, head: str = "trl-lib/ddpo-aesthetic-predictor", model: str = CLIP_L, **options: Any):
        super().__init__(**options)
        self.head = head
        self.model = model

    def _load(self) -> nn.Module:
        weights = read_checkpoint(self.head, "aesthetic-model.pth")
        encoder = load_clip(self.model, dtype=self.dtype, device=self.device)
        width = encoder.model.config.projection_dim
        return nn.ModuleDict({"encoder": encoder, "head": build(lambda: LinearHead(width), weights, self.head)})

    def _score(self, model: nn.ModuleDict, pictures, prompts, columns) -> list[float]:
        return torch.cat([model["head"](model["encoder"].images(batch)) for batch in self._batches(pictures)]).tolist()


class LinearHead(nn.Module):
    """
    LAION's score of an embedding: five linear layers with nothing but (now idle) dropout between them.

    Args:
        width (`int`):
            Numbers of the embedding.
    """

    def __init__(self, width: int):
        super().__init__()
        idle = nn.Identity  # dropout has no weights, but numbers the layers after it
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), idle(), nn.Linear(1024, 128), idle()),
            *(nn.Linear(128, 64), idle(), nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings).squeeze(-1)


_shared: "WeakValueDictionary[tuple, CLIPEncoder]" = WeakValueDictionary()


def _load_model(model: str) -> "CLIPModel":
    from transformers import CLIPModel

    loaded, report = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    missing, unknown = (sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    if missing or unknown:  # transformers only warns, and draws what is missing at random
        raise ValueError(
            f"{model!r} is not a CLIP in transformers' format: {len(missing)} weights are missing, such as "
            f"{missing[:3]}, and {len(unknown)} are unknown, such as {unknown[:3]}. Give a `CLIPModel`."
        )
    return loaded


def _load_processors(source: str) -> tuple["CLIPTokenizer", Any]:
    # The image processor on Pillow, by name: the automatic choice takes torchvision's, if there is one, and other
    # numbers.
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    return CLIPTokenizer.from_pretrained(source), CLIPImageProcessorPil.from_pretrained(source)


def _check_end_token(model: "CLIPModel", tokenizer: "CLIPTokenizer") -> None:
    # A text's embedding is read off at its end token. A model that does not find it reads the first token, which is
    # the same in all texts: every prompt would score alike. Older configurations say 2 and mean the largest id.
    expected = model.config.text_config.eos_token_id
    expected = model.config.text_config.vocab_size - 1 if expected == 2 else expected
    if tokenizer.eos_token_id != expected:
        raise ValueError(
            f"The tokenizer ends texts by token {tokenizer.eos_token_id}, the model looks for {expected}: they do not "
            "belong together. Give the model's own tokenizer."
        )


def _crop(pictures: Sequence[Image.Image], image_processor) -> Tensor:
    """CLIP's preprocessing: the shorter side to 224 px, bicubic, and the middle of the longer one."""
    return image_processor(list(pictures), return_tensors="pt").pixel_values


def _letterbox(pictures: Sequence[Image.Image], size: int, image_processor) -> Tensor:
    """HPSv2's preprocessing: the longer side to `size`, bicubic, in the middle of a black square."""
    squares = []
    for picture in pictures:
        scale = size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        square = Image.new("RGB", (size, size))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        squares.append(square)
    return image_processor(squares, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values


def _from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights by the names, and in the shapes, of transformers' `CLIPModel`."""
    ours = {}
    for theirs, weight in weights.items():
        name = renamed(theirs, _OPEN_CLIP_BEGINNINGS, _OPEN_CLIP_PARTS)
        if "attn.in_proj_" in name:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                ours[name.replace("attn.in_proj_", f"attn.{letter}_proj.")] = part
        elif theirs in ("visual.proj", "text_projection"):
            ours[name] = weight.T.contiguous()
        else:
            ours[name] = weight
    return ours


_OPEN_CLIP_BEGINNINGS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_PARTS = {
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)
