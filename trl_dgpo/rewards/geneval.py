"""
GenEval (arXiv 2310.11513): are the objects that a prompt names there, in that number, colour and place?

A detector finds objects, CLIP names their colours, and rules on boxes do the rest. The rules are pure functions of
what was found; [`GenEvalReward`] finds it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..coco import COCO_CLASSES
from .clip import CLIPEncoder, load_clip
from .detect import Detections, load_detector
from .model import ModelReward, as_pictures
from .scoring import RewardOutputError


COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
VARIANTS = ("official", "strict", "reference", "bounded")

_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_BACKGROUND = "#999999"
_MOST_PER_CLASS = 16

Box = tuple[float, float, float, float]


class Found(NamedTuple):
    """
    One object in a picture.

    Args:
        box (`tuple` of four `float`):
            `(x0, y0, x1, y1)` in pixels, y downwards.
        colour (`str`, *optional*):
            One of `COLOURS`; `None` where nobody asked.
    """

    box: Box
    colour: str | None = None


class Wanted(NamedTuple):
    """
    Objects that a prompt asks for, or forbids.

    Args:
        name (`str`):
            One of [`~trl_dgpo.coco.COCO_CLASSES`].
        count (`int`):
            How many, at least 1.
        colour (`str`, *optional*):
            Their colour.
        position (`tuple[str, int]`, *optional*):
            Their relation to the objects of an earlier entry, by its place in the list.
    """

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


class Task(NamedTuple):
    """
    A record of GenEval's prompt file.

    Args:
        tag (`str`):
            Its kind, e.g. `"two_object"`.
        include (`tuple` of [`Wanted`]):
            What must be there.
        exclude (`tuple` of [`Wanted`]):
            What must be there in a smaller number.
    """

    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


class GenEvalReward(ModelReward):
    r"""
    Reward for compositions: GenEval (arXiv 2310.11513), and the reward that Flow-GRPO (arXiv 2505.05470) and DGPO
    (arXiv 2510.08425) made of it for training.

    | `variant` | value | range |
    |---|---|---|
    | `"official"` | [`official_score`], which papers report: enough objects, judged by the most certain | {0, 1} |
    | `"strict"` | [`strict_score`]: exact numbers, judged by all | {0, 1} |
    | `"reference"` | [`soft_score`], the training reward of both papers, to the digit | at most 1, no lower bound |
    | `"bounded"` | [`soft_score`] without two faults of it | [0, 1] |

    GenEval's overall score is the mean of the six tags' means, not of all images. Each tag is logged as
    `<name>/<tag>`, e.g. `geneval/counting` or `geneval_strict/counting`. Objects count with a score above `threshold`,
    in tasks of the tag "counting" above `counting_threshold`, and the first 16 of a class at most. A row without
    metadata gets `None`.

    **Report its numbers as "GenEval (HF detector)".** The architecture is the paper's, Mask2Former with a Swin-S
    backbone, but the paper used the weights that mmdet trained, and these are Meta's own. How far the two differ in
    GenEval has not been measured here; the thresholds are the paper's and were chosen for the other weights.

    Further departures, beside those of [`~trl_dgpo.rewards.detect.find_instances`]: pictures that are not square are
    stretched to multiples of 32 px, not padded. CLIP runs in `dtype`, not in mixed precision. The detector sees right
    colours: Flow-GRPO's server gives RGB arrays to mmdet, which reads BGR, and it sees JPEG files. The paper's
    suppression of overlapping boxes, off by default, is left out.

    Models: `facebook/mask2former-swin-small-coco-instance` (the card says licence "other"; needs scipy, the extra
    `trl-dgpo[geneval]`) and `openai/clip-vit-large-patch14` (MIT). The rules are those of the code of GenEval (MIT).

    Args:
        variant (`str`, *optional*, defaults to `"official"`):
            One of the table.
        detector (`str` or `nn.Module`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            Hub id or folder for [`~trl_dgpo.rewards.detect.load_detector`], or a module in the form of
            [`~trl_dgpo.rewards.detect.Detector`]. One without masks leaves the background in the colour's crop.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the CLIP that names colours.
        threshold (`float`, *optional*, defaults to `0.3`):
            Objects of a larger score count.
        counting_threshold (`float`, *optional*, defaults to `0.9`):
            The same for the tag "counting".
        **options:
            `device`, `dtype`, `batch_size` and `offload`, see [`~trl_dgpo.rewards.model.ModelReward`].

    Raises:
        `ValueError`: if `variant` is unknown or a threshold is outside [0, 1).
    """

    def __init__(
        self,
        variant: str = "official",
        *,
        detector: str | nn.Module = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        **options: Any,
    ):
        super().__init__(**options)
        if variant not in VARIANTS:
            raise ValueError(f"`variant` is {variant!r}; it must be one of {VARIANTS}.")
        for name, value in {"threshold": threshold, "counting_threshold": counting_threshold}.items():
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 0 and below 1.")
        self.__name__ = "geneval" if variant == "official" else f"geneval_{variant}"
        self.variant = variant
        self.detector = detector
        self.clip = clip
        self.threshold = threshold
        self.counting_threshold = counting_threshold

    def __call__(
        self,
        prompts: list[str],
        completions: Tensor | Sequence[Image.Image],
        metadata: Sequence[str | Mapping[str, Any] | None],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if not len(prompts) == len(completions) == len(metadata):
            raise ValueError(
                f"There are {len(metadata)} `metadata` and {len(prompts)} prompts for {len(completions)} images; give "
                "one each."
            )
        tasks = [None if row is None else read_metadata(row) for row in metadata]
        asked = [i for i, task in enumerate(tasks) if task is not None]
        pictures = as_pictures(completions)
        values = super().__call__(
            [prompts[i] for i in asked], [pictures[i] for i in asked], tasks=[tasks[i] for i in asked]
        )
        rewards: list[float | None] = [None] * len(tasks)
        for i, value in zip(asked, values, strict=True):
            rewards[i] = value
            if log_metric is not None:
                log_metric(f"{self.__name__}/{tasks[i].tag}", value)
        return rewards

    def _load(self) -> nn.Module:
        detector = self.detector
        if isinstance(detector, str):
            detector = load_detector(detector, dtype=self.dtype)
        colours = ColourClassifier(load_clip(self.clip, dtype=self.dtype, device=self.device))
        return nn.ModuleDict({"detector": detector, "colours": colours})

    def _score(
        self, model: nn.Module, pictures: list[Image.Image], prompts: list[str], columns: dict[str, Any]
    ) -> list[float]:
        tasks: list[Task] = columns["tasks"]
        thresholds = [self.counting_threshold if task.tag == "counting" else self.threshold for task in tasks]
        rows: list[dict[str, list[Found]]] = []
        crops: list[tuple[int, str, int, Image.Image]] = []  # (row, class, place, picture)
        for batch in self._batches(range(len(pictures))):
            coloured = any(wanted.colour for i in batch for wanted in tasks[i].include)
            detections = model["detector"](
                [pictures[i] for i in batch], min(thresholds[i] for i in batch), masks=coloured
            )
            for i, one in zip(batch, detections, strict=True):
                kept = _kept(one, thresholds[i])
                rows.append({name: [Found(tuple(one.boxes[k].tolist())) for k in kept[name]] for name in kept})
                for wanted in tasks[i].include:
                    if wanted.colour and self._sees_colours(wanted, len(kept.get(wanted.name, []))):
                        for place, k in enumerate(kept[wanted.name][: wanted.count]):
                            crops.append((i, wanted.name, place, _crop(pictures[i], one, k)))
        for batch in self._batches(crops):  # of all pictures together
            colours = model["colours"]([crop for *_, crop in batch], [name for _, name, *_ in batch])
            for (i, name, place, _), colour in zip(batch, colours, strict=True):
                rows[i][name][place] = rows[i][name][place]._replace(colour=colour)
        return [self._rule(found, task) for found, task in zip(rows, tasks, strict=True)]

    def _sees_colours(self, wanted: Wanted, number: int) -> bool:
        # With a wrong number nobody asks for colours, and CLIP is spared.
        return number >= wanted.count if self.variant == "official" else number == wanted.count

    def _rule(self, found: dict[str, list[Found]], task: Task) -> float:
        if self.variant == "official":
            return official_score(found, task)
        if self.variant == "strict":
            return strict_score(found, task)
        return soft_score(found, task, bounded=self.variant == "bounded")


class ColourClassifier(nn.Module):
    """
    Zero-shot colours by CLIP: a picture has the colour whose vector is nearest, the normalised mean of three texts'
    embeddings, e.g. "a photo of a red car", "a photo of a red-colored car", "a photo of a red object".

    Args:
        clip ([`~trl_dgpo.rewards.clip.CLIPEncoder`]):
            Embeds pictures and texts.
    """

    def __init__(self, clip: CLIPEncoder):
        super().__init__()
        self.clip = clip
        self._vectors: dict[str, Tensor] = {}

    def forward(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """
        Colours of objects.

        Args:
            pictures (sequence of `PIL.Image.Image`):
                One object each.
            names (sequence of `str`):
                Class of each object.

        Returns:
            `list[str]`: of `COLOURS`.
        """
        images = self.clip.images(list(pictures))  # (B, D)
        vectors = torch.stack([self._of_class(name).to(images.device) for name in names])  # (B, colours, D)
        return [COLOURS[i] for i in (vectors @ images[:, :, None])[:, :, 0].argmax(1).tolist()]

    def _of_class(self, name: str) -> Tensor:
        if name not in self._vectors:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
            means = self.clip.texts(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES))).mean(1)
            self._vectors[name] = nn.functional.normalize(means, dim=-1)
        return self._vectors[name]


def read_metadata(record: str | Mapping[str, Any]) -> Task:
    """
    A record of GenEval's prompt file, checked.

    Args:
        record (`str` or mapping):
            A line of the file, or what it holds.

    Returns:
        [`Task`].

    Raises:
        `ValueError`: if it is no such record. A reward scorer does not take it for the fault of one image: it stops.
    """
    try:
        values = json.loads(record) if isinstance(record, str) else record
        task = Task(
            str(values["tag"]),
            tuple(_wanted(entry) for entry in values["include"]),
            tuple(_wanted(entry) for entry in values.get("exclude") or ()),
        )
        _check(task)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise RewardOutputError(
            f"`metadata` {record!r} is no record of GenEval: {reason}. A record is "
            '{"tag": ..., "include": [{"class": ..., "count": ...}, ...]}, see the prompt set "geneval".'
        ) from error
    return task


def relative_position(box: Box, target: Box) -> set[str]:
    r"""
    Where a box lies relative to another one: with offset `o` between the centres, and `d` width and height,
    `o' = sign(o) max(|o| - 0.1 (d + d_target), 0)`, and a relation holds where its component of `o' / |o|` is above
    0.5. A diagonal offset may have two relations, a small one none.

    Args:
        box (`tuple` of four `float`):
            `(x0, y0, x1, y1)`, y downwards.
        target (`tuple` of four `float`):
            The other one.

    Returns:
        `set[str]`: of `RELATIONS`.
    """
    offsets, revised = [], []
    for low, high in ((0, 2), (1, 3)):  # x, y
        offset = (box[low] + box[high]) / 2 - (target[low] + target[high]) / 2
        slack = 0.1 * (abs(box[high] - box[low]) + abs(target[high] - target[low]))
        offsets.append(offset)
        revised.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
    if all(abs(value) < 1e-3 for value in revised):
        return set()
    dx, dy = (value / math.hypot(*offsets) for value in revised)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def official_score(found: Mapping[str, Sequence[Found]], task: Task) -> float:
    """
    GenEval's own score, which papers report: each wanted class is there at least `count` times, its `count` most
    certain objects have the colour and hold the relation to every object of the target, and nothing excluded is there
    `count` times or more.

    Args:
        found (`dict[str, list[Found]]`):
            Objects of each class, by falling score.
        task ([`Task`]):
            What is wanted.

    Returns:
        `float`: 1 or 0.
    """
    right = _all_hold([found.get(wanted.name, ())[: wanted.count] for wanted in task.include], task)
    spare = any(len(found.get(wanted.name, ())) >= wanted.count for wanted in task.exclude)
    return float(right and not spare)


def strict_score(found: Mapping[str, Sequence[Found]], task: Task) -> float:
    """
    The same with exact numbers, judged by all objects found; what is excluded is not looked at (Flow-GRPO's server).

    Args:
        found (`dict[str, list[Found]]`):
            Objects of each class.
        task ([`Task`]):
            What is wanted.

    Returns:
        `float`: 1 or 0.
    """
    return float(_all_hold([found.get(wanted.name, ()) for wanted in task.include], task))


def soft_score(found: Mapping[str, Sequence[Found]], task: Task, *, bounded: bool) -> float:
    r"""
    The training reward of Flow-GRPO and DGPO: the mean of terms. With `k` objects wanted and `n` found each entry has
    `1 - |k - n| / k`. Where a colour or a relation is wanted too and `n = k`, it has for the colour
    `1 - |k - c| / k`, `c` of them right, and, if they all are, for the relation 1 or 0; where `n` is wrong, one 0.

    Two faults of the published code are kept with `bounded=False`: the number's term falls without bound (16 dogs
    where one is wanted: -14), and a wrong relation has a term 1 beside its 0. With `bounded=True` the number's term is
    at least 0 and a wrong relation has its 0 alone, so that the score lies in [0, 1].

    Args:
        found (`dict[str, list[Found]]`):
            Objects of each class.
        task ([`Task`]):
            What is wanted.
        bounded (`bool`):
            Without the two faults.

    Returns:
        `float`: at most 1.
    """
    groups = [found.get(wanted.name, ()) for wanted in task.include]
    holding = _holding(groups, task)
    terms = []
    for objects, wanted in zip(groups, task.include, strict=True):
        number = 1 - abs(wanted.count - len(objects)) / wanted.count
        terms.append(max(number, 0.0) if bounded else number)
        if len(objects) != wanted.count:
            if wanted.colour or wanted.position:
                terms.append(0.0)
            continue
        if wanted.colour:
            terms.append(1 - (wanted.count - _in_colour(objects, wanted)) / wanted.count)
        if wanted.position and _in_colour(objects, wanted) == wanted.count:
            target = holding[wanted.position[1]]
            right = target is not None and _holds_relation(objects, target, wanted.position[0])
            terms.append(float(right))
            if not right and target is not None and not bounded:
                terms.append(1.0)  # the published code's unconditional one
    return sum(terms) / len(terms)


def _all_hold(groups: list[Sequence[Found]], task: Task) -> bool:
    return None not in _holding(groups, task)


def _holding(groups: list[Sequence[Found]], task: Task) -> list[Sequence[Found] | None]:
    """The objects of each entry, or None where they are not as wanted; a relation to such ones does not hold."""
    holding: list[Sequence[Found] | None] = []
    for objects, wanted in zip(groups, task.include, strict=True):
        right = len(objects) == _in_colour(objects, wanted) == wanted.count
        if right and wanted.position:
            relation, target = wanted.position
            right = holding[target] is not None and _holds_relation(objects, holding[target], relation)
        holding.append(objects if right else None)
    return holding


def _in_colour(objects: Sequence[Found], wanted: Wanted) -> int:
    return sum(wanted.colour in (None, one.colour) for one in objects)


def _holds_relation(objects: Sequence[Found], targets: Sequence[Found], relation: str) -> bool:
    return all(relation in relative_position(one.box, target.box) for one in objects for target in targets)


def _wanted(entry: Mapping[str, Any]) -> Wanted:
    position = entry.get("position")
    return Wanted(entry["class"], entry["count"], entry.get("color"), position and tuple(position))


def _check(task: Task) -> None:
    if not task.include:
        raise ValueError("`include` is empty")
    for wanted in (*task.include, *task.exclude):
        if wanted.name not in COCO_CLASSES:
            raise ValueError(f"there is no class {wanted.name!r} in `trl_dgpo.coco.COCO_CLASSES`")
        if not isinstance(wanted.count, int) or wanted.count < 1:
            raise ValueError(f"`count` is {wanted.count!r}, not a whole number from 1 on")
        if wanted.colour is not None and wanted.colour not in COLOURS:
            raise ValueError(f"the colour {wanted.colour!r} is none of {COLOURS}")
    for i, wanted in enumerate(task.include):
        if wanted.position is not None:
            relation, target = wanted.position
            if relation not in RELATIONS or target not in range(i):
                raise ValueError(
                    f"the position {wanted.position!r} is not one of {RELATIONS} with the place of an earlier entry"
                )


def _kept(detections: Detections, threshold: float) -> dict[str, list[int]]:
    """Places of the objects that count, by class and falling score."""
    kept: dict[str, list[int]] = {}
    for k, (score, label) in enumerate(zip(detections.scores.tolist(), detections.labels.tolist(), strict=True)):
        places = kept.setdefault(COCO_CLASSES[label], [])
        if score > threshold and len(places) < _MOST_PER_CLASS:
            places.append(k)
    return kept


def _crop(picture: Image.Image, detections: Detections, k: int) -> Image.Image:
    """One object alone, in its box on grey."""
    if detections.masks is not None:
        mask = Image.fromarray(detections.masks[k].numpy())
        picture = Image.composite(picture, Image.new("RGB", picture.size, _BACKGROUND), mask)
    x0, y0, x1, y1 = detections.boxes[k].tolist()
    return picture.crop((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)))
