"""Random generators while a stage is traced: what a graph records is draws, and nothing else about them.

Seeding a generator, reading its state or putting one back happen in Python, once, while the stage is traced;
and so does making one. The programs of such a stage would draw other numbers than eager: it is refused.
Private: functions of `torch.random` look their generator up in that module.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from types import FrameType
from typing import Any

import torch

from funcstage.errors import TraceError
from funcstage.state.ambient import Generator, RandomState, of_torch

_UNRECORDED = {
    *("get_state", "set_state", "graphsafe_get_state", "graphsafe_set_state", "clone_state"),
    *("manual_seed", "seed", "initial_seed", "get_offset", "set_offset"),
}
_WAYS_OUT = (
    "which a graph does not record. Draw from a generator that the stage keeps and seeds outside of its "
    "forward, torch.rand(..., generator=self.generator), or use the uncompiled `apply`."
)


RECORDED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether a trace can record draws from a generator that is passed."""


class _Watched:
    """Stands for torch's generator of the CPU, and refuses what a trace cannot record."""

    def __init__(self, generator: torch.Generator, stage: str) -> None:
        self._generator = generator
        self._stage = stage
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if name in _UNRECORDED and threading.get_ident() == self._thread and not _asked_by_compiler():
            raise TraceError(
                f"{self._stage} seeds torch's random generator, or reads or sets its state (manual_seed, "
                f"get_rng_state, set_rng_state, fork_rng), {_WAYS_OUT}"
            )
        return getattr(self._generator, name)


def _asked_by_compiler() -> bool:
    return _is_compiler(sys._getframe(3))  # behind the function of `torch.random`


def _is_compiler(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(("torch._dynamo", "torch._inductor"))


_RANDOM = ("torch.random", "torch.cuda", "torch.cuda.random")
"""Modules whose functions look generators up for their callers."""


class Asked:
    """What a stage does to generators by their own methods while it is traced.

    Calls that Python makes of these methods are seen; those in C (of a `partial`, in `map`) are told by what
    has become of generators within the stage's reach. Those of the CPU are seeded with a number of our own
    meanwhile, so that the seed that one has is not set again unnoticed; torch's own, from which other threads
    draw, is not. Where functions of `torch.random` look that one up, it is looked after elsewhere.
    """

    def __init__(self) -> None:
        self._before = RandomState(())
        self._first: str | None = None
        self._within_reach: dict[int, torch.Generator] = {}
        self._left: RandomState | None = None
        self._torchs = RandomState(of_torch())
        self._seed = torch.default_generator.initial_seed()

    def reach(self, generator: torch.Generator) -> None:
        """Take note of a generator that the stage can get at."""
        if generator is torch.default_generator or id(generator) in self._within_reach:
            return
        self._within_reach[id(generator)] = generator
        if self._left is not None:
            self._watch(generator, self._left)

    def begin(self) -> None:
        """Watch what was found, and from now on what is."""
        if self._left is None:
            self._left = RandomState(())
            for generator in self._within_reach.values():
                self._watch(generator, self._left)

    def _watch(self, generator: torch.Generator, left: RandomState) -> None:
        watched = Generator("of the stage", generator.get_state, generator.set_state)
        self._before.note(watched)
        if generator.device.type == "cpu":
            generator.seed()
        left.note(watched)

    def _moved(self) -> bool:
        return self._torchs_is_seeded() or (self._left is not None and bool(self._left.moved()))

    def _torchs_is_seeded(self) -> bool:
        return torch.default_generator.initial_seed() != self._seed

    def note(self, function: Any, frame: FrameType) -> None:
        """Look at a function in C that is about to be called."""
        generator, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if type(generator) is not torch.Generator or name not in _UNRECORDED:
            return
        if frame.f_globals.get("__name__") in (__name__, RandomState.__module__):
            return  # our own
        caller: FrameType | None = frame
        while caller is not None and caller.f_globals.get("__name__") in _RANDOM:
            caller = caller.f_back
        looked_up = generator is torch.default_generator and frame.f_globals is vars(torch.random)
        if not looked_up and not (caller is not None and _is_compiler(caller)):
            self._before.note(Generator(name, generator.get_state, generator.set_state))
            self._first = self._first or f"{name}(), at {frame.f_code.co_filename}:{frame.f_lineno}"

    def undo(self) -> None:
        """Put the generators back."""
        self._before.restore()
        if self._torchs_is_seeded():
            self._torchs.restore()

    def refuse(self) -> None:
        """Refuse a stage that has done something to generators.

        Raises:
            TraceError: names the first thing that it has done.
        """
        if self._first is None and self._moved():
            self._first = "a method of a generator that is called by functools.partial, map or another thread"
        if self._first is not None:
            raise TraceError(
                f"The stage seeds a random generator, or reads or sets its state ({self._first}), {_WAYS_OUT}"
            )


@contextmanager
def left_alone(stage: str) -> Iterator[None]:
    """Refuse stages that do more with torch's generator than draw; one trace runs at a time."""
    module: Any = torch.random
    real = module.default_generator
    module.default_generator = _Watched(real, stage)
    try:
        yield
    finally:
        module.default_generator = real


def check_kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse, of an operation's operands, a generator that the stage made while it was traced.

    The stage would make it anew in every call. Local variables hold no reference that the garbage collector
    knows of; all else that keeps objects does.
    """
    for operand in args:  # by type, as Dynamo, which torch.cond lets read this, does not ask tensors more
        if type(operand) is torch.Generator:
            _check_kept(operand, args)
    for operand in kwargs.values():
        if type(operand) is torch.Generator:
            _check_kept(operand, kwargs)


def _check_kept(generator: torch.Generator, call: tuple[Any, ...] | dict[str, Any]) -> None:
    if not RECORDED:
        raise TraceError(
            f"The stage draws from a generator of its own, which a trace of torch {torch.__version__} cannot "
            "record. Draw from torch's default generator, use torch 2.13 or newer, or the uncompiled `apply`."
        )
    if all(holder is call or _are_operands(holder, call) for holder in gc.get_referrers(generator)):
        raise TraceError(
            "The stage makes a random generator in its forward, which a compiled stage would make only once. "
            "Keep the generator on the module or pass it as an argument, or use the uncompiled `apply`."
        )


def _are_operands(holder: Any, call: tuple[Any, ...] | dict[str, Any]) -> bool:
    """Tell whether a tuple is the operands too, as they were handed on."""
    return (
        isinstance(holder, tuple)
        and isinstance(call, tuple)
        and len(holder) == len(call)
        and (all(map(is_, holder, call)))
    )
