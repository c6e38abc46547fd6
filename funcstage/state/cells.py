"""Functions: what they close over, and which of them a callback is."""

from __future__ import annotations

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


def function_of(callback: Any) -> FunctionType | None:
    """The Python function that runs when something is called; None if there is none."""
    while isinstance(callback, partial):
        callback = callback.func
    called = callback if isinstance(callback, (FunctionType, MethodType)) else type(callback).__call__
    called = getattr(called, "__func__", called)
    return called if isinstance(called, FunctionType) else None
