"""Forwards that find the module's own tensors in other places, and ask which ones they are."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

BY_ENGINE = pytest.mark.parametrize("engine", ["closures", "aten"])
GLOBAL: dict[Any, float] = {}


class Asking(nn.Module):
    """Doubles the output of those of its layers that are marked in some way."""

    def __init__(self, mark: Callable[[Any], Any], is_marked: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("held", torch.ones(3))
        self.is_marked = is_marked
        self.marks: Any = mark(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = layer(x) * (2 if self.is_marked(self, layer) else 1)
        return x


class _Slot:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _in_a_global(m: Any) -> None:
    GLOBAL.clear()
    GLOBAL[m.a.weight] = 2.0


def _is_in(m: Any, layer: Any) -> bool:
    return any(layer.weight is each for each in m.marks)


PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "a list": (lambda m: [m.a.weight], _is_in),
    "a tuple": (lambda m: (m.a.weight,), _is_in),
    "a set": (lambda m: {m.a.weight}, lambda m, layer: layer.weight in m.marks),
    "a frozen set": (lambda m: frozenset([m.a.weight]), lambda m, layer: layer.weight in m.marks),
    "keys": (lambda m: {m.a.weight: 1}, lambda m, layer: m.marks.get(layer.weight)),
    "values": (lambda m: {"w": m.a.weight}, lambda m, layer: layer.weight is m.marks["w"]),
    "an object": (
        lambda m: types.SimpleNamespace(w=m.a.weight),
        lambda m, layer: layer.weight is m.marks.w,
    ),
    "a slot": (lambda m: _Slot(m.a.weight), lambda m, layer: layer.weight is m.marks.tensor),
    "a partial": (
        lambda m: functools.partial(lambda one, other: one is other, m.a.weight),
        lambda m, layer: m.marks(layer.weight),
    ),
    "a cell": (
        lambda m: (lambda own: lambda tensor: tensor is own)(m.a.weight),
        lambda m, layer: m.marks(layer.weight),
    ),
    "ids": (lambda m: {id(m.a.weight)}, lambda m, layer: id(layer.weight) in m.marks),
    "an id": (lambda m: id(m.a.weight), lambda m, layer: id(layer.weight) == m.marks),
    "a global": (_in_a_global, lambda m, layer: GLOBAL.get(layer.weight)),
    "a buffer in a set": (lambda m: {m.held}, lambda m, layer: m.held in m.marks),
}


@BY_ENGINE
@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_that_asks_which_of_its_tensors_lies_elsewhere_is_refused(
    place: str, argnums: tuple[int, ...], engine: str
) -> None:
    module, x = Asking(*PLACES[place]), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    for _ in range(2):
        with pytest.raises(fs.StageError, match=r"compares its parameter or buffer by identity .*Keep names"):
            fs.stage_vjp(stage, params, buffers, x, argnums=argnums)


WAYS_OUT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "names": (
        lambda m: {"a.weight"},
        lambda m, layer: any(p is layer.weight and n in m.marks for n, p in m.named_parameters()),
    ),
    "submodules": (lambda m: {m.a}, lambda m, layer: layer in m.marks),
    "what is not asked": (lambda m: [m.a.weight, id(m.b)], lambda m, layer: len(m.marks) > 1),
    "one place": (lambda m: None, lambda m, layer: layer.weight is m.a.weight),
}


@BY_ENGINE
@pytest.mark.parametrize("way", WAYS_OUT)
def test_names_and_submodules_are_compared_instead(way: str, engine: str) -> None:
    module, x = Asking(*WAYS_OUT[way]), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine, fullgraph=True)
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        torch.testing.assert_close(output, module(x).detach())
        grads = fs.stage_backward(pullback, torch.ones_like(output))[1]
        named = dict(module.named_parameters())
        wanted = torch.autograd.grad(module(x).sum(), [*named.values()])
        torch.testing.assert_close([grads[name] for name in named], [*wanted])


def _once(m: Any, layer: Any) -> bool:
    is_new = layer.weight not in m.marks
    if isinstance(m.marks, set):
        m.marks.add(layer.weight)
    else:
        m.marks[layer.weight] = True
    return is_new


@BY_ENGINE
@pytest.mark.parametrize("kind", [set, dict])
def test_a_forward_that_keeps_its_parameters_as_keys_is_refused(kind: Any, engine: str) -> None:
    module = Asking(lambda m: kind(), _once)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    with pytest.raises(fs.StageError, match=r"a key of a dict|a set|leaves something on its module"):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 3))
    assert not module.marks
