"""What a forward writes into objects among its arguments: as eager leaves it there, detached, or refused."""

from __future__ import annotations

import copy
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs


class Slotless:
    """As caches of keys and values are."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.table: dict[str, Any] = {}
        self.queue: deque[Any] = deque()
        self.inner = SimpleNamespace(last=None)
        self.seen = 0

    def tensors(self) -> list[Tensor]:
        nested = [t for pair in self.layers for t in pair]
        return [*nested, *self.table.values(), *self.queue, self.inner.last]


class Fills(nn.Linear):
    def forward(self, x: Tensor, cache: Slotless) -> Tensor:
        y = super().forward(x)
        cache.layers.append((y, x * 2))
        cache.table["y"] = y.tanh()
        cache.queue.append(self.weight * 2)
        cache.inner.last = y.detach()
        cache.seen += 1
        return y * cache.seen


def test_uncompiled_the_object_holds_what_eager_leaves_in_it() -> None:
    module, x = Fills(3, 3), torch.randn(4, 3)
    expected, cache = Slotless(), Slotless()
    apply, params, buffers = fs.functionalize(module)
    for _ in range(2):
        wanted = module(x, expected)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, cache=cache)
        assert torch.equal(output, wanted)
        grads = pullback(torch.ones_like(output))[1]()
        assert torch.allclose(grads["bias"], torch.full((3,), 4.0 * expected.seen))
    assert cache.seen == expected.seen == 2
    for ours, eagers in zip(cache.tensors(), expected.tensors(), strict=True):
        assert type(ours) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(ours)
        assert not ours.requires_grad
        assert torch.equal(ours, eagers.detach())
    copy.deepcopy(cache)


def test_compiled_it_is_refused_by_name_and_the_object_is_left_alone() -> None:
    apply, params, buffers = fs.functionalize(Fills(3, 3))
    cache = Slotless()
    with pytest.raises(fs.TraceError, match="writes into an object that it is handed as an argument"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.randn(4, 3), cache=cache)
    assert not cache.layers
    assert not cache.table
    assert cache.inner.last is None
    assert cache.seen == 0


def test_an_object_that_is_only_read_is_compiled() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor, settings: Any) -> Tensor:
            return super().forward(x) * (settings.seen + 2)

    module, x = Reads(3, 3), torch.randn(4, 3)
    apply, params, buffers = fs.functionalize(module)
    settings = Slotless()
    output, _, _ = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x, settings=settings)
    assert torch.allclose(output, module(x, settings))
