"""Pass 4, programs: a partition -> F, I and W as callables.

A program takes its inputs in one list, which it empties, so that a residual is freed when it was last
used.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch import tracing as tt
from funcstage._torch.shapes import SYMBOLIC
from funcstage._torch.tensors import memory_of
from funcstage.engines.graph.absent import without
from funcstage.engines.graph.accumulate import Product, accumulating
from funcstage.engines.graph.cuda_graphs import SlotPool
from funcstage.engines.graph.extract import Program, giving_away
from funcstage.engines.graph.joint import Joint, results_of
from funcstage.engines.graph.nodes import dependents
from funcstage.engines.graph.partition import Partition
from funcstage.engines.graph.pieces import cut_out, divide
from funcstage.engines.graph.runners import Lower, Runner, plain_run, run_as_python
from funcstage.engines.graph.sites import ProgramSite, depending_on, sites_of
from funcstage.engines.graph.together import handing_on, hides_messages, together
from funcstage.state.writes import Watch


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A lowered program with the places of its inputs.

    Attributes:
        runner: the program, for these parameters, buffers and open sizes.
        state: which of the parameters and buffers it reads.
        rest: which entries of the list of all its other possible inputs it reads.
    """

    runner: Callable[[Sequence[Any]], Runner]
    state: tuple[int, ...]
    rest: tuple[int, ...]

    def inputs(self, state: Sequence[Tensor], rest: Sequence[Any]) -> list[Any]:
        """What the program reads, to be handed to `plain_run` and held by nobody else."""
        return [state[i] for i in self.state] + [rest[i] for i in self.rest]

    def __call__(self, state: Sequence[Tensor], rest: Sequence[Any]) -> Sequence[Tensor | None]:
        return plain_run(self.runner(state), self.inputs(state, rest))


@dataclass(slots=True, eq=False)
class Programs:
    """The three programs of one signature, lowered when first needed.

    A program may overwrite residuals that nothing else lies in the memory of, once it is their last reader.
    Which these are is read off the tensors of the first run, as a lowered program may let results share
    memory that had none in common in the graph.

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
    _made: dict[Any, Any] = field(default_factory=dict)

    def note_forward(
        self,
        given: Sequence[Tensor],
        leaves: Sequence[Any],
        results: Sequence[Any],
        residuals: Sequence[Tensor],
    ) -> None:
        """Note, from a first run, which residuals of F lie in memory of their own, and what is to be watched.

        Args:
            given: parameters, buffers and arguments.
            leaves: of output and new buffers, as the caller gets them.
            results: the same, as the program returned them.
            residuals: what it returned beside them.
        """
        if "F" not in self._made:
            self._made["watched"] = self._watched((*given, *leaves), residuals)
            self._made["captured"] = self._captured(residuals)
            # Last, as other threads take it for all of them.
            self._made["F"] = unshared(self.partition.after_forward, residuals, [*given, *results])

    def watch(self, held_by_caller: Sequence[Any]) -> Watch:
        """Watch over what I and W may read of what the caller gave and got, or the stage captured.

        Parameters and buffers are held until W is done. Arguments and outputs are not: their residuals go
        with I, or to the host.
        """
        of_state, rest, names = self._made["watched"]
        captured = self._made["captured"]

        def ordered() -> list[str]:
            found, n_state = names(), len(of_state)
            return [*found[:n_state], *captured.values(), *found[n_state:]]

        state = map(held_by_caller.__getitem__, of_state)
        return Watch([*state, *captured], [*map(held_by_caller.__getitem__, rest)], ordered)

    def _watched(
        self, leaves: Sequence[Any], residuals: Sequence[Tensor]
    ) -> tuple[list[int], list[int], Callable[[], list[str]]]:
        """Which leaves of the state, and which others given and returned, I and W may read, with their names.

        Others are those that residuals lie in the memory of.
        """
        joint, parts = self.joint, self.partition
        read = {*parts.input_grad.inputs, *parts.weight_grad.inputs}
        memory = {ft.storage_key(residual) for residual in residuals}
        places = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
            and ((i < joint.n_state and joint.placeholders[i].name in read) or ft.storage_key(leaf) in memory)
        ]
        results = (("output", joint.output_spec), ("new_buffers", joint.buffers_spec))

        def names() -> list[str]:
            all_names = [
                *joint.given,
                *(name for root, spec in results for name in trees.leaf_names(spec, root)),
            ]
            return [all_names[i] for i in places]

        n_state = sum(i < joint.n_state for i in places)
        return places[:n_state], places[n_state:], names

    def _captured(self, residuals: Sequence[Tensor]) -> dict[Tensor, str]:
        """The tensors that the stage has captured and I and W may read, with their names."""
        parts = self.partition
        read = {*map(id, _constants(parts.input_grad)), *map(id, _constants(parts.weight_grad))}
        memory = {ft.storage_key(residual) for residual in residuals}
        return {
            tensor: name
            for tensor, name in self.joint.captured.items()
            if id(tensor) in read or ft.storage_key(tensor) in memory
        }

    @property
    def has_run(self) -> bool:
        return "F" in self._made

    @property
    def forward(self) -> Step:
        if "forward" not in self._made:
            rest = [node.name for node in self.joint.placeholders[self.joint.n_state :]]
            self._made["forward"] = self._step(self.partition.forward, rest)
        return self._made["forward"]

    def backward(self, absent: tuple[int, ...]) -> Backward:
        """I and W, specialised to the cotangents that are absent."""
        if absent not in self._made:
            self._made[absent] = self._backward(absent)
        return self._made[absent]

    def at_once(self, backward: Backward) -> Backward:
        """The same where W follows I at once: where either sends messages, one program computes all."""
        key = "at once", backward
        if key not in self._made:
            parts, i, w = self.partition, backward.input_grad, backward.weight_grad
            if not hides_messages(i, w):
                return self._made.setdefault(key, backward)
            rest, names = handing_on(w)
            n, there = len(parts.from_input), set(rest.inputs)
            self._made[key] = replace(
                backward,
                input_grad=together(self.joint, i, w, parts.from_input, backward.linear),
                weight_grad=rest,
                kept=(),
                made=tuple(n + k for k, name in enumerate(names) if name in there),
                handed=names,
                is_done=True,
            )
        found: Backward = self._made[key]
        return found

    def input_grad(self, backward: Backward, donate: bool) -> Step:
        """I; it overwrites what only it reads, if that is donated."""
        key = "I", backward, donate
        if key not in self._made:
            handed_on = {self.partition.after_forward[i] for i in backward.kept}
            donated = self._made["F"] - handed_on if donate else ()
            rest = [*self.partition.after_forward, *self._cotangents]
            self._made[key] = self._step(backward.input_grad, rest, donated)
        return self._made[key]

    def weight_grad(self, backward: Backward, own: bool, donate: bool) -> Step:
        """W; residuals that are its own it may return as results and, if donated, overwrite."""
        key = "W", backward, own, donate
        if key not in self._made:
            program = backward.weight_grad
            owned = (self._made["F"] | self._made["I", backward.whole or backward]) - backward.common
            if own:
                program = giving_away(program, owned)
            lower = run_as_python if backward.is_done else None
            self._made[key] = self._step(program, self.kept(backward), owned if own and donate else (), lower)
        return self._made[key]

    def weight_grad_into(self, backward: Backward) -> tuple[Step, tuple[Product, ...]]:
        """W with its last products apart, which add into accumulators."""
        key = "W into", backward
        if key not in self._made:
            program, products = accumulating(backward.weight_grad)
            self._made[key] = self._step(program, self.kept(backward)), products
        return self._made[key]

    def kept(self, backward: Backward) -> tuple[str, ...]:
        """What W may read beside parameters and buffers, in the order in which its tape has it."""
        return (*self.partition.after_forward, *self.partition.from_input, *backward.handed)

    def pieces(self, backward: Backward, parts: int) -> tuple[Step | None, tuple[Backward, ...]]:
        """W in pieces: what runs first, whose results are handed on to them, and each as a W of its own."""
        key = "pieces", backward, parts
        if key not in self._made:
            first, handed, programs, common = divide(backward.weight_grad, parts)
            step = None if first is None else self._step(first, self.kept(backward))
            linear, data = (
                names | {name for name, node in handed.items() if node in depending}
                for names in (backward.linear, backward.data)
                for depending in [depending_on(backward.weight_grad, names)]
            )
            pieces = [
                replace(
                    backward,
                    weight_grad=program,
                    whole=backward.whole or backward,
                    linear=linear,
                    data=data - linear,
                    handed=(*backward.handed, *handed),
                    common=backward.common | common,
                    name=f"{backward.name}, {i} of {len(programs)}",
                )
                for i, program in enumerate(programs)
            ]
            self._made[key] = step, tuple(pieces)
        return self._made[key]

    def note(
        self, backward: Backward, results: Sequence[Tensor | None], others: Sequence[Tensor | None]
    ) -> None:
        """Note which residuals of W lie in memory of their own, from what I returned in its first run."""
        n = backward.n_grads
        names = (*self.partition.from_input, *backward.handed)
        self._made["I", backward] = unshared(names, results[n:], (*results[:n], *others))

    def shared(self, backward: Backward) -> tuple[int, ...] | None:
        """Which leaves of output and arguments have gradients whose memory W may read; None before I ran."""
        found: tuple[int, ...] | None = self._made.get(("shared", backward))
        return found

    def note_shared(
        self,
        backward: Backward,
        given: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
        kept: Iterable[Tensor | None],
    ) -> tuple[int, ...]:
        """Read it off a first run, as for donation; of those without graphs, which read copies."""
        n, leaves = backward.n_grads, [leaf for leaf, _ in backward.cotangents]
        read = (*kept, *(results[n + i] for i in backward.made))
        memory = {ft.storage_key(tensor) for tensor in read if tensor is not None}
        n_outputs = self.joint.output_spec.num_leaves
        grads = [*zip(leaves, given, strict=True), *enumerate(results[:n], n_outputs)]
        found = tuple(i for i, grad in grads if grad is not None and ft.storage_key(grad) in memory)
        self._made["shared", backward] = found
        return found

    def sites(self, backward: Backward) -> tuple[Step, tuple[ProgramSite, ...], tuple[Step, ...]]:
        """The sites of W: what yields all their views and inputs, they, and what runs from each of them."""
        key = "sites", backward
        if key not in self._made:
            program = backward.weight_grad
            found = sites_of(program, backward.linear, backward.data, self.joint.sizes)
            values = [node for site in found for node in (*site.views, *site.inputs)]
            kept = self.kept(backward)
            seen = self._step(cut_out(program, values, {}), kept)
            steps = [self._step(s.program, [*kept, s.cotangent], lower=run_as_python) for s in found]
            self._made[key] = seen, found, tuple(steps)
        return self._made[key]

    def summed(self, backward: Backward) -> list[int]:
        """Which parameters' gradients I has summed for W."""
        program = backward.weight_grad
        depending = depending_on(program, self.partition.summed)
        return [i for i, node in enumerate(results_of(program.module.graph)) if node in depending]

    def found(
        self,
        program: Program,
        state: Sequence[Tensor],
        kept: Sequence[str],
        residuals: Sequence[Tensor | None],
    ) -> Iterator[Tensor]:
        """What a program reads of parameters, buffers, residuals (called `kept`) and captured tensors."""
        yield from _constants(program)
        names = set(program.inputs)
        given = [node.name for node in self.joint.placeholders[: self.joint.n_state]]
        for name, tensor in (*zip(given, state, strict=True), *zip(kept, residuals, strict=False)):
            if isinstance(tensor, Tensor) and name in names:
                yield tensor

    def constants(self, state: Sequence[Any]) -> dict[int, Any]:
        """The leaves of output and new buffers that are no tensors, for a call."""
        sizes, constants = self.joint.sizes, self.joint.constants
        symbolic = [i for i, constant in constants.items() if isinstance(constant, SYMBOLIC)]
        if sizes is None or not symbolic:
            return constants
        if "constants" not in self._made:
            self._made["constants"] = sizes.function([constants[i] for i in symbolic])
        numbers = self._made["constants"](*sizes.among(state))
        return {**constants, **dict(zip(symbolic, numbers, strict=True))}

    def strides(self, backward: Backward, state: Sequence[Any]) -> Sequence[tuple[int, ...]]:
        """Those that the cotangents of a call must have."""
        sizes, strides = self.joint.sizes, [stride for _, stride in backward.cotangents]
        if sizes is None:
            return strides
        if "strides" not in self._made:
            self._made["strides"] = sizes.function([number for each in strides for number in each])
        numbers = iter(self._made["strides"](*sizes.among(state)))
        return [tuple(itertools.islice(numbers, len(each))) for each in strides]

    def is_noted(self, backward: Backward) -> bool:
        return ("I", backward) in self._made

    @property
    def _cotangents(self) -> list[str]:
        return [node.name for node in self.joint.placeholders[self.joint.n_state + self.joint.n_args :]]

    def _step(
        self,
        program: Program,
        rest: Sequence[str],
        donated: Collection[str] = (),
        lower: Lower | None = None,
    ) -> Step:
        """Lower a program whose inputs are state, then some of `rest`."""
        names = [node.name for node in self.joint.placeholders[: self.joint.n_state]]
        state = {name: i for i, name in enumerate(names)}
        others = {name: i for i, name in enumerate(rest)}
        with tt.one_at_a_time:
            run = (lower or self.lower)(program.module, donated)
        return Step(
            self._checked(run, program),
            tuple(state[name] for name in program.inputs if name in state),
            tuple(others[name] for name in program.inputs if name not in state),
        )

    def _checked(self, run: Runner, program: Program) -> Callable[[Sequence[Any]], Runner]:
        """Run a lowered program where what the backend has assumed of open sizes holds, else Python."""
        sizes = self.joint.sizes
        if sizes is None or (n_guards := sizes.n_guards()) == sizes.n_traced:
            return lambda state: run
        python = run_as_python(program.module, ())
        return lambda state: run if sizes.hold(sizes.among(state), n_guards) else python

    def _backward(self, absent: tuple[int, ...]) -> Backward:
        parts, joint = self.partition, self.joint
        input_grad, weight_grad = parts.input_grad, parts.weight_grad
        if absent:
            cotangents_gone = [self._cotangents[i] for i in absent]
            input_grad = without(input_grad, parts.linear, cotangents_gone, joint.sizes)
            made = input_grad.results[len(input_grad.results) - len(parts.from_input) :]
            gone = [name for name, result in zip(parts.from_input, made, strict=True) if result is None]
            weight_grad = without(weight_grad, parts.linear, gone, joint.sizes, own=True)
        cotangents = joint.placeholders[joint.n_state + joint.n_args :]
        values = [node.meta["val"] for node in cotangents]
        needed = set(weight_grad.inputs)
        return Backward(
            input_grad,
            weight_grad,
            tuple((leaf, value.stride()) for leaf, value in zip(joint.cotangents, values, strict=True)),
            len(input_grad.results) - len(parts.from_input),
            tuple(i for i, name in enumerate(parts.after_forward) if name in needed),
            tuple(i for i, name in enumerate(parts.from_input) if name in needed),
            parts.linear,
            frozenset(node.name for node in dependents(joint.module.graph, joint.args)) - parts.linear,
        )


def _constants(program: Program) -> list[Tensor]:
    """The tensors that a program has captured."""
    found = [getattr(program.module, n.target) for n in program.module.graph.find_nodes(op="get_attr")]
    return [value for value in found if isinstance(value, Tensor)]


def unshared(
    names: Sequence[str], tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> frozenset[str]:
    """Names of those of `tensors` that have memory of their own, which no other tensor has a part of."""
    memory = Counter(memory_of(tensor) for tensor in (*tensors, *others) if isinstance(tensor, Tensor))
    return frozenset(
        name
        for name, tensor in zip(names, tensors, strict=True)
        if tensor is not None and memory[memory_of(tensor)] == 1
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
        linear: what W reads that depends on cotangents.
        data: what else it reads that depends on arguments.
        whole: what W was split from, if this is a piece.
        handed: what else W reads, as what ran when it was split, or I where that computes all, has made it.
        common: residuals that other pieces of W read too.
        is_done: whether I computes W's results.
        name: of W.
    """

    input_grad: Program
    weight_grad: Program
    cotangents: tuple[tuple[int, tuple[int, ...]], ...]
    n_grads: int
    kept: tuple[int, ...]
    made: tuple[int, ...]
    linear: frozenset[str]
    data: frozenset[str]
    whole: Backward | None = None
    handed: tuple[str, ...] = ()
    common: frozenset[str] = frozenset()
    is_done: bool = False
    name: str = "W"
