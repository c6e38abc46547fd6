"""Examples of tensors without memory, when two are alike, and what is sent where there is no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from funcstage.pipelining.examples import alike, any_requires_grad, as_tuple, cast, example, looks, sent_grad
from funcstage.pipelining.examples import trainable as as_input

X, Y = torch.ones(2, 3), torch.ones(3)
SIZE = torch.Size([2])


@pytest.mark.parametrize(
    ("output", "sent"),
    [
        (X, (X,)),
        ((X, Y), (X, Y)),
        ([X, Y], (X, Y)),
        ({"x": X}, ({"x": X},)),
        (torch.Size([2]), (torch.Size([2]),)),
    ],
)
def test_tuples_and_lists_are_sent_one_by_one(output: Any, sent: tuple[Any, ...]) -> None:
    found = as_tuple(output)
    assert type(found) is tuple
    assert len(found) == len(sent)
    assert all(a is b or a == b for a, b in zip(found, sent, strict=True))


@pytest.mark.parametrize("leaf", [torch.ones(2, 3, dtype=torch.float64), X.clone().requires_grad_(), X.int()])
def test_an_example_has_all_of_a_tensor_but_its_memory(leaf: Tensor) -> None:
    made = example(leaf)
    assert made.is_meta
    assert (made.shape, made.dtype, made.requires_grad) == (leaf.shape, leaf.dtype, leaf.requires_grad)


@pytest.mark.parametrize("leaf", [None, 3, "words", True])
def test_what_is_no_tensor_is_its_own_example(leaf: object) -> None:
    assert example(leaf) is leaf


def test_tensors_are_alike_of_the_same_shapes_and_dtypes() -> None:
    assert alike([X, Y], [X + 1, example(Y)])
    assert alike([], [])
    for others in ([X], [Y, X], [X, Y, Y], [X, Y.double()], [X, Y[:2]], [X, X]):
        assert not alike([X, Y], others)


def test_several_are_described_without_their_device() -> None:
    assert looks([X, Y.double()]) == "(float32[2, 3], float64[3])"


def test_a_gradient_that_is_not_there_is_sent_as_zeros_if_there_could_be_one() -> None:
    device = torch.device("cpu")
    assert sent_grad(None, None, device) is None
    assert sent_grad(X, None, device) is None
    zeros = sent_grad(None, example(X.double()), device)
    assert zeros is not None
    assert torch.equal(zeros, torch.zeros(2, 3, dtype=torch.float64))
    assert zeros.dtype is torch.float64
    sent = sent_grad(X, example(X), device)
    assert sent is not None
    assert torch.equal(sent, X)


def test_floating_tensors_are_cast_and_made_inputs_and_all_else_is_left() -> None:
    integers = X.long()
    assert cast(X, torch.float64).dtype is torch.float64
    assert cast(X, None) is X
    assert cast(integers, torch.float64) is integers
    assert cast("words", torch.float64) == "words"
    assert as_input(integers) is integers
    assert as_input(3) == 3
    given = X.clone().requires_grad_() * 2
    found = as_input(given)
    assert found.is_leaf
    assert found.requires_grad
    assert found.data_ptr() == given.data_ptr()
    assert any_requires_grad({"x": X, "y": [3, found]})
    assert not any_requires_grad({"x": X, "y": [3, None]})
