"""Looking inside composite functions, so that each of their operations is a site of its own.

Under a `TorchFunctionMode` a Python function of torch such as `F.multi_head_attention_forward` reaches
the mode whole, before its body runs. Taken as one operation, everything between its first and its last
parameter would be repeated in the weight pass. `opened` returns the same body with its override checks
answering no, so that called under the mode it presents the operations one by one.

A few composites are written in C++ (the recurrent layers outside oneDNN and cuDNN, and their cells);
`decomposed` returns the same computation in Python. Dropout is opened too, for another reason:
torch.func has a dropout of its own, which draws other masks than the eager one.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions

_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class _Opened(dict[str, Any]):
    """The globals of a module with its override checks answered; everything else is looked up live."""

    def __init__(self, original: dict[str, Any]) -> None:
        super().__init__({name: lambda *_: False for name in _OVERRIDE_CHECKS})
        self._original = original

    def __missing__(self, name: str) -> Any:
        return self._original[name]


def opened(function: Any) -> Callable[..., Any] | None:
    """Return the body of a function of torch that must not run as one operation, or None for all else."""
    try:
        return _OPENED[function]
    except (KeyError, TypeError):
        pass
    if type(function) is not types.FunctionType:
        return None
    body: Callable[..., Any] | None = None
    is_torchs = function.__module__.partition(".")[0] == "torch"
    checks_overrides = any(name in function.__globals__ for name in _OVERRIDE_CHECKS)
    # A method that calls super() only prepares the arguments of an operation of the same name.
    if is_torchs and checks_overrides and "__class__" not in function.__code__.co_freevars:
        body = types.FunctionType(
            function.__code__,
            _Opened(function.__globals__),
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        body.__kwdefaults__ = function.__kwdefaults__
    return _OPENED.setdefault(function, body)


def decomposed(function: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Return a C++ composite's computation in Python, or None where it runs as a single kernel."""
    choose = _DECOMPOSED.get(function)
    return None if choose is None else choose(args)


def _dropout(*, features: bool = False, alpha: bool = False, in_place: bool = False) -> Callable[..., Tensor]:
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


def _recurrent(whole: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    def choose(args: tuple[Any, ...]) -> Callable[..., Any] | None:
        data = args[0]
        if data.is_cuda and torch.backends.cudnn.is_acceptable(data):
            return None  # one cuDNN kernel
        # The packed form has batch sizes where the other has the hidden state.
        is_packed = isinstance(args[1], Tensor) and args[1].dtype == torch.int64
        return packed if is_packed else whole

    return choose


def _shaped(body: Callable[..., Any], hidden_at: int) -> Callable[..., Any]:
    """Give the final states the shape of the initial ones; torch 2.11 leaves an extra axis in them."""

    def lstm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output, h, c = body(*args)
        return output, h.reshape(args[hidden_at][0].shape), c.reshape(args[hidden_at][1].shape)

    return lstm


def _lstm(args: tuple[Any, ...]) -> Callable[..., Any] | None:
    data, hidden = args[0], args[1]
    if isinstance(hidden, (tuple, list)):
        projected = hidden[0].shape[-1] != hidden[1].shape[-1]
        supported = data.dtype in (torch.float32, torch.bfloat16, torch.float16) and not projected
        one_dnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        if data.device.type == "cpu" and supported and one_dnn:
            return None  # a layer is one kernel
    return _LSTM(args)


def _lstm_cell(
    data: Tensor,
    hidden: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, c = hidden
    linear = torch.nn.functional.linear
    gates = linear(data, w_ih, b_ih) + linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(
    data: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    linear = torch.nn.functional.linear
    i_r, i_z, i_n = linear(data, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, 1)
    r = torch.sigmoid(h_r + i_r)
    z = torch.sigmoid(h_z + i_z)
    n = torch.tanh(i_n + h_n * r)
    return (h - n) * z + n


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        data: Tensor,
        h: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        linear = torch.nn.functional.linear
        return activation(linear(data, w_ih, b_ih) + linear(h, w_hh, b_hh))

    return cell


def _always(body: Callable[..., Any]) -> Callable[..., Any]:
    return lambda args: body


_OPENED: dict[Any, Callable[..., Any] | None] = {
    torch.dropout: _dropout(),
    torch.dropout_: _dropout(in_place=True),
    torch.feature_dropout: _dropout(features=True),
    torch.feature_dropout_: _dropout(features=True, in_place=True),
    torch.alpha_dropout: _dropout(alpha=True),
    torch.alpha_dropout_: _dropout(alpha=True, in_place=True),
    torch.feature_alpha_dropout: _dropout(features=True, alpha=True),
    torch.feature_alpha_dropout_: _dropout(features=True, alpha=True, in_place=True),
}
_LSTM = _recurrent(_shaped(decompositions.lstm_impl, 1), _shaped(decompositions.lstm_data_impl, 2))
_DECOMPOSED: dict[Any, Callable[[tuple[Any, ...]], Callable[..., Any] | None]] = {
    torch.lstm: _lstm,
    torch.gru: _recurrent(decompositions.gru_impl, decompositions.gru_impl_data),
    torch.rnn_tanh: _recurrent(decompositions.rnn_tanh_input, decompositions.rnn_tanh_data),
    torch.rnn_relu: _recurrent(decompositions.rnn_relu_input, decompositions.rnn_relu_data),
    torch.lstm_cell: _always(_lstm_cell),
    torch.gru_cell: _always(_gru_cell),
    torch.rnn_tanh_cell: _always(_rnn_cell(torch.tanh)),
    torch.rnn_relu_cell: _always(_rnn_cell(torch.relu)),
}
