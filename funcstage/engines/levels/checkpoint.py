"""Checkpointed regions: their forward keeps nothing, and they are run again where gradients need them.

`torch.utils.checkpoint` recomputes when autograd first asks for a saved tensor, which happens twice in a
split backward. Here a region is split as a stage within the stage. Its forward runs under levels of its
own, from which nothing is kept but the values of the result. On the tape of the inputs it is one
operation, `Recomputed`, whose backward runs it again, with the tape this time; I takes the input
gradients from that, and W the weight gradients later, so that both come from one recomputation. A region
that depends on parameters alone lies on the tape of the weights, and is run again in W. A region within a
region is computed again with that, and not once more: what it would save is memory during I.

What a region reads need not be among its arguments: parameters and activations are also found in
modules and closures. Whatever is read in the first run and was there before is *captured*, and fresh
leaves stand in for it in the second.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.modules import own_cached_weights
from funcstage.engines.levels.first_run import Numbers, Operations
from funcstage.errors import StageError
from funcstage.state.ambient import AmbientState, RandomState, among, of_process, of_torch
from funcstage.state.at_once import at_once
from funcstage.state.before import undone
from funcstage.state.cells import closed_over, defaults_of
from funcstage.state.elsewhere import reads_instead
from funcstage.state.module import locked, state_of, steps_to, swapped
from funcstage.state.reach import reached


class Place(NamedTuple):
    """Stands in a region's arguments for the captured tensor that was there."""

    number: int


class Call(NamedTuple):
    """What `torch.utils.checkpoint.checkpoint` was called with.

    Attributes:
        function: what is to be run again.
        args: its positional arguments.
        kwargs: its keyword arguments.
        reentrant: whether torch's reentrant form was asked for, its default.
        preserve_rng_state: whether the second run draws the same random numbers.
        early_stop: whether the second run may stop where nothing more is needed.
        context_fn: makes the contexts of the two runs.
        constant: whether its result has no gradient: the reentrant form gives none but through its arguments.
            Torch warns of it.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reentrant: bool
    preserve_rng_state: bool
    early_stop: bool
    context_fn: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
    constant: bool

    @classmethod
    def of(
        cls,
        call: inspect.BoundArguments,
        requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad"),
    ) -> Call:
        """Read a call; `requires_grad` tells of an argument whether it does."""
        given = call.arguments
        args, kwargs = given.get("args", ()), dict(given.get("kwargs", {}))
        reentrant = given["use_reentrant"] is not False
        return cls(
            given["function"],
            args,
            kwargs,
            reentrant,
            kwargs.pop("preserve_rng_state", True),
            given["early_stop"],
            given["context_fn"],
            reentrant and not any(requires_grad(arg) for arg in args if isinstance(arg, Tensor)),
        )

    def run(self) -> Any:
        """Run the function as it is, without gradients where its result has none."""
        with torch.no_grad() if self.constant else nullcontext():
            return self.function(*self.args, **self.kwargs)


class Region:
    """A checkpointed call, as it was made and as it can be made again.

    Attributes:
        read: maps what it may find of its module's in other places to what stands in for that.
    """

    def __init__(self, call: Call, owner: nn.Module | None) -> None:
        """`owner` is the stage's module: where no module can be found in the call, any may be used."""
        self._function = call.function
        self._reentrant = call.reentrant
        leaves, self._spec = trees.flatten((call.args, call.kwargs))
        self.read = reads_instead() or _as_it_is
        self._leaves = [*map(self.read, leaves)]
        self._first, self._second = call.context_fn()
        modules = set(modules_in([call.function, *self._leaves]))
        if not modules and owner is not None:
            modules.update(owner.modules())
        self._owner = owner
        self._modules = state_of(modules)
        self._operations = Operations() if call.early_stop and not call.reentrant else None
        self._numbers = None if call.reentrant else Numbers()
        inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._ambient = AmbientState.now()
        devices = (tensor.device for tensor in inputs)
        self._random = RandomState(of_torch(devices) if call.preserve_rng_state else ())
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def run(self) -> Any:
        """Run the function as it was called."""
        args, kwargs = trees.unflatten(self._spec, self._leaves)
        with ExitStack() as stack:
            stack.enter_context(self._first)
            stack.enter_context(own_cached_weights())
            if self._operations is not None:
                stack.enter_context(self._operations.noted())
            stack.enter_context(torch.set_grad_enabled(not self._reentrant))
            if self._numbers is not None:
                stack.enter_context(self._numbers.noted())
            return self._function(*args, **kwargs)

    def run_again(self, stand_ins: Sequence[Any]) -> Any:
        """Run the function on what stands in for the captured tensors."""
        leaves = [stand_ins[leaf.number] if isinstance(leaf, Place) else leaf for leaf in self._leaves]
        args, kwargs = trees.unflatten(self._spec, leaves)
        with self._ambient.restored(), self._random.again(), locked(self._owner):
            back = steps_to(state_of([state.module for state in self._modules]))
            owners = [state.module for state in self._modules] if self._owner is None else [self._owner]
            try:
                with ExitStack() as stack:
                    stack.enter_context(undone(owners))
                    stack.enter_context(swapped(self._modules))
                    stack.enter_context(self._second)
                    if self._operations is not None:
                        generators = *of_process(), *among(reached(owners))
                        stack.enter_context(self._operations.cut_short(generators))
                    stack.enter_context(StandIns(functools.partial(self.stand_in, stand_ins)))
                    if self._numbers is not None:
                        stack.enter_context(self._numbers.passed_again())
                    return self._function(*args, **kwargs)
            except BaseException:
                at_once(back)  # an interrupt may come between leaving and what that does
                raise

    def forget(self, saved: Any) -> None:
        """Keep nothing of what the first run saves for a backward, except that it does."""
        if self._operations is not None:
            self._operations.saved()

    def capture(self, tensor: Tensor) -> None:
        """Note a tensor that the region reads and that was there before."""
        self._places[id(tensor)] = weakref.ref(tensor), len(self._places)

    def place(self, leaf: Any) -> int | None:
        """Which of the captured tensors something is.

        They are known by identity and not kept alive here: what can be read again is held by the function.
        """
        known = self._places.get(id(leaf))
        return known[1] if known is not None and known[0]() is leaf else None

    def stand_in(self, stand_ins: Sequence[Any], leaf: Any) -> Any:
        """What stands in for something in the second run: itself, unless it was captured."""
        leaf = self.read(leaf)
        place = self.place(leaf)
        if place is None and isinstance(leaf, nn.Parameter):
            raise StageError(
                f"A checkpointed region reads a parameter ({trees.describe(leaf)}) in its second run that it "
                "did not read in the first: its module was not found. Pass the module to `checkpoint`, or a "
                "function that holds it."
            )
        return leaf if place is None else stand_ins[place]

    def constants(self) -> Iterator[Tensor]:
        """Tensors that a second run may read besides the captured ones."""
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                yield leaf
        for state in self._modules:
            for tensor in (*state.params.values(), *state.buffers.values()):
                if tensor is not None and not ft.is_dead(tensor):
                    yield tensor

    def release(self, unwrapped: Callable[[Any], Any]) -> None:
        """Let go of the arguments, and take what it has assigned to buffers out of its levels."""
        places = [self.place(leaf) for leaf in self._leaves]
        self._leaves = [
            leaf if place is None else Place(place) for leaf, place in zip(self._leaves, places, strict=True)
        ]
        for state in self._modules:
            for name, buffer in state.module._buffers.items():
                if buffer is not state.buffers.get(name):
                    state.module._buffers[name] = unwrapped(buffer)


def _as_it_is(leaf: Any) -> Any:
    return leaf


class StandIns(TorchFunctionMode):
    """Passes to operations what stands in for their operands."""

    def __init__(self, of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.of = of

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = trees.map_leaves(self.of, (args, kwargs or {}))
        return func(*args, **kwargs)


class Rerun:
    """What `Recomputed` asks for gradients.

    Attributes:
        values: the differentiable results of the first run, until they are taken.
        first_kept: how many of the captured tensors it needs no more.
    """

    values: tuple[Tensor, ...]
    first_kept: int = 0

    def vjp(self, captured: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Run the region again: gradients of those captured tensors that come first."""
        raise NotImplementedError

    def reads(self) -> Iterator[Tensor]:
        """What the region reads that was not captured, and that is no parameter."""
        raise NotImplementedError


class Recomputed(Function):
    """A region as one operation, from captured tensors to the values that its first run has left."""

    @staticmethod
    def forward(rerun: Rerun, *captured: Tensor) -> tuple[Tensor, ...]:
        values, rerun.values = rerun.values, ()
        return tuple(value.detach() for value in values)  # none of them is a captured tensor itself

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rerun, *captured = inputs
        ctx.n_captured = len(captured)
        ctx.save_for_backward(*captured[ctx.rerun.first_kept :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        captured = [ft.without_dead_wrappers(tensor) for tensor in ctx.saved_tensors]
        grads = ctx.rerun.vjp(captured, cotangents)
        return None, *grads, *[None] * (ctx.n_captured - len(grads))


def modules_in(objects: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules that functions among these objects hold, with all that is in them."""
    stack = list(objects)
    seen: set[int] = set()
    while stack:
        found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, nn.Module):
            yield from found.modules()
        elif isinstance(found, functools.partial):
            stack += [found.func, *found.args, *found.keywords.values()]
        elif isinstance(found, types.MethodType):
            stack += [found.__self__, found.__func__]
        elif isinstance(found, types.FunctionType):
            stack += [*closed_over(found), *defaults_of(found)]
        elif isinstance(found, dict):
            stack += found.values()
        elif isinstance(found, (list, tuple)):
            stack += found
