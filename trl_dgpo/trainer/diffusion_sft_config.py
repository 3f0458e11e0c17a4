"""What can be set of supervised training: DGPO's configuration with other defaults."""

from dataclasses import dataclass, field

from .dgpo_config import DGPOConfig


@dataclass(repr=False)
class DiffusionSFTConfig(DGPOConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    All parameters are those of [`DGPOConfig`]; those listed have another default or meaning, and the defaults are
    ours. Nothing is rolled out and nothing compared: what controls rewards, gate, clip and the old policy has nothing
    to choose here, and what differs from its default is refused. `sampler` and `sample_num_steps` only say how
    pictures are drawn for people.

    Parameters:
        num_generations (`int`, *optional*, defaults to `1`):
            Each group is one picture: of a saved group of several the best.
        prompts_per_round (`int`, *optional*, defaults to `32`):
            Pictures of a round, over all processes, and with the other defaults of an optimiser step.
        per_device_train_batch_size (`int`, *optional*):
            Images of a micro-batch: 16, or the next smaller divisor of a process's images of an optimiser step, if not
            set.
        loss_type (`str`, *optional*, defaults to `"mse"`):
            `"mse"`: the mean of the denoising errors.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            No KL term.
        clip_range (`float`, *optional*):
            Nothing is clipped.
        advantage_clip (`float`, *optional*):
            There is no advantage.
        num_train_timesteps (`int`, *optional*, defaults to `4`):
            Levels of a pass, shared by its pictures: a single one would make the loss jump from step to step.
        t_min (`float`, *optional*, defaults to `0.0`):
            All levels.
        timestep_sampling (`str`, *optional*, defaults to `"continuous"`):
            Uniform before the model's shift. `"grid"` would leave the levels between those of a rollout untaught,
            and a saved picture has no rollout of this model's to be taught on.
        old_policy_after (`int`, *optional*):
            There is no old policy.
        learning_rate (`float`, *optional*):
            1e-4 with LoRA, 1e-5 without.

    Raises:
        `ValueError`: as [`DGPOConfig`], and for what has nothing to choose here.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate: 1e-4 with LoRA and 1e-5 without, if not set."}
    )
    num_generations: int = field(default=1, metadata={"help": "Each group is one picture."})
    prompts_per_round: int = field(default=32, metadata={"help": "Pictures of a round, over all processes."})
    loss_type: str = field(default="mse", metadata={"help": "'mse'."})
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the squared velocity difference to the base."})
    clip_range: float | None = field(default=None, metadata={"help": "Nothing is clipped."})
    advantage_clip: float | None = field(default=None, metadata={"help": "Nothing is clipped."})
    t_min: float = field(default=0.0, metadata={"help": "Smallest level before the shift, in [0, 1)."})
    timestep_sampling: str = field(
        default="continuous", metadata={"help": "Where levels are drawn from.", "choices": ["grid", "continuous"]}
    )
    old_policy_after: int | None = field(default=None, metadata={"help": "There is no old policy."})

    _loss_types = ("mse",)
    _fixed = {
        "num_generations": (
            "it takes one picture of each group, the best one; `prompts_per_round` says how many groups a round has"
        ),
        "loss_type": "it has one loss",
        **dict.fromkeys(("beta", "reference", "clip_range"), "its loss has neither gate, reference nor clip"),
        **dict.fromkeys(
            ("scale_rewards", "advantage_clip", "recenter_clipped"), "nothing is compared, so there is no advantage"
        ),
        **dict.fromkeys(
            ("reward_weights", "multi_objective_aggregation", "async_reward_computation"), "it asks no reward"
        ),
        "shared_noise": "a group is one picture, with noise of its own",
        "old_policy_after": "nothing is rolled out",
    }

    @property
    def reads_reference(self) -> bool:
        return False

    @property
    def _default_batch_size(self) -> int:
        return 16

    @property
    def _default_learning_rate(self) -> float:
        return 1e-5 if self.full_finetuning else 1e-4
