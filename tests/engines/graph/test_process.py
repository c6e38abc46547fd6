"""What a compiled stage asks of its process: noticed when it has changed, or refused."""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

LOG = logging.getLogger("funcstage.of_a_test.stage")
ADAPTED = logging.LoggerAdapter(LOG, {})


class Named:
    """A class whose name is asked for."""


class Asking(nn.Module):
    """Scales its output by an answer."""

    def __init__(self, asks: Callable[[], Any]) -> None:
        super().__init__()
        self.linear, self.asks = nn.Linear(3, 3), asks

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + float(self.asks()))


def _zone(name: str) -> None:
    os.environ["TZ"] = name
    time.tzset()


WAITING: list[threading.Timer] = []


def _start() -> None:
    WAITING.append(threading.Timer(1e4, int))
    WAITING[-1].start()


def _end() -> None:
    for timer in WAITING:
        timer.cancel()
        timer.join()
    WAITING.clear()


ASKED: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]] = {
    "whether a logger is enabled": (
        lambda: LOG.isEnabledFor(10),
        lambda: LOG.setLevel(10),
        lambda: LOG.setLevel(0),
    ),
    "whether an adapter is": (
        lambda: ADAPTED.isEnabledFor(10),
        lambda: LOG.setLevel(10),
        lambda: LOG.setLevel(0),
    ),
    "a logger's level": (lambda: LOG.level, lambda: LOG.setLevel(10), lambda: LOG.setLevel(0)),
    "a parent's level": (
        lambda: LOG.getEffectiveLevel(),
        lambda: logging.getLogger("funcstage.of_a_test").setLevel(10),
        lambda: logging.getLogger("funcstage.of_a_test").setLevel(0),
    ),
    "a logger by name": (
        lambda: logging.getLogger(LOG.name).level,
        lambda: LOG.setLevel(10),
        lambda: LOG.setLevel(0),
    ),
    "what is disabled": (
        lambda: logging.root.manager.disable,
        lambda: logging.disable(50),
        lambda: logging.disable(0),
    ),
    "handlers": (
        lambda: len(LOG.handlers),
        lambda: LOG.addHandler(logging.NullHandler()),
        lambda: LOG.handlers.clear(),
    ),
    "decimal's context": (
        lambda: decimal.getcontext().prec,
        lambda: setattr(decimal.getcontext(), "prec", 5),
        lambda: setattr(decimal.getcontext(), "prec", 28),
    ),
    "decimals": (
        lambda: decimal.Decimal(1) / decimal.Decimal(3),
        lambda: setattr(decimal.getcontext(), "prec", 1),
        lambda: setattr(decimal.getcontext(), "prec", 28),
    ),
    "the limit of recursion": (
        lambda: sys.getrecursionlimit() / 1000,
        lambda: sys.setrecursionlimit(4321),
        lambda: sys.setrecursionlimit(1000),
    ),
    "the collector": (lambda: gc.isenabled(), gc.disable, gc.enable),
    "a class's name": (
        lambda: len(Named.__name__),
        lambda: setattr(Named, "__name__", "Longer than it was"),
        lambda: setattr(Named, "__name__", "Named"),
    ),
    "a class's qualified name": (
        lambda: len(Named.__qualname__),
        lambda: setattr(Named, "__qualname__", "Longer than it was"),
        lambda: setattr(Named, "__qualname__", "Named"),
    ),
    "a class's module": (
        lambda: len(Named.__module__),
        lambda: setattr(Named, "__module__", "elsewhere"),
        lambda: setattr(Named, "__module__", __name__),
    ),
    "what a class says of itself": (
        lambda: len(Named.__doc__ or ""),
        lambda: setattr(Named, "__doc__", "Something else."),
        lambda: setattr(Named, "__doc__", "A class."),
    ),
    "a function's name": (
        lambda: len(_zone.__name__),
        lambda: setattr(_zone, "__name__", "another"),
        lambda: setattr(_zone, "__name__", "_zone"),
    ),
    "what is imported": (
        lambda: "of_no_distribution" in sys.modules,
        lambda: sys.modules.__setitem__("of_no_distribution", sys),
        lambda: sys.modules.pop("of_no_distribution", None),
    ),
    "how many threads there are": (  # others come and go, though not as many
        lambda: threading.active_count() // 40,
        lambda: [_start() for _ in range(40)],
        lambda: _end(),
    ),
    "the name of the thread": (
        lambda: len(threading.current_thread().name),
        lambda: setattr(threading.current_thread(), "name", "another"),
        lambda: setattr(threading.current_thread(), "name", "MainThread"),
    ),
    "the name of the main thread": (
        lambda: len(threading.main_thread().name),
        lambda: setattr(threading.main_thread(), "name", "another"),
        lambda: setattr(threading.main_thread(), "name", "MainThread"),
    ),
    "the names of threads": (
        lambda: max(len(each.name) for each in threading.enumerate() if each is threading.main_thread()),
        lambda: setattr(threading.main_thread(), "name", "another"),
        lambda: setattr(threading.main_thread(), "name", "MainThread"),
    ),
    "filters of warnings": (
        lambda: len(warnings.filters),
        lambda: warnings.simplefilter("ignore", BytesWarning),
        lambda: warnings.filters.pop(0),  # type: ignore[attr-defined]
    ),
    "the locale": (
        lambda: len(str(locale.getlocale())),
        lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
        lambda: locale.setlocale(locale.LC_ALL, "C"),
    ),
    "the time zone": (
        lambda: time.mktime((2020, 1, 1, 0, 0, 0, 0, 0, 0)) / 1e6,
        lambda: _zone("FAR+11"),
        lambda: _zone("UTC"),
    ),
    "the working directory": (lambda: len(os.getcwd()), lambda: os.chdir("/usr"), lambda: os.chdir("/")),
    "time-outs": (
        lambda: socket.getdefaulttimeout() or 0,
        lambda: socket.setdefaulttimeout(3),
        lambda: socket.setdefaulttimeout(None),
    ),
    "arguments of the program": (
        lambda: len(sys.argv),
        lambda: sys.argv.append("more"),
        lambda: sys.argv.__delitem__(slice(1, None)),
    ),
}


@pytest.fixture
def defaults() -> Any:
    """Settings as the cases leave them, and afterwards as they were."""
    before = os.getcwd(), os.environ.get("TZ"), locale.setlocale(locale.LC_ALL), sys.getrecursionlimit()
    filters, argv, zone = warnings.filters[:], sys.argv[:], before[1]
    os.chdir("/")
    _zone("UTC")
    locale.setlocale(locale.LC_ALL, "C")
    yield
    os.chdir(before[0])
    os.environ.pop("TZ")
    os.environ.update({} if zone is None else {"TZ": zone})
    time.tzset()
    locale.setlocale(locale.LC_ALL, before[2])
    sys.setrecursionlimit(before[3])
    warnings.filters[:] = filters  # type: ignore[index]
    sys.argv[:] = argv


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("asked", ASKED)
def test_what_has_changed_in_the_process_is_noticed(asked: str) -> None:
    asks, change, change_back = ASKED[asked]
    module, x = Asking(asks), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True)

    def check() -> Tensor:
        output, expected = fs.stage_vjp(stage, params, buffers, x)[0], module(x).detach()
        torch.testing.assert_close(output, expected)
        return expected

    change_back()
    check()
    change()
    try:
        check()
    finally:
        change_back()
    check()


REFUSED: dict[str, Callable[[], Any]] = {
    "_signal.getsignal": lambda: signal.getsignal(signal.SIGUSR1) is None,
    "resource.getrlimit": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 9,
    "posix.sched_getaffinity": lambda: len(os.sched_getaffinity(0)) > 1,
    "sys.getprofile": lambda: sys.getprofile() is None,
    "sys.getrefcount": lambda: sys.getrefcount(Named) > 3,
    "gc.get_objects": lambda: len(gc.get_objects()) > 3,
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_asked_again_is_refused(asked: str) -> None:
    module, x = Asking(REFUSED[asked]), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True)
    with pytest.raises(fs.TraceError, match=rf"{asked}, at .*test_process.py:\d+.* as an argument"):
        fs.stage_vjp(stage, params, buffers, x)
    torch.testing.assert_close(fs.stage_vjp(apply, params, buffers, x)[0], module(x).detach())


def test_a_logger_that_only_writes_is_not_watched() -> None:
    def asks() -> float:
        LOG.debug("of no consequence")
        return 1.0

    module, x = Asking(asks), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True)
    fs.stage_vjp(stage, params, buffers, x)
    before = repr(stage)
    LOG.setLevel(50)
    try:
        fs.stage_vjp(stage, params, buffers, x)
    finally:
        LOG.setLevel(0)
    assert repr(stage) == before
