"""What one rank fails with, the others raise too, instead of waiting for messages that never come.

A rank that fails writes down why, in the store that all ranks of the process group share, and then breaks off
its connections, so that whoever waits for it wakes up, looks there, and does likewise. Before the first step
each rank also writes down its plan (which schedule, how many stages and microbatches), and compares it with
those that are there already: of two ranks that disagree, the later one sees it.

Private names of torch that this stands on: of a schedule `_PipelineSchedule`, `_step_microbatches`,
`_internal_losses`, `_n_microbatches`, `_has_backward`, `_stages` and `_stage`, and `_get_default_store`.

Nothing of this costs anything in a step that goes well. Connections are broken off where they are gloo's; on
a GPU the others wait for at most the group's timeout.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from funcstage.errors import StageError, StructureError


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank cannot go on; sent to the others in place of what they wait for.

    Attributes:
        kind: the error to raise.
        message: what it says, on every rank the same.
    """

    kind: type[StageError]
    message: str

    @classmethod
    def of(cls, stage: str, error: Exception) -> Failure:
        """Describe an error of a stage."""
        if isinstance(error, StageError):
            text = str(error)
            return cls(type(error), text if text.lower().startswith(stage.lower()) else f"{stage}: {text}")
        return cls(StageError, f"{stage} has failed: {type(error).__name__}: {error}")


def tell(group: dist.ProcessGroup | None, failure: Failure) -> None:
    """Write down why this rank fails."""
    _store().set(_key(group, "failure"), pickle.dumps(failure))


def heard(group: dist.ProcessGroup | None) -> Failure | None:
    """Read why a rank has failed, if one said so."""
    store, key = _store(), _key(group, "failure")
    failure: Failure | None = pickle.loads(store.get(key)) if store.check([key]) else None
    return failure


def break_off(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Wake all who wait for this rank, or will."""
    for group in set(groups):
        if "gloo" in dist.get_backend(group):
            for peer in set(range(dist.get_world_size(group))) - {dist.get_rank(group)}:
                # When a wait runs out of time, gloo closes all connections of this rank in the group. With a
                # peer whose connection is closed already there is nothing to wait for: hence all of them.
                with suppress(RuntimeError):
                    work = dist.irecv(torch.empty(1), group_src=peer, group=group, tag=_NEVER_SENT)
                    assert work is not None
                    work.wait(timedelta(milliseconds=1))


_NEVER_SENT = 0x7FFF_0001


def lost(error: Exception) -> bool:
    """Whether an error says no more than that another rank does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


_SIGNS_OF_LOSS = ("gloo", "Connection closed", "Timed out", "pair closure", "reset by peer", "Broken pipe")


# What ranks must agree about.


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank is about to run.

    Attributes:
        schedule: its class.
        num_stages: over all ranks.
        num_microbatches: of a step.
        scales: whether gradients are divided by the number of microbatches.
        trains: whether there is a loss.
        stages: those of this rank.
    """

    schedule: str
    num_stages: int
    num_microbatches: int
    scales: bool
    trains: bool
    stages: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Any) -> Plan:
        """Read a schedule of torch's."""
        stages = _stages_of(schedule)
        return cls(
            type(schedule).__name__,
            stages[0].num_stages,
            schedule._n_microbatches,
            bool(getattr(schedule, "scale_grads", True)),
            bool(schedule._has_backward),
            tuple(sorted(stage.stage_index for stage in stages)),
        )

    def disagreement(self, other: Plan) -> str:
        """Say what two ranks disagree about; nothing if they do not.

        The two are in the order of the ranks.
        """
        for name, what in _AGREED.items():
            if getattr(self, name) != getattr(other, name):
                return f"{what}: {getattr(self, name)} and {getattr(other, name)}"
        both = sorted({*self.stages} & {*other.stages})
        return f"where stage {both[0]} is: both have it" if both else ""


_AGREED = {
    "num_stages": "the number of stages",
    "num_microbatches": "the number of microbatches",
    "schedule": "the schedule",
    "scales": "scale_grads",
    "trains": "whether the schedule has a loss_fn",
}


def _stages_of(schedule: Any) -> list[Any]:
    return schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]


def check_agreement(
    group: dist.ProcessGroup | None, number: int, plan: Plan, rank_of: Mapping[int, int]
) -> None:
    """Compare the plan of this rank with those that others have written down.

    Args:
        group: of the pipeline.
        number: how many schedules this rank has run in the group before.
        plan: of this rank.
        rank_of: where the schedule looks for each stage.

    Raises:
        StructureError: if another rank has another plan; it says which, and about what they disagree.
    """
    store, rank, world = _store(), dist.get_rank(group), dist.get_world_size(group)
    keys = [_key(group, f"plan {number} of {other}") for other in range(world)]
    store.set(keys[rank], pickle.dumps(plan))
    plans = {
        r: pickle.loads(store.get(keys[r])) for r in range(world) if r != rank and store.check([keys[r]])
    }
    for other, theirs in plans.items():
        first, second = sorted((rank, other))
        mine_first = rank == first
        said = (plan if mine_first else theirs).disagreement(theirs if mine_first else plan)
        if said:
            raise StructureError(
                f"Rank {first} and rank {second} of the pipeline disagree about {said}. Give all ranks the "
                "same schedule, loss_fn, number of stages and number of microbatches, and each stage to one."
            )
    for i in plan.stages:
        if rank_of.get(i, rank) != rank:
            raise StructureError(
                f"Rank {rank} of the pipeline and its schedule disagree about where stage {i} is: the "
                f"schedule looks for it on rank {rank_of[i]}. Make it there."
            )
    missing = set(range(plan.num_stages)).difference(plan.stages, *(p.stages for p in plans.values()))
    if len(plans) == world - 1 and missing:
        raise StructureError(
            f"Stage {min(missing)} of {plan.num_stages} is on no rank of the pipeline. Make it on one."
        )


# Schedules, which know when a step begins and what it fails with.

_NUMBERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""The schedules that are watched, and how many there were in their group before."""

_COUNTS: dict[str, int] = {}


def watch_caller(stage: Any, groups: Callable[[], Iterable[dist.ProcessGroup | None]]) -> None:
    """Watch the schedule that begins a step with this stage: compare plans, and share what a step fails with.

    Args:
        stage: whose method the schedule has called.
        groups: the process groups that the stage's messages go through.
    """
    schedule = _calling_schedule()
    if schedule is None or schedule in _NUMBERS:
        return
    name = _key(stage.group, "")
    _NUMBERS[schedule] = number = _COUNTS.get(name, 0)
    _COUNTS[name] = number + 1
    kind, weak = type(schedule), weakref.ref(schedule)

    def step_microbatches(*args: Any, **kwargs: Any) -> Any:
        watched: Any = weak()
        watched._internal_losses.clear()  # those of a step that failed, which torch would pull back
        try:
            return kind._step_microbatches(watched, *args, **kwargs)
        except Exception as error:
            share(stage, groups(), error)
            raise

    schedule._step_microbatches = step_microbatches
    check_agreement(stage.group, number, Plan.of(schedule), stage.stage_index_to_group_rank)


def share(stage: Any, groups: Iterable[dist.ProcessGroup | None], error: Exception) -> None:
    """Tell the other ranks of an error, or raise what one of them has told.

    Args:
        stage: a stage of this rank.
        groups: the process groups that its messages go through.
        error: what this rank fails with.

    Raises:
        StageError: what another rank has failed with, if that is all that is wrong here.
    """
    if getattr(error, "known_to_all", False):
        return
    told = heard(stage.group) if lost(error) else None
    if told is None:
        tell(stage.group, Failure.of(f"Stage {stage.stage_index} of {stage.num_stages}", error))
    break_off(groups)
    if told is not None:
        raise told.kind(told.message) from error


def _calling_schedule() -> Any:
    frame: Any = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return None
        caller = frame.f_locals.get("self")
        if isinstance(caller, schedules._PipelineSchedule):
            return caller
        frame = frame.f_back
    return None


def _key(group: dist.ProcessGroup | None, what: str) -> str:
    group = group or dist.group.WORLD
    assert group is not None
    return f"funcstage {group.group_name}: {what}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
