"""Interrupts: whatever a call had entered when it was broken off is left again.

`with` and `finally` see to that as long as exceptions come out of what they surround. An interrupt (Ctrl-C,
an alarm, a profiler) comes between any two instructions, those of entering and leaving among them. So what a
call has found is noted first, and put back if it fails in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

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
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            while modes.dispatch_modes() > dispatched:
                modes.pop_dispatch_mode()
            while modes.function_modes() > entered:
                modes.pop_function_mode()
            ft.close_to(levels)
            ft.drop_saving_hooks(hooks)
            ft.refuse_saving(refusal)
            _dynamo.run_eagerly(eager)
            _interception.restore(asked)
            _calls.restore(called)
            modes.set_grad_enabled(grad)
            interrupt = error.__context__
            left = isinstance(error, RuntimeError) and says(error, NOT_ENTERED)
            if left and interrupt is not None:
                raise interrupt from None
            raise

    return run  # type: ignore[return-value]  # with the same parameters
