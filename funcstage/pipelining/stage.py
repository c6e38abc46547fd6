"""A stage for torch's pipelines: `PipelineStage` with the forward and backward of `stage_vjp`.

torch's schedules, messages and receive buffers are used as they are. What differs is what a stage does for
an action: F is `stage_vjp`, I its pullback and W the second half of that, eager or compiled. The private
torch API behind it is in `_torch.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from funcstage import trees
from funcstage._torch.schedules import num_microbatches
from funcstage.dtensors import local_of, to_send
from funcstage.errors import StructureError
from funcstage.pipelining import constructors, failed_steps, failures, plans
from funcstage.pipelining.accumulating_stage import AccumulatingStage
from funcstage.pipelining.binding import Binding
from funcstage.pipelining.examples import LossFunction, StageFunction, any_requires_grad, as_tuple, sent_grad
from funcstage.pipelining.folded_loss import FoldedLoss, Pending, backward_of
from funcstage.pipelining.given import GetMesh, Given, Position
from funcstage.pipelining.microbatch import Call, Forward
from funcstage.pipelining.over_order import pieces_of
from funcstage.pipelining.pieces import Piece, Pieces
from funcstage.pipelining.preparations import Preparations
from funcstage.pipelining.ranges import in_range, leaves_behind, range_of
from funcstage.pipelining.refusals import (
    check_group,
    check_loss,
    check_module,
    check_param_dtype,
    check_position,
)
from funcstage.pipelining.replicas import replicas_of
from funcstage.pipelining.stays import Offloaded, check_offload
from funcstage.pipelining.transport.choice import Transport, check_transport
from funcstage.pipelining.upstream import Upstream
from funcstage.pipelining.waiting import Waiting, waiting_under
from funcstage.pullback import input_before_weights, stage_backward_input, stage_vjp
from funcstage.report import size, table
from funcstage.schedules.orders import Action
from funcstage.state.parameter_hooks import with_hooks_on_accumulators
from funcstage.state.undone import undone_if_interrupted
from funcstage.trees import PyTree
from funcstage.weight_pullback import WeightPullback


class FunctionalPipelineStage(AccumulatingStage):
    """A pipeline stage whose backward is split by `stage_vjp`, for all of torch's schedules.

    It takes the place of `torch.distributed.pipelining.PipelineStage` and may share a pipeline with it.
    The module keeps its parameters and buffers: gradients are added into `.grad`, and buffers are updated in
    place, microbatch after microbatch, so optimizers, gradient clipping and state dicts work as usual. Fake
    tensors determine what the stages send each other before the first microbatch runs, and stages that do not
    fit together raise an error there. Microbatches may look other in each step, and within one.

    An error in the middle of a step says which microbatches are in `.grad`. It leaves messages in flight, so
    no rank can go on in a group of several: make a new group, or let the process end. With gloo the other
    ranks are woken at once; on a GPU they wait for at most the group's timeout. If the constructor of a stage
    fails, all ranks hear of it before their first step.

    Args:
        submodule: the module of this stage, not compiled or wrapped. You may change it between steps
            (replace, parametrize or freeze submodules, replace tensors, or assign `stage.submod`): the next
            step uses what it finds, or raises an error if it no longer fits the other stages.
        stage_index: the number of this stage, from 0.
        num_stages: how many stages the pipeline has.
        device: where the module's tensors are.
        input_args: examples of the positional arguments for one microbatch. They are checked against what the
            stage gets, and never needed.
        output_args: examples of the output, likewise; needed if shapes depend on the values of inputs.
        output_grads: examples of the gradients of the outputs; they are checked against what the next stage
            sends. These arguments and `get_mesh` need torch 2.12. (Torch 2.11 has `group` and `dw_builder`
            at the positions of the two, and here they are taken there as well.)
        input_grads: examples of the gradients of the inputs; DTensors are sent with these placements.
        group: the pipeline's process group; `None` is the default group.
        dw_builder: must be `None`, as this stage splits its backward itself.
        get_mesh: `get_mesh(mesh_dim_names, mesh_layout) -> DeviceMesh`, which looks up the mesh of a DTensor
            that another stage sends.
        compile: run F, I and W as compiled programs: `True`, or a dict of options of `funcstage.compile`.
        loss_fn: `loss_fn(output, target) -> scalar`, a pure function of the last stage's output. Give the
            schedule the `loss_fn` attribute of this stage, and the loss becomes part of the last stage's
            programs. Other stages need none.
        data_parallel: the ranks with replicas of this rank's stages, as a process group or a one-dimensional
            mesh (`mesh["data"]`). The replicas start as copies of the first one. Each step averages their
            gradients once, after the stage's last W, while the rank's other stages work.
        grad_dtype: the dtype of the parameters' `.grad`, such as `torch.float32` to sum the gradients of
            bfloat16 parameters; `None` is that of the parameters. Not all of torch's optimizers take
            gradients that are wider than their parameters (Adam and its relatives do not: cast them first).
        param_dtype: the dtype to compute in, such as `torch.bfloat16` for float32 parameters. Floating
            parameters are cast once a step, and floating inputs when they arrive; buffers and outputs are not
            cast (as with FSDP's `MixedPrecisionPolicy` and its defaults). Gradients end up in `.grad` in the
            parameters' own dtype, and are summed over the microbatches in it.
        offload: whose residuals wait in host memory (`funcstage.offload`) where the schedule runs four
            actions or more of this rank in between: `"W"` for those of W, from I on; `"IW"` for those of I
            and W, from F on, too. They are fetched up to three actions before they are used.
        transport: how messages travel: `"nccl"` through the process group, `"symmetric"` by writing into the
            memory of the peer's GPU, which takes no multiprocessors; `"auto"` does that where all ranks of
            the pipeline are on one host, on GPUs that reach each other's memory, with stages of this class.

    Raises:
        LeafError: if `stage_index` is out of range, a tensor of the module is on another device, or
            `param_dtype` is no floating dtype.
        StructureError: if the module is wrapped, the loss has parameters, `dw_builder` is given, or `offload`
            or `transport` is something else. In the first step, if the GPUs cannot do as `transport` says.
        StageError: if there is no process group.

    In a process for each rank (examples/train_distributed.py is a complete script):

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
        output_grads: PyTree = None,
        input_grads: PyTree = None,
        group: dist.ProcessGroup | None = None,
        dw_builder: None = None,
        get_mesh: GetMesh | None = None,
        *,
        compile: bool | dict[str, Any] = False,
        loss_fn: LossFunction | None = None,
        grad_dtype: torch.dtype | None = None,
        data_parallel: dist.ProcessGroup | DeviceMesh | None = None,
        param_dtype: torch.dtype | None = None,
        offload: Offloaded | None = None,
        transport: Transport = "auto",
    ) -> None:
        """Construct the stage; the docstring of the class describes the arguments."""
        where = Position(output_grads, input_grads, group, dw_builder, get_mesh)
        group = where.group_found
        with constructors.constructing(group, stage_index, num_stages):
            read = where.of_this_torch()
            device = torch.device(device)
            if device.type == "cpu":
                device = torch.device("cpu")  # which cpu:0 is, too
            check_position(stage_index, num_stages)
            check_module(submodule, device)
            check_loss(loss_fn)
            check_param_dtype(param_dtype)
            self.offload: Offloaded | None = check_offload(offload)
            self.transport = check_transport(transport, device)
            if read.dw_builder is not None:
                raise StructureError(
                    "dw_builder must be None: this stage splits its backward itself, into I and W."
                )
            check_group(group)
            given = Given(input_args, output_args, read.input_grads, read.output_grads)
            given.check()
            # The examples stay here: torch would take them for the truth, and skip the exchange that
            # checks it.
            meshes: dict[str, Any] = {} if get_mesh is None else {"get_mesh": get_mesh}
            super().__init__(submodule, stage_index, num_stages, device, group=group, **meshes)
            self._given = given
            self.know_meshes_of(given.all_tensors())
            self._compile_options: dict[str, Any] | None = {} if compile is True else compile or None
            self._loss = None if loss_fn is None else FoldedLoss(loss_fn)
            self._grad_dtype = grad_dtype
            self._param_dtype = param_dtype
            self._output: PyTree = None
            self._prepared_for: tuple[Any, dict[str, Any]] | None = None
            self._forwards: dict[int, Forward] = {}
            self._pending: dict[int, Pending] = {}
            self._weight_pullbacks: dict[int, WeightPullback] = {}
            self._pieces, self._chunks_left, self._waiting = Pieces(1), 0, Waiting.for_nothing()
            self._shared: set[str] = set()
            self._shared_grads: dict[str, Tensor] = {}
            self._upstream = Upstream()
            self._hooks_of_accumulators: list[str] = []
            self._replicas = None if data_parallel is None else replicas_of(data_parallel)
            self._parameters: dict[str, Any] = {}
            self._fitting: Binding | None = None
            self.examples_of = {}
            self._progress = failed_steps.Progress()
            self._preparations = Preparations(self)
            self._bind()
            if self._replicas is not None:
                self._replicas.replicate([*submodule.parameters(), *submodule.buffers()])

    def __repr__(self) -> str:
        told = ", ".join(f"{name}: {value}" for name, value in self._facts()[1:])
        return f"<FunctionalPipelineStage {self._facts()[0][1]}, {told}>"

    def _repr_html_(self) -> str:
        return table("FunctionalPipelineStage", ("", ""), self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        parameters = [p for p in self.submod.parameters() if p.requires_grad]
        held = sum(p.numel() * p.element_size() for p in parameters)
        options = self._compile_options
        how = "uncompiled" if options is None else f"compiled by {options.get('backend', 'inductor')}"
        return [
            ("stage", f"{self.stage_index} of {self.num_stages}"),
            ("module", type(self.submod).__name__),
            ("parameters", f"{len(parameters)} ({size(held)})"),
            ("device", str(self.device)),
            ("engine", how),
        ]

    @property
    def loss_fn(self) -> FoldedLoss | None:
        """The loss for the schedule: with this as its `loss_fn`, the last stage's programs compute it.

        It may be used inside of other functions (a scaled loss, say). A schedule that is given the plain
        function computes the same values, apart from the programs.
        """
        return self._loss

    def clear_runtime_states(self) -> None:
        """Begin a step."""
        super().clear_runtime_states()
        self.drop_received()
        for left in (
            self.bwd_cache,
            self._forwards,
            self._pending,
            self._weight_pullbacks,
            self._pieces,
            self._shared_grads,
        ):
            left.clear()
        self._progress.begin()
        self._upstream.clear()
        if self._whole is not None:
            self._whole.begin()
        if self._replicas is not None:
            self._replicas.drop(self)
        try:
            schedule = plans.watch_caller(self, self.all_groups)
            if schedule is not None:
                self._preparations.turn_to(schedule, self)
                self._pieces = Pieces(pieces_of(schedule))
                self._chunks_left = num_microbatches(schedule)
                self._waiting = waiting_under(schedule, self.group_rank)
            self._read_state()
            self._check_step(schedule)
            if self._fitting is not self._binding:  # has changed while another schedule drove the stage
                self._check_still_fits()
                self._fitting = self._binding
        except BaseException as error:
            failures.share(self, self.all_groups(), error)
            raise
        if self.has_backward:
            self._hooks_of_accumulators = with_hooks_on_accumulators(self._own)

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
        self._turn_to(fwd_chunk_id)
        self._waiting.begin(Action("F", self.stage_index, fwd_chunk_id))
        self.keep_output(fwd_chunk_id, ())
        if not self._forwards and not self._weight_pullbacks:
            self._find_shared()  # all stages have read their states by now
        if self._replicas is not None and self.has_backward:
            self._replicas.begin(self)
        if not self.is_first:
            args = tuple(map(trees.detached, self.received(fwd_chunk_id)))
        call = Call(fwd_chunk_id, args, kwargs or {})
        self._look_again(fwd_chunk_id)
        self._check_call(call)
        if not self.is_last:
            outputs = tuple(map(to_send, as_tuple(self._forward(self._apply, call))))
            self._check_microbatch(call, "output", outputs, self._output_examples)
            self.keep_output(fwd_chunk_id, tuple(map(local_of, outputs)))
            return outputs if len(outputs) > 1 else outputs[0]
        if save_forward_output:
            self.output_chunks.append(None)
        pending = Pending(self, call, len(self.output_chunks) - 1 if save_forward_output else None)
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
        for info, tensor in zip(self.args_recv_info[mb_index], as_tuple(prev_stage_outputs), strict=True):
            info.buffer = local_of(tensor)  # no copy

    @in_range("B")
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
        self._turn_to(bwd_chunk_id)
        action = Action("B" if full_backward else "I", self.stage_index, bwd_chunk_id)
        self._waiting.begin(action)
        self.drop_output(bwd_chunk_id)
        if self.is_last:
            self._backward_of_loss(bwd_chunk_id, loss)
        forward = self._forwards.pop(bwd_chunk_id)
        if not self.is_last:
            forward.output_grads.update(enumerate(self.received_grads(bwd_chunk_id)))
        self._gather()
        run = input_before_weights if full_backward else stage_backward_input
        input_grads, weight_pullback = run(forward.pullback, forward.cotangents())
        if self.is_first:
            self._upstream.gather(forward.args, input_grads)
        else:
            examples = self._input_grad_examples or self._input_examples
            pairs = zip(input_grads, examples, strict=True)
            self.bwd_cache[bwd_chunk_id] = tuple(sent_grad(grad, like, self.device) for grad, like in pairs)
        if full_backward:
            self._accumulate(bwd_chunk_id, Piece(1, 1, weight_pullback), last_backward, whole=True)
        else:
            leaves_behind(weight_pullback)
            self._weight_pullbacks[bwd_chunk_id] = weight_pullback
            self._waiting.made(action)

    def _forward(self, apply: StageFunction, call: Call) -> PyTree:
        """Run F: return the output, keep the pullback and update the module's buffers."""
        with range_of(self.stage_index, "F", call.chunk), self._gathered():
            return self.in_forward_context(call.chunk, self._run_forward, apply, call)

    @undone_if_interrupted
    def _run_forward(self, apply: StageFunction, call: Call) -> PyTree:
        args, kwargs = trees.map_leaves(trees.detached, (call.args, call.kwargs))
        try:
            if not self.has_backward:
                output, new_buffers = apply(self._params, self._buffers, *args, **kwargs)
            else:
                # torch calls for the gradient of the inputs that require grad, and these alone.
                wanted = call.args if self.is_first else self._input_examples
                argnums = [i for i, arg in enumerate(wanted) if any_requires_grad(arg)]
                output, new_buffers, pullback = stage_vjp(
                    apply, self._params, self._buffers, *args, argnums=argnums, **kwargs
                )
                leaves_behind(pullback)
                self._forwards[call.chunk] = Forward.of(pullback, output, call.args if self.is_first else ())
                self._waiting.made(Action("F", self.stage_index, call.chunk))
        except Exception as error:
            error.add_note(f"This was {self._name}, in F of microbatch {call.chunk}.")
            raise
        self._update_buffers(new_buffers)
        return trees.map_leaves(trees.detached, output)

    def _backward_of_loss(self, chunk: int, loss: Tensor | None) -> None:
        """Take the gradients of the output from what the schedule computed with it."""
        if isinstance(loss, Tensor) and chunk in self._pending:  # the loss did not read the output
            self._pending[chunk].output()
        inputs = self._forwards[chunk].args if self.is_first else self._input_examples
        backward_of(self._name, loss, bool(self._params) or any_requires_grad(inputs))

    def all_groups(self) -> set[dist.ProcessGroup | None]:
        """The process groups that messages of this stage go through."""
        replicas = set() if self._replicas is None else {self._replicas.group}
        return self._groups() | self.groups_beside() | replicas
