"""Long and wide use: many threads, many microbatches, many signatures; what is counted stays bounded.

`benchmarks/soak.py` is the same for longer, with times and bytes.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from both_ways import eager, split
from torch import Tensor, nn
from torch.fx import GraphModule

import funcstage as fs

pytestmark = pytest.mark.slow

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])


def stage(compiled: bool) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).double()
    apply, params, buffers = fs.functionalize(module)
    return fs.compile(apply, backend="aten") if compiled else apply, params, buffers, module


@ENGINES
def test_eight_threads_on_one_stage_get_eagers_gradients(compiled: bool) -> None:
    apply, params, buffers, module = stage(compiled)
    start = threading.Barrier(8)

    def work(number: int) -> list[tuple[Tensor, list[Tensor]]]:
        start.wait()  # so that all of them are first
        xs = [torch.full((2, 4), number + i / 100, dtype=torch.float64) for i in range(25)]
        return [(x, split(apply, params, buffers, x)) for x in xs]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for x, found in (pair for results_of_one in results for pair in results_of_one):
        torch.testing.assert_close(found, eager(module, x))
    if compiled:
        assert "1 signature(s)" in repr(apply)


@ENGINES
def test_thousands_of_microbatches_leave_no_tensor_behind(compiled: bool) -> None:
    apply, params, buffers, _ = stage(compiled)
    x = torch.randn(2, 4, dtype=torch.float64)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for _ in range(10):
        split(apply, params, buffers, x)
    before = tensors()
    for _ in range(2_000):
        split(apply, params, buffers, x)
    assert tensors() <= before


def test_the_least_recently_used_signatures_are_forgotten_with_all_that_they_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By its full name, as the package has a function of the last part of it.
    monkeypatch.setattr(sys.modules["funcstage.engines.graph.compile"], "MAX_SIGNATURES", 4)
    uncompiled, params, buffers, module = stage(compiled=False)
    apply: Any = fs.compile(uncompiled, backend="aten", dynamic=False)
    made: list[weakref.ref[GraphModule]] = []
    for n in range(1, 41):
        x = torch.randn(n, 4, dtype=torch.float64)
        torch.testing.assert_close(split(apply, params, buffers, x), eager(module, x))
        made.append(weakref.ref(list(apply._traced.values())[-1].partition.forward.module))
        split(apply, params, buffers, torch.zeros(1, 4, dtype=torch.float64))  # used again and again
    gc.collect()
    assert "4 signature(s)" in repr(apply)
    alive = [n for n, program in enumerate(made, 1) if program() is not None]
    assert alive == [1, 38, 39, 40]
