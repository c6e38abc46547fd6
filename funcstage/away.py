"""Residuals that wait in host memory: what goes there, how it gets there, and how it comes back.

Copies run on streams of their own, beside what the device computes. Memory that several residuals share is
copied once, and they share it there, too.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcstage._torch import functorch as ft
from funcstage.state.writes import Watching

FAR = ("cuda",)
"""Devices whose memory is not the host's, and from which residuals are moved."""

_ALIGNED = 16  # bytes: what programs may assume of where a tensor begins, relative to its memory


class Away:
    """Where the residuals of a pullback are to be when it runs, and the copies that are on their way.

    Args:
        devices: of each residual; `None` for one that has stayed where it was.
        watches: over what was copied, which must not be written into while a copy may still run.
        sent: what to wait for before the host's copies are read.
    """

    __slots__ = ("_arriving", "_copies", "_devices", "_sent", "watches")

    def __init__(
        self,
        devices: Sequence[torch.device | None],
        watches: tuple[Watching, ...],
        sent: Sequence[torch.cuda.Event],
    ) -> None:
        self._devices, self.watches, self._sent = devices, watches, sent
        self._arriving: list[Tensor] | None = None
        self._copies: list[_Copies] = []

    def again(self) -> Away:
        """The same for a copy of the pullback, which brings its residuals back for itself."""
        return Away(self._devices, self.watches, self._sent)

    def settle(self) -> None:
        """Wait until the host may read its copies."""
        for event in self._sent:
            event.synchronize()

    def fetch(self, leaves: Sequence[Tensor]) -> None:
        """Begin to copy residuals back."""
        if self._arriving is not None:
            return
        arriving, started = [*leaves], []
        for device in dict.fromkeys(device for device in self._devices if device is not None):
            there = zip(self._devices, leaves, strict=True)
            here = [i for i, (d, leaf) in enumerate(there) if d == device and leaf.device.type == "cpu"]
            if device.type == "cuda":
                for event in self._sent:
                    _stream(device, "back").wait_event(event)
            copies = relocated([leaves[i] for i in here], functools.partial(_fetched, device=device))
            for i, copy in zip(here, copies, strict=True):
                arriving[i] = copy
            if device.type == "cuda":
                done = _stream(device, "back").record_event()
                started.append(_Copies(copies, torch.cuda.current_stream(device), done))
        self._arriving, self._copies = arriving, started

    def back(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The residuals where they are needed; what is computed from now on waits for the copies."""
        self.fetch(leaves)
        assert self._arriving is not None
        for tensors, owner, done in self._copies:
            stream = torch.cuda.current_stream(owner.device)
            stream.wait_event(done)
            for tensor in tensors if stream != owner else ():
                tensor.record_stream(stream)
        self._copies = []
        return self._arriving

    def __del__(self) -> None:
        for tensors, _, _ in self._copies:  # which nobody has waited for
            for tensor in tensors:
                tensor.record_stream(_stream(tensor.device, "back"))


class _Copies(NamedTuple):
    """Copies on their way to a device.

    Attributes:
        tensors: the copies.
        owner: the stream that their memory belongs to.
        done: when they have arrived.
    """

    tensors: list[Tensor]
    owner: torch.cuda.Stream
    done: torch.cuda.Event


class Sent(NamedTuple):
    """Residuals on their way to the host.

    Attributes:
        leaves: all of them, copies in place of those that were moved.
        moved: which were.
        events: what to wait for before the copies are read.
        leaving: what was moved, where it was, until one of the methods is called.
    """

    leaves: list[Tensor]
    moved: list[int]
    events: list[torch.cuda.Event]
    leaving: list[Tensor]

    def free_when_done(self) -> None:
        """Let the memory be used again once the host sees that the copies are done."""
        for tensor in self.leaving:
            if tensor.device.type == "cuda":
                tensor.record_stream(_stream(tensor.device, "out"))
        self.leaving.clear()

    def free_in_turn(self) -> None:
        """Let the memory be used again by what is launched from now on, which waits for the copies.

        The host may be far ahead of the device, and would find none of them done.
        """
        for device in {tensor.device for tensor in self.leaving if tensor.device.type == "cuda"}:
            for event in self.events:
                torch.cuda.current_stream(device).wait_event(event)
        self.leaving.clear()


def send(leaves: Sequence[Tensor], overwritten: bool) -> Sent:
    """Copy residuals to the host.

    Args:
        leaves: the residuals.
        overwritten: whether others write into their memory once the pullback is gone, so that the device
            has to wait for the copies.
    """
    moved = [i for i, leaf in enumerate(leaves) if _moves(leaf)]
    devices = {leaves[i].device for i in moved if leaves[i].device.type == "cuda"}
    for device in devices:
        _stream(device, "out").wait_stream(torch.cuda.current_stream(device))
    found = [*leaves]
    for i, copy in zip(moved, relocated([leaves[i] for i in moved], _sent), strict=True):
        found[i] = copy
    events = []
    for device in devices:
        events.append(_stream(device, "out").record_event())
        if overwritten:
            torch.cuda.current_stream(device).wait_event(events[-1])
    return Sent(found, moved, events, [leaves[i] for i in moved])


def relocated(tensors: Sequence[Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Copy the memory of some tensors, what several of them share once.

    Args:
        tensors: dense ones with memory.
        copy: from bytes, a tensor of uint8 with one dimension, to the same bytes elsewhere.

    Returns:
        Tensors of the same shapes and strides over those.
    """
    spans: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start, size = int(tensor.storage_offset()), tensor.element_size()
        spans[ft.storage_key(tensor)].append((start * size, (start + reach + 1) * size, i))
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for of_storage in spans.values():
            for first, last, members in _merged(of_storage):
                first = first // _ALIGNED * _ALIGNED
                there = copy(_bytes(tensors[members[0]], first, last - first))
                for i in members:
                    found[i] = _like(tensors[i], there, first)
    return [found[i] for i in range(len(tensors))]


def _merged(spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, list[int]]]:
    """Runs of bytes, each with what lies in it."""
    runs: list[tuple[int, int, list[int]]] = []
    for first, last, i in sorted(spans):
        if runs and first < runs[-1][1]:
            begin, end, members = runs[-1]
            runs[-1] = (begin, max(end, last), [*members, i])
        else:
            runs.append((first, last, [i]))
    return runs


def _bytes(tensor: Tensor, first: int, count: int) -> Tensor:
    """Some bytes of a tensor's memory."""
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(tensor.untyped_storage(), first, (count,), (1,))


def _like(tensor: Tensor, memory: Tensor, first: int) -> Tensor:
    """The same tensor over a copy of its memory from the byte `first` on."""
    view = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    offset = tensor.storage_offset() - first // tensor.element_size()
    return view.set_(memory.untyped_storage(), int(offset), tensor.shape, tensor.stride())


def _moves(leaf: Tensor) -> bool:
    """Whether a residual is moved: dense ones that no transform has wrapped, off the host."""
    return (
        type(leaf) in (Tensor, torch.nn.Parameter)
        and ft.innermost(leaf) is leaf
        and leaf.layout is torch.strided
        and leaf.device.type in FAR
        and leaf.numel() > 0
        and not (leaf.is_conj() or leaf.is_neg())
    )


def _sent(memory: Tensor) -> Tensor:
    if memory.device.type != "cuda":
        return memory.clone()
    host = torch.empty(memory.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    with torch.cuda.stream(_stream(memory.device, "out")):
        host.copy_(memory, non_blocking=True)
    return host


def _fetched(memory: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return memory.clone()
    # Memory of the stream that computes, as it is read and freed there; the copy waits until it is free.
    here = torch.empty(memory.shape, dtype=torch.uint8, device=device)
    stream = _stream(device, "back")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        here.copy_(memory, non_blocking=True)
    return here


@functools.cache
def _stream(device: torch.device, way: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
