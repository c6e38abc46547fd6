"""Functions that torch.compile has compiled, inside of stages: they run there as they were written.

Levels and traces cannot see into a compiled function, whose forward and backward are whole; what it was
made from they split as everything else. Nothing that other threads see is changed meanwhile: whether this
thread is in a stage is kept apart for each thread, and torch.compile elsewhere goes on compiling.
Private: the thread's own "nested compile" setting, and before torch 2.14, which has none, the functions that
all compiled functions ask what to do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from funcstage import forks


class uncompiled:  # no generator: see `funcstage.state.undone`
    """Let compiled functions run as they were written, in this thread."""

    _eager = True

    def __enter__(self) -> None:
        self._before = runs_eagerly()
        run_eagerly(self._eager)

    def __exit__(self, *error: object) -> None:
        run_eagerly(self._before)


class compiled_again(uncompiled):
    """Let torch.compile work within `uncompiled`."""

    _eager = False


def runs_eagerly() -> bool:
    """Tell whether compiled functions of this thread run as they were written."""
    return bool(getattr(getattr(_eval_frame(), "_force_eager_nested_compile", _own), "depth", 0))


def run_eagerly(eager: bool) -> None:
    """Let them, or not."""
    eval_frame = _eval_frame()
    if eval_frame is None:
        return
    setting = getattr(eval_frame, "_force_eager_nested_compile", _own)
    if setting is _own and eager:
        _install(eval_frame)
    setting.depth = int(eager)


def _eval_frame() -> Any:
    return sys.modules.get(_EVAL_FRAME)  # without it nothing is compiled; the import takes a second


_EVAL_FRAME = "torch._dynamo.eval_frame"


class _OfThread(threading.local):
    depth = 0


_own = _OfThread()
_install_lock = forks.lock()


def _install(eval_frame: Any) -> None:
    """Put questions before torch's own, once; for a thread that is in no stage they change nothing."""
    with _install_lock:
        for name, in_stage in _ASKED.items():
            own_of_torch = getattr(eval_frame, name, None)
            if own_of_torch is not None and not hasattr(own_of_torch, "in_stage"):
                setattr(eval_frame, name, _asking(own_of_torch, in_stage))


def _asking(own_of_torch: Callable[[Any], Any], in_stage: Any) -> Callable[[Any], Any]:
    def ask(argument: Any) -> Any:
        return in_stage if _own.depth else own_of_torch(argument)

    ask.in_stage = in_stage  # type: ignore[attr-defined]
    return ask


_ASKED = {
    "_callback_from_stance": None,  # what is to be done with a frame: nothing
    "set_fullgraph_compiled_frame_count": 0,  # frames compiled so far: one that compiles none is no error
}
"""What torch before 2.14 asks about every call of a compiled function, with the answers within a stage."""


def disable_cache_limit() -> AbstractContextManager[None]:
    """Let Dynamo compile one function as often as it is asked to."""
    from torch._dynamo import utils

    return utils.disable_cache_limit()
