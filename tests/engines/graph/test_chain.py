"""Repeated layers are lowered once, and what comes out is what one program gives."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_repeats import WIDTH, Layer, programs
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import funcstage as fs
from funcstage.engines.graph import chain, inductor, surplus
from funcstage.engines.graph.chain import OF_ANY_SIZE, WORTH_IT, chained
from funcstage.engines.graph.repeats import ordered
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
@pytest.mark.parametrize("share", [surplus.SURPLUS, math.inf])
@pytest.mark.parametrize("remat", ["none", "min_cut", "full"])
@pytest.mark.parametrize("name", STAGES)
def test_repeated_layers_give_to_the_bit_what_one_program_gives(
    name: str, remat: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surplus, "SURPLUS", share)
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


@pytest.mark.parametrize(
    ("backend", "repeated", "least"),
    [
        ("aten", None, None),
        ("aten", False, None),
        ("aten", True, OF_ANY_SIZE),
        ("inductor", False, None),
        ("inductor", None, WORTH_IT),
        ("inductor", True, OF_ANY_SIZE),
    ],
)
def test_repeated_layers_become_parts_where_that_is_asked_for_or_worth_it(
    backend: str, repeated: bool | None, least: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = importlib.import_module("funcstage.engines.graph.compile")  # the package has its function
    monkeypatch.setattr(compiling, "chained", lambda *args: args)
    _, lower = compiling._backend(backend, repeated)
    of_backend = run_as_python if backend == "aten" else inductor.lower
    assert lower == (of_backend if least is None else (of_backend, least))


@pytest.mark.slow
def test_repeated_layers_are_eagers_by_inductor() -> None:
    torch.manual_seed(0)
    check_stage(
        STAGES["one differs"](),
        torch.randn(4, WIDTH),
        engines=lambda apply: fs.compile(apply, backend="inductor", repeated=True),
    )


def lowered(module: nn.Module, x: Tensor, **options: Any) -> list[int]:
    """How many programs are lowered for F, I and W."""
    counts = []
    apply, params, buffers = fs.functionalize(module)
    for program in fs.compile(apply, backend="aten", **options).programs(params, buffers, x):
        seen: list[GraphModule] = []

        def lower(module: GraphModule, donated: Collection[str], seen: Any = seen) -> Runner:
            seen.append(module)
            return run_as_python(module, donated)

        chained(lower, OF_ANY_SIZE)(program, ())
        counts.append(len(seen))
    return counts


class Gated(nn.Module):
    """The second half of a transformer's block, behind a norm whose scales are trained."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@pytest.mark.parametrize("depth", [4, 12])
def test_layers_that_are_alike_are_lowered_once_the_first_and_last_among_them(depth: int) -> None:
    module = nn.Sequential(*(Gated() for _ in range(depth)))
    assert lowered(module, torch.randn(8, 64)) == [1, 1, 1]
    forward, _, weight_grad = lowered(module, torch.randn(8, 64), remat="full")
    assert forward == weight_grad == 1


def test_where_it_would_be_much_that_nobody_reads_the_first_layer_has_a_program_of_its_own() -> None:
    module = nn.Sequential(*(Gated() for _ in range(4)))
    assert lowered(module, torch.randn(256, 64)) == [1, 1, 2]


def runs_of_two(more: Any, *extra: Tensor) -> list[surplus.Run]:
    """Of a part, and of one that begins alike and goes on."""

    def both(x: Tensor, y: Tensor, *extra: Tensor) -> Any:
        a, b = x.sin() * x, y.sin() * y
        return a, b, more(b, *extra)

    root = make_fx(both)(torch.randn(4, 4), torch.randn(4, 4), *extra)
    nodes, (x, y, *others) = ordered(root.graph), root.graph.find_nodes(op="placeholder")
    all_of_them = frozenset(range(1 + len(others)))
    return surplus.runs_of(
        [
            surplus.Part(nodes[:2], [x], [nodes[1]], frozenset({0})),
            surplus.Part(nodes[2:], [y, *others], [nodes[3], nodes[-1]], all_of_them),
        ],
        root,
    )


def test_a_part_runs_as_one_that_goes_on_where_that_maps_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    part, whole = runs_of_two(torch.tanh)
    assert part.form != whole.form, "more than the share"
    monkeypatch.setattr(surplus, "SURPLUS", math.inf)
    part, whole = runs_of_two(torch.tanh)
    assert part.form == whole.form
    assert part.model is whole.model
    assert part.results[1] is None
    assert part.donated == {0}
    part, whole = runs_of_two(torch.mul, torch.randn(4, 4))
    assert part.form == whole.form
    assert len({*part.inputs}) == 1, "the other factor may be any"
    assert not part.donated, "what it is given twice would be overwritten between"


@pytest.mark.parametrize(
    ("more", "extra"),
    [
        (lambda b: b @ b, ()),
        (lambda b: b > 0, ()),
        (torch.add, (torch.ones(4, 4, dtype=torch.int64),)),
        (torch.mul, (torch.randn(4),)),
    ],
    ids=["a product", "no number", "an integer", "of another shape"],
)
def test_a_part_computes_nothing_for_nobody_that_takes_long_or_might_fail(
    more: Any, extra: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surplus, "SURPLUS", math.inf)
    part, whole = runs_of_two(more, *extra)
    assert part.form != whole.form
    assert part.model is not whole.model


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
