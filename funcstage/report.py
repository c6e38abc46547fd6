"""Tables for notebooks, and figures with their units."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from funcstage.errors import StageError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")

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


def size(nbytes: float) -> str:
    """Write a number of bytes with three significant digits, such as ``1.25 GiB``."""
    return _scaled(nbytes, 1024, _BINARY)


def work(flops: float, unit: str = "FLOP") -> str:
    """Write a number of floating-point operations with three significant digits, such as ``17.6 TFLOP``."""
    return _scaled(flops, 1000, tuple(prefix + unit for prefix in _DECIMAL))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while step < len(units) - 1 and float(f"{value:.4g}") >= base:
        value, step = value / base, step + 1
    digits = f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
    return f"{digits} {units[step]}".rstrip()


def frame(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """Lay out rows as a `pandas.DataFrame`.

    Raises:
        StageError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as missing:
        raise StageError("to_pandas() needs pandas, which is not installed: pip install pandas.") from missing
    return pandas.DataFrame(rows, columns=list(header))
