"""Two processes on the CPU, as `torchrun` starts them, against one, which is this."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """What two processes left in a folder and told: started once, since their imports take longer than all else."""
    from tiny_trainers import run_in_two_processes

    folder = tmp_path_factory.mktemp("two")
    return folder, run_in_two_processes(__file__, folder)


def test_two_processes_learn_what_one_learns(two, tmp_path):
    folder, _ = two
    learn(tmp_path / "learn")
    files = (tmp_path / "learn.0.pt", folder / "learn.0.pt", folder / "learn.1.pt")
    one, first, second = (torch.load(file, weights_only=True) for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    difference = sum((first[n] - one[n]).square().sum() for n in one).sqrt()
    assert difference < 1e-5 * sum(weight.square().sum() for weight in one.values()).sqrt()
    logs = [json.loads((where / "learn.0.json").read_text()) for where in (tmp_path, folder)]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        # Every number is of both processes' images, but for the seconds.
        for key in [key for key in mine if not re.search("time|second", key)]:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert (folder / "learn" / "pytorch_lora_weights.safetensors").is_file()


def test_two_processes_hold_a_kl_and_guard_as_one(two, tmp_path):
    folder, _ = two
    hold(tmp_path / "hold")
    one, first, second = (
        json.loads(file.read_text())
        for file in (tmp_path / "hold.0.json", folder / "hold.0.json", folder / "hold.1.json")
    )
    assert first == second
    assert first["told"] == one["told"] != []
    for name in ("kl_coef", "divergence", "shifts"):
        assert first[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name
    assert one["kl_coef"][1] != one["kl_coef"][0]
    assert one["divergence"][0] > 1e-3
    assert one["step"] == first["step"] == 3  # both end together


def test_what_scoring_raises_in_one_process_ends_both(two):
    folder, stderr = two
    first, second = (json.loads((folder / f"fail.{rank}.json").read_text()) for rank in range(2))
    text = "RewardOutputError: Reward `short` returned {} values for {} images; it must return one each."
    told = "RuntimeError: Scoring failed in 1 of 2 processes. process 1: "
    # In training, where images are scored as they arrive; then in evaluation, where the second has one image.
    for mine, theirs, numbers in zip(first, second, ((3, 4), (0, 1)), strict=True):
        assert theirs == text.format(*numbers)
        assert mine == told + theirs
    assert "limits together (1 x `reward_timeout`, 600 seconds) are no shorter than `ddp_timeout` (100)" in stderr


def fail(output: Path) -> None:
    from tiny_trainers import brightness, prompt_dataset, tiny_trainer

    rank = int(os.environ["RANK"])

    def short(images, **kwargs):
        return brightness(images)[rank:]

    trainer = tiny_trainer(
        output,
        reward_funcs=short,
        eval_dataset=prompt_dataset("x", "y", "z"),
        eval_on_start=False,
        async_reward_computation=True,
        sample_batch_size=4,
        ddp_timeout=100,
    )
    errors = []
    for call in (trainer.train, trainer.evaluate):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    Path(f"{output}.{rank}.json").write_text(json.dumps(errors))


def learn(output: Path) -> None:
    from tiny_trainers import brightness, prompt_dataset, scramble, tiny_trainer, weights

    trainer = tiny_trainer(
        output,
        reward_funcs=brightness,
        train_dataset=prompt_dataset("a", "b", "c", "d", "e"),
        eval_dataset=prompt_dataset("x", "y", "z"),
        num_iterations=2,
        updates_per_round=2,
        max_steps=6,
        kl_coef=0.1,
        clip_range=1e-3,
        beta=1e4,
    )
    scramble(trainer)
    trainer.train()
    trainer.save_model()
    rank = trainer.args.process_index
    torch.save({n: w.detach() for n, w in weights(trainer).items()}, f"{output}.{rank}.pt")
    Path(f"{output}.{rank}.json").write_text(json.dumps(trainer.state.log_history))


def hold(output: Path) -> None:
    from tiny_trainers import scramble, tiny_trainer

    from trl_dgpo.guards import MEMORY

    def rising(images, trainer_state, **kwargs):
        return [trainer_state.global_step + i / 10 for i in range(len(images))]

    trainer = tiny_trainer(
        output,
        reward_funcs=rising,
        num_generations=3,  # a group lies on both
        prompts_per_round=2,
        max_steps=5,
        kl_coef=0.1,
        kl_target=0.01,
        divergence_rounds=1,
        image_guard="stop",
    )
    scramble(trainer)
    decode = trainer.backbone.decode

    def flat(latents):
        images = decode(latents)
        return images if trainer.state.global_step == 0 else (110 + images.float() / 10).to(torch.uint8)

    trainer.backbone.decode = flat
    trainer.train()
    history = trainer.state.log_history
    report = {name: [entry[name] for entry in history if name in entry] for name in ("kl_coef", "divergence")}
    shifts = [v for entry in history for name, v in entry.items() if name.startswith("images_vs_base/")]
    report |= {"shifts": shifts, "told": trainer.state.stateful_callbacks[MEMORY]["told"]}
    report["step"] = trainer.state.global_step
    Path(f"{output}.{trainer.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    for part in (learn, fail, hold):
        part(Path(sys.argv[1]) / part.__name__)
