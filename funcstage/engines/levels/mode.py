"""The mode that sends every operation of a stage through the levels that it concerns, and notes the sites."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.messages import CAPTURED_WRITTEN, says
from funcstage._torch.operators import Written
from funcstage._torch.tensors import READS_BASE, READS_WHETHER_VIEW
from funcstage.effects import EFFECTS, MARKS, refuse_effects, refused_mark
from funcstage.engines.levels import inner_gradients
from funcstage.engines.levels.explain import asks_for_views, impure, written_into_own
from funcstage.engines.levels.first_reads import FirstReads
from funcstage.engines.levels.moves import Levels
from funcstage.engines.levels.regions import Rerunnable, checkpointed
from funcstage.engines.levels.tape import Exit
from funcstage.engines.node_hooks import READS_NODE, Allowed, checked_hooks, is_of_module
from funcstage.engines.rules import custom_functions
from funcstage.engines.rules.base import Call, Rule
from funcstage.engines.rules.table import known
from funcstage.state.overlaps import refuse_overwritten
from funcstage.trees import PyTree


class Split(Levels, TorchFunctionMode):
    """Sends every operation through the levels that it concerns, and notes the sites.

    Activations live on the outer level; parameters, and values made of parameters alone, on the inner.
    Every path from the output to a parameter changes from the outer tape to the inner at one site: what
    `call` returns has left the inner level, and nothing computed from that returns to it. The exceptions
    stay on both levels and are sites nowhere but where they are read (`lower`).

    Attributes:
        given: what the caller owns, by kind, for refusing to write into it.
        arguments: the argument leaves as the stage sees them.
        moved: overwritten arguments with what they stand for by now.
        owners: memory of the caller's leaves, read at the first in-place operation.
        mixed: whether values that are on both levels may exist.
        hooked: whether the stage has put hooks on tensors.
        calls_back: whether Python functions of the stage's own run in the reverse passes.
        rerunnable: how checkpointed regions are run again; None where they are run as they come.
        paused: whether another split is at work, in a region.
        alone: whether nobody differentiates the stage in turn.
        marked: whether the stage has marked tensors of its own as requiring grad.
        had_tapes: whether regions were among them in which autograd keeps a tape, as reentrant ones do not.
        had_apart: whether another engine has run parts of the stage.
        had_regions: whether checkpointed regions have been run, which leave tensors of closed levels behind.
        before_write: told what is about to be overwritten.
        before_read: called where values leave torch other than by an operation.
        first_reads: where data meets parameters, if no argument is differentiated.
        in_region: whether it is the split of a checkpointed region in its first run.
        nodes: those that the stage has asked for, with whether they are on one of the two tapes alone.
    """

    def __init__(
        self, outer_level: int | None, inner_level: int, given: dict[str, PyTree], arguments: list[Any]
    ) -> None:
        Levels.__init__(self, outer_level, inner_level)
        TorchFunctionMode.__init__(self)
        self.given = given
        self.arguments = arguments
        self.moved: dict[int, tuple[Tensor, Tensor]] = {}
        self.owners: dict[int, tuple[str, int]] | None = None
        self.mixed = False
        self.hooked = False
        self.calls_back = False
        self.rerunnable: Rerunnable | None = None
        self.paused = False
        self.alone = False
        self.marked = False
        self.had_tapes = False
        self.had_regions = False
        self.had_apart = False
        self.before_write: Callable[[Any, Any], None] | None = None
        self.before_read: Callable[[Any], None] | None = None
        self.first_reads: FirstReads | None = None
        self.in_region = False
        self.nodes: dict[Node, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if types:
            inner_gradients.meet_subclasses(types, self.alone)
        if func in _HEEDED:
            if inner_gradients.takes_gradients(func):
                self.take_gradients(func.__name__)
            refuse_effects(func, args, kwargs)
            if func in MARKS:
                return self.mark(*args, **kwargs)
            if func in _READING_MEMORY:
                return self.read_memory(func, args, kwargs)
            if self.marked and func in _READING_MARKS:
                self.take_gradients("asking what requires grad after requires_grad_()")
            if func == READS_NODE:
                return self.read_node(args[0])
            if self.in_region and func in _READING_VIEWS:
                raise asks_for_views(func)
            if func == READS_BASE:
                return self.argument_like(self.call(func, args, kwargs))
        operation = known(func)
        if operation.opened is not None:
            if func is Tensor.register_hook:
                self.hook(args[1])
            with self:
                return operation.opened(*args, **kwargs)
        if self.moved or self.had_regions:
            args, kwargs = trees.map_leaves(self.current, (args, kwargs))
        writes = operation.written
        if (writes.positions or kwargs) and writes.among(args, kwargs):
            return self.in_place(func, args, kwargs, writes)
        if self.before_write is not None:
            for i, name in operation.statistics:
                self.before_write(args[i] if i < len(args) else kwargs.get(name), func)
        if operation.may_have_formula:
            try:
                return self.call(func, args, kwargs)
            except custom_functions.Formula as found:
                with self:
                    return custom_functions.applied(found.function, (kwargs, *args))
        return self.call(func, args, kwargs, operation.instead if operation.at_levels else None)

    def call(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        instead: Callable[[Call], Rule | None] | None = None,
    ) -> Any:
        """Run an operation that mutates nothing, or what a rule puts in its place."""
        splits = self.splits()
        is_site = splits and self.reads_weights(args, kwargs)
        if instead is not None:
            rule = instead(Call(args, kwargs, False, is_site))
            if rule is not None and not rule.whole:
                with self:
                    return rule.body(*args, **kwargs)
            func = func if rule is None else rule.body
        if not splits:
            return self.undivided(func, args, kwargs)
        if not is_site:
            return self.above(func, args, kwargs)
        if self.mixed and (func in _VIEWS or getattr(func, "__name__", "") not in _ABOUT_THE_OPERAND):
            args, kwargs = trees.map_leaves(self.lower_activation, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return self.release(result)
        if isinstance(result, (tuple, list)):
            return trees.map_leaves(self.release, result)
        return result

    def undivided(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Any = None) -> Any:
        """Run an operation at whatever level is on top."""
        self.reads_weights(args, kwargs)
        result = func(*args, **kwargs)
        if self.first_reads is not None and ft.current_level() == self.inner_level:
            self.first_reads.note(args, kwargs, result if written is None else written)
        return result

    def splits(self) -> bool:
        """Tell whether the two levels are there and on top."""
        if ft.current_level() == self.inner_level:
            return self.outer_level is not None  # or else everything is W's
        self.mixed = True  # a transform of the stage's own is open, whose results stay on both levels
        return False

    def differentiates(self) -> bool:
        """Tell whether a transform of the stage's own is open that takes derivatives."""
        return ft.differentiating_above(self.inner_level)

    def take_gradients(self, how: str) -> None:
        """The stage takes gradients itself, other than by the transforms of torch.func."""
        if self.differentiates() and not self.alone:
            return  # those transforms do
        raise inner_gradients.TakesGradients if self.alone else inner_gradients.refused(how)

    def make_dtensor(self, function: str) -> None:
        """The stage makes DTensors, whose class the levels hide; a plain tape takes them as they are."""
        raise inner_gradients.TakesGradients if self.alone else inner_gradients.makes_dtensors(function)

    def hook(self, hook: Any) -> None:
        """The stage puts a hook on a tensor."""
        self.hooked = self.calls_back = True
        # A tensor of its own is marked in order to take gradients by it, if not now, then in the hook.
        if self.marked or inner_gradients.differentiates(hook):
            self.take_gradients("a hook")

    def mark(self, tensor: Tensor, requires_grad: bool = True) -> Tensor:
        """The stage marks a tensor, which has no effect: gradients are those of arguments and parameters."""
        if self.differentiates():  # a transform of torch.func, which takes gradients later if it does
            return tensor.requires_grad_(requires_grad)
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
            buffers = trees.flatten(self.given.get("buffer"))[0]
            if owner is not None and any(buffer is tensor for buffer in buffers):  # and no alias of it
                raise refused_mark(owner, requires_grad)
            self.marked = True
            if self.hooked:
                self.take_gradients("a hook")
        return tensor

    def read_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand out what a tensor holds: where it is detached it is a constant, which needs no wrappers."""

        if self.before_read is not None:
            self.before_read(None)

        def constant(leaf: Any) -> Any:
            leaf = self.current(leaf)
            if isinstance(leaf, Tensor) and (kwargs.get("force") or not ft.requires_grad(leaf)):
                for level in range(ft.current_level(), 0, -1):
                    leaf = ft.unwrap(leaf, level)
            return leaf

        args = trees.map_leaves(constant, args)
        with ft.down_to(0):
            return func(*args, **kwargs)

    def read_node(self, tensor: Tensor) -> Node | None:
        """Hand out a node of one of the tapes, which the stage may put hooks on."""
        tensor = self.current(tensor)
        node: Node | None = READS_NODE(tensor)
        if node is not None and not is_of_module(node):
            below = self.below(tensor)
            self.nodes[node] = below is tensor or not self.is_activation(below)
        return node

    def argument_like(self, base: Tensor | None) -> Tensor | None:
        """The argument itself for what wraps it as the base of a view."""
        bare = self.bare(base)
        return next((x for x in self.arguments if base is not None and self.bare(x) is bare), base)

    def check_nodes(self, stage: str, exits: Iterable[Exit]) -> None:
        """See to the hooks that the stage has put on nodes: they run as in eager, or are refused."""
        if not self.nodes:
            return
        edges = [edge for exit in exits for edge in exit[1:] if edge is not None]
        edges += [site.inner for site in self.sites]
        divided = {site.outer.node for site in self.sites}

        def allowed(node: Node) -> Allowed:
            alone = self.nodes.get(node, False)
            return Allowed(alone, alone and node not in divided)

        for hook in checked_hooks(stage, edges, allowed):
            self.hook(hook)

    def in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: Written) -> Any:
        """Run an operation that writes into some of its operands."""
        written = writes.among(args, kwargs)
        for tensor in written:
            if self.before_write is not None:
                self.before_write(tensor, func)
            owner = self.owner(tensor)
            if owner is not None:
                is_first = len(written) == 1 and bool(args) and tensor is args[0]
                if not is_first or not any(tensor is a for a in self.arguments):
                    raise impure(owner, func, tensor, self.given)
                # The stage may overwrite an argument as a name; the caller's tensor stays as it is.
                refuse_overwritten(tensor, self.given, self.arguments)
                copy = self.call(torch.clone, (tensor,), {})
                self.moved[id(tensor)] = (tensor, copy)
                return self.in_place(func, (copy, *args[1:]), kwargs, writes)
        if not self.splits():
            return self.undivided(func, args, kwargs, written)
        if any(ft.level_of(tensor) == self.inner_level for tensor in written):
            self.mixed = True  # an activation may be written into a value made of parameters
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if not says(error, CAPTURED_WRITTEN) or any(ft.level_of(tensor) < 0 for tensor in written):
                    raise
            return self.into_own(func, args, kwargs, kwargs.get("out", written[0]))
        if self.reads_weights(args, kwargs):
            # The inner level may not write into a tensor of the outer one, so the weights come down.
            args, kwargs = trees.map_leaves(self.lower, (args, kwargs))
        return self.above(func, args, kwargs)

    def into_own(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        """Write into a parameter that the stage has made, whose wrapper torch takes for captured."""
        operands = [leaf for leaf in trees.flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        recorded = torch.is_grad_enabled() and getattr(func, "__module__", "") != nn.init.__name__
        if recorded and any(map(ft.requires_grad, operands)):
            raise written_into_own(func, target)
        args, kwargs = trees.map_leaves(self.below, (args, kwargs))
        self.above(func, args, kwargs)
        return target

    def current(self, leaf: Any) -> Any:
        """The tensor that an overwritten argument stands for by now."""
        moved = self.moved.get(id(leaf))
        if moved is not None:
            return moved[1]
        if isinstance(leaf, Tensor) and ft.is_dead(leaf):
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
        if isinstance(leaf, Tensor) and ft.level_of(leaf) == self.outer_level:
            outer = self.above(get_gradient_edge, (leaf,), {}) if leaf.requires_grad else None
            leaf = ft.unwrap(leaf, self.outer_level)
        return Exit(leaf, outer, inner)

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        """Apply a custom autograd function at the levels that it concerns."""
        self.calls_back = True
        if custom_functions.is_formula(function):
            raise custom_functions.Formula(function)
        if function.__module__.startswith("torch.distributed.tensor."):
            self.make_dtensor(function.__name__)
        if inner_gradients.backward_differentiates(function):
            self.take_gradients(f"the backward of {function.__name__}")
        if custom_functions.wants_context(function):
            return custom_functions.applied(function, args)
        return apply(*args)

    def thread(self) -> None:
        """The stage lets other threads compute, which do not see the levels; a plain tape is seen by all."""
        raise inner_gradients.TakesGradients if self.alone else inner_gradients.starts_threads()

    def waits(self) -> None:
        """The stage waits for a thread that was given something nobody saw, and may compute by now."""
        raise inner_gradients.waits_for_threads()

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        """Run a checkpointed region, keeping what it takes to run it again."""
        return checkpointed(self, call)

    def nested(self, outer_level: int, inner_level: int) -> Split:
        """A split for the first run of a region, under levels of its own."""
        nested = Split(outer_level, inner_level, {}, [])
        nested.alone, nested.in_region = self.alone, True
        return nested


# These speak of the operand itself, so that another tensor of the same value will not do.
_ABOUT_THE_OPERAND = {"__get__", "__set__", "_register_hook_dict"}


_VIEWS = {getattr(Tensor, name).__get__ for name in ("real", "imag", "T", "mT", "H", "mH")}
"""Attributes that are operations."""


_READING_MEMORY: set[Any] = {
    *(Tensor.numpy, Tensor.__array__, Tensor.__reduce_ex__, Tensor.__dlpack__),
    *(Tensor.tolist, Tensor.untyped_storage, Tensor.data_ptr),
}
_READING_VIEWS: set[Any] = {READS_BASE, READS_WHETHER_VIEW}
_READING_MARKS = {READS_NODE, *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf"))}
"""What tells of a mark, which has no effect on the levels."""
_HEEDED = MARKS | EFFECTS | inner_gradients.TAKING | _READING_MEMORY | _READING_VIEWS | _READING_MARKS
