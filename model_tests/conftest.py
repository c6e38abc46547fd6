"""Lays out what the tests found: a table at the end of the run, and in RESULTS.md with --write-results."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

_LIBRARIES = ("torch", "transformers", "timm", "torchvision")
_COLUMNS = ("library", "model", "stages", "attention", "closures", "aten")
_HEAD = """# Models of libraries, cut into stages

    pip install -e '.[models]' && pytest model_tests --write-results

Each model is built small, with random weights, cut into four stages, and trained for two steps of AdamW under
ZBVZeroBubble with four microbatches, in float64. Losses, gradients, parameters and buffers must be those of
the unsplit model under plain eager autograd, to a relative 1e-9 (1e-4 in float32).

*cut* is `funcstage.pipelining.cut`: timm's and torchvision's models with their blocks left whole, those of
transformers through `torch.export`. *by hand* are stages written out of the library's blocks. *whole* is a
model as one stage, with the experts it comes with, compiled in one piece: its output and gradients must be
those of eager backward, to 1e-5 of the largest in float32, which it is if no dtype is given, and to 2e-2 in
bfloat16. Where a cell gives a reason, the engine refuses the model for it.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write the table to model_tests/RESULTS.md")


@pytest.fixture
def table(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Says where in the table a test's result belongs, and in which words where it is a refusal."""

    def tell(**cells: str) -> None:
        for column, cell in cells.items():
            record_property(column, cell)

    return tell


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(report.user_properties)
            if "engine" in found:
                row = tuple(found.get(column, "") for column in _COLUMNS[:4])
                cell = found.get("refused", "passes") if outcome == "passed" else "**fails**"
                rows.setdefault(row, {})[found["engine"]] = cell
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line([*row, *(rows[row].get(engine, "") for engine in _COLUMNS[4:])]) for row in sorted(rows)]
    table = "\n".join(lines)
    versions = ", ".join(filter(None, map(_installed, _LIBRARIES)))
    terminalreporter.write_line(f"\n{table}\n\nWith {versions}.")
    if config.getoption("--write-results"):
        text = f"{_HEAD}With {versions}, on a CPU.\n\n{table}\n"
        Path(__file__).with_name("RESULTS.md").write_text(text)


def _installed(library: str) -> str | None:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return None


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
