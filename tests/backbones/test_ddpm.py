"""DDPM's forms, as SD 1.5 and SDXL have them; what holds for every family is in `test_contract`."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from peft import LoraConfig
from tiny_families import tiny_family
from tiny_trainers import prompt_dataset, tiny_trainer

from trl_dgpo.backbones import load_backbone
from trl_dgpo.losses import denoising_error


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backbone_of(name: str, scheduler=None, **options):
    pipeline = tiny_family(name)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    return load_backbone(pipeline, **{"sampler": "euler", **options})


# (1 - alpha_bar) / alpha_bar of Stable Diffusion's betas
X0_TO_NOISE = {0: 8.507e-4, 250: 0.48414, 500: 2.61883, 750: 16.8032, 999: 213.588}


@pytest.mark.parametrize(("timestep", "factor"), X0_TO_NOISE.items())
def test_an_error_of_x0_is_one_of_the_noise_times_a_number(timestep, factor):
    backbone = backbone_of("sd15")
    x0, drawn = noise(2, 4, 8, 8).double(), noise(2, 4, 8, 8, seed=1).double()
    predicted, level = drawn + 0.1 * noise(2, 4, 8, 8, seed=2).double(), timestep / 1000
    clean = backbone.clean(backbone.noise(x0, drawn, level), predicted, level)
    ratio = denoising_error(clean, x0).double() / denoising_error(predicted, drawn).double()
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ["sd15", "sd15-v", "sdxl"])
def test_noise_and_targets_are_the_schedulers_own(name):
    backbone = backbone_of(name)
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)
    x0, drawn = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    timesteps = torch.tensor([3, 500, 999])
    levels = timesteps.double() / 1000
    torch.testing.assert_close(backbone.noise(x0, drawn, levels), scheduler.add_noise(x0, drawn, timesteps))
    target = scheduler.get_velocity(x0, drawn, timesteps) if name == "sd15-v" else drawn
    torch.testing.assert_close(backbone.target(x0, drawn, levels), target)


def test_a_level_between_two_timesteps_is_the_nearer_one():
    backbone = backbone_of("sd15")
    told = []
    backbone.denoiser.register_forward_pre_hook(lambda module, args: told.append(args[1].tolist()))
    x0, drawn = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    assert torch.equal(backbone.noise(x0, drawn, 0.4996), backbone.noise(x0, drawn, 0.5))
    assert torch.equal(backbone.noise(x0, drawn, 1.0), backbone.noise(x0, drawn, 0.999))  # of 1000 timesteps the last
    with torch.no_grad():
        backbone.predict(x0, 0.4996, backbone.encode(["a", "b"]))
        backbone.predict(x0, torch.tensor([0.0004, 1.0]), backbone.encode(["a", "b"]))
    assert told == [[500.0, 500.0], [0.0, 999.0]]


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
def test_a_saved_scheduler_walks_as_the_one_in_memory(sampler, tmp_path):
    backbone = backbone_of("sd15", sampler=sampler)
    assert backbone.sigmas(4).tolist() == [0.999, 0.749, 0.5, 0.25]  # from the last timestep on
    # A saved configuration names all values, also those that were nobody's choice.
    backbone.pipeline.scheduler.save_pretrained(tmp_path)
    saved = backbone_of("sd15", DDIMScheduler.from_pretrained(tmp_path), sampler=sampler)
    assert torch.equal(saved.sigmas(4), backbone.sigmas(4))


# As the Hub has them.
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=False),
        DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        EulerDiscreteScheduler(**SD15, timestep_spacing="leading"),
        EulerDiscreteScheduler(**SD15, use_karras_sigmas=True),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL", "Karras"],
)
def test_by_default_all_walk_evenly_spaced_timesteps(scheduler):
    backbone = backbone_of("sd15", scheduler, sampler="dpm")
    assert backbone.sigmas(10).tolist() == pytest.approx([0.999 - 0.0999 * i for i in range(10)], abs=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), {}, "FlowMatchEulerDiscreteScheduler without `alphas_cumprod`"),
        (DDIMScheduler(prediction_type="sample"), {}, "`prediction_type`='sample'; it must be one of 'epsilon'"),
        (PNDMScheduler(), {"sigmas": "model"}, "a PNDMScheduler; of one forward a step and without noise are DDIM"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {"sigmas": "model"}, "without noise are DDIM"),
        (EulerDiscreteScheduler(timestep_type="continuous"), {"sigmas": "model"}, "`timestep_type`='continuous'"),
        (None, {"sigmas": "model", "sampler": "dpm"}, "`sampler` is 'dpm', which has a grid of its own"),
    ],
)
def test_schedulers_that_do_not_fit(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        backbone_of("sd15", scheduler, **options)


def draw_one_colour(pipeline, *, num_steps: int = 80):
    """
    Teach a UNet latents of one number each, drawn from a normal distribution.

    Random weights draw noise, which nothing can be preferred in.
    """
    backbone, stream = load_backbone(pipeline, sampler="euler"), torch.Generator().manual_seed(0)
    conditioning = backbone.encode(["a"] * 32)
    parameters = list(backbone.denoiser.requires_grad_(True).train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, num_steps)
    for _ in range(num_steps):
        x0 = torch.randn(32, 1, 1, 1, generator=stream).expand(32, 4, 4, 4)
        drawn, levels = torch.randn(32, 4, 4, 4, generator=stream), torch.rand(32, generator=stream)
        prediction = backbone.predict(backbone.noise(x0, drawn, levels), levels, conditioning)
        denoising_error(prediction, backbone.target(x0, drawn, levels)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    backbone.denoiser.requires_grad_(False).eval()


LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.slow), "sd15-v"])
def test_a_reward_rises(name, tmp_path):
    pipeline = tiny_family(name)
    draw_one_colour(pipeline)
    trainer = tiny_trainer(
        tmp_path,
        model=pipeline,
        train_dataset=prompt_dataset("a", "b"),
        peft_config=LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian", target_modules=LAYERS),
        learning_rate=1e-2,
        num_generations=16,
        prompts_per_round=2,
        max_steps=12,
        resolution=16,
        sample_num_steps=6,
        t_min=0.0,
        logging_steps=1,
        per_device_train_batch_size=32,
        sample_batch_size=32,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    last = sum(entry["reward"] for entry in log[-3:]) / 3
    assert last - log[0]["reward"] > 0.5 * log[0]["reward_std"]  # the first round is of the model as it was
