"""What can be set of a Diffusion-DPO run: DGPO's configuration with other defaults and a choice of pairs."""

from dataclasses import dataclass, field

from .dgpo_config import DGPOConfig


@dataclass(repr=False)
class DiffusionDPOConfig(DGPOConfig):
    r"""
    Configuration class for the [`DiffusionDPOTrainer`].

    All parameters are those of [`DGPOConfig`]; those listed are new or have another default or meaning. "The paper" is
    [2311.12908](https://huggingface.co/papers/2311.12908), which trains Stable Diffusion 1.5 and SDXL on people's
    choices. For flow matching with a reward there are only implementations to follow: the DPO baseline in Flow-GRPO's
    code and verl-omni's. `clip_range`, `scale_rewards`, `advantage_clip` and `recenter_clipped` have nothing to choose
    here, and what differs from their defaults is refused.

    Parameters:
        pair_selection (`str`, *optional*, defaults to `"max"`):
            Which pairs of a group are compared: `"max"` (the best against the worst, as in Flow-GRPO's baseline),
            `"min"` (the two whose rewards differ least) or `"all"`. Images in no pair cost no forward. See
            [`~trl_dgpo.advantages.preference_pairs`].
        beta (`float`, *optional*, defaults to `2000.0`):
            Strength of the reference, with the authors' factor 1/2 (verl-omni's default). Flow-GRPO's baseline has
            100, its authors advise up to 2000 where training is unstable; 5000 is the authors' value for Stable
            Diffusion 1.5 and SDXL, whose errors are those of the noise. Without the 1/2, as in diffusers' example, the
            number is half of ours.
        loss_type (`str`, *optional*, defaults to `"surrogate"`):
            `"surrogate"` or `"logsigmoid"`: the same gradient up to the factor `beta`. See
            [`~trl_dgpo.losses.pairwise_dpo_loss`].
        kl_coef (`float`, *optional*, defaults to `0.0`):
            No KL term: the reference stands in the objective. With one, every image costs a forward.
        clip_range (`float`, *optional*):
            Nothing is clipped.
        advantage_clip (`float`, *optional*):
            Rewards only order a pair's images: there is no advantage, hence nothing to bound.
        num_train_timesteps (`int`, *optional*, defaults to `4`):
            Levels a pass, shared by all pairs. The paper draws one for each pair.
        t_min (`float`, *optional*, defaults to `0.0`):
            All levels (the paper).
        old_policy_after (`int`, *optional*):
            Rollouts always come from the policy.
        per_device_train_batch_size (`int`, *optional*):
            Counts the images that are left out too. With one pair of each group a micro-batch of a group has a forward
            of two images: several groups fit into the same memory.
        learning_rate (`float`, *optional*):
            3e-4 with LoRA (DGPO's and Flow-GRPO's). 2.048e-5 without: the authors' 1e-8 times their 2048 pairs of an
            optimiser step, for Stable Diffusion 1.5.

    Raises:
        `ValueError`: as [`DGPOConfig`], and for what has nothing to choose here.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate: 3e-4 with LoRA and 2.048e-5 without, if not set."}
    )
    pair_selection: str = field(
        default="max",
        metadata={"help": "Which pairs of a group are compared.", "choices": ["max", "min", "all"]},
    )
    beta: float = field(default=2000.0, metadata={"help": "Strength of the reference."})
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the squared velocity difference to the base."})
    clip_range: float | None = field(default=None, metadata={"help": "Nothing is clipped."})
    advantage_clip: float | None = field(default=None, metadata={"help": "There is no advantage to bound."})
    t_min: float = field(default=0.0, metadata={"help": "Smallest level before the shift, in [0, 1)."})
    old_policy_after: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps after which rollouts come from the old policy. Never if not set."},
    )

    _fixed = dict.fromkeys(
        ("clip_range", "scale_rewards", "advantage_clip", "recenter_clipped"),
        "rewards only order the images of a pair, and `beta` is what keeps the policy near the reference",
    )

    @property
    def _default_learning_rate(self) -> float:
        return 2.048e-5 if self.full_finetuning else 3e-4

    def _check_objective(self) -> None:
        super()._check_objective()
        if self.pair_selection not in ("max", "min", "all"):
            raise ValueError(f"`pair_selection` is {self.pair_selection!r}; it must be one of 'max', 'min', 'all'.")
