"""What a DTensor is made of: its tensor on this rank and the spec of the whole. Loaded on need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = [
    "DTensor",
    "DTensorSpec",
    "contiguous",
    "groups_of",
    "laid_out_as",
    "local_of",
    "of_cotangent",
    "one",
    "shape_here",
    "spec_for",
    "spec_of",
    "with_dtype",
    "with_placements",
    "wrapped",
]


def local_of(tensor: Any) -> Tensor:
    """The tensor that a DTensor has on this rank, once it has arrived."""
    local: Tensor = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def spec_of(tensor: Any) -> Any:
    """Mesh, placements and the look of the whole."""
    return tensor._spec


def wrapped(local: Tensor, spec: Any) -> Any:
    """A DTensor around this rank's part, without history; nothing is checked or sent."""
    # A copy, as torch's operators in place change the spec of what they write into.
    return DTensor(local, copy.copy(spec), requires_grad=False)


def groups_of(spec: Any) -> tuple[str, ...]:
    """The names of the process groups of a mesh, by which a graph refers to them."""
    return tuple(group.group_name for group in spec.mesh.get_all_groups())


def of_cotangent(spec: Any) -> Any:
    """The spec of the cotangent of an output: what is summed over ranks has its gradient on all of them."""
    return with_placements(spec, [Replicate() if p.is_partial() else p for p in spec.placements])


def with_placements(spec: Any, placements: Sequence[Any]) -> Any:
    """The same whole, placed otherwise."""
    if tuple(placements) == tuple(spec.placements):
        return spec
    return DTensorSpec(spec.mesh, tuple(placements), tensor_meta=spec.tensor_meta)


def with_dtype(spec: Any, dtype: torch.dtype) -> Any:
    """The same placements of a whole of another dtype."""
    meta = spec.tensor_meta
    return spec if meta.dtype == dtype else replace(spec, tensor_meta=meta._replace(dtype=dtype))


def laid_out_as(tensor: Any, placements: Sequence[Any]) -> Any:
    """A DTensor with these placements; sends messages where it has others."""
    with torch.no_grad():
        return tensor.redistribute(placements=placements)


def spec_for(
    mesh: Any, placements: Sequence[Any], shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Any:
    """The spec of a whole of this shape."""
    meta = TensorMeta(torch.Size(shape), tuple(strides), dtype)
    return DTensorSpec(mesh, tuple(placements), tensor_meta=meta)


def shape_here(spec: Any) -> tuple[int, ...]:
    """The shape of the part of the whole that falls to this rank."""
    return tuple(compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)[0])


def contiguous(tensor: Any, device: torch.device | str | None = None) -> Any:
    """The same DTensor, whose whole and part both count as contiguous; elsewhere, one without its values."""
    spec, local = spec_of(tensor), local_of(tensor)
    strides = torch.empty(tensor.shape, device="meta").stride()
    spec = spec_for(spec.mesh, spec.placements, tensor.shape, strides, tensor.dtype)
    here = (
        local.contiguous() if device is None else torch.empty(local.shape, dtype=local.dtype, device=device)
    )
    return DTensor(here, spec, requires_grad=False)


def one(shape: torch.Size, dtype: torch.dtype, device: torch.device, mesh: Any) -> Any:
    """A one on every rank, of a shape with a single element."""
    local = torch.ones(shape, dtype=dtype, device=device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
