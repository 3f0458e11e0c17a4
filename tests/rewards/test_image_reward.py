import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import picture, randomise
from torch import nn

from trl_dgpo.rewards import get_reward
from trl_dgpo.rewards.image_reward import ImageReward
from trl_dgpo.rewards.scoring import RewardScorer


PICTURES = [picture(*size, seed) for seed, size in enumerate([(32, 32), (50, 40), (40, 70), (90, 33), (64, 64)])]
PROMPTS = ["a red cat", "a photo of a dog", "a red cat", "x", "a photo of two dogs and a cat on the moon"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##s", "cat", "dog", "photo"]
WORDS += ["of", "red", "and", "two", "on", "the", "moon", *(f"##{letter}" for letter in "abcdefgh")]
VOCABULARY = len(WORDS) + 2  # and BLIP's own two
IMAGE_WIDTH, TEXT_WIDTH, HIDDEN = 128, 192, 96


# -- ImageReward's model, written from its definition with its names


class Attention(nn.Module):
    """BLIP's ViT: query, key and value in one matrix."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(IMAGE_WIDTH, 3 * IMAGE_WIDTH), nn.Linear(IMAGE_WIDTH, IMAGE_WIDTH)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(IMAGE_WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(IMAGE_WIDTH, HIDDEN), nn.Linear(HIDDEN, IMAGE_WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class VisualEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, IMAGE_WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, 17, IMAGE_WIDTH))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, IMAGE_WIDTH, 8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(IMAGE_WIDTH, eps=1e-6)

    def forward(self, pixels):
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Output(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, key_width):
        super().__init__()
        self.self = nn.Module()
        self.self.query = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
        self.self.key, self.self.value = (nn.Linear(key_width, TEXT_WIDTH) for _ in range(2))
        self.output = Output(TEXT_WIDTH)

    def forward(self, x, source, mask=None):
        return self.output(attend(self.self.query(x), self.self.key(source), self.self.value(source), mask), x)


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.crossattention = BertAttention(TEXT_WIDTH), BertAttention(IMAGE_WIDTH)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(TEXT_WIDTH, HIDDEN)
        self.output = Output(HIDDEN)

    def forward(self, x, mask, image):
        x = self.crossattention(self.attention(x, x, mask), image)
        return self.output(nn.functional.gelu(self.intermediate.dense(x)), x)


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.embeddings.position_embeddings = nn.Embedding(40, TEXT_WIDTH)
        self.embeddings.LayerNorm = nn.LayerNorm(TEXT_WIDTH, eps=1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder.layer = nn.ModuleList(BertLayer() for _ in range(2))

    def forward(self, tokens, mask, image):
        e = self.embeddings
        x = e.LayerNorm(e.word_embeddings(tokens) + e.position_embeddings.weight[: tokens.shape[1]])
        for layer in self.encoder.layer:
            x = layer(x, mask, image)
        return x


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder, self.blip.text_encoder = VisualEncoder(), TextEncoder()
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(IMAGE_WIDTH, 256), nn.Linear(TEXT_WIDTH, 256)
        sizes, dropout = [TEXT_WIDTH, 1024, 128, 64, 16, 1], nn.Dropout
        layers = [nn.Linear(*sizes[i : i + 2]) for i in range(5)]
        self.mlp.layers = nn.Sequential(
            layers[0], dropout(0.2), layers[1], dropout(0.2), layers[2], dropout(0.1), layers[3], layers[4]
        )

    def forward(self, pixels, tokens, mask):
        seen = self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(seen[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def attend(query, key, value, mask=None):
    """Attention with heads of 64; `mask` is true where a key counts."""
    query, key, value = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT / math.sqrt(64)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def pixels_by_hand(image):
    """Shorter side to 32, bicubic, the middle of the longer one."""
    scale = 32 / min(image.size)
    image = image.resize([32 if side == min(image.size) else int(side * scale) for side in image.size], 3)
    left, top = (image.width - 32) // 2, (image.height - 32) // 2
    pixels = np.array(image.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


def tokens_by_hand(prompts):
    """Words of the vocabulary or else their letters, `[CLS]` before and `[SEP]` after, 35 in all."""
    rows = []
    for prompt in prompts:
        ids = []
        for word in prompt.split():
            stem = word if word in WORDS else word.removesuffix("s")
            ids += [WORDS.index(stem)] + [WORDS.index("##s")] * (stem != word)
        ids = [2, *ids[:33], 3]
        rows.append(ids + [0] * (35 - len(ids)))
    return torch.tensor(rows), torch.tensor(rows) != 0


@pytest.fixture(scope="module")
def model():
    model = Reference().eval()
    randomise(model, seed=0, gain=1.0)
    return model


@pytest.fixture
def folder(tmp_path, model):
    """`ImageReward.pt` as it is published: the state dict alone; and BERT's tokenizer."""
    torch.save(model.state_dict(), tmp_path / "ImageReward.pt")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return tmp_path


def reward(folder, **options):
    return ImageReward(str(folder), str(folder / "bert"), **options)


def relative(scores, expected):
    return np.linalg.norm(np.subtract(scores, expected)) / np.linalg.norm(expected)


# -- the reward


@torch.no_grad()
def test_it_is_the_definition(folder, model):
    prompts = [*PROMPTS, "two red dogs and the moon " * 20, ""]
    pictures = [*PICTURES, picture(34, 32, 8), picture(32, 90, 9)]
    expected = model(torch.stack([pixels_by_hand(image) for image in pictures]), *tokens_by_hand(prompts))
    scores = reward(folder)(prompts, pictures)
    assert relative(scores, expected) < 1e-5
    assert expected.std() > 0.1 * expected.abs().mean()


def test_pictures_and_prompts_both_count(folder):
    scores = reward(folder)
    same_prompt = torch.tensor(scores(["a cat"] * 5, PICTURES))
    same_picture = torch.tensor(scores(["a cat", "a dog", "the moon"], PICTURES[:1] * 3))
    for values in (same_prompt, same_picture):
        assert values.std() > 0.05 * values.abs().mean()


def test_padding_batches_and_order_do_not_matter(folder):
    together = reward(folder)(PROMPTS, PICTURES)
    for size in (1, 2):
        assert relative(reward(folder, batch_size=size)(PROMPTS, PICTURES), together) < 1e-5
    assert relative(reward(folder)(PROMPTS[::-1], PICTURES[::-1]), together[::-1]) < 1e-5


def test_each_picture_is_seen_once(folder):
    scores = reward(folder, batch_size=2)
    scores(PROMPTS[:1], PICTURES[:1])
    seen = []
    scores._model.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    scores(PROMPTS, PICTURES)
    assert seen == [2, 2, 1]


def test_the_sizes_are_read_off_the_weights(folder):
    scores = reward(folder)
    scores(PROMPTS[:1], PICTURES[:1])
    vision, text = scores._model.vision.config, scores._model.text.config
    assert (vision.hidden_size, vision.num_attention_heads, vision.image_size, vision.patch_size) == (128, 2, 32, 8)
    assert (text.hidden_size, text.num_attention_heads, text.encoder_hidden_size) == (192, 3, 128)
    assert (vision.num_hidden_layers, text.num_hidden_layers) == (2, 2)


def test_the_head_stays_in_float32(folder):
    scores = reward(folder, dtype=torch.bfloat16)
    rough = scores(PROMPTS, PICTURES)
    assert scores._model.vision.dtype == scores._model.text.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in scores._model.head.parameters()} == {torch.float32}
    assert 0 < relative(rough, reward(folder)(PROMPTS, PICTURES)) < 0.2


def test_in_the_scorer(folder):
    tensor = torch.stack([torch.from_numpy(np.array(image.resize((40, 40)))) for image in PICTURES]).permute(
        0, 3, 1, 2
    )
    scores = RewardScorer([reward(folder)])(tensor, PROMPTS, {"text": PROMPTS})
    pictures = [Image.fromarray(image) for image in tensor.permute(0, 2, 3, 1).numpy()]
    assert scores.by_name["image_reward"].tolist() == reward(folder)(PROMPTS, pictures)


def test_it_is_cheap_to_build_and_to_send(folder):
    assert get_reward("image-reward", normalize=True).checkpoint == "THUDM/ImageReward"
    scores = reward(folder)
    first = scores(PROMPTS, PICTURES)
    data = pickle.dumps(scores)
    assert len(data) < 1000
    assert pickle.loads(data)(PROMPTS, PICTURES) == first


# -- checkpoints that are none


def test_weights_that_do_not_fit_are_named(folder):
    weights = torch.load(folder / "ImageReward.pt")
    last = weights.pop("blip.text_encoder.encoder.layer.1.output.dense.bias")
    torch.save(weights | {"blip.itm_head.bias": last}, folder / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"(?s)text\.encoder\.layer\.1\.output\.dense\.bias.*blip\.itm_head\.bias"):
        reward(folder)(PROMPTS, PICTURES)


def test_another_models_checkpoint_is_refused(folder):
    torch.save({"state_dict": {}}, folder / "ImageReward.pt")
    with pytest.raises(ValueError, match="no checkpoint of ImageReward: it has no 'vision"):
        reward(folder)(PROMPTS, PICTURES)


def test_another_tokenizer_is_refused(folder):
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(
        ValueError, match=f"has {VOCABULARY - 1} tokens, BLIP's two included, and the model {VOCABULARY}"
    ):
        reward(folder)(PROMPTS, PICTURES)
