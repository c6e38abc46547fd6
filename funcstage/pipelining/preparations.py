"""A stage that several schedules drive in turn: each finds what it prepared the stage for.

Before its first step a schedule lets its stages make receive buffers, and find out what they send and get,
for microbatches of its size and number. It does so once, so that another schedule's preparation in between
would leave it with buffers of the other's microbatches.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from funcstage._torch.pipelining import PREPARED_BY_TORCH

OF_THE_NEXT_MICROBATCH = ("_input_examples", "_output_examples", "_input_grad_examples", "_output")
"""Attributes of a stage that may be others for each microbatch."""

PREPARED = (*PREPARED_BY_TORCH, *OF_THE_NEXT_MICROBATCH, "examples_of", "_prepared_for", "_fitting", "route")
"""Attributes of a stage that a preparation sets."""


class Preparations:
    """What the schedules of a stage have prepared it for.

    Args:
        stage: the stage, which no schedule has prepared yet.
    """

    def __init__(self, stage: Any) -> None:
        self._unprepared = copied(stage)
        self._of: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._current: weakref.ref[Any] | None = None
        self._is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_unprepared": self._unprepared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's schedules are others, the first of which finds it as no schedule has prepared it."""
        self.__dict__.update(state, _of=weakref.WeakKeyDictionary(), _current=None, _is_copy=True)

    def turn_to(self, schedule: Any, stage: Any) -> None:
        """Let the stage be as a schedule has prepared it."""
        before = None if self._current is None else self._current()
        self._current = weakref.ref(schedule)
        if self._is_copy:
            vars(stage).update(copies(self._unprepared))
            self._is_copy = False
        if before is not schedule and before is not None:
            self._of[before] = {name: getattr(stage, name) for name in self._unprepared}
            found = self._of.pop(schedule, None)
            vars(stage).update(copies(self._unprepared) if found is None else found)
        if hasattr(schedule, "stage_index_to_group_rank"):  # a later schedule's constructor has set its own
            stage.stage_index_to_group_rank = schedule.stage_index_to_group_rank


def copied(stage: Any) -> dict[str, Any]:
    """What a stage is prepared for."""
    return copies({name: getattr(stage, name) for name in PREPARED if hasattr(stage, name)})


def copies(attributes: dict[str, Any]) -> dict[str, Any]:
    """The same for a stage to go on with, which writes into its containers."""
    return {name: copy.copy(value) for name, value in attributes.items()}
