"""Offloading from a CUDA device: its memory is free, copies run beside it, gradients are right."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import nn

import funcstage as fs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDTH, ROWS = 512, 8192
ENGINES: list[dict[str, Any] | None] = [None, {"backend": "aten"}, {"backend": "aten", "cuda_graphs": True}]
IDS = ["uncompiled", "aten", "graphs"]


def stage(options: dict[str, Any] | None) -> tuple[nn.Module, Any, Any, Any]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6)]
    module = nn.Sequential(*layers).cuda()
    apply, params, buffers = fs.functionalize(module)
    return module, apply if options is None else fs.compile(apply, **options), params, buffers


@pytest.mark.parametrize("options", ENGINES, ids=IDS)
def test_many_microbatches_that_wait_on_the_host_have_the_gradients_of_eager(options: Any) -> None:
    module, apply, params, buffers = stage(options)
    batches = [torch.randn(ROWS, WIDTH, device="cuda") for _ in range(6)]
    waiting, inputs = [], []
    for x in batches:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = fs.offload(pullback)(torch.ones_like(output))
        inputs.append(dx)
        waiting.append(fs.offload(weight_pullback))
    for dx, weight_pullback, x in zip(inputs, waiting, batches, strict=True):
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])
        fs.prefetch(weight_pullback)
        torch.testing.assert_close([dx, *weight_pullback().values()], [*expected], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("options", ENGINES[:2], ids=IDS[:2])
def test_the_devices_memory_is_free_while_residuals_wait_in_pinned_memory(options: Any) -> None:
    _, apply, params, buffers = stage(options)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(ROWS, WIDTH, device="cuda"))
    _, weight_pullback = pullback(torch.ones_like(output))
    del output, pullback
    held, before = weight_pullback.nbytes, torch.cuda.memory_allocated()
    assert held >= 12 * ROWS * WIDTH * 4  # the input and the cotangent of each layer
    waiting = fs.offload(weight_pullback)
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # the allocator looks then whether copies are done
    assert before - torch.cuda.memory_allocated() >= 0.95 * held
    assert waiting.nbytes == held
    leaves: Any = optree.tree_leaves(waiting, namespace="funcstage")  # type: ignore[arg-type]
    assert all(leaf.device.type == "cpu" and leaf.is_pinned() for leaf in leaves)
    waiting()


@pytest.mark.parametrize("options", ENGINES, ids=IDS)
def test_what_overwrites_the_memory_at_once_does_not_reach_the_copies(options: Any) -> None:
    module, apply, params, buffers = stage(options)
    x = torch.randn(ROWS, WIDTH, device="cuda")
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf).sum(), [*module.parameters()])
    for _ in range(4):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        waiting = fs.offload(fs.offload(pullback)(torch.ones_like(output))[1])
        del output, pullback
        for _ in range(3):  # the same slot, the same blocks of memory
            again, _, other = fs.stage_vjp(apply, params, buffers, torch.full_like(x, float("nan")))
            other(torch.ones_like(again))[1]()
            del again, other
        torch.testing.assert_close([*waiting().values()], [*expected], rtol=1e-4, atol=1e-2)


def test_a_pullback_is_used_on_another_stream_than_it_was_fetched_on() -> None:
    module, apply, params, buffers = stage(None)
    x = torch.randn(ROWS, WIDTH, device="cuda")
    expected = torch.autograd.grad(module(x).sum(), [*module.parameters()])
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    waiting = fs.offload(pullback(torch.ones_like(output))[1])
    fs.prefetch(waiting)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        grads = waiting()
    torch.cuda.current_stream().wait_stream(other)
    torch.testing.assert_close([*grads.values()], [*expected], rtol=1e-4, atol=1e-2)


def test_while_a_graph_is_captured_offloading_is_refused() -> None:
    _, apply, params, buffers = stage(None)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(8, WIDTH, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(fs.StageError, match="while a CUDA graph is captured"):
        fs.offload(pullback)
    pullback(torch.ones_like(output))
