"""Signatures: everything that a trace depends on, so that none is ever used where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage.errors import TraceError
from funcstage.graph import _torch as tt


class Surroundings(NamedTuple):
    """What a trace depends on beside the arguments of the call."""

    module: tuple[Hashable, ...]
    autocast: tuple[Hashable, ...]
    grad_mode: bool
    flags: tuple[Hashable, ...]

    @classmethod
    def now(cls, module: ModuleState) -> Surroundings:
        autocast = tt.autocast_state() if tt.is_any_autocast_enabled() else ()
        return cls(module.read(), autocast, torch.is_grad_enabled(), tt.global_flags())


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
    return Signature(structure, tuple([_leaf(leaf) for leaf in leaves]), argnums, Surroundings.now(module))


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
        self._surroundings = Surroundings.now(module)

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
        if not self._are_alike(*tensors) or any(_leaf(leaves[i]) != other for i, other in self._others):
            return None
        return tensors if Surroundings.now(module) == self._surroundings else None


def reasons(old: Signature, new: Signature) -> Iterator[str]:
    """Say in which respects two signatures differ."""
    fields = (*Signature._fields[:-1], *Surroundings._fields)
    pairs = zip((*old[:-1], *old.surroundings), (*new[:-1], *new.surroundings), strict=True)
    for field, (before, after) in zip(fields, pairs, strict=True):
        if before == after:
            continue
        if field != "leaves" or old.structure != new.structure:
            yield field if field == "structure" else f"{field} {before} -> {after}"
            continue
        names = trees.leaf_names(new.structure, "")
        for name, a, b in zip(names, old.leaves, new.leaves, strict=True):
            if a != b:
                yield f"{name}: {a} -> {b}"
                break


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            raise TraceError(f"A {leaf.layout} tensor cannot be traced. The uncompiled `apply` works.")
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.is_conj(), leaf.is_neg()
    try:
        hash(leaf)
    except TypeError:
        raise TraceError(
            f"An argument of type {type(leaf).__name__} is neither a tensor nor hashable, so a later change "
            "of it would go unnoticed. Pass its tensors instead, or use the uncompiled `apply`."
        ) from None
    return type(leaf), leaf  # as 1 == 1.0 == True


class ModuleState:
    """Reads what a module's code reads of it besides its tensors: modes, numbers, names, submodules.

    Attributes of other types (a list that the module appends to, a configuration object) are not read:
    a module that changes behaviour through those needs a new `compile`.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._readers: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str]] = []
        for part in () if module is None else module.modules():
            attributes = vars(part)
            names = [name for name, value in attributes.items() if _is_simple(name, value)]
            self._readers.append((attributes, itemgetter(*names, "training")))
            if part._modules:
                self._readers.append((part._modules, itemgetter(*part._modules)))
            self._tensors += [(attributes, name) for name, v in attributes.items() if isinstance(v, Tensor)]

    def read(self) -> tuple[Hashable, ...]:
        values = [reader(values) for values, reader in self._readers]
        return (*values, *[id(values.get(name)) for values, name in self._tensors])


def _is_simple(name: str, value: Any) -> bool:
    return name not in _INTERNAL and isinstance(
        value, (bool, int, float, complex, str, torch.dtype, torch.device, type(None))
    )


_INTERNAL = {"training", "_backward_hooks", "_parameters", "_buffers", "_modules"}
