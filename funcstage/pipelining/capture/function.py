"""A function whose calls become CUDA graphs: a training step in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.functorch import current_level
from funcstage.errors import StructureError
from funcstage.pipelining.capture.baked import Baked
from funcstage.pipelining.capture.entries import Entries
from funcstage.pipelining.capture.entry import Entry, Graph, record
from funcstage.pipelining.capture.given import CannotCaptureError, Given
from funcstage.pipelining.capture.gradients import VIEWS_HELD, Gradients
from funcstage.pipelining.capture.graphs import Graphs, Recorder
from funcstage.pipelining.capture.said import Said

P = ParamSpec("P")
T = TypeVar("T")


class CapturedFunction(Generic[P, T]):
    """A function of tensors on a GPU whose work there is recorded as a CUDA graph, and replayed.

    As `CapturedSchedule`, for what one process computes: the first calls with a signature run as they are,
    then one is recorded, and from then on it is replayed. Arguments are read from copies, results are the
    caller's, and an argument that is returned as it came is that very tensor. What the function reads
    besides (the variables around it, modules, optimizers) is compared before each replay; tensors among
    that are read, and written, where they lie.

    Where a call cannot be captured (it waits for the device, or its tensors are on the CPU) it runs as it
    is, and a warning says why.

    Args:
        function: takes and returns pytrees of tensors and of plain values.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        update_wrapper(self, function)
        self.function = function
        self._said = Said(getattr(function, "__qualname__", type(function).__name__))
        self._device: torch.device | None = None
        self._recorder: Recorder | None = None
        self._gradients = Gradients()
        self._recorded = False
        self._entries = Entries(self._bake, _trained, self._said)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return self.function(*args, **kwargs)  # as a part of what is being recorded
        arguments = args, kwargs
        entry, graph, reason = None, None, ""
        try:
            recorder, device = self._recorder_for(arguments)
            given = Given.of(("call", device), arguments, device)
            entry = self._entries.of(given.signature)
            graph, reason = entry.graph, entry.refused
            if graph is None and entry.is_warm and not reason:
                graph = entry.graph = self._record(entry, given, recorder)
        except CannotCaptureError as error:
            reason = str(error)
            if entry is not None:
                entry.refused = reason
        if reason:
            self._said(reason)
        if graph is not None:
            found = graph.replay(given.tensors)
            if found is not None:
                return found[0]
            self._said(VIEWS_HELD)
        if entry is None:
            return self.function(*args, **kwargs)
        with recorder.prepared():
            result = self.function(*args, **kwargs)
        self._entries.ran(entry)
        return result

    def __get__(self, instance: object, owner: type | None = None) -> CapturedFunction[P, T]:
        """Refuse to be a method: a graph is that of one object."""
        if instance is None:
            return self
        raise StructureError(
            f"{self._said.name} is a captured function in a class, and would not be given the object. "
            "Capture the bound method, `self.step = captured(self.step)`, or make it a staticmethod."
        )

    def close(self) -> None:
        """Drop the graphs and their memory; further calls make new ones."""
        self._entries.close()
        self._gradients, self._recorded = Gradients(), False

    def __repr__(self) -> str:
        return f"<captured {self._said.name}, {self._entries}>"

    def _record(self, entry: Entry, given: Given, recorder: Recorder) -> Graph:
        def run(arguments: Any) -> tuple[T]:
            args, kwargs = arguments
            return (self.function(*args, **kwargs),)

        graph = record(entry, given, run, recorder, self._gradients, not self._recorded)
        self._recorded = True
        return graph

    def _bake(self) -> Baked:
        assert self._device is not None
        return Baked(self._device, {self._said.name: self.function})

    def _recorder_for(self, arguments: Any) -> tuple[Recorder, torch.device]:
        """Find out where calls are recorded, when the first one comes.

        Raises:
            CannotCaptureError: if this one cannot be, whatever it does.
        """
        if torch.compiler.is_compiling() or current_level():
            raise CannotCaptureError(
                "it is called inside a transformation or torch.compile. Capture the whole of that instead."
            )
        if self._recorder is None or self._device is None:
            tensors = [leaf for leaf in trees.flatten(arguments)[0] if isinstance(leaf, Tensor)]
            found = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
            if found is None:
                places = ", ".join(sorted({str(tensor.device) for tensor in tensors})) or "no device"
                raise CannotCaptureError(
                    f"the tensors among its arguments are on {places}, but only work on a CUDA device can be "
                    "captured. Pass tensors on one."
                )
            self._recorder, self._device = Graphs(found), found
        return self._recorder, self._device


def _trained(baked: Baked) -> list[Tensor]:
    """The parameters whose gradients a call may write: all that it can reach."""
    return [tensor for tensor in baked.tensors.values() if tensor.requires_grad and tensor.is_leaf]
