"""
Text accuracy: how much of the text that a prompt asks for can be read in the picture.

The engine is RapidOCR (PP-OCR on onnxruntime); its models lie inside its wheel, so nothing is downloaded. Another
engine reads differently: state the engine beside every number. Needs the extra `trl-dgpo[ocr]`.
"""

import logging
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from PIL.Image import Image


logger = logging.getLogger(__name__)

# From this side length (px) on, pictures are detected at their own size; smaller ones are enlarged first.
_LARGE_IMAGE = 512
# The recogniser's input height in px.
_LINE_HEIGHT = 48
# Pictures per call of the recogniser; larger batches are no faster and hold more memory.
_RECOGNITION_BATCH = 32
_QUOTED = re.compile(r"\"([^\"]*)\"|“([^”]*)”")


def text_accuracy(recognised: str, target: str, *, penalize_extra: bool = False) -> float:
    r"""
    Share of the target that was read: `1 - min(d, n) / n`, with `n` the target's length and `d` the Levenshtein
    distance, or 0 where the target is contained in what was read (Flow-GRPO, arXiv 2505.05470; used by DGPO, arXiv
    2510.08425).

    Both sides are compared in NFKC form, case-folded and without spaces. The published code lower-cases only, so that
    full-width letters or ligatures count as errors there.

    By that definition "SALESALESALE" is a perfect "SALE". With `penalize_extra` a contained target is no exception:
    `d` counts every character beside it, and with as many as the target has nothing is left. Where the target is not
    contained, both are the same number.

    Args:
        recognised (`str`):
            All text found in the picture.
        target (`str`):
            The text asked for.
        penalize_extra (`bool`, *optional*, defaults to `False`):
            Text beside the target costs too.

    Returns:
        `float`: in [0, 1]; 1 means that the target is there, and with `penalize_extra` nothing else.

    Raises:
        ValueError: `target` holds nothing but spaces.
    """
    recognised, target = _normalise(recognised), _normalise(target)
    if not target:
        raise ValueError("`target` is empty: there is no text whose share could be measured; leave such samples out.")
    if target in recognised and not penalize_extra:
        return 1.0
    length = len(target)
    return 1.0 - min(_levenshtein(recognised, target), length) / length


class OCRReward:
    """
    Reward for text in pictures: [`text_accuracy`] of what RapidOCR reads.

    A sample without a target gets `None` (not applicable). A picture that the engine fails on gets NaN, alone; the log
    says so once per call. The share of exact matches is logged beside it, as `ocr/exact_match`. The engine is built at
    the first call, so that the object is cheap and can be pickled.

    Args:
        target_column (`str`, *optional*, defaults to `"text"`):
            Dataset column with the text asked for. Without that column the first quoted span of the prompt is taken.
        exact_match (`bool`, *optional*, defaults to `False`):
            1 where what was read equals the target (spaces and case aside), else 0.
        penalize_extra (`bool`, *optional*, defaults to `False`):
            Text beside the target costs too, see [`text_accuracy`].
        recognition_only (`bool`, *optional*, defaults to `False`):
            Skip text detection and read each picture as one line: much faster, for small pictures of a single line
            only.
        num_workers (`int`, *optional*):
            Pictures read at the same time, each by one onnxruntime thread. Defaults to the cores of this process
            divided by the local processes (`LOCAL_WORLD_SIZE`).
    """

    input_type = "pil"

    def __init__(
        self,
        *,
        target_column: str = "text",
        exact_match: bool = False,
        penalize_extra: bool = False,
        recognition_only: bool = False,
        num_workers: int | None = None,
    ):
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"`num_workers` is {num_workers}; it must be at least 1, or None for all cores.")
        if exact_match and penalize_extra:
            raise ValueError("`exact_match` allows no other text anyway; leave `penalize_extra` out.")
        self.target_column = target_column
        self.exact_match = exact_match
        self.penalize_extra = penalize_extra
        self.recognition_only = recognition_only
        self.num_workers = num_workers or _default_workers()
        # Another number, another name: both can be logged beside the reward itself.
        self.__name__ = "ocr_exact_match" if exact_match else "ocr_penalize_extra" if penalize_extra else "ocr"
        self._engines: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        prompts: list[str],
        completions: "list[Image]",
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        targets = columns.get(self.target_column)
        if targets is None:
            targets = [_first_quoted(prompt) for prompt in prompts]
        if len(targets) != len(completions):
            raise ValueError(f"{len(targets)} targets for {len(completions)} images; there must be one for each.")

        rewards: list[float | None] = [None] * len(completions)
        asked = [i for i, target in enumerate(targets) if target is not None and _normalise(target)]
        results = self._read_isolated([completions[i] for i in asked])
        for i, result in zip(asked, results, strict=True):
            rewards[i] = float("nan") if isinstance(result, Exception) else self._score(result, targets[i])
        read = [(result, targets[i]) for i, result in zip(asked, results, strict=True) if isinstance(result, str)]
        if read and log_metric is not None:
            log_metric("ocr/exact_match", sum(_matches(*pair) for pair in read) / len(read))

        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            logger.warning(
                "OCR failed on %d of %d images; they get NaN.", len(failures), len(asked), exc_info=failures[0]
            )
        return rewards

    def read(self, images: "Sequence[Image]") -> list[str]:
        """
        The text in each picture: all lines found, joined without a separator; `""` where there is none.

        Raises:
            Exception: whatever the engine raised for the first picture that it failed on.
        """
        results = self._read_isolated(images)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def __getstate__(self) -> dict[str, Any]:
        # onnxruntime sessions and locks cannot be pickled; the copy builds its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_engines", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engines, self._lock = {}, threading.Lock()

    def _score(self, recognised: str, target: str) -> float:
        if self.exact_match:
            return float(_matches(recognised, target))
        return text_accuracy(recognised, target, penalize_extra=self.penalize_extra)

    def _read_isolated(self, images: "Sequence[Image]") -> list[str | Exception]:
        if not images:
            return []
        if self.recognition_only:
            size = min(_RECOGNITION_BATCH, -(-len(images) // self.num_workers))
            read, jobs = self._recognise, [images[i : i + size] for i in range(0, len(images), size)]
            self._engine("recognition")
        else:
            read, jobs = self._detect_and_recognise, [[image] for image in images]
        # onnxruntime works outside the GIL, so threads are enough.
        with ThreadPoolExecutor(self.num_workers) as pool:
            return [result for results in pool.map(partial(_isolate, read), jobs) for result in results]

    def _recognise(self, images: "Sequence[Image]") -> list[str]:
        from rapidocr.ch_ppocr_rec import TextRecInput

        recogniser = self._engine("recognition").text_rec
        # Smaller pictures are stretched to the recogniser's height alone: its time grows with the width, and it reads
        # narrow letters as well.
        lines = [image.resize((image.width, max(image.height, _LINE_HEIGHT))) for image in images]
        return list(recogniser(TextRecInput(img=[_to_bgr(line) for line in lines], return_word_box=False)).txts)

    def _detect_and_recognise(self, images: "Sequence[Image]") -> list[str]:
        profiles = ["large" if max(image.size) >= _LARGE_IMAGE else "small" for image in images]
        # No per-call overrides here: they change the engine that other threads are using.
        texts = [self._engine(profile)(_to_bgr(image)).txts for profile, image in zip(profiles, images, strict=True)]
        return ["".join(lines or ()) for lines in texts]

    def _engine(self, profile: str) -> Any:
        with self._lock:
            if profile not in self._engines:
                self._engines[profile] = _build_engine(profile)
            return self._engines[profile]


def _build_engine(profile: str) -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("The OCR reward needs RapidOCR and onnxruntime: `pip install trl-dgpo[ocr]`.") from error

    params = {
        "Global.log_level": "critical",
        "Global.use_cls": False,  # the classifier of upside-down lines errs on small pictures
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    if profile == "large":
        # PaddleOCR's own default; RapidOCR's (shorter side at least 736) is for pictures too small to be read.
        params |= {"Det.limit_type": "max", "Det.limit_side_len": 960}
    if profile == "recognition":
        # A square minimum shape: the batch is as wide as its widest picture instead of padded to 320 pixels.
        params |= {
            "Global.use_det": False,
            "Rec.rec_img_shape": [3, _LINE_HEIGHT, _LINE_HEIGHT],
            "Rec.rec_batch_num": _RECOGNITION_BATCH,
        }
    engine = RapidOCR(params=params)
    blank = np.full((_LINE_HEIGHT, 2 * _LINE_HEIGHT, 3), 255, dtype=np.uint8)
    engine(blank)  # the models are loaded by the first call
    return engine


def _isolate(read: Callable[[Sequence], list[str]], images: Sequence) -> list[str | Exception]:
    """Reads a batch; if it raises, reads its pictures one by one, so that only the culprits fail."""
    try:
        return read(images)
    except ImportError:
        raise
    except Exception as error:
        if len(images) == 1:
            return [error]
        return [result for image in images for result in _isolate(read, [image])]


def _to_bgr(image: "Image") -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # OpenCV's channel order


def _first_quoted(prompt: str) -> str | None:
    match = _QUOTED.search(prompt)
    return match and (match[1] or match[2])


def _matches(recognised: str, target: str) -> bool:
    return _normalise(recognised) == _normalise(target)


def _normalise(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _levenshtein(a: str, b: str) -> int:
    """Least number of inserted, deleted and replaced characters that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, char_b in enumerate(b, start=1):
            substitution = diagonal + (char_a != char_b)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substitution)
    return row[-1]


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
