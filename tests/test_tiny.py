import json

import numpy as np
import pytest
import torch

from trl_dgpo.prompts import tiny_ocr_prompts
from trl_dgpo.rewards import OCRReward
from trl_dgpo.tiny import tiny_pipeline_path


MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts: list[str], **settings):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    settings = {"height": 32, "width": 64, "num_inference_steps": 10, "guidance_scale": 1.0} | settings
    return pipeline(prompts, generator=generators, **settings).images


def test_loads_in_one_dtype_with_every_part(pipeline):
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 5
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    assert pipeline.scheduler.config.shift == 3.0


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in tiny_pipeline_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}


def test_draws_about_two_letters_in_three(pipeline):
    """The start of every learning test; the stock call's 256 silent tokens change it little."""
    rows = tiny_ocr_prompts("test", 64)
    prompts, texts = [row["prompt"] for row in rows], [row["text"] for row in rows]
    reward = OCRReward(recognition_only=True)
    short = reward(prompts, draw(pipeline, prompts, max_sequence_length=1), text=texts)
    stock = reward(prompts[:16], draw(pipeline, prompts[:16]), text=texts[:16])
    assert np.mean(short) == pytest.approx(0.65, abs=0.1)
    assert np.mean(stock) == pytest.approx(np.mean(short[:16]), abs=0.1)


def test_the_third_encoder_says_nothing_and_cuts_nothing_off(pipeline, caplog):
    embeds = pipeline.encode_prompt('A sign that says "CAFE"', None, None, max_sequence_length=3)[0]
    assert embeds.shape == (1, 12 + 3, 64)
    assert torch.count_nonzero(embeds[:, 12:]) == 0
    assert not caplog.records


def test_the_number_of_silent_tokens_changes_little(pipeline):
    prompt = ['A sign that says "CAFE"']
    short, stock = (np.asarray(draw(pipeline, prompt, max_sequence_length=n)[0], dtype=float) for n in (1, 256))
    assert abs(short - stock).mean() < 25


def test_letters_decide_the_picture(pipeline):
    """Same noise, other text: other letters; upper and lower case are one."""
    cafe, bike, lower = (
        np.asarray(draw(pipeline, [f'A sign that says "{text}"'])[0], dtype=float) for text in ("CAFE", "BIKE", "cafe")
    )
    assert abs(cafe - bike).mean() > 5
    assert np.array_equal(cafe, lower)


def test_the_plainest_call_works(pipeline):
    image = pipeline('A sign that says "CAFE"', num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_the_build_log_tells_its_story():
    log = json.loads((tiny_pipeline_path() / "build_log.json").read_text())
    assert log["vae"]["ocr_exact_of_reconstructions"] > 0.97
    assert log["clean"]["ocr"] > 0.95
    assert 0.6 <= log["noisy"]["ocr"] <= 0.7
    assert abs(log["noisy"]["ocr"] - log["noisy"]["ocr_at_256_tokens"]) < 0.03


class TestBuild:
    @pytest.fixture(scope="class")
    def build(self):
        return pytest.importorskip("trl_dgpo.tiny.build")

    def test_counting_one_silent_token_n_times_is_having_n_of_them(self, build):
        torch.manual_seed(0)
        pipeline = build.new_pipeline()
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        inputs = build.encode_captions(pipeline, ['A sign that says "CAFE"', ""])
        x, timestep = torch.randn(2, 8, 8, 16), torch.tensor([500.0, 900.0])
        embeds = inputs.pop("encoder_hidden_states")
        many = torch.cat([embeds, embeds[:, -1:].expand(-1, 19, -1)], dim=1)
        with torch.no_grad():
            expected = pipeline.transformer(x, many, timestep=timestep, **inputs).sample
            plain = pipeline.transformer(x, embeds, timestep=timestep, **inputs).sample
            with build.SilentTokens(torch.tensor([20.0, 20.0])):
                counted = pipeline.transformer(x, embeds, timestep=timestep, **inputs).sample
        assert (plain - expected).abs().max() > 1e-2
        torch.testing.assert_close(counted, expected, rtol=1e-4, atol=1e-4)

    def test_runs_from_nothing_to_a_folder(self, build, tmp_path):
        from diffusers import StableDiffusion3Pipeline

        log = build.build(tmp_path / "sd3", num_images=64, vae_steps=2, clean_steps=2, noise_steps=2, num_test=4)
        assert json.loads((tmp_path / "sd3/build_log.json").read_text()) == log
        assert len(draw(StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3"), [""])) == 1

    def test_no_test_text_is_learned(self, build):
        import random

        learned = set(build.training_texts(16_000, random.Random(0)))
        assert not learned & {row["text"] for row in tiny_ocr_prompts("test", 2000)}
