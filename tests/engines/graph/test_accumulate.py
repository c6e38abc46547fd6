"""Accumulating weight gradients over microbatches: the sum that eager backward leaves in `.grad`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Tied(nn.Module):
    """One weight in two products and one of them transposed; a norm; a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.weight = nn.Parameter(torch.randn(6, 10))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.norm(x) @ self.weight).tanh() @ self.weight.t() * self.frozen)


class Experts(nn.Module):
    """Batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, *x.shape), self.weight).tanh().sum(0)


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False)),
    "tied": Tied,
    "experts": Experts,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten()),
}
ENGINES = [None, {"backend": "aten"}, {"backend": "inductor"}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES, ids=["closures", "aten", "inductor"])
@pytest.mark.parametrize("name", MODULES)
def test_microbatches_add_up_to_what_eager_accumulates(
    name: str, engine: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().to(DEVICE, dtype)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine is None else fs.compile(apply, **engine)
    batches = torch.randn(3, 5, 6, dtype=dtype, device=DEVICE)
    reference = {name: p.double().detach().requires_grad_() for name, p in params.items()}
    pending, cotangents = [], []
    for x in batches:
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        cotangents.append(torch.randn_like(output))
        pending.append(pullback(cotangents[-1])[1])
    wide = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    accumulate = {**wide, "unused": None} if name == "tied" else wide
    if dtype is torch.float64:
        accumulate = fs.stage_backward_weight(pending.pop(0))
    before = {name: total.data_ptr() for name, total in accumulate.items() if total is not None}
    grads = fs.stage_backward_weight(pending, accumulate)

    module = module.double()
    for x, cotangent in zip(batches.double(), cotangents, strict=True):
        torch.func.functional_call(module, reference, x).backward(cotangent.double())
    assert before == {name: grad.data_ptr() for name, grad in grads.items() if grad is not None}
    for key, grad in grads.items():
        expected = reference[key].grad
        assert (grad is None) == (expected is None)
        if grad is not None and expected is not None:
            assert grad.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
            tolerance = 1e-12 if dtype is torch.float64 else 2e-2
            error = (grad - expected).norm() / expected.norm()
            assert error < tolerance, f"{key}: {error}"


@pytest.mark.parametrize("engine", ENGINES, ids=["closures", "aten", "inductor"])
def test_accumulators_that_are_differentiated_are_left_intact(engine: dict[str, Any] | None) -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(3, 2))
    stage = apply if engine is None else fs.compile(apply, **engine)
    _, _, pullback = fs.stage_vjp(stage, params, buffers, torch.randn(4, 3))
    totals = {name: torch.zeros_like(p, requires_grad=True) for name, p in params.items()}
    _, weight_pullback = pullback(torch.ones(4, 2))
    grads = fs.stage_backward_weight(weight_pullback, totals)
    assert all(total.eq(0).all() for total in totals.values())
    assert all(grad.requires_grad for grad in grads.values())


@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_products_of_a_compiled_stage_add_into_the_accumulators_without_a_pass_of_their_own(
    backend: Any,
) -> None:
    apply, params, buffers = fs.functionalize(MODULES["mlp"]().to(DEVICE))
    fast = fs.compile(apply, backend=backend)
    x = torch.randn(5, 6, device=DEVICE)
    for measured in (False, True):
        output, _, pullback = fs.stage_vjp(fast, params, buffers, x)
        _, weight_pullback = pullback(torch.randn_like(output))
        totals = {name: torch.zeros_like(p) for name, p in params.items()}
        if measured:
            with torch.profiler.profile() as profile:
                fs.stage_backward_weight(weight_pullback, totals)
            calls = {event.key: event.count for event in profile.key_averages()}
            assert calls["aten::addmm_"] == 2
            assert "aten::mm" not in calls
            assert calls.get("aten::add_", 0) == 1  # the bias
        else:
            fs.stage_backward_weight(weight_pullback, totals)
