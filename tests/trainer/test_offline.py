"""
Offline: a saved round teaches what the round taught, whoever made it, and no reward is asked.

`collect_rollouts` makes the sets; with `shuffle_dataset=False` groups are dealt as they stand, so that the first round
offline is the first round online.
"""

import gc
import io
import json
import os
import sys
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_trainers import (
    Gradient,
    Interrupt,
    brightness,
    everything,
    prompt_dataset,
    relative_error,
    run_in_two_processes,
    same,
    scramble,
    tiny_trainer,
    weights,
)
from transformers import TrainerCallback

from trl_dgpo import DGPOTrainer, GPOTrainer
from trl_dgpo.rollout_dataset import SavedGroups, to_dataset
from trl_dgpo.trainer import dgpo_trainer


# Everything acts: the gate, the clip, the KL term, two passes over a round and two parts of it.
CONFIG = {
    "beta": 100.0,
    "clip_range": 1e-3,
    "kl_coef": 0.1,
    "num_iterations": 2,
    "updates_per_round": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "old_policy_after": 1,
    "shuffle_dataset": False,
    "max_grad_norm": 0.0,
}


def dark(images, **kwargs):
    return [1 - value for value in brightness(images)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> datasets.Dataset:
    """Two rounds of four groups of the scrambled policy."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("collect"), **CONFIG)
    scramble(trainer)
    return trainer.collect_rollouts(2)


def train(tmp_path, trainer_class=DGPOTrainer, *, resume=None, **given):
    gradient = Gradient()
    given = {**CONFIG, "max_steps": 1, **given, "callbacks": [gradient, *given.pop("callbacks", ())]}
    trainer = tiny_trainer(tmp_path, trainer_class, **given)
    scramble(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradient.value


@pytest.mark.parametrize("trainer_class", [DGPOTrainer, GPOTrainer])
def test_a_saved_round_teaches_what_the_round_taught(tmp_path, saved, trainer_class):
    method = {"clip_range": None, "kl_coef": 0.0, "loss_type": "logsigmoid"} if trainer_class is GPOTrainer else {}
    online, expected = train(tmp_path / "online", trainer_class, max_steps=4, **method)
    offline, gradient = train(
        tmp_path / "offline", trainer_class, max_steps=4, train_dataset=saved, reward_funcs=None, **method
    )
    assert same(gradient, expected)
    for name in ("x0", "rewards", "advantages", "group_index", "number_in_group", "group_sizes"):
        assert torch.equal(getattr(offline.buffer.record, name), getattr(online.buffer.record, name)), name
    if "old" not in online.policy.views:
        assert same(everything(offline), everything(online))  # after all steps of the round


def test_the_set_is_of_the_policy_as_it_is(tmp_path, saved):
    trainer, _ = train(tmp_path, max_steps=2, num_iterations=1)
    assert trainer.state.global_step >= trainer.args.old_policy_after  # rollouts of training are the old policy's
    assert not same_images(trainer.collect_rollouts(2), saved)
    fresh = tiny_trainer(tmp_path, **CONFIG)
    assert not same_images(fresh.collect_rollouts(2), saved)
    scramble(fresh)
    before = weights(fresh)
    assert same_images(fresh.collect_rollouts(2), saved)
    assert same(weights(fresh), before)
    assert fresh.buffer.round is None
    with torch.no_grad():
        for name, weight in trainer.policy.tensors().items():
            weight.copy_(before[name])
    assert same_images(trainer.collect_rollouts(2), saved)


def test_training_goes_on_as_if_nothing_had_been_collected(tmp_path):
    class Collect(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            self.rows = len(trainer.collect_rollouts(1))

    expected, _ = train(tmp_path / "without", max_steps=5)
    trainer = tiny_trainer(tmp_path / "with", callbacks=[collect := Collect()], **{**CONFIG, "max_steps": 5})
    scramble(trainer)
    trainer.train()
    assert collect.rows == 16
    assert same(everything(trainer), everything(expected))
    for log, other in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        assert log.keys() == other.keys()
        assert all(log[name] == other[name] for name in log if not name.startswith(("time/", "train_")))


def test_one_round_at_a_time_is_in_memory(tmp_path, monkeypatch):
    seen, whole_round = [], dgpo_trainer.whole_round

    def watched(scored):
        gc.collect()
        assert all(reference() is None for reference in seen)
        whole = whole_round(scored)
        seen.extend(weakref.ref(part) for part in (scored, whole, whole.images, whole.x0))
        return whole

    monkeypatch.setattr(dgpo_trainer, "whole_round", watched)
    dataset = tiny_trainer(tmp_path).collect_rollouts(3)
    assert len(seen) == 12
    assert dataset["round"][:] == [round for round in range(3) for _ in range(16)]
    assert len(dataset.cache_files) == 3  # on the disk


def same_images(a: datasets.Dataset, b: datasets.Dataset) -> bool:
    return a["x0"][:] == b["x0"][:]


def test_without_latents_the_pictures_are_encoded(tmp_path, saved, monkeypatch):
    pictures_only = saved.remove_columns(["x0", "x0.shape", "advantage"])
    trainer, gradient = train(tmp_path / "pictures", train_dataset=pictures_only, reward_funcs=None)
    # The same with the latents in the set: this VAE, of random weights, does not bring its pictures back.
    monkeypatch.setattr(dgpo_trainer, "_LATENT_TOLERANCE", 255)
    images = torch.stack([torch.tensor(list(p.getdata())).view(32, 32, 3).permute(2, 0, 1) for p in saved["image"]])
    x0 = trainer.backbone.encode_images(images.to(torch.uint8))
    encoded = pictures_only.add_column("x0", x0.flatten(1).tolist()).add_column("x0.shape", [[4, 8, 8]] * len(x0))
    _, expected = train(tmp_path / "latents", train_dataset=encoded, reward_funcs=None)
    assert relative_error(gradient, expected) < 1e-5
    some = [None if i % 3 else row for i, row in enumerate(x0.flatten(1).tolist())]
    _, mixed = train(
        tmp_path / "some",
        train_dataset=encoded.remove_columns("x0").add_column("x0", some),
        reward_funcs=None,
    )
    assert relative_error(mixed, expected) < 1e-5
    _, with_its_own = train(tmp_path / "own", train_dataset=saved, reward_funcs=None)
    assert relative_error(gradient, with_its_own) > 0.1


def test_given_rewards_score_the_pictures_anew(tmp_path, saved):
    _, expected = train(tmp_path / "saved", train_dataset=saved, reward_funcs=None)
    _, anew = train(tmp_path / "anew", train_dataset=saved.remove_columns("reward"), reward_funcs=brightness)
    assert same(anew, expected)
    trainer, other = train(tmp_path / "other", train_dataset=saved, reward_funcs=dark)
    assert relative_error(other, expected) > 0.1
    assert "rewards/dark/mean" in trainer.state.log_history[0]


def test_columns_of_the_prompts_reach_a_reward_that_scores_anew(tmp_path):
    prompts = prompt_dataset("a", "b", "c").add_column("text", ["A", "B", "C"])
    dataset = tiny_trainer(tmp_path, train_dataset=prompts).collect_rollouts(1)
    seen = []

    def reads(prompts, text, images, **kwargs):
        seen.extend(zip(prompts, text, strict=True))
        assert kwargs.keys().isdisjoint({"image", "x0", "group", "round", "advantage"})
        return brightness(images)

    train(tmp_path / "run", train_dataset=dataset, reward_funcs=reads, reward_self_test=True)
    assert len(seen) == 17  # sixteen pictures, and the white one of the self-test
    assert all(text == prompt.upper() for prompt, text in seen)


def pair_set(prompts: list[str], labels: list[float]) -> datasets.Dataset:
    random = np.random.default_rng(0)

    def jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    columns = {"caption": prompts, "label_0": labels}
    for name in ("jpg_0", "jpg_1"):
        columns[name] = [jpeg() for _ in prompts]
    return datasets.Dataset.from_dict(columns)


def test_pairs_are_groups_of_two_with_advantages_of_one(tmp_path, caplog):
    pairs = pair_set(["a", "b", "c", "d"], [1.0, 0.5, 0.0, 1.0])
    config = {"num_generations": 2, "num_iterations": 1, "max_steps": 2}
    trainer, gradient = train(tmp_path, train_dataset=pairs, reward_funcs=None, **config)
    record = trainer.buffer.record
    assert record.rewards.view(4, 2).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [1, 0]]
    assert record.advantages.view(4, 2).round().tolist() == [[1, -1], [0, 0], [-1, 1], [1, -1]]
    assert record.x0.shape == (8, 4, 8, 8)
    assert any(value.abs().max() > 0 for value in gradient.values())
    told = [message for message in caplog.messages if "scaled and cut" in message]
    assert len(told) == 1  # not in every round
    assert "to 32 x 32, the first from 48 x 40" in told[0]


def test_what_is_trained_on_is_told(tmp_path, saved, caplog):
    caplog.set_level("INFO", logger="trl_dgpo")

    def told(**given) -> list[tuple[str, str]]:
        caplog.clear()
        tiny_trainer(tmp_path, **given)
        return [(r.levelname, r.getMessage()) for r in caplog.records if r.name.endswith("dgpo_trainer")]

    assert told(train_dataset=saved, reward_funcs=None) == [
        ("INFO", "Training on 8 saved groups of 4 images, with their own rewards; nothing is sampled.")
    ]
    [(level, message)] = told(train_dataset=saved, num_generations=2)
    assert level == "WARNING"
    assert "8 saved groups of 4 images, of which the first 2 are taken, with rewards computed anew" in message
    [(level, message)] = told(train_dataset=saved.select_columns(["prompt", "image"]))
    assert level == "WARNING"
    assert "Images are sampled for them" in message
    assert told() == []


def test_of_larger_groups_the_first_images_are_taken(tmp_path, saved):
    trainer, _ = train(
        tmp_path, train_dataset=saved, reward_funcs=None, num_generations=2, per_device_train_batch_size=4
    )
    groups = SavedGroups(saved)
    expected = torch.cat([groups.read(group, [0, 1]).rewards for group in range(4)])
    assert torch.equal(trainer.buffer.record.rewards, expected.float())


def test_each_round_has_the_groups_that_it_was_dealt(tmp_path, saved):
    given = {"num_iterations": 1, "updates_per_round": 1, "shuffle_dataset": True, "max_steps": 2}
    trainer, _ = train(tmp_path, train_dataset=saved, reward_funcs=None, **given)
    groups, deal = SavedGroups(saved), trainer.sampler.deal(1)
    assert deal != [0, 1, 2, 3]
    reads = [groups.read(index, [0, 1, 2, 3]) for index in deal]
    assert torch.equal(trainer.buffer.record.x0, torch.stack([x0 for read in reads for x0 in read.x0]))
    assert torch.equal(trainer.buffer.record.rewards, torch.cat([read.rewards for read in reads]).float())
    prompts = trainer.backbone.encode([groups[index]["prompt"] for index in deal])
    assert all(torch.equal(prompts[name], rows) for name, rows in trainer.buffer.record.conditioning.items())


def test_a_masked_image_of_the_set_is_as_if_it_were_not_there(tmp_path, saved):
    rewards = [None if i % 4 == 3 else reward for i, reward in enumerate(saved["reward"][:])]
    masked = saved.remove_columns("reward").add_column("reward", rewards)
    _, gradient = train(tmp_path / "masked", train_dataset=masked, reward_funcs=None)
    _, expected = train(
        tmp_path / "short", train_dataset=saved, reward_funcs=None, num_generations=3, per_device_train_batch_size=3
    )
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("step", [2, 3])  # in the middle of a round, and of a pass over it
def test_offline_runs_go_on_exactly(tmp_path, saved, step):
    given = {"train_dataset": saved, "reward_funcs": None, "max_steps": 6, "lr_scheduler_type": "linear"}
    given |= {"save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True}
    whole, _ = train(tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", callbacks=[Interrupt(3 * step + 1)], **given)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    resumed, _ = train(tmp_path / "run", resume=checkpoint, **given)
    assert same(everything(resumed), everything(whole))


def test_nothing_is_sampled_and_no_old_policy_kept(tmp_path, saved, monkeypatch):
    def sampled(*args, **kwargs):
        raise AssertionError("an image was sampled")

    monkeypatch.setattr(dgpo_trainer.DGPOTrainer, "_sample", sampled)
    trainer, _ = train(tmp_path, train_dataset=saved, reward_funcs=None, clip_range=None)
    assert "old" not in trainer.policy.views
    log = trainer.state.log_history[0]
    assert log["rewards/saved/mean"] == log["reward"]


def test_evaluation_has_rewards_of_its_own(tmp_path, saved):
    given = {"train_dataset": saved, "reward_funcs": None, "eval_dataset": prompt_dataset("x")}
    with pytest.raises(ValueError, match="`eval_dataset` is given and nothing that measures its images"):
        tiny_trainer(tmp_path, **given)
    trainer, _ = train(tmp_path, eval_reward_funcs=dark, num_log_images=1, **given)
    assert "eval_rewards/dark/mean" in trainer.evaluate()


def test_a_run_without_any_reward_is_looked_at_too(tmp_path, saved):
    trainer, _ = train(tmp_path, train_dataset=saved, reward_funcs=None, num_log_images=2, log_completions=True)
    told = json.loads((tmp_path / "samples" / "step-000001" / "samples.json").read_text())
    assert told["prompts"] == ["a", "b"]
    assert told["rewards"] == [None, None]
    assert (tmp_path / "completions" / "completions-000000.parquet").is_file()
    assert trainer.describe()["rewards"] == []
    trainer.create_model_card()
    assert "DGPO" in (tmp_path / "README.md").read_text()


def test_a_round_as_to_dataset_writes_it_is_a_set(tmp_path, saved):
    trainer, expected = train(tmp_path / "saved", train_dataset=saved, reward_funcs=None)
    groups = SavedGroups(saved)
    reads = [groups.read(group, [0, 1, 2, 3]) for group in range(4)]
    images = torch.stack([dgpo_trainer.fitted(image, 32, 32) for read in reads for image in read.images])
    round = to_dataset(trainer.buffer.record, [groups[group]["prompt"] for group in range(4)], images)
    _, gradient = train(tmp_path / "round", train_dataset=round, reward_funcs=None)
    assert relative_error(gradient, expected) < 1e-5  # its rewards were float32


class TestWhatDoesNotFitIsToldBeforeTheModelIsLoaded:
    @pytest.mark.parametrize(
        ("change", "config", "message"),
        [
            (lambda d: d, {"num_generations": 6}, "`num_generations` is 6, and 8 of the 8 groups .* 4 to 4 images"),
            (lambda d: d.select(range(30)), {}, "`num_generations` is 4, and 1 of the 8 groups .* 2 to 4 images"),
            (lambda d: d.remove_columns("reward"), {}, "without rewards: .* Add a column `reward`, or give `reward_"),
            (lambda d: d.select_columns(["prompt", "image"]), {}, "without rewards: .* Add the columns `reward` and"),
            (lambda d: d.shuffle(seed=0), {}, "do not stand together"),
            (lambda d: d, {"reward_weights": [1.0]}, "`reward_weights` is .* no `reward_funcs`"),
        ],
    )
    def test_sets(self, tmp_path, saved, change, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path, model="not loaded", train_dataset=change(saved), reward_funcs=None, **config)

    def test_prompts_alone_need_rewards(self, tmp_path):
        with pytest.raises(TypeError, match="Neither `reward_funcs`"):
            tiny_trainer(tmp_path, model="not loaded", reward_funcs=None)

    def test_a_method_that_needs_its_own_sampling(self, tmp_path, saved):
        class OnlineTrainer(DGPOTrainer):
            _trains_offline = False

        message = r"DGPO learns from the course of its own sampling. Give prompts, with `dataset.select_columns\(\['"
        with pytest.raises(ValueError, match=message + r"prompt'\]\)`"):
            tiny_trainer(tmp_path, OnlineTrainer, model="not loaded", train_dataset=saved)
        with pytest.raises(ValueError, match=message + r"caption'\]\).rename_column\('caption', 'prompt'\)`"):
            tiny_trainer(tmp_path, OnlineTrainer, model="not loaded", train_dataset=pair_set(["a"], [1.0]))


def test_prompts_that_come_with_a_picture_are_prompts_where_there_are_rewards(tmp_path, saved):
    with_pictures = saved.select([0, 4, 8]).select_columns(["prompt", "image"])
    trainer, _ = train(tmp_path, train_dataset=with_pictures, reward_funcs=brightness)
    assert trainer.saved is None


def test_latents_of_another_model(tmp_path, saved):
    other_size = saved.remove_columns("x0.shape").add_column("x0.shape", [[4, 4, 16]] * len(saved))
    with pytest.raises(ValueError, match=r"`x0` of shape \(4, 4, 16\), and those of this model"):
        tiny_trainer(tmp_path, train_dataset=other_size, reward_funcs=None)
    other_vae = saved.remove_columns("x0").add_column("x0", [[-x for x in x0] for x0 in saved["x0"]])
    with pytest.raises(ValueError, match="of 255 away from its picture: another VAE has made it"):
        tiny_trainer(tmp_path, train_dataset=other_vae, reward_funcs=None)


def test_collecting_needs_prompts_and_rounds(tmp_path, saved):
    with pytest.raises(ValueError, match="`num_rounds` is 0"):
        tiny_trainer(tmp_path).collect_rollouts(0)
    with pytest.raises(ValueError, match="holds saved pictures, so nothing is rolled out"):
        tiny_trainer(tmp_path, train_dataset=saved, reward_funcs=None).collect_rollouts(1)


@pytest.mark.slow
def test_two_processes_collect_and_learn_what_one_does(tmp_path, saved):
    saved.save_to_disk(tmp_path / "set")
    run_in_two_processes(__file__, tmp_path)
    _, expected = train(tmp_path / "one", train_dataset=saved, reward_funcs=None)
    assert relative_error(torch.load(tmp_path / "gradient.pt"), expected) < 1e-5
    read = json.loads((tmp_path / "read.json").read_text())
    # Of the two groups of each of the two updates the first is this process's, and no other is read.
    assert read == [[0, [0, 1, 2, 3]], [2, [0, 1, 2, 3]]]
    collected = datasets.load_from_disk(tmp_path / "collected")
    assert collected.remove_columns(["image", "x0", "reward", "advantage"]).to_dict() == (
        saved.remove_columns(["image", "x0", "reward", "advantage"]).to_dict()
    )
    assert torch.allclose(torch.tensor(collected["x0"][:]), torch.tensor(saved["x0"][:]), atol=1e-5)
    kept = datasets.load_dataset("parquet", data_files=str(tmp_path / "kept" / "*.parquet"), split="train")
    assert kept["x0"][:] == collected["x0"][:16]
    # What the main process alone could not write is told to the other one, which would wait for it.
    first, second = ((tmp_path / f"error-{rank}").read_text() for rank in range(2))
    assert first.startswith("NotADirectoryError")
    assert second == f"RuntimeError: A callback failed in 1 of 2 processes. process 0: {first}"


def two_processes(directory: Path) -> None:
    from trl_dgpo.callbacks import SaveRolloutsCallback

    trainer = tiny_trainer(directory / "collect", callbacks=[SaveRolloutsCallback(directory / "kept")], **CONFIG)
    scramble(trainer)
    collected = trainer.collect_rollouts(2)
    trainer.train()
    offline = tiny_trainer(
        directory / "two",
        callbacks=[gradient := Gradient()],
        train_dataset=datasets.load_from_disk(directory / "set"),
        reward_funcs=None,
        **{**CONFIG, "max_steps": 1},
    )
    scramble(offline)
    read, original = [], SavedGroups.read
    SavedGroups.read = lambda self, index, numbers: read.append((index, numbers)) or original(self, index, numbers)
    offline.train()
    if offline.is_world_process_zero():
        collected.save_to_disk(directory / "collected")
        torch.save(
            {name.removeprefix("module."): value for name, value in gradient.value.items()}, directory / "gradient.pt"
        )
        (directory / "read.json").write_text(json.dumps(read))
    no_folder = SaveRolloutsCallback(directory / "read.json" / "kept")
    try:
        tiny_trainer(directory / "fail", callbacks=[no_folder], **CONFIG).train()
    except (OSError, RuntimeError) as error:
        (directory / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
