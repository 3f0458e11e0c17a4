"""Prompt embeddings on disk: encoded once, read to the bit, found again only by what they are."""

import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_random_pipeline

from trl_dgpo import prompt_embeds
from trl_dgpo.backbones.sd3 import SD3Backbone
from trl_dgpo.prompt_embeds import precompute


class Encoder:
    """Rows that say which prompt they are of, and a count of the prompts."""

    def __init__(self):
        self.prompts = []

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.prompts += prompts
        rows = [torch.tensor([[float(sum(map(ord, p))), float("nan"), 0.1], [-0.0, 1e-8, 3e38]]) for p in prompts]
        return {"hidden": torch.stack(rows).bfloat16(), "pooled": torch.stack(rows)[:, 0] / 3}

    def __reduce__(self):
        raise AssertionError("hashing what encodes would read gigabytes")


def never(prompts: list[str]):
    raise AssertionError(f"{prompts} are encoded again")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def test_every_distinct_prompt_is_encoded_once_and_read_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_embeds, "BATCH", 2)
    encode = Encoder()
    rows = precompute(["b", "a", "b", "c", "a"], encode, key="k", cache_dir=tmp_path)
    assert sorted(encode.prompts) == ["a", "b", "c"]
    assert set(rows) == {"a", "b", "c"}
    assert len(rows) == 3
    for prompt in "abc":
        for name, tensor in Encoder()([prompt]).items():
            row = rows[prompt][name]
            assert (row.dtype, row.shape) == (tensor.dtype, tensor.shape[1:])
            assert torch.equal(bits(row), bits(tensor[0]))
    with pytest.raises(KeyError):
        rows["d"]
    assert "d" not in rows


def test_rows_are_in_a_file_and_not_in_memory(tmp_path):
    rows = precompute("abc", Encoder(), key="k", cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.arrow")
    assert [entry["filename"] for entry in rows._dataset.cache_files] == [str(file)]


def test_they_are_found_again(tmp_path):
    first = precompute("abc", Encoder(), key="k", cache_dir=tmp_path)
    again = precompute("cabba", never, key="k", cache_dir=tmp_path)
    assert all(torch.equal(bits(again[p]["hidden"]), bits(first[p]["hidden"])) for p in "abc")
    code = (
        "import sys; from trl_dgpo.prompt_embeds import precompute; "
        "print(precompute('cba', None, key='k', cache_dir=sys.argv[1])['b']['hidden'][0, 0].item())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) == ord("b")


def test_another_key_or_other_prompts_are_encoded_anew(tmp_path):
    for key, prompts in (("k", "abc"), ("l", "abc"), ("k", "ab"), ("k", "abcd"), ("k", ["ab", "c"])):
        encode = Encoder()
        precompute(prompts, encode, key=key, cache_dir=tmp_path)
        assert encode.prompts == list(prompts)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_to_be_trusted(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_embeds, "BATCH", 1)

    def interrupted(prompts):
        if prompts == ["c"]:
            raise stop
        return Encoder()(prompts)

    with pytest.raises(BaseException) as raised:
        precompute("abc", interrupted, key="k", cache_dir=tmp_path)
    assert stop in (type(raised.value), type(raised.value.__cause__))  # datasets wraps errors, not interrupts
    encode = Encoder()
    rows = precompute("abc", encode, key="k", cache_dir=tmp_path)
    assert encode.prompts == ["a", "b", "c"]
    assert len(rows) == 3


def test_no_prompts():
    assert len(precompute([], never, key="k")) == 0


def test_a_backbone_reads_what_another_wrote(tmp_path):
    prompts = ["a sign: hi", "a sign: no", ""]
    first, second = (SD3Backbone(tiny_random_pipeline(0, True), max_sequence_length=8) for _ in range(2))
    precompute(prompts, first.encode, key=first.embeds_key(), cache_dir=tmp_path)
    second.prompt_embeds = precompute(prompts, never, key=second.embeds_key(), cache_dir=tmp_path)
    second.pipeline.encode_prompt = None
    order = [prompts[1], prompts[0], prompts[1]]
    for name, rows in first.encode(order).items():
        assert torch.equal(second.encode(order)[name], rows)
