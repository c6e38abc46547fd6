"""Finds out what a stage reads while it is traced: each Python function that runs tells by its byte code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from types import BuiltinMethodType, CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from funcstage._torch import tracing as tt
from funcstage._torch.modules import hooks_of, hooks_of_backwards
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import is_functionalized
from funcstage.engines.graph.classes import refusal_in, refuse
from funcstage.engines.graph.draws import OF_FILES, Noted
from funcstage.engines.graph.generators import Asked
from funcstage.engines.graph.left_behind import LeftBehind, is_made_in_trace
from funcstage.engines.graph.process import Process
from funcstage.engines.graph.reads import ABSENT, VALUES, Place, Reads, Said, Space, Watch, reach, said_by
from funcstage.errors import TraceError
from funcstage.state.ambient import RandomState, of_process
from funcstage.state.cells import closed_over, function_of
from funcstage.state.code import is_library, loads_of, may_be_imported, modules_named_in, nested_codes
from funcstage.state.content import is_one_of_its_kind, is_opaque, is_plain, parts_of
from funcstage.state.profilers import resume


class Recorder(TorchFunctionMode):
    """Finds out what a stage reads while it is traced.

    As a context it notes every function that runs in this thread. Other profilers are told of everything
    as before, those that are written in C excepted, which pause.

    Args:
        apply: the stage function.
        modules: those behind it, whose attributes are watched elsewhere.
        arguments: what is handed to it and is no tensor, under its names; likewise.
    """

    def __init__(
        self, apply: Callable[..., Any], modules: Iterable[nn.Module], arguments: Iterable[tuple[str, Any]]
    ) -> None:
        super().__init__()
        self._places: dict[tuple[int, Any], Place] = {}
        self._said: dict[tuple[int, Any], Hashable] = {}
        self._spaces: dict[int, Space] = {}
        self._names: set[str] = {"forward", "__call__"}
        self._codes: set[CodeType] = set()
        self._others: set[CodeType] = set()  # of libraries
        self._nested: set[CodeType] = set()
        self._functions: dict[CodeType, list[FunctionType]] = {}
        self._explored: dict[int, Any] = {}
        self._heard_of, self._of_stage = dict[int, FunctionType](), set[int]()  # which the trace has made
        self._globals, self._reached = set[str](), set[int]()
        self._any = False  # whether attributes are looked up by computed names
        self._kept: list[Any] = []
        self._given = [*arguments]
        self._parts = [part for module in modules for part in module.modules()]
        self.generators, self.left_behind = Asked(), LeftBehind()
        self._noted, self._process = Noted(self._explored), Process()
        self._small: list[Tensor] = []
        self._before: Any = None
        self._thread = get_ident()
        self._collecting, self._callbacks = False, 0  # so many were handed to torch
        self._refusal: TraceError | None = None
        self._random, parts, self.known = RandomState(()), self._parts, {*map(id, self._parts)}
        self._explored.update((id(part), part) for part in parts)
        self._explore(apply, "the stage function")
        for part in parts:
            self._reach_class(type(part))
            for name, value in vars(part).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self._explore(value, f"{type(part).__name__}.{name}")
        for place in _held_by_hooks(parts):
            self._note(place)
        for hook in hooks_of_backwards(parts):
            self._read(hook)
        for label, value in self._given:
            self._explore(value, label)

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._random = RandomState(of_process())
        self.generators.begin()
        self._others |= _run_by_the_interpreter()
        gc.callbacks.append(self._collect)
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: Any) -> None:
        resume(self._before)
        gc.callbacks.remove(self._collect)
        for name in self._random.moved():  # by whatever way
            self._noted.draws.setdefault(name, "a place that is not known, maybe in another thread")
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # torch.cond lets Dynamo read this very method
            return func(*args, **kwargs)
        given = [arg for arg in (*args, *kwargs.values()) if callable(arg) and not isinstance(arg, Tensor)]
        self._callbacks += len(given)
        for function in given:
            self._read(function)  # a hook, which runs with the backward
        own_code = isinstance(func, _WITHOUT_CALLBACKS) or is_library(getattr(func, "__module__", None))
        if given or not own_code:
            return func(*args, **kwargs)
        own = sys.getprofile()
        sys.setprofile(self._before if callable(self._before) else None)  # no code of the user runs inside
        try:
            result = func(*args, **kwargs)
        finally:
            sys.setprofile(own)
        with without_torch_function():
            real = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not _is_traced(a)]
            self._small += [tensor for tensor in real if tensor.numel() == 1]
            read = [*real, *self._small] if getattr(func, "__name__", "") in _READERS_OF_VALUES else []
            for t in {id(t): t for t in read}.values():
                self._note(Place(f"the values of a tensor of shape {[*t.shape]}", weakref.ref(t), VALUES))
        return result

    def finish(self) -> tuple[Reads, Said]:
        """Return what was read, and what it said when it was read first.

        Raises:
            TraceError: if some of it cannot be watched.
        """
        self._find_functions()
        self._look_at_tensors()
        for place in [*self._process.places(self._names, self._explored.values())]:
            self._note(place)
        for space in [*self._spaces.values()]:
            self._look_up(space, space.names & space.entries.keys())  # some were not there before
        _forget_late_cells(self._places, self._of_stage)
        self._refuse()
        said = [self._said[key] for key in self._places]
        reads = Reads(self._places, said, self._spaces.values(), self.known)
        labelled = [(place.label, each) for place, each in zip(reads.places, said, strict=True)]
        return reads, (*labelled, *reads.now()[len(said) :])

    def _collect(self, phase: str, _: Any) -> None:
        """Leave out what runs while garbage is collected: finalizers of anybody's objects."""
        if get_ident() == self._thread:
            self._collecting = phase == "start"

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._collecting:
            pass
        elif event == "call":
            code = frame.f_code
            if code not in self._codes and code not in self._others:
                with without_torch_function():
                    self._enter(code, frame.f_globals)
            self._noted.draw(frame, self._codes)
        elif event == "return" and frame.f_code in self._codes:
            self._refusal = self._refusal or refusal_in(frame)
        elif event == "c_call":
            self.generators.note(argument, frame)
            if argument in OF_FILES or frame.f_code in self._codes:
                self._noted.call(argument, frame, self._codes)
        self._process.hear(event, argument, frame, self._codes)
        if callable(self._before):
            self._before(frame, event, argument)

    def _enter(self, code: CodeType, namespace: dict[str, Any]) -> None:
        """Note what a function that runs can read."""
        module = namespace.get("__name__")
        # Dynamo's guards, which run while `torch.cond` is recorded, are code without a module.
        if is_library(module) or (module is None and "G" in namespace):
            self._others.add(code)
            return
        self._codes.add(code)
        self._nested |= nested_codes(code)
        loads = loads_of(code)
        new = {*loads.attributes} - self._names
        self._names |= new
        for space in self._attributes():
            self._look_up(space, new)
        if loads.any_attribute and not self._any:
            self._any = True
            for space in self._attributes():
                self._look_up(space, self._wanted(space))
        self.left_behind.reach_named(namespace)
        space = self._spaces.setdefault(id(namespace), Space(f"module {module}", namespace, set(), False))
        self._globals |= loads.globals
        names = loads.globals | ({*namespace} if loads.any_global else set())
        self._look_up(space, names - space.names)
        for name, package in modules_named_in(code, namespace.get("__package__")):
            self._import(name, package)
        for function in self._functions.get(code, ()):
            self._run(function)

    def _read(self, callback: Any) -> None:
        """Note what a callback can read that runs when nobody looks, and those that it may call."""
        function = function_of(callback)
        if function is None or id(function) in self._heard_of:
            return
        self._heard_of[id(function)] = function
        if id(function) not in self._explored and function.__code__ in self._nested:
            self._of_stage.add(id(function))
        if not _is_of_library(function):
            self._explore(callback, function.__qualname__)
            self._enter(function.__code__, function.__globals__)
        for called in _may_be_called_by(function):
            self._read(called)

    def _run(self, function: FunctionType) -> None:
        """Note the cells and defaults of a function that runs."""
        label, reference = function.__qualname__, weakref.ref(function)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._note(Place(f"{label}.{name}", reference, name))
        for i, name in enumerate(function.__code__.co_freevars):
            self._note(Place(f"{name!r} in {label}", reference, i))

    def _import(self, name: str, package: str | None) -> None:
        for full in may_be_imported(name, package):
            if (module := sys.modules.get(full)) is not None:
                self._reach_module(module)
            if (module is not None or (package is None and full == name)) and not is_library(full):
                self._note(Place(f"module {full}", sys.modules, full))

    def _attributes(self) -> list[Space]:
        """The namespaces of modules and classes within reach, whose entries are looked up as attributes."""
        return [space for key, space in self._spaces.items() if key in self._reached]

    def _reach(self, space: Space) -> None:
        """Look up in a namespace all attributes that are loaded anywhere."""
        space = self._spaces.setdefault(id(space.entries), space)
        self._reached.add(id(space.entries))
        self._look_up(space, self._wanted(space))

    def _wanted(self, space: Space) -> set[str]:
        """Names of attributes that are looked up in a namespace: all there are, if names are computed."""
        return self._names | {*space.entries} if self._any and not space.library else self._names

    def _look_up(self, space: Space, names: Iterable[str]) -> None:
        for name in [*names]:
            if name in _OF_NO_CONSEQUENCE:
                continue
            value = space.entries.get(name, ABSENT)
            named = name in self._names or name in self._globals or name[:2] == "__"
            if not (named or _is_data(value) or isinstance(value, _ENVIRONMENT)):
                continue  # any object, where a namespace is searched by computed names
            space.names.add(name)
            if isinstance(value, ModuleType):
                self._reach_module(value)
            fixed = is_plain(value) or is_one_of_its_kind(value)
            of_interest = fixed or isinstance(value, (FunctionType, _ENVIRONMENT))
            if value is not ABSENT and (of_interest or not space.library):
                self._note(Place(f"{name!r} in {space.label}", space.entries, name))

    def _reach_module(self, module: ModuleType) -> None:
        if id(module) in self._explored:
            return
        self._explored[id(module)] = module
        library = is_library(module.__name__)
        self._reach(Space(f"module {module.__name__}", vars(module), set(), library))
        if module is os and not self._names.isdisjoint(("getenv", "getenvb")):
            self._look_up(self._spaces[id(vars(os))], ["environ", "environb"])

    def _reach_class(self, kind: type) -> None:
        for base in (*type.mro(kind), *type.mro(type(kind))):
            if id(base) in self._explored:
                continue
            self._explored[id(base)] = base
            library = is_library(base.__module__)
            if not library:
                self.left_behind.reach_named(base)
                self._note(Place(f"{base.__qualname__}.__mro__", weakref.ref(base), "__mro__"))
            elif base is nn.Module or not issubclass(base, nn.Module):
                continue
            entries = vars(base)
            for name, value in [*entries.items()]:
                if hasattr(value, "__get__"):
                    self._explore(value, f"{base.__qualname__}.{name}")
            self._reach(Space(f"class {base.__qualname__}", entries, set(), library))
            special = [name for name in entries if name[:2] == name[-2:] == "__" and callable(entries[name])]
            self._look_up(self._spaces[id(entries)], special)
            if issubclass(base, Function) and isinstance(entries.get("backward"), staticmethod):
                self._read(entries["backward"].__func__)  # which may run in a thread of its own

    def _note(self, place: Place) -> None:
        owner = place.owner() if isinstance(place.owner, weakref.ref) else place.owner
        key = id(owner), place.name
        if key in self._places:
            return
        if isinstance(owner, FunctionType) and is_made_in_trace(place.value()):
            return  # so is the function, a hook for instance, and the programs have what it does
        self._places[key] = place
        self._kept.append(owner)  # the ids of what is gone may be given anew
        self._said[key] = said_by(place, self.known)
        if place.name != VALUES:
            self._explore(place.value(), place.label)

    def _explore(self, value: Any, label: str) -> None:
        """Look for functions and classes in whatever is within reach."""
        pending = [(value, label)]
        while pending:
            value, label = pending.pop()
            if isinstance(value, ModuleType):
                self._reach_module(value)
            if is_plain(value) or id(value) in self._explored:
                continue
            if isinstance(value, type):
                self._reach_class(value)
                continue
            self._explored[id(value)] = value
            self.left_behind.reach(value)
            if type(value) is torch.Generator:
                self.generators.reach(value)
            if isinstance(value, FunctionType):
                self._functions.setdefault(value.__code__, []).append(value)
                if value.__code__ in self._codes:
                    self._run(value)
                if not is_library(value.__globals__.get("__name__")):
                    pending += [(inside, f"a cell of {label}") for inside in closed_over(value)]
            else:
                self._reach_class(type(value))
            pending += [(part, f"{label}.{name}") for name, part in parts_of(value)]

    def _look_at_tensors(self) -> None:
        """Note attributes of the modules' parameters and buffers, under all names that were loaded."""
        for space in _attributes_of_tensors(self._parts):
            if self._spaces.setdefault(id(space.entries), space) is space:
                self._look_up(space, self._wanted(space) & space.entries.keys())
                space.names.update(self._names)

    def _find_functions(self) -> None:
        """Look for the functions that ran and were not within reach, in all there is."""
        missing = [code for code in self._codes if code not in self._functions and code not in self._nested]
        for function in gc.get_referrers(*missing) if missing else ():
            if isinstance(function, FunctionType):
                self._explore(function, function.__qualname__)

    def _refuse(self) -> None:
        self.generators.refuse()
        self._noted.refuse()
        refuse(self._refusal)
        for label, value in self._unwatchable():
            raise TraceError(
                f"The stage reads {label}, of type {type(value).__module__}.{type(value).__qualname__}, "
                "whose state cannot be compared: a later change would go unnoticed. Pass what the stage "
                "reads of it as an argument."
            )
        self._noted.warn()

    def _unwatchable(self) -> Iterator[tuple[str, Any]]:
        """What was read and cannot be looked at; of attributes, those whose names were loaded."""
        loaded = self._names | self._globals
        pending = [
            (place.value(), place.label)
            for place in self._places.values()
            if place.name != VALUES and (isinstance(place.owner, weakref.ref) or place.name in loaded)
        ]
        pending += [(value, label) for label, value in self._given]
        pending += [
            (value, f"{type(part).__name__}.{name}")
            for part in self._parts
            for name, value in vars(part).items()
            if name in self._names
        ]
        seen = set(self.known)
        while pending:
            value, label = pending.pop()
            if is_plain(value) or id(value) in seen:
                continue
            seen.add(id(value))
            if is_opaque(value):
                yield label, value
            is_container, entered = isinstance(value, _CONTAINERS), isinstance(value, _NAMELESS)
            for name, part in parts_of(value):
                if entered or not isinstance(name, str) or name in self._names or name[:2] == "__":
                    pending.append((part, f"{label}[{name!r}]" if is_container else f"{label}.{name}"))


def _forget_late_cells(places: dict[tuple[int, Any], Place], functions: Container[int]) -> None:
    """Forget cells, of functions that the trace has made, that it has put its tensors into later."""
    for key in [key for key in places if key[0] in functions and is_made_in_trace(places[key].value())]:
        del places[key]


def may_read(recorder: Recorder, name: str) -> bool:
    """Tell whether what ran may have read an attribute of this name."""
    return recorder._any or name in recorder._names


def watch(recorder: Recorder) -> Callable[[], bool]:
    """A check whether all that was read says what it said, and torch was handed no more callbacks."""
    recorder._find_functions()
    said, callbacks, before = recorder._said, recorder._callbacks, {**recorder._places}
    unchanged = Watch(Reads(before, [*said.values()], recorder._spaces.values(), recorder.known)).unchanged
    reached = reach(before.values(), recorder.known)

    def alike() -> bool:
        new = [(place, said[key]) for key, place in recorder._places.items() if key not in before]
        same = all(said_by(place, recorder.known) == each for place, each in new)
        return same and not reached and recorder._callbacks == callbacks and unchanged()

    return alike


def _held_by_hooks(parts: list[nn.Module]) -> Iterator[Place]:
    """Where hooks of modules are that are no plain functions, and hold what they read: methods, partials."""
    for part in parts:
        for table in hooks_of(part):
            for key, hook in table.items():
                function = function_of(hook)
                if function is not None and function is not hook and not _is_of_library(function):
                    yield Place(f"a hook of {type(part).__name__} ({function.__qualname__})", table, key)


def _may_be_called_by(function: FunctionType) -> list[Any]:
    """The callbacks that a function closes over, and those among its globals that it names."""
    named = set() if _is_of_library(function) else loads_of(function.__code__).globals
    values = [*closed_over(function), *map(function.__globals__.get, named)]
    return [value for value in values if isinstance(value, (FunctionType, MethodType, partial))]


def _is_of_library(function: FunctionType) -> bool:
    return is_library(function.__globals__.get("__name__"))


def _attributes_of_tensors(parts: Iterable[nn.Module]) -> Iterator[Space]:
    for part in parts:
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield Space(f"the attributes of {type(part).__name__}.{name}", vars(tensor), set(), False)


def _is_traced(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of the trace, or of the memory that those have."""
    traced = isinstance(tensor, (tt.FunctionalTensor, tt.FakeTensor))
    return traced or is_functionalized(tensor) or tensor.is_meta


def _run_by_the_interpreter() -> set[CodeType]:
    """Functions that run between the stage's at any time: the collector's callbacks, handlers of signals."""
    handlers = map(signal.getsignal, signal.valid_signals())
    return {f.__code__ for f in (*gc.callbacks, *handlers) if isinstance(f, FunctionType)}


def _is_data(value: Any, most: int = 1000) -> bool:
    """Tell whether a value is plain, compared by identity, or a container of not too many such."""
    pending = [value]
    while pending:
        each = pending.pop()
        most -= 1
        if not (isinstance(each, FunctionType) or is_plain(each) or is_one_of_its_kind(each)):
            if type(each) not in _CONTAINERS or most < 0:
                return False
            pending += [part for _, part in parts_of(each)]
    return True


_CONTAINERS = (list, tuple, dict, set, frozenset, deque)

_NAMELESS = (*_CONTAINERS, partial, weakref.ref, ContextVar, CellType)
"""Types of what is entered without naming what is in it."""

_READERS_OF_VALUES = frozenset(
    {"item", "tolist", "numpy", "equal", "is_nonzero", "allclose"}
    | {f"__{name}__" for name in ("bool", "int", "float", "complex", "index", "array", "contains", "format")}
)

_WITHOUT_CALLBACKS = (
    *(BuiltinMethodType, type(Tensor.add), type(Tensor.__add__)),
    type(Tensor.shape.__get__),  # type: ignore[attr-defined]
)

_ENVIRONMENT = type(os.environ)
_OF_NO_CONSEQUENCE = frozenset(
    {"__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__warningregistry__"}
    | {"__spec__", "__loader__", "__cached__"}  # of the import, which holds all of pytest's state, say
    | {"__dataclass_fields__", "__dataclass_params__"}  # written with the class, and slow to compare
)
