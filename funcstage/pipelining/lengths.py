"""Microbatches of other lengths: all ranks prepare for them before any of them posts a receive.

Only the first stage's rank sees the pipeline's input. Before each step it writes down for each other rank
what the microbatches look like, in the store that all share: no device is waited for, and no message is sent.
If they look other than those of the step before, every rank lets its stages find out anew what they send and
get. Where microbatches of one step differ, that is done once for each kind of them, and each keeps what its
kind needs.
"""

from __future__ import annotations

import hashlib
import pickle
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from funcstage import trees
from funcstage._torch.messages import STORE_EMPTY, says
from funcstage._torch.pipelining import ExchangingStage
from funcstage._torch.schedules import (
    Microbatches,
    num_microbatches,
    prepare,
    prepare_again,
    prepared,
    stages_of,
)
from funcstage.dtensors import placement
from funcstage.errors import LeafError, StructureError
from funcstage.pipelining import failures
from funcstage.pipelining.examples import looks, tensors
from funcstage.pipelining.preparations import OF_THE_NEXT_MICROBATCH, copied, copies
from funcstage.pipelining.transport.carrying_stage import open_routes

_UNHEARD = 16
"""Steps after which a rank that has none of our stages is told nothing more."""


@dataclass(slots=True, eq=False)
class Agreement:
    """What the ranks of a schedule know of its microbatches.

    Attributes:
        group: of the pipeline.
        first: the rank with the first stage.
        place: names the place in the store for a step and a rank.
        strangers: says which ranks have stages of torch's own, whose shapes stay.
        others: the ranks to tell.
        listens: whether the first rank is known to tell; nothing where that is not yet known.
        seconds: how long to wait for it.
        decide: decides on the first rank how messages travel.
        step: how many there were.
        prepared: whether the stages have been prepared for anything.
        now: what they are prepared for.
        described: how the first rank describes microbatches, those of the last step.
        symmetric: whether messages are written into the memory of peers, once it is decided.
        ahead: what was agreed about the step that is to come, if that was done ahead.
        keep: how many preparations to keep, so that going back to one takes no messages.
        kept: what was prepared for what; the same on all ranks.
    """

    group: dist.ProcessGroup | None
    first: int
    place: Callable[[int, int], str]
    strangers: Callable[[], Sequence[int]]
    others: list[int]
    listens: bool | None
    seconds: float
    decide: Callable[[], bool]
    step: int = 0
    prepared: bool = False
    now: bytes | None = None
    described: tuple[Any, bytes] | None = None
    symmetric: bool | None = None
    ahead: bytes | None = None
    keep: int = 0
    kept: dict[bytes, list[dict[str, Any]]] = field(default_factory=dict)

    def before_step(self, schedule: Any, microbatches: Microbatches) -> None:
        """Let all ranks have their stages prepared for the microbatches of a step.

        Raises:
            LeafError: if the microbatches look other than before, and some stages cannot follow.
        """
        known = self.ahead is not None
        told, begun = (self.ahead, False) if known else self._agreed(schedule, microbatches)
        if told != self.now:
            self._prepare_for(schedule, microbatches, told or b"", begun)

    def agree_ahead(self, schedule: Any, microbatches: Microbatches) -> tuple[bytes, bool]:
        """Agree about a step that not all ranks may run as it is.

        Returns:
            What the microbatches look like, and whether all ranks can prepare for them without messages.
        """
        self.ahead = self._agreed(schedule, microbatches)[0]
        return self.ahead, not self.ahead or self.ahead in self.kept

    def forget(self) -> None:
        """Prepare anew in the next step."""
        self.now = None
        self.kept.clear()

    def _agreed(self, schedule: Any, microbatches: Microbatches) -> tuple[bytes, bool]:
        """What the first rank tells of a step, and whether the stages are prepared for its first kind."""
        rank, begun = dist.get_rank(self.group), False
        if rank == self.first:
            now = looks_of(microbatches), microbatches.trains
            if self.symmetric is None:
                self.symmetric = self.decide()
            if self.described is None or self.described[0] != now:
                self.described = now, described(*now, self.symmetric)
            told = self.described[1]
            self._check_may_change(told, microbatches)
            self._tell(told)
        elif self.listens is not None:
            told = self._hear(rank) if self.listens else b""
        else:
            self._prepare(schedule, microbatches, 0)  # with messages that came from the first rank
            told, begun = failures.written(self.place(self.step, rank)) or b"", True
            self.listens = bool(told)
        self.step += 1
        return told, begun

    def _prepare_for(self, schedule: Any, microbatches: Microbatches, told: bytes, begun: bool) -> None:
        self.now = None  # until all is well
        stages = stages_of(schedule)
        symmetric = bool(told) and pickle.loads(told)[2]
        insists = any(getattr(stage, "transport", "") == "symmetric" for stage in stages)
        if insists and self.others and not symmetric:
            raise StructureError(
                "transport='symmetric' needs stages of FunctionalPipelineStage on all ranks of the pipeline. "
                "Make all of them that, or leave transport at 'auto'."
            )
        if told in self.kept:
            for stage, found in zip(stages, self.kept[told], strict=True):
                vars(stage).update(copies(found))
            prepared(schedule, microbatches.trains)
        else:
            self._prepare_kinds(schedule, microbatches, pickle.loads(told)[1] if told else (), begun)
            if symmetric:
                open_routes(stages, num_microbatches(schedule), microbatches.trains)
            if self.keep and told:
                self.kept[told] = [*map(copied, stages)]
                if len(self.kept) > self.keep:  # the same one on all ranks
                    del self.kept[next(iter(self.kept))]
        self.now = told

    def _prepare_kinds(
        self, schedule: Any, microbatches: Microbatches, kinds: Sequence[int], begun: bool
    ) -> None:
        stages = stages_of(schedule)
        found: list[dict[int, Any]] = [{} for _ in stages]
        for kind in dict.fromkeys(kinds or (0,)):
            if not (begun and kind == 0):
                self._prepare(schedule, microbatches, kind)
            if any(kinds):
                for stage, of_stage in zip(stages, found, strict=True):
                    of_stage |= {i: _prepared(stage, i) for i, each in enumerate(kinds) if each == kind}
        if any(kinds):
            for stage, of_stage in zip(stages, found, strict=True):
                _take(stage, of_stage)

    def _prepare(self, schedule: Any, microbatches: Microbatches, kind: int) -> None:
        """Let the stages find out what they send and receive, as if all microbatches were of one kind."""
        if self.prepared:
            prepare_again(schedule)
            for stage in stages_of(schedule):
                if isinstance(stage, ExchangingStage):
                    stage.prepare_again()
        self.prepared = True
        prepare(schedule, microbatches, kind)

    def _check_may_change(self, told: bytes, microbatches: Microbatches) -> None:
        differ = any(pickle.loads(told)[1])
        if (self.now is None and not differ) or told == self.now:
            return
        strangers = self.strangers()
        if strangers:
            args = [looks(tensors(args)) for args in microbatches.args]
            said = "microbatches of a step differ" if differ else "the microbatches differ from those before"
            raise LeafError(
                f"{said}: they are {', '.join(dict.fromkeys(args))}, but rank {strangers[0]} of the pipeline "
                "has stages of torch's own, which receive microbatches of one shape. Make all stages "
                "FunctionalPipelineStage, or pad the microbatches to one shape."
            )

    def _tell(self, told: bytes) -> None:
        if self.step == _UNHEARD:
            strangers = self.strangers()
            self.others = [rank for rank in self.others if rank not in strangers]
        for rank in self.others:
            failures.store().set(self.place(self.step, rank), told)

    def _hear(self, rank: int) -> bytes:
        place, store, pause = self.place(self.step, rank), failures.store(), 1.0
        deadline = time.monotonic() + self.seconds
        while not _is_there(store, place, min(pause, max(deadline - time.monotonic(), 0.1))):
            pause = min(2 * pause, 30.0)  # stores log each wait that was in vain
            failure = failures.heard([self.group])
            if failure is None:
                failures.check_connected(self.group, self.first)
            else:
                failures.tell([self.group], failure)
                failures.break_off([self.group])
                raise failures.heard_by_all(failure)
            if time.monotonic() > deadline:
                raise StructureError(
                    f"rank {self.first} of the pipeline has begun no step within the timeout of its group. "
                    "Call the schedule's step (or eval) equally often on every rank."
                )
        told: bytes = store.get(place)
        store.delete_key(place)
        return told


def _is_there(store: Any, place: str, seconds: float) -> bool:
    """Wait until somebody has written at a place, or for some seconds."""
    try:
        store.wait([place], timedelta(seconds=seconds))
    except RuntimeError as error:
        if not says(error, STORE_EMPTY):
            raise
        return False
    return True


AGREEMENTS: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()
"""By schedule."""

_KEEPING: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def keep_for(schedule: Any, number: int) -> None:
    """Keep what a schedule's stages are prepared for, so that going back to it takes no messages."""
    _KEEPING[schedule] = number
    agreement = AGREEMENTS.get(schedule)
    if agreement is not None:
        agreement.keep = number
        agreement.forget()


def looks_of_last(schedule: Any) -> bytes:
    """What the microbatches of the last step looked like."""
    agreement = AGREEMENTS.get(schedule)
    return b"" if agreement is None or not agreement.others else agreement.now or b""


def watch(schedule: Any, agreement: Agreement) -> Agreement:
    """Let ranks agree about the microbatches of a schedule from now on."""
    agreement.keep = _KEEPING.get(schedule, 0)
    AGREEMENTS[schedule] = agreement
    return agreement


def looks_of(microbatches: Microbatches) -> list[Any]:
    """What each microbatch of a step looks like."""
    return [_look(both) for both in zip(microbatches.args, microbatches.kwargs, strict=True)]


def described(found: Sequence[Any], trains: bool, symmetric: bool = False) -> bytes:
    """What microbatches look like, and which are of one kind: the first of it, for each; how they travel."""
    first: dict[Any, int] = {}
    kinds = tuple(first.setdefault(look, i) for i, look in enumerate(found))
    text = repr(([*first], trains))
    return pickle.dumps((hashlib.sha256(text.encode()).digest(), kinds, symmetric))


def _look(tree: Any) -> Any:
    leaves, spec = trees.flatten(tree)
    return spec, tuple(
        (tuple(leaf.shape), str(leaf.dtype), leaf.requires_grad, str(placement(leaf)))
        if isinstance(leaf, Tensor)
        else (type(leaf).__name__, leaf if isinstance(leaf, int) else None)
        for leaf in leaves
    )


def _prepared(stage: Any, i: int) -> dict[str, Any]:
    """What a stage has prepared for a microbatch."""
    return {name: getattr(stage, name) for name in OF_THE_NEXT_MICROBATCH} | {
        name: getattr(stage, name).get(i) for name in _RECEIVED
    }


_RECEIVED = ("args_recv_info", "grad_recv_info")


def _take(stage: Any, prepared: dict[int, dict[str, Any]]) -> None:
    """Let a stage find what is prepared for each microbatch."""
    trained = {tuple(t.requires_grad for t in each["_input_examples"]) for each in prepared.values()}
    if len(trained) > 1 and not stage.is_first:
        raise StructureError(
            f"{stage._name}: some microbatches of the step need a gradient where others need none. Let the "
            "stage before it return the same kinds of tensors for all of them."
        )
    for name in _RECEIVED:
        found = {i: each.pop(name) for i, each in prepared.items()}
        getattr(stage, name).update({i: infos for i, infos in found.items() if infos is not None})
    stage.examples_of = prepared
