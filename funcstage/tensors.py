"""Sums of gradients over microbatches and uses."""

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
