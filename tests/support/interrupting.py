"""Interrupts at any point of a run, and what they must leave as it was."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from inspect import CO_GENERATOR
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode

from funcstage._torch import functorch as ft
from funcstage._torch import interception as _interception

OWN_APPLY: Any = Function.__dict__["apply"]


FAIL: list[BaseException] = []


class Brittle(Function):
    """The identity, whose backward fails when told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if FAIL:
            raise FAIL.pop()
        return grad.clone()


def state_of_everything(module: nn.Module) -> tuple[Any, ...]:
    return (
        ft.current_level(),
        _len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled(),
        ft.saving_refused(),
        ft.saving_hooks(),
        _interception.current(),
        Function.__dict__["apply"] is OWN_APPLY,
        getattr(getattr(OWN_APPLY, "__func__", None), "__code__", None),
        torch.random.default_generator is torch.default_generator,
        [id(tensor) for tensor in (*module.parameters(), *module.buffers())],
    )


class Interrupt:
    """Raises once, at the n-th call of a Python function, or the next one if that is a generator.

    Python swallows what is raised in a generator that it is closing, and leaves its blocks half done.
    """

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event == "call"
        if event == "call" and 0 < self.n <= self.calls and not frame.f_code.co_flags & CO_GENERATOR:
            sys.setprofile(None)
            self.n = 0  # once, though a recorder sets it again
            raise KeyboardInterrupt


class Nested:
    """Raises at the n-th call of a Python function, and again each of these many calls later.

    A profiler that raises is taken away, so that a tracer sets it anew. What comes later interrupts what puts
    things back after the interrupt before.
    """

    def __init__(self, n: int, later: Sequence[int]) -> None:
        self.left: int | None = n
        self.later = [*later]
        self.raised = 0

    def trace(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and self.left is not None:
            self.left -= 1
            if self.left <= 0 and not frame.f_code.co_flags & CO_GENERATOR:
                self.left = self.later.pop(0) if self.later else None
                sys.setprofile(self._raise)

    def _raise(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            self.raised += 1
            raise KeyboardInterrupt


# No collection comes in between: Python swallows what is raised in callbacks and finalizers that it calls.


def interrupted_again(run: Callable[[], object], call: int, later: Sequence[int]) -> int:
    """Run something, interrupt it at a call, and interrupt the undoing of that; return how often."""
    tracer, profiler, nested = sys.gettrace(), sys.getprofile(), Nested(call, later)
    ignored, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what generators raise that are freed
    gc.disable()
    sys.settrace(nested.trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
        sys.setprofile(profiler)
        gc.enable()
        gc.collect(0)
        sys.unraisablehook = ignored
    return nested.raised


def calls_of(run: Callable[[], object]) -> int:
    """How many Python functions are called in a run."""
    counter, profiler = Interrupt(-1), sys.getprofile()
    gc.disable()
    sys.setprofile(counter)
    run()
    sys.setprofile(profiler)
    gc.enable()
    return counter.calls


def interrupted(run: Callable[[], object], call: int) -> None:
    """Run something, and interrupt it at a call."""
    profiler = sys.getprofile()
    gc.disable()
    sys.setprofile(Interrupt(call))
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(profiler)
        gc.enable()
    gc.collect(0)


class Interrupts(TorchDispatchMode):
    """Raises an error instead of running operation number `at`."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error("in the midst of a pass")
        return function(*args, **(kwargs or {}))


def drop_what_autograd_left() -> None:
    """Run a backward: until a thread's next one autograd keeps what a failed one had not come to."""
    torch.ones((), requires_grad=True).square().backward()
