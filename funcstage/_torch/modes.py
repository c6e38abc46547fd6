"""The stacks of modes, which what was interrupted may have left too high."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _len_torch_function_stack as function_modes
from torch.overrides import _pop_mode as pop_function_mode
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode

__all__ = [
    "dispatch_modes",
    "function_modes",
    "gradients",
    "pop_dispatch_mode",
    "pop_function_mode",
    "set_grad_enabled",
]

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
set_grad_enabled: Callable[[bool], Any] = torch._C._set_grad_enabled


class gradients:  # used as torch's `enable_grad` and `no_grad`, which take four times as long
    """Turn gradients on or off for a while."""

    __slots__ = ("_before", "_on")

    def __init__(self, *, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        set_grad_enabled(self._on)

    def __exit__(self, *error: object) -> None:
        set_grad_enabled(self._before)
