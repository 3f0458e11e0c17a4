"""What people look at: the progress bar, the trackers, and the files that a run leaves."""

import json
import math
import sys

import datasets
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from trl_dgpo.callbacks import (
    CompletionsCallback,
    RewardProgressCallback,
    RunLogCallback,
    SampleImagesCallback,
    SaveRolloutsCallback,
    Trackers,
)
from trl_dgpo.rewards.scoring import RewardScorer
from trl_dgpo.rollout import ScoredImages
from trl_dgpo.rollout_dataset import SavedGroups, load_rollouts


def state(step=0, **fields) -> TrainerState:
    return TrainerState(global_step=step, **fields)


# -- the progress bar -------------------------------------------------------------------------------------------------


class Bar:
    def __init__(self):
        self.postfix, self.lines = None, []

    def set_postfix(self, **postfix):
        self.postfix = postfix

    def write(self, line):
        self.lines.append(line)


@pytest.fixture
def show(tmp_path):
    callback, args = RewardProgressCallback(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.training_bar = Bar()

    def log(state=None, **logs):
        callback.on_log(args, state or TrainerState(global_step=7), TrainerControl(), logs=logs)
        return callback.training_bar

    return log


def test_reward_and_loss_stand_beside_the_bar(show):
    assert show(reward=0.61234, loss=0.00123).postfix == {"reward": "0.612", "loss": "1.23e-03"}


def test_a_step_without_rollouts_leaves_the_last_reward(show):
    show(reward=0.5, loss=0.1)
    assert show(loss=0.2).postfix["reward"] == "0.500"


def test_an_evaluation_is_a_line(show):
    assert show(**{"eval_reward": 0.7, "eval_images/contrast": 0.1}).lines == ["step 7: eval_reward 0.700"]


def test_evaluations_of_several_data_sets_are_lines_too(show):
    logs = {"eval_short_reward": 0.7, "eval_short_reward_stderr": 0.01, "eval_short_rewards/ocr/mean": 0.8}
    assert show(**logs).lines == ["step 7: eval_short_reward 0.700, eval_short_rewards/ocr/mean 0.800"]


def test_other_processes_show_nothing(show):
    bar = show(TrainerState(is_world_process_zero=False), reward=0.5, loss=0.1)
    assert bar.postfix is None


def test_no_bar_no_line():
    RewardProgressCallback().on_log(None, TrainerState(), TrainerControl(), logs={"reward": 0.5, "loss": 0.1})


def test_on_a_terminal(tmp_path, capsys):
    from tiny_trainers import prompt_dataset, tiny_trainer

    trainer = tiny_trainer(tmp_path, disable_tqdm=False, eval_dataset=prompt_dataset("x"))
    trainer.train()
    out, err = capsys.readouterr()
    assert "reward=0." in err
    assert "step 0: eval_reward 0." in out + err


# -- trackers ---------------------------------------------------------------------------------------------------------


class Wandb:
    """What `Trackers` uses of wandb."""

    class Image:
        def __init__(self, picture, caption=None):
            self.picture, self.caption = picture, caption

    class Table:
        def __init__(self, columns, data):
            self.columns, self.data = columns, data

    def __init__(self, run="a run"):
        self.run, self.logs = run, []

    def log(self, values):
        self.logs.append(values)


def wandb_callback(module) -> WandbCallback:
    callback = WandbCallback.__new__(WandbCallback)  # its constructor imports wandb
    callback._wandb = module
    return callback


def trackers(*callbacks, step=7) -> Trackers:
    return Trackers(list(callbacks), lambda: step)


def test_wandb_gets_images_and_numbers_by_trainers_step():
    wandb, red = Wandb(), Image.new("RGB", (4, 2), "red")
    trackers(wandb_callback(wandb)).log_images({"a | 0.5": red, "b": red}, step=12)
    trackers(wandb_callback(wandb)).log({"reward": torch.tensor(0.5)})
    images, numbers = wandb.logs
    assert images.keys() == {"a | 0.5", "b", "train/global_step"}
    assert images["train/global_step"] == 12
    assert images["a | 0.5"].caption == "a | 0.5"
    assert images["b"].picture.getpixel((3, 1)) == (255, 0, 0)
    assert numbers == {"reward": 0.5, "train/global_step": 7}


def test_wandb_gets_tables_with_images_in_them():
    wandb, red = Wandb(), Image.new("RGB", (4, 2), "red")
    rows = [{"prompt": "a", "reward": 0.5, "image": red}, {"prompt": "b", "reward": None, "image": red}]
    trackers(wandb_callback(wandb)).log_table("completions", rows, 3)
    [log] = wandb.logs
    assert log["completions"].columns == ["prompt", "reward", "image"]
    assert [row[:2] for row in log["completions"].data] == [["a", 0.5], ["b", None]]
    assert all(isinstance(row[2], Wandb.Image) for row in log["completions"].data)
    assert log["train/global_step"] == 3


def test_where_no_run_is_open_nothing_is_sent():
    # Before training, after its end, and on other processes than the main one.
    wandb, tensorboard = Wandb(run=None), TensorBoardCallback()
    sent = trackers(wandb_callback(wandb), tensorboard)
    sent.log_images({"a": torch.zeros(3, 2, 2)})
    sent.log({"reward": 1.0})
    sent.log_table("completions", [{"prompt": "a"}])
    assert wandb.logs == []
    assert tensorboard.tb_writer is None


def test_a_tracker_that_is_added_later_is_found():
    callbacks, wandb = [], Wandb()
    sent = Trackers(callbacks, lambda: 0)
    callbacks.append(wandb_callback(wandb))
    sent.log({"reward": 1.0})
    assert len(wandb.logs) == 1


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (torch.tensor([255, 128, 0], dtype=torch.uint8).view(3, 1, 1), (255, 128, 0)),
        (torch.tensor([1.0, 0.5, -0.2]).view(1, 3, 1, 1), (255, 128, 0)),
        (torch.tensor([0.5], dtype=torch.bfloat16).view(1, 1, 1), (128, 128, 128)),
        (Image.new("L", (1, 1), 9), (9, 9, 9)),
    ],
)
def test_one_image_in_its_forms(image, pixel):
    wandb = Wandb()
    trackers(wandb_callback(wandb)).log_images({"a": image})
    assert wandb.logs[0]["a"].picture.getpixel((0, 0)) == pixel


def test_what_is_not_one_image_is_refused():
    with pytest.raises(ValueError, match=r"'a' has shape \(2, 3, 4, 4\); .* its own label"):
        trackers().log_images({"a": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(TypeError, match="'a' is a list"):
        trackers().log_images({"a": [torch.zeros(3, 4, 4)]})


def test_tensorboard_has_the_very_pixels(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    image = torch.randint(0, 256, (3, 8, 16), dtype=torch.uint8)
    with SummaryWriter(tmp_path) as writer:
        for step in (3, 5):
            trackers(TensorBoardCallback(writer)).log_images({"samples": image}, step)
        trackers(TensorBoardCallback(writer)).log({"reward": 0.25}, 5)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("samples")] == [3, 5]
    assert torch.equal(decoded(events.Images("samples")[1].encoded_image_string), image)
    [reward] = events.Scalars("reward")
    assert (reward.step, reward.value) == (5, 0.25)


def decoded(content: bytes) -> torch.Tensor:
    import io

    with Image.open(io.BytesIO(content)) as picture:
        pixels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def args(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, logging_steps=2)
    args.steps_per_round = 2
    return args


def begin(callback, args, at):
    callback.on_train_begin(args, at, TrainerControl())


def lines(args) -> list:
    with open(f"{args.output_dir}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def test_each_log_is_a_line(args):
    callback = RunLogCallback({"method": "DGPO", "config": {"dtype": torch.bfloat16}})
    callback.on_log(args, state(), TrainerControl(), logs={"eval_reward": 0.1})  # before training: not of this run
    begin(callback, args, state())
    callback.on_log(args, state(1), TrainerControl(), logs={"reward": 0.5, "epoch": 0.1})
    callback.on_log(args, state(2), TrainerControl(), logs={"grad_norm": math.inf, "kl": torch.tensor(0.5)})
    assert lines(args) == [{"reward": 0.5, "epoch": 0.1, "step": 1}, {"grad_norm": None, "kl": 0.5, "step": 2}]
    with open(f"{args.output_dir}/run.json") as file:
        assert json.load(file) == {"method": "DGPO", "config": {"dtype": "torch.bfloat16"}}


def test_a_resumed_run_goes_on_in_its_log(args):
    first = RunLogCallback({})
    begin(first, args, state())
    first.on_log(args, state(1), TrainerControl(), logs={"reward": 0.5})
    with open(f"{args.output_dir}/log.jsonl", "a") as file:
        file.write('{"reward": 0.6, "lo')  # killed
    second = RunLogCallback({})
    begin(second, args, state(1))
    second.on_log(args, state(2), TrainerControl(), logs={"reward": 0.7})
    with open(f"{args.output_dir}/log.jsonl") as file:
        texts = file.read().splitlines()
    assert [json.loads(texts[0]), json.loads(texts[2])] == [{"reward": 0.5, "step": 1}, {"reward": 0.7, "step": 2}]


def test_a_new_run_in_an_old_folder_loses_nothing_and_mixes_nothing(args, tmp_path):
    for reward in (0.1, 0.2, 0.3):
        callback = RunLogCallback({})
        begin(callback, args, state())
        callback.on_log(args, state(1), TrainerControl(), logs={"reward": reward})
        (tmp_path / "run" / "samples").mkdir()
    assert lines(args) == [{"reward": 0.3, "step": 1}]
    for number, reward in ((1, 0.1), (2, 0.2)):
        earlier = tmp_path / "run" / f"_earlier-{number}"
        assert sorted(path.name for path in earlier.iterdir()) == ["log.jsonl", "run.json", "samples"]
        assert json.loads((earlier / "log.jsonl").read_text())["reward"] == reward


def test_other_processes_write_no_log(args, tmp_path):
    callback, other = RunLogCallback({}), state(is_world_process_zero=False)
    begin(callback, args, other)
    callback.on_log(args, other, TrainerControl(), logs={"reward": 0.5})
    assert not (tmp_path / "run").exists()


# -- the same prompts through training --------------------------------------------------------------------------------


class Drawer:
    """A model whose images tell how often it was asked."""

    def __init__(self, reward=lambda images, **kwargs: [0.25, None, math.nan][: len(images)]):
        self.times, self.scorer = 0, RewardScorer(reward)

    def generate(self, prompts):
        self.times += 1
        return torch.full((len(prompts), 3, 8, 16), self.times, dtype=torch.uint8)

    def score(self, images, rows):
        return self.scorer(images, [row["prompt"] for row in rows], {})


def sampling(drawer, sent=None, every=None):
    rows = [{"prompt": "a cat"}, {"prompt": "[b] " * 40}, {"prompt": "c"}]
    return SampleImagesCallback(drawer.generate, drawer.score, rows, sent or trackers(), every)


def train(callback, args, begin_at=0, steps=6, evaluate=(), stop=None, tracker=None):
    """The order in which Trainer calls: trackers come first, and close at the end of training."""
    now, control = state(begin_at), TrainerControl()
    callback.on_train_begin(args, now, control)
    while now.global_step < steps:
        now.global_step += 1
        control.should_training_stop = now.global_step == steps
        callback.on_step_end(args, now, control)
        if now.global_step in evaluate:
            callback.on_evaluate(args, now, control)
        if now.global_step == stop:
            break
    if tracker is not None:
        tracker.run = None
    callback.on_train_end(args, now, control)


def drawn(args) -> list[int]:
    from pathlib import Path

    return sorted(int(path.stem.removeprefix("step-")) for path in Path(args.output_dir).glob("samples/step-*.png"))


@pytest.mark.parametrize(
    ("every", "run", "steps"),
    [
        (None, {}, [0, 6]),
        (None, {"evaluate": (2, 4, 6)}, [0, 2, 4, 6]),
        (4, {"evaluate": (2, 6)}, [0, 4, 6]),
        (None, {"begin_at": 3, "evaluate": (4,)}, [4, 6]),  # resumed: the start is not drawn again
        (None, {"stop": 5}, [0, 5]),
    ],
)
def test_when_the_fixed_prompts_are_drawn(args, every, run, steps):
    drawer = Drawer()
    train(sampling(drawer, every=every), args, **run)
    assert drawn(args) == steps
    assert drawer.times == len(steps)


def test_an_evaluation_outside_of_training_draws_nothing(args):
    drawer = Drawer()
    sampling(drawer).on_evaluate(args, state(), TrainerControl())
    assert drawer.times == 0


def test_what_a_drawing_leaves(args, tmp_path):
    wandb = Wandb()
    train(sampling(Drawer(), trackers(wandb_callback(wandb))), args, tracker=wandb)
    folder = tmp_path / "run" / "samples" / "step-000006"
    assert sorted(path.name for path in folder.iterdir()) == ["00.png", "01.png", "02.png", "samples.json"]
    with Image.open(folder / "01.png") as picture:
        assert picture.size == (16, 8)
        assert picture.getpixel((0, 0)) == (2, 2, 2)
    record = json.loads((folder / "samples.json").read_text())
    assert record["step"] == 6
    assert record["prompts"][0] == "a cat"
    assert record["rewards"] == [0.25, None, None]
    assert record["by_name"] == {"<lambda>": [0.25, None, None]}
    assert [log["train/global_step"] for log in wandb.logs] == [0, 6]
    with Image.open(folder.with_suffix(".png")) as grid:
        assert list(grid.tobytes()) == list(wandb.logs[1]["samples"].picture.tobytes())


def test_a_drawing_takes_the_place_of_an_earlier_one_and_of_a_broken_one(args, tmp_path):
    samples = tmp_path / "run" / "samples"
    for name in ("step-000000", "_step-000000"):
        (samples / name).mkdir(parents=True)
        (samples / name / "99.png").write_bytes(b"")
    train(sampling(Drawer()), args, steps=0)
    assert not (samples / "_step-000000").exists()
    assert not (samples / "step-000000" / "99.png").exists()
    assert (samples / "step-000000" / "02.png").exists()


def test_a_model_that_fails_is_not_hidden_and_leaves_nothing(args, tmp_path):
    def fail(prompts):
        raise RuntimeError("out of memory")

    callback = sampling(Drawer())
    callback.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        train(callback, args)
    assert not (tmp_path / "run").exists()


def test_other_processes_draw_nothing(args):
    drawer = Drawer()
    callback = sampling(drawer)
    callback.on_train_begin(args, state(is_world_process_zero=False), TrainerControl())
    assert drawer.times == 0


def test_no_rows_no_drawing(args):
    callback = SampleImagesCallback(None, None, [], trackers())
    train(callback, args)
    assert drawn(args) == []


def test_every_nought_steps_is_refused():
    with pytest.raises(ValueError, match="`every` is 0"):
        SampleImagesCallback(None, None, [], trackers(), every=0)


# -- what is trained on -----------------------------------------------------------------------------------------------


def scored(groups=2, size=3, **fields) -> ScoredImages:
    number = groups * size
    rewards = torch.arange(number, dtype=torch.float64) / 10
    rewards[1] = math.nan
    values = {
        "round": 5,
        "images": torch.arange(number, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 256, 128) * 20,
        "rows": [
            {"prompt": f"[red]a[/red] {i // size}", "text": "A", "points": 1.5, "reward": "clash", "list": [1]}
            for i in range(number)
        ],
        "rewards": rewards,
        "by_name": {"ocr": rewards, "pick": torch.full((number,), math.nan)},
        "advantages": torch.arange(number, dtype=torch.float64) - 1,
        "group_index": torch.arange(groups).repeat_interleave(size),
        "x0": torch.randn(number, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
        "extra": {"read": [f"CAF{i}" for i in range(number)], "mixed": [1, "x", None, 2.5, True, "y"][:number]},
    }
    return ScoredImages(**{**values, **fields})


def roll_out(callback, args, step=40, sent=None, at=None, **fields):
    at = at or state(step, logging_steps=args.logging_steps)
    callback.on_rollout(args, at, TrainerControl(), scored(**fields), sent or trackers())


def kept(args) -> list[str]:
    from pathlib import Path

    return sorted(path.name for path in Path(args.output_dir).glob("completions/*"))


def test_the_images_are_kept_as_a_data_set(args, tmp_path):
    roll_out(CompletionsCallback(), args)
    assert kept(args) == ["completions-000040.parquet"]
    path = str(tmp_path / "run" / "completions" / "completions-000040.parquet")
    rows = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path))
    assert rows.column_names == [
        *("step", "round", "group", "prompt", "text", "points", "read", "mixed"),
        *("reward", "rewards/ocr", "rewards/pick", "advantage", "image"),
    ]
    assert rows[4]["prompt"] == "[red]a[/red] 1"
    assert (rows[4]["step"], rows[4]["round"], rows[4]["group"], rows[4]["points"]) == (40, 5, 1, 1.5)
    assert (rows[4]["read"], rows[4]["mixed"]) == ("CAF4", "True")
    assert (rows[4]["reward"], rows[4]["rewards/ocr"], rows[4]["advantage"]) == (0.4, 0.4, 3.0)
    assert rows[4]["rewards/pick"] is None
    assert rows[1]["reward"] is None
    assert rows[4]["image"].size == (64, 128)
    assert rows[4]["image"].getpixel((9, 9)) == (80, 80, 80)
    assert rows.features["rewards/pick"].dtype == rows.features["reward"].dtype == "float64"


def test_a_table_is_printed(args, capsys):
    roll_out(CompletionsCallback(), args)
    out = capsys.readouterr().out
    assert "Step 40, round 5: 6 of 6 images" in out
    assert out.count("[red]a[/red]") == 6  # a prompt is no markup
    for column in ("group", "prompt", "ocr", "pick", "reward", "advantage"):
        assert column in out
    assert "0.400" in out


def test_the_table_has_all_groups_alike_best_first(args):
    wandb = Wandb()
    sent = trackers(wandb_callback(wandb))
    roll_out(CompletionsCallback(4), args, sent=sent, groups=2, size=8, extra={})
    [log] = wandb.logs
    column = log["completions"].columns.index
    table = [(row[column("group")], row[column("reward")]) for row in log["completions"].data]
    assert table == [(0, 0.5), (0, 0.0), (1, 1.3), (1, 0.9)]
    assert log["train/global_step"] == 40


@pytest.mark.parametrize(("limit", "number"), [(None, 6), (100, 6), (2, 2), (0, 0)])
def test_as_many_rows_are_printed_as_are_asked_for(args, capsys, limit, number):
    roll_out(CompletionsCallback(limit), args)
    assert capsys.readouterr().out.count("[red]a[/red]") == number
    assert kept(args) == ["completions-000040.parquet"]


@pytest.mark.parametrize(
    ("logging", "steps"),
    [
        ({"logging_steps": 1}, [0, 2, 4, 6, 8]),
        ({"logging_steps": 5}, [4, 8]),  # steps 5 and 10 end in the rounds that begin at 4 and 8
        ({"logging_steps": 5, "logging_first_step": True}, [0, 4, 8]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_it_acts_where_trainer_logs(tmp_path, logging, steps):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **logging)
    args.steps_per_round = 2
    for step in range(0, 10, 2):
        roll_out(CompletionsCallback(0), args, step)
    assert kept(args) == [f"completions-{step:06d}.parquet" for step in steps]


def test_other_processes_keep_no_images(args):
    roll_out(CompletionsCallback(), args, at=state(40, logging_steps=2, is_world_process_zero=False))
    assert kept(args) == []


def test_without_rich_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match="pip install rich"):
        CompletionsCallback()


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_every_round_is_kept_as_a_set_to_train_on(tmp_path):
    from tiny_trainers import tiny_trainer

    def train(at, save_in, **config):
        config = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1, **config}
        picture = Image.new("RGB", (2, 2))  # of which a set keeps nothing
        rows = [{"prompt": prompt, "text": prompt.upper(), "picture": picture} for prompt in "abc"]
        prompts = datasets.Dataset.from_list(rows)
        trainer = tiny_trainer(
            tmp_path / at, callbacks=[SaveRolloutsCallback(tmp_path / save_in)], train_dataset=prompts, **config
        )
        trainer.train(resume_from_checkpoint=config.get("resume_from_checkpoint"))
        return trainer

    trainer = train("run", "kept")
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files == [f"round-00000{round}.parquet" for round in range(3)]
    dataset = load_rollouts(tmp_path / "kept")
    assert len(dataset) == 48
    saved, record = SavedGroups(dataset), trainer.buffer.record
    assert saved.sizes.tolist() == [4] * 12
    last = [saved.read(group, [0, 1, 2, 3]) for group in range(8, 12)]
    assert torch.equal(torch.cat([read.rewards.float() for read in last]), record.rewards)
    assert torch.equal(torch.stack([x0 for read in last for x0 in read.x0]), record.x0)
    assert [saved[group]["text"] for group in range(8)] == [saved[group]["prompt"].upper() for group in range(8)]
    # A run that goes on keeps the rounds before its checkpoint, sets the others aside and writes them anew.
    first, second, third = ((tmp_path / "kept" / name).read_bytes() for name in files)
    (tmp_path / "kept" / files[1]).write_bytes(b"of the interrupted run")
    (tmp_path / "kept" / "round-000009.parquet").write_bytes(b"of its future")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    train("run", "kept", resume_from_checkpoint=checkpoint, max_steps=4)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["_earlier-1", *files[:2]]
    aside = tmp_path / "kept" / "_earlier-1"
    assert sorted(path.name for path in aside.iterdir()) == [*files[1:], "round-000009.parquet"]
    assert (tmp_path / "kept" / files[0]).read_bytes() == first
    assert (tmp_path / "kept" / files[1]).read_bytes() == second
    # Within a round, the round is the checkpoint's.
    train("run", "kept", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert (tmp_path / "kept" / files[1]).read_bytes() == second
    assert (tmp_path / "kept" / files[2]).read_bytes() == third
    assert not (tmp_path / "kept" / "_earlier-2").exists()
    # One that begins anew does not mix with them.
    train("other", "kept", max_steps=2)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["_earlier-1", "_earlier-2", files[0]]
    assert (tmp_path / "kept" / files[0]).read_bytes() == first


def test_rounds_of_which_each_has_other_values_are_read_as_one_set(tmp_path):
    def keep(round, **columns):
        rows = [{"prompt": "a", **columns}] * 6
        callback.on_rollout(args, state(), TrainerControl(), scored=scored(round=round, rows=rows), train_dataset=[])

    args = TrainingArguments(output_dir=str(tmp_path))
    args.steps_per_round = 1
    callback = SaveRolloutsCallback(tmp_path)
    keep(0, number=1, text="T")
    keep(1, number=0.5, text=None)
    callback = SaveRolloutsCallback(tmp_path)  # of a run that goes on
    callback.on_train_begin(args, state(2), TrainerControl())
    keep(2, text="U", new=1)
    rows = load_rollouts(tmp_path)
    assert (rows["number"][::6], rows["text"][::6]) == ([1.0, 0.5, None], ["T", None, "U"])


def test_a_round_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    callback, args = SaveRolloutsCallback(tmp_path / "kept"), TrainingArguments(output_dir=str(tmp_path))
    callback.on_rollout(args, state(), TrainerControl(), scored=scored())
    before = (tmp_path / "kept" / "round-000005.parquet").read_bytes()

    def break_off(dataset, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("datasets.Dataset.to_parquet", break_off)
    for round in (5, 6):
        with pytest.raises(OSError, match="no space left"):
            callback.on_rollout(args, state(), TrainerControl(), scored=scored(round=round))
    assert len(load_rollouts(tmp_path / "kept")) == 6
    assert (tmp_path / "kept" / "round-000005.parquet").read_bytes() == before


def test_rollouts_are_the_main_processs_to_write(tmp_path):
    callback, args = SaveRolloutsCallback(tmp_path / "kept"), TrainingArguments(output_dir=str(tmp_path))
    callback.on_rollout(args, state(is_world_process_zero=False), TrainerControl(), scored=scored())
    assert not (tmp_path / "kept").exists()
