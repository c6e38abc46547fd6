"""Operands of several dtypes: both engines give eager's dtypes, or eager's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import both_ways
import pytest
import torch
import torch.nn.functional as F
from both_ways import eager, stage_of
from torch import Tensor, nn

import funcstage as fs

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])


class Linear(nn.Module):
    """A linear layer with a bias of its own dtype, behind a change of layout."""

    def __init__(self, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layout(x), self.weight, self.bias)


class Attention(nn.MultiheadAttention):
    """Attention over a batch, whose bias of the projections in has its own dtype."""

    def __init__(self) -> None:
        super().__init__(4, 2, batch_first=True)
        self.in_proj_bias = nn.Parameter(torch.randn(12, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def split(module: nn.Module, x: Tensor, compiled: bool) -> list[Tensor]:
    apply, params, buffers = fs.functionalize(module)
    return both_ways.split(stage_of(apply, "aten" if compiled else "uncompiled"), params, buffers, x)


WITH_GAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a vector": lambda x: x[:, 0, 0],
    "a batch": lambda x: x.permute(2, 1, 0),
    "four axes": lambda x: x.permute(2, 1, 0)[None],
}


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", WITH_GAPS.values(), ids=WITH_GAPS)
def test_a_bias_of_another_dtype_leaves_a_linear_layers_dtype_as_it_is(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, compiled: bool
) -> None:
    module, x = Linear(layout, dtype), torch.randn(3, 2, 5)
    torch.testing.assert_close(split(module, x, compiled), eager(module, x))


@ENGINES
def test_a_bias_of_another_dtype_leaves_attentions_dtype_as_it_is(compiled: bool) -> None:
    module, x = Attention(), torch.randn(2, 3, 4)
    torch.testing.assert_close(split(module, x, compiled), eager(module, x))


@ENGINES
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (lambda x: x.permute(2, 1, 0).contiguous(), torch.float64),
        (lambda x: x[:, 0].T, torch.float64),
        (lambda x: x[:, 0, 0], torch.complex64),
    ],
    ids=["contiguous", "a matrix", "complex"],
)
def test_a_bias_that_eager_cannot_add_fails_as_in_eager(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, compiled: bool
) -> None:
    module, x = Linear(layout, dtype), torch.randn(3, 2, 5)
    with pytest.raises(RuntimeError) as expected:
        module(x)
    with pytest.raises(RuntimeError) as found:
        split(module, x, compiled)
    assert str(found.value) == str(expected.value)


@ENGINES
@pytest.mark.parametrize(
    "write",
    [
        lambda y, scale: y.add_(scale * 1j),
        lambda y, scale: y.mul_(1j),
        lambda y, scale: y.addcmul_(scale, scale * 1j),
        lambda y, scale: y.__isub__(scale * 1j),
    ],
    ids=["a sum", "a number", "a sum of products", "an operator"],
)
def test_complex_results_are_not_written_into_real_numbers(
    write: Callable[[Tensor, Tensor], Tensor], compiled: bool
) -> None:
    def apply(params: dict[str, Tensor], buffers: Any, x: Tensor) -> Any:
        return write(x * 1, params["scale"]).real, buffers

    params, x = {"scale": torch.ones(3)}, torch.ones(3)
    with pytest.raises(RuntimeError) as expected:
        apply(params, {}, x)
    with pytest.raises(RuntimeError) as found:
        fs.stage_vjp(fs.compile(apply, backend="aten") if compiled else apply, params, {}, x)
    assert str(found.value) == str(expected.value)
