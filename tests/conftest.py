"""The table of what is supported, from the tests that say so; `--write-support` puts it in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support: written by pytest --write-support -->\n", "<!-- end of support -->\n"
collect_ignore = ["conftest.py"]  # for doctests, as two modules of one name cannot be imported
COLUMNS = ("in a stage", "uncompiled", "compiled")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write the table of support to README.md")
    parser.addoption("--print-support", action="store_true", help="print the table of what was collected")


QUICK_CASES = 4
"""How many cases of a test are among the quick ones: the rest are slow, however fast each is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    by_test: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for cases in by_test.values():
        quick = {len(cases) * i // QUICK_CASES for i in range(QUICK_CASES)}
        for i, item in enumerate(cases):
            if i not in quick:
                item.add_marker(pytest.mark.slow)
    for item in items:
        for marker in item.iter_markers("supports"):
            item.user_properties.append(("supports", row_of(*marker.args, **marker.kwargs)))


def row_of(what: str, uncompiled: str = "yes", compiled: str = "yes") -> tuple[str, ...]:
    """A row of the table: what, and how either engine deals with it."""
    return what, uncompiled, compiled


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--print-support"):
        found = [
            tuple(row) for item in session.items for name, row in item.user_properties if name == "supports"
        ]
        print(BEGIN + table(found) + END)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the table of the tests that ran; what failed is in it as such."""
    if not config.getoption("--write-support"):
        return
    rows: dict[tuple[str, ...], bool] = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, row in getattr(report, "user_properties", []):
                if name == "supports":
                    rows[tuple(row)] = rows.get(tuple(row), True) and outcome not in ("failed", "error")
    found = [row if passed else (row[0], "**fails**", "**fails**") for row, passed in rows.items()]
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table(found) + END + rest.split(END)[1])


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *sorted(set(rows), key=lambda row: row[0].lower().lstrip("`"))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
