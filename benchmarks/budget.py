"""Bytes held after F against what is computed again: `python -m benchmarks.budget [--size M] [--device cpu]`.

The curve of `remat` from 0 to 1, as the plans say it. On a GPU the time of F, I and W too, beside
`torch.compile` with its own activation budget, all taking turns. The last column is against `torch.compile`
with the largest budget, of which 1.0 is none.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import config
from torch._inductor.compile_fx import compile_fx

import funcstage as fs
from benchmarks.split import (
    SIZES,
    Phases,
    Stage,
    autograd_phases,
    funcstage_phases,
    make_stage,
    measure_memory,
    reserved_bytes,
)
from benchmarks.turns import in_turns, spread_of

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


def compare(stage: Stage, budgets: Sequence[float], repeats: int) -> None:
    """Print the time of each budget, ours and that of `torch.compile`, all of which take turns."""
    torch._dynamo.config.recompile_limit = 64
    systems: dict[tuple[str, float], tuple[Stage, Phases]] = {}
    for budget in budgets:

        def within_budget(graph: Any, inputs: Any, budget: float = budget) -> Any:
            """A backend of its own, as Dynamo takes the code of a module like it otherwise."""
            with config.patch(activation_memory_budget=budget):
                return compile_fx(graph, inputs)

        for name in ("torch.compile", "funcstage"):
            own = Stage(copy.deepcopy(stage.module), stage.x, stage.cotangent)
            phases = (
                autograd_phases(own, torch.compile(own.module, backend=within_budget))
                if name == "torch.compile"
                else funcstage_phases(own, backend="inductor", remat=budget)
            )
            systems[name, budget] = own, phases
    times = in_turns(systems, repeats)
    base = times["torch.compile", max(budgets)].totals
    print("| budget | system | MiB after F | for W | F + I + W, ms | of torch.compile's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, budget), (own, phases) in systems.items():
        held = measure_memory(own, phases, False, reserved_bytes(own))
        cells = [str(budget), name, f"{held.held_after_forward or 0:.0f}"]
        cells += ["" if held.held_for_weight is None else f"{held.held_for_weight:.0f}"]
        totals = times[name, budget].totals
        cells += [spread_of(totals), f"{statistics.median(totals) / statistics.median(base):.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the curve, and on a GPU what it takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="to compare the times of")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    stage = make_stage(SIZES[args.size], args.device)
    curve(stage)
    if stage.x.is_cuda:
        compare(stage, args.budgets, args.repeats)


if __name__ == "__main__":
    main()
