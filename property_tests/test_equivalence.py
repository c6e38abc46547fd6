"""The main property: on every generated stage, the split is eager backward.

One example is one generated module with its arguments. `Stage.check` compares outputs, buffers and
gradients (which of them are absent, too) with plain autograd, holds W back until another microbatch has
run whole, counts FLOPs, and looks for anything that was mutated, used twice or left behind.
"""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from funcstage.testing import strategies
from funcstage.testing.stages import Stage

STAGES = {family: strategies.stages(family=family) for family in strategies.FAMILIES}


@pytest.mark.parametrize("family", strategies.FAMILIES)
@given(data=st.data())
def test_the_split_of_a_generated_stage_is_eager_backward(family: str, data: st.DataObject) -> None:
    stage: Stage = data.draw(STAGES[family], label="stage")
    report = stage.check()
    event("bitwise equal" if report.exact == len(report.leaves) else "equal within the tolerance")
