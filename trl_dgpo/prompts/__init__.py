"""
Prompt sets: rows of a prompt and of what its reward needs to know.

A set is a function `f(split, num_prompts) -> list[dict]` of its arguments alone. "train" and "test" never share what
is tested. A new set is a file of its own and a line in the table.
"""

from collections.abc import Callable

from .counting import counting_prompts
from .geneval import geneval_prompts
from .out_of_distribution import ood_prompts
from .text import ocr_prompts, tiny_ocr_prompts


# Names on the command line. Without a number of prompts each has its own: the whole set where it is small, else
# 20 000 of "train" and 256 of "test".
PROMPT_SETS: dict[str, Callable[..., list[dict]]] = {
    "counting": counting_prompts,
    "geneval": geneval_prompts,
    "ocr": ocr_prompts,
    "ood": ood_prompts,
    "tiny-ocr": tiny_ocr_prompts,
}

__all__ = ["PROMPT_SETS", "counting_prompts", "geneval_prompts", "ocr_prompts", "ood_prompts", "tiny_ocr_prompts"]
