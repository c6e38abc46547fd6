"""Situations among the arguments: objects that the caller holds, changes, and finds written."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from situation import Around, Situation, map_differentiable
from torch import Tensor, nn

from funcstage import trees


@dataclass
class _Options:
    scale: Any
    inner: Any = None


@dataclass(frozen=True)
class _Frozen:
    scale: Any


class _Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: Any) -> None:
        self.scale = scale


class _Hidden:
    def __init__(self, scale: Any) -> None:
        self.__scale = scale

    @property
    def scale(self) -> Any:
        return self.__scale

    def write(self, value: Any) -> None:
        self.__scale = value


class _Table(dict):  # type: ignore[type-arg]
    pass


class _Level(Enum):
    ONE = 1.0
    TWO = 2.0


def _set(name: str) -> Callable[[Any, float], Any]:
    return lambda o, v: setattr(o, name, v)


def _put(key: Any) -> Callable[[Any, float], Any]:
    return lambda o, v: o.__setitem__(key, v)


_NEW = object()
"""Instead of a write: an object made anew."""

CARRIERS: dict[str, tuple[Callable[[float], Any], Callable[[Any], Any], Any]] = {
    "a number": (float, lambda o: o, _NEW),
    "a flag": (lambda v: v > 1, lambda o: 2.0 if o else 1.0, _NEW),
    "a string": (str, float, _NEW),
    "none or a number": (lambda v: None if v == 1 else v, lambda o: 1.0 if o is None else o, _NEW),
    "an enumeration": (_Level, lambda o: o.value, _NEW),
    "a function": (lambda v: lambda: v, lambda o: o(), _NEW),
    "a partial": (lambda v: functools.partial(max, v), lambda o: o(0.5), _NEW),
    "a tensor": (torch.tensor, lambda o: o, _NEW),
    "a tensor's value": (torch.tensor, lambda o: o, lambda o, v: o.fill_(v)),
    "a dataclass": (_Options, lambda o: o.scale, _set("scale")),
    "a dataclass within": (
        lambda v: _Options(0, _Options(v)),
        lambda o: o.inner.scale,
        lambda o, v: setattr(o.inner, "scale", v),
    ),
    "a dataclass of a tensor": (
        lambda v: _Options(torch.tensor(v)),
        lambda o: o.scale,
        lambda o, v: setattr(o, "scale", torch.tensor(v)),
    ),
    "a frozen dataclass": (_Frozen, lambda o: o.scale, _NEW),
    "a namespace": (lambda v: SimpleNamespace(scale=v), lambda o: o.scale, _set("scale")),
    "a namespace of a list": (
        lambda v: SimpleNamespace(scale=[v]),
        lambda o: o.scale[0],
        lambda o, v: o.scale.__setitem__(0, v),
    ),
    "a namespace of a tensor": (
        lambda v: SimpleNamespace(scale=torch.tensor(v)),
        lambda o: o.scale,
        lambda o, v: setattr(o, "scale", torch.tensor(v)),
    ),
    "a namespace's tensor's value": (
        lambda v: SimpleNamespace(scale=torch.tensor(v)),
        lambda o: o.scale,
        lambda o, v: o.scale.fill_(v),
    ),
    "slots": (_Slots, lambda o: o.scale, _set("scale")),
    "a property": (_Hidden, lambda o: o.scale, lambda o, v: o.write(v)),
    "a dict": (lambda v: {"scale": v}, lambda o: o["scale"], _put("scale")),
    "an ordered dict": (lambda v: OrderedDict(scale=v), lambda o: o["scale"], _put("scale")),
    "a dict subclass": (lambda v: _Table(scale=v), lambda o: o["scale"], _put("scale")),
    "a dict's keys": (
        lambda v: {str(v): 0},
        lambda o: float(next(iter(o))),
        lambda o, v: (o.clear(), o.update({str(v): 0})),
    ),
    "a list": (lambda v: [v], lambda o: o[0], _put(0)),
    "a list's length": (lambda v: [0] * int(v), lambda o: float(len(o)), lambda o, v: o.append(0)),
    "a deque": (lambda v: deque([v]), lambda o: o[0], _put(0)),
    "a set": (lambda v: {v}, max, lambda o, v: (o.clear(), o.add(v))),
    "an array": (lambda v: torch.tensor([v]).numpy(), lambda o: float(o[0]), _put(0)),
}
"""Objects of one number: how they are made, read, and changed."""


class _Carrying(Around):
    """Scales its output by a number out of an argument."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__(inner)
        self.kind = kind

    def forward(self, *args: Any, carried: Any, **kwargs: Any) -> Any:
        scale = CARRIERS[self.kind][1](carried)
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t * scale, output)


@dataclass(frozen=True)
class Carried(Situation):
    """An object among the arguments, which the caller changes between two microbatches."""

    kind: str
    refusable = ("aten",)

    def build(self, module: nn.Module) -> nn.Module:
        return _Carrying(module, self.kind)

    def held(self) -> Any:
        return [CARRIERS[self.kind][0](1.0)]

    def keywords(self, held: Any, k: int) -> dict[str, Any]:
        make, _, write = CARRIERS[self.kind]
        if k > 0:
            if write is _NEW:
                held[0] = make(2.0)
            else:
                write(held[0], 2.0)
        return {"carried": held[0]}


@dataclass
class _Cache:
    """What a forward fills."""

    layers: list[Any] = field(default_factory=list)
    table: dict[str, Any] = field(default_factory=dict)
    last: Any = None
    seen: int = 0

    def update(self, value: Tensor) -> int:
        self.seen += 1
        self.last = value
        return self.seen


class _Opaque:
    """The same, of no type that is a pytree."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.table: dict[str, Any] = {}
        self.seen = 0

    def update(self, value: Tensor) -> None:
        self.seen += 1
        self.table.update(last=value)


FILLED: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "a list": (list, lambda o, t: o.append(t)),
    "a dict": (dict, lambda o, t: o.__setitem__("last", t)),
    "a list in a dict": (lambda: {"all": []}, lambda o, t: o["all"].append(t)),
    "a list in a tuple": (lambda: ([],), lambda o, t: o[0].append(t)),
    "a dict subclass": (_Table, lambda o, t: o.__setitem__(str(len(o)), t)),
    "a namespace": (lambda: SimpleNamespace(last=None), lambda o, t: setattr(o, "last", t)),
    "a namespace's list": (lambda: SimpleNamespace(all=[]), lambda o, t: o.all.append(t)),
    "a deque": (deque, lambda o, t: o.append(t)),
    "a cache": (_Opaque, lambda o, t: o.update(t)),
    "a cache's list": (_Opaque, lambda o, t: o.layers.append(t)),
    "a cache's table": (_Opaque, lambda o, t: o.table.update(last=t)),
    "a dataclass": (_Cache, lambda o, t: o.update(t)),
}
"""Objects that a forward fills: how they are made and given a tensor."""


def contents(value: Any) -> list[Any]:
    """The numbers and tensors in an object, in the order in which they are found."""
    if isinstance(value, Tensor | int | float | None):
        return [value]
    if isinstance(value, dict):
        return [found for entry in value.values() for found in contents(entry)]
    if isinstance(value, list | tuple | deque):
        return [found for entry in value for found in contents(entry)]
    return contents(vars(value))


class _Filling(Around):
    def __init__(self, inner: nn.Module, kind: str, detached: bool) -> None:
        super().__init__(inner)
        self.kind, self.detached = kind, detached

    def forward(self, *args: Any, filled: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        first = next(t for t in trees.flatten(output)[0] if isinstance(t, Tensor))
        value = first.detach() * 2 if self.detached else first * 2
        FILLED[self.kind][1](filled, value)
        return output


@dataclass(frozen=True)
class Filled(Situation):
    """The forward writes into an object among its arguments."""

    kind: str
    detached: bool = False
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        return _Filling(module, self.kind, self.detached)

    def held(self) -> Any:
        return FILLED[self.kind][0]()

    def keywords(self, held: Any, k: int) -> dict[str, Any]:
        return {"filled": held}

    def left(self, held: Any) -> list[Any]:
        return contents(held)
