"""Which threads wait for each other: those whose stages have a submodule in common.

A stage lends its tensors to the submodules of its module, one thread at a time. Each submodule belongs to
one lock, and a stage takes the locks of all of its submodules, always in the order in which they were made,
so that no two stages wait for each other. Stages that share nothing run side by side.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


class _Lock:
    """A lock with its place in the order of all."""

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self.lock = threading.RLock()


_NUMBERS = itertools.count()
_GUARD = threading.Lock()
_OF_SUBMODULE: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_OF_STAGE: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def look_over(module: nn.Module) -> tuple[Any, ...]:
    """Find a stage's locks, by the submodules that its module has now; in the order to take them."""
    with _GUARD:
        parts = list(filter(_has_state, module.modules()))
        found = {_OF_SUBMODULE[part] for part in parts if part in _OF_SUBMODULE}
        fresh = [part for part in parts if part not in _OF_SUBMODULE]
        if fresh:
            own = _Lock()
            found.add(own)
            _OF_SUBMODULE.update(dict.fromkeys(fresh, own))
        locks = tuple(each.lock for each in sorted(found, key=lambda each: each.number))
        _OF_STAGE[module] = locks
        return locks


def _has_state(part: nn.Module) -> bool:
    """Tell whether a module may hold anything that a forward changes; torch's activations do not."""
    of_torch = type(part).__module__.startswith("torch.nn.")
    return not of_torch or bool(part._parameters or part._buffers or part._modules)


@contextmanager
def lent(module: nn.Module | None) -> Iterator[None]:
    """Let one thread at a time put tensors into a stage's module: the others would compute with them."""
    if module is None:
        yield
        return
    locks = _OF_STAGE.get(module) or look_over(module)
    if len(locks) == 1:
        with locks[0]:
            yield
        return
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
