"""Types that optree was not told of, told to it when they are first met in arguments or outputs.

Dataclasses (and attrs classes), subclasses of dict, list, deque and tuple, as model libraries return them,
what is registered in `torch.utils._pytree`, FlexAttention's masks (`masks.py`), and named tuples whose
constructors are their own (`PackedSequence`). They are rebuilt by their contents, without their
constructors, as a cotangent or a gradient need not be what those accept. The namespace is ours alone, and
what a user has registered there, or for all namespaces, comes first.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import types
import warnings
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, Sequence, ValuesView
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from funcstage import forks
from funcstage._torch.block_masks import is_block_mask
from funcstage._torch.pytree import SUPPORTED_NODES
from funcstage.masks import flatten_mask, unflatten_mask

NAMESPACE = "funcstage"

ALWAYS_LEAVES: frozenset[type] = frozenset(
    (Tensor, nn.Parameter, type(None), bool, int, float, complex, str, bytes)
)

LEAVES: set[type] = {*ALWAYS_LEAVES}
"""Types that are known to be leaves; what was added may come to be registered."""

_registered: set[type] = set()
_lock = forks.lock()


def has_new(leaves: Iterable[Any]) -> bool:
    """Register types among those of leaves that can be looked into; tell whether there were any.

    A dataclass without tensors, a configuration for one, stays the leaf that it is.
    """
    found = False
    for leaf in leaves:
        kind = type(leaf)
        if kind in LEAVES:
            continue
        with _lock:
            if kind not in _registered:
                rule = _rule(kind)
                if rule is None:
                    LEAVES.add(kind)
                    continue
                if rule[0] is _flatten_object and not holds_tensor(leaf):
                    continue
                flatten, unflatten, entries = rule
                optree.register_pytree_node(
                    kind, flatten, unflatten, path_entry_type=entries, namespace=NAMESPACE
                )
                _registered.add(kind)
            found = True
    return found


def has_new_nodes(spec: optree.PyTreeSpec) -> bool:
    """Register named tuples of a structure that optree would rebuild by constructors of their own."""
    with suppress(TypeError):  # what a user's node keeps need not be hashable
        if spec in _SEEN:
            return False
    picky = [*filter(_is_picky, _named_tuples(spec))]
    if not picky:
        with suppress(TypeError):
            if len(_SEEN) >= _MANY:
                _SEEN.clear()
            _SEEN.add(spec)
        return False
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is named, too: optree takes it for a mistake
        for kind in {*picky} - _registered:
            rebuild = partial(_unflatten_items, kind)
            optree.register_pytree_node(
                kind, _flatten_fields, rebuild, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE
            )
            _registered.add(kind)
    return True


_SEEN: set[optree.PyTreeSpec] = set()
_MANY = 256


def _named_tuples(spec: optree.PyTreeSpec) -> Iterable[type]:
    """The classes of a structure's named tuples, but for those that have rules of their own."""
    if spec.kind == optree.PyTreeKind.NAMEDTUPLE:
        yield spec.type  # type: ignore[misc]  # which only a leaf has not
    for child in spec.children():
        yield from _named_tuples(child)


def _is_picky(kind: Any) -> bool:
    """Tell whether a named tuple is more than its fields, or makes something else of them."""
    maker = next(base for base in kind.__mro__ if "__new__" in vars(base))
    return "_fields" not in vars(maker) or kind.__init__ is not object.__init__ or kind.__dictoffset__ != 0


def _rule(kind: type) -> tuple[Any, Any, Any] | None:
    """How instances of a class are taken apart and put together; None where they are leaves."""
    if issubclass(kind, _NEVER):
        return None
    if is_block_mask(kind):
        return flatten_mask, unflatten_mask, optree.AutoEntry
    if issubclass(kind, dict):
        return _flatten_dict, partial(_unflatten_dict, kind), optree.AutoEntry
    if issubclass(kind, list):
        return partial(_flatten_items, list), partial(_unflatten_items, kind), optree.AutoEntry
    if issubclass(kind, deque):
        return _flatten_deque, partial(_unflatten_deque, kind), optree.AutoEntry
    if issubclass(kind, tuple):
        return partial(_flatten_items, tuple), partial(_unflatten_items, kind), optree.AutoEntry
    if dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__"):
        return _flatten_object, partial(_unflatten_object, kind), optree.GetAttrEntry
    node = SUPPORTED_NODES.get(kind)
    if node is not None:
        return partial(_flatten_torch, node), partial(_unflatten_torch, node), optree.AutoEntry
    if issubclass(kind, (UserDict, UserList)):
        return _flatten_object, partial(_unflatten_object, kind), optree.GetAttrEntry
    return None


_NEVER = (Tensor, nn.Module, type, enum.Enum, torch.Size, types.ModuleType, optree.PyTreeSpec)


def fields_of(kind: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass or an attrs class."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(field.name for field in getattr(kind, "__attrs_attrs__", ()))


def attributes_of(instance: Any) -> dict[str, Any]:
    """All attributes of an instance: its fields, then whatever else it was given."""
    found = {name: getattr(instance, name, _ABSENT) for name in fields_of(type(instance))}
    own = getattr(instance, "__dict__", {})
    if own is not instance:  # a dict whose entries are its attributes
        found |= {name: value for name, value in own.items() if name not in found}
    return {name: value for name, value in found.items() if value is not _ABSENT}


_ABSENT = object()


def _set(instance: Any, names: Iterable[str], values: Iterable[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)  # a frozen dataclass has no other way


def _flatten_object(instance: Any) -> tuple[Iterable[Any], Any, Any]:
    found = attributes_of(instance)
    return tuple(found.values()), tuple(found), tuple(found)


def _unflatten_object(kind: type, names: tuple[str, ...], children: Iterable[Any]) -> Any:
    new: Any = object.__new__(kind)
    _set(new, names, children)
    return new


class _Entries(NamedTuple):
    """What a dict is made of besides its values.

    Attributes:
        attributes: the names of those.
        alike: those keys under which the dict has what an attribute is that is no field.
        keys: the other ones. Those of a dataclass's fields are entries wherever they are not None.
        factory: the default one.
        is_its_attributes: whether the entries are the attributes.
    """

    attributes: tuple[str, ...]
    alike: tuple[str, ...]
    keys: tuple[Any, ...]
    factory: Any
    is_its_attributes: bool


def _flatten_dict(instance: Any) -> tuple[Iterable[Any], Any, Any]:
    attributes = attributes_of(instance)
    items = [*dict.items(instance)]
    same = [key for key, value in items if key in attributes and attributes[key] is value]
    keys = [key for key, _ in items if key not in same]
    own = _Entries(
        tuple(attributes),
        tuple(key for key in same if key not in fields_of(type(instance))),
        tuple(keys),
        instance.default_factory if isinstance(instance, defaultdict) else None,
        getattr(instance, "__dict__", None) is instance,
    )
    values = [*attributes.values(), *(dict.__getitem__(instance, key) for key in keys)]
    return values, own, (*attributes, *keys)


def _unflatten_dict(kind: Any, own: _Entries, children: Iterable[Any]) -> Any:
    values = list(children)
    new: Any = kind.__new__(kind)
    put: Any = OrderedDict.__setitem__ if issubclass(kind, OrderedDict) else dict.__setitem__
    n = len(own.attributes)
    _set(new, own.attributes, values[:n])
    for name, value in zip(own.attributes, values[:n], strict=True):
        if name in own.alike or (value is not None and name in fields_of(kind)):
            put(new, name, value)
    for key, value in zip(own.keys, values[n:], strict=True):
        put(new, key, value)
    if own.factory is not None:
        new.default_factory = own.factory
    if own.is_its_attributes:
        object.__setattr__(new, "__dict__", new)
    return new


def _flatten_items(base: Any, instance: Any) -> tuple[Iterable[Any], Any, Any]:
    attributes = attributes_of(instance)
    items = list(base.__iter__(instance))
    return [*items, *attributes.values()], tuple(attributes), (*range(len(items)), *attributes)


def _flatten_fields(instance: Any) -> tuple[Iterable[Any], Any, Any]:
    items, names, _ = _flatten_items(tuple, instance)
    return items, names, (*instance._fields, *names)


def _unflatten_items(kind: Any, names: tuple[str, ...], children: Iterable[Any]) -> Any:
    values = list(children)
    n = len(values) - len(names)
    if issubclass(kind, tuple):
        new: Any = tuple.__new__(kind, values[:n])
    else:
        new = kind.__new__(kind)
        list.extend(new, values[:n])
    _set(new, names, values[n:])
    return new


def _flatten_deque(instance: Any) -> tuple[Iterable[Any], Any, Any]:
    values, names, entries = _flatten_items(deque, instance)
    return values, (names, instance.maxlen), entries


def _unflatten_deque(kind: Any, own: tuple[tuple[str, ...], int | None], children: Iterable[Any]) -> Any:
    names, maxlen = own
    values = list(children)
    n = len(values) - len(names)
    new: Any = kind.__new__(kind)
    deque.__init__(new, values[:n], maxlen)
    _set(new, names, values[n:])
    return new


class _Context:
    """What torch's rule keeps of an instance, which need not be hashable as optree's must."""

    __slots__ = ("kind", "value")

    def __init__(self, kind: type, value: Any) -> None:
        self.kind, self.value = kind, value

    def __hash__(self) -> int:
        return hash(self.kind)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.kind is other.kind and bool(self.value == other.value)

    def __repr__(self) -> str:
        return repr(self.value)


def _flatten_torch(node: Any, instance: Any) -> tuple[Iterable[Any], Any]:
    children, context = node.flatten_fn(instance)
    return children, _Context(type(instance), context)


def _unflatten_torch(node: Any, context: _Context, children: Iterable[Any]) -> Any:
    return node.unflatten_fn(list(children), context.value)


def holds_tensor(leaf: Any, is_wanted: Callable[[Tensor], bool] = lambda _: True, depth: int = 3) -> bool:
    """Tell whether an object has tensors among its attributes, in lists and dicts of it or objects there.

    A set, a view of a dict or a read-only one has them as its elements.
    """
    if type(leaf) in ALWAYS_LEAVES or isinstance(leaf, (*_NEVER, types.FunctionType)):
        return False
    slots = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())]
    values: Sequence[Any] = [
        *getattr(leaf, "__dict__", {}).values(),
        *(getattr(leaf, name, None) for name in slots if name not in ("__dict__", "__weakref__")),
        *(leaf if isinstance(leaf, _IN_LISTS) else ()),
        *(leaf.values() if isinstance(leaf, types.MappingProxyType) else ()),
    ]
    inside: list[Any] = optree.tree_leaves(values, namespace=NAMESPACE)  # type: ignore[arg-type]
    return any(
        is_wanted(value)
        if isinstance(value, Tensor)
        else depth > 0 and holds_tensor(value, is_wanted, depth - 1)
        for value in inside
    )


def way_out(leaf: Any) -> str:
    """How what is in some object is looked into."""
    if isinstance(leaf, types.MappingProxyType):
        return "It is a read-only view of a dict: pass on dict(...) of it"
    if type(leaf).__name__.endswith("Cache"):  # as those of models in transformers
        return f"Where nobody reads it, call the model with use_cache=False. {WAY_OUT}"
    return "Pass on a list of what is in it" if isinstance(leaf, _IN_LISTS) else WAY_OUT


def is_consumed_by_looking(leaf: Any) -> bool:
    """Tell whether an object is a generator or another iterator over what is in memory: not a file."""
    return isinstance(leaf, Iterator) and not isinstance(leaf, io.IOBase)


_IN_LISTS = (set, frozenset, ValuesView, ItemsView)

WAY_OUT = (
    "Register the type, by torch.utils._pytree.register_pytree_node or optree.register_pytree_node "
    '(namespace "funcstage"), or make it a dataclass'
)
"""How a type becomes one that is looked into."""
