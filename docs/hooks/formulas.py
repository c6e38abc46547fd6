"""Formulas of notebooks as MathML, which browsers draw; Jupyter's way would fetch a script from a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page
from mkdocs_jupyter.plugin import NotebookFile

_CODE_OR_FORMULA = re.compile(
    r"<(pre|code|script|style)\b.*?</\1>|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$<]+)\$", re.DOTALL
)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Convert the formulas of a notebook."""
    return _CODE_OR_FORMULA.sub(_drawn, content) if isinstance(page.file, NotebookFile) else content


def _drawn(found: re.Match[str]) -> str:
    for display in ("block", "inline"):
        if found[display]:
            latex = html.unescape(found[display]).replace("{aligned}", "{align*}")  # which it does not know
            return convert(latex, display=display)
    return found[0]
