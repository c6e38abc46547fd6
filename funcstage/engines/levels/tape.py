"""The tapes of the levels engine: what F leaves for I and W, and the reverse passes over it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage._torch import functorch as ft
from funcstage._torch.tensors import is_symbolic_zero
from funcstage.engines import on_nodes
from funcstage.engines.base import Place, is_differentiated
from funcstage.engines.levels.checkpoint import Rerun
from funcstage.engines.levels.pieces import reached, split
from funcstage.engines.on_nodes import InputsOnNodes, WeightsOnNodes, operation_of
from funcstage.residuals import (
    Home,
    Residual,
    nodes_behind,
    residuals_of,
)

Exits: TypeAlias = list[tuple[int, GradientEdge]]
"""Indices of output leaves, with their places on a tape."""


Entries: TypeAlias = list[tuple[int, Tensor]]
"""Indices of argument or parameter leaves, with the wrapped leaves where a tape ends."""


class Exit(NamedTuple):
    """A leaf of the result, free of wrappers, and its places on the tapes if it has any."""

    value: Any
    outer: GradientEdge | None
    inner: GradientEdge | None


class Site(NamedTuple):
    """Where a value left the inner level: its place on the outer tape and on the inner one."""

    outer: GradientEdge
    inner: GradientEdge


@dataclass(frozen=True, slots=True, eq=False)
class Origin(on_nodes.Origin):
    """What all tapes of one forward pass have in common.

    Attributes:
        params: the parameter leaves, where the inner tape ends.
        higher: whether the gradients are to be differentiated in turn.
    """

    params: Entries
    higher: bool

    def retains(self, shared: bool) -> bool:
        """Whether a reverse pass leaves the nodes as they are."""
        return shared or self.higher or self.switchboard.taken_out

    def read_behind(self, edges: Sequence[GradientEdge], home: Home) -> Iterator[Tensor]:
        """What a reverse pass from these places reads, and what the regions there read again."""
        yield from (residual.tensor for residual in residuals_of(edges, (), self.switchboard, home))
        for node in nodes_behind(edges):
            rerun = getattr(node, "rerun", None)
            if isinstance(rerun, Rerun):
                yield from rerun.reads()


@dataclass(frozen=True, slots=True, eq=False)
class WeightTape(WeightsOnNodes):
    """What W needs: places on the inner tape with the cotangents that arrived there.

    Attributes:
        origin: the forward pass.
        seeds: (place on the inner tape, cotangent).
        regions: what is left of the checkpointed regions that I has run again.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
    """

    origin: Origin
    seeds: list[tuple[GradientEdge, Tensor]]
    regions: list[RegionTape]
    shared: bool
    home: Home

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
        for (i, _), grad in zip(origin.params, _unshared(found, cotangents), strict=True):
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
            for place in of_region.sites():
                yield place._replace(
                    reached=reached_from([outside[i] for i in place.reached]),
                    vjp=lambda grad, inside=place.vjp, outside=outside: vjp_from(outside, inside(grad)),  # type: ignore[misc]
                )

    def reached(self) -> set[int]:
        """Which parameters lie behind the sites."""
        return reached(self)

    def split(self, parts: int) -> list[WeightTape]:
        """Divide the sites."""
        return split(self, parts)

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


class RegionTape(NamedTuple):
    """What W needs of a checkpointed region, and where on the inner tape the gradients go on."""

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
    higher: ClassVar = True

    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        origin = self.origin
        if not origin.higher and is_differentiated(cotangents):
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
        weight_tape = WeightTape(origin, seeds, regions, shared, self.home)
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


def reverse(
    seeds: Sequence[tuple[GradientEdge, Tensor]],
    wanted: Sequence[GradientEdge | Tensor],
    shared: bool,
    origin: Origin,
    home: Home,
) -> Sequence[Tensor | None]:
    """One reverse pass over a tape; `None` for the places that it does not reach."""
    if not seeds or not wanted:
        return [None] * len(wanted)
    edges, cotangents = zip(*seeds, strict=True)
    with origin.reading(home):
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            edges,
            wanted,  # type: ignore[arg-type]  # the stubs know edges or tensors, not both
            cotangents,
            retain_graph=origin.retains(shared),
            create_graph=origin.higher,
            allow_unused=True,
        )
    # Torch's zeros without memory can be read by few kernels and written by none.
    return [grad if grad is None or not is_symbolic_zero(grad) else torch.zeros_like(grad) for grad in grads]


def _unshared(grads: Iterable[Tensor | None], cotangents: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Copy gradients that lie in each other's or a cotangent's memory, so that each can be added into."""
    taken = {ft.storage_key(cotangent) for cotangent in cotangents}
    for grad in grads:
        if grad is not None:
            key = ft.storage_key(grad)
            if key in taken or (grad.layout is torch.strided and 0 in grad.stride()):
                grad = grad.clone(memory_format=torch.contiguous_format)
            taken.add(key)
        yield grad
