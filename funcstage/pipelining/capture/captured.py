"""The way in: a schedule or a function -> the same, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch import nn
from torch.optim import Optimizer

from funcstage._torch.schedules import is_schedule
from funcstage.errors import StructureError
from funcstage.functional import FunctionalStage
from funcstage.pipelining.capture.function import CapturedFunction, P, T
from funcstage.pipelining.capture.schedule import CapturedSchedule
from funcstage.trees import describe


@overload
def captured(schedule: Callable[P, T]) -> CapturedFunction[P, T]: ...
@overload
def captured(schedule: Any, *, optimizer: Optimizer | None = None) -> CapturedSchedule: ...
def captured(schedule: Any, *, optimizer: Optimizer | None = None) -> Any:
    """Make the steps of a schedule, or the calls of a function, CUDA graphs: all of their work as one launch.

    Args:
        schedule: one of torch's, of our stages or torch's own, on one device. Or a function of pytrees of
            tensors, such as a training step in one process.
        optimizer: one whose step is to follow in the same graph, for a schedule. It must be able to be
            captured (`capturable=True`, a learning rate that is a tensor); hooks of its steps, such as one
            that clips gradients, are captured with it.

    Returns:
        A schedule with the same `step` and `eval`; or the function, to be called as before.

    Raises:
        StructureError: if `schedule` is neither, or `optimizer` no optimizer, or given for a function.

    Example:

    ```python
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(1e-3, device="cuda"), capturable=True)
    train = captured(schedule, optimizer=optimizer)
    for inputs, targets in batches:
        train.step(inputs, target=targets, losses=losses)
        optimizer.zero_grad()

    @captured
    def step(params, buffers, state, inputs, targets):
        loss, buffers, grads = value_and_grad(params, buffers, inputs, targets)
        params, state = update(grads, state, params)
        return loss, params, buffers, state
    ```
    """
    if is_schedule(schedule):
        return CapturedSchedule(schedule, optimizer)
    if isinstance(schedule, (nn.Module, FunctionalStage)) or not callable(schedule):
        raise StructureError(
            f"captured takes a schedule of torch.distributed.pipelining, got {describe(schedule)}. Make one "
            "of the stages first, or pass a function that runs the whole step."
        )
    if optimizer is not None:
        raise StructureError(
            "optimizer= goes with a schedule, got a function. Let the function call optimizer.step() itself."
        )
    return CapturedFunction(schedule)
