"""Every number that does not fit is told with its value, the rule, and one that fits."""

import re
import warnings

import pytest
from tiny_trainers import tiny_config

from trl_dgpo import DGPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, FlowGRPOConfig, GPOConfig, TDMR1Config


CONFIGS = [DGPOConfig, GPOConfig, FlowGRPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, TDMR1Config]
# Another value than the default of any method that has nothing to choose there.
OTHER = {
    "advantage_clip": 5.0,
    "async_reward_computation": True,
    "beta": 0.5,
    "clip_range": 0.01,
    "full_finetuning": True,
    "loss_type": "logsigmoid",
    "multi_objective_aggregation": "normalize_then_sum",
    "num_generations": 4,
    "old_policy_after": 5,
    "prompt_dropout": 0.1,
    "recenter_clipped": True,
    "reference": "old",
    "reference_guidance_scale": 2.0,
    "reward_weights": [1.0],
    "sample_guidance_scale": 2.0,
    "sampler": "euler",
    "scale_rewards": "batch",
    "shared_noise": False,
    "t_max": 0.9,
    "timestep_sampling": "continuous",
}


def test_the_round_decides_the_accumulation(tmp_path):
    assert tiny_config(tmp_path).gradient_accumulation_steps == 4 * 2  # groups x levels
    assert tiny_config(tmp_path, per_device_train_batch_size=8).gradient_accumulation_steps == 2 * 2
    config = tiny_config(tmp_path, updates_per_round=2, num_iterations=3)
    assert config.gradient_accumulation_steps == 2 * 2
    assert config.micro_batches_per_update == 2
    assert config.steps_per_round == 6
    assert tiny_config(tmp_path, gradient_accumulation_steps=8).gradient_accumulation_steps == 8


def test_accumulation_counts_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(DGPOConfig, "world_size", 2)
    assert tiny_config(tmp_path).gradient_accumulation_steps == 2 * 2
    monkeypatch.setattr(DGPOConfig, "world_size", 3)
    with pytest.raises(ValueError, match=r"16 images .* 3 processes .*prompts_per_round=3 or 6`, or 2 processes"):
        tiny_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_generations": 1}, "`num_generations` is 1; a group needs at least 2"),
        ({"per_device_train_batch_size": 6}, r"\(6\) must divide .* \(16: 4 groups / 1 updates .* Use 4 or 8\.$"),
        ({"per_device_train_batch_size": 32}, r"\(32\) must divide .* \(16: .* Use 16\.$"),
        ({"prompts_per_round": 5, "updates_per_round": 2}, r"`prompts_per_round` \(5\).*prompts_per_round=4 or 6"),
        ({"prompts_per_round": 1, "updates_per_round": 2}, r"`prompts_per_round` \(1\).*prompts_per_round=2`"),
        ({"gradient_accumulation_steps": 3}, "`gradient_accumulation_steps` is 3, but the round makes it 8.*unset"),
        ({"t_min": -0.1}, r"`t_min` is -0.1; .* in \[0, 1\)\. 0 trains on all levels"),
        ({"t_min": 1.0}, r"`t_min` is 1.0; .* in \[0, 1\)"),
        ({"t_max": 0.4}, r"`t_max` is 0.4; .* at most 1 and above `t_min` \(0.4\)"),
        ({"t_max": 1.1}, r"`t_max` is 1.1; .* at most 1"),
        ({"t_max": float("nan")}, "`t_max` is nan"),
        ({"t_min": float("nan")}, "`t_min` is nan"),
        ({"num_train_timesteps": 5}, r"\(5\).*`sample_num_steps` \(4\).*timestep_sampling='continuous'"),
        ({"prompt_dropout": 1.0}, r"`prompt_dropout` is 1.0; .* in \[0, 1\)"),
        ({"beta": 0.0}, r"`beta` is 0.0; it must be above 0\.$"),
        ({"clip_range": -0.1}, "`clip_range` is -0.1; it must be above 0; None turns it off"),
        ({"advantage_clip": -1.0}, "`advantage_clip` is -1.0; it must be above 0; None turns it off"),
        ({"kl_coef": -0.1}, "`kl_coef` is -0.1; it must be 0 .* or more"),
        ({"kl_coef": float("nan")}, "`kl_coef` is nan"),
        ({"old_policy_after": -2}, "`old_policy_after` is -2; .* 0 or more. None for never"),
        ({"reward_weights": [1.0, float("nan")]}, r"`reward_weights` is \[1.0, nan\]; each must be a finite number"),
        ({"reward_weights": [float("inf")]}, r"`reward_weights` is \[inf\]; each must be a finite number"),
        ({"sampler": "ddim"}, "`sampler` is 'ddim'; it must be one of 'dpm', 'euler', 'sde'"),
        *[
            ({name: 0}, f"`{name}` is 0; it must be at least 1")
            for name in ("prompts_per_round", "sample_num_steps", "num_iterations", "updates_per_round", "ema_every")
        ],
    ],
)
def test_what_does_not_fit_is_told(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **config)


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, "group"), (False, "none"), ("True", "group"), ("batch", "batch"), ("sign", "sign")],
)
def test_scale_rewards_takes_trls_forms(tmp_path, given, meant):
    assert tiny_config(tmp_path, scale_rewards=given).scale_rewards == meant


def test_continuous_levels_are_not_bound_by_the_grid(tmp_path):
    assert tiny_config(tmp_path, num_train_timesteps=9, timestep_sampling="continuous").num_train_timesteps == 9


@pytest.mark.parametrize(
    ("config_class", "config", "default"),
    [
        (DGPOConfig, {}, "100"),
        (DiffusionDPOConfig, {}, "2000"),
        (GPOConfig, {"loss_type": "logsigmoid"}, "100"),
        (GPOConfig, {}, None),  # in "linear" it means nothing
    ],
)
def test_grpos_beta_is_told_apart(tmp_path, config_class, config, default):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny_config(tmp_path, config_class, beta=0.04, **config)
    assert len(told) == (default is not None)
    expected = rf"`beta` is 0.04: in `{config_class.__name__}` it .*, {default} by default, .* `kl_coef` here"
    assert all(re.match(expected, str(warning.message)) for warning in told)


@pytest.mark.parametrize(
    ("config_class", "name"), [(config_class, name) for config_class in CONFIGS for name in config_class._fixed]
)
def test_where_a_method_has_nothing_to_choose_another_value_is_refused(tmp_path, config_class, name):
    given = {"output_dir": str(tmp_path), "use_cpu": True}
    other = "dpm" if OTHER[name] == getattr(config_class, name) == "euler" else OTHER[name]
    expected = f"`{name}` is {other!r}; in `{config_class.__name__}` it must be {getattr(config_class, name)!r}: "
    with pytest.raises(ValueError) as error:
        config_class(**given, **{name: other})
    assert str(error.value) == f"{expected}{config_class._fixed[name]}. Leave it unset."
    config_class(**given, **{name: getattr(config_class, name)})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_warn_of_nothing(tmp_path, config_class):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_class(output_dir=str(tmp_path), use_cpu=True)


def test_bf16_is_off_where_there_is_none(tmp_path):
    assert not tiny_config(tmp_path).bf16
    assert tiny_config(tmp_path, bf16=True).bf16


@pytest.mark.parametrize(
    ("config", "is_on"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": False, "activation_checkpointing": True}, True),
    ],
)
def test_checkpointing_is_known_by_both_names(tmp_path, config, is_on):
    assert DGPOConfig(output_dir=str(tmp_path), use_cpu=True, **config).activation_checkpointing is is_on


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (
            DGPOConfig,
            {
                "num_generations": 24,
                "prompts_per_round": 24,
                "per_device_train_batch_size": 24,
                "beta": 100.0,
                "loss_type": "surrogate",
                "kl_coef": 0.001,
                "clip_range": 1e-3,
                "num_train_timesteps": 4,
                "t_min": 0.4,
                "num_iterations": 1,
                "updates_per_round": 1,
                "scale_rewards": "group",
                "advantage_clip": 5.0,
                "sample_num_steps": 10,
                "sample_guidance_scale": 4.5,
                "eval_guidance_scale": 4.5,
                "eval_num_steps": 40,
                "reference": "frozen",
                "old_policy_after": 200,
                "resolution": 512,
                "learning_rate": 3e-4,
                "weight_decay": 1e-4,
                "max_grad_norm": 1.0,
                "gradient_accumulation_steps": 24 * 4,
            },
        ),
        (
            GPOConfig,
            {
                "num_generations": 32,
                "prompts_per_round": 8,
                "loss_type": "linear",
                "kl_coef": 0.0,
                "clip_range": None,
                "num_train_timesteps": 5,
                "t_min": 0.0,
                "num_iterations": 3,
                "advantage_clip": None,
                "reference": "refreshed",
                "old_policy_after": None,
                "learning_rate": 1e-4,
            },
        ),
    ],
)
def test_defaults_are_the_published_ones(tmp_path, config_class, values):
    config = config_class(output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(config, name) for name in values} == values


def test_gpos_learning_rate_depends_on_what_is_trained(tmp_path):
    assert GPOConfig(output_dir=str(tmp_path), use_cpu=True, full_finetuning=True).learning_rate == 2e-8
    assert GPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3).learning_rate == 1e-3


def test_a_command_line_can_turn_off_what_none_turns_off(tmp_path):
    args = DGPOConfig(output_dir=str(tmp_path), clip_range=0.0, advantage_clip=0.0, old_policy_after=-1)
    assert args.clip_range is args.advantage_clip is args.old_policy_after is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_skipped_steps": 0}, "`max_skipped_steps` is 0; it must be at least 1"),
        ({"skip_grad_norm": 0.0}, "`skip_grad_norm` is 0.0; it must be above 0"),
        ({"skip_grad_norm": float("nan")}, "`skip_grad_norm` is nan; it must be a finite number"),
        ({"enable_jit_checkpoint": True}, "SIGTERM is answered without it"),
    ],
)
def test_how_faults_are_met(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **config)
