"""What a program is made into before Inductor compiles it, on small graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from funcstage.engines.graph.inductor import (
    _as_inputs,
    _first_result,
    _laid_out,
    _orders,
    _rename,
    _round_as_eager,
    _write_parts_in_place,
)

aten = torch.ops.aten


def given(graph: Graph, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Node:
    node = graph.placeholder(name)
    node.meta["val"] = torch.empty(2, 3, dtype=dtype, device=device)
    return node


def called(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = torch.empty(2, 3)
    return node


@pytest.mark.parametrize("n_inputs", [0, 1, 2])
def test_captured_tensors_become_inputs_behind_the_others_each_once(n_inputs: int) -> None:
    root = nn.Module()
    root.first, root.second, root.inner = torch.ones(2), torch.zeros(2), GraphModule(nn.Module(), Graph())
    graph = Graph()
    inputs = [given(graph, f"x{i}") for i in range(n_inputs)]
    reads = [graph.get_attr(name) for name in ("second", "inner", "first", "second")]
    for node in reads:
        node.meta["val"] = getattr(root, str(node.target))
    graph.output((*inputs, *reads))
    found = _as_inputs(graph, GraphModule(root, graph))
    assert [*map(id, found)] == [id(root.second), id(root.first)]
    placeholders = graph.find_nodes(op="placeholder")
    assert placeholders[:n_inputs] == inputs
    second, first = placeholders[n_inputs:]
    assert [second.name, first.name] == ["primals_second", "primals_first"]
    assert second.meta["val"] is root.second
    assert first.meta["val"] is root.first
    (output,) = graph.find_nodes(op="output")
    assert output.args[0] == (*inputs, second, reads[1], first, second)
    assert graph.find_nodes(op="get_attr") == [reads[1]]
    graph.lint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_operation_of_low_precision_is_rounded(dtype: torch.dtype, device: str) -> None:
    graph = Graph()
    x = given(graph, "x", dtype, device)
    plain, low = called(graph, aten.neg.default, x), called(graph, aten.sin.default, x)
    low.meta["val"] = torch.empty(2, dtype=dtype, device=device)
    unknown = graph.call_function(aten.cos.default, (x,))
    graph.output((plain, low, unknown))
    is_low = dtype in (torch.bfloat16, torch.float16)
    assert _round_as_eager(graph) == (is_low and device == "cpu")
    assert [node.meta.get("low_precision_pointwise_barrier") for node in (x, plain, low, unknown)] == [
        *(None, None, True if is_low else None, None)
    ]
    assert [node.name for node in (x, plain, low)] == [
        "x",
        "neg_default",
        "rounded_sin_default"[8 * (not is_low) :],
    ]


def test_the_first_result_of_an_operation_is_taken_right_behind_it() -> None:
    graph = Graph()
    x = given(graph, "x")
    two = graph.call_function(aten.native_dropout.default, (x, 0.5, True))
    two.meta["val"] = (torch.empty(2, 3), torch.empty(2, 3, dtype=torch.bool))
    graph.output((called(graph, aten.sin.default, x),))
    first = _first_result(two)
    graph.lint()
    assert two.next is first
    assert first.meta["val"] is two.meta["val"][0]
    assert _first_result(x) is x


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_a_result_that_is_laid_out_otherwise_is_laid_out_as_traced(order: tuple[int, ...]) -> None:
    sizes = (2, 3, 4)
    back = sorted(range(3), key=order.__getitem__)
    wanted = torch.empty([sizes[i] for i in order]).permute(back)
    found = torch.randn(sizes)
    orders = _orders([[*wanted.stride()], None, [1]], [(*found.stride(),), (5,), None])
    assert orders == ({} if order == (0, 1, 2) else {0: [*order]})
    result = _laid_out(found, orders.get(0, [0, 1, 2]))
    assert torch.equal(result, found)
    assert result.stride() == wanted.stride()
    assert _orders([[1], [4, 1]], [(1,)]) == {}
    assert _orders([[4, 1]], [("4", 1)]) == {}


@pytest.mark.parametrize(
    ("name", "donated", "renamed"),
    [
        ("state_1", False, "primals_1"),
        ("cotangent_0", False, "tangents_0"),
        ("state_1", True, "donated_state_1"),
        ("mm", False, "mm"),
        ("mm", True, "donated_mm"),
    ],
)
def test_inputs_are_named_as_inductor_plans_memory_by(name: str, donated: bool, renamed: str) -> None:
    node = Graph().placeholder(name)
    _rename(node, donated)
    assert (node.name, node.target) == (renamed, renamed)


def halves(graph: Graph, x: Node, y: Node, kind: str) -> Node:
    """A concatenation, and what is done with it."""
    left, right = called(graph, aten.sin.default, x), called(graph, aten.mul.Tensor, x, y)
    if kind == "a product":
        left = called(graph, aten.mm.default, x, x)
    if kind == "the value itself":
        left = x
    if kind == "a view":
        left = called(graph, aten.view.default, x, [3, 2])
    if kind == "of different values":
        left, right = called(graph, aten.sin.default, x), called(graph, aten.cos.default, y)
    if kind == "mapped twice":
        left = called(graph, aten.cos.default, called(graph, aten.view.default, left, [2, 3]))
    dim = () if kind == "no dimension" else (1,)
    joined = called(graph, aten.cat.default, [left, right], *dim)
    if kind == "mapped after":
        called(graph, aten.neg.default, joined)
    if kind == "mapped after views":
        called(
            graph,
            aten.neg.default,
            called(graph, aten.view.default, called(graph, aten.t.default, joined), [-1]),
        )
    if kind == "multiplied after views":
        called(graph, aten.mm.default, called(graph, aten.t.default, joined), x)
    return joined


IN_PLACE = {
    **dict.fromkeys(["plain", "no dimension", "mapped twice", "multiplied after views"], True),
    **dict.fromkeys(["a product", "the value itself", "a view", "of different values"], False),
    **dict.fromkeys(["mapped after", "mapped after views"], False),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_concatenations_of_what_is_computed_from_one_value_are_written_in_parts(kind: str) -> None:
    graph = Graph()
    x, y = given(graph, "x"), given(graph, "y")
    joined = halves(graph, x, y, kind)
    args: tuple[Any, ...] = joined.args
    graph.output((joined,))
    _write_parts_in_place(graph)
    if IN_PLACE[kind]:
        assert joined.target is torch.ops.funcstage.cat.default
        assert joined.args == (args[0], 0 if kind == "no dimension" else 1)
    else:
        assert joined.target is aten.cat.default
        assert joined.args == args


def test_a_concatenation_in_parts_is_one() -> None:
    parts = [torch.ones(2, 3), torch.zeros(2, 1)]
    assert torch.equal(torch.ops.funcstage.cat(parts, 1), torch.cat(parts, 1))
    fake = torch.ops.funcstage.cat([part.to("meta") for part in parts], -1)
    assert isinstance(fake, Tensor)
    assert fake.shape == (2, 4)
