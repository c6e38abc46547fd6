"""Attributes of modules that are put aside for a while, and which of them somebody reads meanwhile.

Python looks for an attribute in an object's namespace first. Where it is missing there, torch's `__getattr__`
looks among the module's parameters, and there it finds the attribute, and tells. Who reads the namespace
itself finds all of it again, which counts as a read of everything.
Private: that `__getattr__` looks there, and how.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def tells_reads(kind: type[nn.Module], name: str) -> bool:
    """Tell whether whatever reads an attribute that is put aside comes to torch's `__getattr__`."""
    of_kind: Any = kind
    usual = of_kind.__getattr__ is nn.Module.__getattr__
    usual = usual and of_kind.__getattribute__ is object.__getattribute__
    return usual and not any(name in vars(base) for base in kind.__mro__)


@contextmanager
def noting_reads(
    modules: Sequence[nn.Module], names: Sequence[Collection[str]], read: Callable[[int, str], object]
) -> Iterator[None]:
    """Be told which attributes of modules are read.

    Args:
        modules: they, each once.
        names: of the attributes of each, for which `tells_reads` holds.
        read: gets the number of a module and a name, each time that the attribute is read.
    """
    watched = []
    for i, (module, aside) in enumerate(zip(modules, names, strict=True)):
        if aside:
            own = vars(module)
            values = {name: own[name] for name in aside}
            watched.append((module, own, _Namespace(own, values, _telling(read, i))))
    try:
        for module, _, space in watched:
            object.__setattr__(module, "__dict__", space)
        yield
    finally:
        for module, own, space in watched:
            object.__setattr__(module, "__dict__", own)
            space.leave(own)


def _telling(read: Callable[[int, str], object], i: int) -> Callable[[str], object]:
    return lambda name: read(i, name)


class _Parameters(dict[str, Any]):
    """The parameters of a module, among which torch finds what was put aside."""

    def __init__(self, own: dict[str, Any], aside: dict[str, Any], read: Callable[[str], object]) -> None:
        super().__init__(own)
        self._aside, self._read = aside, read

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (
            name in self._aside and sys._getframe(1).f_code is nn.Module.__getattr__.__code__
        )

    def __missing__(self, name: str) -> Any:
        value = self._aside[name]
        self._read(name)
        return value


class _Namespace(dict[str, Any]):
    """The namespace of a module from which attributes were put aside."""

    def __init__(self, own: dict[str, Any], aside: dict[str, Any], read: Callable[[str], object]) -> None:
        super().__init__({name: value for name, value in own.items() if name not in aside})
        self._aside, self._read = aside, read
        self._parameters = _Parameters(own["_parameters"], aside, read)
        dict.__setitem__(self, "_parameters", self._parameters)

    def come_back(self) -> None:
        """Have all of it again."""
        for name in self._aside:
            self._read(name)
        dict.update(self, self._aside)
        self._aside.clear()

    def leave(self, own: dict[str, Any]) -> None:
        """Do to a module's own namespace what was done to this one."""
        now = dict(dict.items(self))
        if now.get("_parameters") is self._parameters:
            now["_parameters"] = own["_parameters"]
            _refill(own["_parameters"], self._parameters, ())
        _refill(own, now, self._aside)


def _refill(own: dict[str, Any], now: dict[str, Any], apart: Collection[str]) -> None:
    """Let a dict hold this, and what it holds apart from it."""
    for name in own.keys() - now.keys() - {*apart}:
        del own[name]
    for name, value in now.items():
        if name not in own or own[name] is not value:
            own[name] = value


def _of_entry(name: str) -> Any:
    method: Any = getattr(dict, name)

    def of_entry(self: _Namespace, key: Any, *rest: Any) -> Any:
        if key in self._aside:
            self.come_back()
        return method(self, key, *rest)

    return of_entry


def _of_all(name: str) -> Any:
    method: Any = getattr(dict, name)

    def of_all(self: _Namespace, *rest: Any, **given: Any) -> Any:
        self.come_back()
        return method(self, *rest, **given)

    return of_all


for _name in ("__contains__", "__getitem__", "__setitem__", "__delitem__", "get", "pop", "setdefault"):
    setattr(_Namespace, _name, _of_entry(_name))
for _name in (
    *("__iter__", "__len__", "__repr__", "__eq__", "__ne__", "__or__", "__ior__", "__ror__", "__reversed__"),
    *("keys", "values", "items", "copy", "update", "clear", "popitem"),
):
    setattr(_Namespace, _name, _of_all(_name))
