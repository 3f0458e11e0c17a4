"""Flow-GRPO: DGPO's rounds, learned from by a policy gradient over the steps of their sampling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ..losses import denoising_error, flow_grpo_loss, step_kl, step_log_prob
from ..noising import SDECoefficients, flow_sde_target, trainable_levels
from ..rewards.scoring import Scores
from ..rollout import Rollout, Trajectory, Visited
from ..seeding import generator
from .dgpo_trainer import DGPOTrainer, Fixed, MicroBatch, Part
from .flow_grpo_config import FlowGRPOConfig


class FlowGRPOTrainer(DGPOTrainer):
    r"""
    Trainer for Flow-GRPO, introduced in [Flow-GRPO: Training Flow Matching Models via Online
    RL](https://huggingface.co/papers/2505.05470), with the few stochastic steps of its fast form and of
    [MixGRPO](https://huggingface.co/papers/2507.21802) as options.

    Rollouts take stochastic steps, and each step is an action: [`~trl_dgpo.losses.flow_grpo_loss`] raises the
    probability of the steps that led to images better than their group's. A step's mean is affine in the velocity, so
    its log-probability is a denoising error against the velocity that would have led to where it went
    ([`~trl_dgpo.noising.flow_sde_target`]), and the round, its micro-batches and its KL pass are [`DGPOTrainer`]'s.

    Departures from the authors' code: the last step of a rollout is the ODE's, whose noise would stay in the image (it
    is not trained there either); the policy's probabilities at sampling time are those of the rollouts' own forwards;
    groups are weighed alike where some of their samples are masked; a group without preference counts among the groups
    and has its part in the KL term, where that code drops samples of advantage 0 before it trains.

    Args: as [`DGPOTrainer`], with `args` a [`FlowGRPOConfig`]. Without a `peft_config` the LoRA has rank 32 and alpha
    64.
    """

    _tag_names = ["trl", "flow-grpo", "text-to-image", "diffusers"]
    _name = "Flow-GRPO"
    _paper = {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        "citation": (
            "@article{liu2025flowgrpo,\n"
            "    title  = {{Flow-GRPO: Training Flow Matching Models via Online RL}},\n"
            "    author = {Jie Liu and others},\n"
            "    year   = 2025,\n"
            "    eprint = {arXiv:2505.05470},\n"
            "}"
        ),
    }
    _config_class = FlowGRPOConfig
    _record_type = Trajectory
    _trains_offline = False

    def _sample_and_score(
        self, round: int, rows: list[dict], view: str | None
    ) -> tuple[dict[str, Tensor], Tensor, Scores]:
        steps, device = self._stochastic_steps(round), self.args.device
        self._visited = _VisitedAtRandom(
            torch.empty(len(rows), len(steps) + 1, *self._latent_shape, device=device),
            first=steps[0],
            log_probs=torch.empty(len(rows), len(steps), device=device),
        )
        try:
            sampled, images, scores = super()._sample_and_score(
                round, rows, view, noise_level=self.args.noise_level, keep=self._keep
            )
            trajectory = {"latents": self._visited.latents, "log_probs": self._visited.log_probs}
        finally:
            del self._visited
        return {**sampled, **trajectory, "steps": torch.tensor(steps).repeat(len(rows), 1)}, images, scores

    def _keep(self, step: int, x_t: Tensor, velocity: Tensor, x_next: Tensor) -> None:
        number = step - self._visited.first
        if 0 <= number < self._visited.log_probs.shape[1]:  # else a step of the ODE
            coefficients = self._coefficients[step]
            errors = denoising_error(velocity, flow_sde_target(x_t, x_next, coefficients))
            rows = self._visited.add(number, x_t, x_next)
            self._visited.log_probs[rows, number] = step_log_prob(errors, coefficients.velocity, coefficients.std)

    def _step_noise(self, round: int, keys: list[tuple[int, int]]) -> Callable[[slice, int], Tensor | None]:
        noise, steps = super()._step_noise(round, keys), self._stochastic_steps(round)
        return lambda rows, step: noise(rows, step) if step in steps else None

    def _stochastic_steps(self, round: int) -> list[int]:
        """Numbers of a round's stochastic steps, consecutive ones."""
        args, allowed = self.args, self._allowed_steps
        places = len(allowed) - (args.num_sde_steps or len(allowed)) + 1
        if args.sde_window == "random":
            first = int(torch.randint(places, (), generator=generator(args.seed, "window", round)))
        else:
            first = round % places
        return allowed[first : len(allowed) - places + 1 + first]

    @cached_property
    def _coefficients(self) -> list[SDECoefficients]:
        """How each step of a rollout but the last is taken where it is stochastic."""
        return self.backbone.sde_coefficients(self.args.sample_num_steps, noise_level=self.args.noise_level)

    @cached_property
    def _allowed_steps(self) -> list[int]:
        """Numbers of the steps that may be stochastic, consecutive ones."""
        args, sigmas = self.args, self.backbone.sigmas(self.args.sample_num_steps)
        allowed = trainable_levels(sigmas, args.t_min, self.backbone.shift_factor, t_max=args.t_max)
        return allowed[allowed < args.sample_num_steps - 1].tolist()

    def _train_levels(self, args: FlowGRPOConfig) -> Tensor:
        if args.merge_adapter and not self.merges_exactly:
            raise ValueError(
                "`merge_adapter` is on, and merging rounds the weights, which are not all in float32: the rollouts' "
                "probabilities would be those of another policy than the one that is trained. Leave it unset."
            )
        sigmas, allowed = self.backbone.sigmas(args.sample_num_steps), self._allowed_steps
        for name in ("num_sde_steps", "num_train_timesteps"):
            if (getattr(args, name) or 1) > len(allowed):
                raise ValueError(
                    f"`{name}` ({getattr(args, name)}) is more than the {len(allowed)} steps that `t_min` "
                    f"({args.t_min}) and `t_max` ({args.t_max}) leave of `sample_num_steps` "
                    f"({args.sample_num_steps}) without the last: "
                    f"{[round(sigma, 3) for sigma in sigmas[allowed].tolist()]}. Set `{name}` lower, or raise "
                    "`sample_num_steps`."
                )
        return sigmas[allowed]

    def _draw_steps(self, round: int, iteration: int) -> list[int]:
        """
        Which of the trajectory's steps a pass trains on, by their places in it.

        The passes of a round walk through one permutation after the other, so that every step is trained on before any
        is again.
        """
        count, order = self.buffer.record.log_probs.shape[1], []
        for number in range(iteration + 1):
            if len(order) < self.args.num_train_timesteps:
                fresh = torch.randperm(count, generator=generator(self.args.seed, "levels", round, number)).tolist()
                # What is left of the last comes first, and again as the last: no pass has a step twice.
                order += sorted(fresh, key=order.__contains__)
            drawn, order = order[: self.args.num_train_timesteps], order[self.args.num_train_timesteps :]
        return drawn

    def _draw_levels(self, round: int, iteration: int) -> list[float]:
        first = int(self.buffer.record.steps[0, 0]) - self._allowed_steps[0]
        return [self._levels[first + step].item() for step in self._draw_steps(round, iteration)]

    def _part(self, round: int, iteration: int, update: int) -> _StepsPart:
        part = super()._part(round, iteration, update)
        return _StepsPart.extending(part, steps=self._draw_steps(round, iteration))

    def _noise(self, rollout: Rollout, key: tuple[int, int, int]) -> None:
        """None: it is in the trajectory."""

    def _step(self, part: _StepsPart, level: int) -> tuple[int, SDECoefficients]:
        """Which of the trajectory's steps a level is, and how it was taken."""
        step = part.steps[level]
        return step, self._coefficients[int(part.rollout.steps[0, step])]

    def _predict(
        self,
        part: _StepsPart,
        rows: slice | Tensor,
        level: int,
        *,
        model: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity, guided as in the rollout, before a step, and the one that would have led to where it went."""
        number, coefficients = self._step(part, level)
        x_t, x_next = part.rollout.latents[rows, number], part.rollout.latents[rows, number + 1]
        with self.accelerator.autocast() if model is None else nullcontext():
            velocity = self.backbone.predict(
                x_t,
                part.sigmas[level],
                part.conditioning_of(rows),
                model=model,
                guidance_scale=self.args.sample_guidance_scale if guidance_scale is None else guidance_scale,
            )
        return velocity, flow_sde_target(x_t, x_next, coefficients)

    def _preference_loss(
        self, errors: Tensor, part: _StepsPart, fixed: Fixed, batch: MicroBatch, level: int
    ) -> Tensor:
        number, coefficients = self._step(part, level)
        log_probs = step_log_prob(errors, coefficients.velocity, coefficients.std)
        old_log_probs = part.rollout.log_probs[batch.rows, number]
        policy = flow_grpo_loss(
            log_probs,
            old_log_probs,
            batch.advantages,
            batch.group_index,
            clip_range=self.args.clip_range,
            **batch.sizes,
        )
        seen = slice(None if batch.weighs else 0)  # a row that is there for the backward's sake is not counted
        self._metrics["ratio_mean"].append(policy.ratio[seen])
        self._metrics["approx_kl"].append((log_probs.detach() - old_log_probs).square()[seen] / 2)
        if self.args.clip_range is not None:
            self._metrics["clip_ratio"].append(policy.clipped.float()[seen])
        return batch.share * policy.loss

    def _kl(self, divergence: Tensor, part: _StepsPart, level: int) -> Tensor:
        _, coefficients = self._step(part, level)
        return step_kl(divergence, coefficients.velocity, coefficients.diffusion)


@dataclass(frozen=True)
class _StepsPart(Part):
    """A part and which of the trajectory's steps each of its levels is."""

    steps: list[int]


@dataclass
class _VisitedAtRandom(Visited):
    """What was visited, and with what probability."""

    first: int = field(kw_only=True)  # number of the first stochastic step
    log_probs: Tensor = field(kw_only=True)  # (images, steps)
