"""Autocast above the levels, for composites that it runs in float32.

Inside a `torch.func` level autocast acts on a composite operation and then, below the level, once more
on the operations it consists of. Where the composite is to run in float32 its matrix products are so
cast back to the lower precision, after autograd has saved the float32 operands. Going straight to the
autocast kernel makes it act once, as in eager, and before the levels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcstage._torch import operators as ops
from funcstage._torch.settings import is_any_autocast_enabled
from funcstage.engines.rules.base import Call, Rule

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "hpu": "AutocastHPU"}


def first(overload: Any) -> tuple[Rule, ...]:
    """The rules of a composite whose autocast kernel runs first."""

    def at_kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_among((*args, *kwargs.values()))
        return ops.with_autocast_kernel(overload, _KEYS[device])(*args, **kwargs)

    return (Rule(_casts, at_kernel, whole=True),)


def _casts(call: Call) -> bool:
    if call.traced or not is_any_autocast_enabled():
        return False
    device = _device_among((*call.args, *call.kwargs.values()))
    return device in _KEYS and torch.is_autocast_enabled(device)


def _device_among(operands: Iterable[Any]) -> str:
    """The type of the device of the first tensor, if there is one."""
    return next((operand.device.type for operand in operands if isinstance(operand, Tensor)), "")
