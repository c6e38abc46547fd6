"""Pass 3, partition: the joint graph -> three graphs F, I, W and the residuals between them.

What does not depend on a cotangent may run in F; I is what the input gradients need of the rest, W what
the parameter gradients need beyond that. Free to choose is which values cross the two boundaries,
F | I, W and F, I | W, and which are computed again on the far side. That is a minimum cut over bytes, as
in torch's own two-way partitioner: a value may be computed again if its operation is cheap and all that
it reads can be had.

The boundary before W is cut first, over the nodes of F and I together, and those that sum up for W what
I has at hand (a norm's weight gradient): where the sum costs fewer bytes to hold, I computes it. What the
first cut takes from F joins the demand of the boundary before I: a residual of W may be one of I's as well,
or made from one by I.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import networkx as nx  # type: ignore[import-untyped]
import torch
from networkx.algorithms.flow import boykov_kolmogorov  # type: ignore[import-untyped]
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from funcstage.graph._torch import BoxedCodeGen, LazyGraphModule
from funcstage.graph.replay import drawn_once
from funcstage.graph.separate import ancestors
from funcstage.graph.trace import CHECKPOINTED, Joint, is_random

Remat: TypeAlias = Literal["none", "min_cut", "full"] | Callable[[Node], bool]

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """One of the three graphs.

    Attributes:
        module: a graph of placeholders, ATen operations and one flat tuple of results.
        inputs: the placeholders' names, which are names of the joint graph.
        results: the results' names there, `None` where there is no result.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    results: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Three programs and the residuals that pass between them, by their names in the joint graph.

    Attributes:
        forward: (state, args) -> outputs, new buffers, `after_forward`.
        input_grad: (state, residuals, cotangents) -> input gradients, `from_input`.
        weight_grad: (state, residuals) -> parameter gradients, each with memory of its own.
        after_forward: what F hands to I and W.
        from_input: what I hands to W.
        for_weight: what W reads, out of both.
        nbytes: the bytes that each residual keeps alive.
        linear: the residuals and inputs of the backward that it is linear in: cotangents and what I
            made of them.
        recomputed: what is computed in more than one program.
    """

    forward: Program
    input_grad: Program
    weight_grad: Program
    after_forward: tuple[str, ...]
    from_input: tuple[str, ...]
    for_weight: tuple[str, ...]
    nbytes: dict[str, int]
    linear: frozenset[str]
    recomputed: tuple[str, ...]


def partition(joint: Joint, remat: Remat) -> Partition:
    """Divide a joint graph in three.

    Args:
        joint: a separated joint graph; left as it is.
        remat: what may be computed again: "none" (views only), "min_cut" (what is cheap), "full"
            (everything, from the stage's inputs; W still gets matrix products from I) or a policy that
            tells of a node whether its value is to be saved. Random operations never run twice.

    Returns:
        The partition. Under "none" and "min_cut" no matrix product, attention, convolution or reduction
        is in two programs.
    """
    outputs, new_buffers, input_grads, param_grads = joint.results
    placeholders = joint.placeholders
    state = set(placeholders[: joint.n_state])
    state.update(joint.module.graph.find_nodes(op="get_attr"))
    cotangents = placeholders[joint.n_state + joint.n_args :]
    late = _dependents(joint.module.graph, cotangents)
    needed = ancestors((*outputs, *new_buffers))
    for_inputs = ancestors(input_grads)
    urgent = late & for_inputs
    for node in joint.module.graph.nodes:
        if node.target is operator.getitem and node.args[0] in urgent:
            urgent.add(node)  # an entry of a result is at hand where the result is, which cannot be saved
    deferred = (late & ancestors(param_grads)) - urgent - set(cotangents)
    early = [node for node in joint.module.graph.nodes if node not in deferred and node.op != "output"]
    movable = _movable(joint.module.graph, deferred) if urgent else set()
    cheap = {node for node in early if is_cheap(node)}

    again_in_weight, again_in_input = cheap, cheap
    unsaved = {node for node in early if node.meta.get(CHECKPOINTED) and not is_random(node)}
    if remat == "none":
        views = {node for node in cheap if is_view(node)}
        again_in_input = views | (cheap - needed)
        again_in_weight = views | (cheap - needed - for_inputs)
        cheap = views
    elif remat != "min_cut":
        save = remat if callable(remat) else lambda node: False
        unsaved |= {
            node for node in early if node.op == "call_function" and not is_random(node) and not save(node)
        }
        again_in_input = set()
        again_in_weight = cheap & unsaved
    free = _free(early, state, cheap)
    held = {node for node in early if node.meta.get(CHECKPOINTED) is False}
    again_in_input = (again_in_input | unsaved) - held
    # What I has to compute again is at hand for W; the rest is computed again in W alone.
    for_weight_alone = unsaved - late - _behind(_reads(urgent, input_grads), again_in_input)
    again_in_weight = (again_in_weight | movable | for_weight_alone) - held

    for_weight = _cut(_reads(deferred - movable, param_grads), again_in_weight, free, for_weight_alone)
    moved = movable & ancestors(for_weight)
    demand = [*_reads(urgent | moved, input_grads), *for_weight]
    after_forward = _cut([node for node in demand if node not in late], again_in_input, free, unsaved)
    from_input = [node for node in for_weight if node not in set(after_forward)]

    constants = [node for node in state if node.op == "get_attr"]
    given = placeholders[: joint.n_state]
    args = placeholders[joint.n_state : joint.n_state + joint.n_args]
    anywhere = set(early) | deferred
    draws = [node for node in joint.module.graph.nodes if is_random(node) and node not in late]
    forward = _extract(
        joint, constants, [*given, *args], anywhere, [*outputs, *new_buffers, *after_forward], draws
    )
    input_grad = _extract(
        joint, constants, [*given, *after_forward, *cotangents], late, [*input_grads, *from_input]
    )
    weight_grad = _extract(joint, constants, [*given, *for_weight], deferred, param_grads, own=True)
    counts: dict[str, int] = {}
    for program in (forward, input_grad, weight_grad):
        for node in program.module.graph.nodes:
            if node.op == "call_function" and not is_view(node):
                counts[node.name] = counts.get(node.name, 0) + 1
    return Partition(
        forward,
        input_grad,
        weight_grad,
        tuple(node.name for node in after_forward),
        tuple(node.name for node in from_input),
        tuple(node.name for node in for_weight),
        {node.name: nbytes(node) for node in (*after_forward, *from_input)},
        frozenset(node.name for node in (*cotangents, *from_input) if node in late),
        tuple(name for name, n in counts.items() if n > 1),
    )


def is_view(node: Node) -> bool:
    """Tell whether a node's result lies in the memory of what it reads, or is an entry of such a result."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _RESHAPES)


def is_cheap(node: Node) -> bool:
    """Tell whether an operation moves or maps elements and no more, so that running it twice costs little."""
    if node.target is operator.getitem:
        return is_cheap(node.args[0])  # type: ignore[arg-type]
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or is_view(node) or target.overloadpacket in _CHEAP


def nbytes(node: Node) -> int:
    """Bytes that saving a node's value keeps alive: all of the memory that a view looks into."""
    value = node.meta["val"]
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0


def _dependents(graph: Graph, roots: Iterable[Node]) -> set[Node]:
    found = set(roots)
    for node in graph.nodes:
        if node.op == "call_function" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _free(nodes: Iterable[Node], state: set[Node], cheap: set[Node]) -> set[Node]:
    """What can be had anywhere without holding anything: state, and cheap functions of state."""
    free = set(state)
    for node in nodes:
        if node in cheap and all(source in free for source in node.all_input_nodes):
            free.add(node)
    return free


def _movable(graph: Graph, deferred: set[Node]) -> set[Node]:
    """What W computes from its residuals by mapping and summing alone.

    The sums of a norm's weight gradient are far smaller than what they sum, which I has at hand.
    """
    movable: set[Node] = set()
    for node in graph.nodes:
        sums = getattr(node.target, "overloadpacket", None) in (aten.sum, aten.mean)
        maps_or_sums = node in deferred and (sums or is_cheap(node))
        if maps_or_sums and all(read in movable for read in node.all_input_nodes if read in deferred):
            movable.add(node)
    return movable


def _reads(nodes: set[Node], results: Iterable[Node | None]) -> dict[Node, None]:
    """What a set of nodes reads from outside it, and results that lie outside it."""
    found = dict.fromkeys(node for node in results if isinstance(node, Node) and node not in nodes)
    for node in nodes:
        found.update(dict.fromkeys(source for source in node.all_input_nodes if source not in nodes))
    return found


def _behind(reads: Iterable[Node], within: set[Node]) -> set[Node]:
    """What must be computed for these reads, out of `within` and from nothing but `within`."""
    stack = [node for node in reads if node in within]
    found = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in within and source not in found:
                found.add(source)
                stack.append(source)
    return found


def _cut(
    demand: Iterable[Node], again: set[Node], free: set[Node], unsaved: Collection[Node] = ()
) -> list[Node]:
    """Choose what to save: the values of fewest bytes from which all of `demand` can be computed.

    Args:
        demand: nodes that the far side reads.
        again: nodes that the far side may compute.
        free: nodes that it has anyway.
        unsaved: nodes that must be computed again, whatever they cost to save.

    Returns:
        The nodes to save, in graph order.
    """
    roots: dict[Node, Node] = {}

    def computable(node: Node) -> bool:
        return node in again and (node.target is not operator.getitem or node.args[0] in again)

    def price(node: Node) -> float:
        saveable = isinstance(node.meta["val"], Tensor) and not (node in unsaved and computable(node))
        return nbytes(node) if saveable else math.inf

    def root(node: Node) -> Node:
        """Follow functions of one value up to where that is cheapest to save, which no cut can better."""
        chain = []
        while node not in roots:
            chain.append(node)
            reads = [read for read in node.all_input_nodes if read not in free] if computable(node) else []
            # On equal terms a later value is better, as it need not be computed again, unless it is a view.
            if len(reads) != 1 or (price(node), is_view(node)) <= (price(reads[0]), False):
                break
            node = reads[0]
        found = roots.get(node, node)
        roots.update(dict.fromkeys(chain, found))
        return found

    demanded = {root(node) for node in demand if node not in free}
    reads: dict[Node, set[Node | None]] = {}
    stack = list(demanded)
    while stack:
        node = stack.pop()
        if node not in reads:
            found = [root(read) for read in node.all_input_nodes if read not in free]
            reads[node] = set(found) if computable(node) else {None}
            stack.extend(found if computable(node) else ())
    return _min_cut(reads, demanded, price)


def _min_cut(
    reads: dict[Node, set[Node | None]], demanded: set[Node], price: Callable[[Node], float]
) -> list[Node]:
    """Cut all that is demanded off the source, at the least price, and of such cuts as late as possible.

    Every node is split in two, joined by an edge of its price; edges along the data flow have no limit.
    The solver takes time squared, so what can be told without it is: more than half of any real graph.

    Args:
        reads: what every node reads; `None` is the source. Left as it is.
        demanded: some of these nodes.
        price: of a node.

    Returns:
        The nodes that are cut, in graph order.
    """
    nodes = sorted(reads)
    reads = dict(reads)
    readers: defaultdict[Node | None, set[Node]] = defaultdict(set)
    for node in nodes:
        for read in reads[node]:
            readers[read].add(node)
    # A value of one reader that has no higher price is never the better of the two: it becomes part of it.
    for node in reversed(nodes):
        if node in demanded or len(readers[node]) != 1:
            continue
        (reader,) = readers[node]
        if price(reader) <= price(node):
            reads[reader] = reads[reader] - {node} | reads[node]
            for read in reads.pop(node):
                readers[read].remove(node)
                readers[read].add(reader)

    cut: list[Node] = []
    flow = nx.DiGraph()
    source, sink = -1, -2
    flow.add_nodes_from((source, sink))
    numbers: dict[Node, int] = {}
    for node in nodes:
        found = reads.get(node, set())
        if None in found and node in demanded:
            cut.append(node)  # in any case; what is made from such values alone is left out as well
            continue
        open = [source] if None in found else [numbers[read] + 1 for read in found if read in numbers]
        if open:
            i = numbers[node] = 2 * len(numbers)
            flow.add_edge(i, i + 1, capacity=price(node))
            flow.add_edges_from((j, i) for j in open)
            if node in demanded:
                flow.add_edge(i + 1, sink)
    # The solver's second tree is what can still reach the sink: all that lies behind the latest cut.
    _, behind = boykov_kolmogorov(flow, source, sink).graph["trees"]
    cut += (node for node, i in numbers.items() if i + 1 in behind and i not in behind)
    return sorted(cut)


def _extract(
    joint: Joint,
    constants: Iterable[Node],
    inputs: Iterable[Node],
    prompt: set[Node],
    results: Sequence[Node | None],
    draws: Sequence[Node] = (),
    own: bool = False,
) -> Program:
    """Build the program that computes `results` from those of `inputs` that they need.

    It draws all of `draws`, in order, whether anybody reads them or not: what is drawn next depends on it.

    The operations of `prompt` run in the order of the joint graph; all others, which are recomputations,
    run when they are first read, so that not all of them are alive together, and results among them as
    soon as nothing else waits for what they are made from.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    boundary = {*constants, *inputs}
    wanted = set()
    stack = [*draws, *(node for node in results if node is not None)]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            if node not in boundary:
                stack.extend(node.all_input_nodes)
    given = [node for node in inputs if node in wanted]
    for node in given:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    nodes = [node for node in joint.module.graph.nodes if node in wanted]
    state = {*constants, *joint.placeholders[: joint.n_state]}
    for root in _schedule(nodes, prompt, boundary, state, results):
        pending = [root]
        while pending:
            node = pending[-1]
            missing = [source for source in node.all_input_nodes if source not in copies]
            if node in copies or not missing:
                pending.pop()
                if node not in copies:
                    copies[node] = graph.node_copy(node, copies.__getitem__)
            else:
                pending.extend(reversed(missing))
    graph.output(tuple(None if node is None else copies[node] for node in results))
    drawn_once(graph)
    if own:
        own_results(graph)
    return Program(
        boxed(joint.module, graph),
        tuple(node.name for node in given),
        tuple(None if node is None else node.name for node in results),
    )


def _schedule(
    nodes: Sequence[Node],
    prompt: set[Node],
    held: set[Node],
    state: set[Node],
    results: Iterable[Node | None],
) -> list[Node]:
    """Order the prompt operations and the results.

    A result that is recomputed follows the last prompt operation that reads what it is made from: that is
    free then, and a compiler can have both from one pass over it.

    Args:
        nodes: what the program consists of, in graph order.
        prompt: what keeps its order.
        held: the inputs; `state` are those of them that are held anyway.
        results: the results.
    """
    order = {node: i for i, node in enumerate(node for node in nodes if node in prompt)}
    last_use = dict.fromkeys(nodes, -1)
    for node in reversed(nodes):
        for read in node.all_input_nodes if node not in held else ():
            last_use[read] = max(last_use[read], order.get(node, last_use[node]))
    due: dict[Node, int] = {}
    for node in nodes:
        if node in held:
            due[node] = -1 if node in state else last_use[node]
        else:
            due[node] = order.get(node, max((due[read] for read in node.all_input_nodes), default=-1))
    recomputed = {node: due[node] for node in results if node is not None and node not in order}
    return sorted([*order, *recomputed], key=lambda node: (due[node], node in recomputed))


def boxed(root: GraphModule, graph: Graph) -> GraphModule:
    """A module that takes its arguments in one list and empties it, so that each is freed after its use.

    Its Python is written when it is first run or read: a compiler wants the graph alone.
    """
    graph.set_codegen(BoxedCodeGen())
    return LazyGraphModule(root, graph)


def own_results(graph: Graph) -> None:
    """Copy results that lie in the memory of an input or of one another, so that each can be added into."""
    (output,) = graph.find_nodes(op="output")
    taken: set[Node] = set()
    owned: list[Node | None] = []
    for node in output.args[0]:
        if node is not None:
            base = _base(node)
            value = node.meta["val"]
            if base.op != "call_function" or base in taken or 0 in value.stride():
                with graph.inserting_before(output):
                    copy = graph.call_function(
                        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                copy.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
                node = copy
            taken.add(base)
        owned.append(node)
    output.args = (tuple(owned),)


def giving_away(program: Program, names: Collection[str]) -> Program:
    """Return a program whose results are the inputs of `names` where they are copies of these.

    Args:
        program: left as it is.
        names: inputs that nobody reads after the program.
    """
    graph = Graph()
    results: list[Any] = list(graph.graph_copy(program.module.graph, {}))  # type: ignore[arg-type]
    given: set[Node] = set()
    for i, result in enumerate(results):
        if result is not None and result.target is aten.clone.default:
            source = result.args[0]
            base = _base(source)
            if base.name in names and base not in given and source.meta["val"].is_contiguous():
                given.add(base)
                results[i] = source
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    return replace(program, module=boxed(program.module, graph))


def _base(node: Node) -> Node:
    """The node in whose memory another lies."""
    while node.op == "call_function" and is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


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
