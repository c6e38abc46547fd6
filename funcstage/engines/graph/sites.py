"""Sites of a compiled stage: where the gradients in the program W begin, each with its cotangent and inputs.

Going back from a parameter's gradient, the first operation that reads data (what depends on the stage's
arguments) is the one that makes a gradient of a cotangent: a product, or what a norm multiplies and sums.
Its cotangent is a site. W is the sum over sites of the programs from their cotangents to the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from funcstage.engines.graph.absent import without
from funcstage.engines.graph.extract import Program
from funcstage.engines.graph.joint import results_of
from funcstage.engines.graph.nodes import aten, dependents, is_cheap
from funcstage.engines.graph.pieces import cut_out
from funcstage.engines.graph.sizes import Sizes
from funcstage.engines.pieces import connected


@dataclass(frozen=True, slots=True, eq=False)
class ProgramSite:
    """A site in the program W.

    Attributes:
        name: the operation of the stage, as autograd calls it.
        views: how the operation sees the value at which W is cut: that value first, each a view of the one
            before, the cotangent last.
        inputs: what the operation reads beside the cotangent, of the data.
        reached: the gradients that it adds to.
        program: from the value at which W is cut to these gradients; the others are `None`.
        cotangent: what the program calls that value.
    """

    name: str
    views: tuple[Node, ...]
    inputs: tuple[Node, ...]
    reached: tuple[int, ...]
    program: Program
    cotangent: str


def sites_of(
    program: Program, linear: Iterable[str], data: Iterable[str], sizes: Sizes | None
) -> tuple[ProgramSite, ...]:
    """Find the sites of W, in its order.

    Args:
        program: W; left as it is.
        linear: its inputs that it is linear in: cotangents, and what I made of them.
        data: its other inputs that depend on the stage's arguments.
        sizes: the open ones, if any.
    """
    graph = program.module.graph
    varying = depending_on(program, linear)
    read = depending_on(program, data) - varying
    results: Sequence[Node | None] = results_of(graph)
    walk = _Walk(varying, read)
    known: set[Node] = set()
    for kind in ("products", "readers"):  # of a bias's sum, the product beside it says what it is a sum of
        known |= {start for node in results if node is not None for start in walk.starts(node, known, kind)}
    starts: dict[Node, list[int]] = {}
    for i, node in enumerate(results):
        if node is not None:
            for start in walk.starts(node, known, "all"):
                starts.setdefault(start, []).append(i)
    names = {start: f"cotangent_{i}" for i, start in enumerate(starts)}
    stops = set(starts)
    found = []
    for start in (node for node in graph.nodes if node in starts):
        behind = {i: _between(start, [results[i]], stops) for i in starts[start]}
        for reached in _by_product(behind, read):
            parts = [node if i in reached else None for i, node in enumerate(results)]
            others = [name for name in names.values() if name != names[start]]
            alone = without(cut_out(program, parts, names), names.values(), others, sizes)
            between = _between(start, parts, stops)
            sources = [source for node in between for source in node.all_input_nodes if source in read]
            inputs = tuple(dict.fromkeys(map(_untransposed, sources)))
            name, views = _name(between, read), _views(start, between)
            found.append(ProgramSite(name, views, inputs, tuple(reached), alone, names[start]))
    return tuple(reversed(found))


def _by_product(behind: dict[int, list[Node]], read: set[Node]) -> list[list[int]]:
    """Group the gradients that begin at one cotangent by the products that they come from."""
    products = {i: {node for node in nodes if _is_product(node, read)} for i, nodes in behind.items()}
    of_products = [i for i in behind if products[i]]
    groups = [[of_products[k] for k in group] for group in connected([products[i] for i in of_products])]
    alone = [i for i in behind if not products[i]]  # sums of the cotangent: a bias's
    if not alone or not groups:
        return groups or [alone]
    if all(node.target in _LOOK_UPS for i in groups[0] for node in products[i]):
        return [alone, *groups]  # what is added to an embedding
    return [sorted([*alone, *groups[0]]), *groups[1:]]


def _is_product(node: Node, read: set[Node]) -> bool:
    return not is_cheap(node) and any(source in read for source in node.all_input_nodes)


def depending_on(program: Program, names: Iterable[str]) -> set[Node]:
    """The nodes of a program that depend on inputs of these names."""
    graph, wanted = program.module.graph, set(names)
    return dependents(graph, [node for node in graph.find_nodes(op="placeholder") if node.name in wanted])


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """From gradients back to where they begin.

    Attributes:
        varying: what depends on a cotangent.
        read: of the rest, what depends on data.
    """

    varying: set[Node]
    read: set[Node]

    def starts(self, result: Node, known: set[Node], kind: str) -> list[Node]:
        """Where a gradient begins.

        Args:
            result: the gradient.
            known: beginnings, before which it does not begin.
            kind: which are wanted: "products" and other kernels that read data, all "readers" of data, or
                "all", a cotangent that is summed among them.
        """
        found: dict[Node, None] = {}
        seen = {result}
        stack = [result]
        while stack:
            node = stack.pop()
            sources = [source for source in node.all_input_nodes if source in self.varying]
            if node in known or (node in self.varying and not sources):
                if kind == "all":
                    found[node] = None
            elif any(source in self.read for source in node.all_input_nodes):
                if kind != "products" or not is_cheap(node):
                    found.update(dict.fromkeys(map(self.value, sources)))
            else:
                stack.extend(source for source in sources if source not in seen)
                seen.update(sources)
        return list(found)

    def value(self, node: Node) -> Node:
        """The value that a node shows in another shape, which its other readers may see in a third."""
        while _reshapes(node) and node.args[0] in self.varying:
            node = node.args[0]  # type: ignore[assignment]
        return node


def _between(start: Node, results: Iterable[Node | None], stops: set[Node]) -> list[Node]:
    """The operations from a beginning to gradients, in order, that depend on it."""
    after: set[Node] = {start}
    stack = [node for node in results if node is not None]
    behind = set(stack)
    while stack:
        node = stack.pop()
        if node not in stops:
            new = [source for source in node.all_input_nodes if source not in behind]
            behind.update(new)
            stack.extend(new)
    ordered = [node for node in start.graph.nodes if node in behind and node not in stops]
    for node in ordered:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    return [node for node in ordered if node in after]


def _views(start: Node, between: Sequence[Node]) -> tuple[Node, ...]:
    """How the first operation that is no view sees the value: a product, if there is one."""
    shapes: dict[Node, tuple[Node, ...]] = {start: (start,)}
    first: tuple[Node, ...] | None = None
    for node in between:
        source = next((s for s in node.all_input_nodes if s in shapes), None)
        if source is None:
            continue
        if _reshapes(node):
            shapes[node] = (*shapes[source], node)
        elif first is None or node.target in _PRODUCTS:
            first = shapes[source]
            if node.target in _PRODUCTS:
                break
    views = first or (start,)
    while len(views) > 1 and _transposes(views[-1]):
        views = views[:-1]
    return views


def _name(between: Sequence[Node], read: set[Node]) -> str:
    """Name a site after its operation: of what reads data, the first product or other kernel."""
    readers = [node for node in between if any(source in read for source in node.all_input_nodes)]
    kernels = [node for node in between if _is_product(node, read)] or readers
    if not kernels:
        return "add"
    name = kernels[0].target.overloadpacket.__name__  # type: ignore[union-attr]
    name = name.removesuffix("_backward").removesuffix("_dense")
    sums = any(node.target in _SUMS and not set(node.all_input_nodes) & {*readers} for node in between)
    return "addmm" if name == "mm" and sums else name


def _untransposed(node: Node) -> Node:
    while _transposes(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _transposes(node: Node) -> bool:
    return node.target in (aten.t.default, aten.transpose.int, aten.permute.default)


def _reshapes(node: Node) -> bool:
    """Tell whether a node shows all of a value, once, in another shape."""
    return _transposes(node) or node.target in _RESHAPES


def restored(cotangent: Tensor, values: Sequence[Tensor], views: Sequence[Node]) -> Tensor:
    """Bring a cotangent from the shape in which an operation has it to that in which W is cut.

    Args:
        cotangent: it.
        values: those of `views` for the cotangent that arrived.
        views: of a site.
    """
    for node, before in zip(reversed(views[1:]), reversed(values[:-1]), strict=True):
        if _transposes(node):
            order = _order(node, before.dim())
            cotangent = cotangent.permute([order.index(i) for i in range(len(order))])
        else:
            cotangent = cotangent.reshape(before.shape)
    return cotangent


def _order(node: Node, dim: int) -> list[int]:
    order = list(range(dim))
    if node.target is aten.permute.default:
        return [int(i) % dim for i in node.args[1]]  # type: ignore[arg-type,union-attr]
    first, second = (0, dim - 1) if node.target is aten.t.default else node.args[1:3]
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return order


_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.convolution_backward.default}
_LOOK_UPS = {
    aten.embedding_dense_backward.default,
    aten._embedding_bag_dense_backward.default,
    aten.index_put.default,
    aten._unsafe_index_put.default,
}
"""Backwards of operations that have no bias."""
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
}
