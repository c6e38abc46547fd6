"""Stages with DTensors among their parameters: split on a plain autograd tape.

The wrappers of `torch.func` hide a tensor's class, which the hooks of `parallelize_module` look at. Such a
stage therefore runs under autograd alone, and is split as `funcstage.autograd` splits what already ran: no
operation runs twice, except those whose one kernel yields both gradients. What the levels are for, higher
derivatives and transforms around the stage, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcstage import _functorch as ft
from funcstage import autograd, trees
from funcstage.errors import StageError
from funcstage.functional import checked_result
from funcstage.residuals import (
    Home,
    Residual,
    Switchboard,
    nodes_behind,
    nodes_between,
    replaced,
    residuals_of,
    saved_in,
)
from funcstage.sums import added
from funcstage.trees import Buffers, Params, PyTree


def first_dtensor(tree: PyTree) -> int | None:
    """The number of the first leaf of a tree that is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return None
    leaves = enumerate(trees.flatten(tree)[0])
    return next((i for i, leaf in leaves if isinstance(leaf, module.DTensor)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What both tapes of one forward pass have in common.

    Attributes:
        n_args: the number of argument leaves.
        n_params: the number of parameter leaves.
        params: the leaves of the tape that stand for parameters, by number.
        state: parameters and buffers, which are no residuals.
        switchboard: where nodes look for residuals that were taken out of them.
    """

    n_args: int
    n_params: int
    params: dict[int, Tensor]
    state: list[Tensor]
    switchboard: Switchboard

    def saved(self, edges: Iterable[GradientEdge], home: Home) -> list[Residual]:
        return residuals_of(edges, self.state, self.switchboard, home)


@dataclass(frozen=True, slots=True, eq=False)
class WeightTape:
    """What W needs: the groups of `funcstage.autograd.stage_backward_input`."""

    origin: Origin
    groups: list[dict[str, Any]]
    home: Home
    shares: ClassVar = True

    def pull(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        origin, board = self.origin, self.origin.switchboard
        weights = list(origin.params.values())
        grads: list[Tensor | None] = [None] * origin.n_params
        try:
            with board.reading(self.home):
                found = autograd.stage_backward_weight(
                    weights, self.groups, retain_graph=retain or board.taken_out
                )
            for i, grad in zip(origin.params, found, strict=True):
                grads[i] = grad
        finally:
            for weight in weights:
                weight.grad = None
        return grads, self if retain else None

    @property
    def intact(self) -> bool:
        return self.origin.switchboard.taken_out

    def reads(self) -> list[Tensor]:
        """What W reads: what the nodes that it runs have saved, and the cotangents."""
        sites = [site for group in self.groups for site in group["intermediates"]]
        behind = [GradientEdge(*edge) for site in sites for _, edge in site.weight_edges]
        behind += [GradientEdge(site.node, 0) for site in sites if not site.weight_edges]
        nodes = {*nodes_behind(behind), *(site.node for site in sites)}
        return [*saved_in(nodes, self.origin.switchboard, self.home), *self._cotangents()]

    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run W and add the gradients into `totals`, which are donated."""
        return added(totals, self.pull(retain=False)[0])

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes have saved, then the cotangents."""
        return [r.tensor for r in self._saved()] + self._cotangents()

    def share(self) -> list[Tensor]:
        return self.leaves()  # nothing is ever written into them

    def with_leaves(self, leaves: Sequence[Tensor]) -> WeightTape:
        """The same tape over other residuals."""
        saved = self._saved()
        rest = iter(leaves[len(saved) :])
        home = replaced(saved, leaves[: len(saved)], self.origin.switchboard, self.home)
        groups = [
            {**group, "grads": [_again(grads, rest) for grads in group["grads"]]} for group in self.groups
        ]
        return replace(self, groups=groups, home=home)

    def _saved(self) -> list[Residual]:
        sites = (site for group in self.groups for site in group["intermediates"])
        return self.origin.saved((GradientEdge(site.node, 0) for site in sites), self.home)

    def _cotangents(self) -> list[Tensor]:
        arrived = (grads for group in self.groups for grads in group["grads"])
        return [grad for grads in arrived for grad in grads or () if grad is not None]


def _again(grads: Sequence[Tensor | None] | None, instead: Any) -> tuple[Tensor | None, ...] | None:
    return None if grads is None else tuple(None if grad is None else next(instead) for grad in grads)


@dataclass(frozen=True, slots=True, eq=False)
class InputTape:
    """What the forward pass retains.

    Attributes:
        origin: the forward pass.
        outputs: the output leaves that require grad, by number.
        inputs: the leaves of the tape that stand for differentiated arguments, by number.
        home: residuals that were taken out of the nodes.
    """

    origin: Origin
    outputs: dict[int, Tensor]
    inputs: dict[int, Tensor]
    home: Home
    watch: ClassVar = None

    def pull(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        origin = self.origin
        given = {i: output for i, output in self.outputs.items() if cotangents[i] is not None}
        inputs = list(self.inputs.values())
        grads: list[Tensor | None] = [None] * origin.n_args
        try:
            with origin.switchboard.reading(self.home):
                found, groups = autograd.stage_backward_input(
                    list(given.values()), [cotangents[i] for i in given], inputs, origin.params.values()
                )
            for i, grad in zip(self.inputs, found, strict=True):
                grads[i] = grad
        finally:
            for leaf in inputs:
                leaf.grad = None
        return grads, WeightTape(origin, groups, self.home), self if retain else None

    @property
    def intact(self) -> bool:
        return True  # W runs some of the nodes again

    def reads(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """What I reads: what the nodes between outputs and inputs have saved."""
        outputs = [get_gradient_edge(x) for i, x in self.outputs.items() if cotangents[i] is not None]
        ends = {get_gradient_edge(leaf).node for leaf in self.inputs.values()}
        between = nodes_between(outputs, ends)
        return saved_in(between, self.origin.switchboard, self.home)

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes have saved."""
        return [r.tensor for r in self._saved()]

    def share(self) -> list[Tensor]:
        return self.leaves()  # nothing is ever written into them

    def with_leaves(self, leaves: Sequence[Tensor]) -> InputTape:
        """The same tape over other residuals."""
        return replace(self, home=replaced(self._saved(), leaves, self.origin.switchboard, self.home))

    def _saved(self) -> list[Residual]:
        return self.origin.saved(map(get_gradient_edge, self.outputs.values()), self.home)


def linearize(
    apply: Callable[..., Any],
    params: Params,
    buffers: Buffers,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    diff: Sequence[int],
) -> tuple[PyTree, Buffers, InputTape]:
    """Run a stage function once under autograd, and keep its tape; as `closures.linearize`.

    Raises:
        StageError: within a transform of `torch.func`.
    """
    param_leaves, params_spec = trees.flatten(params)
    arg_leaves, args_spec = trees.flatten(args)
    if ft.current_level():
        raise StageError(
            "A stage with DTensors among its parameters cannot be transformed by torch.func (vmap, grad, "
            "jvp). Transform the stage before parallelize_module."
        )
    state = [leaf for leaf in (*param_leaves, *trees.flatten(buffers)[0]) if isinstance(leaf, Tensor)]
    trained = {i: _fresh(leaf) for i, leaf in enumerate(param_leaves) if trees.is_differentiable(leaf)}
    inputs = {i: _fresh(arg_leaves[i]) for i in diff}
    with torch.enable_grad():
        result = apply(
            trees.unflatten(params_spec, [trained.get(i, leaf) for i, leaf in enumerate(param_leaves)]),
            buffers,
            *trees.unflatten(args_spec, [inputs.get(i, leaf) for i, leaf in enumerate(arg_leaves)]),
            **kwargs,
        )
    output, new_buffers = checked_result(apply, result)
    leaves, spec = trees.flatten(output)
    origin = Origin(len(arg_leaves), len(param_leaves), trained, state, Switchboard())
    wanted = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    tape = InputTape(origin, wanted, inputs, {})
    return (
        trees.unflatten(spec, map(trees.detached, leaves)),
        trees.map_leaves(trees.detached, new_buffers),
        tape,
    )


def _fresh(leaf: Tensor) -> Tensor:
    return leaf.detach().requires_grad_()
