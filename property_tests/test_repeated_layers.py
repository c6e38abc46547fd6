"""Repeated layers, one of which may differ: lowered once, they give what one program gives, and eager."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pullbacks import assert_bitwise_equal, cotangents

import funcstage as fs
from funcstage import trees
from funcstage.engines.graph import chain, surplus
from funcstage.testing import strategies
from funcstage.testing.stages import Block, Node, Stage, after, inner_place

SHARE = settings(max_examples=settings.default.max_examples // 2)
FEW = settings(max_examples=2)

DIFFERENCES = ("frozen", "eval", "autocast", "residual", "other", "none")


@st.composite
def deep(draw: st.DrawFn) -> Stage:
    """Draw a stage of layers that are alike but for one of them."""
    stage = draw(strategies.stages())
    layer = Block("residual", (stage.body,))
    place = stage.start
    hypothesis.assume(_fits(layer, stage))
    body: list[Node] = [layer] * draw(st.integers(2, 5))
    difference = draw(st.sampled_from(DIFFERENCES))
    if difference == "other":
        other = Block("residual", (draw(strategies.stages()).body,))
        hypothesis.assume(_fits(other, stage) and _runs(other, stage))
        body.insert(draw(st.integers(0, len(body))), other)
    elif difference != "none":
        body.insert(draw(st.integers(0, len(body))), Block(difference, ((layer,),)))
    hypothesis.assume(after(body, place).shape == place.shape)
    found = replace(stage, body=tuple(body))
    hypothesis.assume(_runs(layer, found))
    return found


def _fits(layer: Block, stage: Stage) -> bool:
    place = stage.start
    try:
        return after(layer.bodies[0], inner_place(layer, place)).shape == place.shape
    except Exception:  # drawn for another shape
        return False


def _runs(layer: Block, stage: Stage) -> bool:
    """Tell whether eager can train the stage: its layers were drawn for other places than those they have."""
    try:
        module, args, kwargs = replace(stage, body=(layer, *stage.body)).build()
        leaves = trees.flatten(module(*args, **kwargs))[0]
        losses = [leaf.abs().sum() for leaf in leaves if trees.is_differentiable(leaf) and leaf.requires_grad]
        if losses:
            torch.autograd.backward(losses)
    except Exception:
        return False
    return True


def run(stage: Stage, **options: Any) -> Any:
    """Output, new buffers and all gradients of a second microbatch, whose residuals are given away."""
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", **options)
    for _ in range(2):
        torch.manual_seed(0)
        output, new_buffers, pullback = fs.stage_vjp(
            compiled, params, buffers, *args, argnums=stage.argnums, **kwargs
        )
        input_grads, weight_pullback = pullback(cotangents(output, 0))
        param_grads = weight_pullback()
    return output, new_buffers, input_grads, param_grads


@SHARE
@given(
    stage=deep(),
    remat=st.sampled_from(("none", "min_cut", "full")),
    share=st.sampled_from((surplus.SURPLUS, math.inf)),
)
def test_repeated_layers_give_to_the_bit_what_one_program_gives(
    stage: Stage, remat: Any, share: float
) -> None:
    hypothesis.assume(not stage.reads_values)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(surplus, "SURPLUS", share)
        ours = run(stage, remat=remat, repeated=True)
    assert_bitwise_equal(ours, run(stage, remat=remat, repeated=False))


@SHARE
@given(stage=deep())
def test_repeated_layers_are_eagers(stage: Stage) -> None:
    hypothesis.assume(not stage.reads_values)
    stage.check(engines=lambda apply: fs.compile(apply, backend="aten", repeated=True), flops=False)


@FEW
@given(stage=deep())
def test_repeated_layers_are_eagers_by_inductor(stage: Stage) -> None:
    hypothesis.assume(not stage.reads_values)
    stage.check(engines=lambda apply: fs.compile(apply, backend="inductor", repeated=True), flops=False)


def test_generated_stages_have_layers_that_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The properties above would hold of nothing otherwise."""
    found = []
    divide = chain._parts

    def noting(*args: Any) -> Any:
        parts = divide(*args)
        found.append(len(parts))
        return parts

    monkeypatch.setattr(chain, "_parts", noting)

    @settings(max_examples=20, database=None, derandomize=True)
    @given(stage=deep())
    def draw(stage: Stage) -> None:
        hypothesis.assume(not stage.reads_values)
        run(stage, repeated=True)

    draw()
    assert sum(n > 2 for n in found) > len(found) / 4
