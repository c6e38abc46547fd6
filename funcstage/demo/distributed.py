"""The demo's pipeline as processes started by torchrun: torch's schedule over our stages.

A `Pipeline` is all that the rest of the demo sees of the difference: which stages are trained here, how
their gradients are made, and how the values of all stages come together where the report is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from funcstage import trees
from funcstage.demo import model
from funcstage.functional import functionalize
from funcstage.pipelining import (
    FunctionalPipelineStage,
    Order,
    ScheduleName,
    captured,
    logged,
    pipeline_value_and_grad,
)
from funcstage.pipelining.local import ValueAndGrad
from funcstage.pipelining.logged import Log
from funcstage.trees import Buffers, Params

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

_TIMEOUT = timedelta(seconds=120)


class Pipeline(NamedTuple):
    """The part of a pipeline that is trained in this process.

    Attributes:
        stages: their indices.
        step: loss, buffers and gradients of these stages, from their parameters and buffers and a batch.
        gather: puts the values of these stages in the place that they have among all stages' values; on
            rank 0 there are then all of them, elsewhere none.
    """

    stages: list[int]
    step: ValueAndGrad
    gather: Callable[[Sequence[Any]], list[Any]]


def pipeline(
    order: Order, modules: Sequence[nn.Module], device: torch.device, log: Log | None = None
) -> Pipeline:
    """Make the pipeline of all stages in this one process, or of those that torchrun's rank is to train.

    Args:
        order: which schedule, and of how many stages and microbatches.
        modules: all stages.
        device: where they are.
        log: takes the scalars of each step.
    """
    if WORLD_SIZE > 1:
        return _spread(order, modules, device, log)
    step = pipeline_value_and_grad(
        [functionalize(module) for module in modules],
        model.loss_fn,
        schedule=cast(ScheduleName, order.schedule),
        num_microbatches=order.num_microbatches,
        captured=device.type == "cuda",
    )
    return Pipeline(list(range(len(modules))), step if log is None else logged(step, log), list)


def _spread(order: Order, modules: Sequence[nn.Module], device: torch.device, log: Log | None) -> Pipeline:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    indices = order.stages_of(RANK)
    stages = [
        FunctionalPipelineStage(modules[i], i, order.num_stages, device, loss_fn=model.loss_fn)
        for i in indices
    ]
    schedule_class: Any = get_schedule_class(order.schedule)
    one_stage = issubclass(schedule_class, PipelineScheduleSingle)
    schedule = schedule_class(
        stages[0] if one_stage else stages, order.num_microbatches, loss_fn=stages[-1].loss_fn
    )
    if device.type == "cuda":
        schedule = captured(schedule)
    run = schedule.step if log is None else logged(schedule, log)
    first, last = stages[0].is_first, order.rank_of_stages()[-1]

    def step(
        params: Sequence[Params], buffers: Sequence[Buffers], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, list[Buffers], list[Params]]:
        for stage, values in zip(stages, params, strict=True):
            stage.submod.load_state_dict(values, strict=False)
        losses: list[Tensor] = []
        run(*([inputs] if first else []), target=targets, losses=losses, return_outputs=False)
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=device)
        dist.broadcast(loss, last)
        grads = [stage.grads for stage in stages]
        for stage in stages:
            stage.submod.zero_grad()
        return loss, list(buffers), grads

    def gather(values: Sequence[Any]) -> list[Any]:
        mine = trees.map_leaves(Tensor.cpu, dict(zip(indices, values, strict=True)))
        parts: list[Any] = [{}] * WORLD_SIZE
        dist.gather_object(mine, parts if RANK == 0 else None)
        found = {i: value for part in parts for i, value in part.items()}
        return trees.map_leaves(lambda leaf: leaf.to(device), [found[i] for i in sorted(found)])

    return Pipeline(indices, step, gather)
