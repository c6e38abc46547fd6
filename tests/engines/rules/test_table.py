"""The table of rules, and operations that are told apart by their schemas, against eager autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcstage as fs
from funcstage._torch.operators import NO_WRITES
from funcstage.engines.rules.table import RULES, Known, known
from funcstage.testing import check_stage


@torch.library.custom_op("funcstage_rules::fill", mutates_args={"into"})
def fill(value: Tensor, into: Tensor) -> None:
    into.copy_(value)


class Stage(nn.Module):
    def __init__(self, case: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("kept", torch.zeros(2, 3))
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def overload_on_an_activation(s: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.mul_.Scalar(s.linear(x), 3.0)


def packet_on_an_activation(s: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.mul_(s.linear(x), 3.0)


def overload_on_a_value_of_parameters(s: Any, x: Tensor) -> Tensor:
    weight = s.linear.weight * 2
    torch.ops.aten.mul_.Tensor(weight, s.linear.weight)
    return x @ weight


def activation_into_a_fresh_tensor(s: Any, x: Tensor) -> Tensor:
    fresh = torch.zeros_like(x)
    torch.ops.aten.add_.Tensor(fresh, s.linear(x))
    return fresh * x


def lists_of_tensors(s: Any, x: Tensor) -> Tensor:
    parts = [s.linear(x), s.linear(x * 2)]
    torch._foreach_mul_(parts, 2.0)
    return parts[0] * parts[1]


def custom_operator_on_a_fresh_tensor(s: Any, x: Tensor) -> Tensor:
    fresh = torch.zeros(2, 3)
    fill(torch.ones(2, 3), fresh)
    return s.linear(x) * fresh


def custom_operator_on_a_buffer(s: Any, x: Tensor) -> Tensor:
    fill(torch.ones(2, 3), s.kept)
    return s.linear(x) * s.kept


@pytest.mark.parametrize(
    "case",
    [
        overload_on_an_activation,
        packet_on_an_activation,
        overload_on_a_value_of_parameters,
        activation_into_a_fresh_tensor,
        lists_of_tensors,
        custom_operator_on_a_fresh_tensor,
        custom_operator_on_a_buffer,
    ],
)
def test_writes_that_a_name_does_not_tell_are_those_of_eager(case: Any) -> None:
    check_stage(Stage(case), torch.randn(2, 3), engines=("closures", "aten"))


def into_an_argument(s: Any, x: Tensor) -> Tensor:
    fill(torch.ones(2, 3), x)
    return s.linear(x)


def into_a_parameter(s: Any, x: Tensor) -> Tensor:
    fill(torch.ones(3, 3), s.linear.weight)
    return s.linear(x)


def overload_into_a_parameter(s: Any, x: Tensor) -> Tensor:
    torch.ops.aten.mul_.Scalar(s.linear.weight, 2.0)
    return s.linear(x)


@pytest.mark.parametrize("case", [into_an_argument, into_a_parameter, overload_into_a_parameter])
def test_a_write_into_what_the_caller_owns_is_refused_whatever_the_operator_is_called(case: Any) -> None:
    module, x = Stage(case), torch.randn(2, 3)
    before = copy.deepcopy(module.state_dict()), x.clone()
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(fs.PurityError, match=r"(argument|parameter).*in place, by .*work on a clone"):
        fs.stage_vjp(apply, params, buffers, x)
    torch.testing.assert_close((dict(module.state_dict()), x), (dict(before[0]), before[1]), rtol=0, atol=0)


def test_an_argument_may_be_overwritten_as_a_name_by_an_overload_as_by_a_method() -> None:
    def overwritten(s: Any, x: Tensor) -> Tensor:
        torch.ops.aten.mul_.Scalar(x, 2.0)
        return s.linear(x)

    module, x = Stage(overwritten), torch.randn(2, 3)
    twin, before = copy.deepcopy(module), x.clone()
    apply, params, buffers = fs.functionalize(module)
    for stage in (apply, fs.compile(apply, backend="aten")):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        leaf = before.clone().requires_grad_()
        expected = twin(leaf.clone())
        wanted = torch.autograd.grad(expected, [leaf, *twin.parameters()], torch.ones_like(expected))
        torch.testing.assert_close((output, dx, *weight_pullback().values()), (expected, *wanted))
        assert torch.equal(x, before)


@pytest.mark.parametrize("function", RULES, ids=lambda function: getattr(function, "__name__", str(function)))
def test_an_operation_in_the_table_is_opened_or_has_rules(function: Any) -> None:
    found = known(function)
    assert found.opened is not None or found.at_levels or found.in_trace
    assert known(function) is found


def test_an_operation_that_is_not_in_the_table_runs_as_it_comes() -> None:
    for function in (torch.matmul, Tensor.add, torch.tanh):
        found = known(function)
        assert found._replace(written=NO_WRITES) == Known(None, (), (), NO_WRITES, (), False)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_a_ctc_loss_is_eagers(listed: bool, reduction: str, zero_infinity: bool) -> None:
    def case(s: Any, x: Tensor) -> Tensor:
        lengths: Any = ((4, 2, 1), (2, 0, 2))  # the last of which is infinite
        lengths = lengths if listed else [torch.tensor(each) for each in lengths]
        targets = torch.tensor([[1, 2], [0, 0], [1, 1]])
        scores = s.linear(x.view(4, 3, 3)).log_softmax(-1)
        return F.ctc_loss(
            scores, targets, *lengths, reduction=reduction, zero_infinity=zero_infinity
        ).nan_to_num(posinf=2.0)

    check_stage(Stage(case), torch.randn(12, 3), engines=("closures",))


def test_a_ctc_loss_is_refused_in_a_trace_where_the_uncompiled_stage_works() -> None:
    stage = Stage(
        lambda s, x: F.ctc_loss(s.linear(x).log_softmax(-1), torch.tensor([1, 2]), (4,), (2,))  # type: ignore[arg-type]
    )
    apply, params, buffers = fs.functionalize(stage)
    with pytest.raises(fs.TraceError, match=r"_ctc_loss.*The uncompiled `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(4, 3))
