"""Situations that a module makes: hooks, wrappers, what it keeps, reads, returns, draws and raises."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from situation import Around, Situation, map_differentiable
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.nn.utils import parametrize

from funcstage import trees


@dataclass(frozen=True)
class ParameterHook(Situation):
    """A hook of a parameter that changes its gradient."""

    accumulated: bool = False
    place: int = 0
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained:
            parameter = trained[self.place % len(trained)]
            if self.accumulated:
                parameter.register_post_accumulate_grad_hook(_double_grad)
            else:
                parameter.register_hook(lambda grad: 2 * grad)
        return module


def _double_grad(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = 2 * parameter.grad


@dataclass(frozen=True)
class ModuleHook(Situation):
    """A hook of a submodule that changes what goes through it."""

    kind: str
    place: int = 0

    def build(self, module: nn.Module) -> nn.Module:
        parts = list(module.modules())
        HOOKS[self.kind](parts[self.place % len(parts)])
        return module


def _scaled(value: Any) -> Any:
    """Scale the tensor, or the first of a tuple of them."""
    if isinstance(value, Tensor):
        return value * 2 if trees.is_differentiable(value) else value
    if isinstance(value, tuple) and type(value) is tuple and value:
        return (_scaled(value[0]), *value[1:])
    return value


def _scaled_grads(grads: Any) -> Any:
    return tuple(None if grad is None else 2 * grad for grad in grads)


def _hook_output(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda grad: 3 * grad)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, output: _scaled(output)),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda m, args: _scaled(args)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, given, grads: _scaled_grads(given)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, grads: _scaled_grads(grads)),
    "of its output": lambda m: m.register_forward_hook(_hook_output),
}


class _Doubles(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrized(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            parametrize.register_parametrization(part, "weight", _Doubles())
            break
    return module


def _weight_normed(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear) and not parametrize.is_parametrized(part) and part.weight.numel():
            nn.utils.weight_norm(part)
            break
    return module


def _part_compiled(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.compile(backend="eager")
            break
    return module


def _frozen_first(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        break
    return module


@dataclass(frozen=True)
class Wrapped(Situation):
    """A wrapper around the module or around a part of it."""

    by: str

    @property
    def refusable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("closures", "aten") if self.refused else ()

    @property
    def refused(self) -> bool:  # type: ignore[override]
        return self.by in DATA_PARALLEL

    def build(self, module: nn.Module) -> nn.Module:
        return WRAPPERS[self.by](module)


class _Beside(Around):
    """A unit of its own beside the module, wrapped for data parallelism."""

    def __init__(self, inner: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(inner)
        self.unit = wrap(nn.Linear(2, 2, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        more = self.unit(torch.ones(1, 2, dtype=torch.float64)).sum()
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t + more.to(t.dtype), output)


DATA_PARALLEL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "distributed data parallel": nn.parallel.DistributedDataParallel,
    "FSDP": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    "replicate": lambda m: replicate(m),
}
"""Wrappers for data parallelism, of a process group of this process alone."""

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a module": Around,
    **{by: functools.partial(lambda wrap, m: _Beside(m, wrap), wrap) for by, wrap in DATA_PARALLEL.items()},
    "parametrization": _parametrized,
    "old weight norm": _weight_normed,
    "a compiled part": _part_compiled,
    "a deep copy": copy.deepcopy,
    "a frozen parameter": _frozen_first,
    "requires_grad off and on": lambda m: m.requires_grad_(False).requires_grad_(True),
}


class _Keeping(Around):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__(inner)
        self.how = how
        self.kept: Any = {"list": [], "dict": {}}.get(how)
        if how == "on a part":
            inner.kept = None  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        first = next(t for t in trees.flatten(output)[0] if isinstance(t, Tensor))
        value = first.detach() * 2 if self.how == "detached" else first * 2
        if self.how == "list":
            self.kept.append(value)
        elif self.how == "dict":
            self.kept["last"] = value
        elif self.how == "on a part":
            self.module.kept = value
        elif self.how == "on a new part":
            self.made = nn.Identity()
            self.made.kept = value
        else:
            self.kept = value
        return output


@dataclass(frozen=True)
class Kept(Situation):
    """The forward keeps a tensor on the module."""

    how: str = "attribute"
    refusable = ("closures", "aten")
    HOWS: ClassVar = ("attribute", "list", "dict", "on a part", "on a new part", "detached")

    def build(self, module: nn.Module) -> nn.Module:
        return _Keeping(module, self.how)

    def observed(self, module: nn.Module) -> list[Any]:
        keeping = next(m for m in module.modules() if isinstance(m, _Keeping))
        parts = {"on a part": keeping.module, "on a new part": getattr(keeping, "made", None)}
        held = getattr(parts.get(self.how, keeping), "kept", None)
        return trees.flatten(held)[0]


SCALE = 1.0


class _Remaking(Around):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__(inner)
        self.how, self.own = how, nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.how == "makes":
            self.made = nn.Parameter(torch.ones(()))
        elif self.how == "exchanges":
            self.own = nn.Parameter(self.own.detach() / 2)
        else:
            self.layer = nn.Linear(2, 2)
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class Remade(Situation):
    """The forward makes parameters, or exchanges those that it has."""

    how: str = "makes"
    refused = True
    HOWS: ClassVar = ("makes", "exchanges", "makes a layer")

    def build(self, module: nn.Module) -> nn.Module:
        return _Remaking(module, self.how)


class _Packed:
    """An object with state."""

    scale: Any = 1.0

    def __init__(self) -> None:
        self.inner = types.SimpleNamespace(scale=1.0)
        self.__hidden = 1.0

    def hidden(self) -> float:
        return self.__hidden

    def hide(self, value: float) -> None:
        self.__hidden = value


def _by_default(scale: Any = (1.0,)) -> Any:
    return scale[0]


class _Reading(Around):
    """Scales its output by a number that it finds somewhere."""

    level = 1.0

    def __init__(self, inner: nn.Module, where: str) -> None:
        super().__init__(inner)
        self.where = where
        self.number = 1.0
        self.listed, self.queue, self.chosen = [1.0], deque([1.0]), {1.0}
        self.table = {"scale": 1.0}
        self.object, self.part = _Packed(), functools.partial(max, 1.0)
        self.array = torch.ones(1).numpy()
        self.tensor = torch.ones(())
        scale = 1.0

        def read() -> float:
            return scale

        def write(value: float) -> None:
            nonlocal scale
            scale = value

        self.cell = (read, write)
        self.function = lambda: 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        scale = READS[self.where][0](self)
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t * scale, output)


def _set_global(value: float) -> None:
    globals()["SCALE"] = value


READS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, float], object]]] = {
    "a global": (lambda m: SCALE, lambda m, v: _set_global(v)),
    "a cell": (lambda m: m.cell[0](), lambda m, v: m.cell[1](v)),
    "a class attribute": (lambda m: m.level, lambda m, v: setattr(type(m), "level", v)),
    "a default argument": (
        lambda m: _by_default(),
        lambda m, v: setattr(_by_default, "__defaults__", ((v,),)),
    ),
    "an attribute": (lambda m: m.number, lambda m, v: setattr(m, "number", v)),
    "a list": (lambda m: m.listed[0], lambda m, v: m.listed.__setitem__(0, v)),
    "a deque": (lambda m: m.queue[0], lambda m, v: m.queue.__setitem__(0, v)),
    "a dict": (lambda m: m.table["scale"], lambda m, v: m.table.__setitem__("scale", v)),
    "a set": (lambda m: max(m.chosen), lambda m, v: (m.chosen.clear(), m.chosen.add(v))),
    "an array": (lambda m: float(m.array[0]), lambda m, v: m.array.__setitem__(0, v)),
    "an object": (lambda m: m.object.inner.scale, lambda m, v: setattr(m.object.inner, "scale", v)),
    "a hidden attribute": (lambda m: m.object.hidden(), lambda m, v: m.object.hide(v)),
    "an object's class": (lambda m: m.object.scale, lambda m, v: setattr(_Packed, "scale", v)),
    "a partial": (lambda m: m.part(0.5), lambda m, v: setattr(m, "part", functools.partial(max, v))),
    "a function": (lambda m: m.function(), lambda m, v: setattr(m, "function", lambda: v)),
    "a tensor": (lambda m: m.tensor, lambda m, v: m.tensor.fill_(v)),
    "another tensor": (lambda m: m.tensor, lambda m, v: setattr(m, "tensor", torch.tensor(v))),
}
"""Where a module may find a number, and how it is changed."""


@dataclass(frozen=True)
class Changed(Situation):
    """Something that the forward reads changes between two microbatches."""

    where: str
    refusable = ("aten",)

    def build(self, module: nn.Module) -> nn.Module:
        READS[self.where][1](_Reading(nn.Identity(), self.where), 1.0)  # what outlives the module
        return _Reading(module, self.where)

    def between(self, module: nn.Module) -> None:
        reading = next(m for m in module.modules() if isinstance(m, _Reading))
        READS[self.where][1](reading, 2.0)


@dataclass
class _Encoded:
    hidden: Any
    rest: Any = None
    name: str = "encoded"


@dataclass(frozen=True)
class _Frozen:
    hidden: Any
    rest: Any = None


class _ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As model libraries return it: a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class _Bag(dict):  # type: ignore[type-arg]
    pass


class _Two(NamedTuple):
    hidden: Any
    rest: Any


class _Cache:
    """As key-value caches are: an object of no type that anybody knows."""

    def __init__(self, hidden: Any, rest: Any) -> None:
        self.hidden, self.rest = hidden, rest


PACKS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "a dataclass": (_Encoded, lambda o: (o.hidden, o.rest)),
    "a frozen dataclass": (_Frozen, lambda o: (o.hidden, o.rest)),
    "a model output": (lambda h, r: _ModelOutput(hidden=h, rest=r), lambda o: (o["hidden"], o["rest"])),
    "a dict subclass": (lambda h, r: _Bag(hidden=h, rest=r), lambda o: (o["hidden"], o["rest"])),
    "a user dict": (lambda h, r: UserDict(hidden=h, rest=r), lambda o: (o["hidden"], o["rest"])),
    "a namedtuple": (_Two, lambda o: (o.hidden, o.rest)),
    "an object": (_Cache, lambda o: (o.hidden, o.rest)),
    "a partial function": (lambda h, r: functools.partial(_Two, h, r), lambda o: o.args),
}
"""Types of a user's, of two values: how they are made and taken apart."""

REFUSED = ("a user dict", "an object", "a partial function")
"""Those that an output may be refused for."""


class _Returning(Around):
    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__(inner)
        self.kind = kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        first = next(t for t in trees.flatten(output)[0] if isinstance(t, Tensor))
        return PACKS[self.kind][0](output, first * 2)


@dataclass(frozen=True)
class Returned(Situation):
    """The stage returns a type of the user's."""

    kind: str

    @property
    def refusable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("closures", "aten") if self.kind in REFUSED else ()

    def build(self, module: nn.Module) -> nn.Module:
        return _Returning(module, self.kind)

    def opened(self, output: Any) -> Any:
        return PACKS[self.kind][1](output)

    def closed(self, cotangents: Any) -> Any:
        return PACKS[self.kind][0](*cotangents)


class _Drawing(Around):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(3)
        first = next(t for t in trees.flatten((args, kwargs))[0] if isinstance(t, Tensor))
        F.dropout(torch.ones_like(first, dtype=torch.float32), 0.5)
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: F.dropout(t, 0.5), output)


@dataclass(frozen=True)
class Draws(Situation):
    """Random draws that nobody reads come before some that count."""

    def build(self, module: nn.Module) -> nn.Module:
        return _Drawing(module)


class _Raising(Around):
    raises = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.raises:  # before buffers are updated, which eager would keep
            raise KeyError("the user's own")
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class Raised(Situation):
    """The forward raises an error of its own at the first microbatch."""

    def build(self, module: nn.Module) -> nn.Module:
        return _Raising(module)

    def between(self, module: nn.Module) -> None:
        next(m for m in module.modules() if isinstance(m, _Raising)).raises = False
