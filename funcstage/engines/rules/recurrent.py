"""Recurrent layers and cells in Python, operation by operation as in ATen/native/RNN.cpp.

In C++ they are composites that reach a mode whole. Taken as one operation their weight pass would repeat
the whole backward through time; opened, each step's matrix products are sites of their own. (torch has
such decompositions too, which leave the dropout between layers out.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from funcstage.engines.rules.base import Call, Rule

State: TypeAlias = tuple[Tensor, ...]
"""Hidden state, and cell state if the cell has one: float[batch, hidden] each."""

Cell: TypeAlias = Callable[[Tensor, State, Sequence[Tensor | None]], State]
"""Next state from the input's gates, the state, and the weights (w_hh, b_hh, w_hr)."""


def lstm_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    h, c = state
    i, f, g, o = (linear(h, _given(weights[0]), weights[1]) + gates).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights[2] is None else linear(h, weights[2])), c


def gru_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    (h,) = state
    i_r, i_z, i_n = gates.chunk(3, 1)
    h_r, h_z, h_n = linear(h, _given(weights[0]), weights[1]).chunk(3, 1)
    n = (i_n + h_n * (h_r + i_r).sigmoid()).tanh()
    return ((h - n) * (h_z + i_z).sigmoid() + n,)


def tanh_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((linear(state[0], _given(weights[0]), weights[1]) + gates).tanh(),)


def relu_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((linear(state[0], _given(weights[0]), weights[1]) + gates).relu(),)


def single(step: Cell) -> Callable[..., Any]:
    """The signature of `torch.lstm_cell` and its like, over a step."""

    def cell(
        data: Tensor,
        hidden: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        state = step(linear(data, w_ih, b_ih), state, (w_hh, b_hh, None))
        return state[0] if isinstance(hidden, Tensor) else state

    return cell


def stacked(step: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """The two signatures of `torch.lstm` and its like, over a step.

    Either `(data, hidden, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)`, or
    for packed sequences `(data, batch_sizes, hidden, weights, ..., bidirectional)`.
    """

    def layers(data: Tensor, second: Any, third: Any, *rest: Any) -> tuple[Tensor, ...]:
        sizes: list[int] | None = None
        if isinstance(rest[0], bool):
            hidden, weights, (*options, batch_first) = second, third, rest
        else:
            sizes, hidden, (weights, *options), batch_first = second.tolist(), third, rest, False
        has_biases, num_layers, dropout, train, bidirectional = options
        directions = 2 if bidirectional else 1
        initial = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        states = list(zip(*(tensor.unbind(0) for tensor in initial), strict=True))
        per_layer = len(weights) // (num_layers * directions)
        finals: list[State] = []
        data = data.transpose(0, 1) if batch_first else data
        for layer in range(num_layers):
            outputs = []
            for reverse in range(directions):
                k = layer * directions + reverse
                own = _named(weights[k * per_layer : (k + 1) * per_layer], has_biases)
                if sizes is None:
                    output, final = _sequence(step, data, states[k], own, bool(reverse))
                else:
                    output, final = _packed(step, data, states[k], own, bool(reverse), sizes)
                outputs.append(output)
                finals.append(final)
            data = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and train and layer < num_layers - 1:
                data = torch.dropout(data, dropout, True)
        output = data.transpose(0, 1) if batch_first else data
        return output, *(torch.stack(tensors) for tensors in zip(*finals, strict=True))

    return layers


def lstm_by_layer(
    data: Tensor,
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """`torch.lstm` with a call for each layer, where a layer is one kernel."""
    per_layer = len(weights) // num_layers
    finals = []
    states = zip(*(tensor.chunk(num_layers, 0) for tensor in hidden), strict=True)
    for layer, state in enumerate(states):
        own = list(weights[layer * per_layer : (layer + 1) * per_layer])
        if layer and dropout and train:
            data = torch.dropout(data, dropout, True)
        data, *final = torch.lstm(data, state, own, has_biases, 1, 0.0, train, bidirectional, batch_first)
        finals.append(final)
    return data, *(torch.cat(tensors) for tensors in zip(*finals, strict=True))


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


def _named(weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor | None, ...]:
    """One layer's weights as (w_ih, b_ih, w_hh, b_hh, w_hr)."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projection = rest[2:] if has_biases else rest
    return w_ih, b_ih, w_hh, b_hh, projection[0] if projection else None


def _sequence(
    step: Cell, data: Tensor, state: State, weights: Sequence[Any], reverse: bool
) -> tuple[Tensor, State]:
    w_ih, b_ih, *recurrent = weights
    gates = linear(data, w_ih, b_ih).unbind(0)
    outputs = []
    for at_step in reversed(gates) if reverse else gates:
        state = step(at_step, state, recurrent)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _packed(
    step: Cell, data: Tensor, initial: State, weights: Sequence[Any], reverse: bool, sizes: list[int]
) -> tuple[Tensor, State]:
    """Sequences of falling length, `sizes[t]` of which are alive at step t."""
    w_ih, b_ih, *recurrent = weights
    gates = linear(data, w_ih, b_ih).split(sizes)
    order = range(len(sizes))
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(tensor[: sizes[-1 if reverse else 0]] for tensor in initial)
    for t in reversed(order) if reverse else order:
        alive, now = state[0].shape[0], sizes[t]
        if now < alive:
            ended.append(tuple(tensor[now:] for tensor in state))
            state = tuple(tensor[:now] for tensor in state)
        elif now > alive:
            pairs = zip(state, initial, strict=True)
            state = tuple(torch.cat([tensor, first[alive:now]]) for tensor, first in pairs)
        state = step(gates[t], state, recurrent)
        outputs.append(state[0])
    ended.append(state)
    final = tuple(torch.cat(tensors[::-1]) for tensors in zip(*ended, strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), final


# When they run instead of what they are written after.


def layers(step: Cell) -> tuple[Rule, ...]:
    """The rules of `torch.gru` and its like, over a step."""
    return (Rule(_reads_by_address, _by_position(stacked(step))),)


def cells(step: Cell) -> tuple[Rule, ...]:
    """The rules of `torch.lstm_cell` and its like, over a step."""
    return (Rule(lambda call: call.split and not call.traced, _by_position(single(step))),)


def _reads_by_address(call: Call) -> bool:
    """Whether a layer is split, or reads weights by address, as cuDNN's, where wrappers have none."""
    args = in_order(call.args, call.kwargs)
    return call.split or args[0].is_cuda or isinstance(args[2], Tensor)


def _is_one_kernel(args: tuple[Any, ...]) -> bool:
    """Whether oneDNN runs each layer of an LSTM as one kernel."""
    data, hidden = args[0], args[1]
    if isinstance(hidden, Tensor) or data.device.type != "cpu":  # packed data has its batch sizes there
        return False
    projected = hidden[0].shape[-1] != hidden[1].shape[-1]
    supported = data.dtype in (torch.float32, torch.bfloat16, torch.float16) and not projected
    return supported and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _has_kernel_a_layer(call: Call) -> bool:
    args = in_order(call.args, call.kwargs)
    return not call.traced and _is_one_kernel(args) and args[4] > 1


def _is_lstm_opened(call: Call) -> bool:
    args = in_order(call.args, call.kwargs)
    if call.traced:
        return True
    # A level would wrap batch sizes, which the kernels read by address.
    return not _is_one_kernel(args) and (call.split or args[0].is_cuda or isinstance(args[1], Tensor))


def _by_position(body: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: body(*in_order(args, kwargs))


def in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All operands of a recurrent layer or cell by position."""
    if not kwargs:
        return args
    names = next(names for names in _SIGNATURES if kwargs.keys() <= {*names})
    rest = names[len(args) :]
    return args + tuple(kwargs.get(name) for name in rest[: max(map(rest.index, kwargs)) + 1])


_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_SIGNATURES = (
    ("input", "hx", "params", *_OPTIONS, "batch_first"),
    ("data", "batch_sizes", "hx", "params", *_OPTIONS),
    ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
)
"""What the parameters of recurrent layers, of those over packed sequences, and of cells are called."""

LSTM = (
    Rule(_has_kernel_a_layer, _by_position(lstm_by_layer)),
    Rule(_is_lstm_opened, _by_position(stacked(lstm_step))),
)
"""The rules of `torch.lstm`."""
