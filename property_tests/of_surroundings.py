"""Situations outside of a module: tensors that it captures and that are written, and state that is shared."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import multiprocessing
import os
import tempfile
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from situation import Around, Situation, World, map_differentiable
from torch import Tensor, nn

TENSOR = torch.ones(())
TENSORS: dict[str, list[Tensor]] = {"all": [TENSOR]}


class _Holder:
    tensor = TENSOR


def _by_default(*, tensor: Any = (TENSOR,)) -> Tensor:
    found: Tensor = tensor[0]
    return found


class _Capturing(Around):
    """Computes with a tensor that is no argument, parameter or buffer."""

    of_class = TENSOR

    def __init__(self, inner: nn.Module, where: str, saved: bool) -> None:
        super().__init__(inner)
        self.where, self.saved = where, saved
        tensor = torch.ones((), dtype=torch.float64)
        self.plain, self.listed, self.table = tensor, [tensor], {"deep": [tensor]}
        self.object = types.SimpleNamespace(inner=types.SimpleNamespace(tensor=tensor))
        self.cell = lambda: tensor

    def tensor(self) -> Tensor:
        return CAPTURED[self.where](self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        captured = self.tensor()
        output = super().forward(*args, **kwargs)

        return map_differentiable(lambda t: t * captured if self.saved else t + captured, output)


CAPTURED: dict[str, Callable[[_Capturing], Tensor]] = {
    "a global": lambda m: TENSOR,
    "in a global": lambda m: TENSORS["all"][0],
    "a global's attribute": lambda m: _Holder.tensor,
    "a class attribute": lambda m: m.of_class,
    "a default argument": lambda m: _by_default(),
    "a cell": lambda m: m.cell(),
    "an attribute": lambda m: m.plain,
    "a list": lambda m: m.listed[0],
    "a nested list": lambda m: m.table["deep"][0],
    "an object": lambda m: m.object.inner.tensor,
    "a view of an attribute": lambda m: m.plain.view(1)[0],
}
"""Where a module may find a tensor that it captured."""


@dataclass(frozen=True)
class Captured(Situation):
    """A captured tensor, which the caller may write in place after a pass."""

    where: str
    after_verb: str = ""
    saved: bool = True
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        TENSOR.fill_(1)
        return _Capturing(module, self.where, self.saved)

    def after(self, verb: str, world: World) -> None:
        if verb == self.after_verb:
            capturing = next(m for m in world.module.modules() if isinstance(m, _Capturing))
            with torch.no_grad():
                capturing.tensor().fill_(3)


SETTINGS: dict[str, Any] = {"deep": {"scale": [1.0]}, "plain": 1.0}
LEVEL = contextvars.ContextVar("LEVEL", default=1.0)
SPACE = types.SimpleNamespace(scale=1.0, inner=types.SimpleNamespace(scale=1.0))
COUNTS: defaultdict[str, float] = defaultdict(lambda: 1.0)
ROWS = ((1.0,),)
LOOKED_AT = {"scale": 1.0}
VIEW = LOOKED_AT.values()
IN_C = ctypes.c_double(1.0)
OF_PROCESSES = multiprocessing.Value("d", 1.0)
OPTIMIZER = torch.optim.SGD([torch.zeros(1)], lr=1.0)


class _Config:
    """State that a program shares."""

    scale = 1.0
    scales: ClassVar = [1.0]

    @property
    def computed(self) -> float:
        return self.scale

    @classmethod
    def of_class(cls) -> float:
        return cls.scale

    def method(self) -> float:
        return 1.0


class _Derived(_Config):
    pass


CONFIG = _Derived()


def number() -> float:
    """A function that is replaced."""
    return 1.0


def by_keyword(*, scale: float = 1.0) -> float:
    """A function whose default is replaced."""
    return scale


def _rebind(name: str, value: Any) -> None:
    globals()[name] = value


def _environment(value: float) -> None:
    os.environ["FUNCSTAGE_TEST_SCALE"] = str(value)


_FILE = Path(tempfile.mkdtemp()) / "scale"


SHARED: dict[str, tuple[Callable[[], Any], Callable[[float], object]]] = {
    "a global dict": (lambda: SETTINGS["plain"], lambda v: SETTINGS.__setitem__("plain", v)),
    "a nested global": (
        lambda: SETTINGS["deep"]["scale"][0],
        lambda v: SETTINGS["deep"]["scale"].__setitem__(0, v),
    ),
    "a nested global, rebound": (
        lambda: SETTINGS["deep"]["scale"][0],
        lambda v: SETTINGS.__setitem__("deep", {"scale": [v]}),
    ),
    "a global tuple": (lambda: ROWS[0][0], lambda v: _rebind("ROWS", ((v,),))),
    "a global by get": (lambda: SETTINGS.get("plain", 0), lambda v: SETTINGS.update(plain=v)),
    "a key of a global": (
        lambda: 2.0 if "extra" in SETTINGS else 1.0,
        lambda v: SETTINGS.pop("extra", None) if v == 1 else SETTINGS.update(extra=0),
    ),
    "a default dict": (lambda: COUNTS["scale"], lambda v: COUNTS.__setitem__("scale", v)),
    "a namespace": (lambda: SPACE.scale, lambda v: setattr(SPACE, "scale", v)),
    "a nested namespace": (lambda: SPACE.inner.scale, lambda v: setattr(SPACE.inner, "scale", v)),
    "by getattr": (lambda: getattr(SPACE, "sca" + "le"), lambda v: setattr(SPACE, "scale", v)),
    "a base's attribute": (lambda: CONFIG.scale, lambda v: setattr(_Config, "scale", v)),
    "a base's list": (lambda: CONFIG.scales[0], lambda v: _Config.scales.__setitem__(0, v)),
    "a property": (lambda: CONFIG.computed, lambda v: setattr(_Config, "scale", v)),
    "a class method": (lambda: CONFIG.of_class(), lambda v: setattr(_Config, "scale", v)),
    "a method": (lambda: CONFIG.method(), lambda v: setattr(_Config, "method", lambda self: v)),
    "a function": (lambda: number(), lambda v: _rebind("number", lambda: v)),
    "a function's code": (
        lambda: by_keyword(),
        lambda v: setattr(by_keyword, "__kwdefaults__", {"scale": v}),
    ),
    "a rebound object": (
        lambda: CONFIG.__dict__.get("own", 1.0),
        lambda v: (_rebind("CONFIG", _Derived()), setattr(CONFIG, "own", v)),
    ),
    "a context variable": (lambda: LEVEL.get(), lambda v: LEVEL.set(v)),
    "the environment": (lambda: float(os.environ["FUNCSTAGE_TEST_SCALE"]), _environment),
    "a view of a dict": (lambda: next(iter(VIEW)), lambda v: LOOKED_AT.update(scale=v)),
    "a number in C": (lambda: IN_C.value, lambda v: setattr(IN_C, "value", v)),
    "a number of processes": (lambda: OF_PROCESSES.value, lambda v: setattr(OF_PROCESSES, "value", v)),
    "a learning rate": (
        lambda: OPTIMIZER.param_groups[0]["lr"],
        lambda v: OPTIMIZER.param_groups[0].update(lr=v),
    ),
    "a file": (lambda: float(_FILE.read_text()), lambda v: _FILE.write_text(str(v))),
}
"""Where a program may keep a number for all of its modules, and how it is changed."""


class _Looking(Around):
    """Scales its output by a number that the program keeps somewhere."""

    def __init__(self, inner: nn.Module, where: str) -> None:
        super().__init__(inner)
        self.where = where

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        scale = SHARED[self.where][0]()
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t * scale, output)


@dataclass(frozen=True)
class Shared(Situation):
    """State of the program that the forward reads changes between two microbatches."""

    where: str
    refusable = ("aten",)

    def build(self, module: nn.Module) -> nn.Module:
        SHARED[self.where][1](1.0)
        return _Looking(module, self.where)

    def between(self, module: nn.Module) -> None:
        SHARED[self.where][1](2.0)


@functools.lru_cache(maxsize=2)
def _cached(n: int) -> Tensor:
    return torch.full((), 2.0, dtype=torch.float64) * n


@functools.cache
def _cached_in_a_dict(n: int) -> dict[str, list[Tensor]]:
    return {"all": [torch.full((), 2.0, dtype=torch.float64) * n]}


def _of_function() -> Tensor:
    if not hasattr(_of_function, "table"):
        _of_function.table = torch.full((), 2.0, dtype=torch.float64)  # type: ignore[attr-defined]
    found: Tensor = _of_function.table  # type: ignore[attr-defined]
    return found


def _forget() -> None:
    if hasattr(_of_function, "table"):
        del _of_function.table


def _of_default(*, tables: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
    if "table" not in tables:
        tables["table"] = torch.full((), 2.0, dtype=torch.float64)
    return tables["table"]


CACHES: dict[str, tuple[Callable[[], Tensor], Callable[[], object]]] = {
    "lru_cache": (lambda: _cached(1), _cached.cache_clear),
    "cache": (lambda: _cached_in_a_dict(1)["all"][0], _cached_in_a_dict.cache_clear),
    "an attribute of a function": (_of_function, _forget),
    "a default of a function": (_of_default, lambda: (_of_default.__kwdefaults__ or {})["tables"].clear()),
}
"""Functions that make a tensor once, and how they forget it."""


class _Tabled(Around):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__(inner)
        self.how = how

    def table(self) -> Tensor:
        return CACHES[self.how][0]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        table = self.table()
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t * table, output)


@dataclass(frozen=True)
class Cached(Situation):
    """The forward computes with a tensor that a function keeps for all calls, made by the stage first."""

    how: str

    @property
    def refusable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("aten",) if self.how.endswith("of a function") else ()

    def build(self, module: nn.Module) -> nn.Module:
        return _Tabled(module, self.how)

    @contextmanager
    def around(self, verb: str) -> Iterator[None]:
        if verb == "F":
            CACHES[self.how][1]()
        yield

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        return nullcontext()

    def observed(self, module: nn.Module) -> list[Any]:
        return [part.table() for part in module.modules() if isinstance(part, _Tabled)]
