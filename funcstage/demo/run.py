"""The demo from beginning to end."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

import funcstage as fs
from funcstage.demo import adamw, distributed, measure, model, report, scalars, text, train
from funcstage.errors import StageError
from funcstage.functional import FunctionalStage
from funcstage.pipelining import (
    Costs,
    ScheduleName,
    Timeline,
    pipeline_order,
    plot_timeline,
    simulate,
)

_SEQUENCES_PER_MICROBATCH = 2
_TOLERANCE = 1e-4  # of float32 sums over a few hundred terms, taken in another order
_AVERAGED = 20  # steps that the last training loss is a mean over


class Settings(NamedTuple):
    """What the command line decides."""

    device: str
    schedule: ScheduleName
    steps: int
    stages: int
    microbatches: int
    seed: int
    output: Path
    scalars: Path


def run(settings: Settings) -> None:
    """Train the model, and report what the pipeline did and would do on as many devices as ranks.

    Under torchrun each process is one of these ranks, and the first one reports.

    Raises:
        StageError: if the settings do not fit together, or the gradients are wrong.
    """
    start = time.perf_counter()
    console = Console(highlight=False, quiet=distributed.RANK > 0)
    spread = distributed.WORLD_SIZE > 1
    order = pipeline_order(
        settings.schedule,
        settings.stages,
        settings.microbatches,
        num_ranks=distributed.WORLD_SIZE if spread else None,
    )
    device = _device(settings.device)
    torch.manual_seed(settings.seed)
    whole = model.build_model(settings.stages).to(device)
    modules = model.cut_evenly(whole, settings.stages)
    stages = [fs.functionalize(module) for module in modules]
    log = scalars.to_tensorboard(settings.scalars / f"rank{distributed.RANK}" if spread else settings.scalars)
    pipeline = distributed.pipeline(order, modules, device, log)
    source = text.standard_library(settings.seed)
    batch = settings.microbatches * _SEQUENCES_PER_MICROBATCH
    batches = (
        (x.to(device), y.to(device))
        for x, y in text.random_batches(source.train, batch, model.CONTEXT, settings.seed)
    )
    place = "a process each" if spread else "all in this one process"
    size = sum(p.numel() for p in whole.parameters())
    console.print(
        f"text: {len(source.train) + len(source.held_out):,} bytes of Python's standard library, "
        f"{source.files} files\n"
        f"model: byte-level transformer, {size:,} parameters, {settings.stages} stages, on {device}\n"
        f"schedule: {order.schedule}, {order.num_ranks} ranks, {place}, "
        f"{settings.microbatches} microbatches of {_SEQUENCES_PER_MICROBATCH} x {model.CONTEXT} bytes"
    )

    params, buffers = (
        [stages[i].params for i in pipeline.stages],
        [stages[i].buffers for i in pipeline.stages],
    )
    inputs, targets = next(batches)
    _, _, grads = pipeline.step(params, buffers, inputs, targets)
    grads = pipeline.gather(grads)
    error = measure.relative_error(whole, inputs, targets, grads) if grads else 0.0
    console.print(_checked(error))

    optimizer = adamw.adamw(adamw.warmed_up(3e-3, settings.steps))
    with report.progress(console, settings.steps, inputs.numel()) as advance:
        trained = train.train(
            pipeline.step, optimizer, params, buffers, itertools.islice(batches, settings.steps), advance
        )
    values = pipeline.gather(list(zip(trained.params, trained.buffers, strict=True)))
    if spread:
        dist.destroy_process_group()
    if not values:  # rank 0 has them, and does the rest
        return
    stages = [FunctionalStage(stage.apply, p, b) for stage, (p, b) in zip(stages, values, strict=True)]

    microbatch = slice(0, _SEQUENCES_PER_MICROBATCH)
    costs = measure.measure(stages, inputs[microbatch], targets[microbatch])
    console.print(report.cost_table(costs))
    timeline = simulate(order, [cost.costs for cost in costs])
    plot_timeline(timeline, settings.output)
    console.print(f"bubble of a step under these times: {_bubbles(timeline)}")
    console.print(f"picture of the step on a clock: {settings.output}")
    if log is not None:
        console.print(f"scalars of each step: tensorboard --logdir {settings.scalars}")

    x, y = text.windows(source.held_out, 128, model.CONTEXT)
    validation = train.evaluate(stages, x.to(device), y.to(device))
    recent = trained.losses[-_AVERAGED:]
    console.print(f"time: {time.perf_counter() - start:.0f} s")
    console.print(
        f"train loss {_nats(sum(recent) / len(recent))}, validation loss {_nats(validation)}, "
        f"unigram entropy {_nats(source.unigram_entropy)}",
        soft_wrap=not console.is_terminal,  # a terminal breaks it between words
    )


def _checked(error: float) -> str:
    if not error <= _TOLERANCE:
        raise StageError(
            f"The pipeline's gradients differ from plain eager backward by {error:.1e} relative, more than "
            f"{_TOLERANCE:.0e}. They are wrong: please report this with the command line."
        )
    return (
        f"check: all gradients equal those of plain eager backward of the whole model; "
        f"largest relative error {error:.1e}"
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and distributed.WORLD_SIZE > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "cpu":
        # Kernels this small gain little from a second thread, and lose much where cores are shared.
        torch.set_num_threads(1)
    return device


def _bubbles(timeline: Timeline) -> str:
    """Compare a timeline with 1F1B on as many ranks, each with as many consecutive stages in one."""
    order = timeline.order
    share = order.num_stages // order.num_ranks
    merged = [
        Costs(*map(sum, zip(*timeline.costs[i : i + share], strict=True)))
        for i in range(0, order.num_stages, share)
    ]
    reference = simulate(pipeline_order("1F1B", order.num_ranks, order.num_microbatches), merged)
    return (
        f"{order.schedule} {timeline.bubble_fraction:.1%} of {timeline.makespan * 1e3:.0f} ms, "
        f"1F1B on the same {order.num_ranks} ranks {reference.bubble_fraction:.1%} of "
        f"{reference.makespan * 1e3:.0f} ms"
    )


def _nats(loss: float) -> str:
    return f"{loss:.3f} nats ({text.bits(loss):.3f} bits) per byte"
