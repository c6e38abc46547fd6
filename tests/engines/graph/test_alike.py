"""What makes a layer unlike any other: that of which nobody could tell whether two layers agree in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook

from funcstage._torch.tracing import FunctionalTensorMode, to_functional
from funcstage.engines.graph.alike import Unlike, description, surroundings


@pytest.fixture(autouse=True)
def in_a_trace() -> Iterator[None]:
    with FunctionalTensorMode():
        yield


REAL, COMPLEX = torch.ones(2), torch.ones(2, dtype=torch.complex64)


class Given:
    number = 3


def layer(**attributes: Any) -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    vars(module).update(attributes)
    return module


def hooked() -> nn.Module:
    module = layer()
    module.register_forward_hook(print)
    return module


def holding(tensor: Tensor) -> nn.Module:
    module = layer()
    module.register_buffer("own", tensor)
    return module


def test_layers_are_described_by_their_own_and_by_what_they_are_given() -> None:
    x, own = to_functional(REAL), to_functional(REAL)
    found = description(holding(own), ((x, {"n": [1, x]}), {}), [{"training"}, set()])
    assert [*map(id, found.tensors)] == [id(own), id(x)]
    assert found.apart.keys() == {(0, "training")}


CANNOT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "hooks": (hooked, tuple, "has hooks"),
    "a tensor of its own": (partial(holding, REAL), tuple, "none of the trace"),
    "a tensor it is given": (layer, lambda: (REAL,), "none of the trace"),
    "an object it is given": (layer, lambda: ([Given()],), "it is given a Given"),
    "a module elsewhere": (lambda: layer(other=[nn.ReLU()]), tuple, "not its own"),
    "a tensor elsewhere": (lambda: layer(other=(REAL,)), tuple, "not its own"),
    "an iterator": (lambda: layer(other=iter([1])), tuple, "not its own"),
    "what is a number in others": (lambda: layer(number=[1]), tuple, "number or string is none"),
    "conjugated": (layer, lambda: to_functional(COMPLEX).conj(), "conjugated or negated"),
    "negated": (layer, lambda: to_functional(COMPLEX).conj().imag, "conjugated or negated"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_a_layer_that_cannot_be_compared_is_unlike_any(name: str) -> None:
    make, given, why = CANNOT[name]
    module = make()
    with pytest.raises(Unlike, match=why):
        description(module, given(), [{"number"} & vars(module).keys(), set()])


SURROUNDINGS: dict[str, tuple[Callable[[], AbstractContextManager[object]], str]] = {
    "hooks on what is saved": (lambda: saved_tensors_hooks(lambda x: x, lambda x: x), "hooks run"),
    "hooks of all modules": (lambda: register_module_forward_hook(lambda *_: None), "hooks run"),
    "inference": (torch.inference_mode, "nobody notes"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_where_not_all_is_noticed_no_layer_is_like_another(name: str) -> None:
    around, why = SURROUNDINGS[name]
    assert surroundings() == surroundings()
    with around(), pytest.raises(Unlike, match=why):
        surroundings()
