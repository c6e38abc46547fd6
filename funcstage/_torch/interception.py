"""What is hidden from a `TorchFunctionMode`: checkpointed regions, custom autograd functions, and threads.

The first two are plain Python calls that reach a mode as what they consist of, if at all, however they were
imported. While a stage runs, its calls of `torch.utils.checkpoint.checkpoint` and of
`torch.autograd.Function.apply` in the same thread go to an interceptor instead; everything else, and
everybody once no stage runs, has torch's own. What a stage lets other threads do reaches no mode at all, so
the interceptor is told where it starts one, gives one something to do, or waits for one. It is not where that
is done in C alone, as by a `queue.SimpleQueue` both there and back: `state/shared.py` looks for those before.
Private: `__dynamo_disable`, which torch's wrapper of
`checkpoint` looks up in every call, and the code of `Function.apply`. `tests/_torch/test_private_api.py`
says so when they move.
"""

from __future__ import annotations

import functools
import inspect
import queue
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from funcstage._torch.patches import Patch


class Interceptor(Protocol):
    """What is asked in place of torch."""

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        """Run a checkpointed region; `call` has all of the parameters of `checkpoint`."""

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        """Apply a custom autograd function; `apply` is its own."""

    def thread(self) -> None:
        """Hear that another thread is about to be given something to do."""

    def waits(self) -> None:
        """Hear that this thread is about to wait for another one."""


class intercepting:
    """Ask `interceptor` about the calls of this thread, or nobody."""

    def __init__(self, interceptor: Interceptor | None) -> None:
        self._interceptor = interceptor
        self._before = current()

    def __enter__(self) -> None:
        _current.interceptor = self._interceptor
        _patches.hold(self._before.depth + 1)

    def __exit__(self, *error: object) -> None:
        restore(self._before)


class Current(NamedTuple):
    """Who is asked in this thread, and how many have asked to be."""

    interceptor: Interceptor | None
    depth: int


def current() -> Current:
    """What holds in this thread."""
    return Current(_current.interceptor, _patches.depth())


def restore(before: Current) -> None:
    """Let it hold again."""
    _patches.hold(before.depth)
    _current.interceptor = before.interceptor


def current_interceptor() -> Interceptor | None:
    """The interceptor that is asked about calls of this thread."""
    return _current.interceptor


def copied_otherwise() -> dict[int, Callable[[Any, Any], Any]]:
    """How parameters are copied in this thread that are not copied as all are, by their ids."""
    return _current.copied


class _OfThread(threading.local):
    interceptor: Interceptor | None = None

    def __init__(self) -> None:
        self.copied: dict[int, Callable[[Any, Any], Any]] = {}


_current = _OfThread()
_BODY: Any = checkpoint.__wrapped__  # type: ignore[attr-defined]
_DISABLED = "__dynamo_disable"
_PARAMETERS = inspect.signature(_BODY)


class _Patches(Patch):
    """All of these, while any stage runs in any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._in_place: bool | None = False  # None while that changes
        self._checkpoint: Any = None

    @property
    def _users(self) -> int:
        return sum(self._depths.values())

    def _put(self, wanted: bool) -> None:
        if self._in_place is wanted:
            return
        if self._in_place is False:
            self._checkpoint = getattr(_BODY, _DISABLED, None)
        self._in_place = None
        if wanted:
            setattr(_BODY, _DISABLED, self._asked_checkpoint())
        elif self._checkpoint is not None:
            setattr(_BODY, _DISABLED, self._checkpoint)
        elif hasattr(_BODY, _DISABLED):
            delattr(_BODY, _DISABLED)
        _set_apply(asked=wanted)
        _set_threads(asked=wanted)
        kind: Any = torch.nn.Parameter
        kind.__deepcopy__ = _asked_copy if wanted else _OWN_COPY
        self._in_place = wanted

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
            stops_early = torch.utils.checkpoint._enable_checkpoint_early_stop  # set_checkpoint_early_stop
            if stops_early is not None:
                call.arguments["early_stop"] = stops_early
            return interceptor.checkpoint(call)

        return asked


class _Asking(Function):
    """Holds what takes the place of `Function.apply`."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore[name-defined]  # noqa: B018  # torch's code has this free variable too
        from funcstage._torch.interception import asked_to_apply

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
        kind: Any = Function
        kind.apply = _Asking.__dict__["apply"] if asked else _IN_CLASS


_OWN_COPY: Any = torch.nn.Parameter.__deepcopy__


@functools.wraps(_OWN_COPY)
def _asked_copy(parameter: Any, memo: Any) -> Any:
    return _current.copied.get(id(parameter), _OWN_COPY)(parameter, memo)


_GIVING: Any = (
    (threading.Thread, "start"),
    (ThreadPoolExecutor, "submit"),
    (queue.Queue, "put"),
    (Pool, "apply_async"),
    (Pool, "_map_async"),
    (Pool, "imap"),
    (Pool, "imap_unordered"),
    # What tells a thread that there is something to do, wherever that lies; before it changes anything.
    (threading.Event, "set"),
    (threading.Semaphore, "release"),
    (threading.BoundedSemaphore, "release"),
    (threading.Condition, "__enter__"),
)
_WAITING: Any = ((threading.Event, "wait"), (threading.Condition, "wait"), (queue.Queue, "get"))
_HEARD_OF: Any = (*_GIVING, *_WAITING)
_OWN: Any = tuple(vars(kind)[name] for kind, name in _HEARD_OF)


def _told(own: Callable[..., Any], waits: bool) -> Callable[..., Any]:
    @functools.wraps(own)
    def giving(*args: Any, **kwargs: Any) -> Any:
        interceptor = current_interceptor()
        if interceptor is not None:
            (interceptor.waits if waits else interceptor.thread)()
        return own(*args, **kwargs)

    return giving


_TOLD: Any = tuple(_told(own, where in _WAITING) for own, where in zip(_OWN, _HEARD_OF, strict=True))


def _set_threads(*, asked: bool) -> None:
    found, instead = (_OWN, _TOLD) if asked else (_TOLD, _OWN)
    for (kind, name), own, other in zip(_HEARD_OF, found, instead, strict=True):
        if vars(kind)[name] is own:  # and no debugger's
            setattr(kind, name, other)


_patches = _Patches()
