"""Autocast above the levels, for composites that it runs in float32.

Inside a `torch.func` level autocast acts on a composite operation and then, below the level, once more
on the operations it consists of. Where the composite is to run in float32 its matrix products are so
cast back to the lower precision, after autograd has saved the float32 operands. Going straight to the
autocast kernel makes it act once, as in eager, and before the levels.

A few kernels consist of matrix products that autocast casts in turn. A graph runs them out of autocast, in
another precision, so they are refused where it is on. Of torch's operators these are all, by a comparison of
each with its trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcstage._torch import operators as ops
from funcstage._torch.settings import is_any_autocast_enabled
from funcstage.engines.rules.base import Call, Rule
from funcstage.errors import TraceError

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "hpu": "AutocastHPU"}


def first(overload: Any) -> tuple[Rule, ...]:
    """The rules of a composite whose autocast kernel runs first."""

    def at_kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_among((*args, *kwargs.values()))
        return ops.with_autocast_kernel(overload, _KEYS[device])(*args, **kwargs)

    return (Rule(lambda call: not call.traced and _casts(call), at_kernel, whole=True),)


def _casts(call: Call) -> bool:
    if not is_any_autocast_enabled():
        return False
    device = _device_among((*call.args, *call.kwargs.values()))
    return device in _KEYS and torch.is_autocast_enabled(device)


def within(name: str) -> tuple[Rule, ...]:
    """The rules of an operation in whose kernel autocast acts: a graph would run that out of autocast.

    Raises:
        TraceError: names it, where autocast acts on a call that is recorded.
    """

    def refused(*args: Any, **kwargs: Any) -> Any:
        dtype = str(torch.get_autocast_dtype(_device_among((*args, *kwargs.values())))).removeprefix("torch.")
        raise TraceError(
            f"The stage calls {name} under autocast, which multiplies in {dtype} within its kernel. A graph "
            "would not. Call it under torch.autocast(..., enabled=False), with tensors of the dtype that it "
            "is to have."
        )

    return (Rule(lambda call: call.traced and _casts(call), refused, whole=True),)


def _device_among(operands: Iterable[Any]) -> str:
    """The type of the device of the first tensor, if there is one."""
    return next((operand.device.type for operand in operands if isinstance(operand, Tensor)), "")
