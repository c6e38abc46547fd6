"""Masks of FlexAttention among a stage's arguments: one trace for all that differ in tensors alone.

FlexAttention itself has gradients on CUDA only (`engines/rules/test_kernels_cuda.py`). Here a stage asks the
mask's function, as a kernel does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

import funcstage as fs
from funcstage.pipelining import pipeline_value_and_grad

BATCH, LENGTH, WIDTH = 4, 8, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        b, i = torch.arange(len(x))[:, None, None], torch.arange(LENGTH)
        hidden = ~mask.mask_mod(b, torch.zeros_like(b), i[:, None], i)
        return (self.q(x) @ x.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ x


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def within(documents: Tensor) -> Callable[..., Tensor]:
    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return documents[b, q] == documents[b, k]

    return same


def near(reach: int) -> Callable[..., Tensor]:
    def is_near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q - k < reach

    return is_near


def mask(*functions: Callable[..., Tensor], batch: int | None = BATCH) -> BlockMask:
    return create_block_mask(and_masks(*functions), batch, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=4)


def packed(seed: int) -> BlockMask:
    """One of documents that lie elsewhere in each row."""
    drawn = torch.randint(3, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    return mask(causal, within(drawn.sort(1).values))


def microbatches_of(given: BlockMask) -> list[BlockMask]:
    return [kwargs["mask"] for kwargs in split_args_kwargs_into_chunks((), {"mask": given}, BATCH)[1]]


def check(stage: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    x = args[0].clone().requires_grad_()
    expected = module(x, *args[1:], **kwargs)
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [x, *module.parameters()], cotangent)
    output, _, pullback = fs.stage_vjp(*stage, *args, **kwargs)
    (dx, *_), weight_pullback = pullback(cotangent)
    torch.testing.assert_close([output, dx, *weight_pullback().values()], [expected, *grads])


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Attention().double()


def inputs(n: int = 1) -> Tensor:
    return torch.randn(n, LENGTH, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_masks_of_microbatches_are_new_tensors_for_one_trace(
    module: nn.Module, compiled: bool, by_name: bool
) -> None:
    stage = fs.functionalize(module)
    fast = fs.compile(stage.apply, backend="aten")
    for seed in range(3):
        for part in microbatches_of(packed(seed)):
            given: Any = ((), {"mask": part}) if by_name else ((part,), {})
            check(stage._replace(apply=fast) if compiled else stage, module, inputs(), *given[0], **given[1])
    assert not compiled or "1 signature" in repr(fast)


def test_masks_of_other_functions_or_numbers_are_traced_anew(module: nn.Module) -> None:
    stage = fs.functionalize(module)
    fast = fs.compile(stage.apply, backend="aten")
    for functions in ((causal,), (near(2), causal), (near(3), causal), (causal, near(3))):
        for _ in range(2):
            check(stage._replace(apply=fast), module, inputs(BATCH), mask(*functions))
    assert "4 signature" in repr(fast)


class Marked:
    """A mask function that is none of Python's functions."""

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k


def calls_itself() -> Callable[..., Tensor]:
    def far(b: Tensor, h: Tensor, q: Tensor, k: Tensor, times: int = 1) -> Tensor:
        return far(b, h, q, k - 1, times - 1) if times else q >= k

    return far


def with_attributes() -> Callable[..., Tensor]:
    function = near(2)
    function.reach = 2  # type: ignore[attr-defined]
    return function


@pytest.mark.parametrize("make", [Marked, calls_itself, with_attributes])
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_any_function_makes_a_mask(module: nn.Module, compiled: bool, make: Callable[[], Any]) -> None:
    stage = fs.functionalize(module)
    if compiled:
        stage = stage._replace(apply=fs.compile(stage.apply, backend="aten"))
    given = mask(causal, make())
    for _ in range(2):
        check(stage, module, inputs(BATCH), given)


@pytest.mark.parametrize("whole", [False, True], ids=["of each sample", "for all samples"])
def test_a_pipeline_in_one_process_cuts_masks_as_torch_does(module: nn.Module, whole: bool) -> None:
    given = mask(causal, batch=None) if whole else packed(0)
    x, target = inputs(BATCH), inputs(BATCH)
    stage = fs.functionalize(copy.deepcopy(module))
    step = pipeline_value_and_grad([stage], functional.mse_loss, schedule="1F1B", num_microbatches=2)
    loss, _, (grads,) = step([stage.params], [stage.buffers], (x, given), target)
    expected = functional.mse_loss(module(x, given), target)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads["q.weight"], module.q.weight.grad)
