"""What a value says is compared: whatever a result could depend on, and nothing else."""

from __future__ import annotations

import array
import contextvars
import dataclasses
import datetime
import enum
import fractions
import functools
import hashlib
import io
import logging
import mmap
import os
import pathlib
import re
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy
import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage.state.content import MARK, content, is_one_of_its_kind, is_opaque, is_plain, parts_of


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Thing:
    """A plain object."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> None:
        """Does nothing."""

    def other(self) -> None:
        """Does nothing either."""


class Slots:
    __slots__ = ("__private", "there")

    def __init__(self, value: Any) -> None:
        self.__private = value


class Below(Slots):
    __slots__ = ()


@dataclasses.dataclass
class Data:
    value: Any


class Number(int):
    """A number with attributes."""


class Named(dict):  # type: ignore[type-arg]
    """A dict with attributes."""


class Keyed:
    """Equal to any other, but may change."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed)

    def __hash__(self) -> int:
        return 1


class Answering:
    """Has code of its own for what it has not got."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


class Iterator:
    """Has no state that anybody can look at."""

    __slots__ = ()

    def __next__(self) -> int:
        return 1


def attributed(kind: Any, *args: Any, **attributes: Any) -> Any:
    value = kind(*args)
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def instance_of(module: str) -> Any:
    return type("Kernel", (), {"__module__": module})()


def cell(*values: Any) -> Any:
    def function() -> Any:
        return value

    for value in values:  # noqa: B007
        pass
    return function.__closure__[0]  # type: ignore[index]


def said(value: Any) -> Any:
    return content(value, set())


def changed(value: Any, change: Callable[[Any], Any]) -> bool:
    """Tell whether a change of an object is heard, and that nothing is where there is none."""
    before = said(value)
    assert said(value) == before
    hash(before)
    change(value)
    return said(value) != before


EQUAL: list[Callable[[], Any]] = [
    lambda: 1,
    lambda: -0.0,
    lambda: 1.5 + 2j,
    lambda: "text",
    lambda: [1, [2, (3,)]],
    lambda: (1, 2),
    lambda: {"a": [1], (1, ("b",)): 2},
    lambda: OrderedDict(a=1),
    lambda: {1, "a", (2, 3)},
    lambda: frozenset((1, 2)),
    lambda: deque([1, 2], 3),
    lambda: slice(1, 2, 3),
    lambda: array.array("d", [1.0]),
    lambda: bytearray(b"ab"),
    lambda: memoryview(b"ab"),
    lambda: numpy.arange(6.0).reshape(2, 3),
    lambda: numpy.arange(20_000),
    lambda: numpy.array([1, [2]], dtype=object),
    lambda: numpy.float32(1.5),
    lambda: numpy.dtype("float32"),
    lambda: Data([1, 2]),
    lambda: functools.partial(print, 1, sep=""),
    lambda: types.MappingProxyType({"a": [1]}),
    lambda: datetime.date(2020, 1, 2),
    lambda: fractions.Fraction(1, 3),
    lambda: pathlib.Path("a"),
    lambda: Counter("aab"),
    lambda: [].append,
    lambda: Colour.RED,
    lambda: {int("1234567"): 1},
    lambda: optree.tree_structure([1]),
    lambda: weakref.ref(Thing),
    lambda: cell([1]),
    lambda: torch.float32,
    lambda: attributed(Number, 3, note=1),
    lambda: attributed(Named, {"a": 1}, note=1),
]


@pytest.mark.parametrize("make", EQUAL)
def test_what_is_made_anew_and_is_alike_says_the_same(make: Callable[[], Any]) -> None:
    assert said(make()) == said(make())
    assert hash(said(make())) == hash(said(make()))


DIFFERENT: list[tuple[Any, Any]] = [
    (1, 2),
    (1, 1.0),
    (1, True),
    (0.0, -0.0),
    (complex(0.0, 0.0), complex(0.0, -0.0)),
    ("a", b"a"),
    (None, ...),
    (torch.float32, torch.float64),
    ([1, 2], (1, 2)),
    ([1, 2], [2, 1]),
    ([[]], [()]),
    ([1], []),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({1: 0}, {1.0: 0}),
    ({(1,): 0}, {(1.0,): 0}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"a": 1}, OrderedDict(a=1)),
    (defaultdict(int), defaultdict(float)),
    (defaultdict(int), {}),
    (types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})),
    (types.MappingProxyType({"a": 1}), types.MappingProxyType({"b": 1})),
    ({1}, {1.0}),
    ({1}, frozenset((1,))),
    (set(), {1}),
    (deque([1]), deque([1], 5)),
    (deque([1]), deque([2])),
    (deque([1]), [1]),
    (slice(1, 2), slice(0, 2)),
    (slice(1, 2), slice(1, 3)),
    (slice(1, 2), slice(1, 2, 2)),
    (array.array("i", [1]), array.array("I", [1])),
    (array.array("i", [1]), array.array("i", [2])),
    (bytearray(b"a"), bytearray(b"b")),
    (memoryview(b"a"), memoryview(b"a").cast("b")),
    (numpy.zeros(4), numpy.ones(4)),
    (numpy.zeros((2, 3)), numpy.zeros((3, 2))),
    (numpy.zeros(2), numpy.zeros(2, "int64")),
    (numpy.zeros(20_000), numpy.ones(20_000)),
    (numpy.array([1, [2]], dtype=object), numpy.array([1, [3]], dtype=object)),
    (numpy.array([None], dtype=object), numpy.array([[None]], dtype=object)),
    (numpy.float32(1), numpy.float32(2)),
    (numpy.float32(0), numpy.int32(0)),
    (numpy.dtype("f4"), numpy.dtype("f8")),
    (Data(1), Data(2)),
    (Thing(), Thing()),
    (functools.partial(print), functools.partial(repr)),
    (functools.partial(print, 1), functools.partial(print, 2)),
    (functools.partial(print, sep=""), functools.partial(print, sep=" ")),
    (attributed(functools.partial, print, note=1), attributed(functools.partial, print, note=2)),
    (attributed(Number, 3, note=1), attributed(Number, 3, note=2)),
    (attributed(Number, 3, note=1), attributed(Number, 4, note=1)),
    (attributed(Named, {}, note=1), attributed(Named, {}, note=2)),
    (datetime.date(2020, 1, 2), datetime.date(2020, 1, 3)),
    (pathlib.Path("a"), pathlib.Path("b")),
    (Counter("a"), Counter("b")),
    ([1].append, [2].append),
    ([].append, [].extend),
    (len, repr),
    (Colour.RED, Colour.BLUE),
    (weakref.ref(Thing), weakref.ref(Data)),
    (cell([1]), cell([2])),
    (cell(1), cell()),
    (Thing, Data),
    (os, re),
    (lambda: 1, lambda: 1),
    (iter([1]), iter([1])),
    (Iterator(), Iterator()),
    (torch.zeros(2), torch.zeros(2)),
    (nn.ReLU(), nn.ReLU()),
    ({Keyed(): 1}, {Keyed(): 1}),
    (optree.tree_structure([1]), optree.tree_structure((1,))),
    (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 1.0)),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_in_anything_says_something_else(one: Any, other: Any) -> None:
    assert said(one) == said(one)
    assert said(one) != said(other)
    hash(said(one))


class Holder:
    """Has a value in a slot whose name is mangled."""

    __slots__ = ("__hidden",)

    def fill(self, value: Any) -> None:
        self.__hidden = value


VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")


def function() -> None:
    """Does nothing."""


async def asynchronous() -> Any:
    """Is never run."""
    yield 1


CHANGES: list[tuple[Any, Callable[[Any], Any]]] = [
    (Thing(value=[1]), lambda thing: thing.value.append(2)),
    (Thing(value=1), lambda thing: setattr(thing, "value", 2)),
    (Thing(), lambda thing: setattr(thing, "new", None)),
    (Slots([1]), lambda thing: setattr(thing, "there", 2)),
    (Below(1), lambda thing: Slots.__init__(thing, 2)),
    (Holder(), lambda thing: thing.fill(1)),
    (Holder(), lambda thing: thing.fill(None)),
    (threading.local(), lambda local: setattr(local, "value", 1)),
    (VARIABLE, lambda variable: variable.set([1])),
    (function, lambda f: setattr(f, "note", 1)),
    (Thing(value=1).method, lambda bound: setattr(bound.__self__, "value", 2)),
    (weakref.ref(function), lambda reference: setattr(reference(), "other", 1)),
    (os.environ, lambda environment: environment.update(FUNCSTAGE_TEST_OF_CONTENT="1")),
    (attributed(Named, {}, note=[]), lambda named: named.note.append(1)),
    ({"a": {"b": [set()]}}, lambda nested: nested["a"]["b"][0].add(1)),
    (property(attributed(lambda: lambda thing: 1, note=[])), lambda p: p.fget.note.append(1)),
    (staticmethod(attributed(lambda: lambda: 1, note=[])), lambda s: s.__func__.note.append(1)),
    (functools.cached_property(attributed(lambda: lambda t: 1, note=[])), lambda c: c.func.note.append(1)),
    (torch.zeros(2), lambda tensor: tensor.resize_(3)),
    (Thing(old=1), lambda thing: thing.__dict__.update(new=thing.__dict__.pop("old"))),
    (attributed(Named, {}, note=1), lambda named: vars(named).update(new=vars(named).pop("note"))),
    (Keyed(), lambda keyed: setattr(keyed, "value", 1)),
    (types.SimpleNamespace(a=1), lambda space: setattr(space, "a", 2)),
    (torch.zeros(2), lambda tensor: setattr(tensor, "data", tensor.data.double())),
    (attributed(lambda: lambda: 1, __module__=None), lambda f: setattr(f, "note", 1)),
    (nn.ReLU(), lambda module: setattr(module, "inplace", True)),
    (torch.distributions.Normal(0.0, 1.0), lambda normal: setattr(normal, "loc", 1)),
    (torch.optim.SGD([torch.zeros(2)]), lambda optimizer: optimizer.param_groups[0].update(lr=2.0)),
    (torch.optim.SGD([torch.zeros(2)]), lambda optimizer: setattr(optimizer, "note", 1)),
]


@pytest.mark.parametrize(("value", "change"), CHANGES)
def test_a_change_within_is_heard(
    value: Any, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUNCSTAGE_TEST_OF_CONTENT", raising=False)
    assert changed(value, change)
    monkeypatch.setenv("FUNCSTAGE_TEST_OF_CONTENT", "")  # and away afterwards


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (logging.getLogger("of a test"), lambda logger: logger.setLevel(5)),
        (io.StringIO(), lambda stream: stream.write("x")),
        (torch.sum, lambda _: None),
        (torch.zeros(2), lambda tensor: tensor.add_(1)),
        (nn.functional.relu, lambda f: setattr(f, "note", 1)),
        (torch.Generator(), lambda generator: generator.seed()),
        (torch.optim.SGD([torch.zeros(2)]), lambda optimizer: optimizer.state.update(step=1)),
        (torch.optim.SGD([torch.zeros(2)]), lambda optimizer: optimizer.param_groups[0]["params"].pop()),
        (instance_of("triton.runtime"), lambda kernel: setattr(kernel, "calls", 1)),
        (instance_of("numba.core"), lambda kernel: setattr(kernel, "calls", 1)),
    ],
)
def test_what_a_result_does_not_depend_on_or_is_watched_apart_is_not_heard(
    value: Any, change: Callable[[Any], Any]
) -> None:
    assert not changed(value, change)


def test_two_methods_of_one_object_differ_and_one_of_it_says_the_same_each_time() -> None:
    thing = Thing()
    assert said(thing.method) == said(thing.method)
    assert said(thing.method) != said(thing.other)
    assert said(thing.method) != said(Thing().method)


def test_containers_may_hold_themselves_and_one_object_twice() -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    assert said(endless) == said(endless)
    inner: list[int] = [1]
    assert said([inner, inner]) != said([inner, [1]])  # of which one write changes both
    assert content(inner, {id(inner)}) == content(inner, {id(inner)}) != said(inner)
    assert content(inner, {id(inner)}) != content(endless, {id(endless)})


def test_code_of_the_value_does_not_run() -> None:
    answering = Answering()
    assert said([answering, answering]) == said([answering, answering])
    assert type(answering).__name__ in repr(said(answering))


def test_objects_that_are_gone_are_like_no_other() -> None:
    one, other = said(Thing()), said(Thing())  # maybe in the same memory
    assert one != other


def test_a_tensor_that_a_stage_left_counts_by_its_looks() -> None:
    def left(tensor: torch.Tensor) -> Any:
        setattr(tensor, MARK, True)
        return said([tensor, tensor])

    assert left(torch.zeros(2, 3)) == left(torch.ones(2, 3))
    for other in (
        torch.zeros(3, 2),
        torch.zeros(2, 3).double(),
        torch.zeros(3, 2).t(),
        torch.zeros(2, 3) + 0j,
    ):
        assert left(torch.zeros(2, 3)) != left(other)
    z = torch.zeros(2, 3) + 0j
    assert left(z + 0) != left(z.conj())
    assert left(z.conj().imag) != left(torch.view_as_real(z)[..., 1])


@pytest.mark.parametrize(
    "value", [1, 1.5, 1j, "a", b"a", None, ..., NotImplemented, torch.int8, torch.device("cpu"), (1, ("a",))]
)
def test_what_cannot_change_is_plain(value: Any) -> None:
    assert is_plain(value)
    assert [*parts_of(value)] == ([*enumerate(value)] if isinstance(value, tuple) else [])


@pytest.mark.parametrize("value", [[], {}, Thing(), ([],), (1, [2]), Number(1), torch.zeros(1), function])
def test_what_can_change_is_not_plain(value: Any) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize(
    ("value", "one_of_its_kind", "opaque"),
    [
        (torch.sum, True, False),
        (nn.functional.relu, True, False),  # a function in Python, of torch's
        (function, False, False),
        (len, True, False),
        (dict.fromkeys, True, False),
        ([].append, False, False),
        (Thing, True, False),
        (os, True, False),
        (iter([]), True, True),
        (Iterator(), False, False),
        (Thing(), False, False),
        (logging.getLogger(), True, False),
        ([], False, False),
        ((x for x in ()), True, True),
        (numpy.random.default_rng(), True, True),
        (hashlib.sha256(), True, False),
        (mmap.mmap(-1, 8), True, True),
        ({}.keys(), False, False),
        (asynchronous(), True, True),
    ],
)
def test_what_is_compared_by_which_one_it_is(value: Any, one_of_its_kind: bool, opaque: bool) -> None:
    assert is_one_of_its_kind(value) is one_of_its_kind
    assert is_opaque(value) is opaque


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
        lambda: nn.LazyLinear(3).weight,
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    ],
)
def test_tensors_of_any_layout_may_lie_within_a_stages_reach(make: Callable[[], Tensor]) -> None:
    table = {"kept": make()}

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(table)

    module, x = Scaled(3, 3), torch.ones(2, 3)
    apply, params, buffers = fs.functionalize(module)
    fast = fs.compile(apply, backend="aten", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(fs.stage_vjp(fast, params, buffers, x)[0], module(x).detach())
    table["kept"] = make()
    table["more"] = make()
    torch.testing.assert_close(fs.stage_vjp(fast, params, buffers, x)[0], module(x).detach())


def test_what_a_proxy_stood_for_is_gone() -> None:
    thing = Thing(value=1)
    proxy = weakref.proxy(thing)
    there = content(proxy, set())
    del thing
    assert content(proxy, set()) != there
    assert content(proxy, set()) == content(proxy, set())
