"""What functions read that they were not given: the variables around them, and what those lead to.

A replay runs no Python, so a function that would read another value by now must not be replayed. Which
names a function reads is in its code; the methods that it may call are found by their names. More may be
found than a step reads, and what reads its variables in another way (`globals()`) is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from funcstage.state.cells import held_by
from funcstage.state.code import codes_within, is_torchs_or_library, loads_of
from funcstage.state.content import is_plain
from funcstage.state.reach import holders


class Cells:
    """The variables that a function closes over, with its defaults and code, as a container."""

    def __init__(self, function: FunctionType) -> None:
        self.label = function.__qualname__
        self.names = [*_OWN, *function.__code__.co_freevars]
        self._function = function
        self._cells = function.__closure__ or ()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        for name in _OWN:
            yield getattr(self._function, name)
        for cell in self._cells:
            yield held_by(cell)


_OWN = ("__code__", "__defaults__", "__kwdefaults__")


class Names:
    """Some of the names in a namespace, as a container; what is not there may come."""

    def __init__(self, label: str, namespace: dict[str, Any], names: Iterable[str]) -> None:
        self.label = label
        self.names = sorted(names)
        self._namespace = namespace

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self._namespace.get(name, ABSENT) for name in self.names)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a name that is not there."""


class Reach:
    """All that some roots lead to, by attributes, variables and the methods that may be called.

    Args:
        roots: modules, functions, containers, other objects.

    Attributes:
        containers: dicts, lists and sets, attributes of objects among them.
        variables: of the functions.
        passed: everything else that was come upon.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.containers: list[Any] = []
        self.variables: list[Cells | Names] = []
        self.passed: list[Any] = []
        self._seen: set[int] = set()
        self._attributes = {"forward", "__call__"}
        self._classes: dict[type, set[str]] = {}
        self._modules: dict[int, ModuleType] = {}
        self._pending = [*roots]
        while self._pending:
            self._walk(self._pending.pop())
            if not self._pending:
                self._look_up()
        for module in self._modules.values():
            names = self._attributes & vars(module).keys()
            self.variables.append(Names(f"module {module.__name__}", vars(module), names))

    def _walk(self, root: Any) -> None:
        passed: list[Any] = []
        containers = [*holders(root, passed, closed=("torch", "funcstage"))]
        self.containers += [each for each in containers if self._is_new(each)]
        new = [each for each in passed if self._is_new(each)]
        self.passed += new
        for found in new:
            if isinstance(found, FunctionType):
                self._read(found)
            elif isinstance(found, type):
                self._go_on(found.__mro__)
            elif not isinstance(found, (Tensor, ModuleType)):
                self._go_on(type(found).__mro__)
                if _is_ours(found):  # a compiled stage holds a stage function, and that its module
                    self._go_on(filter(callable, getattr(found, "__dict__", {}).values()))

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        return True

    def _read(self, function: FunctionType) -> None:
        """Note the variables of a function, and go on from what they hold."""
        library = is_torchs_or_library(function.__globals__.get("__name__") or "")
        if function.__closure__ or not library:
            self.variables.append(Cells(function))
        if library:
            return
        self._go_on(filter(None, (function.__defaults__, function.__kwdefaults__)))
        loads = [loads_of(code) for code in codes_within(function.__code__)]
        self._attributes |= {name for each in loads for name in each.attributes}
        read = Names(
            function.__qualname__, function.__globals__, {name for each in loads for name in each.globals}
        )
        self.variables.append(read)
        self._go_on(read)

    def _go_on(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, ModuleType):
                if not is_torchs_or_library(value.__name__) and id(value) not in self._modules:
                    self._modules[id(value)] = value
            elif isinstance(value, type):
                if not is_torchs_or_library(value.__module__):
                    self._classes.setdefault(value, set())
            elif id(value) not in self._seen and _may_hold_something(value):
                self._pending.append(value)

    def _look_up(self) -> None:
        """Go on from methods whose names are known by now."""
        for kind, known in self._classes.items():
            for name in (self._attributes & vars(kind).keys()) - known:
                known.add(name)
                value = vars(kind)[name]
                for part in (value, *(getattr(value, n, None) for n in ("__func__", "fget"))):
                    if isinstance(part, FunctionType) and id(part) not in self._seen:
                        self._pending.append(part)
        for module in self._modules.values():
            self._go_on([vars(module)[name] for name in self._attributes & vars(module).keys()])


_FOLLOWED = (
    *(dict, list, set, deque, tuple, frozenset),
    *(FunctionType, MethodType, partial, nn.Module, Optimizer),
)
"""Types of libraries that hold what is the user's."""


def _may_hold_something(value: Any) -> bool:
    if is_plain(value) or isinstance(value, Tensor):
        return False
    if isinstance(value, _FOLLOWED) or not is_torchs_or_library(type(value).__module__):
        return True
    return _is_ours(value) and callable(value)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("funcstage.")
