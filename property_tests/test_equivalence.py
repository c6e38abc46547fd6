"""The main property: on every generated stage, through every engine, the split is eager backward.

One example is one generated module with its arguments. `Stage.check` compares outputs, buffers and
gradients (which of them are absent, too) with plain autograd, holds W back until another microbatch has
run whole, counts FLOPs, and looks for anything that was mutated, used twice or left behind.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from funcstage.testing import StageReport, strategies
from funcstage.testing.stages import Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")

STAGES = {family: strategies.stages(family=family) for family in strategies.FAMILIES}

SAMPLE = settings(
    max_examples=max(12, settings.default.max_examples // (20 if torch.cuda.is_available() else 100)),
    phases=[phase for phase in settings.default.phases if phase is not Phase.shrink],
)
"""What Inductor is given, which runs a compiler of C++ or Triton for seconds on every program: as many stages
as a minute or two suffice for, more under the thorough profile; none is shrunk."""


def assert_refused_for_values_alone(report: StageReport, stage: Stage) -> None:
    """A stage is compiled unless its operations depend on values."""
    assert stage.reads_values or not report.refusals, str(report)


@pytest.mark.parametrize("family", strategies.FAMILIES)
@given(data=st.data())
def test_the_split_of_a_generated_stage_is_eager_backward(family: str, data: st.DataObject) -> None:
    stage: Stage = data.draw(STAGES[family], label="stage")
    report = stage.check(engines=("closures", "aten"))
    assert_refused_for_values_alone(report, stage)
    event("bitwise equal" if report.exact == len(report.leaves) else "equal within the tolerance")


# Inductor does not sum complex numbers of which there are none.
@pytest.mark.filterwarnings("ignore:TorchInductor cannot compile:UserWarning")
@SAMPLE
@given(stage=strategies.stages(max_layers=3))
def test_a_generated_stage_through_inductor_is_eager_backward(stage: Stage) -> None:
    """Fused kernels round less often than eager does."""
    assert_refused_for_values_alone(stage.check(engines=("closures", "inductor")), stage)
