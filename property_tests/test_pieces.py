"""W in pieces, for any stage: in any order, on any engine, what the whole gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pullbacks import assert_bitwise_equal, cotangents

import funcstage as fs
from funcstage import trees
from funcstage.testing import strategies
from funcstage.testing.stages import Stage

SHARE = settings(max_examples=settings.default.max_examples // 2)

ENGINES = st.sampled_from(("levels", "none", "min_cut", "full"))


def weight_pullback_of(stage: Stage, engine: str) -> fs.WeightPullback:
    """Run F and I, of an engine or with what a compiled stage may compute again."""
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    run: Any = apply if engine == "levels" else fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
    torch.manual_seed(0)
    output, _, pullback = fs.stage_vjp(run, params, buffers, *args, argnums=stage.argnums, **kwargs)
    return pullback(cotangents(output, 0))[1]


def in_pieces(pieces: Any) -> Any:
    """Run pieces, and put their gradients together; no parameter has one in two of them."""
    found = [trees.flatten(piece()) for piece in pieces]
    spec = found[0][1]
    by_parameter = zip(*(leaves for leaves, _ in found), strict=True)
    present = [[grad for grad in grads if grad is not None] for grads in by_parameter]
    assert all(len(grads) <= 1 for grads in present)
    return trees.unflatten(spec, [grads[0] if grads else None for grads in present])


@SHARE
@given(stage=strategies.stages(), engine=ENGINES, parts=st.integers(1, 9), data=st.data())
def test_pieces_of_any_stage_give_in_any_order_what_the_whole_gives_to_the_bit(
    stage: Stage, engine: str, parts: int, data: st.DataObject
) -> None:
    expected = weight_pullback_of(stage, engine)()
    pieces = weight_pullback_of(stage, engine).split(parts)
    assert 1 <= len(pieces) <= parts
    assert_bitwise_equal(in_pieces(data.draw(st.permutations(pieces), label="order")), expected)
    summed = fs.stage_backward_weight(weight_pullback_of(stage, engine).split(parts))
    assert_bitwise_equal(summed, expected)
    pieces = weight_pullback_of(stage, engine).split(parts)
    for piece in pieces:
        piece(retain=True)
    smaller = [smaller for piece in pieces for smaller in piece.split(2)]
    assert_bitwise_equal(in_pieces(smaller), expected)


@pytest.mark.parametrize("engine", ["levels", "min_cut"])
def test_this_would_notice_a_gradient_in_two_pieces(engine: str) -> None:
    module = torch.nn.Linear(3, 2)
    apply, params, buffers = fs.functionalize(module)
    run: Any = apply if engine == "levels" else fs.compile(apply, backend="aten")
    _, _, pullback = fs.stage_vjp(run, params, buffers, torch.ones(4, 3))
    _, weight_pullback = pullback(torch.ones(4, 2))
    with pytest.raises(AssertionError):
        in_pieces([lambda: weight_pullback(retain=True)] * 2)
