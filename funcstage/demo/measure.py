"""What F, I and W of every stage cost: seconds, FLOPs, and the bytes that wait between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from funcstage.demo import model
from funcstage.functional import FunctionalStage
from funcstage.pipelining import Costs
from funcstage.pullback import stage_vjp

T = TypeVar("T")


class StageCosts(NamedTuple):
    """What one microbatch costs a stage; FLOPs are of the loss too, on the last one."""

    costs: Costs
    flops: tuple[int, int, int]


def measure(
    stages: Sequence[FunctionalStage], inputs: Tensor, targets: Tensor, repeats: int = 10
) -> list[StageCosts]:
    """Run one microbatch through the stages, forward and back, several times.

    Args:
        stages: functions with the values to run them on.
        inputs: one microbatch, as `targets`.
        repeats: of how many runs the fastest counts, after one to warm up; what makes the others slower is
            not the stage.
    """
    _run(stages, inputs, targets, lambda work: (work(), 0.0))
    seconds = [_run(stages, inputs, targets, _timed(inputs.device))[0] for _ in range(repeats)]
    flops, sizes = _run(stages, inputs, targets, _counted)
    return [
        StageCosts(
            Costs(
                min(run["F"][s] for run in seconds),
                min(run["I"][s] for run in seconds),
                min(run["W"][s] for run in seconds),
                *sizes[s],
            ),
            (int(flops["F"][s]), int(flops["I"][s]), int(flops["W"][s])),
        )
        for s in range(len(stages))
    ]


def relative_error(
    whole: nn.Module, inputs: Tensor, targets: Tensor, grads: Sequence[dict[str, Tensor]]
) -> float:
    """Compare gradients with those of plain eager backward through the whole model at once.

    Args:
        whole: the model that the stages were cut from, which holds the parameters that `grads` were taken at.
        inputs: the whole batch, as `targets`.
        grads: one dict a stage, by qualified name.

    Returns:
        The largest difference in any parameter's gradient, relative to that gradient's largest entry.
    """
    model.loss_fn(whole(inputs), targets).backward()
    ours = {name: grad for of_stage in grads for name, grad in of_stage.items()}
    errors = []
    for name, parameter in whole.named_parameters():
        expected = parameter.grad
        assert expected is not None
        errors.append(((ours[name] - expected).abs().max() / expected.abs().max()).item())
        parameter.grad = None
    return max(errors)


def _run(
    stages: Sequence[FunctionalStage],
    inputs: Tensor,
    targets: Tensor,
    meter: Callable[[Callable[[], Any]], tuple[Any, float]],
) -> tuple[dict[str, list[float]], list[tuple[int, int]]]:
    """Run F, I and W of every stage under a meter; also return the bytes held for I and for W."""
    readings: dict[str, list[float]] = {kind: [0.0] * len(stages) for kind in "FIW"}
    pullbacks, held = [], []
    value: Any = inputs
    for s, stage in enumerate(stages):
        last = s == len(stages) - 1

        def forward(stage: FunctionalStage = stage, x: Any = value, last: bool = last) -> Any:
            output, _, pullback = stage_vjp(stage.apply, stage.params, stage.buffers, x)
            if not last:
                return output, pullback, None
            loss, _, loss_pullback = stage_vjp(_loss_stage, (), (), output, targets)
            return loss, pullback, loss_pullback

        (value, pullback, loss_pullback), readings["F"][s] = meter(forward)
        pullbacks.append((pullback, loss_pullback))
        held.append(pullback.nbytes + (loss_pullback.nbytes if loss_pullback else 0))
    sizes = []
    cotangent = None
    for s, (pullback, loss_pullback) in reversed(list(enumerate(pullbacks))):

        def backward(pullback: Any = pullback, loss: Any = loss_pullback, cotangent: Any = cotangent) -> Any:
            if loss is not None:
                (cotangent, _), _ = loss()
            (input_grad,), weight_pullback = pullback(cotangent)
            return input_grad, weight_pullback

        (cotangent, weight_pullback), readings["I"][s] = meter(backward)
        sizes.append((held[s], weight_pullback.nbytes))
        _, readings["W"][s] = meter(weight_pullback)
    return readings, sizes[::-1]


def _loss_stage(params: Any, buffers: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    return model.loss_fn(logits, targets), buffers


def _timed(device: torch.device) -> Callable[[Callable[[], T]], tuple[T, float]]:
    def meter(work: Callable[[], T]) -> tuple[T, float]:
        _wait_for(device)
        start = time.perf_counter()
        result = work()
        _wait_for(device)
        return result, time.perf_counter() - start

    return meter


def _counted(work: Callable[[], T]) -> tuple[T, float]:
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
