"""TorchInductor as a backend: what it lays out or refuses, and, in processes of their own, what is cached on
disk and what is imported when.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.compiler.config
from torch import Tensor

import funcstage as fs
from funcstage.engines.graph.inductor import decompositions

ROOT = Path(__file__).parents[3]

COMPILES = """
import json

import torch
from torch import nn
from torch._dynamo.utils import counters

import funcstage as fs

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
apply, params, buffers = fs.functionalize(module)
x = torch.randn(4, 16)
output, _, pullback = fs.stage_vjp(fs.compile(apply, backend="inductor"), params, buffers, x)
(dx,), weight_pullback = pullback(output.cos())
grads = [dx, *weight_pullback().values()]
expected = module(x.requires_grad_())
expected = torch.autograd.grad(expected, [x, *module.parameters()], expected.cos())
for ours, eagers in zip(grads, expected, strict=True):
    torch.testing.assert_close(ours, eagers)
kinds = ("hit", "miss", "bypass")
print(json.dumps([counters["inductor"][f"fxgraph_cache_{kind}"] for kind in kinds]))
print(json.dumps([grad.tolist() for grad in grads]))
"""

IMPORTS = """
import json
import sys

import optree
import torch

before = set(sys.modules)
import funcstage as fs

{then}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def run(script: str, **environment: str) -> list[Any]:
    """Run a script in a process of its own; what it prints last, line by line."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first_in_inductors_cache(tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    cache["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # an empty cache also forgets which instructions were tried out
    (cold, grads), (warm, again) = run(COMPILES, **cache), run(COMPILES, **cache)
    assert cold == [0, 3, 0], "F, I and W are compiled once and stored"
    assert warm == [3, 0, 0], "F, I and W are read back"
    assert again == grads


def assert_as_eager(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    **options: Any,
) -> None:
    stage = fs.compile(
        lambda params, buffers, x: (function(x, params), buffers), backend="inductor", **options
    )
    with around():
        output, _, pullback = fs.stage_vjp(stage, w, (), x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    with around():
        expected = function(*leaves)
    grads = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    torch.testing.assert_close([output, dx, weight_pullback()], [expected.detach(), *grads])


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_residual_that_is_an_operand_of_a_product_has_the_strides_of_the_trace(cached: bool) -> None:
    """Inductor's passes note other strides on the nodes, and do not run where a program is in its cache."""
    torch.manual_seed(0)
    x, w = torch.eye(4, 3) + 0.1 * torch.randn(4, 3), torch.eye(3) + 0.1 * torch.randn(3, 3)
    for _ in range(1 + cached):
        with torch.compiler.config.patch(force_disable_caches=not cached):
            assert_as_eager(lambda x, w: torch.linalg.pinv(x @ w), x, w)


def test_a_batch_of_nothing_may_have_open_sizes() -> None:
    """Inductor's code binds no names to the sizes of what has no elements."""
    with torch.compiler.config.patch(force_disable_caches=True):
        assert_as_eager(lambda x, w: (x * w).exp(), torch.ones(0, 3, 2), torch.ones(2), dynamic=True)


@pytest.mark.slow
def test_what_is_out_of_autocast_is_compiled_in_its_own_precision() -> None:
    """Inductor finds dtypes by running operations, which the caller's autocast must not change."""
    torch.manual_seed(0)

    def in_float32(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            product = torch.mm(x, w)
        return product.bfloat16() + w[0].bfloat16()

    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    with torch.compiler.config.patch(force_disable_caches=True):
        assert_as_eager(in_float32, torch.randn(4, 8), torch.randn(8, 8), autocast)


@pytest.mark.filterwarnings("ignore:TorchInductor cannot compile:UserWarning")
def test_sums_of_complex_numbers_of_which_there_are_none_run_as_they_are() -> None:
    x, w = torch.empty(3, 0, dtype=torch.complex64).t(), torch.ones(3, dtype=torch.complex64)
    assert_as_eager(torch.add, x, w)


@pytest.mark.slow
def test_importing_funcstage_leaves_tracing_and_compilers_for_when_they_are_asked_for() -> None:
    (loaded,) = run(IMPORTS.format(then=""))
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"funcstage"}
    assert not any(name.startswith("funcstage.engines.graph") for name in loaded)
    (loaded,) = run(IMPORTS.format(then="assert fs.compile and fs.CompiledStage"))
    assert "funcstage.engines.graph.compile" in loaded
    assert not any(name.startswith(("torch._inductor", "torch._dynamo")) for name in loaded)


def test_what_is_imported_late_is_found_by_all_the_usual_ways() -> None:
    then = """
assert {"compile", "CompiledStage", "testing", "schedules"} <= set(dir(fs))
assert all(getattr(fs, name) is not None for name in dir(fs))
import funcstage.testing
assert fs.testing is funcstage.testing
from funcstage import CompiledStage, compile
import funcstage.engines.graph
assert compile is fs.compile is funcstage.engines.graph.compile
assert CompiledStage is fs.CompiledStage
everything = {}
exec("from funcstage import *", everything)
assert set(fs.__all__) <= set(everything)
assert everything["compile"] is compile
assert not hasattr(fs, "nothing")
"""
    run(IMPORTS.format(then=then))


class Narrow(torch.nn.Module):
    """Normalizes values that bfloat16 rounds to three levels: which one decides about every gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        levels = (x * self.weight.bfloat16()).sigmoid() * 1.1 + 100.0
        return torch.nn.functional.layer_norm(levels.float(), (8,))


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="before 2.13, Inductor's C++ takes back roundings before a cast, always",
)
@pytest.mark.parametrize("remat", ["none", "min_cut", "full"])
def test_every_program_rounds_to_low_precision_where_eager_does(remat: Any) -> None:
    torch.manual_seed(0)
    module, x = Narrow(), torch.randn(4, 8).bfloat16().requires_grad_()
    expected = module(x)
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [x, module.weight], cotangent)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="inductor", remat=remat)
    output, _, pullback = fs.stage_vjp(compiled, params, buffers, x.detach())
    (dx,), weight_pullback = pullback(cotangent)
    torch.testing.assert_close(output, expected.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(dx, grads[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(weight_pullback()["weight"], grads[1], atol=1e-2, rtol=1e-2)


def test_no_draw_is_taken_apart_before_inductor_sees_it() -> None:
    """Of its parts, the draws would be others than eager's, for the same seed."""
    aten, found = torch.ops.aten, decompositions()
    draws = {aten.native_dropout, aten.uniform, aten.normal_functional, aten.exponential}
    assert {aten.bernoulli.p, *(draw.default for draw in draws)}.isdisjoint(found)
    assert aten.native_layer_norm.default in found
