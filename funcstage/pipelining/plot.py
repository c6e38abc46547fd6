"""The picture of a timeline, in the manner of the zero-bubble paper (arXiv 2401.10241, figure 2).

Ranks are rows, time runs to the right, a box is an action with its microbatch in it, and what stays
grey is the bubble. Needs matplotlib, from the extra `demo`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from funcstage.errors import StageError
from funcstage.pipelining.orders import Order
from funcstage.pipelining.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Hues that colour-blind readers tell apart, in steps of luminance, so that greyscale does too.
_COLORS = {"F": "#A6D3F2", "I": "#E69F00", "W": "#00614A", "B": "#B5562B"}
_DARK = {"W", "B"}  # take white text
_NAMES = {"F": "F  forward", "I": "I  input gradient", "W": "W  weight gradient", "B": "B  backward, I + W"}
_IDLE = "#EDEDED"
_BAR = "#1A1A1A"
_BOX_HEIGHT = 0.86
_BAR_HEIGHT = 0.1


def plot_timeline(
    timeline: Timeline, path_or_ax: str | os.PathLike[str] | Axes, *, title: str | None = None
) -> Axes:
    """Draw a timeline.

    Args:
        timeline: from `simulate`.
        path_or_ax: the file to write (the ending says the format, `.png` or `.svg`, say), or
            matplotlib axes to draw into.
        title: over the picture; by default the schedule, its size and its bubble fraction.

    Returns:
        The axes.

    Raises:
        StageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise StageError(
            "Drawing a timeline needs matplotlib, which is not installed: pip install 'funcstage[demo]'."
        ) from missing
    if not isinstance(path_or_ax, (str, os.PathLike)):
        _draw(timeline, path_or_ax, title)
        return path_or_ax
    # A figure of its own, outside pyplot, leaves no global state and needs no display.
    figure = Figure(figsize=(12, 1.5 + 0.5 * len(timeline.ranks)), layout="constrained")
    axes = figure.add_subplot()
    _draw(timeline, axes, title)
    figure.savefig(path_or_ax, dpi=150)
    return axes


def _draw(timeline: Timeline, axes: Axes, title: str | None) -> None:
    scale, unit = (1e3, "ms") if timeline.makespan < 1 else (1.0, "s")
    order = timeline.order
    for rank, spans in enumerate(timeline.ranks):
        axes.barh(rank, timeline.makespan * scale, height=_BOX_HEIGHT, color=_IDLE, zorder=1)
        chunk = {stage: k for k, stage in enumerate(order.stages_of(rank))}
        for span in spans:
            _draw_box(axes, rank, span, scale, timeline.makespan, chunk[span.action.stage])
    axes.set_yticks(range(order.num_ranks), [_row_name(order, rank) for rank in range(order.num_ranks)])
    axes.set_ylim(order.num_ranks - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan * scale or 1)
    axes.set_xlabel(f"time ({unit})")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title or _title(timeline), loc="left", fontsize=11)
    axes.legend(
        handles=_legend(timeline),
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        handleheight=1.1,
    )


def _draw_box(axes: Axes, rank: int, span: Span, scale: float, makespan: float, chunk: int) -> None:
    seconds = span.end - span.start
    box: dict[str, Any] = {"left": span.start * scale, "edgecolor": "white", "linewidth": 0.6}
    axes.barh(rank, seconds * scale, height=_BOX_HEIGHT, color=_COLORS[span.action.kind], zorder=2, **box)
    for i in range(chunk):
        # Bars under a box count the stages that the rank has before this one: seen in any colours.
        bottom = rank + _BOX_HEIGHT / 2 - (1.5 * i + 0.5) * _BAR_HEIGHT
        axes.barh(bottom, seconds * scale, height=_BAR_HEIGHT, color=_BAR, zorder=3, **box)
    label = str(span.action.microbatch)
    width_in_points = seconds / makespan * axes.get_window_extent().width / axes.figure.dpi * 72
    if width_in_points >= 6 * len(label) + 2:
        axes.text(
            (span.start + span.end) / 2 * scale,
            rank,
            label,
            color="white" if span.action.kind in _DARK else "black",
            fontsize=8,
            ha="center",
            va="center",
            zorder=4,
        )


def _row_name(order: Order, rank: int) -> str:
    stages = order.stages_of(rank)
    return f"rank {rank}\nstage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def _legend(timeline: Timeline) -> list[Any]:
    from matplotlib.patches import Patch

    used = {span.action.kind for spans in timeline.ranks for span in spans}
    handles = [Patch(color=_COLORS[kind], label=name) for kind, name in _NAMES.items() if kind in used]
    order = timeline.order
    if any(len(order.stages_of(rank)) > 1 for rank in range(order.num_ranks)):
        handles.append(Patch(color=_BAR, label="barred: the rank's second stage"))
    return [*handles, Patch(facecolor=_IDLE, label="idle")]


def _title(timeline: Timeline) -> str:
    order = timeline.order
    return (
        f"{order.schedule}, {order.num_stages} stages on {order.num_ranks} ranks, "
        f"{order.num_microbatches} microbatches: bubble {timeline.bubble_fraction:.1%}"
    )
