"""What a checkpointed region finds around it when it runs again: what its first run found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.state.ambient import AmbientState, RandomState, generators_kept, of_process, of_torch


@contextmanager
def casting_to(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", dtype)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cpu", before)


class Region(nn.Module):
    """A region that reads the settings, each in an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def inside(self, x: Tensor) -> Tensor:
        outside = self.first(x * torch.ones(8).to(x))
        with torch.autocast("cpu"):
            cast = self.last(outside.float())
        return cast.float() + outside.float()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False).sin()


SETTINGS: dict[str, tuple[Any, Any]] = {
    "autocast, then none": (lambda: torch.autocast("cpu", torch.bfloat16), nullcontext),
    "none, then autocast": (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)),
    "two dtypes": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ),
    "a dtype for autocasts to come": (lambda: casting_to(torch.float16), nullcontext),
    "an autocast that keeps nothing": (
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        nullcontext,
    ),
    "another default device": (nullcontext, lambda: torch.device("meta")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_region_is_run_again_under_the_settings_of_its_first_run(name: str) -> None:
    around_f, around_i = SETTINGS[name]
    module, x = Region(), torch.randn(4, 8)
    apply, params, buffers = fs.functionalize(module)
    with around_f():
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        theirs = module(leaf := x.clone().requires_grad_())
    assert torch.equal(output, theirs)
    cotangent = torch.randn_like(theirs)
    with around_i():
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
        theirs.backward(cotangent)
    assert torch.equal(dx, leaf.grad)
    for key, weight in module.named_parameters():
        assert torch.equal(grads[key], weight.grad), key


def test_what_is_restored_is_left_again() -> None:
    with torch.autocast("cpu", torch.float16), torch.device("meta"):
        noted = AmbientState.now()
    before = AmbientState.now()
    assert noted != before
    with noted.restored():
        now = AmbientState.now()
        assert (now.autocast, now.casts, now.default_device) == (
            ("cpu",),
            noted.casts,
            torch.device("meta"),
        )
    assert AmbientState.now() == before


@pytest.mark.parametrize("draw", [lambda: torch.rand(3).tolist(), lambda: [random.random()]])
def test_generators_draw_the_same_again_and_go_on_as_if_nothing_was_drawn(draw: Any) -> None:
    noted = RandomState((*of_torch(), *of_process()))
    first, second = draw(), draw()
    noted.restore()
    assert draw() == first
    with noted.again():
        assert draw() == first
    with generators_kept((*of_torch(), *of_process())):
        assert draw() == second
    assert draw() == second


def test_generators_that_have_moved_are_named() -> None:
    noted = RandomState(of_process())
    assert noted.moved() == []
    random.random()
    assert noted.moved() == ["random"]
