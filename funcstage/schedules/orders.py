"""Schedules as data: what each rank does, in which order, read off torch's own schedule classes.

Everything else in this package works on the plain tables made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from funcstage._torch.schedules import table_of
from funcstage.errors import StageError
from funcstage.report import table

Kind: TypeAlias = Literal["F", "I", "W", "B"]


class ScheduleError(StageError, ValueError):
    """A schedule that does not exist, or that cannot run these numbers of stages and microbatches."""


class Action(NamedTuple):
    """One unit of work: a kind (F, I, W, or B for I and W together) of one stage for one microbatch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def gives(self) -> tuple[Action, ...]:
        """Return what is done once this action is: B stands for I and W."""
        return (self._replace(kind="I"), self._replace(kind="W")) if self.kind == "B" else (self,)

    def needs(self, num_stages: int) -> Iterator[Action]:
        """Yield what must be done before; of each stage, one action at a time is in progress."""
        if self.kind == "F":
            if self.stage > 0:
                yield self._replace(stage=self.stage - 1)
            if self.microbatch > 0:  # buffers go through the microbatches in turn
                yield self._replace(microbatch=self.microbatch - 1)
        elif self.kind == "W":
            yield self._replace(kind="I")
        else:
            yield self._replace(kind="F")
            if self.stage < num_stages - 1:
                yield self._replace(kind="I", stage=self.stage + 1)


@dataclass(frozen=True, slots=True, repr=False)
class Order:
    """A schedule as a table: `ranks[r]` is what rank `r` does, one action after the other.

    Attributes:
        schedule: its name.
        num_stages: over all ranks.
        num_microbatches: of a step.
        ranks: the actions of each rank.
        pieces: in how many pieces W is; each is an action of its own, so that a W stands there so often.
    """

    schedule: str
    num_stages: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    pieces: int = 1

    def __post_init__(self) -> None:
        check_count("pieces", self.pieces)

    def __repr__(self) -> str:
        size = f"{self.num_ranks} ranks, {self.num_stages} stages, {self.num_microbatches} microbatches"
        is_short = sum(map(len, self.ranks)) <= _SHORT
        actions = " | ".join(" ".join(map(str, actions)) for actions in self.ranks)
        return f"<Order {self.schedule}, {size}{f': {actions}' if is_short else ''}>"

    @property
    def num_ranks(self) -> int:
        """How many devices the schedule is for."""
        return len(self.ranks)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that live on a rank, ascending."""
        return sorted({action.stage for action in self.ranks[rank]})

    def rank_of_stages(self) -> list[int]:
        """Return, for each stage, the rank that it lives on."""
        owner = {stage: rank for rank in range(self.num_ranks) for stage in self.stages_of(rank)}
        return [owner[stage] for stage in range(self.num_stages)]

    def _repr_html_(self) -> str:
        caption = (
            f"{self.schedule}: {self.num_stages} stages on {self.num_ranks} ranks, "
            f"{self.num_microbatches} microbatches"
        )
        caption += f", W in {self.pieces} pieces" if self.pieces > 1 else ""
        rows = [(f"rank {rank}", " ".join(map(str, actions))) for rank, actions in enumerate(self.ranks)]
        return table(caption, ("", "actions: stage, kind, microbatch"), rows)

    def in_turn(self) -> list[Action]:
        """Merge the ranks into one sequence that one process can run.

        Each rank's order is kept, nothing runs before what it needs, and the ranks take turns, so that
        about as much is in flight as on real devices.

        Raises:
            RuntimeError: if the ranks wait for each other; no table of torch's does.
        """
        done: set[Action] = set()
        sequence: list[Action] = []
        position = [0] * self.num_ranks
        total = sum(map(len, self.ranks))
        while len(sequence) < total:
            before = len(sequence)
            for rank, actions in enumerate(self.ranks):
                if position[rank] == len(actions):
                    continue
                action = actions[position[rank]]
                if done.issuperset(action.needs(self.num_stages)):
                    done.update(action.gives())
                    sequence.append(action)
                    position[rank] += 1
            if len(sequence) == before:
                waiting = [str(a[i]) for a, i in zip(self.ranks, position, strict=True) if i < len(a)]
                raise RuntimeError(
                    f"Internal error: {self.schedule} with {self.num_stages} stages and "
                    f"{self.num_microbatches} microbatches deadlocks; waiting: {', '.join(waiting)}."
                )
        return sequence


class _Family(NamedTuple):
    """How a schedule places its stages: torch's class, and the number of stages a rank holds."""

    torch_class: str
    stages_per_rank: int | None  # None: any number


_FAMILIES: dict[str, _Family] = {
    "GPipe": _Family("ScheduleGPipe", 1),
    "1F1B": _Family("Schedule1F1B", 1),
    "LoopedBFS": _Family("ScheduleLoopedBFS", None),
    "Interleaved1F1B": _Family("ScheduleInterleaved1F1B", None),
    "InterleavedZeroBubble": _Family("ScheduleInterleavedZeroBubble", None),
    "ZBVZeroBubble": _Family("ScheduleZBVZeroBubble", 2),
    "DualPipeV": _Family("ScheduleDualPipeV", 2),
}
ScheduleName: TypeAlias = Literal[
    "GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
"""The name of one of torch's schedules, as type checkers know it; any case works when it runs."""

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
"""The names of torch's schedules."""


def pipeline_order(
    schedule: ScheduleName, num_stages: int, num_microbatches: int, *, num_ranks: int | None = None
) -> Order:
    """Return the table of one of torch's schedules.

    Args:
        schedule: one of `SCHEDULES`, in any case.
        num_stages: how many stages the model is cut into.
        num_microbatches: how many microbatches a step has.
        num_ranks: over how many ranks the stages are spread. GPipe and 1F1B have one stage a rank, the
            V-shaped schedules two; the looped ones (LoopedBFS, Interleaved*) take any divisor of
            `num_stages`, by default two stages a rank where that is possible, else one.

    Returns:
        The order, without communication and idle slots. Pairs that DualPipeV overlaps on a device
        follow one another.

    Raises:
        ScheduleError: if there is no such schedule, or torch's does not take these numbers.

    Example:
        >>> print(*pipeline_order("1F1B", num_stages=2, num_microbatches=2).ranks[0])
        0F0 0F1 0B0 0B1
    """
    schedule = _known(schedule)
    check_count("num_stages", num_stages)
    check_count("num_microbatches", num_microbatches)
    num_ranks = _placed(schedule, num_stages, num_ranks)
    table = _torch_table(schedule, num_stages, num_microbatches, num_ranks)
    if schedule == "1F1B":
        table = [numbered_in_turn(actions) for actions in table]
    return Order(schedule, num_stages, num_microbatches, tuple(map(tuple, table)))


def _known(schedule: object) -> ScheduleName:
    for name in SCHEDULES:
        if isinstance(schedule, str) and schedule.lower() == name.lower():
            return name
    raise ScheduleError(f"There is no schedule {schedule!r}. The schedules are {', '.join(SCHEDULES)}.")


def check_count(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ScheduleError(f"{name} must be a positive integer, got {count!r}.")


def _placed(schedule: str, num_stages: int, num_ranks: int | None) -> int:
    """Return the number of ranks, or refuse a number of stages that cannot be spread over them."""
    per_rank = _FAMILIES[schedule].stages_per_rank
    if num_ranks is not None:
        check_count("num_ranks", num_ranks)
        if num_stages % num_ranks or per_rank not in (None, num_stages // num_ranks):
            shares = {None: "the same number of stages", 1: "one stage"}
            share = shares.get(per_rank, f"{per_rank} stages")
            raise ScheduleError(
                f"{schedule} has {share} on every rank; {num_stages} stages on {num_ranks} ranks do not fit. "
                "Change one of these numbers."
            )
        return num_ranks
    if per_rank is None:
        per_rank = 2 if num_stages % 2 == 0 else 1
    if num_stages % per_rank:
        raise ScheduleError(
            f"{schedule} has {per_rank} stages on every rank, so their number must be a multiple of "
            f"{per_rank}; got {num_stages} stages. Cut the model into {num_stages + 1}, or use 1F1B."
        )
    return num_stages // per_rank


def _torch_table(schedule: str, num_stages: int, num_microbatches: int, num_ranks: int) -> list[list[Action]]:
    try:
        found = table_of(_FAMILIES[schedule].torch_class, num_stages, num_microbatches, num_ranks)
    except ValueError as refusal:
        raise ScheduleError(
            f"{schedule} cannot run {num_stages} stages on {num_ranks} ranks with {num_microbatches} "
            f"microbatches. torch says: {' '.join(str(refusal).split())}"
        ) from refusal
    return [[Action(*unit) for unit in units] for units in found]  # type: ignore[arg-type]


def numbered_in_turn(actions: list[Action]) -> list[Action]:
    """Number a stage's forwards from 0: for 1F1B's last rank torch's table starts at 1.

    Torch itself does not notice, because its 1F1B runs a loop and never reads the table.
    """
    numbers = iter(range(len(actions)))
    return [a._replace(microbatch=next(numbers)) if a.kind == "F" else a for a in actions]


_SHORT = 32
"""Actions of an order that are shown as they are."""
