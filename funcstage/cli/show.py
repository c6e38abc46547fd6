"""Tables and progress: rich's on a terminal, plain text anywhere else or without rich."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
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

        console = Console()
        console.print(title, style="bold", highlight=False)
        for part in _drawn(header, rows, console.width):
            console.print(part)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        first, *others = (
            cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def _drawn(header: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[Any]:
    """A table for rich in which no figure is cut, however little room there is.

    Headers are broken over lines first. Then the rules between the columns go. Where that is not enough, each
    row is a list of its own.
    """
    from rich.box import HEAVY_HEAD
    from rich.table import Table

    cells = [max(map(len, column)) for column in zip(*rows, strict=True)] or [0] * len(header)
    broken = [_broken(name, width) for name, width in zip(header, cells, strict=True)]
    for names, box, gap in ((header, HEAVY_HEAD, 3), (broken, HEAVY_HEAD, 3), (broken, None, 2)):
        lines = [max(map(len, name.split("\n"))) for name in names]
        if sum(map(max, cells, lines)) + gap * (len(cells) - 1) <= room:
            drawn = Table(show_edge=False, pad_edge=False, box=box)
            for i, name in enumerate(names):
                drawn.add_column(name, justify="right" if i else "left", no_wrap=True)
            for row in rows:
                drawn.add_row(*row)
            return [drawn]
    lists = []
    for row in rows:
        drawn = Table(show_edge=False, pad_edge=False, show_header=False, box=None)
        for pair in zip(header, row, strict=True):
            drawn.add_row(*pair)
        lists.append(drawn)
    return lists


def _broken(name: str, width: int) -> str:
    """A header in lines that are as long as what is below, or as its longest word."""
    longest = max([width, 1, *map(len, name.split())])
    return "\n".join(textwrap.wrap(name, longest)) or name


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
