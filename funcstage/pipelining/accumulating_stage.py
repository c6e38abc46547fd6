"""A stage that adds its weight gradients into `.grad`, microbatch after microbatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from funcstage._torch.pipelining import WAITS_FOR_REDUCTIONS
from funcstage._torch.schedules import keeps_gradients_back
from funcstage.errors import StructureError
from funcstage.pipelining import failed_steps, hooks
from funcstage.pipelining.binding import read
from funcstage.pipelining.module_stage import STAGES_OF, ModuleStage
from funcstage.pipelining.pieces import Piece, Pieces
from funcstage.pipelining.ranges import range_of
from funcstage.pipelining.upstream import Upstream
from funcstage.pipelining.waiting import Waiting
from funcstage.schedules.orders import Action
from funcstage.state.parameter_hooks import hooked
from funcstage.weight_pullback import WeightPullback, stage_backward_weight


class AccumulatingStage(ModuleStage):
    """What a stage does with its weight gradients: sums, hooks, parameters that other stages have too."""

    _shared: set[str]
    _shared_grads: dict[str, Tensor]
    _upstream: Upstream
    _hooks_of_accumulators: list[str]
    _progress: failed_steps.Progress
    _weight_pullbacks: dict[int, WeightPullback]
    _pieces: Pieces
    _chunks_left: int
    _waiting: Waiting

    def _check_step(self, schedule: object) -> None:
        self._check_same(schedule)
        if self._whole is not None and keeps_gradients_back(schedule):
            raise StructureError(
                f"{self._name}: finalize_gradients=False holds FSDP's gradients back for later steps, which "
                "this stage does not do. Run the microbatches of those steps in one."
            )

    def _find_shared(self) -> None:
        """Find the parameters that other stages of this process have as well.

        Each stage scales its gradients when it is done, others may not be: so sums are kept apart till then.
        """
        self._shared = {name for name, p in self._parameters.items() if len(STAGES_OF[p]) > 1}
        if self._shared and self._replicas is not None:
            raise StructureError(
                f"{self._name}: {min(self._shared)!r} is also a parameter of another stage of this process, "
                "and `data_parallel` would average their gradients separately. Leave `data_parallel` out, "
                "and average the gradients after the step."
            )
        gathered = self._shared - self._own.keys()
        if gathered:
            raise StructureError(
                f"{self._name}: {min(gathered)!r} is a parameter of another stage of this process too, but "
                "FSDP reduces its gradients for each stage separately. Keep it out of fully_shard "
                "(`ignored_params=`) in both stages, or give each stage a parameter of its own."
            )
        if self.has_backward:
            seen = [*hooks.after_accumulation(self._parameters), *self._hooks_of_accumulators]
            hooks.check_shared(self._name, seen, self._shared, self._replicas is not None)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run W for a microbatch, or the next piece of it: add its weight gradients into `.grad`.

        Args:
            bwd_chunk_id: the number of the microbatch.
            last_backward: whether it is the last backward of the step.

        Raises:
            StructureError: if I did not run for this microbatch, or W did already.
        """
        if not self.has_backward:
            return
        if bwd_chunk_id not in self._weight_pullbacks and not self._pieces.begun(bwd_chunk_id):
            raise StructureError(
                f"{self._name}: W of microbatch {bwd_chunk_id} has no I before it, or runs a second time. "
                "Correct the schedule."
            )
        self._waiting.begin(Action("W", self.stage_index, bwd_chunk_id))
        with range_of(self.stage_index, "W", bwd_chunk_id, self._pieces.named(bwd_chunk_id)):
            piece = self._pieces.next(bwd_chunk_id, lambda: self._weight_pullbacks.pop(bwd_chunk_id))
            # On the first stage torch's I does nothing, and its W is the whole backward.
            self._accumulate(bwd_chunk_id, piece, last_backward, whole=self.is_first)

    def _accumulate(self, chunk: int, piece: Piece, last: bool, whole: bool) -> None:
        self._gather()
        if self._own:  # what FSDP is to reduce is not in `.grad` yet
            self._progress.add(chunk)
        if piece.pullback is None:
            pass
        elif self._hooks_of_accumulators or hooked(self._own.values()):
            self._accumulate_by_autograd(chunk, piece.pullback, whole)
        else:
            self._accumulate_directly(piece.pullback)
        if piece.is_last:
            self._progress.added_all(chunk)
            self._chunks_left -= 1
        if self._pieces.count > 1:  # which torch counts like whole ones
            last = piece.is_last and self._chunks_left == 0
        if last and self._replicas is not None:
            grads = (parameter.grad for parameter in self._parameters.values())
            self._replicas.average(self, [grad for grad in grads if grad is not None])

    def _accumulate_by_autograd(self, chunk: int, weight_pullback: WeightPullback, whole: bool) -> None:
        grads = weight_pullback()
        own = {name: p for name, p in self._own.items() if whole and name not in self._shared}
        rest = {name: p for name, p in self._own.items() if name not in own}
        try:
            hooks.accumulate(own, grads)
            for name, grad in hooks.captured(rest, grads).items():
                self._add(name, grad)
        except Exception as error:
            error.add_note(f"This was {self._name}, in the hooks of parameters in W of microbatch {chunk}.")
            raise
        for name in self._parameters.keys() - self._own.keys():
            grad, total = grads[name], self._total(name)
            if grad is not None:
                self._put(name, grad if total is None else total.add_(grad))
        idle = [*hooks.after_accumulation(rest), *(n for n in self._hooks_of_accumulators if n in rest)]
        if idle:
            hooks.warn_of_idle(self._name, idle)

    def _add(self, name: str, grad: Tensor) -> None:
        grad, total = grad.to(self._parameters[name].grad_dtype or grad.dtype), self._total(name)
        self._put(name, grad if total is None else total.add_(grad))

    def _accumulate_directly(self, weight_pullback: WeightPullback) -> None:
        before = {name: self._total(name) for name in self._parameters}
        sums = stage_backward_weight(weight_pullback, accumulate=before)
        for name in self._parameters:
            grad = sums[name]
            if grad is not None and grad is not before[name]:
                self._put(name, grad)

    def _total(self, name: str) -> Tensor | None:
        """The sum of a parameter's gradients so far, kept apart where others have to be done first."""
        if self._whole is not None and name in self._whole.names:
            return self._whole.total(name)
        return self._shared_grads.get(name) if name in self._shared else self._parameters[name].grad

    def _put(self, name: str, total: Tensor) -> None:
        """Keep the sum of a parameter's gradients where the next microbatch is going to be added."""
        if self._whole is not None and name in self._whole.names:
            self._whole.take(name, total)
            return
        total = total.to(self._parameters[name].grad_dtype or total.dtype)
        if name in self._shared:
            self._shared_grads[name] = total
        else:
            self._parameters[name].grad = total

    @property
    def _own(self) -> dict[str, Any]:
        """The parameters whose gradients the stage accumulates itself, with their hooks.

        FSDP reduces those of its own once a step, and runs then the hooks that it knows.
        """
        if self._whole is None:
            return self._parameters
        return {name: p for name, p in self._parameters.items() if name not in self._whole.names}

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Divide the gradients by a number, such as that of the microbatches whose losses are means.

        Args:
            grad_scale_factor: the number.
        """
        self._upstream.deliver(grad_scale_factor)
        frozen = [p for p in read(self._binding.constant).values() if isinstance(p, nn.Parameter)]
        for parameter in frozen if grad_scale_factor != 1 else ():
            if parameter.grad is not None:  # of an earlier step; torch's stage divides it too
                parameter.grad.div_(grad_scale_factor)
        if self._replicas is not None and self._replicas.scale(self, grad_scale_factor):
            return
        shared, self._shared_grads = self._shared_grads, {}
        for name, parameter in self._parameters.items():
            if name in shared:
                grad = shared[name].div_(grad_scale_factor)
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            elif parameter.grad is not None and name not in self._shared:
                parameter.grad.div_(grad_scale_factor)
        self._progress.whole = self._whole is not None or bool(self._progress.added)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce and divide the gradients at the end of a step; torch does not divide by one."""
        if self._whole is not None and self.has_backward:
            self._whole.hand_over()
        super().perform_reduce_grad(grad_scale_factor)
        by_torch = self._whole is not None and self._whole.known_to_schedules and WAITS_FOR_REDUCTIONS
        if grad_scale_factor == 1 and not by_torch:
            self.scale_grads(1)

    def start_gradient_reduction(self) -> None:
        """Start to reduce the gradients that FSDP shards; called by torch from 2.15 on."""
        if self._whole is not None:
            self._whole.hand_over()
        super().start_gradient_reduction()  # type: ignore[misc]

    def wait_for_gradient_reduction(self, grad_scale_factor: int) -> None:
        """Wait for them and divide; torch does not divide by one."""
        super().wait_for_gradient_reduction(grad_scale_factor)  # type: ignore[misc]
        if grad_scale_factor == 1:
            self.scale_grads(1)
