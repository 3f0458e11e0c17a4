"""TDM-R1: DGPO's rounds, from which a few-step student learns by way of a surrogate reward and a fake score."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import to_device
from ..backbones.flow import FlowBackbone
from ..losses import Revision, clip_drifted, denoising_error, group_mean, revision_error, revisions
from ..noising import flow_clean, flow_renoise, flow_renoise_target, flow_velocity, renoising_level
from ..policy import Adapter
from ..rewards.scoring import Scores
from ..rollout import Rollout, Visited, Walk
from ..seeding import generator
from .dgpo_trainer import DGPOTrainer, Fixed, MicroBatch, Part, evaluating
from .tdm_r1_config import ROLES, TDMR1Config


class TDMR1Trainer(DGPOTrainer):
    r"""
    Trainer for TDM-R1, introduced in [TDM-R1: Reinforcing Few-Step Diffusion Models with Non-Differentiable
    Reward](https://huggingface.co/papers/2603.07700): reinforcement learning of a model that draws in a few steps.

    Three LoRAs stand on one frozen model, the base, and learn in turn from the same rollouts:

    - the **fake** score: a denoiser of what the student draws;
    - the **surrogate**: a denoiser that learns what is preferred, by DGPO's group objective, wherever the student's
      steps lead;
    - the **student**, which draws the rollouts and is evaluated and saved: what it draws moves to what the base would
      draw and away from the fake score (distribution matching), and to what the surrogate would draw. It starts at the
      base, or from the LoRA that `model` brings, such as a distilled few-step one.

    See [`~trl_dgpo.losses.revisions`] for what the student learns, [`~trl_dgpo.noising.flow_renoise`] for where, and
    [`TDMR1Config`] for every default and its source. Adapters that do not learn in an optimiser step have no gradient
    in it: AdamW passes over them, and neither weights nor moments move.

    Departures from the authors' code: a level, and the step of the rollout that it is drawn for, is shared by all
    images of a pass, there by those of a micro-batch, so that an update there sees more of them; fake score and
    student draw theirs apart; the three learn one after the other, there the student from what the others were before
    the update; rollouts step by Euler, there by DPM-Solver++; the second clip of the surrogate looks at each sample's
    own divergence ([`~trl_dgpo.losses.clip_drifted`]); the student's latents of the rollout itself, kept in float32,
    are what is noised on, without a second forward, so that with several updates a round they are those of the student
    that drew them; a sample whose reward failed is masked for all three.

    Args: as [`DGPOTrainer`], with `args` a [`TDMR1Config`]. Without a `peft_config` the LoRAs have rank 32 and alpha
    64. `optimizers` cannot be given.
    """

    _tag_names = ["trl", "tdm-r1", "text-to-image", "diffusers"]
    _name = "TDM-R1"
    _paper = {
        "title": "TDM-R1: Reinforcing Few-Step Diffusion Models with Non-Differentiable Reward",
        "id": "2603.07700",
        "citation": (
            "@article{luo2026tdmr1,\n"
            "    title  = {{TDM-R1: Reinforcing Few-Step Diffusion Models with Non-Differentiable Reward}},\n"
            "    author = {Yihong Luo and Tianyang Hu and Weijian Luo and Jing Tang},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2603.07700},\n"
            "}"
        ),
    }
    _config_class = TDMR1Config
    _record_type = Walk
    _trains_offline = False
    _companions = tuple(role for role in ROLES if role != "student")  # that one is the policy
    _old_of = "surrogate"

    # -- whose turn it is ---------------------------------------------------------------------------------------------

    @property
    def _role(self) -> str:
        # A round is a whole number of turns.
        return ROLES[self.state.global_step % len(ROLES)]

    @property
    def _trained(self) -> str | None:
        return None if self._role == "student" else self._role

    @property
    def _shares_noise(self) -> bool:
        return self._role == "surrogate" and self.args.shared_noise

    def _update_of(self, step: int) -> int:
        return step // len(ROLES)

    def training_step(self, model: nn.Module, *args, **kwargs) -> Tensor:
        # In the backward too, where gradient checkpointing computes the forward anew.
        with self.policy.using(self._trained):
            return super().training_step(model, *args, **kwargs)

    def move_averages(self, step: int) -> None:
        """Move the averaged weights after the optimiser step of this number: each with its own adapter's."""
        number, role = divmod(step, len(ROLES))
        if ROLES[role] == "surrogate" and "old" in self.policy.views:
            self.policy.update_old(number + 1)  # min(0.3, 0.001 + 0.001 n)
        if ROLES[role] == "student" and "ema" in self.policy.views and (number + 1) % self.args.ema_every == 0:
            self.policy.update_ema(number)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model or self.model)
            groups = {  # the first one's learning rate is the one in the log
                None: (args.learning_rate, args.adam_beta1),
                "fake": (args.fake_learning_rate, args.fake_adam_beta1),
                "surrogate": (args.surrogate_learning_rate, args.surrogate_adam_beta1),
            }
            self.optimizer = optimizer_class(
                [
                    {
                        "params": list(self.policy.tensors(name).values()),
                        "lr": rate,
                        "betas": (beta1, args.adam_beta2),
                        "weight_decay": args.weight_decay,
                    }
                    for name, (rate, beta1) in groups.items()
                ],
                **options,
            )
        return self.optimizer

    # -- the round ----------------------------------------------------------------------------------------------------

    def _sample_and_score(
        self, round: int, rows: list[dict], view: str | None, **options
    ) -> tuple[dict[str, Tensor], Tensor, Scores]:
        points = self.args.sample_num_steps + 1
        visited = Visited(torch.empty(len(rows), points, *self._latent_shape, device=self.args.device))
        sampled, images, scores = super()._sample_and_score(
            round, rows, view, keep=lambda step, x_t, velocity, x_next: visited.add(step, x_t, x_next), **options
        )
        return {**sampled, "latents": visited.latents}, images, scores

    @cached_property
    def _edges(self) -> list[float]:
        """Levels of the latents before each of the student's steps, and after the last."""
        return self.backbone.step_levels(self.args.sample_num_steps)

    @cached_property
    def _told(self) -> list[float]:
        """Levels that the denoiser was told at each step."""
        return self.backbone.sigmas(self.args.sample_num_steps).tolist()

    def _draw_steps(self, round: int, iteration: int) -> list[int]:
        """Which steps of the rollouts the present role learns from in a pass."""
        count, stream = self.args.sample_num_steps, generator(self.args.seed, "steps", self._role, round, iteration)
        again = self._role == "surrogate"  # it sees the later steps more often, and one of them twice
        weights = torch.arange(1.0, count + 1) if again else torch.ones(count)
        return torch.multinomial(weights, self.args.num_train_timesteps, again, generator=stream).tolist()

    def _draw_levels(self, round: int, iteration: int) -> list[float]:
        # The fake score must know all levels at which it is asked, and the student asks at all.
        return self._renoising_levels(
            self._role, self.args.t_min if self._role == "surrogate" else 0.0, round, iteration
        )

    def _renoising_levels(self, name: str, t_min: float, round: int, iteration: int) -> list[float]:
        """A level for each step of a pass, to which what the step led to is noised on."""
        stream = generator(self.args.seed, "levels", name, round, iteration)
        return [
            self._level(step, torch.rand((), generator=stream).item(), t_min)
            for step in self._draw_steps(round, iteration)
        ]

    def _level(self, step: int, uniform: float, t_min: float) -> float:
        return renoising_level(uniform, self._edges[step + 1], t_min, self.backbone.shift_factor)

    def _noise(self, rollout: Rollout, key: tuple) -> Tensor:
        return super()._noise(rollout, (self._role, *key))

    def _part(self, round: int, iteration: int, update: int) -> _StepsPart:
        part = super()._part(round, iteration, update)
        sigmas, noise = [], []
        if self._role == "student":
            sigmas = self._renoising_levels("reward", self.args.reward_t_min, round, iteration)
            noise = [self._reward_noise(part.rollout, (round, iteration, level)) for level in range(len(sigmas))]
        steps = self._draw_steps(round, iteration)
        return _StepsPart.extending(part, steps=steps, reward_sigmas=sigmas, reward_noise=noise)

    def _reward_noise(self, rollout: Rollout, key: tuple[int, int, int]) -> Tensor:
        """Noise with which the surrogate is asked, one draw a group, as it learned."""
        return to_device(
            self._draw(("noise", "reward", *key), [(group,) for group in rollout.groups.tolist()]), self.args.device
        )

    def _learned_from(self, rollout: Rollout) -> Tensor:
        # What the others learn needs no preference.
        return super()._learned_from(rollout) if self._role == "surrogate" else rollout.valid

    # -- where the student's steps lead -------------------------------------------------------------------------------

    def _renoised(self, part: _StepsPart, rows: slice | Tensor, level: int) -> tuple[Tensor, Tensor]:
        """What some rows' step led to, noised on to a level, and the noise."""
        latents = part.rollout.latents[rows, part.steps[level] + 1]
        noise = part.noise[level][part.group_index[rows] if self._shares_noise else rows]
        return flow_renoise(latents, noise, self._edges[part.steps[level] + 1], part.sigmas[level]), noise

    def _student_x0(self, part: _StepsPart, rows: slice | Tensor, level: int) -> Tensor:
        """Clean latents that the student's step pointed to when it was taken: known without a forward."""
        step = part.steps[level]
        now, following = self._edges[step], self._edges[step + 1]
        x_t, x_next = part.rollout.latents[rows, step], part.rollout.latents[rows, step + 1]
        return flow_clean(x_t, (x_t - x_next) / (now - following), now)

    def _predict(
        self,
        part: _StepsPart,
        rows: slice | Tensor,
        level: int,
        *,
        model: nn.Module | None = None,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Velocity where a step of the student led, and the one that the present role should have there."""
        step, sigma = part.steps[level], part.sigmas[level]
        x_t, noise = self._renoised(part, rows, level)
        with self.accelerator.autocast() if model is None else nullcontext():
            velocity = self.backbone.predict(
                x_t, sigma, part.conditioning_of(rows), model=model, guidance_scale=guidance_scale
            )
        if self._role == "surrogate":
            latents = part.rollout.latents[rows, step + 1]
            return velocity, flow_renoise_target(latents, noise, self._edges[step + 1], sigma)
        return velocity, flow_velocity(x_t, self._student_x0(part, rows, level), sigma)

    # -- what does not move while one of them learns ------------------------------------------------------------------

    def _fix(self, part: _StepsPart) -> Fixed:
        if self._role == "surrogate":
            return super()._fix(part)
        base_predictions = directions = None
        if self._role == "student":
            directions = self._directions(part)
        elif self.args.fake_kl_coef:
            _, base_predictions = self._no_grad_pass(self.policy.using("base"), part, keep=True)
        return _FixedDirections(
            reference_errors=None,
            old_errors=None,
            base_predictions=base_predictions,
            scores=None,
            objectives=None,
            directions=directions,
        )

    def _directions(self, part: _StepsPart) -> list[dict[str, Revision]]:
        """Of each level, where the student's clean latents should move."""
        size = self._rows_without_gradient(self.args.no_grad_guidance_scale)
        blocks = [rows for _, rows, _ in self._blocks(part, size)]
        count, found = len(part.learned_from), []
        with torch.no_grad(), evaluating(self.policy.model):
            for level in range(len(part.sigmas)):
                kept: dict[str, Revision] = {}
                for rows in blocks:
                    for name, (direction, scale) in self._revisions(part, rows, level).items():
                        if name not in kept:
                            kept[name] = Revision(
                                direction.new_zeros(count, *direction.shape[1:]), scale.new_ones(count)
                            )
                        kept[name].direction[rows], kept[name].scale[rows] = direction, scale
                found.append(kept)
        return found

    def _revisions(self, part: _StepsPart, rows: slice | Tensor, level: int) -> dict[str, Revision]:
        args, step, conditioning = self.args, part.steps[level], part.conditioning_of(rows)

        def clean(view: str, x_t: Tensor, sigma: float, guidance_scale: float = 1.0) -> Tensor:
            with self.policy.using(view), self.accelerator.autocast():
                velocity = self.backbone.predict(x_t, sigma, conditioning, guidance_scale=guidance_scale)
            return flow_clean(x_t, velocity.float(), sigma)

        (x_t, _), sigma = self._renoised(part, rows, level), part.sigmas[level]
        base_negative = surrogate = surrogate_base = None
        if args.distill_guidance_scale > 1:
            with self.policy.using("base"), self.accelerator.autocast():
                sides = self.backbone.predict_sides(x_t, sigma, conditioning)
            base_negative, base = (flow_clean(x_t, velocity.float(), sigma) for velocity in sides)
        else:
            base = clean("base", x_t, sigma)
        fake = clean("fake", x_t, sigma)
        if "reward" in self._weights(step):
            sigma, noise = part.reward_sigmas[level], part.reward_noise[level][part.group_index[rows]]
            x_t = flow_renoise(part.rollout.latents[rows, step + 1], noise, self._edges[step + 1], sigma)
            surrogate = clean("surrogate", x_t, sigma, args.reward_guidance_scale)
            surrogate_base = clean("base", x_t, sigma)
        return revisions(
            self._student_x0(part, rows, level),
            base,
            fake,
            base_negative=base_negative,
            guidance_scale=args.distill_guidance_scale,
            surrogate=surrogate,
            surrogate_base=surrogate_base,
        )

    def _weights(self, step: int) -> dict[str, float]:
        """How much of each direction the student learns of one of its steps."""
        reward = self.args.reward_weight
        if self.args.reward_steps is None or step < self.args.reward_steps:
            return {"kl": 1.0, "cfg": 1 - reward, "reward": reward}
        return {"kl": 1 - reward, "cfg": 1 - reward}

    # -- the losses ---------------------------------------------------------------------------------------------------

    def _loss(self, model: nn.Module, part: _StepsPart, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        if self._role == "surrogate":
            # Later steps weigh more: what they led to is nearer to an image.
            loss = (
                (part.steps[level] + 1) / self.args.sample_num_steps * super()._loss(model, part, fixed, batch, level)
            )
        elif self._role == "fake":
            loss = self._fake_loss(model, part, fixed, batch, level)
        else:
            loss = self._student_loss(model, part, fixed, batch, level)
        self._metrics[f"loss/{self._role}"].append(loss.detach())
        return loss

    def _errors(self, prediction: Tensor, target: Tensor, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        errors, limit = super()._errors(prediction, target, fixed, batch, level), self.args.divergence_limit
        if limit is None:
            return errors
        base = self._base_prediction(fixed, batch.rows, level)
        divergence, base_errors = denoising_error(prediction, base), denoising_error(base, target)
        errors, drifted = clip_drifted(errors, base_errors, batch.advantages, divergence, limit)
        self._metrics["drift_ratio"].append(drifted.float() if batch.weighs else drifted[:0].float())
        return errors

    def _fake_loss(self, model: nn.Module, part: _StepsPart, fixed: Fixed, batch: MicroBatch, level: int) -> Tensor:
        velocity, target = self._predict(part, batch.rows, level, model=model)
        errors = denoising_error(velocity, target)
        if self.args.fake_kl_coef:
            base = self._base_prediction(fixed, batch.rows, level)
            errors = errors + self.args.fake_kl_coef * denoising_error(velocity, base)
        return self._mean(errors, batch)

    def _student_loss(
        self, model: nn.Module, part: _StepsPart, fixed: _FixedDirections, batch: MicroBatch, level: int
    ) -> Tensor:
        rows, step = batch.rows, part.steps[level]
        x_t = part.rollout.latents[rows, step]
        velocity = self.backbone.predict(x_t, self._told[step], part.conditioning_of(rows), model=model)
        x0, loss = flow_clean(x_t, velocity.float(), self._edges[step]), 0.0
        for name, weight in self._weights(step).items():
            if name not in fixed.directions[level]:
                continue
            direction, scale = fixed.directions[level][name]
            term = self._mean(revision_error(x0, Revision(direction[rows], scale[rows])), batch)
            self._metrics[f"loss/student_{name}"].append(term.detach())
            loss = loss + weight * term
        return loss

    def _mean(self, errors: Tensor, batch: MicroBatch) -> Tensor:
        """The micro-batch's part of the mean over groups; a row that is there for the backward's sake has none."""
        return batch.weighs * batch.share * group_mean(errors, batch.group_index, **batch.sizes)

    # -- what is asked before anything is trained ---------------------------------------------------------------------

    def _load(self, model: Any, args: TDMR1Config, quantization_config: Any) -> Adapter | None:
        start = super()._load(model, args, quantization_config)
        if not isinstance(self.backbone, FlowBackbone):
            raise ValueError(
                f"`model` is a {self.backbone.PIPELINE}, which predicts noise; {self._name} follows the velocities of "
                "flow matching. Take a model of that kind, such as SD3.5, FLUX.1 or Z-Image."
            )
        return start

    def _train_levels(self, args: TDMR1Config) -> Tensor:
        for t_min in (args.t_min, args.reward_t_min):
            self._level(0, 0.0, t_min)  # of the noisiest, above which there may be nothing left
        return torch.tensor(self._edges)

    def _views(self, args: TDMR1Config) -> tuple[str, ...]:
        return (*(("old",) if args.clips_errors or args.reference == "old" else ()), "base")


@dataclass(frozen=True)
class _StepsPart(Part):
    """A part, which of the student's steps each of its levels is drawn for, and where the surrogate is asked."""

    steps: list[int]
    reward_sigmas: list[float]
    reward_noise: list[Tensor]  # of each, one draw a group


@dataclass(frozen=True)
class _FixedDirections(Fixed):
    """What the student learns, by level and name."""

    directions: list[dict[str, Revision]] | None
