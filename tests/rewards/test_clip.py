import gc
import json
import pickle
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import picture, randomise, tiny_clip, tiny_clip_tokenizer
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trl_dgpo.rewards import get_reward
from trl_dgpo.rewards.clip import AestheticScore, CLIPScore, HPSv2, LinearHead, PickScore, _letterbox, load_clip
from trl_dgpo.rewards.scoring import RewardScorer


PICTURES = [picture(*size, seed) for seed, size in enumerate([(32, 32), (50, 40), (40, 70), (90, 33), (64, 64)])]
PROMPTS = ["a red cat", "a photo of a dog", "a red cat", "x", "a photo of two dogs and a cat on the moon"]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("clip")))


def theirs(folder, pictures=PICTURES, prompts=PROMPTS):
    """Cosines by transformers' own joint forward, one pair at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    cosines = []
    for image, prompt in zip(pictures, prompts):
        pixels = processor([image], return_tensors="pt")
        with torch.no_grad():
            output = model(**tokenizer([prompt], return_tensors="pt"), **pixels)
        cosines.append((output.image_embeds * output.text_embeds).sum().item())
    return np.array(cosines)


def edit_weights(folder, edit):
    weights = load_file(f"{folder}/model.safetensors")
    edit(weights)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- CLIPScore and PickScore, from a checkpoint on disk


def test_clip_score(folder):
    expected = theirs(folder)
    assert expected.std() > 0.01  # pictures and prompts do show
    np.testing.assert_allclose(CLIPScore(folder)(PROMPTS, PICTURES), 100 * expected, atol=1e-4)
    np.testing.assert_allclose(CLIPScore(folder, normalize=True)(PROMPTS, PICTURES), 100 / 30 * expected, atol=1e-4)


def test_pickscore(tmp_path, folder):
    # The model and the processor lie in two places, and the scale is the checkpoint's own.
    tiny_clip(tmp_path, "gelu", seed=1)
    edit_weights(tmp_path, lambda weights: weights.update(logit_scale=torch.tensor(4.5)))
    expected = np.exp(4.5) * theirs(tmp_path)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / file).unlink()
    np.testing.assert_allclose(PickScore(str(tmp_path), folder)(PROMPTS, PICTURES), expected, atol=1e-4)
    scaled = PickScore(str(tmp_path), folder, normalize=True)(PROMPTS, PICTURES)
    np.testing.assert_allclose(scaled, expected / 26, atol=1e-5)


def test_the_scale_is_not_rounded_with_the_weights(tmp_path):
    tiny_clip(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update(logit_scale=torch.tensor(4.6052)))  # 4.59375 in bfloat16
    encoder = load_clip(str(tmp_path), dtype=torch.bfloat16)
    assert encoder.model.dtype == torch.bfloat16
    assert encoder.scale == pytest.approx(np.exp(4.6052), rel=1e-6)
    assert encoder.texts(["a cat"]).dtype == torch.float32


def test_the_tensor_path_through_the_scorer(folder):
    square = [image.resize((32, 32)) for image in PICTURES]
    tensor = torch.stack([torch.from_numpy(np.array(image)) for image in square]).permute(0, 3, 1, 2)
    scores = RewardScorer([CLIPScore(folder), PickScore(folder, folder)])(tensor, PROMPTS, {"text": PROMPTS})
    np.testing.assert_allclose(scores.by_name["clip_score"], 100 * theirs(folder, square), atol=1e-4)
    assert not scores.failed.any()


@pytest.mark.parametrize("name", ["clip-score", "pickscore", "hpsv2", "aesthetic"])
def test_they_are_cheap_to_build_and_to_send(name):
    reward = pickle.loads(pickle.dumps(get_reward(name, normalize=True)))
    assert reward.__name__ == name.replace("-", "_")
    assert getattr(reward, "normalize", True) is True


# -- what must not matter


def test_batches_and_order_do_not_matter(folder):
    expected = CLIPScore(folder)(PROMPTS, PICTURES)
    for size in (1, 2, 3):
        np.testing.assert_allclose(CLIPScore(folder, batch_size=size)(PROMPTS, PICTURES), expected, atol=1e-4)
    np.testing.assert_allclose(CLIPScore(folder)(PROMPTS[::-1], PICTURES[::-1]), expected[::-1], atol=1e-4)


def test_each_prompt_is_encoded_once(folder, monkeypatch):
    reward, seen = CLIPScore(folder, batch_size=4), []
    encode = reward._load().texts.__func__
    monkeypatch.setattr(
        "trl_dgpo.rewards.clip.CLIPEncoder.texts", lambda s, texts: seen.append(texts) or encode(s, texts)
    )
    prompts = [prompt for prompt in "abcdef" for _ in range(3)]
    reward(prompts, [PICTURES[0]] * len(prompts))
    assert seen == [list("abcd"), list("ef")]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # "!" is token 0: what open_clip pads with
@pytest.mark.parametrize("legacy", [False, True])
def test_padding_does_not_matter(tmp_path, pad, legacy):
    # Older configurations call the end token 2, wherever it is.
    tiny_clip(tmp_path, **({"eos_token_id": 2} if legacy else {}))
    edit_json(tmp_path / "tokenizer_config.json", pad_token=pad)
    encoder = load_clip(str(tmp_path))
    assert encoder.tokenizer.pad_token_id == (0 if pad == "!" else encoder.tokenizer.eos_token_id)
    together = encoder.texts(PROMPTS)
    alone = torch.cat([encoder.texts([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together @ together.T)[0, 1] < 0.95  # and they are not all the first token's


def test_long_prompts_keep_their_end_token(folder):
    encoder = load_clip(folder)
    words = "a red cat and a dog " * 30
    texts = encoder.texts([words, words + "photo", "photo " + words])
    torch.testing.assert_close(texts[0], texts[1], rtol=0, atol=1e-6)
    assert texts[0] @ texts[2] < 0.999
    ids = encoder.tokenizer([words], truncation=True, max_length=77).input_ids[0]
    assert (len(ids), ids[-1]) == (77, encoder.tokenizer.eos_token_id)


def test_embeddings_are_unit_vectors(folder):
    encoder = load_clip(folder)
    for embeddings in (encoder.images(PICTURES), encoder.texts(PROMPTS)):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
    assert encoder.images(PICTURES).shape == (5, 24)


def test_the_activation_function_is_the_checkpoints(tmp_path, folder):
    other = tiny_clip(tmp_path / "gelu", "gelu")
    assert load_file(other / "model.safetensors").keys() == load_file(f"{folder}/model.safetensors").keys()
    quick, plain = (np.array(CLIPScore(str(f))(PROMPTS, PICTURES)) for f in (folder, other))
    np.testing.assert_allclose(plain, 100 * theirs(other), atol=1e-4)
    assert abs(quick - plain).max() > 0.1


# -- one model for all who ask


def test_a_clip_is_shared_while_it_is_used(tmp_path, folder):
    score, other = CLIPScore(folder), CLIPScore(folder, dtype=torch.bfloat16)
    aesthetic = AestheticScore(save_head(tmp_path), folder)
    for reward in (score, aesthetic, other):
        reward(PROMPTS, PICTURES)
    assert score._model is aesthetic._model["encoder"] is load_clip(folder)
    assert score._model is not other._model
    assert score._model is not load_clip(folder, device="meta")
    used = weakref.ref(score._model)
    del score, reward
    gc.collect()
    assert used() is aesthetic._model["encoder"]
    del aesthetic
    gc.collect()
    assert used() is None


# -- checkpoints that are none


def test_missing_and_unknown_weights_are_named(tmp_path):
    tiny_clip(tmp_path)
    edit_weights(
        tmp_path, lambda weights: weights.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})
    )
    load_clip(str(tmp_path))  # a buffer that older versions saved
    edit_weights(tmp_path, lambda weights: weights.update({"visual_projection.bias": torch.zeros(24)}))
    with pytest.raises(
        ValueError, match=r"0 weights are missing.* 1 are unknown, such as \['visual_projection\.bias'\]"
    ):
        load_clip(str(tmp_path))
    edit_weights(tmp_path, lambda weights: weights.pop("visual_projection.bias"))
    edit_weights(tmp_path, lambda weights: weights.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match=r"1 weights are missing, such as \['visual_projection\.weight'\]"):
        CLIPScore(str(tmp_path))(PROMPTS, PICTURES)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, folder):
    # The model would not find the end token, and read the same first token of every prompt.
    tiny_clip(tmp_path)
    edit_json(tmp_path / "vocab.json", **{"<|endoftext|>": 600})
    with pytest.raises(ValueError, match="ends texts by token 600, the model looks for 523"):
        PickScore(folder, str(tmp_path))(PROMPTS, PICTURES)


# -- preprocessing


def by_hand(image, size, left, top, width, height):
    """An image resized to `size`, its `width` x `height` from `left`, `top` taken, black where it ends; normalised."""
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float64) / 255
    canvas = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            if 0 <= y + top < size[1] and 0 <= x + left < size[0]:
                canvas[y, x] = pixels[y + top, x + left]
    return ((canvas - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        ((224, 224), (224, 224), 0, 0),
        ((512, 512), (224, 224), 0, 0),
        ((300, 200), (336, 224), 56, 0),
        ((100, 250), (224, 560), 0, 168),
    ],
)
def test_clips_preprocessing(tmp_path, size, resized, left, top):
    tiny_clip(tmp_path, image_size=224)
    image = picture(*size)
    [pixels] = load_clip(str(tmp_path)).preprocess([image])
    np.testing.assert_allclose(pixels, by_hand(image, resized, left, top, 224, 224), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        ((224, 224), (224, 224), 0, 0),
        ((512, 512), (224, 224), 0, 0),
        ((100, 100), (224, 224), 0, 0),
        ((300, 200), (224, 149), 0, -37),  # black above and below
        ((100, 250), (90, 224), -67, 0),  # black left and right
        ((224, 100), (224, 100), 0, -62),
        ((2000, 1), (224, 1), 0, -111),
    ],
)
def test_hpsv2s_preprocessing(size, resized, left, top):
    image = picture(*size)
    [pixels] = _letterbox([image], 224, CLIPImageProcessorPil())
    np.testing.assert_allclose(pixels, by_hand(image, resized, left, top, 224, 224), atol=1e-6)


# -- HPSv2: open_clip's model, written from its definition with its names


class Block(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 64), "act": activation, "c_proj": nn.Linear(64, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, out, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, activation)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self, vocab_size, activation=None):
        super().__init__()
        activation = activation or nn.GELU()
        self.visual = Visual(48, 2, 24, activation)
        self.transformer = Transformer(32, 2, activation)
        self.token_embedding = nn.Embedding(vocab_size, 32)
        self.positional_embedding = nn.Parameter(torch.empty(77, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.empty(32, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens):
        mask = torch.full((77, 77), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def open_clip_tokens(folder, prompts):
    """Padded to 77 by 0, as open_clip does."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rows = [tokenizer(prompt, truncation=True, max_length=77).input_ids for prompt in prompts]
    return torch.tensor([row + [0] * (77 - len(row)) for row in rows])


@pytest.fixture(params=["gelu", "quick_gelu"])
def hpsv2(request, tmp_path):
    """A small HPSv2: open_clip's model, the folder of its configuration and tokenizer, and its checkpoint's folder."""
    tiny_clip(tmp_path / "laion", request.param)
    (tmp_path / "laion" / "model.safetensors").unlink()  # only the file of the checkpoint has weights
    vocab_size = tiny_clip_tokenizer(tmp_path / "laion")
    model = OpenCLIP(vocab_size, QuickGELU() if request.param == "quick_gelu" else nn.GELU())
    randomise(model, seed=2, skip=("logit_scale",))
    torch.save({"iteration": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return model.eval(), tmp_path


def relative(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_hpsv2_is_open_clips(hpsv2):
    model, folder = hpsv2
    prompts = [*PROMPTS, "a red cat and a dog " * 30, ""]
    pictures = [*PICTURES, picture(30, 31), picture(31, 90)]
    reward = HPSv2(checkpoint=str(folder), model=str(folder / "laion"))
    scores = reward(prompts, pictures)

    tall = torch.stack([torch.from_numpy(letterbox_by_hand(image)) for image in pictures]).float()
    images, texts = model.visual(tall), model.encode_text(open_clip_tokens(folder / "laion", prompts))
    images, texts = images / images.norm(dim=-1, keepdim=True), texts / texts.norm(dim=-1, keepdim=True)
    assert relative(reward._model.images(pictures), images) < 1e-5
    assert relative(reward._model.texts(prompts), texts) < 1e-5
    assert relative(torch.tensor(scores), (images * texts).sum(-1)) < 1e-5
    for embeddings in (images, texts):  # the models' weights do show
        assert (embeddings @ embeddings.T).min() < 0.8


def letterbox_by_hand(image):
    scale = 32 / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return by_hand(image, (width, height), -((32 - width) // 2), -((32 - height) // 2), 32, 32)


def test_the_activation_function_of_hpsv2_is_the_configurations(hpsv2):
    _, folder = hpsv2
    laion = folder / "laion"
    right = np.array(HPSv2(checkpoint=str(folder), model=str(laion))(PROMPTS, PICTURES))
    config = json.loads((laion / "config.json").read_text())
    for part in (config["text_config"], config["vision_config"]):
        part["hidden_act"] = "gelu" if part["hidden_act"] == "quick_gelu" else "quick_gelu"
    (laion / "config.json").write_text(json.dumps(config))
    wrong = np.array(HPSv2(checkpoint=str(folder), model=str(laion))(PROMPTS, PICTURES))
    assert abs(right - wrong).max() > 1e-3


def test_hpsv2s_versions_are_two_files(hpsv2):
    model, folder = hpsv2
    laion = str(folder / "laion")
    new = HPSv2(checkpoint=str(folder), model=laion)(PROMPTS, PICTURES)
    assert HPSv2(checkpoint=str(folder / "HPS_v2.1_compressed.pt"), model=laion)(PROMPTS, PICTURES) == new
    with pytest.raises(ValueError, match=r"`hpsv2` cannot be loaded: .*HPS_v2_compressed\.pt"):
        HPSv2("v2.0", checkpoint=str(folder), model=laion)(PROMPTS, PICTURES)
    randomise(model, seed=3)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
    assert HPSv2("v2.0", checkpoint=str(folder), model=laion)(PROMPTS, PICTURES) != new
    with pytest.raises(ValueError, match="`version` is 'v3'; it must be one of"):
        HPSv2("v3")


def test_what_is_no_checkpoint_of_hpsv2(hpsv2):
    model, folder = hpsv2
    reward = HPSv2(checkpoint=str(folder / "bad.pt"), model=str(folder / "laion"))
    weights = model.state_dict()
    torch.save(weights, folder / "bad.pt")
    with pytest.raises(ValueError, match="no checkpoint of HPSv2: it has no `state_dict`"):
        reward(PROMPTS, PICTURES)
    attention = weights.pop("visual.transformer.resblocks.1.attn.in_proj_weight")
    torch.save({"state_dict": weights | {"score_predictor.weight": attention}}, folder / "bad.pt")
    with pytest.raises(ValueError, match=r"(?s)layers\.1\.self_attn\.q_proj\.weight.*score_predictor\.weight"):
        reward(PROMPTS, PICTURES)


# -- the aesthetic predictor


def save_head(folder, width=24):
    """A head in the layout of the published file."""
    sizes = [width, 1024, 128, 64, 16, 1]
    head = nn.Sequential(OrderedDict((str(i), nn.Linear(*sizes[n : n + 2])) for n, i in enumerate([0, 2, 4, 6, 7])))
    randomise(head, seed=4)
    torch.save(
        OrderedDict((f"layers.{name}", weight) for name, weight in head.state_dict().items()), folder / "head.pth"
    )
    return str(folder / "head.pth")


def test_aesthetic(tmp_path, folder):
    head = save_head(tmp_path)
    reward = AestheticScore(head, folder, batch_size=2)
    scores = reward(PROMPTS, PICTURES)
    weights = {name: weight.double().numpy() for name, weight in torch.load(head).items()}
    x = load_clip(folder).images(PICTURES).detach().double().numpy()
    for i in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    np.testing.assert_allclose(scores, x[:, 0], rtol=1e-4)
    assert np.std(scores) > 1e-3
    np.testing.assert_allclose(reward(["other"] * 5, PICTURES), scores)  # prompts are not read


def test_the_heads_maths_stays_in_float32(tmp_path, folder):
    reward = AestheticScore(save_head(tmp_path), folder, dtype=torch.bfloat16)
    reward(PROMPTS, PICTURES)
    assert {parameter.dtype for parameter in reward._model["head"].parameters()} == {torch.float32}
    assert reward._model["encoder"].model.dtype == torch.bfloat16


def test_a_head_for_another_clip_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"(?s)not those of this reward's model.*layers\.0\.weight"):
        AestheticScore(save_head(tmp_path, width=768), folder)(PROMPTS, PICTURES)


def test_the_published_heads_names_and_sizes():
    shapes = {name: tuple(weight.shape) for name, weight in LinearHead(768).state_dict().items() if "weight" in name}
    assert list(shapes.values()) == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    assert list(shapes) == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]
