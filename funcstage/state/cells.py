"""Functions: what they close over, and which of them a callback is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any


def held_by(cell: CellType) -> Any:
    """What a cell holds; itself where that is nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def closed_over(function: FunctionType) -> list[Any]:
    """What a function closes over, as far as its cells hold anything."""
    return [value for cell in function.__closure__ or () if (value := held_by(cell)) is not cell]


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
