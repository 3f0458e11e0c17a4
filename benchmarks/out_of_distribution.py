"""
What training has done beside what it was rewarded for, measured at a run's end.

Texts that training never asked for, another OCR engine, the pictures' own statistics, and how much the pictures of
one prompt still differ.

The model itself has learned to draw with words and codes of the training split. *Held out* are texts of the other
split, two codes for every word, as in the evaluation; *unseen words* are its words alone; *three letters* are codes of
a length that neither the model nor its training has ever had.
"""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trl_dgpo.image_measures import image_statistics, measure_images
from trl_dgpo.prompts.text import _SIGN_WORDS, tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward
from trl_dgpo.rewards.ocr import text_accuracy


NUM_PROMPTS = 64
NUM_GROUPS, GROUP_SIZE = 16, 8
_ENLARGED = 4  # tesseract wants letters of about 30 pixels and a quiet edge


def measure(trainer: Any, view: str, held_out: list[str]) -> dict[str, Any]:
    """Everything below, of one view of the policy: `"ema"`, or `"base"`, which is the same in every run of a start."""
    held_out = held_out[:NUM_PROMPTS]
    texts = {"held out": held_out, "unseen words": unseen_words(), "three letters": three_letters()}
    images = {name: trainer.generate([_prompt(t) for t in of], view=view) for name, of in texts.items()}
    engine = OCRReward(recognition_only=True, num_workers=1)
    ocr = {name: mean_accuracy(engine.read(pictures(images[name])), of) for name, of in texts.items()}
    second = tesseract_read(pictures(images["held out"])) if tesseract_version() else None
    groups = trainer.generate([_prompt(t) for t in held_out[:NUM_GROUPS]], view=view, num_images=GROUP_SIZE)
    return {
        "ocr": ocr,
        "tesseract": None if second is None else mean_accuracy(second, held_out),
        "tesseract_version": tesseract_version(),
        "images": image_statistics(measure_images(images["held out"])) | {"sharpness": sharpness(images["held out"])},
        "diversity": diversity(groups.unflatten(0, (NUM_GROUPS, GROUP_SIZE))),
    }


def unseen_words() -> list[str]:
    """English words of the held-out split."""
    test = {row["text"] for row in tiny_ocr_prompts("test", 20_000)}
    return [word for word in _SIGN_WORDS.split() if word in test][:NUM_PROMPTS]


def three_letters() -> list[str]:
    """Codes one letter short."""
    return [row["text"][:3] for row in tiny_ocr_prompts("test", NUM_PROMPTS, seed=1)]


def sharpness(images: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels in [0, 1], down and across: blur lowers it."""
    pixels = images.double() / 255
    return (pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()).item() / 2


def diversity(groups: Tensor) -> float:
    """
    Mean distance of two pictures of one prompt.

    Args:
        groups (`torch.Tensor` of shape `(N, G, 3, H, W)`):
            uint8 images.

    Returns:
        `float`: root mean square difference of pixels in [0, 1], over all pairs of a group, averaged over groups.
    """
    pixels = groups.flatten(2).double() / 255
    distances = torch.stack([torch.pdist(group) for group in pixels])
    return (distances / pixels.shape[-1] ** 0.5).mean().item()


def mean_accuracy(read: list[str], texts: list[str]) -> float:
    return sum(text_accuracy(found, text) for found, text in zip(read, texts, strict=True)) / len(texts)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


@cache
def tesseract_version() -> str | None:
    """`None` where it is not installed (Debian: `apt-get install tesseract-ocr`)."""
    if shutil.which("tesseract") is None:
        return None
    return subprocess.run(["tesseract", "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def tesseract_read(images: list[Image.Image]) -> list[str]:
    """What tesseract reads: one line a picture, of capital letters, enlarged on a wider ground, in one call."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(images))]
        for image, file in zip(images, files, strict=True):
            _enlarged(image).save(file)
        names = Path(folder) / "names.txt"
        names.write_text("".join(f"{file}\n" for file in files))
        command = ["tesseract", names, "stdout", "--psm", "7", "-c", "page_separator=\f"]
        command += ["-c", "tessedit_char_whitelist=ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        command += ["-c", "load_system_dawg=0", "-c", "load_freq_dawg=0"]  # codes are no words
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    pages = done.stdout.split("\f")[: len(images)]
    if len(pages) != len(images):
        raise RuntimeError(f"tesseract read {len(pages)} of {len(images)} pictures: {done.stderr[-500:]}")
    return [page.strip() for page in pages]


def _enlarged(image: Image.Image) -> Image.Image:
    gray = image.convert("L")
    gray = gray.resize((gray.width * _ENLARGED, gray.height * _ENLARGED), Image.BICUBIC)
    ground = Image.new("L", (gray.width + 80, gray.height + 80), gray.getpixel((2, 2)))
    ground.paste(gray, (40, 40))
    return ground


def _prompt(text: str) -> str:
    return f'A sign that says "{text}"'
