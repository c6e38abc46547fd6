"""DTensors, found without importing what they are made by, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch

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
    if kind is None or not any(issubclass(each, kind) for each in {*map(type, leaves)}):
        return leaves, {}
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kind)]
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


def example(tensor: Any, device: Any = "meta") -> Any:
    """A DTensor with the look of another one and without its values, contiguous; of others, none."""
    if not _is_dtensor(tensor):
        return None
    from funcstage._torch.dtensor import contiguous

    return contiguous(tensor, device)


def to_send(tensor: Any) -> Any:
    """A tensor that lies contiguously and has arrived; a DTensor with all of that on this rank."""
    if _is_dtensor(tensor):
        from funcstage._torch.dtensor import contiguous

        return contiguous(tensor)
    wait = getattr(tensor, "wait", None)  # of a collective's result that nobody has read yet
    return (tensor if wait is None else wait()).contiguous()


def as_cotangent(tensor: Any) -> Any:
    """A tensor; of a DTensor, what is a sum over ranks counts as the whole, as in its gradient."""
    [local], specs = unwrapped([tensor])
    return wrapped([local], of_cotangents(specs))[0] if specs else tensor


def placement(tensor: Any) -> tuple[Any, ...]:
    """Mesh and placements of a DTensor; nothing for any other tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if _is_dtensor(tensor) else ()


def zeros(example: Any, device: Any) -> Any:
    """Zeros that look like an example, which may be a DTensor."""
    [local], specs = unwrapped([example])
    made = [torch.zeros(local.shape, dtype=local.dtype, device=device)]
    return wrapped(made, specs)[0]


def groups_of(tensors: Iterable[Any]) -> set[Any]:
    """The process groups of several ranks over which some of the tensors are DTensors."""
    meshes = [mesh for mesh in map(mesh_of, tensors) if mesh is not None]
    found: set[Any] = set()
    for mesh in dict.fromkeys(meshes):
        found |= {group for group in mesh.get_all_groups() if group.size() > 1}
    return found


def mesh_of(tensor: Any) -> Any:
    """The mesh of a DTensor; None for any other tensor."""
    kind = _kind()
    return tensor.device_mesh if kind is not None and isinstance(tensor, kind) else None


def _is_dtensor(tensor: Any) -> bool:
    kind = _kind()
    return kind is not None and isinstance(tensor, kind)


def _kind() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local_of(tensor: Any) -> Any:
    """The tensor that lies on this rank: a DTensor's own part, and anything else as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
