"""Autocast above the levels, for composites that it runs in float32.

Inside a `torch.func` level autocast acts on a composite operation and then, below the level, once more
on the operations it consists of. Where the composite is to run in float32 its matrix products are so
cast back to the lower precision, after autograd has saved the float32 operands. Going straight to the
autocast kernel makes it act once, as in eager, and before the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcstage._torch import operators as ops
from funcstage._torch.settings import is_any_autocast_enabled

_COMPOSITES: dict[Any, Any] = {
    ops.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
    ops.cdist: torch.ops.aten.cdist.default,
}
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "hpu": "AutocastHPU"}


def cast_first(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return `function`, or under autocast the autocast kernel of a composite that needs it."""
    if not is_any_autocast_enabled():
        return function
    overload = _COMPOSITES.get(function)
    operand = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if overload is None or operand is None:
        return function
    device_type = operand.device.type
    key = _KEYS.get(device_type)
    if key is None or not torch.is_autocast_enabled(device_type):
        return function
    return ops.with_autocast_kernel(overload, key)
