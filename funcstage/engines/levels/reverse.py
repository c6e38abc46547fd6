"""A reverse pass over a tape of the levels'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from funcstage._torch import functorch as ft
from funcstage._torch.tensors import is_symbolic_zero
from funcstage.engines import on_nodes
from funcstage.engines.levels.checkpoint import Rerun
from funcstage.residuals import Home, nodes_behind, residuals_of

Entries: TypeAlias = list[tuple[int, Tensor]]
"""Indices of argument or parameter leaves, with the wrapped leaves where a tape ends."""


@dataclass(frozen=True, slots=True, eq=False)
class Origin(on_nodes.Origin):
    """What all tapes of one forward pass have in common.

    Attributes:
        params: the parameter leaves, where the inner tape ends.
        higher: whether the gradients are to be differentiated in turn.
        apart: whether another engine has run parts of the stage.
    """

    params: Entries
    higher: bool
    apart: bool

    @property
    def by_autograd(self) -> bool:
        """Whether autograd runs all of the reverse passes."""
        return not self.apart

    def retains(self, shared: bool) -> bool:
        """Whether a reverse pass leaves the nodes as they are."""
        return shared or self.switchboard.taken_out

    def read_behind(self, edges: Sequence[GradientEdge], home: Home) -> Iterator[Tensor]:
        """What a reverse pass from these places reads, and what the regions there read again."""
        yield from (residual.tensor for residual in residuals_of(edges, (), self.switchboard, home))
        for node in nodes_behind(edges):
            rerun = getattr(node, "rerun", None)
            if isinstance(rerun, Rerun):
                yield from rerun.reads()


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


def unshared(grads: Iterable[Tensor | None], cotangents: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Copy gradients that lie in each other's or a cotangent's memory, so that each can be added into."""
    taken = {ft.storage_key(cotangent) for cotangent in cotangents}
    for grad in grads:
        if grad is not None:
            key = ft.storage_key(grad)
            if key in taken or (grad.layout is torch.strided and 0 in grad.stride()):
                grad = grad.clone(memory_format=torch.contiguous_format)
            taken.add(key)
        yield grad
