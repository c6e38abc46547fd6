"""Recurrent layers, attention and scans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from funcstage.testing.layers.base import (
    NO,
    Layer,
    Op,
    Place,
    sequence,
    weight,
)


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
    return Op(lambda x, w: scans[how](F.logsigmoid(x * w), x), weight(place, place.shape[-1]))


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


LAYERS: dict[str, Layer] = {
    "recurrent": Layer(
        _recurrent,
        sequence,
        {"kind": ("lstm", "gru", "rnn"), "hidden": (1, 2), "layers": (1, 2), "both": NO, "states": NO},
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
        sequence,
        {"heads": (1, 2), "weights": NO, "masked": NO, "dropout": (0.0, 0.25)},
        tags="attention",
    ),
    "rotary attention": Layer(
        _rotary,
        lambda p: sequence(p) and p.shape[-1] % 2 == 0,
        {"repeated": NO},
        tags="attention",
    ),
    "scan": Layer(
        _scan,
        lambda p: sequence(p) and not p.low,
        {"how": ("loop", "cumsum", "doubling")},
        tags="sequence recurrent",
    ),
    "transformer": Layer(
        _transformer,
        sequence,
        {"heads": (1, 2), "decoder": NO, "norm_first": NO, "dropout": (0.0, 0.25)},
        tags="attention",
    ),
}
