"""What a microbatch costs each stage, measured where it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from funcstage import trees
from funcstage.functional import FunctionalStage
from funcstage.pipelining.local import LossFunction, Step
from funcstage.schedules.costs import Costs
from funcstage.schedules.orders import Action, ScheduleError
from funcstage.trees import PyTree


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
