"""W in pieces: what `weight_pullback.split` promises, on every engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage._torch.tensors import users_of
from funcstage.engines.pieces import balanced, connected

ENGINES: dict[str, Callable[[Any], Any]] = {
    "levels": lambda apply: apply,
    "aten": lambda apply: fs.compile(apply, backend="aten"),
    "aten, all computed again": lambda apply: fs.compile(apply, backend="aten", remat="full"),
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.other = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.other(torch.tanh(F.linear(x, self.weight))), self.weight.t()) * self.weight.sum()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        def region(h: Tensor) -> Tensor:
            return torch.tanh(self.layers[1](torch.tanh(self.layers[2](h))))

        return self.layers[3](checkpoint(region, self.layers[0](x), use_reentrant=False))


class Region(nn.Module):
    """Its body in a checkpointed region."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Energy(nn.Module):
    """A stage that only plain autograd runs: it takes a gradient inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            h = torch.tanh(self.first(x))
            (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return self.second(slope + h)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.LayerNorm(6), nn.Linear(6, 5)
    ),
    "tied": Tied,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 5)
    ),
    "checkpointed": Checkpointed,
    "gradients inside": Energy,
    "frozen": lambda: nn.Sequential(nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 5)),
    "recurrent": lambda: nn.Sequential(nn.RNNCell(5, 5), nn.Linear(5, 5)),
}


def weight_pullback_of(module: nn.Module, engine: str, x: Tensor, **options: Any) -> fs.WeightPullback:
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(ENGINES[engine](apply), params, buffers, x, **options)
    generator = torch.Generator().manual_seed(1)
    return pullback(torch.randn(output.shape, generator=generator))[1]


def made(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODULES[case](), torch.randn(4, 5)


def eager_grads(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    module = copy.deepcopy(module)
    output = module(x.clone().requires_grad_())
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("parts", [1, 2, 3, 1000])
@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_run_in_any_order_yield_the_gradients_of_the_whole_to_the_bit(
    engine: str, case: str, parts: int
) -> None:
    module, x = made(case)
    whole = weight_pullback_of(module, engine, x)()
    pieces = weight_pullback_of(module, engine, x).split(parts)
    assert 1 <= len(pieces) <= parts
    found = [piece() for piece in reversed(pieces)]
    for name, expected in eager_grads(module, x).items():
        contributions = [grads[name] for grads in found if grads[name] is not None]
        assert len(contributions) == (expected is not None)
        if expected is not None:
            assert torch.equal(contributions[0], whole[name])
            torch.testing.assert_close(contributions[0], expected)
    assert all(any(grad is not None for grad in grads.values()) for grads in found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parts", [2, 3])
def test_there_are_as_many_pieces_as_are_asked_for_where_there_is_enough_to_divide(
    engine: str, parts: int
) -> None:
    module, x = made("mlp")
    assert len(weight_pullback_of(module, engine, x).split(parts)) == parts


@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_of_several_microbatches_sum_up_in_any_mixture(engine: str) -> None:
    module, x = made("mlp")
    microbatches = x, x + 1, x * 2
    expected = fs.stage_backward_weight([weight_pullback_of(module, engine, m) for m in microbatches])
    first, second = zip(*(weight_pullback_of(module, engine, m).split(2) for m in microbatches), strict=True)
    total = fs.stage_backward_weight([*second])
    addresses = {name: grad.data_ptr() for name, grad in total.items() if grad is not None}
    total = fs.stage_backward_weight(first, accumulate=total)
    for name, grad in expected.items():
        assert torch.equal(total[name], grad)
        assert addresses.get(name, total[name].data_ptr()) == total[name].data_ptr()
    # into accumulators of a wider dtype, all of them there
    wide = {name: torch.zeros_like(grad, dtype=torch.float64) for name, grad in expected.items()}
    pieces = [piece for m in microbatches for piece in weight_pullback_of(module, engine, m).split(3)]
    total = fs.stage_backward_weight(pieces, accumulate=wide)
    for name, grad in expected.items():
        assert total[name] is wide[name]
        torch.testing.assert_close(total[name], grad.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_splitting_consumes_the_whole_and_says_where_it_went(engine: str) -> None:
    module, x = made("mlp")
    weight_pullback = weight_pullback_of(module, engine, x)
    pieces = weight_pullback.split(2)
    assert weight_pullback.consumed
    assert weight_pullback.nbytes == 0
    for use in (
        weight_pullback,
        lambda: weight_pullback.split(2),
        lambda: weight_pullback.sites,
        lambda: fs.stage_backward_weight(weight_pullback),
    ):
        with pytest.raises(
            fs.ConsumedError, match=r"was split, and its pieces have its residuals\. Use those"
        ):
            use()
    for piece in pieces:
        piece()
        with pytest.raises(fs.ConsumedError, match="was used before"):
            piece.split(2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_may_be_split_where_the_whole_is_needed_too(engine: str) -> None:
    module, x = made("tied")
    weight_pullback = weight_pullback_of(module, engine, x)
    found = fs.stage_backward_weight(copy.copy(weight_pullback).split(2))
    for name, grad in weight_pullback().items():
        assert torch.equal(found[name], grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_piece_is_a_weight_pullback_in_every_respect(engine: str) -> None:
    module, x = made("mlp")
    whole = weight_pullback_of(module, engine, x)()
    pieces = list(weight_pullback_of(module, engine, x).split(2))
    assert all(piece.nbytes > 0 for piece in pieces)
    assert "gradients of" in repr(pieces[0])
    again = pieces[0](retain=True)
    pieces[0] = optree.tree_map(torch.clone, pieces[0], namespace="funcstage")
    smaller = [smaller for piece in pieces for smaller in piece.split(2)]
    assert len(smaller) == 4
    found = fs.stage_backward_weight(smaller)
    for name, grad in whole.items():
        assert torch.equal(found[name], grad)
        assert again[name] is None or torch.equal(again[name], grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_one_piece_may_be_written_before_the_others_run(engine: str) -> None:
    module, x = made("weight norm")
    whole = weight_pullback_of(module, engine, x)()
    for piece in weight_pullback_of(module, engine, x).split(9):
        for name, grad in piece().items():
            if grad is not None:
                assert torch.equal(grad, whole[name])
                grad.fill_(torch.nan)


class Fan(nn.Module):
    """Several layers that read one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.first(x))
        return sum(layer(h) for layer in self.layers)  # type: ignore[return-value]


@pytest.mark.parametrize("engine", ["levels", "aten"])
def test_what_pieces_share_is_freed_with_the_last_of_them(engine: str) -> None:
    torch.manual_seed(0)
    pieces = list(weight_pullback_of(Fan(), engine, torch.randn(64, 5)).split(4))
    found = [optree.tree_leaves(piece, namespace="funcstage") for piece in pieces]  # type: ignore[arg-type]
    held = {leaf.data_ptr(): leaf.untyped_storage() for leaves in found for leaf in leaves}
    needed = [{leaf.data_ptr() for leaf in leaves} for leaves in found]
    del found
    assert sum(map(len, needed)) > len(held)  # or else they would share nothing
    counts = []
    while pieces:
        counts.append({address: users_of(storage._cdata) for address, storage in held.items()})
        pieces.pop()()
    for address, storage in held.items():
        nobody = users_of(storage._cdata)
        for k, count in enumerate(counts):  # before k pieces of four were left out
            holders = sum(address in addresses for addresses in needed[: len(needed) - k])
            assert (count[address] > nobody) == (holders > 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parts", [0, -1, True, 1.5, 2.0, "2", None, [1, 2], torch.tensor(2), (0.5, 0.5)])
def test_what_is_no_number_of_pieces_is_refused_and_consumes_nothing(engine: str, parts: Any) -> None:
    module, x = made("mlp")
    weight_pullback = weight_pullback_of(module, engine, x)
    with pytest.raises(fs.StructureError, match="the number of pieces, a whole number of 1 or more; got"):
        weight_pullback.split(parts)
    assert weight_pullback()["0.weight"] is not None


def test_numpys_integers_are_numbers_of_pieces() -> None:
    module, x = made("mlp")
    assert len(weight_pullback_of(module, "levels", x).split(np.int64(2))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_without_gradients_is_one_empty_piece(engine: str) -> None:
    (piece,) = weight_pullback_of(nn.Tanh(), engine, torch.randn(4, 5)).split(3)
    assert piece() == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_after_i_is_noticed_by_split_and_by_the_pieces_that_read_it(engine: str) -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    x = torch.randn(4, 5)
    weight_pullback = weight_pullback_of(module, engine, x)
    before = x.clone()
    first, second = weight_pullback.split(2)
    x.zero_()
    failed = []
    for piece in (first, second):
        try:
            piece()
        except fs.WrittenError:
            failed.append(piece)
    assert first in failed
    assert (second in failed) == (engine == "aten, all computed again")  # from x
    whole = weight_pullback_of(module, engine, before)
    before.zero_()
    with pytest.raises(fs.WrittenError):
        whole.split(2)
    assert not whole.consumed


def test_inductors_pieces_yield_the_gradients_of_the_whole() -> None:
    module, x = made("mlp")
    apply, params, buffers = fs.functionalize(module)
    fast = fs.compile(apply)
    for parts in (2, 9):
        output, _, pullback = fs.stage_vjp(fast, params, buffers, x)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        found = fs.stage_backward_weight(pullback(cotangent)[1].split(parts))
        for name, expected in eager_grads(module, x).items():
            torch.testing.assert_close(found[name], expected)


def test_a_compiled_first_stage_runs_its_chain_once_when_it_is_split() -> None:
    module = nn.Sequential(nn.Embedding(9, 8), *(nn.Linear(8, 8) for _ in range(4)))
    tokens = torch.randint(9, (4, 6))
    apply, params, buffers = fs.functionalize(module)
    fast = fs.compile(apply, backend="aten")

    def flops(function: Callable[[], Any]) -> tuple[int, Any]:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops(), result

    def pulled() -> fs.WeightPullback:
        output, _, pullback = fs.stage_vjp(fast, params, buffers, tokens)
        return pullback(torch.ones_like(output))[1]

    whole, expected = flops(pulled())
    weight_pullback = pulled()
    at_once, pieces = flops(lambda: weight_pullback.split(3))
    parts = [flops(piece) for piece in pieces]
    assert len(pieces) == 3
    assert 0 < at_once < whole
    assert at_once + sum(n for n, _ in parts) == whole
    for name, grad in expected.items():
        assert sum(found[name] is not None and torch.equal(found[name], grad) for _, found in parts) == 1


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([5, 1, 1, 1, 1, 1], 2, [1, 5]),
        ([1, 2, 3], 7, [1, 1, 1]),
        ([0, 0, 0, 9], 2, [1, 3]),
        ([0, 0, 0], 2, [1, 2]),
        ([], 3, []),
        ([4], 1, [1]),
    ],
)
def test_a_row_is_cut_in_runs_of_equal_cost(costs: list[float], parts: int, expected: list[int]) -> None:
    runs = balanced(costs, parts)
    assert [len(run) for run in runs] == expected
    assert [i for run in runs for i in run] == [*range(len(costs))]


def test_parts_are_connected_by_way_of_others() -> None:
    assert connected([{1}, {2}, {1, 3}, {4}, {3, 2}, set()]) == [[0, 1, 2, 4], [3], [5]]


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    ("engine", "region", "argnums"),
    [*itertools.product(ENGINES, (False, True), (None,)), ("levels", False, ())],
)
def test_the_costliest_piece_costs_as_little_as_can_be(
    engine: str, region: bool, argnums: Any, parts: int
) -> None:
    torch.manual_seed(0)
    widths = [4, 64, 8, 8, 32, 2, 4]
    each = [n * m for n, m in itertools.pairwise(widths)]
    layers = [nn.Sequential(nn.Linear(n, m, bias=False), nn.Tanh()) for n, m in itertools.pairwise(widths)]
    body = nn.Sequential(*layers)
    module = Region(body) if region else body
    pieces = weight_pullback_of(module, engine, torch.randn(5, 4), argnums=argnums).split(parts)
    costs = [sum(grad.numel() for grad in piece().values() if grad is not None) for piece in pieces]
    cuts = itertools.combinations(range(1, len(each)), parts - 1)
    possible = [[sum(each[a:b]) for a, b in itertools.pairwise((0, *cut, len(each)))] for cut in cuts]
    assert sum(costs) == sum(each)
    assert max(costs) == min(map(max, possible))
