"""A custom function's backward runs twice in a split, for I and for W, each for a level of its own.

In eager it runs once, and may write into what it reads: fused losses scale the gradients that their forward
has computed ahead, fused norms write a gradient over the cotangent that they were handed. Whoever is not the
last to call it gets copies of what the forward made for it, and of the cotangents.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from funcstage._torch.operators import written_by
from funcstage.engines.levels.inner_gradients import codes


@dataclass(slots=True)
class Turns:
    """Who calls one backward.

    Attributes:
        levels: how many will, as far as the forward knows.
        called: those that have.
    """

    levels: int = 0
    called: set[int] = field(default_factory=set)

    def enter(self) -> int:
        """Count one more level in, and give it a number."""
        self.levels += 1
        return self.levels

    def has_another(self, level: int) -> bool:
        """Note a call by a level, and tell whether one is still to come by another."""
        self.called.add(level)
        return len(self.called) < self.levels


def copied(value: Any, given: Collection[int] = ()) -> Any:
    """Copy the tensors of a value, in lists, tuples and dicts, and these.

    Args:
        value: anything; what is neither is handed on.
        given: ids of tensors to hand on too. So are those with a history, which it would be cut off from.
    """
    if isinstance(value, Tensor):
        return value if value.requires_grad or id(value) in given else value.clone()
    if type(value) in (list, tuple):
        return type(value)(copied(each, given) for each in value)
    if type(value) is dict:
        return {key: copied(each, given) for key, each in value.items()}
    return value


@functools.lru_cache(maxsize=1024)
def looks_writing(backward: Any) -> bool:
    """Tell whether the code of a backward, or of what it calls by name, writes into tensors by its looks."""
    return any(map(_looks_writing, codes(backward)))


def _looks_writing(code: CodeType) -> bool:
    return (
        any(map(_is_write, code.co_names))
        or any(isinstance(const, tuple) and "out" in const for const in code.co_consts)  # a keyword
        or any(
            step.opname == "STORE_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
            for step in dis.get_instructions(code)
        )
    )


@functools.lru_cache(maxsize=4096)
def _is_write(name: str) -> bool:
    """Tell whether a method of tensors, or a function of torch, of this name writes into its operands."""
    found = (getattr(place, name, None) for place in (Tensor, torch))
    return name == "data" or any(bool(written_by(each).positions) for each in found if callable(each))
