"""What torch hides from a `TorchFunctionMode`: checkpointed regions and custom autograd functions.

Both are plain Python calls that reach a mode as what they consist of, if at all, however they were
imported. While a stage runs, its calls of `torch.utils.checkpoint.checkpoint` and of
`torch.autograd.Function.apply` in the same thread go to an interceptor instead; everything else, and
everybody once no stage runs, has torch's own.
Private: `__dynamo_disable`, which torch's wrapper of
`checkpoint` looks up in every call, and the code of `Function.apply`. `tests/test_private_api.py` says so
when they move.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint


class Interceptor(Protocol):
    """What is asked in place of torch."""

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        """Run a checkpointed region; `call` has all of the parameters of `checkpoint`."""

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        """Apply a custom autograd function; `apply` is its own."""


@contextmanager
def intercepting(interceptor: Interceptor) -> Iterator[None]:
    """Ask `interceptor` about the calls of this thread."""
    before = current_interceptor()
    _current.interceptor = interceptor
    _patches.enter()
    try:
        yield
    finally:
        _patches.leave()
        _current.interceptor = before


def current_interceptor() -> Interceptor | None:
    """The interceptor that is asked about calls of this thread."""
    return getattr(_current, "interceptor", None)


_current = threading.local()
_BODY: Any = checkpoint.__wrapped__  # type: ignore[attr-defined]
_DISABLED = "__dynamo_disable"
_PARAMETERS = inspect.signature(_BODY)


class _Patches:
    """The patches, in place while any stage runs in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._checkpoint: Any = None

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._checkpoint = getattr(_BODY, _DISABLED, None)
                setattr(_BODY, _DISABLED, self._asked_checkpoint())
                _set_apply(asked=True)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if self._checkpoint is None:
                    delattr(_BODY, _DISABLED)
                else:
                    setattr(_BODY, _DISABLED, self._checkpoint)
                _set_apply(asked=False)

    def _asked_checkpoint(self) -> Callable[..., Any]:
        original = self._checkpoint

        def asked(*args: Any, **kwargs: Any) -> Any:
            interceptor = current_interceptor()
            if interceptor is None:
                # Made by torch in the first call, as it takes a second.
                run = original or torch._dynamo.disable(_BODY, wrapping=False)
                return run(*args, **kwargs)
            call = _PARAMETERS.bind(*args, **kwargs)
            call.apply_defaults()
            return interceptor.checkpoint(call)

        return asked


class _Asking(Function):
    """Holds what takes the place of `Function.apply`."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore[name-defined]  # noqa: B018  # torch's code has this free variable too
        from funcstage._interception import asked_to_apply

        return asked_to_apply(cls, args, kwargs)


def asked_to_apply(function: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a custom function, or ask the interceptor of this thread to."""
    own = _OWN_APPLY.__get__(None, function)
    interceptor = current_interceptor()
    if interceptor is None or kwargs or not torch._C._are_functorch_transforms_active():
        return own(*args, **kwargs)
    return interceptor.custom_function(own, function, args)


_IN_CLASS: Any = Function.__dict__["apply"]
_IN_PYTHON = isinstance(_IN_CLASS, classmethod)
"""Up to torch 2.13. Its code is exchanged, so that an `apply` that was bound before is found too."""


def _copied(method: Any) -> Any:
    function = method.__func__
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return classmethod(copy)


_OWN_APPLY: Any = _copied(_IN_CLASS) if _IN_PYTHON else _IN_CLASS


def _set_apply(*, asked: bool) -> None:
    if _IN_PYTHON:
        source = _Asking.__dict__["apply"] if asked else _OWN_APPLY
        _IN_CLASS.__func__.__code__ = source.__func__.__code__
    else:
        Function.apply = _Asking.__dict__["apply"] if asked else _IN_CLASS  # type: ignore[method-assign]


_patches = _Patches()
