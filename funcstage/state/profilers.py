"""Python's profilers: who is told of this thread's calls, and goes on when we no longer are."""

from __future__ import annotations

import sys
from typing import Any


def resume(profiler: Any) -> None:
    """Let the one that `sys.getprofile` named go on."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:  # cProfile's, up to Python 3.11
        profiler.enable()
