"""The signatures that steps have had: which graph is the one for a step, and which make room for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from funcstage import trees
from funcstage.pipelining.capture.baked import Baked
from funcstage.pipelining.capture.entry import WARM_UP, Entry
from funcstage.pipelining.capture.given import CannotCaptureError, Signature
from funcstage.pipelining.capture.gradients import pattern_of

MAX_GRAPHS = 8
"""Graphs of a schedule or function. Those that no longer hold make room; beyond that, signatures run as
they are."""

_TRIES = 3
"""How often in a row a step may find something changed before that is said."""


class Entries:
    """The steps of a schedule or function by their signatures.

    Args:
        bake: notes what a graph would have baked in.
        parameters: lists those whose gradients a step may write.
        warn: is told why steps are not replayed.
    """

    def __init__(
        self,
        bake: Callable[[], Baked],
        parameters: Callable[[Baked], Sequence[Tensor]],
        warn: Callable[[str], None],
    ) -> None:
        self._bake = bake
        self._parameters = parameters
        self._warn = warn
        self._entries: list[Entry] = []
        self._changes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        graphs = sum(entry.graph is not None for entry in self._entries)
        reason = next((entry.refused for entry in self._entries if entry.refused), "")
        return f"not captured: {reason}" if reason and not graphs else f"{graphs} graphs of {MAX_GRAPHS}"

    def of(self, signature: Signature) -> Entry:
        """Find the step with a signature, or make room for a new one.

        Raises:
            CannotCaptureError: if there are as many as there may be.
        """
        alike = [
            e for e in self._entries if e.signature == signature and e.pattern == pattern_of(e.parameters)
        ]
        for entry in reversed(alike):
            if not entry.baked.change():
                self._entries.remove(entry)
                self._entries.append(entry)  # used last
                self._changes = 0
                return entry
        if alike:
            self._changes += 1
            if self._changes >= _TRIES:
                self._warn(
                    f"{alike[-1].baked.change()} before each of the last {_TRIES} steps, and is baked into a "
                    "graph. Change it less often, or make it a tensor that is written in place "
                    "(`lr=torch.tensor(...)`)."
                )
        if len(self._entries) >= MAX_GRAPHS:
            stale = [entry for entry in self._entries if entry.baked.change()]
            if not stale:
                raise CannotCaptureError(
                    f"there are {MAX_GRAPHS} graphs already, and this step has another signature"
                    f"{_difference(self._entries[-1].signature, signature)}. Let batches have fewer shapes, "
                    "and pass values that change as tensors."
                )
            self._drop(stale[0])
        baked = self._bake()
        parameters = [*self._parameters(baked)]
        self._entries.append(Entry(signature, parameters, pattern_of(parameters), baked))
        return self._entries[-1]

    def agree(self, looks: bytes) -> None:
        """Note what the ranks have agreed about the microbatches of the only step so far."""
        for entry in self._entries:
            entry.signature = entry.signature.agreed(looks)

    def ran(self, entry: Entry) -> None:
        """Take note that a step ran as it is."""
        entry.expected = pattern_of(entry.parameters)
        change = entry.baked.change()
        entry.runs += 1
        if change:
            entry.baked = self._bake()
            entry.unsteady += 1
            entry.runs = min(entry.runs, WARM_UP - 1)
            if entry.unsteady >= WARM_UP:
                entry.refused = (
                    f"{change} by each step, which a replay would not repeat. Do that outside of the step."
                )
                self._warn(entry.refused)

    def close(self) -> None:
        """Drop all graphs, and forget everything."""
        for entry in [*self._entries]:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        self._entries.remove(entry)
        if entry.graph is not None:
            entry.graph.recording.reset()
            entry.graph = None


def _difference(before: Signature, now: Signature) -> str:
    """Name an argument in which two signatures differ."""
    if before.structure != now.structure:
        return ""
    pairs = zip(before.leaves, now.leaves, trees.leaf_names(now.structure, "(args, kwargs)"), strict=True)
    name = next((name for was, is_now, name in pairs if was != is_now), "")
    return name and f": {name} is not as it was"
