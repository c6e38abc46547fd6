"""Draw the pictures of the guide beside this file, with matplotlib: `python docs/pictures/draw.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

import funcstage as fs
from funcstage.pipelining import (
    Costs,
    Timeline,
    pipeline_order,
    plot_comparison,
    plot_timeline,
    simulate,
    zero_bubble_h1,
)
from funcstage.schedules.plot import COLORS, NAMES

HERE = Path(__file__).parent
RANKS, MICROBATCHES = 4, 8
OF_A_RANK = Costs(forward=1.0, input=1.0, weight=1.0, held_after_forward=1 << 30, held_after_input=1 << 29)
HALF = Costs(*(cost / 2 for cost in OF_A_RANK))


def timeline(schedule: str) -> Timeline:
    """A step of a schedule, whose ranks have the same work in all."""
    if schedule == "ZB-H1":
        return simulate(zero_bubble_h1(RANKS, MICROBATCHES), [OF_A_RANK] * RANKS)
    share = 1 if schedule in ("GPipe", "1F1B") else 2
    order = pipeline_order(schedule, share * RANKS, MICROBATCHES, num_ranks=RANKS)  # type: ignore[arg-type]
    return simulate(order, [OF_A_RANK if share == 1 else HALF] * share * RANKS)


def two_steps(path: Path) -> None:
    """1F1B and ZB-V on the same clock: the picture on the first page."""
    steps = [("1F1B", timeline("1F1B")), ("ZB-V, the backward split in I and W", timeline("ZBVZeroBubble"))]
    figure = Figure(figsize=(10, 5), layout="constrained")
    longest = max(step.makespan for _, step in steps)
    for axes, (name, step) in zip(figure.subplots(2, sharex=True), steps, strict=True):
        plot_timeline(step, axes, title=f"{name}: {step.makespan:.3g} s, idle {step.bubble_fraction:.0%}")
        axes.set_xlim(0, longest)
        axes.get_legend().remove()
    figure.axes[0].set_xlabel("")
    _legend(figure)
    figure.savefig(path, dpi=120)


def _legend(figure: Figure) -> None:
    patches = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in "FBIW"]
    patches.append(Patch(color="#1A1A1A", label="barred: the rank's second stage"))
    patches.append(Patch(color="#EDEDED", label="idle"))
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def what_is_held(path: Path) -> None:
    """Bytes that a transformer layer holds after F against the work that it repeats, by budget."""
    layer = nn.TransformerEncoderLayer(1024, 16, 4096, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.empty(4, 1024, 1024)
    apply, params, buffers = fs.functionalize(layer)

    def point(remat: object) -> tuple[float, float]:
        plan = fs.compile(apply, backend="aten", remat=remat).plan(params, buffers, x)  # type: ignore[arg-type]
        return plan.held_after_forward / 2**20, 100 * plan.recomputed_flops / (
            plan.flops - plan.recomputed_flops
        )

    curve = sorted(point(i / 40) for i in range(41))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(
        [held for held, _ in curve],
        [again for _, again in curve],
        where="post",
        color="#00614A",
        linewidth=1.6,
    )
    for remat, offset in (("full", (6, 8)), ("min_cut", (-20, 8))):
        held, again = point(remat)
        axes.plot(held, again, "o", color="#B5562B")
        axes.annotate(f'"{remat}"', (held, again), xytext=offset, textcoords="offset points", fontsize=10)
    axes.set_xlabel("held after F (MiB)")
    axes.set_ylabel("FLOP done twice (%)")
    axes.set_ylim(bottom=-2)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    two_steps(HERE / "step.png")
    plot_comparison([timeline(name) for name in ("GPipe", "1F1B", "ZB-H1")], HERE / "one_stage_a_rank.png")
    names = ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    plot_comparison([timeline(name) for name in names], HERE / "two_stages_a_rank.png")
    what_is_held(HERE / "remat.png")


if __name__ == "__main__":
    main()
