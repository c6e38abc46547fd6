"""What an error that stops a trace becomes: a refusal that names the line, or itself if it is the stage's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import funcstage as fs
from funcstage._torch import messages
from funcstage._torch import tracing as tt
from funcstage.engines.graph.refusals import ReadsValue, Shown, refusal_of

Raising = Callable[[], Any]


def by_torch(error: Exception) -> Raising:
    """Raise an error below a line of this file, but by no `raise` of it."""

    def paused() -> Any:
        yield

    def raising() -> Any:
        started = paused()
        next(started)
        started.throw(error)

    return raising


def by_stage(error: Exception) -> Raising:
    def raising() -> Any:
        raise error

    return raising


def in_answer(error: Exception) -> Raising:
    def raising() -> Any:
        try:
            int("x")
        except ValueError:
            raise error  # noqa: B904

    return raising


def writes_into_a_leaf() -> Any:
    return torch.ones(2, requires_grad=True).add_(1)


def writes_into_a_view() -> Any:
    return torch.ones(2, requires_grad=True)[0].add_(1)


def has_a_bad_branch() -> Any:
    return torch.cond("no predicate", torch.sin, torch.cos, ())  # type: ignore[arg-type]


class Layer(nn.Module):
    """A layer within which something is raised, also by an object of its own that cannot be a key."""

    def __init__(self, raising: Raising, depth: int, via_list: bool = False) -> None:
        super().__init__()
        self.raising, self.via_list = raising, via_list
        self.sub = nn.ModuleList([Layer(raising, depth - 1, via_list)] if depth else [])

    def forward(self) -> Any:
        if len(self.sub):
            return self.sub[0]()
        return Own([self.raising]).first() if self.via_list else self.raising()


class Own(list[Raising]):
    def first(self) -> Any:
        return self[0]()


def error_of(run: Raising) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def says(signs: Any) -> str:
    return f"it says: {signs if isinstance(signs, str) else signs[0]}."


LEAF, CAPTURED = says(messages.LEAF_WRITTEN), says(messages.FUNCTIONAL_WRITES_REAL)
AT = r"at \S*test_trace_errors\.py:\d+"
HERE = rf"Layer cannot be traced, {AT}: "
READS = HERE + "it reads the value of a tensor "
VALUES = says(messages.NO_VALUES)
REFUSALS: dict[str, tuple[Raising, type[Exception], str]] = {
    "a view of a leaf": (
        writes_into_a_view,
        fs.PurityError,
        "Layer writes into a tensor",
    ),
    "what autograd calls so": (by_torch(ValueError(LEAF)), fs.TraceError, HERE + re.escape(LEAF)),
    "control flow": (has_a_bad_branch, fs.TraceError, "Layer calls the higher-order operator cond, whose"),
    "a captured tensor": (by_torch(RuntimeError(CAPTURED)), fs.PurityError, rf"Layer writes.*\({AT}\)"),
    "another error": (by_torch(RuntimeError("no such thing")), fs.TraceError, HERE + r"no such thing\.$"),
    "a sentence": (by_torch(RuntimeError("no.\nWhy?")), fs.TraceError, HERE + r"no\.$"),
    "nothing": (by_torch(IndexError()), fs.TraceError, HERE + r"IndexError\.$"),
    "an answer": (in_answer(ValueError("mine")), fs.TraceError, HERE + r"mine\.$"),
    "a nested tensor": (
        by_torch(RuntimeError(says(messages.NESTED_IN_TRACE))),
        fs.TraceError,
        HERE + "it makes a nested tensor; compute on padded",
    ),
    "a layout": (
        by_torch(RuntimeError(f"Sparse CSR{messages.NO_STRIDES}")),
        fs.TraceError,
        HERE + r"it reads a tensor in a compressed sparse layout \(Sparse CSR\); use",
    ),
    "an overwritten value": (
        by_torch(RuntimeError(says(messages.SAVED_WRITTEN))),
        fs.TraceError,
        HERE + "it overwrites in place what it has read before",
    ),
    "a collective in place": (
        by_torch(RuntimeError(f"{messages.ORDERED_EFFECT[0]} of c10d.some_.default")),
        fs.TraceError,
        HERE + r"it calls c10d\.some_\.default, which a graph cannot hold",
    ),
    "DTensors in a list": (
        by_torch(RuntimeError(says(messages.PLAIN_AMONG_DTENSORS))),
        fs.TraceError,
        HERE + r"it says: .*\. Is it handed all of its DTensors\? A sharded module belongs into",
    ),
    "no values": (by_torch(RuntimeError(VALUES)), ReadsValue, READS + re.escape(f"({VALUES[:-1]}).")),
    "a choice": (by_torch(tt.UNTRACEABLE[0]("of aten.item")), ReadsValue, READS + r"\(of aten.item\)\.$"),
    "text": (by_torch(Shown("as text")), ReadsValue, READS + r"\(as text\)\.$"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_stops_a_trace_is_refused_by_what_it_is_with_its_line(case: str) -> None:
    raising, kind, said = REFUSALS[case]
    module = Layer(raising, 0)
    refusal = refusal_of(fs.functionalize(module)[0], error_of(module))
    assert type(refusal) is kind
    assert re.match(said, str(refusal)), str(refusal)


@pytest.mark.parametrize(
    "raising", [by_stage(ValueError("mine")), by_stage(RuntimeError(LEAF)), writes_into_a_leaf]
)
def test_what_the_stage_raises_itself_or_eager_would_is_passed_on(raising: Raising) -> None:
    module = Layer(raising, 0)
    error = error_of(module)
    assert refusal_of(fs.functionalize(module)[0], error) is error


@pytest.mark.parametrize("via_list", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_innermost_module_is_named(depth: int, via_list: bool) -> None:
    module = Layer(by_torch(RuntimeError("no")), depth, via_list)
    owner = ".".join(["Layer", *["sub.0"] * depth])
    refusal = refusal_of(fs.functionalize(module)[0], error_of(module))
    assert str(refusal).startswith(f"{owner} cannot be traced, at ")


def test_a_function_has_its_own_name() -> None:
    def my_stage() -> None: ...

    refusal = refusal_of(my_stage, error_of(Layer(by_torch(RuntimeError("no")), 1)))
    assert ".my_stage cannot be traced, at " in str(refusal)


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("anomaly", [False, True])
@pytest.mark.parametrize("with_line", [False, True])
def test_anomaly_mode_is_blamed_where_no_line_of_the_stage_reads_values(
    with_line: bool, anomaly: bool
) -> None:
    module = nn.Linear(2, 2)
    error: Exception = Shown("of torch's")
    error = error_of(by_torch(error)) if with_line else error
    with torch.autograd.set_detect_anomaly(anomaly):
        refusal = refusal_of(fs.functionalize(module)[0], error)
    blamed = anomaly and not with_line
    assert type(refusal) is (fs.TraceError if blamed else ReadsValue)
    assert ("anomaly mode looks at the values of gradients" in str(refusal)) == blamed
    assert re.match(f"Linear cannot be traced{f', {AT}' if with_line else ''}: ", str(refusal))
