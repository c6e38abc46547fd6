"""Linear layers of torchao that compute in float8, against eager backward on both engines."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import funcstage as fs
from funcstage.testing import check_stage

pytest.importorskip("torchao")
float8 = pytest.importorskip("torchao.float8")

aten = functools.partial(fs.compile, backend="aten")
EMULATED = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)
DEVICE = "cpu" if EMULATED else "cuda"
ROWS = 32
RECIPES = pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
ENGINES = pytest.mark.parametrize("engine", [None, aten], ids=["closures", "aten"])


def network(recipe: str) -> nn.Module:
    """Layers whose sizes are multiples of 16, as float8 products want them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32, bias=False))
    config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=EMULATED)
    return float8.convert_to_float8_training(module.to(DEVICE, torch.bfloat16), config=config)


@ENGINES
@RECIPES
def test_float8_layers_are_split_as_eager_runs_them(recipe: str, engine: Any) -> None:
    x = torch.randn(2, ROWS // 2, 32, device=DEVICE, dtype=torch.bfloat16)
    check_stage(network(recipe), x, engines=engine or "closures", tolerance=0.0, flops=False)


def flops(function: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


@ENGINES
def test_what_a_float8_backward_costs(engine: Any) -> None:
    """torchao's backward computes both products whatever is asked of it; traced, each is computed once."""
    apply, params, buffers = fs.functionalize(network("tensorwise"))
    stage = engine(apply) if engine else apply
    x = torch.randn(ROWS, 32, device=DEVICE, dtype=torch.bfloat16)
    fs.stage_backward(fs.stage_vjp(stage, params, buffers, x)[2], x)  # compiled
    (_, _, pullback), of_f = flops(lambda: fs.stage_vjp(stage, params, buffers, x))
    (_, weight_pullback), of_i = flops(lambda: pullback(x))
    _, of_w = flops(weight_pullback)
    products = 2 * ROWS * 2 * 32 * 64
    repeated = 1 if engine else 2
    assert (of_f, of_i, of_w) == (products, repeated * products, repeated * products)


@pytest.mark.parametrize("options", [["--size", "XS", "--repeats", "1"], ["--train", "10", "--seeds", "1"]])
def test_the_comparison_with_torch_compile_runs(options: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.float8",
        "--device",
        "cpu",
        "--recipes",
        "tensorwise",
        *options,
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| funcstage |") == 2
