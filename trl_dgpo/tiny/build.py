"""
Builds the tiny SD3 from nothing: `python -m trl_dgpo.tiny.build --output DIR` (minutes on two cores).

1. Signs are drawn with a font of matplotlib's wheel: one word or code of the *training* split each.
2. An autoencoder (32 x 64 RGB <-> 8 x 8 x 16 latents) learns to rebuild them, letters above all.
3. The transformer learns to draw what the caption says, by flow matching, until an OCR engine reads nearly all.
4. Then each letter of a caption is replaced at random with probability `noise`. The model keeps its knowledge of
   the letters but loses its confidence: the start of reinforcement learning. (A model that merely stopped early at
   the same accuracy lacks the knowledge, and no reward brings it out.)

The two CLIP encoders stay as they were drawn: with a vocabulary of single characters any fixed random features do. The
third encoder says nothing (zeros) so that plain `from_pretrained` finds every part; the transformer learns to ignore
any number of its tokens. One empty caption in ten throughout, so that guidance means something.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trl_dgpo.prompts.text import _SIGN_LETTERS, _SIGN_WORDS, tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward


HEIGHT, WIDTH = 32, 64
CAPTION = 'A sign that says "{}"'
EMPTY_SHARE = 0.1
# The stock pipeline's number of tokens of the third encoder; reinforcement learning uses one, for speed.
MAX_SILENT_TOKENS = 256


def build(
    output: Path,
    *,
    seed: int = 0,
    num_images: int = 12_000,
    vae_steps: int = 1200,
    clean_steps: int = 1300,
    noise: float = 0.42,
    noise_steps: int = 200,
    num_test: int = 256,
) -> dict:
    """
    Trains all parts and writes the pipeline and its log to `output`.

    Args:
        output (`Path`):
            Folder to write; an existing one is replaced at the end, in one move.
        seed (`int`, *optional*, defaults to `0`):
            Of everything that is drawn.
        num_images (`int`, *optional*, defaults to `12_000`):
            Signs to learn from.
        vae_steps, clean_steps, noise_steps (`int`, *optional*):
            Optimiser steps of the three phases.
        noise (`float`, *optional*, defaults to `0.42`):
            Probability that a letter of a caption is replaced, in the last phase.
        num_test (`int`, *optional*, defaults to `256`):
            Test prompts for the OCR figures of the log.

    Returns:
        `dict`: the log, as written to `build_log.json`.
    """
    rng = _seed_phase(seed, "pictures")
    start = time.time()
    log: dict = {"seed": seed, "num_images": num_images, "noise": noise}

    def report(**entries: float) -> None:
        print(f"{time.time() - start:6.0f} s", json.dumps(entries), flush=True)

    texts = training_texts(num_images, rng)
    images = torch.from_numpy(np.stack([np.asarray(draw_sign(text, rng)) for text in texts])).permute(0, 3, 1, 2)
    report(images=len(images))

    _seed_phase(seed, "autoencoder")
    pipeline = new_pipeline()
    log["vae"] = train_vae(pipeline.vae, images, vae_steps, report)
    latents = encode(pipeline.vae, images)
    mean, std = latents.mean(), latents.std()
    pipeline.vae.register_to_config(shift_factor=round(mean.item(), 4), scaling_factor=round(1 / std.item(), 4))
    latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    reader = OCRReward(recognition_only=True)
    log["vae"]["ocr_exact_of_reconstructions"] = exact_share(reader, rebuild(pipeline, latents[:512]), texts[:512])
    report(ocr_exact_of_reconstructions=log["vae"]["ocr_exact_of_reconstructions"])

    ema = torch.optim.swa_utils.AveragedModel(
        pipeline.transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    for phase, steps, learning_rate, letter_noise in (
        ("clean", clean_steps, 2e-3, 0.0),
        ("noisy", noise_steps, 1e-3, noise),
    ):
        rng = _seed_phase(seed, phase)
        losses = train_transformer(pipeline, ema, latents, texts, steps, learning_rate, letter_noise, rng, report)
        trained = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
        pipeline.transformer.load_state_dict(ema.module.state_dict())
        log[phase] = {"steps": steps, "losses": losses, **evaluate(pipeline, reader, num_test)}
        report(phase=phase, **{key: value for key, value in log[phase].items() if key.startswith("ocr")})
        if phase == "clean":
            pipeline.transformer.load_state_dict(trained)

    log["seconds"] = round(time.time() - start)
    save(pipeline, log, output)
    return log


# Pictures


def training_texts(number: int, rng: random.Random) -> list[str]:
    """Texts of the training split only, a quarter of them words (there are few, so they repeat)."""
    rows = [row["text"] for row in tiny_ocr_prompts("train", number, seed=rng.randrange(2**31))]
    words = sorted(set(rows) & set(_SIGN_WORDS.split()))
    return [rng.choice(words) if rng.random() < 0.25 else text for text in rows]


def draw_sign(text: str, rng: random.Random) -> Image.Image:
    """One line of dark ink on a light sign; hue, lightness, size and place are random."""
    hue, ink_hue = rng.random(), rng.random()
    top, bottom = (_hsv(hue, rng.uniform(0.10, 0.42), rng.uniform(0.88, 1.0)) for _ in range(2))
    ink = _hsv(ink_hue, rng.uniform(0.6, 1.0), rng.uniform(0.15, 0.5))
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    background = (1 - rows) * np.array(top) + rows * np.array(bottom)
    image = Image.fromarray(np.broadcast_to(background, (HEIGHT, WIDTH, 3)).round().astype(np.uint8))
    where = (WIDTH / 2 + rng.uniform(-1, 1), HEIGHT / 2 + rng.uniform(-1.5, 1.5))
    ImageDraw.Draw(image).text(where, text, font=_font(rng.choice((24, 25))), fill=ink, anchor="mm")
    return image


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    import colorsys

    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf", size)


# Parts


def new_pipeline() -> StableDiffusion3Pipeline:
    """All parts with fresh weights."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        layers_per_block=0,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=WIDTH,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=64,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    tokenizer = new_tokenizer()
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer),
        tokenizer_2=new_tokenizer(),
        text_encoder_3=new_silent_encoder(),
        tokenizer_3=new_silent_tokenizer(),
    )


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over single characters (it lower-cases), with one word for the opening of every caption."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    entries = ["<|startoftext|>", "<|endoftext|>", *characters, *(character + "</w>" for character in characters)]
    tokenizer = CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=12)
    tokenizer.add_tokens([AddedToken("a sign that says", normalized=True, single_word=True)])
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    # CLIP's own initial embeddings are so small that all captions would look alike.
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    torch.nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight)
    return encoder


def new_silent_encoder() -> T5EncoderModel:
    """A T5 encoder whose output is zero, which is what diffusers itself puts in the place of a missing one."""
    config = T5Config(vocab_size=8, d_model=64, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def new_silent_tokenizer() -> PreTrainedTokenizerFast:
    """Every text is empty to it, so that a short `max_sequence_length` cuts nothing off and warns of nothing."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SILENT_TOKENS,
    )


# Autoencoder


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, report) -> dict:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    losses = []
    for step, batch in enumerate(_batches(len(images), 32, steps)):
        x = images[batch].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(rebuilt, x) + _edge_loss(rebuilt, x) + 2 * F.l1_loss(_chroma(rebuilt), _chroma(x))
        loss = loss + 1e-4 * posterior.kl().mean() / 8
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            report(vae_step=step + 1, loss=round(float(np.mean(losses[-100:])), 4))
    return {"steps": steps, "losses": _thin(losses)}


def _edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean difference of the slopes: sharp letters rather than right areas."""
    return sum(F.l1_loss(a.diff(dim=dim), b.diff(dim=dim)) for dim in (-1, -2))


def _chroma(x: Tensor) -> Tensor:
    """Colour without lightness: thin letters lose theirs if nothing insists."""
    return x - x.mean(dim=1, keepdim=True)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(256)])


@torch.no_grad()
def rebuild(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> list[Image.Image]:
    config = pipeline.vae.config
    parts = [
        pipeline.vae.decode(part / config.scaling_factor + config.shift_factor).sample for part in latents.split(64)
    ]
    return pipeline.image_processor.postprocess(torch.cat(parts), output_type="pil")


# Transformer


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    ema: torch.optim.swa_utils.AveragedModel,
    latents: Tensor,
    texts: list[str],
    steps: int,
    learning_rate: float,
    letter_noise: float,
    rng: random.Random,
    report,
) -> list[float]:
    """Flow matching on captions whose letters are replaced with probability `letter_noise`; returns the losses."""
    transformer = pipeline.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, final_div_factor=20
    )
    losses = []
    for step, batch in enumerate(_batches(len(latents), 64, steps)):
        captions = [noisy_caption(texts[i], letter_noise, rng) for i in batch]
        conditioning = encode_captions(pipeline, captions)
        x0 = latents[batch]
        noise = torch.randn_like(x0)
        sigma = torch.randn(len(x0)).sigmoid()
        sigma = 3 * sigma / (1 + 2 * sigma)  # SD3's shift
        weight = sigma.view(-1, 1, 1, 1)
        with SilentTokens(torch.exp(torch.rand(len(x0)) * math.log(MAX_SILENT_TOKENS))):
            velocity = transformer(
                (1 - weight) * x0 + weight * noise, timestep=1000 * sigma, return_dict=False, **conditioning
            )[0]
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(transformer)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            report(step=step + 1, loss=round(float(np.mean(losses[-100:])), 4))
    transformer.eval()
    return _thin(losses)


class SilentTokens(TorchFunctionMode):
    """
    Lets the last text token of each sample count as `number (B,)` equal tokens in every attention.

    The third encoder's tokens are all equal (zeros, without positions), and remain so in every layer. Counting one of
    them n times in the softmax, by log n on its logit, is exactly what n of them would do, at the cost of one.
    """

    def __init__(self, number: Tensor):
        super().__init__()
        self.log_number = number.log()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            key = args[1]
            bias = key.new_zeros(len(key), 1, 1, key.shape[2])
            bias[:, 0, 0, -1] = self.log_number
            kwargs = {**kwargs, "attn_mask": bias}
        return func(*args, **kwargs)


def noisy_caption(text: str, letter_noise: float, rng: random.Random) -> str:
    if rng.random() < EMPTY_SHARE:
        return ""
    return CAPTION.format("".join(rng.choice(_SIGN_LETTERS) if rng.random() < letter_noise else c for c in text))


@torch.no_grad()
def encode_captions(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def evaluate(pipeline: StableDiffusion3Pipeline, reader: OCRReward, num_test: int) -> dict[str, float]:
    """OCR of test prompts, with few and with many tokens of the third encoder, and with guidance."""
    rows = tiny_ocr_prompts("test", num_test)
    prompts, texts = [row["prompt"] for row in rows], [row["text"] for row in rows]
    results = {}
    for name, length, guidance in (
        ("", 1, 1.0),
        (f"_at_{MAX_SILENT_TOKENS}_tokens", MAX_SILENT_TOKENS, 1.0),
        ("_guidance_3", 1, 3.0),
    ):
        images = sample(pipeline, prompts, max_sequence_length=length, guidance_scale=guidance)
        scores = reader(prompts, images, text=texts)
        results["ocr" + name] = round(float(np.mean(scores)), 4)
        results["ocr_exact" + name] = exact_share(reader, images, texts)
    return results


def sample(pipeline: StableDiffusion3Pipeline, prompts: list[str], **settings) -> list[Image.Image]:
    """The stock pipeline's pictures; the noise of each depends on its place in the list alone."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipeline(
            part, height=HEIGHT, width=WIDTH, num_inference_steps=10, generator=generators, **settings
        ).images
    return images


def exact_share(reader: OCRReward, images: list[Image.Image], texts: list[str]) -> float:
    return round(float(np.mean([read == text for read, text in zip(reader.read(images), texts, strict=True)])), 4)


def _seed_phase(seed: int, phase: str) -> random.Random:
    """Each phase has its own seed, so that one can be changed without moving the others."""
    rng = random.Random(f"{seed}/{phase}")
    torch.manual_seed(rng.getrandbits(63))
    return rng


def _batches(number: int, size: int, steps: int) -> Iterator[Tensor]:
    order = torch.randperm(number)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(number)
        batch, order = order[:size], order[size:]
        yield batch


def _thin(losses: list[float]) -> list[float]:
    """Means of a hundred steps."""
    return [round(float(np.mean(losses[i : i + 100])), 4) for i in range(0, len(losses), 100)]


def save(pipeline: StableDiffusion3Pipeline, log: dict, output: Path) -> None:
    """Transformer and autoencoder in half precision; the encoders in single: transformers keeps the dtype it finds."""
    partial = output.with_name(output.name + ".partial")
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(partial)
    (partial / "build_log.json").write_text(json.dumps(log, indent=1) + "\n")
    readme = output / "README.md"
    if readme.exists():
        shutil.copy(readme, partial)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the bundled files need one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.output, seed=arguments.seed)
