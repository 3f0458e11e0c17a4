"""Flow-GRPO: DGPO's rounds, learned from by a policy gradient over the steps of their sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..losses import denoising_error, flow_grpo_loss, step_kl, step_log_prob
from ..noising import SDECoefficients, flow_sde_target, trainable_levels
from ..policy import Adapter, lora_config
from ..rewards.scoring import Scores
from ..rollout import Rollout, Trajectory
from ..seeding import generator
from .dgpo_trainer import DGPOTrainer, _Fixed, _MicroBatch, _Part
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
    groups are weighed alike where some of their samples are masked.

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

    def _sample_and_score(self, round: int, rows: list[dict]) -> tuple[dict[str, Tensor], Tensor, Scores]:
        steps = self._stochastic_steps(round)
        self._visited: list[tuple[Tensor, Tensor, Tensor]] = []
        sampled, images, scores = super()._sample_and_score(round, rows)
        sub_batches = [self._visited[i : i + len(steps)] for i in range(0, len(self._visited), len(steps))]
        del self._visited
        latents = [
            torch.stack([sub_batch[0][0], *(x_next for _, x_next, _ in sub_batch)], 1) for sub_batch in sub_batches
        ]
        log_probs = [torch.stack([log_prob for *_, log_prob in sub_batch], 1) for sub_batch in sub_batches]
        trajectory = {
            "latents": torch.cat(latents),
            "log_probs": torch.cat(log_probs),
            "steps": torch.tensor(steps).repeat(len(rows), 1),
        }
        return {**sampled, **trajectory}, images, scores

    def _sample(self, *args, step_noise: Callable | None = None, **kwargs) -> Iterator:
        if step_noise is not None:  # a rollout, not an evaluation
            kwargs |= {"noise_level": self.args.noise_level, "keep": self._keep}
        return super()._sample(*args, step_noise=step_noise, **kwargs)

    def _keep(self, step: int, x_t: Tensor, velocity: Tensor, x_next: Tensor) -> None:
        coefficients = self._coefficients[step]
        errors = denoising_error(velocity, flow_sde_target(x_t, x_next, coefficients))
        self._visited.append((x_t, x_next, step_log_prob(errors, coefficients.velocity, coefficients.std)))

    def _step_noise(self, round: int, keys: list[tuple[int, int]]) -> Callable[[slice, int], Tensor | None]:
        noise, steps = super()._step_noise(round, keys), self._stochastic_steps(round)
        return lambda rows, step: noise(rows, step) if step in steps else None

    def _stochastic_steps(self, round: int) -> list[int]:
        """Numbers of a round's stochastic steps, consecutive ones."""
        args, allowed = self.args, self._steps
        places = len(allowed) - (args.num_sde_steps or len(allowed)) + 1
        if args.sde_window == "random":
            first = int(torch.randint(places, (), generator=generator(args.seed, "window", round)))
        else:
            first = round % places
        return allowed[first : len(allowed) - places + 1 + first]

    def _train_levels(self, args: FlowGRPOConfig) -> Tensor:
        sigmas = self.backbone.sigmas(args.sample_num_steps)
        allowed = trainable_levels(sigmas, args.t_min, self.backbone.shift_factor, t_max=args.t_max)
        allowed = allowed[allowed < args.sample_num_steps - 1]
        for name in ("num_sde_steps", "num_train_timesteps"):
            if (getattr(args, name) or 1) > len(allowed):
                raise ValueError(
                    f"`{name}` ({getattr(args, name)}) is more than the {len(allowed)} steps that `t_min` "
                    f"({args.t_min}) and `t_max` ({args.t_max}) leave of `sample_num_steps` "
                    f"({args.sample_num_steps}) without the last: "
                    f"{[round(sigma, 3) for sigma in sigmas[allowed].tolist()]}. Set `{name}` lower, or raise "
                    "`sample_num_steps`."
                )
        self._steps = allowed.tolist()
        self._coefficients = self.backbone.sde_coefficients(args.sample_num_steps, noise_level=args.noise_level)
        return sigmas[allowed]

    def _draw_levels(self, round: int, iteration: int) -> list[float]:
        steps = self.buffer.record.steps[0] - self._steps[0]
        order = torch.randperm(len(steps), generator=generator(self.args.seed, "levels", round, iteration))
        return self._levels[steps[order[: self.args.num_train_timesteps]]].tolist()

    def _noise(self, rollout: Rollout, key: tuple[int, int, int]) -> None:
        """None: it is in the trajectory."""

    def _step(self, part: _Part, level: int) -> tuple[int, SDECoefficients]:
        """Which of the trajectory's steps a level is, and how it was taken."""
        step = self._steps[self._levels.tolist().index(part.sigmas[level])]
        return step - int(part.rollout.steps[0, 0]), self._coefficients[step]

    def _predict(
        self,
        part: _Part,
        rows: slice | Tensor,
        level: int,
        *,
        model: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity, guided as in the rollout, before a step, and the one that would have led to where it went."""
        number, coefficients = self._step(part, level)
        x_t, x_next = part.rollout.latents[rows, number], part.rollout.latents[rows, number + 1]
        index = part.group_index[rows]
        conditioning = {name: of_groups[index] for name, of_groups in part.rollout.conditioning.items()}
        with self.accelerator.autocast() if model is None else nullcontext():
            velocity = self.backbone.predict(
                x_t,
                part.sigmas[level],
                conditioning,
                model=model,
                guidance_scale=self.args.sample_guidance_scale if guidance_scale is None else guidance_scale,
            )
        return velocity, flow_sde_target(x_t, x_next, coefficients)

    def _preference_loss(self, errors: Tensor, part: _Part, fixed: _Fixed, batch: _MicroBatch, level: int) -> Tensor:
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

    def _kl(self, divergence: Tensor, part: _Part, level: int) -> Tensor:
        _, coefficients = self._step(part, level)
        return step_kl(divergence, coefficients.velocity, coefficients.diffusion)

    def _adapter_config(
        self, args: FlowGRPOConfig, peft_config: LoraConfig | None, start: Adapter | None
    ) -> LoraConfig | None:
        if peft_config is None and start is None and not args.full_finetuning:
            peft_config = lora_config(self.backbone.LORA_TARGETS)
            peft_config.r, peft_config.lora_alpha = 32, 64
        return super()._adapter_config(args, peft_config, start)
