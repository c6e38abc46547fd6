"""The second run of a checkpointed region computes with the numbers of the first, or is refused."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import funcstage as fs
from funcstage.engines.levels.first_run import _Look
from tests.support.both_ways import eager, split

WIDTH = 16
aten = torch.ops.aten


class Counting(nn.Module):
    """Scales inside a checkpointed region by a number that changes from run to run."""

    def __init__(self, number: Callable[[], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.number = number

    def region(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() * self.number() + 1

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.region, x, use_reentrant=False)


class Noted(nn.Module):
    """Asks in a checkpointed region what its parameter is, and what was noted on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight.factor = 3.0  # type: ignore[assignment]

    def region(self, x: Tensor) -> Tensor:
        weight: Any = self.linear.weight
        act = torch.tanh if isinstance(weight, nn.Parameter) else torch.sigmoid
        return act(self.linear(x) * weight.factor)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.region, x, use_reentrant=False)


class Reading(nn.Module):
    """Reads an attribute of an activation and of a parameter in a checkpointed region."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.weight, self.attribute = nn.Parameter(torch.randn(WIDTH, WIDTH)), attribute

    def region(self, x: Tensor) -> Tensor:
        read = operator.attrgetter(self.attribute)
        return read(x @ read(self.weight)).tanh().sum()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.region, x, use_reentrant=False)


@pytest.mark.parametrize("attribute", ["T", "mT", "H", "mH", "real"])
def test_an_attribute_is_the_same_operation_in_the_second_run(attribute: str) -> None:
    module, x = Reading(attribute), torch.randn(6, WIDTH)
    torch.testing.assert_close(split(*fs.functionalize(module), x), eager(module, x))


def test_parameters_look_like_parameters_in_the_second_run_too() -> None:
    module, x = Noted(), torch.randn(6, WIDTH)
    torch.testing.assert_close(split(*fs.functionalize(module), x), eager(module, x))


@pytest.mark.parametrize("early_stop", [True, False])
def test_numbers_are_those_of_the_forward_as_in_eager(early_stop: bool) -> None:
    """Autograd keeps what an operation was called with first."""
    module = Counting(random.Random(0).random)
    twin = copy.deepcopy(module)
    twin.number, module.number = random.Random(0).random, random.Random(0).random
    x = torch.randn(6, WIDTH)
    stage = fs.functionalize(module)
    with set_checkpoint_early_stop(early_stop):
        for _ in range(3):
            torch.testing.assert_close(split(*stage, x), eager(twin, x))


def test_numbers_of_the_process_are_drawn_as_often_as_by_eager() -> None:
    module = Counting(random.random)
    x = torch.randn(6, WIDTH)
    random.seed(0)
    expected = [eager(module, x) for _ in range(3)]
    random.seed(0)
    torch.testing.assert_close([split(*fs.functionalize(module), x) for _ in range(3)], expected)


def test_a_second_run_that_takes_another_branch_is_refused() -> None:
    runs = iter([True, False])

    def region(x: Tensor) -> Tensor:
        return x.tanh() if next(runs) else x.sigmoid()

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return checkpoint(region, x * params, use_reentrant=False), buffers

    _, _, pullback = fs.stage_vjp(apply, torch.randn(3), (), torch.randn(3))
    with pytest.raises(fs.StageError, match=r"called tanh in its first run and sigmoid in"):
        pullback(torch.ones(3))


def test_a_second_run_may_find_a_cache_filled() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.mask: Tensor | None = None

        def region(self, x: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.ones(6, WIDTH).tril().logical_not()
            return self.linear(x).masked_fill(self.mask, 0.0).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.region, x, use_reentrant=False)

    module = Masked()
    x = torch.randn(6, WIDTH)
    torch.testing.assert_close(split(*fs.functionalize(module), x), eager(copy.deepcopy(module), x))


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "a map": lambda y: y + 1,
    "a write": lambda y: (y + 1).mul_(2),
    "a write alone": lambda y: y.clone().neg_(),
    "several results": lambda y: sum(torch.unbind_copy(y + 1)),  # type: ignore[arg-type, return-value]
    "a view": lambda y: (y + 1).t().neg(),
}


@pytest.mark.parametrize("after", AFTER)
def test_what_follows_the_last_tensor_that_is_saved_may_be_of_any_kind(after: str) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: AFTER[after](self.linear(x).exp()), x, use_reentrant=False)

    module, x = Maps(), torch.randn(6, WIDTH)
    torch.testing.assert_close(split(*fs.functionalize(module), x), eager(module, x))


LOOK = (torch.Size([2, 3]), (1, 2), torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("operation", "result", "look"),
    [
        (aten.mm.default, torch.empty(3, 2, dtype=torch.float64).t(), LOOK),
        (aten.mul_.Tensor, torch.empty(3, 2), None),
        (aten.mm.out, torch.empty(3, 2), None),
        (torch.mm, torch.empty(3, 2), None),
        (aten.native_layer_norm.default, (torch.empty(3, 2),), None),
        (aten.to_sparse.default, torch.eye(2).to_sparse(), None),
        (aten.mm.default, nn.Parameter(torch.empty(3, 2)), None),
        (aten.item.default, 2.0, None),
    ],
)
def test_memory_stands_for_what_is_a_new_plain_tensor(operation: Any, result: Any, look: Any) -> None:
    found = _Look.of(operation, result)
    assert (None if found is None else tuple(found)) == look


def test_a_region_of_weights_alone_runs_again_once_for_all_uses_of_w() -> None:
    class OfWeights(nn.Linear):
        runs = 0

        def region(self, weight: Tensor) -> Tensor:
            OfWeights.runs += 1
            return weight.sin().exp() * weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ checkpoint(self.region, self.weight, use_reentrant=False)  # type: ignore[no-any-return]

    module, x = OfWeights(4, 4, bias=False), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    weight_pullback = pullback(torch.ones_like(output))[1]
    assert OfWeights.runs == 1
    grads = [weight_pullback(retain=True), weight_pullback(retain=True), weight_pullback()]
    assert OfWeights.runs == 2
    expected = torch.autograd.grad(module(x).sum(), module.weight)
    torch.testing.assert_close([each["weight"] for each in grads], [*expected * 3])
