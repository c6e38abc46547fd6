"""Budgets of bytes, for any stage: kept, monotone, and without effect on what comes out."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import funcstage as fs
from funcstage.testing import strategies
from funcstage.testing.stages import Named, Stage, use

SHARE = settings(max_examples=settings.default.max_examples // 4)

BUDGETS = st.one_of(st.floats(0, 1), st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)))


def plan(stage: Stage, remat: Any) -> Any:
    """Plan a stage."""
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    fast = fs.compile(apply, backend="aten", remat=remat)
    return fast.plan(params, buffers, *args, argnums=stage.argnums, **kwargs)


SPARED = Stage(
    body=(
        use("batch norm", affine=False, stats=True, momentum=0.1),
        use("normalised weight", how="weight"),
        use("batch norm", affine=False, stats=False, momentum=0.1),
        use("product", kind="chain"),
    ),
    shape=(2, 3, 1, 2),
    dtype=torch.float32,
    inputs=({"c": "name"}, "number"),
    keywords={"scale": Named("added", "flag")},
    output=("hidden", [["other", "detached", "sum"]]),
    argnums=-3,
    training=False,
)
"""What is saved spares arguments that are held otherwise, so that a better choice may hold less."""


@SHARE
@given(stage=strategies.stages(), budgets=st.lists(BUDGETS, min_size=2, max_size=3))
@example(SPARED, [0.05, 0.3, 0.4])
def test_a_larger_budget_holds_no_less_and_recomputes_no_more_and_none_is_exceeded(
    stage: Stage, budgets: list[float]
) -> None:
    assume(not stage.reads_values)
    least, most = (plan(stage, remat).held_after_forward for remat in ("full", "none"))
    plans = [plan(stage, budget) for budget in sorted(budgets)]
    for budget, found in zip(sorted(budgets), plans, strict=True):
        assert found.held_after_forward <= found.budget <= max(least, least + budget * (most - least))
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.recomputed_flops >= larger.recomputed_flops
        if least <= most:
            assert smaller.held_after_forward <= larger.held_after_forward
    assert plan(stage, 0.0).held_after_forward <= least
    assert plan(stage, 1.0).held_after_forward <= max(least, most)


@SHARE
@given(stage=strategies.stages(), budget=BUDGETS)
def test_within_any_budget_the_split_is_eagers(stage: Stage, budget: float) -> None:
    stage.check(engines=lambda apply: fs.compile(apply, backend="aten", remat=budget), flops=False)
