"""Memory that the GPUs of one host write into each other's: torch's symmetric memory, and its signals.

Relied on are of `torch._C._distributed_c10d._SymmetricMemory` `empty_strided_p2p`, `rendezvous`,
`signal_pad_size`, `get_buffer`, `put_signal` and `wait_signal`. A signal is a word in the memory of the rank
that waits for it: `put_signal` sets it, once it is clear, and `wait_signal` clears it, once it is set. Both
are work of the current stream; past their timeout they end in an error of the device. Nothing is multicast.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcstage._torch.distributed import timeout_of

__all__ = ["Memory", "host", "open_memory", "place"]


def place(device: torch.device) -> tuple[str, str, tuple[str, ...]] | str:
    """Say where a device is: on which host, under which name, and which others it reaches; or why not."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device} is no CUDA device"
    own = torch.cuda.current_device() if device.index is None else device.index
    names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    others = [i for i in range(len(names)) if i != own and torch.cuda.can_device_access_peer(own, i)]
    return host(), names[own], tuple(names[i] for i in others)


def host() -> str:
    """Name this host, as it runs now."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


class Memory:
    """Memory of this rank and of its peers. All ranks of a group make it at once.

    Args:
        nbytes: how much, the same on all ranks.
        signals: how many signals from one rank to another are told apart, the same on all ranks.
        group: the process group.
        device: of this rank.
    """

    def __init__(self, nbytes: int, signals: int, group: Any, device: torch.device) -> None:
        self._kind = torch._C._distributed_c10d._SymmetricMemory
        self._device, self._group = device, group
        self._milliseconds = int(timeout_of(group, device) * 1000)
        self._per_pad = self._kind.signal_pad_size // 4 // group.size()
        self._nbytes = nbytes
        # Each piece of memory has a pad of signals of its own: further ones are made for their pads.
        pads = -(-signals // self._per_pad)
        self._tensors = [self._empty(size) for size in (nbytes, *[256] * (pads - 1))]
        self._handles = [self._kind.rendezvous(tensor, group.group_name) for tensor in self._tensors]
        self._beside = _stream_on(device)

    def _empty(self, nbytes: int) -> Tensor:
        return self._kind.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device)

    @property
    def own(self) -> Tensor:
        """The memory of this rank, in bytes."""
        return self._tensors[0]

    def of(self, rank: int) -> Tensor:
        """The memory of a peer, in bytes."""
        return self._handles[0].get_buffer(rank, (self._nbytes,), torch.uint8)

    def put(self, rank: int, signal: int) -> None:
        """Give a peer a signal, after all that was put into its memory on this stream."""
        pad, channel = divmod(signal, self._per_pad)
        self._handles[pad].put_signal(rank, channel, self._milliseconds)

    def wait(self, rank: int, signal: int) -> None:
        """Let this stream wait for a signal of a peer."""
        pad, channel = divmod(signal, self._per_pad)
        self._handles[pad].wait_signal(rank, channel, self._milliseconds)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work beside the current stream, on what is ready there now."""
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            yield

    def mark(self) -> Any:
        """A point in the work beside the current stream."""
        event = torch.cuda.Event()
        event.record(self._beside)
        return event

    def join(self, mark: Any) -> None:
        """Let the current stream wait for such a point."""
        torch.cuda.current_stream(self._device).wait_event(mark)


def open_memory(nbytes: int, signals: int, group: Any, device: torch.device) -> Memory:
    """Make memory of this rank and of its peers, all of them at once."""
    on_device: AbstractContextManager[Any] = torch.cuda.device(device) if device.index else nullcontext()
    with on_device:
        return Memory(nbytes, signals, group, device)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream_on(device: torch.device) -> torch.cuda.Stream:
    """The stream for what is sent: its small kernels go before others, its copies need no multiprocessor."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device, priority=-1)
    return _STREAMS[device]
