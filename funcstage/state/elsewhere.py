"""Parameters and buffers that a module holds in other places, too: in lists, keys, closures, or by their ids.

A stage puts other tensors in their proper places while the forward runs, but not there. A forward that finds
them there and asks which tensors they are is watched (`identity.py`), as its answer would not be eager's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from funcstage.state.cells import held_by


class Elsewhere:
    """What lies within reach of a module, other than in the places where a stage puts tensors.

    Args:
        module: the stage's.
        containers: those within reach that hold something.
        passed: what else there is on the way.
    """

    def __init__(self, module: nn.Module, containers: Iterable[Any], passed: Iterable[Any]) -> None:
        self._module = module
        lent = {id(place) for part in module.modules() for place in _lent(part)}
        self._containers = [each for each in containers if id(each) not in lent]
        self._keyed = [each for each in self._containers if isinstance(each, dict) and holds_tensors(each)]
        self._cells: list[Any] = []
        self._fixed: set[int] = set()
        for each in passed:
            if isinstance(each, FunctionType):
                self._cells += each.__closure__ or ()
            elif isinstance(each, (tuple, frozenset, partial)):
                self._fixed |= _tensors(each.args if isinstance(each, partial) else each)
        for each in self._containers:
            self._fixed |= _addresses(each)
            self._fixed |= _addresses(values_of(each))

    def narrow(self, changing: Collection[int]) -> None:
        """Look only into containers whose contents may change unnoticed; by their ids."""
        self._containers = [each for each in self._containers if id(each) in changing]

    def ids(self, others: Iterable[Any]) -> frozenset[int]:
        """The ids of the module's parameters and buffers that lie there, or among others."""
        places = (*map(values_of, self._containers), *self._keyed, map(held_by, self._cells), others)
        found = frozenset(self._fixed.union(*map(_tensors, places)))
        if not found:
            return found
        spaces = (space for part in self._module.modules() for space in (part._parameters, part._buffers))
        return found & frozenset(map(id, (tensor for space in spaces for tensor in space.values())))


def holds_tensors(values: Iterable[Any]) -> bool:
    """Tell whether tensors are among values, or among the keys of a dict."""
    return any(issubclass(kind, Tensor) for kind in {*map(type, values)})


def values_of(container: Any) -> Any:
    """What a container holds, other than keys of a dict."""
    return container.values() if isinstance(container, dict) else container


def _lent(part: nn.Module) -> Iterator[Any]:
    yield from (part._parameters, part._buffers)
    if isinstance(part, nn.RNNBase):
        yield part._flat_weights


def _tensors(values: Iterable[Any]) -> set[int]:
    return {id(value) for value in values if isinstance(value, Tensor)}


def _addresses(values: Iterable[Any]) -> set[int]:
    """Numbers so large that they may be ids."""
    return {value for value in values if type(value) is int and value > _SMALL}


_SMALL = 1 << 32
