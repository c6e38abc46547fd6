"""Time of the partition of large graphs: `python -m benchmarks.partition [--blocks 260] [--layers 80]`.

A deep stage of small layers, and one of a 70-billion-parameter model's size. Of the processor's time too, as
others may use the machine.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import funcstage as fs
from benchmarks.split import Block, Size
from funcstage.engines.base import StageCall
from funcstage.engines.graph.decompose import DECOMPOSED, decompose
from funcstage.engines.graph.partition import partition
from funcstage.engines.graph.trace import trace


def report(name: str, module: nn.Module, x: Tensor) -> None:
    """Trace a stage and partition it five times."""
    apply, params, buffers = fs.functionalize(module)
    joint = decompose(trace(StageCall.of(apply, params, buffers, (x,), {}, [0]), DECOMPOSED, copied=False))
    runs = []
    for _ in range(5):
        start = time.perf_counter(), time.process_time()
        partition(joint, "min_cut")
        runs.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, processor = (sorted(column) for column in zip(*runs, strict=True))
    print(
        f"{name}: {len(joint.module.graph.nodes)} nodes partitioned in {wall[2]:.2f} s, "
        f"at best {wall[0]:.2f} s, {processor[2]:.2f} s of the processor"
    )


def main() -> None:
    """Partition both stages on the meta device, where nothing is allocated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=260)
    parser.add_argument("--layers", type=int, default=80)
    args = parser.parse_args()
    size = Size(8192, 28672, args.layers, 1, 4096, 64)
    with torch.device("meta"):
        small = [nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Tanh()]
        report(f"{args.blocks} small blocks", nn.Sequential(*(small * args.blocks)), torch.empty(4, 8))
        large = nn.Sequential(*(Block(size) for _ in range(size.layers))).to(torch.bfloat16)
        x = torch.empty(size.batch, size.tokens, size.width, dtype=torch.bfloat16)
        report(f"{size.layers} layers of width {size.width}", large, x)


if __name__ == "__main__":
    main()
