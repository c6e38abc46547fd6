"""Writes in place after F: what a pullback will read again, with the versions that it had.

Torch counts the writes into every tensor, and autograd compares before it reads what it has saved. What the
levels and the programs read it does not see. So a pullback notes the versions of what its caller holds: the
leaves that F was given and has returned, the cotangents, and the input gradients. As long as the versions are
the same nothing was written, which is all that a call looks at as a rule. Otherwise the tape lists what it is
about to read, and only a write into that is refused: who updates what nobody reads any more is left alone.

As in eager, nobody notices writes through `tensor.data`, those of fused optimizers, and any into a tensor
that was made in inference mode: torch does not count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, NamedTuple, Protocol
from weakref import ref

import optree
import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.tensors import is_functionalized, memory_key_of, version_of
from funcstage.errors import WrittenError
from funcstage.residuals import SavedAndWritten
from funcstage.trees import PyTree

_version = attrgetter("_version")


class _Other(NamedTuple):
    """What is remembered of a tensor that is not kept alive."""

    itself: ref[Tensor]
    memory: ref[torch.UntypedStorage] | None
    dtype: torch.dtype
    shape: torch.Size


class Part(NamedTuple):
    """Leaves of one tree; those that are no tensors are not looked at.

    Attributes:
        root: what the tree is called.
        leaves: its leaves.
        spec: its structure.
    """

    root: str
    leaves: Sequence[Any]
    spec: optree.PyTreeSpec

    @classmethod
    def of(cls, root: str, tree: PyTree) -> Part:
        return cls(root, *trees.flatten(tree))


class Watch:
    """Tensors of the caller's, with the versions that they have now.

    Args:
        held: those that the tape keeps alive anyway.
        others: those that it does not; nor does this.
        names: tells their names in that order, when asked.
    """

    __slots__ = ("_counters", "_held", "_inner", "_names", "_others", "_unswappable", "_versions")

    def __init__(
        self, held: Sequence[Tensor], others: Iterable[Tensor], names: Callable[[], Sequence[str]]
    ) -> None:
        self._held = len(held)
        self._unswappable = [*map(ref, held)]  # torch.utils.swap_tensors refuses what has weak references
        self._counters = list(held)
        self._names = names
        self._others: list[_Other] = []
        transformed = ft.current_level() > 0
        for tensor in others:
            self._counters.append(_stand_in(tensor, transformed))
            self._others.append(_Other(ref(tensor), _memory_of(tensor), tensor.dtype, tensor.shape))
        # What a DTensor has on this rank counts its own writes.
        self._inner = [i for i, tensor in enumerate(self._counters) if type(tensor) not in _PLAIN]
        self._counters += [_stand_in(local_part(self._counters[i]), transformed) for i in self._inner]
        self._versions = versions(self._counters)

    @classmethod
    def over(cls, held: Sequence[Part], others: Sequence[Part], only: Sequence[int] | None = None) -> Watch:
        """A watch over the tensors of some trees, or over only some of those that are not held, by number."""
        given = [leaf for part in held for leaf in part.leaves]
        kept = [i for i, leaf in enumerate(given) if isinstance(leaf, Tensor)]
        rest = [leaf for part in others for leaf in part.leaves]
        if only is None:
            only = [i for i, leaf in enumerate(rest) if isinstance(leaf, Tensor)]
        roots, n_given = [(part.root, part.spec) for part in (*held, *others)], len(given)

        def names() -> list[str]:
            found = [name for root, spec in roots for name in trees.leaf_names(spec, root)]
            return [*(found[i] for i in kept), *(found[n_given + i] for i in only)]

        return cls([given[i] for i in kept], [rest[i] for i in only], names)

    def written(self, reads: Callable[[], Iterable[Tensor]]) -> str | None:
        """Name a tensor that was written into and is among what `reads` lists; None as a rule."""
        now = versions(self._counters)
        if now == self._versions:
            return None
        changed = self._changed(now)
        try:
            keys = {memory_key(tensor) for tensor in reads()}
        except SavedAndWritten:  # by autograd, which does not say of what
            return " or ".join(map(self._described, changed))
        return next((self._described(i) for i in changed if not keys.isdisjoint(self._keys(i))), None)

    def within(self, memory: Sequence[Tensor]) -> Watching:
        """A watch over those alone that have memory in common with some tensors, whatever is read."""
        keys = {memory_key(tensor) for tensor in memory}
        n = len(self._counters) - len(self._inner)
        return _Within(self, {i for i in range(n) if not keys.isdisjoint(self._keys(i))})

    def _changed(self, now: Sequence[int]) -> list[int]:
        n = len(now) - len(self._inner)
        found = [i for i, before in enumerate(self._versions) if now[i] != before]
        return [i if i < n else self._inner[i - n] for i in found]

    def _keys(self, i: int) -> Iterator[int]:
        """The memory that a tensor had, if it is not free by now, and what it has since `Tensor.set_`."""
        other = None if i < self._held else self._others[i - self._held]
        if other is None or other.memory is None:
            yield memory_key(self._counters[i])
            return
        if (storage := other.memory()) is not None:
            yield memory_key_of(storage)
        if (tensor := other.itself()) is not None:
            yield memory_key(tensor)

    def _described(self, i: int) -> str:
        like: Any = self._counters[i] if i < self._held else self._others[i - self._held]
        return f"{self._names()[i]} ({trees.look(like)})"


class _Within(NamedTuple):
    """Some of what is watched."""

    watch: Watch
    only: set[int]

    def written(self, reads: Callable[[], Iterable[Tensor]]) -> str | None:
        changed = self.watch._changed(versions(self.watch._counters))
        return next((self.watch._described(i) for i in changed if i in self.only), None)

    def within(self, memory: Sequence[Tensor]) -> Watching:
        return self


class Watching(Protocol):
    """A watch over what I or W may read."""

    def written(self, reads: Callable[[], Iterable[Tensor]]) -> str | None: ...
    def within(self, memory: Sequence[Tensor]) -> Watching: ...


def refuse_written(
    watches: Iterable[Watching], reads: Callable[[], Iterable[Tensor]], stage: str, phase: str
) -> None:
    """Refuse to run a phase that reads what was written into.

    Args:
        watches: over what may be read.
        reads: lists what will be.
        stage: its name.
        phase: "I" or "W".

    Raises:
        WrittenError: naming one leaf.
    """
    for watch in watches:
        name = watch.written(reads)
        if name is not None:
            raise written_error(name, stage, phase)


def written_error(name: str, stage: str, phase: str) -> WrittenError:
    """The refusal of a phase that would read this leaf."""
    return WrittenError(
        f"{name} of {stage} was written in place after F or I had used it. {phase} reads it again, so its "
        f"gradients would be wrong. Run {phase} before the write, give the stage a clone of that tensor, or "
        "write into a clone."
    )


def versions(leaves: Sequence[Any]) -> list[int]:
    """How often each tensor was written into; 0 for what is none, or does not count."""
    try:
        return list(map(_version, leaves))
    except (AttributeError, RuntimeError):  # None, inference tensors
        return [
            version_of(leaf) if isinstance(leaf, Tensor) and not leaf.is_inference() else 0 for leaf in leaves
        ]


def memory_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return ft.storage_key(local_part(tensor))


def local_part(tensor: Tensor) -> Tensor:
    """What a DTensor, or the pending result of a collective, keeps on this rank."""
    if type(tensor) in _PLAIN:
        return tensor
    tensor = getattr(tensor, "_local_tensor", tensor)
    return getattr(tensor, "elem", tensor) if type(tensor) not in _PLAIN else tensor


def _stand_in(tensor: Tensor, transformed: bool) -> Tensor:
    """A tensor with the version counter of another, and none of its memory where that can be."""
    alias = tensor.detach()
    if not (transformed or type(tensor) not in _PLAIN or is_functionalized(tensor)):
        with _UNLESS_REFUSED:  # sparse tensors and some others have to be kept
            alias.data = _NOTHING
    return alias


def _memory_of(tensor: Tensor) -> ref[torch.UntypedStorage] | None:
    """What tells a tensor's memory from all other, without keeping its contents."""
    inner = ft.innermost(tensor if type(tensor) in _PLAIN else local_part(tensor))
    if inner.layout is not torch.strided:
        return None
    return ref(inner.untyped_storage())


_NOTHING = torch.empty(0)
_UNLESS_REFUSED = suppress(RuntimeError)
_PLAIN = (Tensor, torch.nn.Parameter)
