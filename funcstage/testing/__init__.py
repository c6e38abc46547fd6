"""A testing kit: the split backward of anybody's stage against plain eager autograd.

    fs.testing.check_stage(module, *args)           # raises StageMismatch, or returns a StageReport

    from funcstage.testing import strategies        # needs the extra "test"

    @given(strategies.stages())
    def test_my_engine(stage):
        stage.check(engines=my_engine)

`strategies` imports Hypothesis and is therefore not imported here.
"""

from funcstage.testing.check import check_stage
from funcstage.testing.report import EngineReport, Flops, StageMismatch, StageReport
from funcstage.testing.tolerances import TOLERANCES, Difference

__all__ = ["TOLERANCES", "Difference", "EngineReport", "Flops", "StageMismatch", "StageReport", "check_stage"]
