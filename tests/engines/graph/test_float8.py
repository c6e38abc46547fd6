"""Products of float8 numbers, scaled by state that each forward updates, against plain eager autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).clamp(-LARGEST, LARGEST).to(FLOAT8)


def product(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, like: Tensor) -> Tensor:
    """`a @ b`, of which the kernel takes `b` by columns."""
    by_columns = b.t().contiguous().t()
    return torch._scaled_mm(a, by_columns, scale_a=1 / of_a, scale_b=1 / of_b, out_dtype=like.dtype)


class Product(torch.autograd.Function):
    """`x @ w.t()` and both its gradients, in float8."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, of_x: Tensor, of_w: Tensor) -> Tensor:
        return product(rounded(x, of_x), rounded(w, of_w).t(), of_x, of_w, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, of_x, of_w = ctx.saved_tensors
        of_g = LARGEST / g.abs().max().float()
        narrow = rounded(g, of_g)
        of_input = product(narrow, rounded(w, of_w), of_g, of_w, x)
        return of_input, product(narrow.t().contiguous(), rounded(x, of_x), of_g, of_x, w), None, None


class Float8Linear(nn.Linear):
    """Scales its input by the largest that it has seen lately."""

    largest: Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.register_buffer("largest", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        of_x = LARGEST / self.largest.float()
        of_w = LARGEST / self.weight.detach().abs().max().float()
        self.largest = torch.maximum(self.largest * 0.9, x.detach().abs().max())
        return Product.apply(x, self.weight, of_x, of_w)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["uncompiled", "aten", "inductor"])
def test_float8_products_are_split_and_their_scales_are_new_buffers(backend: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Float8Linear(32, 32), nn.GELU(), Float8Linear(32, 16)).bfloat16()
    eager = copy.deepcopy(module)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if backend == "uncompiled" else fs.compile(apply, backend=backend, fullgraph=True)
    # Inductor rounds less often between products, so that some numbers go to another float8 number.
    exact = {"rtol": 0.0, "atol": 0.0} if backend != "inductor" else {"rtol": 0.1, "atol": 0.15}
    for _ in range(2):
        x, g = torch.randn(16, 32).bfloat16(), torch.randn(16, 16).bfloat16()
        leaf = x.clone().requires_grad_()
        output = eager(leaf)
        expected = [output.detach(), *torch.autograd.grad(output, [leaf, *eager.parameters()], g)]
        found, buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(g)
        torch.testing.assert_close([found, dx, *weight_pullback().values()], expected, **exact)
        torch.testing.assert_close(buffers, dict(eager.named_buffers()), **exact)


def test_each_of_the_three_programs_has_its_own_products() -> None:
    module = nn.Sequential(Float8Linear(32, 32), nn.GELU(), Float8Linear(32, 16)).bfloat16()
    apply, params, buffers = fs.functionalize(module)
    programs = fs.compile(apply, backend="aten").programs(params, buffers, torch.randn(16, 32).bfloat16())
    for program in programs:
        assert str(program.graph).count("_scaled_mm.default") == 2
