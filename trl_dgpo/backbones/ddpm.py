r"""
Families of DDPM: SD 1.5 and SDXL, which predict the noise or \\( v \\).

A level is a timestep over 1000: \\( x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon \\) exists for
whole timesteps alone, so a level between two is rounded to the nearer one, in `noise`, `target` and `predict` alike.
The squared error of the noise is \\( \bar\alpha_t / (1 - \bar\alpha_t) \\) times that of \\( x_0 \\); as in
Diffusion-DPO ([2311.12908](https://huggingface.co/papers/2311.12908)) the former is trained on, whatever the level.
"""

import copy

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from .. import noising
from .base import Backbone


PREDICTION_TYPES = ("epsilon", "v_prediction")
WALKED = (DDIMScheduler, EulerDiscreteScheduler)  # deterministic, one forward a step
EVENLY = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")  # all off


class DDPMBackbone(Backbone):
    """
    A backbone of DDPM; see [`~trl_dgpo.backbones.base.Backbone`].

    `sigmas="dpm"` walks DPM-Solver++ (of order one, which is DDIM, for `sampler="euler"`) with the betas and
    the prediction of the pipeline's own scheduler, on equally spaced timesteps from the last one on;
    `sigmas="model"` the pipeline's own, if it is DDIM or Euler. There are no stochastic steps, so no
    Flow-GRPO.
    """

    DENOISER = "unet"

    def noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Noised latent: [`~trl_dgpo.noising.ddpm_noise`] at the level's timestep."""
        return noising.ddpm_noise(x0, noise, self._alpha_bar(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What `predict` should give: [`~trl_dgpo.noising.ddpm_target`]."""
        return noising.ddpm_target(x0, noise, self._alpha_bar(sigma), prediction_type=self._prediction_type)

    def clean(self, x_t: Tensor, prediction: Tensor, sigma: Tensor | float) -> Tensor:
        """Clean latent that a prediction means: [`~trl_dgpo.noising.ddpm_clean`]."""
        return noising.ddpm_clean(x_t, prediction, self._alpha_bar(sigma), prediction_type=self._prediction_type)

    def _timestep(self, sigma: Tensor | float) -> Tensor | float:
        """The nearest whole timestep."""
        last = len(self._alphas_cumprod) - 1
        if isinstance(sigma, Tensor):
            return (1000 * sigma.double()).round().clamp(0, last)
        return min(max(round(1000 * sigma), 0), last)

    def _alpha_bar(self, sigma: Tensor | float) -> Tensor | float:
        timestep = self._timestep(sigma)
        if not isinstance(timestep, Tensor):
            return self._alphas_cumprod[timestep].item()
        if self._alphas_on_device.device != timestep.device:
            self._alphas_on_device = self._alphas_cumprod.to(timestep.device)
        return self._alphas_on_device[timestep.long()]

    def _walk(self, sampler: str, sigmas: str, image_size: tuple[int, int] | None) -> tuple[float, SchedulerMixin]:
        own = self.pipeline.scheduler
        if not hasattr(own, "alphas_cumprod"):
            raise ValueError(
                f"The pipeline's scheduler is a {type(own).__name__} without `alphas_cumprod`, so it is none of DDPM. "
                "Replace it: `pipeline.scheduler = DDIMScheduler.from_pretrained(model, subfolder='scheduler')`."
            )
        self._alphas_cumprod = self._alphas_on_device = own.alphas_cumprod.double().cpu()
        self._prediction_type = own.config.prediction_type
        if self._prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"The pipeline's scheduler has `prediction_type`={self._prediction_type!r}; it must be one of "
                f"{', '.join(map(repr, PREDICTION_TYPES))}."
            )
        if sampler == "sde":
            raise ValueError(
                f"`sampler` is 'sde', the stochastic steps of flow matching, and `model` is a {self.PIPELINE}; take "
                "'dpm' or 'euler', with another method than Flow-GRPO."
            )
        if sigmas == "dpm":
            return 1.0, DPMSolverMultistepScheduler.from_config(
                own.config,
                algorithm_type="dpmsolver++",
                solver_order=2 if sampler == "dpm" else 1,
                solver_type="midpoint",
                lower_order_final=True,
                euler_at_final=False,
                final_sigmas_type="zero",
                # Else a saved configuration, which names all values, would walk another way than the one in memory.
                timestep_spacing="linspace",
                **dict.fromkeys(EVENLY, False),
            )
        if sampler == "dpm":
            raise ValueError(
                "`sigmas` is 'model' and `sampler` is 'dpm', which has a grid of its own; take `sampler='euler'`, or "
                "`sigmas='dpm'`."
            )
        if own.config.get("timestep_type") == "continuous":
            raise ValueError(
                "`sigmas` is 'model' and the pipeline's scheduler has `timestep_type`='continuous', whose timesteps "
                "are none of DDPM's. Replace the scheduler or take `sigmas='dpm'`."
            )
        if not isinstance(own, WALKED):
            walked = ", ".join(cls.__name__ for cls in WALKED)
            raise ValueError(
                f"`sigmas` is 'model' and the pipeline's scheduler is a {type(own).__name__}; of one forward a step "
                f"and without noise are {walked}. Replace the scheduler or take `sigmas='dpm'`."
            )
        return 1.0, copy.deepcopy(own)

    def _start(self, latents: Tensor, scheduler: SchedulerMixin) -> Tensor:
        return latents * scheduler.init_noise_sigma

    def _scaled(self, latents: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
        return scheduler.scale_model_input(latents, timestep)
