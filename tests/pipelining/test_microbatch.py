"""What a forward leaves for I: the gradients of its output, whether or not they have arrived."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from funcstage.pipelining.microbatch import Forward

NO_PULLBACK: Any = None
X, COUNTS = torch.full((2, 3), 2.0), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("output", "arrived", "expected"),
    [
        (X, {0: X}, X),
        (X, {0: None}, torch.zeros(2, 3)),
        (X, {}, torch.zeros(2, 3)),
        ((X,), {}, (None,)),
        (COUNTS, {}, None),
        (COUNTS, {0: COUNTS}, None),
        ((X, COUNTS), {0: X, 1: COUNTS}, (X, None)),
        ({"a": X, "b": X}, {1: X}, {"a": None, "b": X}),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_has_not_arrived_is_absent_and_of_a_single_output_zeros(
    output: Any, arrived: dict[int, Any], expected: Any
) -> None:
    forward = Forward.of(NO_PULLBACK, output, ())
    forward.output_grads.update(arrived)
    found = forward.cotangents()
    assert str(found) == str(expected)


def test_a_leaf_of_the_output_hands_over_its_gradient_and_may_be_written_into() -> None:
    forward = Forward.of(NO_PULLBACK, X, ())
    output = X.clone()
    leaf = forward.awaiting_grad(0, output)
    leaf.mul_(3).sum().backward()
    assert not output.requires_grad
    assert torch.equal(forward.cotangents(), torch.full((2, 3), 3.0))
