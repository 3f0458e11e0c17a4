import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler

from trl_dgpo.losses import denoising_error, step_log_prob
from trl_dgpo.noising import (
    continuous_levels,
    ddpm_noise,
    ddpm_target,
    flow_clean,
    flow_noise,
    flow_renoise,
    flow_renoise_target,
    flow_sde_coefficients,
    flow_sde_step,
    flow_sde_target,
    flow_target,
    flow_velocity,
    renoising_level,
    shift,
    trainable_levels,
    unshift,
)


# DPM-Solver++ with flow sigmas and shift 3, as whole timesteps.
GRIDS = {
    4: [999, 899, 749, 499],
    10: [999, 963, 922, 874, 817, 749, 666, 562, 428, 249],
    14: [999, 974, 947, 916, 881, 843, 799, 749, 691, 624, 545, 449, 333, 187],
}
# Stable Diffusion 1.5's schedule.
SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def latents(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]


# -- flow matching


def test_flow_path_by_hand():
    x0, noise = f64(2.0, 4.0), f64(-1.0, 8.0)
    assert flow_noise(x0, noise, 0.0).tolist() == [2.0, 4.0]
    assert flow_noise(x0, noise, 0.25).tolist() == [1.25, 5.0]
    assert flow_noise(x0, noise, 1.0).tolist() == [-1.0, 8.0]
    assert flow_target(x0, noise).tolist() == [-3.0, 4.0]


def test_the_velocity_is_the_slope_of_the_path():
    x0, noise, _ = latents(2, 4, 3, 3)
    slope = (flow_noise(x0, noise, 0.75) - flow_noise(x0, noise, 0.25)) / 0.5
    torch.testing.assert_close(slope, flow_target(x0, noise), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noised", [flow_noise, ddpm_noise])
def test_each_sample_has_its_own_level(noised):
    x0, noise, _ = latents(3, 4, 2, 3)  # no axis of another's size, so that a wrong broadcast fails
    together = noised(x0, noise, f64(0.1, 0.5, 0.9))
    alone = [noised(x0[i : i + 1], noise[i : i + 1], level) for i, level in enumerate((0.1, 0.5, 0.9))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("sigma", "x0_ratio"), [(0.25, 0.0625), (0.666, 0.443556), (0.999, 0.998001)])
def test_flow_errors_in_other_spaces(sigma, x0_ratio):
    x0, noise, slip = latents(2, 4, 3, 3)
    x_t, velocity = flow_noise(x0, noise, sigma), flow_target(x0, noise) + slip
    error = denoising_error(velocity, flow_target(x0, noise))
    torch.testing.assert_close(denoising_error(x_t - sigma * velocity, x0), x0_ratio * error, rtol=1e-9, atol=0)
    noise_error = denoising_error(x_t + (1 - sigma) * velocity, noise)
    torch.testing.assert_close(noise_error, (1 - sigma) ** 2 * error, rtol=1e-9, atol=0)


# -- DDPM


@pytest.mark.parametrize("t", [0, 250, 500, 750, 999])
def test_ddpm_is_that_of_diffusers(t):
    x0, noise, _ = (x.float() for x in latents(2, 4, 3, 3))
    alpha_bar, step = SCHEDULER.alphas_cumprod[t].item(), torch.tensor([t, t])
    torch.testing.assert_close(ddpm_noise(x0, noise, alpha_bar), SCHEDULER.add_noise(x0, noise, step))
    velocity = ddpm_target(x0, noise, alpha_bar, prediction_type="v_prediction")
    torch.testing.assert_close(velocity, SCHEDULER.get_velocity(x0, noise, step))
    assert torch.equal(ddpm_target(x0, noise, alpha_bar), noise)


@pytest.mark.parametrize(
    ("t", "ratio"), [(0, 8.507e-4), (250, 0.48414), (500, 2.61883), (750, 16.8032), (999, 213.588)]
)
def test_x0_error_of_an_epsilon_prediction(t, ratio):
    alpha_bar = ALPHA_BAR[t].item()
    x0, noise, slip = latents(2, 4, 3, 3)
    x_t, prediction = ddpm_noise(x0, noise, alpha_bar), noise + slip
    predicted_x0 = (x_t - math.sqrt(1 - alpha_bar) * prediction) / math.sqrt(alpha_bar)
    error = denoising_error(prediction, ddpm_target(x0, noise, alpha_bar))
    torch.testing.assert_close(denoising_error(predicted_x0, x0), ratio * error, rtol=3e-5, atol=0)


def test_v_prediction_gives_back_x0_and_noise():
    x0, noise, _ = latents(2, 4, 3, 3)
    x_t, v = ddpm_noise(x0, noise, 0.36), ddpm_target(x0, noise, 0.36, prediction_type="v_prediction")
    torch.testing.assert_close(0.6 * x_t - 0.8 * v, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(0.8 * x_t + 0.6 * v, noise, rtol=0, atol=1e-12)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'sample'; it must be 'epsilon' or 'v_prediction'"):
        ddpm_target(f64(0.0), f64(0.0), 0.5, prediction_type="sample")


# -- levels


@pytest.mark.parametrize(
    ("u", "sigma"), [(0.0, 0.0), (0.2, 0.4286), (0.3, 0.5625), (0.4, 0.6667), (0.6, 0.8182), (1.0, 1.0)]
)
def test_shift(u, sigma):
    assert shift(u, 3.0) == pytest.approx(sigma, abs=5e-5)
    assert unshift(shift(u, 3.0), 3.0) == pytest.approx(u, abs=1e-12)
    assert shift(u, 1.0) == u


def test_unshifted_grid_is_even():
    unshifted = unshift(f64(*GRIDS[10]) / 1000, 3.0)
    assert unshifted.tolist() == pytest.approx(
        [0.997, 0.897, 0.798, 0.698, 0.598, 0.499, 0.399, 0.3, 0.2, 0.1], abs=6e-4
    )


@pytest.mark.parametrize(
    ("num_steps", "t_min", "kept"),
    [
        (10, 0.0, 10), (10, 0.2, 9), (10, 0.3, 8), (10, 0.4, 7), (10, 0.5, 6), (10, 0.6, 5), (10, 0.99, 1),
        (14, 0.0, 14), (14, 0.4, 9), (14, 0.6, 6),
        (4, 0.0, 4), (4, 0.25, 4), (4, 0.4, 3), (4, 0.6, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trainable_levels(num_steps, t_min, kept, dtype):
    sigmas = torch.tensor(GRIDS[num_steps], dtype=dtype) / 1000
    assert trainable_levels(sigmas, t_min, 3.0).tolist() == list(range(kept))


@pytest.mark.parametrize(
    ("t_min", "t_max", "kept"),
    [(0.0, 0.5, [5, 6, 7, 8, 9]), (0.5, 1.0, [0, 1, 2, 3, 4, 5]), (0.3, 0.6, [4, 5, 6, 7]), (0.31, 0.34, [])],
)
def test_a_band_of_levels(t_min, t_max, kept):
    sigmas = f64(*GRIDS[10]) / 1000
    assert trainable_levels(sigmas, t_min, 3.0, t_max=t_max).tolist() == kept


def test_continuous_levels_of_a_band():
    sigmas = continuous_levels(f64(0.0, 0.5, 1.0), t_min=0.2, shift_factor=3.0, t_max=0.6)
    assert sigmas.tolist() == pytest.approx([0.42857142857, 0.66666666667, 0.81818181818], abs=1e-9)


def test_continuous_levels():
    sigmas = continuous_levels(f64(0.0, 1 / 3, 2 / 3, 1.0), t_min=0.4, shift_factor=3.0)  # u = .4, .6, .8, 1
    assert sigmas.tolist() == pytest.approx([2 / 3, 9 / 11, 12 / 13, 1.0], abs=1e-12)


# -- the stochastic step


@pytest.mark.parametrize(
    ("sigma", "next_sigma", "s", "mean", "std", "x_next", "log_prob"),
    [
        (0.9, 0.80000, 2.1, 0.414850, 0.664078308635, 0.879704816045, -0.754583331437),
        (1.0, 0.96013, 3.505701400935, 0.389461, 0.7, 0.879461, -0.807263589266),
    ],
)
def test_sde_step(sigma, next_sigma, s, mean, std, x_next, log_prob):
    step = flow_sde_coefficients(sigma, next_sigma, max_sigma=0.96013)
    x, v = f64(0.5), f64(-0.3)
    out = flow_sde_step(x, v, f64(0.7), step)
    assert step.diffusion == pytest.approx(s, abs=1e-9)
    assert step.latent * 0.5 + step.velocity * -0.3 == pytest.approx(mean, abs=1e-9)
    assert step.std == pytest.approx(std, abs=1e-9)
    assert out.item() == pytest.approx(x_next, abs=1e-9)
    error = denoising_error(v[None], flow_sde_target(x, out, step)[None])
    assert step_log_prob(error, step.velocity, step.std).item() == pytest.approx(log_prob, abs=1e-9)


def test_sde_without_noise_is_eulers_step():
    x_t, velocity, noise = latents(2, 4, 3, 3)
    step = flow_sde_coefficients(0.9, 0.8, noise_level=0.0, max_sigma=0.9)
    assert step.std == step.diffusion == 0
    out = flow_sde_step(x_t, velocity, noise, step)
    torch.testing.assert_close(out, x_t - (0.9 - 0.8) * velocity, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sigma", "next_sigma"), [(1.0, 0.96), (0.9, 0.8), (0.278, 0.009)])
def test_the_target_is_the_velocity_that_leads_there(sigma, next_sigma):
    x_t, velocity, noise = latents(2, 4, 3, 3)
    step = flow_sde_coefficients(sigma, next_sigma, max_sigma=0.96)
    x_next = flow_sde_step(x_t, velocity, noise, step)
    target = flow_sde_target(x_t, x_next, step)
    torch.testing.assert_close(flow_sde_step(x_t, target, torch.zeros_like(noise), step), x_next)
    torch.testing.assert_close(target - velocity, step.std / step.velocity * noise)  # what the noise did


def test_sde_keeps_the_marginal():
    # Data that is one point, x0 = 0: the path at sigma is N(0, sigma^2), the velocity x / sigma. A small step gives
    # the variance of the next level, to second order.
    for step in (1e-2, 1e-3):
        x_next = [
            flow_sde_step(f64(x), f64(x) / 0.5, f64(z), flow_sde_coefficients(0.5, 0.5 - step, max_sigma=0.9)).item()
            for x, z in ((0.5, 0.0), (0.0, 1.0))
        ]
        assert x_next[0] ** 2 + x_next[1] ** 2 == pytest.approx((0.5 - step) ** 2, abs=2 * step**2)


# -- a student's step noised on: TDM-R1


def test_renoised_latents_by_hand():
    x_s, noise = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-0.7]], dtype=torch.float64)
    # alpha = .2 / .501, b = sqrt(.64 - (.499 alpha)^2)
    alpha = 0.2 / 0.501
    b = (0.64 - (0.499 * alpha) ** 2) ** 0.5
    assert flow_renoise(x_s, noise, 0.499, 0.8).item() == pytest.approx(0.3 * alpha - 0.7 * b, abs=1e-12)
    assert flow_renoise_target(x_s, noise, 0.499, 0.8).item() == pytest.approx(-1.5008188153, abs=1e-9)


@pytest.mark.parametrize(("sigma", "to"), [(0.0, 0.4), (0.499, 0.8), (0.899, 0.95)])
def test_the_renoised_target_is_the_derivative_of_its_path(sigma, to):
    x_s, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    h = 1e-6
    path = [flow_renoise(x_s, noise, sigma, to + d) for d in (-h, h)]
    torch.testing.assert_close(
        flow_renoise_target(x_s, noise, sigma, to), (path[1] - path[0]) / (2 * h), rtol=1e-6, atol=1e-6
    )


def test_a_clean_latent_is_noised_on_as_any_is():
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(flow_renoise(x0, noise, 0.0, 0.4), flow_noise(x0, noise, 0.4))
    torch.testing.assert_close(flow_renoise_target(x0, noise, 0.0, 0.4), noise - x0)


def test_renoising_twice_is_renoising_once():
    # a mean of x0 and a variance: those of a latent noised from x0 at once
    x0, sigma, to = 0.6, 0.5, 0.9
    alpha = (1 - to) / (1 - sigma)
    b = flow_renoise(torch.zeros(1, 1), torch.ones(1, 1), sigma, to).item()
    assert alpha * (1 - sigma) * x0 == pytest.approx((1 - to) * x0)
    assert (alpha * sigma) ** 2 + b**2 == pytest.approx(to**2)


def test_a_velocity_points_back():
    x_t, x0 = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    velocity = flow_velocity(x_t, x0, 0.7)
    torch.testing.assert_close(flow_clean(x_t, velocity, 0.7), x0)
    assert flow_velocity(torch.tensor([[1.0]]), torch.tensor([[0.4]]), 0.3).item() == pytest.approx(2.0)


def test_levels_to_noise_on_to():
    # .749 of a grid with shift 3 is u = .4986; from .02 above that to 1, uniform before the shift
    u = 0.749 / (3 - 2 * 0.749)
    lowest, middle = u + 0.02, u + 0.02 + (1 - u - 0.02) / 2
    level = partial(renoising_level, sigma=0.749, t_min=0.125, shift_factor=3.0)
    assert level(0.0) == pytest.approx(3 * lowest / (1 + 2 * lowest))
    assert level(0.5) == pytest.approx(3 * middle / (1 + 2 * middle))
    assert level(1.0) == pytest.approx(1.0)
    # of clean latents, from t_min: 300 of 1000 after the shift is .125 before it
    assert renoising_level(0.0, 0.0, 0.125, 3.0) == pytest.approx(3 * 0.145 / (1 + 2 * 0.145))
    assert unshift(0.3, 3.0) == pytest.approx(0.125)
    with pytest.raises(ValueError, match=r"A latent at the level 0.997, .* Lower `t_min`, or take fewer"):
        renoising_level(0.0, 0.997, 0.125, 3.0)
