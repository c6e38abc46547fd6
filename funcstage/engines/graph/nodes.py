"""What kinds of nodes there are in a joint graph: views, cheap ones, and what they depend on."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from funcstage._torch.operators import OpOverload
from funcstage._torch.shapes import is_number
from funcstage.engines.graph.joint import is_random

aten = torch.ops.aten


prims = torch.ops.prims


def is_view(node: Node) -> bool:
    """Tell whether a node's result takes no memory of its own: a part of what it reads, or a number."""
    if is_number(node):
        return True
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    target = node.target
    return isinstance(target, OpOverload) and (target.is_view or target in _RESHAPES)


def is_cheap(node: Node) -> bool:
    """Tell whether an operation moves or maps elements and no more, so that running it twice costs little."""
    if is_number(node):
        return True
    if node.target is operator.getitem:
        return is_cheap(node.args[0])  # type: ignore[arg-type]
    target = node.target
    if not isinstance(target, OpOverload) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or is_view(node) or target.overloadpacket in _CHEAP


def dependents(graph: Graph, roots: Iterable[Node]) -> set[Node]:
    found = set(roots)
    for node in graph.nodes:
        if node.op == "call_function" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def behind(reads: Iterable[Node], within: set[Node]) -> set[Node]:
    """What must be computed for these reads, out of `within` and from nothing but `within`."""
    stack = [node for node in reads if node in within]
    found = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in within and source not in found:
                found.add(source)
                stack.append(source)
    return found


_RESHAPES = {aten._unsafe_view.default, aten.reshape.default, aten.lift_fresh_copy.default}


_CHEAP_NAMES = """
_conj arange cat clone constant_pad_nd copy elu_backward empty empty_like empty_strided expand_copy eye fill
flip full full_like hardtanh_backward leaky_relu_backward log_sigmoid_backward masked_fill new_empty new_full
new_ones new_zeros ones ones_like pixel_shuffle pixel_unshuffle _prelu_kernel repeat roll scalar_tensor
select_backward select_scatter slice_backward slice_scatter softplus_backward stack _to_copy tril triu where
zeros zeros_like
"""


_CHEAP = {getattr(aten, name) for name in _CHEAP_NAMES.split()} | {prims.convert_element_type, prims.iota}
"""Operations that are cheap to run again, beside views and what torch tags as pointwise."""
