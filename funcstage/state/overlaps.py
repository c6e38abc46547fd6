"""Leaves of a call that share memory: what is written into one, eager's caller sees in the others.

A stage writes into copies, so that its other leaves would not see it. Nothing is compared unless it has
written into something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcstage._torch import functorch as ft
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import is_functional, memory_of, was_written
from funcstage.errors import PurityError
from funcstage.state.writes import local_part, memory_key, versions
from funcstage.trees import PyTree, describe, flatten


class _Memory(NamedTuple):
    """Where a tensor lies: its first byte, the one after its last, and its geometry in bytes."""

    start: int
    end: int
    dims: tuple[tuple[int, int], ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory | None:
        """None for what has no memory of its own that could be told: fake, sparse and empty tensors."""
        tensor = local_part(ft.innermost(tensor))
        if tensor.layout is not torch.strided:
            return None
        try:
            start, strides = tensor.data_ptr(), tensor.stride()
        except RuntimeError:
            return None
        size, sizes = tensor.element_size(), zip(strides, tensor.shape, strict=True)
        dims = tuple(sorted(((stride * size, n) for stride, n in sizes if n > 1), reverse=True))
        end = start + size + sum(stride * (n - 1) for stride, n in dims)
        return cls(start, end, dims, size) if start else None

    def meets(self, other: _Memory) -> bool:
        """Tell whether they have a byte in common; where that is hard to tell, that they may."""
        if self.end <= other.start or other.end <= self.start:
            return False
        alike = self.dims == other.dims and self.itemsize == other.itemsize
        return not (alike and self._is_nested()) or _meets(other.start - self.start, self.dims, self.itemsize)

    def _is_nested(self) -> bool:
        """Tell whether each step leads past all that lies within the next one's, as in parts of a tensor."""
        inner = self.itemsize
        for stride, n in reversed(self.dims):
            if stride < inner:
                return False
            inner = stride * n
        return True


def _meets(distance: int, dims: Sequence[tuple[int, int]], size: int) -> bool:
    if not dims:
        return abs(distance) < size
    (stride, n), *rest = dims
    steps = {min(max(distance // stride + more, 1 - n), n - 1) for more in (0, 1)}
    return any(_meets(distance - step * stride, rest, size) for step in steps)


def sharing(
    tensors: Iterable[Tensor], others: Iterable[Any], key: Callable[[Tensor], int] = memory_key
) -> tuple[Tensor, Tensor] | None:
    """Return one of some tensors with one of others that has memory in common with it, if any has.

    `key` tells their storages apart.
    """
    with without_torch_function():
        lying: dict[int, list[Tensor]] = {}
        for other in others:
            if isinstance(other, Tensor):
                lying.setdefault(key(other), []).append(other)
        for tensor in tensors:
            for other in lying.get(key(tensor), ()):
                first, second = _Memory.of(tensor), _Memory.of(other)
                if first is not None and second is not None and first.meets(second):
                    return tensor, other
    return None


def names_that_share(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names of tensors to another's with which they have memory in common, where there is one."""
    with without_torch_function():
        lying = [(memory, name) for name, tensor in tensors.items() if (memory := _Memory.of(tensor))]
    found: dict[str, str] = {}
    before: list[tuple[_Memory, str]] = []
    for memory, name in sorted(lying):
        before = [(m, n) for m, n in before if m.end > memory.start]
        for other, of_other in before:
            if other.meets(memory) and tensors[name] is not tensors[of_other]:
                found |= {name: of_other, of_other: name}
        before.append((memory, name))
    return found


def refuse_written_buffers(
    owner: str,
    copies: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    held: Callable[[], Mapping[str, Any]],
    twins: Mapping[str, str],
    given: PyTree,
) -> None:
    """Refuse a forward that has written in place into a buffer whose memory another or an argument shares.

    Within a trace it is noted for `noting_written` instead, as the tensors have no memory.

    Args:
        owner: the stage's name.
        copies: those of the buffers, that it was given to write into.
        buffers: what they are copies of.
        held: tells what its module holds in their places.
        twins: names of buffers, with another's that has memory in common.
        given: its arguments.

    Raises:
        PurityError: names the buffer.
    """
    counts = versions([*copies.values()])
    written = [name for name, count in zip(copies, counts, strict=True) if count]
    unsure = {name: copy for name, copy in copies.items() if copy.dim() == 1 and name not in written}
    leaves = flatten(given)[0] if unsure or written else []
    if unsure:
        written += _written_statistics(unsure, buffers, held, leaves)
    if not written:
        return
    if (name := next(filter(twins.get, written), None)) is not None:
        raise PurityError(
            f"{owner} writes in place into its buffer {name!r}, with which {twins[name]!r} shares memory. "
            "The stage writes into a copy, so that the other would not see what is written, as it does in "
            f"eager. Make the view in the forward, instead of keeping it as {twins[name]!r}."
        )
    if any(is_functional(buffers[name]) for name in written):
        _current.noted += [buffers[name] for name in written]
        return
    of_module = held()
    for name in written:
        own = [tensor for tensor in (buffers[name], of_module.get(name)) if isinstance(tensor, Tensor)]
        if (found := sharing(own, leaves)) is not None:
            raise refusal(owner, f"its buffer {name!r}", found[1])


def _written_statistics(
    copies: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    held: Callable[[], Mapping[str, Any]],
    leaves: Sequence[Any],
) -> list[str]:
    """Names of statistics of norms that were written, which the kernels of norms do not count.

    In a trace all that were; otherwise of those alone that have memory in common with other leaves.
    """
    if any(is_functional(buffer) for buffer in buffers.values()):
        return [name for name, copy in copies.items() if is_functional(copy) and was_written(copy)]
    with without_torch_function():
        keys = {memory_key(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        of_module = held() if keys else {}
        lying = (tensor for name in copies for tensor in (buffers[name], of_module.get(name)))
        if keys.isdisjoint(memory_key(tensor) for tensor in lying if isinstance(tensor, Tensor)):
            return []
        pairs = {name: (ft.innermost(copy), ft.innermost(buffers[name])) for name, copy in copies.items()}
        return [name for name, (now, before) in pairs.items() if not torch.equal(now, before)]


def refuse_written(
    owner: str,
    written: Mapping[int, Sequence[int]],
    tensors: Sequence[Tensor],
    n_args: int,
    names: Callable[[], Sequence[str]],
) -> None:
    """Refuse a call of a program that writes in place into copies of leaves whose memory others share.

    Args:
        owner: the stage's name.
        written: numbers of those leaves, with those that the trace has taken for the same.
        tensors: the leaves.
        n_args: how many of them, at the end, are arguments.
        names: tells what they are called.

    Raises:
        PurityError: names the leaf.
    """
    start = len(tensors) - n_args
    # State that has memory in common is the module's matter, and the same in each call.
    of_state = [tensors[i] for i in written if i < start]
    found = [sharing(of_state, tensors[start:], memory_of)] if of_state else []
    for i, same in written.items():
        if i >= start:
            others = (tensor for k, tensor in enumerate(tensors) if k not in same)
            found.append(sharing([tensors[i]], others, memory_of))
    for one, other in filter(None, found):
        i = next(i for i in written if tensors[i] is one)
        raise refusal(owner, names()[i], other)


def refuse_overwritten(argument: Tensor, given: Mapping[str, PyTree], stand_ins: Sequence[Any]) -> None:
    """Refuse to overwrite a copy of an argument whose memory another leaf shares.

    Args:
        argument: as the forward was handed it.
        given: what the caller owns, by kind, the arguments last.
        stand_ins: what the forward was handed for these.

    Raises:
        PurityError: describes the argument.
    """
    leaves = [leaf for tree in given.values() for leaf in flatten(tree)[0]]
    of_state = [None] * (len(leaves) - len(stand_ins))
    handed = zip(leaves, (*of_state, *stand_ins), strict=True)
    found = sharing([argument], (leaf for leaf, stand_in in handed if stand_in is not argument))
    if found is not None:
        raise refusal("The stage", f"an argument ({describe(argument)})", found[1])


def refusal(owner: str, written: str, other: Tensor) -> PurityError:
    """The refusal of a write into one leaf that the caller sees in another."""
    return PurityError(
        f"{owner} writes in place into {written}, which it was handed as another argument as well, itself or "
        f"a view of it ({describe(other)}). To the caller they are one memory, but the stage writes into a "
        "copy, and the other would not see what is written. Pass a clone, or let the forward make the view "
        "itself."
    )


@contextmanager
def noting_written() -> Iterator[list[Tensor]]:
    """Collect the buffers, as a trace's function was handed them, into whose copies it has written."""
    around, _current.noted = _current.noted, []
    try:
        yield _current.noted
    finally:
        _current.noted = around


class _Current(threading.local):
    def __init__(self) -> None:
        self.noted: list[Tensor] = []


_current = _Current()
