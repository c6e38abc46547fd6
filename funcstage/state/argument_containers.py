"""Lists, dicts and the like among the arguments into which a forward writes.

A stage is handed its arguments rebuilt from their leaves, with tensors of its own. What it appends to such a
list, or sets in such a dict, is given to the caller's afterwards, tensors detached, as what it keeps on its
module is (`kept.py`). A trace, which runs once for many calls, refuses it.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import optree
from torch import Tensor

from funcstage._torch import functorch as ft
from funcstage.errors import PurityError
from funcstage.registration import LEAVES, NAMESPACE
from funcstage.state.kept import replace_in
from funcstage.state.reach import holders

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

WAY_OUT = "Return what is new instead, or copy the container first (copy.copy) and change the copy."


def are_among(spec: optree.PyTreeSpec) -> bool:
    """Tell whether a tuple or dict of arguments, of this structure, holds more than leaves."""
    return spec.num_nodes > spec.num_leaves + 1


class _Contents(NamedTuple):
    """What a container holds, where, and what it says of itself."""

    places: Sequence[Any]
    values: list[Any]
    marks: Any

    def is_same(self, other: _Contents) -> bool:
        same = len(self.values) == len(other.values) and all(map(is_, self.values, other.values))
        return same and [*self.places] == [*other.places] and bool(self.marks == other.marks)


class _Container(NamedTuple):
    """One that the stage was handed, and the caller's.

    Attributes:
        name: what it is called.
        given: the caller's.
        handed: the stage's.
        before: what that held.
    """

    name: str
    given: Any
    handed: Any
    before: _Contents


class Containers:
    """The containers among arguments, as they are before the stage runs.

    Args:
        given: the caller's `(args, kwargs)`.
        handed: the same, rebuilt for the stage.
    """

    def __init__(self, given: Call, handed: Call) -> None:
        self._found: list[_Container] = []
        self._originals: dict[int, Any] = {}
        self._handed: list[Any] = []  # kept alive, as long as their ids are compared
        (args, kwargs), (stage_args, stage_kwargs) = given, handed
        for i, pair in enumerate(zip(args, stage_args, strict=True)):
            self._look(f"args[{i}]", *pair)
        for key in kwargs:
            self._look(f"kwargs[{key!r}]", kwargs[key], stage_kwargs[key])

    def _look(self, name: str, given: Any, handed: Any) -> None:
        if handed is not given:
            self._originals[id(handed)] = given
            self._handed.append(handed)
        contents = _contents(handed)
        if contents is None:
            return
        if not isinstance(handed, tuple):
            self._found.append(_Container(name, given, handed, contents))
        own = _contents(given)
        assert own is not None
        for place, here, there in zip(contents.places, own.values, contents.values, strict=True):
            self._look(f"{name}[{place!r}]", here, there)

    def changed(self) -> list[_Container]:
        """Those that the stage has written into."""
        return [
            each
            for each in self._found
            if (now := _contents(each.handed)) is None or not now.is_same(each.before)
        ]

    def give_back(self, stage: str) -> None:
        """Let the caller's containers hold what the stage has left in its own.

        Raises:
            PurityError: if one is of a type whose contents cannot be exchanged, or there more than once.
        """
        changed = self.changed()
        for each in changed:
            if sum(each.given is other.given for other in self._found) > 1:
                raise PurityError(
                    f"{stage} writes into {each.name}, a {type(each.given).__qualname__} that is among the "
                    "arguments more than once. The stage gets a copy for each of these places, so they "
                    f"would no longer agree. {WAY_OUT}"
                )
            if type(each.given) not in _FILLED and not _is_open_dataclass(each.given):
                raise PurityError(
                    f"{stage} writes into {each.name}, a {type(each.given).__qualname__}. The stage gets a "
                    f"copy of it, so the caller's would not change. {WAY_OUT}"
                )
        for each in changed:
            given, handed = each.given, each.handed
            if isinstance(given, dict):
                entries = {key: self._original(value) for key, value in handed.items()}
                given.clear()
                given.update(entries)
            elif isinstance(given, (list, deque)):
                values = [*map(self._original, handed)]
                given.clear()
                given.extend(values)
            else:
                for name, value in vars(handed).items():
                    setattr(given, name, self._original(value))

    def _original(self, value: Any) -> Any:
        """What the caller's containers hold in place of a value: the caller's own, or one without a tape."""
        if id(value) in self._originals:
            return self._originals[id(value)]
        if isinstance(value, Tensor):
            value = ft.without_dead_wrappers(value)
            return value if value.is_leaf else value.detach()
        if isinstance(value, (tuple, frozenset)):
            items = [*map(self._original, value)]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
        for holder in holders(value) if type(value) not in LEAVES else ():
            replace_in(holder, self._original)
        return value


def _contents(container: Any) -> _Contents | None:
    """The contents of what is a container and no leaf."""
    if type(container) in LEAVES or isinstance(container, Tensor):  # whose values optree would write out
        return None
    if isinstance(container, dict):
        return _Contents([*container], [*container.values()], None)
    try:
        values, marks, places, _ = optree.tree_flatten_one_level(
            container, none_is_leaf=True, namespace=NAMESPACE
        )
    except ValueError:  # a leaf
        return None
    return _Contents(places, [*values], marks)


def _is_open_dataclass(value: Any) -> bool:
    frozen = getattr(getattr(type(value), "__dataclass_params__", None), "frozen", True)
    return not frozen and hasattr(value, "__dict__") and not isinstance(value, (dict, list))


_FILLED = (list, dict, OrderedDict, defaultdict, deque)
