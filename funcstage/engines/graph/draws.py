"""Random numbers of Python and NumPy, clocks, and files: what a trace would keep for all calls."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Container
from types import CodeType, FrameType, ModuleType
from typing import Any

from funcstage.errors import TraceError
from funcstage.state.ambient import numpy_random


class Noted:
    """Where a stage draws random numbers and reads clocks, as far as calls tell.

    Attributes:
        draws: places, by what was drawn.
        clocks: places, by what was read.
        opened: where a file was opened or looked for first.
    """

    def __init__(self, within_reach: Container[int]) -> None:
        """`within_reach` has the ids of objects that were there before the stage ran."""
        self.draws: dict[str, str] = {}
        self.clocks: dict[str, str] = {}
        self.opened: str | None = None
        self._within_reach = within_reach

    def draw(self, frame: FrameType, codes: Container[CodeType]) -> None:
        """Note a function that the stage calls, of the library of random numbers.

        Those on generators that the stage has made are left out; `codes` are those of its functions.
        """
        caller = frame.f_back
        if frame.f_globals.get("__name__") not in _DRAWING or caller is None or caller.f_code not in codes:
            return
        owner, name = frame.f_locals.get("self"), frame.f_code.co_name
        if not name.startswith("_") and (owner is None or self._is_shared(owner)):
            self.draws.setdefault(f"{frame.f_globals['__name__']}.{name}", _where(caller))

    def call(self, function: Any, frame: FrameType, codes: Container[CodeType]) -> None:
        """Note a call of a function in C that answers differently every time.

        Args:
            function: that is called.
            frame: the function that calls it.
            codes: of the stage's functions.
        """
        if function in OF_FILES:
            reader: FrameType | None = frame
            while reader is not None and reader.f_code not in codes and _reads_for_others(reader):
                reader = reader.f_back
            if reader is not None and reader.f_code in codes:
                self.opened = self.opened or _where(reader)
            return
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(owner, ModuleType):
            if owner.__name__ == "time" and name not in ("sleep", "strftime", "mktime"):
                self.clocks.setdefault(f"time.{name}", _where(frame))
            elif (owner.__name__, name) == ("posix", "urandom"):
                self.draws.setdefault("os.urandom", _where(frame))
        elif isinstance(owner, type):
            if owner.__module__ == "datetime" and name in ("now", "utcnow", "today"):
                self.clocks.setdefault(f"{owner.__name__}.{name}", _where(frame))
        elif _is_generator(owner) and self._is_shared(owner):
            self.draws.setdefault(f"{type(owner).__module__.partition('.')[0]}'s {name}", _where(frame))

    def refuse(self) -> None:
        """Refuse a stage that draws, or looks at files.

        Raises:
            TraceError: names what, and where.
        """
        for what, where in self.draws.items():
            raise TraceError(
                f"The stage draws a random number ({what}, at {where}), and a trace would repeat it in every "
                "call. Draw with torch.rand, or draw outside and pass the number as an argument."
            )
        if self.opened is not None:
            raise TraceError(
                f"The stage opens a file, or looks for one (at {self.opened}), which a trace would do only "
                "once. Read it outside and pass what it says as an argument; write what the stage returns."
            )

    def warn(self) -> None:
        """Warn of clocks."""
        for what, where in self.clocks.items():
            warnings.warn(
                f"The stage reads a clock ({what}, at {where}), which stands still in its compiled programs. "
                "Pass the time as an argument.",
                stacklevel=2,
            )

    def _is_shared(self, generator: Any) -> bool:
        numpy = numpy_random()
        shared = [random.random.__self__, *([] if numpy is None else [numpy.rand.__self__])]  # type: ignore[attr-defined]
        return id(generator) in map(id, shared) or id(generator) in self._within_reach


def _is_generator(value: Any) -> bool:
    return isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random")


def _reads_for_others(frame: FrameType) -> bool:
    """Tell whether a function opens files for whoever calls it, and not to show lines of code."""
    name = str(frame.f_globals.get("__name__"))
    package = name.partition(".")[0]
    return name.startswith(_READERS) or (package in sys.stdlib_module_names and package not in _OF_CODE)


OF_FILES = frozenset({open, os.stat, os.lstat, os.listdir, os.scandir, os.open})
"""Functions by which files are opened and looked for."""

_DRAWING = ("random", "secrets", "uuid")
_READERS = ("torch.serialization", "numpy.lib.")
_OF_CODE = ("linecache", "tokenize", "importlib", "inspect", "traceback", "warnings", "logging", "runpy")


def _where(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
