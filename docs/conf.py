"""Sphinx's settings: `make docs` builds the site in `outputs/site`, and it opens from there without a server."""

import inspect
import sys
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from sphinx.util.docutils import SphinxDirective
from transformers import TrainingArguments

import trl_dgpo


sys.path.insert(0, str(Path(__file__).parent))  # where `docstrings.py` is

from docstrings import as_markdown, members, public, signature


project = "trl_dgpo"
copyright = "the trl_dgpo authors, Apache-2.0"
release = trl_dgpo.__version__

extensions = ["myst_parser", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # a heading's own anchor, as GitHub makes it
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "trl_dgpo"
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # it reads the pages over HTTP, which a folder on a disk has none of


class Api(SphinxDirective):
    """
    What the docstrings of a module say: its own and those of its public functions and classes.

    The argument is the module's name. Names under the directive choose what is shown of it, without its docstring.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module = import_module(self.arguments[0])
        chosen = [line.strip() for line in self.content if line.strip()]
        text = [] if chosen else [as_markdown(inspect.getdoc(module), module)]
        text += [_described(getattr(module, name)) for name in chosen] or map(_described, public(module))
        self.env.note_dependency(module.__file__)
        holder = nodes.Element()
        holder.document = self.state.document
        lines = "\n\n".join(text).splitlines()
        self.state.nested_parse(StringList(lines, source=f"docstrings of {module.__name__}"), 0, holder)
        return holder.children


def setup(app):
    # MathML is part of every browser: no script, no font and nothing from a server.
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.add_directive("api", Api)
    app.connect("source-read", _inside)


def _described(found) -> str:
    """A class with its members, or a function, in the directives of Sphinx's Python domain."""
    place = f":module: {found.__module__}\n\n"
    if inspect.isfunction(found):
        body = as_markdown(inspect.getdoc(found), found)
        return f":::::{{py:function}} {found.__name__}{signature(found)}\n{place}{body}\n:::::"
    # A configuration has a field for each of its parameters, and those of `TrainingArguments`.
    call = "(output_dir=None, **fields)" if issubclass(found, TrainingArguments) else signature(found)
    text = f"::::::{{py:class}} {found.__name__}{call}\n{place}{as_markdown(inspect.getdoc(found), found)}\n"
    for member in members(found):
        function = getattr(member, "fget", getattr(member, "__func__", member))
        body = as_markdown(inspect.getdoc(function), found)
        kind, call = ("property", "") if isinstance(member, property) else ("method", signature(function))
        text += f"\n:::::{{py:{kind}}} {found.__name__}.{function.__name__}{call}\n{place}{body}\n:::::\n"
    return text + "::::::"


def _inline(writer, node):
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(writer, node):
    # Room for what MathML draws beyond its line: the theme's wrapper would show a scroll bar.
    writer.body.append(f'<div class="math" style="padding: 0.4em 0">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _inside(app, docname, source):
    # What lies beside `docs` and is a page of the site too.
    for there, here in {"../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md"}.items():
        source[0] = source[0].replace(f"]({there}", f"]({here}")
