"""Which places the recorder notes when a stage runs, each by its label: all that it read, and no other."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import pytest
import torch
from seeing import Seeing
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import funcstage as fs
from funcstage.engines.graph.left_behind import is_made_in_trace
from funcstage.engines.graph.reads import Reads
from funcstage.engines.graph.recorder import (
    Recorder,
    _is_data,
    _is_traced,
    _run_by_the_interpreter,
    watch,
)

HERE = __name__
NUMBER = 1.0
TABLE = {"a": [1.0]}
PAIR = (1.0, 2.0)
VECTOR = torch.ones(3)
ONE = torch.ones(())

settings = types.ModuleType("settings_of_a_user")
settings.factor = 2.0  # type: ignore[attr-defined]
settings.other = 3.0  # type: ignore[attr-defined]
settings.inner = inner = types.ModuleType("settings_of_a_user.inner")  # type: ignore[attr-defined]
inner.deep = 4.0  # type: ignore[attr-defined]
sys.modules |= {"settings_of_a_user": settings, "settings_of_a_user.inner": inner}


def recorded(
    function: Callable[[], Any], modules: Iterable[nn.Module] = (), arguments: Iterable[tuple[str, Any]] = ()
) -> Reads:
    """What is noted while a function runs."""
    recorder = Recorder(function, modules, arguments)
    with recorder:
        function()
    return recorder.finish()[0]


def labels(function: Callable[[], Any], **options: Any) -> set[str]:
    """The labels of all places but the function's own, and those of the recorder's own named tuples."""
    function()  # what is imported on first use is imported
    found = {place.label for place in recorded(function, **options).places}
    found = {label for label in found if "__new__" not in label and "namedtuple_" not in label}
    return {label.replace(HERE, "here") for label in found - code_of(function.__qualname__)}


def code_of(function: str, *more: str) -> set[str]:
    """The labels of a function that has run and was there before."""
    return {f"{function}.{name}" for name in ("__code__", "__defaults__", "__kwdefaults__")} | {*more}


class Base:
    __hash__ = None  # type: ignore[assignment]
    unit = 1.0
    unread = 2.0

    def scaled(self) -> float:
        return self.unit


class Heir(Base):
    pass


class Kept:
    """An object with a state that is read, and one that is not."""

    def __init__(self) -> None:
        self.number, self.stream, self.inside = 1.0, iter([1]), [iter([2])]


class Calling:
    """What is called by an instance, where a class has it for a special method."""

    def __call__(self) -> float:
        return NUMBER


class Special:
    __call__ = Calling()


KEPT = Kept()
MODULES = [settings]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
MEMBER = Heir()
COMPARING = functools.cmp_to_key(lambda a, b: int(NUMBER * a) - b)
STREAM = iter([1])
IN_SET = (iter([1]), CYCLE, 1, 1)
STREAMS = {"a": [iter([1])]}
PARTIAL: Any = functools.partial(list, STREAM)


def default(stream: Any = STREAM) -> None:
    pass


def helper() -> float:
    return NUMBER


def with_defaults(x: float = 3.0, *, y: float = 4.0) -> float:
    return x + y


def closing_over(value: Any) -> Callable[[], Any]:
    def read() -> Any:
        return value

    return read


CELL = closing_over(5.0)
READ = "closing_over.<locals>.read"


def in_package(source: str, package: str) -> Callable[[], Any]:
    """A function of a module in a package."""
    namespace: dict[str, Any] = {"__name__": f"{package}.code", "__package__": package}
    exec(f"def run():\n    {source}", namespace)
    run: Callable[[], Any] = namespace["run"]
    return run


def of_a_module(found: Any = settings) -> Any:
    return found.factor


def after_another() -> Any:
    return settings.factor, computed(settings, "other")


def computed(owner: Any, name: str) -> Any:
    return getattr(owner, name)


def under_torchs_layer(x: Tensor) -> Any:
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(helping, (x,), x)
    return x


def helping(x: Tensor) -> Any:
    return x * NUMBER


def by_import() -> Any:
    from settings_of_a_user.inner import deep  # type: ignore[import-not-found]

    return deep


def by_import_of_a_module() -> Any:
    import settings_of_a_user.inner as found  # type: ignore[import-not-found]

    return found.deep


def hooking() -> None:
    torch.ones(2, requires_grad=True).register_hook(hook)


def hook(grad: Tensor) -> Tensor:
    return grad * helper() * CELL()


def hooking_with_a_closure() -> None:
    inside = CELL

    def scaled(grad: Tensor) -> Tensor:
        return grad * helper() * inside()

    torch.ones(2, requires_grad=True).register_hook(scaled)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * helper()


HELPER = code_of("helper", "'helper' in module here", "'NUMBER' in module here")
IMPORTED = {"module settings_of_a_user", "module settings_of_a_user.inner"}
INNER = {"'inner' in module settings_of_a_user", "'deep' in module settings_of_a_user.inner"}
OF_RELU = {"'relu' in module torch", "'functional' in module torch", "'functional' in module torch.nn"}
OF_OVERRIDES = {
    "'overrides' in module torch",
    *("'handle_torch_function' in module torch.overrides", "'has_torch_function' in module torch.overrides"),
}
TORCH = {"'torch' in module here", "'ones' in module torch"}
SCALED = "hooking_with_a_closure.<locals>.scaled"
HOOK = {*HELPER, "'CELL' in module here", "'hook' in module here", *code_of("hook")}

READS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "nothing": (lambda: 1 + 1, set()),
    "a global": (lambda: NUMBER, {"'NUMBER' in module here"}),
    "a function": (lambda: helper(), HELPER),
    "a function that is named and not called": (lambda: helper, {"'helper' in module here"}),
    "defaults": (lambda: with_defaults(), code_of("with_defaults", "'with_defaults' in module here")),
    "a cell": (lambda: CELL(), code_of(READ, "'CELL' in module here", f"'value' in {READ}")),
    "a function inside": (lambda: (lambda: NUMBER)(), {"'NUMBER' in module here"}),
    "an attribute of a module": (
        lambda: settings.factor,
        {"'settings' in module here", "'factor' in module settings_of_a_user"},
    ),
    "an attribute of a module in a module": (
        lambda: settings.inner.deep,
        {"'settings' in module here", *INNER},
    ),
    "an import": (by_import, {*IMPORTED, "'deep' in module settings_of_a_user.inner"}),
    "an import of a module": (by_import_of_a_module, INNER | IMPORTED),
    "an import of what is beside": (
        in_package("from .inner import deep", "settings_of_a_user"),
        {*IMPORTED, "'deep' in module settings_of_a_user.inner"},
    ),
    "an import of what is above": (
        in_package("from ..inner import deep", "settings_of_a_user.inner"),
        {*IMPORTED, "'deep' in module settings_of_a_user.inner"},
    ),
    "an import of a name from the package": (
        in_package("from . import factor", "settings_of_a_user"),
        {"module settings_of_a_user", "'factor' in module settings_of_a_user"},
    ),
    "a module by its name": (
        lambda: sys.modules["settings_of_a_user"].factor,
        {"'sys' in module here", "module settings_of_a_user", "'factor' in module settings_of_a_user"},
    ),
    "a constant of a library": (lambda: math.pi, {"'math' in module here", "'pi' in module math"}),
    "a function of a library": (
        lambda: json.dumps([1]),
        {"'json' in module here", "'dumps' in module json"},
    ),
    "the environment": (
        lambda: os.environ.get("HOME"),
        {"'os' in module here", "'environ' in module os"},
    ),
    "the environment, by a function": (
        lambda: os.getenv("HOME"),
        {"'os' in module here", *(f"'{name}' in module os" for name in ("getenv", "environ", "environb"))},
    ),
    "an attribute of a class": (
        lambda: Base.unit,
        {"'Base' in module here", "Base.__mro__", "'unit' in class Base"},
    ),
    "an inherited method": (
        lambda: Heir().scaled(),
        {
            *("'Heir' in module here", "Heir.__mro__", "Base.__mro__"),
            *("'unit' in class Base", "'scaled' in class Base"),
            *code_of("Base.scaled"),
        },
    ),
    "a hook": (hooking, {*HOOK, *TORCH, *code_of(READ, f"'value' in {READ}")}),
    "a hook that is made inside": (
        hooking_with_a_closure,
        {
            *(HELPER | TORCH | code_of(SCALED, f"'inside' in {SCALED}")),
            *code_of(READ, f"'value' in {READ}", "'CELL' in module here"),
        },
    ),
    "a backward": (
        lambda: Doubled.apply(torch.ones(2)),
        {
            *("'Doubled' in module here", "Doubled.__mro__", "'forward' in class Doubled"),
            *(TORCH | HELPER | code_of("Doubled.forward")),
            *code_of("Doubled.backward") | code_of("Doubled.setup_context"),
        },
    ),
    "a hook by its keyword": (
        lambda: torch.ones(2, requires_grad=True).register_hook(hook=hook),
        {*HOOK, *TORCH, *code_of(READ, f"'value' in {READ}")},
    ),
    "a hook of a library": (
        lambda: torch.ones(2, requires_grad=True).register_hook(nn.functional.relu),
        {*TORCH, "'nn' in module here", "'relu' in module torch.nn.functional", *OF_RELU},
    ),
    "what only torch's layer calls": (
        lambda: under_torchs_layer(VECTOR),
        {
            *("'VECTOR' in module here", "'NUMBER' in module here", "'helping' in module here"),
            *("'torch' in module here", "'under_torchs_layer' in module here"),
            *(code_of("helping") | code_of("under_torchs_layer") | OF_OVERRIDES),
        },
    ),
    "what only an object in C calls": (
        lambda: COMPARING(1) < COMPARING(2),
        {"'COMPARING' in module here", "'NUMBER' in module here"},
    ),
    "a special method that is an object": (
        lambda: Special()(),
        {
            *("'Special' in module here", "'__call__' in class Special", "'NUMBER' in module here"),
            *("'__call__' in class Calling", *code_of("Calling.__call__")),
            *("Special.__mro__", "Calling.__mro__"),
        },
    ),
    "a module in a list": (
        lambda: MODULES[0].factor,
        {"'MODULES' in module here", "'factor' in module settings_of_a_user"},
    ),
    "a module as a default": (
        lambda: of_a_module(),
        code_of("of_a_module", "'of_a_module' in module here", "'factor' in module settings_of_a_user"),
    ),
    "a list that holds itself": (lambda: CYCLE, {"'CYCLE' in module here"}),
    "an attribute of an object": (
        lambda: MEMBER.unit,
        {"'MEMBER' in module here", "Heir.__mro__", "Base.__mro__", "'unit' in class Base"},
    ),
    "a separator of the system": (lambda: os.sep, {"'os' in module here", "'sep' in module os"}),
    "the word getenv": (
        lambda: ("getenv", settings.factor),
        {"'settings' in module here", "'factor' in module settings_of_a_user"},
    ),
    "an attribute of a library by a computed name": (
        lambda: computed(math, "".join(["p", "i"])),
        code_of("computed", "'computed' in module here", "'math' in module here"),
    ),
    "an attribute by a computed name": (
        after_another,
        {
            *("'settings' in module here", "'factor' in module settings_of_a_user", *INNER),
            *("'other' in module settings_of_a_user", *code_of("computed", "'computed' in module here")),
            *(
                f"'{name}' in module {module}"
                for name in ("__name__", "__package__")
                for module in ("settings_of_a_user", "settings_of_a_user.inner")
            ),
        },
    ),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_noted_and_nothing_else(name: str) -> None:
    function, expected = READS[name]
    assert labels(function) == expected


def test_globals_by_computed_names_are_all_that_say_something() -> None:
    found = labels(lambda: globals()["NUM" + "BER"])
    assert {"'NUMBER' in module here", "'TABLE' in module here", "'PAIR' in module here"} <= found
    assert not {label for label in found if "KEPT" in label or "VECTOR" in label}


READERS: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": Tensor.tolist,
    "numpy": Tensor.numpy,
    "equal": lambda x: torch.equal(x, x),
    "is_nonzero": lambda x: torch.is_nonzero(x[0]),
    "allclose": lambda x: torch.allclose(x, x),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "complex": lambda x: complex(x[0]),
    "index": lambda x: [1, 2][x[0].int() - 1],
    "array": numpy.asarray,
    "contains": lambda x: 1.0 in x,
    "format": lambda x: f"{x[0]:.1f}",
}


@pytest.mark.parametrize("name", READERS)
def test_the_values_of_a_tensor_are_noted_where_they_are_read(name: str) -> None:
    read = READERS[name]
    found = {place.label for place in recorded(lambda: read(VECTOR)).places}
    assert any(label.startswith("the values of a tensor of shape [") for label in found)
    assert "'VECTOR' in module " + HERE in found


@pytest.mark.parametrize("function", [lambda: VECTOR.sum(), lambda: VECTOR.shape, lambda: VECTOR + VECTOR])
def test_the_values_of_a_tensor_are_not_noted_where_they_are_computed_with(function: Any) -> None:
    assert not [label for label in labels(function) if "values" in label]


def test_of_what_is_read_each_tensor_of_one_element_counts_that_took_part() -> None:
    def function() -> Any:
        ONE * 2
        return torch.ones(2, device="meta").shape[0] + VECTOR[0].item()

    found = [place for place in recorded(function).places if "values" in place.label]
    assert sum(place.owner() is ONE for place in found) == 1


def test_what_has_changed_since_is_told_by_what_its_place_says(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(helper, (), ())
    with recorder:
        helper()
    reads, said = recorder.finish()
    assert reads.now() == said
    monkeypatch.setattr(sys.modules[HERE], "NUMBER", 2.0)
    changed = [label for (label, now), (_, before) in zip(reads.now(), said, strict=True) if now != before]
    assert changed == [f"'NUMBER' in module {HERE}"]


def test_names_that_appear_in_a_namespace_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> Any:
        return hasattr(settings, "late")

    recorder = Recorder(function, (), ())
    with recorder:
        function()
    reads, said = recorder.finish()
    monkeypatch.setattr(settings, "late", 1.0, raising=False)
    changed = [label for (label, now), (_, before) in zip(reads.now(), said, strict=True) if now != before]
    assert changed == ["the names in module settings_of_a_user"]


@pytest.mark.parametrize(
    ("function", "label"),
    [
        (lambda: next(STREAM, None), f"'STREAM' in module {HERE}"),
        (lambda: STREAMS["a"], f"'STREAMS' in module {HERE}['a'][0]"),
        (lambda: KEPT.stream, f"'KEPT' in module {HERE}.stream"),
        (lambda: KEPT.inside, f"'KEPT' in module {HERE}.inside[0]"),
        (lambda: PARTIAL(), f"'PARTIAL' in module {HERE}.args[0]"),
        (lambda: default(), "default.__defaults__[0]"),
        (lambda: IN_SET, f"'IN_SET' in module {HERE}[0]"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_where_it_was_read(function: Any, label: str) -> None:
    with pytest.raises(
        fs.TraceError, match=re.escape(f"The stage reads {label}, of type builtins.list_iter")
    ):
        recorded(function)


@pytest.mark.parametrize("function", [lambda: KEPT.number, lambda: KEPT, lambda: "stream"])
def test_what_is_beside_what_was_read_may_be_anything(function: Any) -> None:
    recorded(function)


def test_an_iterator_among_the_arguments_and_one_on_the_module_are_refused_by_name() -> None:
    module = nn.Linear(2, 2)
    module.stream = iter([1])  # type: ignore[assignment]
    recorded(lambda: module.in_features, modules=[module])
    with pytest.raises(fs.TraceError, match=re.escape("reads Linear.stream, of type builtins.list_iterator")):
        recorded(lambda: module.stream, modules=[module])
    with pytest.raises(fs.TraceError, match=re.escape("reads args[0], of type builtins.list_iterator")):
        recorded(lambda: None, arguments=[("args[0]", iter([1]))])


def test_modules_that_are_watched_elsewhere_are_known_and_only_their_classes_are_read() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    recorder = Recorder(module, [module], ())
    assert recorder.known == {id(module), id(module[0])}
    with recorder:
        module(torch.ones(2))
    reads, _ = recorder.finish()
    assert reads.known == recorder.known
    found = {place.label for place in reads.places}
    assert {"'forward' in class Linear", "'forward' in class Sequential", "Linear.forward.__code__"} <= found
    assert not {label for label in found if "in_features" in label or "weight" in label}


def test_what_modules_and_arguments_hold_is_looked_through_for_classes() -> None:
    module, given = nn.Linear(2, 2), Heir()
    module.holder = MEMBER  # type: ignore[assignment]
    assert "'unit' in class Base" in labels(lambda: module.holder.unit, modules=[module])
    assert "'unit' in class Base" in labels(lambda: given.unit, arguments=[("args[0]", given)])
    module._modules["holder"] = MEMBER  # type: ignore[assignment]
    del module.__dict__["holder"]
    assert "'unit' in class Base" not in labels(lambda: "unit", modules=[nn.Linear(2, 2)])


def test_of_libraries_classes_those_of_layers_are_read() -> None:
    plain = nn.Linear(2, 2)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for layer, classes in ((plain, {"Linear"}), (module, {"Linear", "ParametrizationList", "_WeightNorm"})):
        found = {place.label for place in recorded(lambda m=layer: m(VECTOR[:2]), modules=[layer]).places}  # type: ignore[misc]
        assert {f"'forward' in class {name}" for name in classes} <= found
        assert not {label for label in found if label.endswith(" in class Module")}


def test_the_users_profiler_is_told_of_what_runs_inside_torch() -> None:
    events, before = [], sys.getprofile()

    def profiler(frame: Any, event: str, argument: Any) -> None:
        events.append((frame.f_code.co_name, event))

    recorder = Recorder(helper, (), ())
    sys.setprofile(profiler)
    try:
        with recorder:
            nn.functional.softmin(VECTOR, 0)
    finally:
        sys.setprofile(before)
    assert events.count(("softmin", "call")) == 2  # once to ask the modes, then by the recorder


def test_tensors_of_a_trace_are_told_from_others_and_so_are_containers_of_them() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        assert _is_traced(x)
        assert all(map(is_made_in_trace, (x, [x], (x,), {"a": x}, [1, x])))
        assert not any(map(is_made_in_trace, (VECTOR, [VECTOR], "x", [[x]], None, ())))
        return x * params["w"], buffers

    fs.compile(apply, backend="aten", fullgraph=True)({"w": VECTOR}, {}, VECTOR)
    assert not _is_traced(VECTOR)
    assert _is_traced(VECTOR.to("meta"))
    with FakeTensorMode() as mode:
        assert _is_traced(mode.from_tensor(VECTOR))
    assert torch.func.functionalize(lambda x: x * (2 if _is_traced(x) else 3))(VECTOR)[0] == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, True),
        (helper, True),
        (math.sin, True),
        ([1, {"a": (2, {3}, frozenset({4}), deque([5]))}], True),
        ([helper, [math.sin]], True),
        (KEPT, False),
        ([1, [KEPT]], False),
        ({"a": KEPT}, False),
        (deque([KEPT]), False),
        ([[0] for _ in range(499)], True),
        ([[0] for _ in range(1500)], False),
    ],
)
def test_data_is_what_is_compared_at_little_cost(value: Any, expected: bool) -> None:
    assert _is_data(value) == expected


def test_draws_are_refused_and_clocks_are_warned_of_with_their_line() -> None:
    def draws() -> float:
        return random.random()

    line = f"{__file__}:{draws.__code__.co_firstlineno + 1}"
    with pytest.raises(fs.TraceError, match=re.escape(f"a random number (random's random, at {line})")):
        recorded(draws)
    with pytest.raises(fs.TraceError, match=re.escape("(random.uniform, at ")):
        recorded(lambda: random.uniform(0, 1))
    with Recorder(helper, (), ()) as recorder:
        sys.setprofile(None)
        random.random()
    with pytest.raises(fs.TraceError, match="at a place that is not known"):
        recorder.finish()
    with pytest.warns(UserWarning, match=re.escape("reads a clock (time.time, at ")):
        recorded(lambda: time.time())


def test_handlers_of_signals_and_the_collectors_callbacks_are_nobodys_reading() -> None:
    def handler(*_: Any) -> None:
        pass

    def callback(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGUSR2, handler)
    gc.callbacks.append(callback)
    try:
        assert {handler.__code__, callback.__code__} <= _run_by_the_interpreter()
    finally:
        gc.callbacks.remove(callback)
        signal.signal(signal.SIGUSR2, before)
    assert not {handler.__code__, callback.__code__} & _run_by_the_interpreter()


def test_the_profiler_and_the_collectors_callbacks_are_as_before_afterwards() -> None:
    callbacks, before, events = [*gc.callbacks], sys.getprofile(), []

    def profiler(frame: Any, event: str, argument: Any) -> None:
        events.append((frame.f_code.co_name, event))

    sys.setprofile(profiler)
    try:
        recorded(helper)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)
    assert gc.callbacks == callbacks
    assert ("helper", "call") in events
    assert ("helper", "return") in events


def test_functions_without_a_module_are_read_unless_they_are_dynamos_guards() -> None:
    given: tuple[dict[str, Any], ...] = ({}, {"G": 1}, {"G": 1, "__name__": "of_a_user"})
    for namespace, noted in zip(given, (True, False, True), strict=True):
        exec("FACTOR = 1.0\ndef run(): return FACTOR", namespace)
        del namespace["__builtins__"]
        found = {place.label for place in recorded(namespace["run"]).places}
        assert (f"'FACTOR' in module {namespace.get('__name__')}" in found) == noted


def test_a_trace_of_another_thread_is_not_disturbed_by_what_is_collected_there() -> None:
    recorder = Recorder(helper, (), ())
    with recorder:
        thread = threading.Thread(target=recorder._collect, args=("start", {}))
        thread.start()
        thread.join()
        helper()
    assert f"'NUMBER' in module {HERE}" in {place.label for place in recorder.finish()[0].places}


MEANWHILE: dict[str, tuple[Callable[[], Any], bool]] = {
    "nothing": (lambda: None, True),
    "what was read": (lambda: NUMBER, True),
    "what was not read yet": (lambda: (PAIR, settings.factor), True),
    "what was read is changed": (lambda: TABLE["a"].append(2.0), False),
    "a hook": (lambda: torch.ones(2, requires_grad=True).register_hook(math.sin), False),
}


@pytest.mark.parametrize("done", MEANWHILE)
def test_all_is_as_it_was_until_what_was_read_changes_or_torch_is_handed_a_callback(
    done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "a", [1.0])
    function, is_alike = MEANWHILE[done]

    def run() -> Any:
        return NUMBER, TABLE["a"][0]

    recorder = Recorder(run, (), ())
    with recorder:
        run()
        alike = watch(recorder)
        assert alike()
        function()
        assert alike() is is_alike


def test_what_is_noted_of_tensors_reaches_no_mode_of_the_stage() -> None:
    def run() -> Tensor:
        return VECTOR.sin()

    recorder = Recorder(run, (), ())
    with Seeing() as mode, recorder:
        run()
        assert mode.seen == [Tensor.sin]
    assert any("'VECTOR'" in place.label for place in recorder.finish()[0].places)


class Naming(nn.Module):
    """Names a global that can be changed, which its stage function remembers together with all globals."""

    def forward(self, x: Tensor) -> Tensor:
        return x * TABLE["a"][0]


def test_what_a_stage_function_remembers_of_its_module_is_not_searched() -> None:
    module = Naming()
    apply, params, buffers = fs.functionalize(module)
    fs.stage_vjp(apply, params, buffers, VECTOR)
    recorder = Recorder(apply, [module], ())
    with recorder:
        apply(params, buffers, VECTOR)
    recorder.finish()
    assert id(TABLE) in recorder._explored
    others = [vars(sys.modules[HERE]), PAIR, settings, inner, Base, json]
    assert not [each for each in others if id(each) in recorder._explored]
