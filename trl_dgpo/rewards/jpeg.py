"""JPEG size as a reward: DDPO's two toy tasks, with no model. They show that a trainer learns at all."""

from io import BytesIO
from typing import Any

from PIL import Image


# The reference's training scale (Flow-GRPO and DGPO divide the kilobytes by it; DDPO does not).
_SCALE = 500.0


class JPEGIncompressibility:
    r"""
    Kilobytes (1000 bytes) of the picture as a JPEG of quality 95 (DDPO, arXiv 2305.13301): above 0, about 5 to 400 at
    512 px. Pillow encodes, with its default chroma subsampling (4:2:0), as DDPO does.

    Args:
        normalize (`bool`, *optional*, defaults to `False`):
            Divide by 500, as Flow-GRPO and DGPO train.
    """

    input_type = "pil"
    __name__ = "jpeg_incompressibility"
    _sign = 1.0

    def __init__(self, *, normalize: bool = False):
        self.normalize = normalize

    def __call__(self, completions: list[Image.Image], **columns: Any) -> list[float]:
        scale = self._sign / (_SCALE if self.normalize else 1.0)
        return [scale * _kilobytes(picture) for picture in completions]


class JPEGCompressibility(JPEGIncompressibility):
    r"""
    Minus the kilobytes (1000 bytes) of the picture as a JPEG of quality 95 (DDPO, arXiv 2305.13301): below 0, about
    -400 to -5 at 512 px. Pillow encodes, with its default chroma subsampling (4:2:0), as DDPO does.

    Args:
        normalize (`bool`, *optional*, defaults to `False`):
            Divide by 500, as Flow-GRPO and DGPO train.
    """

    __name__ = "jpeg_compressibility"
    _sign = -1.0


def _kilobytes(picture: Image.Image) -> float:
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
