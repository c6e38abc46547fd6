"""What a stage asks of its process while it is traced: settings of Python, loggers, threads, names.

What is asked by a call is no attribute of anything, so that byte code does not tell it. Which functions are
called does: their answers are places that are looked at again as all others (`reads.py`).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Set
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from funcstage.engines.graph.reads import OF_CODE, Place
from funcstage.errors import TraceError
from funcstage.state.code import is_library


class Process:
    """Notes what a stage asks of its process."""

    def __init__(self) -> None:
        self._asked: dict[Any, str] = {}
        self._refused: tuple[str, str] | None = None

    def hear(self, event: str, argument: Any, frame: FrameType, codes: Collection[CodeType]) -> None:
        """Note what a profiler is told: calls of functions that answer, by the stage itself or for it.

        Args:
            event: what it is told of.
            argument: the function in C that is called, or what a function returns.
            frame: the function that calls, is called or returns.
            codes: of the stage's functions.
        """
        if event == "c_call":
            if getattr(argument, "__name__", None) in _NAMES:
                self._asks(argument, frame, codes)
        elif event == "call" and frame.f_code in _OF_THREADS:
            if frame.f_back is not None and frame.f_back.f_code in codes:
                self._asked[_OF_THREADS[frame.f_code]] = f"threading.{frame.f_code.co_name}()"
        elif event == "call" and frame.f_code in _OF_LOGGERS:
            self._meets_logger(frame.f_locals["self"], frame.f_back, codes)
        elif event == "return" and frame.f_code is _GETS_LOGGER:
            self._meets_logger(argument, frame.f_back, codes)

    def _asks(self, function: Any, frame: FrameType, codes: Collection[CodeType]) -> None:
        asked = getattr(getattr(function, "__self__", None), "__name__", ""), function.__name__
        if asked not in _ANSWERS and asked not in _REFUSED:
            return
        asker = _asker(frame, codes)
        if asker is not None:
            what = ".".join(asked)
            if asked in _ANSWERS:
                self._asked[_ANSWERS[asked] or function] = f"{what}()"
            else:
                self._refused = self._refused or (what, f"{asker.f_code.co_filename}:{asker.f_lineno}")

    def _meets_logger(self, logger: Any, asker: FrameType | None, codes: Collection[CodeType]) -> None:
        while asker is not None and asker.f_code in _OF_LOGGERS:
            asker = asker.f_back
        if asker is not None and asker.f_code in codes and isinstance(logger, logging.Logger):
            self._asked[logger] = f"the logger {logger.name!r}"

    def places(self, names: Set[str], reached: Iterable[Any]) -> Iterator[Place]:
        """What was asked for.

        Args:
            names: of attributes that the stage's functions load.
            reached: objects, modules and classes that they can get at.

        Raises:
            TraceError: if it has asked for what cannot be looked at again; names what, and where.
        """
        if self._refused is not None:
            what, where = self._refused
            raise TraceError(
                f"The stage asks for the state of its process ({what}, at {where}), and a trace would keep "
                "the answer for all calls. Ask outside and pass the answer as an argument."
            )
        told = sorted(names & OF_CODE)
        for each in reached:
            if isinstance(each, logging.Logger) and not names.isdisjoint(_OF_LOGGER):
                self._asked[each] = f"the logger {each.name!r}"
            elif isinstance(each, ModuleType):
                if each is logging and "manager" in names:
                    self._asked[logging.root] = "the root logger"
                for name, says in _OF_MODULES.get(each.__name__, {}).items():
                    if name in names or not name:
                        self._asked[says] = f"module {each.__name__}"
            elif isinstance(each, (type, FunctionType)):
                if each.__module__ == "decimal":
                    self._asked[_decimals] = "the context of decimal"
                elif not is_library(each.__module__):
                    for name in told:
                        yield Place(f"{each.__qualname__}.{name}", weakref.ref(each), name)
        yield from (Place(label, ANSWERS, key) for key, label in self._asked.items())


def _asker(frame: FrameType | None, codes: Collection[CodeType]) -> FrameType | None:
    """The stage's function that calls, by way of the standard library or not."""
    while frame is not None and frame.f_code not in codes:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in sys.stdlib_module_names:
            return None
        frame = frame.f_back
    return frame


class _Answers:
    """The answers of functions, and the state of loggers, as a namespace in which all of them are."""

    def __init__(self) -> None:
        self._last: dict[Any, Any] = {}

    def __contains__(self, key: Any) -> bool:
        return True

    def __getitem__(self, key: Any) -> Hashable:
        answer = _state(key) if isinstance(key, logging.Logger) else key()
        before = self._last.setdefault(key, answer)
        if before is not answer and before != answer:
            self._last[key] = before = answer
        return before  # the same object, as long as it says the same

    def get(self, key: Any, default: Any) -> Hashable:
        return self[key]


ANSWERS = _Answers()


def _state(logger: logging.Logger) -> Hashable:
    own = logger.level, logger.disabled, logger.propagate, len(logger.handlers), logger.hasHandlers()
    return *own, logger.getEffectiveLevel(), logger.manager.disable


def _filters() -> Hashable:
    return tuple(map(str, warnings.filters))


def _argv() -> Hashable:
    return tuple(sys.argv)


def _path() -> Hashable:
    return tuple(sys.path)


def _thread() -> Hashable:
    thread = threading.current_thread()
    return thread.name, thread.daemon, thread.ident


def _main_thread() -> Hashable:
    return threading.main_thread().name, threading.main_thread().ident


def _threads() -> Hashable:
    return tuple((thread.name, thread.daemon, thread.ident) for thread in threading.enumerate())


def _is_debugged() -> Hashable:
    return sys.gettrace() is not None


def _decimals() -> Hashable:
    return str(sys.modules["decimal"].getcontext())


def _locale() -> Hashable:
    library = sys.modules["_locale"]
    return str(library.setlocale(library.LC_ALL))


def _zone() -> Hashable:
    return *time.tzname, time.timezone, time.daylight


_ANSWERS: dict[tuple[str, str], Callable[[], Hashable] | None] = {
    **{("sys", f"get{name}"): None for name in ("recursionlimit", "switchinterval", "_int_max_str_digits")},
    ("sys", "gettrace"): _is_debugged,
    **{("gc", name): None for name in ("isenabled", "get_threshold", "get_debug")},
    **{("posix", name): None for name in ("getcwd", "getcwdb", "getpid", "getppid")},
    **{("_locale", name): _locale for name in ("setlocale", "localeconv", "nl_langinfo", "getencoding")},
    **{("time", name): _zone for name in ("strftime", "mktime")},
    ("decimal", "getcontext"): _decimals,
    ("_decimal", "getcontext"): _decimals,
    ("_socket", "getdefaulttimeout"): None,
    ("faulthandler", "is_enabled"): None,
    ("_tracemalloc", "is_tracing"): None,
}
"""Functions in C, by their modules, with what says the same; None where they say it themselves."""
_REFUSED = {
    ("sys", "getprofile"),
    ("_signal", "getsignal"),
    ("sys", "getrefcount"),
    *(("gc", name) for name in ("get_count", "get_objects", "get_referrers", "get_stats")),
    ("posix", "umask"),
    ("posix", "getpriority"),
    ("posix", "sched_getaffinity"),
    ("posix", "getloadavg"),
    ("resource", "getrlimit"),
    ("resource", "getrusage"),
}
"""Functions that take arguments, answer otherwise each time, or otherwise while a stage is traced."""
_OF_MODULES: dict[str, dict[str, Callable[[], Hashable]]] = {
    "warnings": {"filters": _filters},
    "sys": {"argv": _argv, "path": _path},
    "decimal": {"": _decimals},
}
"""What attributes of modules say that are lists, by their names, or what all of them depend on."""
_NAMES = frozenset(name for _, name in (*_ANSWERS, *_REFUSED))
_OF_THREADS: dict[CodeType, Callable[[], Hashable]] = {
    threading.current_thread.__code__: _thread,
    threading.main_thread.__code__: _main_thread,
    threading.active_count.__code__: threading.active_count,
    threading.enumerate.__code__: _threads,
}
"""Functions that tell of threads, with what says what they tell."""
_OF_LOGGER = frozenset({"level", "disabled", "propagate", "handlers", "parent"})
_OF_LOGGERS: frozenset[CodeType] = frozenset(
    method.__code__
    for kind in (logging.Logger, logging.LoggerAdapter)
    for method in (kind.isEnabledFor, kind.getEffectiveLevel, kind.hasHandlers)
)
"""Functions that tell whether a logger is enabled."""
_GETS_LOGGER: CodeType = logging.getLogger.__code__
