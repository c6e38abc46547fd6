"""Surplus: parts that are others but for a little that nobody reads of them -> the same program for both.

The layers at a stage's ends lack what the others hand on: W makes the gradient between two layers from what
both need, and below the first layer nobody asks for it. What such a part lacks, it computes for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from funcstage.engines.graph.mincut import nbytes
from funcstage.engines.graph.nodes import is_cheap
from funcstage.engines.graph.repeats import Form, form

SURPLUS = 1 / 64
"""The share of the bytes that all parts read and return which may be read and returned for nobody."""


class Part(NamedTuple):
    """Operations that become a program, with what they read from outside and what is read of them."""

    nodes: Sequence[Node]
    inputs: Sequence[Node]
    results: Sequence[Node]
    donated: frozenset[int]  # of the inputs


class Run(NamedTuple):
    """How a part runs.

    Attributes:
        form: of the program.
        model: a part that it is made from.
        inputs: what it is given.
        results: what it returns, `None` what nobody reads.
        donated: those of the inputs that it may overwrite.
    """

    form: Form
    model: Part
    inputs: Sequence[Node]
    results: Sequence[Node | None]
    donated: frozenset[int]


def runs_of(parts: Sequence[Part], root: GraphModule) -> list[Run]:
    """Choose for each part the program that it runs: its own, or one that computes a little more.

    Args:
        parts: of a program.
        root: what holds the graphs that operations run.
    """
    forms = [form(part.nodes, part.inputs, part.results, root) for part in parts]
    models = dict(zip(reversed(forms), reversed(parts), strict=True))
    left = SURPLUS * sum(nbytes(node) for part in parts for node in (*part.inputs, *part.results))
    larger: dict[Form, list[Form]] = {
        own: sorted((each for each in models if _includes(each, own)), key=_size) for own in models
    }
    runs = []
    for part, own in zip(parts, forms, strict=True):
        run = Run(own, part, part.inputs, part.results, part.donated)
        for other in larger[own]:
            model = models[other]
            surplus = sum(nbytes(model.nodes[i]) for i in {*other.results} - {*own.results})
            surplus += sum(map(nbytes, model.inputs[len(part.inputs) :]))
            found = _run_as(part, own, model, other) if surplus <= left else None
            if found is not None:
                run, left = found, left - surplus
                break
        runs.append(run)
    return runs


def _includes(form: Form, other: Form) -> bool:
    """Tell whether another form is the beginning of one."""
    n, m = len(other.operations), len(other.inputs)
    return (
        _size(form) < _size(other)
        and form.operations[:n] == other.operations
        and form.values[:n] == other.values
        and form.inputs[:m] == other.inputs
        and {*form.results} >= {*other.results}
    )


def _size(form: Form) -> tuple[int, int]:
    """By which the largest forms come first."""
    return -len(form.operations), -len(form.results)


def _run_as(part: Part, own: Form, model: Part, form: Form) -> Run | None:
    """Run a part by the program of one that begins with the same, unless what comes then might fail.

    It maps numbers, and in place of what there is none of for this part it is given others of the same kind.
    """
    n, m = len(own.operations), len(own.inputs)
    if not all(is_cheap(node) and _is_floating(node) for node in model.nodes[n:]):
        return None
    instead: list[int] = []
    for said, wanted in zip(form.inputs[m:], model.inputs[m:], strict=True):
        if said not in own.inputs or not _is_floating(wanted):
            return None
        instead.append(own.inputs.index(said))
    inputs = [*part.inputs, *(part.inputs[i] for i in instead)]
    results = [part.nodes[i] if i in {*own.results} else None for i in form.results]
    return Run(form, model, inputs, results, part.donated - {*instead})


def _is_floating(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()
