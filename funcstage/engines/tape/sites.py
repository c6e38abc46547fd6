"""The plain tape's W by its sites: each is a W of one site, at a cotangent of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcstage import dtensors
from funcstage._torch.tape import output_shapes
from funcstage.engines.base import AddedDirectly, Place
from funcstage.engines.levels.first_stage import Arrived, arrived_at_sites, inputs_of, nodes_of
from funcstage.engines.on_nodes import operation_of
from funcstage.engines.pieces import connected
from funcstage.param_groups import Site, walk

if TYPE_CHECKING:
    from funcstage.engines.tape.eager import WeightTape


def places(tape: WeightTape) -> Iterator[Place] | None:
    """The sites of W, of which nothing is used up; None where DTensors arrive at them.

    Raises:
        AddedDirectly: if backward() calls in the stage's own backward have added to parameters already.
    """
    if tape.direct:
        raise AddedDirectly([*tape.direct])
    arrived = list(_arrived(tape))
    ends = [GradientEdge(site.node, 0, site.owner) for site, _ in arrived]
    order = {node: i for i, node in enumerate(walk(ends, set())[0])}
    arrived.sort(key=lambda each: order[each[0].node])
    cotangents = [grad for _, grads in arrived for grad in grads]
    if dtensors.first_dtensor([*tape.origin.params.values(), *cotangents]) is not None:
        return None
    numbers = _numbers(tape)
    return (
        _place(tape, site, grads, number, numbers)
        for site, grads in arrived
        for number, grad in enumerate(grads)
        if grad is not None
    )


def by_site(tape: WeightTape) -> WeightTape:
    """Run the chain of cotangents of a W that is a whole backward; its tape stays as it is."""
    origin = tape.origin
    seeds = [
        (GradientEdge(site.node, number, site.owner), grad)
        for site, grads in _arrived(tape)
        for number, grad in enumerate(grads)
        if grad is not None
    ]
    try:
        with origin.reading(tape.home):
            arrived = arrived_at_sites(seeds, tape.first_reads, [*origin.params.values()])
    finally:
        direct = origin.added_directly()
    numbers = _numbers(tape)
    groups = []
    nodes = [nodes_of(site) for site, _ in arrived]
    for group in connected(nodes):
        sites, grads = zip(*(arrived[k] for k in group), strict=True)
        behind = set[Any]().union(*(nodes[k] for k in group))
        params = [node for node in numbers if node in behind]
        groups.append({"params": params, "intermediates": [*sites], "grads": [*grads]})
    return replace(tape, groups=groups, direct=direct, first_reads=())


def _place(
    tape: WeightTape, site: Site, grads: Sequence[Tensor | None], number: int, numbers: dict[Any, int]
) -> Place:
    nodes = nodes_of(site)
    reached = {node: i for node, i in numbers.items() if node in nodes}

    def vjp(cotangent: Tensor) -> list[Tensor | None]:
        alone: list[Tensor | None] = [None] * len(output_shapes(site.node))
        alone[number] = cotangent
        group = {"params": [*reached], "intermediates": [site], "grads": [tuple(alone)]}
        return replace(tape, groups=[group], direct={}).weight_vjp(retain=True)[0]

    cotangent = grads[number]
    assert cotangent is not None
    inputs = inputs_of(site, tape.origin, tape.home)
    return Place(operation_of(site.node), cotangent, inputs, [*reached.values()], vjp)


def _arrived(tape: WeightTape) -> Iterator[Arrived]:
    for group in tape.groups:
        for site, grads in zip(group["intermediates"], group["grads"], strict=True):
            yield site, tuple(grads or ())


def _numbers(tape: WeightTape) -> dict[Any, int]:
    """The parameters by the nodes where the tape ends."""
    return {get_gradient_edge(leaf).node: i for i, leaf in tape.origin.params.items()}
