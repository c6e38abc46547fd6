"""One stage whose blocks are checkpointed: time and memory of F, I and W, for eager and for both engines.

    python -m benchmarks.checkpointing --device cuda --size L

The blocks, clocks and columns are those of `benchmarks.split`. Where a system has no W, its I is the whole
backward, in which it computes the blocks again.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.split import (
    SIZES,
    Result,
    autograd_phases,
    float64_gradients,
    funcstage_phases,
    isolated,
    make_stage,
    measure,
    table,
    torch_split_phases,
    warm_up,
)


class Checkpointed(nn.Module):
    """A block that is computed again for its backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, size {options.size}")
    stage = make_stage(SIZES[options.size], options.device)
    reference = float64_gradients(stage)
    plain = stage.module
    stage.module = nn.Sequential(*map(Checkpointed, plain))
    backend = "inductor" if options.device == "cuda" else "aten"
    systems = {
        "eager": lambda: autograd_phases(stage, stage.module),
        "torch.compile": lambda: autograd_phases(stage, torch.compile(stage.module)),
        "torch's split": partial(torch_split_phases, stage),
        "funcstage closures": partial(funcstage_phases, stage),
        f"funcstage {backend}": partial(funcstage_phases, stage, backend=backend),
    }
    warm_up(stage)
    results: dict[str, Result] = {}
    for name, build in systems.items():
        with isolated():
            try:
                results[name] = measure(name, stage, build, False, options.repeats, reference)
            except RuntimeError as error:  # what torch's split may not do
                print(f"{name} refuses: {str(error).splitlines()[0]}")
    print(table(results))


if __name__ == "__main__":
    main()
