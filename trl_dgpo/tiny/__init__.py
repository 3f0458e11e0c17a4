"""The tiny SD3: a whole Stable Diffusion 3 pipeline of 1.4 million parameters that writes four letters on a sign."""

from pathlib import Path
from typing import Any


BUNDLED = "tiny"


def tiny_pipeline_path() -> Path:
    """The bundled pipeline's folder; `StableDiffusion3Pipeline.from_pretrained(folder)` loads it as it is."""
    return Path(__file__).parent / "sd3"


def pipeline_source(model: Any) -> Any:
    """What a pipeline is loaded from: the bundled folder for `"tiny"`, anything else as it is."""
    return tiny_pipeline_path() if model == BUNDLED else model
