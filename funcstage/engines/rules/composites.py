"""Looking inside composite functions, so that each of their operations is a site of its own.

Under a `TorchFunctionMode` a Python function of torch such as `F.multi_head_attention_forward` reaches
the mode whole, before its body runs. Taken as one operation, everything between its first and its last
parameter would be repeated in the weight pass. `opened` returns the same body with its override checks
answering no, so that called under the mode it presents the operations one by one.

Composites in C++ are written out here, operation by operation; recurrent layers have a file of their own.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcstage._torch import functorch as ft
from funcstage._torch import operators as ops
from funcstage.engines.rules.base import Call

_OVERRIDE_CHECKS = (
    *("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
    "_has_torch_function",  # what torch.foreach calls it
)


class _Opened(dict[str, Any]):
    """The globals of a module with its override checks answered; everything else is looked up live."""

    def __init__(self, original: dict[str, Any]) -> None:
        super().__init__({name: lambda *_: False for name in _OVERRIDE_CHECKS})
        self._original = original

    def __missing__(self, name: str) -> Any:
        return self._original[name]


def opened(function: types.FunctionType) -> Callable[..., Any] | None:
    """Return the body of a function of torch that must not run as one operation, or None for all else."""
    is_torchs = function.__module__.partition(".")[0] == "torch"
    checks_overrides = any(name in function.__globals__ for name in _OVERRIDE_CHECKS)
    # A method that calls super() only prepares the arguments of an operation of the same name.
    if is_torchs and checks_overrides and "__class__" not in function.__code__.co_freevars:
        return opened_body(function)
    return None


def opened_body(function: Any) -> Callable[..., Any]:
    """The same function with its override checks answering no."""
    body = types.FunctionType(
        function.__code__,
        _Opened(function.__globals__),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def dropout(*, features: bool = False, alpha: bool = False, in_place: bool = False) -> Callable[..., Tensor]:
    """The eager dropout, as in ATen/native/Dropout.cpp, operation by operation."""

    def dropout(input: Tensor, p: float, train: bool) -> Tensor:
        times = input.mul_ if in_place else input.mul
        if not 0 <= p <= 1:
            raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
        if p == 0 or not train or input.numel() == 0:
            return input
        if p == 1:
            return times(input.new_zeros(()))
        if not (features or alpha or in_place) and input.device.type in ("cuda", "xpu"):
            return torch.native_dropout(input, p, train)[0]
        if features:
            if input.dim() < 2:
                raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
            noise = input.new_empty((*input.shape[:2], *(1 for _ in input.shape[2:])))
        else:
            noise = torch.empty_like(input)
        noise = noise.bernoulli_(1 - p)
        if not alpha:
            return times(noise.div_(1 - p))
        saturation = 1.7580993408473766  # the negative limit of SELU, arXiv 1706.02515
        scale = 1 / math.sqrt((saturation * saturation * p + 1) * (1 - p))
        shift = noise.add(-1).mul_(saturation * scale).add_(saturation * scale * p)
        return times(noise.mul_(scale)).add_(shift)

    return dropout


def meshgrid(*tensors: Any, indexing: str | None = None) -> tuple[Tensor, ...]:
    """The eager function, whose override check lies in another one that it calls."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    options = {} if indexing is None else {"indexing": indexing}
    return ops.meshgrid(tensors, **options)


def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy as eager makes it, without a history; its memory is not at hand where a wrapper is on it."""
    if id(tensor) in memo:
        found: Tensor = memo[id(tensor)]
        return found
    with ops.without_torch_function():
        is_leaf, requires_grad = tensor.is_leaf, tensor.requires_grad
    if not is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the "
            "moment."  # as torch says
        )
    copy = memo[id(tensor)] = tensor.detach().clone()
    return copy.requires_grad_(requires_grad)


def is_mean_over_listed_lengths(call: Call) -> bool:
    """Tell whether a CTC loss is divided by lengths that are numbers."""
    given = _of_ctc(*call.args, **call.kwargs)
    is_listed = not isinstance(given["target_lengths"], Tensor)
    return not call.traced and is_listed and given.get("reduction") == _MEAN


def ctc_loss(*args: Any, **kwargs: Any) -> Tensor:
    """The eager operations, as in ATen/native/LossCTC.cpp, where the lengths are read by their address."""
    given = _of_ctc(*args, **kwargs)
    losses = torch.ctc_loss(**given | {"reduction": 0})
    lengths = torch.tensor(given["target_lengths"], dtype=losses.dtype, device=losses.device)
    return (losses / lengths.clamp_min(1)).mean()


def _of_ctc(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(_CTC, args, strict=False)), **kwargs}


def pack_padded_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Pack with lengths and batch sizes free of wrappers, as the kernels read their memory."""
    pack = torch.ops.aten._pack_padded_sequence.default
    packed, batch_sizes = pack(input, ft.innermost(lengths), batch_first)
    return packed, ft.innermost(batch_sizes)


def sobol_engine_draw(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Points of a Sobol sequence, and its next state; the kernel reads memory, which wrappers do not have."""
    fresh = torch.ops.aten.lift_fresh.default
    points, state = _below_levels(ops.sobol_engine_draw, args, kwargs)
    return fresh(points), fresh(state)


def writing_below_levels(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation that writes into the memory of its first operand, which a wrapper does not have."""

    def write(written: Tensor, *args: Any) -> Tensor:
        return written.copy_(_below_levels(function, (written.clone(), *args), {}))

    return write


def _below_levels(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bare = [ft.innermost(arg) if isinstance(arg, Tensor) else arg for arg in args]
    with ops.without_torch_function(), ft.down_to(0):
        return function(*bare, **kwargs)


def pad_packed_sequence(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """The eager operations, as in ATen/native/PackedSequence.cpp, whose kernel fills `lengths` by address."""
    sizes = ft.innermost(batch_sizes).tolist()
    if 0 < total_length < len(sizes):
        raise RuntimeError(
            "Expected total_length to be at least the length of the longest sequence in input, but got "
            f"total_length={total_length} and max sequence length being {len(sizes)}"
        )
    padded = data.new_full((max(total_length, len(sizes)), sizes[0], *data.shape[1:]), padding_value)
    lengths = [0] * sizes[0]
    start = offset = 0
    for size, steps in ((size, len(list(group))) for size, group in itertools.groupby(sizes)):
        block = data[offset : offset + steps * size].view(steps, size, *data.shape[1:])
        padded[start : start + steps, :size].copy_(block)
        start, offset = start + steps, offset + steps * size
        lengths[:size] = [start] * size
    return padded.transpose(0, 1) if batch_first else padded, torch.tensor(lengths)


_CTC = ("log_probs", "targets", "input_lengths", "target_lengths", "blank", "reduction", "zero_infinity")
_MEAN = 1
"""What `torch.nn.functional` says for the mean, to operators."""


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """As `torch.nn.functional.one_hot`, whose checks of what it is given a trace leaves out."""
    encoded: Tensor = torch.nn.functional.one_hot(tensor, num_classes)
    if num_classes > 0:
        check = torch.ops.aten._assert_async.msg
        check((tensor >= 0).all(), "Class values must be non-negative.")
        check((tensor < num_classes).all(), "Class values must be smaller than num_classes.")
    return encoded
