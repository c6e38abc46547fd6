"""The stacks of modes, which what was interrupted may have left too high, or without one of its caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode

__all__ = [
    "dispatch_modes",
    "function_modes",
    "gradients",
    "pop_dispatch_mode",
    "restore_function_modes",
    "set_grad_enabled",
]

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
set_grad_enabled: Callable[[bool], Any] = torch._C._set_grad_enabled


def restore_function_modes(before: Sequence[Any]) -> None:
    """Let these modes be entered, in this order, and no others."""
    now = function_modes()
    common = 0
    while common < min(len(now), len(before)) and now[common] is before[common]:
        common += 1
    for _ in now[common:]:
        pop_function_mode()
    for mode in before[common:]:
        push_function_mode(mode)


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
