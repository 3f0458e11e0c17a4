"""What each run's process would import first; the server that they are forked from does it once."""

import runs
from diffusers import StableDiffusion3Pipeline  # noqa: F401
from rapidocr import RapidOCR  # noqa: F401

import trl_dgpo


for names in runs.TRAINERS.values():
    for name in names:
        getattr(trl_dgpo, name)
