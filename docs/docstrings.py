r"""
Docstrings in Hugging Face's format as Markdown of the site.

They are Markdown already, with four habits of their own: sections such as `Args:`, parameters as `name (type):` over
an indented text, mathematics between \\( and \\), and references such as [`~package.module.name`] or, within a module,
[`name`]. Nothing here needs Sphinx, so that the tests can ask without it whether every reference means something.
"""

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any


REFERENCE = re.compile(r"\[`(~?[A-Za-z_][\w.]*)`\](?!\()")
_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Yields|Raises|Example):")
_OF_PARAMETERS = {"Args", "Parameters", "Attributes"}
_NAMES = re.compile(r"(?:^|(?<=\), ))\*{0,2}\w+(?:, \*{0,2}\w+)*(?= \(|$)")
_MATH = re.compile(r"\\{1,2}\((.+?)\\{1,2}\)", re.S)
_FORMULA = re.compile(r"(?<=\n\n)\$([^$\n]+)\$(?=\n\n|\Z)")  # a paragraph of its own


def public(module: ModuleType) -> list[Any]:
    """What a module defines for others: documented classes and functions without an underscore, in their order."""
    found = [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    ]
    own = [value for value in found if value.__module__ == module.__name__ and value.__doc__]
    return sorted(own, key=lambda value: inspect.getsourcelines(value)[1])


def members(cls: type) -> list[Any]:
    """Methods and properties that a class itself documents, in their order."""
    return [
        value
        for name, value in vars(cls).items()
        if not name.startswith("_") and inspect.getdoc(_function(value)) and callable(_function(value))
    ]


def resolve(reference: str, scope: Any) -> str | None:
    """
    Full name of what a docstring refers to.

    Args:
        reference (`str`):
            What stands between [` and `], without the tilde.
        scope (module, class or function):
            Whose docstring it is: names are looked for in it, in its module, in the package's face,
            then everywhere.

    Returns:
        `str`, module and name; `None` if there is no such thing.
    """
    module = scope if inspect.ismodule(scope) else import_module(_function(scope).__module__)
    face = import_module(module.__name__.split(".")[0])
    for start in ([scope] if inspect.isclass(scope) else []) + [module, face]:
        if (found := _descend(start, reference.split("."))) is not None:
            return _full_name(found, start, reference)
    names = reference.split(".")
    for length in range(len(names), 0, -1):
        try:
            start = import_module(".".join(names[:length]))
        except ImportError:
            continue
        found = _descend(start, names[length:])
        return None if found is None else _full_name(found, start, ".".join(names[length:]))
    return None


def as_markdown(docstring: str, scope: Any) -> str:
    """
    A docstring as Markdown of MyST: parameters as definition lists, references as roles, mathematics in dollars.

    Args:
        docstring (`str`):
            Of `inspect.getdoc`.
        scope (module, class or function):
            Whose docstring it is.

    Returns:
        `str`.

    Raises:
        `ValueError`: for a reference to nothing.
    """
    lines, section, begins = [], None, False
    for line in docstring.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text and indent == 0:
            heading = _SECTION.fullmatch(text)
            section = heading[1] if heading else section if section == "Example" else None
            lines += ["", f"**{section}**", ""] if heading else [line]
        elif section not in _OF_PARAMETERS:
            lines.append(line[4:] if section in ("Returns", "Yields", "Raises") else line)
        elif text.startswith("> "):
            lines += ["", f"*{text[2:]}*", ""]
        elif text and indent == 4:
            lines += ["", _NAMES.sub(lambda names: f"`{names[0]}`", text.removesuffix(":"))]
            begins = True
        else:
            lines.append((":   " if begins else "    ") + line[8:] if text else "")
            begins = begins and not text
    text = _MATH.sub(lambda math: f"${' '.join(math[1].split())}$", "\n".join(lines))
    text = _FORMULA.sub(r"$$\1$$", text)
    return REFERENCE.sub(lambda match: _role(match[1], scope), text)


def signature(found: Any) -> str:
    """Names and defaults of a call. Types stand in the docstring."""
    if inspect.isclass(found) and issubclass(found, Exception):
        return ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(found).parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(parameters))


def _role(reference: str, scope: Any) -> str:
    name = reference.removeprefix("~")
    full = resolve(name, scope)
    if full is None:
        raise ValueError(f"[`{reference}`] in the docstring of {scope!r} refers to nothing.")
    return f"{{py:obj}}`{name.split('.')[-1] if reference.startswith('~') else name} <{full}>`"


def _descend(start: Any, names: list[str]) -> Any:
    for name in names:
        start = getattr(start, name, None)
    return start


def _full_name(found: Any, start: Any, reference: str) -> str:
    """By where it is defined, as Sphinx knows it; a constant by where it was found."""
    if inspect.ismodule(found):
        return found.__name__
    found = _function(found)
    if hasattr(found, "__qualname__") and not isinstance(found, type(list[int])):
        return f"{found.__module__}.{found.__qualname__}"
    return f"{_full_name(start, start, '')}.{reference}"


def _function(value: Any) -> Any:
    """What a property, class method or static method is made of."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)
