"""Time of the partition of a large graph: `python -m benchmarks.partition [--blocks 260]`."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import funcstage as fs
from funcstage.graph.partition import partition
from funcstage.graph.separate import DECOMPOSED, separate
from funcstage.graph.trace import trace


def main() -> None:
    """Trace a deep stage on the meta device and partition it five times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=260)
    args = parser.parse_args()
    with torch.device("meta"):
        block = [nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Tanh()]
        module, x = nn.Sequential(*(block * args.blocks)), torch.empty(4, 8)
    apply, params, buffers = fs.functionalize(module)
    joint = separate(trace(apply, params, buffers, (x,), {}, [0], DECOMPOSED))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        partition(joint, "min_cut")
        seconds.append(time.perf_counter() - start)
    print(f"{len(joint.module.graph.nodes)} nodes partitioned in {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
