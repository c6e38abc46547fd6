"""Sums of gradients over microbatches and uses, and tensors laid out as others are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]


def added(totals: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> Gradients:
    """Add gradients into `totals`, which are donated; `None` counts as zero."""
    return [_added(total, grad) for total, grad in zip(totals, grads, strict=True)]


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    if total.layout is not torch.strided and grad.layout is torch.strided:
        return grad + total  # a sparse tensor takes no dense one
    if torch.is_grad_enabled() and (total.requires_grad or grad.requires_grad):
        return total + grad  # the sum may be differentiated, which needs its terms intact
    return total.add_(grad)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy with these strides. Where they make elements share memory, those are equal."""
    if tensor.stride() == strides:
        return tensor
    with torch.no_grad():
        new = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        size = new.untyped_storage().nbytes() // new.element_size()
        if size >= new.numel():
            return new.copy_(tensor)
        places = torch.arange(size, device=tensor.device).as_strided(tensor.shape, strides)
        new.as_strided((size,), (1,)).index_put_((places.reshape(-1),), tensor.reshape(-1))
        return new
