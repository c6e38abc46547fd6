"""What the ranks of a pipeline must agree about, compared before the first step of each schedule.

Each rank writes down its plan (which schedule, how many stages and microbatches), and compares it with those
of the others. From then on the schedule is watched: what a step of it fails with is shared with the others,
and so is what its microbatches look like (`lengths`).
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist

from funcstage._torch.distributed import timeout_of
from funcstage._torch.pipelining import ExchangingStage
from funcstage._torch.schedules import Microbatches, is_schedule, num_microbatches, split, stages_of, trains
from funcstage.errors import StructureError
from funcstage.pipelining import constructors, failed_steps, over_order
from funcstage.pipelining.failures import check_unbroken, key, share, store, written
from funcstage.pipelining.lengths import AGREEMENTS, Agreement, watch
from funcstage.pipelining.transport import carrying_stage
from funcstage.pipelining.transport.choice import Offer, is_symmetric


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
        torchs: those of them that are torch's own.
        offer: how their messages could travel.
        order: which order of ours it runs, as a number.
    """

    schedule: str
    num_stages: int
    num_microbatches: int
    scales: bool
    trains: bool
    stages: tuple[int, ...]
    torchs: tuple[int, ...] = ()
    order: int = 0
    offer: Offer | None = None

    @classmethod
    def of(cls, schedule: Any) -> Plan:
        """Read a schedule of torch's."""
        stages = stages_of(schedule)
        return cls(
            type(schedule).__name__,
            stages[0].num_stages,
            num_microbatches(schedule),
            bool(getattr(schedule, "scale_grads", True)),
            trains(schedule),
            tuple(sorted(stage.stage_index for stage in stages)),
            tuple(sorted(s.stage_index for s in stages if not isinstance(s, ExchangingStage))),
            over_order.digest(schedule),
            Offer.of(stages),
        )

    def disagreement(self, other: Plan) -> str:
        """Say what two ranks disagree about; nothing if they do not.

        The two are in the order of the ranks.
        """
        for name, what in _AGREED.items():
            if getattr(self, name) != getattr(other, name):
                return f"{what}: {getattr(self, name)} and {getattr(other, name)}"
        if self.order != other.order:
            return "the order of the actions"
        both = sorted({*self.stages} & {*other.stages})
        return f"where stage {both[0]} is: both have it" if both else ""


_AGREED = {
    "num_stages": "the number of stages",
    "num_microbatches": "the number of microbatches",
    "schedule": "the schedule",
    "scales": "scale_grads",
    "trains": "whether the schedule has a loss_fn",
}


def plan_key(group: dist.ProcessGroup | None, number: int, rank: int) -> str:
    """Name the place in the store of a rank's plan for the schedule of that number."""
    return key(group, f"plan {number} of {rank}")


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
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    texts = {r: written(plan_key(group, number, r)) for r in range(world) if r != rank}
    plans = {r: pickle.loads(text) for r, text in texts.items() if text}
    for other, theirs in plans.items():
        first, second = sorted((rank, other))
        mine_first = rank == first
        said = (plan if mine_first else theirs).disagreement(theirs if mine_first else plan)
        if said:
            raise StructureError(
                f"Rank {first} and rank {second} of the pipeline disagree about {said}. Give all ranks the "
                "same schedule, loss_fn, number of stages and number of microbatches, and each stage to one."
            )
    if len(plans) == world - 1:
        is_symmetric({rank: plan.offer} | {other: theirs.offer for other, theirs in plans.items()})
    for i in plan.stages:
        if rank_of.get(i, rank) != rank:
            raise StructureError(
                f"Rank {rank} of the pipeline and its schedule disagree about where stage {i} is: the "
                f"schedule expects it on rank {rank_of[i]}. Construct it there."
            )
    missing = set(range(plan.num_stages)).difference(plan.stages, *(p.stages for p in plans.values()))
    if len(plans) == world - 1 and missing:
        raise StructureError(
            f"Stage {min(missing)} of {plan.num_stages} is on no rank of the pipeline. Construct it on one."
        )


def strangers(group: dist.ProcessGroup | None, number: int, plan: Plan) -> list[int]:
    """The ranks that have stages of torch's own, as far as is known: those that wrote no plan among them."""
    rank, found = dist.get_rank(group), []
    for r in range(dist.get_world_size(group)):
        text = written(plan_key(group, number, r)) if r != rank else pickle.dumps(plan)
        if not text or pickle.loads(text).torchs:
            found.append(r)
    return found


def _is_symmetric(group: dist.ProcessGroup | None, number: int, plan: Plan) -> bool:
    """Decide how messages travel, by the plans of all ranks."""
    offers = {dist.get_rank(group): plan.offer}
    for rank in set(range(dist.get_world_size(group))) - {*offers}:
        text = written(plan_key(group, number, rank))
        offers[rank] = pickle.loads(text).offer if text else None
    return is_symmetric(offers)


def _agreement(stage: Any, number: int, plan: Plan) -> Agreement:
    """What the ranks of a schedule know of its microbatches, before its first step."""
    group, first = stage.group, stage.stage_index_to_group_rank[0]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return Agreement(
        group,
        first,
        lambda step, of: key(group, f"microbatches of step {step} of {number} for {of}"),
        partial(strangers, group, number, plan),
        [r for r in range(world) if r != rank],
        True if world == 1 or written(plan_key(group, number, first)) else None,
        timeout_of(group, stage.device),
        partial(_is_symmetric, group, number, plan),
    )


_COUNTS: dict[str, int] = {}


def watch_caller(stage: Any, groups: Callable[[], Iterable[dist.ProcessGroup | None]]) -> Any:
    """Watch the schedule that begins a step with this stage: compare plans, and share what a step fails with.

    Args:
        stage: whose method the schedule has called.
        groups: the process groups that the stage's messages go through.

    Returns:
        The schedule; `None` if the caller is none.

    Raises:
        StageError: if the ranks disagree, or one has failed before.
    """
    check_unbroken(stage.group)
    schedule = _calling_schedule()
    if schedule is None:
        return None
    failed_steps.forget(schedule)
    if schedule in AGREEMENTS:
        if any(getattr(each, "cannot_run", False) for each in stages_of(schedule)):
            AGREEMENTS[schedule].forget()
        return schedule
    name = key(stage.group, "")
    number = _COUNTS.get(name, 0)
    plan, rank = Plan.of(schedule), dist.get_rank(stage.group)
    if dist.get_world_size(stage.group) > 1:
        store().set(plan_key(stage.group, number, rank), pickle.dumps(plan))
        try:
            constructors.wait_for_plans(stage.group, partial(plan_key, stage.group, number))
        except BaseException:
            store().set(plan_key(stage.group, number, rank), b"")
            raise
    agreement = watch(schedule, _agreement(stage, number, plan))
    _COUNTS[name] = number + 1
    kind, weak = type(schedule), weakref.ref(schedule)

    def step_microbatches(*args: Any, **kwargs: Any) -> Any:
        try:
            agreement.before_step(weak(), Microbatches.of(weak(), *args, **kwargs))
            carrying_stage.begin(stages_of(weak()))
            found = kind._step_microbatches(weak(), *args, **kwargs)
            carrying_stage.finish(stages_of(weak()))
            return found
        except BaseException as error:
            failed_steps.note_gradients(error, stages_of(weak()))
            share(stage, groups(), error)
            raise

    schedule._step_microbatches = step_microbatches
    check_agreement(stage.group, number, plan, stage.stage_index_to_group_rank)
    return schedule


@contextmanager
def agreed_ahead(
    schedule: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[bytes, bool]]:
    """Agree with the other ranks about a step which some of them may not run as it is.

    Yields:
        What its microbatches look like, and whether all ranks are prepared for them: otherwise all of them
        must run it as it is.
    """
    agreement = AGREEMENTS.get(schedule)
    if agreement is None or not agreement.others:
        yield b"", True
        return
    try:
        found = agreement.agree_ahead(schedule, split(schedule, method, args, kwargs))
    except BaseException as error:
        stage: Any = next(each for each in stages_of(schedule) if isinstance(each, ExchangingStage))
        share(stage, stage.all_groups(), error)
        raise
    try:
        yield found
    finally:
        agreement.ahead = None


def _calling_schedule() -> Any:
    frame: Any = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return None
        caller = frame.f_locals.get("self")
        if is_schedule(caller):
            return caller
        frame = frame.f_back
    return None
