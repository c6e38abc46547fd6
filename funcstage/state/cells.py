"""Cells: what functions close over."""

from __future__ import annotations

from types import CellType, FunctionType
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
