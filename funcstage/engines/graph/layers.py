"""Layers that are alike: one is traced, and what was recorded of it is copied for the others.

The first of them runs as any other module, and what it leaves in the graph and on autograd's tape is noted.
One that is called later and says the same of itself (`alike.py`) does not run: its nodes are copies of the
first one's, and on the tape it is a single node, `_Layer`. Numbers and strings in which the layers differ are
put aside while the first one runs: unless it reads them, they do not matter. When the backward comes to such
a node first, it runs the first layer's tape on the cotangents that came, and lets what that recorded read the
other's values; further ones are copies again. The joint graph is thus what it would have been.

A layer stands for others only if it does nothing but compute: what it has read, wherever that lies, is
afterwards as it was before, no tensor was written into, and each node reads the layer's own tensors, those
that it was given, or its own nodes. Where anything is not surely so, layers are traced themselves. Where it
is found out too late, all of the stage is traced anew without copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import is_
from typing import Any

import optree
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import Node

from funcstage._torch.calls import asking_about_calls
from funcstage._torch.namespaces import noting_reads
from funcstage._torch.recorded import next_number, node_of, number_of, recorded_since
from funcstage._torch.tape import is_python
from funcstage._torch.tensors import OF_FUNCTIONAL, version_of
from funcstage._torch.tracing import FunctionalTensor, last_recorded
from funcstage.engines.graph.alike import Description, Unlike, all_in, description, differing, surroundings
from funcstage.engines.graph.layer_copies import Copy, Entry, First, check_nodes, edges_behind, unseen
from funcstage.engines.graph.nodes import is_view
from funcstage.engines.graph.recorder import Recorder, watch
from funcstage.engines.graph.regions import Regions
from funcstage.engines.node_hooks import is_leaf
from funcstage.state.content import is_plain
from funcstage.state.reach import holders

FEWEST_LAYERS = 3
"""How many siblings of one class there must be for any of them to be copied."""

FEWEST_NODES = 8
"""What a smaller layer records is not worth looking for."""

MOST_TRIED = 4
"""How many layers of one class may turn out to stand for no other."""


class Layers:
    """The layers of a stage while it is traced: is asked about the calls of its modules.

    Args:
        module: the stage's; without one, none are looked for.
        recorder: notes what the stage reads; likewise.
        regions: checkpointed regions of the trace.

    Attributes:
        copies: the layers that were not traced.
        is_used: whether any was meant not to be, so that an error may be this one's.
    """

    def __init__(self, module: nn.Module | None, recorder: Recorder | None, regions: Regions) -> None:
        self.copies: list[Copy] = []
        self._stage, self._recorder, self._regions = module, recorder, regions
        may_be = () if module is None or recorder is None else _siblings(module)
        self._siblings = {id(part): part for part in may_be}
        self._apart: dict[tuple[type, ...], list[Set[str]]] = {}
        self._firsts: defaultdict[type, list[First]] = defaultdict(list)
        self._tried: Counter[type] = Counter()
        self._effects: Sequence[Any] = ()
        self._busy = False

    @property
    def is_used(self) -> bool:
        return any(self._firsts.values())

    def asked(self, effects: Sequence[Any]) -> AbstractContextManager[Any]:
        """Be asked, if there may be any that are alike; `effects` is a list of what no copy would do."""
        self._effects = effects
        return asking_about_calls(self.called) if self._siblings else nullcontext()

    def forget(self) -> None:
        """Let go of all that a trace has made."""
        for copy in self.copies:
            copy.forget()
        self._firsts.clear()

    def called(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module, or copy what another one has recorded."""
        if self._busy or id(module) not in self._siblings:
            return call(module, *args, **kwargs)
        kind = type(module)
        with unseen():
            before = self._copied_or_before(module, (args, kwargs))
        if isinstance(before, Copy):
            return before.result
        if before is None:
            return call(module, *args, **kwargs)
        self._busy = True
        try:
            with before.noting_reads():
                result = call(module, *args, **kwargs)
        finally:
            self._busy = False
        with unseen(), suppress(Unlike):
            self._firsts[kind].append(before.first(result))
        return result

    def check(self, outputs: Iterable[Tensor]) -> None:
        """Look at what became of the copies' tensors, when all of the stage has run.

        Args:
            outputs: of the stage, those that may have cotangents.

        Raises:
            Unlike: if what one has read or returned was written since, of which autograd would have told; or
                if gradients would be summed in another order.
        """
        if not self.copies:
            return
        edges = edges_behind(map(get_gradient_edge, outputs))
        for copy in self.copies:
            copy.check(edges)

    def _copied_or_before(self, module: nn.Module, arguments: Any) -> Copy | _Before | None:
        """What stands for a call, or what has to be known before it to let it stand for others."""
        kind = type(module)
        firsts, spent = self._firsts[kind], self._tried[kind] >= MOST_TRIED
        if (spent and not firsts) or self._regions.is_reentrant:
            return None
        try:
            around = *surroundings(), self._regions.is_open
            apart = self._apart_of(module)
            found = description(module, arguments, apart)
            for first in firsts:
                if first.is_like(around, found):
                    self.copies.append(Copy(first, found.tensors))
                    return self.copies[-1]
            self._tried[kind] += 1
            return None if spent else _Before(self, module, arguments, around, apart, found)
        except Unlike:
            self._tried[kind] += 1
            return None

    def _apart_of(self, module: nn.Module) -> list[Set[str]]:
        """Which attributes are said apart, for each module of a layer: the same for all of its structure."""
        kinds = _kinds(module)
        if kinds not in self._apart:
            layers = [layer for layer in self._siblings.values() if _kinds(layer) == kinds]
            self._apart[kinds] = differing(layers)
        return self._apart[kinds]

    def state(self) -> Iterator[Any]:
        """What the stage's modules hold, one after the other, and what regions have noted."""
        yield self._regions.count, len(self._effects)
        for holder in holders(self._stage):
            yield holder
            yield from holder.values() if isinstance(holder, dict) else holder

    def watch(self) -> Callable[[], bool]:
        """A check whether what was read is unchanged."""
        assert self._recorder is not None
        return watch(self._recorder)


class _Before:
    """A layer that is about to run, and may stand for others."""

    def __init__(
        self,
        layers: Layers,
        module: nn.Module,
        arguments: Any,
        around: Any,
        apart: list[Set[str]],
        found: Description,
    ) -> None:
        reads = [node_of(tensor) for tensor in found.tensors]
        edges = {i: _edge_of(tensor) for i, tensor in enumerate(found.tensors) if tensor.requires_grad}
        self._entry = Entry(around, found.said, {}, reads, edges)
        self._tensors, self._apart, self._found_apart = found.tensors, apart, found.apart
        self._layers, self._module, self._arguments = layers, module, arguments
        self._number = next_number()
        self._held = [*all_in(arguments), *found.tensors]
        self._versions = [*map(version_of, found.tensors)]
        self._state = [*layers.state()]
        self._unchanged = layers.watch()
        self._last = last_recorded()

    def noting_reads(self) -> AbstractContextManager[None]:
        """Note which attributes it reads of those that are said apart."""

        def read(i: int, name: str) -> None:
            self._entry.read[i, name] = self._found_apart[i, name]

        return noting_reads([*self._module.modules()], self._apart, read)

    def first(self, result: Any) -> First:
        """The layer as one that may stand for others, now that it has run.

        Raises:
            Unlike: if it may not.
        """
        nodes = [*recorded_since(self._last)][::-1]
        self._check_unchanged()
        self._check_nodes(nodes)
        leaves, spec = optree.tree_flatten(result, none_is_leaf=True)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, Tensor) or is_plain(leaf) for leaf in leaves):
            raise Unlike("it returns objects")
        made = [self._node_of_output(output, {*nodes}) for output in outputs]
        if len({*map(_memory_of, made)}) < len(made):
            raise Unlike("results share memory")
        differentiable = [output.requires_grad for output in outputs]
        ends = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        counts = self._contributions(ends)
        return First(
            self._entry, nodes, spec, leaves, made, differentiable, ends, counts, self._layers.watch()
        )

    def _check_unchanged(self) -> None:
        """See that the layer has done nothing but compute."""
        state = [*self._layers.state()]
        alike = _are_the_same(state[1:], self._state[1:])
        written = [*map(version_of, self._tensors)] != self._versions
        if not alike or written or state[0] != self._state[0] or not self._unchanged():
            raise Unlike("it changes something")
        now = description(self._module, self._arguments, self._apart)
        held = [*all_in(self._arguments), *now.tensors]
        if now.said != self._entry.said or not _are_the_same(held, self._held):
            raise Unlike("it changes itself, or what it was given")

    def _check_nodes(self, nodes: Sequence[Node]) -> None:
        """See that all is computed from the layer's tensors."""
        if len(nodes) < FEWEST_NODES:
            raise Unlike("it is too small")
        check_nodes(nodes, {*nodes, *self._entry.reads})

    def _node_of_output(self, output: Tensor, nodes: set[Node]) -> Node:
        node = node_of(output) if type(output) is FunctionalTensor else None
        if node is None or _memory_of(node) not in nodes or vars(output).keys() - OF_FUNCTIONAL:
            raise Unlike("it returns what it was given, or a view of that")
        return node

    def _contributions(self, ends: Iterable[GradientEdge]) -> Counter[int]:
        """How many gradients are summed up for each of its tensors."""
        at = {(edge.node, edge.output_nr): i for i, edge in self._entry.edges.items()}
        counts: Counter[int] = Counter()
        for (node, number), count in edges_behind(ends, {*at}).items():
            if (node, number) in at:
                counts[at[node, number]] = count
            elif is_python(node) or is_leaf(node) or number_of(node) < self._number:
                raise Unlike("its tape has nodes of others")
        nodes = {self._entry.edges[i].node for i in counts}
        before = [GradientEdge(f, number) for node in nodes for f, number in node.next_functions if f]
        if not {*edges_behind(before)}.isdisjoint(at):
            raise Unlike("a tensor is computed from another one, whose gradient would come by it, too")
        return counts


def _siblings(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that have several others of their class beside them, and are no single operations."""
    for part in module.modules():
        # Without weak proxies, which no dict of torch's takes.
        held: list[Any] = [*part._modules.values()]
        children = dict.fromkeys(child for child in held if issubclass(type(child), nn.Module))
        kinds = Counter(map(type, children))
        for child in children:
            of_torch = type(child).__module__.startswith("torch.nn.modules.")
            if kinds[type(child)] >= FEWEST_LAYERS and not (of_torch and not any(child.children())):
                yield child


def _kinds(module: nn.Module) -> tuple[type, ...]:
    return tuple(map(type, module.modules()))


def _are_the_same(values: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(values) == len(before) and all(map(is_, values, before))


def _edge_of(tensor: Tensor) -> GradientEdge:
    edge = get_gradient_edge(tensor)
    if is_leaf(edge.node):
        raise Unlike("it reads a leaf")
    return edge


def _memory_of(node: Node) -> Node:
    """The node whose memory a node's result is a view of."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
