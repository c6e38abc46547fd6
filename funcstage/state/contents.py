"""What a stage's module holds before a call, remembered so that a few steps tell whether it still does.

A forward may change attributes of its modules, and the dicts, lists, objects and closures that it gets to
from there. To find all of that takes longer than to run a small stage, so what a walk has found is kept for
the next call: it is good as long as everything on the way is the same object as it was. Tensors may be
exchanged for others, as the way ends there; none is kept alive between calls.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import chain, compress, islice
from operator import attrgetter, call, is_, itemgetter, length_hint, not_
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from funcstage.registration import holds_tensor
from funcstage.state.ambient import RandomState, among
from funcstage.state.caches import Cache, behind
from funcstage.state.cells import held_by
from funcstage.state.elsewhere import Elsewhere, holds_tensors, values_of
from funcstage.state.kept import differs, refill, replace_in, replace_in_slots
from funcstage.state.reach import INERT, holders, put_in_slot, slots_of, with_slots
from funcstage.state.shared import NOTHING_SHARED, Shared, meet_threads, names_of


class Contents:
    """What a module holds, which is looked at in every call of its stage."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._walk: _Walk | None = None
        self._changing: set[int] = set()  # containers, by their ids, in which something has changed
        self._in_vain = 0

    def now(self) -> Held:
        """Note what it holds now; to be called, as what is returned, while the module is locked."""
        walk, self._walk = self._walk, None
        if walk is not None:
            loose = walk.loose()
            if walk.is_current(loose):
                return Held(self, walk, loose, seen=True)
            self._changing |= walk.changed()
        walk = _Walk(self.module)
        if self._in_vain < _TRIES:
            walk.note(self._changing)
        return Held(self, walk, walk.loose(), seen=False)

    def replace_changed(self, of: Callable[[Any], Any], held: Held) -> None:
        """Replace tensors, and tuples of them, in what has changed since; to be called once."""
        walk, seen = held.walk, held.seen
        if self._in_vain >= _TRIES:
            for holder in holders(self.module):
                replace_in(holder, of)
            return
        loose = walk.loose()
        if not walk.is_same_for_holders(loose):
            self._changing |= walk.changed()
            walk, seen = _Walk(self.module), False
            walk.note(self._changing)
        if not seen or not all(map(is_, loose, held.loose)):
            for holder in walk.loose_holders if seen else walk.holders:
                replace_in(holder, of)
            if not walk.may_be_kept(loose_changed=seen):
                self._in_vain += 1
                return
        self._walk, self._in_vain = walk, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Contents, (self.module,)


class Held:
    """What a module held at some moment.

    Attributes:
        walk: how it was found.
        seen: whether tensors have been replaced in it in the call before.
        loose: what was in loose containers.
    """

    def __init__(self, contents: Contents, walk: _Walk, loose: list[Any], seen: bool) -> None:
        self._contents = contents
        self.walk = walk
        self.seen = seen
        self.loose = loose
        self._copies = walk.copies()
        self._generators = RandomState(walk.generators)
        self._shared = Shared(walk.names) if walk.names else NOTHING_SHARED
        self._slots = slots_of(walk.slotted) if walk.slotted else []
        self._caches = Cache.among(walk.cached)
        self._left = [length_hint(each, -1) for each in walk.iterators]

    def replace_changed(self, of: Callable[[Any], Any]) -> None:
        """Replace tensors, and tuples of them, in what has changed since."""
        self._contents.replace_changed(of, self)
        self._shared.replace_changed(of)
        replace_in_slots(self._slots, of)
        for cache in self._caches:
            cache.forget(lambda tensor: of(tensor) is not tensor)

    def elsewhere(self) -> frozenset[int]:
        """The ids of parameters and buffers that lie in other places than their own, too."""
        in_slots = (value for _, _, value in self._slots)
        return self.walk.elsewhere.ids(chain(in_slots, self._shared.tensors()))

    @property
    def meets_threads(self) -> bool:
        """Whether something is held, or within reach of the code, by which threads meet."""
        return self.walk.meets_threads or self._shared.meets_threads

    def restore(self) -> None:
        """Put back what has changed since."""
        for container, before in zip(self.walk.filled, self._copies, strict=True):
            if differs(container, before):
                refill(container, before)
        for container in self.walk.empty:
            container.clear()
        for holder, slot, content in self._slots:
            put_in_slot(holder, slot, content)
        self._generators.restore()
        self._shared.restore()

    def moved_iterators(self) -> list[Any]:
        """Those that have gone on since, or of which that is not known."""
        pairs = zip(self.walk.iterators, self._left, strict=True)
        return [each for each, left in pairs if left == -1 or left != length_hint(each, -1)]


class _Walk:
    """What can be reached from a module.

    What it found is compared by identity, except for numbers and the like and for tensors in containers that
    have tensors, or are known to change: these are loose.

    Attributes:
        holders: containers in which a forward may leave something.
        loose_holders: those of them that are loose.
        empty: those of all containers on the way that hold nothing.
        filled: the others, dicts first.
        generators: random generators on the way.
        iterators: iterators on the way, which cannot be put back.
        slotted: objects with slots on the way, and the cells of functions.
        cached: functions on the way that cache their results.
        names: what the code of its modules can get at besides.
        meets_threads: whether something is on the way by which threads meet.
        elsewhere: parameters and buffers of the module that lie on the way.
    """

    def __init__(self, module: nn.Module) -> None:
        passed: list[Any] = []
        self.holders = [*holders(module, passed)]
        self._passed = [each for each in passed if not isinstance(each, (Tensor, *_CONTAINERS))]
        self._parts = [each for each in self._passed if isinstance(each, nn.Module)]
        self.generators = [*among(self._passed)]
        self.iterators = [each for each in self._passed if isinstance(each, Iterator) and not _is_file(each)]
        self.meets_threads = meet_threads(self._passed)
        self.slotted = with_slots(self._passed)
        self.cached = [each for each in map(behind, self._passed) if each is not None]
        functions = [each for each in self._passed if isinstance(each, FunctionType)]
        self.names = names_of([*{*map(type, self._parts)}, *functions])
        own = [x for part in self._parts for x in vars(part).values() if isinstance(x, _CONTAINERS)]
        of_partials = [each.keywords for each in self._passed if isinstance(each, functools.partial)]
        self._found = {id(each): each for each in (*self.holders, *own, *of_partials)}
        self.empty = [each for each in self._found.values() if not each]
        dicts = [each for each in self._found.values() if each and type(each) is dict]
        others = [each for each in self._found.values() if each and type(each) is not dict]
        self.filled = [*dicts, *others]
        self._n_dicts = len(dicts)
        self.elsewhere = Elsewhere(module, self.filled, self._passed)
        self._cells: list[CellType] = []
        self._loose_views: list[Any] = []

    def note(self, changing: Collection[int]) -> None:
        """Note what is to be compared; `changing` are ids of containers that are known to change."""
        found = self._found
        self._owners = [each for each in self._passed if id(getattr(each, "__dict__", None)) in found]
        functions = [each for each in self._passed if isinstance(each, FunctionType)]
        self._cells = [cell for function in functions for cell in function.__closure__ or ()]
        self._views = [values_of(each) for each in self.filled]
        self._sizes = [*map(len, self._views)]
        self._is_loose = [
            id(each) in changing or holds_tensors(view)
            for each, view in zip(self.filled, self._views, strict=True)
        ]
        loose = {*map(id, compress(self.filled, self._is_loose))}
        self.loose_holders = [each for each in self.holders if id(each) in loose]
        self.elsewhere.narrow(loose)
        self._loose_views = [*compress(self._views, self._is_loose)]
        self._firm_views = [*compress(self._views, map(not_, self._is_loose))]
        self._namespaces = [*map(_NAMESPACE, self._owners)]
        self._firm = [*chain.from_iterable(self._firm_views)]
        now = self.loose()
        self._is_bound = [type(value) not in _FREE for value in now]
        self._bound = [*compress(now, self._is_bound)]
        self._note_for_holders()

        lasting = {id(own) for part in self._parts for own in (vars(part), part._parameters, part._buffers)}
        passing = [each for each in compress(self.filled, self._is_loose) if id(each) not in lasting]
        self._passing_views = [values_of(each) for each in passing]

    def may_be_kept(self, *, loose_changed: bool) -> bool:
        """Tell whether that keeps no tensors alive that the module might drop.

        `loose_changed` says that it did not, and that only what is loose has changed.
        """
        if any(map(holds_tensors, (*self._passing_views, map(held_by, self._cells)))):
            return False
        if loose_changed:
            return True
        tuples = [each for each in self._passed if isinstance(each, (tuple, frozenset))]
        kept = [value for value in (*self._firm, *self._bound) if not isinstance(value, _CONTAINERS)]
        return not (any(map(holds_tensors, (*tuples, kept))) or any(map(holds_tensor, kept)))

    def copies(self) -> list[Any]:
        """Copies of what is filled."""
        dicts, others = self.filled[: self._n_dicts], self.filled[self._n_dicts :]
        return [*map(dict.copy, dicts), *map(copy.copy, others)]

    def _note_for_holders(self) -> None:
        """Note the same without what torch keeps in every module and a walk does not go on from."""
        spaces = {*map(id, map(vars, self._parts))}
        off = {id(x) for part in self._parts for name, x in vars(part).items() if name in _OFF_THE_WAY}
        off -= {*map(id, self.holders)}
        pairs = zip(self.filled, self._views, self._is_loose, strict=True)
        firm = [(each, view) for each, view, loose in pairs if not loose and id(each) not in off]
        self._plain_views = [view for each, view in firm if id(each) not in spaces]
        self._own = [each for each, _ in firm if id(each) in spaces]
        names = [[name for name in each if name not in _OFF_THE_WAY] for each in self._own]
        self._readers = [itemgetter(*some) for some in names]  # several: submodules for one
        self._empty_on_the_way = [each for each in self.empty if id(each) not in off]
        self._of_holders = [*self._now_of_holders()]

    def _now_of_holders(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(self._plain_views),
            chain.from_iterable(map(call, self._readers, self._own)),
        )

    def loose(self) -> list[Any]:
        """The contents of loose containers, and of cells."""
        return [*chain.from_iterable(self._loose_views), *map(held_by, self._cells)]

    def is_current(self, loose: list[Any]) -> bool:
        """Tell whether a walk would find the same now; `loose` is what is in loose containers."""
        return (
            not any(self.empty)
            and [*map(len, self._views)] == self._sizes
            and all(map(is_, chain.from_iterable(self._firm_views), self._firm))
            and all(map(is_, map(_NAMESPACE, self._owners), self._namespaces))
            and self._is_same_loose(loose)
        )

    def is_same_for_holders(self, loose: list[Any]) -> bool:
        """Tell the same after a forward, of what it may have left tensors in."""
        try:
            return (
                not any(self._empty_on_the_way)
                and [*map(len, self._views)] == self._sizes
                and all(map(is_, self._now_of_holders(), self._of_holders))
                and all(map(is_, map(_NAMESPACE, self._owners), self._namespaces))
                and self._is_same_loose(loose)
            )
        except KeyError:  # one attribute in place of another
            return False

    def _is_same_loose(self, loose: list[Any]) -> bool:
        if not self._bound and len(loose) == len(self._is_bound):
            return _FREE.issuperset(map(type, loose))
        return [type(value) not in _FREE for value in loose] == self._is_bound and all(
            map(is_, compress(loose, self._is_bound), self._bound)
        )

    def changed(self) -> set[int]:
        """The ids of firm containers that hold something else by now."""
        firm = compress(self.filled, map(not_, self._is_loose))
        before = iter(self._firm)
        return {
            id(each)
            for each, size in zip(firm, compress(self._sizes, map(not_, self._is_loose)), strict=True)
            if [*map(id, islice(before, size))] != [*map(id, values_of(each))]
        }


def _is_file(value: Any) -> bool:
    return type(value).__module__ == "_io"


_FREE = INERT | {Tensor, nn.Parameter}
"""Types of values behind which nothing is found."""

_TRIES = 3
"""How often in a row a walk may be of no use for the next call before that is given up."""

_NAMESPACE = attrgetter("__dict__")
_CONTAINERS = (dict, list, set, deque)
_OFF_THE_WAY = frozenset(vars(nn.Module())) - {
    *("training", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
}
"""Attributes of every module that a walk does not go on from."""
