"""Nodes of the graph that is being recorded: which one a tensor is, copies of them, and tensors for these.

Private: the tracer's table of tensors, how fake tensors are made, and the numbers of autograd's nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy, map_arg
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode
from torch.utils._mode_utils import no_dispatch

from funcstage._torch.tensors import memory_key_of
from funcstage._torch.tracing import FakeTensor, from_functional, last_recorded, to_functional


def node_of(tensor: Tensor) -> Node | None:
    """The node whose result a tensor of the trace is; `None` where it is none, or its values are known."""
    found: Any = _tracer().tensor_tracker.get(from_functional(tensor))
    return None if found is None or found.constant is not None else found.proxy.node


def recorded_since(before: Node) -> Iterator[Node]:
    """The nodes recorded after this one, last first."""
    node = last_recorded()
    while node is not before:
        yield node
        node = node.prev


def copies(nodes: Iterable[Node], instead: Mapping[Node, Node], left_out: Iterable[str]) -> dict[Node, Node]:
    """Record nodes once more, reading other nodes instead of some.

    Args:
        nodes: in their order.
        instead: for each that they read from outside.
        left_out: what of their notes is not copied.

    Returns:
        What is read instead of these nodes, their copies among it.
    """
    graph = last_recorded().graph
    found = dict(instead)
    memory: dict[int, torch.UntypedStorage] = {}
    for node, other in instead.items():  # where there are views, copies are views of what is read instead
        value, now = node.meta.get("val"), other.meta.get("val")
        if isinstance(value, Tensor) and isinstance(now, Tensor):
            memory[memory_key_of(value.untyped_storage())] = now.untyped_storage()
    with no_dispatch():
        for node in nodes:
            args: Any = map_arg(node.args, found.__getitem__)
            kwargs: Any = map_arg(node.kwargs, found.__getitem__)
            copy = graph.create_node(node.op, node.target, args, kwargs, type_expr=node.type)
            copy.meta = {name: note for name, note in node.meta.items() if name not in left_out}
            if "val" in node.meta:
                copy.meta["val"] = _alike(node.meta["val"], memory)
            found[node] = copy
    return found


def tensor_of(node: Node) -> Tensor:
    """A tensor of the trace, whose node this is."""
    with no_dispatch():
        value = _fake(node.meta["val"], node.meta["val"].untyped_storage())
    _tracer().tensor_tracker[value] = _ProxyTensor(Proxy(node, _tracer()), None)
    return to_functional(value)


def number_of(node: Any) -> int:
    """When a node of autograd's tape was made: later ones have higher numbers."""
    number: int = node._sequence_nr()
    return number


def next_number() -> int:
    """The number of the next one, or a smaller one that no node has yet."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def _tracer() -> Any:
    mode: Any = get_proxy_mode()
    return mode.tracer


def _alike(value: Any, memory: dict[int, torch.UntypedStorage]) -> Any:
    """Fake tensors like these, which share memory where these do."""
    if isinstance(value, (list, tuple)):
        return type(value)([_alike(each, memory) for each in value])
    if not isinstance(value, Tensor):
        return value
    own = value.untyped_storage()
    key = memory_key_of(own)
    if key not in memory:
        memory[key] = torch.UntypedStorage(own.nbytes(), device="meta")
    return _fake(value, memory[key])


def _fake(like: Any, storage: torch.UntypedStorage) -> Tensor:
    bare = torch.empty(0, dtype=like.dtype, device="meta")
    bare.set_(storage, like.storage_offset(), like.shape, like.stride())
    return FakeTensor(like.fake_mode, bare, like.fake_device)
