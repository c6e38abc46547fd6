"""Offloaded pullbacks of any stage: what they give is what it would have been, to the bit.

The host's memory counts as a device's here, so that residuals take the whole way without a GPU.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pullbacks import assert_bitwise_equal, cotangents

import funcstage as fs
from funcstage import away
from funcstage.testing import strategies
from funcstage.testing.stages import Stage

SHARE = settings(max_examples=settings.default.max_examples // 2)
ENGINES = st.sampled_from(("levels", "none", "min_cut", "full"))


def run(stage: Stage, engine: str, parts: int, move: Any) -> Any:
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    if engine != "levels":
        apply = fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
    torch.manual_seed(0)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args, argnums=stage.argnums, **kwargs)
    input_grads, weight_pullback = move(pullback)(cotangents(output, 0))
    pieces = move(weight_pullback).split(parts)
    return input_grads, fs.stage_backward_weight([move(piece) for piece in pieces])


@SHARE
@given(stage=strategies.stages(), engine=ENGINES, parts=st.integers(1, 4))
def test_residuals_that_were_away_give_what_they_would_have_given(
    stage: Stage, engine: str, parts: int
) -> None:
    def there_and_soon_back(pullback: Any) -> Any:
        held = pullback.nbytes
        offloaded = fs.offload(pullback)
        assert offloaded.nbytes == held
        fs.prefetch(offloaded)
        return offloaded

    expected = run(stage, engine, parts, lambda pullback: pullback)
    with mock.patch.object(away, "FAR", ("cpu",)):
        assert_bitwise_equal(run(stage, engine, parts, fs.offload), expected)
        assert_bitwise_equal(run(stage, engine, parts, there_and_soon_back), expected)
