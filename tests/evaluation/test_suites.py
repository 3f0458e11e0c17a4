"""Suites: intervals that are what they say, tables as papers count them, and folders that are gone on with."""

import gc
import json
import logging
import math
import re
import shutil
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from trl_dgpo.evaluation import suites
from trl_dgpo.evaluation.comparison import as_markdown, as_text, compare, estimate, table
from trl_dgpo.evaluation.models import labelled, model_record
from trl_dgpo.evaluation.suites import SUITES, SuiteEvaluation, suite_rows
from trl_dgpo.prompts import PROMPT_SETS
from trl_dgpo.rewards import BUILT_IN


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
    assert set(results["versions"]) == {"trl-dgpo", "torch", "diffusers", "transformers"}
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


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_killed_in_the_middle_of_a_line(whole, tmp_path, cut):
    file = tmp_path / "whole" / "lora" / "scores" / "shade.jsonl"
    text = file.read_bytes()
    file.write_bytes(text[:-cut])
    models, reward = {"base": Model(0), "lora": Model(7)}, Shade()
    assert str(evaluation(tmp_path / "whole", models, reward).run()) == str(whole)
    assert reward.scored == 2  # the last part
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
    monkeypatch.setattr(suites, "version", lambda name: "9.9")
    with caplog.at_level(logging.WARNING):
        evaluation(tmp_path / "whole")
    assert "'torch': '9.9'" in caplog.text


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
    assert better.scored == 8  # of both models the part with the failures
    assert (reward["num_images"], reward["failed"], reward["not_applicable"]) == (8, 0, 2)


def test_a_reward_that_only_fails_stops_the_evaluation(tmp_path):
    def broken(images, **kwargs):
        raise OSError("no model")

    with pytest.raises(RuntimeError, match="`shade` failed for 4 images in a row"):
        evaluation(tmp_path, reward=broken).run()
    assert len(list((tmp_path / "lora" / "images").iterdir())) == 10
    assert evaluation(tmp_path).run()["models"]["base"]["rewards"]["shade"]["failed"] == 0


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
    assert names == {"shade.jsonl", "shade.rank1.jsonl", "statistics.jsonl", "statistics.rank1.jsonl"}
    # One process goes on with what two began.
    alone = {"base": Model(0), "lora": Model(7)}
    assert str(evaluation(tmp_path / "two", alone).run()) == str(whole)
    assert alone["base"].drawn == []


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
