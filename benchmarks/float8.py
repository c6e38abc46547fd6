"""Products in float8 by torchao's recipes: funcstage beside `torch.compile`.

    python -m benchmarks.float8 [--size L] [--repeats 30] [--recipes tensorwise rowwise]
    python -m benchmarks.float8 --train 300 [--seeds 3]

The blocks of `benchmarks.split`, their linear layers converted by torchao, and in bfloat16 as they are. F, I
and W of all systems take turns; milliseconds by device events, medians ± half the distance of the quartiles.
"error" is the largest `||gradient - float64|| / ||float64||` of all gradients. Where the device has no
products of float8 numbers, torchao emulates them, and times say nothing.

With `--train` the demo's model learns the text of the demo so many steps by each system, under autocast to
bfloat16: the mean loss of the last tenth, in nats per byte, of several seeds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

import funcstage as fs
from benchmarks.split import (
    SIZES,
    Phases,
    Stage,
    autograd_phases,
    float64_gradients,
    forget_gradients,
    funcstage_phases,
    make_stage,
    measure_memory,
    relative_error,
    reserved_bytes,
    run,
)
from benchmarks.turns import in_turns, spread_of
from funcstage.demo import model, text

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
EMULATED = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)


def converted(module: nn.Module, recipe: str) -> nn.Module:
    """A copy whose linear layers compute in float8, or in what they are in for `bfloat16`."""
    copied = copy.deepcopy(module)
    if recipe == "bfloat16":
        return copied
    config = Float8LinearConfig.from_recipe_name(recipe)  # type: ignore[arg-type]
    return convert_to_float8_training(copied, config=dataclasses.replace(config, emulate=EMULATED))


def compare(stage: Stage, recipes: Sequence[str], repeats: int) -> None:
    """Print what F, I and W take by each recipe."""
    reference = float64_gradients(stage)
    torch._dynamo.config.recompile_limit = 64
    systems: dict[tuple[str, str], tuple[Stage, Phases]] = {}
    for recipe, name in itertools.product(recipes, ("torch.compile", "funcstage")):
        own = Stage(converted(stage.module, recipe), stage.x, stage.cotangent)  # type: ignore[arg-type]
        if name == "torch.compile":
            systems[recipe, name] = own, autograd_phases(own, torch.compile(own.module))
        else:
            systems[recipe, name] = own, funcstage_phases(own, backend="inductor")
    times = in_turns(systems, repeats)
    print(
        "| recipe | system | F + I + W, ms | F | I | W | held after F | peak MiB | error | of torch.compile |"
    )
    print("| --- " * 10 + "|")
    for (recipe, name), (own, phases) in systems.items():
        dx, grads = run(phases)
        error = relative_error([dx, *grads], reference)
        del dx, grads
        forget_gradients(own)
        held = measure_memory(own, phases, False, reserved_bytes(own))
        memory = [f"{value or 0:.0f}" for value in (held.held_after_forward, held.peak)]
        each = [f"{statistics.median(phase):.3f}" for phase in times[recipe, name].phases]
        each += [""] * (3 - len(each))
        totals = times[recipe, name].totals
        ratio = statistics.median(totals) / statistics.median(times[recipe, "torch.compile"].totals)
        cells = [recipe, name, spread_of(totals), *each, *memory, f"{error:.4f}", f"{ratio:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


Learn = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets to the loss, with the gradients left in the parameters."""


def learners(device: str) -> dict[str, Callable[[nn.Module], Learn]]:
    """How each system takes the gradients."""

    def autocast() -> Any:
        return torch.autocast(device, torch.bfloat16)

    def by_autograd(module: nn.Module) -> Learn:
        compiled = torch.compile(module)

        def learn(inputs: Tensor, targets: Tensor) -> Tensor:
            with autocast():
                loss = model.loss_fn(compiled(inputs), targets)
            loss.backward()
            return loss.detach()

        return learn

    def by_funcstage(module: nn.Module) -> Learn:
        apply, params, buffers = fs.functionalize(module)
        stage = fs.compile(apply)

        def learn(inputs: Tensor, targets: Tensor) -> Tensor:
            with autocast():
                logits, _, pullback = fs.stage_vjp(stage, params, buffers, inputs)
                logits = logits.detach().requires_grad_()
                loss = model.loss_fn(logits, targets)
            (cotangent,) = torch.autograd.grad(loss, [logits])
            _, grads = fs.stage_backward(pullback, cotangent)
            for name, p in module.named_parameters():
                p.grad = grads[name]
            return loss.detach()

        return learn

    return {"torch.compile": by_autograd, "funcstage": by_funcstage}


def train(steps: int, seeds: int, recipes: Sequence[str], device: str) -> None:
    """Print where the demo's model ends by each recipe and system."""
    losses: dict[tuple[str, str], list[float]] = {}
    for seed, recipe in itertools.product(range(seeds), recipes):
        torch.manual_seed(seed)
        start = model.build_model(2).to(device)
        source = text.standard_library(seed)
        for system, learner in learners(device).items():
            torch.compiler.reset()
            module = converted(start, recipe)
            optimizer = torch.optim.AdamW(module.parameters(), 3e-3, betas=(0.9, 0.99), fused=True)
            learn = learner(module)
            curve = []
            batches = text.random_batches(source.train, 16, model.CONTEXT, seed)
            for inputs, targets in itertools.islice(batches, steps):
                optimizer.zero_grad()
                curve.append(learn(inputs.to(device), targets.to(device)))
                optimizer.step()
            last = torch.stack(curve[-steps // 10 :]).mean().item()
            losses.setdefault((recipe, system), []).append(last)
    print("| recipe | system | mean loss of the last tenth, by seed |")
    print("| --- | --- | --- |")
    for (recipe, system), values in losses.items():
        print(f"| {recipe} | {system} | {', '.join(f'{value:.3f}' for value in values)} |", flush=True)


def main() -> None:
    """Compare times, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--train", type=int, metavar="STEPS")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, products {'emulated' if EMULATED else 'in float8'}")
    recipes = ("bfloat16", *options.recipes)
    if options.train is not None:
        train(options.train, options.seeds, recipes, options.device)
    else:
        compare(make_stage(SIZES[options.size], options.device), recipes, options.repeats)


if __name__ == "__main__":
    main()
