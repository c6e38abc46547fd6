"""Cotangents that are absent: programs without what they would add yield what eager yields for zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funcstage as fs

SUMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    # what the first output is of the input, and how the backward joins the two cotangents
    "of one dtype": (lambda x: x * 2, lambda a, b: a + b),
    "with a factor": (lambda x: x * 2, lambda a, b: torch.add(a, b, alpha=3)),
    "with a factor of the other": (lambda x: x * 2, lambda a, b: torch.add(b, a, alpha=3)),
    "promoted": (lambda x: x.bfloat16(), lambda a, b: (a + b) / 3),
    "broadcast": (lambda x: x.sum(), lambda a, b: (a + b).cumsum(0)),
    "broadcast along an axis": (lambda x: x.sum(0), lambda a, b: (b + a).cumsum(0)),
    "less": (lambda x: x * 2, lambda a, b: a - b),
    "of a sum": (lambda x: x * 2, lambda a, b: (a + b) + (b + a)),
}


def stage_of(name: str) -> Any:
    first, join = SUMS[name]

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return first(x), x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.shape = inputs[0].shape

        @staticmethod
        def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return join(a, b).float().expand(ctx.shape).clone()

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return Joined.apply(x * params["w"]), buffers

    return apply


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_without_one_of_its_terms_is_what_it_is_with_a_zero(name: str, present: Any) -> None:
    torch.manual_seed(0)
    apply = stage_of(name)
    params, x = {"w": torch.randn(4)}, torch.randn(3, 4)
    ends = [x.clone().requires_grad_(), params["w"].clone().requires_grad_()]
    outputs, _ = apply({"w": ends[1]}, {}, ends[0])
    cotangents = [torch.randn_like(o) if there else None for o, there in zip(outputs, present, strict=True)]
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    wanted = torch.autograd.grad([o for o, _ in used], ends, [c for _, c in used])
    for stage in (apply, fs.compile(apply, backend="aten"), fs.compile(apply, backend="aten", remat="none")):
        _, _, pullback = fs.stage_vjp(stage, params, {}, x)
        (dx,), weight_pullback = pullback(tuple(cotangents))
        torch.testing.assert_close([dx, weight_pullback()["w"]], list(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patterns", [((1, 1), (1, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 0), (0, 1), (1, 0))])
def test_sums_over_microbatches_with_different_absent_cotangents_are_eagers(patterns: Any) -> None:
    torch.manual_seed(0)

    def function(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ params["a"]).tanh() @ params["b"], x @ params["a"] @ params["c"]

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return function(params, x), buffers

    params = {"a": torch.randn(4, 4), "b": torch.randn(4, 3), "c": torch.randn(4, 2)}
    ends = {name: p.clone().requires_grad_() for name, p in params.items()}
    stage = fs.compile(apply, backend="aten")
    total: Any = {name: torch.zeros_like(p) for name, p in params.items()}
    for present in patterns:
        x = torch.randn(5, 4)
        outputs = function(ends, x)
        cotangents = [torch.randn_like(o) if on else None for o, on in zip(outputs, present, strict=True)]
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
        torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
        _, _, pullback = fs.stage_vjp(stage, params, {}, x)
        total = fs.stage_backward_weight(pullback(tuple(cotangents))[1], accumulate=total)
    for name, end in ends.items():
        wanted = torch.zeros_like(end) if end.grad is None else end.grad
        torch.testing.assert_close(total[name], wanted)
