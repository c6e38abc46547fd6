"""Beside equality with eager: finite differences, low precision, NaN and infinity, reruns to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcstage as fs
from funcstage import trees
from funcstage.testing import check_stage, strategies
from funcstage.testing.stages import Stage

FACTOR = 2.0
"""How many times as far from float64 as eager in the same precision a result may be, in the mean square."""

DRAWS = 16
"""Of parameters, inputs and cotangents: one result may be luckier than another, all of them are not."""

LEAST = 4
"""Roundings of a leaf's largest magnitude that eager's error counts as at least: chance may make it none."""


class Attention(nn.Module):
    """Self-attention with tied projections and a convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x)
        y = nn.functional.scaled_dot_product_attention(q, self.project(q), x)
        return self.conv(self.norm(y)).tanh()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2)),
    "attention": Attention,
    "recurrent": lambda: nn.Sequential(nn.Linear(4, 3), nn.GRU(3, 2), First(), nn.Linear(2, 2)),
}


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return MODULES[name]().to(dtype), torch.randn(2, 3, 4).to(dtype)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    module, x = made(name)
    apply, params, buffers = fs.functionalize(module)

    class Split(torch.autograd.Function):
        """The stage as a function whose derivative is I and W."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
            named = dict(zip(params, weights, strict=True))
            output, _, ctx.pullback = fs.stage_vjp(apply, named, buffers, x.detach())
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            # Asked several times, for one output after the other.
            (dx,), weight_pullback = ctx.pullback(grad, retain=True)
            return dx, *weight_pullback().values()

    inputs = [tensor.clone().requires_grad_() for tensor in (x, *params.values())]
    assert torch.autograd.gradcheck(Split.apply, inputs)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_gradients_are_those_of_finite_differences(name: str) -> None:
    module, x = made(name)
    apply, params, buffers = fs.functionalize(module)

    def gradients(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(params, weights, strict=True))
        output, _, pullback = fs.stage_vjp(apply, named, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return dx, *weight_pullback().values()

    inputs = [tensor.clone().requires_grad_() for tensor in (x, *params.values())]
    with sdpa_kernel(SDPBackend.MATH):  # no other attention has second derivatives; torch 2.14 prefers others
        assert torch.autograd.gradcheck(gradients, inputs)


@pytest.mark.parametrize("engine", [None, "aten", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["perceptron", "attention"])
def test_in_low_precision_no_result_is_further_from_float64_than_eagers(
    name: str, dtype: torch.dtype, engine: str | None
) -> None:
    apply, _, _ = fs.functionalize(made(name, dtype)[0])
    if engine is not None:
        apply = fs.compile(apply, backend=engine)
    errors = torch.stack([roundings(apply, name, dtype, seed) for seed in range(DRAWS)])
    ours, eagers = errors.square().mean(0).sqrt()
    assert (ours <= FACTOR * eagers.clamp(min=LEAST)).all(), (
        f"{ours.tolist()} against eager's {eagers.tolist()}"
    )


def roundings(apply: Any, name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """How many roundings of its largest magnitude each result is off: a row of ours, one of eager's."""
    module, x = made(name, dtype, seed)
    _, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    grad = torch.randn(output.shape).to(dtype)
    (dx,), weight_pullback = pullback(grad)
    exact = differentiated(copy.deepcopy(module).double(), x.double(), grad.double())
    rows = ([output, dx, *weight_pullback().values()], differentiated(module, x, grad))
    return torch.tensor(
        [
            [
                float((value.double() - right).abs().max() / right.abs().max()) / torch.finfo(dtype).eps
                for value, right in zip(row, exact, strict=True)
            ]
            for row in rows
        ]
    )


def differentiated(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and all gradients by plain autograd."""
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *module.parameters()], grad)]


@settings(max_examples=max(30, settings.default.max_examples // 4))
@given(
    stage=strategies.stages(
        dtype=st.sampled_from((torch.float32, torch.float64)), blocks=("residual", "branch")
    ),
    value=st.sampled_from((float("nan"), float("inf"), -float("inf"))),
    in_cotangent=st.booleans(),
)
def test_what_is_not_finite_lands_where_eager_puts_it(stage: Stage, value: float, in_cotangent: bool) -> None:
    module, args, kwargs = stage.build()

    def spoilt(leaf: Any) -> Any:
        if not trees.is_differentiable(leaf) or not leaf.numel():
            return leaf
        leaf = leaf.clone(memory_format=torch.contiguous_format)
        leaf.view(-1)[0] = value
        return leaf

    def cotangents(output: Any) -> Any:
        ones = trees.map_leaves(lambda y: torch.ones_like(y) if trees.is_differentiable(y) else None, output)
        return trees.map_leaves(spoilt, ones) if in_cotangent else ones

    if not in_cotangent:
        args = (spoilt(args[0]), *args[1:])
    check_stage(
        module,
        *args,
        engines=("closures", "aten"),
        argnums=stage.argnums,
        output_grads=cotangents,
        flops=False,
        **kwargs,
    )


@pytest.mark.parametrize("engine", [None, "aten", "inductor"])
@pytest.mark.parametrize("name", MODULES)
def test_in_deterministic_mode_reruns_are_equal_to_the_last_bit(name: str, engine: str | None) -> None:
    module, x = made(name, torch.float32)
    apply, params, buffers = fs.functionalize(module)
    if engine is not None:
        apply = fs.compile(apply, backend=engine)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
            (dx,), weight_pullback = pullback(torch.ones_like(output))
            runs.append([output, dx, *weight_pullback().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        for ours, first in zip(again, runs[0], strict=True):
            assert torch.equal(ours, first)
