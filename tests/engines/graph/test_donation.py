"""Residuals that are written over: only where nobody else can see them."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from gated import Gated
from torch import Tensor, nn

import funcstage as fs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def stage() -> Any:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(nn.Sequential(Gated(), Gated()).to(DEVICE))
    return fs.compile(apply, backend="inductor"), params, buffers, torch.randn(6, 8, device=DEVICE)


def eager(stage: Any, cotangent: Tensor) -> list[Tensor]:
    fast, params, _, x = stage
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in params.values())]
    output = torch.func.functional_call(fast.module, dict(zip(params, leaves[1:], strict=True)), leaves[0])
    return list(torch.autograd.grad(output, leaves, cotangent))


def assert_gradients(stage: Any, dx: Tensor, grads: dict[str, Tensor], cotangent: Tensor) -> None:
    for ours, theirs in zip([dx, *grads.values()], eager(stage, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_residuals_of_nobody_else_are_written_over(stage: Any) -> None:
    output, _, pullback = fs.stage_vjp(*stage)
    residuals = pullback._tape.leaves()
    before = [residual.clone() for residual in residuals]
    cotangent = torch.randn_like(output)
    (dx,), weight_pullback = pullback(cotangent)
    assert_gradients(stage, dx, weight_pullback(), cotangent)
    assert any(not torch.equal(a, b) for a, b in zip(before, residuals, strict=True))


@pytest.mark.parametrize("half", ["pullback", "weight pullback"])
def test_residuals_that_somebody_holds_are_not(stage: Any, half: str) -> None:
    output, _, pullback = fs.stage_vjp(*stage)
    cotangent = torch.randn_like(output)
    if half == "pullback":
        held = optree.tree_leaves(pullback, namespace="funcstage")
        before = [residual.clone() for residual in held]
        (dx,), weight_pullback = pullback(cotangent)
    else:
        (dx,), weight_pullback = pullback(cotangent)
        held = optree.tree_leaves(weight_pullback, namespace="funcstage")
        before = [residual.clone() for residual in held]
    assert_gradients(stage, dx, weight_pullback(), cotangent)
    for a, b in zip(before, held, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_a_retained_pullback_is_not_disturbed_by_what_comes_of_it(stage: Any) -> None:
    output, _, pullback = fs.stage_vjp(*stage)
    early = torch.randn_like(output)
    (early_dx,), waits = pullback(early, retain=True)
    for cotangent in torch.randn(3, *output.shape, device=DEVICE):
        (dx,), weight_pullback = pullback(cotangent, retain=True)
        assert_gradients(stage, dx, weight_pullback(), cotangent)
    cotangent = torch.randn_like(output)
    (dx,), weight_pullback = pullback(cotangent)
    weight_pullback(retain=True)["0.both.bias"].zero_()
    grads = weight_pullback(retain=True)
    assert_gradients(stage, dx, grads, cotangent)
    assert_gradients(stage, dx, weight_pullback(), cotangent)
    assert_gradients(stage, early_dx, waits(), early)


def test_what_the_caller_gave_and_got_stays_as_it_was(stage: Any) -> None:
    *_, x = stage
    output, _, pullback = fs.stage_vjp(*stage)
    cotangent = torch.randn_like(output)
    before = [t.clone() for t in (x, output, cotangent)]
    (dx,), weight_pullback = pullback(cotangent)
    first = dx.clone()
    weight_pullback()
    for a, b in zip([*before, first], (x, output, cotangent, dx), strict=True):
        assert torch.equal(a, b)


def test_a_cotangent_that_w_reads_itself_stays_as_it_was() -> None:
    stage = fs.compile(lambda params, buffers, x: (x.sin() * params, buffers), backend="inductor")
    x, weight, cotangent = (torch.randn(64, 64, device=DEVICE) for _ in range(3))
    before = cotangent.clone()
    _, weight_pullback = fs.stage_vjp(stage, weight, (), x)[2](cotangent)
    torch.testing.assert_close(weight_pullback(), before * x.sin())
    assert torch.equal(cotangent, before)


def test_a_gradient_that_was_summed_up_early_is_handed_over_and_not_copied() -> None:
    apply, params, buffers = fs.functionalize(Gated())
    x = torch.randn(2**16, 8)  # sums of little are left to W
    output, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
    _, weight_pullback = pullback(torch.randn_like(output))
    held = {residual.data_ptr() for residual in weight_pullback._tape.leaves()}
    assert weight_pullback()["norm.weight"].data_ptr() in held


@pytest.mark.parametrize("remat", ["none", "min_cut", "full"])
def test_where_no_input_is_differentiated_nothing_is_summed_before_w(remat: Any) -> None:
    apply, params, buffers = fs.functionalize(Gated())
    compiled = fs.compile(apply, backend="aten", remat=remat)
    for argnums, computes in ((0, True), ((), False)):
        programs = compiled.programs(params, buffers, torch.randn(2**16, 8), argnums=argnums)
        assert any(node.op == "call_function" for node in programs.input_grad.graph.nodes) == computes


def test_what_is_computed_again_for_the_weights_frees_its_operands_at_once() -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(Gated(), Gated()))
    programs = fs.compile(apply, backend="aten").programs(params, buffers, torch.randn(64, 8))
    nodes = [node for node in programs.input_grad.graph.nodes if node.op == "call_function"]
    products = [i for i, node in enumerate(nodes) if "mm" in str(node.target)]
    units = [i for i, node in enumerate(nodes) if "silu.default" in str(node.target)]
    assert len(units) == 2
    assert products[0] < units[0] < products[1]
    assert products[2] < units[1] < products[3]
    assert all(nodes.index(user) < products[1] for user in nodes[units[0]].users)
