"""Operands of several dtypes, where fake tensors get by with what real ones do not, or get something else.

A linear layer adds its bias with `addmm`, which refuses other dtypes, or (a vector, an input with gaps in
memory) with `add_` into the product, whose dtype stays. For tensors of a trace that is `add`, which promotes.
Sums and products in place of complex numbers into real ones are an error, but not of fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from funcstage.dtensors import first_dtensor

_ARITHMETIC = {
    *("add_", "sub_", "subtract_", "mul_", "multiply_", "div_", "divide_", "true_divide_", "pow_"),
    *("addcmul_", "addcdiv_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"),
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in a trace, with the dtype that it has in eager."""
    result = F.linear(input, weight, bias)
    if bias is None or bias.dtype == weight.dtype or first_dtensor((input, weight, bias)) is not None:
        return result  # of DTensors eager promotes too
    if input.dim() == 2 or (input.is_contiguous() and (input.dim() == 3 or bias.dim() == 1)):
        return result  # `addmm`, which fails when it runs
    product = F.linear(input, weight)
    if product.dtype == result.dtype:
        return result
    refuse_complex("add_", product, bias)
    return product.add_(bias)


def refuse_complex(name: str, target: Tensor, *operands: Any) -> None:
    """Raise eager's error where real numbers are to take complex ones."""
    if name in _ARITHMETIC and not target.is_complex() and any(map(_is_complex, operands)):
        raise RuntimeError(
            f"{name}: a complex result can't be cast to the desired output type {target.dtype}"
        )


def _is_complex(operand: Any) -> bool:
    return operand.is_complex() if isinstance(operand, Tensor) else isinstance(operand, complex)
