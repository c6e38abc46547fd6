"""What a run that is given up has changed, put back: random generators, modules, what arguments hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcstage._torch import functorch as ft
from funcstage.state.ambient import RandomState, among, of_process, of_torch
from funcstage.state.contents import Contents, Held
from funcstage.state.kept import State, objects_among
from funcstage.state.reach import reached
from funcstage.state.shared import NOTHING_SHARED, Shared, meet_threads, names_of


class Before(NamedTuple):
    """What a run that is given up has changed: random generators, and what modules and arguments hold.

    Attributes:
        generators: the random generators that all share: torch's, Python's and NumPy's.
        held: what the module held, and its code can get at, if there is one.
        handed: what objects among the arguments held, and what the stage's function closes over.
        shared: what the code of the stage's function can get at, if that is no module's.
        noted: the attributes of tensors among the arguments, with what these were.
        meets_threads: whether the stage can get at something by which threads meet.
    """

    generators: RandomState
    held: Held | None
    handed: State
    shared: Shared
    noted: list[tuple[dict[str, Any], dict[str, Any]]]
    meets_threads: bool

    @classmethod
    def of(
        cls, apply: Callable[..., Any], module: Any, leaves: Sequence[Any], arguments: Sequence[Any]
    ) -> Before:
        """Take note of a stage's module, if it has one, and of the generators of its tensors' devices.

        Args:
            apply: the stage function.
            module: the stage's.
            leaves: all of the call.
            arguments: those among them that are no state.
        """
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        if devices and torch.cuda.is_current_stream_capturing():
            devices.clear()
        held = None
        if isinstance(module, nn.Module):
            contents: Any = getattr(apply, "contents", None)
            known = isinstance(contents, Contents) and not ft.current_level()  # whose tensors die with it
            held = (contents if known else Contents(module)).now()
        handed = objects_among(leaves) if held is not None else [*objects_among(leaves), apply]
        shared = NOTHING_SHARED if held is not None else Shared(names_of([apply]))
        within_reach = [*reached(handed)]
        return cls(
            RandomState((*of_torch(devices), *of_process(), *among(within_reach))),
            held,
            State(None, handed),
            shared,
            [(leaf.__dict__, leaf.__dict__.copy()) for leaf in arguments if isinstance(leaf, Tensor)],
            meet_threads(within_reach) or (shared if held is None else held).meets_threads,
        )

    def restore(self) -> None:
        """Put everything back but iterators."""
        self.generators.restore()
        if self.held is not None:
            self.held.restore()
        self.handed.restore()
        self.shared.restore()
        for namespace, before in self.noted:
            namespace.clear()
            namespace.update(before)

    def moved_iterators(self) -> list[Any]:
        """Iterators that the module holds and that have gone on, or may have."""
        return [] if self.held is None else self.held.moved_iterators()


@contextmanager
def undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules hold afterwards what they hold now: a region that runs again has been there before."""
    before = [State(module) for module in modules]
    try:
        yield
    finally:
        for state in before:
            state.restore()
