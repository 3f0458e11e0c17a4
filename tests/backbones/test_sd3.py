"""The SD3 backbone is the plain pipeline, cut where a trainer needs it: same bits, counted calls, pinned grids."""

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from tiny_models import tiny_random_pipeline

from trl_dgpo.backbones import base, load_backbone
from trl_dgpo.backbones.sd3 import SD3Backbone
from trl_dgpo.noising import trainable_levels
from trl_dgpo.policy import Policy
from trl_dgpo.tiny import pipeline_source


PROMPTS = ["a sign: cafe", "a sign: hi"]
LENGTH = 8  # tokens of the third text encoder in these tests

SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


def make_backbone(third_text_encoder=False, sd35=False, **options) -> SD3Backbone:
    return SD3Backbone(tiny_random_pipeline(0, third_text_encoder, sd35), **{"max_sequence_length": LENGTH, **options})


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_model(backbone: SD3Backbone, rank: int = 4, **options):
    """The backbone's transformer with a LoRA that acts (B is not zero), the same in every call."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(backbone.LORA_TARGETS), **options)
    model = get_peft_model(backbone.denoiser, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, config


def record_calls(module: torch.nn.Module) -> list[dict]:
    """Keyword arguments of every forward of `module` from now on."""
    calls = []
    module.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


# Grids


@pytest.mark.parametrize(
    ("num_steps", "timesteps"),
    [
        (4, [999, 899, 749, 499]),
        (10, [999, 963, 922, 874, 817, 749, 666, 562, 428, 249]),
        (14, [999, 974, 947, 916, 881, 843, 799, 749, 691, 624, 545, 449, 333, 187]),
    ],
)
def test_dpm_grid_is_the_authors(num_steps, timesteps):
    for sampler in ("dpm", "euler", "sde"):
        sigmas = make_backbone(sampler=sampler).sigmas(num_steps)
        assert sigmas.dtype == torch.float64
        assert (sigmas * 1000).tolist() == timesteps


def test_model_grid_is_the_pipelines_own():
    sigmas = make_backbone(sampler="euler", sigmas="model").sigmas(10)
    expected = [1000, 960.13, 913.35, 857.69, 790.37, 707.28, 602.15, 464.88, 278.05, 8.93]
    np.testing.assert_allclose(sigmas * 1000, expected, atol=0.005)


@pytest.mark.parametrize(("num_steps", "t_min", "last"), [(10, 0.4, 6), (10, 0.6, 4), (14, 0.4, 8), (14, 0.6, 5)])
def test_noisy_prefix_of_the_grid(num_steps, t_min, last):
    backbone = make_backbone()
    assert backbone.shift_factor == 3.0
    levels = trainable_levels(backbone.sigmas(num_steps), t_min, backbone.shift_factor)
    assert levels.tolist() == list(range(last + 1))


# Rollouts


def plain_latents(pipeline, latents, num_steps, guidance_scale, output_type="latent"):
    """The plain call of diffusers, from embeddings that diffusers made."""
    with torch.no_grad():
        rows = [pipeline.encode_prompt([p], None, None, max_sequence_length=LENGTH) for p in PROMPTS]
    positive, negative, pooled, negative_pooled = (torch.cat(tensors) for tensors in zip(*rows))
    return pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=latents,
        height=32,
        width=64,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type=output_type,
    ).images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("third_text_encoder", [False, True])
@pytest.mark.parametrize(("sampler", "sigmas"), [("dpm", "dpm"), ("euler", "dpm"), ("euler", "model")])
def test_rollout_and_images_are_the_plain_pipelines_bits(sampler, sigmas, third_text_encoder, guidance_scale):
    backbone = make_backbone(third_text_encoder, sampler=sampler, sigmas=sigmas)
    plain = tiny_random_pipeline(0, third_text_encoder)
    if sigmas == "dpm":
        plain.scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order={"dpm": 2, "euler": 1}[sampler],
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        )
    latents = noise(2, *backbone.latent_shape(32, 64))

    x0 = backbone.sample(latents, backbone.encode(PROMPTS), num_steps=10, guidance_scale=guidance_scale)

    assert torch.equal(x0, plain_latents(plain, latents, 10, guidance_scale))
    images = plain_latents(plain, latents, 10, guidance_scale, output_type="pil")
    decoded = backbone.decode(x0)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (2, 3, 32, 64)
    assert np.array_equal(decoded.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(image) for image in images]))
    assert decoded.float().std() > 10  # not a blank


def test_rollout_in_bfloat16_is_the_plain_pipelines_bits():
    backbone = load_backbone(tiny_random_pipeline(), dtype=torch.bfloat16, max_sequence_length=LENGTH)
    plain = load_backbone(tiny_random_pipeline(), dtype=torch.bfloat16).pipeline
    plain.scheduler = backbone.scheduler
    latents = noise(2, 4, 8, 8)
    x0 = backbone.sample(latents, backbone.encode(PROMPTS), num_steps=4, guidance_scale=4.5)
    assert x0.dtype == torch.bfloat16
    assert torch.equal(x0, plain_latents(plain, latents, 4, 4.5))
    assert backbone.vae.dtype == torch.float32
    assert backbone.decode(x0).shape == (2, 3, 32, 32)


def test_euler_on_the_dpm_grid_is_eulers_method():
    backbone = make_backbone(sampler="euler")
    conditioning = backbone.encode(PROMPTS)
    x = latents = noise(2, 4, 8, 8)
    backbone.scheduler.set_timesteps(4)
    levels = backbone.scheduler.sigmas
    for sigma, level, next_level in zip(backbone.sigmas(4), levels, levels[1:]):
        with torch.no_grad():
            x = x + (next_level - level) * backbone.predict(x, sigma, conditioning)
    x0 = backbone.sample(latents, conditioning, num_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(x0, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "sigmas"), [("dpm", "dpm"), ("euler", "dpm"), ("euler", "model"), ("sde", "dpm"), ("sde", "model")]
)
def test_samplers_turn_noise_into_the_data_where_the_velocity_is_known(sampler, sigmas, monkeypatch):
    # For data N(m, s^2) the marginal at sigma is N((1-sigma) m, (1-sigma)^2 s^2 + sigma^2), the velocity linear:
    # E[noise - x0 | x_t] = (sigma - (1-sigma) s^2) / variance * (x_t - mean) - m
    m, s = 0.7, 0.5
    backbone = make_backbone(sampler=sampler, sigmas=sigmas)

    def exact_velocity(hidden_states, timestep, **_):
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        slope = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)
        return (slope * (hidden_states - (1 - sigma) * m) - m,)

    monkeypatch.setattr(backbone.denoiser, "forward", exact_velocity)
    latents = noise(64, 4, 8, 8)
    step_noise = {"step_noise": lambda i: noise(64, 4, 8, 8, seed=i + 1)} if sampler == "sde" else {}
    x0 = backbone.sample(latents, backbone.encode(PROMPTS[:1] * 64), num_steps=40, guidance_scale=1.0, **step_noise)
    assert x0.mean() == pytest.approx(m, abs=0.03)
    assert x0.std() == pytest.approx(s, abs=0.05)


def test_sde_draws_noise_for_all_steps_but_the_last():
    backbone = make_backbone(sampler="sde")
    asked = []

    def step_noise(i):
        asked.append(i)
        return noise(2, 4, 8, 8, seed=i)

    rollout = {"num_steps": 4, "guidance_scale": 1.0}
    conditioning = backbone.encode(PROMPTS)
    x0 = backbone.sample(noise(2, 4, 8, 8), conditioning, step_noise=step_noise, **rollout)
    assert asked == [0, 1, 2]
    assert torch.equal(x0, backbone.sample(noise(2, 4, 8, 8), conditioning, step_noise=step_noise, **rollout))
    other = backbone.sample(noise(2, 4, 8, 8), conditioning, step_noise=lambda i: -step_noise(i), **rollout)
    assert not torch.allclose(x0, other, atol=0.1)


def test_step_noise_belongs_to_the_sde_alone():
    for sampler in ("dpm", "euler"):
        backbone = SD3Backbone(tiny_random_pipeline(), sampler=sampler, max_sequence_length=8)
        with pytest.raises(ValueError, match=r"`step_noise` is given and `sampler` is"):
            backbone.sample(
                noise(2, 4, 8, 8),
                backbone.encode(PROMPTS),
                num_steps=4,
                guidance_scale=1.0,
                step_noise=lambda i: noise(2, 4, 8, 8),
            )


def test_the_sde_without_noise_is_eulers_ode():
    outputs = []
    for sampler in ("sde", "euler"):
        backbone = SD3Backbone(tiny_random_pipeline(), sampler=sampler, max_sequence_length=8)
        outputs.append(backbone.sample(noise(2, 4, 8, 8), backbone.encode(PROMPTS), num_steps=4, guidance_scale=1.0))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("sigmas", ["dpm", "model"])
def test_outside_the_stochastic_steps_the_sde_is_the_ode(sigmas):
    backbone = make_backbone(sampler="sde", sigmas=sigmas)
    conditioning, rollout, window, kept = backbone.encode(PROMPTS), {"num_steps": 6, "guidance_scale": 2.0}, (2, 3), []
    x0 = backbone.sample(
        noise(2, 4, 8, 8),
        conditioning,
        step_noise=lambda i: noise(2, 4, 8, 8, seed=i) if i in window else None,
        noise_level=0.3,
        keep=lambda *step: kept.append(step),
        **rollout,
    )
    assert [i for i, *_ in kept] == list(range(6))
    assert torch.equal(kept[-1][3], x0)
    kept = [kept[i] for i in window]
    assert torch.equal(kept[0][3], kept[1][1])  # the latents after a step are those before the next
    levels = [1.0, *backbone.step_levels(6)[1:]]
    for i, x_t, velocity, x_next in kept:
        delta, s = levels[i + 1] - levels[i], 0.3 * (levels[i] / (1 - levels[i])) ** 0.5
        mean = x_t * (1 + s**2 * delta / (2 * levels[i]))
        mean = mean + velocity * (1 + s**2 * (1 - levels[i]) / (2 * levels[i])) * delta
        torch.testing.assert_close((x_next - mean) / (s * (-delta) ** 0.5), noise(2, 4, 8, 8, seed=i))
        again = backbone.predict(x_t, backbone.sigmas(6)[i].item(), conditioning, guidance_scale=2.0)
        torch.testing.assert_close(velocity, again)
    # No step is stochastic, and so all are the ODE's, to rounding; and so are those before and after the window.
    plain = backbone.sample(noise(2, 4, 8, 8), conditioning, **rollout)
    none = backbone.sample(noise(2, 4, 8, 8), conditioning, step_noise=lambda i: None, **rollout)
    torch.testing.assert_close(none, plain, rtol=0, atol=1e-5)
    on_the_way = ode(backbone, noise(2, 4, 8, 8), conditioning, range(2))
    torch.testing.assert_close(kept[0][1], on_the_way, rtol=0, atol=1e-5)
    torch.testing.assert_close(x0, ode(backbone, kept[1][3], conditioning, range(4, 6)), rtol=0, atol=1e-5)


def ode(backbone, latents, conditioning, steps):
    edges, sigmas = backbone.step_levels(6), backbone.sigmas(6).tolist()
    with torch.no_grad():
        for i in steps:
            velocity = backbone.predict(latents, sigmas[i], conditioning, guidance_scale=2.0)
            latents = latents + (edges[i + 1] - edges[i]) * velocity
    return latents


def test_stochastic_steps_are_kept_in_float32():
    backbone, kept = make_backbone(sampler="sde"), []
    backbone.denoiser.to(torch.bfloat16)
    conditioning = {name: rows.bfloat16() for name, rows in backbone.encode(PROMPTS).items()}
    calls = record_calls(backbone.denoiser)
    x0 = backbone.sample(
        noise(2, 4, 8, 8),
        conditioning,
        num_steps=3,
        guidance_scale=1.0,
        step_noise=lambda i: noise(2, 4, 8, 8, seed=i),
        keep=lambda *step: kept.append(step),
    )
    assert x0.dtype == torch.bfloat16
    assert {call["hidden_states"].dtype for call in calls} == {torch.bfloat16}
    assert {tensor.dtype for step in kept for tensor in step[1:]} == {torch.float32}
    assert not torch.equal(kept[1][1], kept[1][1].bfloat16().float())  # and not only cast to it
    step = backbone.sde_coefficients(3)[1]
    _, x_t, velocity, x_next = kept[1]
    z = (x_next - step.latent * x_t - step.velocity * velocity) / step.std
    torch.testing.assert_close(z, noise(2, 4, 8, 8, seed=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigmas", ["dpm", "model"])
@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_the_steps_of_the_ode_are_shown_as_they_are_taken(sampler, sigmas):
    backbone, kept = make_backbone(sampler=sampler, sigmas=sigmas), []
    conditioning, rollout = backbone.encode(PROMPTS), {"num_steps": 4, "guidance_scale": 2.0}
    x0 = backbone.sample(noise(2, 4, 8, 8), conditioning, keep=lambda *step: kept.append(step), **rollout)
    assert [i for i, *_ in kept] == [0, 1, 2, 3]
    torch.testing.assert_close(kept[0][1], noise(2, 4, 8, 8))
    assert torch.equal(kept[-1][3], x0)
    levels, sigmas = backbone.step_levels(4), backbone.sigmas(4).tolist()
    for i, x_t, velocity, x_next in kept:
        assert x_t is kept[i - 1][3] or i == 0
        assert torch.equal(x_next, x_t + (levels[i + 1] - levels[i]) * velocity)
        again = backbone.predict(x_t, sigmas[i], conditioning, guidance_scale=2.0)
        torch.testing.assert_close(velocity, again)
    plain = backbone.sample(noise(2, 4, 8, 8), conditioning, **rollout)
    torch.testing.assert_close(x0, plain, rtol=0, atol=1e-5)


def test_steps_of_second_order_are_not_shown():
    backbone = make_backbone(sampler="dpm")
    with pytest.raises(ValueError, match="`keep` is given and `sampler` is 'dpm'"):
        backbone.sample(
            noise(2, 4, 8, 8), backbone.encode(PROMPTS), num_steps=2, guidance_scale=1.0, keep=lambda *step: None
        )


def test_both_sides_of_guidance_come_from_one_forward():
    backbone = make_backbone()
    conditioning, x_t = backbone.encode(PROMPTS), noise(2, 4, 8, 8)
    calls = record_calls(backbone.denoiser)
    negative, positive = backbone.predict_sides(x_t, 0.7, conditioning)
    assert [len(call["hidden_states"]) for call in calls] == [4]
    guided = backbone.predict(x_t, 0.7, conditioning, guidance_scale=3.0)
    torch.testing.assert_close(guided, negative + 3 * (positive - negative))
    assert (positive - negative).abs().max() > 1e-3


@pytest.mark.parametrize("sigmas", ["dpm", "model"])
def test_the_coefficients_of_stochastic_steps(sigmas):
    backbone = make_backbone(sampler="sde", sigmas=sigmas)
    steps, levels = backbone.sde_coefficients(10, noise_level=0.7), backbone.step_levels(10)
    assert len(steps) == 9  # the last one is never stochastic
    assert backbone.sde_coefficients(1) == []
    # from level 1, with the second level in the denominator; then from the grid's own
    assert steps[0].diffusion == pytest.approx(0.7 * (1 / (1 - levels[1])) ** 0.5)
    assert steps[0].std == pytest.approx(0.7)
    assert steps[0].latent == pytest.approx(1 - 0.49 / 2)
    assert steps[4].diffusion == pytest.approx(0.7 * (levels[4] / (1 - levels[4])) ** 0.5)
    assert all(step.velocity < 0 < step.std for step in steps)


def test_the_negative_side_of_guidance_has_no_gradient():
    backbone = make_backbone()
    conditioning, x_t = backbone.encode(PROMPTS), noise(2, 4, 8, 8)
    weight = backbone.denoiser.proj_out.weight.requires_grad_()

    def gradient(guidance_scale):
        prediction = backbone.predict(x_t, 0.5, conditioning, guidance_scale=guidance_scale)
        return torch.autograd.grad((prediction * noise(2, 4, 8, 8, seed=1)).sum(), weight)[0]

    torch.testing.assert_close(gradient(3.0), 3 * gradient(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 2), (0.0, 2), (4.5, 4)])
def test_one_forward_a_step_of_twice_the_batch_with_guidance(guidance_scale, batch):
    backbone = make_backbone()
    conditioning = backbone.encode(PROMPTS)
    calls = record_calls(backbone.denoiser)
    backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=6, guidance_scale=guidance_scale)
    assert [len(call["hidden_states"]) for call in calls] == [batch] * 6


@pytest.mark.parametrize(("sampler", "sigmas"), [("dpm", "dpm"), ("euler", "model")])
def test_a_grid_is_made_once(sampler, sigmas, monkeypatch):
    backbone = make_backbone(sampler=sampler, sigmas=sigmas)
    conditioning = backbone.encode(PROMPTS)
    scheduler_class = type(backbone.scheduler)
    made, set_timesteps = [], scheduler_class.set_timesteps
    monkeypatch.setattr(
        scheduler_class,
        "set_timesteps",
        lambda self, num_inference_steps, **_: (
            made.append(num_inference_steps) or set_timesteps(self, num_inference_steps, **_)
        ),
    )
    # what would look for the first timestep, on a device
    monkeypatch.setattr(scheduler_class, "index_for_timestep", None)
    for num_steps in (2, 3, 2, 2, 3):
        backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=num_steps, guidance_scale=1.0)
    assert made == [2, 3]
    backbone.scheduler = copy.deepcopy(backbone.scheduler)
    backbone.sigmas(2)
    assert made == [2, 3, 2]  # another one has its own


@pytest.mark.parametrize(("sampler", "sigmas"), [("dpm", "dpm"), ("euler", "model")])
def test_nothing_leaks_from_one_rollout_into_the_next(sampler, sigmas):
    backbone = make_backbone(sampler=sampler, sigmas=sigmas)
    schedulers = (backbone.scheduler, backbone.pipeline.scheduler)
    states = [{name: id(value) for name, value in vars(scheduler).items()} for scheduler in schedulers]
    conditioning = backbone.encode(PROMPTS)
    first = backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=4, guidance_scale=4.5)
    backbone.sample(noise(2, 4, 8, 8, seed=1), conditioning, num_steps=3, guidance_scale=1.0)
    assert torch.equal(first, backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=4, guidance_scale=4.5))
    assert states == [{name: id(value) for name, value in vars(scheduler).items()} for scheduler in schedulers]


def test_rollout_has_no_gradient_and_no_dropout_and_gives_the_mode_back():
    backbone = make_backbone()
    model, _ = lora_model(backbone, lora_dropout=0.5)
    conditioning = backbone.encode(PROMPTS)
    model.train()
    x0 = backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=2, guidance_scale=1.0)
    assert not x0.requires_grad
    assert torch.equal(x0, backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=2, guidance_scale=1.0))
    assert all(module.training for module in backbone.denoiser.modules())
    with pytest.raises(ValueError, match="2 rows of encoder_hidden_states for 3 latents"):
        backbone.sample(noise(3, 4, 8, 8), conditioning, num_steps=2, guidance_scale=1.0)
    assert backbone.denoiser.training
    model.eval()
    backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=2, guidance_scale=1.0)
    assert not backbone.denoiser.training


def test_rollout_has_no_dropout_in_adapters_that_came_later():
    backbone = make_backbone()
    conditioning = backbone.encode(PROMPTS)
    backbone.denoiser.eval()
    lora_model(backbone, lora_dropout=0.5)  # PEFT's dropout is born in training mode
    modes = [module.training for module in backbone.denoiser.modules()]
    assert not backbone.denoiser.training
    assert any(modes)
    rollouts = [backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=2, guidance_scale=1.0) for _ in range(2)]
    assert torch.equal(*rollouts)
    assert modes == [module.training for module in backbone.denoiser.modules()]


# Encoding and decoding


@pytest.mark.parametrize("third_text_encoder", [False, True])
def test_encoding_is_the_plain_pipelines(third_text_encoder):
    backbone = make_backbone(third_text_encoder)
    conditioning = backbone.encode([*PROMPTS, ""])
    plain = tiny_random_pipeline(0, third_text_encoder)
    for row, prompt in enumerate([*PROMPTS, ""]):
        with torch.no_grad():
            hidden_states, _, pooled, _ = plain.encode_prompt([prompt], None, None, max_sequence_length=LENGTH)
        assert torch.equal(conditioning["encoder_hidden_states"][row], hidden_states[0])
        assert torch.equal(conditioning["pooled_projections"][row], pooled[0])


def test_embeddings_do_not_depend_on_order_company_or_autocast():
    prompts = [f"sign {i}" for i in range(6)]
    together = make_backbone(True).encode(prompts)
    backbone = make_backbone(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone.encode(prompts[3:4])
    backwards = backbone.encode(prompts[::-1])
    for name, rows in together.items():
        assert rows.dtype == torch.float32
        assert not rows.requires_grad
        assert torch.equal(rows, backwards[name].flip(0))


def test_every_distinct_prompt_is_encoded_once():
    backbone = make_backbone(True)
    encoders = (backbone.pipeline.text_encoder, backbone.pipeline.text_encoder_2, backbone.pipeline.text_encoder_3)
    calls = [record_calls(encoder) for encoder in encoders]
    conditioning = backbone.encode(["a", "b", "a", "a"])
    assert torch.equal(conditioning["pooled_projections"][0], conditioning["pooled_projections"][3])
    assert [len(c) for c in calls] == [2, 2, 2]
    backbone.encode(["b", "c"])
    assert [len(c) for c in calls] == [3, 3, 3]
    for _ in range(2):  # the negative prompt "" is one more
        backbone.sample(noise(4, 4, 8, 8), conditioning, num_steps=2, guidance_scale=3.0)
    assert [len(c) for c in calls] == [4, 4, 4]


def test_a_distinct_prompt_is_copied_to_the_device_once(monkeypatch):
    backbone = make_backbone()
    copied = []
    to_device = base.to_device
    monkeypatch.setattr(base, "to_device", lambda t, device: copied.append(tuple(t.shape)) or to_device(t, device))
    conditioning = backbone.encode(["a", "b", "a", "a"])
    assert copied == [(2, 16 + LENGTH, 16), (2, 16), (4,)]  # two rows of each, and which row is whose
    for name, rows in conditioning.items():
        assert torch.equal(rows, torch.stack([backbone.encode([prompt])[name][0] for prompt in "abaa"]))
    copied.clear()
    backbone.encode(["b", "a"])
    assert copied == [(2, 16 + LENGTH, 16), (2, 16)]

    copied.clear()
    for _ in range(3):
        backbone.predict(noise(4, 4, 8, 8), 0.5, conditioning, guidance_scale=3.0)
    assert copied == [(1, 16 + LENGTH, 16), (1, 16)]  # the negative prompt stays there
    backbone.negative_prompt = "ugly"
    guided = backbone.predict(noise(4, 4, 8, 8), 0.5, conditioning, guidance_scale=3.0)
    away = make_backbone(negative_prompt="ugly")
    assert torch.equal(guided, away.predict(noise(4, 4, 8, 8), 0.5, conditioning, guidance_scale=3.0))


def test_a_row_that_is_changed_does_not_change_what_is_kept():
    backbone = make_backbone()
    first = backbone.encode(["a"])
    kept = {name: rows.clone() for name, rows in first.items()}
    for rows in first.values():
        rows.zero_()
    assert all(torch.equal(rows, kept[name]) for name, rows in backbone.encode(["a"]).items())


def test_only_the_last_prompts_are_kept(monkeypatch):
    monkeypatch.setattr(base, "ENCODE_CACHE_SIZE", 2)
    backbone = make_backbone()
    calls = record_calls(backbone.pipeline.text_encoder)
    assert len(backbone.encode(["a", "b", "c"])["pooled_projections"]) == 3  # more than are kept
    backbone.encode(["b"])  # now c is the oldest
    backbone.encode(["d"])
    assert len(calls) == 4
    backbone.encode(["b", "d"])
    assert len(calls) == 4
    backbone.encode(["c"])
    assert len(calls) == 5


def test_prompt_embeds_are_asked_before_the_encoders():
    backbone = make_backbone()
    calls = record_calls(backbone.pipeline.text_encoder)
    row = {"encoder_hidden_states": noise(16 + LENGTH, 16), "pooled_projections": noise(16)}
    backbone.prompt_embeds = {"a": row, "": row}
    conditioning = backbone.encode(["b", "a", "a"])
    assert len(calls) == 1
    for name, rows in conditioning.items():
        assert torch.equal(rows[1], row[name])
        assert torch.equal(rows[2], row[name])
        assert torch.equal(rows[0], make_backbone().encode(["b"])[name][0])
    backbone.predict(noise(3, 4, 8, 8), 0.5, conditioning, guidance_scale=3.0)
    assert len(calls) == 1


# Where things are


def record_moves(modules, monkeypatch) -> list[tuple[int, str]]:
    """(Which of `modules`, where to) of every `.to` from now on; away from "cpu" parameters get other memory."""
    moves = []

    def move(number, module, device):
        moves.append((number, str(device)))
        if str(device) != "cpu":
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()

    for number, module in enumerate(modules):
        monkeypatch.setattr(module, "to", functools.partial(move, number, module))
    return moves


def memory(module: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


def text_encoders(backbone: SD3Backbone) -> list[torch.nn.Module]:
    return [backbone.pipeline.text_encoder, backbone.pipeline.text_encoder_2, backbone.pipeline.text_encoder_3]


def test_offloaded_encoders_visit_the_device_only_to_encode(monkeypatch):
    backbone = make_backbone(True, offload_text_encoders=True)
    monkeypatch.setattr(SD3Backbone, "device", torch.device("cpu:0"))  # to be told from "cpu"
    encoders = text_encoders(backbone)
    home = [memory(encoder) for encoder in encoders]
    moves = record_moves(encoders, monkeypatch)
    calls = record_calls(encoders[2])

    conditioning = backbone.encode(["a", "b", "a"])
    there, back = [(i, "cpu:0") for i in range(3)], [(i, "cpu") for i in range(3)]
    assert moves == [*there, *back]
    assert [memory(encoder) for encoder in encoders] == home  # the host's own weights: nothing was copied back
    assert len(calls) == 3  # both, and the negative prompt on the same way
    backbone.encode(["b", "a"])
    backbone.sample(noise(3, 4, 8, 8), conditioning, num_steps=2, guidance_scale=3.0)
    assert moves == [*there, *back]
    assert len(calls) == 3
    backbone.encode(["c"])
    assert len(moves) == 12
    assert len(calls) == 4
    for name, rows in make_backbone(True).encode(["a", "b", "a"]).items():
        assert torch.equal(rows, conditioning[name])


def test_prompts_that_are_remembered_need_one_journey(monkeypatch):
    backbone = make_backbone(True, offload_text_encoders=True)
    monkeypatch.setattr(SD3Backbone, "device", torch.device("cpu:0"))
    moves = record_moves(text_encoders(backbone), monkeypatch)
    backbone.remember(["a", "b", "c", "a"])
    assert len(moves) == 6
    for prompt in "abc":
        backbone.encode([prompt])
    assert len(moves) == 6


def test_offloaded_encoders_come_back_from_a_failure(monkeypatch):
    backbone = make_backbone(True, offload_text_encoders=True)
    encoders = text_encoders(backbone)
    home = [memory(encoder) for encoder in encoders]
    moves = record_moves(encoders, monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(encoders[2], "forward", None)
        context.setattr(SD3Backbone, "device", torch.device("cpu:0"))
        with pytest.raises(TypeError):
            backbone.encode(["a"])
    assert [number for number, _ in moves] == [0, 1, 2, 0, 1, 2]
    assert [memory(encoder) for encoder in encoders] == home
    assert torch.equal(
        backbone.encode(["a"])["pooled_projections"], make_backbone().encode(["a"])["pooled_projections"]
    )


@pytest.mark.parametrize("offload", [False, True])
def test_place_moves_everything_but_encoders_that_wait(offload, monkeypatch):
    backbone = make_backbone(True, offload_text_encoders=offload)
    modules = [backbone.denoiser, backbone.vae, *text_encoders(backbone)]
    moves = record_moves(modules, monkeypatch)
    backbone.place("cpu:0")
    assert moves == [(i, "cpu" if offload and i > 1 else "cpu:0") for i in range(5)]
    moves.clear()
    backbone.encode(["a"])
    assert len(moves) == (6 if offload else 0)


def test_what_was_quantised_or_dispatched_stays(monkeypatch):
    backbone = make_backbone(True, offload_text_encoders=True)
    modules = [backbone.denoiser, backbone.vae, *text_encoders(backbone)]
    backbone.denoiser.is_quantized = True
    backbone.pipeline.text_encoder.is_quantized = True
    backbone.pipeline.text_encoder_2.hf_device_map = {"": 0}
    add_hook_to_module(backbone.pipeline.text_encoder_3, ModelHook())
    moves = record_moves(modules, monkeypatch)
    backbone.place("cpu:0")
    backbone.encode(["a"])
    assert moves == [(1, "cpu:0")]  # the VAE


# What the embeddings depend on


def test_embeds_key_is_that_of_the_same_encoders(tmp_path):
    backbone = make_backbone(True)
    key = backbone.embeds_key()
    backbone.encode(PROMPTS)  # tokenizers keep how they were called last
    assert backbone.embeds_key() == key
    assert make_backbone(True, negative_prompt="ugly", sampler="euler").embeds_key() == key
    backbone.pipeline.save_pretrained(tmp_path)
    assert load_backbone(tmp_path, max_sequence_length=LENGTH).embeds_key() == key
    lora_model(backbone)
    assert backbone.embeds_key() == key


def test_embeds_key_sees_what_changes_the_embeddings():
    def one_bit(backbone):
        weight = backbone.pipeline.text_encoder_3.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight")
        weight.view(torch.int32)[3, 5] ^= 1

    def two_rows_change_places(backbone):
        table = backbone.pipeline.text_encoder_2.get_input_embeddings().weight.data
        table[[0, -1]] = table[[-1, 0]]

    def set_option(backbone):
        backbone.pipeline.text_encoder.config.hidden_act = "gelu"

    def another_word(backbone):
        backbone.pipeline.tokenizer.add_tokens(["cafe"])

    def shorter(backbone):
        backbone.pipeline.tokenizer_2.model_max_length = 8

    def half(backbone):
        backbone.pipeline.text_encoder_3.to(torch.bfloat16)

    changes = [one_bit, two_rows_change_places, set_option, another_word, shorter, half]
    backbones = [make_backbone(True) for _ in changes]
    with torch.no_grad():
        for change, backbone in zip(changes, backbones, strict=True):
            change(backbone)
    backbones += [make_backbone(True), make_backbone(), make_backbone(True, max_sequence_length=LENGTH + 1)]
    assert len({backbone.embeds_key() for backbone in backbones}) == len(backbones)


def test_embeds_key_needs_the_weights():
    backbone = make_backbone()
    backbone.pipeline.text_encoder.to("meta")
    with pytest.raises(ValueError, match="of a text encoder are not in memory"):
        backbone.embeds_key()


def test_max_sequence_length_and_negative_prompt_count():
    backbone = make_backbone()
    assert backbone.encode(["a"])["encoder_hidden_states"].shape == (1, 16 + LENGTH, 16)
    assert make_backbone(max_sequence_length=0).encode(["a"])["encoder_hidden_states"].shape == (1, 16, 16)
    rollout = {"num_steps": 2, "guidance_scale": 4.5}
    x0 = backbone.sample(noise(2, 4, 8, 8), backbone.encode(PROMPTS), **rollout)
    away = make_backbone(negative_prompt="ugly")
    assert not torch.equal(x0, away.sample(noise(2, 4, 8, 8), away.encode(PROMPTS), **rollout))


def test_encoded_images_are_the_image_to_image_pipelines(monkeypatch):
    from diffusers import StableDiffusion3Img2ImgPipeline

    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Img2ImgPipeline(**tiny_random_pipeline().components)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    # Contiguous, which is a matter of kernels: of another layout they round differently.
    pixels = pipeline.image_processor.preprocess(pictures, height=32, width=64).contiguous()
    # The pipeline draws from the distribution; without its deviation the draw is the mode.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(pipeline.scheduler, "scale_noise", lambda latents, timestep, noise: latents)
    stock = pipeline.prepare_latents(
        pixels, torch.tensor([1.0]), 2, 1, torch.float32, torch.device("cpu"), [torch.Generator()] * 2
    )
    one_by_one = make_backbone(decode_batch_size=1).encode_images(images)
    assert torch.equal(one_by_one, stock)
    assert torch.allclose(make_backbone().encode_images(images), stock, atol=1e-5)


def test_the_bundled_vae_encodes_what_it_decodes():
    backbone = load_backbone(pipeline_source("tiny"), max_sequence_length=1)
    images = backbone.decode(
        backbone.sample(
            noise(4, *backbone.latent_shape(32, 64)),
            backbone.encode([f'A sign that says "{text}"' for text in ("CAFE", "BIRD", "XKLM", "TREE")]),
            num_steps=6,
            guidance_scale=1,
        )
    )
    again = backbone.decode(backbone.encode_images(images))
    assert (again.float() - images.float()).abs().mean() < 8  # of 255
    assert images.float().std() > 20


def test_encoding_is_in_slices_and_in_the_vaes_dtype():
    backbone, calls = make_backbone(decode_batch_size=2), []
    backbone.vae.encoder.register_forward_pre_hook(lambda _module, args: calls.append((len(args[0]), args[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        encoded = backbone.encode_images(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    assert calls == [(2, torch.float32), (2, torch.float32), (1, torch.float32)]
    assert encoded.dtype == torch.float32


def test_slices_and_autocast_do_not_change_the_images():
    backbone = make_backbone()
    x0 = noise(5, 4, 8, 8)
    images = backbone.decode(x0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(images, backbone.decode(x0))
    calls = []
    sliced_backbone = make_backbone(decode_batch_size=2)
    sliced_backbone.vae.decoder.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    sliced = sliced_backbone.decode(x0)
    assert calls == [2, 2, 1]
    assert (sliced.int() - images.int()).abs().max() <= 1  # another batch size may round differently


def test_tiles_are_for_large_images():
    whole, tiled = make_backbone(), make_backbone(vae_tiling=True)
    small, large = noise(2, 4, 8, 8), noise(2, 4, 8, 16)
    assert torch.equal(whole.decode(small), tiled.decode(small))
    calls = []
    tiled.vae.decoder.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[-1]))
    images = tiled.decode(large)
    assert len(calls) > 1
    assert max(calls) <= 8
    assert images.shape == whole.decode(large).shape
    with pytest.raises(ValueError, match="`vae_tiling` is True, and the VAE, a VQModel, cannot decode in tiles"):
        SD3Backbone(
            StableDiffusion3Pipeline(**{**tiny_random_pipeline().components, "vae": VQModel()}), vae_tiling=True
        )


def test_latent_shape():
    backbone = make_backbone()
    assert backbone.latent_shape(32, 64) == (4, 8, 16)
    for height, width in ((36, 32), (32, 0), (128, 32)):  # no whole patch, nothing, more than 8 patches
        with pytest.raises(ValueError, match="multiples of 8 from 8 to 64 pixels"):
            backbone.latent_shape(height, width)


# Prediction


def test_predict_is_the_transformer_at_1000_sigma():
    backbone = make_backbone(True, sd35=True)
    conditioning = backbone.encode(PROMPTS)
    x_t = noise(2, 4, 8, 8)
    velocity = backbone.predict(x_t, torch.tensor([0.9, 0.25]), conditioning)
    rows = [
        backbone.denoiser(
            hidden_states=x_t[[i]],
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=conditioning["encoder_hidden_states"][[i]],
            pooled_projections=conditioning["pooled_projections"][[i]],
        ).sample
        for i, timestep in enumerate([900.0, 250.0])
    ]
    torch.testing.assert_close(velocity, torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert torch.equal(backbone.predict(x_t, 0.9, conditioning)[0], velocity[0])
    assert not torch.allclose(backbone.predict(x_t, 0.9, conditioning)[1], velocity[1], atol=1e-3)


def test_training_levels_reach_the_transformer_as_the_rollouts_timesteps():
    backbone = make_backbone()
    conditioning = backbone.encode(PROMPTS[:1])
    calls = record_calls(backbone.denoiser)
    backbone.sample(noise(1, 4, 8, 8), conditioning, num_steps=10, guidance_scale=1.0)
    for sigma in backbone.sigmas(10):
        backbone.predict(noise(1, 4, 8, 8), sigma, conditioning)
    timesteps = [call["timestep"].item() for call in calls]
    assert timesteps[10:] == timesteps[:10]


def test_whole_timesteps_are_exact():
    # 10 of them would be off by a rounding if 1000 * sigma were worked out in float32.
    backbone = make_backbone()
    timesteps = torch.arange(1001)
    rows = {name: row.expand(1001, *row.shape[1:]) for name, row in backbone.encode(["a"]).items()}

    def model(hidden_states, timestep, **_):
        assert torch.equal(timestep, timesteps.float())
        return (hidden_states,)

    backbone.predict(noise(1001, 4, 2, 2), timesteps.double() / 1000, rows, model=model)


def test_guided_prediction_leads_away_from_the_negative_prompt():
    backbone = make_backbone(negative_prompt="ugly")
    conditioning, x_t = backbone.encode(PROMPTS), noise(2, 4, 8, 8)
    positive = backbone.predict(x_t, 0.7, conditioning)
    negative = backbone.predict(x_t, 0.7, backbone.encode(["ugly"] * 2))
    guided = backbone.predict(x_t, 0.7, conditioning, guidance_scale=3.0)
    torch.testing.assert_close(guided, negative + 3.0 * (positive - negative), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, positive, atol=0.01)


def test_predict_calls_the_given_model():
    backbone = make_backbone()
    conditioning = backbone.encode(PROMPTS)

    class Double(torch.nn.Module):
        def forward(self, **kwargs):
            return (2 * backbone.denoiser(**kwargs)[0],)

    velocity = backbone.predict(noise(2, 4, 8, 8), 0.5, conditioning)
    assert torch.equal(backbone.predict(noise(2, 4, 8, 8), 0.5, conditioning, model=Double()), 2 * velocity)


def test_forward_process_is_flow_matching():
    backbone = make_backbone()
    x0, epsilon = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    sigma = torch.tensor([0.25, 1.0])
    x_t = backbone.noise(x0, epsilon, sigma)
    torch.testing.assert_close(x_t[0], 0.75 * x0[0] + 0.25 * epsilon[0])
    assert torch.equal(x_t[1], epsilon[1])
    # along the path the velocity leads from data to noise
    torch.testing.assert_close(
        x0 + sigma.view(-1, 1, 1, 1) * backbone.target(x0, epsilon, sigma), x_t, rtol=1e-4, atol=1e-5
    )


def test_gradient_checkpointing_changes_memory_not_gradients():
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone(sd35=True)
        model, _ = lora_model(backbone)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        assert backbone.denoiser.is_gradient_checkpointing == checkpointing
        backbone.predict(
            noise(2, 4, 8, 8), 0.7, backbone.encode(PROMPTS), model=model.train()
        ).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


# Compiled blocks


class CountingBackend:
    """A backend that runs graphs as they are, and counts graphs and their calls."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def every_kind_of_forward(backbone: SD3Backbone, policy: Policy, views: tuple) -> Iterator[torch.Tensor]:
    """Velocities and gradients, with every view of `views`, merged and not, for batches of two sizes."""
    conditioning = backbone.encode(PROMPTS)
    policy.model.eval()
    for view, merged, rows in itertools.product(views, (False, True), (2, 1)):
        with torch.no_grad(), policy.using(view, merged=merged):
            rows_of = {name: tensor[:rows] for name, tensor in conditioning.items()}
            yield backbone.predict(noise(rows, 4, 8, 8), 0.7, rows_of)
    yield backbone.sample(noise(2, 4, 8, 8), conditioning, num_steps=2, guidance_scale=3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=len(views) > 2):
        velocity = backbone.predict(noise(2, 4, 8, 8), 0.7, conditioning, model=policy.model.train())
    yield velocity
    policy.model.zero_grad()
    velocity.float().square().mean().backward()
    yield torch.cat([p.grad.flatten() for p in policy.tensors().values()])


def scrambled_policy(backbone: SD3Backbone) -> Policy:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(backbone.LORA_TARGETS))
    policy = Policy(backbone.denoiser, config, views=("old", "ema"))
    generator = torch.Generator().manual_seed(0)
    for view in (None, "old", "ema"):
        for tensor in policy.tensors(view).values():
            torch.nn.init.normal_(tensor, std=0.1, generator=generator)
    return policy


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("views", [("old",), (None, "base", "old", "ema")])
def test_compiled_blocks_give_what_plain_ones_give(views, checkpointing):
    outputs, backend = [], CountingBackend()
    for compiled in (False, True):
        backbone = make_backbone()
        policy = scrambled_policy(backbone)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        if compiled:
            backbone.compile_blocks(backend=backend)
            counts = [record_calls(block) for block in backbone.denoiser.transformer_blocks]
        outputs.append([output.detach() for output in every_kind_of_forward(backbone, policy, views)])
    for plain, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    # More graphs than torch's own limit, and never an uncompiled block.
    assert backend.graphs > 8
    assert backend.calls == sum(map(len, counts))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks_share_graphs_and_go_through_aot():
    backbone = make_backbone()
    blocks = backbone.denoiser.transformer_blocks
    blocks.extend([copy.deepcopy(blocks[0]) for _ in range(6)])
    blocks.append(blocks.pop(1))  # the one without text output is the last again
    conditioning = backbone.encode(PROMPTS)
    with torch.no_grad():
        plain = backbone.predict(noise(2, 4, 8, 8), 0.7, conditioning)
        backbone.compile_blocks(backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        compiled = backbone.predict(noise(2, 4, 8, 8), 0.7, conditioning)
    torch.testing.assert_close(compiled, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(blocks) // 2


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    velocities = []
    for compiled in (False, True):
        backbone = make_backbone()
        policy = scrambled_policy(backbone)
        if compiled:
            backbone.compile_blocks()
        velocity = backbone.predict(noise(2, 4, 8, 8), 0.7, backbone.encode(PROMPTS), model=policy.model)
        velocity.square().mean().backward()
        velocities.append((velocity, *(p.grad for p in policy.tensors().values())))
    for plain, compiled in zip(*velocities, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


# LoRA


def test_saved_lora_gives_the_same_bits_in_a_plain_pipeline(tmp_path):
    backbone = make_backbone(sd35=True)
    model, config = lora_model(backbone)
    backbone.save_lora(tmp_path, get_peft_model_state_dict(model), config.to_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    plain = tiny_random_pipeline(sd35=True)
    plain.scheduler = backbone.scheduler
    latents = noise(2, 4, 8, 8)
    base = plain_latents(plain, latents, 4, 4.5)
    plain.load_lora_weights(tmp_path)
    x0 = backbone.sample(latents, backbone.encode(PROMPTS), num_steps=4, guidance_scale=4.5)
    assert torch.equal(x0, plain_latents(plain, latents, 4, 4.5))
    assert not torch.allclose(x0, base, atol=0.01)


def test_lora_targets_of_sd35_medium_on_the_meta_device():
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD35_MEDIUM)
    pipeline = tiny_random_pipeline()
    pipeline.register_modules(transformer=transformer)
    backbone = SD3Backbone(pipeline)
    with torch.device("meta"):
        model, _ = lora_model(backbone, rank=64)

    layers = [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 191  # 24 blocks x 8, less the last block's text output
    assert not [name for name in layers if ".attn2." in name]
    assert [name for name, _ in transformer.named_modules() if name.endswith("attn2.to_q")]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 191 * 2 * 64 * 1536  # 37.6 M
    # tiny VAE: latents are a quarter of the image, so 256 px give SD3.5's latents of 512 px
    assert backbone.latent_shape(256, 256) == (16, 64, 64)
    conditioning = {
        "encoder_hidden_states": torch.empty(2, 77 + 128, 4096, device="meta"),
        "pooled_projections": torch.empty(2, 2048, device="meta"),
    }
    velocity = backbone.predict(torch.empty(2, 16, 64, 64, device="meta"), 0.9, conditioning, model=model)
    assert velocity.shape == (2, 16, 64, 64)
    assert velocity.requires_grad


def test_a_training_step_at_the_full_width_of_sd35_medium():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shallow = {"num_layers": 2, "dual_attention_layers": (0,), "sample_size": 8, "pos_embed_max_size": 8}
        transformer = SD3Transformer2DModel(**{**SD35_MEDIUM, **shallow})
    pipeline = tiny_random_pipeline()
    pipeline.register_modules(transformer=transformer)
    backbone = SD3Backbone(pipeline)
    model, _ = lora_model(backbone, rank=64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 15 * 2 * 64 * 1536
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    conditioning = {"encoder_hidden_states": noise(2, 77, 4096), "pooled_projections": noise(2, 2048)}
    x0, epsilon = noise(2, 16, 8, 8), noise(2, 16, 8, 8, seed=1)

    def loss():
        velocity = backbone.predict(backbone.noise(x0, epsilon, 0.8), 0.8, conditioning, model=model)
        return (velocity - backbone.target(x0, epsilon, 0.8)).square().mean()

    before = loss()
    before.backward()
    assert all(p.grad.isfinite().all() for p in parameters)
    optimizer.step()
    with torch.no_grad():
        assert loss() < before


# Construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "`sampler` is 'ddim'; it must be one of 'dpm', 'euler', 'sde'"),
        ({"sigmas": "karras"}, "`sigmas` is 'karras'; it must be one of 'dpm', 'model'"),
        ({"sampler": "dpm", "sigmas": "model"}, "has a grid of its own; take `sampler='euler'`"),
    ],
)
def test_unknown_samplers_and_grids(options, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(**options)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), r"give `image_size=\(height, width\)`"),
        (DDPMScheduler(), "DDPMScheduler without a flow shift"),
        (DPMSolverMultistepScheduler(flow_shift=3.0), "DPMSolverMultistepScheduler without a flow shift"),
    ],
)
def test_schedulers_without_a_fixed_shift(scheduler, message):
    pipeline = tiny_random_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        SD3Backbone(pipeline)


def test_the_shift_is_read_from_the_pipelines_scheduler():
    pipeline = tiny_random_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    backbone = SD3Backbone(pipeline)
    assert backbone.shift_factor == backbone.scheduler.config.flow_shift == 2.0
    with pytest.raises(ValueError, match="only the grid of a FlowMatchEulerDiscreteScheduler"):
        SD3Backbone(pipeline, sampler="euler", sigmas="model")


def test_encoders_and_vae_are_frozen_and_the_transformer_is_left_alone():
    pipeline = tiny_random_pipeline(third_text_encoder=True)
    pipeline.text_encoder_3.train()
    pipeline.transformer.train()
    backbone = SD3Backbone(pipeline)
    for module in (backbone.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert backbone.denoiser.training
    assert all(p.requires_grad for p in backbone.denoiser.parameters())


# Loading


@pytest.mark.parametrize("third_text_encoder", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads_as_it_was(third_text_encoder, stored, tmp_path):
    pipeline = tiny_random_pipeline(0, third_text_encoder).to(stored)
    pipeline.save_pretrained(tmp_path)
    pipeline.to(torch.float32)
    backbone = load_backbone(tmp_path, sampler="euler", sigmas="model", max_sequence_length=LENGTH)
    assert (backbone.pipeline.text_encoder_3 is None) != third_text_encoder
    latents = noise(2, 4, 8, 8)
    x0 = backbone.sample(latents, backbone.encode(PROMPTS), num_steps=2, guidance_scale=4.5)
    assert torch.equal(x0, plain_latents(pipeline, latents, 2, 4.5))


def test_dtype_is_that_of_transformer_and_text_encoders(tmp_path):
    pipeline = tiny_random_pipeline(third_text_encoder=True)
    pipeline.save_pretrained(tmp_path)
    for model in (str(tmp_path), pipeline):
        loaded = load_backbone(model, dtype=torch.bfloat16).pipeline
        encoders = (loaded.text_encoder, loaded.text_encoder_2, loaded.text_encoder_3)
        assert {module.dtype for module in (loaded.transformer, *encoders)} == {torch.bfloat16}
        assert loaded.vae.dtype == torch.float32


def test_a_pipeline_is_used_in_place():
    pipeline = tiny_random_pipeline()
    backbone = load_backbone(pipeline, negative_prompt="ugly")
    assert backbone.pipeline is pipeline
    assert backbone.negative_prompt == "ugly"
    assert pipeline.transformer.dtype == torch.float32


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "runs/42/model"])
def test_a_path_that_does_not_exist(model):
    with pytest.raises(ValueError, match=f"`model`='{model}' does not exist"):
        load_backbone(model)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load_backbone(tmp_path)


def test_an_id_that_the_hub_does_not_give(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(DiffusionPipeline, "load_config", unreachable)
    with pytest.raises(ValueError, match="`model`='owner/name' is not a folder here"):
        load_backbone("owner/name")


def test_another_family_is_refused_before_any_weights_are_read(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(
        ValueError, match=r"a KandinskyPipeline, which is not supported\. Supported: StableDiffusion3Pipeline"
    ):
        load_backbone(tmp_path)


def test_a_pipeline_of_another_family_is_refused():
    unet = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="a DDPMPipeline, which is not supported"):
        load_backbone(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(TypeError, match="`model` is a UNet2DModel"):
        load_backbone(unet)


def test_a_subclass_of_the_pipeline_is_of_the_family():
    class MyPipeline(StableDiffusion3Pipeline):
        pass

    assert load_backbone(MyPipeline(**tiny_random_pipeline().components)).sampler == "dpm"
