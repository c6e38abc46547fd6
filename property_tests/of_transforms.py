"""Situations inside a stage: gradients, products and maps that the forward takes of the module itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from situation import Around, Situation, map_differentiable
from torch import Tensor, nn
from torch.autograd import forward_ad

from funcstage import trees

Energy = Callable[[Tensor], Tensor]


def _marked(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().clone().requires_grad_()


def _pulled_back(energy: Energy, x: Tensor) -> Tensor:
    value, pull = torch.func.vjp(energy, x)
    (gradient,) = pull(torch.ones_like(value))
    return gradient * value


def _pushed_forward(energy: Energy, x: Tensor) -> Tensor:
    value, tangent = torch.func.jvp(energy, (x,), (x.sin(),))
    return value + tangent


def _dual(energy: Energy, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(energy(forward_ad.make_dual(x, torch.ones_like(x))))
        return made.primal if made.tangent is None else made.primal + made.tangent


def _penalty(energy: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = _marked(x)
        (gradient,) = torch.autograd.grad(energy(point), point, create_graph=True)
    return gradient.square()


def _penalty_inside(energy: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = _marked(x).sin()
        value = energy(point)
        (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    return gradient.square() + value


def _constant(energy: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(point), point)
    return gradient * x


def _each(energy: Energy, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(energy))(torch.stack([x, x.sin()]))


TRANSFORMS: dict[str, Callable[[Energy, Tensor], Tensor]] = {
    "grad": lambda energy, x: torch.func.grad(energy)(x),
    "grad and value": lambda energy, x: torch.mul(*torch.func.grad_and_value(energy)(x)),
    "vjp": _pulled_back,
    "jvp": _pushed_forward,
    "jacrev": lambda energy, x: torch.func.jacrev(energy)(x.sin()),
    "jacfwd": lambda energy, x: torch.func.jvp(energy, (x,), (torch.ones_like(x),))[1],
    "grad of grad": lambda energy, x: torch.func.grad(lambda y: torch.func.grad(energy)(y).square().sum())(x),
    "vmap": lambda energy, x: torch.func.vmap(energy)(torch.stack([x, x.sin()])),
    "vmap of grad": _each,
    "dual numbers": _dual,
    "gradient penalty": _penalty,
    "gradient penalty within": _penalty_inside,
    "gradient as a constant": _constant,
}
"""What a forward may make of an energy, a function from a tensor to a scalar, at some point."""


class _Counter:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def random(self) -> float:
        self.calls += 1
        return self.calls / 4


KEPT: dict[str, Callable[[], Any]] = {
    "python's generator": lambda: random.Random(0),
    "numpy's generator": lambda: numpy.random.default_rng(0),
    "a counter": _Counter,
}
"""What a module may keep that answers differently in every call."""


class _Transforming(Around):
    """Scales its output by what a transform makes of the module inside, and by what else it keeps."""

    def __init__(self, inner: nn.Module, kind: str, kept: str) -> None:
        super().__init__(inner)
        self.kind = kind
        self.kept = KEPT[kept]() if kept else None
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        factor = 1 if self.kept is None else self.kept.random()
        leaves, spec = trees.flatten(args)
        places = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
        ]
        if not places:  # tokens: the energy of a parameter takes the place
            gradient = TRANSFORMS[self.kind](lambda q: (q * self.gain).sin().sum(), self.gain * 2)
            output = super().forward(*args, **kwargs)
        else:
            place = places[0]

            def energy(x: Tensor) -> Tensor:
                given = [*leaves[:place], x, *leaves[place + 1 :]]
                output = super(_Transforming, self).forward(*trees.unflatten(spec, given), **kwargs)
                return _size(output) * self.gain + (x * self.gain).sin().sum()

            gradient = TRANSFORMS[self.kind](energy, leaves[place])
            output = super().forward(*args, **kwargs)
        scale = 1 + gradient.sum().tanh() * factor
        return map_differentiable(lambda t: t * scale.to(t.dtype), output)


def _size(output: Any) -> Tensor:
    """A smooth scalar of all that is differentiable in an output."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in trees.flatten(output)[0]:
        if isinstance(leaf, Tensor) and trees.is_differentiable(leaf):
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            total = total + real.to(torch.float64).tanh().sum()
    return total


@dataclass(frozen=True)
class Transformed(Situation):
    """The forward takes a gradient, a product or a map of the module."""

    kind: str
    kept: str = ""
    refusable = ("aten",)  # where what is transformed reads values, which a trace lacks

    def build(self, module: nn.Module) -> nn.Module:
        return _Transforming(module, self.kind, self.kept)
