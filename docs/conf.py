"""Sphinx: the pages beside this file (MyST Markdown), and the API from the docstrings of every public name."""

import inspect
import re

from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import mmopt

project = "mmopt"
copyright = "the authors of mmopt"
release = mmopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "_*.md"]
html_theme = "furo"
html_title = f"mmopt {release}"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpicky = True  # of what pages refer to; signatures name types that have no page here
nitpick_ignore_regex = [("py:(class|data|attr|meth|func|exc|mod)", ".*")]

ITEM = re.compile(r"[\w, `*]{1,60}: ")


def prose(lines: list[str]) -> list[str]:
    """A docstring of plain prose as reStructuredText.

    `x` is code, nothing else is markup. A paragraph whose lines hang is a list, one item for each line that does not.
    """
    made: list[str] = []
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        rows = paragraph.split("\n")
        hanging = [r.startswith("    ") for r in rows]
        if any(hanging) and all(h or ITEM.match(r) for h, r in zip(hanging, rows, strict=True)):
            items = re.split(r"\n(?!    )", paragraph)
        else:
            items, hanging = [paragraph], []
        for item in items:
            made += [("- " if hanging else "") + marked(" ".join(item.split())), ""]
    return made


def marked(text: str) -> str:
    parts = re.split(r"(``.+?``|`.+?`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*_|\\`])", r"\\\1", part)
        elif (code := part.strip("`")).removeprefix("mmopt.") in mmopt.__all__ and code.startswith("mmopt."):
            parts[i] = f":py:obj:`{code}`"
        else:
            parts[i] = f"``{code}``"
    return "".join(parts)


class PublicNames(SphinxDirective):
    """``.. public-names:: functions | classes | exceptions``: what `mmopt.__all__` holds of that kind."""

    required_arguments = 1

    def run(self):
        lines = []
        for name in sorted(n for n in mmopt.__all__ if not n.startswith("__")):
            value = getattr(mmopt, name)
            kind = "functions"
            if inspect.isclass(value):
                kind = "exceptions" if issubclass(value, Exception) else "classes"
            if kind != self.arguments[0]:
                continue
            how = {"functions": "autofunction", "classes": "autoclass", "exceptions": "autoexception"}[kind]
            lines += [f".. {how}:: mmopt.{name}", "   :members:" if kind == "classes" else "", ""]
        return self.parse_text_to_nodes(StringList(lines, "public-names"))


def leave_the_docs(app, name: str, source: list[str]) -> None:
    """A link to Markdown outside these pages, good where the repository is read, is a path here."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)]+\.md)\)", r"\1 (`\2`)", source[0])


def setup(app):
    app.connect("source-read", leave_the_docs)
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: set_lines(lines))
    return {"parallel_read_safe": True}


def set_lines(lines: list[str]) -> None:
    lines[:] = prose(lines)
