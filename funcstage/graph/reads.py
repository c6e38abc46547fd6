"""What a stage reads that is neither handed to it nor an attribute of its module, and whether it changed.

`Recorder` watches a stage while it is traced: each Python function that runs tells by its byte code
(`code.py`) which globals, attributes of modules and classes, cells and defaults it can load. `Reads` is the
list of these places. Programs are good for as long as all of them say (`content.py`) what they said when
they were read first; a `Watch` tells that within microseconds.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter, is_, itemgetter
from threading import get_ident
from types import BuiltinMethodType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from funcstage.errors import TraceError
from funcstage.graph import _torch as tt
from funcstage.graph.code import is_library, loads_of, nested_codes
from funcstage.graph.content import content, is_one_of_its_kind, is_opaque, is_plain, parts_of
from funcstage.graph.generators import Asked


class Place(NamedTuple):
    """Where something was read.

    Attributes:
        label: what to call it.
        owner: a namespace, a weak reference to a function, or one to a tensor whose values were read.
        name: of the value in the namespace, or the number of a function's cell.
    """

    label: str
    owner: Any
    name: Any

    def is_gone(self) -> bool:
        """Tell whether the function or tensor does not exist any more."""
        return isinstance(self.owner, weakref.ref) and self.owner() is None

    def value(self) -> Any:
        """What is there now."""
        if not isinstance(self.owner, weakref.ref):
            return self.owner.get(self.name, ABSENT)
        owner = self.owner()
        if isinstance(owner, FunctionType):
            if isinstance(self.name, str):
                return getattr(owner, self.name)
            return _in_cell(owner, self.name)
        return owner if isinstance(owner, Tensor) else ABSENT


class Space(NamedTuple):
    """A namespace in which names were looked up.

    Attributes:
        label: what to call it.
        entries: it.
        names: those that are looked up, whether or not they are there.
        library: whether it is one of a library, of which only functions, classes and plain values are read.
    """

    label: str
    entries: Mapping[str, Any]
    names: set[str]
    library: bool


class Reads:
    """The places that a trace has read, in the order in which it came upon them.

    Attributes:
        places: they.
        spaces: namespaces of the user's, in which what is not there may appear.
        known: ids of objects that are watched elsewhere.
    """

    def __init__(
        self,
        places: dict[tuple[int, Any], Place],
        said: list[Hashable],
        spaces: Iterable[Space],
        known: set[int],
    ) -> None:
        """`said` is what the places said when they were read first."""
        self.places = [*places.values()]
        self.spaces = [space for space in spaces if not space.library]
        self.known = known
        self._keys = [*places]
        self._said = said

    def is_like(self, other: Reads) -> bool:
        """Tell whether the same places were read, in the same order."""
        return self._keys == other._keys and len(self.spaces) == len(other.spaces)

    def now(self) -> Said:
        """What all of it says at present."""
        found = [
            # A function that is gone is not called any more; what held it says so.
            (place.label, said if place.is_gone() else said_by(place, self.known))
            for place, said in zip(self.places, self._said, strict=True)
        ]
        present = [(f"the names in {s.label}", frozenset(s.names & s.entries.keys())) for s in self.spaces]
        return *found, *present


Said: TypeAlias = tuple[tuple[str, Hashable], ...]
"""What was read, with labels."""


def said_by(place: Place, known: set[int]) -> Hashable:
    """What a place says."""
    value = place.value()
    return _numbers(value) if place.name == _VALUES else content(value, set(known))


class Watch:
    """Tells whether places say what they say when it is made, several times faster than reading them would.

    What cannot change is compared by identity, all of a namespace at once; containers and objects by content.
    """

    def __init__(self, reads: Reads) -> None:
        self._known = reads.known
        named: dict[int, tuple[Any, list[str]]] = {}
        functions: dict[int, FunctionType] = {}
        self._cells: list[Any] = []
        self._tensors: list[Tensor] = []
        sized: dict[int, Any] = {id(space.entries): space.entries for space in reads.spaces}
        for place in reads.places:
            owner = place.owner() if isinstance(place.owner, weakref.ref) else place.owner
            if owner is None:
                continue  # it is not called any more, and what held it is watched
            elif isinstance(owner, Tensor):
                self._tensors.append(owner)
            elif isinstance(owner, FunctionType) and isinstance(place.name, str):
                functions[id(owner)] = owner
            elif isinstance(owner, FunctionType):
                self._cells.append((owner.__closure__ or ())[place.name])
            elif place.name in owner:
                named.setdefault(id(owner), (owner, []))[1].append(place.name)
            else:
                sized[id(owner)] = owner
        self._readers = [(owner, itemgetter(names[0], *names)) for owner, names in named.values()]
        self._functions = [*functions.values()]
        self._sized = [*sized.values()]
        self._values = self._read()
        self._bare = [v for v in self._values if isinstance(v, FunctionType) and not v.__dict__]
        bare = {*map(id, self._bare)}
        deep = {
            id(value): i
            for i, value in enumerate(self._values)
            if not (id(value) in bare or is_plain(value) or is_one_of_its_kind(value))
        }
        self._deep = [*deep.values()]
        self._said = self._say(self._values)

    def unchanged(self) -> bool:
        """Tell whether all of it is as it was."""
        try:
            values = self._read()
        except (KeyError, ValueError):  # a name or the value of a cell is gone
            return False
        before = self._values
        alike = len(values) == len(before) and all(map(is_, values, before))
        return alike and self._say(values) == self._said

    def _read(self) -> list[Any]:
        values = [value for owner, reader in self._readers for value in reader(owner)]
        values += [cell.cell_contents for cell in self._cells]
        for function in self._functions:
            values += _OF_FUNCTIONS(function)
        return values

    def _say(self, values: list[Any]) -> list[Hashable]:
        seen = set(self._known)
        return [
            *map(len, self._sized),
            any(map(_NAMESPACE, self._bare)),
            *[content(values[i], seen) for i in self._deep],
            *map(_version, self._tensors),
        ]


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
        self._globals: set[str] = set()
        self._reached: set[int] = set()
        self._any = False  # whether attributes are looked up by computed names
        self._kept: list[Any] = []
        self._given = [*arguments]
        self._parts = [part for module in modules for part in module.modules()]
        self.generators = Asked()
        self._draws: dict[str, str] = {}
        self._clocks: dict[str, str] = {}
        self._small: list[Tensor] = []
        self._before: Any = None
        self._thread = get_ident()
        self._collecting = False
        self._states: list[Any] = []
        parts = self._parts
        self.known = {*map(id, parts)}
        self._explored.update((id(part), part) for part in parts)
        self._explore(apply, "the stage function")
        for part in parts:
            self._reach_class(type(part))
            owner = type(part).__name__
            for name, value in vars(part).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self._explore(value, f"{owner}.{name}")
        for label, value in self._given:
            self._explore(value, label)

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._states = [generator.getstate() for generator in _generators()]
        self._others |= _run_by_the_interpreter()
        gc.callbacks.append(self._collect)
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: Any) -> None:
        before = self._before
        if before is None or callable(before):
            sys.setprofile(before)
        else:  # cProfile's, up to Python 3.11
            before.enable()
        gc.callbacks.remove(self._collect)
        for generator, state in zip(_generators(), self._states, strict=True):
            if generator.getstate() != state:  # by whatever way
                self._draws.setdefault(generator.name, "a place that is not known")
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # torch.cond lets Dynamo read this very method
            return func(*args, **kwargs)
        given = [arg for arg in (*args, *kwargs.values()) if callable(arg) and not isinstance(arg, Tensor)]
        for function in given:
            if isinstance(function, FunctionType):
                self._read(function)  # a hook, which runs with the backward
        own_code = isinstance(func, _WITHOUT_CALLBACKS) or is_library(getattr(func, "__module__", "") or "?")
        if given or not own_code:
            return func(*args, **kwargs)
        own = sys.getprofile()
        sys.setprofile(self._before if callable(self._before) else None)  # no code of the user runs inside
        try:
            result = func(*args, **kwargs)
        finally:
            sys.setprofile(own)
        real = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor) and not _is_traced(arg)]
        self._small += [tensor for tensor in real if tensor.numel() == 1]
        if getattr(func, "__name__", "") in _READERS_OF_VALUES:
            for tensor in {id(t): t for t in (*real, *self._small)}.values():
                label = f"the values of a tensor of shape {[*tensor.shape]}"
                self._note(Place(label, weakref.ref(tensor), _VALUES))
        return result

    def finish(self) -> tuple[Reads, Said]:
        """Return what was read, and what it said when it was read first.

        Raises:
            TraceError: if some of it cannot be watched.
        """
        self._find_functions()
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
                with torch._C.DisableTorchFunction():
                    self._enter(code, frame.f_globals)
            if code in self._others and frame.f_globals.get("__name__") in _DRAWING:
                self._drawn(frame)
        elif event == "c_call":
            self.generators.note(argument, frame)
            if frame.f_code in self._codes:
                self._called(argument, frame)
        if callable(self._before):
            self._before(frame, event, argument)

    def _drawn(self, frame: FrameType) -> None:
        """Note a call into the library of random numbers, except on generators that the stage has made."""
        caller, owner, name = frame.f_back, frame.f_locals.get("self"), frame.f_code.co_name
        if caller is None or caller.f_code not in self._codes or name.startswith("_"):
            return
        if owner is None or self._is_shared(owner):
            self._draws.setdefault(f"{frame.f_globals['__name__']}.{name}", _where(caller))

    def _is_shared(self, generator: Any) -> bool:
        numpy = sys.modules.get("numpy.random")
        shared = [random.random.__self__, *([] if numpy is None else [numpy.rand.__self__])]  # type: ignore[attr-defined]
        return id(generator) in {*map(id, shared), *self._explored}

    def _called(self, function: Any, frame: FrameType) -> None:
        """Note a call of a function in C that answers differently every time."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(owner, ModuleType):
            if owner.__name__ == "time" and name not in ("sleep", "strftime", "mktime"):
                self._clocks.setdefault(f"time.{name}", _where(frame))
            elif (owner.__name__, name) == ("posix", "urandom"):
                self._draws.setdefault("os.urandom", _where(frame))
        elif isinstance(owner, type):
            if owner.__module__ == "datetime" and name in ("now", "utcnow", "today"):
                self._clocks.setdefault(f"{owner.__name__}.{name}", _where(frame))
        elif _is_generator(owner) and self._is_shared(owner):
            self._draws.setdefault(f"{type(owner).__module__.partition('.')[0]}'s {name}", _where(frame))

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
        space = self._spaces.setdefault(id(namespace), Space(f"module {module}", namespace, set(), False))
        self._globals |= loads.globals
        names = loads.globals | ({*namespace} if loads.any_global else set())
        self._look_up(space, names - space.names)
        for name in loads.imports:
            self._import(name, namespace.get("__package__") or "")
        for function in self._functions.get(code, ()):
            self._run(function)

    def _read(self, function: FunctionType) -> None:
        """Note what a function can read that runs when nobody looks, and what those can that it may call."""
        if function.__code__ in self._codes or is_library(function.__globals__.get("__name__")):
            return
        self._enter(function.__code__, function.__globals__)
        self._explore(function, function.__qualname__)
        for name in loads_of(function.__code__).globals & function.__globals__.keys():
            if isinstance(function.__globals__[name], FunctionType):
                self._read(function.__globals__[name])
        for i in range(len(function.__closure__ or ())):
            if isinstance(_in_cell(function, i), FunctionType):
                self._read(_in_cell(function, i))

    def _run(self, function: FunctionType) -> None:
        """Note the cells and defaults of a function that runs."""
        label, reference = function.__qualname__, weakref.ref(function)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._note(Place(f"{label}.{name}", reference, name))
        for i, name in enumerate(function.__code__.co_freevars):
            self._note(Place(f"{name!r} in {label}", reference, i))

    def _import(self, name: str, package: str) -> None:
        above = package.split(".") if package else []
        for n in range(len(above) + 1):
            full = ".".join((*above[:n], name)).rstrip(".")
            for i in range(full.count(".") + 1):
                module = sys.modules.get(full.rsplit(".", i)[0])
                if module is not None:
                    self._reach_module(module)

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
            if not (named or _is_data(value) or value is os.environ):
                continue  # any object, where a namespace is searched by computed names
            space.names.add(name)
            if isinstance(value, ModuleType):
                self._reach_module(value)
            function = isinstance(value, FunctionType)
            of_interest = function or is_plain(value) or is_one_of_its_kind(value) or value is os.environ
            if value is not ABSENT and (of_interest or not space.library):
                self._note(Place(f"{name!r} in {space.label}", space.entries, name))

    def _reach_module(self, module: ModuleType) -> None:
        if id(module) in self._explored:
            return
        self._explored[id(module)] = module
        library = is_library(module.__name__)
        self._reach(Space(f"module {module.__name__}", vars(module), set(), library))
        if "getenv" in self._names and module is os:
            self._look_up(self._spaces[id(vars(os))], ["environ"])

    def _reach_class(self, kind: type) -> None:
        for base in (*type.mro(kind), *type.mro(type(kind))):
            if id(base) in self._explored:
                continue
            self._explored[id(base)] = base
            library = is_library(base.__module__)
            if library and not (issubclass(base, nn.Module) and base is not nn.Module):
                continue
            entries = vars(base)
            for name, value in [*entries.items()]:
                if hasattr(value, "__get__"):
                    self._explore(value, f"{base.__qualname__}.{name}")
            self._reach(Space(f"class {base.__qualname__}", entries, set(), library))
            special = [name for name in entries if name[:2] == name[-2:] == "__" and callable(entries[name])]
            self._look_up(self._spaces[id(entries)], special)
            if issubclass(base, Function) and isinstance(entries.get("backward"), staticmethod):
                backward = entries["backward"].__func__  # which may run in a thread of its own
                if isinstance(backward, FunctionType):
                    self._read(backward)

    def _note(self, place: Place) -> None:
        owner = place.owner() if isinstance(place.owner, weakref.ref) else place.owner
        key = id(owner), place.name
        if key in self._places:
            return
        self._places[key] = place
        self._kept.append(owner)  # the ids of what is gone may be given anew
        self._said[key] = said_by(place, self.known)
        if place.name != _VALUES:
            self._explore(place.value(), place.label)

    def _explore(self, value: Any, label: str) -> None:
        """Look for functions and classes in whatever is within reach."""
        pending = [(value, label)]
        while pending:
            value, label = pending.pop()
            if is_plain(value) or id(value) in self._explored or isinstance(value, ModuleType):
                continue
            if isinstance(value, type):
                self._reach_class(value)
                continue
            self._explored[id(value)] = value
            if isinstance(value, FunctionType):
                self._functions.setdefault(value.__code__, []).append(value)
                if value.__code__ in self._codes:
                    self._run(value)
                if not is_library(value.__globals__.get("__name__")):
                    cells = range(len(value.__closure__ or ()))
                    pending += [(_in_cell(value, i), f"a cell of {label}") for i in cells]
            else:
                self._reach_class(type(value))
            pending += [(part, f"{label}.{name}") for name, part in parts_of(value)]

    def _find_functions(self) -> None:
        """Look for the functions that ran and were not within reach, in all there is."""
        missing = [code for code in self._codes if code not in self._functions and code not in self._nested]
        if missing:
            for function in gc.get_referrers(*missing):
                if isinstance(function, FunctionType):
                    self._explore(function, function.__qualname__)

    def _refuse(self) -> None:
        self.generators.refuse()
        for what, where in self._draws.items():
            raise TraceError(
                f"The stage draws a random number ({what}, at {where}), which a trace keeps for all calls. "
                "Draw with torch.rand, or outside and pass the number as an argument."
            )
        for label, value in self._unwatchable():
            raise TraceError(
                f"The stage reads {label}, of type {type(value).__module__}.{type(value).__qualname__}, "
                "whose state cannot be compared, so that a later change of it would go unnoticed. Pass "
                "what is read of it as an argument."
            )
        for what, where in self._clocks.items():
            warnings.warn(
                f"The stage reads a clock ({what}, at {where}), which stands still in its compiled programs.",
                stacklevel=2,
            )

    def _unwatchable(self) -> Iterator[tuple[str, Any]]:
        """What was read and cannot be looked at; of attributes, those whose names were loaded."""
        loaded = self._names | self._globals
        pending = [
            (place.value(), place.label)
            for place in self._places.values()
            if place.name != _VALUES and (isinstance(place.owner, weakref.ref) or place.name in loaded)
        ]
        pending += self._given
        pending += [
            (value, f"{type(part).__name__}.{name}")
            for part in self._parts
            for name, value in vars(part).items()
            if name in self._names
        ]
        seen = set(self.known)
        while pending:
            value, label = pending.pop()
            if is_plain(value) or id(value) in seen or isinstance(value, (type, ModuleType)):
                continue
            seen.add(id(value))
            if is_opaque(value):
                yield label, value
            is_container = isinstance(value, _CONTAINERS)
            for name, part in parts_of(value):
                if is_container or not isinstance(name, str) or name in self._names or name[:2] == "__":
                    pending.append((part, f"{label}[{name!r}]" if is_container else f"{label}.{name}"))


def modules_behind(apply: Any) -> list[nn.Module]:
    """The modules that a stage function can call: its own, those in its cells and globals, by any way."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending: list[Any] = [apply]
    while pending:
        value = pending.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, FunctionType):
            pending += vars(value).values()
            if not is_library(value.__globals__.get("__name__")):
                pending += [_in_cell(value, i) for i in range(len(value.__closure__ or ()))]
                loaded = loads_of(value.__code__).globals
                pending += [value.__globals__[name] for name in loaded & value.__globals__.keys()]
        elif isinstance(value, (partial, MethodType, list, tuple, dict)):
            pending += [part for _, part in parts_of(value)]
        elif callable(value) and not isinstance(value, type):
            pending.append(getattr(value, "module", None))
            pending += [part for _, part in parts_of(value)]
    within = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in within]


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a name that is not there."""


def _in_cell(function: FunctionType, i: int) -> Any:
    cells = function.__closure__ or ()
    try:
        return cells[i].cell_contents
    except (IndexError, ValueError):
        return ABSENT


def _is_traced(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of the trace, or of the memory that those have."""
    traced = isinstance(tensor, (tt.FunctionalTensor, tt.FakeTensor))
    return traced or torch._is_functional_tensor(tensor) or tensor.is_meta


def _numbers(tensor: Any) -> Hashable:
    """The values of a tensor, exactly."""
    if not isinstance(tensor, Tensor):
        return content(tensor, set())
    with torch._C.DisableTorchFunction(), tt.without_modes():
        values = tensor.detach().cpu()
        said = values.contiguous().view(torch.uint8).numpy() if values.dim() else values.item()
        return tuple(tensor.shape), content(said, set())


def _version(tensor: Tensor) -> Hashable:
    """The values of a small tensor, which is faster than looking whether they were written; else that."""
    if tensor.is_inference() or (tensor.is_cpu and tensor.numel() <= _FEW):
        return _numbers(tensor)
    return tensor._version, tensor.data_ptr()


def _where(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


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


class _Generator(NamedTuple):
    """One of the generators of random numbers that all of a process shares."""

    name: str
    getstate: Callable[[], Any]
    setstate: Callable[[Any], Any]


def _generators() -> list[_Generator]:
    found = [_Generator("random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        found.append(_Generator("numpy.random", lambda: _hashable(numpy.get_state()), numpy.set_state))
    return found


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the generators as they were: a stage that draws from them is refused."""
    states = [(generator, generator.getstate()) for generator in _generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.setstate(state)


def _hashable(state: Any) -> tuple[Any, ...]:
    return tuple(tuple(part.tolist()) if hasattr(part, "tolist") else part for part in state)


def _is_generator(value: Any) -> bool:
    return isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random")


_VALUES = ""
"""Stands for the values of a tensor among the names of places."""

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_FEW = 4096
_DRAWING = ("random", "secrets", "uuid")
_READERS_OF_VALUES = frozenset(
    {"item", "tolist", "numpy", "equal", "is_nonzero", "allclose"}
    | {f"__{name}__" for name in ("bool", "int", "float", "complex", "index", "array", "contains", "format")}
)
_WITHOUT_CALLBACKS = (
    BuiltinMethodType,
    type(Tensor.add),
    type(Tensor.__add__),
    type(Tensor.shape.__get__),  # type: ignore[attr-defined]
)
_OF_FUNCTIONS = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_NAMESPACE = attrgetter("__dict__")
_OF_NO_CONSEQUENCE = frozenset(
    {"__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__warningregistry__"}
    | {"__spec__", "__loader__", "__cached__"}  # of the import, which holds all of pytest's state, say
)
