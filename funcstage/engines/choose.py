"""Which engine runs a call of a stage: the one place that knows them all.

A compiled stage brings its own. The levels take every other call but those that only plain autograd can
run: DTensors, whose class levels hide, and stages that take gradients or start threads inside themselves,
or use operators whose gradients are C++ `torch::autograd::Function`s.
So is one with tensors of a class of the user's, which levels hide, too: as soon as that is known.
A stage that can get at a queue, an event or the like runs on the tape at once: what other threads compute for
it is right there, and so is what they hand in. That a stage does anything else of the kind is seen in the
middle of its run, which is then given up: generators and the attributes of its module go back to what they
were, and it runs again. From then on it runs on the tape at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from funcstage.dtensors import first_dtensor
from funcstage.engines.base import Engine, Linearized, StageCall, is_differentiated
from funcstage.engines.levels import linearize as levels
from funcstage.engines.levels.inner_gradients import TakesGradients
from funcstage.engines.rules import control_flow
from funcstage.engines.tape import eager as tape
from funcstage.errors import StageError
from funcstage.state.before import Before
from funcstage.state.module import locked
from funcstage.state.subclasses import any_told


def choose(call: StageCall) -> Engine:
    """Return the engine that runs a call."""
    own: Engine | None = getattr(call.apply, "linearize", None)
    if own is not None:
        return own
    if first_dtensor(call.leaves) is not None:
        return tape.linearize
    return uncompiled


def uncompiled(call: StageCall) -> Linearized[Any]:
    """Run a stage as its Python says: by levels, or on a plain tape where it takes gradients itself."""
    try:
        return _by_levels_or_tape(call)
    except StageError:
        raise
    except Exception as error:
        name = control_flow.operator_behind(error)
        if name is None:
            raise
        raise StageError(control_flow.refusal("The stage", name, control_flow.COMPILED)) from error


def _by_levels_or_tape(call: StageCall) -> Linearized[Any]:
    if is_differentiated(call.of_params[0]) or is_differentiated(call.arg_leaves):
        return levels.linearize(call)
    with locked(call.module):
        before = Before.of(call.apply, call.module, call.leaves, call.argument_leaves)
        try:
            if not (_is_known(call.apply) or before.meets_threads or any_told(call.leaves)):
                with suppress(TakesGradients):
                    return levels.linearize(call, held=before.held)
                _start_over(call, before)
            return tape.linearize(call, before.held)
        except StageError:  # a refused call changes nothing
            before.restore()
            raise


def _start_over(call: StageCall, before: Before) -> None:
    """Give up a run in the middle of which the stage has taken gradients."""
    before.restore()
    for iterator in before.moved_iterators():
        raise StageError(
            "The stage takes gradients inside its forward, starts threads there or applies a C++ "
            "torch::autograd::Function, so it has to start over, but its module holds an iterator "
            f"({_type(iterator)}) that may have advanced. Keep a list and an index into it instead."
        )
    with suppress(TypeError):  # some callables cannot be remembered
        _TAKING.add(call.apply)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_known(apply: Callable[..., Any]) -> bool:
    try:
        return apply in _TAKING
    except TypeError:
        return False


_TAKING: WeakSet[Callable[..., Any]] = WeakSet()
"""Stage functions that were seen to take gradients."""
