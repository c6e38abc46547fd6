"""What a step that failed has left behind: told with its error, and forgotten before the next one.

torch's schedules keep the losses of such a step, its receives and its count of backwards, so that the next
one would take the old losses for its own. Gradients that were added stay in `.grad`, as with autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from funcstage._torch.schedules import KEPT_BY_SCHEDULES


def forget(schedule: Any) -> None:
    """Empty what a schedule keeps of a step."""
    for name in KEPT_BY_SCHEDULES:
        kept = getattr(schedule, name, None)
        if kept:
            kept.clear()


@dataclass(slots=True, eq=False)
class Progress:
    """How far a stage has come with the gradients of a step.

    Attributes:
        added: the microbatches that are in `.grad`.
        adding: the one that is being added.
        whole: whether they are all there, and divided.
    """

    added: list[int] = field(default_factory=list)
    adding: int | None = None
    whole: bool = False

    def begin(self) -> None:
        """Begin a step."""
        self.added, self.adding, self.whole = [], None, False

    def add(self, microbatch: int) -> None:
        """Note that a microbatch is going to be added."""
        self.adding = microbatch

    def added_all(self) -> None:
        """Note that it was."""
        if self.adding is not None:
            self.added.append(self.adding)
        self.adding = None

    def __str__(self) -> str:
        if self.whole:
            return "`.grad` has the gradients of the whole step"
        parts = [f"of microbatch(es) {', '.join(map(str, self.added))}"] if self.added else []
        parts += [] if self.adding is None else [f"of microbatch {self.adding} in part"]
        if not parts:
            return ""
        return f"`.grad` has the gradients {' and '.join(parts)}, not all divided by their number"


def note_gradients(error: BaseException, stages: Iterable[Any]) -> None:
    """Say with an error what it has left in the gradients of stages."""
    told = [f"{stage._name}: {stage._progress}." for stage in stages if str(getattr(stage, "_progress", ""))]
    if told:
        error.add_note(
            f"The step has failed. {' '.join(told)} Clear the gradients (zero_grad) before the next step."
        )
