"""DGPO, GPO and their family: reinforcement learning for text-to-image diffusion models in Hugging Face TRL."""

from importlib import import_module


__version__ = "0.1.0"

_EXPORTS = {
    "DGPOConfig": ".trainer.dgpo_config",
    "DGPOTrainer": ".trainer.dgpo_trainer",
    "DefaultDGPOStableDiffusionPipeline": ".ddpo_compat",
    "DiffusionDPOConfig": ".trainer.diffusion_dpo_config",
    "DiffusionDPOTrainer": ".trainer.diffusion_dpo_trainer",
    "DiffusionSFTConfig": ".trainer.diffusion_sft_config",
    "DiffusionSFTTrainer": ".trainer.diffusion_sft_trainer",
    "FlowGRPOConfig": ".trainer.flow_grpo_config",
    "FlowGRPOTrainer": ".trainer.flow_grpo_trainer",
    "GPOConfig": ".trainer.gpo_config",
    "GPOTrainer": ".trainer.gpo_trainer",
    "GroupRolloutBuffer": ".rollout",
    "Rollout": ".rollout",
    "TDMR1Config": ".trainer.tdm_r1_config",
    "TDMR1Trainer": ".trainer.tdm_r1_trainer",
    "load_rollouts": ".rollout_dataset",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
