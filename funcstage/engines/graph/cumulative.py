"""Batch norms with a cumulative average: the count that their modules read as a number stays a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def averaged_in_tensors(module: Any) -> Iterator[None]:
    """While a stage is traced, let its batch norms with `momentum=None` compute their factor as a tensor.

    Modules with a forward of their own are left alone.
    """
    parts = module.modules() if isinstance(module, nn.Module) else ()
    found = [part for part in parts if _averages(part)]
    for part in found:
        part.__dict__["forward"] = partial(_forward, part)
    try:
        yield
    finally:
        for part in found:
            part.__dict__.pop("forward", None)


def _averages(part: Any) -> bool:
    return (
        type(part).forward is nn.BatchNorm1d.forward  # which those of two and three dimensions have, too
        and "forward" not in part.__dict__
        and part.momentum is None
        and part.training
        and part.track_running_stats
        and not any(each is None for each in (part.running_mean, part.running_var, part.num_batches_tracked))
    )


def _forward(norm: Any, input: Tensor) -> Tensor:
    """As the forward of torch's batch norms, which updates the statistics by 1 / `num_batches_tracked`.

    The kernel takes a number as the momentum: with 1.0 it leaves this batch's own statistics in copies.
    """
    norm._check_input_dim(input)
    norm.num_batches_tracked.add_(1)
    running = norm.running_mean, norm.running_var
    mean, var = own = [each.clone() for each in running]
    out = F.batch_norm(input, mean, var, norm.weight, norm.bias, training=True, momentum=1.0, eps=norm.eps)
    if input.numel() > 0:  # where it is empty, the kernel leaves the statistics alone
        factor = 1.0 / norm.num_batches_tracked.double()
        for average, of_batch in zip(running, own, strict=True):
            average.copy_(of_batch.double() * factor + average.double() * (1.0 - factor))
    return out
