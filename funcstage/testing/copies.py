"""Copies of any module for eager to run on, and the user's own left as it was.

`copy.deepcopy` refuses modules that hold tensors with a history (`torch.nn.utils.weight_norm`), locks, open
files or generators. What cannot be copied is shared; everything around it is copied.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from funcstage import trees
from funcstage.errors import StageError, StructureError
from funcstage.gathered import is_sharded
from funcstage.state.ambient import RandomState, among
from funcstage.state.kept import objects_among
from funcstage.state.reach import holders


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose tensors are its own.

    Args:
        module: any module. What it holds that cannot be copied is the copy's too, generators aside, which
            raise where the copy runs one.
    """
    if is_sharded(module):
        raise StructureError(
            f"{type(module).__name__} is sharded by FSDP, which cannot be copied to be compared with itself. "
            "Check the module before fully_shard."
        )
    try:
        return copy.deepcopy(module)
    except Exception:  # whatever the objects that it holds raise
        return _copied_in_parts(module)


def _copied_in_parts(module: nn.Module) -> nn.Module:
    twins = {id(part): type(part).__new__(type(part)) for part in module.modules()}
    memo: dict[int, Any] = dict(twins)
    for part in module.modules():
        vars(twins[id(part)]).update(
            {name: _twin(value, memo, f"{type(part).__name__}.{name}") for name, value in vars(part).items()}
        )
    return twins[id(module)]


def _twin(value: Any, memo: dict[int, Any], name: str) -> Any:
    """Copy as much of a value as can be copied; `memo` is that of `copy.deepcopy`."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not value.is_leaf:
        twin: Any = value.detach().clone()
    elif isinstance(value, types.GeneratorType):
        twin = _Unrepeatable(name)
    else:
        known = dict(memo)
        try:
            twin = copy.deepcopy(value, known)
            memo.update(known)
            return twin
        except Exception:
            twin = _opened(value, memo, name)
    memo[id(value)] = twin
    return twin


def _opened(value: Any, memo: dict[int, Any], name: str) -> Any:
    """Copy a container, or an object with attributes, part by part; anything else is shared."""
    if isinstance(value, dict) and type(value).__reduce__ is dict.__reduce__:
        return _like(value, ((k, _twin(v, memo, f"{name}[{k!r}]")) for k, v in value.items()))
    if type(value) in (list, tuple, set, deque):
        return type(value)(_twin(item, memo, f"{name}[{i}]") for i, item in enumerate(value))
    if not hasattr(value, "__dict__") or isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return value
    try:
        twin = copy.copy(value)
    except Exception:
        return value
    memo[id(value)] = twin
    vars(twin).update({k: _twin(v, memo, f"{name}.{k}") for k, v in vars(value).items()})
    return twin


def _like(value: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    twin = copy.copy(value)
    twin.update(items)
    return twin


class _Unrepeatable:
    """Stands for a generator, which cannot be run twice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> _Unrepeatable:
        return self

    def __next__(self) -> NoReturn:
        raise StageError(
            f"check_stage: {self.name} is a generator that the stage takes values from, so no two runs are "
            "alike and none can be compared with another. Pass what it yields as an argument."
        )

    def send(self, value: object) -> NoReturn:
        next(self)
        raise AssertionError("not reached")


@contextmanager
def left_alone(module: nn.Module | None, args: Any) -> Iterator[None]:
    """Give a module's attributes and random generators, and those of arguments, back as they were.

    Args:
        module: its submodules' attributes, the contents of lists, dicts and sets among these included.
        args: a pytree, for what objects in it hold, and its random generators.
    """
    parts = [] if module is None else list(module.modules())
    restore: list[Callable[[], object]] = [_restoring(part) for part in parts]
    handed = [(h, copy.copy(h)) for root in objects_among(trees.flatten(args)[0]) for h in holders(root)]
    restore += [functools.partial(_refill, holder, before) for holder, before in handed]
    held = [value for part in parts for value in vars(part).values()]
    restore.append(RandomState(among([*trees.flatten(args)[0], *trees.flatten(held)[0]])).restore)
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _restoring(part: nn.Module) -> Callable[[], None]:
    attributes = dict(vars(part))
    contents = [(v, copy.copy(v)) for v in attributes.values() if type(v) in (list, dict, set, deque)]

    def put_back() -> None:
        vars(part).clear()
        vars(part).update(attributes)
        for value, before in contents:
            _refill(value, before)

    return put_back


def _refill(value: Any, before: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(before)
