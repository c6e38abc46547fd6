"""What a notebook shows of plans, pullbacks, stages and schedules is well-formed, and true."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import funcstage as fs
from funcstage.pipelining import Costs, pipeline_order, simulate
from funcstage.report import size, table, work


def cells(shown: Any) -> list[list[str]]:
    """The rows of all tables of an object's HTML, which must be well-formed."""
    root = ElementTree.fromstring(f"<div>{shown._repr_html_()}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


@pytest.fixture
def stage() -> fs.FunctionalStage:
    return fs.functionalize(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double())


def test_a_stage_is_shown_with_its_tensors(stage: fs.FunctionalStage) -> None:
    header, *rows = cells(stage)
    assert header == ["name", "", "tensor", "size"]
    assert [row[0] for row in rows] == [*stage.params, *stage.buffers]
    assert rows[0] == ["0.weight", "parameter", "float64[5, 3] on cpu", "120 B"]


def test_a_stage_is_one_line_whatever_its_size(stage: fs.FunctionalStage) -> None:
    assert repr(stage) == "<FunctionalStage of Sequential: 4 parameters (240 B), 3 buffers (88 B)>"
    assert "0 buffers (0 B)" in repr(stage._replace(params=(torch.ones(2), 3), buffers=None))


def test_pullbacks_are_shown_with_what_they_hold_until_they_are_used(stage: fs.FunctionalStage) -> None:
    output, _, pullback = fs.stage_vjp(stage.apply, stage.params, stage.buffers, torch.ones(4, 3).double())
    _, *rows = cells(pullback)
    assert len(rows) == len(pullback._tape.leaves())
    assert ["(4, 5)", "torch.float64", "cpu", "160 B"] in rows
    _, weight_pullback = pullback(torch.ones_like(output))
    assert cells(pullback) == [["residual", "dtype", "device", "size"]]
    assert "consumed" in pullback._repr_html_()
    assert "4 parameters" in weight_pullback._repr_html_()


def test_a_compiled_stage_is_shown_with_the_plans_of_its_signatures(stage: fs.FunctionalStage) -> None:
    compiled = fs.compile(stage.apply, backend="aten")
    for rows in (2, 4):
        fs.stage_vjp(compiled, stage.params, stage.buffers, torch.ones(rows, 3).double())
    plan = compiled.plan(stage.params, stage.buffers, torch.ones(4, 3).double())
    _, first, second = cells(compiled)
    assert second[1:4] == [f"{phase.flops:,}" for phase in (plan.forward, plan.input_grad, plan.weight_grad)]
    assert first != second
    assert cells(plan)[1][:2] == ["F", work(plan.forward.flops)]


def test_schedules_are_shown_by_rank() -> None:
    order = pipeline_order("1F1B", 2, 2)
    assert cells(order)[2] == ["rank 1", "1F0 1B0 1F1 1B1"]
    timeline = simulate(order, [Costs(1, 1, 1, 2, 1)] * 2)
    assert cells(timeline)[1] == ["0", "0", "6 s", "33.3%", "4 B"]
    assert "1F1B: 9 s for 2 microbatches, bubble 33.3%" in timeline._repr_html_()


@pytest.mark.parametrize("nasty", ["<script>", 'a"b', "x & y"])
def test_text_is_escaped(nasty: str) -> None:
    root = ElementTree.fromstring(table(nasty, [nasty], [[nasty]]))
    assert "".join(root.itertext()) == nasty * 3


def test_long_tables_say_how_much_is_left_out() -> None:
    root = ElementTree.fromstring(table("", ["n"], [[str(n)] for n in range(100)], shown=3))
    assert "".join(root.itertext()) == "n012and 97 more"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (7.5, "7.5 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1280, "1.25 KiB"),
        (1024**2 - 1, "1 MiB"),
        (1342177280, "1.25 GiB"),
        (1 << 70, "1,048,576 PiB"),
    ],
)
def test_bytes_are_written_in_binary_units(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (999_960, "1 MFLOP"), (17_592_186_044_416, "17.6 TFLOP")],
)
def test_operations_are_written_in_decimal_units(flops: float, text: str) -> None:
    assert work(flops) == text
    assert work(flops, "").split() == text.removesuffix("FLOP").split()
