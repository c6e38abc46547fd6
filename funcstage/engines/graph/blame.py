"""Whose error it is that ended a trace: the stage's own comes through as it is, others are refusals.

What the stage raises by itself is passed on. Anything else may be a limit of the trace or a mistake of the
stage's (a wrong shape, a missing argument), which look alike: the uncompiled stage is tried, once, and what
it raises is the answer, in its backward too. Only where it works is it said to.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.messages import is_of_stage, package_of
from funcstage.engines.base import InputTape, StageCall
from funcstage.engines.choose import uncompiled
from funcstage.errors import StageError, TraceError, stage_name
from funcstage.functional import check_leaves
from funcstage.state.backward_errors import explain
from funcstage.state.before import Before


def is_asked_by_stage() -> bool:
    """Tell whether the function of torch's that runs was called by the stage, rather than by our trees."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
    return is_of_stage(next(dropwhile(lambda frame: package_of(frame) in ("funcstage", "torch"), frames)))


def line_of(error: BaseException) -> str | None:
    """The last line of the stage's own code on the way to an error, as ``file:number``."""
    lines = (
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_of_stage(frame)
    )
    return next(reversed([*lines]), None)


def tried_uncompiled(refusal: TraceError, call: StageCall) -> Exception:
    """Run a stage that cannot be traced uncompiled, and return the error that is to be raised."""
    if _has_other_ranks() or any(isinstance(leaf, Iterator) for leaf in call.argument_leaves):
        return TraceError(f"{refusal} {_UNTRIED}")
    found = _error_of(call, backward=call.diff is not None and torch.is_grad_enabled())
    if found is None:
        return TraceError(f"{refusal} {_WORKS}")
    if isinstance(found, torch.OutOfMemoryError):
        return TraceError(f"{refusal} {_UNTRIED}")
    return refusal if _is_a_refusal(found) else found


def failed(error: Exception, call: StageCall) -> Exception:
    """Return what is to be raised where a program of F fails, which knows nothing of the stage's lines."""
    if isinstance(error, (StageError, torch.OutOfMemoryError)) or _has_other_ranks():
        return error
    found = _error_of(call)
    return error if found is None or _is_a_refusal(found) else found


def _has_other_ranks() -> bool:
    """They may not be there to meet a message of this one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _error_of(call: StageCall, backward: bool = False) -> Exception | None:
    """What the uncompiled stage raises, in I and W too if these are to be tried."""
    args, kwargs = trees.map_leaves(lambda leaf: leaf, (call.args, call.kwargs))  # may be written into
    before = Before.of(call.apply, call.module, call.leaves, call.argument_leaves)
    try:
        output, _, tape = uncompiled(replace(call, args=args, kwargs=kwargs))
        leaves, _ = check_leaves("output", output)
        if backward:
            _run_backward(leaves, tape, stage_name(call.apply))
    except Exception as error:
        return error
    finally:
        before.restore()
    return None


def _run_backward(leaves: Sequence[Any], tape: InputTape, stage: str) -> None:
    cotangents = [_cotangent(leaf) if trees.is_differentiable(leaf) else None for leaf in leaves]
    phase = "I"
    try:
        weight_tape = tape.input_vjp(cotangents, retain=False)[1]
        phase = "W"
        weight_tape.weight_vjp(retain=False)
    except RuntimeError as error:
        explain(error, stage, phase)
        raise


def _cotangent(leaf: Tensor) -> Tensor:
    """Some cotangent of an output; torch makes no ones in sparse layouts."""
    return torch.ones_like(leaf) if leaf.layout is torch.strided else torch.zeros_like(leaf)


def _is_a_refusal(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "funcstage"


_WORKS = "The uncompiled `apply` works: pass it to stage_vjp as it is."
_UNTRIED = "The uncompiled `apply` may work: pass it to stage_vjp as it is."
