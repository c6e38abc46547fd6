"""Batch and instance norm without cuDNN, whose operation writes the running statistics and does not say so.

Torch chooses cuDNN by a setting of the whole process, which a trace leaves alone: these are the operations
below the choice, composed as ATen composes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATISTICS = ((3, "running_mean"), (4, "running_var"))
"""What both write into: positions and names."""


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    """As `torch.batch_norm`; input: [batch, channels, ...]."""
    operands = input, weight, bias, running_mean, running_var, training, momentum, eps
    if input.numel() == 0 or not input.is_cuda:  # where there is no choice
        return torch.batch_norm(*operands, False)
    return torch.native_batch_norm(*operands)[0]


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    """As `torch.instance_norm`; input: [batch, channels, ...]. The samples become channels of one batch."""
    if not input.is_cuda:
        return torch.instance_norm(
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, False
        )
    batch, channels = input.shape[:2]
    weight, bias, means, variances = (
        None if each is None else each.repeat(batch) for each in (weight, bias, running_mean, running_var)
    )
    flat = input.contiguous().view(1, batch * channels, *input.shape[2:])
    out = batch_norm(flat, weight, bias, means, variances, use_input_stats, momentum, eps)
    for own, of_samples in ((running_mean, means), (running_var, variances)):
        if own is not None and of_samples is not None:
            own.detach().copy_(of_samples.view(batch, channels).mean(0))
    return out.view(input.shape)
