"""A byte-level transformer language model (pre-norm, learned positions), and where to cut it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from funcstage.pipelining import cut

WIDTH = 128
HEADS = 4
CONTEXT = 128
_VOCABULARY = 256


class Embedding(nn.Module):
    """Bytes, int64 `[batch, length]`, to vectors `[batch, length, width]`.

    Each byte is embedded together with the two before it, by a table for each place: what follows from
    these alone is learnt in a few steps, and the blocks are left with the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(_VOCABULARY, WIDTH) for _ in range(3))
        self.position = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        for table in self.parameters():
            nn.init.normal_(table, std=0.5)

    def forward(self, text: Tensor) -> Tensor:
        x = self.position[: text.shape[1]]
        for lag, table in enumerate(self.tables):
            x = x + table(functional.pad(text, (lag, 0))[:, : text.shape[1]])
        return x


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = _quiet(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), Attention())
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), _quiet(nn.Linear(4 * WIDTH, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.perceptron(x)


def _quiet(linear: nn.Linear) -> nn.Linear:
    """Start a residual branch near zero, so that it does not drown what it is added to."""
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def build_model(num_stages: int) -> nn.Sequential:
    """Build the model, with blocks for so many stages: four, or one a stage."""
    parts = {
        "embedding": Embedding(),
        "blocks": nn.Sequential(*(Block() for _ in range(max(4, num_stages)))),
        "norm": nn.LayerNorm(WIDTH),
        "head": nn.Linear(WIDTH, _VOCABULARY),
    }
    return nn.Sequential(OrderedDict(parts))


def cut_evenly(model: nn.Sequential, num_stages: int) -> list[nn.Module]:
    """Cut the model so that its blocks are spread evenly over the stages."""
    blocks = len(list(model.get_submodule("blocks").children()))
    return cut(model, at=[f"blocks.{blocks * i // num_stages}" for i in range(1, num_stages)])


def build_stages(num_stages: int) -> list[nn.Module]:
    """Build the model as stages; composed they are the whole model."""
    return cut_evenly(build_model(num_stages), num_stages)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; logits `[batch, length, 256]`, targets `[batch, length]`."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
