"""Batch norms with a cumulative average, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcstage as fs
from funcstage.engines.graph.cumulative import averaged_in_tensors

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
    compiled = fs.compile(apply, backend=backend, fullgraph=True)
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


def given(norm: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


PARTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    **{kind.__name__: (lambda kind=kind: kind(3, momentum=None), True) for kind in BATCH_NORMS},
    "a class of its own": (
        lambda: type("Own", (nn.BatchNorm1d,), {})(3, momentum=None),
        True,
    ),
    "a forward of its class": (lambda: Reads(3, momentum=None), False),
    "a forward of its own": (lambda: given(nn.BatchNorm1d(3, momentum=None), forward=F.relu), False),
    "a moving average": (lambda: nn.BatchNorm1d(3), False),
    "in use": (lambda: nn.BatchNorm1d(3, momentum=None).eval(), False),
    "without statistics": (lambda: nn.BatchNorm1d(3, momentum=None, track_running_stats=False), False),
    "with old ones": (lambda: given(nn.BatchNorm1d(3, momentum=None), track_running_stats=False), False),
    "without a mean": (lambda: given(nn.BatchNorm1d(3, momentum=None), running_mean=None), False),
    "without a count": (lambda: given(nn.BatchNorm1d(3, momentum=None), num_batches_tracked=None), False),
    "another norm": (lambda: nn.InstanceNorm1d(3, momentum=None, track_running_stats=True), False),
}


@pytest.mark.parametrize("name", PARTS)
def test_norms_that_average_over_all_steps_are_given_a_forward_and_lose_it_again(name: str) -> None:
    make, averages = PARTS[name]
    module = nn.Sequential(nn.Linear(3, 3), make())
    part, before = vars(module[1]), dict(vars(module[1]))
    with averaged_in_tensors(module):
        assert (part.get("forward") is not before.get("forward")) == averages
        assert "forward" not in vars(module[0])
    assert part == before
    with averaged_in_tensors(lambda x: x):
        pass


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
