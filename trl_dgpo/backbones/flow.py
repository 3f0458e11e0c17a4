r"""
Families of flow matching: SD3, FLUX.1, Z-Image.

The denoiser predicts the velocity \\( \epsilon - x_0 \\) ([2403.03206](https://huggingface.co/papers/2403.03206)).
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from .. import noising
from .base import Backbone, _evaluating


# LoRA targets of the blocks that attend to image and text at once.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
SHIFTS = {"base_shift": 0.5, "max_shift": 1.15}  # of a dynamic shift, with the defaults that pipelines take


class FlowBackbone(Backbone):
    """
    A backbone of flow matching; see [`~trl_dgpo.backbones.base.Backbone`].

    Levels are shifted to high noise by a factor that the pipeline's scheduler has, or that grows with the image
    (`use_dynamic_shifting`), for which `image_size` is asked.
    """

    def noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Noised latent: [`~trl_dgpo.noising.flow_noise`]."""
        return noising.flow_noise(x0, noise, sigma)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What `predict` should give: [`~trl_dgpo.noising.flow_target`], the same at every level."""
        return noising.flow_target(x0, noise)

    def clean(self, x_t: Tensor, prediction: Tensor, sigma: Tensor | float) -> Tensor:
        """Clean latent that a velocity points to: [`~trl_dgpo.noising.flow_clean`]."""
        return noising.flow_clean(x_t, prediction, sigma)

    @torch.no_grad()
    def sample(
        self,
        latents: Tensor,
        conditioning: dict[str, Tensor],
        *,
        num_steps: int,
        guidance_scale: float,
        step_noise: Callable[[int], Tensor | None] | None = None,
        noise_level: float = 0.7,
        keep: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """
        Clean latents from noise; see [`~trl_dgpo.backbones.base.Backbone.sample`].

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Standard normal noise.
            conditioning (`dict[str, torch.Tensor]`):
                One row a latent.
            num_steps (`int`):
                Steps of the sampler.
            guidance_scale (`float`):
                Classifier-free guidance; at most 1 is without.
            step_noise (`Callable[[int], torch.Tensor]`, *optional*):
                For the `"sde"` sampler alone: standard normal noise of shape `(B, C, h, w)` for step i, asked for all
                steps but the last, whose noise would stay in the image. Where it gives `None`, and without it, that
                sampler walks its noise-free ODE, by Euler on the same levels. Latents are then kept in float32 from
                step to step, and only the denoiser reads them in the conditioning's dtype.
            noise_level (`float`, *optional*, defaults to `0.7`):
                Strength of that noise, see [`~trl_dgpo.noising.flow_sde_coefficients`].
            keep (`Callable`, *optional*):
                For the `"euler"` and `"sde"` samplers: called after each step with its number, the latents before it,
                the velocity there and the latents after it, all in float32. Latents are then kept so too.
        """
        is_shown = keep is not None and self.sampler != "dpm"
        if not (is_shown if step_noise is None else self.sampler == "sde"):
            return super().sample(
                latents,
                conditioning,
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                step_noise=step_noise,
                keep=keep,
            )
        dtype = self._dtype(conditioning)
        conditioning = self._guided(conditioning, len(latents), guidance_scale)
        levels = self.step_levels(num_steps)
        coefficients = None if step_noise is None else self.sde_coefficients(num_steps, noise_level=noise_level)
        latents = latents.to(self.device, dtype).float()
        with _evaluating(self.denoiser):
            for i, timestep in enumerate(self._prepared(num_steps, self.device).timesteps):
                # A trainer takes guidance apart from the forward in float32, and should find the same velocities.
                velocity = self._guided_prediction(
                    self.denoiser, latents.to(dtype), timestep, conditioning, guidance_scale, torch.float32
                )
                x_t, z = latents, None if step_noise is None or i == num_steps - 1 else step_noise(i)
                if z is None:
                    latents = x_t + (levels[i + 1] - levels[i]) * velocity
                else:
                    latents = noising.flow_sde_step(x_t, velocity, z.to(x_t), coefficients[i])
                if keep is not None:
                    keep(i, x_t, velocity, latents)
        return latents.to(self.LATENTS_DTYPE or dtype)

    def sde_coefficients(self, num_steps: int, *, noise_level: float = 0.7) -> list[noising.SDECoefficients]:
        """
        How `sample` takes each step that may be stochastic: all of a rollout but the last.

        Args:
            num_steps (`int`):
                Steps of the sampler.
            noise_level (`float`, *optional*, defaults to `0.7`):
                As in [`~trl_dgpo.noising.flow_sde_coefficients`].
        """
        # The start is pure noise, level 1, also where the grid says 0.99967: there 1 / (1 - sigma) explodes.
        levels = [1.0, *self.step_levels(num_steps)[1:]]
        return [
            noising.flow_sde_coefficients(sigma, next_sigma, noise_level=noise_level, max_sigma=levels[1])
            for sigma, next_sigma in pairwise(levels[:-1])
        ]

    def step_levels(self, num_steps: int) -> list[float]:
        """Levels from which and to which a rollout of so many steps goes, the last one 0."""
        return self._prepared(num_steps, torch.device("cpu")).sigmas.tolist()

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _to_latents(self, encoded: Tensor) -> Tensor:
        return (encoded - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _walk(self, sampler: str, sigmas: str, image_size: tuple[int, int] | None) -> tuple[float, SchedulerMixin]:
        own = self.pipeline.scheduler
        shift_factor = self._shift_factor(own, image_size)
        if sigmas == "dpm":
            return shift_factor, DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver++",
                # of order one DPM-Solver++ is Euler's method here: x + (sigma' - sigma) v
                solver_order=2 if sampler == "dpm" else 1,
                solver_type="midpoint",
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift_factor,
                use_dynamic_shifting=bool(own.config.get("use_dynamic_shifting")),  # a pipeline then gives the shift
                lower_order_final=True,
                euler_at_final=False,
                final_sigmas_type="zero",
                timestep_spacing="linspace",
            )
        if sampler == "dpm":
            raise ValueError(
                "`sigmas` is 'model' and `sampler` is 'dpm', which has a grid of its own; take `sampler='euler'` or "
                "'sde', or `sigmas='dpm'`."
            )
        if not isinstance(own, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"`sigmas` is 'model' and the pipeline's scheduler is a {type(own).__name__}; only the grid of a "
                "FlowMatchEulerDiscreteScheduler can be walked. Replace the scheduler or take `sigmas='dpm'`."
            )
        return shift_factor, copy.deepcopy(own)

    def _steps(self, num_steps: int) -> dict[str, Any]:
        steps = super()._steps(num_steps)
        if self.scheduler.config.get("use_dynamic_shifting"):
            steps["mu"] = math.log(self.shift_factor)
        return steps

    def _image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image, on which a dynamic shift depends."""
        _, h, w = self.latent_shape(height, width)
        return h * w // 4  # patches of 2 x 2

    def _shift_factor(self, scheduler: SchedulerMixin, image_size: tuple[int, int] | None) -> float:
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            if config.get("time_shift_type", "exponential") != "exponential":
                raise ValueError(
                    f"The pipeline's scheduler has `time_shift_type`={config['time_shift_type']!r}; only an "
                    "'exponential' dynamic shift is the shift by one factor that levels are drawn with. Replace it: "
                    "`pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`."
                )
            if image_size is None:
                raise ValueError(
                    "The pipeline's scheduler has `use_dynamic_shifting=True`, a shift that depends on the image; "
                    "give `image_size=(height, width)`, or a scheduler of a fixed one: "
                    "`pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`."
                )
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            base, top = (config.get(name, default) for name, default in SHIFTS.items())
            slope = (top - base) / (high - low)
            return math.exp(self._image_tokens(*image_size) * slope + (base - slope * low))
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
        if shift is None:
            raise ValueError(
                f"The pipeline's scheduler is a {type(scheduler).__name__} without a flow shift, so it is not one of "
                "flow matching. Replace it: `pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)`."
            )
        return float(shift)
