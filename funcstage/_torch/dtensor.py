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
from torch.distributed.tensor._dtensor_spec import DTensorSpec

__all__ = [
    "DTensor",
    "DTensorSpec",
    "groups_of",
    "laid_out_as",
    "local_of",
    "of_cotangent",
    "one",
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


def one(shape: torch.Size, dtype: torch.dtype, device: torch.device, mesh: Any) -> Any:
    """A one on every rank, of a shape with a single element."""
    local = torch.ones(shape, dtype=dtype, device=device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
