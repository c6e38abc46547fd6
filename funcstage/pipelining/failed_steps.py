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
        adding: those that are being added; a W in pieces takes several actions.
        whole: whether they are all there, and divided.
    """

    added: list[int] = field(default_factory=list)
    adding: list[int] = field(default_factory=list)
    whole: bool = False

    def begin(self) -> None:
        """Begin a step."""
        self.added, self.adding, self.whole = [], [], False

    def add(self, microbatch: int) -> None:
        """Note that a microbatch is going to be added, or a piece of it."""
        if microbatch not in self.adding:
            self.adding.append(microbatch)

    def added_all(self, microbatch: int) -> None:
        """Note that it was."""
        if microbatch in self.adding:
            self.adding.remove(microbatch)
            self.added.append(microbatch)

    def __str__(self) -> str:
        if self.whole:
            return "`.grad` has the gradients of the whole step"
        parts = [f"of microbatch(es) {', '.join(map(str, self.added))}"] if self.added else []
        parts += [f"of microbatch {', '.join(map(str, self.adding))} in part"] if self.adding else []
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
