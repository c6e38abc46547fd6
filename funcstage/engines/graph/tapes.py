"""The tapes of a compiled stage: they carry residuals from F to I and W.

They know by position where every input of the next program comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Self

from torch import Tensor

from funcstage import trees
from funcstage.copies import Unpicklable
from funcstage.engines.base import Linearized, Place, Summed
from funcstage.engines.graph.accumulate import add_into, can_add_into
from funcstage.engines.graph.cuda_graphs import Flight, handed_out
from funcstage.engines.graph.programs import Backward, Programs
from funcstage.engines.graph.runners import plain_run
from funcstage.engines.graph.sites import restored
from funcstage.state.writes import Watch
from funcstage.tensors import added, with_strides


def linearize(programs: Programs, tensors: Sequence[Any]) -> Linearized[InputTape]:
    """Run F on parameters, buffers and arguments: return output, new buffers and the tape."""
    joint = programs.joint
    if joint.sizes is not None:
        n_state = joint.n_state - len(joint.sizes)
        tensors = [*tensors[:n_state], *joint.sizes.of(tensors), *tensors[n_state:]]
    state, args = tensors[: joint.n_state], tensors[joint.n_state :]
    n = joint.output_spec.num_leaves
    end = n + joint.buffers_spec.num_leaves
    # The first microbatch runs without graphs: what is noted of it has to hold for others without them.
    flight = programs.slots.claim(state) if programs.slots is not None and programs.has_run else None
    if flight is None:
        results = programs.forward(state, args)
        leaves = list(results[:end])
    else:
        results = flight.slot.run("F", programs.forward, state, given=args, n_results=end)
        leaves = handed_out(results[:end])
    for i, constant in programs.constants(state).items():
        leaves[i] = constant
    output = trees.unflatten(joint.output_spec, leaves[:n])
    new_buffers = trees.unflatten(joint.buffers_spec, leaves[n:])
    if joint.changes is not None:
        new_buffers, kept = new_buffers
        joint.changes.make(kept)
    residuals: Any = tuple(results[end:])
    programs.note_forward(tensors, leaves, results[:end], residuals)
    watch = programs.watch((*tensors, *leaves))
    return Linearized(output, new_buffers, InputTape(programs, state, residuals, flight, False, watch))


@dataclass(slots=True, eq=False)
class OnList(Unpicklable):
    """What both tapes have in common.

    Attributes:
        programs: of the signature.
        state: parameters and buffers.
        residuals: what was handed on, `None` where nobody reads it; given up as the tape runs, so that it is
            freed meanwhile.
        flight: the claim on the slot that residuals lie in, if CUDA graphs made them.
        shared: whether others may hold residuals too, so that nothing may be written into them.
    """

    programs: Programs
    state: Sequence[Tensor]
    residuals: tuple[Tensor | None, ...]
    flight: Flight | None
    shared: bool
    intact: bool = field(default=True, kw_only=True)
    checks_nan: ClassVar = False
    differentiated: ClassVar = False

    @property
    def lent(self) -> bool:
        return self.flight is not None

    def leaves(self) -> list[Tensor]:
        """The residuals."""
        return [residual for residual in self.residuals if residual is not None]

    def share(self) -> list[Tensor]:
        """The residuals, for others to hold: nothing may be written into them any more."""
        self.shared = True
        return self.leaves() if self.flight is None else handed_out(self.leaves())

    def replays(self, name: str) -> bool:
        """Tell whether a program may run as a CUDA graph: if nothing else reads what it uses up."""
        flight = self.flight
        return flight is not None and not self.shared and flight.slot.can_run(name, self.residuals)

    def with_leaves(self, leaves: Sequence[Tensor]) -> Self:
        """The same tape over other residuals."""
        new = iter(leaves)
        residuals = tuple(None if r is None else next(new) for r in self.residuals)
        return replace(self, residuals=residuals, flight=None, shared=True)


@dataclass(slots=True, eq=False)
class InputTape(OnList):
    """What F retains for I and W.

    Attributes:
        watch: over what I and W may read of what the caller holds.
        hurries: whether W follows at once.
    """

    watch: Watch
    hurries: bool = False
    higher: ClassVar = False
    captured: ClassVar = ()

    def at_once(self) -> InputTape:
        """The same where W follows at once; as it is where CUDA graphs are replayed, which I and W are."""
        return self if self.flight is not None else replace(self, hurries=True)

    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        programs, backward = self.programs, self._backward(cotangents)
        given: list[Any] = [
            None if (cotangent := cotangents[leaf]) is None else with_strides(cotangent, strides)
            for (leaf, _), strides in zip(
                backward.cotangents, programs.strides(backward, self.state), strict=True
            )
        ]
        n, size = backward.n_grads, len(self.residuals)
        kept = {i: self.residuals[i] for i in backward.kept}
        self.shared |= retain  # W of this run may be called after those of others
        step = programs.input_grad(backward, donate=not self.shared and programs.slots is None)
        first = not programs.is_noted(backward)
        others = (*self.state, *kept.values(), *given) if first else ()
        replay = not (first or any(grad is None for grad in given)) and self.replays("I")
        if self.flight is not None and replay:
            results = self.flight.slot.run(
                "I", step, self.state, self.residuals, given, n_results=n, left=backward.kept
            )
            grads = handed_out(results[:n])
            shares = None
        else:
            shares = programs.shared(backward)
            laid_out = given if shares is None else []
            inputs = step.inputs(self.state, (*self.residuals, *given))
            del given
            if not retain:
                self.residuals, self.intact = (), False
            results = list(plain_run(step.runner(self.state), inputs))
            grads = list(results[:n])
            if shares is None:
                shares = programs.note_shared(backward, laid_out, results, kept.values())
        if first:
            programs.note(backward, results, others)
        residuals: list[Tensor | None] = [None] * (size + len(results) - n)
        for i, residual in kept.items():
            residuals[i] = residual
        for i in backward.made:
            residuals[size + i] = results[n + i]
        weight_tape = WeightTape(
            programs, self.state, tuple(residuals), self.flight, self.shared, backward, shares, replay
        )
        self.intact = retain
        return grads, weight_tape, self if retain else None

    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """What I reads: residuals, parameters and buffers."""
        program = self._backward(cotangents).input_grad
        kept = self.programs.partition.after_forward
        return self.programs.found(program, self.state, kept, self.residuals)

    def _backward(self, cotangents: Sequence[Tensor | None]) -> Backward:
        traced = self.programs.joint.cotangents
        found = self.programs.backward(
            tuple([i for i, leaf in enumerate(traced) if cotangents[leaf] is None])
        )
        return self.programs.at_once(found) if self.hurries else found


@dataclass(slots=True, eq=False)
class WeightTape(OnList):
    """What F and I retain for W.

    Attributes:
        backward: I and W for the cotangents that there were.
        shares: which of I's cotangents and results share memory with residuals; None where that is unknown.
        replay: whether W may run as a CUDA graph, because I did.
    """

    backward: Backward
    shares: tuple[int, ...] | None
    replay: bool

    def reads(self) -> Iterator[Tensor]:
        """What W reads: residuals, parameters and buffers."""
        kept = self.programs.kept(self.backward)
        return self.programs.found(self.backward.weight_grad, self.state, kept, self.residuals)

    def sites(self) -> Iterator[Place]:
        """Yield the sites; nothing is used up."""
        programs, backward = self.programs, self.backward
        summed = programs.summed(backward)
        if summed:
            raise Summed(summed)
        self.shared = True  # what sites show must not be overwritten by W
        step, found, steps = programs.sites(backward)
        values: Iterator[Any] = iter(step(self.state, self.residuals))
        if self.flight is not None:
            values = map(Tensor.detach, values)

        def vjp_of(k: int, views: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
            return list(steps[k](self.state, [*self.residuals, restored(cotangent, views, found[k].views)]))

        for k, site in enumerate(found):
            views: list[Any] = [*islice(values, len(site.views))]
            inputs: list[Any] = [*islice(values, len(site.inputs))]
            vjp = partial(vjp_of, k, views)
            yield Place(site.name, views[-1], inputs, list(site.reached), vjp)

    def reached(self) -> list[int]:
        """Which results the program has."""
        return [i for i, name in enumerate(self.backward.weight_grad.results) if name is not None]

    def split(self, parts: int) -> list[WeightTape]:
        """Divide W by parameters, after what several pieces need and is not cheap has run."""
        first, pieces = self.programs.pieces(self.backward, parts)
        handed: Sequence[Tensor | None] = ()
        if first is not None:
            handed = first(self.state, self.residuals)
        residuals = (*self.residuals, *handed)
        tapes = []
        for piece in pieces:
            read = {*piece.weight_grad.inputs}
            names = self.programs.kept(piece)
            mine = tuple(r if name in read else None for name, r in zip(names, residuals, strict=True))
            # What has just been made lies in no slot.
            replay = self.replay and not piece.handed
            tapes.append(replace(self, backward=piece, residuals=mine, replay=replay))
        return tapes

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        # What lies in a slot may only be given away by a replay, after which the slot keeps count of it.
        replay = self.replay and not retain and self.replays(self.backward.name)
        own = not (self.shared or retain) and (self.flight is None or replay)
        step = self.programs.weight_grad(self.backward, own, donate=self.programs.slots is None)
        if self.flight is not None and replay:
            name, n = self.backward.name, len(self.backward.weight_grad.results)
            left = () if self.backward.whole is None else None
            grads = self.flight.slot.run(name, step, self.state, self.residuals, n_results=n, left=left)
            self.intact = False
            return handed_out(grads), None
        inputs = step.inputs(self.state, self.residuals)
        if not retain:
            self.residuals, self.intact = (), False
        return list(plain_run(step.runner(self.state), inputs)), self if retain else None

    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run W and add the gradients into `totals`, which are donated."""
        plain = self.flight is not None or self.backward.is_done
        if plain or not can_add_into(totals, self.backward.weight_grad):
            return added(totals, self.weight_vjp(retain=False)[0])
        step, products = self.programs.weight_grad_into(self.backward)

        def run(inputs: list[Any]) -> list[Tensor | None]:
            return add_into(totals, list(step.runner(self.state)(inputs)), products)

        inputs = step.inputs(self.state, self.residuals)
        self.residuals, self.intact = (), False
        return list(plain_run(run, inputs))
