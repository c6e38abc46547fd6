"""A recording that other threads do not notice, and that a stage's libraries take for a compilation.

While torch.fx records, it patches `nn.Module` for the whole process, in a way that two threads break, and
before torch 2.14 says to all threads that somebody records, so that their compiled functions refuse to run.
Neither is needed here.

Model libraries read the values of masks to choose a faster way, unless they are compiled: they ask
`torch.compiler.is_compiling`, whose answer is a setting of the process. While a stage is traced that
function asks for the thread first; torch's own code, which would go other ways, gets torch's answer.
The Python of what is recorded, which each pass would write again, is left until somebody reads it.
Private: who patches, the flag, that the function is Python, and graph modules that wait with theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import _symbolic_trace
from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazy_graph_modules


@contextmanager
def recording() -> Iterator[None]:
    """Put around a call of `make_fx`, of which there is one at a time."""
    functions = (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling)
    codes = [function.__code__ for function in functions]
    _thread.traces += 1
    _thread.starts = True
    _symbolic_trace._new_patcher = _patching
    for function, asking in zip(functions, (_is_compiling, _is_dynamo_compiling), strict=True):
        function.__code__ = asking.__code__
    try:
        with lazy_graph_modules(True):
            yield
    finally:
        for function, code in zip(functions, codes, strict=True):
            function.__code__ = code
        _symbolic_trace._new_patcher = _OF_TORCH
        _thread.traces -= 1


def unsay() -> None:
    """Take back what the recorder has told all threads; called first in what is recorded."""
    if isinstance(getattr(_symbolic_trace, _FLAG, None), bool):
        setattr(_symbolic_trace, _FLAG, False)


class _OfThread(threading.local):
    traces = 0
    starts = False


class _Nothing(_symbolic_trace._Patcher):
    """Patches nothing."""

    def patch(self, *args: Any, **kwargs: Any) -> None:
        pass

    def patch_method(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def _patching() -> Iterator[Any]:
    """What a recorder patches with: the stage's with nothing, others, in it or in other threads, as ever."""
    if _thread.starts:
        _thread.starts = False
        yield _Nothing()
    else:
        with _OF_TORCH() as patcher:
            yield patcher


_thread = _OfThread()
_OF_TORCH: Any = _symbolic_trace._new_patcher
_FLAG = "_is_fx_tracing_flag"


def is_seen_compiling(caller: Any) -> bool:
    """Tell whether the code of a frame is to think that it is compiled."""
    if not _thread.traces:
        return False
    name = caller.f_globals.get("__name__", "")
    if name in _FORWARDING:
        name = caller.f_back.f_globals.get("__name__", "")
    return not name.startswith(("torch.", "funcstage.")) or name.startswith(_OF_MODULES)


_FORWARDING = {"torch._utils", "torch._dynamo.external_utils"}
"""Where further names of `torch.compiler.is_compiling` are."""

_OF_MODULES = ("torch.nn.modules.transformer",)
"""Parts of torch that read values unless they are compiled."""


# Their code runs in place of that of `torch.compiler`, with its globals.
def _is_compiling() -> bool:
    import sys

    from funcstage._torch.fx import is_seen_compiling

    if torch.jit.is_scripting():
        return False
    return is_seen_compiling(sys._getframe(1)) or _is_compiling_flag  # type: ignore[name-defined]  # noqa: F821


def _is_dynamo_compiling() -> bool:
    import sys

    from funcstage._torch.fx import is_seen_compiling

    return is_seen_compiling(sys._getframe(1))
