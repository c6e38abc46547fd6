"""Signatures: everything that a trace depends on, so that none is ever used where it does not hold."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcstage import trees
from funcstage.errors import TraceError
from funcstage.graph import _torch as tt
from funcstage.kept import MARK
from funcstage.registration import attributes_of


class Surroundings(NamedTuple):
    """What a trace depends on beside the arguments of the call."""

    module: tuple[Hashable, ...]
    autocast: tuple[Hashable, ...]
    grad_mode: bool
    flags: tuple[Hashable, ...]

    @classmethod
    def now(cls, module: ModuleState | None, differentiated: bool) -> Surroundings:
        """Read them; what is differentiated is traced with gradients on, whatever the caller's mode."""
        state = () if module is None else module.read()
        autocast = tt.autocast_state() if tt.is_any_autocast_enabled() else ()
        return cls(state, autocast, differentiated or torch.is_grad_enabled(), tt.global_flags())


class Signature(NamedTuple):
    """What a trace was specialised to. The fields' names serve as reasons for a retrace."""

    structure: optree.PyTreeSpec
    leaves: tuple[Hashable, ...]
    argnums: tuple[int, ...] | None
    surroundings: Surroundings


def signature_of(
    leaves: Sequence[Any], structure: optree.PyTreeSpec, diff: Sequence[int] | None, module: ModuleState
) -> Signature:
    """Compute the signature of a call.

    Args:
        leaves: all leaves of (params, buffers, args, kwargs).
        structure: of the same.
        diff: indices of the differentiated leaves of args; `None` for the forward alone.
        module: the state of the module behind the stage function.

    Raises:
        TraceError: if a leaf can be no part of a signature.
    """
    argnums = None if diff is None else tuple(diff)
    found: list[Hashable] = []
    try:
        found += map(_leaf, leaves)
    except _UnfitError as error:
        name = _name(structure, next(i for i, leaf in enumerate(leaves) if _is_unfit(leaf)))
        raise TraceError(f"{name} is {error}, or try the uncompiled `apply`.") from None
    return Signature(structure, tuple(found), argnums, Surroundings.now(module, diff is not None))


class Recent:
    """Recognises calls of one signature several times faster than computing theirs would be.

    Calls follow each other with the same shapes: the tensors are compared in one step with those of a
    call whose programs are known. Whatever is not recognised may have that signature nevertheless.

    Args:
        leaves, structure, diff, module: the call, as for `signature_of`.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        structure: optree.PyTreeSpec,
        diff: Sequence[int] | None,
        module: ModuleState,
    ) -> None:
        self._structure = structure
        self._diff = diff
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others = [(i, _leaf(leaf)) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        self._are_alike = tt.comparison([leaves[i] for i in self._tensors])
        self._glance = module.glance()
        self._outside = Surroundings.now(None, diff is not None)

    def match(
        self,
        leaves: Sequence[Any],
        structure: optree.PyTreeSpec,
        diff: Sequence[int] | None,
        module: ModuleState,
    ) -> list[Tensor] | None:
        """Return the call's tensors if it has the signature, else `None`."""
        if diff != self._diff or structure != self._structure:
            return None
        tensors = [leaves[i] for i in self._tensors]
        if any(map(_is_nested, tensors)):  # which ends the process where strides are compared
            return None
        if not self._are_alike(*tensors) or any(
            _is_unfit(leaves[i]) or _leaf(leaves[i]) != other for i, other in self._others
        ):
            return None
        unchanged = self._outside == Surroundings.now(None, diff is not None) and self._glance.agrees(
            module.glance()
        )
        return tensors if unchanged else None


def reasons(old: Signature, new: Signature) -> Iterator[str]:
    """Say in which respects two signatures differ."""
    fields = (*Signature._fields[:-1], *Surroundings._fields)
    pairs = zip((*old[:-1], *old.surroundings), (*new[:-1], *new.surroundings), strict=True)
    for field, (before, after) in zip(fields, pairs, strict=True):
        if before == after or (field == "leaves" and old.structure != new.structure):
            continue
        if field != "leaves":
            yield field if field == "structure" else f"{field} {before} -> {after}"
            continue
        names = trees.leaf_names(new.structure, "")
        for name, a, b in zip(names, old.leaves, new.leaves, strict=True):
            if a != b:
                yield f"{name}: {a} -> {b}"
                break


class _UnfitError(Exception):
    """Why a leaf can be no part of a signature, and what to pass in its place."""


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if is_lazy(leaf):
            raise _UnfitError("lazy and not yet initialised. Call the module that it belongs to once")
        if leaf.is_nested or leaf.layout is not torch.strided:
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            raise _UnfitError(f"a {kind} tensor, which cannot be traced. Pass dense ones, padded with a mask")
        if leaf.is_quantized or tt.has_no_memory_of_its_own(leaf):
            raise _UnfitError(
                f"a {type(leaf).__name__} ({trees.describe(leaf)}) that programs cannot read, as it is "
                "quantized or wraps another tensor. Pass a plain tensor"
            )
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.is_conj(), leaf.is_neg()
    try:
        hash(leaf)
    except TypeError:
        if dataclasses.is_dataclass(leaf):
            fields = attributes_of(leaf)
            values, structure = trees.flatten([*fields.values()])
            return type(leaf), tuple(fields), structure, *map(_leaf, values)
        raise _UnfitError(
            f"of type {type(leaf).__name__}, neither a tensor nor hashable, so that a later change of it "
            "would go unnoticed. Pass its tensors instead"
        ) from None
    return _exactly(leaf)


def _is_unfit(leaf: Any) -> bool:
    try:
        _leaf(leaf)
    except _UnfitError:
        return True
    return False


def _is_nested(leaf: Any) -> bool:
    return getattr(leaf, "is_nested", False)


def _name(structure: optree.PyTreeSpec, i: int) -> str:
    accessor = structure.accessors()[i]
    return accessor[1:].codify(("params", "buffers", "args", "kwargs")[accessor.path[0]])


def _exactly(value: Hashable) -> Hashable:
    """Tell what compares equal but is not the same: 1 and True, 0.0 and -0.0."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


class ModuleState:
    """Reads what a module's code may read of it besides its parameters and buffers.

    Modes, submodules, hooks and attributes: plain values, containers and plain objects of these by their
    content, anything else (tensors, functions) by identity. What a module reads elsewhere, in globals or
    closures, is its own affair.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._collect()

    def read(self) -> tuple[Hashable, ...]:
        """What is to be compared by equality, in every detail."""
        self._collect()
        plain, rest = self.glance()
        seen = set(self._parts)
        return (*[_content(value, seen) for value in plain], *rest)

    def glance(self) -> Glance:
        """The same in a form that is made and compared faster, but not made to be kept."""
        sizes = [*map(len, self._namespaces)]
        if sizes != self._sizes:
            self._collect()
        seen = set(self._parts)
        others = [_content(namespace.get(name), seen) for namespace, name in self._others]
        try:
            plain = [value for namespace, reader in self._readers for value in reader(namespace)]
        except KeyError:  # one attribute in place of another
            self._collect()
            return self.glance()
        return Glance(plain, [*sizes, *chain.from_iterable(self._hooks), *others])

    def _collect(self) -> None:
        parts = [] if self._module is None else list(self._module.modules())
        self._parts = [id(part) for part in parts]
        self._namespaces = [space for part in parts for space in (vars(part), part._modules)]
        self._sizes = [*map(len, self._namespaces)]
        self._hooks = [getattr(part, kind) for part in parts for kind in _HOOKS]
        self._readers: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        for part in parts:
            attributes = vars(part)
            own = [name for name in attributes if name not in _OF_EVERY_MODULE]
            plain = [name for name in own if _is_plain(attributes[name])]
            if "training" in attributes:  # a compiled module has its original's
                plain.insert(0, "training")
            for namespace, names in ((attributes, plain), (part._modules, [*part._modules])):
                if names:  # the first one twice, as a getter of one item returns no tuple
                    self._readers.append((namespace, itemgetter(names[0], *names)))
            self._others += [(attributes, name) for name in own if name not in plain]


def _is_plain(value: object) -> bool:
    """Tell whether a value cannot change as long as it is the same object."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


class Glance(NamedTuple):
    """The state of a module.

    Attributes:
        plain: immutable values and modules, which are unchanged if they are the same objects.
        rest: what is compared by equality.
    """

    plain: list[Any]
    rest: list[Hashable]

    def agrees(self, other: Glance) -> bool:
        alike = len(self.plain) == len(other.plain) and all(map(operator.is_, self.plain, other.plain))
        return alike and self.rest == other.rest


class _Same:
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
        return isinstance(other, _Same) and mine is not None and mine is other._ref()


def _content(value: Any, seen: set[int]) -> Hashable:
    """What an attribute says; of what was `seen` in another place already, which one it is."""
    if isinstance(value, _PLAIN):
        return _exactly(value)
    if isinstance(value, Tensor) and hasattr(value, MARK):
        return MARK, _leaf(value)
    if id(value) in seen:
        return _Same(value)
    seen.add(id(value))
    if isinstance(value, (list, tuple)):
        return type(value), *[_content(item, seen) for item in value]
    if isinstance(value, dict):
        return type(value), *[(_content(k, seen), _content(item, seen)) for k, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_content(item, seen) for item in value)
    of_torch = type(value).__module__.startswith("torch.") and not isinstance(value, nn.Module)
    if of_torch or isinstance(value, (Tensor, type, FunctionType, ModuleType)):
        return _Same(value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside = [getattr(value, "__dict__", None), *[getattr(value, name, None) for name in slots]]
    return _Same(value), *[_content(part, seen) for part in inside]


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = set(vars(nn.Module()))
