"""A module is lent the tensors of a call, wherever it holds its own, and has these again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage import trees


class Counting(nn.Module):
    """Counts its calls in a buffer, in one of several ways."""

    calls: Tensor

    def __init__(self, count: Callable[[Counting], Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("calls", torch.zeros(()))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if self.count is None:
            self.calls += 1
        else:
            self.count(self)
        return x * self.scale + self.calls


def assign(module: Counting) -> None:
    module.calls = module.calls + 1


def exchange_the_dict(module: Counting) -> None:
    module._buffers = {"calls": module.calls + 1}


def move_to_attribute(module: Counting) -> None:
    now = module.calls + 1
    del module.calls
    module.calls = now


def stage_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple(fs.functionalize(module))


@pytest.mark.parametrize("count", [None, assign, exchange_the_dict, move_to_attribute])
def test_a_buffer_is_read_back_from_where_the_forward_has_left_it(
    count: Callable[[Counting], Any] | None,
) -> None:
    module = Counting(count)
    own = module.scale
    apply, params, buffers = stage_of(module)
    x = torch.tensor([1.0, 1.0])
    output, new_buffers, pullback = fs.stage_vjp(apply, params, buffers, x)
    assert output.tolist() == [3.0, 4.0]
    assert new_buffers["calls"].item() == 1
    assert module.scale is own
    assert module.calls.item() == 0
    assert buffers["calls"].item() == 0
    (dx,), weight_pullback = pullback(torch.ones(2))
    assert dx.tolist() == [2.0, 3.0]
    assert weight_pullback()["scale"].tolist() == [1.0, 1.0]


def test_dicts_of_a_module_may_be_exchanged_between_calls() -> None:
    module = Counting()
    apply, params, buffers = stage_of(module)
    fs.stage_vjp(apply, params, buffers, torch.ones(2))
    module._parameters, module._buffers = dict(module._parameters), dict(module._buffers)
    doubled = {"scale": params["scale"] * 2}
    output, new_buffers, _ = fs.stage_vjp(apply, doubled, {"calls": torch.tensor(5.0)}, torch.ones(2))
    assert output.tolist() == [10.0, 12.0]
    assert new_buffers["calls"].item() == 6
    assert module.calls.item() == 0


def test_a_buffer_that_was_taken_away_is_lent_nevertheless() -> None:
    module = Counting()
    apply, params, buffers = stage_of(module)
    del module.calls
    output, new_buffers, _ = fs.stage_vjp(apply, params, buffers, torch.ones(2))
    assert output.tolist() == [3.0, 4.0]
    assert new_buffers["calls"].item() == 1
    assert not hasattr(module, "calls")


def test_a_forward_that_fails_leaves_the_module_its_own_tensors() -> None:
    def fail(module: Counting) -> None:
        del module.calls
        raise ValueError("on purpose")

    module = Counting(fail)
    scale = module.scale
    apply, params, buffers = stage_of(module)
    with pytest.raises(ValueError, match="on purpose"):
        fs.stage_vjp(apply, params, buffers, torch.ones(2))
    assert module.scale is scale
    assert module.calls.item() == 0


@pytest.mark.parametrize(
    "tree",
    [
        {"b": 1, "a": 2.0},
        {},
        {"a": {"c": 1}, "b": None},
        {2: 1, 1: 2},
        {"a": (1, 2)},
    ],
)
def test_dicts_are_flattened_as_optree_does_when_they_are_met_again(tree: dict[Any, Any]) -> None:
    for _ in range(3):
        leaves, spec = trees.flatten(dict(tree))
        expected, expected_spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=trees.NAMESPACE)
        assert leaves == expected
        assert spec == expected_spec
        assert [*trees.unflatten(spec, leaves)] == [*tree]


def test_a_dict_of_known_keys_with_something_else_in_it_is_looked_into() -> None:
    trees.flatten({"p": 1, "q": 2})
    leaves, spec = trees.flatten({"p": 1, "q": [2, 3]})
    assert leaves == [1, 2, 3]
    assert trees.unflatten(spec, leaves) == {"p": 1, "q": [2, 3]}
    leaves, spec = trees.flatten({"q": 2, "p": 1})
    assert [*trees.unflatten(spec, leaves)] == ["q", "p"]
