"""From a checkpoint at a round's end any number of processes goes on alike: one, then two, then one again."""

import logging
import sys
from pathlib import Path

import pytest
import torch


ROUND = 2  # optimiser steps
CONFIG = {
    "prompts_per_round": 2,
    "updates_per_round": 2,  # one group an optimiser step, of which two processes have a half each
    "per_device_train_batch_size": 2,
    "max_steps": 3 * ROUND,
    "save_strategy": "steps",
    "save_steps": ROUND,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "old_policy_after": 1,
    "clip_range": 1e-3,
    "kl_coef": 0.1,
    "beta": 100.0,
}


@pytest.mark.slow
def test_one_goes_on_as_two_and_two_as_one(tmp_path, caplog):
    from tiny_trainers import relative_error, run_in_two_processes, same

    whole = run(tmp_path / "whole")
    told = run_in_two_processes(__file__, tmp_path / "two", tmp_path / "whole" / f"checkpoint-{ROUND}")
    first, second = (torch.load(tmp_path / f"two.{rank}.pt", weights_only=True) for rank in (0, 1))
    with caplog.at_level(logging.WARNING):
        one_again = run(tmp_path / "again", tmp_path / "two" / f"checkpoint-{2 * ROUND}")
    assert same(first, second)
    parts = {kind(name) for name in whole}
    assert parts == {"policy", "old", "ema", "exp_avg", "exp_avg_sq", "step"}
    for part in parts:
        expected, as_two, as_one = (
            {name: tensor for name, tensor in state.items() if kind(name) == part}
            for state in (whole, first, one_again)
        )
        assert relative_error(as_two, expected) < 1e-5, part
        assert relative_error(as_one, expected) < 1e-5, part
    for output in (told, caplog.text):
        assert "sampled anew" not in output


def kind(name: str) -> str:
    view, _, rest = name.partition(".")
    return rest.rpartition(".")[2] if view == "optimiser" else "policy" if view == "None" else view


def run(output: Path, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    from tiny_trainers import brightness, everything, prompt_dataset, scramble, tiny_trainer

    prompts = prompt_dataset("a", "b", "c", "d", "e")
    trainer = tiny_trainer(output, reward_funcs=brightness, train_dataset=prompts, **CONFIG)
    if checkpoint is None:
        scramble(trainer)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.state.global_step == CONFIG["max_steps"]
    state = everything(trainer)
    torch.save(state, f"{output}.{trainer.args.process_index}.pt")
    return state


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
