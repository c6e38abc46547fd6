"""Mistakes that a first user makes are answered with advice, not with internals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import funcstage as fs
from funcstage.pipelining import Costs, FunctionalPipelineStage, simulate
from funcstage.testing import check_stage

LINEAR = nn.Linear(3, 2)


class CallsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        y.sum().backward()
        return y


def of(module: nn.Module, backend: str | None = None) -> tuple[torch.Tensor, Any, fs.Pullback]:
    apply, params, buffers = fs.functionalize(module)
    function = apply if backend is None else fs.compile(apply, backend=backend)
    return fs.stage_vjp(function, params, buffers, torch.ones(4, 3))


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a schedule's name is simulated": (
        lambda: simulate("1F1B", [Costs(1, 1, 1)] * 4),  # type: ignore[arg-type]
        r"Make one with pipeline_order\('1F1B', num_stages, num_microbatches\)",
    ),
    "costs are numbers": (
        lambda: simulate(fs.pipelining.pipeline_order("1F1B", 2, 2), [1.0, 1.0]),  # type: ignore[list-item]
        r"\[Costs\(forward=1, input=1, weight=1\)\] \* 2",
    ),
    "backward inside a stage": (lambda: of(CallsBackward()), "torch.autograd.grad"),
    "backward inside a compiled stage": (lambda: of(CallsBackward(), "aten"), "torch.autograd.grad"),
    "stage_vjp of a module": (
        lambda: fs.stage_vjp(LINEAR, {}, {}, torch.ones(4, 3)),  # type: ignore[arg-type, unused-ignore]
        r"funcstage.functionalize\(module\)",
    ),
    "check_stage without arguments": (lambda: check_stage(LINEAR), r"check_stage\(module, x, mask=mask\)"),
    "a stage without a process group": (
        lambda: FunctionalPipelineStage(LINEAR, 0, 1, "cpu"),
        "init_process_group.*pipeline_value_and_grad",
    ),
    "a tuple of cotangents": (
        lambda: of(LINEAR)[2]((torch.ones(4, 2),)),
        r"its output, a single leaf; got \(\*,\), where each \* is a leaf\. Pass None",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_advice(mistake: str) -> None:
    if mistake == "a stage without a process group" and dist.is_initialized():
        pytest.skip("another test has made a group")
    call, advice = MISTAKES[mistake]
    with pytest.raises(fs.StageError, match=advice) as error:
        call()
    assert "PyTreeSpec" not in str(error.value)


@pytest.mark.parametrize("backend", [None, "aten"])
def test_w_takes_no_cotangent_and_is_not_consumed_by_one(backend: str | None) -> None:
    output, _, pullback = of(LINEAR, backend)
    _, weight_pullback = pullback(torch.ones_like(output))
    with pytest.raises(fs.StructureError, match="its cotangents came with I"):
        weight_pullback(torch.ones_like(output))  # type: ignore[arg-type]
    torch.testing.assert_close(weight_pullback()["bias"], torch.full((2,), 4.0))


def test_strategies_without_hypothesis_say_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import funcstage.testing.strategies"
    root = Path(fs.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: funcstage.testing.strategies needs Hypothesis, not installed here: "
        "pip install 'funcstage[test]'."
    )
