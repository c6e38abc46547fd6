"""What an operation of a graph costs: FLOPs, and what it moves to and from memory."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from funcstage._torch.pytree import tree_leaves, tree_map
from funcstage._torch.shapes import at_hints, hint
from funcstage.engines.graph.nodes import is_view

FLOPS_PER_BYTE = 100
"""Floating-point operations that take as long as to move a byte: an accelerator's, in half precision."""


def cost(node: Node) -> float:
    """How long a node runs, in FLOPs: those that it does, or those for which there is time while it moves."""
    if node.op != "call_function" or is_view(node):
        return 0
    moved = _size(node) + sum(map(_size, node.all_input_nodes))
    return max(flops(node), FLOPS_PER_BYTE * moved)


def flops(node: Node) -> int:
    """Floating-point operations of a node, as `torch.utils.flop_counter` counts them."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args = [_value(argument) for argument in node.args]
    kwargs = {name: _value(argument) for name, argument in node.kwargs.items()}
    return int(formula(*args, **kwargs, out_val=tree_map(at_hints, node.meta["val"])))


def _value(argument: object) -> object:
    return tree_map(at_hints, argument.meta["val"]) if isinstance(argument, Node) else argument


def _size(node: Node) -> int:
    """Bytes of a node's value, read or written once."""
    values = tree_leaves(node.meta.get("val"))
    return sum(hint(value.numel()) * value.element_size() for value in values if isinstance(value, Tensor))
