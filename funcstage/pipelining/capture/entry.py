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
from funcstage._torch.pipelining import let_go_of_last_step
from funcstage.engines.graph.blame import line_of
from funcstage.pipelining.capture import messages
from funcstage.pipelining.capture.baked import Baked, generators_in
from funcstage.pipelining.capture.given import (
    CannotCaptureError,
    Given,
    Kept,
    Run,
    Signature,
    check_structure,
    fresh,
    unfit_value,
)
from funcstage.pipelining.capture.gradients import Gradients, Pattern, Recorded
from funcstage.pipelining.capture.graphs import Recorder, Recording
from funcstage.state.ambient import RandomState, of_process, of_torch
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
        received: what has the memory that messages are in.
    """

    recording: Recording
    given: Kept
    result: Any
    gradients: Recorded
    written: list[Tensor]
    received: list[object]

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
        return fresh(self.result, zip(self.given.tensors, tensors, strict=True))


def record(
    entry: Entry,
    given: Given,
    run: Run,
    recorder: Recorder,
    gradients: Gradients,
    first: bool,
    stages: Sequence[Any] = (),
) -> Graph:
    """Record a step, which has no effect on any device; what it did to Python's objects is noticed, or
    undone.

    Args:
        entry: which step.
        given: arguments for it.
        run: runs it.
        recorder: records it.
        gradients: the kept ones.
        first: whether nothing was recorded before.
        stages: of this rank, if it is the step of a schedule.

    Raises:
        CannotCaptureError: says why it cannot be recorded, and where.
    """
    device = entry.baked.device
    recorded = Recorded(entry.parameters, gradients, entry.expected, first)
    received: list[object] = []

    def step() -> Any:
        recorded.begin()
        with messages.noted(stages, received):
            result = run(kept.arguments)
        recorded.end()
        return result

    with ExitStack() as undo:
        kept = given.kept()
        undo.callback(recorded.restore)
        for stage in stages:
            let_go_of_last_step(stage)  # it would keep the memory around it from being given back
            undo.callback(let_go_of_last_step, stage)  # in the graphs' own memory, for the next one
        held = [Contents(stage.submod).now() for stage in stages]
        drawn = RandomState([*of_process(), *of_torch()])
        try:
            recording, result = recorder.record(step, generators_in(entry.baked, device))
            _check_draws(drawn)
        except Exception as error:
            for each in held:
                each.restore()
            if isinstance(error, CannotCaptureError):
                raise
            raise CannotCaptureError(_blame(error, stages)) from error
    recorded.settle()
    if kept.written():
        raise CannotCaptureError(
            "the step writes into its arguments, and a graph has only copies of them. Return the new values, "
            "or write into something that the step holds and is not given."
        )
    if change := entry.baked.change():
        raise CannotCaptureError(
            f"{change} by the step itself, which a replay would not repeat. Do that outside of the stages."
        )
    result = _returned(result, kept.tensors, detached=bool(stages))
    return Graph(recording, kept, result, recorded, _written(entry, device), received)


def _check_draws(before: RandomState) -> None:
    """Refuse numbers that were drawn on the host, which a replay would not draw; they can be drawn again."""
    names = before.moved()
    before.restore()
    if names:
        raise CannotCaptureError(
            f"the step draws random numbers on the host ({', '.join(names)}), which a replay would not "
            "repeat. Draw them on the device, or outside of the step, and pass them as tensors."
        )


def _returned(result: Any, arguments: Sequence[Tensor], detached: bool) -> Any:
    """What a step has returned, its arguments among that as they came.

    Raises:
        CannotCaptureError: if something is neither a tensor nor a plain value, or has a history that a
            caller may go on from, where it is not to be `detached`.
    """
    own = {id(tensor) for tensor in arguments}
    leaves, spec = trees.flatten(result)
    check_structure(spec, "the result")
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and id(leaf) not in own:
            if leaf.requires_grad and not detached:
                raise CannotCaptureError(
                    f"{trees.leaf_names(spec, 'the result')[i]} requires grad, but gradients cannot flow "
                    "back into a graph. Take the gradients inside, and return `tensor.detach()`."
                )
            if leaf.layout is not torch.strided and not detached:
                name = trees.leaf_names(spec, "the result")[i]
                raise CannotCaptureError(f"{name} is {trees.describe(leaf)}. Return dense tensors.")
            leaves[i] = leaf.detach()
        elif not isinstance(leaf, Tensor) and not detached and unfit_value(leaf):
            raise CannotCaptureError(f"{trees.leaf_names(spec, 'the result')[i]} is {unfit_value(leaf)}.")
    return trees.unflatten(spec, leaves)


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
