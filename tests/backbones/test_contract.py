"""
What every backbone must do, whatever its family: see docs/new_backbone.md.

A new family adds its tiny pipeline to `tiny_families.FAMILIES` and how the plain pipeline is called to `PLAIN`.
"""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_families import FAMILIES, tiny_family
from tiny_models import tiny_random_pipeline
from tiny_trainers import scramble, tiny_trainer, weights

from trl_dgpo.backbones import load_backbone
from trl_dgpo.noising import trainable_levels


PROMPTS = ["a cat", "two dogs, one hat"]
LENGTH = 16
SIZE = (32, 64)
NAMES = ["sd3", *FAMILIES]


def pipeline_of(name: str) -> DiffusionPipeline:
    return tiny_random_pipeline(third_text_encoder=True) if name == "sd3" else tiny_family(name)


def backbone_of(name: str, **options):
    options = {"sampler": "euler", "sigmas": "model", "image_size": SIZE, "max_sequence_length": LENGTH, **options}
    return load_backbone(pipeline_of(name), **options)


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# How diffusers itself is called: embeddings of one prompt at a time, since company may round them otherwise.


def _sd3(pipeline, latents, guidance_scale, **call):
    rows = [pipeline.encode_prompt([p], None, None, max_sequence_length=LENGTH) for p in PROMPTS]
    return pipeline(**_embeds(rows, pooled=True), latents=latents, guidance_scale=guidance_scale, **call)


def _sd15(pipeline, latents, guidance_scale, **call):
    rows = [pipeline.encode_prompt([p], "cpu", 1, True) for p in PROMPTS]
    return pipeline(**_embeds(rows, pooled=False), latents=latents, guidance_scale=guidance_scale, **call)


def _sdxl(pipeline, latents, guidance_scale, **call):
    rows = [pipeline.encode_prompt([p], device="cpu") for p in PROMPTS]
    return pipeline(**_embeds(rows, pooled=True), latents=latents, guidance_scale=guidance_scale, **call)


def _flux(pipeline, latents, guidance_scale, **call):
    call |= {"guidance_scale": 3.5, "true_cfg_scale": guidance_scale}
    parts = []
    for prompts in (PROMPTS, ["", ""]):
        rows = [pipeline.encode_prompt([p], None, max_sequence_length=LENGTH)[:2] for p in prompts]
        parts.append([torch.cat(tensors) for tensors in zip(*rows)])
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, [*parts[0], *parts[1]], strict=True))
    out = pipeline(**embeds, latents=pipeline._pack_latents(latents, *latents.shape), **call)
    if call["output_type"] == "latent":
        out.images = pipeline._unpack_latents(out.images, *SIZE, pipeline.vae_scale_factor)
    return out


def _z_image(pipeline, latents, guidance_scale, **call):
    encoded = [pipeline.encode_prompt([p], max_sequence_length=LENGTH) for p in PROMPTS]
    positive, negative = ([rows for [rows] in part] for part in zip(*encoded))
    return pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        latents=latents,
        guidance_scale=guidance_scale - 1,
        **call,
    )


def _embeds(rows, *, pooled: bool) -> dict[str, torch.Tensor]:
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] * pooled
    return {name: torch.cat(tensors) for name, tensors in zip(names, zip(*rows), strict=True)}


PLAIN = {
    "sd3": _sd3,
    "sd15": _sd15,
    "sd15-v": _sd15,
    "sdxl": _sdxl,
    "flux-dev": _flux,
    "flux-schnell": _flux,
    "z-image": _z_image,
}

# Z-Image's pipeline guides from the positive side, v + (g - 1) (v - v_negative): the same number, rounded otherwise.
ROUNDED = {"z-image": 1e-5}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_is_the_pipelines_own_call(name, guidance_scale):
    backbone, plain = backbone_of(name), pipeline_of(name)
    plain.scheduler = backbone.scheduler
    latents = noise(2, *backbone.latent_shape(*SIZE))
    call = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4}
    x0 = backbone.sample(latents, backbone.encode(PROMPTS), num_steps=4, guidance_scale=guidance_scale)
    with torch.no_grad():
        expected = PLAIN[name](plain, latents, guidance_scale, output_type="latent", **call).images
        pictures = PLAIN[name](plain, latents, guidance_scale, output_type="pil", **call).images
    if name in ROUNDED and guidance_scale > 1:
        torch.testing.assert_close(x0, expected, rtol=0, atol=ROUNDED[name])
        x0 = expected
    else:
        assert torch.equal(x0, expected)
    decoded = backbone.decode(x0)
    assert decoded.shape == (2, 3, *SIZE)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(picture) for picture in pictures]))
    assert decoded.float().std() > 5  # not a blank
    assert not torch.equal(x0[0], x0[1])


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_is_a_function_of_its_noise(name, sampler):
    backbone = backbone_of(name, sampler=sampler, sigmas="dpm")
    conditioning = backbone.encode(PROMPTS)
    latents = noise(2, *backbone.latent_shape(*SIZE))
    call = {"num_steps": 3, "guidance_scale": 1.0}
    x0 = backbone.sample(latents, conditioning, **call)
    assert x0.shape == latents.shape
    assert torch.equal(x0, backbone.sample(latents, conditioning, **call))
    assert not torch.allclose(x0, backbone.sample(-latents, conditioning, **call), atol=1e-2)
    sigmas = backbone.sigmas(3)
    assert sigmas.shape == (3,)
    assert sigmas.dtype == torch.float64
    assert 1 >= sigmas[0] > sigmas[1] > sigmas[2] >= 0
    assert trainable_levels(sigmas, 0.0, backbone.shift_factor).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_is_of_each_prompt_alone(name):
    backbone = backbone_of(name)
    both, one = backbone.encode(PROMPTS), backbone_of(name).encode(PROMPTS[1:])
    assert tuple(both) == backbone.CONDITIONING
    for key, rows in both.items():
        assert rows.shape == (2, *one[key].shape[1:])
        assert torch.equal(rows[1:], one[key])
    assert any(not torch.equal(rows[0], rows[1]) for rows in both.values())


@pytest.mark.parametrize("name", NAMES)
def test_noise_and_target_at_both_ends(name):
    backbone = backbone_of(name)
    x0, drawn = noise(2, *backbone.latent_shape(*SIZE)), noise(2, *backbone.latent_shape(*SIZE), seed=1)
    # The first of DDPM's timesteps is not quite clean, the last not quite noise.
    assert (backbone.noise(x0, drawn, 0.0) - x0).abs().max() < 0.15
    assert (backbone.noise(x0, drawn, 1.0) - drawn).abs().max() < 0.35
    for sigma in (0.2, 0.5, 0.9):
        each = torch.tensor([sigma, sigma])
        x_t, target = backbone.noise(x0, drawn, each), backbone.target(x0, drawn, each)
        assert x_t.shape == target.shape == x0.shape
        assert x_t.dtype == target.dtype == torch.float32
        torch.testing.assert_close(x_t, backbone.noise(x0, drawn, sigma))  # a float is rounded later than a tensor
        torch.testing.assert_close(target, backbone.target(x0, drawn, sigma))
        # Who knows the target finds x0 again: the pair of them has lost nothing.
        clean = backbone.clean(x_t, target, each)
        torch.testing.assert_close(clean, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_prediction_at_every_level(name):
    backbone = backbone_of(name)
    conditioning, x_t = backbone.encode(PROMPTS), noise(2, *backbone.latent_shape(*SIZE))
    with torch.no_grad():
        predictions = [backbone.predict(x_t, sigma, conditioning) for sigma in (0.0, 0.5, 1.0)]
        each = backbone.predict(x_t, torch.tensor([0.5, 1.0]), conditioning)
        other = backbone.predict(x_t, 0.5, backbone.encode(PROMPTS[::-1]))
    for prediction in predictions:
        assert prediction.shape == x_t.shape
        assert prediction.isfinite().all()
    assert not torch.equal(predictions[0], predictions[1])  # the level is told
    assert not torch.equal(predictions[1], other)  # and the prompt
    torch.testing.assert_close(each[0], predictions[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each[1], predictions[2][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_encoded_and_decoded(name):
    backbone = backbone_of(name)
    x0 = noise(2, *backbone.latent_shape(*SIZE))
    torch.testing.assert_close(backbone._to_latents(backbone._to_vae(x0)), x0, rtol=1e-5, atol=1e-5)
    images = backbone.decode(x0)
    assert backbone.encode_images(images).shape == x0.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_moves_the_lora_alone(name, tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        model=pipeline_of(name),
        sampler="euler",
        resolution=SIZE[0],
        width=SIZE[1],
        max_sequence_length=LENGTH,
        learning_rate=1e-2,
    )
    scramble(trainer)
    lora = weights(trainer)
    frozen = {
        key: tensor.clone() for key, tensor in trainer.backbone.denoiser.state_dict().items() if "lora" not in key
    }
    trainer.train()
    assert any(not torch.equal(tensor, lora[key]) for key, tensor in weights(trainer).items())
    after = trainer.backbone.denoiser.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in frozen.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_lora_gives_the_same_bits_in_a_plain_pipeline(name, tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        model=pipeline_of(name),
        sampler="euler",
        resolution=SIZE[0],
        width=SIZE[1],
        max_sequence_length=LENGTH,
    )
    scramble(trainer)
    trainer.backbone.save_lora(tmp_path, trainer.policy.lora_state_dict(), trainer.policy.peft_config.to_dict())
    plain = pipeline_of(name)
    plain.load_lora_weights(tmp_path)
    other = load_backbone(plain, sampler="euler", image_size=SIZE, max_sequence_length=LENGTH)
    latents = noise(2, *other.latent_shape(*SIZE))
    call = {"num_steps": 2, "guidance_scale": 1.0}
    mine = trainer.backbone.sample(latents, trainer.backbone.encode(PROMPTS), **call)
    assert torch.equal(mine, other.sample(latents, other.encode(PROMPTS), **call))
    base = backbone_of(name, sigmas="dpm")
    assert not torch.equal(mine, base.sample(latents, base.encode(PROMPTS), **call))
