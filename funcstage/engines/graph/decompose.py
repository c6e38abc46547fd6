"""Pass 2, decompose: one backward operation that serves both I and W -> one operation for each.

`convolution_backward` returns the gradients of input, weight and bias together. Left whole it belongs
to I, and all of the weight gradient with it. Its output mask tells it which to compute, so two copies
with disjoint masks do the same work at different times.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from funcstage._torch.operators import OpOverload, arguments_of
from funcstage.engines.graph.joint import Joint

aten = torch.ops.aten


def decompose(joint: Joint) -> Joint:
    """Split every operation that computes input and parameter gradients at once.

    Args:
        joint: a joint graph; rewritten in place.

    Returns:
        The same joint graph: no operation that has an output mask is needed by the input gradients
        for one result and by the parameter gradients alone for another, unless its results cannot be
        computed apart.
    """
    graph = joint.module.graph
    inputs = ancestors(joint.results[2])
    for node in list(graph.nodes):
        position = _mask_position(node.target)
        if position is None:
            continue
        picks = [user for user in node.users if user.target is operator.getitem]
        urgent = {pick.args[1] for pick in picks if pick in inputs}
        deferred = {pick.args[1] for pick in picks} - urgent
        if urgent and deferred:
            with graph.inserting_before(node):
                copy = graph.node_copy(node)
            _restrict(copy, position, deferred)
            for pick in picks:
                if pick.args[1] in deferred:
                    pick.args = (copy, pick.args[1])
        _restrict(node, position, urgent or deferred)
    graph.eliminate_dead_code()
    joint.module.recompile()
    return joint


def ancestors(results: Iterable[Node | None]) -> set[Node]:
    """All nodes that some results depend on, themselves among them."""
    stack = [node for node in results if isinstance(node, Node)]
    found = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _mask_position(target: Any) -> int | None:
    """Where an operation takes its output mask, if it has one."""
    if not isinstance(target, OpOverload):
        return None
    names = [argument.name for argument in arguments_of(target)]
    return names.index("output_mask") if "output_mask" in names else None


def _restrict(node: Node, position: int, wanted: set[Any]) -> None:
    """Compute the wanted results only, out of those that the operation computed so far."""
    mask: Any = node.args[position] if position < len(node.args) else node.kwargs["output_mask"]
    narrowed = [bool(on) and i in wanted for i, on in enumerate(mask)]
    if position < len(node.args):
        node.update_arg(position, narrowed)
    else:
        node.update_kwarg("output_mask", narrowed)
    values = node.meta["val"]
    node.meta["val"] = type(values)(v if i in wanted else None for i, v in enumerate(values))


def _prelu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As in ATen/native/cpu/Activation.cpp."""
    return torch.where(x > 0, grad, weight * grad), torch.where(x > 0, 0, x * grad)


def _batch_norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_var: Tensor | None,
    eps: float,
    *reserve: Tensor,
) -> Any:
    """cuDNN's has no output mask; the native one takes the same statistics."""
    return aten.native_batch_norm_backward(
        grad, x, weight, running_mean, running_var, save_mean, save_var, True, eps, [True, True, True]
    )


DECOMPOSED: dict[Any, Callable[..., Any]] = {
    aten._prelu_kernel_backward.default: _prelu_backward,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    aten.miopen_batch_norm_backward.default: _batch_norm_backward,
}
"""Operations that yield both gradients and have no mask, replaced while tracing."""
