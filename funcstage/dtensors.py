"""DTensors, found without importing what they are made by, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Specs: TypeAlias = dict[int, Any]
"""Mesh, placements and shape of those of some leaves that are DTensors, by number."""


def first_dtensor(leaves: Iterable[Any]) -> int | None:
    """The number of the first leaf that is a DTensor."""
    kind = _kind()
    return (
        None if kind is None else next((i for i, leaf in enumerate(leaves) if isinstance(leaf, kind)), None)
    )


def unwrapped(leaves: list[Any]) -> tuple[list[Any], Specs]:
    """Return the leaves with what this rank has of DTensors in their places, and the specs of these."""
    kind = _kind()
    places = [] if kind is None else [i for i, leaf in enumerate(leaves) if isinstance(leaf, kind)]
    if not places:
        return leaves, {}
    from funcstage._torch.dtensor import local_of, spec_of

    local = list(leaves)
    for i in places:
        local[i] = local_of(leaves[i])
    return local, {i: spec_of(leaves[i]) for i in places}


def wrapped(local: Sequence[Any], specs: Specs) -> list[Any]:
    """Return leaves of which some become DTensors again; what is absent stays so."""
    leaves = list(local)
    if specs:
        from funcstage._torch import dtensor

        for i, spec in specs.items():
            if leaves[i] is not None:
                leaves[i] = dtensor.wrapped(leaves[i], spec)
    return leaves


def of_cotangents(specs: Specs) -> Specs:
    """The specs of the cotangents of outputs: of what is summed over ranks, each has the whole gradient."""
    if not specs:
        return specs
    from funcstage._torch.dtensor import of_cotangent

    return {i: of_cotangent(spec) for i, spec in specs.items()}


def placed_alike(grads: list[Any], specs: Specs) -> list[Any]:
    """Gradients with the placements of what they are gradients of; sends messages where they have others.

    The gradient of a weight that is the same on all ranks, whose activations are not, arrives as sums that
    are to be made. What is a sum over ranks itself keeps the gradient that it has.
    """
    found = unwrapped(grads)[1]
    if not found:
        return grads
    from funcstage._torch.dtensor import laid_out_as

    placed = list(grads)
    for i, spec in found.items():
        like = specs.get(i)
        if like is None or spec.mesh != like.mesh or spec.placements == like.placements:
            continue
        if not any(placement.is_partial() for placement in like.placements):
            placed[i] = laid_out_as(grads[i], like.placements)
    return placed


def placed_as(leaves: Sequence[Any], specs: Specs) -> list[Any]:
    """DTensors with the placements of these specs; sends messages where they have others."""
    placed = list(leaves)
    for i, spec in specs.items():
        if leaves[i] is not None and tuple(leaves[i].placements) != tuple(spec.placements):
            from funcstage._torch.dtensor import laid_out_as

            placed[i] = laid_out_as(leaves[i], spec.placements)
    return placed


def mesh_of(tensor: Any) -> Any:
    """The mesh of a DTensor; None for any other tensor."""
    kind = _kind()
    return tensor.device_mesh if kind is not None and isinstance(tensor, kind) else None


def _kind() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local_of(tensor: Any) -> Any:
    """The tensor that lies on this rank: a DTensor's own part, and anything else as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
