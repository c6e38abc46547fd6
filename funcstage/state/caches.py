"""Functions that `functools.lru_cache` or `functools.cache` wraps, and what a forward has left in them.

Nobody but the garbage collector can look into such a cache, and all that can be taken out of it is
everything: the function computes its results anew, which whoever caches them expects of it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class Cache:
    """A function that caches its results, with how often it has computed one so far."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._computed = function.cache_info().misses

    @classmethod
    def among(cls, values: Iterable[Any]) -> list[Cache]:
        """Those that are among some values."""
        return [cls(cached) for cached in map(behind, values) if cached is not None]

    def forget(self, is_meant: Callable[[Tensor], bool]) -> None:
        """Empty it if among what it has computed since, or was called with, is a tensor that is meant."""
        function = self._function
        if function.cache_info().misses == self._computed:
            return
        stack, seen = [each for each in gc.get_referents(function) if isinstance(each, _HOLDING)], set[int]()
        while stack:
            value = stack.pop()
            if isinstance(value, Tensor):
                if is_meant(value):
                    function.cache_clear()
                    return
            elif id(value) not in seen:
                seen.add(id(value))
                inside = (*value.keys(), *value.values()) if isinstance(value, dict) else value
                stack += [each for each in inside if isinstance(each, _HOLDING)]


def behind(value: Any) -> Any:
    """The function that caches its results which a value is, or is the method of; None for others."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return function if type(function) is _KIND else None


_KIND = type(functools.cache(len))
_HOLDING = (Tensor, tuple, list, dict, set, frozenset)
