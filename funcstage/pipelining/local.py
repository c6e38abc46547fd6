"""A whole pipeline in one process: value and gradient of cut models under torch's schedules.

No process group, no threads: the actions of all ranks run in turn. It computes what the same schedule
computes on many devices, with the same split of the backward and about the same residuals in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from funcstage.batches import microbatches
from funcstage.checks import Meta
from funcstage.errors import LeafError, StructureError
from funcstage.functional import FunctionalStage
from funcstage.pipelining.capture.function import CapturedFunction
from funcstage.pipelining.pieces import Pieces
from funcstage.pipelining.ranges import leaves_behind, range_of
from funcstage.pipelining.stays import Offloaded, stays_everywhere, warn_of_nothing
from funcstage.pipelining.waiting import Waiting
from funcstage.pullback import Pullback, stage_vjp
from funcstage.schedules.costs import Costs
from funcstage.schedules.files import check_order
from funcstage.schedules.orders import Action, Order, ScheduleError, ScheduleName, pipeline_order
from funcstage.schedules.timeline import simulate
from funcstage.trees import Buffers, Params, PyTree, describe
from funcstage.weight_pullback import WeightPullback, stage_backward_weight

StageFunction: TypeAlias = Callable[..., tuple[PyTree, Buffers]]
LossFunction: TypeAlias = Callable[[PyTree, PyTree], Tensor]
ValueAndGrad: TypeAlias = Callable[
    [Sequence[Params], Sequence[Buffers], PyTree, PyTree], tuple[Tensor, list[Buffers], list[Params]]
]


def pipeline_value_and_grad(
    stages: Sequence[StageFunction | FunctionalStage],
    loss_fn: LossFunction,
    *,
    schedule: ScheduleName | Order = "ZBVZeroBubble",
    num_microbatches: int,
    captured: bool = False,
    offload: Offloaded | None = None,
) -> ValueAndGrad:
    """Make a function that runs one step of a pipeline and returns its loss and gradients.

    The loss is the mean over the microbatches of `loss_fn(output, target)`, and the gradients are those
    of that mean. With a loss that is a mean over samples they are therefore those of the whole model on
    the whole batch, as all microbatches are equally large. With a loss that is a sum over samples both
    come out as the sum over the batch divided by `num_microbatches`: multiply by it.

    Args:
        stages: the stage functions `apply(params, buffers, *args) -> (output, new_buffers)` in order,
            from `functionalize` (the whole tuple will do), from `compile`, or hand-written. A stage's
            output is the next one's argument; a plain tuple becomes several arguments.
        loss_fn: `loss_fn(output, target) -> loss`, a real scalar; `output` is the last stage's.
        schedule: one of torch's: GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble,
            ZBVZeroBubble or DualPipeV; or an order, such as `find_schedule` and `read_order` return.
        num_microbatches: into how many equal parts the batch is cut.
        captured: whether steps on a CUDA device become CUDA graphs, as by `captured`; elsewhere they run as
            they are, and a warning says so.
        offload: whose residuals wait in host memory (`funcstage.offload`) where four actions or more of the
            same rank come in between, and are fetched up to three actions before they are used: `"W"` for
            those of W, from I on; `"IW"` for those of I and W, from F on, too; `None` for none.

    Returns:
        A pure function `(params, buffers, inputs, targets) -> (loss, new_buffers, param_grads)`.
        `params`, `buffers`, `new_buffers` and `param_grads` are lists with one entry a stage; a
        parameter that the loss does not depend on has the gradient `None`. `inputs` (a plain tuple
        becomes several arguments of the first stage) and `targets` are pytrees; tensors in them are cut
        along dimension 0, everything else goes to every microbatch as it is. Buffers go through the
        microbatches in turn, as if each had been a batch.

    Raises:
        ScheduleError: if the schedule is unknown, or cannot run these numbers; if an order lacks an action,
            or its ranks wait for each other.
        StructureError: if a stage is no stage function, or with both `captured` and `offload`; by the
            returned function, if `params` or `buffers` are not one for each stage.
        LeafError: by the returned function, if a tensor cannot be cut into equal parts, or the loss is
            no real scalar.

    Example:
        >>> import torch, funcstage as fs
        >>> from funcstage.pipelining import pipeline_value_and_grad
        >>> stages = [fs.functionalize(torch.nn.Linear(4, 4)) for _ in range(2)]
        >>> step = pipeline_value_and_grad(stages, torch.nn.functional.mse_loss, num_microbatches=2)
        >>> params, buffers = [s.params for s in stages], [s.buffers for s in stages]
        >>> x, y = torch.randn(6, 4), torch.randn(6, 4)
        >>> loss, buffers, param_grads = step(params, buffers, x, y)
        >>> loss.shape, [sorted(grads) for grads in param_grads]
        (torch.Size([]), [['bias', 'weight'], ['bias', 'weight']])
    """
    functions = [_stage_function(i, stage) for i, stage in enumerate(stages)]
    if not callable(loss_fn):
        raise StructureError(
            f"loss_fn must be a function of output and target, got {describe(loss_fn)}. Pass one that "
            "returns a scalar, such as torch.nn.functional.mse_loss."
        )
    order = _order(schedule, len(functions), num_microbatches)
    away = stays_everywhere(order, offload)
    if captured and offload:
        raise StructureError(
            f"captured=True and offload={offload!r} exclude each other: a graph's memory stays its own. "
            "Leave one of them out."
        )
    warn_of_nothing(away, order, offload, stacklevel=2)
    actions = order.in_turn()

    def value_and_grad(
        params: Sequence[Params], buffers: Sequence[Buffers], inputs: PyTree, targets: PyTree
    ) -> tuple[Tensor, list[Buffers], list[Params]]:
        _check_per_stage("params", params, len(functions))
        _check_per_stage("buffers", buffers, len(functions))
        step = Step(
            functions,
            loss_fn,
            params,
            buffers,
            microbatches("inputs", inputs, num_microbatches),
            microbatches("targets", targets, num_microbatches),
            order.pieces,
        )
        waiting = Waiting(away, step.left_by, step.replace)
        for action in actions:
            waiting.begin(action)
            step.run(action)
            waiting.made(action)
        return torch.stack(step.losses).mean(), step.buffers, step.grads

    value_and_grad.order = order  # type: ignore[attr-defined]  # which `logged` simulates
    return CapturedFunction(value_and_grad) if captured else value_and_grad


class _Forward(NamedTuple):
    """What a stage's forward leaves for its backward."""

    pullback: Pullback
    single: Meta | None  # of an output that is one tensor
    spread: bool  # whether the output became several arguments of the next stage


class Step:
    """What is in flight during one step; everything is taken out where it is used last."""

    def __init__(
        self,
        functions: list[StageFunction],
        loss_fn: LossFunction,
        params: Sequence[Params],
        buffers: Sequence[Buffers],
        inputs: list[PyTree],
        targets: list[PyTree],
        pieces: int = 1,
    ) -> None:
        self.functions = functions
        self.params = params
        self.buffers = list(buffers)
        self.grads: list[Params] = [None] * len(functions)
        self.losses: list[Tensor] = []
        self.targets = targets
        # What arrives at a stage for a microbatch: activations from before, cotangents from behind.
        self.activations: dict[tuple[int, int], PyTree] = {(0, m): x for m, x in enumerate(inputs)}
        self.cotangents: dict[tuple[int, int], tuple[PyTree, ...]] = {}
        self.forwards: dict[tuple[int, int], _Forward] = {}
        self.weight_pullbacks: dict[tuple[int, int], WeightPullback] = {}
        self.pieces = Pieces(pieces)
        self.loss_pullbacks: dict[int, Pullback] = {}

        def loss_stage(params: Params, buffers: Buffers, output: PyTree, target: PyTree) -> Any:
            return loss_fn(output, target), buffers

        loss_stage.__qualname__ = getattr(loss_fn, "__qualname__", type(loss_fn).__name__)
        self.loss_stage = loss_stage

    def run(self, action: Action) -> None:
        """Run an action whose needs are done."""
        piece = self.pieces.named(action[1:]) if action.kind == "W" else ""
        with range_of(action.stage, action.kind, action.microbatch, piece):
            if action.kind == "F":
                self.forward(action.stage, action.microbatch)
            if action.kind in "IB":
                self.backward_input(action.stage, action.microbatch)
            if action.kind == "W":
                self.backward_piece(action.stage, action.microbatch)
            if action.kind == "B":
                self.backward_weight(action.stage, self.weight_pullbacks.pop(action[1:]))

    def forward(self, stage: int, microbatch: int) -> None:
        given = self.activations.pop((stage, microbatch))
        output, self.buffers[stage], pullback = stage_vjp(
            self.functions[stage],
            self.params[stage],
            self.buffers[stage],
            *(given if _spreads(given) else (given,)),
            argnums=() if stage == 0 else None,  # nobody waits for the gradient of the batch itself
        )
        leaves_behind(pullback)
        self.forwards[stage, microbatch] = _Forward(pullback, Meta.of(output), _spreads(output))
        if stage < len(self.functions) - 1:
            self.activations[stage + 1, microbatch] = output
        else:
            self.loss(microbatch, output)

    def loss(self, microbatch: int, output: PyTree) -> None:
        loss, _, pullback = stage_vjp(self.loss_stage, (), (), output, self.targets[microbatch], argnums=(0,))
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            raise LeafError(
                f"loss_fn must return a real scalar, a tensor of shape [], got {describe(loss)}. Take the "
                "mean over the microbatch."
            )
        self.losses.append(loss)
        self.loss_pullbacks[microbatch] = pullback

    def backward_input(self, stage: int, microbatch: int) -> None:
        pullback, single, spread = self.forwards.pop((stage, microbatch))
        if stage == len(self.functions) - 1:
            share = torch.full_like(self.losses[microbatch], 1 / len(self.targets))
            (cotangent, _), _ = self.loss_pullbacks.pop(microbatch)(share)
        else:
            cotangents = self.cotangents.pop((stage, microbatch))
            cotangent = cotangents if spread else cotangents[0]
        if cotangent is None and single is not None:
            # Nothing behind depends on the output; to a pullback, None alone would mean one.
            cotangent = torch.zeros(single.shape, dtype=single.dtype, device=single.device)
        input_grads, weight_pullback = pullback(cotangent)
        leaves_behind(weight_pullback)
        self.weight_pullbacks[stage, microbatch] = weight_pullback
        if stage > 0:
            self.cotangents[stage - 1, microbatch] = input_grads

    def left_by(self, made: Action) -> Pullback | WeightPullback | None:
        """The pullback that an F or I has left behind, if it is there."""
        if made.kind == "I":
            return self.weight_pullbacks.get(made[1:])
        return self.forwards[made[1:]].pullback if made[1:] in self.forwards else None

    def replace(self, made: Action, pullback: Any) -> None:
        """Put another in its place."""
        if made.kind == "I":
            self.weight_pullbacks[made[1:]] = pullback
        else:
            self.forwards[made[1:]] = self.forwards[made[1:]]._replace(pullback=pullback)

    def backward_piece(self, stage: int, microbatch: int) -> None:
        """Run W, or the next piece of it, if the stage's has as many."""
        key = stage, microbatch
        piece = self.pieces.next(key, lambda: self.weight_pullbacks.pop(key))
        if piece.pullback is not None:
            self.backward_weight(stage, piece.pullback)

    def backward_weight(self, stage: int, weight_pullback: WeightPullback) -> None:
        self.grads[stage] = stage_backward_weight(weight_pullback, accumulate=self.grads[stage])


def _order(schedule: ScheduleName | Order, num_stages: int, num_microbatches: int) -> Order:
    if not isinstance(schedule, Order):
        return pipeline_order(schedule, num_stages, num_microbatches)
    if (schedule.num_stages, schedule.num_microbatches) != (num_stages, num_microbatches):
        raise ScheduleError(
            f"{schedule.schedule} is an order of {schedule.num_stages} stages and "
            f"{schedule.num_microbatches} microbatches, but there are {num_stages} stages and "
            f"num_microbatches={num_microbatches!r}. Make the order for these."
        )
    check_order(schedule)
    simulate(schedule, [Costs(1, 1, 1)] * num_stages)  # refuses ranks that wait for each other
    return schedule


def _spreads(value: PyTree) -> bool:
    """Tell whether a value becomes several arguments; a namedtuple is one value with named parts."""
    return type(value) is tuple


def _stage_function(i: int, stage: StageFunction | FunctionalStage) -> StageFunction:
    if isinstance(stage, FunctionalStage):
        return stage.apply
    if isinstance(stage, nn.Module) or not callable(stage):
        raise StructureError(
            f"stages[{i}] must be a stage function, got {describe(stage)}. Modules become stage functions by "
            "funcstage.functionalize(module)."
        )
    return stage


def _check_per_stage(name: str, values: object, num_stages: int) -> None:
    if not isinstance(values, (list, tuple)) or len(values) != num_stages:
        found = f"{len(values)} entries" if isinstance(values, (list, tuple)) else describe(values)
        raise StructureError(
            f"{name} must be a list with one entry for each of the {num_stages} stages, got {found}. "
            "Pass those that functionalize returned, in the order of the stages."
        )
