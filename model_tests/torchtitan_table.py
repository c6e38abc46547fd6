"""Trains torchtitan's debug models in every way that titan.py knows, and writes TORCHTITAN.md.

    pip install -e '.[torchtitan]' && python model_tests/torchtitan_table.py

takes about an hour on two cores, and goes on where it was left. `--models` and `--ranks` choose.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from pipeline_ranks import run
from titan import CHECKPOINTS, MODELS, RANKS, SCHEDULES, Run, trained

TABLE = Path(__file__).with_name("TORCHTITAN.md")
COLUMNS = ("model", "ranks", "schedule", "checkpointing", "compile.enable", "loss", "uncompiled", "aten")
HEAD = """# torchtitan on our stages

    pip install -e '.[torchtitan]' && python model_tests/torchtitan_table.py

torchtitan's debug models, trained for ten steps of AdamW with clipped gradients in float32 on gloo, by
torchtitan's own functions: `pipelining_fn` cuts a model into four stages on two ranks and applies tensor
parallelism, activation checkpointing, `torch.compile` of blocks and FSDP to them. The losses and the
norms of all gradients in each step are compared with those of the same model on torch's own stages,
without `torch.compile`. A cell says how far they are apart at most, relative to their size; *equal* is
to the last bit.

PP is two ranks, +TP doubles them and so does +FSDP. torchtitan wraps every part by `fully_shard`, also
where that is over one rank. The loss is computed on all logits, or in chunks, outside of the stage, as
in torchtitan's own configurations. Under ZBVZeroBubble torch's stages leave the last norm without a
gradient where the loss is in chunks, and raise an error where checkpointing is selective; so these rows
are compared with torch's stages under Interleaved1F1B.

Routed experts are handed a copy of their input. torch's `local_map`, which they run in, waits in eager for an
activation that has just been gathered by TP, and loses its gradient by that
(https://github.com/pytorch/pytorch/issues/151240): without the copy, the gradient of the layer's input was
off by 0.3 of its largest magnitude, on torch's stages and on ours uncompiled. Compiled, nothing was lost.
Experts compute in bfloat16, which rounds to 4e-3: with them, sums in another order show.

What was not tried: torchtitan's trainer, which insists on a GPU, and with it FlexAttention's kernels,
bfloat16 and Inductor on torchtitan's models.

What could not be tried: torchtitan 0.3.0 on torch 2.11, where neither its models nor its trainer can be
imported (`ImportError: cannot import name 'DataParallelMeshDims' from 'torch.distributed.fsdp'`); with torch
2.12 all of it imports. Nor could its GraphPP (`torchtitan.experiments.graph_trainer.graph_pp`), which 0.3.0
has: building its graphs needs the same name, so torch 2.12 at least, and besides `_PipelineScheduleRuntime`,
`_PipelineContext`, `_Action`, `_wait_batch_p2p` and `_normalize_model_output_as_tuple` of
`torch.distributed.pipelining`, `_extract_graph_with_inputs_outputs` and `_extract_fwd_bwd_outputs` of
`torch._functorch.partitioners`, and `torch.fx._lazy_graph_module`, which torch 2.11 has.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--ranks", nargs="+", choices=RANKS, default=[*RANKS])
    parser.add_argument("--again", action="store_true", help="train those that are in the table, too")
    options = parser.parse_args()
    rows = known()
    for way, ranks, model in itertools.product(ways(), options.ranks, options.models):
        plain = Run(model, ranks, **way)
        row = *plain[:4], "on" if plain.blocks_compiled else "off", plain.loss
        if row in rows and not options.again:
            continue
        expected = run(plain.world_size, trained, plain.on_torchs_stages())
        rows[row] = [compared(plain._replace(stages=stages), expected) for stages in ("uncompiled", "aten")]
        print(*row, *rows[row], sep="\t", flush=True)
        write(rows)


def ways() -> Iterator[dict[str, Any]]:
    """How a model is trained on any ranks; each schedule and each checkpointing once before the rest."""
    for shift in range(2):
        for i, checkpoint in enumerate(CHECKPOINTS):
            yield {"schedule": SCHEDULES[(i + shift) % 2], "checkpoint": checkpoint}
        for schedule in SCHEDULES[1 - shift :: 2]:
            yield {"schedule": schedule, "checkpoint": "selective", "loss": "chunked"}
    yield {"schedule": SCHEDULES[1], "checkpoint": "selective", "blocks_compiled": True, "loss": "chunked"}


def compared(mine: Run, expected: list[list[tuple[float, float]]]) -> str:
    try:
        return apart(run(mine.world_size, trained, mine), expected)
    except (AssertionError, TimeoutError) as error:
        print(error, file=sys.stderr, flush=True)
        return "**fails**"


def apart(found: list[list[tuple[float, float]]], expected: list[list[tuple[float, float]]]) -> str:
    pairs = [
        (a, b)
        for rank, steps in zip(found, expected, strict=True)
        for step, other in zip(rank, steps, strict=True)
        for a, b in zip(step, other, strict=True)
    ]
    if all(a == b for a, b in pairs):
        return "equal"
    return f"{max(abs(a - b) / abs(b) for a, b in pairs if a != b):.0e}"


def known() -> dict[tuple[str, ...], list[str]]:
    """The rows that there are."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {tuple(row[:6]): row[6:] for row in rows[2:]}


def write(rows: dict[tuple[str, ...], list[str]]) -> None:
    versions = f"With torch {version('torch')} and torchtitan {version('torchtitan')}, on a CPU.\n\n"
    names = (*MODELS, *RANKS, *SCHEDULES, *CHECKPOINTS, "off", "on", "whole", "chunked")
    places = {name: i for i, name in enumerate(names)}
    ordered = sorted(rows, key=lambda row: [places[name] for name in row])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([*row, *rows[row]] for row in ordered)]
    TABLE.write_text(HEAD + versions + "".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
