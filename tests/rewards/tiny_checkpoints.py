"""Tiny random checkpoints on disk, in the files of the real ones, so that the real loading code reads them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "p h", "o t", "ph ot", "phot o</w>"]


def tiny_clip(folder: Path, act: str = "quick_gelu", *, seed: int = 0, image_size: int = 32, **text_config) -> Path:
    """
    A CLIP of two layers: `model.safetensors`, `config.json`, `preprocessor_config.json` and the tokenizer's files.

    Its weights are wide enough that pictures, texts and the activation function `act` all matter.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vocab_size = tiny_clip_tokenizer(folder)
    ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": act}
    config = CLIPConfig(
        text_config={"vocab_size": vocab_size, "hidden_size": 32, "projection_dim": 24} | layers | ids | text_config,
        vision_config={"image_size": image_size, "patch_size": 8, "hidden_size": 48, "projection_dim": 24} | layers,
        projection_dim=24,
    )
    model = CLIPModel(config)
    randomise(model, seed, skip=("logit_scale",))
    model.save_pretrained(folder)
    size = {"shortest_edge": image_size}, {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture, with something in every region and colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def tiny_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-level BPE with ten merges, as `vocab.json`, `merges.txt`, `tokenizer_config.json`; its size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in _MERGES), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def randomise(model: torch.nn.Module, seed: int, skip: tuple[str, ...] = (), gain: float = 3.0) -> None:
    """Weights so wide that each layer outweighs what it is added to, and every bias and norm shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in skip:
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                scale = 0.3 if parameter.ndim < 2 else gain * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + is_norm)


def _byte_letters() -> list[str]:
    """The letters by which byte-level BPE writes the 256 bytes: the printable ones as they are, the rest moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(moved))]
