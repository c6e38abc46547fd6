"""What programs return: memory of their own, or that of inputs which nobody reads after them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from funcstage.engines.graph.extract import Program, boxed, giving_away, own_results
from tests.support.graph_programs import program_of, ran

Function = Callable[[Tensor, Tensor], Sequence[Tensor | None]]

CASES: dict[str, tuple[Function, Sequence[str | None]]] = {
    "inputs and no result": (lambda a, b: [a, None, b], ["a", None, "b"]),
    "one input twice": (lambda a, b: [a, b, a], ["a", "b", None]),
    "a view": (lambda a, b: [a.view(9), b.view(1, 9)[0]], ["a", "b"]),
    "views that overlap": (lambda a, b: [a[:2], b, a[1:]], ["a", "b", None]),
    "a transpose": (lambda a, b: [a.t(), b.t().t()], [None, "b"]),
    "a transpose before its input": (lambda a, b: [a.t(), a, b.t()], [None, "a", None]),
    "an expanded sum": (lambda a, b: [a.sum(0).expand(3, 3), b], [None, "b"]),
    "what is computed": (lambda a, b: [a + 1, a * b, b.exp()], [None, None, None]),
    "what is computed, twice": (lambda a, b: [c := a + 1, c, c.view(9), b], [None, None, None, "b"]),
    "a copy of what is computed": (lambda a, b: [(a + 1).clone(), a.clone()], [None, "a"]),
}
"""Functions, and whose memory each result may be."""


def owning(program: Program) -> Program:
    """The program with results that are its own."""
    graph = Graph()
    graph.output(tuple(graph.graph_copy(program.module.graph, {}) or ()))  # type: ignore[arg-type]
    own_results(graph)
    return Program(boxed(program.module, graph), program.inputs, program.results)


def memory_of(tensors: Sequence[Any]) -> list[Any]:
    return [None if tensor is None else tensor.untyped_storage().data_ptr() for tensor in tensors]


def copies_in(program: Program) -> int:
    return sum(node.target is torch.ops.aten.clone.default for node in program.module.graph.nodes)


@pytest.mark.parametrize("names", [(), ("a",), ("b",), ("a", "b")])
@pytest.mark.parametrize("case", CASES)
def test_results_have_memory_of_their_own_or_that_of_an_input_which_is_given_away(
    case: str, names: tuple[str, ...]
) -> None:
    function, owners = CASES[case]
    given = {"a": torch.randn(3, 3), "b": torch.randn(3, 3)}
    program = owning(program_of(function, *given.values()))
    inputs = dict(zip(program.inputs, given.values(), strict=True))
    name_of = dict(zip(given, program.inputs, strict=True))
    before = copies_in(program)
    found = giving_away(program, {name_of[name] for name in names})
    assert (found.inputs, found.results) == (program.inputs, program.results)
    expected = function(*given.values())
    memory = dict(zip(given, memory_of(list(given.values())), strict=True))
    for each, handed in ((program, ()), (found, names)):  # the first is as it was
        results = ran(each, inputs)
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours is None) == (theirs is None)
            assert theirs is None or (ours is not None and torch.equal(ours, theirs))
            assert ours is None or ours.is_contiguous()  # as none of these has to keep another layout
        made = memory_of(results)
        assert [m if m in memory.values() else None for m in made] == [
            memory[owner] if owner in handed else None for owner in owners
        ]
        assert not any(a == b is not None for a, b in itertools.combinations(made, 2))
        assert copies_in(each) == before - sum(owner in handed for owner in owners)
