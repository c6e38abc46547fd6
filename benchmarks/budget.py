"""Bytes held after F against what is computed again: `python -m benchmarks.budget [--size M] [--device cpu]`.

The curve of `remat` from 0 to 1, as the plans say it. On a GPU the time of F, I and W too, beside
`torch.compile` with its own activation budget, in one run.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch._functorch import config

import funcstage as fs
from benchmarks.split import (
    SIZES,
    Result,
    Stage,
    autograd_phases,
    float64_gradients,
    funcstage_phases,
    make_stage,
    measure,
)

BUDGETS = [i / 10 for i in range(11)]


def curve(stage: Stage) -> None:
    """Print what each budget holds and computes again."""
    apply, params, buffers = fs.functionalize(stage.module)
    print("| remat | MiB allowed | held after F | held for W | FLOPs again in I | in W | of all |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    choices: list[Any] = ["full", *BUDGETS, "min_cut", "none"]
    for remat in choices:
        plan = fs.compile(apply, backend="aten", remat=remat).plan(params, buffers, stage.x)
        allowed = "" if plan.budget is None else f"{plan.budget / 2**20:.0f}"
        held = f"{plan.held_after_forward / 2**20:.0f} | {plan.held_after_input / 2**20:.0f}"
        again = [phase.recomputed_flops / 1e9 for phase in (plan.input_grad, plan.weight_grad)]
        share = plan.recomputed_flops / plan.flops
        print(f"| {remat} | {allowed} | {held} | {again[0]:.0f} G | {again[1]:.0f} G | {share:.1%} |")


def timed(stage: Stage, repeats: int) -> None:
    """Print the time of each budget, ours and that of `torch.compile`."""
    reference = float64_gradients(stage)
    print("| budget | ours: MiB after F | ms | torch.compile: MiB after F | ms |")
    print("| --- | --- | --- | --- | --- |")
    for budget in BUDGETS:

        def compiled(budget: float = budget) -> Any:
            torch.compiler.reset()
            config.activation_memory_budget = budget
            return autograd_phases(stage, torch.compile(stage.module))

        def ours(budget: float = budget) -> Any:
            return funcstage_phases(stage, backend="inductor", remat=budget)

        cells = []
        for name, build in (("funcstage", ours), ("torch.compile", compiled)):
            found: Result = measure(name, stage, build, False, repeats, reference)
            cells.append(f"{found.held_after_forward_mib or 0:.0f} | {found.total_ms:.3f}")
        print(f"| {budget} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the curve, and on a GPU what it takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    stage = make_stage(SIZES[args.size], args.device)
    curve(stage)
    if stage.x.is_cuda:
        timed(stage, args.repeats)


if __name__ == "__main__":
    main()
