"""A step with one signature, from its first runs as it is to replays of its graph."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage.engines.graph.blame import line_of
from funcstage.pipelining.capture import messages
from funcstage.pipelining.capture.baked import Baked, generators_in
from funcstage.pipelining.capture.given import CannotCaptureError, Given, Kept, Run, Signature, fresh
from funcstage.pipelining.capture.gradients import Gradients, Pattern, Recorded
from funcstage.pipelining.capture.graphs import Recorder, Recording
from funcstage.state.contents import Contents

WARM_UP = 2
"""How often a step runs as it is before it is recorded: kernels are compiled and loaded, memory is taken."""


@dataclass(slots=True, eq=False)
class Entry:
    """A step with one signature.

    Attributes:
        signature: of its arguments.
        parameters: all whose gradients it may write.
        pattern: what gradients they have before it.
        baked: everything else that it depends on.
        runs: how often it ran as it is.
        unsteady: how often that changed what is baked in.
        refused: why it cannot be recorded.
        expected: the dtypes of the gradients after it.
        graph: what is replayed, once it is recorded.
    """

    signature: Signature
    parameters: list[Tensor]
    pattern: Pattern
    baked: Baked
    runs: int = 0
    unsteady: int = 0
    refused: str = ""
    expected: Pattern = ()
    graph: Graph | None = None

    @property
    def is_warm(self) -> bool:
        """Whether it can be recorded."""
        return self.runs >= WARM_UP


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A recorded step.

    Attributes:
        recording: the work of the device.
        given: where it reads its arguments.
        result: what the step has returned, losses first, in memory that each replay overwrites.
        gradients: what it does to gradients.
        written: the tensors of others that it writes.
        received: the memory that it receives messages in.
    """

    recording: Recording
    given: Kept
    result: Any
    gradients: Recorded
    written: list[Tensor]
    received: list[Tensor]

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        """Run the step for these arguments.

        Returns:
            What it returns, in memory of the caller's; `None` in place of all that if somebody holds views of
            gradients that it would overwrite.
        """
        foreign = self.gradients.enter()
        if foreign is None:
            return None
        self.given.fill(tensors)
        self.recording.replay()
        self.gradients.leave(foreign)
        if self.written:
            torch.autograd.graph.increment_version(self.written)
        return fresh(self.result)


def record(
    entry: Entry,
    given: Given,
    run: Run,
    recorder: Recorder,
    stages: Sequence[Any],
    gradients: Gradients,
    first: bool,
) -> Graph:
    """Record a step, which has no effect on any device; what it did to Python's objects is noticed, or
    undone.

    Args:
        entry: which step.
        given: arguments for it.
        run: runs it.
        recorder: records it.
        stages: of this rank.
        gradients: the kept ones.
        first: whether nothing was recorded before.

    Raises:
        CannotCaptureError: says why it cannot be recorded, and where.
    """
    device = torch.device(stages[0].device)
    recorded = Recorded(entry.parameters, gradients, entry.expected, first)
    received: list[Tensor] = []

    def step() -> Any:
        recorded.begin()
        with messages.noted(stages, received):
            result = run(kept.arguments)
        recorded.end()
        return result

    with ExitStack() as undo:
        kept = given.kept()
        undo.callback(recorded.restore)
        held = [Contents(stage.submod).now() for stage in stages]
        try:
            recording, result = recorder.record(step, generators_in(entry.baked, device))
        except Exception as error:
            for each in held:
                each.restore()
            if isinstance(error, CannotCaptureError):
                raise
            raise CannotCaptureError(_blame(error, stages)) from error
    recorded.settle()
    if kept.written():
        raise CannotCaptureError("the step writes into its arguments, and a graph has only copies of them.")
    if change := entry.baked.change():
        raise CannotCaptureError(
            f"{change} by the step itself, which in a graph would not happen. Do that outside of the stages."
        )
    result = trees.map_leaves(trees.detached, result)
    return Graph(recording, kept, result, recorded, _written(entry, device), received)


def _written(entry: Entry, device: torch.device) -> list[Tensor]:
    """The buffers and parameters that a step may write, whose versions replays count on."""
    tensors = [tensor for tensor in entry.baked.tensors.values() if not tensor.is_inference()]
    return [*{id(tensor): tensor for tensor in tensors if tensor.device.type == device.type}.values()]


def _blame(error: BaseException, stages: Sequence[Any]) -> str:
    """Say where a recording has failed."""
    name, line = "the step", None
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            owner: Any = frame.f_locals.get("self")
            if any(owner is stage for stage in stages):
                name = f"stage {owner.stage_index} of {owner.num_stages} ({type(owner.submod).__name__})"
        error, line, cause = cause, line_of(cause) or line, cause.__cause__
    said = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return (
        f"{name} cannot be captured{f', at {line}' if line else ''}: {said}. Does it wait for the device "
        "(`.item()`, `.cpu()`, a branch on values, shapes that depend on values)? Compute that on the "
        "device, or outside of the step."
    )
