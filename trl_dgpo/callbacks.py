"""Trainer callbacks."""

import re

from transformers import ProgressCallback


class RewardProgressCallback(ProgressCallback):
    """A progress bar that carries the reward, and a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}", loss=f"{logs['loss']:.2e}")
        means = re.compile(r"eval_(.+_)?reward(s/.+/mean)?")
        evaluated = [f"{name} {value:.3f}" for name, value in logs.items() if means.fullmatch(name)]
        if evaluated:
            self.training_bar.write(f"step {state.global_step}: {', '.join(evaluated)}")
