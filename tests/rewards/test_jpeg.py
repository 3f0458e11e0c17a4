import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import picture

from trl_dgpo.rewards import get_reward
from trl_dgpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from trl_dgpo.rewards.scoring import RewardScorer


def jpeg_bytes(image, **options):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return len(buffer.getvalue())


def noisy(amount):
    noise = np.random.default_rng(0).normal(0, amount, (64, 64, 3))
    return Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (9, 200)])
def test_the_bytes_are_pillows(size):
    image = picture(*size)
    assert JPEGIncompressibility()(prompts=["a"], completions=[image]) == [jpeg_bytes(image) / 1000]
    # DDPO leaves Pillow's chroma subsampling as it is.
    assert jpeg_bytes(image) == jpeg_bytes(image, subsampling="4:2:0") < jpeg_bytes(image, subsampling="4:4:4")


def test_compressibility_is_the_same_below_zero():
    images = [picture(40, 40, seed) for seed in range(3)]
    size = JPEGIncompressibility()(prompts=["a"] * 3, completions=images)
    assert JPEGCompressibility()(prompts=["a"] * 3, completions=images) == [-kilobytes for kilobytes in size]
    assert len(set(size)) == 3


@pytest.mark.parametrize("reward_class", [JPEGCompressibility, JPEGIncompressibility])
def test_the_training_scale(reward_class):
    images = [picture(40, 40)]
    [raw], [scaled] = (reward_class(normalize=n)(prompts=["a"], completions=images) for n in (False, True))
    assert scaled == pytest.approx(raw / 500)


def test_noise_costs_bytes():
    sizes = JPEGIncompressibility()(prompts=["a"] * 5, completions=[noisy(amount) for amount in (0, 4, 16, 32, 64)])
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 5


def test_it_reads_rgb_whatever_the_mode():
    image = picture(30, 20)
    assert JPEGIncompressibility()(prompts=["a"], completions=[image.convert("RGBA")]) == [jpeg_bytes(image) / 1000]


def test_both_in_the_scorer():
    images = torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rewards = [get_reward("jpeg-compressibility"), get_reward("jpeg-incompressibility", normalize=True)]
    scores = RewardScorer(rewards)(images, ["a", "b", "c"], {"text": ["1", "2", "3"]})
    assert list(scores.by_name) == ["jpeg_compressibility", "jpeg_incompressibility"]
    expected = [jpeg_bytes(Image.fromarray(image)) / 1000 for image in images.permute(0, 2, 3, 1).numpy()]
    assert scores.by_name["jpeg_compressibility"].tolist() == [-kilobytes for kilobytes in expected]
    torch.testing.assert_close(scores.by_name["jpeg_incompressibility"] * 500, -scores.by_name["jpeg_compressibility"])


def test_it_can_be_pickled():
    reward = pickle.loads(pickle.dumps(JPEGCompressibility(normalize=True)))
    assert (reward.normalize, reward.__name__, reward.input_type) == (True, "jpeg_compressibility", "pil")
