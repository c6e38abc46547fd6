"""Forwards that find the module's own tensors in other places, and ask which ones they are."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

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


def _is_alive_in(m: Any, layer: Any) -> bool:
    return any(each() is layer.weight for each in m.marks)


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
    "a weak reference": (lambda m: weakref.ref(m.a.weight), lambda m, layer: m.marks() is layer.weight),
    "weak references in a list": (lambda m: [weakref.ref(m.a.weight)], _is_alive_in),
    "a weak value": (
        lambda m: weakref.WeakValueDictionary({"w": m.a.weight}),
        lambda m, layer: m.marks["w"] is layer.weight,
    ),
    "weak keys": (
        lambda m: WeakTensorKeyDictionary({m.a.weight: 1}),
        lambda m, layer: m.marks.get(layer.weight),
    ),
    "weak keys that are asked for": (
        lambda m: WeakIdKeyDictionary({m.a.weight: 1}),
        lambda m, layer: layer.weight in m.marks,
    ),
    "a weak set": (lambda m: weakref.WeakSet([m.a.weight]), lambda m, layer: layer.weight in m.marks),
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


class Counting(nn.Module):
    """Reads a buffer in another place than its own, and updates it."""

    def __init__(self, keep: Callable[[Any], Any], reads: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(3, 3), reads
        self.register_buffer("n", torch.ones(3))
        self.kept: Any = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.reads(self, self.linear(x))


def _after(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    return y * m.kept[0]


def _anew(m: Any, y: Tensor) -> Tensor:
    m.n = m.n + 1
    return y * m.kept[0]


def _before(m: Any, y: Tensor) -> Tensor:
    y = y + m.kept[0]
    m.n.add_(1)
    return y


def _through_it(m: Any, y: Tensor) -> Tensor:
    m.kept[0].add_(1)
    return y * m.n


def _in_a_region(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    return checkpoint(lambda y: (y * m.kept[0]).sin() @ m.linear.weight, y, use_reentrant=False)


def _handed_to_a_region(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    return checkpoint(lambda y, n: (y * n).sin() @ m.linear.weight, y, m.kept[0], use_reentrant=False)


def _returned(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    return torch.cat([y, torch.stack(m.kept)])


def _in_a_cell(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    return y * m.kept()


def _by_key(m: Any, y: Tensor) -> Tensor:
    m.n += 1
    for key, scale in m.kept.items():
        y = y * key * scale
    return y


def _beside_a_gradient(m: Any, y: Tensor) -> Tensor:
    leaf = y.detach().requires_grad_()
    return _after(m, y) * torch.autograd.grad((leaf * m.kept[0]).sin().sum(), leaf)[0]


FOUND: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "in a list, after a write": (lambda m: [m.n], _after),
    "before a write": (lambda m: [m.n], _before),
    "in a tuple": (lambda m: (m.n,), _after),
    "written there": (lambda m: [m.n], _through_it),
    "in a region": (lambda m: [m.n], _in_a_region),
    "handed to a region": (lambda m: [m.n], _handed_to_a_region),
    "in an operand that is a list": (lambda m: [m.n], _returned),
    "in a cell": (lambda m: (lambda n: lambda: n)(m.n), _in_a_cell),
    "a key": (lambda m: {m.n: 2.0}, _by_key),
    "on a plain tape": (lambda m: [m.n], _beside_a_gradient),
    "a default": (lambda m: (lambda n: lambda n=n: n)(m.n), _in_a_cell),
    "a bound method": (lambda m: m.n.clone, _in_a_cell),
    "a weak reference": (lambda m: weakref.ref(m.n), _in_a_cell),
    "weak values": (lambda m: weakref.WeakValueDictionary({0: m.n}), _after),
    "weak keys": (lambda m: WeakTensorKeyDictionary({m.n: 2.0}), _by_key),
    "keys by their ids": (lambda m: WeakIdKeyDictionary({m.n: 2.0}), _by_key),
    "a view of what does not change": (lambda m: [m.n[:]], lambda m, y: y * m.kept[0]),
    "a clone of what is assigned anew": (lambda m: [m.n.clone()], _anew),
    "a view made in the forward": (lambda m: [m.n], lambda m, y: _after(m, y) * m.n[:]),
}


@BY_ENGINE
@pytest.mark.parametrize("found", FOUND)
def test_a_buffer_is_what_it_is_by_now_wherever_it_is_found(found: str, engine: str) -> None:
    module, x = Counting(*FOUND[found]), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine, fullgraph=True)
    for _ in range(2):
        output, buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
        expected = module(x)
        torch.testing.assert_close(output, expected.detach())
        torch.testing.assert_close(buffers["n"], module.n)
        grads = fs.stage_backward(pullback, torch.ones_like(output))[1]
        named = dict(module.named_parameters())
        wanted = torch.autograd.grad(expected.sum(), [*named.values()])
        torch.testing.assert_close([grads[name] for name in named], [*wanted])


STALE: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor], str]] = {
    "assigned anew": (
        lambda m: [m.n],
        _anew,
        r"assigns its buffer 'n' anew .* another place, .*a clone there",
    ),
    "a view": (
        lambda m: [m.n[:]],
        _after,
        r"changes its buffer 'n' .*Make the view in the forward",
    ),
    "a view, assigned anew": (lambda m: [m.n[:]], _anew, r"changes its buffer 'n' .* a view"),
}


@BY_ENGINE
@pytest.mark.parametrize("stale", STALE)
def test_what_would_not_show_the_change_of_a_buffer_is_refused(stale: str, engine: str) -> None:
    keep, reads, refusal = STALE[stale]
    apply, params, buffers = fs.functionalize(Counting(keep, reads))
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine, fullgraph=True)
    with pytest.raises(fs.PurityError, match=refusal):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 3))
