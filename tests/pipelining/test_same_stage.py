"""What a rank makes of what another one of its mesh has written down of their stage."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from one_process import one_process

import funcstage as fs
from funcstage.errors import Failure
from funcstage.pipelining import failures, same_stage

MINE = {"the number of the stage": "1", "how it is compiled": "not"}
OTHER = 3


def compare(group: Any, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str] | None, **told: Any) -> None:
    monkeypatch.setattr(failures, "written", lambda key: theirs and pickle.dumps(theirs))
    monkeypatch.setattr(failures, "heard", lambda groups: told.get("failure"))
    monkeypatch.setattr(same_stage.dist, "get_global_rank", lambda group, rank: 10 + rank)
    same_stage._compare(group, "place", OTHER, MINE, told.get("until", math.inf))


def test_ranks_that_disagree_are_named_with_what_each_of_them_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        r"Ranks 10 and 13 run stage 1 together, over a mesh, and disagree about how it is compiled: not and"
    )
    with one_process() as group:
        compare(group, monkeypatch, MINE)
        with pytest.raises(fs.StructureError, match=f"{said} aten"):
            compare(group, monkeypatch, MINE | {"how it is compiled": "aten"})
        with pytest.raises(fs.StructureError, match="disagree about the parameter 'w': none and"):
            compare(group, monkeypatch, MINE | {"the parameter 'w'": "float32[2]"})


def test_a_rank_that_failed_meanwhile_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_process() as group:
        with pytest.raises(fs.LeafError, match="its own words") as caught:
            compare(group, monkeypatch, None, failure=Failure(fs.LeafError, "its own words"), until=0.0)
        assert caught.value.known_to_all
        compare(group, monkeypatch, None, until=0.0)
