"""Signatures: everything that a trace depends on, so that none is ever used where it does not hold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, call, itemgetter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcstage import trees
from funcstage._torch import tracing as tt
from funcstage.engines.graph.content import content, is_plain
from funcstage.engines.graph.reads import Reads, Said, Watch
from funcstage.errors import TraceError
from funcstage.state.ambient import AmbientState
from funcstage.state.parameter_hooks import any_hooked, held_in


class Signature(NamedTuple):
    """What a trace was specialised to. The fields' names serve as reasons for a retrace."""

    structure: optree.PyTreeSpec
    leaves: tuple[Hashable, ...]
    argnums: tuple[int, ...] | None
    module: tuple[Hashable, ...]
    ambient: AmbientState
    outside: Said = ()


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
    ambient = AmbientState.now(differentiated=diff is not None)
    return Signature(structure, tuple(found), argnums, module.read(), ambient)


def others_among(leaves: Sequence[Any], structure: optree.PyTreeSpec) -> list[tuple[str, Any]]:
    """The leaves of a call that are no tensors, under their names."""
    return [(_name(structure, i), leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]


class Recent:
    """Recognises calls of one signature several times faster than computing theirs would be.

    Calls follow each other with the same shapes: the tensors are compared in one step with those of a
    call whose programs are known. Whatever is not recognised may have that signature nevertheless.

    Args:
        leaves, structure, diff, module: the call, as for `signature_of`.
        reads: what the trace has read elsewhere.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        structure: optree.PyTreeSpec,
        diff: Sequence[int] | None,
        module: ModuleState,
        reads: Reads,
    ) -> None:
        self._structure = structure
        self._diff = diff
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._kinds = [type(leaves[i]) for i in self._tensors]
        self._others = [(i, _leaf(leaf)) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        self._are_alike = tt.comparison([leaves[i] for i in self._tensors])
        self._glance = module.glance()
        self._ambient = AmbientState.now(diff is not None)
        self._watch = Watch(reads)

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
        if [*map(type, tensors)] != self._kinds:
            return None
        if any(map(_is_nested, tensors)):  # which ends the process where strides are compared
            return None
        if not self._are_alike(*tensors) or any(
            isinstance(leaves[i], Tensor) or _leaf(leaves[i]) != other for i, other in self._others
        ):
            return None
        unchanged = self._ambient == AmbientState.now(diff is not None) and self._glance.agrees(
            module.glance()
        )
        return tensors if unchanged and self._watch.unchanged() else None


def reasons(old: Signature, new: Signature) -> Iterator[str]:
    """Say in which respects two signatures differ."""
    first, second = (
        dict(zip((*Signature._fields[:4], *AmbientState._fields), (*s[:4], *s.ambient), strict=True))
        for s in (old, new)
    )
    for field, before in first.items():
        after = second[field]
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
    was, now = dict(old.outside), dict(new.outside)
    for label in was.keys() & now.keys():
        if was[label] != now[label]:
            yield f"{label}: {was[label]} -> {now[label]}"


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
    return content(leaf, set())


def _is_unfit(leaf: Any) -> bool:
    try:
        _leaf(leaf)
    except _UnfitError:
        return True
    return False


def _name(structure: optree.PyTreeSpec, i: int) -> str:
    accessor = structure.accessors()[i]
    return accessor[1:].codify(("params", "buffers", "args", "kwargs")[accessor.path[0]])


class ModuleState:
    """Reads what a module's code may read of it besides its parameters and buffers.

    Classes, modes, submodules, hooks and attributes, by their content (`content.py`), and which parameters
    there are. What a module reads elsewhere, in globals or closures, is found out by tracing (`reads.py`).

    Args:
        modules: with all of their submodules.
        hooks: whether it matters that parameters have hooks.
    """

    def __init__(self, modules: Sequence[nn.Module], hooks: bool) -> None:
        self._modules = modules
        self._hooks_matter = hooks
        self._collect()

    def read(self) -> tuple[Hashable, ...]:
        """What is to be compared by equality, in every detail."""
        self._collect()
        plain, rest, _ = self.glance()
        seen = set(self._ids)
        there = [
            (type(part), *[name for name, parameter in part._parameters.items() if parameter is not None])
            for part in self._parts
        ]
        return (*[content(value, seen) for value in plain], *rest, *there)

    def glance(self) -> Glance:
        """The same in a form that is made and compared faster, but not made to be kept."""
        sizes = [*map(len, self._namespaces)]
        if sizes != self._sizes:
            self._collect()
        seen = set(self._ids)
        others = [content(namespace.get(name), seen) for namespace, name in self._others]
        try:
            plain = [*chain.from_iterable(map(call, self._readers))]
        except KeyError:  # one attribute in place of another
            self._collect()
            return self.glance()
        parameters = held_in(self._parameters)
        hooked = self._hooks_matter and any_hooked(parameters)
        kinds = [*map(type, self._parts), *map(type, parameters)]
        hooks = chain.from_iterable(self._hooks) if any(self._hooks) else ()
        return Glance(plain, [*sizes, *hooks, *others, hooked], kinds)

    def _collect(self) -> None:
        parts = [part for module in self._modules for part in module.modules()]
        self._parts, self._ids = parts, [*map(id, parts)]
        self._parameters = [part._parameters for part in parts if part._parameters]
        self._namespaces = [space for part in parts for space in (vars(part), part._modules)]
        self._sizes = [*map(len, self._namespaces)]
        self._hooks = [getattr(part, kind) for part in parts for kind in _HOOKS]
        self._readers: list[Callable[[], Any]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        for part in parts:
            attributes = vars(part)
            own = [name for name in attributes if name not in _OF_EVERY_MODULE]
            plain = [name for name in own if is_plain(attributes[name])]
            if "training" in attributes:  # a compiled module has its original's
                plain.insert(0, "training")
            for namespace, names in ((attributes, plain), (part._modules, [*part._modules])):
                if names:  # the first one twice, as a getter of one item returns no tuple
                    self._readers.append(partial(itemgetter(names[0], *names), namespace))
            self._others += [(attributes, name) for name in own if name not in plain]


class Glance(NamedTuple):
    """The state of a module.

    Attributes:
        plain: immutable values and modules, which are unchanged if they are the same objects.
        rest: what is compared by equality.
        kinds: the classes of the modules and of their parameters, None's among these.
    """

    plain: list[Any]
    rest: list[Hashable]
    kinds: list[type]

    def agrees(self, other: Glance) -> bool:
        alike = len(self.plain) == len(other.plain) and all(map(operator.is_, self.plain, other.plain))
        return alike and self.rest == other.rest and self.kinds == other.kinds


_is_nested = attrgetter("is_nested")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = set(vars(nn.Module()))
