"""Tensors of classes of the user's, which torch tells of its functions: right uncompiled, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import funcstage as fs


class Image(Tensor):
    """Only keeps its class, as those of torchvision and fastai do."""


class Noted(Tensor):
    """Keeps what is noted on it, as MONAI's does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        notes = [arg.scale for arg in args if hasattr(arg, "scale")]
        if isinstance(found, cls) and notes:
            found.scale = notes[0]  # type: ignore[attr-defined]
        return found


class Doubling(Tensor):
    """Has a sine of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func in (torch.sin, Tensor.sin) else found


class DoublingWeight(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func is F.linear else found


def noted(x: Tensor, scale: float) -> Any:
    found: Any = x.as_subclass(Noted)
    found.scale = scale
    return found


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


class Stage(nn.Module):
    def __init__(self, computes: Callable[[Any, Tensor], Any], holds: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        if holds:  # what is split on a plain tape from its first run on
            self.register_buffer("held", torch.ones(4).as_subclass(Doubling))
            self.kept = torch.ones(4).as_subclass(Doubling)
        self.computes = computes

    def forward(self, x: Tensor) -> Any:
        return self.computes(self, x)


def _within(m: Any, x: Tensor) -> Tensor:
    y = noted(m.proj(x), 3.0) * 2
    return plain(y * y.scale)


COMPUTES: dict[str, Callable[[Any, Tensor], Any]] = {
    "its class": lambda m, x: (lambda y: plain(y) * isinstance(y, Image))(m.proj(x).as_subclass(Image) * 2),
    "what is noted on it": _within,
    "a function of its own": lambda m, x: plain(torch.sin(m.proj(x).as_subclass(Doubling))),
    "of a weight": lambda m, x: F.linear(x, plain(m.proj.weight.as_subclass(Doubling).sin()), m.proj.bias),
    "of a constant": lambda m, x: m.proj(x) * plain(torch.ones(4).as_subclass(Doubling).sin()),
    "of a buffer": lambda m, x: m.proj(x) * plain(m.held.sin()),
    "of what is held": lambda m, x: m.proj(x) * plain(m.kept.sin()),
    "an argument": lambda m, x: m.proj(plain(torch.sin(x))),
    "a region": lambda m, x: checkpoint(lambda y: y * 2, m.proj(x), use_reentrant=False),
}


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("of", [Tensor, Image, Doubling])
@pytest.mark.parametrize("computes", COMPUTES)
def test_a_forward_computes_with_tensors_of_other_classes(computes: str, of: Any, argnums: Any) -> None:
    module = Stage(COMPUTES[computes], holds=computes in ("of a buffer", "of what is held"))
    x = torch.randn(3, 4).as_subclass(of)
    leaf = x.detach().clone().requires_grad_()
    expected = module(leaf)
    wanted = [leaf] if argnums else []
    wanted = torch.autograd.grad(plain(expected).sum(), [*wanted, *module.parameters()])
    apply, params, buffers = fs.functionalize(module)
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        assert type(output) is type(expected)
        torch.testing.assert_close(plain(output), plain(expected).detach())
        grads, weight_pullback = pullback(torch.ones(3, 4))
        found = [*(grads if argnums else []), *weight_pullback().values()]
        torch.testing.assert_close([*map(plain, found)], [*map(plain, wanted)])


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.proj(x).as_subclass(Image) * 2


def test_the_output_is_of_the_class_that_the_forward_gives_it_last() -> None:
    for computes in (
        lambda m, x: m.proj(x).as_subclass(Image),
        lambda m, x: m.proj(x).as_subclass(Image) * 2,
    ):
        output, _, _ = fs.stage_vjp(*fs.functionalize(Stage(computes)), torch.randn(3, 4))
        assert type(output) is Image


def test_parameters_whose_class_has_functions_of_its_own_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight = DoublingWeight(torch.ones(4, 4))  # type: ignore[assignment]
    with pytest.raises(fs.StructureError, match=r"'0\.weight' is a DoublingWeight, whose __torch_function__"):
        fs.functionalize(module)


def test_what_is_differentiated_in_turn_refuses_them() -> None:
    apply, params, buffers = fs.functionalize(Stage(COMPUTES["what is noted on it"]))
    params = {name: p.requires_grad_() for name, p in params.items()}
    with pytest.raises(fs.StageError, match=r"class of its own \((Noted|Doubling)\), and is differ"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))
