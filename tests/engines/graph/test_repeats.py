"""Repeated layers are found in graphs: those that are alike, and none that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import funcstage as fs
from funcstage.engines.graph.chain import OF_ANY_SIZE, WORTH_IT, _parts
from funcstage.engines.graph.repeats import Least, form, ordered, parts_of

WIDTH = 8


class Layer(nn.Module):
    """A gated unit behind a norm, with dropout."""

    def __init__(self, eps: float = 1e-5, p: float = 0.0, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=eps)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden // 2, WIDTH)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.drop(self.down(gate.sigmoid() * up))


def programs(module: nn.Module) -> list[GraphModule]:
    """The graphs of F, I and W."""
    apply, params, buffers = fs.functionalize(module)
    return list(fs.compile(apply, backend="aten").programs(params, buffers, torch.randn(3, WIDTH)))


def forms(module: GraphModule, least: Least = OF_ANY_SIZE) -> list[Any]:
    """The forms of the parts of a program."""
    return [form(part.nodes, part.inputs, part.results, module) for part in _parts(module, (), least)]


def test_identical_layers_are_parts_of_one_form() -> None:
    forward, input_grad, weight_grad = programs(nn.Sequential(*(Layer() for _ in range(6))))
    assert len(forms(forward)) == 6
    assert len(set(forms(forward))) == 1
    for program in (input_grad, weight_grad):  # where the first layer may differ, and the last
        assert len(forms(program)) >= 5
        assert len(set(forms(program))) <= 3


def frozen(layer: Layer) -> Layer:
    layer.up.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    "other",
    [
        lambda: Layer(eps=1e-3),
        lambda: Layer(p=0.5),
        lambda: Layer(hidden=4 * WIDTH),
        lambda: nn.Sequential(Layer(), nn.Tanh()),
        lambda: frozen(Layer()),
    ],
    ids=["eps", "dropout", "width", "tanh", "frozen"],
)
def test_a_layer_that_differs_is_not_merged_with_the_others(other: Callable[[], nn.Module]) -> None:
    layers = [Layer() for _ in range(5)]
    alike = programs(nn.Sequential(*layers))
    different = programs(nn.Sequential(*layers[:3], other(), *layers[3:]))
    n = [len(set(forms(program))) for program in alike]
    m = [len(set(forms(program))) for program in different]
    assert any(b > a for a, b in zip(n, m, strict=True))
    assert all(len(forms(program)) >= 4 for program in different)


def test_layers_before_and_after_another_one_are_one_form() -> None:
    forward, _, _ = programs(nn.Sequential(Layer(), Layer(), nn.Tanh(), Layer(), Layer(), Layer()))
    found = forms(forward)
    assert len(found) == 6
    assert len(set(found)) == 2


def test_what_is_not_repeated_stays_in_one_piece() -> None:
    for program in programs(nn.Sequential(Layer(), nn.Tanh(), nn.Linear(WIDTH, WIDTH))):
        assert len(_parts(program, (), WORTH_IT)) == 1
    for program in programs(nn.Sequential(Layer(), Layer(), Layer())):
        assert len(_parts(program, (), WORTH_IT)) == 1  # three times is not worth it


def test_parts_are_all_operations_in_order_and_no_entry_is_parted_from_its_result() -> None:
    for program in programs(nn.Sequential(*(Layer(p=0.5) for _ in range(4)))):
        order = ordered(program.graph)
        assert {*order} == {node for node in program.graph.nodes if node.op == "call_function"}
        parts = parts_of(order, program, OF_ANY_SIZE)
        assert [node for part in parts for node in part] == order
        for part in _parts(program, (), OF_ANY_SIZE):
            assert all(isinstance(node.meta["val"], Tensor) for node in (*part.inputs, *part.results))


def test_numbers_that_are_equal_but_of_another_kind_make_another_form() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: Any) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return ((x.sin() * self.factor).cos() + x).tanh()

    for one, other in [(2, 2.0), (0.0, -0.0)]:
        (program, _, _) = programs(nn.Sequential(*(Scaled(factor) for factor in (one, one, other, other))))
        assert len(set(forms(program))) > 1
        (program, _, _) = programs(nn.Sequential(*(Scaled(one) for _ in range(4))))
        assert len(set(forms(program))) == 1
