"""Orders of ours under torch's runtime, pieces of W included, and the orders of torch's own schedules."""

from __future__ import annotations

import weakref
import zlib
from typing import Any

from funcstage._torch.pipelining import ExchangingStage
from funcstage._torch.schedules import num_microbatches, order_on, schedule_over
from funcstage.errors import StructureError
from funcstage.gathered import is_sharded
from funcstage.pipelining.examples import LossFunction
from funcstage.schedules.costs import Costs
from funcstage.schedules.files import check_order
from funcstage.schedules.orders import Action, Order, ScheduleError, numbered_in_turn
from funcstage.schedules.timeline import simulate
from funcstage.trees import describe

MAX_SHARDED = 3
"""How many stages of a rank torch's runtime keeps gathered at once."""

_ORDERS: weakref.WeakKeyDictionary[Any, Order] = weakref.WeakKeyDictionary()


def torch_schedule(order: Order, stages: Any, loss_fn: LossFunction | None = None, **options: Any) -> Any:
    """Make a schedule of torch's that runs an order, such as `find_schedule` and `read_order` return.

    Args:
        order: what each rank of the stages' process group does. With W in pieces, the stages must be
            `FunctionalPipelineStage`s; the first piece to come divides the W.
        stages: the stages of this rank, a list, in any order.
        loss_fn: as for torch's schedules; `stages[-1].loss_fn`, say.
        **options: what torch's `PipelineScheduleMulti` takes: `scale_grads`, `args_chunk_spec`, ...

    Returns:
        The schedule, whose `step` and `eval` are used like those of any schedule of torch's.

    Raises:
        ScheduleError: if an order lacks an action, its ranks wait for each other, or it is not for these
            stages or this number of ranks.
        StructureError: if W is in pieces, and a stage is torch's own, or one of more than three of a rank
            that FSDP shards.

    Example:
        ```python
        order = find_schedule(costs, ranks=4, microbatches=16, pieces=4)
        schedule = torch_schedule(order, stages, loss_fn=stages[-1].loss_fn)
        schedule.step(inputs, target=targets)
        ```
    """
    if not isinstance(order, Order):
        raise StructureError(
            f"order must be an Order, got {describe(order)}. find_schedule, read_order and pipeline_order "
            "return one."
        )
    stages = list(stages) if isinstance(stages, (list, tuple)) else [stages]
    _check_stages(order, stages)
    check_order(order)
    simulate(order, [Costs(1, 1, 1)] * order.num_stages)  # refuses ranks that wait for each other
    ranks = [[(a.kind, a.stage, a.microbatch) for a in actions] for actions in order.ranks]
    schedule = schedule_over(ranks, stages, order.num_microbatches, loss_fn=loss_fn, **options)
    _ORDERS[schedule] = order
    return schedule


def _check_stages(order: Order, stages: list[Any]) -> None:
    first, *_ = stages
    for name, have, want in (
        ("stages", order.num_stages, first.num_stages),
        ("ranks", order.num_ranks, first.group_size),
    ):
        if have != want:
            raise ScheduleError(
                f"{order.schedule} is an order of {have} {name}, but the pipeline has {want}. Make the order "
                "for these."
            )
    mine = sorted(stage.stage_index for stage in stages)
    if mine != order.stages_of(first.group_rank):
        raise ScheduleError(
            f"{order.schedule} has the stages {order.stages_of(first.group_rank)} on rank "
            f"{first.group_rank}, but got {mine}. Construct those that the order has there."
        )
    for stage in stages if order.pieces > 1 else ():
        if not isinstance(stage, ExchangingStage):
            raise StructureError(
                f"{order.schedule} has W in {order.pieces} pieces, and stage {stage.stage_index} is a "
                f"{type(stage).__name__}, whose W cannot be cut. Make it a FunctionalPipelineStage, or "
                "leave pieces out of the order."
            )
        if len(stages) > MAX_SHARDED and is_sharded(stage.submod):
            raise StructureError(
                f"{order.schedule} has W in {order.pieces} pieces, and FSDP shards stage "
                f"{stage.stage_index}. With {len(stages)} stages on a rank, torch frees parameters before "
                f"the pieces use them. Have at most {MAX_SHARDED} stages on a rank, or no pieces."
            )


def pieces_of(schedule: Any) -> int:
    """In how many pieces a schedule has W."""
    return _ORDERS[schedule].pieces if schedule in _ORDERS else 1


def digest(schedule: Any) -> int:
    """A number that the ranks of an order of ours must agree about; 0 for other schedules."""
    return zlib.crc32(repr(_ORDERS[schedule]).encode()) if schedule in _ORDERS else 0


def order_of(schedule: Any, rank: int) -> Order | None:
    """The order of a schedule, as far as a rank runs it; None if it cannot be read.

    Args:
        schedule: any of torch's.
        rank: of this process, in the pipeline's group.
    """
    units = order_on(schedule, rank)
    if units is None:
        return None
    actions = [Action(*unit) for unit in units]  # type: ignore[arg-type]
    stages = {action.stage for action in actions}
    if len(stages) == 1:
        actions = numbered_in_turn(actions)
    name = type(schedule).__name__
    return Order(name, 1 + max(stages), num_microbatches(schedule), (tuple(actions),), pieces_of(schedule))
