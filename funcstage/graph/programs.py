"""Pass 4, programs: a partition -> F, I and W as callables, and the tapes that carry residuals between.

A program takes its inputs in one list, which it empties, so that a residual is freed when it was last
used. The tapes know by position where every input of the next program comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcstage import trees
from funcstage.graph import _torch as tt
from funcstage.graph.absent import without
from funcstage.graph.cuda_graphs import Flight, SlotPool, handed_out
from funcstage.graph.partition import Partition, Program
from funcstage.graph.trace import Joint
from funcstage.trees import Buffers, PyTree

Runner: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor | None]]
"""A program that can be run: takes its inputs in a list, which it empties."""

Lower: TypeAlias = Callable[[GraphModule], Runner]
"""Makes a program runnable."""


def run_as_python(module: GraphModule) -> Runner:
    """`backend="aten"`: the generated Python, operation by operation."""
    return module.forward


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A lowered program with the places of its inputs.

    Attributes:
        run: the program.
        state: which of the parameters and buffers it reads.
        rest: which entries of the list of all its other possible inputs it reads.
    """

    run: Runner
    state: tuple[int, ...]
    rest: tuple[int, ...]

    def inputs(self, state: Sequence[Tensor], rest: Sequence[Any]) -> list[Any]:
        """What the program reads, to be handed to `plain_run` and held by nobody else."""
        return [state[i] for i in self.state] + [rest[i] for i in self.rest]

    def __call__(self, state: Sequence[Tensor], rest: Sequence[Any]) -> Sequence[Tensor | None]:
        return plain_run(self.run, self.inputs(state, rest))


def step(program: Program, joint: Joint, rest: Sequence[str], lower: Lower) -> Step:
    """Lower a program whose inputs are state, then some of `rest`."""
    names = [node.name for node in joint.placeholders[: joint.n_state]]
    state = {name: i for i, name in enumerate(names)}
    others = {name: i for i, name in enumerate(rest)}
    return Step(
        lower(program.module),
        tuple(state[name] for name in program.inputs if name in state),
        tuple(others[name] for name in program.inputs if name not in state),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Programs:
    """The three programs of one signature, lowered when first needed.

    Attributes:
        joint: the traced graph.
        partition: the same in three.
        lower: the backend.
        slots: where CUDA graphs are replayed, if they are.
    """

    joint: Joint
    partition: Partition
    lower: Lower
    slots: SlotPool | None = None
    _steps: dict[Any, Any] = field(default_factory=dict)

    def linearize(self, state: Sequence[Tensor], args: Sequence[Tensor]) -> tuple[PyTree, Buffers, InputTape]:
        """Run F: return output, new buffers and the tape."""
        joint = self.joint
        n = joint.output_spec.num_leaves
        end = n + joint.buffers_spec.num_leaves
        flight = self.slots.claim(state) if self.slots is not None else None
        if flight is None:
            results = self.forward(state, args)
            leaves = list(results[:end])
        else:
            results = flight.slot.run("F", self.forward, state, (), args)
            leaves = handed_out(results[:end])
        for i, constant in joint.constants.items():
            leaves[i] = constant
        output = trees.unflatten(joint.output_spec, leaves[:n])
        new_buffers = trees.unflatten(joint.buffers_spec, leaves[n:])
        residuals: Any = tuple(results[end:])
        return output, new_buffers, InputTape(self, state, residuals, flight)

    @property
    def forward(self) -> Step:
        if "forward" not in self._steps:
            rest = [node.name for node in self.joint.placeholders[self.joint.n_state :]]
            self._steps["forward"] = step(self.partition.forward, self.joint, rest, self.lower)
        return self._steps["forward"]

    def backward(self, absent: tuple[int, ...]) -> Backward:
        """I and W, specialised to the cotangents that are absent."""
        if absent not in self._steps:
            self._steps[absent] = self._backward(absent)
        return self._steps[absent]

    def _backward(self, absent: tuple[int, ...]) -> Backward:
        parts, joint = self.partition, self.joint
        input_grad, weight_grad = parts.input_grad, parts.weight_grad
        if absent:
            names = [node.name for node in joint.placeholders[joint.n_state + joint.n_args :]]
            input_grad = without(input_grad, parts.linear, [names[i] for i in absent])
            made = input_grad.results[len(input_grad.results) - len(parts.from_input) :]
            gone = [name for name, result in zip(parts.from_input, made, strict=True) if result is None]
            weight_grad = without(weight_grad, parts.linear, gone, own=True)
        cotangents = joint.placeholders[joint.n_state + joint.n_args :]
        values = [node.meta["val"] for node in cotangents]
        after_forward = {name: i for i, name in enumerate(parts.after_forward)}
        needed = set(weight_grad.inputs)
        n_made = len(parts.from_input)
        return Backward(
            step(input_grad, joint, [*parts.after_forward, *(node.name for node in cotangents)], self.lower),
            step(weight_grad, joint, [*parts.after_forward, *parts.from_input], self.lower),
            tuple((leaf, value.stride()) for leaf, value in zip(joint.cotangents, values, strict=True)),
            len(input_grad.results) - n_made,
            tuple(after_forward[name] for name in parts.after_forward if name in needed),
            tuple(i for i, name in enumerate(parts.from_input) if name in needed),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """I and W for one pattern of absent cotangents.

    Attributes:
        input_grad: I.
        weight_grad: W.
        cotangents: for each cotangent of the trace its output leaf and the strides that it must have.
        n_grads: how many results of I are input gradients; the others are residuals of W.
        kept: the residuals of F that W reads.
        made: the residuals of I that W reads.
    """

    input_grad: Step
    weight_grad: Step
    cotangents: tuple[tuple[int, tuple[int, ...]], ...]
    n_grads: int
    kept: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(slots=True, eq=False)
class InputTape:
    """What F retains for I and W.

    Attributes:
        programs: of the signature.
        state: parameters and buffers.
        residuals: what F handed on; given up when I runs, so that it is freed as I proceeds.
        flight: the claim on the slot that the residuals lie in, if CUDA graphs made them.
    """

    programs: Programs
    state: Sequence[Tensor]
    residuals: tuple[Tensor, ...]
    flight: Flight | None

    def pull(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        traced = self.programs.joint.cotangents
        absent = tuple(i for i, leaf in enumerate(traced) if cotangents[leaf] is None)
        backward = self.programs.backward(absent)
        given: list[Any] = [_with_strides(cotangents[i], strides) for i, strides in backward.cotangents]
        n, size = backward.n_grads, len(self.residuals)
        kept = {i: self.residuals[i] for i in backward.kept}
        replay = self.flight is not None and not retain and not absent
        if self.flight is not None and replay:
            results = self.flight.slot.run("I", backward.input_grad, self.state, self.residuals, given)
            grads = handed_out(results[:n])
        else:
            inputs = backward.input_grad.inputs(self.state, (*self.residuals, *given))
            del given
            if not retain:
                self.residuals = ()
            results = list(plain_run(backward.input_grad.run, inputs))
            grads = list(results[:n])
        residuals: list[Tensor | None] = [None] * (size + len(results) - n)
        for i, residual in kept.items():
            residuals[i] = residual
        for i in backward.made:
            residuals[size + i] = results[n + i]
        weight_tape = WeightTape(backward.weight_grad, self.state, tuple(residuals), self.flight, replay)
        return grads, weight_tape, self if retain else None

    def leaves(self) -> list[Tensor]:
        return list(self.residuals)

    def with_leaves(self, leaves: Sequence[Tensor]) -> InputTape:
        return replace(self, residuals=tuple(leaves), flight=None)


@dataclass(slots=True, eq=False)
class WeightTape:
    """What F and I retain for W.

    Attributes:
        weight_grad: W.
        state: parameters and buffers.
        residuals: what F and I handed on, `None` where W does not read it; given up when W runs.
        flight: the claim on the slot that residuals lie in, if any.
        replay: whether W may run as a CUDA graph, because I did.
    """

    weight_grad: Step
    state: Sequence[Tensor]
    residuals: tuple[Tensor | None, ...]
    flight: Flight | None
    replay: bool

    def pull(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        if self.flight is not None and self.replay and not retain:
            grads = self.flight.slot.run("W", self.weight_grad, self.state, self.residuals, ())
            return handed_out(grads), None
        inputs = self.weight_grad.inputs(self.state, self.residuals)
        if not retain:
            self.residuals = ()
        return list(plain_run(self.weight_grad.run, inputs)), self if retain else None

    def leaves(self) -> list[Tensor]:
        return [residual for residual in self.residuals if residual is not None]

    def with_leaves(self, leaves: Sequence[Tensor]) -> WeightTape:
        new = iter(leaves)
        residuals = tuple(None if r is None else next(new) for r in self.residuals)
        return replace(self, residuals=residuals, flight=None)


def _with_strides(cotangent: Tensor | None, strides: tuple[int, ...]) -> Tensor | None:
    """The programs view their cotangents as the trace did, so these must lie in memory as they did there."""
    if cotangent is None or cotangent.stride() == strides:
        return cotangent
    with torch.no_grad():
        laid_out = torch.empty_strided(
            cotangent.shape, strides, dtype=cotangent.dtype, device=cotangent.device
        )
        return laid_out.copy_(cotangent)


def plain_run(run: Runner, inputs: list[Any]) -> Sequence[Tensor | None]:
    """Run a program without what is in it already: autograd's work and autocast's."""
    if tt.is_any_autocast_enabled():
        with torch.no_grad(), tt.autocast_off():
            return run(inputs)
    with torch.no_grad():
        return run(inputs)
