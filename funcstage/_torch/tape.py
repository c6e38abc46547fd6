"""Nodes of the eager autograd tape: how to call one by itself, and what arrives there.

`funcstage.autograd` rests on

- `node._input_metadata`: shape and dtype of each output of the operation that recorded `node`;
- a node that is called from Python *while the engine runs* computes only the gradients that this run
  needs, as it would if the engine had called it;
- `torch._C._is_alias_of`: whether two tensors share memory;
- a node recorded by a Python `torch.autograd.Function` is that function's `ctx`, with its `backward` bound as
  `apply`, and is owned by the nodes recorded after it, not by references from Python.

`tests/test_autograd.py` tests each by itself, so that a torch release that changes one fails by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

Edge = tuple[Node, int]
"""A node and the number of one output of the operation that recorded it."""


class _During(torch.autograd.Function):
    """A scalar whose backward calls a function."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[None, None]:
        ctx.call()
        return None, None


def during_backward(edges: Sequence[Edge], call: Callable[[], None]) -> None:
    """Call `call` inside an engine run that wants the gradients at `edges` and nothing else.

    Nothing connects the run to `edges`; naming them is what makes each node that `call` calls compute its
    gradients towards them and leave out the others. The anchor lies on the CPU, so that the engine runs
    `call` in this thread and on the current streams.
    """
    with torch.enable_grad():
        anchor = torch.zeros((), requires_grad=True)
        result = _During.apply(anchor, call)
    wanted: list[Any] = [anchor, *(GradientEdge(*edge) for edge in edges)]
    torch.autograd.grad(result, wanted, allow_unused=True)


def call_node(node: Node, cotangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients that `node` passes on, one per entry of `node.next_functions`.

    A node of a Python `autograd.Function` always computes all of its gradients: its `needs_input_grad` is
    fixed in forward.
    """
    if not is_python(node):
        gradients = node(*cotangents)  # type: ignore[operator]
        return list(gradients) if isinstance(gradients, tuple) else [gradients]
    # The engine too fills in zeros, unless the function declined them; they are right in either case.
    filled = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if c is None else c
        for c, m in zip(cotangents, node._input_metadata, strict=True)
    ]
    gradients = node.apply(*filled)  # type: ignore[attr-defined]
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    # `next_functions` skips arguments that are not tensors and holds no node for tensors without gradient.
    needed = (g for g, wanted in zip(gradients, node.needs_input_grad, strict=False) if wanted)  # type: ignore[attr-defined]
    return [None if after is None else next(needed) for after, _ in node.next_functions]


def conform(gradient: torch.Tensor, edge: Edge, not_sharing: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The gradient that a node passed on, as it arrives at `edge`, in memory that `.grad` may take over.

    Broadcasting and promotion are undone, as the engine does between two nodes. An operation may pass on its
    cotangent itself, or a view of it, and the engine makes a `.grad` of such a view without a copy; later
    accumulation would then change the cotangent, which is still the caller's.
    """
    metadata = edge[0]._input_metadata[edge[1]]
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    gradient = gradient.to(metadata.dtype)
    alias = torch._C._is_alias_of  # type: ignore[attr-defined]
    shared = any(other is not None and alias(gradient, other) for other in not_sharing)
    return gradient.clone() if shared else gradient


def is_python(node: Node) -> bool:
    """Whether a Python `autograd.Function` recorded `node`, so that holding it does not keep it alive."""
    return isinstance(node, BackwardCFunction)


def output_shapes(node: Node) -> list[torch.Size]:
    """The shape of each differentiable output of the operation that recorded `node`."""
    return [torch.Size(metadata.shape) for metadata in node._input_metadata]


def dtypes_into(node: Node) -> set[torch.dtype]:
    """The dtypes of the values whose gradients arrive at a node."""
    return {meta.dtype for meta in node._input_metadata if meta is not None}


def saved_input(node: Any) -> torch.Tensor:
    """What an operation has saved as `input`."""
    saved: torch.Tensor = node._saved_input
    return saved
