"""Repeated layers are lowered once, and what comes out is what one program gives."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import pytest
import torch
from test_repeats import WIDTH, Layer, programs
from torch import Tensor, nn
from torch.fx import GraphModule

import funcstage as fs
from funcstage.engines.graph import chain
from funcstage.engines.graph.chain import OF_ANY_SIZE, chained
from funcstage.engines.graph.runners import Runner, run_as_python
from funcstage.testing import check_stage


class Tied(nn.Module):
    """Layers some of which share a weight, and all of which read what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.layers[3].up.weight = self.layers[1].up.weight
        self.layers[2].down.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        first = x.sin()
        for layer in self.layers:
            x = layer(x) * first
        return x


class Constants(nn.Module):
    """Layers that make a constant each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * torch.tensor([0.5 + i] * WIDTH)
        return x


class Wired(nn.Module):
    """Layers of the same operations, which read one another's results in different ways."""

    def forward(self, x: Tensor) -> Tensor:
        for way in (0, 1, 2, 0, 1, 2):
            sine = x.sin()
            cosine = (x if way else sine).cos()
            of = sine.tanh() if way < 2 else cosine.tanh()
            x = (sine - cosine) * of + x
        return x


STAGES = {
    "plain": lambda: nn.Sequential(*(Layer() for _ in range(5))),
    "dropout": lambda: nn.Sequential(*(Layer(p=0.3) for _ in range(5))),
    "tied": Tied,
    "constants": Constants,
    "wired differently": Wired,
    "one differs": lambda: nn.Sequential(Layer(), Layer(), Layer(eps=1e-2), Layer(), Layer()),
    "norms with statistics": lambda: nn.Sequential(
        *(nn.Sequential(nn.BatchNorm1d(WIDTH), Layer()) for _ in range(4))
    ),
}


def gradients(stage: Any, params: Any, buffers: Any, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, new buffers and gradients, of a second microbatch, so that residuals are given away."""
    for _ in range(2):
        torch.manual_seed(3)
        output, new_buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
    return [output, dx, *new_buffers.values(), *(g for g in grads.values() if g is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "min_cut", "full"])
@pytest.mark.parametrize("name", STAGES)
def test_repeated_layers_give_to_the_bit_what_one_program_gives(name: str, remat: Any) -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(STAGES[name]())
    x, cotangent = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    compiled = [fs.compile(apply, backend="aten", remat=remat, repeated=yes) for yes in (True, False)]
    ours, whole = (gradients(stage, params, buffers, x, cotangent) for stage in compiled)
    for a, b in zip(ours, whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", STAGES)
def test_repeated_layers_are_eagers(name: str) -> None:
    torch.manual_seed(0)
    check_stage(
        STAGES[name](),
        torch.randn(4, WIDTH),
        engines=lambda apply: fs.compile(apply, backend="aten", repeated=True),
    )


@pytest.mark.slow
def test_repeated_layers_are_eagers_by_inductor() -> None:
    torch.manual_seed(0)
    check_stage(
        STAGES["one differs"](),
        torch.randn(4, WIDTH),
        engines=lambda apply: fs.compile(apply, backend="inductor", repeated=True),
    )


def test_each_kind_of_layer_is_lowered_once_however_many_there_are() -> None:
    def lowered(depth: int) -> list[int]:
        counts = []
        for program in programs(nn.Sequential(*(Layer() for _ in range(depth)))):
            seen: list[GraphModule] = []

            def lower(module: GraphModule, donated: Collection[str], seen: Any = seen) -> Runner:
                seen.append(module)
                return run_as_python(module, donated)

            chained(lower, OF_ANY_SIZE)(program, ())
            counts.append(len(seen))
        return counts

    assert lowered(6) == lowered(12)
    assert lowered(12)[0] == 1


def test_what_passes_between_layers_is_freed_after_its_last_use() -> None:
    forward, _, _ = programs(nn.Sequential(*(nn.Sequential(Layer(), nn.Dropout(0.0)) for _ in range(6))))
    alive: list[int] = []
    given: list[weakref.ref[Tensor]] = []

    def lower(module: GraphModule, donated: Collection[str]) -> Runner:
        run = run_as_python(module, donated)

        def noting(inputs: list[Tensor]) -> Any:
            alive.append(sum(ref() is not None for ref in given))
            given.extend(weakref.ref(value) for value in inputs)
            return [value.clone() for value in run(inputs)]

        return noting

    (output,) = forward.graph.find_nodes(op="output")
    output.args = (output.args[0][:1],)  # no residuals
    forward.graph.eliminate_dead_code()
    places = forward.graph.find_nodes(op="placeholder")
    inputs = [torch.randn([*node.meta["val"].shape]) for node in places]
    chained(lower, OF_ANY_SIZE)(forward, ())(inputs)
    assert not inputs
    assert len(alive) >= 6
    assert max(alive) == 0  # each layer is the last reader of all that it is given


def test_an_input_is_donated_where_one_layer_alone_reads_it() -> None:
    _, input_grad, _ = programs(nn.Sequential(*(Layer() for _ in range(6))))
    (output,) = input_grad.graph.find_nodes(op="output")
    given = {*input_grad.graph.find_nodes(op="placeholder")} - {*output.args[0]}
    names = {node.name for node in given}
    parts = chain._parts(input_grad, names, OF_ANY_SIZE)
    readers: dict[Any, int] = {}
    for part in parts:
        for node in part.inputs:
            readers[node] = readers.get(node, 0) + 1
    for part in parts:
        donated = {part.inputs[i] for i in part.donated}
        assert donated == {n for n in part.inputs if n in given and readers[n] == 1}


@pytest.mark.parametrize("repeated", ["yes", 1, 4.0])
def test_repeated_is_true_false_or_none(repeated: Any) -> None:
    apply, _, _ = fs.functionalize(nn.Linear(2, 2))
    with pytest.raises(fs.StageError, match=r"repeated must be None, True or False"):
        fs.compile(apply, repeated=repeated)
