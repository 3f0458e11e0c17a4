r"""
Forward processes: how a clean latent is noised and what the network is asked to predict there.

Conventions, stated once. Flow matching: `sigma` in [0, 1], 0 is data and 1 is noise, \\( x_t = (1 - \sigma) x_0 +
\sigma \epsilon \\), and the velocity points to the noise, \\( v = \epsilon - x_0 \\) (Stable Diffusion 3,
[2403.03206](https://huggingface.co/papers/2403.03206)). DDPM: \\( x_t = \sqrt{\bar\alpha} x_0 + \sqrt{1 - \bar\alpha}
\epsilon \\). Noise, levels and uniforms are arguments; nothing is drawn here.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SDECoefficients(NamedTuple):
    r"""
    A stochastic step \\( x' = a x + b v + \mathrm{std}\, z \\) of the reverse flow, from \\( \sigma \\) to \\( \sigma'
    \\).

    Args:
        latent (`float`):
            \\( a \\), what the mean has of the present latent.
        velocity (`float`):
            \\( b < 0 \\), what it has of the predicted velocity.
        diffusion (`float`):
            \\( s \\), the noise of a unit of time.
        std (`float`):
            \\( s \sqrt{\sigma - \sigma'} \\), that of the step.
    """

    latent: float
    velocity: float
    diffusion: float
    std: float


def flow_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    r"""
    Noised latent of flow matching, \\( x_t = (1 - \sigma) x_0 + \sigma \epsilon \\).

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise.
        sigma (`float` or `torch.Tensor` of shape `(B,)`):
            Noise level in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    sigma = _per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def flow_target(x0: Tensor, noise: Tensor) -> Tensor:
    r"""Velocity target of flow matching, \\( \epsilon - x_0 \\): the same at every level."""
    return noise - x0


def flow_clean(x_t: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    r"""
    Clean latent that a velocity points to, \\( \hat x_0 = x_t - \sigma v \\).

    Args:
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noised latents.
        velocity (`torch.Tensor` of shape `(B, ...)`):
            Velocities there.
        sigma (`float` or `torch.Tensor` of shape `(B,)`):
            Noise level in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    return x_t - _per_sample(sigma, x_t) * velocity


def flow_velocity(x_t: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    r"""
    Velocity that points from a noised latent to a clean one, \\( v = (x_t - x_0) / \sigma \\): the inverse of
    [`flow_clean`].

    Args:
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noised latents.
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        sigma (`float` or `torch.Tensor` of shape `(B,)`):
            Noise level in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    return (x_t - x0) / _per_sample(sigma, x_t)


def flow_renoise(x_s: Tensor, noise: Tensor, sigma: Tensor | float, to: Tensor | float) -> Tensor:
    r"""
    A latent at one level noised on to a higher one, \\( x_\tau = \alpha x_s + b \epsilon \\) with \\( \alpha =
    \frac{1 - \tau}{1 - \sigma} \\) and \\( b = \sqrt{\tau^2 - \sigma^2 \alpha^2} \\), as if \\( x_0 \\) had been
    ([2603.07700](https://huggingface.co/papers/2603.07700)).

    Args:
        x_s (`torch.Tensor` of shape `(B, ...)`):
            Latents at `sigma`.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise, of what is added.
        sigma (`float` or `torch.Tensor` of shape `(B,)`):
            Their level, in [0, 1).
        to (`float` or `torch.Tensor` of shape `(B,)`):
            The level wanted, in (`sigma`, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    alpha, b = _renoising(_per_sample(sigma, x_s), _per_sample(to, x_s))
    return alpha * x_s + b * noise


def flow_renoise_target(x_s: Tensor, noise: Tensor, sigma: Tensor | float, to: Tensor | float) -> Tensor:
    r"""
    Velocity of [`flow_renoise`]'s path at its end, \\( \frac{d x_\tau}{d \tau} = - \frac{x_s}{1 - \sigma} +
    \frac{\epsilon}{b} \left( \tau + \frac{\sigma^2 \alpha}{1 - \sigma} \right) \\); of a clean `x_s` the velocity of
    flow matching.

    Args:
        x_s (`torch.Tensor` of shape `(B, ...)`):
            Latents at `sigma`.
        noise (`torch.Tensor` of shape `(B, ...)`):
            The noise that was added.
        sigma (`float` or `torch.Tensor` of shape `(B,)`):
            Their level.
        to (`float` or `torch.Tensor` of shape `(B,)`):
            The level that they were noised to.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    sigma, to = _per_sample(sigma, x_s), _per_sample(to, x_s)
    alpha, b = _renoising(sigma, to)
    return -x_s / (1 - sigma) + noise / b * (to + sigma**2 * alpha / (1 - sigma))


def _renoising(sigma: Tensor | float, to: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    alpha = (1 - to) / (1 - sigma)
    return alpha, (to**2 - (sigma * alpha) ** 2) ** 0.5


def ddpm_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    r"""
    Noised latent of DDPM, \\( x_t = \sqrt{\bar\alpha} x_0 + \sqrt{1 - \bar\alpha} \epsilon \\).

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise.
        alpha_bar (`float` or `torch.Tensor` of shape `(B,)`):
            Cumulative product of the schedule's alphas at the sample's timestep, in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    alpha_bar = _per_sample(alpha_bar, x0)
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def ddpm_target(x0: Tensor, noise: Tensor, alpha_bar: Tensor | float, *, prediction_type: str = "epsilon") -> Tensor:
    r"""
    What a DDPM network predicts: the noise, or \\( v = \sqrt{\bar\alpha} \epsilon - \sqrt{1 - \bar\alpha} x_0 \\).

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise.
        alpha_bar (`float` or `torch.Tensor` of shape `(B,)`):
            Cumulative product of alphas.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            `"epsilon"` or `"v_prediction"`, diffusers' names.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.

    Raises:
        `ValueError`: for any other `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alpha_bar = _per_sample(alpha_bar, x0)
        return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0
    raise ValueError(f"`prediction_type` is {prediction_type!r}; it must be 'epsilon' or 'v_prediction'.")


def ddpm_clean(
    x_t: Tensor, prediction: Tensor, alpha_bar: Tensor | float, *, prediction_type: str = "epsilon"
) -> Tensor:
    r"""
    Clean latent that a prediction means: \\( (x_t - \sqrt{1 - \bar\alpha} \epsilon) / \sqrt{\bar\alpha} \\), or \\(
    \sqrt{\bar\alpha} x_t - \sqrt{1 - \bar\alpha} v \\).

    Args:
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noised latents.
        prediction (`torch.Tensor` of shape `(B, ...)`):
            What the network predicts there.
        alpha_bar (`float` or `torch.Tensor` of shape `(B,)`):
            Cumulative product of alphas.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.

    Raises:
        `ValueError`: for any other `prediction_type`.
    """
    alpha_bar = _per_sample(alpha_bar, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * prediction
    raise ValueError(f"`prediction_type` is {prediction_type!r}; it must be 'epsilon' or 'v_prediction'.")


def shift(u: Tensor | float, factor: float) -> Tensor | float:
    r"""
    Shifted level, \\( s u / (1 + (s - 1) u) \\) ([2403.03206](https://huggingface.co/papers/2403.03206), Eq. 23).

    A factor above 1 spends more of a uniform `u` in [0, 1] at high noise; SD3 uses 3.
    """
    return factor * u / (1 + (factor - 1) * u)


def unshift(sigma: Tensor | float, factor: float) -> Tensor | float:
    """Inverse of `shift`: the uniform level that `factor` maps to `sigma`."""
    return sigma / (factor - (factor - 1) * sigma)


def trainable_levels(sigmas: Tensor, t_min: float, shift_factor: float, *, t_max: float = 1.0) -> Tensor:
    r"""
    Indices of a rollout grid's levels that are trained on: its noisy prefix, or a band of it.

    DGPO's timestep clip ([2510.08425](https://huggingface.co/papers/2510.08425)) trains on \\( t \in
    [t_{\min}, 1] \\) alone, since a few-step rollout has its artefacts at low noise. Here \\( t \\) is a level before
    the shift, on which the grid is evenly spaced, and an index is kept iff \\( \mathrm{unshift}(\sigma) \ge t_{\min} -
    0.005 \\). The half per cent makes up for grids of whole timesteps: 10 steps and `t_min=0.4` keep the first 7
    levels, as the authors' OCR configuration does.

    Args:
        sigmas (`torch.Tensor` of shape `(S,)`):
            Levels of the grid in (0, 1].
        t_min (`float`):
            Smallest level, before the shift, in [0, 1). 0 keeps the whole grid.
        shift_factor (`float`):
            The grid's shift.
        t_max (`float`, *optional*, defaults to `1.0`):
            Largest level, before the shift, kept with the same tolerance.

    Returns:
        `torch.Tensor` of shape `(K,)`, int64.
    """
    u = unshift(sigmas, shift_factor)
    return torch.nonzero((u >= t_min - 0.005) & (u <= t_max + 0.005)).flatten()


def continuous_levels(uniform: Tensor, t_min: float, shift_factor: float, *, t_max: float = 1.0) -> Tensor:
    r"""
    Levels of the paper's continuous form: \\( u \sim U[t_{\min}, t_{\max}] \\), then shifted.

    Args:
        uniform (`torch.Tensor` of shape `(M,)`):
            Draws from U[0, 1).
        t_min (`float`):
            Smallest level before the shift, in [0, 1).
        shift_factor (`float`):
            The rollout grid's shift, so that the density is that of the grid.
        t_max (`float`, *optional*, defaults to `1.0`):
            Largest level before the shift.

    Returns:
        `torch.Tensor` of shape `(M,)`.
    """
    return shift(t_min + (t_max - t_min) * uniform, shift_factor)


def renoising_level(uniform: float, sigma: float, t_min: float, shift_factor: float) -> float:
    r"""
    The level that TDM-R1 ([2603.07700](https://huggingface.co/papers/2603.07700)) noises a latent at `sigma` on to:
    uniform before the shift, \\( u \sim U[\max(\mathrm{unshift}(\sigma), t_{\min}) + 0.02, 1] \\), then shifted.

    Args:
        uniform (`float`):
            A draw from U[0, 1).
        sigma (`float`):
            The latent's level, in [0, 1).
        t_min (`float`):
            Smallest level before the shift. The authors' code has it after the shift: its 300 of 1000 is 0.125 here,
            with a shift of 3.
        shift_factor (`float`):
            The rollout grid's shift.

    Returns:
        `float` above `sigma`, at most 1.

    Raises:
        `ValueError`: if there is nothing between the lowest such level and 1.
    """
    lowest = max(unshift(sigma, shift_factor), t_min) + 0.02
    if not lowest < 1:
        raise ValueError(
            f"A latent at the level {sigma:.3f}, with `t_min` {t_min}, would be noised on to at least {lowest:.3f} "
            "before the shift, and 1 is noise. Lower `t_min`, or take fewer sampling steps."
        )
    return shift(lowest + (1 - lowest) * uniform, shift_factor)


def flow_sde_coefficients(
    sigma: float, next_sigma: float, *, noise_level: float = 0.7, max_sigma: float
) -> SDECoefficients:
    r"""
    Coefficients of a stochastic step (Flow-GRPO, [2505.05470](https://huggingface.co/papers/2505.05470)).

    With \\( \Delta = \sigma' - \sigma < 0 \\) and \\( s = \eta \sqrt{\sigma / (1 - \sigma)} \\) the step's mean is
    affine in latent and velocity: \\( a = 1 + s^2 \Delta / 2\sigma \\), \\( b = (1 + s^2 (1 - \sigma) / 2\sigma)
    \Delta \\). Its marginals are those of the ODE, to first order in \\( \Delta \\).

    Args:
        sigma (`float`):
            Present level in (0, 1].
        next_sigma (`float`):
            Next level, below `sigma`.
        noise_level (`float`, *optional*, defaults to `0.7`):
            \\( \eta \\); 0 is Euler's step on the ODE.
        max_sigma (`float`):
            Stands for `sigma` in \\( s \\)'s denominator where `sigma` is 1 and the denominator 0: the grid's second
            level, as in the authors' code.

    Returns:
        [`SDECoefficients`].
    """
    delta = next_sigma - sigma
    s = noise_level * (sigma / (1 - (max_sigma if sigma == 1 else sigma))) ** 0.5
    return SDECoefficients(
        latent=1 + s**2 * delta / (2 * sigma),
        velocity=(1 + s**2 * (1 - sigma) / (2 * sigma)) * delta,
        diffusion=s,
        std=s * (-delta) ** 0.5,
    )


def flow_sde_step(x_t: Tensor, velocity: Tensor, noise: Tensor, coefficients: SDECoefficients) -> Tensor:
    r"""
    One stochastic step, \\( x' = a x + b v + \mathrm{std}\, z \\).

    Args:
        x_t (`torch.Tensor`):
            Latent at the present level.
        velocity (`torch.Tensor`):
            Predicted velocity there.
        noise (`torch.Tensor`):
            Standard normal \\( z \\).
        coefficients ([`SDECoefficients`]):
            From [`flow_sde_coefficients`].
    """
    return coefficients.latent * x_t + coefficients.velocity * velocity + coefficients.std * noise


def flow_sde_target(x_t: Tensor, x_next: Tensor, coefficients: SDECoefficients) -> Tensor:
    r"""
    The velocity whose step, without noise, leads from `x_t` to `x_next`: \\( v^* = (x' - a x) / b \\).

    A step is the likelier the nearer the predicted velocity is to it, see [`~trl_dgpo.losses.step_log_prob`].

    Args:
        x_t (`torch.Tensor`):
            Latent before the step.
        x_next (`torch.Tensor`):
            Latent after it.
        coefficients ([`SDECoefficients`]):
            From [`flow_sde_coefficients`].
    """
    return (x_next - coefficients.latent * x_t) / coefficients.velocity


def _per_sample(value: Tensor | float, like: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value  # as a tensor it would be copied to the device, which the host waits for
    value = value.to(like.device, like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value
