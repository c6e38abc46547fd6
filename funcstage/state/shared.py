"""What a stage's functions can get at besides their module and arguments: globals, and attributes of classes.

Their code says which. A run that is given up must leave these too as it found them: generators, counters,
lists in which something is noted. Long containers, and what lies deeper, are not looked at.
"""

from __future__ import annotations

import copy
import dis
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from funcstage.state.ambient import RandomState, among
from funcstage.state.caches import Cache, behind
from funcstage.state.cells import closed_over, defaults_of
from funcstage.state.code import codes_within, is_library, is_torchs_or_library, loads_of
from funcstage.state.elsewhere import holds_tensors
from funcstage.state.kept import differs, refill, replace_in, replace_in_slots
from funcstage.state.reach import INERT, put_in_slot, slots_of, with_slots


class Name(NamedTuple):
    """A name among the globals of a module, or the attributes of a class.

    Attributes:
        owner: the globals, or the class.
        key: the name.
        is_assigned: whether a function assigns it.
    """

    owner: Any
    key: str
    is_assigned: bool

    def value(self) -> Any:
        """What it stands for now; itself where that is nothing."""
        return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(self.key, self)

    def assign(self, value: Any) -> None:
        """Let it stand for something else, or for nothing if that is itself."""
        if isinstance(self.owner, type):
            if value is self:
                delattr(self.owner, self.key)
            else:
                setattr(self.owner, self.key, value)
        elif value is self:
            del self.owner[self.key]
        else:
            self.owner[self.key] = value


class Held(NamedTuple):
    """A function in a table, in place of a name.

    Attributes:
        function: the one that was there when the table was looked at first.
    """

    function: Any

    def value(self) -> Any:
        """What it stands for."""
        return self.function


class Shared:
    """What some names stand for at a moment, and what is in it.

    Attributes:
        meets_threads: whether something is among it by which threads meet.
    """

    def __init__(self, names: Sequence[Name | Held]) -> None:
        self._values = values = [name.value() for name in names]
        pairs = zip(names, values, strict=True)
        self._assigned = [(n, value) for n, value in pairs if isinstance(n, Name) and n.is_assigned]
        functions = [*_functions(values)]
        containers = [found for value in values if (found := _container(value)) is not None]
        containers += chain.from_iterable(map(_kept_by, functions))
        self._slots = slots_of(with_slots(functions))
        self._contents = [(container, copy.copy(container)) for container in containers]
        found = [*values, *chain.from_iterable(map(_inside, values))]
        self._caches = Cache.among(values)
        self._generators = RandomState(among(found))
        self.meets_threads = meet_threads(chain(found, *map(_inside, found)))

    def tensors(self) -> Iterator[Tensor]:
        """Those that names stand for, and those in what they stand for, keys of dicts among it."""
        places: list[Any] = [self._values]
        for _, contents in self._contents:
            places += (contents, contents.values()) if isinstance(contents, dict) else (contents,)
        for place in filter(holds_tensors, places):
            yield from (value for value in place if isinstance(value, Tensor))

    def restore(self) -> None:
        """Put back what has changed since."""
        for name, value in self._assigned:
            if name.value() is not value:
                name.assign(value)
        for container, contents in self._contents:
            if differs(container, contents):
                refill(container, contents)
        for holder, slot, content in self._slots:
            put_in_slot(holder, slot, content)
        self._generators.restore()

    def replace_changed(self, of: Callable[[Any], Any]) -> None:
        """Put other tensors in place of those that have come into it since, by themselves or in tuples."""
        for name, before in self._assigned:
            value = name.value()
            if value is not before and (new := of(value)) is not value:
                name.assign(new)
        for container, contents in self._contents:
            if differs(container, contents):
                replace_in(container, of)
        replace_in_slots(self._slots, of)
        for cache in self._caches:
            cache.forget(lambda tensor: of(tensor) is not tensor)


def shared_by(apply: Callable[..., Any], modules: Iterable[nn.Module]) -> Shared:
    """What the modules behind a stage function can get at, or it itself where there are none."""
    kinds = {type(part) for module in modules for part in module.modules()}
    return Shared(names_of(kinds or [apply]))


def names_of(roots: Iterable[type | Callable[..., Any]]) -> list[Name | Held]:
    """What classes and functions, and functions that these call, can get at."""
    return [name for root in roots for name in _names_of(root)]


def meet_threads(values: Iterable[Any]) -> bool:
    """Tell whether something is among them by which threads give each other work or its results."""
    return any(issubclass(kind, _MEETING) for kind in {*map(type, values)})


def _container(value: Any) -> Any:
    """In what a value keeps what can be changed; None where there is nothing, or much."""
    if isinstance(value, (dict, list, set, deque)):
        return value if len(value) <= _LONG else None
    inside = getattr(value, "__dict__", None)
    if type(inside) is not dict or isinstance(value, (type, *_FIXED)) or is_library(type(value).__module__):
        return None
    return inside


def _functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    """Functions of the user's, and those that they close over."""
    stack, seen = [*values], set[int]()
    while stack:
        value = stack.pop()
        new = isinstance(value, FunctionType) and id(value) not in seen
        if new and not is_torchs_or_library(value.__module__):
            seen.add(id(value))
            stack += closed_over(value)
            yield value


def _kept_by(function: FunctionType) -> list[Any]:
    """In what a function keeps what can be changed: its attributes, its defaults, what it closes over."""
    values = *defaults_of(function), *closed_over(function)
    found = [_container(value) for value in values if not isinstance(value, FunctionType)]
    return [function.__dict__, *(each for each in found if each is not None)]


def _callables(value: Any, depth: int = 2) -> Iterator[Any]:
    """A function or class, or those in a table: in containers and tuples, and in those inside of these."""
    if isinstance(value, (FunctionType, type, partial)) or behind(value) is not None:
        yield value
    elif depth:
        for each in value if isinstance(value, tuple) and len(value) <= _LONG else _inside(value):
            yield from _callables(each, depth - 1)


def _is_kept(value: Any) -> bool:
    """Tell whether a function of the user's is one that tensors may be left in."""
    return behind(value) is not None or _keeps(value)


def _keeps(value: Any) -> bool:
    """Tell whether a value is a function of the user's that keeps something, or may."""
    if not isinstance(value, FunctionType) or is_torchs_or_library(value.__module__):
        return False
    attributes = value.__dict__ or _stored("STORE_ATTR", value.__code__)
    return bool(attributes or value.__closure__) or len(_kept_by(value)) > 1


def _inside(value: Any) -> Iterable[Any]:
    """What is in a container, or in a user's object: functions in tables are called, too."""
    found = _container(value)
    return () if found is None else [*found.values()] if isinstance(found, dict) else [*found]


def _names_of(root: Any) -> list[Name | Held]:
    try:
        if root not in _KNOWN:
            _KNOWN[root] = [*_search(root)]
        return _KNOWN[root]
    except TypeError:  # it cannot be remembered
        return [*_search(root)]


def _search(root: Any) -> Iterator[Name | Held]:
    stack, seen = [root], set()
    while stack:
        found = stack.pop()
        found = found.func if isinstance(found, partial) else found
        found = getattr(found, "__func__", getattr(found, "__wrapped__", found))
        if id(found) in seen or is_torchs_or_library(getattr(found, "__module__", None)):
            continue
        seen.add(id(found))
        for name in _names_in(found):
            value = name.value()
            called = [] if value is name else [*_callables(value)]
            stack += called
            yield from (Held(each) for each in called if each is not value and _is_kept(each))
            is_fixed = type(value) in INERT or isinstance(value, (*_FIXED, Name))
            if name.is_assigned or not is_fixed or _is_kept(value):
                yield name
        if isinstance(found, type):
            stack += found.__mro__[1:]


def _names_in(found: Any) -> Iterator[Name]:
    if isinstance(found, type):
        values = [(value, getattr(value, "__func__", value)) for value in vars(found).values()]
        methods = [(value, method) for value, method in values if isinstance(method, FunctionType)]
        assigned, made = set(), set()
        for value, method in methods:
            stored = _stored("STORE_ATTR", method.__code__)
            assigned |= stored
            if value is not method or not {found.__name__, *_OF_CLASS}.isdisjoint(method.__code__.co_names):
                made |= stored  # on the class itself, which may not have them yet
        own = dict.fromkeys((*vars(found), *made))
        yield from (Name(found, key, key in assigned) for key in own if not key.startswith("__"))
    elif isinstance(found, FunctionType):
        space = found.__globals__
        for code in codes_within(found.__code__):
            loads, assigned = loads_of(code), _stored("STORE_GLOBAL", code)
            yield from (Name(space, key, key in assigned) for key in loads.globals)
            stored = _stored("STORE_ATTR", code)  # on a class, perhaps, which may not have them yet
            for value in map(space.get, loads.globals):
                if isinstance(value, ModuleType) and not is_library(value.__name__):
                    keys = loads.attributes & vars(value).keys()
                    yield from (Name(vars(value), key, is_assigned=False) for key in keys)
                elif isinstance(value, type) and not is_torchs_or_library(value.__module__):
                    yield from (Name(value, key, is_assigned=True) for key in stored)


def _stored(operation: str, code: CodeType) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname == operation}


NOTHING_SHARED = Shared(())
_FIXED = (FunctionType, MethodType, type, ModuleType, property, classmethod, staticmethod, Tensor, nn.Module)
_KNOWN: WeakKeyDictionary[Any, list[Name | Held]] = WeakKeyDictionary()
_LONG = 1000
_OF_CLASS = "type", "__class__"
_MEETING = (
    *(queue.Queue, queue.SimpleQueue),
    *(threading.Event, threading.Condition, threading.Semaphore, threading.Barrier),
)
