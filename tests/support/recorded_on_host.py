"""A recorder for tests on the CPU, which does with operations what a CUDA graph does with kernels.

While it records, nothing happens in the end: what was written is put back. A replay runs the same
operations on the same memory, and no Python. Whatever has to be known of a value at once (`.item()`) fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Recording(TorchDispatchMode):
    """The operations of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.replays = 0
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in _tensors(_written(func, args, kwargs)):
            memory = tensor.untyped_storage()._cdata
            if memory not in self._own and memory not in self._before:
                whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                self._before[memory] = whole, whole.clone()
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in given]
        for tensor in made:
            self._own[tensor.untyped_storage()._cdata] = tensor
        if made or func._schema.is_mutable:
            self.operations.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Let what was recorded not have happened."""
        for tensor, before in self._before.values():
            tensor.copy_(before)
        for tensor in self._own.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        self._before.clear()

    def seal(self) -> None:
        """Hold none of the memory that was there before, as a graph does not."""
        own = self._own

        def unheld(leaf: Any) -> Any:
            return (
                leaf
                if not isinstance(leaf, Tensor) or leaf.untyped_storage()._cdata in own
                else _view_at(leaf)
            )

        self.operations = [
            (func, *tree_map(unheld, (args, kwargs, result)))
            for func, args, kwargs, result in self.operations
        ]

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)

    def reset(self) -> None:
        self.operations.clear()


class OnHost:
    """Records steps on the CPU."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    @contextmanager
    def prepared(self) -> Iterator[None]:
        yield

    def record(self, step: Callable[[], Any], generators: Sequence[torch.Generator]) -> tuple[Recording, Any]:
        recording = Recording()
        drawn = [(g, g.get_state()) for g in (torch.default_generator, *generators)]
        try:
            with recording:
                result = step()
        finally:
            with torch.no_grad():
                recording.undo()
            for generator, state in drawn:
                generator.set_state(state)
        recording.seal()
        self.recordings.append(recording)
        return recording, result

    @property
    def replays(self) -> int:
        """How often something was replayed."""
        return sum(recording.replays for recording in self.recordings)


def on_host(captured: Any) -> OnHost:
    """Let a captured schedule or function on the CPU record its steps."""
    captured._recorder, captured._given_up, captured._device = OnHost(), "", torch.device("cpu")
    recorder: OnHost = captured._recorder
    return recorder


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    named = zip(func._schema.arguments, args, strict=False)
    pairs = [*named, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
    return [
        value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _view_at(tensor: Tensor) -> Tensor:
    """The same memory, which may be gone one day."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return tensor
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype).set_(
        whole, tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
