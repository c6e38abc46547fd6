"""What the sites of a weight pullback yield is what a brute-force computation does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from identity import Identity
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage import trees
from funcstage.engines.levels.first_stage import by_site
from funcstage.testing import strategies

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.fixture
def in_float64() -> Iterable[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def taking_a_gradient(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The same stage, which takes a gradient inside itself and so is split on a plain tape."""

    def taking(*args: Any, **kwargs: Any) -> Any:
        one = torch.ones((), requires_grad=True)
        torch.autograd.grad(one * one, one)
        return apply(*args, **kwargs)

    return taking


ENGINES: dict[str, Callable[[Any], Any]] = {
    "uncompiled": lambda apply: apply,
    "plain tape": taking_a_gradient,
    "compiled": lambda apply: fs.compile(apply, backend="aten"),
    "all computed again": lambda apply: fs.compile(apply, backend="aten", remat="full"),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def weight_pullback_of(
    module: nn.Module, x: Tensor, cotangent: Tensor, engine: str = "uncompiled"
) -> fs.WeightPullback:
    apply, params, buffers = fs.functionalize(module)
    _, _, pullback = fs.stage_vjp(ENGINES[engine](apply), params, buffers, x)
    return pullback(cotangent)[1]


def summed(
    sites: Iterable[fs.Site], of: Callable[[fs.Site], Tensor | None] = lambda _: None
) -> dict[str, Tensor]:
    """The gradients as the sum over the sites, each at a cotangent of its own."""
    total: dict[str, Tensor] = {}
    for site in sites:
        for name, grad in site.vjp(of(site)).items():
            total[name] = total[name] + grad if name in total else grad
    return total


def by_example(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[dict[str, Tensor]]:
    """Each example's gradients, by a backward for each."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(module(x[i : i + 1]), parameters, cotangent[i : i + 1]) for i in range(len(x))
    ]
    return [dict(zip(names, found, strict=True)) for found in grads]


def masked(site: fs.Site, i: int, examples: int) -> Tensor:
    """The cotangent of one example; a layer's leading dimensions may be flattened into one."""
    grad = torch.zeros_like(site.cotangent)
    rows = len(grad) // examples
    grad[i * rows : (i + 1) * rows] = site.cotangent[i * rows : (i + 1) * rows]
    return grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight * 2  # a derived weight that the region captures

        def region(h: Tensor) -> Tensor:
            return torch.tanh(F.linear(self.second(h), weight))

        return checkpoint(region, self.first(x), use_reentrant=False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), (4, 5)),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)), (4, 6, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)), (4, 3, 6, 6)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), (4, 5)),
    "tied": (Tied, (4, 5)),
    "checkpointed": (Checkpointed, (4, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sum_over_the_sites_is_the_weight_gradient_and_looking_uses_nothing_up(
    case: str, engine: str
) -> None:
    make, shape = CASES[case]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    cotangent = torch.randn_like(module(x))
    weight_pullback = weight_pullback_of(module, x, cotangent, engine)
    assert {name for site in weight_pullback.sites for name in site.params} == dict(
        module.named_parameters()
    ).keys()
    found = summed(weight_pullback.sites)
    again = summed(weight_pullback.sites)
    grads = weight_pullback()
    module(x.clone().requires_grad_()).backward(cotangent)
    assert grads.keys() == found.keys()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
        assert torch.equal(found[name], again[name])
        assert torch.equal(grads[name], parameter.grad)


@pytest.mark.parametrize("case", CASES)
def test_the_vjp_at_one_examples_cotangent_is_its_gradient(case: str, engine: str) -> None:
    make, shape = CASES[case]
    torch.manual_seed(1)
    module, x = make(), torch.randn(shape)
    cotangent = torch.randn_like(module(x))
    sites = weight_pullback_of(module, x, cotangent, engine).sites
    for i, expected in enumerate(by_example(module, x, cotangent)):
        found = summed(sites, lambda site, i=i: masked(site, i, len(x)))  # type: ignore[misc]
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_the_norm_of_an_examples_gradient_comes_from_inputs_and_cotangents_alone(engine: str) -> None:
    # |g x^T|^2 = |g|^2 |x|^2: Goodfellow, arXiv 1510.01799.
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    cotangent = torch.randn(4, 3)
    squares = torch.zeros(4)
    for site in weight_pullback_of(module, x, cotangent, engine).sites:
        (inputs,) = site.inputs
        squares += site.cotangent.square().sum(1) * (1 + inputs.square().sum(1))
    expected = [sum(g.square().sum() for g in grads.values()) for grads in by_example(module, x, cotangent)]
    torch.testing.assert_close(squares, torch.stack(expected))


def test_kronecker_factors_are_those_that_hooks_on_the_layers_see(engine: str) -> None:
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    cotangent = torch.randn(4, 3)
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, layer: nn.Module) -> list[Any]:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = [args[0].detach()]

        def backward(_: nn.Module, input_grads: Any, output_grads: tuple[Tensor, ...]) -> None:
            seen[name].append(output_grads[0])

        return [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]

    hooks = [hook for name in ("0", "2") for hook in watch(name, module.get_submodule(name))]
    module(x.clone().requires_grad_()).backward(cotangent)
    for hook in hooks:
        hook.remove()
    sites = weight_pullback_of(module, x, cotangent, engine).sites
    assert {site.params for site in sites} == {("0.bias", "0.weight"), ("2.bias", "2.weight")}
    for site in sites:
        inputs, grads = seen[site.params[0].split(".")[0]]
        torch.testing.assert_close(site.inputs[0].T @ site.inputs[0], inputs.T @ inputs)
        torch.testing.assert_close(site.cotangent.T @ site.cotangent, grads.T @ grads)


def test_a_compressed_cotangent_gives_the_gradient_of_the_compressed(engine: str) -> None:
    module, x = nn.Linear(5, 3), torch.randn(8, 5)
    cotangent = torch.randn(8, 3)
    (site,) = weight_pullback_of(module, x, cotangent, engine).sites
    kept = torch.where(cotangent.abs() > 0.5, cotangent, 0)
    expected = torch.autograd.grad(module(x), [module.weight, module.bias], kept)
    found = site.vjp(kept)
    torch.testing.assert_close((found["weight"], found["bias"]), expected)


def test_a_norm_before_a_view_has_the_cotangent_of_the_norm(engine: str) -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Flatten())
    sites = weight_pullback_of(module, torch.randn(2, 4, 5), torch.randn(2, 12), engine).sites
    (norm,) = [site for site in sites if "1.weight" in site.params]
    assert norm.cotangent.shape == (2, 4, 3)


def test_a_site_says_what_it_is() -> None:
    module = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    norm, linear = weight_pullback_of(module, torch.randn(2, 4, 5), torch.randn(2, 4, 3)).sites
    assert (norm.name, norm.params) == ("native_layer_norm", ("0.bias", "0.weight"))
    assert repr(linear) == "<Site mm of 1.weight, inputs [8, 5], cotangent [2, 4, 3]>"


def test_every_use_of_a_shared_weight_is_a_site(engine: str) -> None:
    sites = weight_pullback_of(Tied(), torch.randn(2, 5), torch.randn(2, 5), engine).sites
    assert [site.params for site in sites] == [("weight",), ("weight",)]


class FirstStage(nn.Module):
    """Embeddings of tokens and of places, a tied weight, and a derived one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, 5), nn.Embedding(6, 5)
        self.block = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5, bias=False))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        h = h + self.block(h) * torch.exp(self.scale)
        return F.linear(h, self.tokens.weight)


def first_stage_of(module: nn.Module, x: Tensor, engine: str = "uncompiled") -> tuple[Tensor, fs.Pullback]:
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(ENGINES[engine](apply), params, buffers, x, argnums=())
    return output, pullback


def test_a_first_stage_has_a_site_for_each_operation_too(engine: str) -> None:
    tokens = torch.randint(9, (4, 6))
    output, pullback = first_stage_of(FirstStage(), tokens, engine)
    _, weight_pullback = pullback(torch.randn_like(output))
    sites = weight_pullback.sites
    assert [(site.name, site.params) for site in sites] == [
        ("embedding", ("tokens.weight",)),
        ("add", ("places.weight",)),
        ("native_layer_norm", ("block.0.bias", "block.0.weight")),
        ("addmm", ("block.1.bias", "block.1.weight")),
        ("mm", ("block.3.weight",)),
        ("mul", ("scale",)),
        ("mm", ("tokens.weight",)),
    ]
    assert torch.equal(sites[0].inputs[0], tokens)


def test_sites_of_a_first_stage_yield_each_examples_gradient_and_use_nothing_up(engine: str) -> None:
    module, tokens = FirstStage(), torch.randint(9, (4, 6))
    output, pullback = first_stage_of(module, tokens, engine)
    cotangent = torch.randn_like(output)
    _, weight_pullback = pullback(cotangent)
    sites = weight_pullback.sites
    for i, expected in enumerate(by_example(module, tokens, cotangent)):
        found = summed(sites, lambda site, i=i: masked(site, i, 4))  # type: ignore[misc]
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
    module(tokens).backward(cotangent)
    for name, grad in weight_pullback().items():
        assert torch.equal(grad, module.get_parameter(name).grad)  # type: ignore[arg-type]


def test_kronecker_factors_of_a_first_stage_are_those_of_a_later_one(engine: str) -> None:
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    cotangent = torch.randn(4, 3)
    _, pullback = first_stage_of(module, x, engine)
    first = pullback(cotangent)[1].sites
    for site, later in zip(first, weight_pullback_of(module, x, cotangent).sites, strict=True):
        assert site.params == later.params
        torch.testing.assert_close(site.inputs[0], later.inputs[0])
        torch.testing.assert_close(site.cotangent, later.cotangent)


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_pieces_of_a_first_stage_are_its_sites_of_some_parameters(engine: str) -> None:
    module, tokens = FirstStage(), torch.randint(9, (4, 6))
    output, pullback = first_stage_of(module, tokens, engine)
    cotangent = torch.randn_like(output)
    pieces = pullback(cotangent)[1].split(3)
    module(tokens).backward(cotangent)
    had: list[str] = []
    for piece in reversed(pieces):
        found = summed(piece.sites)
        grads = {name: grad for name, grad in piece().items() if grad is not None}
        assert grads.keys() == found.keys()
        had += grads
        for name, grad in grads.items():
            torch.testing.assert_close(grad, module.get_parameter(name).grad)
            torch.testing.assert_close(found[name], grad)
    assert len(pieces) == 3
    assert sorted(had) == sorted(name for name, _ in module.named_parameters())


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_sites_of_a_first_stage_show_residuals_that_were_moved(engine: str) -> None:
    output, pullback = first_stage_of(FirstStage(), torch.randint(9, (4, 6)), engine)
    weight_pullback = pullback(torch.randn_like(output))[1]
    expected = [site.inputs for site in weight_pullback.sites]
    moved = optree.tree_map(torch.clone, weight_pullback, namespace="funcstage")
    found = [site.inputs for site in moved.sites]
    torch.testing.assert_close(found, expected)
    held = {leaf.data_ptr() for leaf in optree.tree_leaves(moved, namespace="funcstage")}
    assert all(tensor.data_ptr() in held for inputs in found for tensor in inputs)


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_pieces_of_a_retained_first_stage_leave_it_what_it_needs(engine: str) -> None:
    module, tokens = FirstStage(), torch.randint(9, (4, 6))
    output, pullback = first_stage_of(module, tokens, engine)
    cotangent = torch.randn_like(output)
    for piece in pullback(cotangent, retain=True)[1].split(2):
        piece(retain=True)
        piece()
    module(tokens).backward(cotangent)
    for name, grad in pullback(cotangent)[1]().items():
        torch.testing.assert_close(grad, module.get_parameter(name).grad)


def test_a_site_of_a_first_stage_costs_its_cotangent_times_the_rows_of_its_widest_weight() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))
    apply, params, buffers = fs.functionalize(module)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(6, 3), argnums=())
    tape = by_site(pullback(torch.randn(6, 4))[1]._tape)  # type: ignore[arg-type]
    costs = {tuple(sorted(tape._reached(site))): tape._cost(site, grads) for site, grads in tape.arrived}
    assert costs == {(0, 1): 6 * 5 * 3, (2, 3): 6 * 4 * 5, (4, 5): 6 * 4}
    cut = [sorted(piece.reached()) for piece in tape.split(2)]
    assert cut == [[0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_a_first_stage_with_a_number_and_an_empty_weight_among_its_parameters_is_divided(engine: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)
            self.gate, self.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(0, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * self.gate) + self.none.sum()

    module = Gated()
    whole, pieces = (
        first_stage_of(module, torch.ones(4, 3), engine)[1](torch.ones(4, 2))[1] for _ in range(2)
    )
    total: dict[str, Tensor] = {}
    for piece in pieces.split(3):
        total |= {name: grad for name, grad in piece().items() if grad is not None}
    torch.testing.assert_close(total, whole())


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_chain_of_a_first_stage_runs_when_it_is_divided_and_in_w_where_it_is_not(
    parts: int, engine: str
) -> None:
    ran: list[int] = []

    class Counted(Identity):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            ran.append(1)
            return grad

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(9, 5), nn.Linear(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.linear(Counted.apply(self.embedding(tokens)))

    output, pullback = first_stage_of(First(), torch.arange(6), engine)
    pieces = pullback(torch.ones_like(output))[1].split(parts)
    assert (len(pieces), len(ran)) == (parts, parts - 1)
    for piece in pieces:
        piece()
    assert len(ran) == 1


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_residuals_of_a_first_stage_may_move_before_and_after_it_is_split(engine: str) -> None:
    module, tokens = FirstStage(), torch.randint(9, (4, 6))
    output, pullback = first_stage_of(module, tokens, engine)
    cotangent = torch.randn_like(output)
    _, weight_pullback = pullback(cotangent)
    moved = optree.tree_map(torch.clone, weight_pullback, namespace="funcstage")
    pieces = [optree.tree_map(torch.clone, piece, namespace="funcstage") for piece in moved.split(3)]
    module(tokens).backward(cotangent)
    for name, grad in fs.stage_backward_weight(pieces).items():
        torch.testing.assert_close(grad, module.get_parameter(name).grad)


@pytest.mark.parametrize("engine", ["uncompiled", "plain tape"])
def test_a_write_between_i_and_w_of_a_first_stages_piece_is_noticed(engine: str) -> None:
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    _, pullback = first_stage_of(module, x, engine)
    first, second = pullback(torch.randn(4, 3))[1].split(2)
    x.zero_()
    second()  # reads what tanh returned
    with pytest.raises(fs.WrittenError, match="args"):
        first()


def test_a_used_weight_pullback_has_no_sites_and_its_sites_no_vjp(engine: str) -> None:
    weight_pullback = weight_pullback_of(nn.Linear(3, 2), torch.ones(4, 3), torch.ones(4, 2), engine)
    (site,) = weight_pullback.sites
    weight_pullback(retain=True)
    assert torch.equal(site.vjp()["bias"], torch.full((2,), 4.0))
    weight_pullback()
    for use in (lambda: weight_pullback.sites, site.vjp):
        with pytest.raises(fs.ConsumedError, match="was used before"):
            use()


@pytest.mark.parametrize(
    "wrong", [torch.ones(4, 3), torch.ones(4, 2, dtype=torch.float32), torch.ones(8), None, 1.0]
)
def test_a_cotangent_that_is_not_the_sites_is_refused(wrong: Any, engine: str) -> None:
    (site,) = weight_pullback_of(nn.Linear(3, 2), torch.ones(4, 3), torch.ones(4, 2), engine).sites
    if wrong is None:
        assert site.vjp(wrong).keys() == {"weight", "bias"}  # the one that arrived
        return
    with pytest.raises(fs.LeafError, match=r"must look like the one that arrived, float64\[4, 2\]"):
        site.vjp(wrong)


def test_the_sites_of_a_compiled_stage_are_those_of_the_uncompiled_one() -> None:
    modules = [
        nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False)),
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
    ]
    for module in modules:
        x = torch.randn(4, 6, 5)
        cotangent = torch.randn(4, 6, 3)
        of_both = zip(
            *(weight_pullback_of(module, x, cotangent, e).sites for e in ("uncompiled", "compiled")),
            strict=True,
        )
        for expected, site in of_both:
            assert (site.name, site.params) == (expected.name, expected.params)
            torch.testing.assert_close(site.cotangent.flatten(0, -2), expected.cotangent.flatten(0, -2))
            torch.testing.assert_close(site.inputs[0].flatten(0, -2), expected.inputs[0].flatten(0, -2))


class TwoProducts(nn.Module):
    """Two weights whose products are added: one cotangent arrives at both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(torch.tanh(x))


def test_every_product_of_a_compiled_stage_is_a_site_with_its_own_input() -> None:
    x, cotangent = torch.randn(4, 5), torch.randn(4, 3)
    sites = weight_pullback_of(TwoProducts(), x, cotangent, "compiled").sites
    inputs = {name: site.inputs for site in sites for name in site.params if name.endswith("weight")}
    assert torch.equal(inputs["first.weight"][0], x)
    assert torch.equal(inputs["second.weight"][0], torch.tanh(x))
    assert all(torch.equal(site.cotangent, cotangent) for site in sites)


def test_what_sites_show_is_not_overwritten_by_w(engine: str) -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5))
    weight_pullback = weight_pullback_of(module, torch.randn(4, 5), torch.randn(4, 5), engine)
    shown = [tensor for site in weight_pullback.sites for tensor in (*site.inputs, site.cotangent)]
    before = [tensor.clone() for tensor in shown]
    weight_pullback()
    assert all(map(torch.equal, shown, before))


def test_pieces_have_the_sites_of_their_parameters(engine: str) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    x, cotangent = torch.randn(4, 5), torch.randn(4, 3)
    for piece in weight_pullback_of(module, x, cotangent, engine).split(3):
        found = summed(piece.sites)
        for name, grad in piece().items():
            assert (grad is None) == (name not in found)
            if grad is not None:
                torch.testing.assert_close(found[name], grad)


@pytest.mark.slow
def test_an_inductor_stage_has_sites_too() -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    apply, params, buffers = fs.functionalize(module)
    x, cotangent = torch.randn(4, 5), torch.randn(4, 3)
    _, _, pullback = fs.stage_vjp(fs.compile(apply), params, buffers, x)
    _, weight_pullback = pullback(cotangent)
    sites = weight_pullback.sites
    assert [site.params for site in sites] == [(f"{i}.bias", f"{i}.weight") for i in (0, 2, 3)]
    for i, expected in enumerate(by_example(module, x, cotangent)):
        found = summed(sites, lambda site, i=i: masked(site, i, len(x)))  # type: ignore[misc]
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_sums_that_i_has_made_are_named_with_the_way_out() -> None:
    module = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 2))
    x, cotangent = torch.randn(4096, 64), torch.randn(4096, 2)
    apply, params, buffers = fs.functionalize(module)
    _, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
    _, weight_pullback = pullback(cotangent)
    with pytest.raises(
        fs.StageError, match=r"already summed the gradients of 0\.weight.*fs\.compile\(apply, sites=True\)"
    ):
        _ = weight_pullback.sites
    expected = weight_pullback()
    fast = fs.compile(apply, backend="aten", sites=True)
    _, _, pullback = fs.stage_vjp(fast, params, buffers, x)
    _, weight_pullback = pullback(cotangent)
    for name, grad in summed(weight_pullback.sites).items():
        torch.testing.assert_close(grad, expected[name])
    cotangents = [site.cotangent.shape for site in weight_pullback.sites]
    assert all(shape[0] == 4096 for shape in cotangents)


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_whether_w_sums_is_yes_or_no(wrong: Any) -> None:
    with pytest.raises(fs.StructureError, match="sites must be True or False"):
        fs.compile(fs.functionalize(nn.Linear(3, 2)).apply, sites=wrong)


# Sums are compared to nine digits, which casts and autocast do not leave.
PRECISE = tuple(block for block in strategies.BLOCKS if block not in ("cast", "autocast"))


def check_sums(module: nn.Module, seed: int, engine: str, argnums: Any = None) -> None:
    apply, params, buffers = fs.functionalize(module)
    torch.manual_seed(seed)
    x = torch.randn(2, 3)
    try:
        output, _, pullback = fs.stage_vjp(ENGINES[engine](apply), params, buffers, x, argnums=argnums)
    except (fs.TraceError, fs.PurityError):  # reads values; writes into arguments, on a plain tape
        reject()
    _, weight_pullback = pullback(trees.map_leaves(torch.ones_like, output))
    found = summed(weight_pullback.sites)
    for name, grad in weight_pullback().items():
        assert (grad is None) == (name not in found)
        if grad is not None:
            close = 1e-9 * grad.abs().max().item()
            torch.testing.assert_close(found[name], grad, rtol=0, atol=close, equal_nan=True)


MODULES = strategies.modules(PRECISE, dtype=torch.float64)


UNCOMPILED = st.sampled_from(("uncompiled", "plain tape"))
ARGNUMS = st.sampled_from((None, ()))


@settings(deadline=None)
@given(module=MODULES, seed=st.integers(0, 99), engine=UNCOMPILED)
def test_any_stages_sites_sum_up_to_its_weight_gradient(module: nn.Module, seed: int, engine: str) -> None:
    check_sums(module, seed, engine)


@settings(deadline=None)
@given(module=MODULES, seed=st.integers(0, 99), engine=UNCOMPILED)
def test_any_first_stages_sites_and_pieces_sum_up_to_w(module: nn.Module, seed: int, engine: str) -> None:
    check_sums(module, seed, engine, argnums=())
    torch.manual_seed(seed)
    x = torch.randn(2, 3)
    state = torch.get_rng_state()
    grads = []
    for parts in (1, 3):
        torch.set_rng_state(state)
        output, pullback = first_stage_of(module, x, engine)
        pieces = pullback(trees.map_leaves(torch.ones_like, output))[1].split(parts)
        grads.append(fs.stage_backward_weight(pieces))
    whole, of_pieces = grads
    for name, grad in whole.items():
        assert (grad is None) == (of_pieces[name] is None)
        if grad is not None:
            close = 1e-9 * grad.abs().max().item()
            torch.testing.assert_close(of_pieces[name], grad, rtol=0, atol=close, equal_nan=True)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)  # as tracing takes a moment
@given(
    module=MODULES,
    seed=st.integers(0, 99),
    engine=st.sampled_from(("compiled", "all computed again")),
    argnums=ARGNUMS,
)
def test_any_compiled_stages_sites_sum_up_to_its_weight_gradient(
    module: nn.Module, seed: int, engine: str, argnums: tuple[int, ...] | None
) -> None:
    check_sums(module, seed, engine, argnums)


def test_sites_of_two_products_may_have_one_cotangent() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x)
            return self.cell(x, (h, c))[0]

    check_sums(Twice(), 0, "compiled")


def test_a_gradient_that_is_a_sites_cotangent_is_not_the_same_memory(engine: str) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.linear = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.shift)

    weight_pullback = weight_pullback_of(Shift(), torch.randn(4, 5), torch.randn(4, 3), engine)
    shown = [site.cotangent for site in weight_pullback.sites]
    before = [cotangent.clone() for cotangent in shown]
    for grad in weight_pullback().values():
        grad.zero_()
    assert all(map(torch.equal, shown, before))
