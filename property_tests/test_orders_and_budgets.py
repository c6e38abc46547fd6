"""Pieces of W in any order, under any budget, offloaded or not, compiled or not: what eager autograd gives.

Both executors run each order: that of one process, and torch's over `FunctionalPipelineStage`. The host's
memory counts as a device's here, so that residuals take the whole way without a GPU.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_process import one_process
from test_local_pipelines import Residual
from torch import Tensor, nn

import funcstage as fs
from funcstage import away
from funcstage.pipelining import (
    Action,
    FunctionalPipelineStage,
    Order,
    pipeline_value_and_grad,
    torch_schedule,
)
from funcstage.testing import strategies

pytestmark = pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")

REMAT = st.one_of(st.floats(0, 1), st.sampled_from(("none", "min_cut", "full")))
LOSS = nn.functional.mse_loss


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Everything that one rank has to do, in any order in which nothing runs before what it needs."""
    stages, microbatches, pieces = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    left = {
        Action(kind, s, m): pieces if kind == "W" else 1  # type: ignore[arg-type]
        for kind in "FIW"
        for s in range(stages)
        for m in range(microbatches)
    }
    actions: list[Action] = []
    while left:
        done = {*actions}
        ready = [action for action in left if done.issuperset(action.needs(stages))]
        action = draw(st.sampled_from(ready))
        actions.append(action)
        left[action] -= 1
        if not left[action]:
            del left[action]
    return Order("any", stages, microbatches, (tuple(actions),), pieces)


@settings(max_examples=max(10, settings.default.max_examples // 5))
@given(
    order=orders(),
    body=strategies.modules(dtype=torch.float64, blocks=("residual", "tied", "repeat")),
    options=st.one_of(st.none(), st.fixed_dictionaries({"backend": st.just("aten"), "remat": REMAT})),
    offload=st.sampled_from((None, "W", "IW")),
)
def test_any_order_of_pieces_has_the_gradients_of_the_model(
    order: Order, body: nn.Module, options: Any, offload: Any
) -> None:
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        nn.Sequential(nn.Linear(3, 3).double(), Residual(copy.deepcopy(body))).eval()
        for _ in range(order.num_stages)
    ]
    generator = torch.Generator().manual_seed(0)
    shape = 2 * order.num_microbatches, 3
    x, y = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = gradients(modules, x, y, order.num_microbatches)
    with mock.patch.object(away, "FAR", ("cpu",)):
        compare(in_one_process(modules, x, y, order, options, offload), expected)
        compare(under_torch(modules, x, y, order, options, offload), expected)


def gradients(modules: list[nn.Module], x: Tensor, y: Tensor, count: int) -> list[dict[str, Any]]:
    losses = [
        LOSS(nn.Sequential(*modules)(rows.clone()), y.chunk(count)[i])
        for i, rows in enumerate(x.chunk(count))
    ]
    loss = torch.stack(losses).mean()
    found = []
    for module in modules:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        grads: Any = [None] * len(trained)
        if loss.requires_grad and trained:
            grads = torch.autograd.grad(loss, [*trained.values()], retain_graph=True, allow_unused=True)
        found.append(dict(zip(trained, grads, strict=True)))
    return found


def in_one_process(
    modules: list[nn.Module], x: Tensor, y: Tensor, order: Order, options: Any, offload: Any
) -> list[dict[str, Any]]:
    stages = [fs.functionalize(module) for module in modules]
    applies: Any = [s.apply if options is None else fs.compile(s.apply, **options) for s in stages]
    count = order.num_microbatches
    step: Any = pipeline_value_and_grad(
        applies, LOSS, schedule=order, num_microbatches=count, offload=offload
    )
    found: list[dict[str, Any]] = step([s.params for s in stages], [s.buffers for s in stages], x, y)[2]
    return found


def under_torch(
    modules: list[nn.Module], x: Tensor, y: Tensor, order: Order, options: Any, offload: Any
) -> list[dict[str, Any]]:
    with one_process():
        stages = [
            FunctionalPipelineStage(m, i, len(modules), "cpu", compile=options or False, offload=offload)
            for i, m in enumerate(modules)
        ]
        torch_schedule(order, stages, LOSS).step(x, target=y)
    found = [{name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in modules]
    for module in modules:
        module.zero_grad()
    return found


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, eager in zip(found, expected, strict=True):
        assert ours.keys() == eager.keys()
        for name, grad in eager.items():
            assert (ours[name] is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(ours[name], grad, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_this_would_notice_a_piece_that_is_left_out() -> None:
    modules: list[nn.Module] = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()]
    x, y = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    found = in_one_process(
        modules,
        x,
        y,
        Order("two", 1, 1, ((*map(Action, "FIWW", [0] * 4, [0] * 4),),), 2),
        None,
        None,  # type: ignore[arg-type]
    )
    compare(found, gradients(modules, x, y, 1))
    found[0]["2.weight"] = None
    with pytest.raises(AssertionError):
        compare(found, gradients(modules, x, y, 1))
