"""What a value says, in a form that can be kept and compared: whether a trace that has read it still holds.

Plain values count as they are, containers and objects by what is in them, functions, classes, modules and
tensors by which one they are: of these, what a trace has read is watched apart (`reads.py`). No code of the
value's own runs, neither properties nor `__getattr__` nor `__eq__`.
"""

from __future__ import annotations

import array
import contextvars
import ctypes
import dataclasses
import functools
import hashlib
import mmap
import os
import queue
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcstage._torch.modes import dispatch_modes
from funcstage._torch.tensors import is_functional
from funcstage.errors import TraceError

MARK = "_kept_by_stage"
"""An attribute of tensors that compiled stages have left on modules: which one it is does not matter."""

PLAIN = (
    *(bool, int, float, complex, str, bytes, torch.dtype, torch.device),
    *(type(None), type(...), type(NotImplemented)),
)
"""Types of values that cannot change."""

Parts: TypeAlias = tuple[Any, Iterable[tuple[Any, Any]]]
"""What is compared of a value itself, and what is in it, each under the name that it goes by there."""


def is_plain(value: object) -> bool:
    """Tell whether a value cannot change as long as it is the same object."""
    return type(value) in PLAIN or (isinstance(value, tuple) and all(map(is_plain, value)))


def is_one_of_its_kind(value: object) -> bool:
    """Tell whether a value is compared by which one it is, and by nothing else."""
    reader = reader_of(type(value))
    if isinstance(value, types.FunctionType):
        return _is_of_torch(value)
    return reader in (_same, _opaque) or (reader is _builtin and _is_unbound(value))


def is_opaque(value: object) -> bool:
    """Tell whether a value has a state that nobody can look at without changing it, or at all."""
    return reader_of(type(value)) is _opaque


def content(value: Any, seen: set[int]) -> Hashable:
    """What a value says; of what was `seen` in another place already, which one it is."""
    kind = type(value)
    if kind in PLAIN:
        return exactly(value)
    if id(value) in seen and not (isinstance(value, Tensor) and hasattr(value, MARK)):
        return Same(value)
    seen.add(id(value))
    head, parts = reader_of(kind)(value)
    inside = [
        (name, content(part, seen)) if type(name) is str else content(part, seen) for name, part in parts
    ]
    return (head, *inside) if inside else head


def exactly(value: Hashable) -> Hashable:
    """Tell what compares equal but is not the same: 1 and True, 0.0 and -0.0."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


class Same:
    """Compares an object by identity, without keeping it alive where that is possible."""

    __slots__ = ("_hash", "_ref")

    def __init__(self, value: object) -> None:
        self._hash = id(value)
        try:
            self._ref: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self._ref = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine = self._ref()
        return isinstance(other, Same) and mine is not None and mine is other._ref()

    def __repr__(self) -> str:
        value = self._ref()
        return f"<{type(value).__name__} at {self._hash:#x}>"


def _reader_of(kind: Any) -> Callable[[Any], Parts]:
    """How values of a type are read."""
    for base, reader in _READERS.items():
        if issubclass(kind, base):
            return reader
    owner = kind.__module__.partition(".")[0]
    if kind.__module__ == "torch.quasirandom":
        return _opaque  # it goes on with each draw
    if (
        owner == "torch"
        and not issubclass(kind, nn.Module)
        and _LOOKED_INTO.isdisjoint(kind.__module__.split("."))
    ):
        return _same
    if kind.__module__ in _OF_NO_CONSEQUENCE or owner in ("triton", "numba"):
        return _same
    may_be_key = kind.__eq__ is not object.__eq__ and kind.__hash__ is not None
    if may_be_key and owner in _STANDARD:
        return _equal  # dates, paths, fractions, patterns: what may be a key of a dict does not change
    if any("__dict__" in vars(base) or "__slots__" in vars(base) for base in kind.__mro__):
        return _object
    if hasattr(kind, "__next__"):
        return _opaque
    if may_be_key:
        return _equal
    return _same if owner in _STANDARD else _opaque


def parts_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """What is in a value, under its names."""
    return () if type(value) in PLAIN else reader_of(type(value))(value)[1]


def _same(value: Any) -> Parts:
    return Same(value), ()


def _opaque(value: Any) -> Parts:
    return Same(value), ()


def _equal(value: Any) -> Parts:
    return (type(value), value), ()


def _plain(value: Any) -> Parts:
    return exactly(value), _attributes(value)


def _list(value: list[Any]) -> Parts:
    return type(value), [*enumerate(list.__iter__(value)), *_attributes(value)]


def _tuple(value: tuple[Any, ...]) -> Parts:
    return type(value), [*enumerate(tuple.__iter__(value)), *_attributes(value)]


def _deque(value: deque[Any]) -> Parts:
    return (type(value), value.maxlen), [*enumerate(deque.__iter__(value)), *_attributes(value)]


def _dict(value: dict[Any, Any]) -> Parts:
    items = [*(OrderedDict if isinstance(value, OrderedDict) else dict).items(value)]
    if isinstance(value, defaultdict):
        items.append(("default_factory", value.default_factory))
    return (type(value), *[_key(key) for key, _ in items]), items + _attributes(value)


def _proxy(value: Mapping[Any, Any]) -> Parts:
    items = [*value.items()]
    return (type(value), *[_key(key) for key, _ in items]), items


def _view(value: Any) -> Parts:
    return type(value), (("mapping", value.mapping),)


def _memory(value: Any) -> Parts:
    return (type(value), bytes(value)), ()


def _optimizer(value: torch.optim.Optimizer) -> Parts:
    """Its settings, a learning rate for one, without what it keeps of parameters."""
    groups = [[pair for pair in group.items() if pair[0] != "params"] for group in value.param_groups]
    own = [pair for pair in _attributes(value) if pair[0] not in ("state", "param_groups")]
    return Same(value), [*enumerate(map(dict, groups)), *own]


def _set(value: Any) -> Parts:
    base = set if isinstance(value, set) else frozenset
    return (type(value), frozenset(map(_key, base.__iter__(value)))), _attributes(value)


def _tensor(value: Tensor) -> Parts:
    if hasattr(value, MARK):
        looks = value.shape, value.dtype, value.device, value.stride(), value.is_conj(), value.is_neg()
        return (MARK, looks), ()
    if is_functional(value) and not dispatch_modes():  # the trace is over that made it
        raise TraceError(
            "The stage leaves a tensor outside of its module, in a global, on a class or a function, which "
            "a compiled stage would do in its first call alone. Return it, or keep it in an attribute, a "
            "list or a dict of the module."
        )
    sizes = None if value.is_nested or is_lazy(value) else value.shape
    return (Same(value), sizes, value.dtype, value.requires_grad), ()


def _key(key: Any) -> Hashable:
    if isinstance(key, tuple):
        return type(key), *map(_key, key)
    return exactly(key) if isinstance(key, PLAIN) else Same(key)


def _function(value: types.FunctionType) -> Parts:
    return Same(value), () if _is_of_torch(value) else value.__dict__.items()


def _is_of_torch(function: types.FunctionType) -> bool:
    """Tell whether it is torch's own, on which what torch notes says nothing of what it does."""
    return (function.__module__ or "").partition(".")[0] == "torch"


def _method(value: Any) -> Parts:
    return type(value), (("__func__", value.__func__), ("__self__", value.__self__))


def _builtin(value: Any) -> Parts:
    if _is_unbound(value):
        return Same(value), ()
    return (type(value), value.__name__), (("__self__", value.__self__),)


def _is_unbound(value: Any) -> bool:
    return value.__self__ is None or isinstance(value.__self__, (type, types.ModuleType))


def _slice(value: slice) -> Parts:
    return slice, enumerate((value.start, value.stop, value.step))


def _partial(value: functools.partial[Any]) -> Parts:
    return type(value), [
        ("func", value.func),
        ("args", value.args),
        ("keywords", value.keywords),
        *_attributes(value),
    ]


def _descriptor(value: Any) -> Parts:
    functions = [(name, getattr(value, name, None)) for name in ("fget", "fset", "__func__", "func")]
    return Same(value), [(name, function) for name, function in functions if function is not None]


def _bytes(value: Any) -> Parts:
    return (type(value), getattr(value, "typecode", None) or getattr(value, "format", None), bytes(value)), ()


def _ndarray(value: Any) -> Parts:
    if value.dtype.hasobject:
        return (type(value), value.shape), enumerate(value.ravel().tolist())
    data = hashlib.blake2b(value.tobytes()).digest()
    return (type(value), str(value.dtype), value.shape, data), ()


def _scalar(value: Any) -> Parts:
    return (type(value), str(value.dtype), value.tobytes()), ()


def _reference(value: weakref.ref[Any]) -> Parts:
    return type(value), (("()", value()),)


def _proxy_of(value: Any) -> Parts:
    with suppress(ReferenceError):  # it is gone
        return type(value), (("()", value.__repr__.__self__),)
    return type(value), ()


def _variable(value: contextvars.ContextVar[Any]) -> Parts:
    try:
        return Same(value), (("get()", value.get()),)
    except LookupError:
        return Same(value), ()


def _local(value: threading.local) -> Parts:
    return Same(value), value.__dict__.items()


def _environment(value: Any) -> Parts:
    return (type(value), tuple(value._data.items())), ()


def _cell(value: types.CellType) -> Parts:
    try:
        return type(value), (("cell_contents", value.cell_contents),)
    except ValueError:
        return type(value), ()


def _object(value: Any) -> Parts:
    # A dataclass is all that is in it, and often made anew for each call.
    return type(value) if dataclasses.is_dataclass(value) else Same(value), _attributes(value)


def _attributes(value: Any) -> list[tuple[Any, Any]]:
    """What an object's own namespace and slots hold."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = None
    found = [*own.items()] if isinstance(own, dict) else []
    for name, slot in slots(type(value)):
        with suppress(AttributeError):  # not filled
            found.append((name, slot.__get__(value)))
    return found


def _slots_of(kind: Any) -> tuple[tuple[str, Any], ...]:
    """The slots of a type, found by their descriptors, as the names of private ones are mangled."""
    return tuple(
        (name, slot)
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType)
    )


_READERS: dict[type, Callable[[Any], Parts]] = {
    **dict.fromkeys(PLAIN, _plain),
    Tensor: _tensor,
    type: _same,
    types.ModuleType: _same,
    types.CodeType: _same,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinMethodType: _builtin,
    types.MethodWrapperType: _builtin,
    slice: _slice,
    **dict.fromkeys((property, classmethod, staticmethod, functools.cached_property), _descriptor),
    functools.partial: _partial,
    list: _list,
    tuple: _tuple,
    deque: _deque,
    dict: _dict,
    types.MappingProxyType: _proxy,
    **dict.fromkeys(map(type, ({}.keys(), {}.values(), {}.items())), _view),
    **dict.fromkeys((set, frozenset), _set),
    ctypes.Structure.__mro__[1]: _memory,  # of all that lies in memory as in C
    torch.optim.Optimizer: _optimizer,
    **dict.fromkeys((array.array, bytearray, memoryview), _bytes),
    weakref.ref: _reference,
    **dict.fromkeys(weakref.ProxyTypes, _proxy_of),
    contextvars.ContextVar: _variable,
    threading.local: _local,
    type(os.environ): _environment,
    types.CellType: _cell,
    **dict.fromkeys((types.CoroutineType, types.AsyncGeneratorType, queue.SimpleQueue, mmap.mmap), _opaque),
}
if "numpy" in sys.modules:
    import numpy

    _READERS |= {numpy.ndarray: _ndarray, numpy.generic: _scalar, numpy.ufunc: _same, numpy.dtype: _equal}

reader_of: Callable[[Any], Callable[[Any], Parts]] = functools.lru_cache(maxsize=4096)(_reader_of)
slots: Callable[[Any], tuple[tuple[str, Any], ...]] = functools.lru_cache(maxsize=4096)(_slots_of)
_LOOKED_INTO = frozenset({"distributions", "lr_scheduler", "amp"})
"""Parts of torch whose objects have a state of their own that a forward may read."""

_STANDARD = sys.stdlib_module_names
_OF_NO_CONSEQUENCE = frozenset(
    {"logging", "threading", "_thread", "typing", "re", "_io", "abc", "_abc", "operator", "_operator"}
    | {"funcstage.state.contents"}  # what a stage function remembers of its module, with globals by name
)
"""Modules whose objects a result does not depend on, or that never change."""
