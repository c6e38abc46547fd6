"""What is noted of the first run of a checkpointed region, for the second to do likewise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch.operators import OpOverload, TorchDispatchMode, writes
from funcstage.errors import StageError
from funcstage.state.ambient import Generator, RandomState


class Numbers:
    """The numbers that a region's first run has computed with, for the second to compute with them too.

    A region may read a counter that has gone on since, or draw from Python's generator: what autograd keeps
    of an operation's numbers is what the first run has passed. Looked at are calls whose results have
    gradients; a second run that makes others is none of the same function.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, list[Any]]] = []

    def noted(self) -> TorchFunctionMode:
        """Note the numbers of the first run."""

        def run(func: Any, args: Any, kwargs: Any) -> Any:
            result = func(*args, **kwargs)
            if _counts(func, result):
                self._calls.append((func, [*filter(_is_number, trees.flatten((args, kwargs))[0])]))
            return result

        return _Called(run)

    def passed_again(self) -> TorchFunctionMode:
        """Pass them in the second run, and refuse one that calls something else."""
        calls = iter(self._calls)
        following = next(calls, _NO_CALL)

        def run(func: Any, args: Any, kwargs: Any) -> Any:
            nonlocal following
            noted, numbers = following
            if numbers and func == noted and torch.is_grad_enabled():
                leaves, spec = trees.flatten((args, kwargs))
                if sum(map(_is_number, leaves)) == len(numbers):
                    left = iter(numbers)
                    leaves = [next(left) if _is_number(leaf) else leaf for leaf in leaves]
                    args, kwargs = trees.unflatten(spec, leaves)
            result = func(*args, **kwargs)
            if _counts(func, result):
                if func != noted:  # of an attribute it is another object each time
                    raise StageError(
                        f"A checkpointed region called {_name(noted)} in its first run and {_name(func)} in "
                        "its second, so its gradients would be those of another function. Decide what "
                        "changes from run to run (a counter, a random number from Python) outside of the "
                        "checkpoint, and pass it as an argument."
                    )
                following = next(calls, _NO_CALL)
            return result

        return _Called(run)


_NO_CALL: tuple[Any, list[Any]] = (None, [])


def _name(func: Any) -> str:
    return "nothing more" if func is None else getattr(func, "__name__", str(func))


def _counts(func: Any, result: Any) -> bool:
    is_a_trackers = func is Tensor.view_as  # those of modules call it, to have something to hook
    return not is_a_trackers and _has_gradients(result)


def _has_gradients(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    return isinstance(result, (tuple, list)) and any(map(_has_gradients, result))


def _is_number(leaf: Any) -> bool:
    return type(leaf) in (int, float, complex)


class _Called(TorchFunctionMode):
    """Sends every call of torch's functions through a function."""

    def __init__(self, run: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._run(func, args, kwargs or {})


class Operations:
    """The operations of a region's first run, of which the last need not be computed again.

    Nothing reads what comes after the last tensor that was saved for the backward: the outcome of a last
    linear layer, for one. Torch's own recomputation stops there. Here these operations still take their
    places on the tapes, but what they return is memory that nobody has written.
    """

    def __init__(self) -> None:
        self._found: list[tuple[Any, _Look | None]] = []  # views left out, as trackers of modules make some
        self._needed = 0

    def saved(self) -> None:
        """Note that something was saved for the backward."""
        self._needed = len(self._found)

    def noted(self) -> TorchDispatchMode:
        """Note the operations of the first run."""

        def run(op: Any, args: Any, kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            if not _is_view(op):
                self._found.append((op, _Look.of(op, result)))
            return result

        return _Dispatched(run)

    @contextmanager
    def cut_short(self, generators: Sequence[Generator]) -> Iterator[None]:
        """Leave out the last operations of the second run, and what these generators draw meanwhile."""
        needed = self._needed
        if any(torch.Tag.data_dependent_output in getattr(op, "tags", ()) for op, _ in self._found[needed:]):
            needed = len(self._found)  # what is read there would not be the same
        left = iter(self._found[needed:])
        count = 0
        drawn = RandomState(generators)

        def run(op: Any, args: Any, kwargs: Any) -> Any:
            nonlocal count, drawn
            if not _is_view(op):
                count += 1
                noted, look = next(left, (None, None)) if count > needed else (None, None)
                if op is noted and look is not None:
                    return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device=look.device)
            if count == self._needed:
                drawn = RandomState(generators)
            return op(*args, **kwargs)

        with _Dispatched(run):
            yield
        drawn.restore()


def _is_view(op: Any) -> bool:
    return isinstance(op, OpOverload) and op.is_view


class _Look(NamedTuple):
    """What a new tensor, the one result of an operation, looks like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, op: Any, result: Any) -> _Look | None:
        is_new = isinstance(op, OpOverload) and not writes(op)
        if not is_new or type(result) is not Tensor or result.layout is not torch.strided:
            return None
        return cls(result.shape, result.stride(), result.dtype, result.device)


class _Dispatched(TorchDispatchMode):
    """Sends every operation through a function."""

    supports_higher_order_operators = True

    def __init__(self, run: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._run(func, args, kwargs or {})
