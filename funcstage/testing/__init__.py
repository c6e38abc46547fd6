"""A testing kit: the split backward of anybody's stage against plain eager autograd.

    fs.testing.check_stage(module, *args)           # raises StageMismatch, or returns a StageReport

    from funcstage.testing import strategies        # needs the extra "test"

    @given(strategies.stages())
    def test_my_engine(stage):
        strategies.check(stage, wrap=my_engine)

`strategies` imports Hypothesis and is therefore not imported here.
"""

from funcstage.testing.check import Flops, StageMismatch, StageReport, check_stage
from funcstage.testing.tolerances import TOLERANCES, Difference

__all__ = ["TOLERANCES", "Difference", "Flops", "StageMismatch", "StageReport", "check_stage"]
