"""The notebooks run from top to bottom, and what they keep of their outputs is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_are_six() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "1_split_vjp",
        "2_pipeline",
        "3_weight_pass",
        "4_compile",
        "5_curvature",
        "6_one_step",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_yields_the_kinds_of_outputs_that_it_keeps(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures are drawn into the notebook
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    run = nbformat.read(path, as_version=4)
    NotebookClient(run, timeout=300, kernel_name="python3").execute()
    for before, now in zip(kept.cells, run.cells, strict=True):
        assert kinds(before) == kinds(now), before.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_nothing_of_the_machine_that_it_was_run_on(path: Path) -> None:
    text = path.read_text()
    for trace in ("/tmp/", "/home/", "/root/", "site-packages", '"execution": {', '"stderr"'):
        assert trace not in text
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"


def kinds(cell: nbformat.NotebookNode) -> list[tuple[str, ...]]:
    """The outputs of a cell but for their values; text that came in several parts is one.

    What is logged (torch 2.11's profiler says when it starts) is none.
    """
    found: list[tuple[str, ...]] = []
    for output in cell.get("outputs", []):
        assert output.output_type != "error"
        kind = (output.output_type, *sorted(output.get("data", {})))
        if output.get("name") == "stderr":
            continue
        if output.output_type != "stream" or kind not in found:
            found.append(kind)
    return found
