"""A compiled stage that was traced for one batch is eager backward for another, whatever the stage."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st

import funcstage as fs
from funcstage.engines.graph import CompiledStage
from funcstage.testing import check_stage, strategies
from funcstage.testing.stages import Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be traced with open sizes:UserWarning")


BATCHES = {
    "stage": strategies.stages(max_layers=3),
    "more": st.integers(1, 3),
    "dynamic": st.sampled_from([None, True]),
}
FEW = settings(
    max_examples=max(4, settings.default.max_examples // 25),
    phases=[phase for phase in settings.default.phases if phase is not Phase.shrink],
)
"""A compiler of C++ or Triton runs for seconds on every program."""


@given(**BATCHES)
def test_a_generated_stage_takes_another_batch(stage: Stage, more: int, dynamic: bool | None) -> None:
    takes_another(stage, more, backend="aten", dynamic=dynamic)


@pytest.mark.filterwarnings("ignore:TorchInductor cannot compile:UserWarning")  # as complex numbers
@FEW
@given(**BATCHES)
def test_a_generated_stage_takes_another_batch_by_inductor(
    stage: Stage, more: int, dynamic: bool | None
) -> None:
    takes_another(stage, more, backend="inductor", dynamic=dynamic)


def takes_another(stage: Stage, more: int, **options: Any) -> None:
    """Compile a stage for its batch, and check it with one that is larger."""
    module, args, kwargs = stage.build()
    longer = dataclasses.replace(stage, shape=(stage.shape[0] + more, *stage.shape[1:]))
    _, other_args, other_kwargs = longer.build()
    try:
        copy.deepcopy(module)(*other_args, **other_kwargs)
    except Exception:
        assume(False)  # what does not take another batch
    made: list[CompiledStage] = []

    def traced_before(apply: Callable[..., Any]) -> CompiledStage:
        made.append(fs.compile(apply, **options))
        _, params, buffers = fs.functionalize(copy.deepcopy(module))
        fs.stage_vjp(made[0], params, buffers, *args, argnums=stage.argnums, **kwargs)
        return made[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_stage(
                module,
                *other_args,
                engines=traced_before,
                argnums=stage.argnums,
                seed=stage.seed,
                **other_kwargs,
            )
        except fs.StageError:
            assume(not stage.reads_values)
            raise
    event(f"{len(made[0]._traced)} traces")
