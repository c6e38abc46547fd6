"""The tapes of the levels engine: what F leaves for I and W, and the reverse passes over it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage.engines.base import Place, Summed, is_differentiated
from funcstage.engines.base import WeightTape as AnyWeightTape
from funcstage.engines.levels import first_stage
from funcstage.engines.levels.pieces import reached, split
from funcstage.engines.levels.reverse import Entries, Origin, reverse, unshared
from funcstage.engines.on_nodes import InputsOnNodes, WeightsOnNodes, operation_of
from funcstage.residuals import (
    Home,
    Residual,
    nodes_behind,
)
from funcstage.state.subclasses import as_told

Exits: TypeAlias = list[tuple[int, GradientEdge]]
"""Indices of output leaves, with their places on a tape."""


class Exit(NamedTuple):
    """A leaf of the result, free of wrappers, and its places on the tapes if it has any."""

    value: Any
    outer: GradientEdge | None
    inner: GradientEdge | None

    def of(self, kind: type) -> Exit:
        """The same with a tensor of a class of the user's, if it is one, which wrappers have hidden."""
        return self._replace(value=as_told(kind, self.value))


class Site(NamedTuple):
    """Where a value left the inner level: its place on the outer tape and on the inner one."""

    outer: GradientEdge
    inner: GradientEdge


@dataclass(frozen=True, slots=True, eq=False)
class WeightTape(WeightsOnNodes):
    """What W needs: places on the inner tape with the cotangents that arrived there.

    Attributes:
        origin: the forward pass.
        seeds: (place on the inner tape, cotangent).
        regions: what is left of the checkpointed regions that I has run again.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
        first_reads: where data meets parameters first, if W is the whole backward of a stage.
    """

    origin: Origin
    seeds: list[tuple[GradientEdge, Tensor]]
    regions: list[RegionTape]
    shared: bool
    home: Home
    first_reads: Sequence[GradientEdge] = ()

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        origin = self.origin
        shared = self.shared or retain
        seeds, regions = list(self.seeds), []
        for places, tape in self.regions:
            of_region, left = tape.weight_vjp(retain)
            seeds += [(edge, grad) for edge, grad in zip(places, of_region, strict=True) if grad is not None]
            if left is not None:
                regions.append(RegionTape(places, left))
        wanted = [leaf for _, leaf in origin.params]
        with origin.switchboard.rerunning(retain):
            found = reverse(seeds, wanted, shared, origin, self.home)
        grads: list[Tensor | None] = [None] * origin.n_params
        cotangents = [cotangent for _, cotangent in seeds]
        for (i, _), grad in zip(origin.params, unshared(found, cotangents), strict=True):
            grads[i] = grad
        return grads, replace(self, regions=regions, shared=True) if retain else None

    def _beside(self) -> Iterator[Tensor]:
        """The cotangents, then the residuals of the regions."""
        yield from (cotangent for _, cotangent in self.seeds)
        for _, tape in self.regions:
            yield from tape.leaves()

    def _others(self, rest: Iterator[Tensor]) -> dict[str, Any]:
        return {
            "seeds": [(edge, next(rest)) for edge, _ in self.seeds],
            "regions": [
                RegionTape(places, tape.with_leaves([*islice(rest, len(tape.leaves()))]))
                for places, tape in self.regions
            ],
        }

    def sites(self) -> Iterator[Place]:
        """Yield the sites, those of checkpointed regions included; nothing is used up."""
        if self._is_whole_backward():
            yield from first_stage.by_site(self).sites()
            return
        origin = self.origin

        def vjp_from(edges: Sequence[GradientEdge], cotangents: list[Tensor | None]) -> list[Tensor | None]:
            seeds = [(edge, grad) for edge, grad in zip(edges, cotangents, strict=True) if grad is not None]
            grads: list[Tensor | None] = [None] * origin.n_params
            found = reverse(seeds, [leaf for _, leaf in origin.params], True, origin, self.home)
            for (i, _), grad in zip(origin.params, found, strict=True):
                grads[i] = grad
            return grads

        def reached_from(edges: Sequence[GradientEdge]) -> list[int]:
            ends = [getattr(node, "variable", None) for node in nodes_behind(edges)]
            return [i for i, leaf in origin.params if any(end is leaf for end in ends)]

        for edge, cotangent in self.seeds:
            saved = origin.saved([edge], self.home)
            yield Place(
                operation_of(edge.node),
                cotangent,
                [residual.tensor for residual in saved],
                reached_from([edge]),
                lambda grad, edge=edge: vjp_from([edge], [grad]),  # type: ignore[misc]
            )
        for outside, of_region in self.regions:
            for place in _sites_of(of_region, outside, reached_from):
                yield place._replace(
                    reached=reached_from([outside[i] for i in place.reached]),
                    vjp=lambda grad, inside=place.vjp, outside=outside: vjp_from(outside, inside(grad)),  # type: ignore[misc]
                )

    def reached(self) -> set[int]:
        """Which parameters lie behind the sites."""
        return reached(self)

    def split(self, parts: int) -> Sequence[AnyWeightTape]:
        """Divide the sites."""
        if self._is_whole_backward() and parts > 1:
            return first_stage.by_site(self).split(parts)
        return split(self, parts)

    def _is_whole_backward(self) -> bool:
        """Whether there is a chain of cotangents to run, and nobody differentiates that in turn."""
        return bool(self.first_reads) and not self.origin.higher

    @property
    def differentiated(self) -> bool:
        return self.origin.higher

    @property
    def intact(self) -> bool:
        return not self.regions and self.origin.retains(self.shared)

    def reads(self) -> Iterator[Tensor]:
        """What W reads: residuals, parameters and buffers."""
        yield from self.origin.read_behind([edge for edge, _ in self.seeds], self.home)
        yield from (cotangent for _, cotangent in self.seeds)
        for _, tape in self.regions:
            yield from tape.reads()

    def _saved(self) -> list[Residual]:
        return self.origin.saved((edge for edge, _ in self.seeds), self.home)


def _sites_of(
    tape: Any, outside: list[GradientEdge], reached_from: Callable[[Sequence[GradientEdge]], list[int]]
) -> Iterator[Place]:
    """The sites of a region, or of a part that another engine runs."""
    try:
        yield from tape.sites()
    except Summed as summed:
        raise Summed(reached_from([outside[i] for i in summed.reached])) from None


class RegionTape(NamedTuple):
    """What W needs of a checkpointed region, or of a part that another engine runs.

    Attributes:
        places: where on the inner tape the gradients go on.
        tape: its own.
    """

    places: list[GradientEdge]
    tape: WeightTape


@dataclass(frozen=True, slots=True, eq=False)
class InputTape(InputsOnNodes):
    """What the forward pass retains: the outer tape for I, and the inner one for W.

    Attributes:
        origin: the forward pass.
        roots: where the output leaves lie on the outer tape.
        inputs: the differentiated argument leaves, where the outer tape ends.
        sites: where the two tapes meet.
        derived: where output leaves lie on the inner tape, for what they owe to parameters directly.
        hooked: whether the stage put hooks on activations.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
        captured: the tensors that F has read without being handed them.
        first_reads: where data meets parameters first, if no argument is differentiated.
    """

    origin: Origin
    roots: Exits
    inputs: Entries
    sites: list[Site]
    derived: Exits
    hooked: bool
    shared: bool
    home: Home
    captured: Sequence[weakref.ref[Tensor]] = ()
    first_reads: Sequence[GradientEdge] = ()

    @property
    def higher(self) -> bool:
        """Whether what I and W yield can be differentiated in turn."""
        return bool(self.origin.by_autograd)

    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        origin = self.origin
        if is_differentiated(cotangents):
            origin = replace(origin, higher=True)
        shared = self.shared or retain
        wanted: list[GradientEdge | Tensor] = [leaf for _, leaf in self.inputs]
        wanted += [site.outer for site in self.sites]
        with (
            origin.switchboard.rerunning(retain) as regions,
            self._behind_hooks() as hooked_cotangents,
        ):
            found = reverse(_seeds(self.roots, cotangents), wanted, shared, origin, self.home)
        grads: list[Tensor | None] = [None] * origin.n_args
        for (i, _), grad in zip(self.inputs, found, strict=False):
            grads[i] = grad
        seeds: list[tuple[GradientEdge, Tensor]] = []
        for site, grad in zip(self.sites, found[len(self.inputs) :], strict=True):
            if site.outer.node in hooked_cotangents:
                grad = hooked_cotangents[site.outer.node][site.outer.output_nr]
            if grad is not None:
                seeds.append((site.inner, grad))
        seeds += _seeds(self.derived, cotangents)
        weight_tape = WeightTape(origin, seeds, regions, shared, self.home, self.first_reads)
        return grads, weight_tape, replace(self, shared=True) if retain else None

    @contextmanager
    def _behind_hooks(self) -> Iterator[dict[Node, Sequence[Tensor | None]]]:
        """Note the cotangents at sites as the stage's own hooks leave them.

        Where a node runs, `torch.autograd.grad` reports what arrived before hooks, but W needs what the
        input side got: what was there after them.
        """
        arrived: dict[Node, Sequence[Tensor | None]] = {}
        handles = []
        if self.hooked:
            for node in {site.outer.node for site in self.sites}:
                handles.append(node.register_prehook(partial(arrived.__setitem__, node)))
        try:
            yield arrived
        finally:
            for handle in handles:
                handle.remove()

    @property
    def differentiated(self) -> bool:
        return self.origin.higher

    @property
    def intact(self) -> bool:
        return self.origin.retains(self.shared)

    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """What I reads: residuals, parameters and buffers."""
        edges = [edge for edge, _ in _seeds(self.roots, cotangents)]
        return self.origin.read_behind(edges, self.home)

    def _saved(self) -> list[Residual]:
        edges = [edge for _, edge in self.roots + self.derived] + [
            edge for site in self.sites for edge in site
        ]
        return self.origin.saved(edges, self.home)


def _seeds(places: Exits, cotangents: Sequence[Tensor | None]) -> list[tuple[GradientEdge, Tensor]]:
    return [(edge, cotangent) for i, edge in places if (cotangent := cotangents[i]) is not None]
