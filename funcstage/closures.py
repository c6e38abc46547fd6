"""Engine 1: the split by two nested `torch.func` levels, without tracing.

The stage runs once, under an outer gradient level that wraps the differentiated inputs and an inner one
that wraps the parameters. An operation that reads a parameter (a *site*) runs under both: from its one
kernel launch the inner level records the weight side and the outer level the input side. Its output
then leaves the inner level, so that no later operation continues the weight side of this one; what
remains there, the inner tape from the site's output to the parameters, is the closure retained for W.
All other operations run under the outer level alone. In the terms of `torch.func.vjp`: the outer level
is one vjp over the inputs; the inner one is a vjp over the parameters for every site, with the sites
sharing a level instead of opening one each, which saves most of the host time.

I is one reverse pass over the outer tape that also yields the cotangent at every site's output; W is
one reverse pass over the inner tape from the sites' outputs, seeded with those cotangents. A value made
of parameters alone (a transposed or normalised weight, an embedded token) never leaves the inner level:
its gradient is W's business throughout. With no differentiated input there is no outer level, nothing
for I to do, and W is the whole backward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from funcstage import _functorch as ft
from funcstage import custom_functions, inner_gradients, kept, trees
from funcstage._dynamo import uncompiled
from funcstage._interception import intercepting
from funcstage.argument_containers import Containers, are_among
from funcstage.autocast import cast_first
from funcstage.checkpointing import Call, Recomputed, Region, StandIns
from funcstage.composites import decomposed, opened
from funcstage.contents import Held
from funcstage.copies import Unpicklable
from funcstage.effects import EFFECTS, MARKS, refuse_effects, refused_mark
from funcstage.errors import LeafError, PurityError, StageError
from funcstage.flex import attend, is_flex_attention
from funcstage.functional import ModuleState, check_leaves, checked_result, holding, lent_again
from funcstage.group_norm import CRASHING, contiguous_group_norm, crashes
from funcstage.residuals import (
    Home,
    Residual,
    Switchboard,
    nodes_behind,
    replaced,
    residuals_of,
    saving_outside,
)
from funcstage.sums import added
from funcstage.trees import Buffers, Params, PyTree

Exits: TypeAlias = list[tuple[int, GradientEdge]]
"""Indices of output leaves, with their places on a tape."""

Entries: TypeAlias = list[tuple[int, Tensor]]
"""Indices of argument or parameter leaves, with the wrapped leaves where a tape ends."""


class Exit(NamedTuple):
    """A leaf of the result, free of wrappers, and its places on the tapes if it has any."""

    value: Any
    outer: GradientEdge | None
    inner: GradientEdge | None


class Site(NamedTuple):
    """Where a value left the inner level: its place on the outer tape and on the inner one."""

    outer: GradientEdge
    inner: GradientEdge


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What all tapes of one forward pass have in common.

    Attributes:
        n_args: the number of argument leaves.
        n_params: the number of parameter leaves.
        params: the parameter leaves, where the inner tape ends.
        state: the parameters and buffers, which are no residuals: the caller holds them anyway.
        higher: whether the gradients are to be differentiated in turn.
        switchboard: where nodes look for residuals that were taken out of them.
        modules: what the stage's modules held, where Python functions may read it in the reverse passes.
    """

    n_args: int
    n_params: int
    params: Entries
    state: list[Tensor]
    higher: bool
    switchboard: Switchboard
    modules: list[ModuleState]

    def retains(self, shared: bool) -> bool:
        """Whether a reverse pass leaves the nodes as they are."""
        return shared or self.higher or self.switchboard.taken_out

    def read_behind(self, edges: Sequence[GradientEdge], home: Home) -> Iterator[Tensor]:
        """What a reverse pass from these places reads, and what the regions there read again."""
        yield from (residual.tensor for residual in residuals_of(edges, (), self.switchboard, home))
        for node in nodes_behind(edges):
            rerun = getattr(node, "rerun", None)
            if isinstance(rerun, _Rerun):
                yield from rerun.reads()


@dataclass(frozen=True, slots=True, eq=False)
class WeightTape(Unpicklable):
    """What W needs: places on the inner tape with the cotangents that arrived there.

    Attributes:
        origin: the forward pass.
        seeds: (place on the inner tape, cotangent).
        regions: what is left of the checkpointed regions that I has run again.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
    """

    origin: Origin
    seeds: list[tuple[GradientEdge, Tensor]]
    regions: list[RegionTape]
    shared: bool
    home: Home
    checks_nan: ClassVar = True
    shares: ClassVar = None

    def pull(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        origin = self.origin
        shared = self.shared or retain
        seeds, regions = list(self.seeds), []
        for places, tape in self.regions:
            of_region, left = tape.pull(retain)
            seeds += [(edge, grad) for edge, grad in zip(places, of_region, strict=True) if grad is not None]
            if left is not None:
                regions.append(RegionTape(places, left))
        wanted = [leaf for _, leaf in origin.params]
        with origin.switchboard.rerunning(retain):
            found = reverse(seeds, wanted, shared, origin, self.home)
        grads: list[Tensor | None] = [None] * origin.n_params
        cotangents = [cotangent for _, cotangent in seeds]
        for (i, _), grad in zip(origin.params, _unshared(found, cotangents), strict=True):
            grads[i] = grad
        return grads, replace(self, regions=regions, shared=True) if retain else None

    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run W and add the gradients into `totals`, which are donated."""
        return added(totals, self.pull(retain=False)[0])

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes have saved, the cotangents, then those of the regions."""
        own = [r.tensor for r in self._saved()] + [cotangent for _, cotangent in self.seeds]
        return own + [leaf for _, tape in self.regions for leaf in tape.leaves()]

    def share(self) -> list[Tensor]:
        return self.leaves()  # nothing is ever written into them

    def with_leaves(self, leaves: Sequence[Tensor]) -> WeightTape:
        """The same tape over other residuals."""
        saved, rest = self._saved(), iter(leaves)
        home = replaced(saved, [*islice(rest, len(saved))], self.origin.switchboard, self.home)
        seeds = [(edge, next(rest)) for edge, _ in self.seeds]
        regions = [
            RegionTape(places, tape.with_leaves([*islice(rest, len(tape.leaves()))]))
            for places, tape in self.regions
        ]
        return replace(self, seeds=seeds, regions=regions, home=home)

    @property
    def intact(self) -> bool:
        return not self.regions and self.origin.retains(self.shared)

    def reads(self) -> Iterator[Tensor]:
        """What W reads: residuals, parameters and buffers."""
        yield from self.origin.read_behind([edge for edge, _ in self.seeds], self.home)
        yield from (cotangent for _, cotangent in self.seeds)
        for _, tape in self.regions:
            yield from tape.reads()

    def _saved(self) -> list[Residual]:
        edges = (edge for edge, _ in self.seeds)
        return residuals_of(edges, self.origin.state, self.origin.switchboard, self.home)


class RegionTape(NamedTuple):
    """What W needs of a checkpointed region, and where on the inner tape the gradients go on."""

    places: list[GradientEdge]
    tape: WeightTape


@dataclass(frozen=True, slots=True, eq=False)
class InputTape(Unpicklable):
    """What the forward pass retains: the outer tape for I, and the inner one for W.

    Attributes:
        origin: the forward pass.
        roots: where the output leaves lie on the outer tape.
        inputs: the differentiated argument leaves, where the outer tape ends.
        sites: where the two tapes meet.
        derived: where output leaves lie on the inner tape, for what they owe to parameters directly.
        hooked: whether the stage put hooks on activations.
        shared: whether other tapes still need the same nodes.
        home: residuals that were taken out of the nodes.
        captured: the tensors that F has read without being handed them.
    """

    origin: Origin
    roots: Exits
    inputs: Entries
    sites: list[Site]
    derived: Exits
    hooked: bool
    shared: bool
    home: Home
    captured: Sequence[weakref.ref[Tensor]] = ()
    watch: ClassVar = None
    checks_nan: ClassVar = True
    higher: ClassVar = True

    def pull(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        origin = self.origin
        if not origin.higher and is_differentiated(cotangents):
            origin = replace(origin, higher=True)
        shared = self.shared or retain
        wanted: list[GradientEdge | Tensor] = [leaf for _, leaf in self.inputs]
        wanted += [site.outer for site in self.sites]
        with (
            origin.switchboard.rerunning(retain) as regions,
            self._behind_hooks() as hooked_cotangents,
        ):
            found = reverse(_seeds(self.roots, cotangents), wanted, shared, origin, self.home)
        grads: list[Tensor | None] = [None] * origin.n_args
        for (i, _), grad in zip(self.inputs, found, strict=False):
            grads[i] = grad
        seeds: list[tuple[GradientEdge, Tensor]] = []
        for site, grad in zip(self.sites, found[len(self.inputs) :], strict=True):
            if site.outer.node in hooked_cotangents:
                grad = hooked_cotangents[site.outer.node][site.outer.output_nr]
            if grad is not None:
                seeds.append((site.inner, grad))
        seeds += _seeds(self.derived, cotangents)
        weight_tape = WeightTape(origin, seeds, regions, shared, self.home)
        return grads, weight_tape, replace(self, shared=True) if retain else None

    @contextmanager
    def _behind_hooks(self) -> Iterator[dict[Node, Sequence[Tensor | None]]]:
        """Note the cotangents at sites as the stage's own hooks leave them.

        Where a node runs, `torch.autograd.grad` reports what arrived before hooks, but W needs what the
        input side got: what was there after them.
        """
        arrived: dict[Node, Sequence[Tensor | None]] = {}
        handles = []
        if self.hooked:
            for node in {site.outer.node for site in self.sites}:
                handles.append(node.register_prehook(partial(arrived.__setitem__, node)))
        try:
            yield arrived
        finally:
            for handle in handles:
                handle.remove()

    @property
    def intact(self) -> bool:
        return self.origin.retains(self.shared)

    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """What I reads: residuals, parameters and buffers."""
        edges = [edge for edge, _ in _seeds(self.roots, cotangents)]
        return self.origin.read_behind(edges, self.home)

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes of both tapes have saved."""
        return [r.tensor for r in self._saved()]

    def share(self) -> list[Tensor]:
        return self.leaves()  # nothing is ever written into them

    def with_leaves(self, leaves: Sequence[Tensor]) -> InputTape:
        """The same tape over other residuals."""
        return replace(self, home=replaced(self._saved(), leaves, self.origin.switchboard, self.home))

    def _saved(self) -> list[Residual]:
        edges = [edge for _, edge in self.roots + self.derived] + [
            edge for site in self.sites for edge in site
        ]
        return residuals_of(edges, self.origin.state, self.origin.switchboard, self.home)


def linearize(
    apply: Callable[..., Any],
    params: Params,
    buffers: Buffers,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    diff: Sequence[int],
    *,
    rerun: bool = False,
    held: Held | None = None,
) -> tuple[PyTree, Buffers, InputTape]:
    """Run a stage function once and retain what its two reverse passes need.

    Args:
        apply: the stage function.
        params: its parameters; floating and complex tensor leaves are differentiated.
        buffers: its buffers.
        args: its positional arguments.
        kwargs: its keyword arguments.
        diff: indices of the differentiated leaves of `args`.
        rerun: whether this is a checkpointed region that is run again. Regions inside of it are not run
            again in turn, as nothing is computed a third time.
        held: what the module behind `apply` holds now, where that is known.

    Returns:
        The output and the new buffers, free of wrappers, and the tape.

    Raises:
        PurityError: if `apply` mutates a tensor that it was given or has captured.
        StageError: if saved-tensor hooks are in use.
        TakesGradients: if the stage takes gradients inside itself, and a plain tape can be used instead.
    """
    param_leaves, params_spec = check_leaves("params", params)
    buffer_leaves, _ = check_leaves("buffers", buffers)
    arg_leaves, args_spec = trees.flatten(args)
    kwarg_leaves, kwargs_spec = trees.flatten(kwargs)
    state = [leaf for leaf in (*param_leaves, *buffer_leaves) if isinstance(leaf, Tensor)]
    given = {"parameter": params, "buffer": buffers, "positional argument": args, "keyword argument": kwargs}
    higher = is_differentiated(param_leaves) or is_differentiated(arg_leaves)
    inputs: Entries = []
    weights: Entries = []
    switchboard = Switchboard()
    with ExitStack() as stack:
        handed = kept.objects_among((*arg_leaves, *kwarg_leaves))
        stack.enter_context(kept.taken_out(getattr(apply, "module", None), handed, held))
        stack.enter_context(_explaining(given, higher or rerun))
        transformed = ft.current_level() > 0
        if transformed:
            stack.enter_context(saving_outside(switchboard))
        else:
            _refuse_saved_tensor_hooks(stack)
            if not higher:  # kernels look at the mode under all levels, the fused LSTM's for one
                stack.enter_context(torch.enable_grad())
        outer = None
        if diff:
            outer = stack.enter_context(ft.grad_level())
            stack.enter_context(torch.enable_grad())
            arg_leaves = list(arg_leaves)
            for i in diff:
                arg_leaves[i] = ft.wrap_leaf(arg_leaves[i], outer)
                inputs.append((i, arg_leaves[i]))
        inner = stack.enter_context(ft.grad_level())
        stack.enter_context(torch.enable_grad())
        param_leaves = list(param_leaves)
        for i, leaf in enumerate(param_leaves):
            if trees.is_differentiable(leaf):
                param_leaves[i] = ft.wrap_leaf(leaf, inner)
                weights.append((i, param_leaves[i]))
        mode = _Split(outer, inner, given, [*arg_leaves, *kwarg_leaves])
        mode.alone = not (transformed or higher or rerun)
        if mode.alone:
            mode.rerunnable = Rerunnable(getattr(apply, "module", None), state, switchboard)
        stage_args, stage_kwargs = trees.unflatten(args_spec, arg_leaves), kwargs
        containers = None
        if are_among(args_spec) or are_among(kwargs_spec):
            stage_kwargs = trees.unflatten(kwargs_spec, kwarg_leaves)
            containers = Containers((args, kwargs), (stage_args, stage_kwargs))
        with mode, intercepting(mode), uncompiled():
            result = apply(trees.unflatten(params_spec, param_leaves), buffers, *stage_args, **stage_kwargs)
        output, new_buffers = checked_result(apply, result)
        output_leaves, output_spec = trees.flatten(output)
        exits = [mode.leave(leaf) for leaf in output_leaves]
        new_buffers = trees.map_leaves(lambda leaf: mode.leave(leaf).value, new_buffers)
    output = trees.unflatten(output_spec, (exit.value for exit in exits))
    if containers is not None:
        containers.give_back(getattr(apply, "__qualname__", type(apply).__name__))
    modules = []
    # Regions borrow the module themselves, in threads of autograd's.
    if (
        mode.calls_back
        and not mode.had_regions
        and isinstance(params, dict)
        and isinstance(new_buffers, dict)
    ):
        modules = holding(getattr(apply, "module", None), {**new_buffers, **params})
    origin = Origin(len(arg_leaves), len(param_leaves), weights, state, higher, switchboard, modules)
    tape = InputTape(
        origin,
        roots=[(i, exit.outer) for i, exit in enumerate(exits) if exit.outer is not None],
        inputs=inputs,
        sites=mode.sites,
        derived=[(i, exit.inner) for i, exit in enumerate(exits) if exit.inner is not None],
        hooked=mode.hooked,
        shared=False,
        home={},
        captured=mode.captured_among(state, arg_leaves, kwarg_leaves),
    )
    return output, new_buffers, tape


class Rerunnable(NamedTuple):
    """What checkpointed regions of a forward pass need to be run again.

    Attributes:
        module: the stage's, if it has one.
        state: tensors that are no residuals.
        switchboard: where they leave what W needs.
    """

    module: nn.Module | None
    state: list[Tensor]
    switchboard: Switchboard


class _Split(TorchFunctionMode):
    """Sends every operation through the levels that it concerns, and notes the sites.

    Activations live on the outer level; parameters, and values made of parameters alone, on the inner.
    Every path from the output to a parameter changes from the outer tape to the inner at one site: what
    `call` returns has left the inner level, and nothing computed from that returns to it. The exceptions
    stay on both levels and are sites nowhere but where they are read (`lower`).

    Attributes:
        outer_level: the level of the inputs, None where nothing is differentiated.
        inner_level: the level of the parameters.
        given: what the caller owns, by kind, for refusing to write into it.
        arguments: the argument leaves as the stage sees them.
        sites: the sites so far.
        moved: overwritten arguments with what they stand for by now.
        owners: memory of the caller's leaves, read at the first in-place operation.
        mixed: whether values that are on both levels may exist.
        hooked: whether the stage has put hooks on tensors.
        calls_back: whether Python functions of the stage's own run in the reverse passes.
        bases: the sites at what outputs are views of.
        rerunnable: how checkpointed regions are run again; None where they are run as they come.
        paused: whether another split is at work, in a region.
        alone: whether nobody differentiates the stage in turn.
        marked: whether the stage has marked tensors of its own as requiring grad.
        had_tapes: whether regions were among them in which autograd keeps a tape, as reentrant ones do not.
        had_regions: whether checkpointed regions have been run, which leave tensors of closed levels behind.
        before_write: told what is about to be overwritten.
        plain: operands on none of the levels, by the ids of these references: given, or captured.
    """

    def __init__(
        self, outer_level: int | None, inner_level: int, given: dict[str, PyTree], arguments: list[Any]
    ) -> None:
        super().__init__()
        self.outer_level = outer_level
        self.inner_level = inner_level
        self.given = given
        self.arguments = arguments
        self.sites: list[Site] = []
        self.moved: dict[int, tuple[Tensor, Tensor]] = {}
        self.owners: dict[int, tuple[str, int]] | None = None
        self.mixed = False
        self.hooked = False
        self.calls_back = False
        self.bases: set[Site] = set()
        self.rerunnable: Rerunnable | None = None
        self.paused = False
        self.alone = False
        self.marked = False
        self.had_tapes = False
        self.had_regions = False
        self.before_write: Callable[[Any, Any], None] | None = None
        self.plain: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func in _HEEDED:
            if inner_gradients.takes_gradients(func):
                self.take_gradients(func.__name__)
            refuse_effects(func, args, kwargs)
            if func in MARKS:
                return self.mark(*args, **kwargs)
        body = opened(func)
        if body is not None:
            if func is Tensor.register_hook:
                self.hook(args[1])
            with self:
                return body(*args, **kwargs)
        if self.moved or self.had_regions:
            args, kwargs = trees.map_leaves(self.current, (args, kwargs))
        if _is_in_place(func, kwargs):
            return self.in_place(func, args, kwargs)
        if self.before_write is not None and func in _WRITERS:
            for statistics in _WRITERS[func](args):
                self.before_write(statistics, func)
        if func in CRASHING and crashes(func, args, kwargs):
            with self:
                return contiguous_group_norm(func, args, kwargs)
        if type(func) in _NO_OPERATORS:
            return self.call(func, args, kwargs)
        if is_flex_attention(func):
            with self:
                return attend(func, args)
        if custom_functions.may_have_formula(func):
            try:
                return self.call(func, args, kwargs)
            except custom_functions.Formula as found:
                with self:
                    return custom_functions.applied(found.function, (kwargs, *args))
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that mutates nothing."""
        func = cast_first(func, args, kwargs)
        splits = self.splits()
        is_site = splits and self.reads_weights(args, kwargs)
        found = decomposed(func, args, kwargs, is_site)
        if found is not None:
            body, operands = found
            with self:
                return body(*operands)
        if not splits:
            self.reads_weights(args, kwargs)
            return func(*args, **kwargs)
        if not is_site:
            return self.above(func, args, kwargs)
        if self.mixed and (func in _VIEWS or getattr(func, "__name__", "") not in _ABOUT_THE_OPERAND):
            args, kwargs = trees.map_leaves(self.lower_activation, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return self.release(result, args)
        if isinstance(result, (tuple, list)):
            return trees.map_leaves(lambda leaf: self.release(leaf, args), result)
        return result

    def splits(self) -> bool:
        """Tell whether the two levels are there and on top."""
        if ft.current_level() == self.inner_level:
            return self.outer_level is not None  # or else everything is W's
        self.mixed = True  # a transform of the stage's own is open, whose results stay on both levels
        if self.alone and self.differentiates():
            raise inner_gradients.TakesGradients
        return False

    def differentiates(self) -> bool:
        """Tell whether a transform of the stage's own is open that takes derivatives."""
        return ft.differentiating_above(self.inner_level)

    def take_gradients(self, how: str) -> None:
        """The stage takes gradients itself, other than by the transforms of torch.func."""
        if self.differentiates() and not self.alone:
            return  # those transforms do
        raise inner_gradients.TakesGradients if self.alone else inner_gradients.refused(how)

    def hook(self, hook: Any) -> None:
        """The stage puts a hook on a tensor."""
        self.hooked = self.calls_back = True
        # A tensor of its own is marked in order to take gradients by it, if not now, then in the hook.
        if self.marked or inner_gradients.differentiates(hook):
            self.take_gradients("a hook")

    def mark(self, tensor: Tensor, requires_grad: bool = True) -> Tensor:
        """The stage marks a tensor, which has no effect: gradients are those of arguments and parameters."""
        if self.differentiates():
            if self.alone:
                raise inner_gradients.TakesGradients
            with torch._C.DisableTorchFunction():
                return tensor.requires_grad_(requires_grad)
        with torch._C.DisableTorchFunction():
            now = ft.requires_grad(self.current(tensor))
            if now and not requires_grad:
                owner = self.owner(tensor)
                if owner is not None:
                    raise refused_mark(owner, requires_grad)
                raise RuntimeError(
                    "you can only change requires_grad flags of leaf variables. If you want to use a "
                    "computed variable in a subgraph that doesn't require differentiation use var_no_grad "
                    "= var.detach()."  # as torch says
                )
        if requires_grad and not now:
            owner = self.owner(tensor)
            if owner is not None and owner.startswith("buffer"):
                raise refused_mark(owner, requires_grad)
            self.marked = True
            if self.hooked:
                self.take_gradients("a hook")
        return tensor

    def above(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation with the outer level on top.

        Not only for speed: composite kernels decide by `requires_grad` what to save, and on the inner
        level activations do not require grad.
        """
        layer = ft.pop_layer()
        try:
            return func(*args, **kwargs)
        finally:
            ft.push_layer(layer)

    def reads_weights(self, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
        """Tell whether an operand lives on the inner level; note those that live on none."""
        inner_level, level_of = self.inner_level, ft.level_of
        found = False
        for operands in (args, kwargs.values()) if kwargs else (args,):
            for operand in operands:
                if isinstance(operand, Tensor):
                    level = level_of(operand)
                    if level == inner_level:
                        found = True
                    elif level < 0:
                        reference = weakref.ref(operand)  # the same one each time
                        self.plain[id(reference)] = reference
                elif isinstance(operand, (list, tuple)):
                    found |= self.reads_weights(operand, {})
                elif isinstance(operand, dict):
                    found |= self.reads_weights(operand.values(), {})
        return found

    def captured_among(self, *given: Iterable[Any]) -> list[weakref.ref[Tensor]]:
        """The operands so far on none of the levels, except those that were given."""
        if not self.plain:
            return []
        known = {id(leaf) for leaves in given for leaf in leaves}
        return [reference for reference in self.plain.values() if id(reference()) not in known]

    def is_activation(self, value: Tensor) -> bool:
        """Tell whether a value without its inner wrapper depends on a differentiated input."""
        return value.requires_grad and ft.level_of(value) == self.outer_level

    def release(self, leaf: Any, args: tuple[Any, ...]) -> Any:
        """Let a site's output leave the inner level; values made of parameters alone stay."""
        if not isinstance(leaf, Tensor) or ft.level_of(leaf) != self.inner_level:
            return leaf
        value = ft.unwrap(leaf, self.inner_level)
        if not leaf.requires_grad:
            return value
        if not self.is_activation(value) or any(leaf is operand for operand in args):
            return leaf
        if value._is_view() and leaf._is_view():
            self.meet_at_base(value, leaf)
        else:
            self.sites.append(Site(get_gradient_edge(value), get_gradient_edge(leaf)))
        return value

    def meet_at_base(self, value: Tensor, leaf: Tensor) -> None:
        """Note a site whose output is a view, at what it is a view of.

        Writing into a view moves its place on a tape, but not that of its base. Several outputs may be
        views of one base, which is one site.
        """
        base, inner_base = value._base, leaf._base
        assert base is not None
        assert inner_base is not None
        site = Site(get_gradient_edge(base), get_gradient_edge(inner_base))
        if site not in self.bases:
            self.bases.add(site)
            self.sites.append(site)

    def in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that writes into its first operand, or into `out`."""
        out = kwargs.get("out")
        target = out if out is not None else args[0] if args else next(iter(kwargs.values()))
        targets = target if isinstance(target, (tuple, list)) else (target,)
        for tensor in targets:
            if self.before_write is not None:
                self.before_write(tensor, func)
            owner = self.owner(tensor)
            if owner is not None:
                if (
                    tensor is not target
                    or out is not None
                    or not args
                    or not any(tensor is a for a in self.arguments)
                ):
                    raise _impure(owner, func)
                # The stage may overwrite an argument as a name; the caller's tensor stays as it is.
                copy = self.call(torch.clone, (tensor,), {})
                self.moved[id(tensor)] = (tensor, copy)
                return self.in_place(func, (copy, *args[1:]), kwargs)
        if not self.splits():
            self.reads_weights(args, kwargs)
            return func(*args, **kwargs)
        if any(ft.level_of(tensor) == self.inner_level for tensor in targets):
            self.mixed = True  # an activation may be written into a value made of parameters
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if _CAPTURED not in str(error) or any(ft.level_of(tensor) < 0 for tensor in targets):
                    raise
            return self.into_own(func, args, kwargs, target)
        if self.reads_weights(args, kwargs):
            # The inner level may not write into a tensor of the outer one, so the weights come down.
            args, kwargs = trees.map_leaves(self.lower, (args, kwargs))
        return self.above(func, args, kwargs)

    def into_own(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        """Write into a parameter that the stage has made, whose wrapper torch takes for captured."""
        operands = [leaf for leaf in trees.flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        recorded = torch.is_grad_enabled() and getattr(func, "__module__", "") != nn.init.__name__
        if recorded and any(map(ft.requires_grad, operands)):
            if isinstance(target, Tensor) and target.requires_grad and target.is_leaf:
                raise RuntimeError(_LEAF_WRITTEN)  # as torch says
            raise PurityError(
                f"The stage writes what is differentiated, by {getattr(func, '__name__', func)}, into a "
                f"parameter that it has made itself ({trees.describe(target)}). Compute the values first, "
                "and use them as they are."
            )
        args, kwargs = trees.map_leaves(self.below, (args, kwargs))
        self.above(func, args, kwargs)
        return target

    def below(self, leaf: Any) -> Any:
        """An operand without its wrapper of the inner level."""
        on_inner = isinstance(leaf, Tensor) and ft.level_of(leaf) == self.inner_level
        return ft.unwrap(leaf, self.inner_level) if on_inner else leaf

    def lower_activation(self, leaf: Any) -> Any:
        """Bring an operand that is on both levels down, so that the inner tape ends before it."""
        if isinstance(leaf, Tensor) and ft.level_of(leaf) == self.inner_level and leaf.requires_grad:
            return self.lower(leaf) if self.is_activation(ft.unwrap(leaf, self.inner_level)) else leaf
        return leaf

    def lower(self, leaf: Any) -> Any:
        """Bring an operand down to the outer level, as a site of its own."""
        if not isinstance(leaf, Tensor) or ft.level_of(leaf) != self.inner_level:
            return leaf
        if not leaf.requires_grad:
            return ft.unwrap(leaf, self.inner_level)
        if self.is_activation(ft.unwrap(leaf, self.inner_level)):
            leaf = leaf.view_as(leaf)  # a place of its own, as `leaf` itself stays on both levels
            value = ft.unwrap(leaf, self.inner_level)
        else:
            value = ft.make_leaf(self.above(torch.detach, (ft.unwrap(leaf, self.inner_level),), {}))
        self.sites.append(Site(self.above(get_gradient_edge, (value,), {}), get_gradient_edge(leaf)))
        return value

    def current(self, leaf: Any) -> Any:
        """The tensor that an overwritten argument stands for by now."""
        moved = self.moved.get(id(leaf))
        if moved is not None:
            return moved[1]
        if self.had_regions and isinstance(leaf, Tensor) and ft.is_dead(leaf):
            if ft.requires_grad(leaf) and self.had_tapes:
                raise inner_gradients.TakesGradients  # on a plain tape it is a value as any other
            return ft.without_dead_wrappers(leaf)  # a constant
        return leaf

    def owner(self, tensor: Tensor) -> str | None:
        """Name what the caller has given in this memory, if it is the caller's."""
        if self.owners is None:
            self.owners = {
                ft.storage_key(leaf): (kind, i)
                for kind, tree in self.given.items()
                for i, leaf in enumerate(trees.flatten(tree)[0])
                if isinstance(leaf, Tensor)
            }
        kind, i = self.owners.get(ft.storage_key(tensor), (None, 0))
        if kind is None:
            return None
        leaves, spec = trees.flatten(self.given[kind])
        return f"{kind} {trees.leaf_names(spec, '')[i]} ({trees.describe(leaves[i])})"

    def leave(self, leaf: Any) -> Exit:
        """Free a leaf of the result of its wrappers, and note its places on the tapes."""
        leaf = self.current(leaf)
        outer = inner = None
        if isinstance(leaf, Tensor) and ft.level_of(leaf) == self.inner_level:
            inner = get_gradient_edge(leaf) if leaf.requires_grad else None
            leaf = ft.unwrap(leaf, self.inner_level)
        if (
            self.outer_level is not None
            and isinstance(leaf, Tensor)
            and ft.level_of(leaf) == self.outer_level
        ):
            outer = self.above(get_gradient_edge, (leaf,), {}) if leaf.requires_grad else None
            leaf = ft.unwrap(leaf, self.outer_level)
        return Exit(leaf, outer, inner)

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        """Apply a custom autograd function at the levels that it concerns."""
        self.calls_back = True
        if custom_functions.is_formula(function):
            raise custom_functions.Formula(function)
        if inner_gradients.backward_differentiates(function):
            self.take_gradients(f"the backward of {function.__name__}")
        if custom_functions.wants_context(function):
            return custom_functions.applied(function, args)
        return apply(*args)

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        """Run a checkpointed region, keeping what it takes to run it again."""
        asked = Call.of(call)
        if asked.is_constant(self.is_differentiated):
            with torch.no_grad():
                return asked.run()
        board = self.rerunnable
        if board is None or not torch.is_grad_enabled():
            return asked.run()
        region = Region(asked, board.module)
        self.had_regions = True
        self.had_tapes = self.had_tapes or not asked.reentrant
        captured = _Captured(region, self)
        exits, spec = self._first_run(region, captured)
        with torch._C.DisableTorchFunction():
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

    def _first_run(self, region: Region, captured: _Captured) -> tuple[list[Exit], Any]:
        """Run a region under two levels of its own, from which nothing is kept.

        They see the same operations, and the same `requires_grad`, as those of the second run.
        """
        self.paused = True
        with ExitStack() as stack:
            stack.callback(setattr, self, "paused", False)
            stack.enter_context(ft.saving_through(region.forget, region.forget))
            captured.outer = stack.enter_context(ft.grad_level())
            stack.enter_context(torch.enable_grad())
            captured.inner = stack.enter_context(ft.grad_level())
            nested = _Split(captured.outer, captured.inner, {}, [])
            nested.alone = self.alone
            nested.before_write = captured.before_write
            with nested, intercepting(nested), StandIns(captured.adopted):
                leaves, spec = trees.flatten(region.run())
                exits = [nested.leave(captured.adopted(leaf)) for leaf in leaves]
            region.release(lambda buffer: self.bare(nested.leave(buffer).value))
        return [exit._replace(value=self.bare(exit.value)) for exit in exits], spec

    @property
    def levels(self) -> list[int]:
        """The levels that there are, from below."""
        return [level for level in (self.outer_level, self.inner_level) if level is not None]

    def bare(self, value: Any) -> Any:
        """A value without the wrappers of the levels."""
        for level in reversed(self.levels):
            if isinstance(value, Tensor):
                value = ft.unwrap(value, level)
        return value

    def is_weight(self, value: Tensor) -> bool:
        """Tell whether a value depends on parameters and lives on the inner level alone."""
        on_inner = ft.level_of(value) == self.inner_level and value.requires_grad
        return on_inner and not self.is_activation(ft.unwrap(value, self.inner_level))

    def is_differentiated(self, value: Tensor) -> bool:
        """Tell whether a value depends on parameters or differentiated inputs."""
        return self.is_weight(value) or self.is_activation(ft.unwrap(value, self.inner_level))


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
    """

    outer: int
    inner: int

    def __init__(self, region: Region, split: _Split) -> None:
        self._region = region
        self._split = split
        self._values: list[Tensor] = []  # as the split around knows them
        self._adopted: list[Tensor] = []  # as the first run does
        self._before: dict[int, Tensor] = {}  # constants before they were overwritten

    def adopted(self, leaf: Any) -> Any:
        """What stands for something in the first run: a leaf of its own levels, if it is captured."""
        place = self._region.place(leaf)
        if place is not None:
            return self._adopted[place]
        if not isinstance(leaf, Tensor):
            return leaf
        with torch._C.DisableTorchFunction():
            split = self._split
            value = split.current(leaf)
            if ft.level_of(value) not in split.levels and not isinstance(leaf, nn.Parameter):
                return leaf
            self._region.capture(leaf)
            self._values.append(value)
            self._adopted.append(self._adopt(value))
            return self._adopted[-1]

    def _adopt(self, value: Tensor) -> Tensor:
        bare = self._split.bare(value)
        if not self._split.is_differentiated(value):
            for level in (*self._split.levels, self.outer):  # it may be written into, which all must know
                bare = ft.wrap(bare, level)
            return bare
        level = self.inner if self._split.is_weight(value) else self.outer
        with ft.down_to(level):
            return ft.wrap_leaf(bare, level)

    def before_write(self, tensor: Any, func: Any) -> None:
        """Keep what is overwritten as it was, which is how the second run must find it."""
        if not isinstance(tensor, Tensor):
            return
        with torch._C.DisableTorchFunction():
            key = ft.storage_key(tensor)
            for place, value in enumerate(self._values):
                if place not in self._before and ft.storage_key(value) == key:
                    if self._split.is_differentiated(value):
                        raise PurityError(
                            f"A checkpointed region writes into its input ({trees.describe(value)}) in "
                            f"place, by {getattr(func, '__name__', func)}, so that it cannot be run again. "
                            "Work on a clone."
                        )
                    with ft.down_to(0):
                        self._before[place] = self._split.bare(value).clone()

    def operands(self) -> _Operands:
        """What was captured, once the levels of the first run are closed."""
        split = self._split
        activations, weights, constants = [], [], []
        for place, value in enumerate(self._values):
            if not split.is_differentiated(value):
                with ft.down_to(0):
                    constants.append((place, self._before.get(place, split.bare(value)).detach()))
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


class _Rerun:
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

    def pull(
        self, captured: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Gradients of the activations, or in W of the weights."""
        board = self._board.switchboard
        # It is left out while it runs: one that fails in its midst is of no use.
        tape, self._tape = self._tape or self._linearize(captured), None
        grads, weight_tape, self._tape = tape.pull(cotangents, board.retain)
        if self._n == 0:
            return weight_tape.pull(retain=False)[0]
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
        output, _, tape = linearize(again, weights, (), (*acts, *constants), {}, diff, rerun=True)
        found = [(value.shape, value.dtype, value.device) for value in output]
        if found != self._metas:
            raise StageError(
                f"A checkpointed region returned {self._metas} at first and {found} when it was run again. "
                "Take out of the checkpoint what changes from run to run."
            )
        return replace(tape, origin=replace(tape.origin, state=self._board.state))


def _is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and name != "requires_grad_":
        return name in _IN_PLACE_DUNDERS if name.endswith("__") else True
    return kwargs.get("out") is not None


def is_differentiated(leaves: Iterable[Any]) -> bool:
    """Tell whether somebody outside differentiates what is computed from these leaves."""
    if not torch.is_grad_enabled():
        return False
    if ft.current_level() > 0:
        return True
    return any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))


def _no_leaf(leaf: Tensor) -> Tensor:
    """The same at its level as no leaf: module trackers put hooks on leaves, which fail in reverse passes."""
    with torch._C.DisableTorchFunction(), ft.down_to(ft.level_of(leaf)):
        return leaf.view_as(leaf) if leaf.layout is torch.strided else leaf.clone()


def _seeds(places: Exits, cotangents: Sequence[Tensor | None]) -> list[tuple[GradientEdge, Tensor]]:
    return [(edge, cotangent) for i, edge in places if (cotangent := cotangents[i]) is not None]


def reverse(
    seeds: Sequence[tuple[GradientEdge, Tensor]],
    wanted: Sequence[GradientEdge | Tensor],
    shared: bool,
    origin: Origin,
    home: Home,
) -> Sequence[Tensor | None]:
    """One reverse pass over a tape; `None` for the places that it does not reach."""
    if not seeds or not wanted:
        return [None] * len(wanted)
    edges, cotangents = zip(*seeds, strict=True)
    board = origin.switchboard
    with board.reading(home), lent_again(origin.modules):
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            edges,
            wanted,  # type: ignore[arg-type]  # the stubs know edges or tensors, not both
            cotangents,
            retain_graph=origin.retains(shared),
            create_graph=origin.higher,
            allow_unused=True,
        )
    # Torch's zeros without memory can be read by few kernels and written by none.
    return [grad if grad is None or not grad._is_zerotensor() else torch.zeros_like(grad) for grad in grads]


def _unshared(grads: Iterable[Tensor | None], cotangents: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Copy gradients that lie in each other's or a cotangent's memory, so that each can be added into."""
    taken = {ft.storage_key(cotangent) for cotangent in cotangents}
    for grad in grads:
        if grad is not None:
            key = ft.storage_key(grad)
            if key in taken or (grad.layout is torch.strided and 0 in grad.stride()):
                grad = grad.clone(memory_format=torch.contiguous_format)
            taken.add(key)
        yield grad


def _refuse_saved_tensor_hooks(stack: ExitStack) -> None:
    try:
        stack.enter_context(ft.refusing_to_save(_HOOKS_REFUSED))
    except RuntimeError as error:
        raise StageError(_HOOKS_REFUSED) from error


def _impure(owner: str, func: Any) -> PurityError:
    return PurityError(
        f"The stage writes into {owner} in place, by {getattr(func, '__name__', func)}. A stage function "
        "mutates nothing that it is given: work on a clone, or return the new value as a buffer."
    )


@contextmanager
def _explaining(given: dict[str, PyTree], higher: bool) -> Iterator[None]:
    """Raise a refusal in place of what torch says about functions that cannot be transformed.

    `higher` tells whether gradients are to be differentiated in turn.
    """
    try:
        yield
    except StageError:
        raise
    except (AttributeError, RuntimeError) as error:
        if not higher and "backward() called inside a functorch transform" in str(error):
            raise inner_gradients.TakesGradients from None
        refusal = _refusal(error) or _sparse(error, given) or _compressed(error)
        if refusal is None:
            raise
        raise refusal from error


def _sparse(error: Exception, given: dict[str, PyTree]) -> StageError | None:
    """Blame a sparse leaf, if there is one: few of torch's kernels take them, and fewer under levels."""
    for kind, tree in given.items():
        leaves, spec = trees.flatten(tree)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
                reason = str(error).partition("\n")[0]
                return LeafError(
                    f"The stage fails on {kind} {trees.leaf_names(spec, '')[i]} ({trees.describe(leaf)}): "
                    f"{reason} Pass it dense, by tensor.to_dense(), or run funcstage.autograd eagerly."
                )
    return None


def _compressed(error: Exception) -> StageError | None:
    layout, found, _ = str(error).partition(" tensors do not have strides")
    if not found:
        return None
    return StageError(
        f"The stage reads a tensor of a compressed sparse layout ({layout}), which the levels of torch.func "
        "cannot look into. Keep it as tensor.to_sparse_coo(), or dense."
    )


def _refusal(error: Exception) -> StageError | None:
    """Translate what torch says about functions that cannot be transformed; None for users' errors."""
    message = str(error)
    if _HOOKS_REFUSED in message:
        return StageError(_HOOKS_REFUSED)
    if "don't yet support saved tensor hooks" in message:  # those of `saving_outside`
        return inner_gradients.refused("torch.func")
    if _CAPTURED in message:
        return PurityError(
            "The stage mutates in place a tensor that it has captured from outside (not an argument, a "
            "parameter or a buffer), which a pure function cannot do. Register the tensor as a buffer, or "
            "update a clone of it."
        )
    if "NestedInt" in message or "NestedTensorImpl" in message:
        return StageError(
            "The stage makes a nested tensor, which the levels of torch.func cannot look into. Compute on "
            "padded tensors with a mask, or on the packed values with their offsets."
        )
    if "Cannot access data pointer" in message:
        return StageError(
            "The stage reads the memory of a tensor that is differentiated (by NumPy, for one), which the "
            "levels of torch.func cannot look into. Make what reads it a torch.library.custom_op."
        )
    if "C++ torch::autograd::Function" in message:
        return StageError(
            "The stage uses an operator whose gradient is a C++ torch::autograd::Function (torch 2.11's "
            "differentiable collectives, for one), which torch.func cannot transform. Compile the stage by "
            "funcstage.compile, or put a torch.autograd.Function around the operator without its gradient."
        )
    if "autograd.Function" in message and "setup_context" in message:
        return StageError(
            "The stage applies a torch.autograd.Function whose forward takes `ctx`, by an `apply` that was "
            "bound before the stage ran. From torch 2.14 on it cannot be found so: write "
            "`MyFunction.apply(...)` in the stage, or give the function a separate setup_context "
            "staticmethod."
        )
    return None


_CAPTURED = "mutate a captured Tensor"  # in functorch's message
_LEAF_WRITTEN = "a leaf Variable that requires grad is being used in an in-place operation."
_HOOKS_REFUSED = (
    "The closures engine cannot differentiate under saved-tensor hooks (save_on_cpu, for one). Take them out "
    "of the stage, or use funcstage.autograd on an eager tape; torch.utils.checkpoint works."
)
_WRITERS: dict[Any, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    torch.batch_norm: lambda args: args[3:5],
    torch.instance_norm: lambda args: args[3:5],
}
"""What operations write into whose names do not say so."""
# These speak of the operand itself, so that another tensor of the same value will not do.
_ABOUT_THE_OPERAND = {"__get__", "__set__", "_register_hook_dict"}
_VIEWS = {getattr(Tensor, name).__get__ for name in ("real", "imag", "T", "mT", "H", "mH")}
"""Attributes that are operations."""
_HEEDED = MARKS | EFFECTS | inner_gradients.TAKING
_NO_OPERATORS = (
    FunctionType,
    BuiltinFunctionType,
    MethodDescriptorType,
    WrapperDescriptorType,
    MethodWrapperType,
)
"""Types of most functions that a mode is told of; operators are objects of torch's own types."""
_IN_PLACE_DUNDERS = {
    f"__{name}__"
    for name in [
        "iadd",
        "iand",
        "idiv",
        "ifloordiv",
        "ilshift",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
        "setitem",
    ]
}
