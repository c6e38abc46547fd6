"""The private parts of `torch.distributed.pipelining` that our stage stands on, in one place.

`tests/_torch/test_private_api.py` says so when they move. Relied on are

- all: of a stage `submod`, `device`, `group`, `group_rank`, `stage_index_to_group_rank`, `has_backward`,
  `bwd_cache`, `output_chunks`, `args_recv_info`, `_check_chunk_id`, `_retrieve_recv_grads`,
  and that schedules call `clear_runtime_states`, `_prepare_forward_infra`, `_prepare_backward_infra`,
  `get_fwd_recv_ops`, `get_fwd_send_ops`, `set_local_fwd_input`, `get_local_bwd_output`,
  `set_local_bwd_input` and the three `*_one_chunk`;
- 2.11: `_get_init_p2p_neighbors_ops`, `_shape_inference`, `inputs_meta`, `_configure_outputs_meta`;
- up to 2.14: `fwd_cache`;
- from 2.12 on: `_forward_metadata_inference`, `_backward_metadata_inference`,
  `_post_metadata_inference_cleanup`, `_create_grad_send_info`, `_stage_meta`,
  `_TensorMeta`, `_StageForwardMeta`, `_StageBackwardMeta`, `_derive_grad_metas`;
- from 2.14 on: `_pre_metadata_inference_backup`;
- from 2.15 on: `_forward_chunk_states`, `_make_forward_chunk_state`, `take_buffer` of a received input,
  `_get_p2p_group`, `_forward_contexts`, `_call_with_forward_context`, `PipelineStageInfo`;
- beside them `torch._dynamo.OptimizedModule` and `Tensor._make_wrapper_subclass`.

Before the first microbatch each stage tells the next one what it will send; from 2.12 on it also tells the
previous one which gradients to expect. Here both versions' messages become tuples of tensors on the meta
device (`requires_grad` says whether a gradient comes back), and a failure travels in their place, so that
every rank it reaches raises the same error instead of waiting for a message that never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import _utils as torch_utils
from torch.distributed.pipelining import stage as torch_stage

from funcstage import dtensors
from funcstage._torch import sharded_messages
from funcstage.errors import Failure, StageError, StructureError
from funcstage.trees import is_differentiable

__all__ = [
    "EVERY_INPUT_RETURNS_A_GRADIENT",
    "PREPARED_BY_TORCH",
    "TAKES_GRADS_AND_MESHES",
    "WAITS_FOR_REDUCTIONS",
    "Examples",
    "ExchangingStage",
    "OptimizedModule",
    "arriving",
    "let_go_of_last_step",
    "put_there",
    "receive_there",
    "without_memory",
]

PREPARED_BY_TORCH = (
    "args_recv_info",
    "act_send_info",
    "grad_recv_info",
    "grad_send_info",
    "chunks",
    "inputs_meta",
    "_outputs_meta",
    "_stage_meta",
    "_inference_mode",
)
"""Attributes of a stage that a schedule sets before its first step; no version of torch has all."""

Examples: TypeAlias = tuple[Tensor, ...]
"""Tensors on the meta device that say what crosses between two stages; all of it lies contiguously."""

GradExamples: TypeAlias = tuple[Tensor | None, ...]
"""The same of gradients; `None` where there is none."""

EVERY_INPUT_RETURNS_A_GRADIENT = not hasattr(torch_utils, "_StageForwardMeta")
"""In torch 2.11 the previous stage waits for a gradient even of what has none, such as integers."""

TAKES_GRADS_AND_MESHES = not EVERY_INPUT_RETURNS_A_GRADIENT
"""From torch 2.12 on DTensors cross between stages, and constructors take `get_mesh` and gradients."""

_CHUNKS_HAVE_STATES = hasattr(torch_stage, "_ForwardChunkState")
"""From torch 2.15 on what is to be sent lies there, and a receive buffer is taken once."""


WAITS_FOR_REDUCTIONS = hasattr(PipelineStage, "wait_for_gradient_reduction")
"""From torch 2.15 on FSDP reduces gradients beside other work, and the stage is told when to wait."""


class ExchangingStage(PipelineStage):
    """A stage that learns what it receives and says what it sends, in the manner of either torch.

    `infer`, for a subclass to define, maps examples of the inputs to those of the outputs.
    """

    _failure: Failure | None = None
    _cause: Exception | None = None
    _all_know: bool = True
    _input_examples: Examples = ()
    _output_examples: Examples = ()
    examples_of: Mapping[int, Mapping[str, Any]]
    """Examples of each microbatch, by the names of the attributes, where those of a step differ."""
    _input_grad_examples: GradExamples = ()

    def infer(self, inputs: Any, kwargs: dict[str, Any]) -> tuple[Examples, Examples]:
        """Say what the stage sends for what it receives.

        Args:
            inputs: the first stage's arguments for one microbatch, or what the previous stage sends.
            kwargs: the keyword arguments of one microbatch.

        Returns:
            Examples of the tensors among the inputs, and of those among the outputs.
        """
        raise NotImplementedError

    def infer_grads(self, received: GradExamples) -> GradExamples:
        """Say which gradients of its inputs the stage sends for those of its outputs that it receives.

        Args:
            received: examples of the gradients of the outputs; of the last stage's there are none.

        Returns:
            An example for each input, `None` for those that have no gradient.
        """
        raise NotImplementedError

    def groups_beside(self) -> set[Any]:
        """The groups whose ranks run the same stage, on other parts of its tensors."""
        return set()

    def fail(self, error: Exception) -> None:
        """Note that the stage cannot run; to be raised on every rank once they have heard of it."""
        kind = type(error) if isinstance(error, StageError) else StructureError
        text = str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
        self._failure = Failure(
            kind, f"Stage {self.stage_index} of {self.num_stages} ({type(self.submod).__name__}): {text}"
        )
        self._cause = error

    @property
    def cannot_run(self) -> bool:
        """Whether it was found out before the first microbatch that the stages cannot run."""
        return self._failure is not None

    def prepare_again(self) -> None:
        """Forget what is known of shapes, which are to be found out again."""
        stage: Any = self
        stage.grad_send_info = None
        if EVERY_INPUT_RETURNS_A_GRADIENT:
            self.inputs_meta: Any = None
            self._outputs_meta: Any = None

    def raise_failure(self) -> None:
        """Raise what this stage, or one that told it so, failed with."""
        if self._failure is not None:
            error: Exception = self._failure.kind(self._failure.message)
            if self._cause is not None and not isinstance(self._cause, StageError):
                error = self._cause  # the module's own, as it is
                error.add_note(f"This was while its shapes were found out: {self._failure.message}")
            known = self._all_know and not EVERY_INPUT_RETURNS_A_GRADIENT and not self.groups_beside()
            error.known_to_all = known  # type: ignore[attr-defined]
            raise error from (self._cause if error is not self._cause else error.__cause__)

    def _infer(self, received: Any, kwargs: dict[str, Any] | None) -> Failure | Examples:
        self._failure = self._cause = None
        self.examples_of = {}
        self._all_know = True
        if isinstance(received, Failure):
            self._failure = received
        else:
            try:
                inputs = received if self.is_first else self._examples(received)
                self._input_examples, self._output_examples = self.infer(inputs, kwargs or {})
            except Exception as error:  # whatever it is, the other ranks are waiting
                self.fail(error)
        return self._failure or self._output_examples

    def _shares_rank_with(self, stage_index: int) -> bool:
        return self.stage_index_to_group_rank[stage_index] == self.group_rank

    def _peer(self, stage_index: int) -> int:
        group = self.group or dist.group.WORLD
        assert group is not None
        return dist.get_global_rank(group, self.stage_index_to_group_rank[stage_index])

    def _tell(self, stage_index: int, message: Any) -> None:
        group = self._edge_group(self.stage_index, stage_index)
        dist.send_object_list(
            [message], dst=self._peer(stage_index), group=group, device=self.device, use_batch=True
        )

    def _hear(self, stage_index: int) -> Any:
        messages: list[Any] = [None]
        group = self._edge_group(stage_index, self.stage_index)
        dist.recv_object_list(
            messages, src=self._peer(stage_index), group=group, device=self.device, use_batch=True
        )
        return messages[0]

    # What a schedule sends and receives.

    def keep_output(self, chunk: int, output: tuple[Tensor, ...]) -> None:
        """Keep what the schedule is going to send of a microbatch, in the place of what was kept before."""
        stage: Any = self
        if _CHUNKS_HAVE_STATES:
            stage._forward_chunk_states[chunk] = stage._make_forward_chunk_state(output, [])
        else:
            stage.fwd_cache[chunk] = output, []

    def drop_output(self, chunk: int) -> None:
        """Let go of it."""
        stage: Any = self
        (stage._forward_chunk_states if _CHUNKS_HAVE_STATES else stage.fwd_cache).pop(chunk)

    def received(self, chunk: int) -> tuple[Tensor, ...]:
        """What the previous stage has sent of a microbatch; to be asked for once."""
        infos: Any = self.args_recv_info[chunk]
        buffers = [info.take_buffer() if _CHUNKS_HAVE_STATES else info.buffer for info in infos]
        if not _CHUNKS_HAVE_STATES and self._shares_rank_with(self.stage_index - 1):
            _let_go(infos)
        return tuple(dtensors.wrapped(buffers, dtensors.unwrapped([*self._input_examples])[1]))

    def received_grads(self, chunk: int) -> tuple[Tensor, ...]:
        """What the next stage has sent of a microbatch; to be asked for once."""
        found: Any = self._retrieve_recv_grads(chunk)
        if not _CHUNKS_HAVE_STATES and self._shares_rank_with(self.stage_index + 1):
            _let_go(self.grad_recv_info[chunk])
        return found

    def drop_received(self) -> None:
        """Let go of what a step that failed has not taken; torch 2.15 receives into no such place again."""
        for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
            for info in infos if _CHUNKS_HAVE_STATES else ():
                info.buffer = None

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """Hand the input gradients to the previous stage, where that is on the same rank."""
        # V-shaped schedules ask for them even in `schedule.eval`, which torch's own stages do not survive.
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradients of the output, where the next stage is on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def in_forward_context(
        self, microbatch: int, forward: Callable[..., Any], *args: Any, inferring: bool = False
    ) -> Any:
        """Run a forward in the context that `register_forward_context` of torch 2.15 was given, if it was.

        Args:
            microbatch: of which microbatch it is.
            forward: the function to run.
            *args: its arguments.
            inferring: whether it only finds out what the stage sends.
        """
        stage: Any = self
        if not getattr(stage, "_forward_contexts", None):
            return forward(*args)
        info = torch_stage.PipelineStageInfo(  # type: ignore[attr-defined]
            stage_index=self.stage_index, microbatch_index=microbatch, is_metadata_inference=inferring
        )
        return stage._call_with_forward_context(info, forward, *args)

    def _edge_group(self, source: int, target: int) -> dist.ProcessGroup | None:
        """The group for messages between two stages; in torch 2.15 each pair of ranks may have its own."""
        stage: Any = self
        return stage._get_p2p_group(source, target) if hasattr(stage, "_get_p2p_group") else self.group

    def _groups(self) -> set[dist.ProcessGroup | None]:
        """The groups that messages to and from the neighbours go through."""
        stage: Any = self
        found = {getattr(stage, name, self.group) for name in ("_downstream_group", "_upstream_group")}
        for other in (self.stage_index - 1, self.stage_index + 1):
            peer = self.stage_index_to_group_rank.get(other, self.group_rank)
            if peer != self.group_rank:
                found |= {
                    self._edge_group(self.stage_index, other),
                    self._edge_group(other, self.stage_index),
                }
        return found | {self.group}

    # torch 2.11: a message down the pipeline, a tuple of meta tensors.

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        ops = super()._get_init_p2p_neighbors_ops()
        if self.device.type != "cpu":
            return ops
        # V-shaped schedules have neighbours on one rank, and gloo cannot send to itself.
        return [op for op in ops if op.peer != dist.get_rank()]

    def _prepare_forward_infra(self, num_microbatches: int, args: Any, *rest: Any, **named: Any) -> Any:
        if not EVERY_INPUT_RETURNS_A_GRADIENT:
            return super()._prepare_forward_infra(num_microbatches, args, *rest, **named)
        outputs: Any = ()
        if self.inputs_meta is None:
            outputs = self._shape_inference(args, *rest, **named)
            if self._failure is not None:
                return outputs
        has_backward = self.has_backward
        self.has_backward = False  # else every buffer is made to require grad, which integers cannot
        try:
            super()._prepare_forward_infra(num_microbatches, args, *rest, **named)
        finally:
            self.has_backward = has_backward
        return outputs

    def _shape_inference(self, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if not self.is_first and not self._shares_rank_with(self.stage_index - 1):
            args = self._hear(self.stage_index - 1)
        message = self._infer(args, kwargs)
        if self._failure is None:
            self.inputs_meta = tuple(example.detach() for example in self._input_examples)
            outputs_meta = tuple(example.detach() for example in self._output_examples)
            self._configure_outputs_meta(outputs_meta)  # type: ignore[attr-defined]
        if self.is_last or self._shares_rank_with(self.stage_index + 1):
            return message
        self._tell(self.stage_index + 1, message)
        return ()

    def _prepare_backward_infra(self, *args: Any, **named: Any) -> Any:
        if EVERY_INPUT_RETURNS_A_GRADIENT:
            self.raise_failure()
        return super()._prepare_backward_infra(*args, **named)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.raise_failure()
        return super().get_fwd_recv_ops(fwd_chunk_id)

    # From torch 2.12 on: a message down the pipeline and, before a backward, one up again.

    def _forward_metadata_inference(
        self, args: Any, kwargs: dict[str, Any] | None = None, has_backward: bool = False
    ) -> Any:
        if not self.is_first and not self._shares_rank_with(self.stage_index - 1):
            args = self._hear(self.stage_index - 1)
        self._infer(args, kwargs)
        if self._failure is not None:
            self._input_examples = self._output_examples = ()
        self._stage_meta.inputs = _metas(self._input_examples)
        self._stage_meta.outputs = _metas(self._output_examples)
        message = self._failure or torch_utils._StageForwardMeta(forward_metas=self._stage_meta.outputs)
        if self.is_last or self._shares_rank_with(self.stage_index + 1):
            return message
        self._tell(self.stage_index + 1, message)
        return None

    def _backward_metadata_inference(
        self,
        loss_fn: Any = None,
        target: Any = None,
        received_grad_meta: Any = None,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        meta = self._stage_meta
        meta.output_grads = None if self.is_last else (None,) * len(self._output_examples)
        meta.input_grads = (None,) * len(self._input_examples)
        if self.is_last and target is None and self._failure is None:
            self.fail(
                StructureError("the schedule has a loss_fn but got no target: schedule.step(target=...).")
            )
        elif not self.is_last:
            local = self._shares_rank_with(self.stage_index + 1)
            received = received_grad_meta if local else self._hear(self.stage_index + 1)
            if not isinstance(received, Failure):
                meta.output_grads = received.backward_metas
            elif self._failure is None:
                self._failure = received
        if self._failure is None:
            try:
                self._input_grad_examples = self.infer_grads(self._grad_examples(meta.output_grads or ()))
                meta.input_grads = _metas(self._input_grad_examples)
            except Exception as error:  # the stages before this one are waiting; those after it have gone on
                self.fail(error)
                self._all_know = False
        message = self._failure or torch_utils._StageBackwardMeta(backward_metas=meta.input_grads)
        if self.is_first or self._shares_rank_with(self.stage_index - 1):
            return message
        self._tell(self.stage_index - 1, message)
        return None

    def _pre_metadata_inference_backup(self) -> None:
        """Since 2.14 torch writes the buffers back that its forward changed; ours changes none."""

    # What the messages say, as examples.

    def _examples(self, received: Any) -> Examples:
        """Read what the previous stage, ours or torch's, says that it will send."""
        if EVERY_INPUT_RETURNS_A_GRADIENT:
            return tuple(example.detach().requires_grad_(is_differentiable(example)) for example in received)
        return tuple(self._example(meta, self.stage_index - 1) for meta in received.forward_metas)

    def _grad_examples(self, metas: Sequence[Any]) -> GradExamples:
        """Read which gradients the next stage says that it will send."""
        return tuple(None if m is None else self._example(m, self.stage_index + 1) for m in metas)

    def _example(self, meta: Any, sender: int) -> Tensor:
        local = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        if type(meta) is torch_utils._TensorMeta:
            return local.requires_grad_(meta.requires_grad)
        spec = sharded_messages.spec_of(meta, sender, self._mesh_cache)
        [whole] = dtensors.wrapped([local], {0: spec})
        return whole.requires_grad_(meta.requires_grad)

    def know_meshes_of(self, examples: Sequence[Tensor | None]) -> None:
        """Let DTensors over the meshes of these arrive."""
        if TAKES_GRADS_AND_MESHES:
            self._mesh_cache.update_from_tensors(tuple(examples))

    def _create_grad_send_info(self, args_recv_info: Any) -> list[int | None]:
        # torch 2.12 would send a gradient of every input, but waits for none of those that have none.
        sent = super()._create_grad_send_info(args_recv_info)
        if EVERY_INPUT_RETURNS_A_GRADIENT:
            return sent
        pairs = zip(sent, self._input_examples, strict=True)
        return [stage if example.requires_grad else None for stage, example in pairs]

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        self.raise_failure()


def without_memory(kind: type[Tensor], like: Tensor, device: torch.device) -> Any:
    """Make a tensor of class `kind` that only has a shape, a dtype and a device."""
    return Tensor._make_wrapper_subclass(
        kind, like.shape, dtype=like.dtype, device=device, requires_grad=like.requires_grad
    )


def arriving(infos: Sequence[Any]) -> list[Tensor]:
    """Examples of the tensors that a message brings, from what torch notes of each input or gradient."""
    noted = [info.tensor_meta if _CHUNKS_HAVE_STATES else info.buffer for info in _of_messages(infos)]
    return [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in noted]


def put_there(infos: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Let a message's tensors be found where torch looks for them."""
    for info, tensor in zip(_of_messages(infos), tensors, strict=True):
        info.buffer = tensor


def receive_there(infos: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Let torch, which up to 2.14 has memory for messages from the beginning, have this in its place."""
    if not _CHUNKS_HAVE_STATES:
        put_there(infos, tensors)


def _of_messages(infos: Sequence[Any]) -> list[Any]:
    found = [info for info in infos if isinstance(info, torch_stage._RecvInfo)]
    if EVERY_INPUT_RETURNS_A_GRADIENT:
        return found
    return [each for each in found if not each.is_root_arg and each.tensor_meta is not None]


def _metas(examples: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if e is None else torch_utils.extract_tensor_meta(e) for e in examples)


def let_go_of_last_step(stage: Any) -> None:
    """Let go of what a stage, ours or torch's, holds of its last step until the next one: it takes memory."""
    stage.output_chunks.clear()
    ranks = stage.stage_index_to_group_rank
    for other, received in ((-1, stage.args_recv_info), (1, stage.grad_recv_info)):
        if ranks.get(stage.stage_index + other) == stage.group_rank:
            for infos in received.values():
                _let_go(infos)


def _let_go(infos: Any) -> None:
    """Let go of what another stage of this rank has handed over; torch up to 2.14 keeps it until replaced."""
    for info in infos:
        if isinstance(getattr(info, "buffer", None), Tensor):
            info.buffer = None if _CHUNKS_HAVE_STATES else _NOTHING


_NOTHING = torch.empty(0)
