"""Programs cut out of W, and cotangents brought back through the views in which an operation has them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from funcstage.engines.graph.extract import Program
from funcstage.engines.graph.pieces import cut_out, divide
from funcstage.engines.graph.sites import _views, restored
from tests.support.graph_programs import program_of, ran

aten = torch.ops.aten


def view_of(rng: random.Random, value: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """A view of a value that shows all of it, once."""
    dim = value.dim()
    kind = rng.choice(["t", "transpose", "permute", "view", "unsqueeze", "squeeze", "alias"])
    if kind == "t" and dim == 2:
        return aten.t.default, ()
    if kind == "transpose" and dim > 1:
        return aten.transpose.int, (rng.randrange(-dim, dim), rng.randrange(-dim, dim))
    if kind == "permute" and dim:
        order = rng.sample(range(dim), dim)
        return aten.permute.default, ([i - dim * rng.randrange(2) for i in order],)
    if kind == "view" and value.is_contiguous():
        return aten.view.default, ([value.numel()] if dim > 1 else [2, -1],)
    if kind == "unsqueeze":
        return aten.unsqueeze.default, (rng.randrange(dim + 1),)
    if kind == "squeeze":
        return aten.squeeze.default, ()
    return aten.alias.default, ()


@pytest.mark.parametrize("seed", range(40))
def test_a_cotangent_is_restored_through_any_views(seed: int) -> None:
    rng = random.Random(seed)
    graph = Graph()
    values, views = [torch.arange(24.0).view(2, 3, 4)], [graph.placeholder("x")]
    for _ in range(rng.randrange(6)):
        target, args = view_of(rng, values[-1])
        values.append(target(values[-1], *args))
        views.append(graph.call_function(target, (views[-1], *args)))
    again = restored(values[-1], values, views)
    assert again.shape == values[0].shape
    assert torch.equal(again, values[0])


PRODUCTS = [aten.mm.default, aten.bmm.default, aten.convolution_backward.default]


@pytest.mark.parametrize("product", [*PRODUCTS, aten.mul.Tensor, None])
def test_a_cotangent_is_seen_as_the_first_product_sees_it_or_what_comes_first(product: Any) -> None:
    graph = Graph()
    start, x = graph.placeholder("start"), graph.placeholder("x")
    flat = graph.call_function(aten.view.default, (start, [-1, 4]))
    total = graph.call_function(aten.sum.dim_IntList, (start, [0]))
    turned = graph.call_function(aten.t.default, (flat,))
    other = graph.call_function(aten.view.default, (start, [4, -1]))
    unrelated = graph.call_function(aten.neg.default, (x,))
    between = [flat, unrelated, total, turned, other]
    if product is not None:
        between.append(graph.call_function(product, (turned, x)))
        between.append(graph.call_function(aten.mm.default if product in PRODUCTS else product, (other, x)))
    # A transpose is none of the cotangent's shape: the operation has it in its own.
    assert _views(start, between) == ((start, flat) if product in PRODUCTS else (start,))
    assert _views(start, [flat, turned]) == (start,)


def results_of(program: Program) -> Sequence[Node | None]:
    (output,) = program.module.graph.find_nodes(op="output")
    return output.args[0]


def chain(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor | None]:
    """Four gradients: of one product, of that and a second, of a third, and none."""
    first = a @ b
    second = first.sin() @ c
    return [first + 1, second.cos() + first, None, (c @ c).exp(), second.sum(0)]


GIVEN = [torch.randn(3, 3) for _ in range(3)]


@pytest.mark.parametrize("wanted", [w for n in range(1, 5) for w in itertools.combinations((0, 1, 3, 4), n)])
def test_what_is_cut_out_computes_what_was_asked_for_and_reads_nothing_else(wanted: tuple[int, ...]) -> None:
    program, expected = program_of(chain, *GIVEN), chain(*GIVEN)
    results = [node if i in wanted else None for i, node in enumerate(results_of(program))]
    part = cut_out(program, results, {})
    found = ran(part, dict(zip(program.inputs, GIVEN, strict=True)))
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours is None) == (i not in wanted)
        assert ours is None or torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert set(part.inputs) == {program.inputs[2], *(program.inputs[:2] if {0, 1, 4} & {*wanted} else ())} - (
        {program.inputs[2]} if wanted == (0,) else set()
    )
    assert [name is not None for name in part.results] == [i in wanted for i in range(5)]
    assert sum("mm" in str(node.target) for node in part.module.graph.nodes) == (
        (1 if {0, 1, 4} & {*wanted} else 0) + (1 if {1, 4} & {*wanted} else 0) + (3 in wanted)
    )


def test_what_is_given_is_read_under_its_new_name_and_not_computed() -> None:
    program, expected = program_of(chain, *GIVEN), chain(*GIVEN)
    product = next(node for node in program.module.graph.nodes if "mm" in str(node.target))
    part = cut_out(program, [*results_of(program)[:2], product], {product: "given"})
    assert part.inputs == (program.inputs[2], "given")
    value = GIVEN[0] @ GIVEN[1]
    found = ran(part, {program.inputs[2]: GIVEN[2], "given": value})
    assert torch.equal(found[0], expected[0])  # type: ignore[arg-type]
    assert torch.equal(found[1], expected[1])  # type: ignore[arg-type]
    assert torch.equal(found[2], value)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_pieces_of_w_compute_each_gradient_in_one_of_them_and_nothing_twice(parts: int) -> None:
    program, expected = program_of(chain, *GIVEN), chain(*GIVEN)
    pieces = divide(program, parts)
    given = dict(zip(program.inputs, GIVEN, strict=True))
    if pieces.first is not None:
        made = ran(pieces.first, given)
        assert len(made) == len(pieces.handed)
        given |= dict(zip(pieces.handed, made, strict=True))  # type: ignore[arg-type]
    assert 1 <= len(pieces.programs) <= parts
    assert parts == 1 or len(pieces.programs) > 1
    found: dict[int, Tensor] = {}
    for piece in pieces.programs:
        for i, result in enumerate(ran(piece, given)):
            if result is not None:
                assert i not in found
                found[i] = result
    assert found.keys() == {0, 1, 3, 4}
    assert all(torch.equal(result, expected[i]) for i, result in found.items())  # type: ignore[arg-type]
    programs = [*pieces.programs, *([] if pieces.first is None else [pieces.first])]
    read = [name for each in programs for name in each.inputs]
    several = {name for name in read if read.count(name) > 1}
    assert pieces.common == (several if len(pieces.programs) > 1 else set())
    assert sum(node.target is aten.mm.default for each in programs for node in each.module.graph.nodes) == 3


def sharing(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor | None]:
    """Gradients of which two share a sine, and two others a product."""
    sine, product = c.sin(), a.t() @ c
    return [a @ sine, product.sum(0), b @ sine, product.sum(1)]


def test_gradients_which_share_what_is_cheap_may_be_in_several_pieces_and_of_a_product_in_one() -> None:
    pieces = divide(program_of(sharing, *GIVEN), 4)
    there = [{i for i, name in enumerate(piece.results) if name is not None} for piece in pieces.programs]
    assert sorted(there, key=min) == [{0}, {1, 3}, {2}]
    assert pieces.first is None
