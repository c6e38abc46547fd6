"""The levels engine's W in pieces: which of its sites must run together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage.engines.pieces import balanced, connected
from funcstage.residuals import nodes_behind

if TYPE_CHECKING:
    from funcstage.engines.levels.tape import WeightTape


def split(tape: WeightTape, parts: int) -> list[WeightTape]:
    """Divide the sites of W, so that all that reach a parameter, or share a node, are in one piece.

    So no gradient is a sum over pieces, none of them frees what another needs, and each sums in W's order.
    """
    units = list(_units(tape))
    groups = connected([unit.nodes for unit in units])
    runs = balanced([sum(units[i].cost for i in group) for group in groups], parts)
    chosen = [sorted(i for group in groups[run.start : run.stop] for i in group) for run in runs]
    return [_merged(tape, [units[i].tape for i in members]) for members in chosen] or [tape]


def reached(tape: WeightTape) -> set[int]:
    """Which parameters lie behind the sites of W."""
    nodes = {node for unit in _units(tape) for node in unit.nodes}
    ends = {id(end) for node in nodes if (end := getattr(node, "variable", None)) is not None}
    return {i for i, leaf in tape.origin.params if id(leaf) in ends}


class _Unit(NamedTuple):
    """What cannot be divided: one site.

    Attributes:
        tape: W with this site alone.
        nodes: those that it runs, of the tape of the stage.
        cost: roughly how many multiplications.
    """

    tape: WeightTape
    nodes: set[Node]
    cost: float


def _units(tape: WeightTape) -> Iterable[_Unit]:
    for edge, cotangent in tape.seeds:
        nodes = {*nodes_behind([edge])}
        ends = [getattr(node, "variable", None) for node in nodes]
        reached = [leaf for _, leaf in tape.origin.params if any(end is leaf for end in ends)]
        alone = replace(tape, seeds=[(edge, cotangent)], regions=[])
        yield _Unit(alone, nodes, cotangent.numel() * max(map(row, reached), default=1))
    for i, (places, of_region) in enumerate(tape.regions):
        if not hasattr(of_region, "seeds"):  # another engine's
            behind = {*nodes_behind([places[k] for k in of_region.reached()])}
            rows = [row(leaf) for _, leaf in tape.origin.params if any(_ends_at(leaf, behind))]
            held = sum(leaf.numel() for leaf in of_region.leaves())
            alone = replace(tape, seeds=[], regions=[tape.regions[i]])
            yield _Unit(alone, behind, held * max(rows, default=1))
            continue
        for unit in _units(of_region):
            ends = [getattr(node, "variable", None) for node in unit.nodes]
            reached_there = [k for k, leaf in of_region.origin.params if any(end is leaf for end in ends)]
            behind = {*nodes_behind([places[k] for k in reached_there])}
            region = tape.regions[i]._replace(tape=unit.tape)
            yield _Unit(replace(tape, seeds=[], regions=[region]), unit.nodes | behind, unit.cost)


def _ends_at(leaf: Tensor, nodes: Iterable[Node]) -> Iterator[bool]:
    return (getattr(node, "variable", None) is leaf for node in nodes)


def row(weight: Tensor) -> int:
    """How many entries of a weight every entry of a cotangent is multiplied for."""
    return weight.numel() // len(weight) if weight.dim() > 1 and len(weight) else 1


def _merged(tape: WeightTape, units: Sequence[WeightTape]) -> WeightTape:
    seeds: list[tuple[GradientEdge, Tensor]] = [seed for unit in units for seed in unit.seeds]
    of_regions: dict[Hashable, list[WeightTape]] = {}
    for unit in units:
        for places, of_region in unit.regions:
            of_regions.setdefault(id(places), []).append(of_region)
    regions = [
        region._replace(tape=_merged(region.tape, of_regions[id(region.places)]))
        if hasattr(region.tape, "seeds")
        else region
        for region in tape.regions
        if id(region.places) in of_regions
    ]
    return replace(tape, seeds=seeds, regions=regions)
