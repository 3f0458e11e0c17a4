"""
Guards: what tells, where nobody looks, that a reward rises while the pictures go bad.

    every round         ImageGuard      the round's pictures against the base model's, by what needs no model
    every evaluation    HeldOutGuard    the training reward against the metric on held-out prompts; early stop

They read what is there anyway, and draw nothing. What they must remember is in Trainer's own state, so that a run that
is killed and resumed is warned as if it never was: the guard's numbers in `stateful_callbacks`, and the log. Every
process comes to the same decision.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from .image_measures import measure_images, near_duplicates, thumbnails
from .rollout import ScoredImages


logger = logging.getLogger(__name__)

LIMIT = 2.0  # standard deviations of the base's pictures: their mean is where 1 in 40 of the base's was
ROUNDS = 2  # in a row
EVALUATIONS = 3  # after the best one
MEMORY = "trl_dgpo.ImageGuard"  # no callback's name alone: Trainer would make those anew
_AT_ONCE = 16  # images that are measured at a time


# Smallest deviation that is reckoned with, in the measure's own unit, where the base's pictures are all alike.
LEAST = {
    "brightness": 0.05,
    "darkness": 0.05,
    "contrast": 0.02,
    "saturation": 0.05,
    "edges": 0.01,
    "colour_entropy": 0.2,
    "near_duplicates": 0.1,
}


class Sign(NamedTuple):
    """
    A way in which pictures go bad.

    Args:
        measure (`str`):
            One of `LEAST`, see [`~trl_dgpo.image_measures.measure_images`] and
            [`~trl_dgpo.image_measures.near_duplicates`].
        way (`int`):
            1 if it rises, -1 if it falls.
        meaning (`str`):
            What one sees.
    """

    measure: str
    way: int
    meaning: str

    @property
    def key(self) -> str:
        """Its name in the guard's memory."""
        return f"{self.measure} {self.way:+d}"


# Brightness and saturation are logged and are no signs: of a reward for light or for colour they are the task.
SIGNS = (
    Sign("contrast", -1, "flat pictures"),
    Sign("edges", -1, "lost detail"),
    Sign("edges", 1, "noise or fine patterns"),
    Sign("colour_entropy", -1, "few colours"),
    Sign("darkness", 1, "dark pictures"),
    Sign("near_duplicates", 1, "the same picture again for a prompt"),
)


class ImageGuard(TrainerCallback):
    """
    Measures every round's pictures against those of the first, which are the base model's.

    Training starts at the base model, so the first round's pictures are its own, drawn for nothing. Logged are, as
    means over a round, `images/<measure>`, `images_vs_base/<measure>` (its difference from the base's, in standard
    deviations of the base's pictures), and `guard/alarms` (signs that are out of range).

    A sign is out of range where its measure has moved its way by more than two of those deviations, in two rounds in a
    row. A warning then names it, with its numbers and the reward's; each sign warns once.

    Args:
        log_metric (`Callable[[str, float], None]`):
            Takes a number for the trainer's next log.
        stops (`bool`, *optional*, defaults to `False`):
            Whether training ends, with a checkpoint, after the optimiser step in which a warning is given and the
            reward is above the first round's.
    """

    def __init__(self, log_metric: Callable[[str, float], None], stops: bool = False):
        self.log_metric, self.stops = log_metric, stops
        self._is_over = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_over = False

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_over:  # told before, in the midst of the step, Trainer would drop what is left of it
            control.should_training_stop = control.should_save = True

    def on_rollout(self, args, state, control, scored: ScoredImages, **kwargs):
        measures, reward = _measured(scored, args.device)
        means = {name: values.mean().item() for name, values in measures.items()}
        # What Trainer saves with each checkpoint and reads again.
        memory = state.stateful_callbacks.setdefault(MEMORY, {})
        if not memory:
            if scored.round > 0:
                logger.warning(
                    "The checkpoint knows nothing of the base model's pictures: those of round %d, at step %d, are "
                    "compared with in their place.",
                    *(scored.round, state.global_step),
                )
            spreads = {name: values.std(correction=0).item() for name, values in measures.items()}
            memory |= {"means": means, "spreads": spreads, "reward": reward, "rounds": {}, "told": []}
        shifts = {
            name: (mean - memory["means"][name]) / max(memory["spreads"][name], LEAST[name])
            for name, mean in means.items()
            if name in memory["means"]
        }
        out = []
        for sign in SIGNS:
            key = sign.key
            is_out = sign.way * shifts.get(sign.measure, 0.0) > LIMIT
            memory["rounds"][key] = memory["rounds"].get(key, 0) + 1 if is_out else 0
            if memory["rounds"][key] >= ROUNDS:
                out.append(key)
        for name in shifts:
            self.log_metric(f"images/{name}", means[name])
            self.log_metric(f"images_vs_base/{name}", shifts[name])
        self.log_metric("guard/alarms", float(len(out)))
        if new := [key for key in out if key not in memory["told"]]:
            memory["told"] += new
            has_risen = reward > memory["reward"]
            self._is_over = self.stops and has_risen
            if state.is_world_process_zero:
                evidence = [
                    f"{sign.measure} {means[sign.measure]:.3f}, the base model's {memory['means'][sign.measure]:.3f} "
                    f"+- {memory['spreads'][sign.measure]:.3f} ({sign.meaning})"
                    for sign in SIGNS
                    if sign.key in new
                ]
                logger.warning(
                    "The pictures leave the base model's range while the reward %s: it was %.3f in the first round "
                    "and is %.3f in round %d, at step %d. Out of range for %d rounds: %s. Look at them (%s). %s",
                    "rises" if has_risen else "does not rise",
                    *(memory["reward"], reward, scored.round, state.global_step, ROUNDS, "; ".join(evidence)),
                    "`output_dir/samples`" if args.num_log_images else "`num_log_images` draws some",
                    "Training stops after this step, with a checkpoint (`image_guard` is 'stop')."
                    if self._is_over
                    else "If they are bad, raise `kl_coef` or set `kl_target`, or add a reward for what is lost.",
                )


def _measured(scored: ScoredImages, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """Measures of the images of all processes, those without a number left out, and their mean reward."""
    on_device = (part.to(device) for part in scored.images.split(_AT_ONCE))
    parts = [(measure_images(part), thumbnails(part)) for part in on_device]
    own = {name: torch.cat([measures[name] for measures, _ in parts]).cpu() for name in LEAST if name in parts[0][0]}
    small = torch.cat([thumbnail for _, thumbnail in parts]).cpu()
    gathered = gather_object([(own, small, scored.group_index.cpu(), scored.rewards.cpu())])
    measures = {name: torch.cat([of_one[name] for of_one, *_ in gathered]) for name in own}
    small, group_index, rewards = (torch.cat(parts) for parts in list(zip(*gathered, strict=True))[1:])
    measures["near_duplicates"] = near_duplicates(small, group_index)
    known = {name: values[~values.isnan()].double() for name, values in measures.items()}
    return {name: values for name, values in known.items() if len(values)}, rewards.nanmean().item()


def _way_back(args: Any, state: Any, best_step: int) -> str:
    if not args.load_best_model_at_end:
        return "`load_best_model_at_end` would bring the best one back."
    if best_step == 0:  # of which there is no checkpoint
        return f"That is the model before training; loaded is the best checkpoint, of step {state.best_global_step}."
    return "The best checkpoint is loaded."


class HeldOutGuard(TrainerCallback):
    """
    Watches a metric on held-out prompts: warns where it falls while the training reward rises, and stops early.

    The best evaluation is the one with the best value so far, that before training among them. Where three have come
    after it, the last of them is worse by more than twice the metric's standard error (where the log has one), and the
    training reward since the last but one is above what it was until the best, a warning names the numbers of both; so
    again after every three more.

    All is read from the log, so that it holds across an interruption.

    Args:
        metric (`str`):
            Name in the log, such as `eval_reward`.
        greater_is_better (`bool`, *optional*, defaults to `True`):
            Whether more of it is better.
        patience (`int`, *optional*):
            Evaluations after the best one at which training stops. Not at all if not given.
    """

    def __init__(self, metric: str, greater_is_better: bool = True, patience: int | None = None):
        self.metric, self.greater_is_better, self.patience = metric, greater_is_better, patience

    def on_evaluate(self, args, state, control, **kwargs):
        evaluated = [entry for entry in state.log_history if math.isfinite(entry.get(self.metric, math.nan))]
        if not evaluated:
            return
        choose = max if self.greater_is_better else min
        best = choose(range(len(evaluated)), key=lambda number: evaluated[number][self.metric])  # the first of them
        since = evaluated[best + 1 :]
        if since and len(since) % EVALUATIONS == 0:
            self._compare(state, evaluated, best)
        if self.patience is not None and len(since) >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "Early stop at step %d: `%s` was %.4g at step %d and not better in the %d evaluations since, the "
                    "last %.4g. %s",
                    *(state.global_step, self.metric, evaluated[best][self.metric], evaluated[best]["step"]),
                    *(len(since), since[-1][self.metric]),
                    _way_back(args, state, evaluated[best]["step"]),
                )

    def _compare(self, state: Any, evaluated: list[dict[str, float]], best: int) -> None:
        """Warn where the training reward has risen since the best evaluation, and the metric clearly not."""
        was, now = evaluated[best], evaluated[-1]
        error = now.get(f"{self.metric}_stderr", 0.0)
        if abs(now[self.metric] - was[self.metric]) <= 2 * error or not state.is_world_process_zero:
            return
        # Until the best evaluation since the one before it; of the first, which is before training, just after it.
        first = max(best, 1)
        before = self._reward(state, evaluated[first - 1]["step"], evaluated[first]["step"])
        after = self._reward(state, evaluated[-2]["step"], now["step"])
        if after > before:
            logger.warning(
                "The training reward rises while `%s` on held-out prompts gets worse: the reward was %.4g around step "
                "%d and is %.4g; `%s` was %.4g at step %d and is %.4g at step %d%s. The reward is being gamed, or the "
                "prompts learned by heart: keep the best checkpoint (`load_best_model_at_end`, "
                "`early_stopping_patience`), raise `kl_coef` or set `kl_target`.",
                *(self.metric, before, evaluated[first]["step"], after, self.metric, was[self.metric], was["step"]),
                *(now[self.metric], now["step"], f", +- {error:.2g}" if error else ""),
            )

    @staticmethod
    def _reward(state: Any, after: int, until: int) -> float:
        """Mean training reward of the logs between two steps."""
        rewards = [
            entry["reward"] for entry in state.log_history if "reward" in entry and after < entry["step"] <= until
        ]
        return sum(rewards) / len(rewards) if rewards else math.nan
