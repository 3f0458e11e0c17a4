"""
Prompt embeddings on disk: every distinct prompt is encoded once, in this run or in an earlier one.

They are an Arrow file in the cache of `datasets`, found again by a fingerprint of the prompts and of what encodes
them, and read from there row by row: a thousand prompts of SD3.5 take 1.7 GB of disk in bfloat16 and no memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike

import datasets
import safetensors.torch
from torch import Tensor


BATCH = 256  # prompts encoded at a time: text encoders that are moved for it are moved once a batch
WRITTEN = 32  # rows held in memory until they are written
FORMAT = 1  # of the rows; another number finds no older file


def precompute(
    prompts: Iterable[str],
    encode: Callable[[list[str]], dict[str, Tensor]],
    *,
    key: str,
    cache_dir: str | PathLike | None = None,
) -> Mapping[str, dict[str, Tensor]]:
    """
    Encodes prompts, or finds them encoded.

    A file is trusted only when it is whole: an interrupted run leaves none. With several processes, let the main one
    call this first; the others then find the file.

    Args:
        prompts (`Iterable[str]`):
            Prompts in any order, repetitions allowed. The same set of them finds the same file.
        encode (`Callable[[list[str]], dict[str, torch.Tensor]]`):
            Gives tensors with one row a prompt, such as [`~trl_dgpo.backbones.sd3.SD3Backbone.encode`]. Called for
            distinct prompts, some at a time, and not at all where there is a file.
        key (`str`):
            What decides the rows besides the prompt, such as
            [`~trl_dgpo.backbones.sd3.SD3Backbone.embeds_key`]: rows of another key are never read.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of the file; the cache of `datasets` if not given.

    Returns:
        `Mapping[str, dict[str, torch.Tensor]]`: by prompt its rows, without the dimension of the batch, on the CPU and
        equal to the bit to what `encode` gave. A prompt that was not asked for is a `KeyError`.
    """
    distinct = sorted(set(prompts))
    if not distinct:
        return {}
    fingerprint = hashlib.sha256(json.dumps([FORMAT, key, distinct]).encode()).hexdigest()[:32]
    dataset = datasets.Dataset.from_generator(
        _rows,
        gen_kwargs={"prompts": tuple(distinct), "encode": encode},  # a list would be taken for shards
        features=datasets.Features({"prompt": datasets.Value("string"), "row": datasets.Value("large_binary")}),
        fingerprint=fingerprint,
        cache_dir=None if cache_dir is None else str(cache_dir),
        writer_batch_size=WRITTEN,
    )
    return _PromptEmbeds(dataset)


class _PromptEmbeds(Mapping):
    def __init__(self, dataset: datasets.Dataset):
        self._dataset = dataset
        self._index = {prompt: i for i, prompt in enumerate(dataset["prompt"][:])}

    def __getitem__(self, prompt: str) -> dict[str, Tensor]:
        return safetensors.torch.load(self._dataset[self._index[prompt]]["row"])

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _rows(prompts: tuple[str, ...], encode: Callable[[list[str]], dict[str, Tensor]]) -> Iterator[dict]:
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        encoded = {name: tensor.cpu() for name, tensor in encode(batch).items()}
        for i, prompt in enumerate(batch):
            row = {name: tensor[i].contiguous() for name, tensor in encoded.items()}
            yield {"prompt": prompt, "row": safetensors.torch.save(row)}
