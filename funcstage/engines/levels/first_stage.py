"""W of a stage of which no argument is differentiated, by its sites: the whole backward, in two halves.

Its first half is the chain of cotangents, from the output to the first reads. It runs when somebody asks for
sites or pieces. The second is what any other stage's W is: the sites, each with its cotangent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage import autograd
from funcstage._torch import functorch as ft
from funcstage._torch.tape import output_shapes
from funcstage.engines.base import Place
from funcstage.engines.levels.first_reads import first_among
from funcstage.engines.levels.pieces import row
from funcstage.engines.levels.reverse import Origin, reverse, unshared
from funcstage.engines.on_nodes import WeightsOnNodes, operation_of
from funcstage.engines.pieces import balanced, connected
from funcstage.param_groups import Site, param_groups_of, walk
from funcstage.residuals import Home, Residual, nodes_behind, saved_in

if TYPE_CHECKING:
    from funcstage.engines.levels.tape import WeightTape

Arrived = tuple[Site, tuple[Tensor | None, ...]]
"""A site, with the cotangent of each output of its operation."""


@dataclass(frozen=True, slots=True, eq=False)
class SitesTape(WeightsOnNodes):
    """Some sites of such a stage, with their cotangents.

    Attributes:
        origin: the forward pass.
        arrived: the sites.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
    """

    origin: Origin
    arrived: list[Arrived]
    shared: bool
    home: Home

    @property
    def differentiated(self) -> bool:
        return self.origin.higher

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], SitesTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        shared = self.shared or retain
        return self._grads(self.arrived, shared), replace(self, shared=True) if retain else None

    def _grads(self, arrived: Sequence[Arrived], shared: bool) -> list[Tensor | None]:
        origin = self.origin
        with origin.reading(self.home), origin.switchboard.rerunning(shared):
            begins = autograd.beginnings(arrived)
            seeds = [(GradientEdge(*edge), gradient) for edge, gradient in begins.items()]
            found = reverse(seeds, [leaf for _, leaf in origin.params], shared, origin, self.home)
        grads: list[Tensor | None] = [None] * origin.n_params
        for (i, _), grad in zip(origin.params, unshared(found, self._cotangents()), strict=True):
            grads[i] = grad
        return grads

    def sites(self) -> Iterator[Place]:
        """Yield the sites; nothing is used up."""
        for site, cotangents in self.arrived:
            for number, cotangent in enumerate(cotangents):
                if cotangent is not None:
                    yield self._place(site, number, cotangent)

    def _place(self, site: Site, number: int, cotangent: Tensor) -> Place:
        def vjp(cotangent: Tensor) -> list[Tensor | None]:
            alone: list[Tensor | None] = [None] * len(output_shapes(site.node))
            alone[number] = cotangent
            return self._grads([(site, tuple(alone))], shared=True)

        inputs = inputs_of(site, self.origin, self.home)
        return Place(operation_of(site.node), cotangent, inputs, [*self._reached(site)], vjp)

    def _reached(self, site: Site) -> set[int]:
        ends = {id(end) for node in nodes_of(site) if (end := getattr(node, "variable", None)) is not None}
        return {i for i, leaf in self.origin.params if id(leaf) in ends}

    def reached(self) -> set[int]:
        """Which parameters lie behind the sites."""
        return {i for site, _ in self.arrived for i in self._reached(site)}

    def split(self, parts: int) -> list[SitesTape]:
        """Divide the sites, so that all that reach a parameter are in one piece."""
        groups = connected([nodes_of(site) for site, _ in self.arrived])
        costs = [sum(self._cost(*self.arrived[k]) for k in group) for group in groups]
        tapes = []
        for run in balanced(costs, parts):
            members = sorted(k for group in groups[run.start : run.stop] for k in group)
            tapes.append(replace(self, arrived=[self.arrived[k] for k in members]))
        return tapes or [self]

    def _cost(self, site: Site, cotangents: Sequence[Tensor | None]) -> float:
        leaves = dict(self.origin.params)
        rows = [row(leaves[i]) for i in self._reached(site)]
        return sum(c.numel() for c in cotangents if c is not None) * max(rows, default=1)

    @property
    def intact(self) -> bool:
        return self.origin.retains(self.shared)

    def reads(self) -> list[Tensor]:
        """What W reads: what the nodes that it runs have saved, and the cotangents."""
        nodes = {node for site, _ in self.arrived for node in nodes_of(site)}
        return [*saved_in(nodes, self.origin.switchboard, self.home), *self._cotangents()]

    def _cotangents(self) -> list[Tensor]:
        return [grad for _, grads in self.arrived for grad in grads if grad is not None]

    def _beside(self) -> list[Tensor]:
        return self._cotangents()

    def _others(self, rest: Iterator[Tensor]) -> dict[str, Any]:
        def again(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            return tuple(None if grad is None else next(rest) for grad in grads)

        return {"arrived": [(site, again(grads)) for site, grads in self.arrived]}

    def _saved(self) -> list[Residual]:
        return self.origin.saved((GradientEdge(site.node, 0) for site, _ in self.arrived), self.home)


def by_site(tape: WeightTape) -> SitesTape:
    """Run the chain of cotangents of a W that is a whole backward; its tape stays as it is."""
    origin = tape.origin
    with origin.reading(tape.home), origin.switchboard.rerunning(retain=True):
        arrived = arrived_at_sites(tape.seeds, tape.first_reads, [leaf for _, leaf in origin.params])
    return SitesTape(origin, arrived, tape.shared, tape.home)


def arrived_at_sites(
    seeds: Sequence[tuple[GradientEdge, Tensor]],
    first_reads: Sequence[GradientEdge],
    params: Sequence[Tensor],
) -> list[Arrived]:
    """Run the chain of cotangents.

    Args:
        seeds: the outputs, with their cotangents.
        first_reads: where data meets parameters, as `FirstReads` notes it.
        params: the leaves where the tape ends.

    Returns:
        The sites, from the output on.
    """
    order = {node: i for i, node in enumerate(walk([edge for edge, _ in seeds], set())[0])}
    first_reads = first_among(first_reads, order)
    leaves = {id(leaf) for leaf in params}
    weights = [node for node in order if id(getattr(node, "variable", None)) in leaves]
    grads, groups = autograd.divided(seeds, first_reads, weights)
    arrived: list[Arrived] = [
        (site, cotangents)
        for group in groups
        for site, cotangents in zip(group["intermediates"], group["grads"], strict=True)
        if cotangents is not None and any(grad is not None for grad in cotangents)
    ]
    of_first_reads: dict[Node, list[Tensor | None]] = {}
    for edge, grad in zip(first_reads, grads, strict=True):
        of_first_reads.setdefault(edge.node, [None] * len(output_shapes(edge.node)))[edge.output_nr] = grad
    for group in param_groups_of(first_reads, set(), weights):
        for site in group["intermediates"]:
            if any(grad is not None for grad in of_first_reads[site.node]):
                arrived.append((site, tuple(of_first_reads[site.node])))
    arrived.sort(key=lambda each: order[each[0].node])
    return arrived


def inputs_of(site: Site, origin: Any, home: Home) -> list[Tensor]:
    """What is saved for a site's gradients on the tape of an `origin`, without parameters and buffers."""
    excluded = {ft.storage_key(tensor) for tensor in origin.state}
    saved = saved_in(nodes_of(site), origin.switchboard, home)
    kept = {ft.storage_key(t): t for t in reversed(saved) if ft.storage_key(t) not in excluded}
    return [*kept.values()][::-1]


def nodes_of(site: Site) -> set[Node]:
    """The nodes that W runs for a site."""
    if not site.weight_edges:
        return {*nodes_behind([GradientEdge(site.node, 0)])}
    return {site.node, *nodes_behind(GradientEdge(*edge) for _, edge in site.weight_edges)}
