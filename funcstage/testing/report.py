"""What `check_stage` found: by engine, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from funcstage.errors import StageError
from funcstage.testing.tolerances import Difference

_SHOWN = 8
"""How many complaints about one engine a message lists."""


class Flops(NamedTuple):
    """Floating-point operations as `FlopCounterMode` counts them."""

    eager_forward: int
    eager_backward: int
    eager_input_backward: int
    forward: int
    input: int
    weight: int

    def problems(self) -> Iterator[str]:
        """Say where work was added, or done in the wrong half."""
        if self.forward != self.eager_forward:
            yield f"FLOPs: F takes {self.forward}, eager's forward {self.eager_forward}"
        if self.input != self.eager_input_backward:
            yield (
                f"FLOPs: I takes {self.input}, eager's backward to the inputs alone "
                f"{self.eager_input_backward}"
            )
        if self.forward + self.input + self.weight != self.eager_forward + self.eager_backward:
            yield (
                f"FLOPs: F + I + W = {self.forward} + {self.input} + {self.weight}, eager's forward + "
                f"backward = {self.eager_forward} + {self.eager_backward}"
            )


@dataclass(slots=True)
class EngineReport:
    """What was found about one engine.

    Attributes:
        engine: its name.
        leaves: every compared leaf with its error.
        problems: broken promises that no leaf stands for.
        flops: of F, I and W against eager's, if they were counted.
        input_nbytes: bytes that the pullback held between F and I.
        weight_nbytes: bytes that the weight pullback held between I and W.
        refusal: the error with which the engine refused the stage, if it did; nothing is compared then.
    """

    engine: str
    leaves: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    flops: Flops | None = None
    input_nbytes: int = 0
    weight_nbytes: int = 0
    refusal: StageError | None = None

    @property
    def exact(self) -> int:
        """How many leaves are bitwise equal."""
        return sum(leaf.accepted and leaf.absolute == 0 for leaf in self.leaves)

    @property
    def worst(self) -> Difference | None:
        """The leaf with the largest relative error."""
        return max(self.leaves, key=lambda leaf: leaf.relative, default=None)

    def complaints(self) -> list[str]:
        """Everything that is wrong, in words; empty for a correct split."""
        return self.problems + [str(leaf) for leaf in self.leaves if not leaf.accepted]

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.engine} refused it: {self.refusal}"
        lines = [f"{self.engine}: {len(self.leaves)} leaves compared, {self.exact} bitwise equal"]
        if self.worst is not None and self.worst.relative:
            lines.append(f"largest error: {self.worst}")
        if self.flops is not None:
            f = self.flops
            lines.append(
                f"FLOPs: F {f.forward} + I {f.input} + W {f.weight} = "
                f"eager {f.eager_forward + f.eager_backward}"
            )
        lines.append(f"residuals: {self.input_nbytes} B before I, {self.weight_nbytes} B before W")
        return "\n  ".join(lines)


@dataclass(slots=True)
class StageReport:
    """What `check_stage` found.

    Attributes:
        stage: the stage's name.
        engines: a report for each engine, by its name.
    """

    stage: str
    engines: dict[str, EngineReport] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Difference]:
        """Every compared leaf of every engine."""
        return [leaf for report in self.engines.values() for leaf in report.leaves]

    @property
    def exact(self) -> int:
        """How many of them are bitwise equal."""
        return sum(report.exact for report in self.engines.values())

    @property
    def refusals(self) -> dict[str, StageError]:
        """The engines that refused the stage, and why."""
        return {name: r.refusal for name, r in self.engines.items() if r.refusal is not None}

    def complaints(self) -> list[str]:
        """Everything that is wrong, in words, the engine first; empty for a correct split."""
        complaints = []
        for name, report in self.engines.items():
            found = report.complaints()
            rest = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            complaints += [f"{name}: {complaint}" for complaint in found[:_SHOWN] + rest]
        return complaints

    def __str__(self) -> str:
        reports = [str(report).replace("\n", "\n  ") for report in self.engines.values()]
        return "\n  ".join([self.stage, *reports])


class StageMismatch(AssertionError):
    """The split of a stage is not what eager backward gives, or breaks a promise of the contract.

    Attributes:
        report: what was compared, the differences among it.
    """

    def __init__(self, report: StageReport) -> None:
        complaints = "\n  ".join(report.complaints())
        super().__init__(f"{report.stage} differs from eager backward:\n  {complaints}")
        self.report = report
