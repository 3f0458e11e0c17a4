"""
What every backbone must do, whatever its family: see docs/new_backbone.md.

A new family adds its tiny pipeline to `tiny_families.FAMILIES`.
"""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_families import FAMILIES, tiny_family
from tiny_models import tiny_random_pipeline
from tiny_trainers import scramble, tiny_trainer, weights

from trl_dgpo.backbones import load_backbone
from trl_dgpo.evaluation.models import check_models, load_with_lora
from trl_dgpo.noising import trainable_levels


PROMPTS = ["a cat", "two dogs, one hat"]
LENGTH = 16
SIZE = (32, 64)
NAMES = ["sd3", *FAMILIES]
OWN = "own"  # the levels of the pipeline's scheduler
GRIDS = {
    "dpm": {"sampler": "dpm", "sigmas": "dpm"},
    "euler": {"sampler": "euler", "sigmas": "dpm"},
    OWN: {"sampler": "euler", "sigmas": "model"},
}
WALKED = [(name, grid) for name in NAMES for grid in GRIDS if name != "z-image" or grid == OWN]
WALK = {"num_steps": 2, "guidance_scale": 1.0}


def pipeline_of(name: str) -> DiffusionPipeline:
    return tiny_random_pipeline(third_text_encoder=True) if name == "sd3" else tiny_family(name)


def backbone_of(name: str, grid: str = OWN, **options):
    options = {**GRIDS[grid], "image_size": SIZE, "max_sequence_length": LENGTH, **options}
    return load_backbone(pipeline_of(name), **options)


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(name: str, pipeline: DiffusionPipeline, prompt: str, latents: torch.Tensor, **arguments) -> torch.Tensor:
    """What a pipeline itself makes of a prompt: latents where `output_type` says so, else pictures."""
    if name.startswith("flux"):
        latents = pipeline._pack_latents(latents, *latents.shape)
    size = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4}
    with torch.no_grad():
        images = pipeline(prompt, latents=latents, **size, **arguments).images
    if name.startswith("flux") and arguments["output_type"] == "latent":
        images = pipeline._unpack_latents(images, *SIZE, pipeline.vae_scale_factor)
    return images


# The same numbers, rounded otherwise: Z-Image's pipeline guides from the positive side, v + (g - 1) (v - v_negative),
# and FLUX's in two forwards of half the batch.
ROUNDED = {"z-image": 1e-5, "flux-dev": 1e-5, "flux-schnell": 1e-5}


@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(1.0, ""), (3.0, ""), (3.0, "grey")])
@pytest.mark.parametrize(("name", "grid"), WALKED)
def test_a_rollout_is_the_pipelines_own_call(name, grid, guidance_scale, negative_prompt):
    backbone, plain = backbone_of(name, grid, negative_prompt=negative_prompt), pipeline_of(name)
    plain.scheduler = backbone.scheduler
    arguments = backbone.pipeline_call(guidance_scale)
    drawn = []
    for seed, prompt in enumerate(PROMPTS):
        latents = noise(1, *backbone.latent_shape(*SIZE), seed=seed)
        x0 = backbone.sample(latents, backbone.encode([prompt]), num_steps=4, guidance_scale=guidance_scale)
        expected = call(name, plain, prompt, latents, output_type="latent", **arguments)
        if name in ROUNDED and guidance_scale > 1:
            torch.testing.assert_close(x0, expected, rtol=0, atol=ROUNDED[name])
            x0 = expected
        assert torch.equal(x0, expected)
        (picture,) = call(name, plain, prompt, latents, output_type="pil", **arguments)
        drawn.append(backbone.decode(x0))
        assert drawn[-1].shape == (1, 3, *SIZE)
        assert drawn[-1].dtype == torch.uint8
        assert np.array_equal(drawn[-1][0].permute(1, 2, 0).numpy(), np.asarray(picture))
        assert drawn[-1].float().std() > 5  # not a blank
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_in_half_precision_is_the_pipelines_own_call(name, dtype):
    plain = pipeline_of(name).to(dtype)
    plain.vae.float()  # as a named model is loaded
    backbone = load_backbone(plain, image_size=SIZE, max_sequence_length=LENGTH, **GRIDS[OWN])
    plain.scheduler = backbone.scheduler
    latents = noise(1, *backbone.latent_shape(*SIZE)).to(backbone.LATENTS_DTYPE or dtype)
    x0 = backbone.sample(latents, backbone.encode(PROMPTS[:1]), num_steps=4, guidance_scale=1.0)
    expected = call(name, plain, PROMPTS[0], latents, output_type="latent", **backbone.pipeline_call(1.0))
    assert x0.dtype == expected.dtype
    assert torch.equal(x0, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_company_changes_nothing(name, guidance_scale):
    prompts = [*PROMPTS, "a sign that says: forty characters and more of them"]  # not all of one length
    backbone = backbone_of(name, max_sequence_length=64)
    conditioning, x_t = backbone.encode(prompts), noise(3, *backbone.latent_shape(*SIZE))
    with torch.no_grad():
        together = backbone.predict(x_t, 0.5, conditioning, guidance_scale=guidance_scale)
        for i, prompt in enumerate(prompts):
            alone = backbone.predict(x_t[i : i + 1], 0.5, backbone.encode([prompt]), guidance_scale=guidance_scale)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "grid"), [pair for pair in WALKED if pair[1] != "dpm"])
def test_one_step_goes_to_where_the_prediction_points(name, grid):
    backbone = backbone_of(name, grid)
    conditioning, latents = backbone.encode(PROMPTS), noise(2, *backbone.latent_shape(*SIZE))
    sigma = backbone.sigmas(1).item()
    stepped = backbone.sample(latents, conditioning, num_steps=1, guidance_scale=1.0)
    with torch.no_grad():
        pointed = backbone.clean(latents, backbone.predict(latents, sigma, conditioning), sigma)
    # A scheduler may start a little above the level that it tells, or end a little above 0.
    distance = (stepped - pointed).abs().mean() / pointed.abs().mean()
    assert distance < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_guidance_and_the_negative_prompt_are_felt(name):
    backbone, grey = backbone_of(name), backbone_of(name, negative_prompt="grey")
    x_t = noise(2, *backbone.latent_shape(*SIZE))
    with torch.no_grad():
        plain, guided = (backbone.predict(x_t, 0.5, backbone.encode(PROMPTS), guidance_scale=g) for g in (1.0, 3.0))
        other = grey.predict(x_t, 0.5, grey.encode(PROMPTS), guidance_scale=3.0)
        negative = {key: row.expand(2, *row.shape[1:]) for key, row in backbone.negative().items()}
        away = backbone.predict(x_t, 0.5, negative)
        sides = backbone.predict_sides(x_t, 0.5, backbone.encode(PROMPTS))
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert not torch.allclose(guided, other, atol=1e-3)
    torch.testing.assert_close(guided, away + 3.0 * (plain - away), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sides, (away, plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "grid"), WALKED)
def test_a_rollout_is_a_function_of_its_noise(name, grid):
    backbone = backbone_of(name, grid)
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


def trainer_of(name: str, folder, *, model=None, **config):
    config = {**GRIDS[OWN], "resolution": SIZE[0], "width": SIZE[1], "max_sequence_length": LENGTH, **config}
    return tiny_trainer(folder, model=pipeline_of(name) if model is None else model, **config)


def drawn_by(pipeline_or_folder) -> torch.Tensor:
    """Latents of the two prompts, as evaluations draw them."""
    backbone = load_backbone(pipeline_or_folder, image_size=SIZE, max_sequence_length=LENGTH, **GRIDS[OWN])
    latents = noise(2, *backbone.latent_shape(*SIZE))
    return backbone.sample(latents, backbone.encode(PROMPTS), num_steps=2, guidance_scale=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_moves_the_lora_alone(name, tmp_path):
    trainer = trainer_of(name, tmp_path, learning_rate=1e-2)
    scramble(trainer)
    lora = weights(trainer)
    whole = {key: tensor.clone() for key, tensor in trainer.backbone.denoiser.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(tensor, lora[key]) for key, tensor in weights(trainer).items())
    after = trainer.backbone.denoiser.state_dict()
    frozen = [key for key in whole if "lora_" not in key]
    assert 0 < len(frozen) < len(whole)
    assert all(torch.equal(whole[key], after[key]) for key in frozen)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("sd15") else []) for name in NAMES]
)  # SDXL is of their kind
def test_ways_to_save_memory_change_nothing(name, tmp_path):
    plain = trainer_of(name, tmp_path / "plain", learning_rate=1e-2)
    saving = trainer_of(
        name,
        tmp_path / "saving",
        learning_rate=1e-2,
        gradient_checkpointing=True,
        offload_text_encoders=True,
        precompute_prompt_embeds=True,
        per_device_train_batch_size=4,
    )
    for trainer in (plain, saving):
        scramble(trainer)
        trainer.train()
    assert saving.backbone.denoiser.is_gradient_checkpointing
    assert saving.backbone.prompt_embeds is not None
    torch.testing.assert_close(weights(saving), weights(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_lora_gives_the_same_bits_in_a_plain_pipeline(name, tmp_path):
    base, saved = str(tmp_path / "base"), tmp_path / "lora"
    pipeline_of(name).save_pretrained(base)
    unchanged = drawn_by(base)
    assert torch.equal(unchanged, drawn_by(pipeline_of(name)))
    trainer = trainer_of(name, saved, model=base)
    scramble(trainer)
    scramble(trainer, "ema")
    trainer.save_model()
    mine = drawn_by(trainer.backbone.pipeline)
    assert not torch.equal(mine, unchanged)
    plain = pipeline_of(name)
    plain.load_lora_weights(saved)
    assert torch.equal(drawn_by(plain), mine)
    # As the commands find it, in PEFT's format and in diffusers'.
    check_models(base, [str(saved)])
    assert torch.equal(drawn_by(load_with_lora(base, str(saved))), mine)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (saved / file).unlink()
    check_models(base, [str(saved)])
    assert torch.equal(drawn_by(load_with_lora(base, str(saved))), mine)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_is_trained_whole_is_saved_under_its_name(name, tmp_path):
    trainer = trainer_of(name, tmp_path, full_finetuning=True, learning_rate=1e-3, save_ema=False)
    trainer.train()
    trainer.save_model()
    folder = trainer.backbone.DENOISER
    saved = type(trainer.backbone.denoiser).from_pretrained(tmp_path / folder)
    pipeline = pipeline_of(name)
    unchanged = drawn_by(pipeline)
    setattr(pipeline, folder, saved.eval())
    assert torch.equal(drawn_by(pipeline), drawn_by(trainer.backbone.pipeline))
    assert not torch.equal(drawn_by(pipeline), unchanged)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found_and_compiled(name):
    backbone = backbone_of(name)
    before = backbone.sample(*(args := (noise(2, *backbone.latent_shape(*SIZE)), backbone.encode(PROMPTS))), **WALK)
    backbone.compile_blocks("eager")
    compiled = [module for module in backbone.denoiser.modules() if module._compiled_call_impl is not None]
    assert compiled
    assert torch.equal(backbone.sample(*args, **WALK), before)


def test_only_distilled_guidance_is_told():
    backbone, other = backbone_of("flux-dev"), backbone_of("flux-dev", embedded_guidance=1.0)
    x_t = noise(2, *backbone.latent_shape(*SIZE))
    conditioning = backbone.encode(PROMPTS)
    with torch.no_grad():
        assert not torch.equal(backbone.predict(x_t, 0.5, conditioning), other.predict(x_t, 0.5, conditioning))
    for name in NAMES:
        if name != "flux-dev":
            with pytest.raises(ValueError, match="`embedded_guidance` is 2, which only a model"):
                backbone_of(name, embedded_guidance=2)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_stochastic_steps_are_those_of_flow_matching(name):
    with pytest.raises(ValueError, match="`sampler` is 'sde', the stochastic steps of flow matching"):
        backbone_of(name, sampler="sde")


def test_a_dropped_prompt_is_the_negative_one(tmp_path):
    # SDXL was trained to see zeros in place of an empty prompt, not its embedding.
    trainer = trainer_of("sdxl", tmp_path, prompt_dropout=0.999)
    seen = []

    def look(module, args, kwargs):
        if module.training:
            seen.append(kwargs["encoder_hidden_states"])

    trainer.backbone.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    assert seen
    assert not any(rows.any() for rows in seen)


def test_sdxls_vae_does_not_overflow():
    plain = pipeline_of("sdxl").to(torch.float16)
    weight = plain.vae.decoder.conv_in.weight
    weight.data = (weight.float() * 6e4 / weight.abs().max()).half()  # what follows is beyond float16
    plain.vae.register_to_config(force_upcast=True)
    backbone = load_backbone(plain, image_size=SIZE, **GRIDS[OWN])
    plain.scheduler = backbone.scheduler
    latents = noise(1, *backbone.latent_shape(*SIZE)).half()
    x0 = backbone.sample(latents, backbone.encode(PROMPTS[:1]), num_steps=4, guidance_scale=1.0)
    (picture,) = call("sdxl", plain, PROMPTS[0], latents, output_type="pil", **backbone.pipeline_call(1.0))
    drawn = backbone.decode(x0)
    assert drawn.float().std() > 5
    assert np.array_equal(drawn[0].permute(1, 2, 0).numpy(), np.asarray(picture))
    assert backbone.encode_images(drawn).isfinite().all()
    assert plain.vae.dtype == torch.float16  # it is the user's


def test_z_images_pipeline_takes_no_other_levels():
    for grid in ("dpm", "euler"):
        with pytest.raises(ValueError, match="tells its scheduler the levels, which DPM-Solver"):
            backbone_of("z-image", grid)


def test_guidance_that_is_hardly_meant_is_told_once(caplog):
    backbone = backbone_of("flux-dev")
    x_t, conditioning = noise(2, *backbone.latent_shape(*SIZE)), backbone.encode(PROMPTS)
    with torch.no_grad():
        backbone.predict(x_t, 0.5, conditioning)
        told = [record for record in caplog.records if record.name.startswith("trl_dgpo")]
        assert not told
        for _ in range(2):
            backbone.predict(x_t, 0.5, conditioning, guidance_scale=3.0)
    told = [record for record in caplog.records if record.name.startswith("trl_dgpo")]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "Set `sample_guidance_scale=1.0`" in caplog.text


def test_a_chat_template_is_part_of_what_embeds():
    backbone, other = backbone_of("z-image"), backbone_of("z-image")
    assert backbone.embeds_key() == other.embeds_key()
    other.pipeline.tokenizer.chat_template = "{% for message in messages %}a {{ message['content'] }}{% endfor %}"
    assert backbone.embeds_key() != other.embeds_key()
