"""What is said of two signatures: why a trace serves one and not the other, and which sizes vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import nn

import funcstage as fs
from funcstage.engines.base import StageCall
from funcstage.engines.graph.guards import (
    MARK,
    OfTensor,
    Recent,
    Signature,
    changed,
    others_among,
    reasons,
    signature_of,
    varied,
)
from funcstage.engines.graph.reads import Place, Reads, said_by
from funcstage.state.module import Fingerprint

MODULE = nn.Linear(2, 2)
WEIGHT = torch.ones(3)


def called(*args: Any, diff: tuple[int, ...] | None = None, **kwargs: Any) -> StageCall:
    """A call with these arguments, of a stage with one parameter and no buffers."""
    return StageCall.of(lambda p, b, *args: (args, b), {"w": WEIGHT}, {}, args, kwargs, diff)


def of_call(call: StageCall, open_dims: Any = None) -> Signature:
    """Its signature."""
    return signature_of(call, Fingerprint([MODULE], hooks=True), open_dims or {})


def signature(*args: Any, open_dims: Any = None, **options: Any) -> Signature:
    """That of such a call."""
    return of_call(called(*args, **options), open_dims)


X, Y = torch.ones(2, 3), torch.ones(4, 3)
LOOKS = {
    "shape": (Y, "args[0]: float32[2, 3], strides (3, 1), cpu -> float32[4, 3], strides (3, 1), cpu"),
    "strides": (
        torch.ones(3, 2).t(),
        "args[0]: float32[2, 3], strides (3, 1), cpu -> float32[2, 3], strides (1, 2), cpu",
    ),
    "dtype": (
        X.double(),
        "args[0]: float32[2, 3], strides (3, 1), cpu -> float64[2, 3], strides (3, 1), cpu",
    ),
    "device": (
        X.to("meta"),
        "args[0]: float32[2, 3], strides (3, 1), cpu -> float32[2, 3], strides (3, 1), meta",
    ),
    "a lazy negative": (
        (torch.ones(2, 3) * 1j).conj().imag,
        "args[0]: float32[2, 3], strides (3, 1), cpu -> float32[2, 3] negated, strides (6, 2), cpu",
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_tensor_that_looks_otherwise_is_the_reason(name: str) -> None:
    other, reason = LOOKS[name]
    before, after = signature(X, 1), signature(other, 1)
    assert before == signature(X.clone(), 1)
    assert before != after
    assert [*reasons(before, after)] == [reason]


def test_a_lazy_conjugate_is_named() -> None:
    z = torch.ones(2, dtype=torch.complex64)
    (said,) = reasons(signature(z), signature(z.conj()))
    assert said.endswith("complex64[2] conjugated, strides (1,), cpu")
    both = signature(z.conj().conj().conj().imag * 1)
    assert both == signature(torch.ones(2))


def test_other_reasons_are_each_named_and_of_the_leaves_the_first() -> None:
    assert [*reasons(signature(X, 1), signature(X, 1.0))] == [
        "args[1]: (<class 'int'>, 1) -> (<class 'float'>, '1.0')"
    ]
    assert [*reasons(signature(X, X), signature(Y, Y))] == [LOOKS["shape"][1]]
    assert [*reasons(signature(X, [X]), signature(Y, (X,)))] == ["structure"]
    assert next(reasons(signature(X), signature(X, diff=(0,)))) == "argnums None -> (0,)"
    assert [*reasons(signature(X), signature(X))] == []


def test_what_was_read_outside_is_a_reason_where_it_was_read_both_times() -> None:
    plain = signature(X)
    before = plain._replace(outside=(("a", 1), ("b", 2), ("c", 3)))
    after = plain._replace(outside=(("b", 2), ("c", 4), ("d", 5)))
    assert [*reasons(before, after)] == ["c: 3 -> 4"]


def test_the_sharding_is_a_reason() -> None:
    plain = signature(X)
    (said,) = reasons(plain, plain._replace(sharding=(1,)))
    assert said == "placements or meshes of DTensors () -> (1,)"
    assert [*reasons(plain, signature([X])._replace(sharding=(1,)))] == ["structure"]


def test_settings_and_the_modules_mode_are_reasons() -> None:
    before = signature(X)
    MODULE.eval()
    try:
        (said,) = reasons(before, signature(X))
    finally:
        MODULE.train()
    assert said.startswith("module ")
    torch.set_default_dtype(torch.float64)
    try:
        (said,) = reasons(before, signature(X))
    finally:
        torch.set_default_dtype(torch.float32)
    assert said.startswith("flags (torch.float32, ")


def test_a_trace_has_changed_something_if_anything_but_kept_tensors_is_another() -> None:
    plain = signature(X)
    marked = (MARK, "looks")
    for field in ("leaves", "module"):
        one, other = plain._replace(**{field: (1, marked)}), plain._replace(**{field: (2, marked)})
        assert changed(one, plain, other)
        assert not changed(one, plain, one)
        longer = plain._replace(**{field: (1, marked, 3)})
        assert changed(one, plain, longer)
        kept = plain._replace(**{field: (1, "what became of it")})
        assert not changed(one, plain, kept)  # it was kept before, and is told apart from then on
        assert changed(kept, plain, one)
        deep, deeper = plain._replace(**{field: ((1, (2,)),)}), plain._replace(**{field: ((1, (3,)),)})
        assert changed(deep, plain, deeper)
    for one, other in (
        *((((1,),), ("x",)), (("x",), ((1,),)), (((1,),), ((1, 2),))),
        *((((1,),), (3,)), ((3,), ((1,),)), (((1,),), ([1],)), (([1],), ((1,),))),
    ):
        assert changed(plain._replace(leaves=one), plain, plain._replace(leaves=other))
    one, other = plain._replace(outside=(("a", 1),)), plain._replace(outside=(("a", 2),))
    assert changed(plain, one, other)
    assert not changed(other, one, one)


def test_sizes_that_vary_are_told_by_leaf_unless_anything_else_differs() -> None:
    before = signature(X, X)
    n_state = 1
    assert varied(before, signature(Y, X), n_state) == {1: (0,)}
    assert varied(before, signature(Y, torch.ones(2, 5)), n_state) == {1: (0,), 2: (1,)}
    assert varied(before, signature(torch.ones(5, 7), X), n_state) == {1: (0, 1)}
    assert varied(before, signature(X, X), n_state) == {}
    # of strides alone nothing is said
    assert varied(before, signature(torch.ones(3, 2).t(), X), n_state) == {}
    for other in (
        signature(Y.double(), X),
        signature(torch.ones(2, 3, 1), X),
        signature(torch.ones(6), X),
        signature(Y, 1),
        signature(Y, X, diff=(0,)),
        signature(Y, [X]),
        signature(Y, X)._replace(module=("other",)),
    ):
        if other.structure == before.structure:
            assert varied(before, other, n_state) == {}
    assert varied(before, signature(Y, X), 2) == {}  # state does not vary
    for one, other in ((1, 2), (1, X), (X, 1)):
        assert varied(signature(X, one), signature(X, other), n_state) == {}
    some = signature(Y, X, open_dims={1: (0,)})
    assert varied(some, signature(torch.ones(9, 5), X, open_dims={1: (0,)}), n_state) == {1: (1,)}


def test_open_sizes_are_no_part_of_a_signature() -> None:
    one, other = (signature(x, open_dims={1: (0,)}) for x in (X, Y))
    assert one == other
    assert one != signature(torch.ones(2, 4), open_dims={1: (0,)})
    leaf = one.leaves[1]
    assert isinstance(leaf, OfTensor)
    assert leaf.shape == (None, 3)
    assert repr(leaf).startswith("float32[any, 3], strides ")


def test_leaves_that_are_no_tensors_have_names() -> None:
    leaves, structure = optree.tree_flatten(({}, {}, (X, 1, ["a", X]), {"k": 2.0}))
    assert others_among(leaves, structure) == [("args[1]", 1), ("args[2][0]", "a"), ("kwargs['k']", 2.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyLinear(2).weight, r"args\[1\] is lazy and not yet initialised"),
        (lambda: torch.ones(2, 2).to_sparse(), r"args\[1\] is a sparse_coo tensor"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), r"args\[1\] is a sparse_csr tensor"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), r"args\[1\] is a Tensor .* cannot read"),
        (lambda: torch.nested.nested_tensor([X, Y]), r"args\[1\] is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_no_trace_can_take_is_named(make: Any, message: str) -> None:
    with pytest.raises(fs.TraceError, match=message):
        signature(X, make())


def test_the_grad_mode_counts_where_nothing_is_differentiated() -> None:
    module, nothing = Fingerprint([MODULE], hooks=True), Reads({}, [], (), set())
    for call, counts in ((called(X), True), (called(X, diff=(0,)), False)):
        before, recent = of_call(call), Recent(call, module, nothing, {}, None)
        with torch.no_grad():
            assert (of_call(call) != before) == counts
            assert (recent.match(call, module) is None) == counts
        assert recent.match(call, module) is not None


class Spec(NamedTuple):
    """How a DTensor lies, as far as specs are compared."""

    mesh: list[int]
    placements: str


def test_dtensors_are_alike_on_one_mesh_in_the_same_places() -> None:
    recent = Recent(CALLS["plain"], Fingerprint([MODULE], hooks=True), Reads({}, [], (), set()), {}, None)
    mesh, equal = [0, 1], [0, 1]
    known: Any = {1: Spec(mesh, "split")}
    recent._specs = known
    others: list[tuple[Any, bool]] = [
        (known, True),
        ({1: Spec(mesh, "split")}, True),
        ({1: Spec(equal, "split")}, False),  # which may have other groups
        ({1: Spec(mesh, "whole")}, False),
        ({2: known[1]}, False),
        ({1: known[1], 2: known[1]}, False),
        ({}, False),
    ]
    for specs, alike in others:
        assert recent._alike(specs) == alike
    module, plain = Fingerprint([MODULE], hooks=True), CALLS["plain"]
    assert recent.match(plain, module) is None
    with_specs = replace(plain)
    vars(with_specs)["local"] = plain.local[0], known
    assert recent.match(with_specs, module) is not None
    recent._specs = {}
    assert recent.match(with_specs, module) is None
    assert recent.match(plain, module) is not None


Z = torch.ones(2, 3, dtype=torch.complex64)
CALLS: dict[str, StageCall] = {
    "plain": called(X),
    "again": called(X.clone()),
    "another shape": called(Y),
    "other strides": called(torch.ones(3, 2).t()),
    "double": called(X.double()),
    "meta": called(X.to("meta")),
    "complex": called(Z),
    "a lazy conjugate": called(Z.conj()),
    "differentiated": called(X, diff=(0,)),
    "a number": called(X, 1),
    "the number again": called(X.clone(), 1),
    "another number": called(X, 2),
    "a number of another type": called(X, 1.0),
    "a tensor for a number": called(X, torch.ones(())),
    "a list": called([X]),
    "two": called(X, X.clone()),
    "two of which one is differentiated": called(X, X.clone(), diff=(0,)),
    "two of which the other is": called(X, X.clone(), diff=(1,)),
    "by keyword": called(x=X),
}


@pytest.mark.parametrize("first", CALLS)
def test_a_call_is_recognised_by_another_if_they_have_one_signature(first: str) -> None:
    known, module = CALLS[first], Fingerprint([MODULE], hooks=True)
    nothing = Reads({}, [], (), set())
    recent = Recent(known, module, nothing, {}, None)
    for name, call in CALLS.items():
        found = recent.match(call, module)
        assert (found is not None) == (of_call(call) == of_call(known)), name
        if found is not None:
            assert all(a is b for a, b in zip(found, filter(torch.is_tensor, call.local[0]), strict=True))
    MODULE.eval()
    try:
        assert recent.match(known, module) is None
    finally:
        MODULE.train()
    assert recent.match(known, module) is not None
    assert recent.match(called(nn.Parameter(X.clone())), module) is None  # another type, to be looked up
    with torch.autocast("cpu", torch.bfloat16):
        assert recent.match(known, module) is None


def test_a_call_is_not_recognised_after_what_was_read_has_changed() -> None:
    module, namespace = Fingerprint([MODULE], hooks=True), {"FACTOR": 1.0}
    place = Place("'FACTOR'", namespace, "FACTOR")
    reads = Reads({(id(namespace), "FACTOR"): place}, [said_by(place, set())], (), set())
    recent = Recent(CALLS["plain"], module, reads, {}, None)
    assert recent.match(CALLS["again"], module) is not None
    namespace["FACTOR"] = 2.0
    assert recent.match(CALLS["again"], module) is None
