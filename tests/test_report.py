"""One page that says what a run did, asks no network for anything, and believes no prompt."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from trl_dgpo.report import write_report


EVIL = '</script><script>alert("1")</script><!-- <img src=x onerror=alert(1)> & \u2028 "quoted"'


def picture(red, size=(16, 8)) -> Image.Image:
    return Image.new("RGB", size, (red, 60, 90))


def jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def write_log(directory, steps=40, every=10):
    lines = [{"eval_reward": 0.25, "eval_reward_stderr": 0.02, "eval_images/contrast": 0.2, "epoch": 0, "step": 0}]
    for step in range(1, steps + 1):
        reward = 0.25 + 0.01 * step
        lines.append({"loss": -0.001 * step, "reward": reward, "gate_mean": 0.5, "time/rollout": 1.5, "step": step})
        if step % every == 0:
            evaluated = {"eval_reward": reward, "eval_reward_stderr": 0.02, "eval_images/contrast": 0.2 + step / 400}
            lines.append({**evaluated, "eval_num_images": 96, "step": step})
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(directory, steps=(0, 10, 20, 30, 40), prompts=("a cat", EVIL), size=(16, 8)):
    for step in steps:
        folder = directory / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for number in range(len(prompts)):
            picture(step + number, size).save(folder / f"{number:02d}.png")
        rewards = [0.01 * step, *[None] * (len(prompts) - 1)]
        record = {"step": step, "prompts": list(prompts), "rewards": rewards, "by_name": {"ocr": rewards}}
        (folder / "samples.json").write_text(json.dumps(record))


def write_groups(directory, steps=(0, 20, 40), groups=3, images=4, prompt=EVIL):
    (directory / "completions").mkdir()
    for step in steps:
        rows = []
        for group in range(groups):
            for number in range(images):
                reward = None if number == 3 else 0.1 * number
                advantage = 0.0 if reward is None else float(number - 1)
                image = {"bytes": jpeg(picture(40 * number)), "path": None}
                row = {"step": step, "round": step // 2, "group": group, "prompt": f"{prompt} {group}"}
                rows.append({**row, "reward": reward, "rewards/ocr": reward, "advantage": advantage, "image": image})
        parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"completions/completions-{step:06d}.parquet")


def write_run(directory):
    run = {
        "method": "DGPO",
        "base_model": "tiny <b>",
        "rewards": ["ocr"],
        "config": {"max_steps": 40, "beta": 100.0, "negative_prompt": EVIL},
        "versions": {"torch": "2.13"},
    }
    (directory / "run.json").write_text(json.dumps(run))


@pytest.fixture
def whole_run(tmp_path):
    directory = tmp_path / "run-1"
    directory.mkdir()
    for write in (write_run, write_log, write_samples, write_groups):
        write(directory)
    return directory


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, and the data in it."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += text

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def read(directory) -> Reader:
    return Reader(write_report(directory).read_text(encoding="utf-8"))


def chart(data, title) -> dict:
    [found] = [chart for chart in data["charts"] + data["more"] if chart["title"] == title]
    return {series["name"]: series["points"] for series in found["series"]}


def test_a_page_stands_beside_the_run_or_where_it_is_asked_for(whole_run, tmp_path):
    assert write_report(whole_run) == whole_run / "report.html"
    elsewhere = tmp_path / "pages" / "one.html"
    assert write_report(str(whole_run), str(elsewhere)) == elsewhere
    assert elsewhere.read_text() == (whole_run / "report.html").read_text()
    assert not list(tmp_path.rglob("_*"))


def test_the_page_asks_nothing_of_a_network(whole_run):
    page = write_report(whole_run).read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]  # a name, which is never fetched
    sources = [v for _, attributes in Reader(page).elements for k, v in attributes.items() if k in ("src", "href")]
    assert sources == ["data:,"]
    assert "default-src 'none'" in page


def test_prompts_are_text_and_nothing_else(whole_run):
    page = write_report(whole_run).read_text(encoding="utf-8")
    reader = Reader(page)
    assert [tag for tag, _ in reader.elements].count("script") == 2
    assert not [tag for tag, attributes in reader.elements if "onerror" in attributes]
    assert page.count("<!--") == 0
    assert reader.data["samples"]["steps"][0]["images"][1]["prompt"] == EVIL
    assert reader.data["groups"]["steps"][0]["groups"][2]["prompt"] == f"{EVIL} 2"


def test_curves_have_what_was_logged(whole_run):
    data = read(whole_run).data
    reward = chart(data, "Reward")
    assert reward["rollouts"][0] == [1, 0.26, None]
    assert reward["held-out prompts"] == [[0, 0.25, 0.02], *[[s, 0.25 + s / 100, 0.02] for s in (10, 20, 30, 40)]]
    assert chart(data, "Statistics of evaluation images") == {
        "contrast": [[0, 0.2, None], [10, 0.225, None], [20, 0.25, None], [30, 0.275, None], [40, 0.3, None]]
    }
    assert chart(data, "Loss")["loss"][-1] == [40, -0.04, None]


def test_after_a_resume_the_last_entry_of_a_step_holds(tmp_path):
    lines = [
        {"reward": 0.1, "loss": 1.0, "step": 1},
        {"reward": 0.2, "loss": 1.0, "step": 2},
        {"eval_reward": 0.5, "step": 2},
        {"reward": 0.3, "loss": 1.0, "step": 2},  # resumed at 1
        {"reward": None, "loss": 1.0, "step": 3},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"reward": 0.9, "lo')  # and killed while it wrote
    reward = chart(read(tmp_path).data, "Reward")
    assert reward == {"rollouts": [[1, 0.1, None], [2, 0.3, None]], "held-out prompts": [[2, 0.5, None]]}


def test_a_run_whose_rewards_all_failed_has_a_page(tmp_path):
    entry = {"eval_reward": None, "reward": None, "loss": 0.5, "step": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(entry))
    assert [one["title"] for one in read(tmp_path).data["charts"]] == ["Loss"]


def test_other_numbers_are_drawn_below(tmp_path):
    other = {"ocr/exact": 0.5, "eval_ocr/exact": 0.4}
    (tmp_path / "log.jsonl").write_text(
        json.dumps({"step": 1, "reward": 1.0, "epoch": 1, "train_runtime": 3, **other})
    )
    data = read(tmp_path).data
    assert [one["title"] for one in data["charts"]] == ["Reward"]
    assert [one["title"] for one in data["more"]] == ["ocr/exact"]
    assert chart(data, "ocr/exact") == {"rollouts": [[1, 0.5, None]], "held-out prompts": [[1, 0.4, None]]}


def test_one_reward_alone_is_no_chart_of_its_own(tmp_path):
    entry = {"rewards/ocr/mean": 0.5, "eval_rewards/ocr/mean": 0.4, "reward": 0.5, "eval_reward": 0.4, "step": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(entry))
    data = read(tmp_path).data
    assert [one["title"] for one in data["charts"] + data["more"]] == ["Reward"]


def test_several_rewards_and_evaluations_have_their_own_curves(tmp_path):
    entry = {"rewards/ocr/mean": 0.5, "rewards/pick/mean": 0.2, "eval_long_rewards/ocr/mean": 0.4, "step": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps({**entry, "eval_long_reward": 0.4, "eval_short_reward": 0.6}))
    data = read(tmp_path).data
    assert chart(data, "Each reward").keys() == {"ocr", "pick", "held-out ocr"}
    assert chart(data, "Reward").keys() == {"held-out prompts (long)", "held-out prompts (short)"}


def test_what_the_guards_measured_has_charts(tmp_path):
    rollouts = {"images/contrast": 0.2, "images/colour_entropy": 2.5, "images_vs_base/contrast": -2.5}
    numbers = {"guard/alarms": 1, "kl": 0.02, "kl_coef": 0.1, "divergence": 0.03, "eval_images/colour_entropy": 2.4}
    (tmp_path / "log.jsonl").write_text(json.dumps({**rollouts, **numbers, "step": 1}))
    data = read(tmp_path).data
    assert chart(data, "Statistics of rollouts").keys() == {"contrast"}
    assert chart(data, "Colour entropy").keys() == {"rollouts", "held-out prompts"}
    assert chart(data, "Rollouts against the base model").keys() == {"contrast"}
    for title in ("Signs out of range", "Weight of the KL term", "Distance to the base model"):
        assert len(chart(data, title)) == 1
    assert not data["more"]


def test_before_and_after_stand_at_the_top(whole_run):
    page = write_report(whole_run).read_text(encoding="utf-8")
    assert '<span class="from">0.250</span> &rarr; 0.650 <span class="change up">+0.400</span>' in page
    assert "96 images, standard error 0.020" in page
    assert "<th>images/contrast</th><td>0.2</td><td>0.3</td><td>+0.1</td>" in page
    assert "at step <b>40</b> of 40" in page
    assert "tiny &lt;b&gt;" in page


def test_images_are_in_the_page(whole_run):
    data = read(whole_run).data
    uri = data["samples"]["steps"][2]["images"][1]["src"]
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.getpixel((3, 3)) == (21, 60, 90)
    rewards = [image["reward"] for image in data["samples"]["steps"][2]["images"]]
    assert rewards == [0.2, None]


def test_large_images_are_made_smaller(tmp_path):
    write_samples(tmp_path, steps=(0,), size=(1024, 512))
    [step] = read(tmp_path).data["samples"]["steps"]
    content = base64.b64decode(step["images"][0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(content)).size == (320, 160)


def test_a_group_is_sorted_by_reward_and_masked_images_come_last(whole_run):
    group = read(whole_run).data["groups"]["steps"][-1]["groups"][1]
    assert group["group"] == 1
    assert [(image["reward"], image["advantage"]) for image in group["images"]] == [
        (0.2, 1.0),
        (0.1, 0.0),
        (0.0, -1.0),
        (None, 0.0),
    ]


def test_a_long_run_is_thinned_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_dgpo.report.GROUP_IMAGES", 60)
    write_samples(tmp_path, steps=range(0, 500, 10))
    write_groups(tmp_path, steps=range(30), groups=9)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    data = Reader(page).data
    steps = [step["step"] for step in data["samples"]["steps"]]
    assert (len(steps), steps[0], steps[-1]) == (24, 0, 490)
    assert "24 of 50 steps are on this page, evenly spaced." in page
    rounds = data["groups"]["steps"]
    assert (len(rounds), rounds[0]["step"], rounds[-1]["step"]) == (12, 0, 29)
    assert "12 of 30 rounds are on this page, evenly spaced. Of each at most 1 of 9 groups are shown." in page


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_run, ["has no <code>log.jsonl</code> yet", "<code>num_log_images</code>", "log_completions=True"]),
        (write_log, ["no <code>run.json</code>", "<code>num_log_images</code>", "log_completions=True"]),
        (write_samples, ["has no <code>log.jsonl</code> yet", "log_completions=True"]),
        (write_groups, ["has no <code>log.jsonl</code> yet", "<code>num_log_images</code>"]),
    ],
)
def test_what_is_missing_is_left_out_with_the_option_that_makes_it(tmp_path, write, said):
    write(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for sentence in said:
        assert sentence in page


def test_without_evaluation_the_page_says_how_to_have_it(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert "<code>eval_dataset</code>" in write_report(tmp_path).read_text()


def test_unfinished_files_are_not_read(whole_run):
    (whole_run / "samples" / "_step-000050").mkdir()
    (whole_run / "samples" / "_step-000050" / "samples.json").write_text("{")
    (whole_run / "completions" / "_completions-000050.parquet").write_bytes(b"PAR1")
    assert read(whole_run).data["samples"]["of"] == 5


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run of this package"):
        write_report(tmp_path)


# -- in a browser -----------------------------------------------------------------------------------------------------


def chromium(tmp_path, page, *flags) -> subprocess.CompletedProcess:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium")
    command = [binary, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--window-size=1280,2400", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.browser
def test_in_a_browser(whole_run, tmp_path):
    done = chromium(tmp_path, write_report(whole_run), "--dump-dom")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    reader = Reader(done.stdout)
    tags = [tag for tag, _ in reader.elements]
    sliders = [attributes.get("aria-label") for tag, attributes in reader.elements if tag == "input"]
    assert sliders[:1] + sliders[-1:] == ["step of the fixed prompts", "step of the groups"]
    assert tags.count("figure") == 2 + 4  # the last step's prompts, the first group of the last round
    assert tags.count("polyline") == 6
    assert tags.count("polygon") == 1  # the standard error
    assert tags.count("option") == 3
    text = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "step 40, mean reward 0.400" in text
    assert "step 40, round 20" in text
    assert text.count('class="card masked"') == 1
    assert tags.count("script") == 2  # none out of a prompt
    assert not [tag for tag, attributes in reader.elements if "onerror" in attributes]
    assert ">&lt;/script&gt;&lt;script&gt;alert" in text


@pytest.mark.browser
def test_the_slider_and_the_browser_of_groups_move(whole_run, tmp_path):
    page = write_report(whole_run)
    act = """
    const [samples, groups] = ["step of the fixed prompts", "step of the groups"].map(
      (name) => document.querySelector(`input[aria-label="${name}"]`));
    for (const range of [samples, groups]) { range.value = 1; range.dispatchEvent(new Event("input")); }
    document.getElementById("beside").click();
    document.querySelector('button[aria-label="next group"]').click();
    const plot = document.querySelector(".chart svg"), box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
    """
    content = page.read_text(encoding="utf-8").replace("</body>", f"<script>{{ {act} }}</script></body>")
    page.write_text(content, encoding="utf-8")
    done = chromium(tmp_path, page, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "step 10, mean reward 0.100" in done.stdout
    assert "step 20, round 10" in done.stdout
    assert [tag for tag, _ in Reader(done.stdout).elements].count("img") == 2 * 2 + 4
    assert re.search(r'class="prompt">[^<]* 1</p>', done.stdout)
    assert "step <b>18</b>" in done.stdout  # under the pointer: the axis of 0 to 40 begins right of the chart's edge
    assert "held-out prompts <b>0.45 \u00b1 0.02</b> (step 20)" in done.stdout
