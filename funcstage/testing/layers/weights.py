"""Layers whose weights are made of parameters, shared, chosen or not used at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from funcstage.testing.layers.base import (
    NO,
    Layer,
    Op,
    Place,
    features,
    weight,
)


class Product(torch.autograd.Function):
    """A user's own function of an activation and a weight."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = grad @ weight.mH if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = x.reshape(-1, x.shape[-1]).mH @ grad.reshape(-1, grad.shape[-1])
        return of_x, of_weight


class Scaled(nn.Linear):
    """A linear layer whose weight is computed from parameters alone, and is trained through that."""

    def __init__(self, features: int, how: str, place: Place) -> None:
        super().__init__(features, features, **place.made)
        self.how = how
        self.low_rank = nn.Parameter(torch.ones(features, 1, **place.made))
        self.base: Tensor
        self.register_buffer("base", torch.ones(features, features, **place.made))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.how == "lora":
            weight = self.base + self.low_rank @ self.low_rank.t()
        elif self.how == "cat":
            weight = torch.cat([self.weight[:1], self.low_rank.t().expand_as(self.weight)[1:]])
        elif self.how == "cast":
            weight = self.weight.double().to(x.dtype) if not x.is_complex() else self.weight.to(x.dtype)
        elif self.how == "stack":
            weight = torch.stack([self.weight, self.base * self.low_rank]).sum(0)
        elif self.how == "in place":
            weight = self.weight.clone()
            weight[0] = self.low_rank[:, 0]
            weight.mul_(self.low_rank)
        elif self.how == "no grad":
            with torch.no_grad():
                norm = self.weight.abs().sum() + 1
            weight = self.weight / norm
        return F.linear(x, weight, self.bias)


class Adapted(nn.Linear):
    """A frozen linear layer with a trained product of low rank beside it, or merged into its weight."""

    def __init__(self, features: int, merged: bool, place: Place) -> None:
        super().__init__(features, features, **place.made)
        self.requires_grad_(False)
        self.merged = merged
        self.a = nn.Parameter(torch.ones(1, features, **place.made))
        self.b = nn.Parameter(torch.ones(features, 1, **place.made))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight + self.b @ self.a, self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)


class Symmetric(nn.Module):
    """A parametrization of a square weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


class Softplus(nn.Module):
    """A parametrization of any weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


def _normalised(place: Place, how: str) -> nn.Module:
    linear = nn.Linear(place.shape[-1], place.shape[-1], **place.made)
    return parametrizations.weight_norm(linear) if how == "weight" else parametrizations.spectral_norm(linear)


def _parametrized(place: Place, how: str, used: int) -> nn.Module:
    linear = nn.Linear(place.shape[-1], place.shape[-1], **place.made)
    parametrize.register_parametrization(linear, "weight", Symmetric() if how == "symmetric" else Softplus())
    return nn.Sequential(*[linear] * used)


def _experts(place: Place, capacity: int) -> nn.Module:
    """Each token goes to its best expert by sorting; those beyond the capacity, if any, to none."""
    n, experts = place.shape[-1], 2
    room = capacity or max(1, place.size(*range(len(place.shape) - 1)))

    def mixed(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        tokens = x.reshape(-1, n)
        weights, chosen = (tokens @ gate).softmax(-1).max(-1)
        expert, order = chosen.sort(stable=True)
        counts = F.one_hot(expert, experts).sum(0)
        rank = torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts)[expert]
        slot = torch.where(rank < room, expert * room + rank, experts * room)
        padded = tokens.new_zeros(experts * room + 1, n).index_copy(0, slot, tokens[order])
        done = torch.bmm(padded[:-1].view(experts, room, n), up).flatten(0, 1)
        rows = F.pad(done, (0, 0, 0, 1))[slot] * weights[order, None]
        return torch.zeros_like(tokens).index_add(0, order, rows).view_as(x)

    made = place.made
    return Op(mixed, {"gate": torch.ones(n, experts, **made), "up": torch.ones(experts, n, n, **made)})


def _product(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "matmul": lambda x, w: x @ w,
        "transposed": lambda x, w: x @ w.t() + x @ w,
        "einsum": lambda x, w: torch.einsum("...i,ij->...j", x, w),
        "bmm": lambda x, w: torch.matmul(x, w.expand(*x.shape[:-2], *w.shape)),
        "chain": lambda x, w: x @ (w @ w),
    }
    n = place.shape[-1]
    return Op(functions[kind], weight(place, n, n))


def _unused(place: Place) -> nn.Module:
    return Op(lambda x, w: x * 1, weight(place, 2))


LAYERS: dict[str, Layer] = {
    "product": Layer(
        _product,
        lambda p: len(p.shape) >= 2,
        {"kind": ("matmul", "transposed", "einsum", "bmm", "chain")},
        complex=True,
        tags="dense weights",
    ),
    "custom function": Layer(
        lambda place: Op(lambda x, w: Product.apply(x, w), weight(place, place.shape[-1], place.shape[-1])),
        lambda p: len(p.shape) >= 2,
        complex=True,
        autocast=False,
        tags="weights",
    ),
    "derived weight": Layer(
        lambda place, how: Scaled(place.shape[-1], how, place),
        features,
        {"how": ("lora", "cat", "cast", "stack", "in place", "no grad")},
        fresh=True,
        complex=True,
        autocast=False,
        tags="weights",
    ),
    "normalised weight": Layer(
        _normalised,
        lambda p: features(p) and not p.low,
        {"how": ("weight", "spectral")},
        fresh=True,
        tags="weights state",
    ),
    "adapter": Layer(
        lambda place, merged: Adapted(place.shape[-1], merged, place),
        features,
        {"merged": NO},
        fresh=True,
        tags="weights dense",
    ),
    "parametrized": Layer(
        _parametrized,
        features,
        {"how": ("symmetric", "softplus"), "used": (1, 2)},
        fresh=True,
        tags="weights",
    ),
    "experts": Layer(
        _experts,
        lambda p: features(p) and not p.low and p.size(*range(len(p.shape))) > 0,
        {"capacity": (0, 2)},
        fresh=True,
        autocast=False,
        tags="sequence weights",
    ),
    "unused": Layer(_unused, fresh=True, complex=True, tags="weights"),
}
