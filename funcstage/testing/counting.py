"""FLOPs of whatever runs: what `torch.utils.flop_counter` counts, draws of checkpointed regions among it.

Its `FlopCounterMode` fails at higher-order operators but `cond`; compiled stages repeat draws by two others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import flop_registry

from funcstage._torch.operators import HigherOrderOperator, OpOverload, TorchDispatchMode, packet_of

Result = TypeVar("Result")


class FlopCounter(TorchDispatchMode):
    """While it is entered, counts the floating-point operations that run.

    Attributes:
        total: how many there were.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        higher = isinstance(function, HigherOrderOperator)
        formula = flop_registry.get(function if higher else packet_of(function))
        if formula is None and higher:
            return function(*map(self._counting, args), **kwargs)
        if function is torch.ops.prim.device.default:  # a question of fake tensors, which has no parts
            return function(*args, **kwargs)
        if formula is None:
            with self:
                # NotImplemented by operations that are not made of others.
                parts = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if parts is NotImplemented else parts
        result = function(*args, **kwargs)
        self.total += int(formula(*args, **kwargs, out_val=result))
        return result

    def _counting(self, argument: Any) -> Any:
        """What a higher-order operator runs, with this counter entered again."""
        if not callable(argument) or isinstance(argument, OpOverload):
            return argument  # an operator is told from functions by its type

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return argument(*args, **kwargs)

        return run


class UncountableError(Exception):
    """Eager does not run where operations are counted, as where `torch.cond` is compiled under a mode."""


def counted(function: Callable[[], Result]) -> tuple[Result, int]:
    """Return what a function returns, and the floating-point operations that it took."""
    with FlopCounter() as counter:
        result = function()
    return result, counter.total


def counted_in_eager(function: Callable[[], Result]) -> tuple[Result, int]:
    """Do the same with what has run before, when nothing counted.

    Raises:
        UncountableError: if it does not run any more.
    """
    try:
        return counted(function)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UncountableError(f"{type(error).__name__}: {reason}") from error
