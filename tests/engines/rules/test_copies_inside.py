"""Copies that a forward makes of tensors and layers are eager's: without a history, or refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcstage as fs


class Layers(nn.Module):
    """Layers, and what a case makes of them."""

    def __init__(self, case: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj, self.more, self.case = nn.Linear(4, 4), nn.Linear(4, 4), case
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.teacher: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def of_a_weight(s: Any, x: Tensor) -> Tensor:
    return F.linear(s.proj(x), copy.deepcopy(s.proj.weight))


def of_a_layer(s: Any, x: Tensor) -> Tensor:
    y: Tensor = copy.deepcopy(s.more)(x) + s.proj(x)
    return y


def of_the_input(s: Any, x: Tensor) -> Tensor:
    y: Tensor = s.proj(x) * copy.deepcopy(x)
    return y


def of_constants(s: Any, x: Tensor) -> Tensor:
    y: Tensor = s.proj(x) * copy.deepcopy(torch.ones(4)) * copy.deepcopy(s.scale)
    return y


def of_one_tensor_twice(s: Any, x: Tensor) -> Tensor:
    first, second = copy.deepcopy([s.proj.weight, s.proj.weight])
    assert first is second
    return F.linear(s.proj(x), first)


def of_a_detached_activation(s: Any, x: Tensor) -> Tensor:
    h = s.proj(x)
    y: Tensor = s.more(h) * copy.deepcopy(h.detach())
    return y


def kept_as_a_teacher(s: Any, x: Tensor) -> Tensor:
    if not s.teacher:
        s.teacher.append(copy.deepcopy(s.more))
    with torch.no_grad():
        target = s.teacher[0](x)
    y: Tensor = s.proj(x) * target
    return y


def of_a_layer_for_a_gradient(s: Any, x: Tensor) -> Tensor:
    layer = copy.deepcopy(s.more)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(layer(x.detach()).tanh().sum(), layer.weight)
    return F.linear(s.proj(x), grad)


COPIES = [
    of_a_weight,
    of_a_layer,
    of_the_input,
    of_constants,
    of_one_tensor_twice,
    of_a_detached_activation,
    kept_as_a_teacher,
    of_a_layer_for_a_gradient,
]


def assert_split_is_eagers(stage: Any, module: nn.Module, x: Tensor, argnums: Any = None) -> None:
    output, _, pullback = fs.stage_vjp(*stage, x, argnums=argnums)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_(argnums is None)
    expected = module(leaf)
    wanted = [*([leaf] if argnums is None else []), *module.parameters()]
    grads = torch.autograd.grad(expected.sum(), wanted, allow_unused=True)
    found = [*([dx] if argnums is None else []), *weight_pullback().values()]
    torch.testing.assert_close([output, *found], [expected.detach(), *grads])


@pytest.mark.parametrize("argnums", [None, ()])
@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("case", COPIES)
def test_deep_copies_in_a_forward_are_eagers_or_refused(case: Any, engine: Any, argnums: Any) -> None:
    module, x = Layers(case), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    twin = copy.deepcopy(module)
    if engine == "aten":
        stage = fs.compile(apply, backend=engine, fullgraph=True)
        with pytest.raises(fs.TraceError, match="The uncompiled `apply` works"):
            fs.stage_vjp(stage, params, buffers, x, argnums=argnums)
        return
    for _ in range(2):
        assert_split_is_eagers((apply, params, buffers), twin, x, argnums)


def test_a_deep_copy_of_an_activation_is_eagers_error() -> None:
    module = Layers(lambda s, x: s.more(copy.deepcopy(s.proj(x))))
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))


@pytest.mark.parametrize("read", [copy.copy, lambda weight: torch.tensor(len(pickle.dumps(weight)) > 0)])
def test_shallow_copies_and_pickles_of_parameters_are_constants(read: Any) -> None:
    module, x = Layers(lambda s, x: s.proj(x) + read(s.more.weight).sum(0)), torch.randn(3, 4)
    assert_split_is_eagers(fs.functionalize(module), module, x)


@pytest.mark.parametrize("copies", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_shallow_copies_and_pickles_of_tensors_are_refused_with_a_way_out(copies: Any) -> None:
    module = Layers(lambda s, x: s.proj(x) + copies(x))
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(fs.StageError, match=r"copy\.copy.*tensor\.detach\(\)"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))
