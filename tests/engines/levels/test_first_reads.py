"""Where data first meets parameters in a stage of which no argument is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcstage.engines.levels.first_reads import FirstReads, first_among


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


X, Y, W = torch.ones(2), torch.ones(2), leaf()
OPERANDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((1, Y), {}),
    "first": ((X, W), {}),
    "in a list": (([W, X],), {}),
    "in a tuple of a list": ((1, ([W], [1, X])), {}),
    "by keyword": ((W,), {"other": X}),
    "by keyword, in a list": ((), {"tensors": [W, Y]}),
}
OTHERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a weight": ((W,), {}),
    "an equal tensor": ((torch.ones(2), [torch.ones(2)]), {}),
    "numbers": ((1, "a", None), {"dim": 1, "other": W}),
    "nothing": ((), {}),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_what_reads_data_and_parameters_is_noted_and_what_reads_data_alone_is_data(name: str) -> None:
    args, kwargs = OPERANDS[name]
    reads = FirstReads([X, 3, None, Y])
    result = W * 2
    reads.note(args, kwargs, result)
    assert [*reads.edges] == [get_gradient_edge(result)]
    data, first, second = torch.zeros(2), W * 3, W * 4
    reads.note(args, kwargs, [data, 1, first])
    reads.note((data,), {}, (None, second))
    assert [*reads.edges] == [*map(get_gradient_edge, (result, first, second))]


@pytest.mark.parametrize("name", OTHERS)
def test_what_reads_no_data_is_not(name: str) -> None:
    args, kwargs = OTHERS[name]
    reads = FirstReads([X, Y])
    made = torch.zeros(2)
    reads.note(args, kwargs, (W * 2, made))
    reads.note((made,), {}, W * 2)
    assert not reads.edges


def test_what_lies_where_data_was_is_none() -> None:
    given = torch.ones(2)
    reads = FirstReads([given])
    place = id(given)
    del given
    others = [torch.ones(2) for _ in range(1000)]
    there = [other for other in others if id(other) == place]
    if not there:
        pytest.skip("Python has put nothing there again")
    reads.note((there[0],), {}, W * 2)
    assert not reads.edges


def test_first_are_those_on_the_tape_that_lead_to_no_others() -> None:
    first, other = W * 2, leaf() * 3
    between = first.sin()
    second, third = between * other, other.exp()
    edges = [*map(get_gradient_edge, (second, first, third, between, other))]
    tape = [edge.node for edge in edges]
    assert first_among(edges, tape) == [edges[1], edges[4]]
    assert first_among(edges, [node for node in tape if node is not first.grad_fn]) == [edges[3], edges[4]]
    assert first_among(edges, [third.grad_fn]) == [edges[2]]
    assert first_among([], tape) == []
