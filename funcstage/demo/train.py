"""The training loop: parameters in, parameters out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcstage.demo import model
from funcstage.demo.adamw import Optimizer
from funcstage.functional import FunctionalStage
from funcstage.pipelining.local import ValueAndGrad
from funcstage.trees import Buffers, Params


class Trained(NamedTuple):
    """What training ends with: values, one entry a stage, and the loss of every step."""

    params: list[Params]
    buffers: list[Buffers]
    losses: list[float]


def train(
    step: ValueAndGrad,
    optimizer: Optimizer,
    params: list[Params],
    buffers: list[Buffers],
    batches: Iterable[tuple[Tensor, Tensor]],
    advance: Callable[[float], None],
) -> Trained:
    """Take a step on every batch, and tell `advance` its loss."""
    state = optimizer.init(params)
    losses = []
    for inputs, targets in batches:
        loss, buffers, grads = step(params, buffers, inputs, targets)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
        advance(losses[-1])
    return Trained(params, buffers, losses)


@torch.no_grad()
def evaluate(stages: Sequence[FunctionalStage], inputs: Tensor, targets: Tensor, batch: int = 32) -> float:
    """Return the mean loss of the whole model, in nats per byte."""
    total = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        value = x
        for stage in stages:
            value, _ = stage.apply(stage.params, stage.buffers, value)
        total += model.loss_fn(value, y).item() * len(x)
    return total / len(inputs)
