"""Runs backward operations with every output mask, and says which differ from the unmasked one.

    python -m tests.support.masked_backwards [cpu|cuda]

One line for each operation before it runs, so that a crash has a name:
`tests/engines/rules/test_group_norm.py` reads them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcstage.engines.rules.group_norm import SURVIVES

aten = torch.ops.aten
Make = Callable[..., Tensor]
Backward = Callable[[list[bool]], tuple[Tensor | None, ...]]
Case = tuple[Backward, tuple[bool, ...]]
"""A backward that takes a mask, and which of its gradients there are at all."""

LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "strided")
SHAPES = {2: (5, 4), 3: (2, 4, 6), 4: (2, 4, 5, 6), 5: (2, 4, 3, 4, 5)}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and tensor.dim() in (4, 5):
        form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=form)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "strided":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    return tensor.contiguous()


def group_norm(make: Make, dim: int, affine: bool, layout: str) -> Case:
    x, grad = laid_out(make(*SHAPES[dim]), layout), laid_out(make(*SHAPES[dim]), layout)
    # As `torch.group_norm` does where it is not the CPU's kernel, and `funcstage.engines.rules.group_norm`.
    if layout != "channels_last" or not (SURVIVES and x.is_cpu):
        x, grad = x.contiguous(), grad.contiguous()
    weight, bias = (make(4), make(4)) if affine else (None, None)
    sizes = (x.shape[0], 4, x[0, 0].numel(), 2)
    _, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, 1e-5)
    return lambda mask: aten.native_group_norm_backward(grad, x, mean, rstd, weight, *sizes, mask), (
        True,
        affine,
        affine,
    )


def layer_norm(make: Make, affine: bool, layout: str) -> Case:
    x, grad = laid_out(make(3, 5, 4), layout), laid_out(make(3, 5, 4), layout)
    weight, bias = (make(4), make(4)) if affine else (None, None)
    _, mean, rstd = aten.native_layer_norm(x, [4], weight, bias, 1e-5)
    return lambda mask: aten.native_layer_norm_backward(grad, x, [4], mean, rstd, weight, bias, mask), (
        True,
        affine,
        affine,
    )


def rms_norm(make: Make, affine: bool, layout: str) -> Case:
    x, grad = laid_out(make(3, 5, 4), layout), laid_out(make(3, 5, 4), layout)
    weight = make(4) if affine else None
    _, rstd = aten._fused_rms_norm(x, [4], weight, 1e-5)
    return lambda mask: aten._fused_rms_norm_backward(grad, x, [4], rstd, weight, mask), (True, affine)


def batch_norm(make: Make, dim: int, affine: bool, training: bool, layout: str) -> Case:
    x, grad = laid_out(make(*SHAPES[dim]), layout), laid_out(make(*SHAPES[dim]), layout)
    weight, bias = (make(4), make(4)) if affine else (None, None)
    statistics = make(4), make(4).abs() + 0.5
    _, mean, rstd = aten.native_batch_norm(x, weight, bias, *statistics, training, 0.1, 1e-5)

    def backward(mask: list[bool]) -> Any:
        return aten.native_batch_norm_backward(grad, x, weight, *statistics, mean, rstd, training, 1e-5, mask)

    return backward, (True, affine, affine)


def convolution(make: Make, dim: int, groups: int, transposed: bool, layout: str) -> Case:
    x = laid_out(make(*SHAPES[dim + 2]), layout)
    weight = laid_out(make(4, 4 // groups, *[3] * dim), layout if layout == "channels_last" else "")
    settings = ([1] * dim, [1] * dim, [1] * dim, transposed, [0] * dim, groups)
    y = aten.convolution(x, weight, make(4), *settings)
    grad = laid_out(make(*y.shape), layout)
    return lambda mask: aten.convolution_backward(grad, x, weight, [4], *settings, mask), (True, True, True)


def grid_sampler(make: Make, dim: int, layout: str) -> Case:
    forward, backward = {
        2: (aten.grid_sampler_2d, aten.grid_sampler_2d_backward),
        3: (aten.grid_sampler_3d, aten.grid_sampler_3d_backward),
    }[dim]
    x = laid_out(make(*SHAPES[dim + 2]), layout)
    grid = make(2, *SHAPES[dim + 2][2:], dim).tanh()
    y = forward(x, grid, 0, 0, False)
    grad = laid_out(make(*y.shape), layout)
    return lambda mask: backward(grad, x, grid, 0, 0, False, mask), (True, True)


def batch_norm_with_update(make: Make, layout: str) -> Case:
    layout = layout if layout == "channels_last" else "contiguous"  # what the kernel of CUDA takes
    x, grad = laid_out(make(*SHAPES[4]), layout), laid_out(make(*SHAPES[4]), layout)
    weight, statistics = make(4), (make(4), make(4).abs() + 0.5)
    _, mean, rstd, reserve = aten._batch_norm_with_update(x, weight, make(4), *statistics, 0.1, 1e-5)

    def backward(mask: list[bool]) -> Any:
        return aten.batch_norm_backward(
            grad, x, weight, *statistics, mean, rstd, True, 1e-5, mask, reserve.clone()
        )

    return backward, (True, True, True)


def batch_norm_by_index(make: Make, layout: str) -> Case:
    layout = layout if layout == "channels_last" else "contiguous"  # what the kernel of CUDA takes
    x, grad = laid_out(make(*SHAPES[4]), layout), laid_out(make(*SHAPES[4]), layout)
    weight, statistics = make(4), (make(4), make(4).abs() + 0.5)
    _, mean, rstd, reserve, index = aten._batch_norm_impl_index(
        x, weight, make(4), *statistics, True, 0.1, 1e-5, True
    )

    def backward(mask: list[bool]) -> Any:
        return aten._batch_norm_impl_index_backward(
            index, x, grad, weight, *statistics, mean, rstd, True, 1e-5, mask, reserve
        )

    return backward, (True, True, True)


def slow_convolution(make: Make, layout: str) -> Case:
    x = laid_out(make(*SHAPES[4]), layout)
    weight = laid_out(make(4, 4, 3, 3), layout if layout == "channels_last" else "")
    y = aten._slow_conv2d_forward(x, weight, [3, 3], make(4), [1, 1], [1, 1])
    grad = laid_out(make(*y.shape), layout)
    return lambda mask: aten._slow_conv2d_backward.output_mask(
        grad, x, weight, [3, 3], [1, 1], [1, 1], mask
    ), (True, True, True)


def convolution_twice(make: Make, dim: int, layout: str) -> Case:
    """The backward of a convolution's backward."""
    x, seed = laid_out(make(*SHAPES[dim + 2]), layout), laid_out(make(*SHAPES[dim + 2]), layout)
    weight = make(4, 4, *[3] * dim)
    settings = ([1] * dim, [1] * dim, [1] * dim, False, [0] * dim, 1)
    y = aten.convolution(x, weight, make(4), *settings)
    grad, seeds = laid_out(make(*y.shape), layout), (seed, make(*weight.shape), make(4))
    return lambda mask: aten._convolution_double_backward(*seeds, grad, weight, x, *settings, mask), (
        True,
        True,
        True,
    )


def efficient_attention(make: Make, biased: bool, layout: str) -> Case:
    if laid_out(make(2, 4, 8, 16), layout).stride(-1) != 1:
        layout = "contiguous"  # where a head's elements do not lie side by side, torch takes another kernel
    query, key, value, grad = (laid_out(make(2, 4, 8, 16), layout) for _ in range(4))
    bias = make(2, 4, 8, 8) if biased else None
    attention = aten._scaled_dot_product_efficient_attention
    out, *saved = attention(query, key, value, bias, True)

    def backward(mask: list[bool]) -> Any:
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, bias, out, *saved, 0.0, mask
        )

    return backward, (True, True, True, biased)


def cudnn_rnn(make: Make, mode: int, layout: str) -> Case:
    """Mode 2 is an LSTM, 3 a GRU; of the list of gradients of weights, the first."""
    gates = {2: 4, 3: 3}[mode]
    x, weights = (
        laid_out(make(5, 2, 3), layout),
        [make(gates * 4, 3), make(gates * 4, 4), *(make(gates * 4) for _ in range(2))],
    )
    hx, cx = make(1, 2, 4), make(1, 2, 4) if mode == 2 else None
    settings = (mode, 4, 0, 1, False, 0.0, True, False, [], None)
    out, _, _, reserve, flat = torch._cudnn_rnn(x, weights, 4, None, hx, cx, *settings)
    grad = laid_out(make(*out.shape), layout)

    def backward(mask: list[bool]) -> Any:
        dx, dhx, dcx, dweights = aten._cudnn_rnn_backward(
            x, weights, 4, flat, hx, cx, out, grad, None, None, *settings, reserve.clone(), mask
        )
        return dx, dhx, dcx, dweights[0] if dweights else None

    return backward, (True, True, mode == 2, True)


ELSEWHERE = {
    "_scaled_dot_product_fused_attention_overrideable_backward": "of devices outside torch",
    "convolution_backward_overrideable": "of devices outside torch",
    "_sparse_mm_reduce_impl_backward": "of sparse tensors, which stages refuse",
    "linear_backward": "of nested tensors, which stages refuse, and of Apple's devices",
    "matmul_backward": "of nested tensors, which stages refuse",
    "miopen_rnn_backward": "of AMD's devices",
    "mkldnn_linear_backward": "of tensors in oneDNN's own layout, which stages refuse",
    "mps_convolution_backward": "of Apple's devices",
    "mps_convolution_transpose_backward": "of Apple's devices",
}
"""Operations with an output mask that are not run here."""

RUN = {
    "_batch_norm_impl_index_backward",
    "_convolution_double_backward",
    "_cudnn_rnn_backward",
    "_fused_rms_norm_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_slow_conv2d_backward",
    "batch_norm_backward",
    "convolution_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "native_batch_norm_backward",
    "native_group_norm_backward",
    "native_layer_norm_backward",
}
"""Those that are, on the devices that have them."""


def masked_operations() -> set[str]:
    """All of torch's operations that are told by a list of booleans what to compute."""
    return {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        for argument in schema.arguments
        if argument.name.endswith("mask") and argument.N and str(argument.type) == "List[bool]"
    }


def cases(device: str) -> Iterator[tuple[str, Callable[[Make, str], Case]]]:
    for affine in (True, False):
        for dim in (3, 4, 5):
            yield f"group_norm{dim}, affine {affine}", lambda m, o, d=dim, a=affine: group_norm(m, d, a, o)
        yield f"layer_norm, affine {affine}", lambda m, o, a=affine: layer_norm(m, a, o)
        if device == "cuda":
            yield f"rms_norm, affine {affine}", lambda m, o, a=affine: rms_norm(m, a, o)
        for dim, training in itertools.product((2, 3, 4, 5), (True, False)):
            yield (
                f"batch_norm{dim}, affine {affine}, training {training}",
                lambda m, o, d=dim, a=affine, t=training: batch_norm(m, d, a, t, o),
            )
    for dim, groups, transposed in itertools.product((1, 2, 3), (1, 2, 4), (False, True)):
        yield (
            f"convolution{dim}, groups {groups}, transposed {transposed}",
            lambda m, o, d=dim, g=groups, t=transposed: convolution(m, d, g, t, o),
        )
    for dim in (2, 3):
        yield f"grid_sampler{dim}", lambda m, o, d=dim: grid_sampler(m, d, o)
    yield "batch_norm_with_update", batch_norm_with_update
    yield "batch_norm_by_index", batch_norm_by_index
    yield "slow_convolution", slow_convolution
    for dim in (1, 2, 3):
        yield f"convolution_twice{dim}", lambda m, o, d=dim: convolution_twice(m, d, o)
    if device == "cuda":
        for biased in (True, False):
            yield (
                f"efficient_attention, bias {biased}",
                lambda m, o, b=biased: efficient_attention(m, b, o),
            )
        for mode in (2, 3):
            yield f"cudnn_rnn, mode {mode}", lambda m, o, k=mode: cudnn_rnn(m, k, o)


def differences(
    device: str,
    make_case: Callable[[Make, str], Case],
    layout: str,
    dtype: torch.dtype,
    widest: torch.dtype,
) -> Any:
    """The masks with which a gradient is not what it is without a mask."""

    def case(dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        return make_case(lambda *shape: torch.randn(*shape, dtype=torch.float64).to(device, dtype), layout)

    exact, there = case(widest)
    expected = exact([*there])
    backward, _ = case(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    for mask in itertools.product((False, True), repeat=len(there)):
        wanted = [i for i, asked in enumerate(mask) if asked and there[i]]
        if len(wanted) < sum(mask) or not wanted:
            continue
        found = backward([*mask])
        for i in wanted:
            ours, right = found[i], expected[i]
            assert ours is not None
            assert right is not None
            if not torch.allclose(ours.double(), right.double(), rtol=tolerance, atol=tolerance):
                yield mask, i


def main(device: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # which rounds float32 to ten bits
    for name, make_case in cases(device):
        dtypes = [torch.float64, torch.float32, torch.bfloat16]
        if "attention" in name:
            del dtypes[0]  # which has no such kernel
        for layout, dtype in itertools.product(LAYOUTS, dtypes):
            if dtype is torch.bfloat16 and "grid" in name:
                continue  # which has no such kernel
            print(f"{name}, {layout}, {dtype}", flush=True)
            for mask, i in differences(device, make_case, layout, dtype, dtypes[0]):
                print(f"DIFFERS: gradient {i} with mask {mask}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
