"""What crosses between the programs F, I and W, chosen by minimum cuts over bytes.

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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor
from torch.fx import Graph, Node

from funcstage.engines.graph.decompose import ancestors
from funcstage.engines.graph.joint import CHECKPOINTED, Joint, is_random
from funcstage.engines.graph.mincut import min_cut, nbytes, nbytes_together
from funcstage.engines.graph.nodes import aten, behind, dependents, is_cheap, is_view

Choice: TypeAlias = Literal["none", "min_cut", "full"] | Callable[[Node], bool]
"""What may be computed again."""


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """The nodes of a joint graph by where they must run.

    Attributes:
        joint: the joint graph.
        state: parameters, buffers and constants.
        late: what depends on a cotangent.
        needed: what the output and the new buffers depend on.
        for_inputs: what the input gradients depend on.
        urgent: what I must compute.
        deferred: what W must compute.
        movable: what I may compute for W.
        cheap: what may run twice at little cost.
    """

    joint: Joint
    state: set[Node]
    late: set[Node]
    needed: set[Node]
    for_inputs: set[Node]
    urgent: set[Node]
    deferred: set[Node]
    movable: set[Node]
    cheap: set[Node]

    @classmethod
    def of(cls, joint: Joint, sites: bool = False) -> Division:
        """Divide a joint graph, which is left as it is; for `sites`, W sums all gradients itself."""
        graph = joint.module.graph
        outputs, new_buffers, input_grads, param_grads = joint.results
        placeholders = joint.placeholders
        state = {*placeholders[: joint.n_state], *graph.find_nodes(op="get_attr")}
        cotangents = placeholders[joint.n_state + joint.n_args :]
        late = dependents(graph, cotangents)
        for_inputs = ancestors(input_grads)
        urgent = late & for_inputs
        for node in graph.nodes:
            if node.target is operator.getitem and node.args[0] in urgent:
                urgent.add(node)  # an entry of a result is at hand where the result is, which cannot be saved
        deferred = (late & ancestors(param_grads)) - urgent - set(cotangents)
        movable = _movable(graph, deferred) if urgent and not sites else set()
        cheap = {node for node in graph.nodes if is_cheap(node)}
        needed = ancestors((*outputs, *new_buffers))
        return cls(joint, state, late, needed, for_inputs, urgent, deferred, movable, cheap)


class Crossing(NamedTuple):
    """The values that pass between the programs.

    Attributes:
        after_forward: from F to I and W.
        from_input: from I to W.
        for_weight: what W reads, out of both.
    """

    after_forward: list[Node]
    from_input: list[Node]
    for_weight: list[Node]


def crossing(division: Division, remat: Choice) -> Crossing:
    """Choose what crosses; `remat` is that of `partition`, without budgets."""
    nodes = division.joint.module.graph.nodes
    late, urgent, cheap = division.late, division.urgent, division.cheap
    _, _, input_grads, param_grads = division.joint.results
    again_in_weight, again_in_input = cheap, cheap
    unsaved = {node for node in nodes if node.meta.get(CHECKPOINTED) and not is_random(node)}
    if remat == "none":
        views = {node for node in cheap if is_view(node)}
        again_in_input = views | (cheap - division.needed)
        again_in_weight = views | (cheap - division.needed - division.for_inputs)
        cheap = views
    elif remat != "min_cut":
        save = remat if callable(remat) else lambda node: False
        unsaved |= {
            node for node in nodes if node.op == "call_function" and not is_random(node) and not save(node)
        }
        again_in_input = set()
        again_in_weight = cheap & (unsaved | late)
    free = _free(nodes, division.state, cheap)
    wanted = {node for node in nodes if node.meta.get(CHECKPOINTED) is False}
    again_in_input = (again_in_input | unsaved) - wanted
    # What I has to compute again is at hand for W, with what is cheap to make of it; the rest is computed
    # again in W alone.
    at_hand = behind(_reads(urgent, input_grads), again_in_input)
    for_weight_alone = unsaved - late - at_hand - _made_of(at_hand, unsaved, division)
    again_in_weight = (again_in_weight | division.movable | for_weight_alone) - wanted

    demand = _reads(division.deferred - division.movable, param_grads)
    for_weight = _cut(demand, again_in_weight, free, for_weight_alone)
    moved = division.movable & ancestors(for_weight)
    reads = [*_reads(urgent | moved, input_grads), *for_weight]
    after_forward = _cut([node for node in reads if node not in late], again_in_input, free, unsaved)
    held = {*after_forward}
    made = behind(reads, again_in_input - held)
    for_weight = _of_what_is_there(division, for_weight, held, made, free, again_in_weight)
    from_input = [node for node in for_weight if node not in held]
    return Crossing(after_forward, from_input, for_weight)


def recomputed(division: Division, found: Crossing) -> list[Node]:
    """What I and W compute again of what F computes, and W of what I computes again."""
    outputs, new_buffers, input_grads, param_grads = division.joint.results
    held = {*found.after_forward}
    early = ancestors((*outputs, *new_buffers, *held)) - division.late
    moved = division.movable & ancestors(found.for_weight)
    of_input = _reads(division.urgent | moved, input_grads)
    again = behind((*of_input, *found.from_input), early - held)
    for_weight = behind(_reads(division.deferred - moved, param_grads), early - {*found.for_weight})
    return [*again, *for_weight]


WRITTEN = 1 / 64
"""The share of a value's bytes that W may hold beyond them, if then nobody has to write it.

It is enough for an input and its norm's scales, one for each 64 numbers or more, to stand for their product.
"""


def _of_what_is_there(
    division: Division,
    for_weight: list[Node],
    held: set[Node],
    made: set[Node],
    free: set[Node],
    again: set[Node],
) -> list[Node]:
    """Let W map what is held anyway, rather than let I write for it what W would map further.

    So layers that are alike hand W the same, whether or not it has other uses for some of that. An operand of
    a product is left as it is: it is written once, here or there.

    Args:
        division: of the joint graph.
        for_weight: what W is to read.
        held: what F hands on.
        made: what I computes again from that.
        free: what W has anyway.
        again: what W may compute.

    Returns:
        What W reads instead, in graph order: for each value that is no longer written at most the share
        `WRITTEN` of its bytes more.
    """
    operands = _in_memory(_reads(division.deferred - division.cheap, division.joint.results[3]))
    mapped = (division.cheap & again) - division.late
    found = {*for_weight}
    for node in reversed(for_weight):
        if node not in mapped or node in operands or node in held:
            continue
        most = WRITTEN * nbytes(node)
        sources: set[Node] = set()
        stack, seen = [*node.all_input_nodes], {*free}
        while stack:
            read = stack.pop()
            if read in seen:
                continue
            seen.add(read)
            if read in held or read in found or (read in made and 0 < nbytes(read) <= most):
                sources.add(read)
            elif read in mapped:
                stack += read.all_input_nodes
            else:
                break
        else:
            new = sources - found
            if nbytes_together(new) <= nbytes(node) + most and nbytes_together(new - held) <= most:
                found = (found - {node}) | sources
    return sorted(found)


def _in_memory(reads: Iterable[Node]) -> set[Node]:
    """What must lie in memory for some nodes to be read: they, and what they are views of."""
    stack, found = [*reads], set[Node]()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes if is_view(node) else ()
    return found


def _made_of(at_hand: set[Node], unsaved: set[Node], division: Division) -> set[Node]:
    """What I can make for W of values that are saved or `at_hand`, at little cost."""
    found: set[Node] = set()
    candidates = unsaved & division.cheap
    for node in division.joint.module.graph.nodes if candidates else ():
        if node in candidates and all(
            read in at_hand or read in found or read not in unsaved for read in node.all_input_nodes
        ):
            found.add(node)
    return found


def _free(nodes: Iterable[Node], state: set[Node], cheap: set[Node]) -> set[Node]:
    """What can be had anywhere without holding anything: state, and cheap functions of state."""
    free = set(state)
    for node in nodes:
        if node in cheap and all(source in free for source in node.all_input_nodes):
            free.add(node)
    return free


SUMMED_EARLY = 2**20
"""Bytes that a sum must save for I to compute it for W, whose sites then have no cotangent of their own."""


def _movable(graph: Graph, deferred: set[Node]) -> set[Node]:
    """What W computes from its residuals by mapping and summing alone.

    The sums of a norm's weight gradient are far smaller than what they sum, which I has at hand.
    """
    movable: set[Node] = set()
    large: set[Node] = set()
    for node in graph.nodes:
        sums = getattr(node.target, "overloadpacket", None) in (aten.sum, aten.mean)
        maps_or_sums = node in deferred and (sums or is_cheap(node))
        if maps_or_sums and all(read in movable for read in node.all_input_nodes if read in deferred):
            movable.add(node)
            if sums and sum(map(nbytes, node.all_input_nodes)) - nbytes(node) >= SUMMED_EARLY:
                large.add(node)
    return movable & (ancestors(large) | dependents(graph, large))


def _reads(nodes: set[Node], results: Iterable[Node | None]) -> dict[Node, None]:
    """What a set of nodes reads from outside it, and results that lie outside it."""
    found = dict.fromkeys(node for node in results if isinstance(node, Node) and node not in nodes)
    for node in nodes:
        found.update(dict.fromkeys(source for source in node.all_input_nodes if source not in nodes))
    return found


def _cut(demand: Iterable[Node], again: set[Node], free: set[Node], unsaved: Collection[Node]) -> list[Node]:
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
    return min_cut(reads, demanded, price)
