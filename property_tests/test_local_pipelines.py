"""Any schedule and any stages, in one process, are the whole model under plain eager autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import funcstage as fs
from funcstage.pipelining import Order, ScheduleError, pipeline_order, pipeline_value_and_grad
from funcstage.testing import strategies

pytestmark = pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")


class Residual(nn.Module):
    """A generated module as a stage: rows in, rows of the same shape out, each computed from itself."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + torch.tanh(y.abs().sum() if y.is_complex() else y.sum())


WRITING = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)).double()
"""Writes into its input, first of all."""


@example(order=pipeline_order("GPipe", 2, 2), bodies=[WRITING])
@settings(max_examples=max(20, settings.default.max_examples // 5))
@given(
    order=strategies.schedules(max_ranks=3, max_microbatches=6),
    bodies=st.lists(
        strategies.modules(dtype=torch.float64, blocks=("residual", "tied", "repeat")), min_size=1, max_size=2
    ),
)
def test_any_schedule_of_any_stages_is_the_whole_model(order: Order, bodies: list[nn.Module]) -> None:
    try:
        pipeline_order(order.schedule, order.num_stages, order.num_microbatches)
    except ScheduleError:
        return  # in one process the ranks are those that torch takes by itself
    modules = [Residual(copy.deepcopy(bodies[i % len(bodies)])).eval() for i in range(order.num_stages)]
    stages = [fs.functionalize(module) for module in modules]
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(2 * order.num_microbatches, 3, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    step: Any = pipeline_value_and_grad(
        stages, nn.functional.mse_loss, schedule=order.schedule, num_microbatches=order.num_microbatches
    )
    loss, _, found = step([s.params for s in stages], [s.buffers for s in stages], inputs, targets)
    losses = []
    for x, y in zip(inputs.split(2), targets.split(2), strict=True):
        x = x.clone()  # a module may write into it, and the parts of a split count their writes together
        for module in modules:
            x = module(x)
        losses.append(nn.functional.mse_loss(x, y))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-8, equal_nan=True)
    for module, grads in zip(modules, found, strict=True):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wanted = (
            torch.autograd.grad(expected, list(trained.values()), retain_graph=True, allow_unused=True)
            if expected.requires_grad and trained
            else [None] * len(trained)
        )
        for name, grad in zip(trained, wanted, strict=True):
            assert (grads[name] is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(grads[name], grad, rtol=1e-7, atol=1e-9, equal_nan=True)
