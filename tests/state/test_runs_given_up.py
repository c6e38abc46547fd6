"""A run that is given up leaves generators, counters and lists as it found them, wherever they are kept.

A stage that takes gradients inside itself runs by levels first and then on a plain tape; eager runs it once.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from tests.support.both_ways import eager, split

SHARED = random.Random(1)
ARRAYS = numpy.random.default_rng(2)
SEEN: list[int] = []
CALLS = 0


class Counter:
    """Counts, and draws."""

    def __init__(self) -> None:
        self.calls = 0
        self.generator = random.Random(3)

    def draw(self) -> float:
        self.calls += 1
        return self.calls + self.generator.random()


COUNTER = Counter()


def counted() -> float:
    global CALLS
    CALLS += 1
    SEEN.append(CALLS)
    return float(len(SEEN))


class Penalised(nn.Module):
    """Takes gradients inside; what it draws scales its output."""

    own_draws = random.Random(4)
    n_runs = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.kind = kind
        self.python = random.Random(5)
        self.arrays = numpy.random.default_rng(6)
        self.old_arrays = numpy.random.RandomState(7)
        self.torchs = torch.Generator().manual_seed(8)
        self.method = random.Random(9).random
        self.holder = Counter()

    def draw(self) -> Any:
        draws: dict[str, Callable[[], Any]] = {
            "python's": self.python.random,
            "numpy's": self.arrays.random,
            "numpy's old": self.old_arrays.rand,
            "torch's": lambda: torch.rand((), generator=self.torchs),
            "method": lambda: self.method(),
            "object": self.holder.draw,
            "process": lambda: random.random() + numpy.random.rand(),
            "global": lambda: SHARED.random() + ARRAYS.random(),
            "global object": lambda: COUNTER.draw(),
            "global counter": counted,
            "class": self.of_class,
        }
        return draws[self.kind]()

    def of_class(self) -> float:
        Penalised.n_runs += 1
        return Penalised.n_runs + self.own_draws.random()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.draw()
        (slope,) = torch.autograd.grad(y.pow(2).sum(), self.linear.weight, create_graph=True)
        return y + slope.sum()


KINDS = (
    *("python's", "numpy's", "numpy's old", "torch's", "method", "object", "process"),
    *("global", "global object", "global counter", "class"),
)


def reset() -> None:
    global CALLS
    CALLS = 0
    SEEN.clear()
    SHARED.seed(1)
    ARRAYS.bit_generator.state = numpy.random.default_rng(2).bit_generator.state
    COUNTER.__init__()  # type: ignore[misc]
    Penalised.own_draws.seed(4)
    Penalised.n_runs = 0
    random.seed(0)
    numpy.random.seed(0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stage_draws_and_counts_is_drawn_and_counted_once(kind: str) -> None:
    torch.manual_seed(0)
    module = Penalised(kind).double()
    twin = copy.deepcopy(module)
    twin.method = random.Random(9).random
    module.method = random.Random(9).random
    x = torch.randn(2, 3, dtype=torch.float64)
    reset()
    expected = [eager(module, x) for _ in range(2)]
    left = CALLS, len(SEEN), COUNTER.calls, Penalised.n_runs, module.holder.calls, random.random()
    reset()
    stage = fs.functionalize(twin)
    results = [split(*stage, x) for _ in range(2)]
    torch.testing.assert_close(results, expected)
    assert (CALLS, len(SEEN), COUNTER.calls, Penalised.n_runs, twin.holder.calls, random.random()) == left


def test_a_generator_among_the_arguments_is_drawn_from_once() -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor, draws: torch.Generator) -> Any:
        y = x * params * torch.rand((), generator=draws)
        return y + torch.func.grad(lambda p: (x * p).pow(2).sum())(params), buffers

    params, x, draws = torch.randn(3), torch.randn(3), torch.Generator().manual_seed(0)
    first, _, _ = fs.stage_vjp(apply, params, (), x, draws, argnums=0)
    draws.manual_seed(0)
    assert torch.equal(first, apply(params, (), x, draws)[0])


def test_a_generator_that_a_function_closes_over_is_drawn_from_once() -> None:
    draws = random.Random(0)

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        y = x * params * draws.random()
        return y + torch.func.grad(lambda p: (x * p).pow(2).sum())(params), buffers

    params, x = torch.randn(3), torch.randn(3)
    first, _, _ = fs.stage_vjp(apply, params, (), x)
    draws.seed(0)
    assert torch.equal(first, apply(params, (), x)[0])


class Scaled(nn.Module):
    """Takes gradients inside, and scales by what an iterator gives or by nothing."""

    def __init__(self, scales: Any, used: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scales = scales
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * (next(self.scales) if self.used else 1)
        return y + torch.autograd.grad(y.sum(), self.linear.weight, create_graph=True)[0].sum()


@pytest.mark.parametrize("scales", [lambda: iter([2, 3]), lambda: (n for n in (2, 3))])
def test_an_iterator_that_cannot_be_put_back_is_refused(scales: Callable[[], Any]) -> None:
    with pytest.raises(fs.StageError, match=r"holds an iterator \(builtins\.\w+\).*Keep a list"):
        fs.stage_vjp(*fs.functionalize(Scaled(scales(), used=True)), torch.randn(2, 3))


def test_an_iterator_that_has_not_gone_on_is_no_matter() -> None:
    module = Scaled(iter([2, 3]), used=False)
    x = torch.randn(2, 3)
    torch.testing.assert_close(split(*fs.functionalize(module), x), eager(module, x))
