"""`remat` as a budget of bytes: what is held, what is computed again, and what is refused."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.engines.graph import budget as budget_module
from funcstage.engines.graph.budget import _groups
from funcstage.report import size

Case = tuple[Any, Any, Any, Tensor]
aten = torch.ops.aten


def narrow_and_wide() -> Case:
    """Products of very different cost for each byte of their results."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((8, 512, 4, 64, 16, 8)):
        layers += [nn.Linear(before, after), nn.Tanh()]
    apply, params, buffers = fs.functionalize(nn.Sequential(*layers))
    return apply, params, buffers, torch.randn(32, 8)


def planned(case: Case, remat: Any) -> Any:
    apply, params, buffers, x = case
    return fs.compile(apply, backend="aten", remat=remat).plan(params, buffers, x)


def test_values_that_lie_in_one_result_are_held_together() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    norm = graph.call_function(aten.native_layer_norm.default, (x, [4], None, None, 1e-5))
    y, mean = (graph.call_function(operator.getitem, (norm, i)) for i in (0, 1))
    turned = graph.call_function(aten.t.default, (y,))
    (part, rest) = (
        graph.call_function(operator.getitem, (graph.call_function(aten.split.Tensor, (turned, 2)), i))
        for i in (0, 1)
    )
    squared = graph.call_function(aten.mul.Tensor, (part, part))
    drawn = graph.call_function(aten.rand_like.default, (x,))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4, 4)
    groups = _groups([x, mean, y, rest, squared, drawn])
    assert [group for group, _ in groups] == [[mean, y, rest], [squared]]


BUDGETS = [i / 20 for i in range(21)]


@pytest.mark.slow
def test_budgets_lie_between_full_and_none_and_are_kept() -> None:
    case = narrow_and_wide()
    full, none = planned(case, "full"), planned(case, "none")
    plans = [planned(case, budget) for budget in BUDGETS]
    for budget, plan in zip(BUDGETS, plans, strict=True):
        allowed = full.held_after_forward + budget * (none.held_after_forward - full.held_after_forward)
        assert plan.held_after_forward <= plan.budget == int(allowed)
    assert plans[0].held_after_forward == full.held_after_forward
    assert plans[0].recomputed_flops == full.recomputed_flops > 0
    assert plans[-1].held_after_forward <= none.held_after_forward
    assert plans[-1].recomputed_flops == 0
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.held_after_forward <= larger.held_after_forward
        assert smaller.recomputed_flops >= larger.recomputed_flops
    assert len({plan.held_after_forward for plan in plans}) > 4


def test_budgets_are_kept_where_there_are_too_many_choices_to_look_at_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = narrow_and_wide()
    budgets = BUDGETS[::5]
    each = [planned(case, budget) for budget in budgets]
    monkeypatch.setattr(budget_module, "FEW", 0)
    for budget, looked_at in zip(budgets, each, strict=True):
        plan = planned(case, budget)
        assert plan.held_after_forward <= plan.budget == looked_at.budget
        assert plan.recomputed_flops >= looked_at.recomputed_flops
    assert plan.recomputed_flops == 0


@pytest.mark.slow
def test_no_choice_within_a_budget_recomputes_less() -> None:
    case = narrow_and_wide()
    apply, params, buffers, x = case
    graph = fs.compile(apply, backend="aten").programs(params, buffers, x).forward.graph
    names = [node.name for node in graph.nodes if node.target is torch.ops.aten.tanh.default]
    choices = []
    for n in range(len(names) + 1):
        for saved in itertools.combinations(names, n):
            plan = planned(case, lambda node, saved=saved: node.name in saved)
            choices.append((plan.held_after_forward, plan.recomputed_flops))
    assert len(choices) == 32
    for budget in BUDGETS:
        plan = planned(case, budget)
        best = min((flops for held, flops in choices if held <= plan.budget), default=None)
        assert best is None or plan.recomputed_flops <= best


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.7, 1.0, 0, 1, np.float32(0.5), Fraction(1, 3)])
def test_results_are_eagers_within_any_budget(budget: Any) -> None:
    apply, params, buffers, x = narrow_and_wide()
    fast = fs.compile(apply, backend="aten", remat=budget)
    output, _, pullback = fs.stage_vjp(fast, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    x = x.clone().requires_grad_()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected, _ = apply(leaves, buffers, x)
    expected.sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(dx, x.grad)
    assert pullback.consumed
    for name, grad in weight_pullback().items():
        assert torch.equal(grad, leaves[name].grad)


def test_what_is_held_is_what_the_plan_says() -> None:
    apply, params, buffers, x = narrow_and_wide()
    for budget in BUDGETS[::4]:
        fast = fs.compile(apply, backend="aten", remat=budget)
        _, _, pullback = fs.stage_vjp(fast, params, buffers, x)
        assert pullback.nbytes == fast.plan(params, buffers, x).held_after_forward


def test_random_numbers_are_drawn_once_within_any_budget() -> None:
    apply, params, buffers = fs.functionalize(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    )
    x = torch.randn(4, 8)
    outcomes = []
    runs: list[Callable[..., Any]] = [apply]
    runs += [fs.compile(apply, backend="aten", remat=budget) for budget in (0.0, 0.5, 1.0)]
    for run in runs:
        torch.manual_seed(3)
        output, _, pullback = fs.stage_vjp(run, params, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        outcomes.append((output, dx, weight_pullback()["0.weight"], torch.rand(())))
    for found in outcomes[1:]:
        for ours, expected in zip(found, outcomes[0], strict=True):
            assert torch.equal(ours, expected)


@torch.library.custom_op(
    "funcstage_tests::two_draws", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def two_draws(x: Tensor) -> list[Tensor]:
    return [torch.rand_like(x), torch.rand_like(x)]


@two_draws.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(x)]


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "one tensor": lambda x: (torch.rand_like(x), torch.rand_like(x)),
    "a list": lambda x: two_draws(x.detach()),
    "a tuple": lambda x: torch.ops.aten.native_dropout(x, 0.5, True),
}


class Drawing(nn.Linear):
    """A checkpointed region whose draws are one operation or two."""

    how = "one tensor"

    def region(self, x: Tensor) -> Tensor:
        y = super().forward(x).sin()
        first, second = DRAWS[self.how](y)
        return (y * first).cos() * second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.region, x, use_reentrant=False)
        return y + torch.rand_like(y)


@pytest.mark.parametrize("how", DRAWS)
def test_draws_of_a_checkpointed_region_are_repeated_whatever_form_they_have(how: str) -> None:
    module, x = Drawing(4, 4), torch.randn(3, 4, requires_grad=True)
    module.how = how
    torch.manual_seed(3)
    expected = module(x)
    grads = torch.autograd.grad(expected.sin().sum(), [x, *module.parameters()])
    drawn = torch.rand(())
    apply, params, buffers = fs.functionalize(module)
    torch.manual_seed(3)
    output, _, pullback = fs.stage_vjp(
        fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x.detach()
    )
    (dx,), weight_pullback = pullback(output.cos())
    found = [output, dx, *weight_pullback().values(), torch.rand(())]
    for ours, theirs in zip(found, [expected.detach(), *grads, drawn], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "remat",
    [
        -0.1,
        1.1,
        float("nan"),
        float("inf"),
        True,
        False,
        -1,
        2,
        None,
        [0.5],
        torch.tensor(0.5),
        0.5j,
        "0.5",
        float,
    ],
)
def test_what_is_no_budget_is_refused(remat: Any) -> None:
    apply, *_ = narrow_and_wide()
    with pytest.raises(fs.StructureError, match=r"remat must be .* a budget between 0 .* and 1"):
        fs.compile(apply, backend="aten", remat=remat)


def test_plans_and_stages_say_their_budget() -> None:
    apply, params, buffers, x = narrow_and_wide()
    fast = fs.compile(apply, backend="aten", remat=0.5)
    plan = fast.plan(params, buffers, x)
    assert f"budget after F {size(plan.budget)}" in " ".join(str(plan).split())
    assert "remat=0.5" in repr(fast)
    assert "budget" not in str(planned((apply, params, buffers, x), "min_cut"))


class Gated(nn.Module):
    """A norm, a gated unit and a residual, as in the blocks of language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 96), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("remat", [0.0, 0.2, 0.4, "full", lambda node: "mm" in str(node.target)])
def test_w_leaves_to_i_what_i_has_at_hand(remat: Any) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(Gated(), Gated()))
    case = apply, params, buffers, torch.randn(64, 16)

    def weight_grad(remat: Any) -> Counter[str]:
        graph = fs.compile(apply, backend="aten", remat=remat).programs(*case[1:]).weight_grad.graph
        return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")

    assert weight_grad(remat) == weight_grad("min_cut")
    assert planned(case, remat).held_after_input <= planned(case, "min_cut").held_after_input
