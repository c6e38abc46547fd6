"""What a compiled stage reads beside its arguments and its module's attributes: a change of it is seen.

Every comparison is with the same function, run by plain PyTorch at that moment. Where nothing has changed,
nothing is traced again.
"""

from __future__ import annotations

import array
import colorsys
import contextvars
import cProfile
import ctypes
import dataclasses
import datetime
import enum
import functools
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import re
import sys
import threading
import time
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.engines.graph.reads import ABSENT, Place, Reads, Said, Space, _numbers
from funcstage.engines.graph.recorder import _is_data

SETTING: Any = None
"""What the stages below read as a global."""

config = types.ModuleType("config_of_a_user")
sys.modules[config.__name__] = config


def from_global() -> Any:
    return SETTING


def by_name() -> Any:
    return globals()["SETTING"]


def from_module() -> Any:
    return config.setting


def from_module_by_name() -> Any:
    return getattr(config, "set" + "ting")


def imported() -> Any:
    from config_of_a_user import setting  # type: ignore[import-not-found]

    return setting


class Holder:
    setting: Any = None

    @property
    def as_property(self) -> Any:
        return self.setting

    @classmethod
    def as_class_method(cls) -> Any:
        return cls.setting


class Heir(Holder):
    pass


def from_class() -> Any:
    return Holder.setting


def inherited() -> Any:
    return Heir().as_property


def by_class_method() -> Any:
    return Heir.as_class_method()


def by_default(value: Any = None) -> Any:
    return value


def by_keyword_default(*, value: Any = None) -> Any:
    return value


def by_lambda() -> Any:
    return (lambda: [SETTING for _ in range(2)][1])()


def made(value: Any) -> Callable[[], Any]:
    def read() -> Any:
        return value

    return read


CELL = made(None)


def set_global(value: Any) -> None:
    global SETTING
    SETTING = value


def set_cell(value: Any) -> None:
    assert CELL.__closure__ is not None  # type: ignore[attr-defined]
    CELL.__closure__[0].cell_contents = value  # type: ignore[attr-defined]


def set_default(value: Any) -> None:
    by_default.__defaults__ = (value,)


def set_keyword_default(value: Any) -> None:
    by_keyword_default.__kwdefaults__ = {"value": value}


def set_on_module(value: Any) -> None:
    config.setting = value  # type: ignore[attr-defined]


def set_on_class(value: Any) -> None:
    Holder.setting = value


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "a global": (from_global, set_global),
    "a global by its name": (by_name, set_global),
    "a global in a lambda": (by_lambda, set_global),
    "an attribute of a module": (from_module, set_on_module),
    "an attribute of a module by a computed name": (from_module_by_name, set_on_module),
    "an import": (imported, set_on_module),
    "an attribute of a class": (from_class, set_on_class),
    "a property": (inherited, set_on_class),
    "a class method": (by_class_method, set_on_class),
    "a cell": (lambda: CELL(), set_cell),
    "a default": (lambda: by_default(), set_default),
    "a default of a keyword": (lambda: by_keyword_default(), set_keyword_default),
}


class Slots:
    __slots__ = ("__private", "scale")

    def __init__(self) -> None:
        self.scale, self.__private = 1.0, 1.0

    def total(self) -> float:
        return self.scale + self.__private

    def set_private(self, value: float) -> None:
        self.__private = value


class Measured(float):
    unit = 1.0


class Mode(enum.Enum):
    SLOW = 1.0
    FAST = 2.0


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    table: dict[str, Any] = dataclasses.field(default_factory=lambda: {"a": [1.0]})


def noted() -> float:
    return noted.scale  # type: ignore[attr-defined]


class Cached:
    """A weak reference to what another holds."""

    def __init__(self) -> None:
        self.strong = Config()
        self.weak = weakref.ref(self.strong)


def first(values: Any) -> Any:
    return next(iter(values))


class Viewed:
    """A dict, and a view of it."""

    def __init__(self) -> None:
        self.of = {"a": 1.0}
        self.view = self.of.values()


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=1.0)
VALUES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    # how it is made, the number that a stage makes of it, how it is changed inside
    "a list": (lambda: [1.0, 2.0], sum, lambda v: v.__setitem__(0, 5.0)),
    "a dict": (lambda: {"a": 1.0}, lambda v: v["a"], lambda v: v.update(a=5.0)),
    "a dict in a list": (lambda: [{"a": [1.0]}], lambda v: v[0]["a"][0], lambda v: v[0]["a"].insert(0, 5.0)),
    "a set": (lambda: {1.0}, sum, lambda v: (v.clear(), v.add(5.0))),
    "a deque": (lambda: deque([1.0, 2.0]), lambda v: v[0], lambda v: v.rotate()),
    "an ordered dict": (
        lambda: OrderedDict(a=1.0, b=2.0),
        lambda v: v[first(v)],
        lambda v: v.move_to_end("a"),
    ),
    "a default dict": (
        lambda: defaultdict(float),
        lambda v: 1.0 + v.get("a", 0.0),
        lambda v: v.update(a=5.0),
    ),
    "an array": (lambda: np.ones(3), lambda v: float(v[1]), lambda v: v.__setitem__(1, 5.0)),
    "a large array": (lambda: np.ones(20_000), lambda v: float(v[-1]), lambda v: v.__setitem__(-1, 5.0)),
    "an array of objects": (
        lambda: np.array([[1.0], None], dtype=object),
        lambda v: v[0][0],
        lambda v: v[0].insert(0, 5.0),
    ),
    "a view of a dict": (Viewed, lambda v: sum(v.view), lambda v: v.of.update(a=5.0)),
    "a number of C": (lambda: ctypes.c_double(1.0), lambda v: v.value, lambda v: setattr(v, "value", 5.0)),
    "an array of C": (
        lambda: (ctypes.c_double * 2)(1.0, 2.0),
        lambda v: v[1],
        lambda v: v.__setitem__(1, 5.0),
    ),
    "a number of all processes": (
        lambda: multiprocessing.Value("d", 1.0),
        lambda v: v.value,
        lambda v: setattr(v, "value", 5.0),
    ),
    "a learning rate": (
        lambda: torch.optim.SGD([torch.ones(1)], lr=1.0),
        lambda v: v.param_groups[0]["lr"],
        lambda v: v.param_groups[0].update(lr=5.0),
    ),
    "a learning rate's schedule": (
        lambda: torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)], lr=1.0), lambda n: 1 + n),
        lambda v: v.get_last_lr()[0],
        lambda v: (v.optimizer.step(), v.step()),
    ),
    "an array.array": (lambda: array.array("d", [1.0]), lambda v: v[0], lambda v: v.__setitem__(0, 5.0)),
    "a bytearray": (lambda: bytearray(b"\1"), lambda v: float(v[0]), lambda v: v.__setitem__(0, 5)),
    "a slice": (
        lambda: [slice(0, 1)],
        lambda v: sum([1.0, 4.0][v[0]]),
        lambda v: v.__setitem__(0, slice(0, 2)),
    ),
    "a partial": (lambda: functools.partial(sum, [1.0]), lambda v: v(), lambda v: v.args[0].append(5.0)),
    "a namespace": (
        lambda: SimpleNamespace(scale=1.0),
        lambda v: v.scale,
        lambda v: setattr(v, "scale", 5.0),
    ),
    "slots": (Slots, lambda v: v.total(), lambda v: setattr(v, "scale", 5.0)),
    "a number with attributes": (
        lambda: Measured(2.0),
        lambda v: v * v.unit,
        lambda v: setattr(v, "unit", 5.0),
    ),
    "a private slot": (Slots, lambda v: v.total(), lambda v: v.set_private(5.0)),
    "a dataclass": (Config, lambda v: v.scale, lambda v: setattr(v, "scale", 5.0)),
    "a dict in a dataclass": (Config, lambda v: v.table["a"][0], lambda v: v.table["a"].insert(0, 5.0)),
    "an enumerator": (lambda: [Mode.SLOW], lambda v: v[0].value, lambda v: v.__setitem__(0, Mode.FAST)),
    "a weak reference": (Cached, lambda v: v.weak().scale, lambda v: setattr(v.strong, "scale", 5.0)),
    "a bound method": (lambda: [1.0].copy, lambda v: v()[0], lambda v: v.__self__.insert(0, 5.0)),
    "a closure": (lambda: made([1.0]), lambda v: v()[0], lambda v: v()[0:0] or v().insert(0, 5.0)),
    "a number of a tensor": (lambda: torch.ones(()), lambda v: v.item(), lambda v: v.fill_(5.0)),
    "a float of a tensor": (lambda: torch.ones(1), float, lambda v: v.data.fill_(5.0)),
    "a list of a tensor": (lambda: torch.ones(2), lambda v: v.tolist()[1], lambda v: v.mul_(5.0)),
    "a branch on a tensor": (
        lambda: torch.ones((), dtype=torch.bool),
        lambda v: 1.0 if v else 5.0,
        lambda v: v.fill_(False),
    ),
    "a tensor": (lambda: torch.ones(4), lambda v: v, lambda v: v.mul_(5.0)),
    "a tensor with other memory": (
        lambda: torch.ones(4),
        lambda v: v,
        lambda v: setattr(v, "data", torch.full((4,), 5.0)),
    ),
}


class Reading(nn.Module):
    def __init__(self, read: Callable[[], Any], number: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.read, self.number = read, number

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.number(self.read())


def check(stage: tuple[Any, Any, Any, Any], x: Tensor, *rest: Any) -> Tensor:
    """Compare F, I and W with plain autograd; return its output."""
    apply, fast, params, buffers = stage
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    leaf = x.detach().requires_grad_()
    output, _ = apply(leaves, buffers, leaf, *rest)
    wanted = torch.autograd.grad(output, [leaf, *leaves.values()], output.detach().cos())
    ours, _, pullback = fs.stage_vjp(fast, params, buffers, x, *rest, argnums=0)
    grads, weight_pullback = pullback(ours.cos())
    for mine, grad in zip((ours, grads[0], *weight_pullback().values()), (output, *wanted), strict=True):
        torch.testing.assert_close(mine, grad.detach())
    return output.detach()


def compiled(module: nn.Module) -> tuple[Any, Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)
    return apply, fs.compile(apply, backend="aten"), params, buffers


def check_change(stage: tuple[Any, Any, Any, Any], change: Callable[[], Any], *args: Any) -> None:
    before = check(stage, *args)
    check(stage, *args)
    assert "1 signature(s)" in repr(stage[1])
    change()
    assert not torch.equal(check(stage, *args), before)
    traced = repr(stage[1])
    check(stage, *args)
    assert repr(stage[1]) == traced


@pytest.mark.parametrize("way", WAYS)
def test_what_is_bound_anew_is_seen(way: str) -> None:
    read, write = WAYS[way]
    write(1.0)
    check_change(compiled(Reading(read, float)), lambda: write(2.0), torch.randn(2, 4))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("way", ["a global", "a cell", "an attribute of a class", "a default"])
def test_what_changes_inside_is_seen(way: str, value: str) -> None:
    read, write = WAYS[way]
    make, number, change = VALUES[value]
    content = make()
    write(content)
    stage, x = compiled(Reading(read, number)), torch.randn(2, 4)
    before = check(stage, x)
    change(content)
    assert not torch.equal(check(stage, x), before)
    traced = repr(stage[1])
    check(stage, x)
    assert repr(stage[1]) == traced


@pytest.mark.parametrize("value", VALUES)
def test_what_changes_inside_an_attribute_is_seen(value: str) -> None:
    make, number, change = VALUES[value]
    module = Reading(lambda: None, lambda _: number(module.content))
    module.content = make()
    stage, x = compiled(module), torch.randn(2, 4)
    before = check(stage, x)
    change(module.content)
    assert not torch.equal(check(stage, x), before)


@dataclasses.dataclass(eq=False)
class Packing:
    content: Any


class Taking(nn.Module):
    def __init__(self, number: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(4, 4), number

    def forward(self, x: Tensor, packing: Any) -> Tensor:
        return self.linear(x) * self.number(packing.content)


@pytest.mark.parametrize("value", VALUES)
def test_what_changes_inside_an_object_among_the_arguments_is_seen(value: str) -> None:
    make, number, change = VALUES[value]
    packing = SimpleNamespace(content=make())
    stage, x = compiled(Taking(number)), torch.randn(2, 4)
    before = check(stage, x, packing)
    change(packing.content)
    assert not torch.equal(check(stage, x, packing), before)
    packing.content = make()
    torch.testing.assert_close(check(stage, x, packing), before)


def test_a_function_with_attributes_is_seen_to_change() -> None:
    noted.scale = 1.0  # type: ignore[attr-defined]
    stage = compiled(Reading(noted, float))
    check_change(stage, lambda: setattr(noted, "scale", 2.0), torch.randn(2, 4))


def test_a_global_function_with_attributes_is_seen_to_change() -> None:
    noted.scale = 1.0  # type: ignore[attr-defined]
    stage = compiled(Reading(lambda: noted(), float))
    check_change(stage, lambda: setattr(noted, "scale", 2.0), torch.randn(2, 4))


def test_a_variable_of_the_context_is_seen_to_change() -> None:
    VARIABLE.set(1.0)
    stage = compiled(Reading(lambda: VARIABLE.get(), float))
    check_change(stage, lambda: VARIABLE.set(2.0), torch.randn(2, 4))


@pytest.mark.parametrize(
    "read",
    [
        lambda: os.environ["OF_A_USER"],
        lambda: os.getenv("OF_A_USER"),
        lambda: os.environb[b"OF_A_USER"],
        lambda: os.getenvb(b"OF_A_USER"),
    ],
)
def test_a_variable_of_the_environment_is_seen_to_change(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_A_USER", "1")
    stage = compiled(Reading(read, float))
    check_change(stage, lambda: monkeypatch.setenv("OF_A_USER", "2"), torch.randn(2, 4))


def test_a_function_put_in_place_of_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    set_global(1.0)
    stage = compiled(Reading(lambda: from_global(), float))
    name = f"{__name__}.from_global"
    check_change(stage, lambda: monkeypatch.setattr(name, lambda: 3.0), torch.randn(2, 4))


def test_a_function_of_torchs_put_in_place_of_another_is_seen_where_only_torchs_layer_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = compiled(nn.Sequential(nn.Linear(4, 4), nn.Softplus()))
    name = "torch.nn.functional.softplus"
    check_change(stage, lambda: monkeypatch.setattr(name, lambda x, *_: x.sin()), torch.randn(2, 4))


class OfOneNumber(nn.Module):
    """Has an activation of one element at hand where it makes a number of a tensor from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.sum().sin() * float(SETTING) * y


def test_a_number_of_a_tensor_is_read_beside_activations_of_one_element() -> None:
    number = torch.ones(1)
    set_global(number)
    check_change(compiled(OfOneNumber()), lambda: number.fill_(5.0), torch.randn(2, 4))


def test_an_attribute_that_appears_on_a_subclass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    set_on_class(1.0)
    stage = compiled(Reading(inherited, float))
    check_change(stage, lambda: monkeypatch.setattr(Heir, "setting", 2.0, raising=False), torch.randn(2, 4))


class One:
    of_base = 1.0


class Other:
    of_base = 3.0


class Based(One):
    pass


def test_other_bases_of_a_class_are_seen() -> None:
    stage = compiled(Reading(lambda: Based().of_base, float))
    try:
        check_change(stage, lambda: setattr(Based, "__bases__", (Other,)), torch.randn(2, 4))
    finally:
        Based.__bases__ = (One,)


def test_what_a_weak_proxy_stands_for_is_seen_to_change() -> None:
    holder = Holder()
    holder.setting = 1.0
    proxy = weakref.proxy(holder)
    stage = compiled(Reading(lambda: proxy.setting, float))
    check_change(stage, lambda: setattr(holder, "setting", 2.0), torch.randn(2, 4))


def test_another_module_of_the_same_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(value: float) -> None:
        made = types.ModuleType("of_a_user")
        made.setting = value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "of_a_user", made)

    def read() -> Any:
        from of_a_user import setting  # type: ignore[import-not-found]

        return setting

    put(1.0)
    check_change(compiled(Reading(read, float)), lambda: put(2.0), torch.randn(2, 4))


def test_a_method_put_in_place_of_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = compiled(Reading(lambda: 2.0, float))

    def forward(self: Reading, x: Tensor) -> Tensor:
        return self.linear(x)

    check_change(stage, lambda: monkeypatch.setattr(Reading, "forward", forward), torch.randn(2, 4))


def test_a_stage_written_around_another_sees_the_changes_of_its_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.5))
    inner, params, buffers = fs.functionalize(module)
    scale = [1.0]

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        output, buffers = inner(params, buffers, x)
        return output * scale[0], buffers

    stage, x = (
        (apply, fs.compile(apply, backend="aten"), params, buffers),
        3 * torch.randn(16, 4),
    )  # some of it negative
    check_change(stage, lambda: setattr(module[1], "negative_slope", 0.1), x)
    scale[0] = 3.0
    check(stage, x)


MEMO: dict[int, float] = {}
CALLS = [0]


def remembered() -> float:
    return MEMO.setdefault(4, 2.0)


def counted() -> int:
    CALLS[0] += 1
    return CALLS[0]


def test_a_stage_that_remembers_is_traced_until_it_knows() -> None:
    MEMO.clear()
    stage, x = compiled(Reading(remembered, float)), torch.randn(2, 4)
    for _ in range(4):
        check(stage, x)
    assert "1 signature(s)" in repr(stage[1]) or "2 signature(s)" in repr(stage[1])


def test_a_stage_that_counts_its_calls_goes_on_counting() -> None:
    module = Reading(counted, float)
    apply, fast, params, buffers = compiled(module)
    x = torch.randn(2, 4)
    for n in range(1, 4):
        CALLS[0] = n
        wanted = apply(params, buffers, x)[0]
        CALLS[0] = n
        assert torch.equal(fs.stage_vjp(fast, params, buffers, x)[0], wanted)


TICKS = [0]


def tick(*_: Any) -> None:
    TICKS[0] += 1


def collected() -> float:
    gc.collect()
    return 2.0


@pytest.mark.slow
def test_what_the_collector_calls_is_none_of_the_stages() -> None:
    stage, x = compiled(Reading(collected, float)), torch.randn(2, 4)
    gc.callbacks.append(tick)
    try:
        for _ in range(3):
            check(stage, x)
    finally:
        gc.callbacks.remove(tick)
    assert TICKS[0]
    assert "1 signature(s)" in repr(stage[1])


def test_a_function_that_is_gone_was_replaced_or_does_not_matter() -> None:
    module = Reading(made(2.0), float)
    stage, x = compiled(module), torch.randn(2, 4)
    for value in (2.0, 3.0, 2.0):
        module.read = made(value)
        gc.collect()
        check(stage, x)


GENERATOR = np.random.default_rng(0)
UNWATCHED: dict[str, tuple[Callable[[], Any], str]] = {
    "an iterator": (lambda: next(COUNT), "count"),
    "a generator": (lambda: next(SETTING), "generator"),
    "random": (lambda: random.random(), "random number"),
    "random's integers": (lambda: random.randint(1, 9), "random number"),
    "NumPy's numbers": (lambda: np.random.rand(), "random number"),
    "a generator of NumPy's": (lambda: GENERATOR.random(), "GENERATOR"),
    "random bytes": (lambda: os.urandom(1)[0], "random number"),
    "an iterator in an object": (lambda: next(HOLDER.table["count"]), "count"),
    "an iterator in a dict": (lambda: next(COUNTS["count"]), "count"),
    "an iterator in a partial": (lambda: NEXT(), "count"),
    "an iterator in a variable of the context": (lambda: next(OF_CONTEXT.get()), "count"),
    "an iterator behind a weak reference": (lambda: next(WEAK().table["count"]), "count"),
}
COUNT = itertools.count(1)
SOBOL = torch.quasirandom.SobolEngine(2)
HOLDS_A_MODULE = SimpleNamespace(of=config)
COUNTS, NEXT, HOLDER = {"count": COUNT}, functools.partial(next, COUNT), Config(table={"count": COUNT})
WEAK = weakref.ref(HOLDER)
OF_CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("of_context", default=COUNT)


@pytest.mark.parametrize("name", UNWATCHED)
def test_what_cannot_be_watched_is_refused_by_name(name: str) -> None:
    read, word = UNWATCHED[name]
    set_global(float(i) for i in range(99))
    _, fast, params, buffers = compiled(Reading(read, float))
    with pytest.raises(fs.StageError, match=word):
        fs.stage_vjp(fast, params, buffers, torch.randn(2, 4))


def test_a_sequence_of_quasi_random_numbers_is_refused_by_name() -> None:
    _, fast, params, buffers = compiled(Reading(lambda: SOBOL.draw(1)[0, 0], lambda value: value))
    with pytest.raises(fs.TraceError, match="SOBOL"):
        fs.stage_vjp(fast, params, buffers, torch.randn(2, 4))


def test_an_iterator_among_the_arguments_is_refused_by_name() -> None:
    def apply(params: Any, buffers: Any, x: Tensor, given: Any) -> Any:
        return x * params["w"] * next(getattr(given["scales"], "of", given["scales"])), buffers

    fast = fs.compile(apply, backend="aten")
    given = iter([1.0]), (float(i) for i in range(9)), SimpleNamespace(of=itertools.count(1))
    for scales in given:  # the first of them has nothing left for a second try
        with pytest.raises(fs.TraceError, match="scales"):
            fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2), {"scales": scales})


@pytest.mark.filterwarnings("ignore:.*random")
@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand()])
def test_a_refused_draw_leaves_the_generator_as_it_was(draw: Callable[[], float]) -> None:
    _, fast, params, buffers = compiled(Reading(draw, float))
    random.seed(0), np.random.seed(0)
    wanted = draw()
    random.seed(0), np.random.seed(0)
    with pytest.raises(fs.StageError):
        fs.compile(fast.apply, backend="aten").plan(params, buffers, torch.randn(2, 4))
    assert draw() == wanted


CLOCKS: dict[str, Callable[[], float]] = {
    "time.time": lambda: time.time(),
    "datetime.now": lambda: datetime.datetime.now().year,
    "date.today": lambda: datetime.date.today().year,
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_is_noted(clock: str) -> None:
    stage = compiled(Reading(lambda: CLOCKS[clock]() * 0 + 1.0, float))
    with pytest.warns(UserWarning, match=rf"{clock}, at .*test_reads\.py:\d+"):
        check(stage, torch.randn(2, 4))


class Usual(nn.Module):
    """Holds and uses what modules of libraries do."""

    log = logging.getLogger(__name__)
    pattern = re.compile("a+")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lock = threading.Lock()
        self.config = Config()
        self.act = functools.partial(nn.functional.leaky_relu, negative_slope=0.1)
        self.ufunc, self.mode, self.typing = np.add, Mode.SLOW, list[int]
        self.unread = iter([1, 2])
        self.own = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        self.log.debug("called")
        with self.lock:
            bias = float(self.ufunc(1.0, self.config.scale)) + len(self.pattern.findall("aba"))
            drawn = random.Random(3).random()
        return self.act(self.linear(x)) * bias * self.mode.value + drawn


def test_what_modules_usually_hold_is_neither_refused_nor_traced_twice() -> None:
    stage, x = compiled(Usual()), torch.randn(2, 4)
    for _ in range(3):
        check(stage, x)
    assert "1 signature(s)" in repr(stage[1])


@pytest.mark.filterwarnings("ignore:once")
def test_what_the_import_notes_on_a_module_is_not_read_by_a_search_of_its_names() -> None:
    stage, x = compiled(Reading(by_name, float)), torch.randn(2, 4)
    set_global(2.0)
    check(stage, x)
    __spec__.loader_state = [1.0]  # type: ignore[name-defined]
    warnings.warn_explicit(
        "once", UserWarning, __file__, 1, registry=globals().setdefault("__warningregistry__", {})
    )
    check(stage, x)
    assert "1 signature(s)" in repr(stage[1])


def test_finalizers_of_others_do_not_belong_to_a_stage() -> None:
    class Litter:
        def __del__(self) -> None:
            seen.append(SETTING)

    def read() -> float:
        litter = [Litter()]
        litter.append(litter)  # type: ignore[arg-type]
        del litter
        gc.collect()
        return 2.0

    set_global(3.0)
    seen: list[Any] = []
    stage, x = compiled(Reading(read, float)), torch.randn(2, 4)
    for value in (3.0, 4.0):
        set_global(value)
        check(stage, x)
    assert seen
    assert "1 signature(s)" in repr(stage[1])


def layers() -> nn.Module:
    """Of which one is traced, and the others are copied."""
    layer = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4))  # noqa: E731
    return nn.Sequential(*[layer() for _ in range(3)])


@pytest.mark.parametrize("make", [lambda: Reading(lambda: 2.0, float), layers], ids=["reads", "layers"])
@pytest.mark.parametrize("kind", ["none", "of Python", "of C"])
def test_a_profiler_of_the_user_goes_on(kind: str, make: Any) -> None:
    stage, x, seen = compiled(make()), torch.randn(2, 4), []
    of_c = cProfile.Profile()
    before = sys.getprofile()
    if kind == "of C":
        of_c.enable()
    elif kind == "of Python":
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name))
    try:
        own = sys.getprofile()
        fs.stage_vjp(stage[1], stage[2], stage[3], x)
        assert sys.getprofile() is own
    finally:
        of_c.disable()
        sys.setprofile(before)
    assert kind != "of Python" or "forward" in seen


def what_is_read(stage: tuple[Any, ...]) -> list[Said]:
    """What every trace of a compiled stage has read says now."""
    return [reads.now() for alike in stage[1]._reads.values() for reads in alike]


def changes(before: list[Said], after: list[Said]) -> str:
    pairs = [pair for was, now in zip(before, after, strict=False) for pair in zip(was, now, strict=True)]
    changed = [f"{label} was {was}, is {now}" for (label, was), (_, now) in pairs if was != now]
    found = sorted(
        {label for now in after for label, _ in now} - {label for was in before for label, _ in was}
    )
    return f"traced again; changed: {[f'{c:.200}' for c in changed]}; read as well: {found}"


SCALARS = st.floats(-4, 4).filter(bool) | st.integers(1, 9) | st.booleans()
TREES: Any = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
        | inner.map(lambda v: SimpleNamespace(of=v))
        | inner.map(lambda v: deque([v]))
        | inner.map(lambda v: functools.partial(made, v))
    ),
    max_leaves=6,
)


def total(value: Any) -> float:
    """A number that depends on everything in a tree, the order and types included."""
    if isinstance(value, dict):
        return sum(i * total(v) + len(k) for i, (k, v) in enumerate(value.items(), 2))
    if isinstance(value, (list, deque)):
        return sum(i * total(v) for i, v in enumerate(value, 2))
    if isinstance(value, SimpleNamespace):
        return 3 * total(value.of)
    if isinstance(value, functools.partial):
        return 5 * total(value.args[0])
    return float(value) + (0.25 if isinstance(value, bool) else 0.0)


@pytest.mark.slow
@settings(deadline=None)
@given(way=st.sampled_from(sorted(WAYS)), values=st.lists(TREES, min_size=2, max_size=3))
def test_whatever_is_read_wherever_a_stage_is_as_eager_at_every_moment(way: str, values: list[Any]) -> None:
    read, write = WAYS[way]
    stage, x = compiled(Reading(read, total)), torch.ones(2, 4)
    for value in (*values, values[0]):
        write([value])
        check(stage, x)
        traced, said = repr(stage[1]), what_is_read(stage)
        check(stage, x)
        assert repr(stage[1]) == traced, changes(said, what_is_read(stage))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: self.proj(x).sin(), x, use_reentrant=False)
        return y


def test_a_checkpoint_is_the_same_function_whatever_torch_notes_on_it() -> None:
    apply, params, buffers = fs.functionalize(Checkpointed())
    compiled = fs.compile(apply, backend="aten")
    for _ in range(3):
        for stage in (compiled, apply):  # which both put an attribute on torch's function for a while
            fs.stage_vjp(stage, params, buffers, torch.randn(4, 4))
    assert "1 signature" in repr(compiled)


class Kind(type):
    """A class of classes."""


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return -y if isinstance(x, Kind) else y


def test_a_class_of_classes_is_read_like_any_other() -> None:
    apply, params, buffers = fs.functionalize(Typed())
    x = torch.randn(2, 4)
    output, _, _ = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
    torch.testing.assert_close(output, apply(params, buffers, x)[0])


class Counted:
    """Has a length that its class tells."""

    def __len__(self) -> int:
        return 2


def test_special_methods_that_nobody_names_are_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    stage = compiled(Reading(lambda: counted, lambda value: float(len(value))))
    check_change(stage, lambda: monkeypatch.setattr(Counted, "__len__", lambda self: 3), torch.randn(2, 4))


def halved(value: Tensor, times: int) -> Tensor:
    return value if times == 0 else halved(value / 2, times - 1)


class Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return halved(grad, 2)


def test_a_backward_may_call_a_function_that_calls_itself() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Halving.apply(self.linear(x))

    check(compiled(Stage()), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, True),
        ([1, ({"a": len}, {2.0})], True),
        (deque([torch.sum, SimpleNamespace]), True),
        ([SimpleNamespace()], False),
        ([[{"a": (SimpleNamespace(),)}]], False),
        ([0] * 2000, True),
        ([[]] * 2000, False),  # searching goes on for so long
    ],
)
def test_data_is_plain_or_containers_of_what_is(value: Any, expected: bool) -> None:
    assert _is_data(value) is expected


@pytest.mark.parametrize(
    "read",
    [
        lambda: sys.modules["colorsys"].ONE_THIRD,
        lambda: __import__("colorsys").ONE_THIRD,
        lambda: importlib.import_module("colorsys").ONE_THIRD,
    ],
)
def test_a_global_of_a_module_that_is_found_by_its_name_is_seen(
    read: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        monkeypatch.setattr(colorsys, "ONE_THIRD", 5.0)

    check_change(compiled(Reading(read, float)), change, torch.randn(2, 4))


class Doubling(TorchFunctionMode):
    """Doubles what every function of torch returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if isinstance(found, (Tensor, float)) else found


ROW = torch.tensor([1.0, 2.0])
NUMBERS: tuple[Any, ...] = (
    *(torch.tensor(value) for value in (0.0, -0.0, 1.0, 2.0, 1, True, 1j, float("inf"))),
    *(ROW, ROW * 2, ROW[None], ROW[:, None], ROW.double(), ROW.bfloat16(), ROW > 1, ROW + 0j, ROW[:0]),
    *(torch.tensor([0.0]), torch.tensor([-0.0]), torch.arange(6).view(2, 3), torch.arange(6).view(3, 2).t()),
    *(ABSENT, None, 1.0),
)


def test_the_values_of_tensors_are_told_apart_exactly_in_every_layout_and_under_every_mode() -> None:
    said = [_numbers(value) for value in NUMBERS]
    assert len(set(said)) == len(NUMBERS)
    for value, numbers in zip(NUMBERS, said, strict=True):
        if isinstance(value, Tensor):
            assert _numbers(value.clone().requires_grad_(value.is_floating_point())) == numbers
            assert _numbers(value.mT.contiguous().mT if value.dim() == 2 else value) == numbers
            with FakeTensorMode(), torch.device("meta"), Doubling():
                assert _numbers(value) == numbers
    assert _numbers(torch.tensor(float("nan"))) == _numbers(torch.tensor(float("nan")))
    assert _numbers((ROW + 1j).conj()) == _numbers(ROW - 1j)
    assert _numbers((ROW + 1j).conj().imag) == _numbers(ROW * 0 - 1)


@pytest.mark.parametrize(
    "read",
    [
        lambda own, given: own.held.scale,
        lambda own, given: own.listed["of"][0].scale,
        lambda own, given: given.scale,
        lambda own, given, found=HOLDS_A_MODULE: found.of.scale,
        lambda own, given, found=config: found.scale,
    ],
    ids=["attribute", "container", "argument", "object", "default"],
)
def test_an_attribute_of_a_module_that_is_held_somewhere_is_seen(
    read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holding(nn.Linear):
        held, listed = config, {"of": [config]}

        def forward(self, x: Tensor, given: Any) -> Tensor:
            y: Tensor = super().forward(x) * read(self, given)
            return y

    apply, params, buffers = fs.functionalize(Holding(3, 3))
    fast, x = fs.compile(apply, backend="aten"), torch.randn(2, 3)
    for scale in (2.0, 3.0):
        monkeypatch.setattr(config, "scale", scale, raising=False)
        torch.testing.assert_close(fast(params, buffers, x, config), apply(params, buffers, x, config))
    assert "2 signature(s)" in repr(fast)


def test_whether_a_captured_tensor_requires_grad_is_seen() -> None:
    tensor = torch.ones(3)
    stage = compiled(Reading(lambda: tensor, lambda t: 2.0 if t.requires_grad else 1.0))
    check_change(stage, tensor.requires_grad_, torch.randn(2, 4))


def with_a_name_for_each_setting(x: Tensor) -> Tensor:
    def one() -> Any:
        return ONE  # noqa: F821

    def other() -> Any:
        return OTHER  # noqa: F821

    try:
        return x * (one() if SETTING == 1 else other())
    except NameError:
        return x


def test_a_name_that_is_not_there_is_told_from_one_which_another_call_did_not_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, x = sys.modules[__name__], torch.randn(2, 4)
    fast = fs.compile(lambda params, buffers, x: (with_a_name_for_each_setting(x), buffers), backend="aten")

    def is_right() -> bool:
        return all(torch.equal(fast((), (), x)[0], with_a_name_for_each_setting(x)) for _ in range(2))

    for setting, name in ((1, None), (2, None), (2, "OTHER"), (1, None), (1, "ONE"), (2, None)):
        monkeypatch.setattr(here, "SETTING", setting)
        if name is not None:
            monkeypatch.setattr(here, name, 5.0, raising=False)
        assert is_right(), (setting, name)
    assert "4 signature(s)" in repr(fast)


def test_two_traces_are_alike_which_read_the_same_places_and_looked_up_the_same_names() -> None:
    here, there = {"a": 1, "b": 2}, {"a": 1}

    def reads(names: str, *spaces: Space) -> Reads:
        places = {(id(here), name): Place(repr(name), here, name) for name in names}
        return Reads(places, [here[name] for name in names], spaces, set())

    def space(names: str, entries: dict[str, Any] = here, library: bool = False) -> Space:
        return Space("a module", entries, {*names}, library)

    kinds = [
        (reads("a", space("a")), reads("a", space("a")), reads("a", space("a"), space("x", library=True))),
        (reads("a"),),
        (reads("b", space("a")),),
        (reads("ab", space("a")), reads("ab", space("a"))),
        (reads("ba", space("a")),),
        (reads("a", space("ax")), reads("a", space("xa"))),
        (reads("a", space("ay")),),
        (reads("a", space("a", there)),),
        (reads("a", space("a"), space("a", there)),),
    ]
    for kind, other in itertools.product(kinds, kinds):
        for one, another in itertools.product(kind, other):
            assert one.is_like(another) == (kind is other)
    assert reads("a", space("ax")).now() != reads("a", space("ay")).now()


def test_a_cell_that_is_empty_or_gone_is_absent() -> None:
    def outer(fill: bool) -> Callable[[], Any]:
        def read() -> Any:
            return value

        if fill:
            value = 1.0
        return read

    def value(function: Callable[..., Any], i: int) -> Any:
        return Place("a cell", weakref.ref(function), i).value()

    filled, empty = outer(True), outer(False)
    assert value(filled, 0) == 1.0
    assert value(empty, 0) is value(filled, 1) is value(outer, 0) is ABSENT
