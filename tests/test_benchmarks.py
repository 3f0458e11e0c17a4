"""The benchmarks measure what they say."""

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_random_pipeline
from tiny_trainers import relative_error, scramble, weights

from trl_dgpo.noising import trainable_levels


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablations  # noqa: E402
import compare  # noqa: E402
import models  # noqa: E402
import naive_loop  # noqa: E402
import out_of_distribution  # noqa: E402
import results  # noqa: E402
import reward_hacking  # noqa: E402
import rewards  # noqa: E402
import rounds  # noqa: E402
import runs  # noqa: E402
import step_cost  # noqa: E402
import tdm_r1  # noqa: E402


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


@pytest.mark.slow
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


# -- the comparison of methods ----------------------------------------------------------------------------------------


def marks_of(*points: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations of `(CPU seconds, OCR)`; ten images and a hundred forwards a second."""
    return [
        {"cpu_s": s, "wall_s": s, "images": 10 * s, "steps": s, "forwards": 100 * s, "ocr": ocr, "exact": ocr / 2}
        for s, ocr in points
    ]


def test_time_to_target_by_hand():
    # Means of neighbours: .6 at 0, .65 at 5, .75 at 15, .8 at 25.
    marks = marks_of((0, 0.6), (10, 0.7), (20, 0.8), (30, 0.8))
    points = results.smooth(marks, "cpu_s")
    assert [x for x, _ in points] == [0, 5, 15, 25]
    assert [y for _, y in points] == pytest.approx([0.6, 0.65, 0.75, 0.8])
    assert results.time_to_target(marks, 0.7).value == pytest.approx(10)
    assert results.time_to_target(marks, 0.7, "images").value == pytest.approx(100)
    assert results.time_to_target(marks, 0.5) == (0, "")
    assert results.time_to_target(marks, 0.85) == (30, ">")


def test_a_peak_that_is_lost_is_no_crossing():
    # Means: .6, .7 at 5 (above), .65 at 15 (lost), .7 at 25, .8 at 35: reached between the last two.
    marks = marks_of((0, 0.6), (10, 0.8), (20, 0.5), (30, 0.9), (40, 0.7))
    assert results.time_to_target(marks, 0.7).value == pytest.approx(25)
    assert results.time_to_target(marks, 0.68).value == pytest.approx(15 + 10 * 0.03 / 0.05)
    # At the end there is no next one: the mean of the last two is what is known.
    assert results.time_to_target(marks, 0.8).value == pytest.approx(35)


def test_ratios_keep_what_they_do_not_know():
    known, beyond = results.Bound(50.0), results.Bound(150.0, ">")
    assert results.ratio(results.Bound(100.0), known) == (2.0, "")
    assert results.ratio(beyond, known) == (3.0, ">")
    assert results.ratio(known, beyond) == (pytest.approx(1 / 3), "<")
    assert results.ratio(beyond, beyond).sign == "?"


def test_a_mean_says_what_it_is_made_of():
    known, larger, smaller = results.Bound(2.0), results.Bound(4.0, ">"), results.Bound(3.0, "<")
    unknown = results.ratio(larger, larger)
    said = {
        (known, results.Bound(4.0)): "3.0 (2.0 to 4.0)",
        (2.0, 4.0): "3.0 (2.0 to 4.0)",
        (known, larger): "> 3.0 (2.0 to > 4.0)",
        (known, results.Bound(4.0), unknown): "3.0 (2.0 to 4.0, 1 unknown)",
        (known, unknown, unknown): "2.0 (2 unknown)",
        (larger, smaller, unknown): "< 3.0, > 4.0 (1 unknown)",
        (known,): "2.0",
        (unknown,): "-",
    }
    assert {values: results.mean_and_range(list(values), 1) for values in said} == said
    assert results.mean_of([known, results.Bound(4.0)]) == (3.0, "")
    assert results.mean_of([known, larger]) == (3.0, ">")
    assert results.mean_of([larger, smaller]).sign == results.mean_of([known, unknown]).sign == "?"


def test_a_verdict_needs_more_than_the_spread():
    assert results.verdict(0.05, 0.02, "+") == results.verdict(-0.05, 0.02, "-") == "agrees"
    assert results.verdict(0.01, 0.02, "0") == results.verdict(-0.02, 0.02, "0") == "agrees"
    assert results.verdict(0.05, 0.02, "0") == "agrees"  # not worse
    assert results.verdict(0.01, 0.02, "+") == results.verdict(-0.02, 0.02, "+") == "within spread"
    assert results.verdict(-0.05, 0.02, "+") == results.verdict(-0.05, 0.02, "0") == "disagrees"
    assert results.verdict(0.05, 0.02, "") == "-"


def test_a_result_at_a_smaller_budget():
    # At 30 and 40 of 0 .. 100: .8 and .8; at 15 and 20 half way up.
    marks = marks_of((0, 0.6), (20, 0.8), (100, 0.8))
    assert results.at_budget(marks, 40) == pytest.approx(0.8)
    assert results.at_budget(marks, 20) == pytest.approx((0.75 + 0.8) / 2)


QUICK = {"budget": 8.0, "longest": 16.0, "marks": 2}


def all_runs() -> list[runs.Run]:
    searched = compare.search_runs(budget=8.0, rates=(1e-3,))
    found = list(searched)
    for schedule in compare.SCHEDULES:
        best = {run.name.split(",")[0]: run for run in searched if f", {schedule}," in run.name}
        for smaller in ({}, {"prompts_per_round": 6}):
            found += compare.seed_runs(list(best.values()), (1, 2), **QUICK, **smaller)
        found += [row.run for row in all_rows(best)]
    return found


def all_rows(best: dict[str, runs.Run]) -> list[ablations.Row]:
    starts = ablations.starts(quick=True)
    saved = ablations.saved_sets(best["dgpo"], starts["stronger"], quick=True)
    return [
        *ablations.dgpo_rows(best["dgpo"], best["online_dpo"], saved),
        *ablations.gpo_rows(best["gpo"], best["online_dpo"], saved, starts["stopped"]),
    ]


def test_settings_are_configurations_of_their_trainers(tmp_path):
    for run in all_runs():
        args = runs.configuration(run, str(tmp_path))
        assert args.seed == run.seed
        assert args.lr_scheduler_type == "constant"
        # Evaluations walk the ODE of the same grid, by the same solver.
        assert (args.sigmas, args.eval_num_steps, args.eval_guidance_scale) == ("dpm", 10, 1.0)
        assert args.sampler in ("euler", "sde")


def test_methods_of_a_schedule_differ_in_nothing_but_their_own():
    own = {"sampler", "clip_range", "scale_rewards", "num_sde_steps", "beta"}
    for schedule in ("matched", "short"):
        configs = [configs[schedule] for _, configs in compare.METHODS.values()]
        shared = [{name: value for name, value in config.items() if name not in own} for config in configs]
        assert all(config == shared[0] for config in shared)
    assert all(tuple(configs) == compare.SCHEDULES for _, configs in compare.METHODS.values())
    runs_of = [
        [run for run in compare.search_runs(budget=3.0) if run.name.startswith(f"{m},")] for m in compare.METHODS
    ]
    assert {len(runs) for runs in runs_of} == {len(compare.SCHEDULES) * 5}
    assert compare.SEARCH_SEED not in compare.SEEDS


def test_levels_that_schedules_leave(tmp_path):
    backbone = runs.make_trainer(runs.Run("any", "dgpo", 1.0, 1.0), tmp_path, str(tmp_path)).backbone

    def left(config: dict) -> torch.Tensor:
        return trainable_levels(backbone.sigmas(config["sample_num_steps"]), config["t_min"], backbone.shift_factor)

    for _, configs in compare.METHODS.values():
        assert [left(configs[schedule]).tolist() for schedule in ("matched", "short")] == [[0, 1, 2]] * 2
    # The first half, of which the authors' fast form draws its window.
    assert left(compare.PUBLISHED["flow_grpo_fast_published"][1]).tolist() == [0, 1, 2, 3, 4]


def test_published_settings_are_those_of_the_configurations(tmp_path):
    for trainer, config, lora in compare.PUBLISHED.values():
        run = runs.Run("published", trainer, 1.0, 1.0, config, lora=lora)
        args, defaults = (
            runs.configuration(run, str(tmp_path)),
            runs.configuration_class(run)(output_dir=str(tmp_path)),
        )
        differing = {name for name in config if getattr(args, name) != getattr(defaults, name)}
        fast = {"clip_range", "kl_coef", "noise_level", "num_sde_steps", "t_min"}
        assert differing <= {"sampler", "per_device_train_batch_size"} | (fast if "num_sde_steps" in config else set())


def test_prompts_of_the_search_are_not_those_of_the_figures():
    report, search = ([row["text"] for row in runs.eval_prompts(name)] for name in ("report", "search"))
    assert len(set(report)) == len(set(search)) == runs.NUM_EVAL_PROMPTS
    assert set(report).isdisjoint(search)
    assert {run.evaluated_on for run in compare.search_runs(budget=1.0)} == {"search"}
    assert {run.evaluated_on for run in compare.seed_runs(compare.search_runs(budget=1.0), (1,), **QUICK)} == {
        "report"
    }


def test_a_result_is_known_by_what_was_run():
    run = runs.Run("a", "dgpo", 8.0, 4.0, {"learning_rate": 1e-3})
    assert runs.Run("b", "dgpo", 8.0, 4.0, {"learning_rate": 1e-3}).key == run.key
    others = [
        runs.Run("a", "gpo", 8.0, 4.0, {"learning_rate": 1e-3}),
        runs.Run("a", "dgpo", 8.0, 4.0, {"learning_rate": 2e-3}),
        runs.Run("a", "dgpo", 8.0, 4.0, {"learning_rate": 1e-3}, seed=1),
        runs.Run("a", "dgpo", 8.0, 4.0, {"learning_rate": 1e-3}, start=run),
        runs.Run("a", "dgpo", 9.0, 4.0, {"learning_rate": 1e-3}),
        dataclasses.replace(run, evaluated_on="search"),
        dataclasses.replace(run, start=runs.Start("stopped", 10, False, 100)),
        dataclasses.replace(run, start=runs.Start("stopped", 20, False, 100)),
        dataclasses.replace(run, saved=runs.Saved("own", 3, "tiny", {"t_min": 0.5})),
        dataclasses.replace(run, saved=runs.Saved("own", 4, "tiny", {"t_min": 0.5})),
        dataclasses.replace(run, saved=runs.Saved("own", 3, "tiny", {"t_min": 0.6})),
        dataclasses.replace(run, saved=runs.Saved("own", 3, runs.Start("stopped", 10, False, 100), {"t_min": 0.5})),
    ]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    saved = [other.saved.folder(Path()) for other in others if other.saved]
    assert len(set(saved)) == len(saved)


def test_a_reduced_run_shares_nothing_with_the_full_one():
    full, quick = ablations.starts(quick=False), ablations.starts(quick=True)
    assert {full[name].folder(Path()) for name in full}.isdisjoint(quick[name].folder(Path()) for name in quick)
    dgpo = compare.search_runs(budget=1.0)[0]
    sets = [ablations.saved_sets(dgpo, starts["stronger"], quick=starts is quick) for starts in (full, quick)]
    assert {s.folder(Path()) for s in sets[0].values()}.isdisjoint(s.folder(Path()) for s in sets[1].values())


def test_halves_of_a_warm_start_are_a_whole():
    best = {run.name.split(",")[0]: run for run in compare.search_runs(budget=8.0, rates=(1e-3,))}
    rows = [row for row in all_rows(best) if row.block == "GPO, capability"]
    spent = [row.run.budget + (row.run.start.budget if isinstance(row.run.start, runs.Run) else 0) for row in rows]
    assert spent == [8.0] * 6
    assert {row.run.start.keep for row in rows if isinstance(row.run.start, runs.Run)} == {True}


def test_a_run_stops_at_its_budget_and_counts_no_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "NUM_EVAL_PROMPTS", 3)
    monkeypatch.setattr(runs, "measure", lambda trainer, view, texts: 1 / 0)
    monkeypatch.setattr(runs, "be_quiet", lambda: None)
    config = {
        "sampler": "euler",
        "sample_num_steps": 3,
        "prompts_per_round": 2,
        "num_generations": 4,
        "num_train_timesteps": 1,
        "scale_rewards": "none",
        "learning_rate": 1e-3,
    }
    run = runs.Run("one round", "gpo", 1e-6, 1.0, config)
    result = runs.take(run, tmp_path)
    start, end = result["marks"]
    assert (start["cpu_s"], start["images"], start["forwards"], start["steps"]) == (0, 0, 0, 0)
    assert end["steps"] == 1
    assert end["images"] == 8
    # Eight rows a rollout step, and two for each image that is learned from; three passes, the first of them taken.
    assert 24 < end["forwards"] <= 24 + 2 * 8
    assert end["cpu_s"] > 0
    assert len(result["ocr_of_prompts"]) == 3
    assert result["round_bytes"] > 8 * 8 * 8 * 16 * 4  # at least the latents
    assert result["peak_bytes"] > 2**26
    assert result["commit"] == runs.commit()
    assert run.result(tmp_path) == json.loads(json.dumps(result))
    monkeypatch.setattr(runs, "in_processes", lambda function, todo, workers: [(run, 1 / 0) for run in todo])
    assert runs.take_all([run], tmp_path, 1) == []  # it is there: nothing is taken
    ends = dataclasses.replace(run, ends=True)
    with pytest.raises(ZeroDivisionError):
        runs.take(ends, tmp_path)
    assert len(ends.result(tmp_path)["marks"]) == 2  # what can fail after it does not lose it
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "in_processes", lambda function, todo, workers: [(run, "Error\nbad") for run in todo])
    assert runs.take_all([runs.Run("a", "dgpo", 1.0, 1.0)], tmp_path, 1) == ["a, seed 0: bad"]
    assert "FAILED a" in capsys.readouterr().out


def test_diversity_by_hand():
    images = torch.zeros(1, 3, 3, 2, 2, dtype=torch.uint8)
    assert out_of_distribution.diversity(images) == 0
    images[0, 2] = 255  # of the three pairs two differ, by all
    assert out_of_distribution.diversity(images) == pytest.approx(2 / 3)


def test_sharpness_by_hand():
    images = torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
    images[..., 2:] = 255  # one of three steps across, none down
    assert out_of_distribution.sharpness(images) == pytest.approx(1 / 6)


def test_unseen_words_are_unseen():
    from trl_dgpo.prompts.text import tiny_ocr_prompts

    trained = {row["text"] for row in tiny_ocr_prompts("train")}
    words = out_of_distribution.unseen_words()
    assert len(words) == out_of_distribution.NUM_PROMPTS
    assert trained.isdisjoint(words)


@pytest.mark.skipif(out_of_distribution.tesseract_version() is None, reason="tesseract is not installed")
def test_tesseract_reads_signs():
    import random

    from trl_dgpo.tiny.build import draw_sign

    texts = ["CAFE", "BLUE", "KXWZ", "TENT"]
    assert out_of_distribution.tesseract_read([draw_sign(text, random.Random(0)) for text in texts]) == texts


def write_results(folder: Path, run: runs.Run, gain: float) -> None:
    ends = [0.65 + gain * step / 10 for step in range(11)]
    end = {
        "ocr": {"held out": 0.8, "unseen words": 0.7, "three letters": 0.3},
        "tesseract": None,
        "tesseract_version": None,
        "images": {"darkness": 0.1, "contrast": 0.2, "saturation": 0.3, "colour_spread": 0.1, "sharpness": 0.4},
        "diversity": 0.1 + gain,
    }
    result = {
        "name": run.name,
        "settings": run.settings,
        "commit": "abc" if run.ends else "def",
        "marks": marks_of(*((run.budget * step / 10, ocr) for step, ocr in enumerate(ends))),
        "ocr_of_prompts": [0.5 + gain, 0.7 + gain],
        "round_bytes": 2**20,
        "peak_bytes": 2**30,
        **({"base": {**end, "diversity": 0.4}, "end": end} if run.ends else {}),
    }
    runs.write_json(run.file(folder), result)


def row_of(page: str, name: str, cells: int) -> list[str]:
    """Cells of the only line of a table that begins so and has so many."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {name} |")]
    (found,) = [line for line in lines if len(line) == cells]
    return found


def test_the_page_says_what_was_measured(tmp_path):
    searched = compare.search_runs(budget=8.0, rates=(1e-3, 2e-3, 3e-3), schedules=("matched", "own"))
    for run in searched:
        at_best = {"online_dpo": 2e-3}.get(run.name.split(",")[0], 3e-3)
        nearness = 1 - abs(run.config["learning_rate"] - at_best) * 300
        write_results(tmp_path, run, 0.1 * nearness + 0.02 * ("matched" in run.name))
    final = compare.finalists(searched, tmp_path, number=2, budget=100.0)
    assert [run.name for run in final if run.name.startswith("gpo")] == [
        *("gpo, matched, 0.003", "gpo, own, 0.003", "gpo, own, 0.002")
    ]
    for run in final:  # in the long run the search's first of one method collapses
        is_first = ", matched, " in run.name
        write_results(tmp_path, run, -0.3 if run.name.startswith("online_dpo, m") else 0.2 if is_first else 0.15)
    best = compare.best_runs(final, tmp_path)
    assert {name: run.name for name, run in best.items()} == {
        name: "online_dpo, own, 0.002" if name == "online_dpo" else f"{name}, matched, 0.003"
        for name in compare.METHODS
    }
    own = next(run for run in final if run.name == "gpo, own, 0.003")
    taken = compare.seed_runs([*best.values(), own], (1, 2), budget=100.0, longest=600.0, marks=10)
    gains = {"dgpo (matched)": 0.3, "gpo (matched)": 0.2, "gpo (own)": 0.15, "flow_grpo (matched)": 0.1}
    for run in taken:
        write_results(tmp_path, run, gains.get(run.name, 0.0) + 0.01 * run.seed)
    compare.write_record(tmp_path, searched, final, best, taken, [], quick=False)
    rows = all_rows({name: dataclasses.replace(run, budget=40.0) for name, run in best.items()})
    missing = next(row.run for row in rows if row.run.name == "SDE rollouts")
    gains = {"t_min 0": 0.2, "own noise of each image": 0.2, "GPO, from stopped early": 0.16, "hard sign": 0.1005}
    for row in rows:
        if row.run.key != missing.key:
            write_results(tmp_path, row.run, gains.get(row.run.name, 0.1))
    ablations.write_record(tmp_path, rows, 40.0, {}, ["SDE rollouts, seed 1: bad"], quick=False)

    comparison = results.Comparison(tmp_path)
    evidence = results.Ablations(tmp_path, comparison)
    page = results.write_page(comparison, evidence, tmp_path).read_text()
    assert "tesseract not installed" in page
    assert row_of(page, "SDE rollouts", 10)[1:6] == ["failed"] * 5
    assert "- SDE rollouts, seed 1: bad" in page
    assert "commits abc, def." in page

    # .65 + .31 t / 100 and .65 + .32 t / 100 reach .8, the other not: .76 and .77 or .66 and .67 at the end.
    dgpo = [100 * 0.15 / 0.31, 100 * 0.15 / 0.32]
    assert row_of(page, "dgpo (matched)", 6)[1] == "16 (16 to 16)"
    flow, published = "flow_grpo (matched)", "flow_grpo_published"
    assert [r.sign for r in comparison.ratios(flow, "dgpo (matched)", 0.80)] == [">", ">"]
    expected = [100 / t for t in dgpo]
    assert [r.value for r in comparison.ratios(flow, "dgpo (matched)", 0.80)] == pytest.approx(expected)
    assert comparison.ratio_of_means(published, "dgpo (matched)", 0.80) == (pytest.approx(600 / (sum(dgpo) / 2)), ">")
    summary = page.split("\n\n")[1].splitlines()
    assert len(summary) == 7
    assert f"; {published} > 600; " in summary[0]
    assert f" {published}: " in summary[5]
    assert " > 12.6 (> 12.4 to > 12.8) to 0.80" in summary[5]
    assert comparison.ratios(published, "dgpo_published", 0.80)[0].sign == "?"
    intervals = page.split("95 % interval")[1].split("\n\n")[0]
    assert "| gpo (own) | +0.150 |" in intervals
    assert "| dgpo_published |" in intervals
    assert f"| {published} |" not in intervals  # another budget

    chosen = [line for line in page.splitlines() if "| 0.003 |" in line or "| 0.002 |" in line]
    assert any(line.startswith("| dgpo | matched | 0.003 | 0.650 ") and "**0.840** |" in line for line in chosen)
    assert [line.count("**at the edge of the rates**") for line in chosen if "| dgpo | matched" in line] == [1]
    assert not any("edge" in line for line in chosen if line.startswith("| online_dpo"))

    # Spread of the seeds at 40 of 100: .01 x .35.
    clip = page.split("### DGPO, timestep clip, 10 rollout steps")[1]
    cells = row_of(clip.split("###")[0], "t_min 0", 13)
    assert cells[1:6] == ["0.650", "0.840", "+0.095", "0.004", "yes"]
    assert cells[7:] == ["disagrees", "40.0", "400.0", "0.200", "0.400", "0.300"]
    assert row_of(page, "hard sign", 10)[7] == "within spread"
    assert row_of(page, "own noise of each image", 10)[6:8] == ["no claim", "-"]
    assert row_of(page, "offline, own groups, against its start", 10)[3:8:4] == ["+0.095, to its start", "agrees"]
    assert row_of(page, "GPO, from stopped early", 10)[3:8:4] == ["+0.057, of the gains", "disagrees"]
    told = page.split("## Where ours disagrees")[1]
    assert (
        "- DGPO, timestep clip, 10 rollout steps, t_min 0: +0.095 against t_min 0.6, spread 0.004: **disagrees**"
        in told
    )
    assert "**agrees**" not in told
    assert row_of(page, "DGPO without the timestep clip, OCR", 4)[2] == "+0.095, spread 0.004"

    numbers = json.loads((tmp_path / "results.json").read_text())
    assert len(numbers["comparison"]["runs"]) == len({run.key for run in [*searched, *final, *taken]})
    assert numbers["ablations"]["runs"].keys() == {row.run.key for row in rows} - {missing.key}
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[-1].rstrip(")")).exists()


@pytest.mark.slow
def test_reduced_comparison_and_ablations_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare.main(["--quick"])
    ablations.main(["--quick"])
    folders = ["--comparison", "outputs/comparison-quick", "--ablations", "outputs/ablations-quick"]
    results.main([*folders, "--docs", str(tmp_path)])
    comparison = results.Comparison(Path("outputs/comparison-quick"))
    evidence = results.Ablations(Path("outputs/ablations-quick"), comparison)
    assert comparison.record["failures"] == evidence.record["failures"] == []
    assert len(comparison.methods) >= len(compare.METHODS) + len(compare.PUBLISHED)
    assert all("end" in run and run["marks"][-1]["steps"] > 0 for of in comparison.methods.values() for run in of)
    assert all(row["result"]["marks"][-1]["steps"] > 0 for row in evidence.rows)
    assert len({row["block"] for row in evidence.rows}) == 12
    assert "Reduced runs" in (tmp_path / "results.md").read_text()


def test_the_readme_says_what_the_results_do():
    page = (ROOT / "docs" / "results.md").read_text()
    lines = iter((ROOT / "README.md").read_text().splitlines())
    assert any(line.startswith("| CPU seconds to") for line in lines)
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(str.strip, lines)][1:]
    assert len(rows) == 6
    for _, *seconds, accuracy in rows:
        assert f"| {' | '.join(seconds)} |" in page
        assert f"| {accuracy} |" in page


def test_a_students_runs_differ_by_their_method_alone(tmp_path):
    taken = tdm_r1.runs_of(tdm_r1.SEEDS, budget=1.0, marks=2)
    assert [(run.name, run.seed) for run in taken] == [
        *((name, seed) for seed in tdm_r1.SEEDS for name in tdm_r1.NAMES),
        *((name, tdm_r1.SEEDS[0]) for name in tdm_r1.CONTROLS),
    ]
    for run in taken:
        config = runs.configuration(run, str(tmp_path))
        assert (config.sample_num_steps, config.eval_num_steps, config.eval_guidance_scale) == (4, 4, 1.0)
        assert config.prompts_per_round * config.num_generations == 72
    learning = [run.config.get("surrogate_learning_rate") != 0 for run in taken]
    assert learning == [run.name not in tdm_r1.CONTROLS for run in taken]


def test_a_students_table_is_of_the_last_two_evaluations(tmp_path):
    (run, *_) = tdm_r1.runs_of((1,), budget=1.0, marks=3)
    numbers = {"steps": 6, "images": 72, "forwards": 1500, "cpu_s": 1.0, "wall_s": 1.0}
    marks = [{"ocr": ocr, "exact": ocr / 2, **numbers} for ocr in (0.5, 0.4, 0.6, 0.8)]
    runs.write_json(run.file(tmp_path), {"marks": marks, "base": {}, "end": {}, "commit": "c"})
    (row,) = tdm_r1.rows_of([run], tmp_path)
    assert row["gain"] == pytest.approx(0.2)
    assert "| TDM-R1 | 1 | 0.500 | 0.400 0.600 0.800 | 0.700 | +0.200 | 0.25 to 0.35 |" in tdm_r1.table([row])
    page = tdm_r1.PAGE.read_text()
    assert page.index(tdm_r1.BEGIN) < page.index(tdm_r1.END)


# -- a reward that is gamed


def gamed(name, warned):
    log = [{"step": 0, "eval_reward": 0.7}]
    for step in range(1, 10):
        log.append({"step": step, "reward": step / 10, "images/contrast": 0.3 - step / 100, "divergence": step / 1000})
    seen = {"base": {"step": 0, "ocr": 0.7, "nearest": 0.064}, "end": {"step": 9, "ocr": 0.1}}
    if warned:
        seen["warned"] = {"step": 4, "ocr": 0.5}
    messages = ["The pictures leave."] if warned else []
    return {"name": name, "commit": "abc", "steps": 9, "seen": seen, "messages": messages, "log": log}


def test_the_page_says_when_the_guard_spoke(tmp_path, monkeypatch):
    page = tmp_path / "guards.md"
    page.write_text(f"before\n{reward_hacking.BEGIN}\nold\n{reward_hacking.END}\nafter\n")
    monkeypatch.setattr(reward_hacking, "PAGE", page)
    monkeypatch.setattr(reward_hacking, "PICTURES", tmp_path / "guards.png")
    results = [gamed("JPEG size", True), gamed("spelling", False)]
    for name, files in (("JPEG size", ("base", "warned", "end")), ("spelling", ("base", "end"))):
        folder = reward_hacking.folder_of(name, tmp_path)
        folder.mkdir()
        for file in files:
            Image.new("RGB", (12, 8)).save(folder / f"{file}.png")
    reward_hacking.draw(results, tmp_path)
    with Image.open(tmp_path / "guards.png") as picture:
        assert picture.size == (24, 2 * (4 * 12 - 4))  # the base, a warning and two ends
    reward_hacking.write_page(results)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    table, _, curves = text.partition("On the way")
    assert row_of(table, "JPEG size", 8)[1:] == ["9", "0.100 to 0.900", "0.700", "step 4", "0.500", "0.100", "0.0090"]
    assert row_of(table, "spelling", 8)[4:6] == ["none", "-"]
    assert row_of(curves, "spelling", 8)[5] == "0.700"
    assert "> The pictures leave." in text
    assert "*spelling*, 0 warnings." in text
    assert "differ by\n16 of 255" in text


def test_a_curve_has_its_ends():
    assert reward_hacking.curve(gamed("", False), "reward", digits=1) == "0.1 0.2 0.4 0.5 0.6 0.8 0.9"
    assert reward_hacking.curve(gamed("", False), "eval_reward") == "0.700"
    assert reward_hacking.curve(gamed("", False), "kl_coef") == "-"
