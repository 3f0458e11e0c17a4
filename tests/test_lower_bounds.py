"""The lowest versions are those that `setup.cfg` states, and what the page of versions says of them."""

import re
from pathlib import Path

import pytest
from lower_bounds import REPOSITORY, SELECTION, TOOLS, lowest


SETUP = """
[options]
install_requires =
    torch>=2.13,<3
    # a remark
    numpy>=2
[options.extras_require]
ocr =
    rapidocr>=3.10,<4
dev =
    pytest>=9
    %(ocr)s
"""


def test_each_requirement_at_its_lowest_version():
    assert lowest(SETUP) == ["torch==2.13", "numpy==2", "pytest==9"]


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch==2.13"])
def test_a_requirement_without_a_lower_bound_is_told(line):
    with pytest.raises(ValueError, match=f"{line!r} in setup.cfg has no lower bound"):
        lowest(SETUP.replace("torch>=2.13,<3", line))


def test_the_page_of_versions_says_what_is_stated():
    page = (REPOSITORY / "docs" / "compatibility.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([\w]+) \| ([\d.]+) \|", page, re.M))
    stated = dict(pin.split("==") for pin in lowest((REPOSITORY / "setup.cfg").read_text(encoding="utf-8")))
    assert told == {name: version for name, version in stated.items() if name not in TOOLS}


def test_the_selection_is_there():
    assert not [name for name in SELECTION if not (Path(__file__).parent / name).exists()]
