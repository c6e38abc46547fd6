"""What a microbatch costs each stage: given, measured, or estimated from a compiled stage's plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from funcstage import trees
from funcstage.functional import FunctionalStage
from funcstage.graph.plan import Plan
from funcstage.pipelining.local import LossFunction, Step
from funcstage.pipelining.orders import Action, ScheduleError
from funcstage.trees import PyTree


class Costs(NamedTuple):
    """What one microbatch costs a stage; the whole backward takes `input + weight` seconds.

    Attributes:
        forward: seconds that F takes.
        input: seconds that I takes.
        weight: seconds that W takes.
        held_after_forward: bytes held between F and I.
        held_after_input: bytes held between I and W.
    """

    forward: float
    input: float
    weight: float
    held_after_forward: int = 0
    held_after_input: int = 0

    def of(self, action: Action) -> float:
        """Return the seconds that an action of the stage takes."""
        backward = {"I": self.input, "W": self.weight, "B": self.input + self.weight}
        return self.forward if action.kind == "F" else backward[action.kind]

    def held(self, action: Action) -> int:
        """Return by how many bytes an action changes what its rank holds once it is done."""
        if action.kind == "F":
            return self.held_after_forward
        if action.kind == "I":
            return self.held_after_input - self.held_after_forward
        return -(self.held_after_forward if action.kind == "B" else self.held_after_input)


def planned_costs(plan: Plan, *, flops_per_second: float, bytes_per_second: float) -> Costs:
    """Estimate a stage's costs from its plan and a device's peak rates.

    A program takes as long as its FLOPs or its residuals' traffic, whichever is longer (the roofline of
    Williams, Waterman and Patterson, CACM 52(4), 2009). The traffic of parameters and of what a program
    keeps to itself is not in a plan, so this is a lower bound.

    Args:
        plan: from `CompiledStage.plan`.
        flops_per_second: peak rate of arithmetic in the stage's dtype.
        bytes_per_second: peak rate of memory.

    Returns:
        Seconds, and the bytes that the plan says are held.

    Raises:
        ScheduleError: if a rate is not positive.
    """
    if not (flops_per_second > 0 and bytes_per_second > 0):
        raise ScheduleError(
            f"Peak rates must be positive, got {flops_per_second} FLOP/s and {bytes_per_second} byte/s."
        )

    def seconds(flops: int, moved: int) -> float:
        return max(flops / flops_per_second, moved / bytes_per_second)

    return Costs(
        seconds(plan.forward.flops, plan.held_after_forward),
        seconds(plan.input_grad.flops, plan.input_grad.reads + plan.input_to_weight),
        seconds(plan.weight_grad.flops, plan.weight_grad.reads),
        plan.held_after_forward,
        plan.held_after_input,
    )


def measure_costs(
    stages: Sequence[FunctionalStage],
    loss_fn: LossFunction,
    inputs: PyTree,
    target: PyTree,
    *,
    repeats: int = 5,
) -> list[Costs]:
    """Measure F, I and W of every stage, as `pipeline_value_and_grad` runs them.

    Args:
        stages: from `functionalize`; compiled ones have `apply` replaced (`stage._replace(apply=...)`).
        loss_fn: `loss_fn(output, target) -> scalar`; its time counts for the last stage.
        inputs: one microbatch; a tuple becomes several arguments of the first stage.
        target: of that microbatch.
        repeats: how many times each action is timed, after one to warm up.

    Returns:
        One for each stage: median seconds by the host's clock around finished work, and the bytes that
        the pullbacks hold.

    Raises:
        ScheduleError: if `repeats` is not positive.
    """
    if repeats < 1:
        raise ScheduleError(f"repeats must be a positive integer, got {repeats!r}.")
    step = Step(
        [stage.apply for stage in stages],
        loss_fn,
        [stage.params for stage in stages],
        [stage.buffers for stage in stages],
        [inputs] * (repeats + 1),
        [target] * (repeats + 1),
    )
    seconds: dict[tuple[str, int], list[float]] = {}
    held: dict[tuple[str, int], int] = {}

    def timed(action: Action) -> None:
        _finish(inputs)
        start = time.perf_counter()
        step.run(action)
        _finish(inputs)
        seconds.setdefault((action.kind, action.stage), []).append(time.perf_counter() - start)

    for m in range(repeats + 1):
        for s in range(len(stages)):
            timed(Action("F", s, m))
            held["F", s] = step.forwards[s, m].pullback.nbytes
        for s in reversed(range(len(stages))):
            timed(Action("I", s, m))
            held["I", s] = step.weight_pullbacks[s, m].nbytes
            timed(Action("W", s, m))

    def median(kind: str, s: int) -> float:
        return statistics.median(seconds[kind, s][1:])

    return [
        Costs(median("F", s), median("I", s), median("W", s), held["F", s], held["I", s])
        for s in range(len(stages))
    ]


def _finish(example: Any) -> None:
    for leaf in trees.flatten(example)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            torch.cuda.synchronize(leaf.device)
