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

from funcstage.pipelining.capture.messages import withheld
from funcstage.state.ambient import generators_kept, of_process, of_torch
from funcstage.state.contents import Contents


def rehearse(stages: Sequence[Any], parameters: Sequence[Tensor], step: Callable[[], Any]) -> None:
    """Run a step without messages, and put back what it has changed.

    Args:
        stages: of this rank.
        parameters: whose gradients are put back.
        step: runs the schedule.
    """
    devices = {torch.device(stage.device) for stage in stages}
    modules = [stage.submod for stage in stages if isinstance(stage.submod, nn.Module)]
    with (
        generators_kept([*of_torch(devices), *of_process()]),
        _unchanged(modules),
        _gradients_aside(parameters),
        withheld(stages),
    ):
        step()


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


@contextmanager
def _unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back what modules hold, and the values of their buffers."""
    held = [Contents(module).now() for module in modules]
    values = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for each in held:
            each.restore()
        with torch.no_grad():
            for buffer, value in values:
                if not torch.is_inference(buffer):
                    buffer.copy_(value)
