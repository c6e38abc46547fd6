"""Tables and progress: rich's on a terminal, plain text anywhere else or without rich."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


def is_rich() -> bool:
    """Whether the output is a terminal and rich is there to draw on it."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its first column is aligned to the left, the others to the right."""
    if is_rich():
        from rich.console import Console
        from rich.table import Table

        # Where there is too little room, the words of a header are broken over lines, and no figure is cut.
        drawn = Table(show_edge=False, pad_edge=False)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] or [0] * len(header)
        for i, (name, width) in enumerate(zip(header, widths, strict=True)):
            drawn.add_column(name, justify="right" if i else "left", min_width=width)
        for row in rows:
            drawn.add_row(*row)
        console = Console()
        console.print(title, style="bold", highlight=False)
        console.print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        first, *others = (
            cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def working(what: str) -> AbstractContextManager[Any]:
    """Show that something is at work, while it is."""
    if not is_rich():
        return nullcontext()
    from rich.console import Console

    return Console().status(what)


def progress(items: Sequence[T], what: str) -> Iterator[T] | Iterable[T]:
    """Go through items with a bar."""
    if not items or not is_rich():
        return items
    from rich.progress import track

    return track(items, what, transient=True)
