"""Packed sequences as arguments and outputs: their data is differentiated, sizes and indices are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import funcstage as fs

LENGTHS = (2, 4, 1)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> PackedSequence:
        lengths = torch.tensor(LENGTHS)
        return self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]


class Projects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: PackedSequence) -> PackedSequence:
        return x._replace(data=self.proj(x.data))


class Constructs(Projects):
    def forward(self, x: PackedSequence) -> PackedSequence:
        return PackedSequence(self.proj(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4)

    def forward(self, x: PackedSequence) -> dict[str, Any]:
        output, state = self.gru(x)
        return {"packed": output, "state": [state]}


class Pads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4)

    def forward(self, x: PackedSequence) -> Tensor:
        return pad_packed_sequence(self.rnn(x)[0])[0]


def packed() -> PackedSequence:
    return pack_sequence([torch.randn(n, 3) for n in LENGTHS], enforce_sorted=False)


def engines(*modules: type[nn.Module], compiled: bool) -> list[Any]:
    return [
        pytest.param(m, e, id=f"{m.__name__}-{e}")
        for m in modules
        for e in (("closures", "aten") if compiled else ("closures",))
    ]


@pytest.mark.parametrize(
    ("make", "engine"),
    [*engines(Projects, Constructs, compiled=True), *engines(Packs, Recurs, Pads, compiled=False)],
)
def test_packed_sequences_pass_in_and_out_with_eagers_gradients(make: type[nn.Module], engine: str) -> None:
    torch.manual_seed(0)
    module = make()
    x = torch.randn(3, 4, 3) if make is Packs else packed()
    data = x.data.detach().clone().requires_grad_()
    expected = module(data if make is Packs else x._replace(data=data))
    tensors = [t for t in fs.trees.flatten(expected)[0] if isinstance(t, Tensor)]
    wanted = [t for t in tensors if t.requires_grad]
    cotangents = [torch.randn_like(t) for t in wanted]
    dx, *dparams = torch.autograd.grad(wanted, [data, *module.parameters()], cotangents)

    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine, fullgraph=True)  # type: ignore[arg-type]
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        assert type(output) is type(expected)
        torch.testing.assert_close(fs.trees.flatten(output)[0], fs.trees.flatten(expected)[0])
        leaves, spec = fs.trees.flatten(output)
        numbers = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        for i, cotangent in zip(numbers, cotangents, strict=True):
            leaves[i] = cotangent
        grads = fs.trees.unflatten(spec, leaves)  # with the sizes and indices of the output
        (found,), weight_pullback = pullback(grads)
        assert type(found) is type(x)
        torch.testing.assert_close(found.data, dx)
        torch.testing.assert_close([*weight_pullback().values()], dparams)
        if make is not Packs:
            assert found[1:] == (None, None, None)


def test_a_packed_gradient_is_the_cotangent_of_the_stage_before() -> None:
    torch.manual_seed(0)
    first, second, x = Projects(), Pads(), packed()
    second.rnn = nn.RNN(4, 2)
    data = x.data.clone().requires_grad_()
    second(first(x._replace(data=data))).square().sum().backward()
    stages = [fs.functionalize(module) for module in (first, second)]
    between, _, pull_first = fs.stage_vjp(*stages[0], x)
    output, _, pull_second = fs.stage_vjp(*stages[1], between)
    (cotangent,), _ = pull_second(2 * output)
    (dx,), weight_pullback = pull_first(cotangent)
    torch.testing.assert_close(dx.data, data.grad)
    torch.testing.assert_close(weight_pullback(), {name: p.grad for name, p in first.named_parameters()})


def test_a_cotangent_of_sizes_with_other_than_sizes_is_refused() -> None:
    stage, x = fs.functionalize(Projects()), packed()
    output, _, pullback = fs.stage_vjp(*stage, x)
    with pytest.raises(fs.LeafError, match=r"output_grads\.batch_sizes of Projects must be None"):
        pullback(output._replace(batch_sizes=torch.ones(4)))
    pullback(output)


@pytest.mark.parametrize("make", [Packs, Recurs])
def test_packing_is_refused_in_a_trace_and_runs_uncompiled_without_fullgraph(make: type[nn.Module]) -> None:
    apply, params, buffers = fs.functionalize(make())
    x = torch.randn(3, 4, 3) if make is Packs else packed()
    with pytest.raises(fs.TraceError, match="reads the value of a tensor"):
        fs.compile(apply, backend="aten", fullgraph=True)(params, buffers, x)
    output, _ = fs.compile(apply, backend="aten")(params, buffers, x)
    torch.testing.assert_close(output, apply(params, buffers, x)[0])
