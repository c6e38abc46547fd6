"""Calls that answer differently each time, told from those that do not, and by whose generator they draw."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import random
import secrets
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage.engines.graph.draws import Noted

OWN = random.Random(1)
NUMPYS_OWN = numpy.random.RandomState(1)
NEW = numpy.random.default_rng(1)


def noted_of(function: Callable[..., Any], *within_reach: Any) -> tuple[list[str], list[str]]:
    """What is noted of a call: draws and clocks, each at the line of the first."""
    noted = Noted({*map(id, within_reach)})
    frame = sys._getframe()
    noted.call(function, frame, {frame.f_code})
    first = frame.f_lineno - 1
    noted.call(function, frame, {frame.f_code})  # the first place is the one that is said
    assert {*noted.draws.values(), *noted.clocks.values()} <= {f"{__file__}:{first}"}
    return [*noted.draws], [*noted.clocks]


@pytest.mark.parametrize(
    ("function", "clock"),
    [
        (time.time, "time.time"),
        (time.perf_counter_ns, "time.perf_counter_ns"),
        (datetime.datetime.now, "datetime.now"),
        (datetime.datetime.utcnow, "datetime.utcnow"),
        (datetime.date.today, "date.today"),
    ],
)
def test_a_clock_is_noted_with_its_line(function: Any, clock: str) -> None:
    assert noted_of(function) == ([], [clock])


@pytest.mark.parametrize(
    ("function", "draw"),
    [
        (os.urandom, "os.urandom"),
        (random.random, "random's random"),
        (random.getrandbits, "random's getrandbits"),
        (numpy.random.rand, "numpy's rand"),
    ],
)
def test_a_draw_from_what_all_share_is_noted_with_its_line(function: Any, draw: str) -> None:
    assert noted_of(function) == ([draw], [])


@pytest.mark.parametrize(
    "function",
    [
        time.sleep,
        time.strftime,
        time.mktime,
        os.getpid,
        math.sin,
        len,
        [].append,
        int.from_bytes,
        datetime.date.fromisoformat,
        datetime.datetime(2020, 1, 1).timestamp,
    ],
)
def test_what_answers_the_same_each_time_is_not_noted(function: Any) -> None:
    assert noted_of(function) == ([], [])


@pytest.mark.parametrize(
    ("generator", "function", "draw"),
    [
        (OWN, OWN.random, "random's random"),
        (NUMPYS_OWN, NUMPYS_OWN.rand, "numpy's rand"),
        (NEW, NEW.normal, "numpy's normal"),
    ],
)
def test_a_generator_counts_if_it_was_there_before_the_stage_ran(
    generator: Any, function: Any, draw: str
) -> None:
    assert noted_of(function) == ([], [])
    assert noted_of(function, generator) == ([draw], [])


def drawn(function: str, module: str, within_reach: tuple[Any, ...] = (), **given: Any) -> dict[str, str]:
    """What is noted of a call of a function in Python in a library of random numbers."""
    noted = Noted({*map(id, within_reach)})
    code: Any = SimpleNamespace(co_filename="stage.py")
    caller = SimpleNamespace(f_code=code, f_lineno=7)
    frame: Any = SimpleNamespace(
        f_locals=given,
        f_code=SimpleNamespace(co_name=function),
        f_globals={"__name__": module},
        f_back=caller,
    )
    noted.draw(frame, [])
    assert not noted.draws  # somebody else calls it
    noted.draw(frame, [code])
    assert not noted.clocks
    return noted.draws


def test_functions_of_the_library_in_python_are_noted_by_whose_generator_they_draw_from() -> None:
    shared = random.random.__self__  # type: ignore[attr-defined]
    assert drawn("uniform", "random", self=shared) == {"random.uniform": "stage.py:7"}
    assert drawn("token_hex", secrets.__name__) == {"secrets.token_hex": "stage.py:7"}
    assert drawn("uniform", "random", self=OWN) == {}
    assert drawn("uniform", "random", (OWN,), self=OWN) == {"random.uniform": "stage.py:7"}
    assert drawn("_randbelow", "random", self=shared) == {}


def test_without_numpy_there_is_pythons_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    assert noted_of(random.random) == (["random's random"], [])
    assert noted_of(numpy.random.rand) == ([], [])


def opens(path: Path) -> Any:
    with open(path) as file:
        return json.load(file)


FILES: dict[str, Callable[[Path], Any]] = {
    "open": opens,
    "a path": lambda path: json.loads(path.read_text()),
    "numpy": lambda path: float(numpy.loadtxt(path)),
    "whether it is there": lambda path: 1.0 + path.with_suffix(".other").exists(),
    "of a folder": lambda path: len(os.listdir(path.parent)),
}


@pytest.mark.parametrize("how", FILES)
def test_a_stage_that_reads_files_is_refused_in_a_trace(how: str, tmp_path: Path) -> None:
    path = tmp_path / "scale.json"

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * FILES[how](path)

    module, x = Scaled(4, 4), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    for scale in ("2.0", "3.0"):
        path.write_text(scale)
        torch.testing.assert_close(fs.stage_vjp(apply, params, buffers, x)[0], module(x).detach())
    with pytest.raises(fs.TraceError, match=r"a file, or looks for one \(at .*test_draws.py:\d+.*works"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)


def test_a_trace_in_which_lines_of_code_are_read_is_none_that_reads_files() -> None:
    class Warns(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("scaled", stacklevel=1)
            logging.getLogger("funcstage.test").warning("scaled by %s", traceback.format_stack(limit=1)[0])
            return super().forward(x)

    apply, params, buffers = fs.functionalize(Warns(4, 4))
    with pytest.warns(UserWarning, match="scaled"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(2, 4))


@pytest.mark.parametrize("drawn", [random.random, numpy.random.rand], ids=["python", "numpy"])
def test_a_refused_stage_has_drawn_nothing(drawn: Any) -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * drawn()

    apply, params, buffers = fs.functionalize(Drawing(4, 4))
    before = random.getstate(), str(numpy.random.get_state())
    with pytest.raises(fs.TraceError, match="draws"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.ones(2, 4))
    assert (random.getstate(), str(numpy.random.get_state())) == before
