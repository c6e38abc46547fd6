"""What looking at W's sites costs, against W: `python -m benchmarks.sites [--device cpu] [--repeats 15]`.

A perceptron; in each repeat W and what is computed from the sites take turns, so that a busy machine
disturbs them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcstage as fs

WIDTH, DEPTH, ROWS = 1024, 4, 1024
ENGINES: dict[str, dict[str, Any] | None] = {
    "uncompiled": None,
    "aten": {"backend": "aten", "sites": True},
    "inductor": {"backend": "inductor", "sites": True},
}


def weight_pullback(options: dict[str, Any] | None, device: str) -> fs.WeightPullback:
    """W of the perceptron."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    apply, params, buffers = fs.functionalize(nn.Sequential(*layers).to(device))
    run: Any = apply if options is None else fs.compile(apply, **options)
    output, _, pullback = fs.stage_vjp(run, params, buffers, torch.randn(ROWS, WIDTH, device=device))
    return pullback(torch.randn_like(output))[1]


def operands(weight_pullback: fs.WeightPullback) -> list[tuple[Tensor, Tensor]]:
    """The input and the cotangent of each product; one that a bias alone has is no product."""
    found = {}
    for site in weight_pullback.sites:
        for inputs in (tensor for tensor in site.inputs if tensor.shape[0] == ROWS):
            found[site.params] = inputs, site.cotangent
    return [*found.values()]


def norms(weight_pullback: fs.WeightPullback) -> Tensor:
    """The norm of each example's gradient, weights and biases: |x|^2 |g|^2 + |g|^2 for each layer."""
    squares = [(x.square().sum(1) + 1) * g.square().sum(1) for x, g in operands(weight_pullback)]
    return torch.stack(squares).sum(0).sqrt()


def factors(weight_pullback: fs.WeightPullback) -> list[tuple[Tensor, Tensor]]:
    """The Kronecker factors of each layer."""
    return [(g.T @ g, x.T @ x) for x, g in operands(weight_pullback)]


def seconds(run: Callable[[], Any], device: str) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the medians, and what they are of W's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print("| engine | W, ms | the sites | with the norm of each example's gradient | with both factors |")
    print("| --- | --- | --- | --- | --- |")
    for engine, options in ENGINES.items():
        pending = weight_pullback(options, args.device)
        runs: list[Callable[[], Any]] = [
            lambda pending=pending: pending(retain=True),
            lambda pending=pending: operands(pending),
            lambda pending=pending: norms(pending),
            lambda pending=pending: factors(pending),
        ]
        taken = [[seconds(run, args.device) for run in runs] for _ in range(args.repeats + 2)][2:]
        whole, *others = map(statistics.median, zip(*taken, strict=True))
        cells = " | ".join(f"{1e3 * other:.2f} ms, {other / whole:.2f} W" for other in others)
        print(f"| {engine} | {1e3 * whole:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
