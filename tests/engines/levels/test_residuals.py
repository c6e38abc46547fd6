"""What pullbacks hold: bytes, leaves, and memory that is given back at the right moment."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

NAMESPACE = "funcstage"


class Watched(nn.Module):
    """Two linear layers; notes the value between them, which W needs."""

    def __init__(self, refs: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.refs = refs

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).cos()
        self.refs.append(weakref.ref(torch._C._functorch.get_unwrapped(h)))
        return self.second(h)


def forward(module: nn.Module, x: Tensor) -> fs.Pullback:
    return fs.stage_vjp(*fs.functionalize(module), x)[2]


def test_nbytes_are_those_of_the_residuals_and_parameters_are_not_counted() -> None:
    x = torch.randn(8, 4)
    pullback = forward(nn.Linear(4, 5, bias=False), x)
    assert pullback.nbytes == x.nbytes  # W reads the input; I reads only the weight
    _, weight_pullback = pullback(torch.ones(8, 5))
    assert pullback.nbytes == 0
    assert weight_pullback.nbytes == x.nbytes + 8 * 5 * 4
    weight_pullback()
    assert weight_pullback.nbytes == 0


def test_tensors_that_several_nodes_saved_count_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(8, 4)
    assert forward(module, x).nbytes == 3 * x.nbytes  # x, and each tanh's output
    views = [x, x[:2], x.t()]
    assert sum(leaf.nbytes for leaf in views) > x.nbytes
    from funcstage.residuals import nbytes

    assert nbytes(views) == x.nbytes


def test_what_only_i_needed_is_freed_by_i() -> None:
    refs: list[weakref.ref[Tensor]] = []

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            mask = (h * 3).sigmoid()  # sigmoid saves its output: needed by I alone
            refs.append(weakref.ref(torch._C._functorch.get_unwrapped(mask)))
            return self.second(mask + h)

    pullback = forward(Stage(), torch.randn(8, 4))
    gc.disable()
    try:
        assert refs[0]() is not None
        _, weight_pullback = pullback(torch.ones(8, 4))
        assert refs[0]() is None
        assert weight_pullback()["first.weight"] is not None
    finally:
        gc.enable()


def test_what_w_needs_is_freed_by_w_without_the_garbage_collector() -> None:
    refs: list[weakref.ref[Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        pullback = forward(Watched(refs), torch.randn(8, 4))
        _, weight_pullback = pullback(torch.ones(8, 4))
        assert refs[0]() is not None
        weight_pullback()
        assert refs[0]() is None
        forward(Watched(refs), torch.randn(8, 4))  # dropped unused
        assert refs[1]() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_thousand_microbatches_leave_no_tensor_behind() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    apply, params, buffers = fs.functionalize(module)
    x, cotangent = torch.randn(8, 4), torch.ones(8, 2)
    state: Any = buffers
    gradients = None

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    for i in range(1000):
        _, state, pullback = fs.stage_vjp(apply, params, state, x)
        _, weight_pullback = pullback(cotangent)
        gradients = fs.stage_backward_weight(weight_pullback, gradients)
        del pullback, weight_pullback
        if i in (10, 999):
            counts.append(alive())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pullbacks_are_pytrees_of_their_residuals(device: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, cotangent = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    pullback = forward(module, x)
    leaves = optree.tree_leaves(pullback, namespace=NAMESPACE)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) == pullback.nbytes
    parked = optree.tree_map(lambda t: t.to(device, copy=True), pullback, namespace=NAMESPACE)
    moved_leaves = optree.tree_leaves(parked, namespace=NAMESPACE)
    assert {leaf.device.type for leaf in moved_leaves} == {device}
    values = iter(leaves)
    back = optree.tree_map(lambda t: next(values).clone(), parked, namespace=NAMESPACE)
    (dx,), weight_pullback = back(cotangent)
    (expected_dx,), expected_pullback = pullback(cotangent)
    moved_weights = optree.tree_map(torch.clone, weight_pullback, namespace=NAMESPACE)
    expected = expected_pullback()
    assert torch.equal(dx, expected_dx)
    for got in (weight_pullback(), moved_weights()):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    for used in (back, weight_pullback, moved_weights):
        assert used.consumed
        assert optree.tree_leaves(used, namespace=NAMESPACE) == []


def test_moving_the_residuals_away_frees_the_originals() -> None:
    refs: list[weakref.ref[Tensor]] = []
    module, x, cotangent = Watched(refs), torch.randn(8, 4), torch.randn(8, 4)
    expected = forward(module, x)(cotangent)[1]()
    pullback = forward(module, x)
    parked = optree.tree_map(torch.clone, pullback, namespace=NAMESPACE)
    assert refs[1]() is not None
    del pullback
    gc.collect()
    assert refs[1]() is None
    got = parked(cotangent)[1]()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
