"""What a forward asserts of values is asserted in each call of a compiled stage, as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

ONES, EYE = torch.ones(3, 3), torch.eye(3)


def _unread(x: Tensor) -> Tensor:
    torch.linalg.inv(x)
    return x


def _asserting(x: Tensor) -> Tensor:
    torch._assert_async(x.sum() < 5, "too large")
    return x


ASSERTING: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {
    "an inverse": (torch.linalg.inv, EYE, ONES),
    "an inverse that nobody reads": (_unread, EYE, ONES),
    "inverses under vmap": (lambda x: torch.func.vmap(torch.linalg.inv)(x.expand(2, 3, 3)), EYE, ONES),
    "an inverse in a region": (lambda x: checkpoint(torch.linalg.inv, x, use_reentrant=False), EYE, ONES),
    "a factorization": (torch.linalg.cholesky, EYE, -EYE),
    "a solution": (lambda x: torch.linalg.solve(x, x[:, :1]), EYE, ONES),
    "eigenvalues": (torch.linalg.eigvalsh, EYE, EYE * torch.nan),
    "an assertion": (_asserting, EYE, ONES),
    "classes below none": (lambda x: F.one_hot(x[0].long(), 3) * x, EYE, EYE - ONES),
    "classes above all": (lambda x: F.one_hot(x[0].long(), num_classes=3) * x, EYE, 3 * ONES),
}
"""What a forward does, a value for which that works, and one for which it raises."""


class Chain(nn.Module):
    """Blocks that are alike, each of which asserts something of what it computes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64))])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scales[0]) * 2


@pytest.mark.supports("linear algebra (a singular matrix raises)")
@pytest.mark.parametrize("backend", ["aten", "inductor"])
@pytest.mark.parametrize("case", ASSERTING)
def test_what_eager_asserts_is_asserted_in_each_call(case: str, backend: Any) -> None:
    function, good, bad = ASSERTING[case]
    module, good, bad = Chain(function), good.double(), bad.double()
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend=backend)
    for _ in range(2):
        leaf = good.clone().requires_grad_()
        expected = module(leaf)
        (dx,) = torch.autograd.grad(expected.sum(), leaf)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, good)
        torch.testing.assert_close([output, pullback(torch.ones_like(output))[0][0]], [expected.detach(), dx])
        with pytest.raises(RuntimeError) as of_eager:
            module(bad)
        with pytest.raises(type(of_eager.value)) as caught:
            fs.stage_vjp(stage, params, buffers, bad)
        assert str(caught.value) == str(of_eager.value)


class Inverting(nn.Module):
    """A layer that stands for others of its like, did it not assert something."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = (x @ self.weight).tanh() + x
        return x @ torch.linalg.inv(self.weight)


@pytest.mark.parametrize("place", range(4))
def test_each_of_several_layers_asserts_of_its_own_matrix(place: int) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(*(Inverting() for _ in range(4))))
    stage = fs.compile(apply, backend="aten")
    fs.stage_vjp(stage, params, buffers, EYE)
    with pytest.raises(torch.linalg.LinAlgError):
        fs.stage_vjp(stage, params | {f"{place}.weight": ONES}, buffers, EYE)


class Keeping(nn.Module):
    """A module that keeps something besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.weight * x)
        self.kept = inverse.sum()
        return inverse


def test_a_call_that_raises_leaves_nothing_on_the_module() -> None:
    module = Keeping()
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten")
    fs.stage_vjp(stage, params, buffers, EYE + ONES)
    kept = module.kept
    torch.testing.assert_close(kept, torch.linalg.inv(EYE * 2).sum())
    with pytest.raises(torch.linalg.LinAlgError):
        fs.stage_vjp(stage, params, buffers, ONES * 0)
    assert module.kept is kept
