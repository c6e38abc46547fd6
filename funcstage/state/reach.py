"""What lies within reach of a module: containers, slots and closures, in which a forward may keep things."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcstage.state.cells import closed_over, defaults_of
from funcstage.state.code import is_library
from funcstage.state.content import slots

# What is between threads is none of a stage's: another may be waiting there by the time that a run is undone.
_CLOSED = ("torch", "threading", "queue", "concurrent", "multiprocessing")


def holders(root: Any, passed: list[Any] | None = None, closed: Sequence[str] = _CLOSED) -> Iterator[Any]:
    """The dicts (attributes of modules and of plain objects among them), lists and sets it reaches.

    What it goes through on the way, modules and objects, functions and tuples, is added to `passed`. It does
    not look into objects of the libraries that are `closed`.
    """
    stack, seen = [root], {id(root)}

    def push(values: Any) -> None:
        for value in values:
            if type(value) not in INERT and id(value) not in seen:
                seen.add(id(value))
                stack.append(value)

    while stack:
        found = stack.pop()
        if passed is not None:
            passed.append(found)
        if isinstance(found, nn.Module):
            own = vars(found)
            yield own
            push(value for name, value in own.items() if name not in _OF_EVERY_MODULE)
            push((own["_buffers"], *own["_modules"].values()))
            for kind in _HOOKS:
                if own.get(kind):
                    push(own[kind].values())
        elif isinstance(found, dict):
            yield found
            push(found.values())
        elif isinstance(found, (list, set, deque)):
            yield found
            push(found)
        elif isinstance(found, (tuple, frozenset)):
            push(found)
        elif isinstance(found, types.FunctionType):
            if not _is_of(closed, found):
                yield found.__dict__
                push(found.__dict__.values())
                push(defaults_of(found))
            push(closed_over(found))
        elif isinstance(found, types.MethodType):
            push((found.__self__, found.__func__))
        elif isinstance(found, functools.partial):
            push((found.func, *found.args, *found.keywords.values()))
        elif not isinstance(found, (Tensor, type, types.ModuleType)) and not _is_of(closed, found):
            inside = getattr(found, "__dict__", None)
            if type(inside) is dict and inside is not found:
                push((inside,))


def with_slots(values: Iterable[Any]) -> list[Any]:
    """What keeps something in slots: objects of the user's, and the cells that functions close over."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, types.FunctionType):
            found += value.__closure__ or ()
        elif slots(type(value)) and not is_library(type(value).__module__):
            found.append(value)
    return found


def slots_of(values: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """The slots of objects that have them, and what is there."""
    return [(value, slot, in_slot(value, slot)) for value in values for slot in _slots_of(type(value))]


def _slots_of(kind: type) -> Iterable[Any]:
    return (_CELL,) if kind is types.CellType else (slot for _, slot in slots(kind))


def in_slot(value: Any, slot: Any) -> Any:
    """What is in a slot of an object."""
    try:
        return slot.__get__(value)
    except (AttributeError, ValueError):
        return _NOTHING


def put_in_slot(value: Any, slot: Any, content: Any) -> None:
    """Let a slot of an object hold something, or nothing."""
    if content is not _NOTHING:
        slot.__set__(value, content)
    elif in_slot(value, slot) is not _NOTHING:
        slot.__delete__(value)


def described(value: Any, slot: Any) -> str:
    """What to call a slot of what a module holds."""
    if isinstance(value, types.CellType):
        return "a variable that a function of its module closes over"
    return f"a slot of its module's {type(value).__qualname__} ({slot.__name__!r})"


def reached(roots: Iterable[Any]) -> list[Any]:
    """The same, and all that lies on the way."""
    passed: list[Any] = []
    for root in roots:
        deque(holders(root, passed), maxlen=0)
    return passed


def _is_of(libraries: Sequence[str], value: Any) -> bool:
    of = value if isinstance(value, types.FunctionType) else type(value)
    return (of.__module__ or "").partition(".")[0] in libraries


_NOTHING = object()
_CELL: Any = types.CellType.cell_contents
INERT = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
