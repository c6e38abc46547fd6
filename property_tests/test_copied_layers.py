"""Copies of one layer, some of them changed: what is traced once for its like is what tracing each gives."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from copied_layers import counted_copies
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pullbacks import assert_bitwise_equal, cotangents
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.testing import check_stage, strategies

SHARE = settings(max_examples=settings.default.max_examples // 4)


@dataclass
class Config:
    """What layers share, as those of libraries do."""

    scale: float = 0.5
    dropout: float = 0.0


class Layer(nn.Module):
    """A layer around a drawn module, which it runs for its mean."""

    def __init__(self, body: nn.Module, config: Config, reads: str) -> None:
        super().__init__()
        self.body, self.config, self.reads = body, config, reads
        self.norm, self.up, self.down = nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.number = 0
        self.power = 2

    def forward(
        self, x: Tensor, beginning: Tensor | None = None, notes: dict[str, Any] | None = None
    ) -> Tensor:
        dtype = self.up.weight.dtype
        h = self.down(F.gelu(self.up(self.norm(x.to(dtype))))) * self.config.scale
        h = F.dropout(h, self.config.dropout, self.training).to(x.dtype) ** self.power
        if self.reads == "number":
            h = h * (1 + self.number)
        elif self.reads == "name":
            h = h * getattr(self, "num" + "ber", 1)
        if beginning is not None:
            h = h + beginning
        if notes is not None:
            notes["sum"] = notes["sum"] + h.mean()
        return x + h + self.body(x.clone()).to(x.dtype).mean()  # which may write into it


class Deep(nn.Module):
    """Layers, which are handed something besides, or are checkpointed."""

    def __init__(self, layers: list[Layer], way: str) -> None:
        super().__init__()
        self.layers, self.way = nn.ModuleList(layers), way

    def forward(self, x: Tensor) -> Any:
        beginning = x * 2
        notes = {"sum": torch.zeros(())}
        for layer in self.layers:
            if self.way == "beginning":
                x = layer(x, beginning)
            elif self.way == "constant":
                x = layer(x, beginning.detach())
            elif self.way == "notes":
                x = layer(x, notes=notes)
            elif self.way == "checkpoint":
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x, notes["sum"]


def _forward(self: Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return type(self).forward(self, x.tanh(), *args, **kwargs)


def _replace_forward(layer: Layer) -> None:
    layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]


def _widen(layer: Layer) -> None:
    layer.up, layer.down = nn.Linear(3, 5), nn.Linear(5, 3)


WAYS = ("plain", "checkpoint", "constant", "beginning", "notes")
CHANGES: dict[str, Callable[[Layer], object]] = {
    "nothing": lambda layer: None,
    "an attribute": lambda layer: setattr(layer, "power", 3),
    "an attribute of another type": lambda layer: setattr(layer, "power", 2.0),
    "a new attribute": lambda layer: setattr(layer, "name", "other"),
    "its mode": lambda layer: layer.eval(),
    "the mode of a part": lambda layer: layer.body.eval(),
    "a frozen parameter": lambda layer: layer.up.weight.requires_grad_(False),
    "no bias": lambda layer: setattr(layer.down, "bias", None),
    "its dtype": lambda layer: [part.double() for part in (layer.norm, layer.up, layer.down)],
    "a shape": _widen,
    "an eps": lambda layer: setattr(layer.norm, "eps", 0.1),
    "a hook": lambda layer: layer.register_forward_hook(lambda module, args, result: result * 2),
    "a hook before": lambda layer: layer.up.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a hook of the backward": lambda layer: layer.up.register_full_backward_hook(
        lambda module, grads, _: tuple(None if grad is None else grad * 2 for grad in grads)
    ),
    "its forward": _replace_forward,
    "another config": lambda layer: setattr(layer, "config", Config(0.25, layer.config.dropout)),
    "an equal config": lambda layer: setattr(layer, "config", copy.copy(layer.config)),
    "a tied parameter": lambda layer: setattr(layer.norm, "bias", layer.norm.weight),
}


@st.composite
def deep(draw: st.DrawFn) -> Deep:
    """Draw a stage of copies of one layer, of which up to two are changed."""
    config = Config(dropout=draw(st.sampled_from((0.0, 0.5))))
    reads = draw(st.sampled_from(("nothing", "number", "name")))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    first = Layer(draw(strategies.modules(())), config, reads)
    layers = [first]
    for i in range(1, draw(st.integers(3, 5))):
        layers.append(copy.deepcopy(first))
        layers[i].config, layers[i].number = config, i % 2
        with torch.no_grad():
            for parameter in layers[i].parameters():
                parameter.mul_(1 + i / 16)
    for change in draw(st.lists(st.sampled_from([*CHANGES]), max_size=2)):
        CHANGES[change](draw(st.sampled_from(layers)))
    return Deep(layers, draw(st.sampled_from(WAYS)))


def run(module: Deep, x: Tensor, **options: Any) -> Any:
    """Output, new buffers and all gradients."""
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", **options)
    torch.manual_seed(0)
    output, new_buffers, pullback = fs.stage_vjp(compiled, params, buffers, x)
    input_grads, weight_pullback = pullback(cotangents(output, 0))
    return output, new_buffers, input_grads, weight_pullback()


@SHARE
@given(module=deep())
def test_copied_layers_give_to_the_bit_what_traced_ones_give(module: Deep) -> None:
    x = torch.linspace(-1, 1, 6).view(2, 3)
    assert_bitwise_equal(run(module, x, repeated=True), run(module, x, repeated=False))


@SHARE
@given(module=deep())
def test_copied_layers_give_what_eager_gives(module: Deep) -> None:
    # A region that runs again writes its buffers again, after F has handed them out.
    hypothesis.assume(module.way != "checkpoint" or not [*module.buffers()])
    x = torch.linspace(-1, 1, 6).view(2, 3)
    check_stage(
        module, x, engines=lambda apply: fs.compile(apply, backend="aten", repeated=True), flops=False
    )


def test_layers_of_generated_stages_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The properties above would hold of nothing otherwise."""
    copies = counted_copies(monkeypatch)

    @settings(max_examples=20, database=None, derandomize=True)
    @given(module=deep())
    def draw(module: Deep) -> None:
        run(module, torch.ones(2, 3), repeated=True)

    draw()
    assert sum(map(bool, copies)) > len(copies) / 5
