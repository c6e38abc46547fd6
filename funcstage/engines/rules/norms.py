"""Batch and instance norm without cuDNN, whose operation writes the running statistics and does not say so.

Torch chooses cuDNN by a setting of the whole process, which a trace leaves alone: these are the operations
below the choice, composed as ATen composes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Any:
    """As `torch.batch_norm`; x: [batch, channels, ...]."""
    if x.numel() == 0 or not x.is_cuda:  # where there is no choice
        return torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, False)
    return torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Any:
    """As `torch.instance_norm`; x: [batch, channels, ...]. The samples become channels of one batch."""
    if not x.is_cuda:
        return torch.instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, False)
    batch, channels = x.shape[:2]
    weight, bias, means, variances = (
        None if each is None else each.repeat(batch) for each in (weight, bias, mean, var)
    )
    flat = x.contiguous().view(1, batch * channels, *x.shape[2:])
    out = batch_norm(flat, weight, bias, means, variances, use_input_stats, momentum, eps)
    for own, of_samples in ((mean, means), (var, variances)):
        if own is not None and of_samples is not None:
            own.detach().copy_(of_samples.view(batch, channels).mean(0))
    return out.view(x.shape)
