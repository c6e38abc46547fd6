"""Scalars of each step, for TensorBoard, Weights & Biases, or whatever takes a dict of numbers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.schedules import is_schedule, loss_of, stages_of
from funcstage.errors import StructureError
from funcstage.linear import held_together
from funcstage.pipelining.accumulating_stage import AccumulatingStage
from funcstage.pipelining.capture import CapturedFunction, CapturedSchedule
from funcstage.pipelining.ranges import HERE, named
from funcstage.schedules.costs import Costs
from funcstage.schedules.orders import Action, Kind, Order
from funcstage.schedules.timeline import simulate
from funcstage.trees import describe

Log: TypeAlias = Callable[[int, dict[str, float]], object]
"""`log(number, scalars)`: the number of a step, from 0, and its scalars by name."""


def logged(step: Any, log: Log, *, every: int = 1) -> Callable[..., Any]:
    """Make a step that hands its scalars to `log`, and otherwise does and returns the same.

    Args:
        step: what `pipeline_value_and_grad` has returned, or a schedule of torch's, whose stages on this rank
            are `FunctionalPipelineStage`s, or what `captured` made of one.
        log: called as `log(number, scalars)` after a step, with its number, from 0, and a dict of floats:

            - `loss`: the mean over the microbatches; of a schedule, on the rank with the last stage.
            - `seconds`: how long the step took.
            - `bubble`: the share of it in which this rank had nothing to do. In one process, where the ranks
              take turns, it is that of the schedule on as many devices, if its actions took as long there.
            - `residual_bytes`: the most bytes that the pullbacks held at a time, and
              `residual_bytes/stage_2`, those of one stage.
            - `F_seconds/stage_2`, `I_seconds/...` and `W_seconds/...`: of a microbatch, the mean;
              `B_seconds/...` where the schedule runs I and W as one.

            A captured step has `loss` and `seconds`, as its graph is one launch. If a step raises an error,
            nothing is logged.
        every: measure the first step of so many. The others cost nothing.

    Returns:
        For a schedule, a function to call as `schedule.step`; otherwise one to call as `step`. A step that is
        measured waits for its device at the end.

    Raises:
        StructureError: if `step` is none of these, a stage of the schedule is no `FunctionalPipelineStage`,
            `log` is no function, or `every` is less than 1.

    Example:
        >>> import torch, funcstage as fs
        >>> from funcstage.pipelining import logged, pipeline_value_and_grad
        >>> stages = [fs.functionalize(torch.nn.Linear(4, 4)) for _ in range(2)]
        >>> mse = torch.nn.functional.mse_loss
        >>> step = pipeline_value_and_grad(stages, mse, schedule="1F1B", num_microbatches=2)
        >>> step = logged(step, lambda number, scalars: print(number, *sorted(scalars)[:3]))
        >>> params, buffers = [s.params for s in stages], [s.buffers for s in stages]
        >>> loss, buffers, grads = step(params, buffers, torch.randn(6, 4), torch.randn(6, 4))
        0 B_seconds/stage_0 B_seconds/stage_1 F_seconds/stage_0
    """
    if not callable(log):
        raise StructureError(f"log must be a function of a number and a dict, got {describe(log)}.")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise StructureError(f"every must be a whole number, 1 or more, got {every!r}.")
    measured = _measured(step)
    plain = step.step if hasattr(step, "step") else step
    number = -1

    def and_log(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        if number % every:
            return plain(*args, **kwargs)
        this = number
        result, scalars = measured(args, kwargs)
        log(this, scalars)
        return result

    return and_log


_Measured: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, float]]]


def _measured(step: Any) -> _Measured:
    """A function that runs a step and returns its result and its scalars."""
    if isinstance(step, CapturedSchedule):
        return _of_schedule(step, step.schedule, by_action=False)
    if is_schedule(step):
        for stage in stages_of(step):
            if not isinstance(stage, AccumulatingStage):
                raise StructureError(
                    f"logged cannot measure stage {stage.stage_index} of the schedule, a "
                    f"{type(stage).__name__}. Make it a FunctionalPipelineStage: it takes the same arguments."
                )
        return _of_schedule(step, step, by_action=True)
    order = getattr(step, "order", None)
    if not isinstance(order, Order):
        raise StructureError(
            "logged takes a schedule of torch.distributed.pipelining, what captured made of one, or what "
            f"pipeline_value_and_grad returned; got {describe(step)}. Pass the schedule itself, not its step."
        )
    return _in_one_process(step, order, by_action=not isinstance(step, CapturedFunction))


def _of_schedule(step: Any, schedule: Any, by_action: bool) -> _Measured:
    device = torch.device(stages_of(schedule)[0].device)
    last = any(stage.is_last for stage in stages_of(schedule))

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        meter = _Meter(device)
        losses = kwargs.get("losses")
        if losses is None and last and loss_of(schedule) is not None:
            losses = []
            kwargs = {**kwargs, "losses": losses}
        with meter.measuring(by_action):
            result = step.step(*args, **kwargs)
        total, spans = meter.read()
        scalars = {"loss": torch.stack(losses).mean().item()} if last and losses else {}
        scalars["seconds"] = total
        if by_action:
            busy = sum(span.seconds for span in spans)
            scalars |= {"bubble": max(0.0, 1 - busy / total)} | _by_stage(spans)
        return result, scalars

    return run


def _in_one_process(step: Any, order: Order, by_action: bool) -> _Measured:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        tensors = [leaf for leaf in trees.flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
        meter = _Meter(device)
        with meter.measuring(by_action):
            result = step(*args, **kwargs)
        total, spans = meter.read()
        if not by_action:
            return result, {"loss": result[0].item(), "seconds": total}
        mean = _mean_seconds(spans)
        costs = [
            Costs(*(mean.get((s, kind), 0.0) for kind in "FIW"))._replace(
                **({"input": mean[s, "B"]} if (s, "B") in mean else {})
            )
            for s in range(order.num_stages)
        ]
        scalars = {
            "loss": result[0].item(),
            "seconds": total,
            "bubble": simulate(order, costs).bubble_fraction,
        }
        return result, scalars | _by_stage(spans)

    return run


class _Span(NamedTuple):
    action: Action
    seconds: float
    held: int  # bytes that it leaves behind


class _Meter:
    """Measures the actions of a step: by CUDA's clock on such a device, otherwise by the host's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Action, Any, Any, int]] = []
        self._step: list[Any] = []
        self._left: Sequence[Any] = ()
        self._own = 0.0  # seconds of the host for counting bytes

    @contextmanager
    def measuring(self, by_action: bool) -> Iterator[None]:
        self._step.append(self._mark())
        HERE.meter = self if by_action else None
        try:
            yield
        finally:
            HERE.meter = None
        self._step.append(self._mark())

    @contextmanager
    def action(self, stage: int, kind: str, microbatch: int, piece: str) -> Iterator[None]:
        with named(stage, kind, microbatch, piece):
            start = self._mark()
            yield
            end = self._mark()
        left, self._left = self._left, ()
        began = time.perf_counter()
        held = held_together(left)
        self._own += time.perf_counter() - began
        self._marks.append((Action(cast(Kind, kind), stage, microbatch), start, end, held))

    def hold(self, pullbacks: Sequence[Any]) -> None:
        self._left = pullbacks

    def read(self) -> tuple[float, list[_Span]]:
        """Return the seconds of the step, and its actions."""
        spans = [_Span(action, self._between(start, end), held) for action, start, end, held in self._marks]
        own = 0.0 if self._device.type == "cuda" else self._own
        return self._between(*self._step) - own, spans

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def _mean_seconds(spans: Iterable[_Span]) -> dict[tuple[int, str], float]:
    seconds: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:  # of a W in pieces there are several
        seconds[span.action.stage, span.action.kind][span.action.microbatch] += span.seconds
    return {which: sum(each.values()) / len(each) for which, each in seconds.items()}


def _by_stage(spans: list[_Span]) -> dict[str, float]:
    scalars = {f"{kind}_seconds/stage_{s}": mean for (s, kind), mean in _mean_seconds(spans).items()}
    held: dict[tuple[int, int], int] = {}
    now: dict[int | None, int] = defaultdict(int)  # by stage; None is all of them
    peaks: dict[int | None, int] = defaultdict(int)
    for (_, stage, microbatch), _, left in spans:
        change = left - held.get((stage, microbatch), 0)
        held[stage, microbatch] = left
        for which in (stage, None):
            now[which] += change
            peaks[which] = max(peaks[which], now[which])
    scalars["residual_bytes"] = peaks.pop(None, 0)
    return scalars | {f"residual_bytes/stage_{s}": peak for s, peak in peaks.items()}
