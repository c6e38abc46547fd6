"""The main property through the graph engine: every generated stage, compiled, is eager backward.

Eager runs without oneDNN here, whose LSTM is one kernel without FLOPs; the graph engine splits it by step.
Inductor compiles every program with a compiler of C++ or Triton, seconds each, so that it is given a sample.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._inductor.exc import InductorError

import funcstage as fs
from funcstage.testing import strategies
from funcstage.testing.stages import Stage

aten = functools.partial(fs.compile, backend="aten")
inductor = functools.partial(fs.compile, backend="inductor")

SAMPLE = settings(
    max_examples=max(12, settings.default.max_examples // (20 if torch.cuda.is_available() else 100)),
    phases=[phase for phase in settings.default.phases if phase is not Phase.shrink],
)
"""As many stages as a minute or two suffice for, more under the thorough profile; none is shrunk."""


def inductor_refuses(stage: Stage) -> bool:
    """Tell whether torch.compile itself raises on sums like this stage's: complex ones of no elements."""
    return "complex" in str(stage) and 0 in stage.shape


def reads_values(stage: Stage) -> bool:
    """Tell whether a stage's operations depend on values of tensors, which a trace cannot express."""
    described = str(stage)
    return "branching" in described or "momentum=None" in described


@pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")
@pytest.mark.parametrize("family", strategies.FAMILIES)
@given(data=st.data())
def test_a_generated_stage_compiled_is_eager_backward(family: str, data: st.DataObject) -> None:
    stage: Stage = data.draw(strategies.stages(family=family), label="stage")
    with torch.backends.mkldnn.flags(enabled=False):
        try:
            stage.check(wrap=aten)
        except fs.TraceError:
            if not reads_values(stage):
                raise


@pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")
@SAMPLE
@given(stage=strategies.stages(max_layers=3))
def test_a_generated_stage_through_inductor_is_eager_backward(stage: Stage) -> None:
    """Fused kernels round less often than eager does, and count no FLOPs."""
    with torch.backends.mkldnn.flags(enabled=False):
        try:
            stage.check(wrap=inductor, flops=False)
        except fs.TraceError:
            if not reads_values(stage):
                raise
        except InductorError:
            if not inductor_refuses(stage):
                raise
