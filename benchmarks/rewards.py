"""
What rewards cost, what of it rounds can hide, and how well text is read; Markdown tables.

    python benchmarks/rewards.py                            # all of it: minutes
    python benchmarks/rewards.py overlap --rounds 9
    python benchmarks/rewards.py --quick                    # a few seconds: that it runs, not what it measures

`throughput`: pictures a second that `OCRReward` reads with one thread and with two, by turns.

`overlap`: rounds of the tiny model that score what has been sampled at the end (in turn), and others that score a
sub-batch while the next is sampled (`async_reward_computation`), by turns. torch has one thread, and so has the
scoring. The rewards read text with detection, or only wait, as for a server, as long as sampling takes. Two figures
say what could be had: the round in turn less the shorter of sampling and scoring (a sum that became a maximum), and
the same where work comes in sub-batches, of which the first has no other to hide behind.

`accuracy`: twelve texts of 1 to 19 characters, drawn in DejaVu Sans on clean and on noisy squares, read by
`OCRReward()`, and on strips of a quarter of the height, read by `OCRReward(recognition_only=True)`.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from models import build_pipeline
from PIL import Image, ImageDraw, ImageFont
from rounds import Rounds, brightness, machine, make_trainer, median, spread

from trl_dgpo.rewards import OCRReward
from trl_dgpo.rewards.ocr import text_accuracy
from trl_dgpo.rewards.scoring import RewardScorer


TEXTS = (
    *("7", "Go", "TAXI", "CAFE 24", "Bakery", "Exit 3B", "OPEN LATE", "No. 1984", "Fresh Bread", "Lost & Found"),
    *("HAPPY BIRTHDAY", "Two for One Tuesday"),
)
# Pictures, and whether to read them as one line: those of the bundled model, and those of SD3.5.
SIZES = {"32 x 64, one line": ((64, 32), True), "512 x 512": ((512, 512), False)}
# The bundled model's largest pictures, in eight sub-batches of four. They are enlarged before they are read, so that
# reading them takes about as long as sampling.
ROUND = {
    "resolution": 64,
    "max_sequence_length": 1,
    "prompts_per_round": 2,
    "num_generations": 16,
    "sample_batch_size": 4,
    "max_workers": 1,
    "use_cpu": True,
}
QUICK = {
    "prompts_per_round": 1,
    "num_generations": 2,
    "sample_batch_size": 1,
    "sample_num_steps": 4,
    "num_train_timesteps": 1,
}
READ_AT = (512, 128)
BACKGROUNDS = ("clean", "noisy")


def main(arguments: list[str] | None = None) -> None:
    tables = {
        "throughput": lambda: throughput(rounds, quick=chosen.quick),
        "overlap": lambda: overlap(rounds, quick=chosen.quick),
        "accuracy": lambda: accuracy(quick=chosen.quick),
    }
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="table", help=f"{', '.join(tables)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    parser.add_argument("--quick", action="store_true", help="as little as possible of everything")
    parser.add_argument("--output", help="JSON file to write the figures to")
    chosen = parser.parse_args(arguments)
    rounds = 1 if chosen.quick else chosen.rounds
    if unknown := set(chosen.tables) - tables.keys():
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are {', '.join(tables)}")

    packages = {name: version(name) for name in ("rapidocr", "onnxruntime", "pillow")}
    figures: dict[str, Any] = {"machine": {**machine(), "cores": os.cpu_count(), **packages}}
    print(json.dumps(figures["machine"]))
    for name in chosen.tables or tables:
        print(f"\n{name}\n", flush=True)
        figures[name] = tables[name]()
    if chosen.output:
        Path(chosen.output).write_text(json.dumps(figures, indent=1) + "\n")


def throughput(rounds: int, *, quick: bool = False) -> dict[str, dict[int, list[float]]]:
    """Pictures a second, of each size, by number of threads."""
    print("| pictures | 1 thread, images/s | 2 threads, images/s | 2 threads / 1 thread |\n|---|---|---|---|")
    figures = {}
    for name, (size, recognition_only) in SIZES.items():
        number = 2 if quick else 512 if recognition_only else 16
        images = [draw(TEXTS[i % 4], size, noisy=i % 2 == 1) for i in range(number)]
        reward = reader(recognition_only)
        reward.read(images[:1])  # loads the models
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for reward.num_workers, values in speeds.items():
                start = time.perf_counter()
                reward.read(images)
                values.append(number / (time.perf_counter() - start))
        reward.num_workers = 1
        ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
        print(f"| {name} | {spread(speeds[1])} | {spread(speeds[2])} | {spread(ratios)} |", flush=True)
        figures[name] = speeds
    return figures


def overlap(rounds: int, *, quick: bool = False) -> dict[str, dict[str, list[float]]]:
    """Seconds of rounds in turn and overlapped, and of what they consist of, by reward."""
    torch.set_num_threads(1)
    config = {**ROUND, **(QUICK if quick else {})}
    num_images = config["prompts_per_round"] * config["num_generations"]
    num_parts = num_images // config["sample_batch_size"]
    figures = {}
    with TemporaryDirectory() as folder, Rounds(make_trainer(build_pipeline("tiny"), folder, **config)) as taken:
        warm_up = [taken.next() for _ in range(3)]
        *_, last = taken.trainer.state.log_history  # of the second: a round is logged when the next one begins
        per_image = last["time/rollout"] / num_images
        scorers = {
            "OCR, 128 x 512": RewardScorer(reads_text()),
            "waits": RewardScorer(waits(per_image)),
            "waits, `async def`": RewardScorer(waits_async(per_image)),
        }
        kinds = [(name, is_async) for name in scorers for is_async in (False, True)]
        seconds = []
        for _ in range(rounds):
            for name, is_async in kinds:
                taken.trainer.scorer, taken.trainer.args.async_reward_computation = scorers[name], is_async
                seconds.append(taken.next())
        log = taken.close()[len(warm_up) :]

    print(
        "| reward | in turn, s | overlapped, s | in turn / overlapped | sampling, s | scoring, s | maximum, s "
        "| by sub-batches, s |\n|---|---|---|---|---|---|---|---|"
    )
    for number, name in enumerate(scorers):
        in_turn, overlapped = (seconds[2 * number + is_async :: len(kinds)] for is_async in (False, True))
        sampling, scoring = ([e[f"time/{p}"] for e in log[2 * number :: len(kinds)]] for p in ("rollout", "reward"))
        figures[name] = {"in turn": in_turn, "overlapped": overlapped, "sampling": sampling, "scoring": scoring}

        ratios = [a / b for a, b in zip(in_turn, overlapped, strict=True)]
        hidden = [min(pair) for pair in zip(sampling, scoring, strict=True)]
        maximum = [t - h for t, h in zip(in_turn, hidden, strict=True)]
        by_parts = [t - h * (num_parts - 1) / num_parts for t, h in zip(in_turn, hidden, strict=True)]
        cells = [spread(values) for values in (in_turn, overlapped, ratios)]
        cells += [f"{median(values):.3f}" for values in (sampling, scoring, maximum, by_parts)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return figures


def accuracy(*, quick: bool = False) -> list[dict[str, Any]]:
    """Exactly read texts and mean rewards, by reader and side of the pictures."""
    print("| read by | px | clean: exact, reward | noisy: exact, reward | ms/image | misread |")
    print("|---|---|---|---|---|---|")
    figures = []
    for recognition_only in (False, True):
        reward = reader(recognition_only)
        for side in (512,) if quick else (64, 128, 256, 512):
            reward.read([draw("TAXI", (side, side))])  # loads the models
            figures.append(read_texts(reward, side, TEXTS[::4] if quick else TEXTS))
            row = figures[-1]
            cells = [f"{row[kind]['exact']} of {row['texts']}, {row[kind]['reward']:.2f}" for kind in BACKGROUNDS]
            misread = ", ".join(f"{wanted!r} as {read!r}" for read, wanted in row["misread"])
            print(f"| {row['reader']} | {side} | {' | '.join(cells)} | {row['ms']:.0f} | {misread} |", flush=True)
    return figures


@cache
def reader(recognition_only: bool) -> OCRReward:
    """Reads with one thread, until told otherwise."""
    return OCRReward(recognition_only=recognition_only, num_workers=1)


def read_texts(reward: OCRReward, side: int, texts: Sequence[str]) -> dict[str, Any]:
    """How well texts in pictures of one side are read, on clean and on noisy backgrounds, and how fast."""
    size = (side, side // 4) if reward.recognition_only else (side, side)
    row = {"reader": "recognition only" if reward.recognition_only else "with detection", "side": side}
    seconds, misread = 0.0, []
    for kind in BACKGROUNDS:
        images = [draw(text, size, noisy=kind == "noisy") for text in texts]
        start = time.perf_counter()
        read = reward.read(images)
        seconds += time.perf_counter() - start
        pairs = list(zip(read, texts, strict=True))
        wrong = [pair for pair in pairs if text_accuracy(*pair, penalize_extra=True) < 1]
        misread += wrong
        row[kind] = {"exact": len(texts) - len(wrong), "reward": float(np.mean([text_accuracy(*p) for p in pairs]))}
    return row | {"texts": len(texts), "ms": 1000 * seconds / len(texts) / 2, "misread": misread}


def draw(text: str, size: tuple[int, int], *, noisy: bool = False) -> Image.Image:
    """Dark text as large as fits, on white, or on grey with noise of every pixel and channel."""
    import matplotlib

    width, height = size
    path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    font = ImageFont.truetype(path, 100)
    left, top, right, bottom = font.getbbox(text)
    scale = min(0.9 * width / (right - left), 0.6 * height / (bottom - top), 0.3 * width / (bottom - top))
    image = Image.new("RGB", size, (200, 200, 200) if noisy else "white")
    centre = (width / 2, height / 2)
    ImageDraw.Draw(image).text(centre, text, fill=(20, 20, 60), font=font.font_variant(size=100 * scale), anchor="mm")
    if not noisy:
        return image
    noise = np.random.default_rng(0).normal(0, 25, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def reads_text() -> Callable[..., list[float]]:
    """A reward that finds and reads text in enlarged pictures, on one thread."""
    reward = reader(recognition_only=False)
    reward.read([draw("TAXI", READ_AT)])  # loads the models

    def ocr(images: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float]:
        return reward(prompts, [image.resize(READ_AT) for image in images], text=["CAFE"] * len(prompts))

    return ocr


def waits(seconds: float) -> Callable[..., list[float]]:
    """A reward that waits so long for every image and computes next to nothing."""

    def waiting(images: list[Image.Image], **kwargs: Any) -> list[float]:
        time.sleep(seconds * len(images))
        return brightness(images)

    return waiting


def waits_async(seconds: float) -> Callable[..., Any]:
    """[`waits`] as a coroutine."""

    async def waiting(images: list[Image.Image], **kwargs: Any) -> list[float]:
        await asyncio.sleep(seconds * len(images))
        return brightness(images)

    return waiting


if __name__ == "__main__":
    main()
