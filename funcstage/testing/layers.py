"""The vocabulary of generated stages: every layer that a stage may be composed of.

Each entry of `LAYERS` says where its layer fits (shape, dtype, mode), which options it has, what shape
comes out and how it is built. Stages are composed by `stages`; nothing here knows of Hypothesis.
Conditions are those of eager torch: a layer fits wherever eager itself runs it forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

Shape: TypeAlias = tuple[int, ...]
Options: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands: what arrives there.

    Attributes:
        shape: of the activation; features last for two or three axes, channels second for convolutions.
        dtype: of the activation and of the parameters.
        device: of both.
        training: the mode.
        autocast: whether the layer runs under autocast.
        fresh: whether the activation may be overwritten: nobody else reads or has saved it.
        argument: whether the activation is an argument of the stage, which may be overwritten whole (the
            stage's name for it then stands for a copy), but not through a view.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    autocast: bool = False
    fresh: bool = False
    argument: bool = False

    def at(self, **changes: Any) -> Place:
        """The same place with some of its attributes changed."""
        return replace(self, **changes)

    @property
    def made(self) -> dict[str, Any]:
        """What factories take."""
        return {"dtype": self.dtype, "device": self.device}

    @property
    def low(self) -> bool:
        """Whether the dtype has 16 bits."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def size(self, *axes: int) -> int:
        """The product of some axes."""
        size = 1
        for axis in axes:
            size *= self.shape[axis]
        return size


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the vocabulary.

    Attributes:
        build: makes the module for a place.
        fits: tells whether eager runs it there.
        options: the choices for each option, the simplest first.
        shape: the shape after it; the same if left out.
        fresh: whether its result is memory that nobody has saved.
        complex: whether it runs on complex numbers.
        autocast: whether it runs under autocast.
        tags: the families of stages in which it is frequent.
    """

    build: Callable[..., nn.Module]
    fits: Callable[[Place], bool] = lambda place: len(place.shape) >= 1
    options: Options = field(default_factory=dict)
    shape: Callable[..., Shape] = lambda place, **options: place.shape
    fresh: bool = False
    complex: bool = False
    autocast: bool = True
    tags: str = ""

    def fits_at(self, place: Place) -> bool:
        """Tell whether the layer can stand there."""
        if place.dtype.is_complex and not self.complex:
            return False
        return (self.autocast or not place.autocast) and self.fits(place)

    def after(self, place: Place, options: Options) -> Place:
        """The place behind the layer."""
        return place.at(shape=tuple(self.shape(place, **options)), fresh=self.fresh, argument=False)


class Op(nn.Module):
    """A function of the activation and of parameters and buffers of its own."""

    def __init__(
        self,
        function: Callable[..., Any],
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.names = [*(params or ()), *(buffers or ())]
        for name, tensor in (params or {}).items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, name) for name in self.names))


class Overwrites(nn.Module):
    """A layer that writes into its operand, given a copy where others read the operand."""

    def __init__(self, layer: nn.Module, place: Place) -> None:
        super().__init__()
        self.layer = layer
        self.copies = not place.fresh

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.clone() if self.copies else x)


class Recurrent(nn.Module):
    """A recurrent layer without its final states, or with them added to its output."""

    def __init__(self, layer: nn.Module, states: bool) -> None:
        super().__init__()
        self.layer = layer
        self.states = states

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        if self.states:
            for s in state if isinstance(state, tuple) else (state,):
                y = y + s.sum()
        return y


class Cell(nn.Module):
    """A recurrent cell stepped over its own output."""

    def __init__(self, cell: nn.Module, steps: int) -> None:
        super().__init__()
        self.cell = cell
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for _ in range(self.steps):
            state = self.cell(x, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, attention: nn.MultiheadAttention, weights: bool, masked: bool) -> None:
        super().__init__()
        self.attention = attention
        self.weights = weights
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.masked:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y, weights = self.attention(x, x, x, need_weights=self.weights, attn_mask=mask)
        return y + weights.sum().to(y.dtype) if self.weights else y


class Decoder(nn.Module):
    """A decoder layer whose memory is its own input, shifted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x * 0.5)


class Twice(nn.Module):
    """A layer of two operands, both made of one."""

    def __init__(self, layer: nn.Module, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.second(x))


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


def _weight(place: Place, *shape: int) -> dict[str, Tensor]:
    return {"weight": torch.ones(shape, **place.made)}


def _features(place: Place) -> bool:
    return len(place.shape) >= 2 and place.shape[-1] > 0


def _sequence(place: Place) -> bool:
    return len(place.shape) == 3 and place.size(0, 1, 2) > 0


def _channels(*ndims: int) -> Callable[[Place], bool]:
    def fits(place: Place) -> bool:
        return len(place.shape) in ndims and all(place.shape[1:])

    return fits


def _batch_norm(*ndims: int) -> Callable[[Place], bool]:
    def fits(place: Place) -> bool:
        if not _channels(*ndims)(place) or place.shape[0] == 0:
            return False
        return place.size(0, *range(2, len(place.shape))) > 1

    return fits


def _instance_norm(place: Place) -> bool:
    return _channels(3, 4)(place) and place.shape[0] > 0 and place.size(*range(2, len(place.shape))) > 1


def _last(place: Place, out: int = 0, **_: Any) -> Shape:
    return (*place.shape[:-1], out or place.shape[-1])


def _second(place: Place, out: int = 0, **_: Any) -> Shape:
    return (place.shape[0], out or place.shape[1], *place.shape[2:])


def _conv(n: int, transposed: bool = False) -> Callable[..., nn.Module]:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)

    def build(place: Place, out: int, kernel: int, bias: bool, groups: bool) -> nn.Module:
        channels = place.shape[1]
        out = out or channels
        divides = groups and out % channels == 0
        made: Any = kinds[n - 1]
        return made(
            channels,
            out,
            kernel,
            padding=kernel // 2,
            bias=bias,
            groups=channels if divides else 1,
            **place.made,
        )

    return build


def _linear(place: Place, out: int, bias: bool) -> nn.Module:
    return nn.Linear(place.shape[-1], out or place.shape[-1], bias=bias, **place.made)


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


def _rotary(place: Place, repeated: bool) -> nn.Module:
    """Heads of two features, turned by their positions, that share one head of keys and values."""
    _, length, n = place.shape
    angles = torch.arange(length, **place.made)[:, None]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attended(x: Tensor, queries: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = turned((x @ queries).unflatten(-1, (n // 2, 2)).transpose(1, 2), cos, sin)
        k, v = (x @ shared).unsqueeze(1).chunk(2, -1)
        k = turned(k, cos, sin)
        if repeated:
            k, v = (t.repeat_interleave(n // 2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeated)
        return y.transpose(1, 2).flatten(-2)

    params = {"queries": torch.ones(n, n, **place.made), "shared": torch.ones(n, 4, **place.made)}
    return Op(attended, params, {"cos": angles.cos(), "sin": angles.sin()})


def _scan(place: Place, how: str) -> nn.Module:
    """A gated linear recurrence along the sequence, h[t] = a[t] h[t-1] + x[t]."""
    length = place.shape[1]

    def loop(log_a: Tensor, u: Tensor) -> Tensor:
        h, hs = torch.zeros_like(u[:, 0]), []
        for t in range(length):
            h = log_a[:, t].exp() * h + u[:, t]
            hs.append(h)
        return torch.stack(hs, 1)

    def cumsum(log_a: Tensor, u: Tensor) -> Tensor:
        total = log_a.cumsum(1)
        return total.exp() * (u * (-total).exp()).cumsum(1)

    def doubling(log_a: Tensor, u: Tensor) -> Tensor:
        a, step = log_a.exp(), 1
        while step < length:
            u = u + a * F.pad(u, (0, 0, step, 0))[:, :length]
            a = a * F.pad(a, (0, 0, step, 0), value=1.0)[:, :length]
            step *= 2
        return u

    scans = {"loop": loop, "cumsum": cumsum, "doubling": doubling}
    return Op(lambda x, w: scans[how](F.logsigmoid(x * w), x), _weight(place, place.shape[-1]))


def _layer_norm(place: Place, affine: str) -> nn.Module:
    return nn.LayerNorm(
        place.shape[-1], elementwise_affine=affine != "none", bias=affine == "both", **place.made
    )


def _group_norm(place: Place, groups: int, affine: bool) -> nn.Module:
    channels = place.shape[1]
    return nn.GroupNorm(groups if channels % groups == 0 else 1, channels, affine=affine, **place.made)


def _batched_norm(place: Place, affine: bool, stats: bool, momentum: float | None) -> nn.Module:
    kind: Any = nn.BatchNorm2d if len(place.shape) == 4 else nn.BatchNorm1d
    return kind(place.shape[1], affine=affine, track_running_stats=stats, momentum=momentum, **place.made)


def _instanced_norm(place: Place, affine: bool, stats: bool) -> nn.Module:
    kind: Any = nn.InstanceNorm2d if len(place.shape) == 4 else nn.InstanceNorm1d
    return kind(place.shape[1], affine=affine, track_running_stats=stats, **place.made)


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


def _recurrent(place: Place, kind: str, hidden: int, layers: int, both: bool, states: bool) -> nn.Module:
    kinds: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    layer = kinds[kind](place.shape[-1], hidden, layers, bidirectional=both, batch_first=True, **place.made)
    return Recurrent(layer, states)


def _cell(place: Place, kind: str, hidden: int, steps: int) -> nn.Module:
    kinds: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
    return Cell(kinds[kind](place.shape[-1], hidden, **place.made), steps)


def _heads(place: Place, heads: int) -> int:
    return heads if place.shape[-1] % heads == 0 else 1


def _attention(place: Place, heads: int, weights: bool, masked: bool, dropout: float) -> nn.Module:
    features = place.shape[-1]
    attention = nn.MultiheadAttention(
        features, _heads(place, heads), dropout=dropout, batch_first=True, **place.made
    )
    return Attention(attention, weights, masked)


def _transformer(place: Place, heads: int, decoder: bool, norm_first: bool, dropout: float) -> nn.Module:
    kind: Any = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(
        place.shape[-1],
        _heads(place, heads),
        2,
        dropout=dropout,
        batch_first=True,
        norm_first=norm_first,
        **place.made,
    )
    return Decoder(layer) if decoder else layer


def _bilinear(place: Place, out: int) -> nn.Module:
    layer = nn.Bilinear(place.shape[-1], place.shape[-1], out or place.shape[-1], **place.made)
    return Twice(layer, torch.tanh)


def _position(place: Place, kind: str) -> nn.Module:
    n, features = place.shape[-2], place.shape[-1]
    if kind == "table":
        return Op(lambda x, w: x + w[: x.shape[-2]], _weight(place, n + 1, features))
    if kind == "embedding":
        return Op(
            lambda x, w: x + F.embedding(torch.arange(n, device=w.device), w), _weight(place, n + 1, features)
        )
    return Op(
        lambda x, w: torch.cat([w[: x.shape[-2]].expand_as(x), x], -2)[..., n:, :],
        _weight(place, n, features),
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
    return Op(functions[kind], _weight(place, place.shape[-1]))


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
    layer = Op(functions[kind], _weight(place, place.shape[-1]))
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


def _pool(place: Place, kind: str) -> nn.Module:
    flat = len(place.shape) == 3
    kinds: dict[str, Any] = {
        "max": F.max_pool1d if flat else F.max_pool2d,
        "average": F.avg_pool1d if flat else F.avg_pool2d,
    }
    function = kinds[kind]
    return Op(lambda x: function(x, 3, stride=1, padding=1))


def _mixing(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "gram": lambda x: x @ (x.transpose(-1, -2) @ x),
        "softmax": lambda x: x.softmax(-1),
        "einsum": lambda x: torch.einsum("...ij,...kj->...ik", x, x).sum(-1, keepdim=True) + x,
    }
    return Op(functions[kind])


def _product(place: Place, kind: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "matmul": lambda x, w: x @ w,
        "transposed": lambda x, w: x @ w.t() + x @ w,
        "einsum": lambda x, w: torch.einsum("...i,ij->...j", x, w),
        "bmm": lambda x, w: torch.matmul(x, w.expand(*x.shape[:-2], *w.shape)),
        "chain": lambda x, w: x @ (w @ w),
    }
    n = place.shape[-1]
    return Op(functions[kind], _weight(place, n, n))


def _unused(place: Place) -> nn.Module:
    return Op(lambda x, w: x * 1, _weight(place, 2))


_OUT = (0, 1, 2, 4)
_YES = (True, False)
_NO = (False, True)

LAYERS: dict[str, Layer] = {
    "linear": Layer(
        _linear,
        lambda p: len(p.shape) >= 1,
        {"out": _OUT, "bias": _YES},
        _last,
        fresh=True,
        complex=True,
        tags="dense sequence attention recurrent weights state",
    ),
    "activation": Layer(
        _activation,
        options={
            "kind": ("relu", "tanh", "sigmoid", "gelu", "silu", "leaky", "hardswish", "elu"),
            "inplace": _NO,
        },
        tags="dense image recurrent",
    ),
    "complex activation": Layer(
        _activation,
        lambda p: p.dtype.is_complex,
        {"kind": ("tanh", "sigmoid"), "inplace": _NO},
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
    "product": Layer(
        _product,
        lambda p: len(p.shape) >= 2,
        {"kind": ("matmul", "transposed", "einsum", "bmm", "chain")},
        complex=True,
        tags="dense weights",
    ),
    "custom function": Layer(
        lambda place: Op(lambda x, w: Product.apply(x, w), _weight(place, place.shape[-1], place.shape[-1])),
        lambda p: len(p.shape) >= 2,
        complex=True,
        autocast=False,
        tags="weights",
    ),
    "mixing": Layer(
        _mixing,
        lambda p: len(p.shape) >= 2 and p.size(*range(len(p.shape))) > 0,
        {"kind": ("softmax", "gram", "einsum", "attention")},
        tags="attention",
    ),
    "derived weight": Layer(
        lambda place, how: Scaled(place.shape[-1], how, place),
        _features,
        {"how": ("lora", "cat", "cast", "stack", "in place", "no grad")},
        fresh=True,
        complex=True,
        autocast=False,
        tags="weights",
    ),
    "normalised weight": Layer(
        _normalised,
        lambda p: _features(p) and not p.low,
        {"how": ("weight", "spectral")},
        fresh=True,
        tags="weights state",
    ),
    "adapter": Layer(
        lambda place, merged: Adapted(place.shape[-1], merged, place),
        _features,
        {"merged": _NO},
        fresh=True,
        tags="weights dense",
    ),
    "parametrized": Layer(
        _parametrized,
        _features,
        {"how": ("symmetric", "softplus"), "used": (1, 2)},
        fresh=True,
        tags="weights",
    ),
    "experts": Layer(
        _experts,
        lambda p: _features(p) and not p.low and p.size(*range(len(p.shape))) > 0,
        {"capacity": (0, 2)},
        fresh=True,
        autocast=False,
        tags="sequence weights",
    ),
    "unused": Layer(_unused, fresh=True, complex=True, tags="weights"),
    "layer norm": Layer(
        _layer_norm,
        lambda p: len(p.shape) >= 2 and p.shape[-1] > 0,
        {"affine": ("both", "weight", "none")},
        fresh=True,
        tags="dense sequence attention",
    ),
    "rms norm": Layer(
        lambda place, affine: nn.RMSNorm(place.shape[-1], elementwise_affine=affine, **place.made),
        _features,
        {"affine": _YES},
        tags="dense sequence attention",
    ),
    "group norm": Layer(
        _group_norm,
        lambda p: _channels(2, 3, 4)(p) and p.size(*range(len(p.shape))) not in (1, 2),
        {"groups": (1, 2), "affine": _YES},
        fresh=True,
        tags="image",
    ),
    "batch norm": Layer(
        _batched_norm,
        _batch_norm(2, 3, 4),
        {"affine": _YES, "stats": _YES, "momentum": (0.1, None)},
        fresh=True,
        tags="image state dense",
    ),
    "instance norm": Layer(
        _instanced_norm,
        _instance_norm,
        {"affine": _YES, "stats": _YES},
        tags="image state",
    ),
    "prelu": Layer(
        lambda place, each: nn.PReLU(place.shape[1] if each and len(place.shape) > 1 else 1, **place.made),
        lambda p: len(p.shape) >= 1 and all(p.shape[1:2]),
        {"each": _NO},
        autocast=False,
        tags="dense image",
    ),
    "dropout": Layer(
        _dropout,
        lambda p: len(p.shape) >= 2,
        {
            "kind": ("plain", "features", "alpha", "feature alpha"),
            "p": (0.25, 0.5, 0.0, 1.0),
            "inplace": _NO,
        },
        tags="dense image attention state",
    ),
    "bilinear": Layer(
        _bilinear,
        lambda p: _features(p) and all(p.shape),
        {"out": _OUT},
        _last,
        autocast=False,
        tags="dense",
    ),
    "conv1d": Layer(
        _conv(1),
        _channels(3),
        {"out": _OUT, "kernel": (3, 1), "bias": _YES, "groups": _NO},
        _second,
        fresh=True,
        complex=True,
        tags="image sequence",
    ),
    "conv2d": Layer(
        _conv(2),
        _channels(4),
        {"out": _OUT, "kernel": (3, 1), "bias": _YES, "groups": _NO},
        _second,
        fresh=True,
        complex=True,
        tags="image",
    ),
    "conv transpose 1d": Layer(
        _conv(1, True),
        _channels(3),
        {"out": _OUT, "kernel": (3, 1), "bias": _YES, "groups": _NO},
        _second,
        fresh=True,
        tags="image",
    ),
    "conv transpose 2d": Layer(
        _conv(2, True),
        _channels(4),
        {"out": _OUT, "kernel": (3, 1), "bias": _YES, "groups": _NO},
        _second,
        fresh=True,
        tags="image",
    ),
    "pool": Layer(_pool, _channels(3, 4), {"kind": ("max", "average")}, tags="image"),
    "position": Layer(
        _position,
        lambda p: len(p.shape) >= 2 and p.shape[-1] > 0,
        {"kind": ("table", "embedding", "cat")},
        tags="sequence attention weights",
    ),
    "recurrent": Layer(
        _recurrent,
        _sequence,
        {"kind": ("lstm", "gru", "rnn"), "hidden": (1, 2), "layers": (1, 2), "both": _NO, "states": _NO},
        lambda p, hidden, both, **_: (*p.shape[:-1], hidden * (1 + both)),
        autocast=False,
        tags="recurrent",
    ),
    "cell": Layer(
        _cell,
        lambda p: len(p.shape) == 2 and all(p.shape),
        {"kind": ("lstm", "gru", "rnn"), "hidden": (1, 2), "steps": (1, 2)},
        lambda p, hidden, **_: (p.shape[0], hidden),
        autocast=False,
        tags="recurrent dense",
    ),
    "attention": Layer(
        _attention,
        _sequence,
        {"heads": (1, 2), "weights": _NO, "masked": _NO, "dropout": (0.0, 0.25)},
        tags="attention",
    ),
    "rotary attention": Layer(
        _rotary,
        lambda p: _sequence(p) and p.shape[-1] % 2 == 0,
        {"repeated": _NO},
        tags="attention",
    ),
    "scan": Layer(
        _scan,
        lambda p: _sequence(p) and not p.low,
        {"how": ("loop", "cumsum", "doubling")},
        tags="sequence recurrent",
    ),
    "transformer": Layer(
        _transformer,
        _sequence,
        {"heads": (1, 2), "decoder": _NO, "norm_first": _NO, "dropout": (0.0, 0.25)},
        tags="attention",
    ),
    "counting": Layer(lambda place: Counting(place), fresh=True, complex=True, tags="state"),
}
"""Every layer by name."""
