"""Signatures: everything that a trace depends on, so that none is ever used where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from funcstage import trees
from funcstage._torch import tracing as tt
from funcstage._torch.tensors import OF_DYNAMO
from funcstage.dtensors import Specs
from funcstage.engines.base import StageCall
from funcstage.engines.graph.reads import Reads, Said, Watch
from funcstage.engines.graph.sizes import Inside, Open, Sizes, strides_of
from funcstage.errors import TraceError
from funcstage.state.ambient import AmbientState
from funcstage.state.content import MARK, content, is_plain
from funcstage.state.module import Fingerprint


class Signature(NamedTuple):
    """What a trace was specialised to. The fields' names serve as reasons for a retrace."""

    structure: optree.PyTreeSpec
    leaves: tuple[Hashable, ...]
    argnums: tuple[int, ...] | None
    module: tuple[Hashable, ...]
    ambient: AmbientState
    sharding: tuple[Hashable, ...] = ()
    outside: Said = ()
    sizes: Sizes | None = None
    same: tuple[int, ...] = ()
    notes: tuple[Hashable, ...] = ()


def signature_of(call: StageCall, module: Fingerprint, open_dims: Open) -> Signature:
    """Compute the signature of a call.

    Args:
        call: that.
        module: of the modules behind the stage function.
        open_dims: those whose sizes are no part of it, by the place of the leaf.

    Raises:
        TraceError: if a leaf can be no part of a signature.
    """
    (leaves, specs), structure, diff = call.local, call.whole[1], call.diff
    argnums = None if diff is None else tuple(diff)
    found: list[Hashable] = []
    try:
        found += map(_leaf, leaves)
        for i, dims in open_dims.items():
            found[i] = _with_open(leaves[i], dims)
    except _UnfitError as error:
        name = _name(structure, next(i for i, leaf in enumerate(leaves) if _is_unfit(leaf)))
        raise TraceError(f"{name} is {error}") from None
    ambient = AmbientState.now(differentiated=diff is not None)
    same = _repeated(call)
    sharding, notes = sharding_of(specs), notes_on(call)
    return Signature(
        structure, tuple(found), argnums, module.read(), ambient, sharding, same=same, notes=notes
    )


def _repeated(call: StageCall) -> tuple[int, ...]:
    """Which arguments are the same tensor as one before, or as one of the state: for each the place of that.

    Empty where all differ.
    """
    twins = call.twins
    if not twins.repeated:
        return ()
    (params, _), (buffers, _) = call.flat[:2]
    held: Any = getattr(call.apply, "held", tuple)()
    leaves = [*held, *params, *buffers, *twins.given]
    ids = [twins.own.get(id(leaf), id(leaf)) for leaf in leaves if leaf is not None]
    return tuple(map(ids.index, ids))


def notes_on(call: StageCall) -> tuple[Hashable, ...]:
    """The classes and attributes of arguments that are tensors, where they are no plain ones without any."""
    return tuple(
        (
            i,
            type(leaf),
            *((name, content(value, set()) if is_plain(value) else type(value)) for name, value in said),
        )
        for i, leaf in enumerate(call.argument_leaves)
        if isinstance(leaf, Tensor) and ((said := _said_on(leaf)) or type(leaf) is not Tensor)
    )


def refuse_notes(call: StageCall, is_loaded: Callable[[str], bool]) -> None:
    """Refuse attributes of tensors among the arguments that a stage may read and that cannot be compared.

    Raises:
        TraceError: names the first of them.
    """
    for leaf in call.argument_leaves:
        for name, value in _said_on(leaf) if isinstance(leaf, Tensor) else ():
            if not is_plain(value) and is_loaded(name):
                raise TraceError(
                    f"{call.name} may read {name!r} of an argument ({trees.describe(leaf)}), an attribute of "
                    f"type {type(value).__qualname__}: a compiled stage would go on with that of the first "
                    "call. Pass it as an argument of its own."
                )


def _said_on(tensor: Tensor) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in tensor.__dict__.items() if not name.startswith(OF_DYNAMO)]


def sharding_of(specs: Specs) -> tuple[Hashable, ...]:
    """What a graph knows of DTensors: also the groups of their meshes, which it calls by name."""
    if not specs:
        return ()
    from funcstage._torch.dtensor import groups_of

    return tuple((i, spec, groups_of(spec)) for i, spec in specs.items())


def others_among(leaves: Sequence[Any], structure: optree.PyTreeSpec) -> list[tuple[str, Any]]:
    """The leaves of a call that are no tensors, under their names."""
    return [(_name(structure, i), leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]


class Recent:
    """Recognises calls of one signature several times faster than computing theirs would be.

    Calls follow each other with the same shapes: the tensors are compared in one step with those of a
    call whose programs are known. Whatever is not recognised may have that signature nevertheless.

    Args:
        call: that.
        module: the fingerprint of the module behind the stage function.
        reads: what the trace has read elsewhere.
        open_dims: those whose sizes it has left open, by the place of the leaf.
        sizes: what it has assumed of these.
    """

    def __init__(
        self, call: StageCall, module: Fingerprint, reads: Reads, open_dims: Open, sizes: Sizes | None
    ) -> None:
        (leaves, self._specs), diff = call.local, call.diff
        self._structures = [structure for _, structure in call.flat]
        self._diff = diff
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._kinds = [type(leaves[i]) for i in self._tensors]
        self._others = [(i, _leaf(leaf)) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        place = {i: k for k, i in enumerate(self._tensors)}
        self._sizes = sizes
        self._strides = [(place[i], strides_of(leaves[i])) for i in open_dims] if sizes is not None else []
        self._are_alike = tt.comparison(
            [leaves[i] for i in self._tensors], {place[i]: dims for i, dims in open_dims.items()}
        )
        self._same, self._notes = _repeated(call), notes_on(call)
        self._glance = module.glance()
        self._ambient = AmbientState.now(diff is not None)
        self._watch = Watch(reads)

    def match(self, call: StageCall, module: Fingerprint) -> list[Tensor] | None:
        """Return the call's tensors if it has the signature, else `None`."""
        leaves, specs = call.local
        structures = [structure for _, structure in call.flat]
        if call.diff != self._diff or structures != self._structures:
            return None
        if (specs or self._specs) and not self._alike(specs):
            return None
        tensors = [leaves[i] for i in self._tensors] if self._others else leaves
        if [*map(type, tensors)] != self._kinds:
            return None
        if any(map(_is_nested, tensors)):  # which ends the process where strides are compared
            return None
        if _repeated(call) != self._same or notes_on(call) != self._notes:
            return None
        if not self._are_alike(*tensors) or any(
            isinstance(leaves[i], Tensor) or _leaf(leaves[i]) != other for i, other in self._others
        ):
            return None
        if self._sizes is not None and not (
            self._sizes.admit(tensors) and all(strides_of(tensors[i]) == rule for i, rule in self._strides)
        ):
            return None
        unchanged = self._ambient == AmbientState.now(call.diff is not None) and self._glance.agrees(
            module.glance()
        )
        return tensors if unchanged and self._watch.unchanged() else None

    def _alike(self, specs: Specs) -> bool:
        known = self._specs
        # Meshes that are equal may have other groups.
        return specs.keys() == known.keys() and all(
            spec is known[i] or (spec.mesh is known[i].mesh and spec == known[i]) for i, spec in specs.items()
        )


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
        for i, (a, b) in enumerate(zip(old.leaves, new.leaves, strict=True)):
            if a != b:
                yield f"{_name(new.structure, i)}: {a} -> {b}"
                break
    if old.structure == new.structure and old.sharding != new.sharding:
        yield f"placements or meshes of DTensors {old.sharding} -> {new.sharding}"
    if old.notes != new.notes:
        yield f"attributes of arguments {old.notes} -> {new.notes}"
    was, now = dict(old.outside), dict(new.outside)
    for label in was.keys() & now.keys():
        if was[label] != now[label]:
            yield f"{label}: {was[label]} -> {now[label]}"


def changed(before: Signature, traced: Signature, after: Signature) -> bool:
    """Tell whether a trace has changed something that its signature is made of, and could not undo that.

    Tensors that were kept on the module by an earlier call and are read now are told apart from then on.
    """
    pairs = ((before.leaves, after.leaves), (before.module, after.module), (traced.outside, after.outside))
    return not all(_alike(*pair) for pair in pairs)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and one[:1] == (MARK,):
        return True
    if type(one) is tuple and type(other) is tuple:
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def varied(old: Signature, new: Signature, n_state: int) -> Open:
    """Which dimensions of arguments differ in size; empty where anything else differs."""
    same = (old.structure, old.argnums, old.module, old.ambient) == (
        new.structure,
        new.argnums,
        new.module,
        new.ambient,
    )
    found: dict[int, tuple[int, ...]] = {}
    for i, (before, after) in enumerate(zip(old.leaves, new.leaves, strict=True) if same else ()):
        if before == after:
            continue
        if i < n_state or not (isinstance(before, OfTensor) and isinstance(after, OfTensor)):
            return {}
        if before[2:] != after[2:] or len(before.shape) != len(after.shape):
            return {}
        sizes = enumerate(zip(before.shape, after.shape, strict=True))
        found[i] = tuple(dim for dim, (a, b) in sizes if a != b and a is not None and b is not None)
    return {i: dims for i, dims in found.items() if dims}


class OfTensor(NamedTuple):
    """What a trace is specialised to of a tensor; open sizes are None."""

    shape: tuple[int | None, ...]
    strides: tuple[int | Inside, ...]
    dtype: torch.dtype
    device: torch.device
    is_conj: bool
    is_neg: bool

    def __repr__(self) -> str:
        shape = ", ".join("any" if size is None else str(size) for size in self.shape)
        bits = (" conjugated" if self.is_conj else "") + (" negated" if self.is_neg else "")
        return (
            f"{str(self.dtype).removeprefix('torch.')}[{shape}]{bits}, strides {self.strides}, {self.device}"
        )


_OR = ", or try the uncompiled `apply`."


class _UnfitError(Exception):
    """Why a leaf can be no part of a signature, and what to pass in its place."""


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if is_lazy(leaf):
            raise _UnfitError(f"lazy and not yet initialised. Call the module that it belongs to once{_OR}")
        if leaf.is_nested:
            raise _UnfitError(
                f"a nested tensor, which cannot be traced. Pass dense ones, padded with a mask{_OR}"
            )
        if leaf.layout is not torch.strided:
            layout = str(leaf.layout).removeprefix("torch.")
            # Of the sparse layouts, torch.func takes that by coordinates alone.
            convert = "" if layout == "sparse_coo" else "tensor.to_sparse_coo() and "
            raise _UnfitError(
                f"a {layout} tensor, which cannot be traced. Pass tensor.to_dense(), or try {convert}the "
                "uncompiled `apply`."
            )
        if leaf.is_quantized or tt.has_no_memory_of_its_own(leaf):
            raise _UnfitError(
                f"a {type(leaf).__name__} ({trees.describe(leaf)}) that programs cannot read, as it is "
                f"quantized or wraps another tensor. Pass a plain tensor{_OR}"
            )
        return OfTensor(leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.is_conj(), leaf.is_neg())
    return content(leaf, set())


def _with_open(leaf: Tensor, dims: Sequence[int]) -> OfTensor:
    found = _leaf(leaf)
    assert isinstance(found, OfTensor)
    shape = tuple(None if dim in dims else size for dim, size in enumerate(leaf.shape))
    return found._replace(shape=shape, strides=tuple(strides_of(leaf)))


def _is_unfit(leaf: Any) -> bool:
    try:
        _leaf(leaf)
    except _UnfitError:
        return True
    return False


def _name(structure: optree.PyTreeSpec, i: int) -> str:
    accessor = structure.accessors()[i]
    return accessor[1:].codify(("params", "buffers", "args", "kwargs")[accessor.path[0]])


_is_nested = attrgetter("is_nested")
