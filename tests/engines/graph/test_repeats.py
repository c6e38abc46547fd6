"""Repeated layers are found in graphs: those that are alike, and none that differs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import funcstage as fs
from funcstage.engines.graph.chain import OF_ANY_SIZE, WORTH_IT, _parts
from funcstage.engines.graph.repeats import (
    NEVER,
    Least,
    _bounds,
    _prices,
    _said,
    _unit,
    form,
    graph_of,
    ordered,
    parts_of,
    said_of,
)

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


@pytest.mark.slow
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


def drawn(rng: random.Random) -> tuple[list[int], list[float], int, int, int]:
    """A sequence in which one unit comes again and again, with prices of cuts; where, how long, how often."""
    size, times = rng.randrange(1, 6), rng.randrange(2, 6)
    before, spare, after = rng.randrange(4), rng.randrange(size), rng.randrange(4)
    unit = [*range(100, 100 + size)]
    looks = [*range(before), *unit * times, *unit[:spare], *range(200, 200 + after)]
    prices = [rng.choice([1.0, 2.0, 3.0, 4.0, NEVER]) for _ in range(len(looks) + 1)]
    return looks, prices, before, size, times * size + spare


@pytest.mark.parametrize("least", [Least(1, 2), Least(3, 2), Least(2, 3)])
def test_what_is_repeated_is_cut_where_least_crosses(least: Least) -> None:
    rng = random.Random(0)
    for _ in range(300):
        looks, prices, first, size, length = drawn(rng)
        unit = size * -(-least.nodes // size)  # several of them, if one is too small
        times = length // unit
        costs = {}
        for start in range(first, first + length - times * unit + 1):
            crossed = prices[start : start + times * unit + 1 : unit]
            if max(crossed) < NEVER:
                costs[start] = max(crossed), start > first, sum(crossed)
        expected = (min(costs, key=costs.__getitem__), unit) if costs and times >= least.times else None
        assert _unit(looks, 0, len(looks), prices, least) == expected
        assert _unit([7, 7, *looks, 7, 7], 2, 2 + len(looks), [0, 0, *prices, 0, 0], least) == (
            None if expected is None else (expected[0] + 2, unit)
        )
        bounds = _bounds(looks, 0, len(looks), prices, least)
        if expected is None:
            assert bounds == set()
        else:
            inside = {expected[0] + i * unit for i in range(times + 1)}
            assert inside <= bounds <= inside | {0, len(looks)}


def test_of_two_repeats_the_one_that_saves_more_is_found_first_and_the_other_in_what_is_left() -> None:
    looks = [1, 2, 3] * 2 + [8] + [4, 5] * 4 + [9]
    free = [1.0] * (len(looks) + 1)
    assert _unit(looks, 0, len(looks), free, Least(1, 2)) == (7, 2)
    bounds = {0, 3, 6, 7, 9, 11, 13, 15, 16}
    assert _bounds(looks, 0, len(looks), free, Least(1, 2)) == bounds
    # The unit comes once more, apart from the others, on either side.
    looks = [4, 5, 6, 8] + [4, 5, 6] * 3 + [9, 4, 5, 6]
    free = [1.0] * (len(looks) + 1)
    assert _bounds(looks, 0, len(looks), free, Least(1, 2)) == {0, 3, 4, 7, 10, 13, 14, 17}
    barred = [*free[:3], NEVER, *free[4:14], NEVER, *free[15:]]
    assert _bounds(looks, 0, len(looks), barred, Least(1, 2)) == {0, 4, 7, 10, 13, 17}


def recorded(function: Callable[..., Any], *args: Any) -> GraphModule:
    """A graph of operations, with what they return."""
    return make_fx(function, tracing_mode="fake")(*args)


def test_a_cut_costs_the_bytes_that_cross_it_and_parts_no_result_from_its_entries() -> None:
    def function(x: Tensor) -> Tensor:
        a = x.sin()
        largest, where = torch.max(a, 0)
        b = torch.cat([a, a])
        c = torch.ops._c10d_functional.all_reduce(b, "sum", "0")
        d = torch.ops._c10d_functional.wait_tensor(c)
        return d * largest + where

    program = recorded(function, torch.randn(4, 3))
    nodes = ordered(program.graph)
    expected = []
    for cut in range(len(nodes) + 1):
        crossing = [node for node in nodes[:cut] if any(user in nodes[cut:] for user in node.users)]
        values = [node.meta["val"] for node in crossing]
        free = all(isinstance(value, Tensor) for value in values) and not any(
            "all_reduce" in node.name for node in crossing
        )
        expected.append(sum(value.numel() * value.element_size() for value in values) if free else NEVER)
    assert NEVER in expected
    assert _prices(nodes) == expected


def form_of(function: Callable[..., Any], *args: Any) -> Any:
    program = recorded(function, *args)
    given = program.graph.find_nodes(op="placeholder")
    nodes = ordered(program.graph)
    return form(nodes, given, nodes[-1:], program)


X = torch.randn(4, 4)
Forward = Callable[..., Any]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: x.div(2, rounding_mode="floor"), lambda x: x.div(2, rounding_mode="trunc")),
        (lambda x: x[0:2], lambda x: x[1:3]),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: torch.stack([x, x], 1), lambda x: torch.cat([x, x], 1)),
        (lambda x: x - x.sin(), lambda x: x.sin() - x),
        (lambda x: torch.cat([x, x.sin()]), lambda x: torch.cat([x.sin(), x])),
        (lambda x: x.double(), lambda x: x.half()),
        (lambda x: x.t().clone(), lambda x: x.t().contiguous()),
        (lambda x: x.sin().cos(), lambda x: x.cos().sin()),
    ],
)
def test_what_computes_something_else_has_another_form(one: Forward, other: Forward) -> None:
    assert form_of(one, X) == form_of(one, torch.zeros(4, 4))
    assert form_of(one, X) != form_of(other, X)


@pytest.mark.parametrize(
    "other",
    [
        X.double(),
        torch.randn(4, 5),
        X.t(),
        torch.randn(5, 4)[1:],
        X.to("meta"),
        torch.randn(4, 4, dtype=torch.complex64),
    ],
    ids=["dtype", "shape", "strides", "offset", "device", "complex"],
)
def test_inputs_that_are_not_alike_make_another_form(other: Tensor) -> None:
    assert form_of(lambda x: x.sin(), X) != form_of(lambda x: x.sin(), other)


def test_lazy_conjugates_and_negatives_make_another_form() -> None:
    z = torch.randn(4, 4, dtype=torch.complex64)
    assert said_of(z) != said_of(z.conj())
    negative = torch.view_as_real(z).as_strided((4, 4), (8, 2), 1)
    assert z.conj().imag.is_neg()
    assert said_of(z.conj().imag) != said_of(negative)
    assert said_of(z.conj().imag)[:-1] == said_of(negative)[:-1]


def test_another_result_of_the_same_operations_makes_another_form() -> None:
    program = recorded(lambda x: (x.sin(), x.cos()), X)
    nodes, given = ordered(program.graph), program.graph.find_nodes(op="placeholder")
    found = {form(nodes, given, results, program) for results in ([nodes[0]], [nodes[1]], nodes)}
    assert len(found) == 3


def test_a_parameter_and_a_value_make_two_forms() -> None:
    program = recorded(lambda state_0: state_0.sin(), X)
    other = recorded(lambda x: x.sin(), X)
    state, value = program.graph.find_nodes(op="placeholder") + other.graph.find_nodes(op="placeholder")
    state.name, value.name = "state_0", "value_0"
    forms = [
        form(ordered(each.graph), each.graph.find_nodes(op="placeholder"), ordered(each.graph), each)
        for each in (program, other)
    ]
    assert forms[0] != forms[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (slice(0, 2), slice(1, 2)),
        (slice(0, 2), slice(0, 3)),
        (slice(0, 2, 1), slice(0, 2, 2)),
        ([1, 2], [1, 3]),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        (torch.float32, torch.float64),
        ({1}, {2}),
        (None, 0),
    ],
)
def test_arguments_are_told_apart_by_all_that_they_are(one: Any, other: Any) -> None:
    root = GraphModule({}, torch.fx.Graph())
    assert _said(one, {}, root) == _said(one, {}, root)
    assert _said(one, {}, root) != _said(other, {}, root)
    hash(_said(one, {}, root))


def test_graphs_that_an_operation_runs_are_told_apart_by_what_they_compute() -> None:
    def run(inner: Callable[[Tensor], Tensor], x: Tensor = X, constant: bool = False) -> Any:
        graph = torch.fx.Graph()
        node, given = graph.get_attr("inner"), graph.placeholder("x")
        inside = recorded(inner, x)
        if constant:
            inside.register_buffer("kept", X)
            inside.graph.get_attr("kept")
        root = GraphModule({"inner": inside}, graph)
        assert graph_of(node, root) is inside
        assert graph_of(given, root) is None
        return _said(node, {}, root)

    assert run(torch.sin) == run(torch.sin)
    assert run(torch.sin) != run(torch.cos)
    assert run(torch.sin) != run(torch.sin, X.double())
    assert run(torch.sin, constant=True) != run(torch.sin, constant=True)  # which may hold anything
    graph = torch.fx.Graph()
    assert graph_of(graph.get_attr("kept"), GraphModule({"kept": nn.Linear(1, 1)}, graph)) is None
