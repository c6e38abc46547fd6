"""The stacks of modes, which what was interrupted may have left too high."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _len_torch_function_stack as function_modes
from torch.overrides import _pop_mode as pop_function_mode
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode

__all__ = ["dispatch_modes", "function_modes", "pop_dispatch_mode", "pop_function_mode", "set_grad_enabled"]

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
set_grad_enabled: Callable[[bool], Any] = torch._C._set_grad_enabled
