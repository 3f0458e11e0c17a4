"""The house: which module stands on which floor, and imports only go down."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "trl_dgpo"

# A name is a file or a folder at the package's top. What is not there yet is only planned.
FLOORS = [
    {"noising", "advantages", "losses", "rollout", "seeding", "run_files", "coco", "image_measures"},
    {"policy", "backbones", "rewards", "prompts", "prompt_embeds", "rollout_dataset", "sampler", "tiny"},
    {"ddpo_compat", "hub", "callbacks", "guards", "faults", "checkpoints", "evaluation", "report", "engines", "plan"}
    | {"field_types"},
    {"trainer"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SCRIPTS = {"tiny/build.py"}  # run, never imported: it may use the whole package
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imports(file: str) -> set[str]:
    """Absolute names of all that a file imports, also inside functions, e.g. `trl_dgpo.rewards.scoring.Scores`."""
    names = set()
    folder = ("trl_dgpo/" + file).split("/")[:-1]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def rooms_used(file: str) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("trl_dgpo.")} - {room(file), "__version__"}


def test_every_file_has_a_floor():
    strangers = {room(file) for file in FILES} - FLOOR.keys() - {"__init__"}
    assert not strangers, f"{strangers} stand on no floor: find them one in FLOORS. There is no `utils`."


@pytest.mark.parametrize("file", [file for file in FILES if room(file) != "__init__" and file not in SCRIPTS])
def test_imports_go_down(file):
    # Files of one floor do not import one another; those of one folder may.
    upward = {name for name in rooms_used(file) if name not in FLOOR or FLOOR[name] >= FLOOR[room(file)]}
    assert not upward, f"{file} imports {upward} of its own floor or of one above."


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in FLOORS[0]])
def test_the_ground_floor_is_torch_alone(file):
    foreign = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names
    assert foreign <= {"torch"}
    assert not rooms_used(file)


def test_a_trainer_builds_on_dgpo_alone():
    for file in FILES:
        if room(file) == "trainer" and file != "trainer/__init__.py":
            used = {name.split(".")[2] for name in imports(file) if name.startswith("trl_dgpo.trainer.")}
            own = Path(file).stem.removesuffix("_trainer").removesuffix("_config")
            below = {"base_trainer"} if own == "dgpo" else {"dgpo_trainer"} if own != "base" else set()
            assert used <= {*below, "dgpo_config", f"{own}_config"}, file


def test_scripts_are_never_imported():
    modules = {"trl_dgpo." + script.removesuffix(".py").replace("/", ".") for script in SCRIPTS}
    for file in FILES:
        assert not any(name == module or name.startswith(module + ".") for name in imports(file) for module in modules)


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("diffusers", {"backbones", "tiny", "trainer"}),  # the trainer passes a pipeline on
        ("trl", {"trainer", "callbacks", "hub", "ddpo_compat", "cli"}),
        ("datasets", {"rollout_dataset", "prompts", "prompt_embeds", "trainer", "cli", "hub"}),
        ("httpx2", {"rewards"}),
    ],
)
def test_each_library_is_known_in_few_places(library, rooms):
    knowing = {room(file) for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    assert knowing <= rooms


def test_the_reader_of_imports_reads_them_all():
    assert "trl_dgpo.rollout.Rollout" in imports("rollout_dataset.py")
    assert "trl_dgpo.noising" in imports("backbones/flow.py")
    assert rooms_used("trainer/base_trainer.py") >= {"evaluation", "rewards", "policy", "backbones"}


def test_no_source_holds_control_characters():
    # A "\\frac" that was written without its backslash is a form feed, and nobody sees it.
    texts = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md"), *(PACKAGE.parent / "docs").rglob("*.md")]
    control = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
    assert len(texts) > len(FILES)
    assert not [path.name for path in texts if control.search(path.read_text(encoding="utf-8"))]


def test_the_face_is_quick():
    # Without torch, hence without everything heavy; and every export is there.
    code = "import sys, trl_dgpo; print({'torch', 'transformers', 'diffusers', 'peft', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
