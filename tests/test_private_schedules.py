"""What funcstage relies on in torch's schedule classes, which promise nothing.

If these fail on a new torch, `funcstage/pipelining/orders.py` is the one file to change.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from funcstage._torch.versions import TRIED
from funcstage.pipelining import SCHEDULES, Action, pipeline_order
from funcstage.pipelining.orders import _FAMILIES, HOUSEKEEPING, MESSAGES

MOVED = (
    f"torch {torch.__version__} changed its private pipeline schedules; adapt funcstage.pipelining.orders, "
    f"written for torch {', '.join(TRIED)}"
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_still_has_the_schedule_under_its_name(schedule: str) -> None:
    named = torch_schedules.get_schedule_class(schedule)
    assert named is getattr(torch_schedules, _FAMILIES[schedule].torch_class, None), MOVED


def test_actions_still_have_the_fields_that_are_read() -> None:
    action = getattr(torch_schedules, "_Action", None)
    assert action is not None, MOVED
    fields = {"stage_index", "computation_type", "microbatch_index", "sub_actions"}
    assert fields <= set(action._fields), MOVED
    kinds = {kind.value for kind in torch_schedules._ComputationType}
    assert {"F", "I", "W", "B", "OVERLAP_F_B"} <= kinds, MOVED
    assert kinds <= {"F", "I", "W", "B", "OVERLAP_F_B", *MESSAGES, *HOUSEKEEPING}, MOVED


# V-shaped schedules have two stages a rank.
POSSIBLE = [
    (schedule, num_stages)
    for schedule in SCHEDULES
    for num_stages in (1, 2, 3, 4, 8)
    if num_stages % 2 == 0 or schedule not in ("ZBVZeroBubble", "DualPipeV")
]


@pytest.mark.parametrize(("schedule", "num_stages"), POSSIBLE)
@pytest.mark.parametrize("num_microbatches", [8, 12])
def test_every_table_holds_each_action_once_and_can_run(
    schedule: str, num_stages: int, num_microbatches: int
) -> None:
    order = pipeline_order(schedule, num_stages, num_microbatches)
    done = [done for action in order.in_turn() for done in action.gives()]
    expected = {
        Action(kind, stage, microbatch)
        for kind in ("F", "I", "W")
        for stage in range(num_stages)
        for microbatch in range(num_microbatches)
    }
    assert len(done) == len(expected), MOVED
    assert set(done) == expected, MOVED


@pytest.mark.parametrize(
    ("schedule", "first_rank", "last_rank"),
    [
        ("GPipe", "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3"),
        ("1F1B", "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3"),
        (
            "ZBVZeroBubble",
            "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3",
            "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3",
        ),
    ],
)
def test_small_tables_are_the_published_ones(schedule: str, first_rank: str, last_rank: str) -> None:
    ranks = pipeline_order(schedule, 4, 4).ranks
    assert " ".join(map(str, ranks[0])) == first_rank, MOVED
    assert " ".join(map(str, ranks[-1])) == last_rank, MOVED


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
def test_v_shaped_schedules_fold_the_stages_over_the_ranks(schedule: str) -> None:
    assert pipeline_order(schedule, 8, 8).rank_of_stages() == [0, 1, 2, 3, 3, 2, 1, 0], MOVED


def test_a_torch_that_moved_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_schedules, "ScheduleGPipe")
    with pytest.raises(RuntimeError, match=r"torch .* builds its pipeline schedules in another way"):
        pipeline_order("GPipe", 2, 2)
