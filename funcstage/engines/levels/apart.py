"""Parts of a stage that are run by another engine, within a stage that is run by levels.

Such a part is one operation on the tape of the inputs, as a checkpointed region is (`checkpoint.py`), but
nothing is computed again: what the other engine retains is what the operation saves. I runs the I of the
part, and leaves its W for W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.interception import current_interceptor
from funcstage._torch.operators import without_torch_function
from funcstage.engines.base import Linearized
from funcstage.engines.levels.checkpoint import Recomputed, Rerun
from funcstage.engines.levels.mode import Split
from funcstage.engines.levels.regions import Rerunnable
from funcstage.engines.levels.tape import RegionTape
from funcstage.trees import PyTree


class Apart(NamedTuple):
    """What another engine has made of a part.

    Attributes:
        linearized: its output, new buffers and tape.
        roots: which leaves of the output have gradients.
    """

    linearized: Linearized[Any]
    roots: Sequence[int]


Engine = Callable[[dict[str, Tensor], dict[str, Tensor], tuple[Any, ...], Sequence[int]], Apart | None]
"""Runs a part on parameters, buffers and arguments, of whose leaves some are differentiated; or does not."""


def split_at_work() -> Split | None:
    """The split of this thread that may run parts of its stage apart, if there is one."""
    split = current_interceptor()
    if not isinstance(split, Split) or split.rerunnable is None or split.paused:
        return None
    return split if torch.is_grad_enabled() and ft.current_level() == split.inner_level else None


def run_apart(
    split: Split,
    engine: Engine,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Any, ...],
) -> tuple[PyTree, dict[str, Tensor]] | None:
    """Run a part of a stage by another engine.

    Args:
        split: of the stage.
        engine: runs the part.
        params: of the part, as the stage holds them now.
        buffers: likewise.
        args: a pytree.

    Returns:
        The output and the new buffers; `None` where the engine cannot, or parameters of the part depend on
        the inputs of the stage.
    """
    with without_torch_function():
        weights, names = trees.flatten(params)
        weights = [*map(split.current, weights)]
        held = {name: split.current(buffer) for name, buffer in buffers.items()}
        if not all(map(split.is_weight, weights)) or any(map(split.is_differentiated, held.values())):
            return None
        leaves, spec = trees.flatten(args)
        leaves = [*map(split.current, leaves)]
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        of_inputs = any(split.is_activation(split.below(leaf)) for _, leaf in tensors)
        if of_inputs:
            leaves = [*map(split.lower, leaves)]
            diff = [i for i, _ in tensors if split.is_activation(leaves[i])]
        else:  # it is W's as a whole
            diff = [i for i, leaf in tensors if split.is_weight(leaf)]
        edges = [get_gradient_edge(weight) for weight in weights]
        bare = [split.bare(leaf) for leaf in leaves]
        given = trees.unflatten(names, map(split.bare, weights)), trees.map_leaves(split.bare, held)
    split.paused = True
    try:
        with ft.down_to(0):
            found = engine(*given, trees.unflatten(spec, bare), diff)
    finally:
        split.paused = False
    if found is None:
        return None
    output, new_buffers, tape = found.linearized
    results, output_spec = trees.flatten(output)
    if found.roots:
        operands = [leaves[i] for i in diff] + ([] if of_inputs else weights)
        residuals = tape.share()
        empty = tape.with_leaves([residual.new_empty(0) for residual in residuals])
        assert split.rerunnable is not None
        values = tuple(results[i] for i in found.roots)
        rerun = _Apart(split.rerunnable, empty, found.roots, len(results), diff, values)
        rerun.edges = edges if of_inputs else None
        rerun.first_kept = len(operands)
        calls_back, split.had_apart = split.calls_back, True
        captured = (rerun, *operands, *residuals)
        with without_torch_function():  # no site, and nothing else that the mode need see
            run = Recomputed.apply
            outputs = split.above(run, captured, {}) if of_inputs else run(*captured)
        for i, value in zip(found.roots, outputs, strict=True):
            results[i] = value
        split.calls_back = calls_back  # what runs in the reverse passes is none of the stage's Python
    return trees.unflatten(output_spec, results), new_buffers


class _Apart(Rerun):
    """A part that another engine has run, asked for its gradients.

    Attributes:
        edges: where its weights lie on the inner tape; nothing where all of it lies there.
    """

    edges: list[GradientEdge] | None

    def __init__(
        self,
        board: Rerunnable,
        tape: Any,
        roots: Sequence[int],
        n_results: int,
        diff: Sequence[int],
        values: tuple[Tensor, ...],
    ) -> None:
        self.values = values
        self._board, self._tape, self._roots, self._n_results = board, tape, roots, n_results
        self._diff = diff

    def vjp(self, captured: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the arguments, or in W of the weights."""
        given: list[Tensor | None] = [None] * self._n_results
        for i, cotangent in zip(self._roots, cotangents, strict=True):
            given[i] = cotangent
        grads, weight_tape, _ = self._tape.with_leaves(captured).input_vjp(given, False)
        of_args = [grads[i] for i in self._diff]
        if self.edges is None:
            return [*of_args, *weight_tape.weight_vjp(False)[0]]
        self._board.switchboard.rerun.append(RegionTape(self.edges, weight_tape))
        return of_args

    def reads(self) -> Iterator[Tensor]:
        """What the part reads that was not saved."""
        yield from self._tape.state
