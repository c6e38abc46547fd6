"""Layers that act on features, element by element, or on the layout of an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from funcstage.testing.layers.base import (
    NO,
    OUT,
    YES,
    Layer,
    Op,
    Place,
    features,
    last,
    weight,
)


class Overwrites(nn.Module):
    """A layer that writes into its operand, given a copy where others read the operand."""

    def __init__(self, layer: nn.Module, place: Place) -> None:
        super().__init__()
        self.layer = layer
        self.copies = not place.fresh

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.clone() if self.copies else x)


class Twice(nn.Module):
    """A layer of two operands, both made of one."""

    def __init__(self, layer: nn.Module, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.second(x))


class Counting(nn.Module):
    """Buffers of every kind of update: in place, assigned anew, and none."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=place.device))
        self.register_buffer("mean", torch.zeros((), **place.made))
        self.scale: Tensor
        self.hidden: Tensor
        self.register_buffer("scale", torch.full((), 2.0, **place.made))
        self.register_buffer("hidden", torch.ones((), **place.made), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean = self.mean * 0.5 + x.detach().sum().to(self.mean.dtype)
        return x * self.scale + self.hidden


def _linear(place: Place, out: int, bias: bool) -> nn.Module:
    return nn.Linear(place.shape[-1], out or place.shape[-1], bias=bias, **place.made)


def _activation(place: Place, kind: str, inplace: bool) -> nn.Module:
    functions: dict[str, Callable[..., Tensor]] = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "gelu": F.gelu,
    }
    in_place: dict[str, Callable[..., Tensor]] = {"tanh": torch.tanh_, "sigmoid": torch.sigmoid_}
    kinds: dict[str, Any] = {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "leaky": nn.LeakyReLU,
        "hardswish": nn.Hardswish,
        "elu": nn.ELU,
    }
    if kind in kinds:
        layer: nn.Module = kinds[kind](inplace=inplace)
    else:
        layer = Op(in_place.get(kind, functions[kind]) if inplace else functions[kind])
    return Overwrites(layer, place) if inplace else layer


def _dropout(place: Place, kind: str, p: float, inplace: bool) -> nn.Module:
    kinds: dict[str, Any] = {
        "plain": nn.Dropout,
        "features": {3: nn.Dropout1d, 4: nn.Dropout2d}.get(len(place.shape), nn.Dropout),
        "alpha": nn.AlphaDropout,
        "feature alpha": nn.FeatureAlphaDropout if len(place.shape) > 2 else nn.AlphaDropout,
    }
    layer = kinds[kind](p, inplace=inplace)
    if kind == "features" and len(place.shape) == 3 and place.shape[0] == 0:
        layer = nn.Dropout(p, inplace=inplace)
    return Overwrites(layer, place) if inplace else layer


def _bilinear(place: Place, out: int) -> nn.Module:
    layer = nn.Bilinear(place.shape[-1], place.shape[-1], out or place.shape[-1], **place.made)
    return Twice(layer, torch.tanh)


def _position(place: Place, kind: str) -> nn.Module:
    n, features = place.shape[-2], place.shape[-1]
    if kind == "table":
        return Op(lambda x, w: x + w[: x.shape[-2]], weight(place, n + 1, features))
    if kind == "embedding":
        return Op(
            lambda x, w: x + F.embedding(torch.arange(n, device=w.device), w), weight(place, n + 1, features)
        )
    return Op(
        lambda x, w: torch.cat([w[: x.shape[-2]].expand_as(x), x], -2)[..., n:, :],
        weight(place, n, features),
    )


def _elementwise(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda x, w: x + w,
        "times": lambda x, w: w * x,
        "where": lambda x, w: torch.where(x.real > 0 if x.is_complex() else x > 0, x, w.to(x.dtype)),
        "twice": lambda x, w: x * w + w,
        "square": lambda x, w: (x * w) * (x * w),
        "addcmul": lambda x, w: torch.addcmul(x, x, w.to(x.dtype)),
        "only weights": lambda x, w: x + (w.exp() if not w.is_complex() else w * w).sum().to(x.dtype),
    }
    return Op(functions[kind], weight(place, place.shape[-1]))


def _in_place(place: Place, kind: str) -> nn.Module:
    def imul(x: Tensor, w: Tensor) -> Tensor:
        return x.mul_(w.to(x.dtype))

    def add(x: Tensor, w: Tensor) -> Tensor:
        x += w.to(x.dtype)
        return x

    def rows(x: Tensor, w: Tensor) -> Tensor:
        x[..., :1] = w[:1].to(x.dtype)
        return x

    def view(x: Tensor, w: Tensor) -> Tensor:
        x[..., :1].add_(w[:1].to(x.dtype))
        x.view(x.shape).mul_(2)
        return x

    def fill(x: Tensor, w: Tensor) -> Tensor:
        y = x.new_zeros(x.shape)
        y[...] = x
        y.add_(w.to(x.dtype), alpha=2)
        return y

    def into_weights(x: Tensor, w: Tensor) -> Tensor:
        y = w.to(x.dtype).expand(x.shape).clone()
        y += x
        return y.mul_(w.to(x.dtype))

    def late(x: Tensor, w: Tensor) -> Tensor:
        y = x * 2
        z = y.view(-1) if y.is_contiguous() else y
        y.add_(w.to(x.dtype))
        return z.view(x.shape) if z.dim() == 1 else z

    def masked(x: Tensor, w: Tensor) -> Tensor:
        mask = torch.arange(x.shape[-1], device=x.device) % 2 == 0
        return x.masked_fill_(mask, 0.5).add_(w.to(x.dtype))

    functions = {
        "mul_": imul,
        "add_": add,
        "setitem": rows,
        "view": view,
        "fill": fill,
        "into weights": into_weights,
        "late": late,
        "masked": masked,
    }
    layer = Op(functions[kind], weight(place, place.shape[-1]))
    return Overwrites(layer, place.at(fresh=False) if kind == "view" and place.argument else place)


def _view(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "reshape": lambda x: x.reshape(-1).reshape(x.shape),
        "transpose": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "flip": lambda x: x.flip(-1),
        "chunk": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(2, -1))], -1),
        "unbind": lambda x: torch.stack([row * 2 for row in x.unbind(-1)], -1),
        "cumsum": lambda x: x.cumsum(-1),
        "roll": lambda x: x.roll(1, -1) + x,
        "branching": lambda x: x * 2 if x.abs().sum() >= 0 else x - 1,
        "detach": lambda x: x * x.detach() if not x.is_complex() else x + x.detach(),
        "same": lambda x: x,
    }
    return Op(functions[kind])


def _mixing(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "gram": lambda x: x @ (x.transpose(-1, -2) @ x),
        "softmax": lambda x: x.softmax(-1),
        "einsum": lambda x: torch.einsum("...ij,...kj->...ik", x, x).sum(-1, keepdim=True) + x,
    }
    return Op(functions[kind])


LAYERS: dict[str, Layer] = {
    "linear": Layer(
        _linear,
        lambda p: len(p.shape) >= 1,
        {"out": OUT, "bias": YES},
        last,
        fresh=True,
        complex=True,
        tags="dense sequence attention recurrent weights state",
    ),
    "activation": Layer(
        _activation,
        options={
            "kind": ("relu", "tanh", "sigmoid", "gelu", "silu", "leaky", "hardswish", "elu"),
            "inplace": NO,
        },
        tags="dense image recurrent",
    ),
    "complex activation": Layer(
        _activation,
        lambda p: p.dtype.is_complex,
        {"kind": ("tanh", "sigmoid"), "inplace": NO},
        complex=True,
        tags="dense",
    ),
    "elementwise": Layer(
        _elementwise,
        options={"kind": ("add", "times", "where", "twice", "square", "addcmul", "only weights")},
        complex=True,
        tags="dense weights in-place",
    ),
    "in place": Layer(
        _in_place,
        lambda p: len(p.shape) >= 1,
        {"kind": ("mul_", "add_", "setitem", "view", "fill", "into weights", "late", "masked")},
        complex=True,
        tags="in-place",
    ),
    "view": Layer(
        _view,
        lambda p: len(p.shape) >= 1 and p.shape[-1] > 0,
        {
            "kind": (
                "same",
                "reshape",
                "transpose",
                "flip",
                "chunk",
                "unbind",
                "cumsum",
                "roll",
                "branching",
                "detach",
            )
        },
        complex=True,
        tags="in-place",
    ),
    "mixing": Layer(
        _mixing,
        lambda p: len(p.shape) >= 2 and p.size(*range(len(p.shape))) > 0,
        {"kind": ("softmax", "gram", "einsum", "attention")},
        tags="attention",
    ),
    "dropout": Layer(
        _dropout,
        lambda p: len(p.shape) >= 2,
        {
            "kind": ("plain", "features", "alpha", "feature alpha"),
            "p": (0.25, 0.5, 0.0, 1.0),
            "inplace": NO,
        },
        tags="dense image attention state",
    ),
    "bilinear": Layer(
        _bilinear,
        lambda p: features(p) and all(p.shape),
        {"out": OUT},
        last,
        autocast=False,
        tags="dense",
    ),
    "position": Layer(
        _position,
        lambda p: len(p.shape) >= 2 and p.shape[-1] > 0,
        {"kind": ("table", "embedding", "cat")},
        tags="sequence attention weights",
    ),
    "prelu": Layer(
        lambda place, each: nn.PReLU(place.shape[1] if each and len(place.shape) > 1 else 1, **place.made),
        lambda p: len(p.shape) >= 1 and all(p.shape[1:2]),
        {"each": NO},
        autocast=False,
        tags="dense image",
    ),
    "counting": Layer(lambda place: Counting(place), fresh=True, complex=True, tags="state"),
}
