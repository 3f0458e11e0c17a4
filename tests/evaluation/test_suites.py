"""Suites: intervals that are what they say, tables as papers count them, and folders that are gone on with."""

import gc
import json
import logging
import math
import os
import re
import shutil
import threading
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_random_pipeline

from trl_dgpo.backbones.sd3 import SD3Backbone
from trl_dgpo.cli import main
from trl_dgpo.evaluation import suites
from trl_dgpo.evaluation.comparison import as_markdown, as_text, compare, estimate, table
from trl_dgpo.evaluation.models import check_models, labelled, model_record, reward_record
from trl_dgpo.evaluation.suites import SUITES, SuiteEvaluation, suite_rows
from trl_dgpo.policy import lora_config
from trl_dgpo.prompts import PROMPT_SETS
from trl_dgpo.rewards import BUILT_IN, get_reward


gc.freeze()  # every evaluation collects garbage: most of its time here, without this

NAN = math.nan
FAILED = math.inf


def column(*values: float) -> torch.Tensor:
    """One image a prompt."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def half_width(interval) -> float:
    return (interval.high - interval.low) / 2


def test_the_interval_of_a_mean_is_its_standard_errors(sample):
    whole = estimate(sample)
    assert whole.mean == pytest.approx(sample.mean().item())
    standard_error = sample.std(correction=0).item() / math.sqrt(len(sample))
    assert half_width(whole) == pytest.approx(1.96 * standard_error, rel=0.05)
    assert (whole.low + whole.high) / 2 == pytest.approx(whole.mean, abs=0.1 * standard_error)


def test_images_of_one_prompt_are_one_piece_of_evidence(sample):
    copies = sample.repeat(1, 4)
    assert estimate(copies) == pytest.approx(estimate(sample))
    noise = torch.randn(400, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert half_width(estimate(noise)) == pytest.approx(1.96 / math.sqrt(1600), rel=0.05)


def test_draws_do_not_depend_on_the_call_or_the_global_generator(sample):
    first = estimate(sample)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert estimate(sample) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_paired_difference_is_narrower(sample):
    other = sample + 0.1 * torch.randn(400, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    paired = estimate(other - sample)
    assert paired.mean == pytest.approx(0.3, abs=0.02)
    assert half_width(paired) == pytest.approx(1.96 * 0.1 / 20, rel=0.1)
    unpaired = math.hypot(half_width(estimate(sample)), half_width(estimate(other)))
    assert half_width(paired) < 0.1 * unpaired


def test_equal_values_have_an_interval_of_no_width():
    assert estimate(torch.full((7, 3), 0.3, dtype=torch.float64)) == (0.3, 0.3, 0.3)


def test_one_prompt_has_no_interval():
    whole = estimate(torch.tensor([[0.0, 1.0]]))
    assert whole.mean == 0.5
    assert math.isnan(whole.low)
    assert math.isnan(whole.high)
    assert all(math.isnan(number) for number in estimate(column(NAN, NAN)))
    assert math.isnan(estimate(column(0.0, 1.0), torch.tensor([0, 1]), mean_of_strata=True).low)  # one of each


def test_what_is_missing_is_left_out():
    assert estimate(torch.tensor([[1.0, NAN], [0.0, 0.5], [NAN, NAN]])).mean == 0.5


def test_strata_keep_their_sizes():
    # All spread lies between the strata: drawn within them, nothing moves.
    values, strata = column(*[0.0] * 10, *[1.0] * 30), torch.tensor([0] * 10 + [1] * 30)
    assert estimate(values, strata) == pytest.approx((0.75, 0.75, 0.75))
    assert estimate(values, strata, mean_of_strata=True) == pytest.approx((0.5, 0.5, 0.5))
    assert half_width(estimate(values)) > 0.1


def test_a_mean_of_strata_has_the_interval_of_its_parts():
    stream = torch.Generator().manual_seed(3)
    values = torch.randn(500, 1, generator=stream, dtype=torch.float64)
    strata = torch.tensor([0] * 100 + [1] * 400)
    whole = estimate(values, strata, mean_of_strata=True)
    means = [values[strata == s].mean().item() for s in (0, 1)]
    errors = [values[strata == s].std().item() / math.sqrt((strata == s).sum()) for s in (0, 1)]
    assert whole.mean == pytest.approx(sum(means) / 2)
    assert half_width(whole) == pytest.approx(1.96 * math.hypot(*errors) / 2, rel=0.07)


# -- tables -----------------------------------------------------------------------------------------------------------

# Two tags of unequal size, two images of each prompt. Of "single": 1 1 | 1 0; of "counting": 0 0.
TAGS = ["single", "single", "counting"]
BASE_SCORES = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
LORA_SCORES = torch.tensor([[1.0, 1.0], [FAILED, 1.0], [1.0, NAN]], dtype=torch.float64)


def compared(mean_of_tags=True, **scores):
    by_label = {label: {"geneval": values} for label, values in scores.items()}
    measures = {
        label: torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(i)) for i, label in enumerate(scores)
    }
    results = compare(by_label, measures, TAGS, mean_of_tags=mean_of_tags)
    settings = {"num_prompts": 3, "num_images": 2}
    return {"settings": settings, "sources": {}, "versions": {}, "mean_of_tags": mean_of_tags, **results}


def test_genevals_result_is_the_mean_of_its_tags():
    base = compared(base=BASE_SCORES)["models"]["base"]["rewards"]["geneval"]
    assert base["mean"] == pytest.approx((3 / 4 + 0 / 2) / 2)  # not 3/6, the mean of the images
    assert compared(mean_of_tags=False, base=BASE_SCORES)["models"]["base"]["rewards"]["geneval"]["mean"] == 0.5
    assert (base["correct"], base["num_images"], base["failed"], base["not_applicable"]) == (3, 6, 0, 0)
    assert base["prompts_correct"] == pytest.approx(2 / 3)
    assert {tag: (part["correct"], part["num_images"]) for tag, part in base["tags"].items()} == {
        "single": (3, 4),
        "counting": (0, 2),
    }


def test_what_failed_is_counted_and_never_a_zero():
    lora = compared(base=BASE_SCORES, lora=LORA_SCORES)["models"]["lora"]["rewards"]["geneval"]
    assert lora["mean"] == 1.0
    assert (lora["num_images"], lora["failed"], lora["not_applicable"]) == (4, 1, 1)
    assert lora["tags"]["counting"]["num_images"] == 1


def test_a_difference_is_over_the_images_that_both_have():
    difference = compared(base=BASE_SCORES, lora=LORA_SCORES)["differences"]["lora"]["rewards"]["geneval"]
    # Both: 1 - 1, 1 - 1, 1 - 0 | 1 - 0, one image of the failed prompt and one of the last are left out.
    assert difference["num_images"] == 4
    assert difference["tags"]["single"]["mean"] == pytest.approx(1 / 3)
    assert difference["mean"] == pytest.approx((1 / 3 + 1) / 2)


def test_the_table():
    text = as_text(table(compared(base=BASE_SCORES, lora=LORA_SCORES)))
    lines = {re.split(r" {2,}", line.strip())[0]: re.split(r" {2,}", line.strip())[1:] for line in text.splitlines()}
    assert lines["3 prompts x 2"] == ["base", "lora", "lora - base"]
    assert lines["geneval, mean of tags"][0].startswith("0.375 [")
    assert lines["single"][:2] == ["0.750 (3/4)", "1.000 (3/3)"]
    assert lines["counting"] == ["0.000 (0/2)", "1.000 (1/1)", "+1.000"]  # of one prompt, no interval
    assert lines["images correct"] == ["0.500 (3/6)", "1.000 (4/4)"]
    assert lines["prompts with one correct"] == ["0.667", "1.000"]
    assert lines["images failed"] == ["0", "1"]
    assert lines["images not applicable"] == ["0", "1"]
    assert {"darkness", "contrast", "saturation", "colour_spread"} < lines.keys()


def test_a_mean_says_of_how_many_tags_it_is():
    whole = LORA_SCORES.nan_to_num(0.0, posinf=0.0)
    without = torch.cat([whole[:2], torch.full((1, 2), NAN, dtype=torch.float64)])
    lines = as_text(table(compared(base=without, lora=without))).splitlines()
    assert lines[1].startswith("geneval, mean of 1 of 2 tags  ")
    assert re.fullmatch(r"  counting +- +- +-", next(line for line in lines if "counting" in line))
    one_of_them = as_text(table(compared(base=whole, lora=without)))
    assert "\ngeneval, mean of 1 or 2 of 2 tags  " in one_of_them
    assert "nan" not in one_of_them


def test_image_statistics_are_drawn_within_tags():
    measures = torch.zeros(40, 1, 6)
    measures[10:] = 1.0  # all spread lies between the tags
    scores = {"base": {"r": column(*[0.5] * 40)}}
    tags = ["few"] * 10 + ["many"] * 30
    images = compare(scores, {"base": measures}, tags)["models"]["base"]["images"]
    assert images["darkness"] == {"mean": 0.75, "interval": [0.75, 0.75]}
    low, high = compare(scores, {"base": measures})["models"]["base"]["images"]["darkness"]["interval"]
    assert low < 0.7 < 0.8 < high


def test_a_score_between_has_no_correct_images():
    results = compared(base=BASE_SCORES + 0.1)
    assert "correct" not in results["models"]["base"]["rewards"]["geneval"]
    assert "images correct" not in as_text(table(results))
    # One model's scores may be whole by chance: the table says the same of both.
    assert "images correct" not in as_text(table(compared(base=BASE_SCORES, lora=BASE_SCORES + 0.1)))


def test_the_page_has_the_whole_table():
    results = compared(base=BASE_SCORES, lora=LORA_SCORES)
    lines = as_markdown(results).splitlines()
    assert [line.count("|") for line in lines if line.startswith("|")] == [5] * (len(table(results)) + 1)


# -- folders ----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"prompt {i}", "tag": "even" if i % 2 == 0 else "odd", "shade": 20 * i} for i in range(5)]


class Model:
    """Draws a grey picture whose shade is the prompt's, and counts; may be killed after so many calls."""

    def __init__(self, offset: int, calls: int = 1000):
        self.offset, self.calls = offset, calls
        self.drawn: list[str] = []

    @contextmanager
    def __call__(self):
        yield self.generate

    def generate(self, prompts, num_images=1):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.drawn += prompts
        shades = [20 * int(prompt.split()[1]) + self.offset + i for prompt in prompts for i in range(num_images)]
        return torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


class Shade:
    """Brightness, exactly; may be killed after so many calls."""

    def __init__(self, calls: int = 1000, name="shade"):
        self.calls, self.scored, self.__name__ = calls, 0, name

    def __call__(self, images, shade, **kwargs):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.scored += len(images)
        return [image.getpixel((0, 0))[0] / 255 for image in images]


def evaluation(folder, models=None, reward=None, **changes):
    arguments = {
        "models": models or {"base": Model(0), "lora": Model(7)},
        "rewards": {"shade": reward or Shade()},
        "num_images": 2,
        "settings": {"steps": 4},
        "sources": {"base": "x", "lora": "y"},
        **changes,
    }
    rows = arguments.pop("rows", ROWS)
    return SuiteEvaluation(folder, rows, **arguments)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(suites, "_IMAGES_AT_ONCE", 4)  # two prompts of two images


@pytest.fixture
def whole(tmp_path):
    """An evaluation that nothing interrupted."""
    return evaluation(tmp_path / "whole").run()


def written(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }


def test_an_evaluation_is_in_its_folder(whole, tmp_path):
    folder = tmp_path / "whole"
    shades = [20 * p + i for p in range(5) for i in range(2)]
    assert whole["models"]["base"]["rewards"]["shade"]["mean"] == pytest.approx(sum(shades) / 10 / 255)
    difference = whole["differences"]["lora"]["rewards"]["shade"]
    assert [difference["mean"], *difference["interval"]] == pytest.approx([7 / 255] * 3)
    assert whole["models"]["base"]["images"]["darkness"]["mean"] == pytest.approx(sum(s < 64 for s in shades) / 10)
    assert len(list((folder / "lora" / "images").iterdir())) == 10
    picture = Image.open(folder / "lora" / "images" / "00003-1.png")
    assert picture.getpixel((0, 0)) == (68, 68, 68)
    lines = (folder / "base" / "scores" / "shade.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"prompt": 1, "image": 1, "value": 21 / 255}
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["base"]["rewards"]["shade"]["tags"]["odd"]["num_images"] == 4
    assert results["models"]["base"]["images"]["colour_spread"]["interval"] == [None, None]
    assert results["settings"]["num_prompts"] == 5
    assert results["versions"]["torch"] == [torch.__version__]
    assert {"trl-dgpo", "torch", "diffusers", "transformers"} <= results["versions"].keys()
    assert Image.open(folder / "grid.png").width > 5 * 96
    assert "| shade |" in (folder / "results.md").read_text()


def test_a_second_run_does_nothing_but_count(whole, tmp_path):
    models, reward = {"base": Model(0), "lora": Model(7)}, Shade()
    before = written(tmp_path / "whole")
    assert str(evaluation(tmp_path / "whole", models, reward).run()) == str(whole)
    assert (models["base"].drawn, models["lora"].drawn, reward.scored) == ([], [], 0)
    assert written(tmp_path / "whole") == before


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_killed_while_sampling(whole, tmp_path, calls):
    killed = {"base": Model(0, calls), "lora": Model(7)}
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path / "killed", killed).run() if calls < 3 else evaluation(
            tmp_path / "killed", {"base": Model(0), "lora": Model(7, 1)}
        ).run()
    models = {"base": Model(0), "lora": Model(7)}
    assert str(evaluation(tmp_path / "killed", models).run()) == str(whole)
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    # A part is two prompts: what was drawn of the first part is not drawn again.
    drawn = {0: (5, 5), 1: (3, 5), 3: (0, 3)}[calls]
    assert (len(models["base"].drawn), len(models["lora"].drawn)) == drawn


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_killed_between_sampling_and_scoring_or_later(whole, tmp_path, calls):
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path / "killed", reward=Shade(calls)).run()
    models, reward = {"base": Model(0), "lora": Model(7)}, Shade()
    assert str(evaluation(tmp_path / "killed", models, reward).run()) == str(whole)
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    assert models["base"].drawn == models["lora"].drawn == []
    assert reward.scored == 20 - {0: 0, 1: 4, 4: 14}[calls]


@pytest.mark.parametrize("cut", range(1, 130, 9))
def test_killed_in_the_middle_of_a_line(whole, tmp_path, cut):
    file = tmp_path / "whole" / "lora" / "scores" / "shade.jsonl"
    text = file.read_bytes()
    file.write_bytes(text[:-cut])
    lost = 10 - text[:-cut].count(b"\n")
    models, reward = {"base": Model(0), "lora": Model(7)}, Shade()
    assert str(evaluation(tmp_path / "whole", models, reward).run()) == str(whole)
    assert reward.scored == lost
    assert models["lora"].drawn == []
    entries = [json.loads(line) for line in file.read_text().splitlines()]  # no line is half
    assert {(e["prompt"], e["image"]) for e in entries} == {(p, i) for p in range(5) for i in range(2)}


def test_a_lost_picture_is_drawn_again(whole, tmp_path):
    picture = tmp_path / "whole" / "lora" / "images" / "00004-1.png"
    pixels = picture.read_bytes()
    picture.unlink()
    beside = picture.with_name("00004-0.png")
    shutil.copy(picture.with_name("00003-0.png"), beside)  # as other rounding would change it
    kept = beside.read_bytes()
    picture.with_name("_00004-1.png").write_bytes(pixels[:20])  # as a kill leaves it
    evaluation(tmp_path / "whole").run()
    assert picture.read_bytes() == pixels
    assert beside.read_bytes() == kept  # what was scored stays what it was
    assert not picture.with_name("_00004-1.png").exists()


def test_another_reward_and_another_model_later(whole, tmp_path):
    models = {"base": Model(0), "new": Model(9)}
    rewards = {"shade": Shade(), "a/b.py:twice": Shade(name="twice")}
    sources = {"base": "x", "new": "z"}
    results = evaluation(tmp_path / "whole", models, rewards=rewards, sources=sources).run()
    assert models["base"].drawn == []
    assert len(models["new"].drawn) == 5
    assert (rewards["shade"].scored, rewards["a/b.py:twice"].scored) == (10, 20)
    assert set(results["models"]) == {"base", "new"}
    assert "\nb.py:twice " in as_text(table(results))
    assert results["sources"] == sources  # of what is shown
    assert "`'y'`" not in (tmp_path / "whole" / "results.md").read_text()
    # The earlier model is still known.
    assert str(evaluation(tmp_path / "whole").run()["models"]) == str(whole["models"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"steps": 5}}, "steps is 5, was 4"),
        ({"settings": {"steps": 4, "sampler": "sde"}}, "sampler is 'sde', was None"),
        ({"num_images": 3}, "num_images is 3, was 2"),
        ({"rows": ROWS[:4]}, "num_prompts is 4, was 5; prompts_sha256 is"),
        ({"rows": [*ROWS[:4], {**ROWS[4], "shade": 9}]}, "holds another evaluation: prompts_sha256 is"),
        ({"sources": {"base": "x", "lora": "Y"}}, "models/lora is 'Y', was 'y'"),
    ],
)
def test_a_folder_is_of_one_evaluation(whole, tmp_path, changes, message):
    before = written(tmp_path / "whole")
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluation(tmp_path / "whole", **changes)
    assert written(tmp_path / "whole") == before


def test_other_versions_are_told(whole, tmp_path, monkeypatch, caplog):
    def versions():
        return json.loads((tmp_path / "whole" / "suite.json").read_text())["versions"]["torch"]

    evaluation(tmp_path / "whole").run()
    assert not caplog.records
    monkeypatch.setattr(suites, "version", lambda name: "9.9")
    for _ in range(2):  # the pictures stay what they are, and so does the warning
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            results = evaluation(tmp_path / "whole").run()
        assert f"'torch': ['{torch.__version__}', '9.9']" in caplog.text
        assert versions() == results["versions"]["torch"] == [torch.__version__, "9.9"]
    monkeypatch.undo()
    evaluation(tmp_path / "whole")
    assert versions() == [torch.__version__, "9.9"]


def test_a_reward_that_has_changed_is_not_mixed_with_its_scores(tmp_path):
    folder = tmp_path / "suite"
    rewards = {"a/b.py:shade": Shade(), "ocr": Shade(name="ocr")}

    def run(changed):
        sources = {"a/b.py:shade": {"sha256": changed}, "ocr": {"name": "ocr"}}
        return evaluation(folder, rewards=rewards, reward_sources=sources).run()

    run("1")
    before = written(folder)
    with pytest.raises(ValueError, match=r"Reward `a/b.py:shade` has changed .*'2'.* was .*'1'") as refused:
        run("2")
    assert written(folder) == before
    files = re.search(r"Delete its scores, (\S+)", str(refused.value)).group(1)
    for file in folder.glob(str(Path(files).relative_to(folder))):
        file.unlink()
    assert rewards["ocr"].scored == 20
    run("2")
    assert (rewards["a/b.py:shade"].scored, rewards["ocr"].scored) == (40, 20)
    with pytest.raises(ValueError, match="has changed"):
        run("1")


def test_a_reward_may_have_any_name_and_a_label_that_of_a_folder(tmp_path):
    rewards = {name: Shade(name=name) for name in ("statistics", "+statistics", "..")}
    results = evaluation(tmp_path / "suite", rewards=rewards).run()
    assert [r["num_images"] for r in results["models"]["base"]["rewards"].values()] == [10, 10, 10]
    for label in ("", ".", "..", "a/b", "/a"):
        with pytest.raises(ValueError, match="must be the name of a folder"):
            evaluation(tmp_path / "other", {"base": Model(0), label: Model(1)})
    assert not (tmp_path / "other").exists()


def test_a_failing_rewards_images_are_counted_and_tried_again(tmp_path):
    def shaky(images, prompts, **kwargs):
        values = {"prompt 1": math.nan, "prompt 2": None}
        return [values.get(prompt, 1.0) for prompt in prompts]

    results = evaluation(tmp_path, reward=shaky).run()
    reward = results["models"]["base"]["rewards"]["shade"]
    assert (reward["mean"], reward["num_images"], reward["failed"], reward["not_applicable"]) == (1.0, 6, 2, 2)
    text = as_text(table(results))
    assert re.search(r"images failed +2 +2", text)
    assert re.search(r"images not applicable +2 +2", text)
    lines = (tmp_path / "base" / "scores" / "shade.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines[2:6]] == ["nan", "nan", None, None]

    better = Shade()
    reward = evaluation(tmp_path, reward=better).run()["models"]["base"]["rewards"]["shade"]
    assert better.scored == 4  # of both models the failures alone
    assert (reward["num_images"], reward["failed"], reward["not_applicable"]) == (8, 0, 2)


def test_a_reward_that_only_fails_stops_the_evaluation(tmp_path):
    def broken(images, **kwargs):
        raise OSError("no model")

    with pytest.raises(RuntimeError, match="`shade` failed for 4 images in a row"):
        evaluation(tmp_path, reward=broken).run()
    assert len(list((tmp_path / "lora" / "images").iterdir())) == 10
    assert evaluation(tmp_path).run()["models"]["base"]["rewards"]["shade"]["failed"] == 0


def test_images_that_always_fail_do_not_block_an_evaluation(tmp_path):
    class Fails(Shade):
        def __call__(self, images, prompts, **kwargs):
            values = super().__call__(images, **kwargs)
            return [math.nan if p in self.bad else v for p, v in zip(prompts, values, strict=True)]

    alone = Fails()
    alone.bad = {"prompt 4"}  # the last part's only image
    for asked in (10, 2):
        before = alone.scored
        results = evaluation(tmp_path / "one", reward=alone, num_images=1).run()
        assert results["models"]["lora"]["rewards"]["shade"]["failed"] == 1
        assert alone.scored - before == asked
    pair = Fails()
    pair.bad = {"prompt 4"}  # all two images of the last part: that is told once for each model
    for _ in range(2):
        with pytest.raises(RuntimeError, match="`shade` failed for 2 images in a row"):
            evaluation(tmp_path / "two", reward=pair).run()
    results = evaluation(tmp_path / "two", reward=pair).run()
    assert results["models"]["lora"]["rewards"]["shade"]["failed"] == 2


def test_what_cannot_be_is_told_before_the_folder_is_taken(tmp_path):
    def needs(images, text, **kwargs):
        return [1.0] * len(images)

    with pytest.raises(ValueError, match=r"`shade` cannot be measured here\. .* needs \['text'\]"):
        evaluation(tmp_path / "new", reward=needs)
    for changes in ({"num_images": 0}, {"rows": []}):
        with pytest.raises(ValueError, match="at least one each"):
            evaluation(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def rank(number: int, barriers=None):
    return SimpleNamespace(
        process_index=number, num_processes=2, wait_for_everyone=barriers.wait if barriers else lambda: None
    )


def test_two_processes_share_the_work(whole, tmp_path):
    barrier = threading.Barrier(2, timeout=30)
    models = [{"base": Model(0), "lora": Model(7)} for _ in range(2)]
    rewards = [Shade(), Shade()]
    results = [None, None]

    def work(number):
        results[number] = evaluation(
            tmp_path / "two", models[number], rewards[number], processes=rank(number, barrier)
        ).run()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1] is None
    assert str(results[0]) == str(whole)
    assert [m["lora"].drawn for m in models] == [["prompt 0", "prompt 2", "prompt 4"], ["prompt 1", "prompt 3"]]
    assert [reward.scored for reward in rewards] == [12, 8]
    names = {path.name for path in (tmp_path / "two" / "base" / "scores").iterdir()}
    assert names == {"shade.jsonl", "shade.rank1.jsonl", "+statistics.jsonl", "+statistics.rank1.jsonl"}
    # One process goes on with what two began.
    alone = {"base": Model(0), "lora": Model(7)}
    assert str(evaluation(tmp_path / "two", alone).run()) == str(whole)
    assert alone["base"].drawn == []


def test_a_failure_of_another_number_of_processes_does_not_stay(whole, tmp_path):
    class Fails(Shade):
        def __call__(self, images, **kwargs):
            return [math.nan, *super().__call__(images, **kwargs)[1:]]

    barrier = threading.Barrier(2, timeout=30)

    def work(number, reward):
        models = {"base": Model(0), "lora": Model(7)}
        evaluation(tmp_path / "two", models, reward, processes=rank(number, barrier)).run()

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, Shade()), (1, Fails()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = evaluation(tmp_path / "two", {"base": Model(0), "lora": Model(7)}).run()
    assert str(again) == str(whole)  # though the other process's file still says so


def test_the_self_test_leaves_no_model_behind(tmp_path):
    class Heavy(Shade):
        loaded: list[weakref.ref] = []

        def __call__(self, images, **kwargs):
            self.model = torch.nn.Linear(1, 1)
            self.loaded.append(weakref.ref(self.model))
            return super().__call__(images, **kwargs)

        def __getstate__(self):
            return {key: value for key, value in self.__dict__.items() if key != "model"}

    tested = evaluation(tmp_path / "suite", reward=Heavy())
    tested.self_test(8, 8)
    assert len(Heavy.loaded) == 1
    assert Heavy.loaded[0]() is None
    tested.run()
    asked = len(Heavy.loaded)
    evaluation(tmp_path / "suite", reward=Heavy()).self_test(8, 8)
    assert len(Heavy.loaded) == asked  # it has scored everything


def test_a_model_is_gone_before_the_next_one_comes(tmp_path):
    class Weights:
        alive: list[weakref.ref]

        def __init__(self):
            self.trainer = self  # as trainers and their callbacks hold one another

        def generate(self, prompts, num_images=1):
            return torch.zeros(len(prompts) * num_images, 3, 4, 4, dtype=torch.uint8)

    Weights.alive = []

    @contextmanager
    def load():
        assert all(reference() is None for reference in Weights.alive)
        weights = Weights()
        Weights.alive.append(weakref.ref(weights))
        yield weights.generate

    evaluation(tmp_path, {"base": load, "lora": load}).run()
    assert len(Weights.alive) == 2


# -- the suites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_prompts_and_rewards(name):
    assert set(SUITES[name].rewards) <= BUILT_IN.keys()
    rows = suite_rows(name, 12)
    assert len(rows) == 12
    assert rows == PROMPT_SETS[name]("test", 12)
    assert json.loads(json.dumps(rows)) == rows
    if SUITES[name].mean_of_tags:
        assert len({row["tag"] for row in suite_rows(name)}) == 6


def test_a_suite_that_is_not_there():
    with pytest.raises(ValueError, match="There is no suite 'genval'; there are geneval, ocr"):
        suite_rows("genval")


def test_labels_of_loras_are_short_and_differ():
    loras = ["out/run", "user/run", "out/run/checkpoint-5", "base", "here/"]
    assert list(labelled(loras, taken="base")) == ["run", "run-2", "run-checkpoint-5", "base-2", "here"]


def test_labels_of_loras_are_folders_names(tmp_path, monkeypatch):
    here = tmp_path / "run" / "checkpoint-2"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert list(labelled([".", "..", "../../run"], taken="base")) == ["run-checkpoint-2", "run", "run-2"]
    monkeypatch.chdir(here.parent)
    assert list(labelled(["checkpoint-2", "./checkpoint-2/"], taken="base")) == [
        "run-checkpoint-2",
        "run-checkpoint-2-2",
    ]


def test_a_loras_weights_are_part_of_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="in which there is no LoRA"):
        model_record(str(tmp_path), is_lora=True)
    with pytest.raises(ValueError, match="which does not exist"):
        model_record(str(tmp_path / "none"), is_lora=True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a")
    before = model_record(str(tmp_path), is_lora=True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"b")
    assert model_record(str(tmp_path), is_lora=True) != before
    assert model_record("user/lora", is_lora=True) == {"name": "user/lora"}
    assert model_record("tiny", is_lora=False) == {"name": "tiny"}


def test_a_pipelines_weights_are_part_of_what_it_is(tmp_path):
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"a")
    before = model_record(str(tmp_path), is_lora=False)
    assert model_record(str(tmp_path), is_lora=False) == before
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # as training on writes the same number of bytes
    changed = model_record(str(tmp_path), is_lora=False)
    assert changed != before
    weights.write_bytes(b"ab")
    os.utime(weights, ns=(0, changed["transformer"][weights.name][1]))
    assert model_record(str(tmp_path), is_lora=False) != changed


@pytest.mark.parametrize("file", ["model_index.json", "adapter_config.json"])
def test_an_ids_commit_is_part_of_what_it_is(tmp_path, file):
    repository = tmp_path / "models--user--model"
    for commit in ("1" * 40, "2" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / file).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    record = model_record("user/model", is_lora=False, cache_dir=str(tmp_path))
    assert record == {"name": "user/model", "commit": "1" * 40}
    old = model_record("user/model", is_lora=False, revision="2" * 40, cache_dir=str(tmp_path))
    assert old["commit"] == "2" * 40
    assert model_record("user/other", is_lora=True, cache_dir=str(tmp_path)) == {"name": "user/other"}


def test_a_rewards_file_is_part_of_what_it_is(tmp_path, monkeypatch):
    file = tmp_path / "some_rewards.py"
    file.write_text("def f(**kwargs): return [1.0]")
    names = [f"{file}:f", "some_rewards:f", "some_rewards.f"]
    monkeypatch.syspath_prepend(tmp_path)
    get_reward("some_rewards:f")
    before = [reward_record(name) for name in names]
    assert [reward_record(name) for name in names] == before
    file.write_text("def f(**kwargs): return [2.0]")
    assert all(reward_record(name)["sha256"] != record["sha256"] for name, record in zip(names, before, strict=True))
    for name in ("ocr", "http://127.0.0.1:8000/ocr", "builtins:len"):
        assert reward_record(name) == {"name": name}


# -- LoRAs that fit ---------------------------------------------------------------------------------------------------


def lora_folder(folder: Path, kind: str, **changes) -> str:
    """A LoRA of the tiny transformer, or of one like it, in either format."""
    transformer = tiny_random_pipeline().transformer
    if changes:
        transformer = type(transformer).from_config({**transformer.config, **changes})
    model = get_peft_model(transformer, lora_config(SD3Backbone.LORA_TARGETS))
    if kind == "peft":
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        weights = {
            name.replace("base_model.model.", "transformer."): tensor.contiguous()
            for name, tensor in get_peft_model_state_dict(model).items()
        }
        save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_random_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["peft", "diffusers"])
def test_only_loras_that_fit_are_taken(base, tmp_path, kind):
    good = lora_folder(tmp_path / "good", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_models(base, [good])
    layers = tiny_random_pipeline().transformer.config
    wide = lora_folder(tmp_path / "wide", kind, attention_head_dim=2 * layers.attention_head_dim)
    with pytest.raises(ValueError, match=r"wide', which cannot be put onto .*size mismatch") as refused:
        check_models(base, [good, wide])
    assert "\n" not in str(refused.value)
    deep = lora_folder(tmp_path / "deep", kind, num_layers=layers.num_layers + 1)
    with pytest.raises(ValueError, match=r"deep', which does not fit .* Give the base"):
        check_models(base, [deep])


def test_files_that_are_no_lora_are_refused(base, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"lora_unet_x.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="it has 0 tensors for a transformer"):
        check_models(base, [str(tmp_path)])
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="which cannot be put onto"):
        check_models(base, [str(tmp_path)])
    with pytest.raises(ValueError, match="'user/lora', which cannot be put onto"):
        check_models(base, ["user/lora"])  # nothing in the cache, and no network


def test_a_lora_does_not_go_onto_a_lora(base, tmp_path):
    lora = lora_folder(tmp_path / "lora", "peft")
    check_models(lora, [])  # itself, on the base that its configuration names
    check_models("tiny", [])
    with pytest.raises(ValueError, match=r"a LoRA itself\. Give its base as `model`"):
        check_models(lora, [lora])
    with pytest.raises(ValueError, match="'/no/where' does not exist"):
        check_models("/no/where", [])


# -- what the command hands on ----------------------------------------------------------------------------------------


def test_the_command_checks_and_records(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SuiteEvaluation, "run", lambda self: None)  # nothing is drawn, nor loaded
    monkeypatch.setattr("accelerate.PartialState.destroy_process_group", lambda self: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("def grey(images, **kwargs): return [0.0] * len(images)")
    widths = tiny_random_pipeline().transformer.config
    lora_folder(tmp_path / "wide", "peft", attention_head_dim=2 * widths.attention_head_dim)
    lora_folder(tmp_path / "good", "peft")

    def told(*flags) -> str:
        given = ["--model", base, "--suite", "tiny-ocr", "--rewards", "my.py:grey", "--reward_self_test", "false"]
        code = main(["evaluate", *given, "--use_cpu", "true", "--bf16", "false", *flags])
        printed = capsys.readouterr().err.strip()
        assert code == (2 if "error: " in printed else 0)
        return printed

    assert "wide', which cannot be put onto" in told("--lora", "good", "wide")
    assert not (tmp_path / "evaluation").exists()
    told("--lora", "good", "--load_in_4bit", "true")
    record = json.loads((tmp_path / "evaluation" / "tiny-ocr" / "suite.json").read_text())
    assert record["rewards"] == {"my.py:grey": reward_record("my.py:grey")}
    assert record["models"] == {
        "base": model_record(base, is_lora=False),
        "good": model_record("good", is_lora=True),
    }
    assert record["models"]["base"].keys() == {"name", "transformer"}
    assert record["settings"]["quantization"]["bnb_4bit_compute_dtype"] == "float32"
    for flags in ("", "--load_in_8bit true", "--load_in_4bit true --bnb_4bit_quant_type fp4"):
        assert "holds another evaluation: quantization is" in told(*flags.split())
