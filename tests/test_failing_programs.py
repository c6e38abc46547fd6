"""A program of F that fails: whose error comes through, and whether the stage is tried uncompiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funcstage as fs
from funcstage.graph.programs import Programs


@pytest.mark.parametrize(("error", "tried"), [(RuntimeError, 1), (torch.OutOfMemoryError, 0)])
def test_an_error_that_the_uncompiled_stage_does_not_have_comes_through(
    error: Any, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        runs.append(x)
        return x * params["w"], buffers

    def fails(self: Programs, tensors: Any) -> Any:
        raise error("in a kernel")

    fast = fs.compile(apply, backend="aten")
    fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2))
    monkeypatch.setattr(Programs, "linearize", fails)
    runs.clear()
    with pytest.raises(error, match="in a kernel"):
        fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2))
    assert len(runs) == tried  # where memory is short, more would be asked of it


@pytest.mark.parametrize("other", [True, 1.0, 2])
def test_a_cotangent_of_a_leaf_that_is_no_tensor_is_that_leaf_or_none(other: Any) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return (x * params["w"], 1), buffers

    _, _, pullback = fs.stage_vjp(apply, {"w": torch.ones(2)}, {}, torch.ones(2))
    with pytest.raises(fs.StageError, match=r"output_grads\[1\]"):
        pullback((torch.ones(2), other))
    (dx,), _ = pullback((torch.ones(2), 1))
    assert torch.equal(dx, torch.ones(2))
