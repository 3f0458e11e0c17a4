"""What can be set of a TDM-R1 run: DGPO's rounds, from which a few-step student learns by way of two other models."""

from dataclasses import dataclass, field

from .dgpo_config import DGPOConfig


_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
ROLES = ("fake", "surrogate", "student")  # in the order in which an update trains them


@dataclass(repr=False)
class TDMR1Config(DGPOConfig):
    r"""
    Configuration class for the [`TDMR1Trainer`].

    All parameters are those of [`DGPOConfig`]; those listed are new or have another default or meaning. "The paper" is
    [2603.07700](https://huggingface.co/papers/2603.07700); numbers are those of its authors' released configuration
    for text rendering (OCR) on SD3.5-Medium unless another source is named. `sampler`, `sample_guidance_scale`,
    `t_max`, `timestep_sampling`, `prompt_dropout`, `reference_guidance_scale`, `old_policy_after` and
    `full_finetuning` have nothing to choose here, and what differs from their defaults is refused.

    An update is three optimiser steps, of the fake score, the surrogate and the student. `max_steps`, `eval_steps`,
    `save_steps` and `logging_steps` count optimiser steps, three an update, and the learning-rate schedule runs over
    them.

    Parameters:
        > Parameters that control the rollouts

        prompts_per_round (`int`, *optional*, defaults to `48`):
            Groups of a round (24 in the authors' runs on preferences).
        sampler (`str`, *optional*, defaults to `"euler"`):
            The student's own steps.
        sample_num_steps (`int`, *optional*, defaults to `4`):
            The student's steps.
        sample_guidance_scale (`float`, *optional*, defaults to `1.0`):
            The student draws without guidance; what guidance does it learns, see `distill_guidance_scale`.
        old_policy_after (`int`, *optional*):
            Rollouts always come from the student: `old` is the surrogate's average here.
        eval_num_steps (`int`, *optional*, defaults to `4`):
            Sampling steps of evaluation images.

        > Parameters that control the levels that are trained on

        num_train_timesteps (`int`, *optional*, defaults to `2`):
            Steps of a rollout that each of the three learns from in a pass, drawn without replacement, for all images
            alike: uniformly for fake score and student, and for the surrogate with weights 1, 2, ... and with
            replacement. The authors draw them for each micro-batch, a dozen or so an update: with few, much of what an
            update learns is the draw's, and their learning rates may be too high.
        t_min (`float`, *optional*, defaults to `0.125`):
            Smallest level, before the shift, to which latents are noised on for the surrogate to learn from, see
            [`~trl_dgpo.noising.renoising_level`]: 300 of 1000 after a shift of 3 (550, in the authors' other runs, is
            0.2895). The fake score learns at all levels.
        reward_t_min (`float`, *optional*, defaults to `0.125`):
            The same where the student learns from the surrogate (300; 250 and 400, in the authors' other runs, are 0.1
            and 0.1818). For the rest it is asked at all levels.

        scale_rewards (`str` or `bool`, *optional*, defaults to `"batch"`):
            The deviation of the whole round.

        > Parameters that control the fake score

        fake_learning_rate (`float`, *optional*, defaults to `3e-4`):
            Its peak learning rate.
        fake_adam_beta1 (`float`, *optional*, defaults to `0.0`):
            Its \\( \beta_1 \\) of AdamW.
        fake_kl_coef (`float`, *optional*, defaults to `0.02`):
            Weight of its squared velocity difference to the base. 0 for none, which saves a forward.

        > Parameters that control the surrogate

        surrogate_learning_rate (`float`, *optional*, defaults to `3e-4`):
            Its peak learning rate.
        surrogate_adam_beta1 (`float`, *optional*, defaults to `0.9`):
            Its \\( \beta_1 \\) of AdamW.
        beta (`float`, *optional*, defaults to `10.0`):
            Sharpness of its gate (10 for OCR and HPS, 1 for GenEval and ImageReward).
        reference (`str`, *optional*, defaults to `"frozen"`):
            What its preference is measured against: `"frozen"` (the released code) or `"old"`, its own average (the
            paper).
        kl_coef (`float`, *optional*, defaults to `0.001`):
            Weight of its squared velocity difference to the base.
        clip_range (`float`, *optional*, defaults to `1e-3`):
            Its clip against `old`, see [`~trl_dgpo.losses.clip_errors`] (2e-3 in some of the authors' runs).
        divergence_limit (`float`, *optional*, defaults to `0.05`):
            Squared velocity difference to the base beyond which what has improved learns no more, see
            [`~trl_dgpo.losses.clip_drifted`]. `None` or 0 for no limit.

        > Parameters that control the student

        learning_rate (`float`, *optional*, defaults to `7.5e-5`):
            Its peak learning rate, which is the one in the log.
        adam_beta1 (`float`, *optional*, defaults to `0.0`):
            Its \\( \beta_1 \\) of AdamW.
        reward_weight (`float`, *optional*, defaults to `0.7`):
            Weight \\( w \\) of what the surrogate has learned, in (0, 1]: a step learns \\( (1 - w) L_{\mathrm{cfg}} +
            w L_{\mathrm{reward}} + L_{\mathrm{kl}} \\), and one after `reward_steps` \\( (1 - w) (L_{\mathrm{cfg}} +
            L_{\mathrm{kl}}) \\).
        reward_steps (`int`, *optional*):
            How many of the first steps of a rollout learn from the surrogate. All if not set (the authors: all for OCR
            and GenEval, the first two for preferences).
        reward_guidance_scale (`float`, *optional*, defaults to `4.5`):
            Guidance of the surrogate where the student learns from it (2.5 and 3.5 in the authors' other runs). 1 or
            less is none.
        distill_guidance_scale (`float`, *optional*, defaults to `4.5`):
            Guidance of the base that the student learns. 1 or less is none.
        ema_every (`int`, *optional*, defaults to `1`):
            Steps of the student between two moves of its `ema`.

        > Parameters that control the updates

        logging_steps (`float`, *optional*, defaults to `3`):
            Optimiser steps between two logs: an update of each of the three. `loss` is a mean over all three, and
            `loss/fake`, `loss/surrogate` and `loss/student` are their own.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `True`):
            One of three adapters takes part in a backward.

    Raises:
        `ValueError`: as [`DGPOConfig`], and for what has nothing to choose here.
    """

    learning_rate: float = field(default=7.5e-5, metadata={"help": "The student's peak learning rate."})
    adam_beta1: float = field(default=0.0, metadata={"help": "The student's beta1 of AdamW."})
    logging_steps: float = field(
        default=3, metadata={"help": "Optimiser steps between two logs: 3 are an update of all that is trained."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "One of three adapters takes part in a backward."}
    )
    prompts_per_round: int = field(default=48, metadata={"help": "Groups of a round, over all processes."})
    sampler: str = field(default="euler", metadata={"help": "Rollout sampler: 'euler'.", "choices": ["euler"]})
    sample_num_steps: int = field(default=4, metadata={"help": "The student's sampling steps."})
    sample_guidance_scale: float = field(default=1.0, metadata={"help": "The student draws without guidance."})
    old_policy_after: int | None = field(default=None, metadata={"help": "Rollouts always come from the student."})
    eval_num_steps: int = field(default=4, metadata={"help": "Sampling steps of evaluation images."})
    num_train_timesteps: int = field(
        default=2, metadata={"help": "Steps of a rollout that each of the three learns from in a pass."}
    )
    t_min: float = field(
        default=0.125, metadata={"help": "Smallest level before the shift that latents are noised on to."}
    )
    reward_t_min: float = field(
        default=0.125, metadata={"help": "The same where the student learns from the surrogate."}
    )
    scale_rewards: str = field(
        default="batch", metadata={"help": "What advantages are divided by: 'group', 'batch', 'none' or 'sign'."}
    )
    fake_learning_rate: float = field(default=3e-4, metadata={"help": "The fake score's peak learning rate."})
    fake_adam_beta1: float = field(default=0.0, metadata={"help": "The fake score's beta1 of AdamW."})
    fake_kl_coef: float = field(
        default=0.02, metadata={"help": "Weight of the fake score's squared velocity difference to the base."}
    )
    surrogate_learning_rate: float = field(default=3e-4, metadata={"help": "The surrogate's peak learning rate."})
    surrogate_adam_beta1: float = field(default=0.9, metadata={"help": "The surrogate's beta1 of AdamW."})
    beta: float = field(default=10.0, metadata={"help": "Sharpness of the surrogate's gate."})
    reference: str = field(
        default="frozen",
        metadata={"help": "What the surrogate's preference is measured against.", "choices": ["frozen", "old"]},
    )
    divergence_limit: float | None = field(
        default=0.05,
        metadata={"help": "Divergence of the surrogate beyond which what has improved learns no more. 0 for none."},
    )
    reward_weight: float = field(
        default=0.7, metadata={"help": "Weight of what the surrogate has learned, in (0, 1]."}
    )
    reward_steps: int | None = field(
        default=None,
        metadata={"help": "How many of a rollout's first steps learn from the surrogate, all if not set."},
    )
    reward_guidance_scale: float = field(
        default=4.5, metadata={"help": "Guidance of the surrogate where the student learns from it."}
    )
    distill_guidance_scale: float = field(
        default=4.5, metadata={"help": "Guidance of the base that the student learns."}
    )
    ema_every: int = field(default=1, metadata={"help": "Steps of the student between two moves of its `ema`."})

    _fixed = {
        "sampler": "a student's step is one along one velocity",
        "sample_guidance_scale": "the student draws without guidance, and learns what guidance does from "
        "`distill_guidance_scale`",
        "t_max": "latents are noised on to anything up to noise",
        "timestep_sampling": "it learns from the steps that a rollout took",
        "prompt_dropout": "the student must see the prompt that it drew",
        "reference_guidance_scale": "the surrogate is compared with the base as it is; guidance is "
        "`reward_guidance_scale` and `distill_guidance_scale`",
        "old_policy_after": "rollouts come from the student, and `old` is the surrogate's average",
        "full_finetuning": "fake score and surrogate are LoRAs beside the student's, on one frozen model",
    }
    default_lora = {"r": 32, "lora_alpha": 64}

    def __post_init__(self):
        # A command line has no None.
        self.divergence_limit = None if self.divergence_limit == 0 else self.divergence_limit
        super().__post_init__()

    @property
    def keeps_base(self) -> bool:
        return super().keeps_base or self.divergence_limit is not None

    @property
    def num_adapters(self) -> int:
        return len(ROLES)

    @property
    def latents_per_image(self) -> int:
        # x0, and those before each step and after the last
        return self.sample_num_steps + 2

    @property
    def num_directions(self) -> int:
        return 2 + (self.distill_guidance_scale > 1)

    @property
    def no_grad_guidance_scale(self) -> float:
        return max(self.distill_guidance_scale, self.reward_guidance_scale)

    @property
    def noises_per_update(self) -> int:
        # Only the surrogate's is shared, and there is one optimiser step's at a time.
        return self.groups_per_update * self.num_generations

    @property
    def steps_per_round(self) -> int:
        return len(ROLES) * super().steps_per_round

    def _check_objective(self) -> None:
        super()._check_objective()
        for name in ("fake_learning_rate", "surrogate_learning_rate", "fake_kl_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be 0 or more.")
        for name in ("adam_beta1", "fake_adam_beta1", "surrogate_adam_beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in [0, 1).")
        if self.divergence_limit is not None and not self.divergence_limit > 0:
            raise ValueError(f"`divergence_limit` is {self.divergence_limit}; it must be above 0, or None for none.")
        if not 0 < self.reward_weight <= 1:
            raise ValueError(
                f"`reward_weight` is {self.reward_weight}; it must be in (0, 1]. At 0 nothing would be learned from "
                "the rewards."
            )
        optim = str(getattr(self.optim, "value", self.optim))
        if optim not in _OPTIMIZERS:
            raise ValueError(
                f"`optim` is {optim!r}; each of the three adapters has its own beta1, and passes when it is not its "
                f"turn. Take one of {', '.join(map(repr, _OPTIMIZERS))}."
            )
        if self.ddp_find_unused_parameters is False:
            raise ValueError(
                "`ddp_find_unused_parameters` is False; one of three adapters takes part in a backward, and DDP would "
                "wait for the others. Leave it unset."
            )
        if not 0 <= self.reward_t_min < 1:
            raise ValueError(f"`reward_t_min` is {self.reward_t_min}; it is a level and must be in [0, 1).")

    def _check_rollouts(self) -> None:
        super()._check_rollouts()
        if self.reward_steps is not None and not 1 <= self.reward_steps <= self.sample_num_steps:
            raise ValueError(
                f"`reward_steps` is {self.reward_steps}; a rollout has `sample_num_steps` ({self.sample_num_steps}) "
                f"steps, so it must be in 1..{self.sample_num_steps}."
            )
