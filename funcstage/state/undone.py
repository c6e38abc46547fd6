"""Interrupts: whatever a call had entered when it was broken off is left again.

`with` and `finally` see to that as long as exceptions come out of what they surround. An interrupt (Ctrl-C,
an alarm, a profiler) comes between any two instructions, those of entering and leaving among them. So what a
call has found is noted first, and put back if it fails in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

import torch

from funcstage import forks
from funcstage._torch import calls as _calls
from funcstage._torch import dynamo as _dynamo
from funcstage._torch import functorch as ft
from funcstage._torch import interception as _interception
from funcstage._torch import modes
from funcstage._torch.messages import NOT_ENTERED, says

Function = TypeVar("Function", bound=Callable[..., Any])


def undone_if_interrupted(function: Function) -> Function:
    """Let a function that fails leave levels, modes, settings and patches as it found them."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        levels, entered, grad = ft.current_level(), modes.function_modes(), torch.is_grad_enabled()
        hooks, refusal, asked = ft.saving_hooks(), ft.saving_refused(), _interception.current()
        eager, dispatched, called = _dynamo.runs_eagerly(), modes.dispatch_modes(), _calls.current()
        lent = forks.lending()

        def undo(error: BaseException) -> None:
            _close_contexts(error)
            while modes.dispatch_modes() > dispatched:
                modes.pop_dispatch_mode()
            modes.restore_function_modes(entered)
            ft.close_to(levels)
            ft.drop_saving_hooks(hooks)
            ft.refuse_saving(refusal)
            _dynamo.run_eagerly(eager)
            _interception.restore(asked)
            _calls.restore(called)
            forks.returned(lent)
            modes.set_grad_enabled(grad)

        try:
            return function(*args, **kwargs)
        except BaseException as error:
            undone: BaseException = error
            for _ in range(_TIMES):
                try:
                    undo(undone)
                    break
                except BaseException as later:  # another interrupt, of which the one before is the context
                    undone = later
            interrupt = _interrupt_behind(error)
            if interrupt is not error:
                raise interrupt from None
            raise

    return run  # type: ignore[return-value]  # with the same parameters


_TIMES = 10
"""How often what undoes an interrupt is begun anew where it is interrupted itself."""


def _interrupt_behind(error: BaseException) -> BaseException:
    """What came between entering and leaving a mode, if that is why it could not be left."""
    found = error
    while isinstance(found, (RuntimeError, AssertionError)) and says(found, NOT_ENTERED):
        if found.__context__ is None:
            return error
        found = found.__context__
    return found


def _close_contexts(error: BaseException | None) -> None:
    """Let torch's context managers that an interrupt came into put modes back now, not when they are freed.

    What raises the interrupt, a handler of signals or a profiler, is given the frame that it came into. One
    that comes while another is dealt with has that as its context.
    """
    while error is not None:
        traceback = None if isinstance(error, Exception) else error.__traceback__
        while traceback is not None:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            name = str(frame.f_globals.get("__name__"))
            if traceback is None or name.partition(".")[0] in ("torch", "contextlib"):
                with suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__context__
