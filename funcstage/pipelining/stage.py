"""A stage for torch's pipelines: `PipelineStage` with the forward and backward of `stage_vjp`.

torch's schedules, messages and receive buffers are used as they are. What differs is what a stage does for
an action: F is `stage_vjp`, I its pullback and W the second half of that, eager or compiled. The private
torch API behind it is in `_torch.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from funcstage import trees
from funcstage.eager import first_dtensor
from funcstage.errors import LeafError, StructureError
from funcstage.graph import _torch as tt
from funcstage.graph import compile as compile_stage
from funcstage.parameter_hooks import hooked, with_hooks_on_accumulators
from funcstage.pipelining import constructors, failed_steps, failures, hooks, plans
from funcstage.pipelining._torch import (
    EVERY_INPUT_RETURNS_A_GRADIENT,
    Examples,
    ExchangingStage,
    OptimizedModule,
    without_memory,
)
from funcstage.pipelining.binding import Binding, Structure, read, untouched, update
from funcstage.pipelining.preparations import Preparations
from funcstage.pipelining.replicas import replicas_of
from funcstage.pipelining.same_dtypes import SameDtypes
from funcstage.pipelining.snapshot import OwnedBuffers, Snapshot
from funcstage.pipelining.upstream import Upstream
from funcstage.split import Meta, Pullback, WeightPullback, stage_backward_weight, stage_vjp
from funcstage.trees import Buffers, Params, PyTree, describe
from funcstage.undone import undone_if_interrupted
from funcstage.wrappers import check_unwrapped

StageFunction = Callable[..., tuple[PyTree, Buffers]]
LossFunction = Callable[..., Tensor]

_STAGES_OF: Any = WeakIdKeyDictionary()
"""The stages of this process that a parameter belongs to."""


class FunctionalPipelineStage(ExchangingStage):
    """A pipeline stage whose backward is split by `stage_vjp`, for all of torch's schedules.

    It takes the place of `torch.distributed.pipelining.PipelineStage` and may share a pipeline with it.
    The module stays the owner of its parameters and buffers: gradients are added into `.grad`, and buffers
    are updated in place, microbatch after microbatch, so optimizers, gradient clipping and state dicts work
    as ever. What crosses between stages is found out with fake tensors before the first microbatch, and
    stages that do not fit together are refused there.

    An error in the midst of a step says which microbatches are in `.grad`. It leaves messages in flight, so
    that no rank goes on in the group of several: make a new group, or let the process end. Others are woken
    at once where the group is gloo's; on a GPU they wait for at most its timeout. A stage whose constructor
    fails is heard of on all ranks before their first step.

    Args:
        submodule: the module of this stage, not compiled or wrapped. What is changed between steps
            (submodules that are replaced, parametrized or frozen, tensors, all of it by `stage.submod = ...`)
            is taken up by the next one, or refused where the other stages were told otherwise.
        stage_index: which stage it is, from 0.
        num_stages: of how many.
        device: where the module's tensors are.
        input_args: examples of the positional arguments for one microbatch. Checked against what the stage
            gets; never needed.
        output_args: examples of the output, likewise; needed where shapes depend on the values of inputs.
        group: the pipeline's process group; `None` is the default group.
        dw_builder: refused, as this stage splits its backward itself.
        compile: run F, I and W as compiled programs: `True`, or a dict of options of `funcstage.compile`.
        loss_fn: what the schedule is going to compute from the last stage's output,
            `loss_fn(output, target) -> scalar`, a pure function. Give the schedule the `loss_fn` of this
            stage, and the loss becomes a part of the last stage's programs. Other stages need none.
        data_parallel: the ranks with replicas of this one's stages, as a process group or a mesh of one
            dimension (`mesh["data"]`). The replicas start as copies of the first one, and each step averages
            their gradients once, after the stage's last W and beside the work of the rank's other stages.
        grad_dtype: the dtype of the parameters' `.grad`, such as `torch.float32` to sum the gradients of
            bfloat16 parameters in; `None` is that of the parameters. Not all of torch's optimizers take
            gradients that are wider than their parameters (Adam and its kin do not: cast them first).
        param_dtype: the dtype to compute in, such as `torch.bfloat16` where the parameters are float32. The
            floating parameters are cast once a step, the floating inputs where they arrive, buffers and
            outputs not (as by FSDP's `MixedPrecisionPolicy` with its defaults). Gradients end in `.grad` in
            the parameters' own dtype, summed over the microbatches in that.

    Raises:
        LeafError: if `stage_index` is out of range, a tensor of the module is on another device, or
            `param_dtype` is no floating dtype.
        StructureError: if the module is wrapped, the loss has parameters, or `dw_builder` is given.

    In a process for each rank (examples/train_distributed.py is the whole of it):

    ```python
    stages = [FunctionalPipelineStage(part, i, 4, device, compile=True) for i, part in mine]
    schedule = ScheduleZBVZeroBubble(stages, 8, loss_fn=torch.nn.functional.mse_loss)
    schedule.step(inputs, target=targets)
    optimizer.step()
    ```
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device | str,
        input_args: PyTree = None,
        output_args: PyTree = None,
        group: dist.ProcessGroup | None = None,
        dw_builder: None = None,
        *,
        compile: bool | dict[str, Any] = False,
        loss_fn: LossFunction | None = None,
        grad_dtype: torch.dtype | None = None,
        data_parallel: dist.ProcessGroup | DeviceMesh | None = None,
        param_dtype: torch.dtype | None = None,
    ) -> None:
        with constructors.constructing(group, stage_index, num_stages):
            device = torch.device(device)
            _check_position(stage_index, num_stages)
            _check_module(submodule, device)
            _check_loss(loss_fn)
            _check_param_dtype(param_dtype)
            if dw_builder is not None:
                raise StructureError(
                    "dw_builder must be None: this stage splits its backward itself, into I and W."
                )
            # The examples stay here: torch would take them for the truth, and skip the exchange that
            # checks it.
            super().__init__(submodule, stage_index, num_stages, device, group=group)
            self._given_inputs = input_args
            self._given_outputs = output_args
            self._compile_options: dict[str, Any] | None = {} if compile is True else compile or None
            self._loss = None if loss_fn is None else FoldedLoss(loss_fn)
            self._grad_dtype = grad_dtype
            self._param_dtype = param_dtype
            self._output: PyTree = None
            self._prepared_for: tuple[Any, dict[str, Any]] | None = None
            self._forwards: dict[int, _Forward] = {}
            self._pending: dict[int, _Pending] = {}
            self._weight_pullbacks: dict[int, WeightPullback] = {}
            self._shared: set[str] = set()
            self._shared_grads: dict[str, Tensor] = {}
            self._upstream = Upstream()
            self._hooks_of_accumulators: list[str] = []
            self._replicas = None if data_parallel is None else replicas_of(data_parallel)
            self._parameters: dict[str, Any] = {}
            self._fitting: Binding | None = None
            self._progress = failed_steps.Progress()
            self._preparations = Preparations(self)
            self._bind()
            if self._replicas is not None:
                self._replicas.replicate([*submodule.parameters(), *submodule.buffers()])

    @property
    def loss_fn(self) -> FoldedLoss | None:
        """The loss for the schedule: with this as its `loss_fn`, the last stage's programs compute it.

        It may be used inside of other functions (a scaled loss, say). A schedule that is given the plain
        function computes the same values, apart from the programs.
        """
        return self._loss

    @property
    def params(self) -> Params:
        """The trainable parameters by name, detached, as `functionalize` returns them."""
        return {name: parameter.detach() for name, parameter in read(self._current().trainable).items()}

    @property
    def grads(self) -> Params:
        """The gradients by name, with the structure of `params`; `None` where there is none."""
        return {name: parameter.grad for name, parameter in read(self._current().trainable).items()}

    # What schedules call.

    def clear_runtime_states(self) -> None:
        """Begin a step."""
        super().clear_runtime_states()
        self.drop_received()
        for left in (
            self.bwd_cache,
            self._forwards,
            self._pending,
            self._weight_pullbacks,
            self._shared_grads,
        ):
            left.clear()
        self._progress.begin()
        self._upstream.clear()
        if self._replicas is not None:
            self._replicas.drop(self)
        try:
            schedule = plans.watch_caller(self, self._all_groups)
            if schedule is not None:
                self._preparations.turn_to(schedule, self)
            self._read_state()
            if self._fitting is not self._binding:  # has changed while another schedule drove the stage
                self._check_still_fits()
                self._fitting = self._binding
        except BaseException as error:
            failures.share(self, self._all_groups(), error)
            raise
        if self.has_backward:
            self._hooks_of_accumulators = with_hooks_on_accumulators(self._parameters)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> PyTree:
        """Run F for a microbatch.

        Args:
            fwd_chunk_id: the number of the microbatch.
            args: the arguments, of the first stage only.
            kwargs: keyword arguments, which are not differentiated.
            save_forward_output: whether `schedule.step` returns the last stage's output.

        Returns:
            The output; on the last stage one that the schedule can compute a loss from.

        Raises:
            LeafError: if the microbatch does not look like the one that the stages were prepared for.
        """
        self.raise_failure()
        self.keep_output(fwd_chunk_id, ())
        if not self._forwards and not self._weight_pullbacks:
            self._find_shared()  # all stages have read their states by now
        if self._replicas is not None and self.has_backward:
            self._replicas.begin(self)
        if not self.is_first:
            args = tuple(map(trees.detached, self.received(fwd_chunk_id)))
        call = _Call(fwd_chunk_id, args, kwargs or {})
        self._look_again(fwd_chunk_id)
        self._check_call(call)
        if not self.is_last:
            outputs = tuple(tensor.contiguous() for tensor in _as_tuple(self._forward(self._apply, call)))
            self._check_microbatch(call, "output", outputs, self._output_examples)
            self.keep_output(fwd_chunk_id, outputs)
            return outputs if len(outputs) > 1 else outputs[0]
        if save_forward_output:
            self.output_chunks.append(None)
        pending = _Pending(self, call, len(self.output_chunks) - 1 if save_forward_output else None)
        if self._loss is None or not self.has_backward:
            return pending.output()
        self._pending[fwd_chunk_id] = pending
        return pending.stand_in(self._output)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the operations that send the output, and let go of it: what I needs is in the pullback."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        self.keep_output(fwd_chunk_id, ())
        return ops

    def set_local_fwd_input(self, prev_stage_outputs: PyTree, mb_index: int) -> None:
        """Take the output of the previous stage, where that is on the same rank."""
        for info, tensor in zip(self.args_recv_info[mb_index], _as_tuple(prev_stage_outputs), strict=True):
            info.buffer = tensor.detach()  # no copy

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """Hand the input gradients to the previous stage, where that is on the same rank."""
        # V-shaped schedules ask for them even in `schedule.eval`, which torch's own stages do not survive.
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradients of the output, where the next stage is on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Run I for a microbatch, and W right after it where the schedule does not want them apart.

        Args:
            bwd_chunk_id: the number of the microbatch.
            loss: what the schedule's loss function returned for it, of the last stage only.
            full_backward: whether to run W as well.
            last_backward: whether it is the last backward of the step.
        """
        if not self.has_backward:
            return
        self._check_chunk_id(bwd_chunk_id)
        self.drop_output(bwd_chunk_id)
        if self.is_last:
            self._backward_of_loss(bwd_chunk_id, loss)
        forward = self._forwards.pop(bwd_chunk_id)
        if not self.is_last:
            forward.output_grads.update(enumerate(self._retrieve_recv_grads(bwd_chunk_id)))
        input_grads, weight_pullback = forward.pullback(forward.cotangents())
        if self.is_first:
            self._upstream.gather(forward.args, input_grads)
        else:
            self.bwd_cache[bwd_chunk_id] = tuple(map(self._sent_grad, input_grads, self._input_examples))
        if full_backward:
            self._accumulate(bwd_chunk_id, weight_pullback, last_backward, whole=True)
        else:
            self._weight_pullbacks[bwd_chunk_id] = weight_pullback

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run W for a microbatch: add its weight gradients into `.grad`.

        Args:
            bwd_chunk_id: the number of the microbatch.
            last_backward: whether it is the last backward of the step.

        Raises:
            StructureError: if I did not run for this microbatch, or W did already.
        """
        if not self.has_backward:
            return
        if bwd_chunk_id not in self._weight_pullbacks:
            raise StructureError(
                f"{self._name}: W of microbatch {bwd_chunk_id} has no I before it, or comes a second time. "
                "Correct the schedule."
            )
        # On the first stage torch's I does nothing, and its W is the whole backward.
        weight_pullback = self._weight_pullbacks.pop(bwd_chunk_id)
        self._accumulate(bwd_chunk_id, weight_pullback, last_backward, whole=self.is_first)

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
        self._progress.whole = bool(self._progress.added)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce and divide the gradients at the end of a step; torch does not divide by one."""
        super().perform_reduce_grad(grad_scale_factor)
        if grad_scale_factor == 1:
            self.scale_grads(1)

    # The module: its structure, read when that changes, and its tensors, read in every step.

    def _bind(self) -> None:
        """Read what the module is made of."""
        binding = Binding.of(self.submod)
        apply: StageFunction = binding.apply
        if self._param_dtype is not None:
            apply = _computing_in(self._param_dtype, apply)
        self._eager = apply
        self._apply = self._compiled(apply)
        self._apply_with_loss = self._compiled(_with_loss(apply, self._loss)) if self._loss else None
        self._binding = binding  # last: if this was interrupted, the next step reads it all again
        self._read_tensors()

    def _current(self) -> Binding:
        """The module as it is now, which may have been changed or replaced since the last step."""
        if not isinstance(self.submod, nn.Module) or Structure.of(self.submod) != self._binding.structure:
            self._take_up()
        return self._binding

    def _take_up(self) -> None:
        """Go on with a module that has changed, or refuse it."""
        before = self._binding
        try:
            _check_module(self.submod, self.device)
            self._bind()
            self._check_still_fits()
            self._fitting = self._binding
        except BaseException:
            self._binding = before  # so that the next step looks again
            raise
        if self._replicas is not None and not before.structure.same_modules(self._binding.structure):
            self._replicas.replicate([*self.submod.parameters(), *self.submod.buffers()])

    def _compiled(self, apply: StageFunction) -> StageFunction:
        return apply if self._compile_options is None else compile_stage(apply, **self._compile_options)

    def _read_state(self) -> None:
        """Read what optimizers, `load_state_dict`, `to` and the like have made of the module."""
        self._current()
        self._read_tensors()

    def _read_tensors(self) -> None:
        parameters, constant = read(self._binding.trainable), read(self._binding.constant)
        for name, parameter in self._parameters.items():
            if parameter is not parameters.get(name):
                _STAGES_OF.get(parameter, set()).discard(self)
        self._parameters = parameters
        for parameter in self._parameters.values():
            _STAGES_OF.setdefault(parameter, weakref.WeakSet()).add(self)
        for parameter in self._parameters.values() if self._grad_dtype is not None else ():
            if parameter.grad_dtype != self._grad_dtype:
                parameter.grad_dtype = self._grad_dtype
        self._params = {name: self._cast(tensor) for name, tensor in self._parameters.items()}
        # Clones, as the module's own are overwritten while earlier microbatches await their backward.
        self._buffers = {
            name: tensor.detach().clone() for name, tensor in read(self._binding.updated).items()
        }
        self._buffers |= {name: self._cast(tensor) for name, tensor in constant.items()}
        self._snapshot = Snapshot.of(
            self.submod,
            self._binding.structure.parts,
            {**self._binding.trainable, **self._binding.constant},
            copied=self._param_dtype is not None,
        )
        self._owned = OwnedBuffers.of(self._binding.updated)

    def _look_again(self, chunk: int) -> None:
        """Notice what was done to the module since the last microbatch of the step."""
        change = self._snapshot.change(self.submod)
        if change:
            raise StructureError(
                f"{self._name}: {change} in the midst of a step, before microbatch {chunk}. Do that between "
                "steps, which take it up."
            )
        if self._owned.changed(self._binding.updated):
            self._current()
            self._read_tensors()
        elif self._snapshot.written():
            self._read_tensors()

    def _cast(self, tensor: Tensor) -> Tensor:
        """Detach a parameter, cast to the dtype to compute in, or a buffer, as it is."""
        return _cast(tensor.detach(), self._param_dtype if isinstance(tensor, nn.Parameter) else None)

    def _check_still_fits(self) -> None:
        """Refuse a module that does not take or return what the other stages were told."""
        if self._prepared_for is None:
            return
        way_out = "Make a new schedule of new stages on every rank, or change it back."
        inputs, kwargs = self._prepared_for
        try:
            output = self._output_for(inputs, kwargs)
        except tt.UNTRACEABLE:
            return  # each microbatch is checked as it comes
        except Exception as error:
            raise LeafError(
                f"{self._name}: the module was changed, and its forward fails on the inputs that it gets, "
                f"{_looks(_tensors(inputs))}: {type(error).__name__}: {error}. {way_out}"
            ) from error
        if self.is_last:
            self._output = trees.map_leaves(_example, output)
            return
        now, told = _tensors(output), self._output_examples
        if not _alike(now, told):
            raise LeafError(
                f"{self._name}: the module was changed, and its output is {_looks(now)}, but the next stage "
                f"was told {_looks(told)}. {way_out}"
            )
        if any(new.requires_grad > old.requires_grad for new, old in zip(now, told, strict=True)):
            raise StructureError(
                f"{self._name}: parameters that were frozen are to be trained, but the next stage was told "
                f"that this one needs no gradients. {way_out}"
            )

    def _update_buffers(self, new: Buffers) -> None:
        before, self._buffers = self._buffers, new
        if update(self._binding.updated, before, new) or self._binding.buffers_registered():
            self._bind()
            self._fitting = self._binding
        else:
            self._owned = OwnedBuffers.of(self._binding.updated)

    def _find_shared(self) -> None:
        """Find the parameters that other stages of this process have as well.

        Each stage scales its gradients when it is done, others may not be: so sums are kept apart till then.
        """
        self._shared = {name for name, p in self._parameters.items() if len(_STAGES_OF[p]) > 1}
        if self._shared and self._replicas is not None:
            raise StructureError(
                f"{self._name}: {min(self._shared)!r} is a parameter of another stage of this process too, "
                "and `data_parallel` would average the gradients of both apart. Leave it out, and average "
                "the gradients after the step."
            )
        if self.has_backward:
            seen = [*hooks.after_accumulation(self._parameters), *self._hooks_of_accumulators]
            hooks.check_shared(self._name, seen, self._shared, self._replicas is not None)

    def _accumulate(self, chunk: int, weight_pullback: WeightPullback, last: bool, whole: bool) -> None:
        self._progress.add(chunk)
        if self._hooks_of_accumulators or hooked(self._parameters.values()):
            self._accumulate_by_autograd(chunk, weight_pullback, whole)
        else:
            self._accumulate_directly(weight_pullback)
        self._progress.added_all()
        if last and self._replicas is not None:
            grads = (parameter.grad for parameter in self._parameters.values())
            self._replicas.average(self, [grad for grad in grads if grad is not None])

    def _accumulate_by_autograd(self, chunk: int, weight_pullback: WeightPullback, whole: bool) -> None:
        grads = weight_pullback()
        own = {name: p for name, p in self._parameters.items() if whole and name not in self._shared}
        rest = {name: p for name, p in self._parameters.items() if name not in own}
        try:
            hooks.accumulate(own, grads)
            for name, grad in hooks.captured(rest, grads).items():
                self._add(name, grad)
        except Exception as error:
            error.add_note(f"This was {self._name}, in the hooks of parameters in W of microbatch {chunk}.")
            raise
        idle = [*hooks.after_accumulation(rest), *(n for n in self._hooks_of_accumulators if n in rest)]
        if idle:
            hooks.warn_of_idle(self._name, idle)

    def _add(self, name: str, grad: Tensor) -> None:
        parameter = self._parameters[name]
        grad = grad.to(parameter.grad_dtype or grad.dtype)
        if name in self._shared:
            total = self._shared_grads.get(name)
            self._shared_grads[name] = grad if total is None else total.add_(grad)
        else:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _accumulate_directly(self, weight_pullback: WeightPullback) -> None:
        before = {
            name: self._shared_grads.get(name) if name in self._shared else parameter.grad
            for name, parameter in self._parameters.items()
        }
        sums = stage_backward_weight(weight_pullback, accumulate=before)
        for name, parameter in self._parameters.items():
            grad = sums[name]
            if grad is None or grad is before[name]:
                continue
            grad = grad.to(parameter.grad_dtype or grad.dtype)
            if name in self._shared:
                self._shared_grads[name] = grad
            else:
                parameter.grad = grad

    # One microbatch.

    def _forward(self, apply: StageFunction, call: _Call) -> PyTree:
        """Run F: return the output, keep the pullback and update the module's buffers."""
        return self.in_forward_context(call.chunk, self._run_forward, apply, call)

    @undone_if_interrupted
    def _run_forward(self, apply: StageFunction, call: _Call) -> PyTree:
        args, kwargs = trees.map_leaves(trees.detached, (call.args, call.kwargs))
        try:
            if not self.has_backward:
                output, new_buffers = apply(self._params, self._buffers, *args, **kwargs)
            else:
                # torch calls for the gradient of the inputs that require grad, and these alone.
                wanted = call.args if self.is_first else self._input_examples
                argnums = [i for i, arg in enumerate(wanted) if _any_requires_grad(arg)]
                output, new_buffers, pullback = stage_vjp(
                    apply, self._params, self._buffers, *args, argnums=argnums, **kwargs
                )
                self._forwards[call.chunk] = _Forward.of(pullback, output, call.args if self.is_first else ())
        except Exception as error:
            error.add_note(f"This was {self._name}, in F of microbatch {call.chunk}.")
            raise
        self._update_buffers(new_buffers)
        return trees.map_leaves(trees.detached, output)

    def _backward_of_loss(self, chunk: int, loss: Tensor | None) -> None:
        """Take the gradients of the output from what the schedule computed with it."""
        if not isinstance(loss, Tensor):
            raise StructureError(f"{self._name}: the schedule's loss must be a tensor, got {describe(loss)}.")
        if chunk in self._pending:  # the loss did not read the output
            self._pending[chunk].output()
        torch.autograd.backward(loss)

    def _sent_grad(self, grad: Tensor | None, example: Tensor) -> Tensor | None:
        """What the previous stage waits for: zeros where there is no gradient, but could have been one."""
        if grad is not None:
            return grad.contiguous()
        if example.requires_grad or EVERY_INPUT_RETURNS_A_GRADIENT:
            return torch.zeros(example.shape, dtype=example.dtype, device=self.device)
        return None

    def _check_call(self, call: _Call) -> None:
        if self.is_first:
            self._check_microbatch(call, "input", _tensors(call.args), self._input_examples)
        self._check_keywords(call.kwargs)

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        if self.has_backward and _any_requires_grad(kwargs):
            raise LeafError(
                "a keyword argument requires grad, but only positional ones are differentiated. Detach it, "
                "or pass it by position."
            )

    def _check_microbatch(
        self, call: _Call, what: str, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        if not _alike(found, expected):
            raise LeafError(
                f"{self._name}: the {what} of microbatch {call.chunk} is {_looks(found)}, but the stages "
                f"were prepared for {_looks(expected)}. Microbatches must be alike: let their number divide "
                "the batch."
            )

    # Before the first microbatch.

    def infer(self, inputs: Any, kwargs: dict[str, Any]) -> tuple[Examples, Examples]:
        """Say what the stage sends for what it receives, from a forward on fake tensors."""
        self._check_keywords(kwargs)
        received = _tensors(inputs)
        if self._given_inputs is not None and not _alike(received, _tensors(self._given_inputs)):
            raise LeafError(
                f"it gets {_looks(received)}, but input_args says {_looks(_tensors(self._given_inputs))}. "
                "Give the stages modules that fit together, or leave input_args out."
            )
        try:
            output = self.in_forward_context(0, self._output_for, inputs, kwargs, inferring=True)
        except tt.UNTRACEABLE as error:
            if self._given_outputs is None:
                raise StructureError(
                    "its shapes depend on values of its inputs, so they cannot be inferred. Pass "
                    f"output_args. ({type(error).__name__}: {error})"
                ) from error
            output = trees.map_leaves(_trainable, self._given_outputs)
        except Exception as error:
            raise LeafError(
                f"its forward fails on the inputs that it gets, {_looks(received)}: "
                f"{type(error).__name__}: {error}. Pass input_args that it takes, or mend what the stage "
                "before it returns."
            ) from error
        sent = _tensors(output)
        if self._given_outputs is not None and not _alike(sent, _tensors(self._given_outputs)):
            raise LeafError(
                f"its output is {_looks(sent)}, but output_args says "
                f"{_looks(_tensors(self._given_outputs))}. Correct output_args or leave it out."
            )
        if not self.is_last and any(not isinstance(value, Tensor) for value in _as_tuple(output)):
            raise StructureError(
                f"its output is {describe(output)}; only a tensor or a tuple of tensors can be sent to the "
                "next stage. Return those, and make constants attributes of the next stage."
            )
        self._output = trees.map_leaves(_example, output)
        self._prepared_for = trees.map_leaves(_example, (inputs, kwargs))
        return tuple(map(_example, received)), tuple(map(_example, sent))

    @undone_if_interrupted
    def _output_for(self, inputs: Any, kwargs: dict[str, Any]) -> PyTree:
        """Run the stage on fake tensors, which have no memory and cost no computation."""
        mode = tt.FakeTensorMode(allow_non_fake_inputs=True)

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if first_dtensor(leaf) is not None:
                return mode.from_tensor(leaf.detach()).requires_grad_(leaf.requires_grad)
            return tt.fake_like(mode, leaf, self.device).requires_grad_(leaf.requires_grad)

        args, kwargs, params, buffers = trees.map_leaves(
            fake, (inputs, kwargs, self._parameters, self._buffers)
        )
        with tt.own_autocast_cache(), untouched(self.submod), mode, SameDtypes(), torch.enable_grad():
            output, _ = self._eager(params, buffers, *args, **kwargs)
        return output

    def _all_groups(self) -> set[dist.ProcessGroup | None]:
        return self._groups() | (set() if self._replicas is None else {self._replicas.group})

    @property
    def _name(self) -> str:
        return f"stage {self.stage_index} of {self.num_stages} ({type(self.submod).__name__})"


class FoldedLoss:
    """A loss function that runs inside of the last stage's programs, where it is given that stage's output.

    Args:
        loss_fn: the plain function; other outputs are handed to it.
    """

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn

    def __call__(self, output: PyTree, target: PyTree, **loss_kwargs: Any) -> Tensor:
        """Compute the loss of a microbatch.

        Args:
            output: what the last stage returned.
            target: what it should have been.
            **loss_kwargs: further arguments of the loss function.

        Returns:
            The loss, a scalar.
        """
        for leaf in trees.flatten(output)[0]:
            if isinstance(leaf, _StandIn) and leaf.pending.leaves is None:
                return leaf.pending.loss(target, loss_kwargs)
        return self.loss_fn(output, target, **loss_kwargs)


def _with_loss(apply: StageFunction, loss: FoldedLoss) -> StageFunction:
    """Make a stage function of the last stage and its loss, whose output is (loss, output)."""

    def apply_with_loss(
        params: Params, buffers: Buffers, *args: Any, kwargs: dict[str, Any], target: PyTree, loss_kwargs: Any
    ) -> tuple[PyTree, Buffers]:
        output, new_buffers = apply(params, buffers, *args, **kwargs)
        value = loss.loss_fn(output, target, **loss_kwargs)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise LeafError(
                f"loss_fn must return a real scalar, a tensor of shape [], got {describe(value)}. Take the "
                "mean over the microbatch."
            )
        return (value, output), new_buffers

    apply_with_loss.__qualname__ = f"{apply.__qualname__} with its loss"
    apply_with_loss.module = apply.module  # type: ignore[attr-defined]  # whose mode a compiled stage looks at
    apply_with_loss.contents = apply.contents  # type: ignore[attr-defined]
    return apply_with_loss


def _computing_in(dtype: torch.dtype, apply: StageFunction) -> StageFunction:
    """Make a stage function that casts its arguments first, and its parameters where nobody has yet."""

    def in_dtype(params: Params, buffers: Buffers, *args: Any, **kwargs: Any) -> tuple[PyTree, Buffers]:
        params, args, kwargs = trees.map_leaves(lambda leaf: _cast(leaf, dtype), (params, args, kwargs))
        return apply(params, buffers, *args, **kwargs)

    in_dtype.__qualname__ = apply.__qualname__
    in_dtype.module = apply.module  # type: ignore[attr-defined]  # whose mode a compiled stage looks at
    in_dtype.contents = apply.contents  # type: ignore[attr-defined]
    return in_dtype


class _Call(NamedTuple):
    """What the forward of a microbatch is given."""

    chunk: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """What F leaves for I.

    Attributes:
        pullback: of the microbatch.
        spec: the structure of the output.
        single: what the output looks like, if it is one tensor.
        args: the first stage's arguments, through which autograd goes on.
        output_grads: the gradients of the output's leaves that have arrived.
    """

    pullback: Pullback
    spec: optree.PyTreeSpec
    single: Meta | None
    args: tuple[Any, ...]
    output_grads: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, pullback: Pullback, output: PyTree, args: tuple[Any, ...]) -> _Forward:
        return cls(pullback, trees.flatten(output)[1], Meta.of(output), args)

    def cotangents(self) -> PyTree:
        """The gradients as the pullback takes them."""
        grads = [self.output_grads.get(i) for i in range(self.spec.num_leaves)]
        # torch 2.11 sends a gradient of everything. To a pullback, one None alone would be ones.
        grads = [grad if trees.is_differentiable(grad) else None for grad in grads]
        if self.single is not None and grads == [None]:
            return torch.zeros(self.single.shape, dtype=self.single.dtype, device=self.single.device)
        return trees.unflatten(self.spec, grads)

    def awaiting_grad(self, i: int, leaf: Tensor) -> Tensor:
        """Make an autograd leaf of a leaf of the output, whose gradient comes here; nothing else holds it."""
        arrived = self.output_grads

        def take(leaf: Tensor) -> None:
            arrived[i], leaf.grad = leaf.grad, None

        leaf = leaf.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(take)
        return leaf


class _Pending:
    """The forward of a microbatch on the last stage; it can wait for the target, to run with the loss.

    Args:
        stage: the stage.
        call: what its forward is given.
        place: where among the stage's output chunks the output is to be put, if it is.
    """

    def __init__(self, stage: FunctionalPipelineStage, call: _Call, place: int | None) -> None:
        self.stage = stage
        self.call = call
        self.place = place
        self.leaves: list[Any] | None = None

    def stand_in(self, output: PyTree) -> PyTree:
        """Make a stand-in for the output, of which examples are given."""
        leaves, spec = trees.flatten(output)
        made = [
            _StandIn(self, i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)
        ]
        return trees.unflatten(spec, made)

    def output(self) -> PyTree:
        """Run the forward without the loss."""
        return self._finish(self.stage._forward(self.stage._apply, self.call), first_leaf=0)

    def loss(self, target: PyTree, loss_kwargs: dict[str, Any]) -> Tensor:
        """Run the forward with the loss."""
        assert self.stage._apply_with_loss is not None
        folded = {"kwargs": self.call.kwargs, "target": target, "loss_kwargs": loss_kwargs}
        call = self.call._replace(kwargs=folded)
        loss, output = self.stage._forward(self.stage._apply_with_loss, call)
        self._finish(output, first_leaf=1)
        return self.stage._forwards[call.chunk].awaiting_grad(0, loss)

    def _finish(self, output: PyTree, first_leaf: int) -> PyTree:
        """Hand the output over to the schedule, to compute with and to return."""
        if self.place is not None:
            self.stage.output_chunks[self.place] = output
        self.stage._pending.pop(self.call.chunk, None)
        leaves, spec = trees.flatten(output)
        if self.stage.has_backward:
            forward = self.stage._forwards[self.call.chunk]
            trainable = [_requires_grad(example) for example in trees.flatten(self.stage._output)[0]]
            leaves = [
                forward.awaiting_grad(i, leaf) if wanted else leaf
                for i, (leaf, wanted) in enumerate(zip(leaves, trainable, strict=True), first_leaf)
            ]
        self.leaves = leaves
        return trees.unflatten(spec, leaves)


class _StandIn(Tensor):
    """A leaf of an output that is computed when somebody computes with it, other than `FoldedLoss`."""

    pending: _Pending
    number: int

    @staticmethod
    def __new__(cls, pending: _Pending, number: int, example: Tensor) -> _StandIn:
        made = without_memory(cls, example, pending.stage.device)
        made.pending, made.number = pending, number
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<output of {self.pending.stage._name}, not yet computed>"

    def computed(self) -> Tensor:
        if self.pending.leaves is None:
            self.pending.output()
        assert self.pending.leaves is not None
        leaf: Tensor = self.pending.leaves[self.number]
        return leaf

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN_BEFORE:
            return super().__torch_function__(func, types, args, kwargs or {})
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = trees.map_leaves(
            lambda leaf: leaf.computed() if isinstance(leaf, _StandIn) else leaf, (args, kwargs or {})
        )
        return func(*args, **kwargs)


_KNOWN_BEFORE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
}
"""What of an output is known before it is computed."""


def _as_tuple(output: PyTree) -> tuple[Any, ...]:
    """An output as the tensors that are sent, by torch's rule."""
    return tuple(output) if type(output) in (tuple, list) else (output,)


def _tensors(tree: PyTree) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def _looks(tensors: Sequence[Tensor]) -> str:
    """Describe tensors without their device, which in examples is none."""
    return f"({', '.join(map(trees.look, tensors))})"


def _example(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)


def _trainable(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if trees.is_differentiable(leaf) else leaf


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating and dtype is not None else leaf


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _any_requires_grad(tree: PyTree) -> bool:
    return any(map(_requires_grad, trees.flatten(tree)[0]))


def _check_position(stage_index: int, num_stages: int) -> None:
    if not 0 <= stage_index < num_stages:
        raise LeafError(
            f"stage_index must be one of the {num_stages} stages, 0 to {num_stages - 1}; got {stage_index}."
        )


def _check_module(module: nn.Module, device: torch.device) -> None:
    if not isinstance(module, nn.Module):
        raise StructureError(f"submodule must be an nn.Module, got {describe(module)}.")
    for part in module.modules():
        if isinstance(part, OptimizedModule):
            raise StructureError(
                "submodule was given to torch.compile, whose backward cannot be split. Pass the module that "
                "it was made from, and compile=True."
            )
    check_unwrapped(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # Modules on the meta device get their memory later.
        same = tensor.device.type == device.type and device.index in (None, tensor.device.index)
        if not same and not tensor.is_meta:
            raise LeafError(
                f"{type(module).__name__}: {name!r} is {describe(tensor)}, but the stage's device is "
                f"{device}. Move it: module.to({str(device)!r})."
            )


def _check_param_dtype(dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LeafError(f"param_dtype must be a floating dtype, such as torch.bfloat16; got {dtype!r}.")


def _check_loss(loss_fn: LossFunction | None) -> None:
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise StructureError(f"loss_fn must be a function of output and target, got {describe(loss_fn)}.")
    if isinstance(loss_fn, nn.Module) and any(map(_requires_grad, loss_fn.parameters())):
        raise StructureError(
            f"loss_fn has parameters to train ({type(loss_fn).__name__}). Make it a part of the last stage's "
            "module, or give it to the schedule only."
        )
