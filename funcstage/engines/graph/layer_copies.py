"""A layer that was traced, and copies of what was recorded of it, forward and backward, for its like."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from operator import getitem
from types import NoneType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge
from torch.fx import Node, map_arg

from funcstage._torch.operators import OpOverload, without_torch_function
from funcstage._torch.recorded import copies, node_of, recorded_since, tensor_of
from funcstage._torch.tensors import version_of
from funcstage._torch.tracing import FakeTensor, last_recorded
from funcstage.engines.graph.alike import Description, Unlike
from funcstage.engines.graph.regions import GATHERED, REGION
from funcstage.state.profilers import resume


class Entry(NamedTuple):
    """What is known of a layer before it runs.

    Attributes:
        around: what its trace depends on besides what it says itself.
        said: that.
        read: what it has read, while it ran, of the attributes that are said apart.
        reads: the nodes of its tensors, where they have one.
        edges: where those that have gradients are on autograd's tape.
    """

    around: Any
    said: Hashable
    read: dict[tuple[int, str], Hashable]
    reads: list[Node | None]
    edges: dict[int, GradientEdge]


class First:
    """A layer that was traced and stands for others.

    Attributes:
        entry: what was known before it ran.
        nodes: what was recorded, in order.
        made: the nodes of the tensors that it returned.
        differentiable: which of these have gradients.
        ends: those, on autograd's tape.
        counts: how many gradients are summed up for each of its tensors, those alone that have some.
        backwards: what its tape records, by what is known of the cotangents.
    """

    def __init__(
        self,
        entry: Entry,
        nodes: list[Node],
        spec: optree.PyTreeSpec,
        leaves: list[Any],
        made: list[Node],
        differentiable: list[bool],
        ends: list[GradientEdge],
        counts: Counter[int],
        unchanged: Callable[[], bool],
    ) -> None:
        self.entry, self.nodes, self.made, self.ends, self.counts = entry, nodes, made, ends, counts
        self.differentiable = differentiable
        self.backwards: dict[Hashable, _Backward] = {}
        self._spec, self._unchanged = spec, unchanged
        self._leaves = [_RESULT if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def is_like(self, around: Any, found: Description) -> bool:
        """Tell whether a layer that says so of itself would record the same."""
        entry = self.entry
        alike = entry.around == around and entry.said == found.said
        return alike and entry.read.items() <= found.apart.items() and self._unchanged()

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What a layer returns, of its tensors."""
        left = iter(tensors)
        leaves = [next(left) if leaf is _RESULT else leaf for leaf in self._leaves]
        return optree.tree_unflatten(self._spec, leaves)


class Copy:
    """A layer that was not traced.

    Attributes:
        result: what it returns.
        known: for each node of the first layer, and for each that this one has read, that of this layer.
    """

    def __init__(self, first: First, tensors: list[Tensor]) -> None:
        self.first = first
        reads = [node_of(tensor) for tensor in tensors]
        if _pattern(reads) != _pattern(first.entry.reads):
            raise Unlike("its tensors are others to the recorder")
        given = {old: new for old, new in zip(first.entry.reads, reads, strict=True) if old and new}
        self.known = copies(first.nodes, given, _OF_REGIONS)
        reached = [tensors[i] for i in first.counts]
        self._edges = [(tensor.grad_fn, tensor.output_nr) for tensor in reached]
        outputs = [*_Layer.apply(self, *reached)] if reached else self.outputs()
        self.result: Any = first.result(outputs)
        self._watched = [*tensors, *outputs]
        self._versions = [*map(version_of, self._watched)]

    def outputs(self) -> list[Tensor]:
        """Tensors for what the layer returns."""
        return [tensor_of(self.known[node]) for node in self.first.made]

    def check(self, edges: Mapping[tuple[Any, int], int]) -> None:
        """See that no gradient is summed up in another order, and that nothing was written.

        Raises:
            Unlike: otherwise.
        """
        if [*map(version_of, self._watched)] != self._versions:
            raise Unlike("what a layer has read or returned was written")
        for edge, count in zip(self._edges, self.first.counts.values(), strict=True):
            if count > 1 and edges[edge] > 1:
                raise Unlike("gradients would be summed up in another order")

    def forget(self) -> None:
        """Let go of tensors, which hold the tape that holds this."""
        self.result, self._watched = None, []
        self.first.backwards.clear()

    def backward(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of what the layer has read."""
        if torch.is_grad_enabled():
            raise Unlike("its gradients are differentiated")
        given = [None if each is None else _cotangent(each) for each in cotangents]
        nodes = [None if each is None else node_of(each) for each in cotangents]
        key = *given, *_pattern(nodes)
        if any(each is not None and node is None for each, node in zip(cotangents, nodes, strict=True)):
            raise Unlike("a cotangent is none of the trace")
        if not {*nodes}.isdisjoint(self.known.values()):
            raise Unlike("a cotangent is one of the layer's own values")
        found = self.first.backwards.get(key)
        if found is None:
            grads, self.first.backwards[key] = _recorded(self, cotangents, nodes)
            return grads
        return found.copied(self, cotangents, nodes)


class _Backward(NamedTuple):
    """What the tape of the first layer has recorded for the copy that asked first.

    Attributes:
        by: that copy.
        nodes: they.
        given: the nodes of its cotangents.
        grads: the nodes of its gradients, or which cotangent one is.
    """

    by: Copy
    nodes: list[Node]
    given: Sequence[Node | None]
    grads: list[Node | int | None]

    def copied(
        self, copy: Copy, cotangents: Sequence[Tensor | None], nodes: Sequence[Node | None]
    ) -> list[Tensor | None]:
        """The gradients of another copy."""
        instead = {mine: copy.known[old] for old, mine in self.by.known.items()}
        instead |= {old: new for old, new in zip(self.given, nodes, strict=True) if old and new}
        made = copies(self.nodes, instead, _OF_REGIONS)

        def grad_of(grad: Node | int | None) -> Tensor | None:
            if isinstance(grad, int):
                return cotangents[grad]
            return None if grad is None else tensor_of(made[grad])

        return [*map(grad_of, self.grads)]


def _recorded(
    copy: Copy, cotangents: Sequence[Tensor | None], given: Sequence[Node | None]
) -> tuple[list[Tensor | None], _Backward]:
    """Run the tape of the first layer, and let what it records read the values of a copy."""
    first, last = copy.first, last_recorded()
    came = [(end, each) for end, each in zip(first.ends, cotangents, strict=True) if each is not None]
    ends = [end for end, _ in came]
    wanted = [first.entry.edges[i] for i in first.counts]
    at = {(edge.node, edge.output_nr) for edge in wanted}
    if len(ends) < len(first.ends) and {*edges_behind(ends, at)} & at != at:
        raise Unlike("some of its tensors have no gradient")
    grads: list[Tensor | None] = []
    grads += torch.autograd.grad(
        ends, wanted, [each for _, each in came], retain_graph=True, allow_unused=True
    )
    nodes = [*recorded_since(last)][::-1]
    own = {*nodes, *given}
    for node in nodes:
        node.args = map_arg(node.args, lambda read: copy.known.get(read, read))
        node.kwargs = map_arg(node.kwargs, lambda read: copy.known.get(read, read))
    check_nodes(nodes, own.union(copy.known.values()))
    of_grads = [None if grad is None else node_of(grad) for grad in grads]
    places = {node: i for i, node in enumerate(given)}
    found: list[Node | int | None] = [places.get(node, node) if node else None for node in of_grads]
    return grads, _Backward(copy, nodes, given, found)


def check_nodes(nodes: Iterable[Node], known: Set[Any]) -> None:
    """See that nodes can be copied, and read nothing but what is known."""
    for node in nodes:
        if not (isinstance(node.target, OpOverload) or node.target is getitem):
            raise Unlike(f"{node} cannot be copied")
        if not known >= {*node.all_input_nodes}:
            raise Unlike(f"{node} reads what the layer was not given")
        if "val" not in node.meta and node.target is getitem:
            continue  # it is no tensor: on GPUs attention returns lengths, and some that were not given
        if "val" not in node.meta or not all(map(_is_simple, _tensors_of(node.meta["val"]))):
            raise Unlike(f"{node} has another layout")


class _Layer(Function):
    """The node of a copy on autograd's tape."""

    @staticmethod
    def forward(ctx: Any, copy: Copy, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.copy = copy
        ctx.set_materialize_grads(False)
        outputs = copy.outputs()
        differentiable = copy.first.differentiable
        ctx.mark_non_differentiable(*[t for t, has in zip(outputs, differentiable, strict=True) if not has])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable = ctx.copy.first.differentiable
        given = [each for each, has in zip(cotangents, differentiable, strict=True) if has]
        with unseen():
            return None, *ctx.copy.backward(given)


def edges_behind(
    ends: Iterable[GradientEdge], stop: Container[tuple[Any, int]] = ()
) -> Counter[tuple[Any, int]]:
    """How often each output of a node is read on a tape up to where it stops, its ends counted too."""
    pending = [(end.node, end.output_nr) for end in ends]
    found: Counter[tuple[Any, int]] = Counter(pending)
    pending = [*found]
    entered = set()
    while pending:
        edge = pending.pop()
        node = edge[0]
        if edge in stop or node in entered:
            continue
        entered.add(node)
        for following, number in node.next_functions:
            if following is not None:
                found[following, number] += 1
                pending.append((following, number))
    return found


def _pattern(nodes: Iterable[Node | None]) -> list[int | None]:
    """Which of some nodes are the same."""
    first: dict[Node, int] = {}
    return [None if node is None else first.setdefault(node, i) for i, node in enumerate(nodes)]


def _cotangent(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _is_simple(tensor: Tensor) -> bool:
    """Tell whether a fake tensor like it can be made of memory alone."""
    return (
        type(tensor) is FakeTensor
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _tensors_of(value: Any) -> Iterator[Tensor]:
    for each in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(each, Tensor):
            yield each
        elif type(each) not in (int, NoneType):
            raise Unlike("a node makes no tensor")


@contextmanager
def unseen() -> Iterator[None]:
    """Keep what is done here from the modes and profilers that watch the stage."""
    profiler = sys.getprofile()
    sys.setprofile(None)
    try:
        with without_torch_function():
            yield
    finally:
        resume(profiler)


_RESULT: Any = object()
_OF_REGIONS = (REGION, GATHERED)
