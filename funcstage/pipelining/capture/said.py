"""Why something runs as it is, said once for each reason, where the user calls it."""

from __future__ import annotations

import sys
import warnings


class Said:
    """Warns that something runs as it is.

    Args:
        name: what to call it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._reasons: set[str] = set()

    def __call__(self, reason: str) -> None:
        """Say why, unless that was said."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"{self.name} runs as it is, not as a CUDA graph: {reason}", stacklevel=_caller())


def _caller() -> int:
    """How far up the caller of the library is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("funcstage."):
        frame, level = frame.f_back, level + 1
    return level
