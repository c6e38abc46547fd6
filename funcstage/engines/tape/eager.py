"""Stages that the levels cannot run, split on a plain autograd tape.

The wrappers of `torch.func` hide a tensor's class, which the hooks of `parallelize_module` look at. A
gradient that a stage takes inside itself needs the one tape that eager has, and so do threads of its own.
Such stages run under autograd alone, and are split as `funcstage.autograd` splits what already ran: no
operation runs twice, except those whose one kernel yields both gradients. What the levels are for, higher
derivatives and transforms around the stage, is refused. Checkpointed regions are not computed again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcstage import autograd, dtensors, trees
from funcstage._torch import functorch as ft
from funcstage._torch.dynamo import uncompiled
from funcstage._torch.interception import intercepting
from funcstage._torch.messages import LEAF_WRITTEN, says
from funcstage.engines import on_nodes
from funcstage.engines.base import Linearized, Place, StageCall
from funcstage.engines.levels.checkpoint import Call
from funcstage.engines.levels.first_reads import FirstReads
from funcstage.engines.levels.inner_gradients import BACKWARD_CALLED
from funcstage.engines.node_hooks import Allowed, checked_hooks, is_leaf
from funcstage.engines.on_nodes import InputsOnNodes, WeightsOnNodes
from funcstage.engines.pieces import balanced
from funcstage.engines.tape.reentrant import Leftovers, OneTape
from funcstage.engines.tape.sites import by_site, places
from funcstage.engines.tape.watched_writes import WatchedWrites
from funcstage.errors import PurityError, StageError
from funcstage.functional import checked_result
from funcstage.param_groups import param_groups_of
from funcstage.residuals import (
    Home,
    Residual,
    Switchboard,
    leaves_behind,
    nodes_behind,
    nodes_between,
    saved_in,
)
from funcstage.state import captured, kept
from funcstage.state.argument_containers import Containers, are_among
from funcstage.state.contents import Held
from funcstage.state.guise import looking_alike
from funcstage.state.identity import watching_identity
from funcstage.state.module import state_with
from funcstage.state.subclasses import as_told, is_told


@dataclass(frozen=True, slots=True, eq=False)
class Origin(on_nodes.Origin):
    """What both tapes of one forward pass have in common.

    Attributes:
        params: the leaves of the tape that stand for parameters, by number.
        reruns: whether there are checkpointed regions, which run again in the reverse passes.
    """

    params: dict[int, Tensor]
    reruns: bool

    @contextmanager
    def reading(self, home: Home) -> Iterator[None]:
        root = self.modules[0].module if self.reruns and self.modules else None
        with on_nodes.Origin.reading(self, home), kept.detached(root):
            yield

    def added_directly(self) -> dict[int, Tensor]:
        """Take away what backward() calls within a reverse pass have added to parameters' `.grad`."""
        found = {i: weight.grad for i, weight in self.params.items() if weight.grad is not None}
        for i in found:
            self.params[i].grad = None
        return found


@dataclass(frozen=True, slots=True, eq=False)
class WeightTape(WeightsOnNodes):
    """What W needs.

    Attributes:
        origin: the forward pass.
        groups: those of `funcstage.autograd.stage_backward_input`.
        direct: gradients that are there already, by parameter.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
        first_reads: where data meets parameters first, if W is the whole backward of a stage.
    """

    origin: Origin
    groups: list[dict[str, Any]]
    direct: dict[int, Tensor]
    shared: bool
    home: Home
    first_reads: Sequence[GradientEdge] = ()

    def sites(self) -> Iterator[Place] | None:
        """The sites, each as a W of its own; nothing is used up."""
        return places(by_site(self) if self.first_reads else self)

    def reached(self) -> Iterable[int]:
        """Any: a backward of the stage's own may add to whichever it likes."""
        return self.origin.params

    def split(self, parts: int) -> list[WeightTape]:
        """Deal out the groups, which have no weight and no site in common."""
        if self.first_reads and parts > 1:
            return by_site(self).split(parts)
        params = {get_gradient_edge(leaf).node: i for i, leaf in self.origin.params.items()}
        of_group = [{params[node] for node in group["params"]} for group in self.groups]
        alone = [{i} for i in self.direct if not any(i in reached for reached in of_group)]
        reached = [*of_group, *alone]
        costs = [sum(self.origin.params[i].numel() for i in indices) for indices in reached]
        tapes = []
        for run in balanced(costs, parts):
            groups = self.groups[run.start : run.stop]
            mine = {i for k in run for i in reached[k]}
            direct = {i: grad for i, grad in self.direct.items() if i in mine}
            tapes.append(replace(self, groups=groups, direct=direct))
        return tapes or [self]

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        origin, board = self.origin, self.origin.switchboard
        weights = list(origin.params.values())
        grads: list[Tensor | None] = [None] * origin.n_params
        try:
            with origin.reading(self.home):
                keep = retain or self.shared or board.taken_out
                autograd.stage_backward_weight(weights, self.groups, retain_graph=keep)
            for found in (self.direct, origin.added_directly()):
                for i, grad in found.items():
                    before = grads[i]
                    grads[i] = grad if before is None else before + grad
        finally:
            for weight in weights:
                weight.grad = None
        like = dtensors.unwrapped([origin.params.get(i) for i in range(origin.n_params)])[1]
        return dtensors.placed_alike(grads, like), replace(self, shared=True) if retain else None

    @property
    def intact(self) -> bool:
        return self.shared or self.origin.switchboard.taken_out

    def reads(self) -> list[Tensor]:
        """What W reads: what the nodes that it runs have saved, and the cotangents."""
        sites = [site for group in self.groups for site in group["intermediates"]]
        behind = [GradientEdge(*edge) for site in sites for _, edge in site.weight_edges]
        behind += [GradientEdge(site.node, 0) for site in sites if not site.weight_edges]
        nodes = {*nodes_behind(behind), *(site.node for site in sites)}
        return [*saved_in(nodes, self.origin.switchboard, self.home), *self._cotangents()]

    def _beside(self) -> list[Tensor]:
        return [*self._cotangents(), *self.direct.values()]

    def _others(self, rest: Iterator[Tensor]) -> dict[str, Any]:
        groups = [
            {**group, "grads": [_again(grads, rest) for grads in group["grads"]]} for group in self.groups
        ]
        return {"groups": groups, "direct": {i: next(rest) for i in self.direct}}

    def _saved(self) -> list[Residual]:
        sites = (site for group in self.groups for site in group["intermediates"])
        return self.origin.saved((GradientEdge(site.node, 0) for site in sites), self.home)

    def _cotangents(self) -> list[Tensor]:
        arrived = (grads for group in self.groups for grads in group["grads"])
        return [grad for grads in arrived for grad in grads or () if grad is not None]


def _again(grads: Sequence[Tensor | None] | None, instead: Any) -> tuple[Tensor | None, ...] | None:
    return None if grads is None else tuple(None if grad is None else next(instead) for grad in grads)


@dataclass(frozen=True, slots=True, eq=False)
class InputTape(InputsOnNodes):
    """What the forward pass retains.

    Attributes:
        origin: the forward pass.
        outputs: the output leaves that require grad, by number.
        inputs: the leaves of the tape that stand for differentiated arguments, by number.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
        first_reads: where data meets parameters first, if no argument is differentiated.
    """

    origin: Origin
    outputs: dict[int, Tensor]
    inputs: dict[int, Tensor]
    shared: bool
    home: Home
    first_reads: Sequence[GradientEdge] = ()
    higher: ClassVar = False
    captured: ClassVar = ()

    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        origin = self.origin
        given = {i: output for i, output in self.outputs.items() if cotangents[i] is not None}
        inputs = list(self.inputs.values())
        grads: list[Tensor | None] = [None] * origin.n_args
        try:
            with origin.reading(self.home):
                found, groups = autograd.stage_backward_input(
                    list(given.values()), [cotangents[i] for i in given], inputs, origin.params.values()
                )
            for i, grad in zip(self.inputs, found, strict=True):
                grads[i] = grad
        finally:
            direct = origin.added_directly()
            for leaf in inputs:
                leaf.grad = None
        shared = self.shared or retain
        weight_tape = WeightTape(origin, groups, direct, shared, self.home, self.first_reads)
        return grads, weight_tape, replace(self, shared=True) if retain else None

    @property
    def intact(self) -> bool:
        return True  # W runs some of the nodes again

    def reads(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """What I reads: what the nodes between outputs and inputs have saved."""
        outputs = [get_gradient_edge(x) for i, x in self.outputs.items() if cotangents[i] is not None]
        ends = {get_gradient_edge(leaf).node for leaf in self.inputs.values()}
        between = nodes_between(outputs, ends)
        return saved_in(between, self.origin.switchboard, self.home)

    def _saved(self) -> list[Residual]:
        return self.origin.saved(map(get_gradient_edge, self.outputs.values()), self.home)


def linearize(call: StageCall, held: Held | None = None) -> Linearized[InputTape]:
    """Run a stage function once under autograd, and keep its tape; as `levels.linearize`.

    Args:
        call: of the stage function.
        held: what the module behind the stage holds now, where that is known.

    Raises:
        PurityError: if the stage writes into a tensor that it was given, its `.grad` among it.
        StageError: within a transform of `torch.func`, or where higher derivatives are wanted; if a
            parameter of the module is captured.
    """
    apply, params = call.apply, call.params
    param_leaves, params_spec = call.of_params
    arg_leaves, args_spec = call.arg_leaves, call.args_spec
    if ft.current_level():
        raise StageError(
            "A stage with DTensors among its parameters cannot be transformed by torch.func (vmap, grad, "
            "jvp). Transform the stage before parallelize_module."
        )
    trained = {i: _fresh(leaf) for i, leaf in enumerate(param_leaves) if trees.is_differentiable(leaf)}
    inputs = {i: _fresh(arg_leaves[i]) for i in call.diff or ()}
    lent_params = [as_told(type(p), trained.get(i, p)) for i, p in enumerate(param_leaves)]
    stage_params = trees.unflatten(params_spec, lent_params)
    stage_args = [as_told(type(a), inputs.get(i, trees.detached(a))) for i, a in enumerate(arg_leaves)]
    looks = looking_alike(call.name, arg_leaves, stage_args)
    kwarg_leaves, kwargs_spec = call.of_kwargs
    lent = [(param_leaves[i], lent_params[i]) for i in trained]
    watch = watching_identity(call.name, call.twins_with(held), [*stage_args, *kwarg_leaves], lent)
    stage_leaves, stage_args = stage_args, trees.unflatten(args_spec, stage_args)
    stage_kwargs, containers = call.kwargs, None
    if are_among(args_spec) or are_among(kwargs_spec):
        stage_kwargs = trees.unflatten(kwargs_spec, kwarg_leaves)
        containers = Containers((call.args, call.kwargs), (stage_args, stage_kwargs))
    regions = _AsTheyCome()
    first_reads = None if inputs else FirstReads([*stage_leaves, *kwarg_leaves])
    modes = WatchedWrites(call.given), OneTape(regions.leftovers, first_reads)
    keeping = kept.detached(call.module, kept.objects_among((*arg_leaves, *kwarg_leaves)))
    running = torch.enable_grad(), intercepting(regions), uncompiled(), looks, *modes, watch
    try:
        with keeping, ExitStack() as stack:
            for context in running:
                stack.enter_context(context)
            result = apply(stage_params, call.buffers, *stage_args, **stage_kwargs)
    except RuntimeError as error:
        if says(error, LEAF_WRITTEN):
            raise PurityError(
                "The stage writes in place into a parameter or argument, or a view of one: work on a clone."
            ) from error
        raise
    if any(leaf.grad is not None for leaf in (*trained.values(), *inputs.values())):
        raise PurityError(BACKWARD_CALLED)
    output, new_buffers = checked_result(apply, result)
    if containers is not None:
        containers.give_back(call.name)
    leaves, spec = trees.flatten(output)
    named = (
        {**new_buffers, **stage_params} if isinstance(new_buffers, dict) and isinstance(params, dict) else {}
    )
    modules = state_with(call.module, trees.map_leaves(_held, named))
    origin = Origin(
        len(arg_leaves), len(param_leaves), call.state, Switchboard(), modules, trained, regions.seen
    )
    wanted = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    given = {*map(id, (*trained.values(), *inputs.values()))}
    made = {*map(id, modes[1].leaves)}
    others = (leaf for leaf in leaves_behind(wanted.values()) if id(leaf) not in given)
    captured.refuse_trainable((leaf for leaf in others if captured.was_there(leaf, made, apply)), apply)
    if modes[1].reads_nodes:
        _check_nodes(call.name, *(map(get_gradient_edge, x.values()) for x in (wanted, inputs, trained)))
    reads = [] if first_reads is None or modes[1].hooked else [*first_reads.edges]
    tape = InputTape(origin, wanted, inputs, shared=False, home={}, first_reads=reads)
    return Linearized(
        trees.unflatten(spec, map(trees.detached, leaves)),
        trees.map_leaves(trees.detached, new_buffers),
        tape,
    )


def _check_nodes(
    stage: str,
    outputs: Iterable[GradientEdge],
    inputs: Iterable[GradientEdge],
    weights: Iterable[GradientEdge],
) -> None:
    """Refuse hooks on nodes that I and W run in parts."""
    roots = [*outputs]
    groups = param_groups_of(roots, {edge[:2] for edge in inputs}, [edge.node for edge in weights])
    divided = {site.node for group in groups for site in group["intermediates"] if site.weight_edges}
    checked_hooks(
        stage, roots, lambda node: Allowed(not is_leaf(node), not is_leaf(node) and node not in divided)
    )


def _fresh(leaf: Tensor) -> Tensor:
    leaf = leaf.detach()
    return (leaf.as_subclass(Tensor) if is_told(type(leaf)) else leaf).requires_grad_()


def _held(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Tensor) and leaf.is_leaf else trees.detached(leaf)


class _AsTheyCome:
    """Runs checkpointed regions and custom functions as they are."""

    def __init__(self) -> None:
        self.leftovers = Leftovers()
        self.seen = False

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        asked = Call.of(call)
        self.seen = True
        return self.leftovers.run(asked.run) if asked.reentrant and not asked.constant else asked.run()

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        return apply(*args)

    def thread(self) -> None:
        """Other threads record on the same tape."""

    def waits(self) -> None:
        """It does no harm."""
