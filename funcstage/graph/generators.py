"""Random generators while a stage is traced: what a graph records is draws, and nothing else about them.

Seeding a generator, reading its state or putting one back happen in Python, once, while the stage is traced;
and so does making one. The programs of such a stage would draw other numbers than eager: it is refused.
Private: functions of `torch.random` look their generator up in that module. Tried with torch 2.11 to 2.14.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from funcstage.errors import TraceError

_UNRECORDED = {"get_state", "set_state", "manual_seed", "seed", "graphsafe_get_state", "graphsafe_set_state"}


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
                "get_rng_state, set_rng_state, fork_rng), which a graph does not record. Draw from a "
                "generator that the stage keeps, torch.rand(..., generator=self.generator), or use the "
                "uncompiled `apply`."
            )
        return getattr(self._generator, name)


def _asked_by_compiler() -> bool:
    frame: Any = sys._getframe(3)  # behind the function of `torch.random`
    return frame.f_globals.get("__name__", "").startswith(("torch._dynamo", "torch._inductor"))


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


def check_kept(generator: torch.Generator, call: dict[str, Any]) -> None:
    """Refuse a generator that the stage made while it was traced: it would make it anew in every call.

    Local variables hold no reference that the garbage collector knows of; all else that keeps objects does.
    """
    if not RECORDED:
        raise TraceError(
            f"The stage draws from a generator of its own, which a trace of torch {torch.__version__} cannot "
            "record. Draw from torch's default generator, use torch 2.13 or newer, or the uncompiled `apply`."
        )
    if all(holder is call for holder in gc.get_referrers(generator)):
        raise TraceError(
            "The stage makes a random generator in its forward, which a graph would go on drawing from. Keep "
            "the generator on the module or pass it as an argument, or use the uncompiled `apply`."
        )
