"""
Named random streams.

Every draw of a training run has a name: what it is for and which round, pass, level, group or image it belongs to. The
name is hashed into the seed of a CPU generator, so a draw never depends on how many were made before it, on the
process that makes it, on the micro-batch it falls into or on the device it is used on.
"""

import hashlib
import operator

import torch


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """
    CPU generator of the named stream.

    Args:
        seed (`int`):
            Seed of the run.
        purpose (`str`):
            What is drawn, e.g. `"noise"`. Streams of different purposes are independent.
        *key (`int` or `str`):
            Which draw of this purpose, e.g. round, pass, level and group. An integer of numpy or torch names the same
            stream as Python's own.

    Returns:
        `torch.Generator` on the CPU, seeded with the first 63 bits of the SHA-256 of the arguments.

    Raises:
        `TypeError`: if a part of the key is neither an integer nor a string.
    """
    parts = (part if isinstance(part, str) else operator.index(part) for part in (seed, purpose, *key))
    digest = hashlib.sha256(repr(tuple(parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
