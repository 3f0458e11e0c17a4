"""The benchmarks measure what they say."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_random_pipeline
from tiny_trainers import relative_error, scramble, weights


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import models  # noqa: E402
import naive_loop  # noqa: E402
import rewards  # noqa: E402
import rounds  # noqa: E402
import step_cost  # noqa: E402


TINY = {"resolution": 32, "max_sequence_length": 4, "num_generations": 4, "num_train_timesteps": 2}


@pytest.mark.parametrize("clip_range", [1e-3, None])
@pytest.mark.parametrize("merge_adapter", [False, True])
def test_the_naive_loop_does_the_same_round(tmp_path, clip_range, merge_adapter):
    config = {**TINY, "clip_range": clip_range, "beta": 200.0, "kl_coef": 0.1}
    epsilon = 1e-2  # with Adam's own, a gradient of rounding errors alone moves a weight as far as any other
    pipeline = tiny_random_pipeline(sd35=True)
    naive = naive_loop.NaiveLoop(copy.deepcopy(pipeline), {**rounds.ROUND, **config})
    trainer = rounds.make_trainer(pipeline, str(tmp_path), merge_adapter=merge_adapter, adam_epsilon=epsilon, **config)
    naive.optimizer.param_groups[0]["eps"] = epsilon
    for view in (None, *trainer.policy.views):
        scramble(trainer, view, seed=len(view or ""))  # the old policy is another than the policy
    start = weights(trainer)
    mine = {name: p for name, p in naive.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(start[name])
    if clip_range:
        naive.old = [weights(trainer, "old")[name] for name in mine]

    with rounds.Rounds(trainer) as taken:
        for number in range(2):
            taken.next()
            naive.round(number)
    end = weights(trainer)
    mine = {name: p.detach() for name, p in mine.items()}
    assert relative_error(mine, end) < 1e-5
    # Of the way that they went. A rounding error can move a pixel by one of its 256 steps, hence a reward.
    ways = [{name: tensors[name] - start[name] for name in start} for tensors in (mine, end)]
    assert relative_error(*ways) < 1e-3


@pytest.fixture
def trainer(tmp_path):
    return rounds.make_trainer(tiny_random_pipeline(), str(tmp_path), **TINY)


def test_rounds_are_taken_one_at_a_time(trainer):
    with rounds.Rounds(trainer) as taken:
        assert taken.next() > 0
        assert trainer.state.global_step == 1
        assert taken.next() > 0
        assert trainer.state.global_step == 2
        log = taken.close()
    assert [entry["step"] for entry in log] == [1, 2]
    assert all(entry[f"time/{phase}"] > 0 for entry in log for phase in step_cost.PHASES)


def test_an_error_belongs_to_who_asked_for_the_round(tmp_path):
    trainer = rounds.make_trainer(tiny_random_pipeline(), str(tmp_path), **TINY)

    def broken(*args):
        raise RuntimeError("broken")

    trainer.backbone.decode = broken
    with pytest.raises(RuntimeError, match="broken"), rounds.Rounds(trainer) as taken:
        taken.next()


def test_counts_are_those_on_paper(tmp_path):
    # Two groups of four; ten steps a group; two levels; micro-batches of two, hence four of them.
    config = {**TINY, "per_device_train_batch_size": 2}
    parts = step_cost.round_parts(rounds.make_trainer(tiny_random_pipeline(), str(tmp_path), **config))
    assert {part.name: (part.count, part.authors_count) for part in parts} == {
        "encode a prompt": (2, 0),
        "encode 4 equal prompts": (0, 2),
        "sampling, 8 rows, merged": (20, 0),
        "sampling, 8 rows": (0, 20),
        "decode 4": (2, 2),
        "reward of 8": (1, 1),
        "reference, 8 rows": (2, 0),  # as many as a rollout's forward has
        "old, 8 rows, merged": (2, 0),
        "gates, 8 rows": (2, 0),  # a group is cut
        "reference, 2 rows": (0, 8),
        "old, 2 rows": (0, 8),
        "policy, with backward": (8, 8),
        "optimiser step": (1, 1),
        "merge policy": (1, 0),
        "merge old": (1, 0),
    }


def test_measuring_moves_nothing(trainer):
    parts = step_cost.round_parts(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    was_training = trainer.policy.model.training
    seconds = step_cost.time_parts(trainer, parts, least=1, enough=0.0)
    assert seconds.keys() == {part.name for part in parts}
    assert all(value > 0 for value in seconds.values())
    assert trainer.policy.model.training == was_training
    after = trainer.policy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in trainer.policy.model.parameters())


def test_floor_and_savings_by_hand():
    parts = [
        # name, phase, count, authors' count, operations, seconds before and after the round, saving
        ("merged", "rollout", 10, 0, 80, (0.8, 1.0), "merging"),
        ("adapter on", "rollout", 0, 10, 100, (1.2, 1.2), "merging"),
        ("merge", "merging", 1, 0, 0, (1.0, 1.0), "merging"),
        ("update", "update", 4, 4, 250, (2.0, 2.0), ""),
    ]
    names = ("name", "phase", "count", "authors_count", "flops", "seconds", "saving")
    result = {"parts": [dict(zip(names, part, strict=True)) for part in parts], "round": [20.0]}
    assert step_cost.floors(result) == pytest.approx([((8 + 8) + (10 + 8)) / 2])
    assert step_cost.floors(result, "authors_count") == pytest.approx([12 + 8])
    # 1000 - 800 of 2000 operations; 12 - 9 seconds, less the one that merging takes, of 20.
    assert step_cost.savings(result) == {"merging": (pytest.approx(0.1), pytest.approx(0.1))}


def test_encoding_costs_the_mid_model_what_it_costs_sd35():
    with torch.device("meta"):
        transformer = models.sd35_transformer(
            width=1536,
            num_layers=24,
            num_dual_layers=13,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            sample_size=128,
            pos_embed_max_size=384,
        )
        inputs = {
            "hidden_states": torch.zeros(1, 16, 64, 64),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 205, 4096),
            "pooled_projections": torch.zeros(1, 2048),
        }
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(2.24e9, rel=0.01)
    with torch.no_grad():
        forward = step_cost._count(lambda: transformer(**inputs))
    assert forward == pytest.approx(2.22e12, rel=0.005)
    encoding = 2 * (128 * (4.76e9 - 32128 * 4096) + 77 * (123e6 + 695e6 - 49408 * (768 + 1280)))
    assert encoding / forward == pytest.approx(0.58, abs=0.01)


def test_arguments_of_the_command_are_fields_of_the_round():
    arguments = step_cost.parse(["--model", "mid", "--clip_range", "0"])
    assert arguments.clip_range == 0
    assert all(
        value == getattr(arguments, name)
        for name, value in rounds.ROUND.items()
        if name not in ("clip_range", "beta", "seed")
    )


def test_the_rewards_benchmark_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    rewards.main(["--quick", "--output", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert [row for row in rows if row not in ("pictures", "reward", "read by")] == [
        *rewards.SIZES,
        *("OCR, 128 x 512", "waits", "waits, `async def`"),
        *("with detection", "recognition only"),
        *rewards._COSTS,
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"machine", "throughput", "overlap", "accuracy", "cost"}
    for seconds in figures["overlap"].values():
        assert 0 < seconds["sampling"][0] + seconds["scoring"][0] < seconds["in turn"][0]
    assert all(min(row["seconds"]) > 0 for row in figures["cost"].values())


@pytest.mark.parametrize(
    ("model", "millions", "digits"),
    [
        ("clip_l", 427.6, 1),
        ("clip_h", 986.1, 1),
        ("blip", 446, 0),
        ("mask2former", 68.7, 1),
        ("rt_detr", 42.9, 1),
        ("yolos", 6.5, 1),
    ],
)
def test_rewards_are_timed_at_the_published_sizes(model, millions, digits):
    with torch.device("meta"):
        number = rewards.count_parameters(getattr(rewards, model)())
    assert round(number / 1e6, digits) == millions


def test_what_is_timed_finds_what_its_row_says():
    found = rewards.find_instances(*rewards._ten_instances(), (512, 512), threshold=0.3)
    assert len(found.scores) == len({tuple(box) for box in found.boxes.tolist()}) == 10
    model = rewards._colours(quick=True)
    seen = []
    model["colours"].clip.preprocess = lambda pictures: (
        seen.extend(pictures) or torch.zeros(len(pictures), 3, 224, 224)
    )
    reward = rewards.get_reward("geneval")
    reward._load = lambda: model
    reward(["a red car"], [rewards.draw("TAXI", (512, 512))], **rewards._task(color="red"))
    assert len(seen) == 1


def assert_read(recognition_only: bool, side: int, texts: tuple[str, ...]) -> None:
    row = rewards.read_texts(rewards.reader(recognition_only), side, texts)
    assert {wanted for _, wanted in row["misread"]} <= {"7"}
    for kind in rewards.BACKGROUNDS:
        assert row[kind]["reward"] >= row[kind]["exact"] / len(texts)


@pytest.mark.parametrize(
    ("recognition_only", "side", "number"), [(False, 128, 2), (False, 512, 4), (True, 256, 12), (True, 512, 12)]
)
def test_texts_are_read_but_for_a_lone_digit(recognition_only, side, number):
    assert_read(recognition_only, side, rewards.TEXTS[12 // number - 1 :: 12 // number])


@pytest.mark.slow
@pytest.mark.parametrize("side", [128, 256, 512])
def test_all_texts_are_read_but_for_a_lone_digit(side):
    assert_read(False, side, rewards.TEXTS)


@pytest.mark.slow
def test_scaling_runs(tmp_path):
    command = ["benchmarks/scaling.py", "--model", "tiny", "--pairs", "1", "--rounds", "1"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "shared / independent" in done.stdout
