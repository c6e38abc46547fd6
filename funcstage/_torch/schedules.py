"""The tables of `torch.distributed.pipelining.schedules`: what its constructors read of a stage, and compute.

No process group is needed: a schedule computes the order of all ranks from a few numbers. Importing torch's
schedules takes a second, as they load Dynamo and FSDP, so it waits until somebody asks for a table.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from funcstage._torch.versions import TRIED

# Torch's runtime puts these between the units of work; an order says nothing of them, as they follow from it.
MESSAGES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "WAIT_SEND_F", "WAIT_SEND_B")
"""Of a stage for a microbatch. A wait lets go of what was sent (torch 2.15)."""
HOUSEKEEPING = ("UNSHARD", "RESHARD", "REDUCE_GRAD", "WAIT_REDUCE_GRAD")
"""Of a stage, for all microbatches."""

Unit = tuple[str, int, int]
"""A unit of work: its kind (F, I, W or B), stage and microbatch."""


def table_of(torch_class: str, num_stages: int, num_microbatches: int, num_ranks: int) -> list[list[Unit]]:
    """Return what each rank does under one of torch's schedule classes.

    Raises:
        ValueError: torch's own, if the schedule cannot run these numbers.
        RuntimeError: if this torch builds its schedules in another way than those that were tried.
    """
    from torch.distributed.pipelining import schedules

    # What torch's constructors read of a stage. They compute the order of every rank, whichever rank
    # they are told to be, and refuse numbers that the schedule cannot run.
    stages: Any = [
        SimpleNamespace(
            stage_index=i,
            num_stages=num_stages,
            group_size=num_ranks,
            group_rank=0,
            is_last=False,
            submod=None,
        )
        for i in range(num_stages // num_ranks)
    ]
    try:
        kind = getattr(schedules, torch_class)
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        if not single:
            # Where communication goes is nothing to us, and takes time that is quadratic in the actions.
            unused = {"_prepare_schedule_with_comms": lambda self, actions: None}
            kind = type(kind.__name__, (kind,), unused)
        order = kind(stages[0] if single else stages, num_microbatches).pipeline_order
        return [[unit for given in order[rank] for unit in _units(given)] for rank in range(num_ranks)]
    except (AttributeError, TypeError, KeyError) as change:
        raise RuntimeError(
            f"torch {torch.__version__} builds its pipeline schedules differently from torch {TRIED[0]} to "
            f"{TRIED[-1]}, which funcstage was tested with. Use one of those. ({change!r})"
        ) from change


def _units(given: Any) -> Iterator[Unit]:
    """Translate one entry of torch's table: an idle slot, an action, or several that are overlapped."""
    if given is None:
        return
    if given.sub_actions is not None:
        for sub_action in given.sub_actions:
            yield from _units(sub_action)
    elif given.computation_type.value in ("F", "I", "W", "B"):
        yield given.computation_type.value, given.stage_index, given.microbatch_index
    elif given.computation_type.value not in MESSAGES + HOUSEKEEPING:
        raise KeyError(given.computation_type.value)


# Orders of ours as torch's schedules.


def schedule_over(
    ranks: Sequence[Sequence[Unit]], stages: list[Any], num_microbatches: int, **options: Any
) -> Any:
    """Make torch's runtime for a table, to which it adds messages; a W may be there several times, in pieces.

    Torch counts the W's of a stage, to reduce its gradients after the last one. So it is told of the last
    piece of each, and the others are put in afterwards.
    """
    from torch.distributed.pipelining import schedules

    def action(unit: Unit) -> Any:
        return schedules._Action(unit[1], schedules._ComputationType(unit[0]), unit[2])

    schedule = schedules._PipelineScheduleRuntime(stages, num_microbatches, **options)
    tables = {rank: list(map(action, units)) for rank, units in enumerate(ranks)}
    last = {rank: _last_of_each(actions) for rank, actions in tables.items()}
    schedule.pipeline_order = {rank: [*actions] for rank, actions in tables.items()}
    schedule._prepare_schedule_with_comms(last)
    lowered = schedule.pipeline_order_with_comms
    for rank, actions in tables.items():
        lowered[rank] = _with_earlier_pieces(lowered[rank], actions)
    return schedule


def _last_of_each(actions: list[Any]) -> list[Any]:
    """An action that is there several times, once."""
    last = {action: i for i, action in enumerate(actions)}
    return [action for i, action in enumerate(actions) if last[action] == i]


def _with_earlier_pieces(lowered: list[Any], actions: list[Any]) -> list[Any]:
    """The same with the actions that torch was not told of: after the messages that the one before sends or
    asks for, and before whatever waits or lets go of parameters."""
    last = {action: i for i, action in enumerate(actions)}
    found: list[Any] = []
    i = 0
    for each in lowered:
        goes_on = each.computation_type.value in ("SEND_F", "SEND_B", "RECV_F", "RECV_B")
        while not goes_on and i < len(actions) and last[actions[i]] != i:
            found.append(actions[i])
            i += 1
        found.append(each)
        i += i < len(actions) and each == actions[i]
    return found


def order_on(schedule: Any, rank: int) -> list[Unit] | None:
    """What a schedule does on a rank, one unit of work after the other; None if it has no table."""
    tables = getattr(schedule, "pipeline_order_with_comms", None) or getattr(schedule, "pipeline_order", None)
    if not tables or rank not in tables:
        return None
    try:
        return [unit for given in tables[rank] for unit in _units(given)]
    except KeyError:  # an action that nobody knows
        return None


# What a schedule that is being run is read for.

KEPT_BY_SCHEDULES = (
    "_internal_losses",
    "fwd_recv_ops",
    "bwd_recv_ops",
    "backward_counter",
    "unshard_ops",
    "unsharded_stages",
)
"""Attributes of torch's schedules, containers, which are empty between steps; not all schedules have all."""


_signature = functools.cache(inspect.signature)


class Microbatches(NamedTuple):
    """The microbatches of a step on one rank.

    Attributes:
        args: the positional arguments of each, on the rank with the first stage.
        kwargs: the keyword arguments of each.
        targets: the target of each, if there are any.
        rest: what else belongs to the step.
        trains: whether there is a backward.
    """

    args: list[Any]
    kwargs: list[Any]
    targets: list[Any] | None
    rest: dict[str, Any]
    trains: bool

    @classmethod
    def of(cls, schedule: Any, *args: Any, **kwargs: Any) -> Microbatches:
        """Read what a schedule is called with, which torch checks."""
        given = _signature(type(schedule)._step_microbatches).bind(schedule, *args, **kwargs).arguments
        names = ("arg_mbs", "kwarg_mbs", "target_mbs", "losses")
        of_args, of_kwargs = schedule._check_inputs(*map(given.get, names))
        rest = {"loss_kwargs": given.get("loss_kwargs")}
        return cls(of_args, of_kwargs, given.get("target_mbs"), rest, trains(schedule))


def split(schedule: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Microbatches:
    """The microbatches of a call of a schedule's `step` or `eval`."""
    known = _signature(type(schedule).step).parameters
    rest = {name: value for name, value in kwargs.items() if name not in known}
    trained = method == "step" and trains(schedule)
    if hasattr(schedule, "_get_microbatch_inputs"):
        given = map(kwargs.get, ("target", "arg_mbs", "kwarg_mbs", "target_mbs"))
        found = schedule._get_microbatch_inputs(args, rest, *given)
    else:
        found = *schedule._split_inputs(args, rest), None
    of_args, of_kwargs = schedule._check_inputs(*found)
    return Microbatches(of_args, of_kwargs, found[2], {}, trained)


def prepare(schedule: Any, microbatches: Microbatches, i: int) -> None:
    """Let a schedule find out what its stages send and receive, if it has not, for microbatch `i`."""
    several = hasattr(schedule, "_initialize_stages")
    method = schedule._initialize_stages if several else schedule._initialize_stage
    known = _signature(method.__func__).parameters
    target = None if microbatches.targets is None else microbatches.targets[i]
    rest = {"target": target, **microbatches.rest}
    found = {name: value for name, value in rest.items() if name in known}
    method(microbatches.args[i], microbatches.kwargs[i], **found)


def prepare_again(schedule: Any) -> None:
    """Let a schedule find out again what its stages send."""
    _set_prepared(schedule, forward=False, backward=False)


def prepared(schedule: Any, backward: bool) -> None:
    """Let a schedule take its stages for prepared, for a backward too or not."""
    _set_prepared(schedule, forward=True, backward=backward)


def _set_prepared(schedule: Any, **done: bool) -> None:
    for of in ("_stage", "_stages"):
        for what, value in done.items():
            if hasattr(schedule, f"{of}_{what}_initialized"):
                setattr(schedule, f"{of}_{what}_initialized", value)


def is_schedule(value: object) -> bool:
    """Tell whether a value is one of torch's schedules."""
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    return schedules is not None and isinstance(value, schedules._PipelineSchedule)


def stages_of(schedule: Any) -> list[Any]:
    """The stages of this rank."""
    return schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]


def num_microbatches(schedule: Any) -> int:
    """How many microbatches a step has."""
    return int(schedule._n_microbatches)


def trains(schedule: Any) -> bool:
    """Tell whether there is a loss."""
    return bool(schedule._has_backward)


OPTIONS = {
    "scale_grads": "scale_grads",
    "_n_microbatches": "the number of microbatches",
    "_loss_fn": "loss_fn",
}
"""Attributes of schedules that say what a step computes, with what they are called."""


def loss_of(schedule: Any) -> Any:
    """The function that computes a microbatch's loss, if there is one."""
    return schedule._loss_fn


def keeps_gradients_back(schedule: object) -> bool:
    """Whether a step leaves it to a later one to reduce the gradients that FSDP shards (torch 2.15)."""
    return not getattr(schedule, "_finalize_gradients", True)
