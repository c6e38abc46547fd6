"""Values that may be used once: what I and W have in common."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Self, TypeAlias, TypeVar

import optree
from torch import Tensor

from funcstage import forks, residuals, trees
from funcstage._torch.pytree import register_pytree_node
from funcstage.away import Away
from funcstage.copies import CopiedByLeaves
from funcstage.described import Described, over
from funcstage.engines.base import Tape
from funcstage.errors import ConsumedError, StageError
from funcstage.report import size, table
from funcstage.state.captured import Captured
from funcstage.state.writes import Watch, refuse_written

AnyTape = TypeVar("AnyTape", bound=Tape)


class Linear(CopiedByLeaves, Generic[AnyTape]):
    """A function that may be called once, because calling it uses up its tape."""

    __slots__ = ("_away", "_failed", "_gone", "_params", "_taker", "_tape", "_turn", "_watches", "stage")

    def __init__(self, tape: AnyTape | None, stage: str, watches: tuple[Watch | Captured, ...]) -> None:
        self._tape = tape
        self._watches = watches
        self._failed = False
        self._away: Away | None = None
        self._taker: int | None = None  # the thread in which a call uses it up
        self._turn = forks.Turn()
        self._params: Sequence[Any] = ()  # of the stage; the tape has them too
        self._gone = ""  # where the residuals went, if it was not a call that used them up
        self.stage = stage

    def __copy__(self) -> Self:
        self._refuse_copies()
        return super().__copy__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._refuse_copies()
        return super().__deepcopy__(memo)

    def _refuse_copies(self) -> None:
        """Refuse to copy what is differentiated in turn: the copy's residuals are cut off from that."""
        if self._tape is not None and self._tape.differentiated:
            raise StageError(
                f"This {type(self).__name__} of {self.stage} cannot be copied, as parameters or arguments "
                "that require grad make its gradients differentiable, and a copy would lose that. Call it "
                "with retain=True instead, or pass detached ones."
            )

    def _live(self) -> AnyTape:
        if self._tape is None:
            if self._gone:
                raise ConsumedError(f"This {type(self).__name__} of {self.stage} {self._gone}")
            what = "A call of this" if self._failed else "This"
            how = "failed halfway" if self._failed else "was used before"
            raise ConsumedError(
                f"{what} {type(self).__name__} of {self.stage} {how}, which freed its residuals. To use it "
                "again, call it with retain=True the first time."
            )
        if isinstance(self._tape, Described):
            raise self._tape.refusal(f"{type(self).__name__} of {self.stage}")
        return self._tape

    def _at_hand(self, phase: str) -> AnyTape:
        """The tape, whose residuals have come back if they were away."""
        tape = self._live()
        if self._away is not None:
            refuse_written(self._away.watches, tuple, self.stage, phase)
            self._tape = tape = tape.with_leaves(self._away.back(tape.leaves()))
            self._away = None
        return tape

    def _taken(self, phase: str, retain: bool = False) -> AnyTape:
        """The same for a call, which uses it up unless it retains: of several threads' calls, the first.

        It still has to wait for its turn, as calls that retain may be under way. A thread that was
        interrupted may take it again.
        """
        with _ONE_TAKER:
            tape = self._at_hand(phase)
            here = threading.get_ident()
            if self._taker not in (None, here):
                raise ConsumedError(
                    f"This {type(self).__name__} of {self.stage} is being used by a call in another thread, "
                    "which frees its residuals. To use it again, call it with retain=True the first time."
                )
            if not retain:
                self._taker = here
        return tape

    def _left(self, tape: AnyTape, left: AnyTape | None) -> None:
        """What a run has left of the tape: nothing, if it or a call in its midst has used it up."""
        if left is None or self._tape is tape:
            self._tape = left
        if self._tape is None:
            self._params, self._watches = (), ()

    def _given_to(self, tape: AnyTape, away: Away | None, how: str) -> Self:
        """The same over another tape, in place of this one."""
        new = self._rebuilt(tape)
        new._away = away
        self._tape, self._away, self._watches = None, None, ()
        self._gone = f"was {how}: use what {how.removesuffix('ed')} returned."
        return new

    def _fail(self, tape: AnyTape) -> None:
        """A run failed, or was interrupted: count as consumed if it has used up some of the tape."""
        self._taker = None
        if self._tape is not None and not tape.intact:
            self._tape, self._watches, self._failed = None, (), True

    @property
    def consumed(self) -> bool:
        """Whether it was used, so that a further call raises `ConsumedError`."""
        return self._tape is None

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals, memory that several share counted once, parameters and buffers not."""
        return 0 if self._tape is None else residuals.nbytes(self._tape.leaves())

    def __repr__(self) -> str:
        if self._tape is None:
            return f"<{type(self).__name__} of {self.stage}, consumed>"
        if isinstance(self._tape, Described):
            leaves = self._tape.share()
            return f"<{type(self).__name__} of {self.stage}, {len(leaves)} residuals replaced: {leaves}>"
        leaves = self._tape.leaves()
        return (
            f"<{type(self).__name__} of {self.stage}, {self._signature()}, {len(leaves)} residuals, "
            f"{size(residuals.nbytes(leaves))}{', offloaded' if self._away is not None else ''}>"
        )

    def _repr_html_(self) -> str:
        leaves = [] if self._tape is None else sorted(self._tape.leaves(), key=lambda t: -t.nbytes)
        rows = [(str(tuple(t.shape)), str(t.dtype), str(t.device), f"{t.nbytes:,} B") for t in leaves]
        return table(repr(self)[1:-1], ("residual", "dtype", "device", "size"), rows, shown=12)

    def _signature(self) -> str:
        raise NotImplementedError

    def _rebuilt(self, tape: AnyTape | None) -> Self:
        raise NotImplementedError


_ONE_TAKER = forks.lock()
"""Reentrant, as a finalizer or a signal's handler may use a pullback in the midst of it."""


def held_together(pullbacks: Iterable[Linear[Any]]) -> int:
    """Bytes that some pullbacks hold, memory that several share counted once."""
    tapes = (pullback._tape for pullback in pullbacks)
    return residuals.nbytes([leaf for tape in tapes if tape is not None for leaf in tape.leaves()])


def _flatten(pullback: Linear[Any]) -> tuple[list[Tensor], _Metadata]:
    tape, away = pullback._tape, pullback._away
    if away is not None:
        away.settle()  # whoever gets the leaves may read them
    # The tape goes along as it is now: the pullback itself may be consumed before it is rebuilt.
    return ([], (pullback, None, None)) if tape is None else (tape.share(), (pullback, tape, away))


def _unflatten(metadata: _Metadata, leaves: Iterable[Tensor]) -> Linear[Any]:
    pullback, tape, away = metadata
    rebuilt = pullback._rebuilt(None if tape is None else over(tape, tuple(leaves)))
    rebuilt._away = None if away is None else away.again()
    return rebuilt


_Metadata: TypeAlias = tuple[Linear[Any], Any, Away | None]


def register(kind: type[Linear[Any]]) -> None:
    """Make a kind of these a pytree of its residuals, for optree (namespace "funcstage") and for torch."""
    optree.register_pytree_node(
        kind,  # type: ignore[arg-type]  # the stubs expect collections
        _flatten,  # type: ignore[arg-type]
        _unflatten,  # type: ignore[arg-type]
        namespace=trees.NAMESPACE,
    )
    register_pytree_node(
        kind,
        _flatten,
        lambda leaves, metadata: _unflatten(metadata, leaves),
        serialized_type_name=f"funcstage.{kind.__name__}",
    )
