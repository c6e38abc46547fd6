"""Batch norms with a cumulative average, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

NORMS = {
    "rows": (nn.BatchNorm1d, (5, 3)),
    "sequences": (nn.BatchNorm1d, (4, 3, 2)),
    "images": (nn.BatchNorm2d, (2, 3, 4, 4)),
    "no rows": (nn.BatchNorm1d, (0, 3)),
}


@pytest.mark.parametrize("backend", ["aten", "inductor"])
@pytest.mark.parametrize("case", NORMS)
def test_a_cumulative_average_is_what_eager_makes_of_it_over_steps(case: str, backend: str) -> None:
    kind, shape = NORMS[case]
    module = nn.Sequential(kind(3, momentum=None), nn.Tanh(), kind(3, momentum=None, affine=False))
    reference = copy.deepcopy(module)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend=backend)
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        leaf = x.clone().requires_grad_()
        expected = reference(leaf)
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, [leaf, *reference.parameters()], cotangent)
        output, buffers, pullback = fs.stage_vjp(compiled, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent)
        found = [output, dx, *weight_pullback().values(), *buffers.values()]
        for one, other in zip(found, [expected, *grads, *reference.buffers()], strict=True):
            torch.testing.assert_close(one, other.detach())


class Reads(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_momentum_set_between_calls_counts_and_the_module_is_left_as_it_was() -> None:
    module, x = nn.BatchNorm1d(3, momentum=None), torch.randn(5, 3)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten")
    for momentum in (None, 0.3, None):
        module.momentum = momentum
        reference = copy.deepcopy(module)
        reference(x)
        _, found, _ = fs.stage_vjp(compiled, params, buffers, x)
        assert "forward" not in vars(module)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(found[name], buffer)


def test_an_input_of_another_shape_is_refused_as_by_eager() -> None:
    module, x = nn.BatchNorm2d(3, momentum=None), torch.randn(5, 3)
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(x)
    with pytest.raises(ValueError, match="expected 4D input"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)


def test_a_forward_of_ones_own_around_a_cumulative_average_is_refused_where_it_reads_the_count() -> None:
    apply, params, buffers = fs.functionalize(Reads(3, momentum=None))
    compiled = fs.compile(apply, backend="aten", fullgraph=True)
    with pytest.raises(fs.StageError, match="value"):
        fs.stage_vjp(compiled, params, buffers, torch.randn(5, 3))
