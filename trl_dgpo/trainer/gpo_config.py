"""What can be set of a GPO run: DGPO's configuration with other defaults."""

from dataclasses import dataclass, field

from .dgpo_config import DGPOConfig


@dataclass(repr=False)
class GPOConfig(DGPOConfig):
    r"""
    Configuration class for the [`GPOTrainer`].

    All parameters are those of [`DGPOConfig`]; those listed have another default or meaning, from the paper
    ([2505.11070](https://huggingface.co/papers/2505.11070)) where it names a number.

    Parameters:
        num_generations (`int`, *optional*, defaults to `32`):
            Images of a group (paper).
        prompts_per_round (`int`, *optional*, defaults to `8`):
            Groups of a round. The paper names none.
        loss_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"logsigmoid"`, see [`~trl_dgpo.losses.gpo_loss`].
        beta (`float`, *optional*, defaults to `100.0`):
            Sharpness of the gate of `"logsigmoid"`; nothing in `"linear"`.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            No KL term.
        clip_range (`float`, *optional*):
            No clip.
        advantage_clip (`float`, *optional*):
            No bound on advantages.
        num_train_timesteps (`int`, *optional*, defaults to `5`):
            Levels a pass (paper).
        t_min (`float`, *optional*, defaults to `0.0`):
            All levels: the paper finds low-noise levels alone unstable and high-noise levels alone slower.
        num_iterations (`int`, *optional*, defaults to `3`):
            Passes over a round (paper).
        reference (`str`, *optional*, defaults to `"refreshed"`):
            The policy at the round's start (paper).
        old_policy_after (`int`, *optional*):
            Rollouts always come from the policy.
        learning_rate (`float`, *optional*):
            1e-4 with LoRA, which is ours, since the paper trains the whole network; 2e-8 without (paper).

    Raises:
        `ValueError`: as [`DGPOConfig`].
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate: 1e-4 with LoRA and 2e-8 without, if not set."}
    )
    num_generations: int = field(default=32, metadata={"help": "Images of a group, at least 2."})
    prompts_per_round: int = field(default=8, metadata={"help": "Groups of a round, over all processes."})
    loss_type: str = field(default="linear", metadata={"help": "'linear' or 'logsigmoid'."})
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the squared velocity difference to the base."})
    clip_range: float | None = field(default=None, metadata={"help": "Clip of the error ratio to the old policy."})
    advantage_clip: float | None = field(default=None, metadata={"help": "Bound on advantages."})
    num_train_timesteps: int = field(default=5, metadata={"help": "Levels a pass, the same for all groups."})
    t_min: float = field(default=0.0, metadata={"help": "Smallest level before the shift, in [0, 1)."})
    num_iterations: int = field(default=3, metadata={"help": "Passes over a round."})
    reference: str = field(
        default="refreshed",
        metadata={"help": "What the preference is measured against.", "choices": ["frozen", "old", "refreshed"]},
    )
    old_policy_after: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps after which rollouts come from the old policy. Never if not set."},
    )

    _loss_types = ("linear", "logsigmoid")

    @property
    def reads_reference(self) -> bool:
        return self.loss_type == "logsigmoid"

    @property
    def _default_learning_rate(self) -> float:
        return 2e-8 if self.full_finetuning else 1e-4
