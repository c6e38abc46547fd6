"""What I and W return is written into: scaled, clipped, added up. Nothing else may change by it.

Every gradient is overwritten as soon as it is there, one element at a time; all others, the residuals that
somebody holds and what a pullback yields afterwards are compared with plain eager autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcstage as fs

Function = Callable[[Any, Tensor], Tensor]

STAGES: dict[str, tuple[Function, dict[str, tuple[int, ...]]]] = {
    # every element of a gradient is one number
    "a sum": (lambda p, x: x * p["a"].sum(), {"a": (3, 2)}),
    "a mean of rows": (lambda p, x: x * p["a"].mean(0).tanh(), {"a": (5, 4)}),
    "an expanded sum": (lambda p, x: (x @ p["w"]) * (1 + p["a"].sum(1, True)), {"w": (4, 3), "a": (1, 6)}),
    # several gradients are one
    "a sum of two": (lambda p, x: x @ (p["a"] + p["b"]), {"a": (4, 3), "b": (4, 3)}),
    "a sum of views": (
        lambda p, x: x @ (p["a"] + p["b"].view(4, 3) + p["c"].t()),
        {"a": (4, 3), "b": (12,), "c": (3, 4)},
    ),
    "halves of one": (lambda p, x: x @ torch.cat([p["a"], p["b"]], 1), {"a": (4, 3), "b": (4, 2)}),
    # a gradient is the cotangent, or a residual that was summed up early
    "an offset": (lambda p, x: x + p["a"] + p["b"], {"a": (6, 4), "b": (4,)}),
    "two offsets": (lambda p, x: (x @ p["w"]).sin() + (p["a"] + p["b"]), {"w": (4, 4), "a": (4,), "b": (4,)}),
    "a norm": (
        lambda p, x: x + F.linear(F.rms_norm(x, (4,), p["a"]), p["w"], p["b"]).sin(),
        {"a": (4,), "w": (4, 4), "b": (4,)},
    ),
    "two layers": (lambda p, x: F.silu(x @ p["a"]) @ p["b"] + p["c"], {"a": (4, 8), "b": (8, 4), "c": (4,)}),
}
ENGINES: dict[str, Callable[[Any], Any]] = {
    "closures": lambda apply: apply,
    "aten": lambda apply: fs.compile(apply, backend="aten"),
    "aten, all saved": lambda apply: fs.compile(apply, backend="aten", remat="none"),
    "aten, nothing saved": lambda apply: fs.compile(apply, backend="aten", remat="full"),
    "inductor": lambda apply: fs.compile(apply, backend="inductor"),
}
ON_INDUCTOR = ("a sum of views", "a norm", "two layers")
CASES = [(stage, engine) for engine in ENGINES for stage in (ON_INDUCTOR if engine == "inductor" else STAGES)]


class Case:
    """A stage that has run, with the gradients that eager finds."""

    def __init__(self, stage: str, engine: str) -> None:
        torch.manual_seed(0)
        function, shapes = STAGES[stage]
        params = {name: torch.randn(shape) for name, shape in shapes.items()}
        x = torch.randn(6, 4)
        output, _, self.pullback = fs.stage_vjp(ENGINES[engine](_stage_of(function)), params, {}, x)
        self.cotangent = torch.randn_like(output)
        self._cotangent = self.cotangent.clone()
        ends = {name: p.clone().requires_grad_() for name, p in [("x", x), *params.items()]}
        grads = torch.autograd.grad(function(ends, ends["x"]), list(ends.values()), self._cotangent)
        self.eager = dict(zip(ends, grads, strict=True))

    def check_input_grad(self, dx: Tensor) -> None:
        torch.testing.assert_close(dx, self.eager["x"])

    def check_and_overwrite(self, grads: dict[str, Tensor]) -> None:
        """Check each gradient as it is while those before it have been written into, then write into it."""
        for name, grad in grads.items():
            wanted = self.eager[name].clone()
            torch.testing.assert_close(grad, wanted, msg=lambda m, name=name: f"{name}: {m}")
            last = (-1,) * grad.dim()
            grad[last] += 7
            wanted[last] += 7
            torch.testing.assert_close(grad, wanted, msg=lambda m, name=name: f"{name}, written into: {m}")
            grad.fill_(torch.nan)
        assert torch.equal(self.cotangent, self._cotangent)


def _stage_of(function: Function) -> Any:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return function(params, x), buffers

    return apply


def copied(pullback: Any) -> Any:
    """The same pullback once more, over the same residuals."""
    return optree.tree_map(lambda leaf: leaf, pullback, namespace="funcstage")


def residuals_of(pullback: Any) -> list[Tensor]:
    return optree.tree_leaves(pullback, namespace="funcstage")


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_each_gradient_has_memory_of_its_own(stage: str, engine: str) -> None:
    case = Case(stage, engine)
    (dx,), weight_pullback = case.pullback(case.cotangent)
    case.check_and_overwrite(weight_pullback())
    case.check_input_grad(dx)


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_a_retained_weight_pullback_yields_the_same_after_its_gradients_were_written_into(
    stage: str, engine: str
) -> None:
    case = Case(stage, engine)
    (dx,), weight_pullback = case.pullback(case.cotangent)
    for retain in (True, True, False):
        case.check_and_overwrite(weight_pullback(retain=retain))
    case.check_input_grad(dx)


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_a_retained_pullback_yields_the_same_after_its_gradients_were_written_into(
    stage: str, engine: str
) -> None:
    case = Case(stage, engine)
    for retain in (True, True, False):
        (dx,), weight_pullback = case.pullback(case.cotangent, retain=retain)
        case.check_input_grad(dx)
        case.check_and_overwrite(weight_pullback())


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_copies_of_a_weight_pullback_do_not_see_what_becomes_of_each_others_gradients(
    stage: str, engine: str
) -> None:
    case = Case(stage, engine)
    _, weight_pullback = case.pullback(case.cotangent)
    first, second = copied(weight_pullback), copied(weight_pullback)
    held = residuals_of(weight_pullback)
    before = [residual.clone() for residual in held]
    for each in (first, weight_pullback, second):
        case.check_and_overwrite(each())
    for residual, was in zip(held, before, strict=True):
        assert torch.equal(residual, was)


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_copies_of_a_pullback_do_not_see_what_becomes_of_each_others_gradients(
    stage: str, engine: str
) -> None:
    case = Case(stage, engine)
    first, second = copied(case.pullback), copied(case.pullback)
    for each in (first, case.pullback, second):
        (dx,), weight_pullback = each(case.cotangent)
        case.check_input_grad(dx)
        case.check_and_overwrite(weight_pullback())


@pytest.mark.parametrize(("stage", "engine"), CASES)
def test_microbatches_add_up_in_the_gradients_of_the_first(stage: str, engine: str) -> None:
    case = Case(stage, engine)
    _, weight_pullback = case.pullback(case.cotangent)
    total = fs.stage_backward_weight([copied(weight_pullback), copied(weight_pullback), weight_pullback])
    for name, grad in total.items():
        torch.testing.assert_close(grad, 3 * case.eager[name])
