"""What each run's process would import first; the server that they are forked from does it once."""

import runs  # noqa: F401
from diffusers import StableDiffusion3Pipeline  # noqa: F401
from rapidocr import RapidOCR  # noqa: F401

import trl_dgpo
from trl_dgpo.cli import TRAINERS


for name in TRAINERS.values():
    for part in ("Trainer", "Config"):
        getattr(trl_dgpo, name + part)
