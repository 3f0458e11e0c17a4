"""Tiny random detectors on disk, in the files of the real ones, and one that finds what it is told."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from trl_dgpo.coco import COCO_CLASSES
from trl_dgpo.rewards.detect import Detections


Scene = list[tuple[str, float, tuple[int, int, int, int]]]  # class, score, box


def tiny_mask2former(folder: Path, num_labels: int = 80, num_queries: int = 10) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = dict.fromkeys(["encoder_feedforward_dim", "dim_feedforward"], 16)
    small |= dict.fromkeys(["feature_size", "mask_feature_size", "hidden_dim"], 32)
    config = Mask2FormerConfig(
        backbone_config=swin,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=num_queries,
        num_labels=num_labels,
        **small,
    )
    # The real checkpoint is said to name another size.
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 384, "width": 384}}
    processor |= {"do_normalize": True, "do_resize": True, "ignore_index": 255, "reduce_labels": False}
    return _save(folder, Mask2FormerForUniversalSegmentation(config), processor | {"size_divisor": 16})


def tiny_rt_detr(folder: Path, num_labels: int = 80, size: int = 64) -> Path:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    resnet = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    model = RTDetrForObjectDetection(RTDetrConfig(backbone_config=resnet, num_labels=num_labels, **_DETR))
    # Keys that the real file has since earlier versions.
    legacy = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_kwargs": None}
    return _save(folder, model, _plain_resize(size), legacy)


def tiny_d_fine(folder: Path, size: int = 64) -> Path:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    ones = [1, 1, 1, 1]
    hgnet = HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=ones,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=ones,
        stage_numb_of_layers=ones,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(backbone_config=hgnet, num_labels=80, **_DETR | {"decoder_layers": 2})
    return _save(folder, DFineForObjectDetection(config), _plain_resize(size))


def tiny_yolos(folder: Path, size: int = 64) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        num_detection_tokens=6,
        num_labels=91,
    )
    processor = {"image_processor_type": "YolosImageProcessor", "do_normalize": True, "do_resize": True}
    processor |= {"size": {"shortest_edge": size, "longest_edge": 1333}}
    return _save(folder, YolosForObjectDetection(config), processor)


class FakeDetector(nn.Module):
    """Finds in picture number i what scene i says, whatever the threshold; its masks fill the boxes' left halves."""

    def __init__(self, scenes: Sequence[Scene]):
        super().__init__()
        self.scenes = scenes
        self.calls: list[tuple[float, bool]] = []

    def forward(self, pictures, threshold, masks=False):
        self.calls.append((threshold, masks))
        return [
            self._detections(self.scenes[picture.getpixel((0, 0))[0]], picture.size, masks) for picture in pictures
        ]

    def _detections(self, scene: Scene, size: tuple[int, int], masks: bool) -> Detections:
        scene = sorted(scene, key=lambda found: -found[1])
        filled = torch.zeros(len(scene), size[1], size[0], dtype=torch.bool)
        for mask, (_, _, (x0, y0, x1, y1)) in zip(filled, scene, strict=True):
            mask[y0:y1, x0 : (x0 + x1) // 2] = True
        return Detections(
            torch.tensor([score for _, score, _ in scene]),
            torch.tensor([COCO_CLASSES.index(name) for name, *_ in scene], dtype=torch.long),
            torch.tensor([box for *_, box in scene], dtype=torch.float32).view(-1, 4),
            filled if masks else None,
        )


def numbered(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A grey picture that the fake detector knows by its first pixel."""
    picture = Image.new("RGB", size, (100, 100, 100))
    picture.putpixel((0, 0), (number, 0, 0))
    return picture


_DETR = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 10,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
}


def _plain_resize(size: int) -> dict:
    processor = {"image_processor_type": "RTDetrImageProcessor", "do_normalize": False, "do_resize": True}
    return processor | {"size": {"height": size, "width": size}}


def _save(folder: Path, model: nn.Module, processor: dict, legacy: dict | None = None) -> Path:
    # Far enough from zero that detectors are sure of something, and differ from picture to picture.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (legacy or {})))
    return folder
