"""
Object detectors: pictures -> scores, COCO classes, boxes and, from Mask2Former, masks.

Labels are places in [`~trl_dgpo.coco.COCO_CLASSES`], found by the checkpoint's order and never by its names, which
differ ("sofa" is COCO's "couch").
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..coco import COCO_CLASSES


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.utils import ModelOutput


# COCO numbered 91 classes (0 is none) and labelled 80. Checkpoints count the 80, or all 91.
_UNUSED_IDS = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_USED_IDS = [coco_id for coco_id in range(91) if coco_id not in _UNUSED_IDS]
_BOX_PROCESSORS = {
    "d_fine": "RTDetrImageProcessorPil",
    "rt_detr": "RTDetrImageProcessorPil",
    "yolos": "YolosImageProcessorPil",
}


@dataclass(frozen=True)
class Detections:
    """
    What a detector found in one picture, by falling score. What detectors return is on the CPU.

    Args:
        scores (`torch.Tensor` of shape `(N,)`):
            In [0, 1].
        labels (`torch.Tensor` of shape `(N,)`):
            Places in [`~trl_dgpo.coco.COCO_CLASSES`].
        boxes (`torch.Tensor` of shape `(N, 4)`):
            `(x0, y0, x1, y1)` in pixels, `x1` and `y1` just outside.
        masks (`torch.Tensor` of shape `(N, H, W)`, *optional*):
            bool, at the picture's size; `None` where not asked for, or from a detector of boxes.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None


class Detector(Protocol):
    """
    What the rewards call; `load_detector` gives one. An own one, e.g. around another library, is an `nn.Module` of
    this form.
    """

    def __call__(self, pictures: Sequence[Image.Image], threshold: float, masks: bool = False) -> list[Detections]:
        """What is found in each RGB picture with a score above `threshold`, with masks if asked for."""


def load_detector(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """
    A detector of transformers.

    | architecture | e.g. | finds |
    |---|---|---|
    | Mask2Former | `facebook/mask2former-swin-small-coco-instance` | masks, and boxes around them |
    | RT-DETR, D-FINE | `PekingU/rtdetr_r50vd`, `ustc-community/dfine-medium-coco` | boxes |
    | YOLOS | `hustvl/yolos-tiny` | boxes |

    Mask2Former sees pictures with their shorter side at 800 px, at most 1333 px long, whatever size its checkpoint
    names; the others see them as theirs says.

    Args:
        name (`str`):
            Hub id or folder, trained on COCO.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights. Mask2Former of transformers 5.23 gave NaN in half precision on a CPU.

    Returns:
        `nn.Module` with the call of [`Detector`].

    Raises:
        `ImportError`: if it is a Mask2Former and scipy is missing.
        `ValueError`: if its architecture is another one, its classes are not COCO's, or weights are missing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    labels = _labels(name, config.num_labels)
    if config.model_type == "mask2former":
        _check_scipy()
        processor = transformers.Mask2FormerImageProcessorPil.from_pretrained(
            name, size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32
        )
        model = _load_model(transformers.Mask2FormerForUniversalSegmentation, name, dtype)
        return _MaskDetector(model, processor, labels)
    if config.model_type in _BOX_PROCESSORS:
        processor = getattr(transformers, _BOX_PROCESSORS[config.model_type]).from_pretrained(name)
        model = _load_model(transformers.AutoModelForObjectDetection, name, dtype)
        return _BoxDetector(model, processor, labels)
    raise ValueError(
        f"Detector {name!r} is a {config.model_type!r}; give a mask2former or one of {sorted(_BOX_PROCESSORS)}, or a "
        "module of your own."
    )


def find_instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], threshold: float, top: int = 100
) -> Detections:
    """
    Mask2Former's instances in one picture, as mmdet finds them.

    A query's class has the score `s m`: `s` its softmax over the classes and "none", `m` the mean of the mask's
    sigmoid where its logit is above 0. The `top` pairs of query and class with the largest `s` are looked at; equal
    ones in the order of query and class.

    Two departures: transformers' own post-processing makes masks at 384 x 384 and rounds scores, here they are made at
    the picture's size; mmdet enlarges mask logits to the network's input first, here they are resized once.

    Args:
        class_logits (`torch.Tensor` of shape `(Q, C + 1)`):
            The last class is "none".
        mask_logits (`torch.Tensor` of shape `(Q, h, w)`):
            Masks of the whole picture, of any size.
        size (`tuple[int, int]`):
            Height and width of the picture.
        threshold (`float`):
            Instances of a larger score are found.
        top (`int`, *optional*, defaults to `100`):
            Pairs of query and class to look at.

    Returns:
        [`Detections`] with the logits' own class numbers, and masks.
    """
    num_classes = class_logits.shape[-1] - 1
    scores = class_logits.float().softmax(-1)[:, :-1].flatten()
    scores, pairs = (values[:top] for values in scores.sort(descending=True, stable=True))
    # A mask's score is at most 1: what is not above the threshold without it needs no mask, which is the dear part.
    scores, pairs = scores[scores > threshold], pairs[scores > threshold]
    logits = mask_logits[pairs // num_classes, None].float()
    logits = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[:, 0]
    masks = logits > 0
    areas = masks.sum((1, 2))
    scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / (areas + 1e-6)
    kept = (scores > threshold) & (areas > 0)
    return _sorted(Detections(scores[kept], pairs[kept] % num_classes, _bounds(masks[kept]), masks[kept]))


class _TransformersDetector(nn.Module, ABC):
    def __init__(self, model: "PreTrainedModel", processor: "BaseImageProcessor", labels: Tensor):
        super().__init__()
        self.model = model
        self.processor = processor
        self.labels = labels  # the checkpoint's class numbers -> places in COCO_CLASSES, -1 where unused

    def forward(self, pictures: Sequence[Image.Image], threshold: float, masks: bool = False) -> list[Detections]:
        found: list[Any] = [None] * len(pictures)
        for size in dict.fromkeys(picture.size for picture in pictures):
            # Of one size together: nothing is padded, so that no picture depends on the others.
            places = [i for i, picture in enumerate(pictures) if picture.size == size]
            pixels = self.processor(images=[pictures[i] for i in places], return_tensors="pt").pixel_values
            output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
            for i, detections in zip(places, self._detections(output, size[::-1], threshold), strict=True):
                found[i] = self._as_coco(detections, masks)
        return found

    @abstractmethod
    def _detections(self, output: "ModelOutput", size: tuple[int, int], threshold: float) -> list[Detections]:
        """Of each picture, with the checkpoint's class numbers; `size` is height and width."""

    def _check_finite(self, *outputs: Tensor) -> None:
        # NaN is above no threshold: it would pass for a picture with nothing in it.
        if not all(output.isfinite().all() for output in outputs):
            raise RuntimeError(
                f"The detector gave NaN or infinite numbers in {self.model.dtype}; give `dtype=torch.float32`, or a "
                "sound checkpoint."
            )

    def _as_coco(self, detections: Detections, masks: bool) -> Detections:
        labels = self.labels[detections.labels.cpu()]
        used = labels >= 0
        return Detections(
            detections.scores.cpu()[used],
            labels[used],
            detections.boxes.cpu()[used],
            detections.masks.cpu()[used] if masks and detections.masks is not None else None,
        )


class _MaskDetector(_TransformersDetector):
    def _detections(self, output: "ModelOutput", size: tuple[int, int], threshold: float) -> list[Detections]:
        self._check_finite(output.class_queries_logits, output.masks_queries_logits)
        queries = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [find_instances(*logits, size, threshold) for logits in queries]


class _BoxDetector(_TransformersDetector):
    def _detections(self, output: "ModelOutput", size: tuple[int, int], threshold: float) -> list[Detections]:
        self._check_finite(output.logits, output.pred_boxes)
        output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
        sizes = [size] * len(output.logits)
        found = self.processor.post_process_object_detection(output, threshold=threshold, target_sizes=sizes)
        return [_sorted(Detections(one["scores"], one["labels"], one["boxes"])) for one in found]


def _load_model(auto_class: Any, name: str, dtype: torch.dtype) -> "PreTrainedModel":
    model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    # transformers draws missing weights at random and only warns; buffers it computes.
    if missing := sorted(set(report["missing_keys"]) & {key for key, _ in model.named_parameters()}):
        raise ValueError(f"Detector {name!r} lacks {len(missing)} weights of its architecture: {missing[:5]} ...")
    return model


def _labels(name: str, num_labels: int) -> Tensor:
    if num_labels == len(COCO_CLASSES):
        return torch.arange(num_labels)
    if num_labels == 91:
        labels = torch.full((91,), -1)
        labels[_USED_IDS] = torch.arange(len(_USED_IDS))
        return labels
    raise ValueError(f"Detector {name!r} has {num_labels} classes; COCO's are 80, or 91 with the unused numbers.")


def _sorted(detections: Detections) -> Detections:
    order = detections.scores.sort(descending=True, stable=True).indices
    masks = None if detections.masks is None else detections.masks[order]
    return Detections(detections.scores[order], detections.labels[order], detections.boxes[order], masks)


def _bounds(masks: Tensor) -> Tensor:
    """Boxes around masks, none of them empty."""
    sides = []
    for line in (masks.any(1), masks.any(2)):  # columns, rows
        line = line.int()  # argmax is the first of equal ones
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float()


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError("Mask2Former of transformers needs scipy: `pip install trl-dgpo[geneval]`.") from error
