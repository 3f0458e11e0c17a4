"""Each code block of README, CONTRIBUTING and docs/ runs or is checked, each link leads somewhere; so in the site."""

import ast
import builtins
import dataclasses
import html.parser
import importlib.util
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import trl_dgpo
from trl_dgpo import cli


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The site's own forms of files that are read at the root.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [page for page in sorted(DOCS.rglob("*.md")) if page.name not in ("contributing.md", "changelog.md")]
# Pages that train for more than a few seconds; the front page and those of one run stay in the default run.
LONG = {
    *("README.md", "CONTRIBUTING.md"),
    *("docs/few_steps.md", "docs/methods.md", "docs/migration.md", "docs/recipes.md"),
}

FENCE = re.compile(r"^( *)```(\w+|\{\w+\})([^\n]*)\n(.*?)^\1```$", re.M | re.S)
NOT_RUN = re.compile(r"# Not run here: \w")
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
# Programs of others that stand in the pages and are not here.
FOREIGN = {"vllm", "apt"}


class Block(NamedTuple):
    """A fenced block: its page, the line it begins after, what it is and what it says."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[2], textwrap.dedent(found[4]))
        for found in FENCE.finditer(text)
        if found[2] == language
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- Python -----------------------------------------------------------------------------------------------------------


def run(block: Block, namespace: dict) -> None:
    """Runs a block as if it stood alone in its page; one that says that it cannot run here is checked instead."""
    code = "\n" * block.line + block.text  # so that an error names the line of the page
    if NOT_RUN.match(block.text):
        check_unrun(ast.parse(code, block.page.name), namespace)
    else:
        exec(compile(code, str(block.page), "exec"), namespace)


def check_unrun(tree: ast.Module, namespace: dict) -> None:
    """Imports are there, every name has a meaning, and configurations can be built."""
    namespace = dict(namespace)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "<import>", "exec"), namespace)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            known = node.id in bound or node.id in namespace or hasattr(builtins, node.id)
            assert known, f"line {node.lineno}: {node.id!r} means nothing"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Config"):
            eval(compile(ast.Expression(node), "<configuration>", "eval"), namespace)


def with_python(pages: list[Path]) -> list:
    return [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] if name(page) in LONG else [])
        for page in pages
        if blocks(page, "python")
    ]


@pytest.mark.parametrize("page", with_python(PAGES))
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        run(block, namespace)


@pytest.mark.parametrize("page", with_python([page for page in PAGES if name(page) in LONG]))
def test_the_python_of_long_pages_is_read_in_the_default_run(page):
    for block in blocks(page, "python"):
        imported = [node for node in ast.parse(block.text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imported, []), str(page), "exec"), {})


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, in words, without variables before them."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    for words in parts:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
    return [words for words in parts if words]


def known_flags() -> set[str]:
    """Flags of every recipe: of the commands, of all methods' configurations, and of TRL's model."""
    from trl import ModelConfig

    arguments = [value for value in vars(cli).values() if dataclasses.is_dataclass(value)]
    configs = [getattr(trl_dgpo, name) for name in trl_dgpo.__all__ if name.endswith("Config")]
    classes = [*arguments, *configs, ModelConfig]
    return {f"--{field.name}" for cls in classes for field in dataclasses.fields(cls)} | {"--config", "--model"}


def flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("-") and not re.match(r"-\d", word)}


def check_command(words: list[str], capsys) -> None:
    """
    A command's flags and files are there. Recipes are read as the command would read them.

    Raises:
        `AssertionError`, `SystemExit`, `ValueError`: for what is not there.
    """
    program, rest = words[0].split("/")[-1], words[1:]
    if program == "python" and rest[:2] == ["-m", "trl_dgpo"]:
        program, rest = "trl-dgpo", rest[2:]
    if program == "trl-dgpo":
        check_own(rest, capsys)
    elif program in ("python", "torchrun", "accelerate"):
        check_script(program, rest, capsys)
    elif program == "pytest":
        for word in rest:
            assert "/" not in word or (ROOT / word).exists(), word
        if "-m" in rest:
            assert f'"{rest[rest.index("-m") + 1]}: ' in (ROOT / "pyproject.toml").read_text()
    elif program == "pip":
        extras = {extra for word in rest for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")}
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert extras <= set(setup["options.extras_require"])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets), rest
    elif program == "ruff":
        assert rest[0] in ("check", "format")
    elif program == "git":
        assert rest[0] in ("clone", "diff")
    else:
        assert program in FOREIGN, f"{program} is no program that the pages know"


def check_own(rest: list[str], capsys) -> None:
    command = rest[0]
    scripts = {
        "train": cli.DGPOScriptArguments,
        "evaluate": cli.EvaluateArguments,
        "sample": cli.SampleArguments,
        "collect": cli.CollectArguments,
        "plan": cli.PlanArguments,
    }
    if command in scripts:
        given = rest[1:] if any(word.startswith(("--config", "--model")) for word in rest) else [*rest[1:], *TINY]
        cli.parse([*given, *cli._as_on_a_gpu(given)], scripts[command], command)
        return
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert flags(rest) <= set(re.findall(r"--\w+", capsys.readouterr().out))


TINY = ["--model_name_or_path", "tiny"]


def check_script(program: str, rest: list[str], capsys) -> None:
    """A launcher's own flags, the script that it starts, and that script's flags."""
    if rest[:2] == ["-m", "venv"] or rest[:1] == ["-c"]:
        return
    if program == "python" and rest[0] == "-m" and rest[1].split(".")[0] in ("sglang",):
        return
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        script, given = launched.training_script, launched.training_script_args
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(rest[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file()
        script, given = launched.training_script, launched.training_script_args
        if launched.module:
            check_command(["python", "-m", script, *given], capsys)
            return
    else:
        script, given = rest[0], rest[1:]
    known = known_flags()
    if script != "train.py":  # a script of the reader's own
        assert (ROOT / script).is_file(), script
        sources = [ROOT / script, *(ROOT / script).parent.glob("*.py")]
        known |= {flag for source in sources for flag in re.findall(r'"(--\w+)"', source.read_text())}
    assert flags(given) <= known, flags(given) - known


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES if blocks(p, "bash")])
def test_every_command_is_one(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            try:
                check_command(words, capsys)
            except (AssertionError, SystemExit, ValueError) as error:
                pytest.fail(f"{name(page)}, line {block.line}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES])
def test_commands_in_the_text_have_flags_that_there_are(page, capsys):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    own = known_flags() | {"--host", "--port", "--normalize", "--help"}
    for command in re.findall(r"(?<!`)`(trl-dgpo \w[^`]*)`(?!`)", text):
        words = command.split()
        assert words[1] in {name for found in cli._COMMANDS for name in (found, found + "|")} or "|" in words[1]
        assert flags(words) <= own, command
    for command in re.findall(r"(?<!`)`(python [\w/]+\.py[^`]*)`(?!`)", text):
        if command.split()[1] != "train.py":
            check_script("python", re.sub(r"[\[\]]", " ", command).split()[1:], capsys)


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES if blocks(p, "yaml")])
def test_every_recipe_in_a_page_is_read(page, tmp_path):
    for block in blocks(page, "yaml"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(block.text)
        given = ["--config", str(recipe)] + ([] if "model_name_or_path" in block.text else TINY)
        cli.parse([*given, *cli._as_on_a_gpu(given)])


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {found[2] for page in PAGES for found in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert kinds <= {"python", "bash", "yaml", "text", "{toctree}", "{api}", "{include}"}
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(FENCE.findall(page.read_text("utf-8")))


def test_a_fault_in_a_page_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nimport json\n\njson.nothing\n```\n\n[b](nowhere.md) [c](#b)\n")
    with pytest.raises(AttributeError, match="nothing") as raised:
        run(blocks(page, "python")[0], {})
    assert raised.traceback[-1].lineno + 1 == 6  # the page's line
    assert broken_links(page) == ["nowhere.md", "#b"]
    for code in (
        "import nothing_of_this_name",
        "print(undefined)",
        "from trl_dgpo import GPOConfig; GPOConfig(beta=-1)",
    ):
        page.write_text(f"```python\n# Not run here: a GPU.\n{code}\n```\n")
        with pytest.raises((ImportError, AssertionError, ValueError)):
            run(blocks(page, "python")[0], {})
    for command in (
        "trl-dgpo train --config examples/recipes/tiny_ocr.yaml --lerning_rate 1",
        "trl-dgpo report x --outptu y",
        "python examples/train_sd35_ocr.py --lerning_rate 1",
        "python examples/nothing.py",
        "torchrun --nodes 2 train.py",
        "pytest tests/test_nothing.py",
        'pip install -e ".[nothing]"',
        "make nothing",
        "trl_dgpo train",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_command(shlex.split(command), capsys)


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """A page's headings, as GitHub and the site call them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


def links(page: Path) -> list[str]:
    return LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8"))))


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            fine = parts.scheme == "https" and "." in parts.netloc
        else:
            target = page.parent / unquote(parts.path) if parts.path else page
            fine = target.exists() and (not parts.fragment or parts.fragment in anchors(target))
        broken += [] if fine else [link]
    return broken


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES])
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for index in DOCS.rglob("index.md"):
        for block in blocks(index, "{toctree}"):
            names = (re.sub(r".*<(.*)>", r"\1", line) for line in block.text.split() if not line.startswith(":"))
            listed |= {(index.parent / f"{name}.md").resolve() for name in names if name != "self"}
    assert {page.resolve() for page in DOCS.rglob("*.md")} - listed == {(DOCS / "index.md").resolve()}


# -- docstrings -------------------------------------------------------------------------------------------------------


def docstrings():
    """`docs/docstrings.py`, which makes pages of docstrings."""
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package() -> list:
    names = [found.name for found in pkgutil.walk_packages(trl_dgpo.__path__, "trl_dgpo.")]
    return [import_module(name) for name in names if not name.endswith(("__main__", "tiny.build"))]


def documented(tool) -> list[tuple]:
    """Every docstring of the package, with whose it is."""
    found = []
    for module in package():
        found.append((module, inspect.getdoc(module)))
        for part in vars(module).values():
            if getattr(part, "__module__", None) == module.__name__ and (
                inspect.isclass(part) or inspect.isfunction(part)
            ):
                found.append((part, part.__doc__ and inspect.cleandoc(part.__doc__)))
                found += (
                    [(part, inspect.getdoc(member)) for member in tool.members(part)] if inspect.isclass(part) else []
                )
    return [(scope, text) for scope, text in found if text]


def test_every_reference_of_a_docstring_means_something():
    tool, lost, number = docstrings(), [], 0
    for scope, text in documented(tool):
        for reference in tool.REFERENCE.findall(text):
            number += 1
            if tool.resolve(reference.removeprefix("~"), scope) is None:
                lost.append(f"[`{reference}`] of {scope}")
    assert not lost
    assert number > 150
    assert tool.resolve("trl_dgpo.losses.nothing", trl_dgpo) is None
    with pytest.raises(ValueError, match="refers to nothing"):
        tool.as_markdown("See [`~trl_dgpo.losses.nothing`].", trl_dgpo)


def test_a_docstring_becomes_markdown():
    from trl_dgpo import losses

    text = inspect.cleandoc(
        r"""
        Mean of \\( a_1 +
        b \\).

        Args:
            > Of the first kind

            errors, more (`float`):
                As in [`dgpo_loss`].

                - one
            sizes:
                See [`~trl_dgpo.losses.group_mean`].

        Returns:
            `float`.
        """
    )
    expected = """
        Mean of $a_1 + b$.


        **Args**


        *Of the first kind*



        `errors, more` (`float`)
        :   As in {py:obj}`dgpo_loss <trl_dgpo.losses.dgpo_loss>`.

            - one

        `sizes`
        :   See {py:obj}`group_mean <trl_dgpo.losses.group_mean>`.


        **Returns**

        `float`.
        """
    assert docstrings().as_markdown(text, losses) == textwrap.dedent(expected).strip("\n ")


def test_the_reference_has_every_name_that_is_exported():
    shown = set()
    for page in (DOCS / "api").glob("*.md"):
        for found in FENCE.finditer(page.read_text(encoding="utf-8")):
            if found[2] == "{api}":
                module = import_module(found[3].strip())
                chosen = found[4].split()
                assert all(inspect.getdoc(getattr(module, name)) for name in chosen)
                names = chosen or [part.__name__ for part in docstrings().public(module)]
                shown |= {getattr(module, name) for name in names}
    missing = {name for name in trl_dgpo.__all__ if getattr(trl_dgpo, name) not in shown}
    assert not missing


# -- the site ---------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page of the site has: links, anchors, formulas."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.tags = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it, where a warning is an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    options = shlex.split(re.search(r"sphinx (.*) docs outputs/site", (ROOT / "Makefile").read_text())[1])
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("https", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fine = not parts.scheme and target.is_file()
            if fine and parts.fragment and target in pages:
                fine = unquote(parts.fragment) in pages[target].anchors
            broken += [] if fine or link == "#" else [f"{path.relative_to(site)}: {link}"]
    assert not broken
    assert len(pages) > 2 * len(list(DOCS.rglob("*.md")))  # the sources are there too


def test_the_table_of_the_log_has_every_name():
    from trl_dgpo.trainer.dgpo_trainer import _OWN_METRICS

    table = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").split("## What the log says")[1]
    own = _OWN_METRICS - {"learning_rate", "grad_norm", "epoch", "step"}  # Trainer's
    assert not {name for name in own if f"`{name}`" not in table}


@pytest.mark.slow
def test_the_references_of_the_configurations_are_links(site):
    page = (site / "api" / "configs.html").read_text(encoding="utf-8")
    dead = re.findall(r'(?<!">)<code class="xref py py-obj[^"]*"><span class="pre">([^<]*)', page)
    assert set(dead) <= {"from_pretrained"}  # diffusers'


@pytest.mark.slow
def test_the_site_asks_no_server_for_anything(site):
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link(?=[^>]*stylesheet)(?=[^>]*href="(?:https?:)?//)"""
    )
    assert loaded.search('<link href="https://a.b/c.css" rel="stylesheet">')
    styles = re.compile(r"""(?:@import|url\()\s*['"]?(?:https?:)?//""")
    assert styles.search("@import '//a.b/c.css'")
    assert not [path.name for path in site.rglob("*.css") if styles.search(path.read_text(encoding="utf-8"))]
    assert not [path.name for path in site.rglob("*.html") if loaded.search(path.read_text(encoding="utf-8"))]
    assert Page(site / "api" / "losses.html").tags.count("math") > 30


def chromium(tmp_path: Path, address: str, *options: str) -> subprocess.CompletedProcess:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium")
    command = [binary, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", *options]
    return subprocess.run([*command, address], capture_output=True, text=True, timeout=120)


def acting(page: Path, script: str) -> str:
    """The address of a copy of a page, beside it, that does something once it is loaded."""
    text = page.read_text(encoding="utf-8")
    copy = page.with_name(f"acting-{page.name}")
    copy.write_text(
        text.replace("</body>", f"<script>onload = () => {{ {script} }}</script></body>"), encoding="utf-8"
    )
    return copy.as_uri()


@pytest.mark.browser
def test_the_site_opens_in_a_browser(site, tmp_path):
    # From the disk, as a reader of a downloaded folder opens it.
    for name, words in {
        "index": "Quickstart",
        "concepts": "<math",
        "api/losses": "dgpo_loss",
        "contributing": "walk",
    }.items():
        done = chromium(tmp_path, (site / f"{name}.html").as_uri(), "--dump-dom")
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        assert words in done.stdout
    for name, words in {"gate": "Concepts", "dgpo_loss": "trl_dgpo.losses"}.items():
        done = chromium(tmp_path, (site / "search.html").as_uri() + f"?q={name}", "--dump-dom")
        assert "CONSOLE" not in done.stderr, done.stderr
        results = re.search(r'<ul[^>]* class="search".*?</ul>', done.stdout, re.S)
        assert results, "no results"
        assert words in results[0]


@pytest.mark.browser
def test_the_sites_navigation_and_formulas(site, tmp_path):
    click = """document.querySelector('.sidebar-tree a[href="concepts.html"]').click()"""
    done = chromium(tmp_path, acting(site / "index.html", click), "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>Concepts" in done.stdout
    # A fraction that is drawn is higher than a letter.
    measure = """
    const height = (selector) => document.querySelector(selector).getBoundingClientRect().height;
    document.title = "fraction " + (height("math mfrac") > 1.3 * height("math mi"));
    const wrappers = [...document.querySelectorAll(".math-wrapper")];
    document.title += ", scrolled " + wrappers.filter((each) => each.scrollHeight > each.clientHeight).length;
    """
    done = chromium(tmp_path, acting(site / "concepts.html", measure), "--dump-dom")
    assert "<title>fraction true, scrolled 0</title>" in done.stdout
