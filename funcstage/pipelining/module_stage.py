"""A stage that reads its module: its structure when that changes, its tensors in every step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from funcstage import trees
from funcstage._torch import tracing as tt
from funcstage._torch.messages import is_raised_by_stage
from funcstage._torch.pipelining import TAKES_GRADS_AND_MESHES, Examples, GradExamples
from funcstage.dtensors import as_cotangent, groups_of, placement
from funcstage.engines.graph import compile as compile_stage
from funcstage.errors import LeafError, StageError, StructureError
from funcstage.gathered import show_shards
from funcstage.pipelining.binding import Binding, Structure, read, update
from funcstage.pipelining.examples import (
    StageFunction,
    alike,
    any_requires_grad,
    as_tuple,
    cast,
    example,
    looks,
    tensors,
    trainable,
)
from funcstage.pipelining.folded_loss import FoldedLoss, with_loss
from funcstage.pipelining.given import Given
from funcstage.pipelining.inference import input_grads, run_on_fakes
from funcstage.pipelining.microbatch import Call
from funcstage.pipelining.refusals import check_module
from funcstage.pipelining.same_stage import check_same, how_it_runs
from funcstage.pipelining.snapshot import OwnedBuffers, Snapshot
from funcstage.pipelining.transport.carrying_stage import CarryingStage
from funcstage.pipelining.whole import WholeParameters, whole_parameters
from funcstage.state.module import locked
from funcstage.trees import Buffers, Params, PyTree, Tensors, describe
from funcstage.wrappers import check_alone

STAGES_OF: Any = WeakIdKeyDictionary()
"""The stages of this process that a parameter belongs to."""


class ModuleStage(CarryingStage):
    """What a stage knows of its module, and finds out about it before the first microbatch.

    The module stays the owner of its tensors. It is looked at again in each step and before each microbatch.
    """

    _given: Given
    _compile_options: dict[str, Any] | None
    _loss: FoldedLoss | None
    _grad_dtype: torch.dtype | None
    _param_dtype: torch.dtype | None
    _output: PyTree
    _prepared_for: tuple[Any, dict[str, Any]] | None
    _parameters: dict[str, Any]
    _fitting: Binding | None
    _replicas: Any
    _whole: WholeParameters | None = None

    def _bind(self) -> None:
        """Read what the module is made of."""
        check_alone(
            self.submod,
            {
                "data_parallel": self._replicas,
                "param_dtype": self._param_dtype,
                "grad_dtype": self._grad_dtype,
            },
        )
        binding = Binding.of(self.submod)
        whole = whole_parameters(self.submod, binding.apply)
        apply: StageFunction = binding.apply
        if self._param_dtype is not None:
            apply = computing_in(self._param_dtype, apply)
        self._eager = apply
        apply = apply if whole is None else whole.apply
        self._apply = self._compiled(apply)
        self._apply_with_loss = self._compiled(with_loss(apply, self._loss)) if self._loss else None
        if whole is not None:
            whole.go_on_from(self._whole)
        self._whole = whole
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
            check_module(self.submod, self.device)
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
        if isinstance(self.submod, nn.Module):
            show_shards(self.submod)
        self._current()
        self._read_tensors()

    def _read_tensors(self) -> None:
        with locked(self.submod):  # another thread's stage may have lent it others
            self._read_own_tensors()

    def _read_own_tensors(self) -> None:
        if self._whole is not None and self._whole.are_there:
            self._read_values(read(self._binding.trainable))
            return
        parameters = read(self._binding.trainable)
        for name, parameter in self._parameters.items():
            if parameter is not parameters.get(name):
                STAGES_OF.get(parameter, set()).discard(self)
        self._parameters = parameters
        for parameter in self._parameters.values():
            STAGES_OF.setdefault(parameter, weakref.WeakSet()).add(self)
        for parameter in self._parameters.values() if self._grad_dtype is not None else ():
            if parameter.grad_dtype != self._grad_dtype:
                parameter.grad_dtype = self._grad_dtype
        self._read_values(parameters)

    def _read_values(self, parameters: dict[str, Any]) -> None:
        """Read what the stage computes with, where FSDP shards the parameters the whole ones."""
        constant = read(self._binding.constant)
        self._params = {name: self._cast(tensor) for name, tensor in parameters.items()}
        # Clones, as the module's own are overwritten while earlier microbatches await their backward.
        self._buffers = {name: tensor.clone() for name, tensor in read(self._binding.updated).items()}
        self._buffers |= {name: self._cast(tensor) for name, tensor in constant.items()}
        places = {**self._binding.trainable, **self._binding.constant}
        if self._whole is not None:  # FSDP puts shards and whole parameters there
            places = {name: place for name, place in places.items() if name not in self._whole.names}
        self._snapshot = Snapshot.of(
            self.submod, self._binding.structure.parts, places, copied=self._param_dtype is not None
        )
        self._owned = OwnedBuffers.of(self._binding.updated)

    def _gather(self) -> None:
        """Have the parameters that FSDP shards whole, which F, I and W compute with."""
        if self._whole is not None:
            first = not self._whole.are_there
            self._whole.gather(self.has_backward)
            if first:
                self._read_tensors()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Have them whole for an F, and do what `reshard_after_forward` says after it."""
        self._gather()
        yield
        if self._whole is not None:
            self._whole.let_go()

    def _look_again(self, chunk: int) -> None:
        """Notice what was done to the module since the last microbatch of the step."""
        self._gather()
        with locked(self._snapshot.module):
            change = self._snapshot.change(self.submod)
            updated = not change and self._owned.changed(self._binding.updated)
        if change:
            raise StructureError(
                f"{self._name}: {change} in the middle of a step, before microbatch {chunk}. Make such "
                "changes between steps: the next step uses them."
            )
        if updated:
            if self._whole is None:
                self._current()
            self._read_tensors()
        elif self._snapshot.written():
            self._read_tensors()

    def _cast(self, tensor: Tensor) -> Tensor:
        """Detach a parameter, cast to the dtype to compute in, or a buffer, as it is."""
        return cast(tensor.detach(), self._param_dtype if isinstance(tensor, nn.Parameter) else None)

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
                f"{looks(tensors(inputs))}: {type(error).__name__}: {error}. {way_out}"
            ) from error
        if self.is_last:
            self._output = trees.map_leaves(example, output)
            return
        now, told = tensors(output), self._output_examples
        if not alike(now, told):
            raise LeafError(
                f"{self._name}: the module was changed, and its output is {looks(now)}, but the next stage "
                f"was told {looks(told)}. {way_out}"
            )
        if any(new.requires_grad > old.requires_grad for new, old in zip(now, told, strict=True)):
            raise StructureError(
                f"{self._name}: parameters that were frozen now require grad, but the next stage was told "
                f"that this one needs no gradients. {way_out}"
            )

    def _update_buffers(self, new: Buffers) -> None:
        before, self._buffers = self._buffers, new
        with locked(self._snapshot.module):
            changed = update(self._binding.updated, before, new) or self._binding.buffers_registered()
        if changed:
            self._bind()
            self._fitting = self._binding
        else:
            self._owned = OwnedBuffers.of(self._binding.updated)

    def infer(self, inputs: Any, kwargs: dict[str, Any]) -> tuple[Examples, Examples]:
        """Say what the stage sends for what it receives, from a forward on fake tensors."""
        self._check_keywords(kwargs)
        received = tensors(inputs)
        if self._given.inputs is not None and not alike(received, tensors(self._given.inputs)):
            raise LeafError(
                f"it gets {looks(received)}, but input_args says {looks(tensors(self._given.inputs))}. "
                "Give the stages modules that fit together, or leave input_args out."
            )
        try:
            output = self.in_forward_context(0, self._output_for, inputs, kwargs, inferring=True)
        except tt.UNTRACEABLE as error:
            if self._given.outputs is None:
                raise StructureError(
                    "what it returns depends on values of its inputs, and is not inferred. Pass its "
                    "constructor an example of what its forward returns for one microbatch"
                    f"{_for_example(received)}. ({type(error).__name__}: {error})"
                ) from error
            output = trees.map_leaves(trainable, self._given.outputs)
        except Exception as error:
            if is_raised_by_stage(error) or isinstance(error, StageError):
                raise
            raise LeafError(
                f"its forward fails on the inputs that it gets, {looks(received)}: {type(error).__name__}: "
                f"{error}. Pass input_args that it takes, or fix what the previous stage returns."
            ) from error
        sent = tensors(output)
        if self._given.outputs is not None and not alike(sent, tensors(self._given.outputs)):
            raise LeafError(
                f"its output is {looks(sent)}, but output_args says "
                f"{looks(tensors(self._given.outputs))}. Correct output_args or leave it out."
            )
        if not self.is_last and any(not isinstance(value, Tensor) for value in as_tuple(output)):
            raise StructureError(
                f"its output is {describe(output)}; only a tensor or a tuple of tensors can be sent to the "
                "next stage. Return those, and make constants attributes of the next stage."
            )
        crossing = ([] if self.is_first else received) + ([] if self.is_last else sent)
        if not TAKES_GRADS_AND_MESHES and any(map(placement, crossing)):
            raise StructureError(
                f"a DTensor crosses between stages ({looks(crossing)}), which torch's pipelines take from "
                "torch 2.12 on. Let stages return tensor.to_local(), or upgrade torch."
            )
        if self.has_backward and not self.is_first:
            self._given.sent_grads(received)
        self._output = trees.map_leaves(example, output)
        self._prepared_for = trees.map_leaves(example, (inputs, kwargs))
        self.know_meshes_of([*received, *sent])
        return tuple(map(example, received)), tuple(map(example, sent))

    def _check_same(self, schedule: Any) -> None:
        """Compare the stage with those of its meshes' other ranks, before the first step of a schedule."""
        if schedule is not None:
            # FSDP gathers and reduces once a step, however that runs.
            how = how_it_runs(schedule, self._compile_options) if self._whole is None else {}
            check_same(schedule, self.stage_index, self._parameters, how)

    def groups_beside(self) -> set[Any]:
        """The groups of the meshes that the stage's DTensors lie on, whose ranks run the same stage."""
        return groups_of([*self._parameters.values(), *self._buffers.values(), *self._input_examples])

    def infer_grads(self, received: GradExamples) -> GradExamples:
        """Say which gradients of its inputs the stage sends for those of its outputs that it receives.

        A gradient looks like its input. Where that is a DTensor, it has the placements of `input_grads`, or
        those that autograd gives it.
        """
        if not self.is_last:
            self._given.check_received(received, self._output_examples)
        inputs = self._input_examples
        given = (None,) * len(inputs) if self.is_first else self._given.sent_grads(inputs)
        sent = [as_cotangent(x if grad is None else grad) for grad, x in zip(given, inputs, strict=True)]
        if not self.is_first and any(x.requires_grad and placement(x) for x in inputs):
            assert self._prepared_for is not None
            with suppress(Exception):  # what autograd does not say costs no more than a message
                found = self._output_for(*self._prepared_for, input_grads(received, self.device))
                sent = [
                    s if g is not None or f is None else f for s, g, f in zip(sent, given, found, strict=True)
                ]
        return tuple(
            example(s.detach()) if x.requires_grad else None for s, x in zip(sent, inputs, strict=True)
        )

    def _output_for(self, inputs: Any, kwargs: dict[str, Any], *then: Any) -> Any:
        """Run the stage on fake tensors, which have no memory and cost no computation."""
        state, call = (self._parameters, self._buffers), (inputs, kwargs)
        return run_on_fakes(self._eager, self.submod, state, call, self.device, *then)

    def _turn_to(self, chunk: int) -> None:
        """Expect what a microbatch looks like, where those of the step differ."""
        if self.examples_of:
            vars(self).update(self.examples_of[chunk])

    def _check_call(self, call: Call) -> None:
        if self.is_first:
            self._check_microbatch(call, "input", tensors(call.args), self._input_examples)
        self._check_keywords(call.kwargs)

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        if self.has_backward and any_requires_grad(kwargs):
            raise LeafError(
                "a keyword argument requires grad, but only positional ones are differentiated. Detach it, "
                "or pass it by position."
            )

    def _check_microbatch(
        self, call: Call, what: str, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        if not alike(found, expected):
            raise LeafError(
                f"{self._name}: the {what} of microbatch {call.chunk} is {looks(found)}, but the stages "
                f"were prepared for {looks(expected)}. Between microbatches it may change only with the "
                "shapes of what the first stage is given. Give the first stage what else it depends on."
            )

    @property
    def params(self) -> Tensors:
        """The trainable parameters by name, detached, as `functionalize` returns them."""
        return {name: parameter.detach() for name, parameter in self._trained().items()}

    @property
    def grads(self) -> dict[str, Tensor | None]:
        """The gradients by name, with the structure of `params`; `None` where there is none."""
        return {name: parameter.grad for name, parameter in self._trained().items()}

    def _trained(self) -> dict[str, Any]:
        """The parameters to train; shards also where the module holds whole ones, in the midst of a step."""
        if self._whole is not None and self._whole.are_there:
            return self._parameters
        return read(self._current().trainable)

    @property
    def _name(self) -> str:
        return f"stage {self.stage_index} of {self.num_stages} ({type(self.submod).__name__})"


def computing_in(dtype: torch.dtype, apply: StageFunction) -> StageFunction:
    """Make a stage function that casts its arguments first, and its parameters where nobody has yet."""

    def in_dtype(params: Params, buffers: Buffers, *args: Any, **kwargs: Any) -> tuple[PyTree, Buffers]:
        params, args, kwargs = trees.map_leaves(lambda leaf: cast(leaf, dtype), (params, args, kwargs))
        return apply(params, buffers, *args, **kwargs)

    in_dtype.__qualname__ = apply.__qualname__
    in_dtype.module = apply.module  # type: ignore[attr-defined]  # whose mode a compiled stage looks at
    in_dtype.contents = apply.contents  # type: ignore[attr-defined]
    return in_dtype


def _for_example(received: Sequence[Tensor]) -> str:
    """How to write an example down, with an input's shape and dtype."""
    made = [f"torch.empty({tuple(x.shape)}, dtype={x.dtype})" for x in received if x.is_floating_point()]
    return f": output_args={made[0]}, if that looks like this input of its" if made else ", as output_args"
