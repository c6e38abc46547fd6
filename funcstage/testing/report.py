"""What `check_stage` found: by engine, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from funcstage.errors import StageError
from funcstage.report import frame
from funcstage.testing.prices import Price
from funcstage.testing.tolerances import Difference

_SHOWN = 8
"""How many complaints about one engine a message lists."""


class Flops(NamedTuple):
    """Floating-point operations as `torch.utils.flop_counter` counts them."""

    eager_forward: int
    eager_backward: int
    eager_input_backward: int
    forward: int
    input: int
    weight: int

    def problems(self, prices: Sequence[Price] = ()) -> Iterator[str]:
        """Say where work was added, or done in the wrong half, that these prices do not explain."""
        allowed = sum(price.flops for price in prices if price.flops is not None)
        moves = any(price.flops is None for price in prices)
        if self.forward - self.eager_forward > allowed:
            yield f"FLOPs: F takes {self.forward}, eager's forward {self.eager_forward}"
        if self.input - self.eager_input_backward > allowed and not moves:
            yield (
                f"FLOPs: I takes {self.input}, eager's backward to the inputs alone "
                f"{self.eager_input_backward}"
            )
        if self._total - self._eager_total > allowed:
            yield (
                f"FLOPs: F + I + W = {self.forward} + {self.input} + {self.weight}, eager's forward + "
                f"backward = {self.eager_forward} + {self.eager_backward}"
            )

    def notes(self, prices: Sequence[Price]) -> Iterator[str]:
        """Say where work was left out, or added at a price that is known: neither is a mismatch."""
        if self._total < self._eager_total:
            yield (
                f"FLOPs: {self._eager_total - self._total} fewer than eager's; what nobody reads was left "
                "out, or is computed in another way"
            )
        if any(self.problems()) and not any(self.problems(prices)):
            found = "; ".join(dict.fromkeys(f"{price.operation}: {price.why}" for price in prices))
            yield (
                f"FLOPs: F + I + W take {self._total - self._eager_total} more than eager's forward and "
                f"backward, I {self.input - self.eager_input_backward} more than its backward to the inputs "
                f'alone: right, but at a price (README, "Right, but at a price"): {found}'
            )

    @property
    def _total(self) -> int:
        return self.forward + self.input + self.weight

    @property
    def _eager_total(self) -> int:
        return self.eager_forward + self.eager_backward


@dataclass(slots=True)
class EngineReport:
    """What was found about one engine.

    Attributes:
        engine: its name.
        leaves: every compared leaf with its error.
        problems: broken promises that no leaf stands for.
        notes: what is not a mismatch but worth knowing: work done twice at a known price, work left out,
            what could not be compared.
        flops: of F, I and W against eager's, if they were counted.
        input_nbytes: bytes that the pullback held between F and I.
        weight_nbytes: bytes that the weight pullback held between I and W.
        refusal: the error that the engine raised for the stage, if it did; then nothing is compared.
    """

    engine: str
    leaves: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
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
            total, eager = f.forward + f.input + f.weight, f.eager_forward + f.eager_backward
            sign = "=" if total == eager else "<" if total < eager else ">"
            lines.append(f"FLOPs: F {f.forward} + I {f.input} + W {f.weight} {sign} eager {eager}")
        lines += [f"note: {note}" for note in self.notes]
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
        """The engines that raised an error for the stage, with the error."""
        return {name: r.refusal for name, r in self.engines.items() if r.refusal is not None}

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each compared leaf of each engine.

        Raises:
            StageError: if pandas is not installed.
        """
        header = ("engine", "leaf", "absolute", "relative", "tolerance", "accepted")
        rows = [
            (name, leaf.leaf, leaf.absolute, leaf.relative, leaf.tolerance, leaf.accepted)
            for name, engine in self.engines.items()
            for leaf in engine.leaves
        ]
        return frame(header, rows)

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
