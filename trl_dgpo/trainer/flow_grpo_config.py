"""What can be set of a Flow-GRPO run: DGPO's rounds, learned from by the steps of their sampling."""

from dataclasses import dataclass, field
from typing import Any

from ..field_types import check_types
from .dgpo_config import DGPOConfig


@dataclass(repr=False)
class FlowGRPOConfig(DGPOConfig):
    r"""
    Configuration class for the [`FlowGRPOTrainer`].

    All parameters are those of [`DGPOConfig`]; those listed are new or have another default or meaning, from the paper
    ([2505.05470](https://huggingface.co/papers/2505.05470)) and its released code unless another source is named.
    `sampler`, `loss_type`, `beta`, `reference`, `shared_noise`, `timestep_sampling` and `prompt_dropout` have nothing
    to choose here, and what differs from their defaults is refused.

    The authors' fast form, Flow-GRPO-Fast, is `num_sde_steps=2` or 3 of the first half of the steps (`t_min=0.5`),
    `clip_range=1e-5`, `kl_coef=0.0` and `noise_level=0.8`; without guidance it is `sample_guidance_scale=1.0` too, for
    which their files have another form of step noise (CPS), which is not offered here.

    Parameters:
        prompts_per_round (`int`, *optional*, defaults to `48`):
            Groups of a round.
        sampler (`str`, *optional*, defaults to `"sde"`):
            Stochastic steps, and the ODE elsewhere. Evaluation walks the ODE.
        sigmas (`str`, *optional*, defaults to `"model"`):
            Levels of the rollouts.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Strength of the stochastic steps, see [`~trl_dgpo.noising.flow_sde_coefficients`].
        num_sde_steps (`int`, *optional*):
            Consecutive stochastic steps of a rollout, of those that `t_min` and `t_max` leave; the other steps are the
            ODE's (MixGRPO, [2507.21802](https://huggingface.co/papers/2507.21802), and the authors' fast form). All of
            them if not set.
        sde_window (`str`, *optional*, defaults to `"random"`):
            Where they begin: `"random"`, drawn anew each round (the fast form), or `"sliding"`, one step nearer to
            the data each round and then from the start again (MixGRPO). The same for all images of a round, so that
            those of a group differ by the same steps.
        num_train_timesteps (`int`, *optional*):
            Stochastic steps that are trained on a pass, drawn without replacement, the same for all groups. The
            passes of a round (`num_iterations`) go on where the last one stopped: with 1, nine passes train on nine
            steps. All if not set: `num_sde_steps`, or 9 of 10 steps, since a rollout's last step is never stochastic.
            Needed where `t_min` or `t_max` leave out steps and `num_sde_steps` is not set.
        t_min (`float`, *optional*, defaults to `0.0`):
            Smallest level of a stochastic step, before the shift.
        loss_type (`str`, *optional*, defaults to `"ppo"`):
            PPO's clipped ratio, see [`~trl_dgpo.losses.flow_grpo_loss`].
        clip_range (`float`, *optional*, defaults to `1e-4`):
            Clip of a step's probability ratio to the policy that took it: PPO's epsilon, not DGPO's clip. Since a
            log-probability is a mean over latent elements, it is small. `None` or 0 for none. It costs no forward.
        kl_coef (`float`, *optional*, defaults to `0.04`):
            Weight of [`~trl_dgpo.losses.step_kl`], the distance of a step's mean to the frozen model's.
        reference_guidance_scale (`float`, *optional*, defaults to `1.0`):
            Always `sample_guidance_scale`, which is that of rollouts, training and the KL term: the probability of a
            step is that of the guided one.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"batch"`):
            The deviation of the whole round.
        updates_per_round (`int`, *optional*, defaults to `2`):
            Optimiser steps of a pass.
        old_policy_after (`int`, *optional*):
            Rollouts come from the policy. With a number, the ratio is to the old policy that they came from.

    Raises:
        `ValueError`: as [`DGPOConfig`], and for what has nothing to choose here.
    """

    prompts_per_round: int = field(default=48, metadata={"help": "Groups of a round, over all processes."})
    sampler: str = field(default="sde", metadata={"help": "Rollout sampler: 'sde'.", "choices": ["sde"]})
    sigmas: str = field(default="model", metadata={"help": "Levels of the rollouts.", "choices": ["dpm", "model"]})
    noise_level: float = field(default=0.7, metadata={"help": "Strength of the stochastic steps, above 0."})
    num_sde_steps: int | None = field(
        default=None, metadata={"help": "Consecutive stochastic steps of a rollout, all that may be if not set."}
    )
    sde_window: str = field(
        default="random",
        metadata={"help": "Where the stochastic steps of a round begin.", "choices": ["random", "sliding"]},
    )
    num_train_timesteps: int | None = field(
        default=None, metadata={"help": "Stochastic steps that are trained on a pass, all if not set."}
    )
    t_min: float = field(default=0.0, metadata={"help": "Smallest level of a stochastic step before the shift."})
    loss_type: str = field(default="ppo", metadata={"help": "'ppo'."})
    clip_range: float | None = field(
        default=1e-4, metadata={"help": "PPO's clip of a step's probability ratio. 0 for none."}
    )
    kl_coef: float = field(default=0.04, metadata={"help": "Weight of the steps' distance to the base's."})
    scale_rewards: str = field(
        default="batch", metadata={"help": "What advantages are divided by: 'group', 'batch', 'none' or 'sign'."}
    )
    updates_per_round: int = field(default=2, metadata={"help": "Optimiser steps of a pass."})
    old_policy_after: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps after which rollouts come from the old policy. Never if not set."},
    )

    _loss_types = ("ppo",)
    _fixed = {
        "sampler": "it learns from stochastic steps",
        "loss_type": "it has one loss",
        "beta": "its loss has no gate; the KL weight is `kl_coef`",
        "reference": "its loss has no reference; the KL term is against the frozen model",
        "shared_noise": "its noise is that of the rollouts, each image's own",
        "timestep_sampling": "it trains on the steps that a rollout took",
        "prompt_dropout": "the policy must see the prompt that it sampled from",
    }
    default_lora = {"r": 32, "lora_alpha": 64}
    clips_likelihoods = True

    @property
    def reads_reference(self) -> bool:
        return False

    @property
    def clips_errors(self) -> bool:
        return False  # what the ratio is to was computed with the rollout

    @property
    def latents_per_image(self) -> int:
        # x0, and those before and after each stochastic step
        return 2 + self._stochastic_steps

    @property
    def train_guidance_scale(self) -> float:
        return self.sample_guidance_scale  # the policy that is trained is the guided one

    @property
    def noises_per_update(self) -> int:
        return 0  # it is in the trajectory

    @property
    def derived(self) -> dict[str, Any]:
        return {
            **super().derived,
            "num_train_timesteps": self._stochastic_steps,
            "reference_guidance_scale": self.sample_guidance_scale,
        }

    @property
    def _stochastic_steps(self) -> int:
        """Stochastic steps of a rollout, whose last step never is one."""
        return self.num_sde_steps or self.sample_num_steps - 1

    def __post_init__(self):
        check_types(self)
        scale = self.reference_guidance_scale
        if not isinstance(scale, _Followed) and scale not in (1.0, self.sample_guidance_scale):
            raise ValueError(
                f"`reference_guidance_scale` is {self.reference_guidance_scale}; for Flow-GRPO it must be "
                f"`sample_guidance_scale` ({self.sample_guidance_scale}), since the KL term compares steps as they "
                "were sampled. Leave it unset."
            )
        self.reference_guidance_scale = _Followed(self.sample_guidance_scale)
        if self.sample_num_steps < 2:
            raise ValueError(
                f"`sample_num_steps` is {self.sample_num_steps}; Flow-GRPO needs at least 2, since the last step of a "
                "rollout is never stochastic."
            )
        if self.num_train_timesteps is None:
            if self.num_sde_steps is None and (self.t_min > 0 or self.t_max < 1):
                raise ValueError(
                    f"`t_min` is {self.t_min} and `t_max` {self.t_max}, which leave out some of the steps: how many "
                    "are left is known only with the model's own grid. Set `num_train_timesteps` (how many to train "
                    "on), or `num_sde_steps` (how many are stochastic, and trained on)."
                )
            self.num_train_timesteps = self._stochastic_steps
        super().__post_init__()
        if self.merge_adapter and (self.bf16 or self.fp16):
            raise ValueError(
                f"`merge_adapter` is on in {'bf16' if self.bf16 else 'fp16'}, where a merged weight is rounded: the "
                "rollouts' probabilities would be those of another policy than the one that is trained. Leave it "
                "unset."
            )

    def _check_rollouts(self) -> None:
        super()._check_rollouts()
        if self.sde_window not in ("random", "sliding"):
            raise ValueError(f"`sde_window` is {self.sde_window!r}; it must be one of 'random', 'sliding'.")
        if not self.noise_level > 0:
            raise ValueError(
                f"`noise_level` is {self.noise_level}; it must be above 0: a step without noise has no probability."
            )
        possible = self.sample_num_steps - 1
        if self.num_sde_steps is not None and not 1 <= self.num_sde_steps <= possible:
            raise ValueError(
                f"`num_sde_steps` is {self.num_sde_steps}; of `sample_num_steps` ({self.sample_num_steps}) all but "
                f"the last can be stochastic, so it must be in 1..{possible}."
            )
        if self.num_train_timesteps > self._stochastic_steps:
            raise ValueError(
                f"`num_train_timesteps` ({self.num_train_timesteps}) is more than the {self._stochastic_steps} "
                "stochastic steps of a rollout, whose last step never is one. Lower it or leave it unset."
            )


class _Followed(float):
    """A number that was not given but follows from another, and does so anew in a copy (`dataclasses.replace`)."""
