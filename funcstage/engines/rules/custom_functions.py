"""Custom autograd functions and operators under the levels of `torch.func`.

For a function whose `forward` takes `ctx` torch asks for a separate `setup_context`, as the forward runs
once, below all levels, and each level keeps a context of its own. What the forward leaves in `ctx` can be
handed on to all of them, though: a `Context` takes its place in the forward, and every level's backward
sees a copy of it, with the saved tensors and `needs_input_grad` of that level. So I calls the function's
backward with `needs_input_grad` true for activations, and W for parameters.

`torch.library` makes such a function of an operator's autograd formula, and applies it inside of the
dispatcher. It is taken out from there, and applied in the same way.
Private: what `torch._library.autograd` calls its variables.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor
from torch.autograd import Function

from funcstage._torch import functorch as ft
from funcstage._torch.custom import (
    BackwardHookFunction,
    SingleLevelFunction,
    enable_single_level_autograd_function,
    registered,
)
from funcstage._torch.operators import OpOverload, OpOverloadPacket, given_to, namespace_of
from funcstage.engines.levels import inner_gradients
from funcstage.engines.rules.turns import Turns, copied, looks_writing
from funcstage.errors import StageError


class Context:
    """What a forward or backward sees as `ctx`; it takes any attribute, as torch's does.

    Attributes:
        needs_input_grad: for every argument whether its gradient is wanted; in the forward, by any level.
        saved_tensors: what the forward has saved; in the backward only.
    """

    saved_tensors: tuple[Tensor | None, ...]

    def __init__(self, function: type[Function], needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self._function = function
        self._noted = _Noted()
        self._turns = Turns()
        self._given: frozenset[int] = frozenset()
        self._made: frozenset[int] = frozenset()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._noted.saved = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """For forward-mode gradients, which a split backward has no use for."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        self._noted.dirty = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._noted.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._noted.materialized = value

    def forget(self, n_args: int) -> None:
        """Let go of what the forward has told, which would keep arguments and outputs alive."""
        tensors = self._noted.tensors or ()
        outputs_too = looks_writing(self._function.backward)
        self._given = frozenset(map(id, tensors[:n_args] if outputs_too else tensors))
        self._made = frozenset(i for i, t in enumerate(self._noted.saved) if id(t) not in self._given)
        del self._noted

    def at(self, ctx: Any, again: bool) -> Context:
        """A copy for one backward of the level that `ctx` belongs to.

        Args:
            ctx: the level's.
            again: whether another level will call the backward, so that this one must not write into what
                that reads.
        """
        copy = object.__new__(type(self))
        for name, value in self.__dict__.items():
            own = again and name not in _OURS
            copy.__dict__[name] = copied(value, self._given) if own else value
        copy.needs_input_grad = ctx.needs_input_grad[1:]
        saved = [None if t is None else ft.without_dead_wrappers(t) for t in ctx.saved_tensors]
        copy.saved_tensors = tuple(copied(t) if again and i in self._made else t for i, t in enumerate(saved))
        return copy


_OURS = frozenset(("needs_input_grad", "_function", "_noted", "_turns", "_given", "_made"))
"""Attributes of a context that are none of the function's."""


@dataclass(slots=True)
class _Noted:
    """What a forward has told its context, until every level has been told.

    Attributes:
        saved: what the backward will read.
        dirty: which arguments were overwritten.
        constant: which outputs have no gradient.
        materialized: whether absent cotangents become zeros.
        tensors: the arguments and outputs as the forward saw them.
    """

    saved: tuple[Tensor | None, ...] = ()
    dirty: tuple[Tensor, ...] = ()
    constant: tuple[Tensor, ...] = ()
    materialized: bool = True
    tensors: Sequence[Any] | None = None

    def tell(self, ctx: Any, tensors: Sequence[Any]) -> None:
        """Tell a level's own context the same of that level's arguments and outputs."""
        if self.tensors is None:
            self.tensors = tensors  # the lowest level comes first
        here = {id(below): tensor for below, tensor in zip(self.tensors, tensors, strict=True)}
        ctx.save_for_backward(*[here.get(id(tensor), tensor) for tensor in self.saved])
        ctx.mark_dirty(*[here[id(tensor)] for tensor in self.dirty])
        ctx.mark_non_differentiable(*[here[id(tensor)] for tensor in self.constant])
        ctx.set_materialize_grads(self.materialized)


class Formula(Exception):
    """Carries an operator's autograd formula out of the dispatcher."""

    def __init__(self, made: type[Function]) -> None:
        super().__init__(made.__name__)
        variables = inspect.getclosurevars(made.forward).nonlocals
        if "info" not in variables:
            raise StageError(
                f"The stage calls an operator with lists of tensors and an autograd formula "
                f"({made.__name__.removeprefix('GeneratedBackwardFor_')}), which torch.func cannot "
                "transform. Let it take its tensors one by one, or use funcstage.autograd on an eager tape."
            )
        self.function = _formula(variables["op"], variables["info"])


def is_formula(function: type[Function]) -> bool:
    """Tell whether a function is what `torch.library` has made of an operator's autograd formula."""
    return function.__module__ == "torch._library.autograd"


def may_have_formula(function: Any) -> bool:
    """Tell whether something is an operator of somebody else's."""
    return isinstance(function, (OpOverload, OpOverloadPacket)) and namespace_of(function) not in (
        "aten",
        "prims",
    )


def _formula(operator: Any, info: Any) -> type[Function]:
    setup, formula = registered(info)

    class Operator(Function):
        @staticmethod
        def forward(ctx: Any, keywords: dict[str, Any], *args: Any) -> Any:
            result = operator(*args, **keywords)
            if setup is not None:
                given, rest = given_to(operator, args, keywords)
                named = {"keyword_only_inputs": rest} if rest else {}
                setup(ctx=ctx, inputs=given, output=result, **named)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if formula is None:
                raise RuntimeError(
                    f"{operator} has no autograd formula: give it one by torch.library.register_autograd."
                )
            ctx.needs_input_grad = ctx.needs_input_grad[1:]
            found = formula(ctx, *grads)
            return None, *(found if isinstance(found, tuple) else (found,))

    return Operator


def takes_ctx(function: type[Function]) -> bool:
    """Tell whether a function's forward takes `ctx`."""
    return function.setup_context is Function.setup_context


def wants_context(function: type[Function]) -> bool:
    """Tell whether a function is to be applied with a `Context`.

    So is one with a setup_context whose backward looks as if it wrote into what it reads, unless it tells
    other transforms what to do, which it could not do then.
    """
    transformable = (
        function.generate_vmap_rule or function.vmap is not Function.vmap or function.jvp is not Function.jvp
    )
    return takes_ctx(function) or (not transformable and looks_writing(function.backward))


def applied(function: type[Function], args: Sequence[Any]) -> Any:
    """Apply a function with a `Context`, inside of a level."""
    if function is BackwardHookFunction:
        return _applied_to_wrappers(function, args)
    wanted = tuple(isinstance(arg, Tensor) and ft.requires_grad(arg) for arg in args)
    context = Context(function, wanted)
    result = _Bridge.apply(context, *args)
    context.forget(len(args))
    return result


def _applied_to_wrappers(function: type[Function], args: Sequence[Any]) -> Any:
    """Apply the identity by which modules hang up backward hooks, whose node they then look for by its name.

    As an identity it has no need of the values below the wrappers, which are on the tapes themselves.
    """
    methods = {"forward": function.forward, "backward": function.backward}
    here: Any = type(function.__name__, (SingleLevelFunction,), methods)
    with enable_single_level_autograd_function():
        return here.apply(*args)


class HasOwnTape:
    """Marks a function of ours that keeps a tape from its forward, and goes back over that alone."""


class _Bridge(Function):
    """A function whose forward takes `ctx`, in the form that `torch.func` can transform."""

    @staticmethod
    def forward(context: Context, *args: Any) -> Any:
        function = context._function
        if takes_ctx(function):
            return function.forward(context, *args)
        output = function.forward(*args)
        function.setup_context(context, args, output)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.context, *args = inputs
        needed = zip(args, ctx.needs_input_grad[1:], strict=True)
        ctx.shapes = [arg.shape if needs and isinstance(arg, Tensor) else None for arg, needs in needed]
        outputs = output if isinstance(output, tuple) else (output,)
        if any(ctx.needs_input_grad):  # or it is a level that will not call the backward
            ctx.turn = ctx.context._turns.enter()
        ctx.context._noted.tell(ctx, (*args, *outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        function = ctx.context._function
        has_own_tape = issubclass(function, HasOwnTape)
        again = ctx.context._turns.has_another(ctx.turn) and not has_own_tape
        context = ctx.context.at(ctx, again)
        grads = copied(grads) if again else grads
        with nullcontext() if has_own_tape else inner_gradients.Refusing(function.__name__):
            found = function.backward(context, *grads)
        found = found if isinstance(found, tuple) else (found,)
        _check_gradients(function, found, ctx.shapes)
        return None, *found

    @staticmethod
    def vmap(info: Any, in_dims: Any, context: Context, *args: Any) -> Any:
        raise _refused(context)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _refused(ctx.context)


def _check_gradients(function: type[Function], grads: tuple[Any, ...], wanted: Sequence[Size | None]) -> None:
    """Raise what torch raises of a function's own node: here it is ours, which takes one argument more.

    `wanted` are the shapes of the arguments, None where no gradient is needed.
    """
    name, n = f"{function.__name__}Backward", len(wanted)
    if len(grads) < n or any(grad is not None for grad in grads[n:]):
        raise RuntimeError(
            f"function {name} returned an incorrect number of gradients (expected {n}, got {len(grads)})"
        )
    for i, (grad, shape) in enumerate(zip(grads, wanted, strict=False)):
        if isinstance(grad, Tensor) and not grad.is_nested and shape and not _sums_to(grad.shape, shape):
            raise RuntimeError(
                f"Function {name} returned an invalid gradient at index {i} - got {list(grad.shape)} but "
                f"expected shape compatible with {list(shape)}"
            )


def _sums_to(shape: Size, wanted: Size) -> bool:
    """Tell whether a gradient is one of a tensor that was broadcast, which torch sums."""
    missing = len(shape) - len(wanted)
    return missing >= 0 and all(n in (1, m) for n, m in zip(wanted, shape[missing:], strict=True))


def _refused(context: Context) -> StageError:
    return StageError(
        f"The stage uses the torch.autograd.Function {context._function.__name__}, whose forward takes "
        "`ctx`: vmap and jvp cannot transform it. Give it a separate setup_context staticmethod, with the "
        "vmap or jvp that torch asks for then."
    )
