"""No setting without help, without a paragraph, or without a reader."""

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from tiny_trainers import tiny_config
from transformers import HfArgumentParser
from trl.trainer.base_config import _BaseConfig

from trl_dgpo import DGPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, FlowGRPOConfig, GPOConfig, TDMR1Config
from trl_dgpo.ddpo_compat import DDPOFields, GRPOFields


PACKAGE = Path(__file__).parents[2] / "trl_dgpo"
CONFIGS = [DGPOConfig, GPOConfig, FlowGRPOConfig, DiffusionDPOConfig, DiffusionSFTConfig, TDMR1Config]
DECLARING = [DDPOFields, GRPOFields, *CONFIGS]
INHERITED = {f.name for f in fields(_BaseConfig)}  # what Trainer reads
OURS = sorted({f.name for cls in CONFIGS for f in fields(cls)} - INHERITED)
PARAGRAPH = re.compile(r"^ {8}(\w+) \((.*)\):$", re.M)


def declared(cls: type) -> list:
    """Fields that a class declares itself, and does not only inherit."""
    return [f for f in fields(cls) if f.name in cls.__annotations__]


def documented(cls: type) -> dict[str, str]:
    """Name of each parameter in a class's docstring -> what stands in its brackets."""
    return dict(PARAGRAPH.findall(cls.__doc__))


def unread(names: list[str], sources: dict[str, str]) -> set[str]:
    """
    Names that no code reads from a configuration.

    A check does not count: a field that is only checked does nothing. `ddpo_compat.py` reads by name, so there a
    string counts too.
    """
    read = set()
    for file, source in sources.items():
        nodes = [ast.parse(source)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef) and (node.name.startswith("_check") or node.name == "__post_init__"):
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", None))
                if owner in ("args", "config") or (owner == "self" and file.endswith("_config.py")):
                    read.add(node.attr)
            elif file == "ddpo_compat.py" and isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    return set(names) - read


def package() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_every_field_is_read_somewhere():
    assert not unread(OURS, package())


@pytest.mark.parametrize(
    ("file", "source", "is_read"),
    [
        ("trainer/dgpo_config.py", "class C:\n    planted: int = 1", False),
        ("trainer/dgpo_config.py", "class C:\n    def _check(self):\n        assert self.planted", False),
        ("trainer/dgpo_config.py", "class C:\n    def steps(self):\n        return self.planted", True),
        ("evaluation.py", "def f(image): return image.planted", False),
        ("evaluation.py", "def f(args): args.planted = 1", False),
        ("evaluation.py", "def f(args): return args.planted", True),
        ("hub.py", "x = 'planted'", False),
        ("ddpo_compat.py", "x = {'planted': 'learning_rate'}", True),
    ],
)
def test_the_reader_of_readers_sees_a_planted_field(file, source, is_read):
    assert unread(["planted"], {**package(), "other.py": ""}) == {"planted"}
    assert unread(["planted"], {file: source}) == (set() if is_read else {"planted"})


@pytest.mark.parametrize("cls", DECLARING)
def test_every_field_has_help_and_a_paragraph(cls):
    assert not [f.name for f in declared(cls) if not f.metadata.get("help")]
    # What is only redeclared for its help need not be told again.
    told = documented(cls).keys()
    changed = {f.name for f in declared(cls) if f.name not in INHERITED or f.default != _default_above(cls, f.name)}
    untold, unknown = changed - told, told - {f.name for f in fields(cls)}
    assert not untold
    assert not unknown


def _default_above(cls: type, name: str):
    for base in cls.__mro__[1:]:
        if name in getattr(base, "__dataclass_fields__", {}):
            return base.__dataclass_fields__[name].default
    return MISSING


@pytest.mark.parametrize("cls", DECLARING)
def test_a_paragraph_tells_the_default(cls):
    defaults = {f.name: f.default for f in fields(cls)}
    told = {}
    for name, text in documented(cls).items():
        default = re.search(r"defaults to `(.*)`", text)
        assert "*optional*" in text or default is None, name
        told[name] = None if default is None else ast.literal_eval(default[1])
    assert told == {name: defaults[name] for name in told}


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_renders(cls):
    text = HfArgumentParser(cls).format_help()  # a bare % in a help raises here
    assert all(f"--{f.name}" in text for f in fields(cls) if f.name in OURS)


@pytest.mark.parametrize(
    "name",
    sorted({f.name for f in fields(DGPOConfig) if f.name in OURS and "choices" in f.metadata})
    + ["loss_type", "scale_rewards", "mixed_precision"],
)
@pytest.mark.parametrize("cls", CONFIGS)
def test_a_choice_that_there_is_not_is_refused(tmp_path, cls, name):
    given = {"loss_type": cls._loss_types[0], "num_generations": cls.num_generations, name: "nonsense"}
    with pytest.raises(ValueError, match=f"`{name}` is 'nonsense'.* must be"):
        tiny_config(tmp_path, cls, **given)
