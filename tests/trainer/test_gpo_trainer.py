"""GPO differs from DGPO by its configuration, one loss, and a reference that follows the policy round by round."""

import pytest
import torch
from tiny_trainers import (
    Gradient,
    brightness,
    relative_error,
    rewards_by_position,
    same,
    scramble,
    tiny_trainer,
    weights,
)

from trl_dgpo import DGPOTrainer, GPOTrainer
from trl_dgpo.losses import gpo_loss
from trl_dgpo.seeding import generator


REWARDS = (0.1, 0.9, 0.4, 0.2, 1.0, 0.0, float("nan"), 0.3, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0)


def linear_by_hand(trainer) -> dict[str, torch.Tensor]:
    """Gradient of the first step: the mean over levels and groups of the mean of A d over a group's valid samples."""
    record, seed, total = trainer.buffer.record, trainer.args.seed, 0.0
    sigmas = trainer._draw_levels(0, 0)
    for level, sigma in enumerate(sigmas):
        for group in range(4):
            rows = (record.group_index == group) & ~record.rewards.isnan()
            x0, rewards = record.x0[rows], record.rewards[rows]
            wins = (rewards[:, None] > rewards).sum(1) - (rewards[:, None] < rewards).sum(1)
            scaled = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
            advantages = (wins if trainer.args.scale_rewards == "sign" else scaled).float()
            noise = torch.randn(x0.shape[1:], generator=generator(seed, "noise", 0, 0, level, group))
            velocity = trainer.backbone.denoiser(
                hidden_states=(1 - sigma) * x0 + sigma * noise,
                timestep=torch.full((len(x0),), 1000 * sigma),
                **{name: row[group].expand(len(x0), *row[group].shape) for name, row in record.conditioning.items()},
                return_dict=False,
            )[0]
            total = total + (advantages * (velocity - (noise - x0)).square().mean((1, 2, 3))).mean()
    parameters = {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(total / (4 * len(sigmas)), list(parameters.values()))
    return dict(zip(parameters, gradient, strict=True))


def first_gradient(tmp_path, trainer_class, **config):
    hand = {}
    gradient = Gradient(lambda: hand.update(linear_by_hand(trainer)))
    config = {"callbacks": [gradient], "reward_funcs": rewards_by_position(*REWARDS), "max_grad_norm": 0.0, **config}
    config |= {"t_min": 0.0, "advantage_clip": None}  # the same for both, to compare
    trainer = tiny_trainer(tmp_path, trainer_class, **config)
    scramble(trainer)
    trainer.train()
    return gradient.value, hand


@pytest.mark.parametrize(("batch_size", "scale_rewards"), [(4, "group"), (16, "group"), (8, "sign")])
def test_linear_gradient_is_the_definitions(tmp_path, batch_size, scale_rewards):
    gradient, hand = first_gradient(
        tmp_path, GPOTrainer, per_device_train_batch_size=batch_size, scale_rewards=scale_rewards
    )
    assert relative_error(gradient, hand) < 1e-5


def test_linear_gpo_is_not_dgpo(tmp_path):
    linear, _ = first_gradient(tmp_path, GPOTrainer)
    gated, _ = first_gradient(tmp_path, DGPOTrainer, beta=100.0)
    assert relative_error(gated, linear) > 0.1
    # With all gates at one half DGPO is linear GPO at half the step.
    with pytest.warns(UserWarning, match="`kl_coef`"):
        half, _ = first_gradient(tmp_path, DGPOTrainer, beta=1e-6)
    assert relative_error(half, {name: tensor / 2 for name, tensor in linear.items()}) < 1e-4


def test_logsigmoid_is_dgpos_objective_against_the_refreshed_reference(tmp_path):
    gradients = [
        first_gradient(tmp_path, trainer_class, loss_type="logsigmoid", reference="refreshed")[0]
        for trainer_class in (GPOTrainer, DGPOTrainer)
    ]
    assert same(*gradients)


def test_the_reference_is_the_policy_at_the_rounds_start(tmp_path):
    config = {"loss_type": "logsigmoid", "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
    trainer = tiny_trainer(tmp_path, GPOTrainer, **config)
    starts, references = [], []
    roll_out, begin_update = trainer._roll_out, trainer._begin_update

    def watch_roll_out(round):
        starts.append(weights(trainer))
        roll_out(round)

    def watch_begin_update():
        begin_update()
        references.append(weights(trainer, "reference"))

    trainer._roll_out, trainer._begin_update = watch_roll_out, watch_begin_update
    trainer.train()
    assert not same(starts[0], starts[1])
    assert [same(reference, starts[step // 2]) for step, reference in enumerate(references)] == [True] * 4
    gates = [log["gate_mean"] for log in trainer.state.log_history if "gate_mean" in log]
    assert [gate == 0.5 for gate in gates] == [True, False, True, False]


def test_a_user_finds_the_same_trainer(tmp_path):
    trainer = tiny_trainer(tmp_path, GPOTrainer, reward_funcs=brightness)
    assert trainer.policy.views == ("ema",)  # no reference is kept for the linear loss, and no old policy
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"reward", "reward_std", "frac_reward_zero_std", "objective", "gate_mean", "time/update"} <= log.keys()
    assert log["objective"] == pytest.approx(log["loss"])
    with pytest.raises(ValueError, match="`loss_type` is 'surrogate'; it must be one of 'linear', 'logsigmoid'"):
        tiny_trainer(tmp_path, GPOTrainer, loss_type="surrogate")


def test_that_the_reference_has_no_gradient_is_why_none_is_computed():
    errors = torch.tensor([0.3, 0.1, 0.2, 0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    gradients = [
        torch.autograd.grad(gpo_loss(errors, reference, advantages).loss, errors)[0]
        for reference in (None, torch.rand(4))
    ]
    assert torch.equal(*gradients)
