"""The refusals: every one a `StageError` that says what was wrong, where, and what to do.

A refused call consumes and mutates nothing. Each class also derives from the builtin exception that
code outside pipelines would expect (`TypeError`, `ValueError`, `RuntimeError`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def stage_name(apply: Callable[..., Any]) -> str:
    """What errors call a stage function."""
    return getattr(apply, "__qualname__", type(apply).__name__)


class StageError(Exception):
    """The base of all errors that funcstage raises."""


class ConsumedError(StageError, RuntimeError):
    """A pullback was used a second time although its residuals are gone."""


class StructureError(StageError, TypeError):
    """A pytree or an argument has another structure or type than the stage function expects."""


class LeafError(StageError, ValueError):
    """A leaf has the right place but the wrong shape, dtype, device or value."""


class PurityError(StageError, RuntimeError):
    """The stage function mutates a tensor that it was given or has captured."""


class WrittenError(PurityError):
    """A tensor that a pullback reads again was written in place after F."""


class TraceError(StageError, RuntimeError):
    """The stage function cannot be traced into a graph."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank cannot go on; sent to the others in place of what they wait for.

    Attributes:
        kind: the error to raise.
        message: what it says, on every rank the same.
    """

    kind: type[StageError]
    message: str

    @classmethod
    def of(cls, stage: str, error: BaseException) -> Failure:
        """Describe an error of a stage."""
        if isinstance(error, StageError):
            text = str(error)
            return cls(type(error), text if text.lower().startswith(stage.lower()) else f"{stage}: {text}")
        return cls(StageError, f"{stage} has failed: {type(error).__name__}: {error}".removesuffix(": "))
