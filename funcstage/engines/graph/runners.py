"""What runs a program: Python, operation by operation, or what a backend made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcstage._torch import tracing as tt
from funcstage._torch.modes import gradients
from funcstage._torch.settings import is_any_autocast_enabled
from funcstage.engines.rules.flex import is_flex_attention_backward, run_dense_backward
from funcstage.state.ambient import autocast_off

Runner: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor | None]]
"""A program that can be run: takes its inputs in a list, which it empties."""


Lower: TypeAlias = Callable[[GraphModule, Collection[str]], Runner]
"""Makes a program runnable, which may overwrite the inputs that are named."""


def run_as_python(module: GraphModule, donated: Collection[str]) -> Runner:
    """`backend="aten"`: the generated Python, operation by operation."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # Kernels may return other strides than the trace was told (batch norm on the CPU, for one).
            node.target = torch.ops.aten.reshape.default
        if node.target is torch.ops.aten.view.dtype:
            node.target = _view_as
        if is_flex_attention_backward(node.target):
            node.args = (node.target, *node.args)
            node.target = run_dense_backward
    return tt.direct(module)


def _view_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """View elements as of another dtype; where there are none, strides may be 0, which torch refuses."""
    return (tensor if tensor.numel() else tensor.new_empty(tensor.shape)).view(dtype)


def plain_run(run: Runner, inputs: list[Any]) -> Sequence[Tensor | None]:
    """Run a program without what is in it already: autograd's work and autocast's."""
    if is_any_autocast_enabled():
        with torch.no_grad(), autocast_off():
            return run(inputs)
    with gradients(on=False):
        return run(inputs)
