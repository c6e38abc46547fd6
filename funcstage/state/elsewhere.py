"""Parameters and buffers that a module holds in other places, too: in lists, keys, closures, or by their ids.

A stage puts other tensors in their proper places while the forward runs, but not there. An operation that is
handed what lies there computes with what stands in for it instead. A forward that asks which tensors they are
is watched (`identity.py`), as its answer would not be eager's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import BuiltinMethodType, FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.operators import without_torch_function
from funcstage.state.cells import defaults_of, held_by
from funcstage.state.guise import instead_of, note_viewed
from funcstage.state.writes import local_part

Views: TypeAlias = Mapping[int, tuple[ref[Tensor], ref[Tensor]]]
"""Tensors that share memory with one of a module's, by their ids, and that one."""


class Elsewhere:
    """What lies within reach of a module, other than in the places where a stage puts tensors.

    Args:
        module: the stage's.
        containers: those within reach that hold something.
        passed: what else there is on the way.

    Attributes:
        views: tensors there that share memory with one of the module's, by their ids, and that one.
    """

    def __init__(self, module: nn.Module, containers: Iterable[Any], passed: Iterable[Any]) -> None:
        self._module = module
        lent = {id(place) for part in module.modules() for place in _lent(part)}
        self._containers = [each for each in containers if id(each) not in lent]
        self._keyed = [each for each in self._containers if isinstance(each, dict) and holds_tensors(each)]
        self._cells: list[Any] = []
        self._fixed: set[int] = set()
        self._weak: list[Any] = []
        for each in passed:
            if isinstance(each, FunctionType):
                self._cells += each.__closure__ or ()
                self._fixed |= _tensors(defaults_of(each))
            elif isinstance(each, ref):
                self._fixed |= _tensors([each()])
            elif isinstance(each, BuiltinMethodType):
                self._fixed |= _tensors([each.__self__])
            elif isinstance(each, _WITH_WEAK_KEYS):
                self._weak.append(each.data)  # type: ignore[union-attr]
            elif isinstance(each, (tuple, frozenset, partial)):
                self._fixed |= _tensors(each.args if isinstance(each, partial) else each)
        for each in self._containers:
            self._fixed |= _addresses(each)
            self._fixed |= _addresses(values_of(each))
        self.views = self._views()

    def _views(self) -> Views:
        own = {id(tensor): tensor for tensor in self._own()}
        places = (*map(values_of, self._containers), map(held_by, self._cells))
        others = [x for x in chain(*places) if isinstance(x, Tensor) and id(x) not in own]
        if not (own and others):
            return {}
        with without_torch_function():
            by_memory = {_memory(tensor): ref(tensor) for tensor in own.values()}
            found = [(other, by_memory.get(_memory(other))) for other in others]
        return {id(other): (ref(other), of) for other, of in found if of is not None}

    def _own(self) -> Iterator[Tensor]:
        spaces = (space for part in self._module.modules() for space in (part._parameters, part._buffers))
        return (tensor for space in spaces for tensor in space.values() if tensor is not None)

    def narrow(self, changing: Collection[int]) -> None:
        """Look only into containers whose contents may change unnoticed; by their ids."""
        self._containers = [each for each in self._containers if id(each) in changing]

    def ids(self, others: Iterable[Any]) -> frozenset[int]:
        """The ids of the module's parameters and buffers that lie there, or among others."""
        places = (*map(values_of, self._containers), *self._keyed, map(held_by, self._cells), others)
        weak = (key() for each in self._weak for key in [*each])
        found = frozenset(self._fixed.union(*map(_tensors, (*places, weak))))
        if not found:
            return found
        return found & frozenset(map(id, self._own()))


class _Reading(TorchFunctionMode):
    """Passes to operations what stands in for the tensors that they were handed.

    Args:
        own: ids of a module's tensors that lie in other places.
        views: as in `Elsewhere`.
    """

    def __init__(self, own: Collection[int], views: Views) -> None:
        super().__init__()
        self._own, self._views = own, views

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = trees.flatten((args, kwargs))
        if any(id(leaf) in self._own or id(leaf) in self._views for leaf in leaves):
            args, kwargs = trees.unflatten(spec, map(self.of, leaves))
        return func(*args, **kwargs)

    def of(self, leaf: Any) -> Any:
        if id(leaf) in self._views:
            view, of = self._views[id(leaf)]
            if view() is leaf:
                note_viewed(id(of()))
        return instead_of(leaf) if id(leaf) in self._own else leaf


@contextmanager
def read_instead(own: Collection[int], views: Views) -> Iterator[None]:
    """Let operations of this thread compute with what stands in for a module's tensors, wherever they lie.

    Args:
        own: ids of those that lie in other places, too.
        views: as in `Elsewhere`.
    """
    if not (own or views):
        yield
        return
    before, _current.reading = _current.reading, _Reading(own, views)
    try:
        with _current.reading:
            yield
    finally:
        _current.reading = before


def reads_instead() -> Callable[[Any], Any] | None:
    """What maps leaves to what stands in for them in this thread; None where nothing does."""
    return None if _current.reading is None else _current.reading.of


class _Current(threading.local):
    reading: _Reading | None = None


_current = _Current()


def _memory(tensor: Tensor) -> int:
    return id(tensor) if ft.is_dead(tensor) else ft.storage_key(local_part(tensor))


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


_WITH_WEAK_KEYS = WeakKeyDictionary, WeakIdKeyDictionary
_SMALL = 1 << 32
