"""A stage through one of the engines, and its module through plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcstage as fs

ENGINES = ("uncompiled", "aten")


def stage_of(apply: Callable[..., Any], engine: str) -> Callable[..., Any]:
    """A stage function for an engine."""
    return apply if engine == "uncompiled" else fs.compile(apply, backend=engine)


def split(apply: Any, params: Any, buffers: Any, x: Tensor) -> list[Tensor]:
    """The output, the gradient of x and those of the parameters, for a cotangent of ones."""
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    return [output, dx, *weight_pullback().values()]


def eager(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The same by plain autograd."""
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    return [output.detach(), *torch.autograd.grad(output.sum(), [leaf, *module.parameters()])]
