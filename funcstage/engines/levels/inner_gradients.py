"""Stages that take gradients inside themselves: how the levels notice.

A force is the gradient of an energy, a penalty is made of gradients, an implicit layer takes them in its
backward. What differentiates inside of a stage reads tapes of its own, across both of the levels that the
stage is split by, and the sites between them. Such a stage is therefore split on a plain autograd tape
instead (`funcstage.engines.choose`), where a gradient is an operation as any other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from funcstage._torch.operators import make_dual
from funcstage.errors import StageError
from funcstage.state.cells import closed_over
from funcstage.state.subclasses import is_told


class TakesGradients(BaseException):
    """Leaves a stage's run under the levels, through whatever errors the stage itself handles."""


def takes_gradients(function: Any) -> bool:
    """Tell whether a function of torch reads, or makes, a tape or a tangent."""
    return function in TAKING


def refused(what: str) -> StageError:
    """The refusal where a plain tape will not do: what surrounds the stage differentiates it in turn."""
    return StageError(
        f"The stage takes gradients inside itself, by {what}, and is differentiated in turn: by torch.func, "
        "or because parameters or arguments require grad. The split cannot do both. Pass detached parameters "
        "and arguments; for higher derivatives transform `apply` itself, without stage_vjp."
    )


def makes_dtensors(function: str) -> StageError:
    """The refusal where a plain tape will not do for DTensors either."""
    return _in_turn(f"makes DTensors inside itself ({function})")


def meet_subclasses(kinds: Iterable[type], alone: bool) -> None:
    """Leave the run where a stage computes with tensors of the user's classes, which a plain tape takes.

    Raises:
        TakesGradients: where there is one, if the stage is `alone`.
        StageError: if it is not.
    """
    for kind in filter(is_told, kinds):
        if alone:
            raise TakesGradients
        raise _in_turn(f"computes with tensors of a class of its own ({kind.__qualname__})")


def starts_threads() -> StageError:
    """The refusal where a plain tape will not do for threads either."""
    return _in_turn("starts threads inside itself, or gives them something to do")


def waits_for_threads() -> StageError:
    """The refusal where a thread may have computed already, and gradients would end there."""
    return StageError(
        "The stage waits for another thread, and was not seen to give it anything to do (by a "
        "queue.SimpleQueue, say): what that thread computes would have no gradient. Give it work by a "
        "queue.Queue, a threading.Event or an executor of concurrent.futures, or wait outside of the stage."
    )


def runs_in_cpp() -> StageError:
    """The refusal where a plain tape will not do for gradients that are written in C++ either."""
    return _in_turn(
        "uses an operator whose gradient is a C++ torch::autograd::Function (such as torch 2.11's and 2.12's "
        "differentiable collectives)",
        ", or wrap the operator, without its gradient, in a torch.autograd.Function",
    )


def _in_turn(does: str, or_else: str = "") -> StageError:
    return StageError(
        f"The stage {does}, and is differentiated in turn: by torch.func, or because parameters or arguments "
        f"require grad. Pass detached parameters and arguments{or_else}."
    )


def differentiates(function: Any) -> bool:
    """Tell whether a hook, or the backward of a custom function, takes gradients itself.

    Its code, and that of the functions it refers to, is searched for what doing so takes. One that only looks
    so is split on a plain tape as well, which is right for it too.
    """
    try:
        return _differentiates(function)
    except TypeError:  # not hashable
        return _differentiates.__wrapped__(function)


def backward_differentiates(function: type[Function]) -> bool:
    """Tell whether a custom function's backward takes gradients."""
    return differentiates(function.backward) or differentiates(function.vjp)


class Refusing(TorchFunctionMode):
    """Refuses gradients taken in the backward of a custom function that did not look so in F."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if takes_gradients(func):
            raise StageError(
                f"The backward of {self._function} takes gradients itself, in something that it calls, where "
                "F could not see it. Write `with torch.enable_grad():` in that backward itself, or compile "
                "the stage with funcstage.compile."
            )
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=1024)
def _differentiates(function: Any) -> bool:
    return any(_NAMES.intersection(code.co_names) for code in codes(function))


def codes(function: Any) -> Iterator[types.CodeType]:
    """The code of a function, of those within it, and of those it calls by global names or closes over."""
    stack, seen = [function], set[int]()
    while stack:
        found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, functools.partial):
            stack.append(found.func)
        elif isinstance(found, types.MethodType):
            stack.append(found.__func__)
            if isinstance(found.__self__, torch.enable_grad):  # a decorator's
                stack.append(_grad_mode_of_decorators)
        elif isinstance(found, types.CodeType):
            yield found
            stack += found.co_consts
        elif isinstance(found, types.FunctionType) and not _is_torchs(found):
            stack.append(found.__code__)
            stack += [found.__globals__.get(name) for name in found.__code__.co_names]
        if isinstance(found, types.FunctionType):
            stack += closed_over(found)


def _grad_mode_of_decorators() -> None:
    torch.set_grad_enabled(True)


def _is_torchs(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


BACKWARD_CALLED = (
    "The stage calls backward(), which adds into the `.grad` of its parameters and arguments. Take the "
    "gradient by torch.autograd.grad(..., create_graph=True), or call backward(inputs=[...]) with tensors of "
    "the stage's own."
)
_NAMES = {"autograd", "enable_grad", "set_grad_enabled", "inference_mode"}
"""Without one of these a backward, which runs without a tape, has nothing to take gradients of."""

TAKING: set[Any] = {
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
    make_dual,
}
