"""Functions: what they close over, what callables hold, and which function a callback is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType
from typing import Any
from weakref import ref

from torch import Tensor


def held_by(cell: CellType) -> Any:
    """What a cell holds; itself where that is nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def closed_over(function: FunctionType) -> list[Any]:
    """What a function closes over, as far as its cells hold anything."""
    return [value for cell in function.__closure__ or () if (value := held_by(cell)) is not cell]


def defaults_of(function: FunctionType) -> list[Any]:
    """The defaults of a function's arguments, by position and by keyword."""
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def held_by_callable(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors that a function or method holds, or a weak reference or an exception; nobody sees them."""
    if isinstance(value, Tensor):
        yield value
        return
    inside: tuple[Any, ...] = ()
    if isinstance(value, FunctionType):
        inside = (*closed_over(value), *defaults_of(value))
    elif isinstance(value, partial):
        inside = value.func, *value.args, *value.keywords.values()
    elif isinstance(value, (MethodType, BuiltinMethodType)):
        inside = (value.__self__,)
    elif isinstance(value, ref):
        inside = (value(),)
    elif isinstance(value, BaseException):
        inside = value.args
    elif isinstance(value, (list, tuple, set, dict)) and len(value) <= _LONG:
        inside = tuple(value.values() if isinstance(value, dict) else value)
    if depth:
        for each in inside:
            yield from held_by_callable(each, depth - 1)


_LONG = 100


def refuse_closures(values: Iterable[Any], of_trace: Callable[[Any], bool]) -> None:
    """Refuse functions that close over tensors of a trace: copies of functions close over the same.

    Raises:
        TypeError: names the function.
    """
    for value in values:
        if isinstance(value, FunctionType) and any(map(of_trace, closed_over(value))):
            raise TypeError(f"{value.__qualname__} closes over a tensor of the forward")


def function_of(callback: Any) -> FunctionType | None:
    """The Python function that runs when something is called; None if there is none."""
    while isinstance(callback, partial):
        callback = callback.func
    called = callback if isinstance(callback, (FunctionType, MethodType)) else type(callback).__call__
    called = getattr(called, "__func__", called)
    return called if isinstance(called, FunctionType) else None
