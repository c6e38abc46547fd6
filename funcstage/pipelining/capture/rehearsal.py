"""A step without messages, of which nothing is left but what it has loaded and taken: kernels and memory.

Schedules receive ahead. On a GPU the receive waits there for its sender, and the first use of a kernel, or
taking memory, may wait for all that is on the device: so two ranks could wait for each other for ever.
After a rehearsal there is nothing left to load or to take when the first message is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcstage.pipelining.capture.messages import Method, in_place_of, withheld
from funcstage.state.ambient import RandomState, of_process, of_torch
from funcstage.state.contents import Contents


def rehearse(stages: Sequence[Any], parameters: Sequence[Tensor], step: Callable[[], Any]) -> None:
    """Run a step without messages, and put back what it has changed.

    What torch does before the first forward, once, is no rehearsal and stays done: to find out what its
    stages send, torch 2.11 draws random numbers and updates statistics.

    Args:
        stages: of this rank.
        parameters: whose gradients are put back.
        step: runs the schedule.
    """
    devices = {torch.device(stage.device) for stage in stages}
    modules = [stage.submod for stage in stages if isinstance(stage.submod, nn.Module)]
    before = _Before(modules, devices)
    begun = False

    def instead(_: str, forward: Method) -> Method:
        def begin(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if not begun:
                before.note()
                begun = True
            return forward(*args, **kwargs)

        return begin

    try:
        with _gradients_aside(parameters), withheld(stages), in_place_of(stages, _FIRST, instead):
            step()
    finally:
        before.restore()


_FIRST = ("forward_one_chunk",)


@contextmanager
def _gradients_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


class _Before:
    """What modules hold, the values of their buffers, and generators, to be put back."""

    def __init__(self, modules: Sequence[nn.Module], devices: set[torch.device]) -> None:
        self._modules = modules
        self._devices = devices
        self.note()

    def note(self) -> None:
        """Note how it is now."""
        self._generators = RandomState([*of_torch(self._devices), *of_process()])
        self._held = [Contents(module).now() for module in self._modules]
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self) -> None:
        """Put it back."""
        for each in self._held:
            each.restore()
        with torch.no_grad():
            for buffer, value in self._values:
                if not torch.is_inference(buffer):
                    buffer.copy_(value)
        self._generators.restore()
