"""Which torches funcstage says that it works with, and what it says of others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from funcstage._torch.versions import RELEASES, TRIED, series, warn_if_newer

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def warnings_of(version: str) -> list[str]:
    """What a process prints that imports funcstage, all of it and more than once, with a torch so called."""
    program = (
        f"import torch; torch.__version__ = {version!r}\n"
        "import funcstage, funcstage.pipelining, funcstage.testing, funcstage.autograd\n"
        "import funcstage as again; again.compile\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "funcstage was tested" in line]


@pytest.mark.slow
def test_a_newer_torch_gives_one_warning_in_a_process() -> None:
    (warning,) = warnings_of("2.99.1+cu140")
    assert "This is torch 2.99.1+cu140;" in warning
    for tried in TRIED:
        assert re.search(rf"\b{re.escape(tried)}\b", warning), tried


@pytest.mark.parametrize("version", ["2.16.0", "2.100.0", "3.0.0a0+git1234567"])
def test_whatever_is_newer_is_warned_of(version: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"This is torch {re.escape(version)}; .* {TRIED[0]}, .* {TRIED[-1]}\."
    ):
        warn_if_newer(version)


@pytest.mark.parametrize("version", [*RELEASES, "2.9.1", f"{TRIED[0]}.1+cpu", f"{TRIED[-1]}.9"])
def test_a_torch_that_was_tried_gives_none(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_newer(version)


def test_the_list_is_what_pyproject_and_the_pages_say() -> None:
    assert list(TRIED) == sorted(TRIED, key=series)
    assert f"torch>={TRIED[0]}" in PROJECT["dependencies"]
    for page in ("README.md", "docs/index.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"torch {TRIED[0]} or later (tested with {TRIED[0]} to {TRIED[-1]})" in text, page


def test_what_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = [
        *PROJECT["dependencies"],
        *extras["demo"],
        *extras["interactive"],
        *extras["schedules"],
        *extras["test"],
    ]
    names = {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in declared}
    core = {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in PROJECT["dependencies"]}
    for path in (ROOT / "funcstage").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_once = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names:
                optional = id(node) not in at_once or path.parts[-2] in ("demo", "testing", "cli", "layers")
                assert module in (names if optional else core) | {"funcstage"}, f"{path} imports {module}"
