"""Checkpointed regions under the split: run once for their values, and again where gradients need them.

`checkpoint.py` says what a region is; this file is what the split around it does with one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.interception import intercepting
from funcstage._torch.operators import without_torch_function
from funcstage.engines.base import Linearized, StageCall
from funcstage.engines.levels.checkpoint import Call, Recomputed, Region, Rerun, StandIns
from funcstage.engines.levels.tape import Exit, InputTape, RegionTape
from funcstage.errors import PurityError, StageError
from funcstage.residuals import (
    Switchboard,
)

if TYPE_CHECKING:
    from funcstage.engines.levels.mode import Split


class Rerunnable(NamedTuple):
    """What checkpointed regions of a forward pass need to be run again.

    Attributes:
        module: the stage's, if it has one.
        state: tensors that are no residuals.
        switchboard: where they leave what W needs.
        linearize: what a region is run by, once more: as `linearize.linearize`.
    """

    module: nn.Module | None
    state: list[Tensor]
    switchboard: Switchboard
    linearize: Callable[..., Linearized[InputTape]]


def checkpointed(split: Split, call: inspect.BoundArguments) -> Any:
    """Run a checkpointed region, keeping what it takes to run it again."""
    asked = Call.of(call, split.is_differentiated)
    board = split.rerunnable
    if asked.constant or board is None or not torch.is_grad_enabled():
        return asked.run()
    region = Region(asked, board.module)
    split.had_regions = True
    split.had_tapes |= not asked.reentrant
    captured = _Captured(region, split)
    exits, spec = _first_run(split, region, captured)
    with without_torch_function():
        operands = captured.operands()
    leaves = [exit.value for exit in exits]
    diff = [
        i
        for i, exit in enumerate(exits)
        if exit.outer or exit.inner or (asked.reentrant and trees.is_differentiable(exit.value))
    ]
    if diff:
        rerun = _Rerun(region, board, operands, diff, tuple(leaves[i] for i in diff))
        for i, value in zip(diff, Recomputed.apply(rerun, *operands.tensors), strict=True):
            leaves[i] = value
    return trees.unflatten(spec, leaves)


def _first_run(split: Split, region: Region, captured: _Captured) -> tuple[list[Exit], Any]:
    """Run a region under two levels of its own, from which nothing is kept.

    They see the same operations, and the same `requires_grad`, as those of the second run.
    """
    split.paused = True
    with ExitStack() as stack:
        stack.callback(setattr, split, "paused", False)
        stack.enter_context(ft.saving_through(region.forget, region.forget))
        captured.outer = stack.enter_context(ft.grad_level())
        stack.enter_context(torch.enable_grad())
        captured.inner = stack.enter_context(ft.grad_level())
        nested = split.nested(captured.outer, captured.inner)
        nested.before_write, nested.before_read = captured.before_write, region.forget
        with nested, intercepting(nested), StandIns(captured.adopted):
            leaves, spec = trees.flatten(region.run())
            exits = [nested.leave(captured.adopted(leaf)) for leaf in leaves]
            nested.check_nodes("A checkpointed region", exits)
        region.release(lambda buffer: captured.around(buffer, nested))
    exits = [exit._replace(value=split.bare(exit.value)) for exit in exits]
    if any(isinstance(exit.value, Tensor) and exit.value.requires_grad for exit in exits):
        split.trainable += [*captured.values, *nested.captured()]
    return exits, spec


class _Operands(NamedTuple):
    """What a region has captured, in the order in which `Recomputed` takes it.

    Attributes:
        tensors: activations, or weights where there are none, as its operands; then all else, bare.
        n_activations: how many activations come first.
        weights: where the weights that follow lie on the inner tape.
        order: the places of the tensors in the region.
        written: the places of those constants that the region overwrites.
    """

    tensors: list[Tensor]
    n_activations: int
    weights: list[GradientEdge]
    order: list[int]
    written: set[int]


class _Captured:
    """What the first run of a region captures: tensors on the levels of the split around it, and parameters.

    Attributes:
        outer: the level of the inputs in the first run.
        inner: the level of the parameters.
        values: they, as the split around knows them.
    """

    outer: int
    inner: int

    def __init__(self, region: Region, split: Split) -> None:
        self._region = region
        self._split = split
        self.values: list[Tensor] = []
        self._adopted: list[Tensor] = []  # as the first run does
        self._before: dict[int, Tensor] = {}  # constants before they were overwritten

    def adopted(self, leaf: Any) -> Any:
        """What stands for something in the first run: a leaf of its own levels, if it is captured."""
        leaf = self._region.read(leaf)
        place = self._region.place(leaf)
        if place is not None:
            return self._adopted[place]
        if not isinstance(leaf, Tensor):
            return leaf
        with without_torch_function():
            split = self._split
            value = split.current(leaf)
            if ft.level_of(value) not in split.levels and not isinstance(leaf, nn.Parameter):
                return leaf
            self._region.capture(leaf)
            self.values.append(value)
            self._adopted.append(self._adopt(value))
            return self._adopted[-1]

    def _adopt(self, value: Tensor) -> Tensor:
        bare = self._split.bare(value)
        if not self._split.is_differentiated(value):
            for level in (*self._split.levels, self.outer):  # it may be written into, which all must know
                bare = ft.wrap(bare, level)
            return bare
        return ft.wrap_leaf(bare, self.inner if self._split.is_weight(value) else self.outer)

    def around(self, buffer: Any, nested: Split) -> Any:
        """What a buffer that a region has assigned is to the split around, which may write it in turn."""
        exit = nested.leave(buffer)
        if exit.outer or exit.inner:  # whoever reads it needs the region's tape
            return buffer if self._split.had_tapes else self._split.bare(exit.value)
        for own, stand_in in zip(self.values, self._adopted, strict=True):
            if buffer is stand_in:  # written in place, as `+=` does
                return own
        value = self._split.bare(exit.value)
        for level in self._split.levels if isinstance(value, Tensor) else ():
            value = ft.wrap(value, level)
        return value

    def before_write(self, tensor: Any, func: Any) -> None:
        """Keep what is overwritten as it was, which is how the second run must find it."""
        if not isinstance(tensor, Tensor):
            return
        with without_torch_function():
            key = ft.storage_key(tensor)
            for place, value in enumerate(self.values):
                if place not in self._before and ft.storage_key(value) == key:
                    if self._split.is_differentiated(value):
                        raise PurityError(
                            f"A checkpointed region writes into its input ({trees.describe(value)}) in "
                            f"place, by {getattr(func, '__name__', func)}, so it cannot run a second time. "
                            "Work on a clone."
                        )
                    with ft.down_to(0):
                        self._before[place] = self._split.bare(value).clone()

    def operands(self) -> _Operands:
        """What was captured, once the levels of the first run are closed."""
        split = self._split
        activations, weights, constants = [], [], []
        for place, value in enumerate(self.values):
            if not split.is_differentiated(value):
                constants.append((place, self._before.get(place, split.bare(value))))
            elif split.is_weight(value):
                weights.append((place, value))
            else:
                activations.append((place, split.lower(value)))
        edges = [get_gradient_edge(value) for _, value in weights]
        if activations:
            weights = [(place, split.bare(value)) for place, value in weights]
        placed = [*activations, *weights, *constants]
        order, tensors = [place for place, _ in placed], [tensor for _, tensor in placed]
        return _Operands(tensors, len(activations), edges, order, set(self._before))


class _Rerun(Rerun):
    """A region, run again when its gradients are wanted.

    Attributes:
        values: the differentiable results of the first run, until they are taken.
    """

    def __init__(
        self,
        region: Region,
        board: Rerunnable,
        operands: _Operands,
        diff: list[int],
        values: tuple[Tensor, ...],
    ) -> None:
        self.values = values
        self._metas = [(value.shape, value.dtype, value.device) for value in values]
        self._region = region
        self._board = board
        self._operands = operands._replace(tensors=[])  # which `Recomputed` keeps
        self._n = operands.n_activations
        self._diff = diff
        self._tape: InputTape | None = None  # kept while it may be asked again

    def vjp(self, captured: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the activations, or in W of the weights."""
        board = self._board.switchboard
        # It is left out while it runs: one that fails in its midst is of no use.
        tape, self._tape = self._tape or self._linearize(captured), None
        grads, weight_tape, self._tape = tape.input_vjp(cotangents, board.retain)
        if self._n == 0:
            return weight_tape.weight_vjp(retain=False)[0]
        board.rerun.append(RegionTape(self._operands.weights, weight_tape))
        return grads[: self._n]

    def reads(self) -> Iterator[Tensor]:
        """What the region reads that was not captured, and that is no parameter."""
        return self._region.constants()

    def _linearize(self, captured: Sequence[Tensor]) -> InputTape:
        end = self._n + len(self._operands.weights)
        acts, weights, constants = captured[: self._n], captured[self._n : end], captured[end:]

        def again(weights: Any, _: Any, *args: Any) -> Any:
            leaves = (*args[: self._n], *weights, *args[self._n :])
            stand_ins: list[Any] = [None] * len(leaves)
            for i, (place, leaf) in enumerate(zip(self._operands.order, leaves, strict=True)):
                if place in self._operands.written:
                    stand_ins[place] = leaf.clone()
                else:
                    stand_ins[place] = _no_leaf(leaf) if i < end else leaf
            results = trees.flatten(self._region.run_again(stand_ins))[0]
            return tuple(results[i] for i in self._diff), ()

        diff = range(self._n)
        call = StageCall.of(again, weights, (), (*acts, *constants), {}, diff)
        output, _, tape = self._board.linearize(call, rerun=True)
        found = [(value.shape, value.dtype, value.device) for value in output]
        if found != self._metas:
            raise StageError(
                f"A checkpointed region returned {self._metas} in its first run and {found} in its second. "
                "Move what changes from run to run out of the checkpoint."
            )
        return replace(tape, origin=replace(tape.origin, state=self._board.state))


def _no_leaf(leaf: Tensor) -> Tensor:
    """The same at its level as no leaf: module trackers put hooks on leaves, which fail in reverse passes."""
    with without_torch_function(), ft.down_to(ft.level_of(leaf)):
        return leaf.view_as(leaf) if leaf.layout is torch.strided else leaf
