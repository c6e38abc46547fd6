"""What a forward asserts of values, as linear algebra does of matrices: no effect of a graph of functions.

What is looked at becomes a result of F, and F asserts it once its program has run. What a backward would
assert, or a branch of `torch.cond`, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcstage._torch import tracing as tt
from funcstage.state.kept import Changes


class Asserted(NamedTuple):
    """What every F of a signature does besides running its program.

    Attributes:
        checks: functions that raise for some values of a tensor, with their further arguments.
        changes: what it does to the module, if anything.
    """

    checks: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
    changes: Changes | None

    def make(self, results: Sequence[Tensor]) -> None:
        """Raise, or change the module; the last of what F has kept are the tensors to look at."""
        start = len(results) - len(self.checks)
        for (check, args, kwargs), tensor in zip(self.checks, results[start:], strict=True):
            if not (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):  # where none can be read
                check(tensor, *args, **kwargs)
        if self.changes is not None:
            self.changes.make(results[:start])


class Functionalization(tt.FunctionalTensorMode):
    """Functionalization under which a stage is traced: it notes what is asserted.

    Attributes:
        checks: what was asserted so far, with the tensors.
        is_forward: whether the forward runs, of which alone it is noted.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.checks: list[tuple[Callable[..., Any], Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.is_forward = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASSERTING:
            if self.is_forward:
                tensor, *rest = args
                self.checks.append((func, tensor, tuple(rest), dict(kwargs or {})))
            return None
        if isinstance(func, tt.HigherOrderOperator):
            before, self.is_forward = self.is_forward, False
            try:
                # Their rules are looked up by the very type of the mode.
                return func.python_key_table[tt.FunctionalTensorMode](self, *args, **(kwargs or {}))
            finally:
                self.is_forward = before
        return super().__torch_dispatch__(func, types, args, kwargs)

    def with_checks(
        self, found: tuple[Changes, list[Tensor]] | None
    ) -> tuple[Changes | Asserted, list[Tensor]] | None:
        """What F does to the module, and the tensors of that, with what the forward has asserted."""
        self.is_forward = False
        if not self.checks:
            return found
        changes, tensors = found or (None, [])
        checks = [(func, args, kwargs) for func, _, args, kwargs in self.checks]
        return Asserted(checks, changes), [*tensors, *(tensor for _, tensor, _, _ in self.checks)]


_ATEN = torch.ops.aten
_ASSERTING = frozenset(
    {_ATEN._linalg_check_errors.default, _ATEN._assert_async.default, _ATEN._assert_async.msg}
)
