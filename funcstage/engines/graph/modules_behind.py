"""Which modules a stage function can call."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from funcstage.state.cells import closed_over
from funcstage.state.code import is_library, loads_of
from funcstage.state.content import parts_of


def modules_behind(apply: Any) -> list[nn.Module]:
    """The modules that a stage function can call: its own, those in its cells and globals, by any way."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending: list[Any] = [apply]
    while pending:
        value = pending.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, FunctionType):
            pending += vars(value).values()
            if not is_library(value.__globals__.get("__name__")):
                pending += closed_over(value)
                loaded = loads_of(value.__code__).globals
                pending += [value.__globals__[name] for name in loaded & value.__globals__.keys()]
        elif isinstance(value, (partial, MethodType, list, tuple, dict)):
            pending += [part for _, part in parts_of(value)]
        elif callable(value) and not isinstance(value, type):
            pending.append(getattr(value, "module", None))
            pending += [part for _, part in parts_of(value)]
    within = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in within]
