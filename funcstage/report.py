"""Tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_SHOWN = 24
"""How many rows of a table are shown; a line says how many more there are."""


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, shown: int = _SHOWN) -> str:
    """Lay out rows of text as an HTML table.

    Args:
        caption: above it.
        header: a name for each column.
        rows: of as many cells as the header has.
        shown: how many rows at most.
    """
    every = list(rows)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in every[:shown]]
    if len(every) > shown:
        lines.append(f'<td colspan="{len(header)}">and {len(every) - shown} more</td>')
    names = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    head = f"<thead><tr>{names}</tr></thead>" if any(header) else ""
    title = f'<caption style="text-align: left; white-space: nowrap">{html.escape(caption)}</caption>'
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"
