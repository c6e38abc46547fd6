"""Custom autograd functions, from inside: the classes behind them, and those that torch makes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction

__all__ = [
    "BackwardHookFunction",
    "SingleLevelFunction",
    "enable_single_level_autograd_function",
    "registered",
]


def registered(info: Any) -> tuple[Callable[..., None] | None, Callable[..., Any] | None]:
    """What `torch.library.register_autograd` was given: how to set up the context, and the backward."""
    return info._setup_context_fn, info._backward_fn
