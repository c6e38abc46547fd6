"""The private parts of torch that tracing needs, in one place."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._C._dynamo.guards import TensorGuards
from torch._ops import HigherOrderOperator, OpOverload
from torch._prims.rng_prims import run_and_save_rng_state as draw_and_save
from torch._prims.rng_prims import run_with_rng_state as draw_again
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from funcstage import forks
from funcstage.dtensors import first_dtensor

UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
)
"""What fake tensors raise where the program depends on the values of tensors."""

__all__ = [
    "UNTRACEABLE",
    "BoxedCodeGen",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "LazyGraphModule",
    "Policy",
    "comparison",
    "direct",
    "draw_again",
    "draw_and_save",
    "fake_like",
    "from_functional",
    "has_no_memory_of_its_own",
    "last_recorded",
    "make_fx",
    "one_at_a_time",
    "policy_of",
    "to_functional",
    "without_modes",
]


one_at_a_time = forks.lock()
"""Tracing and lowering patch what all threads of a process share."""


def fake_like(
    mode: FakeTensorMode,
    tensor: Tensor,
    geometry: tuple[Sequence[Any], Sequence[Any]] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A fake tensor with the shape and strides of a real one, or others; that is neither read nor kept."""
    shape, strides = geometry or (tensor.shape, tensor.stride())
    with mode:
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device or tensor.device)


def last_recorded() -> Node:
    """The last node of the graph that is being recorded."""
    mode: Any = get_proxy_mode()
    node: Node = mode.tracer.graph._root.prev
    return node


Policy: TypeAlias = Callable[[Node], bool]


def policy_of(context: object) -> Policy | None:
    """Whether to save a node, by the policy of a selective checkpoint that made this context; else None."""
    policy = getattr(context, "policy_fn", None)
    if policy is None:
        return None

    def saves(node: Node) -> bool:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
        choice = policy(SelectiveCheckpointContext(is_recompute=False), node.target, *args, **kwargs)
        return choice in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)

    return saves


def to_functional(tensor: Tensor) -> Tensor:
    """Wrap a tensor so that in-place operations on it are recorded as functions."""
    wrapped: Tensor = FunctionalTensor.to_functional(tensor)
    return wrapped


def from_functional(tensor: Tensor) -> Tensor:
    """The current value of a functional tensor."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)
    value: Tensor = torch._from_functional_tensor(tensor.elem)
    return value


def comparison(
    tensors: Sequence[Tensor], open_dims: Mapping[int, Collection[int]] | None
) -> Callable[..., bool]:
    """A check whether tensors agree with these in class, shape, strides, dtype, device and requires_grad.

    Also in what the dispatcher sees: conjugation, negation, subclasses, wrappers of transforms, autocast.
    Sizes of open dimensions are not looked at, nor are the strides of tensors that have some.
    """
    shapes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    for i, dims in (open_dims or {}).items():
        strides[i] = [None] * len(strides[i])
        for dim in dims:
            shapes[i][dim] = None
    if not tensors:
        return lambda: True
    check: Callable[..., bool] = TensorGuards(
        *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
    ).check
    return check


def direct(module: GraphModule) -> Callable[[list[Any]], Any]:
    """What a graph module runs, but its operators are called as torch's own `__call__` of them would.

    Those are Python and looked up by four names: half a microsecond for each operation of a small stage.
    """
    code = module.graph.python_code("self")
    source, names = code.src, {**code.globals}
    operators = {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}
    for i, operator in enumerate(operators):
        names[f"torch_operator_{i}"] = operator._op
        source = source.replace(f" torch.ops.{operator}(", f" torch_operator_{i}(")
    exec(compile(source, f"<program of {len(module.graph.nodes)} nodes>", "exec"), names)
    return types.MethodType(names["forward"], module)


def has_no_memory_of_its_own(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for others: a wrapper subclass, or one that a transform has wrapped.

    Not so DTensors, which are refused elsewhere.
    """
    keys = torch._C._dispatch_keys(tensor)
    return any(map(keys.has, _OF_WRAPPERS)) and first_dtensor([tensor]) is None


_OF_WRAPPERS = [
    torch._C.DispatchKey.Python,
    torch._C.DispatchKey.Functionalize,
    torch._C.DispatchKey.FuncTorchGradWrapper,
    torch._C.DispatchKey.FuncTorchBatched,
]
