"""Interrupts at any call of any stage, and interrupts of what undoes them: everything is as it was before."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from interrupting import calls_of, interrupted_again, state_of_everything

import funcstage as fs
from funcstage.testing import strategies
from funcstage.testing.stages import Stage


@given(
    stage=strategies.stages(max_layers=3),
    at=st.floats(0, 1),
    later=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    compiled=st.booleans(),
)
def test_nothing_is_left_behind(stage: Stage, at: float, later: list[int], compiled: bool) -> None:
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    run = fs.compile(apply, backend="aten") if compiled else apply

    def step() -> Any:
        torch.manual_seed(0)
        output, new_buffers, pullback = fs.stage_vjp(run, params, buffers, *args, **kwargs)
        grads, weight_pullback = pullback(fs.trees.map_leaves(_one, output))
        return output, new_buffers, grads, weight_pullback()

    expected, before = step(), state_of_everything(module)
    interrupted_again(step, 1 + int(at * calls_of(step)), later)
    assert state_of_everything(module) == before
    torch.testing.assert_close(_tensors(step()), _tensors(expected), rtol=0, atol=0, equal_nan=True)


def _one(leaf: Any) -> Any:
    return torch.ones_like(leaf) if fs.trees.is_differentiable(leaf) else None


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in fs.trees.flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
