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

`cost`: CPU seconds of the process for one picture of 512 px and one prompt, by each reward that runs a model in the
process, and by JPEG. The models have the published sizes and random weights, in float32 on the CPU, on one thread; the
rewards' own code prepares the picture, runs the model and scores, and loading is not timed. Layers take as long for
any weights, so this is the published models' cost, but for what depends on what is seen. Random detectors are sure of
nothing: their figure is that of a picture in which nothing is found. What GenEval pays beside it where something is
found has lines of its own: the masks of ten instances, made by hand, and one object's colour; add the latter once per
coloured object. The texts of a class's colours are encoded once per process and not counted. The published
vocabularies are not here: each letter is a token, and the prompt has 20. Other work on the machine shows: the smallest
figure is the least disturbed. Takes 5 to 10 minutes, and 5 GB.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import string
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
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
from torch import nn

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.rewards import OCRReward, get_reward
from trl_dgpo.rewards.clip import CLIPEncoder, LinearHead, _crop, _letterbox
from trl_dgpo.rewards.detect import Detections, _BoxDetector, _labels, _MaskDetector, find_instances
from trl_dgpo.rewards.geneval import ColourClassifier
from trl_dgpo.rewards.image_reward import _BLIP
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
PROMPT = "a red cat on the blue moon"  # 20 letters
# Width, layers and heads of a transformer whose cost does not matter.
QUICK_LAYERS = (32, 1, 2)


def main(arguments: list[str] | None = None) -> None:
    tables = {
        "throughput": lambda: throughput(rounds, quick=chosen.quick),
        "overlap": lambda: overlap(rounds, quick=chosen.quick),
        "accuracy": lambda: accuracy(quick=chosen.quick),
        "cost": lambda: cost(rounds, quick=chosen.quick),
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
    figures: dict[str, Any] = {"machine": {**machine(), "cpu": cpu_name(), "cores": os.cpu_count(), **packages}}
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


def cost(rounds: int, *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Parameters, and CPU seconds for one picture, by reward."""
    torch.set_num_threads(1)
    print(f"| reward | parameters, M | float32, GB | CPU s/image: median of {rounds}, smallest to largest |")
    print("|---|---|---|---|")
    image = draw("TAXI", (512, 512), noisy=True)
    figures = {}
    for row, (name, load, columns) in _COSTS.items():
        reward = get_reward(name)
        if load is not None:
            reward.device, reward._load = "cpu", partial(load, quick)
        seconds = []
        for _ in range(1 + rounds):  # the first loads the model
            start = time.process_time()
            reward(prompts=[PROMPT], completions=[image], **columns)
            seconds.append(time.process_time() - start)
        number = 0 if load is None else count_parameters(reward._model)
        figures[row] = {"parameters": number, "seconds": seconds[1:]}
        del reward
        gc.collect()  # up to 4 GB, before the next is made
        size = f"{number / 1e6:.1f} | {4 * number / 1e9:.2f}" if number else "- | -"
        values = [f"{call(seconds[1:]):#.3g}" for call in (median, min, max)]
        print(f"| {row} | {size} | {values[0]} ({values[1]} to {values[2]}) |", flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "pillow"))
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over 5 min; 1 thread; {versions}")
    return figures


def clip_l(quick: bool = False) -> nn.Module:
    """CLIP ViT-L/14 by the sizes in `openai/clip-vit-large-patch14`, config.json."""
    image, text = (QUICK_LAYERS, QUICK_LAYERS) if quick else ((1024, 24, 16), (768, 12, 12))
    return _clip(image, text, "quick_gelu")


def clip_h(quick: bool = False) -> nn.Module:
    """PickScore's and HPSv2's CLIP ViT-H/14, by the sizes in `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, config.json."""
    image, text = (QUICK_LAYERS, QUICK_LAYERS) if quick else ((1280, 32, 16), (1024, 24, 16))
    return _clip(image, text, "gelu")


def blip(quick: bool = False) -> nn.Module:
    """ImageReward: ViT-L/16, and the BERT-base of BLIP's `med_config.json`, which attends to it; with its head."""
    from transformers import BlipTextConfig, BlipVisionConfig

    image, text = (QUICK_LAYERS, QUICK_LAYERS) if quick else ((1024, 24, 16), (768, 12, 12))
    return _BLIP(
        BlipVisionConfig(**_layers(*image), image_size=224, patch_size=16),
        BlipTextConfig(
            **_layers(*text),
            encoder_hidden_size=image[0],
            vocab_size=30524,  # of bert-base-uncased, and BLIP's own two
            max_position_embeddings=512,
            is_decoder=True,
        ),
    )


def mask2former(quick: bool = False) -> nn.Module:
    """Mask2Former by the sizes of `facebook/mask2former-swin-small-coco-instance`, config.json."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(  # Swin-S
        embed_dim=96,
        depths=[1, 1, 1, 1] if quick else [2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=stages,
    )
    layers = {"encoder_layers": 1, "decoder_layers": 2} if quick else {"encoder_layers": 6, "decoder_layers": 10}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=100, num_labels=80, **layers)
    return Mask2FormerForUniversalSegmentation(config)


def rt_detr(quick: bool = False) -> nn.Module:
    """RT-DETR with ResNet-50-vd, `PekingU/rtdetr_r50vd`: the defaults of transformers are its config.json's sizes."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    resnet = RTDetrResNetConfig(
        depths=[1, 1, 1, 1] if quick else [3, 4, 6, 3],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(backbone_config=resnet, decoder_layers=1 if quick else 6, num_queries=300, num_labels=80)
    return RTDetrForObjectDetection(config)


def yolos(quick: bool = False) -> nn.Module:
    """YOLOS-tiny by the sizes in `hustvl/yolos-tiny`, config.json."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        **_layers(*(QUICK_LAYERS if quick else (192, 12, 3))),
        image_size=[800, 1333],
        use_mid_position_embeddings=False,
        num_detection_tokens=100,
        num_labels=91,
    )
    return YolosForObjectDetection(config)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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


class _Finds(nn.Module):
    """A detector that is told what to find."""

    def __init__(self, find: Callable[[], Detections]):
        super().__init__()
        self.find = find

    def forward(self, pictures: Sequence[Image.Image], threshold: float, masks: bool = False) -> list[Detections]:
        return [self.find() for _ in pictures]


def _layers(width: int, number: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, number, heads, 4 * width), strict=True))


def _clip(image: tuple[int, int, int], text: tuple[int, int, int], activation: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    both = {"hidden_act": activation, "projection_dim": text[0]}
    config = CLIPConfig(
        vision_config={**_layers(*image), **both, "image_size": 224, "patch_size": 14},
        text_config={**_layers(*text), **both, "vocab_size": 49408, "max_position_embeddings": 77},
        projection_dim=text[0],
    )
    return CLIPModel(config)


def _encoder(model: nn.Module, *, letterbox: bool = False) -> CLIPEncoder:
    """A CLIP with the published preprocessing, and tokens for letters."""
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in (*string.ascii_lowercase, "-")]
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    processor = CLIPImageProcessorPil()
    crop, pad = partial(_crop, image_processor=processor), partial(_letterbox, size=224, image_processor=processor)
    return CLIPEncoder(model, CLIPTokenizer(vocab=vocabulary, merges=[]), pad if letterbox else crop)


def _aesthetic(quick: bool) -> nn.Module:
    encoder = _encoder(clip_l(quick))
    return nn.ModuleDict({"encoder": encoder, "head": LinearHead(encoder.model.config.projection_dim)})


def _image_reward(quick: bool) -> nn.Module:
    from transformers import BertTokenizer, CLIPImageProcessorPil

    letters = [begin + letter for begin in ("", "##") for letter in string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    model = blip(quick)
    model.image_processor, model.tokenizer = CLIPImageProcessorPil(), BertTokenizer(vocab=vocabulary)
    return model


def _mask2former_detector(quick: bool) -> nn.Module:
    from transformers import Mask2FormerImageProcessorPil

    size = {"shortest_edge": 64 if quick else 800, "longest_edge": 1333}
    processor = Mask2FormerImageProcessorPil(size=size, size_divisor=32)
    return _geneval(_MaskDetector(mask2former(quick), processor, _labels("random", 80)))


def _rt_detr_detector(quick: bool) -> nn.Module:
    from transformers import RTDetrImageProcessorPil

    side = 128 if quick else 640  # enough places for 300 queries
    processor = RTDetrImageProcessorPil(size={"height": side, "width": side})
    return _BoxDetector(rt_detr(quick), processor, _labels("random", 80))


def _yolos_detector(quick: bool) -> nn.Module:
    from transformers import YolosImageProcessorPil

    processor = YolosImageProcessorPil(size={"shortest_edge": 64 if quick else 512, "longest_edge": 1333})
    return _BoxDetector(yolos(quick), processor, _labels("random", 91))


def _geneval(detector: nn.Module, colours: nn.Module | None = None) -> nn.Module:
    return nn.ModuleDict({"detector": detector, "colours": colours or nn.Identity()})


def _instances(quick: bool) -> nn.Module:
    logits = _ten_instances()
    return _geneval(_Finds(lambda: find_instances(*logits, (512, 512), threshold=0.3)))


def _colours(quick: bool) -> nn.Module:
    found = find_instances(*_ten_instances(), (512, 512), threshold=0.3)
    return _geneval(_Finds(lambda: found), ColourClassifier(_encoder(clip_l(quick))))


def _ten_instances() -> tuple[torch.Tensor, torch.Tensor]:
    """Mask2Former's logits: ten of 100 queries are sure of a car in a square of their own, the others of nothing."""
    classes = torch.zeros(100, 81)
    classes[:, -1] = 20
    masks = torch.full((100, 200, 200), -20.0)  # a quarter of the side that the network sees
    for i in range(10):
        classes[i, COCO_CLASSES.index("car")] = 40
        masks[i, 10 * i : 10 * i + 80, 10 * i : 10 * i + 80] = 20
    return classes, masks


def _task(**wanted: str) -> dict[str, Any]:
    return {"metadata": [{"tag": "benchmark", "include": [{"class": "car", "count": 1, **wanted}]}]}


_CARS = {"object": ["car"], "count": [3]}
# What each row's reward is called on the command line, what gives its model, and the columns of the one picture.
_COSTS: dict[str, tuple[str, Callable[[bool], nn.Module] | None, dict[str, Any]]] = {
    "clip_score (CLIP ViT-L/14)": ("clip-score", lambda quick: _encoder(clip_l(quick)), {}),
    "aesthetic (CLIP ViT-L/14)": ("aesthetic", _aesthetic, {}),
    "pickscore (CLIP ViT-H/14)": ("pickscore", lambda quick: _encoder(clip_h(quick)), {}),
    "hpsv2 (CLIP ViT-H/14)": ("hpsv2", lambda quick: _encoder(clip_h(quick), letterbox=True), {}),
    "image_reward (BLIP)": ("image-reward", _image_reward, {}),
    "geneval (Mask2Former Swin-S), nothing found": ("geneval", _mask2former_detector, _task()),
    "geneval, masks of 10 instances": ("geneval", _instances, _task()),
    "geneval, each coloured object (CLIP ViT-L/14)": ("geneval", _colours, _task(color="red")),
    "counting (RT-DETR R50), nothing found": ("counting", _rt_detr_detector, _CARS),
    "counting (YOLOS-tiny), nothing found": ("counting", _yolos_detector, _CARS),
    "jpeg_compressibility": ("jpeg-compressibility", None, {}),
}


if __name__ == "__main__":
    main()
