"""Residuals: the tensors that autograd nodes have saved, listed, measured and replaced.

A tape's residuals live inside autograd nodes, where `Residuals` reads them. To make a pullback a pytree
they must also be exchangeable (moved to the host and back, say): they are then taken out of the nodes,
through the hooks of each saved tensor, into a dict from which the nodes read while a pullback runs.
That is done only for pullbacks that are rebuilt from leaves.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from funcstage._torch import functorch as ft
from funcstage._torch.messages import SAVED_WRITTEN, says
from funcstage._torch.tape import is_python
from funcstage._torch.tensors import indices_and_values
from funcstage.errors import StageError
from funcstage.forks import Turn

_RAW = "_raw_saved_"


class Cell:
    """Stands in a node for a tensor that is not there: it was taken out, or never put in.

    Attributes:
        tensor: what to read where no home has anything else.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor = tensor


Home = dict[Cell, Tensor]
"""Where a pullback keeps the tensors that were taken out of the nodes."""


class Switchboard:
    """Tells the nodes of one forward pass whose home to read; shared by all its pullbacks.

    Attributes:
        taken_out: whether any residuals were taken out of the nodes.
        retain: whether the pullback that runs may be asked again.
        rerun: what checkpointed regions that it runs again leave for W.
    """

    __slots__ = ("_home", "_turn", "rerun", "retain", "taken_out")

    def __init__(self) -> None:
        self._turn = Turn()
        self._home: Home = {}
        self.taken_out = False
        self.retain = False
        self.rerun: list[Any] = []

    @contextmanager
    def rerunning(self, retain: bool) -> Iterator[list[Any]]:
        """Collect what checkpointed regions leave for W while a pullback runs."""
        with self._turn.taken():
            before = self.rerun, self.retain
            self.rerun, self.retain = [], retain
            try:
                yield self.rerun
            finally:
                self.rerun, self.retain = before

    @contextmanager
    def reading(self, home: Home) -> Iterator[None]:
        """Let the nodes read from `home`; pullbacks that share nodes take turns."""
        with self._turn.taken():
            before, self._home = self._home, home
            try:
                yield
            finally:
                self._home = before

    def read(self, cell: Cell) -> Tensor:
        tensor = self._home.get(cell, cell.tensor)
        if tensor is None:
            raise StageError(
                "These residuals were moved elsewhere: use the pullback that was rebuilt with them."
            )
        return ft.under_one_dead_wrapper(tensor)


class Residual(NamedTuple):
    """A distinct tensor and all the places in nodes that hold it."""

    tensor: Tensor
    places: list[Any]


def residuals_of(
    edges: Iterable[GradientEdge], state: Iterable[Tensor], switchboard: Switchboard, home: Home
) -> list[Residual]:
    """List the distinct tensors that the nodes behind `edges` hold.

    Args:
        edges: where the walk starts.
        state: tensors that are alive anyway (parameters, buffers); whatever shares their memory is left out.
        switchboard: the forward pass's.
        home: what was taken out of the nodes already.
    """
    excluded = {ft.storage_key(tensor) for tensor in state}
    found: dict[Hashable, Residual] = {}
    with switchboard.reading(home):
        for node in nodes_behind(edges):
            for tensor, place in _saved(node):
                storage = ft.storage_key(tensor)
                if storage in excluded:
                    continue
                geometry = (tensor.dtype, tensor.shape, *_strides(tensor), tensor.is_conj(), tensor.is_neg())
                found.setdefault((storage, geometry), Residual(tensor, [])).places.append(place)
    return list(found.values())


def replaced(
    residuals: Sequence[Residual], tensors: Sequence[Tensor], switchboard: Switchboard, home: Home
) -> Home:
    """Take the residuals out of their nodes into `home`, and return a new home with `tensors` instead."""
    switchboard.taken_out = True
    new_home: Home = {}
    for residual, tensor in zip(residuals, tensors, strict=True):
        for place in residual.places:
            cell = place.data
            if not isinstance(cell, Cell):
                cell = Cell()
                home[cell] = residual.tensor
                place.register_hooks(functools.partial(_pack, cell), switchboard.read)
            new_home[cell] = tensor
    return new_home


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind some tensors, memory that several share counted once."""
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    total = 0
    for tensor in map(ft.innermost, tensors):
        if tensor.layout is not torch.strided:
            total += sum(part.nbytes for part in _parts(tensor))
        elif tensor.numel():
            reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset())
            size = tensor.element_size()
            spans[ft.storage_key(tensor)].append((start * size, (start + reach + 1) * size))
    for intervals in spans.values():
        end = 0
        for first, last in sorted(intervals):
            total += max(0, last - max(first, end))
            end = max(end, last)
    return total


@contextmanager
def saving_outside(switchboard: Switchboard) -> Iterator[None]:
    """Keep what is saved meanwhile outside the nodes, and give it to them with one dead wrapper at most.

    A transform around the stage (vmap, jvp, grad) sees through the wrapper of one closed level, whereas a
    site's operands are under two when W reads them; it would take them for constants, or fail.
    """
    with ft.saving_through(Cell, switchboard.read):
        yield


def _pack(cell: Cell, tensor: Tensor) -> Cell:
    return cell


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a sparse one consists of."""
    if tensor.layout is torch.sparse_coo:
        return indices_and_values(tensor)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def _strides(tensor: Tensor) -> tuple[Hashable, ...]:
    return (tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()


def nodes_behind(edges: Iterable[GradientEdge]) -> Iterator[Node]:
    stack = [edge.node for edge in edges]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def leaves_behind(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves that autograd would accumulate gradients in, if it went back from some tensors."""
    for node in nodes_behind(map(get_gradient_edge, outputs)):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf


def nodes_between(edges: Iterable[GradientEdge], ends: set[Node]) -> set[Node]:
    """The nodes behind `edges` from which one of `ends` is reached."""
    nodes = list(nodes_behind(edges))
    leading = set(ends)
    found = -1
    while found != len(leading):  # the walk knows no order
        found = len(leading)
        leading.update(n for n in nodes if any(after in leading for after, _ in n.next_functions))
    return leading.intersection(nodes)


class SavedAndWritten(Exception):
    """Autograd refuses to give out a saved tensor, as that was written into."""


def saved_in(nodes: Iterable[Node], switchboard: Switchboard, home: Home) -> list[Tensor]:
    """All that these nodes hold.

    Raises:
        SavedAndWritten: if autograd has noticed a write into any of it.
    """
    found: list[Tensor] = []
    with switchboard.reading(home):
        for node in nodes:
            found += (tensor for tensor, _ in _saved(node, writes_raise=True))
    return found


@functools.cache
def _saved_names(node_type: type) -> list[str]:
    return [name.removeprefix(_RAW) for name in dir(node_type) if name.startswith(_RAW)]


def _saved(node: Node, writes_raise: bool = False) -> Iterator[tuple[Tensor, Any]]:
    """Yield the tensors that a node has saved, each with its `SavedTensor`."""
    for name in _saved_names(type(node)):
        # Python nodes know their saved tensors under a name of their own.
        public = "saved_tensors" if is_python(node) else f"_saved_{name}"
        try:
            values, places = getattr(node, public), getattr(node, _RAW + name)
        except RuntimeError as error:  # freed by an earlier reverse pass, or written into
            if writes_raise and says(error, SAVED_WRITTEN):
                raise SavedAndWritten from error
            continue
        if not isinstance(values, tuple):
            values, places = (values,), (places,)
        for value, place in zip(values, places, strict=True):
            if isinstance(value, Tensor):
                yield ft.without_dead_wrappers(value), place
