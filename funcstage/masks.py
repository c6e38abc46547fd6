"""FlexAttention's `BlockMask`s as pytrees: their tensors are leaves, as are those of their mask functions.

Masks are made anew for each batch, out of functions that close over tensors of it (where documents begin). A
stage is traced once for all masks that differ in tensors alone: two functions are the same if their code is,
and what they close over are leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import CellType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import optree

from funcstage._torch.block_masks import is_block_mask, with_offset_as_tensor

_INSIDE = "funcstage.masks"


def flatten_mask(mask: Any) -> tuple[Iterable[Any], Any]:
    """The leaves of a mask, and what it is apart from them."""
    return optree.tree_flatten(_opened(mask, frozenset()), none_is_leaf=True, namespace=_INSIDE)


def unflatten_mask(spec: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """A mask made of them, without its constructor, which takes nothing but tensors."""
    return optree.tree_unflatten(spec, leaves)


class _Globals:
    """The globals of a function, which are compared by which ones they are."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def __hash__(self) -> int:
        return id(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Globals) and self.names is other.names


class _Code(NamedTuple):
    """What a function is apart from its defaults and what it closes over."""

    code: Any
    names: _Globals
    name: str
    qualname: str

    def __repr__(self) -> str:
        return self.qualname

    def made_of(self, values: Iterable[Any]) -> FunctionType:
        defaults, by_name, *held = values
        function = FunctionType(self.code, self.names.names, self.name, defaults, tuple(map(CellType, held)))
        function.__kwdefaults__, function.__qualname__ = by_name, self.qualname
        return function


class _Attributes(NamedTuple):
    """What a mask is apart from its attributes' values."""

    kind: type
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return self.kind.__name__

    def made_of(self, values: Iterable[Any]) -> Any:
        mask: Any = object.__new__(self.kind)
        vars(mask).update(zip(self.names, values, strict=True))
        return mask


_Kind: TypeAlias = _Code | _Attributes


class _Node:
    """A mask or function within one, taken apart."""

    __slots__ = ("kind", "values")

    def __init__(self, kind: _Kind, values: tuple[Any, ...]) -> None:
        self.kind, self.values = kind, values


def _flatten(node: Any) -> tuple[tuple[Any, ...], Any]:
    return node.values, node.kind


def _unflatten(kind: Any, values: Iterable[Any]) -> Any:
    return kind.made_of(values)


_NODE: Any = _Node  # which need be no collection, whatever optree's types say
optree.register_pytree_node(_NODE, _flatten, _unflatten, namespace=_INSIDE)


class _CallsItself(Exception):
    """That a function was found within itself."""


def _opened(value: Any, within: frozenset[int]) -> Any:
    """A value with masks and functions taken apart, but functions that call themselves or have attributes.

    Args:
        value: anything.
        within: ids of those that it was found in.
    """
    if type(value) is tuple:
        return tuple(_opened(item, within) for item in value)
    if is_block_mask(type(value)):
        values = tuple(_opened(each, within) for each in vars(value).values())
        return _Node(_Attributes(type(value), tuple(vars(value))), values)
    if isinstance(value, FunctionType) and not vars(value) and all(map(_is_filled, value.__closure__ or ())):
        return _opened_function(value, within)
    return value


def _opened_function(function: FunctionType, within: frozenset[int]) -> Any:
    if id(function) in within:
        raise _CallsItself(function)
    plain = with_offset_as_tensor(function)
    held = (cell.cell_contents for cell in plain.__closure__ or ())
    given = plain.__defaults__, plain.__kwdefaults__, *held
    try:
        values = tuple(_opened(each, within | {id(function)}) for each in given)
    except _CallsItself as found:
        if found.args[0] is not function:
            raise
        return function
    kind = _Code(plain.__code__, _Globals(plain.__globals__), plain.__name__, plain.__qualname__)
    return _Node(kind, values)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
