"""What a graph has baked in besides its arguments: modules, tensors, hooks and options, watched for changes.

A replay reads tensors where they lay, and does what modules, hooks and the optimizer did when it was
recorded. So before each replay all of these are compared with what they were. It is a walk along lists that
were made once, by identity; plain values may be other objects that are equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcstage._torch.tensors import hooks_of
from funcstage.dtensors import first_dtensor, local_of
from funcstage.pipelining.capture.variables import Cells, Names, Reach
from funcstage.state.content import is_plain
from funcstage.state.parameter_hooks import any_hooked
from funcstage.state.writes import versions

_CONTAINERS = (dict, list, set, deque)


class _Other(NamedTuple):
    """A key of a dict, such as a tensor, that is not compared by equality."""

    number: int
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """A container, and what was in it.

    Attributes:
        name: for messages.
        container: a dict, list or set, or the variables of a function.
        names: its keys, or what stands for them.
        values: what was in it.
    """

    name: str
    container: Any
    names: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, name: str, container: Any) -> Space:
        return cls(name, container, *_content(container))

    def again(self) -> Space:
        """The same container, with what is in it now."""
        return Space.of(self.name, self.container)

    def where(self, key: Any) -> str:
        """What to call a place in the container."""
        if isinstance(self.container, (Cells, Names)):
            return f"{key!r}, a variable of {self.name},"
        if isinstance(key, str) and key.isidentifier():
            return f"{self.name}.{key}"
        return f"{self.name}[{key!r}]" if isinstance(key, (str, int)) else f"{self.name}[a {key.kind}]"

    def change(self) -> str:
        """Say what is no longer as it was; nothing if all is."""
        names, values = _content(self.container)
        if names != self.names:
            new, gone = [n for n in names if n not in self.names], [n for n in self.names if n not in names]
            return f"{self.name} has {'other' if new or gone else 'reordered'} entries: {(new + gone)[:3]}"
        for key, before, after in zip(names, self.values, values, strict=True):
            if before is not after and not _equal(before, after):
                was = f" was {before!r} and is {after!r}" if is_plain(before) and is_plain(after) else ""
                return f"{self.where(key)}{was or ' was replaced'}"
        return ""


class Baked:
    """What a graph has baked in.

    Args:
        device: the one that graphs run on.
        roots: by name, the stages' modules, and whatever else may hold or read something.
        optimizer: the one that steps in the graph.
        rest: names of further values and what reads them; they are compared by identity.

    Attributes:
        device: the one that graphs run on.
        spaces: containers with what was in them.
        tensors: the tensors among that, with their names.
    """

    def __init__(
        self,
        device: torch.device,
        roots: dict[str, Any],
        optimizer: Optimizer | None = None,
        rest: Iterable[tuple[str, Callable[[], Any]]] = (),
    ) -> None:
        self.spaces = [*_spaces(roots, optimizer)]
        self.tensors: dict[str, Tensor] = {}
        for space in self.spaces:
            for key, value in zip(space.names, space.values, strict=True):
                if isinstance(value, Tensor):
                    self.tensors[space.where(key)] = value
        self.device = device
        self._rest = [(name, read, read()) for name, read in rest]
        self._note()
        found = [*self.tensors.values()]
        self._plain = [tensor for tensor in found if first_dtensor((tensor,)) is None]
        self._sharded = [tensor for tensor in found if first_dtensor((tensor,)) is not None]
        self._found = [*self._plain, *self._sharded]
        self._places = self._now()
        self._elsewhere = [tensor for tensor in self._plain if tensor.device.type != device.type]
        self._written = versions(self._elsewhere)

    def _note(self) -> None:
        """Lay out what is compared, so that it takes a few steps in all."""
        filled = [space for space in self.spaces if space.values]
        self._empty = [space.container for space in self.spaces if not space.values]
        self._views = [
            space.container.values() if isinstance(space.container, dict) else space.container
            for space in filled
        ]
        self._sizes = [*map(len, self._views)]
        self._values = [value for space in filled for value in space.values]

    def _now(self) -> list[Any]:
        """Where the tensors lie, whether they are trained, and what hooks they have."""
        tensors = self._found
        places = [*map(_PLACE, self._plain), *(local_of(tensor).data_ptr() for tensor in self._sharded)]
        hooks = [*map(hooks_of, tensors)] if any_hooked(tensors) else None
        return [places, [*map(_TRAINED, tensors)], hooks]

    def change(self) -> str:
        """Say what is no longer as it was; nothing if all is."""
        for name, read, before in self._rest:
            if read() is not before:
                return f"{name} was replaced"
        same = not any(self._empty) and [*map(len, self._views)] == self._sizes
        if not same or not all(map(is_, chain.from_iterable(self._views), self._values)):
            for i, space in enumerate(self.spaces):
                if said := space.change():
                    return said
                self.spaces[i] = space.again()
            self._note()  # with what is equal in place of what it is equal to
        now = self._now()
        if now != self._places:
            return self._moved(now)
        written = versions(self._elsewhere)
        if written != self._written:
            which = next(
                i for i, pair in enumerate(zip(self._written, written, strict=True)) if len({*pair}) > 1
            )
            return f"{self._name(self._elsewhere[which])} is on another device and was written into"
        return ""

    def _moved(self, now: Sequence[Any]) -> str:
        for before, after, what in zip(self._places, now, _WHAT, strict=True):
            for i, tensor in enumerate(self._found):
                if (before and before[i]) != (after and after[i]):
                    return f"{self._name(tensor)} {what}"
        return "a hook of a tensor was removed"

    def _name(self, tensor: Tensor) -> str:
        return next(name for name, each in self.tensors.items() if each is tensor)


_WHAT = ("was given other memory", "was frozen or thawed", "has other hooks")
_PLACE = Tensor.data_ptr
_TRAINED = attrgetter("requires_grad")


def _spaces(roots: dict[str, Any], optimizer: Optimizer | None) -> Iterator[Space]:
    """The containers and variables that modules, functions and other objects reach."""
    named: dict[int, str] = {}
    for root_name, root in roots.items():
        for name, part in root.named_modules() if isinstance(root, nn.Module) else ():
            named.setdefault(id(part), f"{root_name}.{name}" if name else root_name)
    reach = Reach(roots.values())
    seen: set[int] = set()
    for part in reach.passed:
        if isinstance(part, nn.Module):
            path = named.get(id(part), type(part).__name__)
            for key, value in [("", vars(part)), *vars(part).items()]:
                if isinstance(value, _CONTAINERS) and id(value) not in seen:
                    seen.add(id(value))
                    own = not key or key in ("_parameters", "_buffers", "_modules")
                    yield Space.of(path if own else f"{path}.{key}", value)
    for container in reach.containers:
        if id(container) not in seen:
            yield Space.of("what the step reads", container)
    for variables in reach.variables:
        yield Space.of(variables.label, variables)
    reached = [each for each in reach.passed if isinstance(each, Optimizer) and each is not optimizer]
    for each in (*(() if optimizer is None else (optimizer,)), *reached):
        yield from _spaces_of(each)


def _spaces_of(optimizer: Optimizer) -> Iterator[Space]:
    name = f"the optimizer ({type(optimizer).__name__})"
    yield Space.of(name, vars(optimizer))
    for key, value in vars(optimizer).items():
        if isinstance(value, _CONTAINERS) and key not in ("state", "param_groups"):
            yield Space.of(f"{name}.{key}", value)
    yield Space.of(f"{name}.param_groups", optimizer.param_groups)
    for i, group in enumerate(optimizer.param_groups):
        yield Space.of(f"{name}.param_groups[{i}]", group)
        yield Space.of(f"{name}.param_groups[{i}]['params']", group["params"])
    yield Space.of(f"{name}.state", optimizer.state)
    for i, state in enumerate(optimizer.state.values()):
        yield Space.of(f"{name}.state of parameter {i}", state)


def _content(container: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(container, dict):
        keys = [
            key if isinstance(key, (str, int)) else _Other(id(key), type(key).__name__) for key in container
        ]
        return keys, [*container.values()]
    values = [*container]
    return (container.names if isinstance(container, (Cells, Names)) else [*range(len(values))]), values


def _equal(before: Any, after: Any) -> bool:
    plain = type(before) is type(after) and is_plain(before) and is_plain(after)
    return plain and repr(before) == repr(after)


def generators_in(baked: Baked, device: torch.device) -> list[torch.Generator]:
    """The generators of random numbers that modules and what they hold have."""
    values = (value for space in baked.spaces for value in space.values)
    found = {id(value): value for value in values if isinstance(value, torch.Generator)}
    return [generator for generator in found.values() if generator.device.type == device.type]
