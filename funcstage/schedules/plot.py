"""Pictures of timelines, in the manner of the zero-bubble paper (arXiv 2401.10241, figure 2), and of memory.

Ranks are rows, time runs to the right, a box is an action with its microbatch in it, and what stays
grey is the bubble. Needs matplotlib, from the extra `demo`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from funcstage.errors import StageError
from funcstage.schedules.orders import Order, ScheduleError
from funcstage.schedules.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Target: TypeAlias = str | os.PathLike[str] | Axes

# Hues that colour-blind readers tell apart, in steps of luminance, so that greyscale does too.
COLORS = {"F": "#A6D3F2", "I": "#E69F00", "W": "#00614A", "B": "#B5562B"}
_DARK = {"W", "B"}  # take white text
NAMES = {"F": "F  forward", "I": "I  input gradient", "W": "W  weight gradient", "B": "B  backward, I + W"}
_IDLE = "#EDEDED"
_BAR = "#1A1A1A"
_BOX_HEIGHT = 0.86
_BAR_HEIGHT = 0.1
_RANKS = "cividis"  # of which colour-blind readers and greyscale keep the order
_NAMED_RANKS = 8  # of more, a legend names the first and the last
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def plot_timeline(timeline: Timeline, path_or_ax: Target, *, title: str | None = None) -> Axes:
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

    def draw(axes: Axes) -> None:
        _draw_timeline(timeline, axes, title or _title(timeline))
        axes.legend(
            handles=_legend([timeline]),
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=9,
            handlelength=1.6,
            handleheight=1.1,
        )

    return _on_axes(path_or_ax, (12, 1.5 + 0.5 * min(len(timeline.ends), 32)), draw)


def plot_memory(
    timeline: Timeline, path_or_ax: Target, *, limit: int | None = None, title: str | None = None
) -> Axes:
    """Draw the bytes of residuals that each rank holds over a step.

    Args:
        timeline: from `simulate`, of costs that say what is held.
        path_or_ax: the file to write, or matplotlib axes to draw into.
        limit: bytes, drawn as a line across.
        title: over the picture; by default the schedule, its size and the fullest rank's peak.

    Returns:
        The axes.

    Raises:
        StageError: if matplotlib is not installed.
    """
    peak = max(timeline.peak_memory)
    scale, unit = _unit(max(peak, limit or 0))

    def draw(axes: Axes) -> None:
        _draw_memory(timeline, axes, scale, unit)
        if limit is not None:
            axes.axhline(limit / scale, color=_BAR, linestyle="--", linewidth=1, label="limit")
        axes.set_ylim(0, 1.08 * max(peak, limit or 0) / scale or 1)
        axes.set_title(
            title or f"{_numbers(timeline.order)}: at most {peak / scale:.3g} {unit}", loc="left", fontsize=11
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)

    return _on_axes(path_or_ax, (12, 3.5), draw)


def plot_comparison(
    timelines: Sequence[Timeline], path_or_figure: str | os.PathLike[str] | Figure
) -> list[tuple[Axes, Axes]]:
    """Draw timelines one above the other on the same clock, each beside the memory that its ranks hold.

    Args:
        timelines: from `simulate`, at least one.
        path_or_figure: the file to write, or an empty matplotlib figure to draw into.

    Returns:
        For each timeline its axes and those of its memory.

    Raises:
        ScheduleError: if there is no timeline.
        StageError: if matplotlib is not installed.
    """
    if not timelines:
        raise ScheduleError("timelines must be one timeline or more, got none.")
    rows = [max(3, min(len(timeline.ends), 16)) for timeline in timelines]
    figure: Figure = (
        _figure((12, sum(0.42 * row + 0.9 for row in rows) + 0.5))
        if isinstance(path_or_figure, (str, os.PathLike))
        else path_or_figure
    )
    grid = figure.subplots(
        len(timelines),
        2,
        squeeze=False,
        width_ratios=(3, 1),
        height_ratios=rows,
        sharex="col",
        gridspec_kw={"hspace": 0.08},
    )
    longest = max(timeline.makespan for timeline in timelines)
    fullest = max(max(timeline.peak_memory) for timeline in timelines)
    scale, unit = _unit(fullest)
    for (clock, memory), timeline in zip(grid, timelines, strict=True):
        _draw_timeline(timeline, clock, _title(timeline), until=longest)
        _draw_memory(timeline, memory, scale, unit, until=longest)
        memory.set_ylim(0, 1.08 * fullest / scale or 1)
        memory.set_title(f"peak {max(timeline.peak_memory) / scale:.3g} {unit}", loc="left", fontsize=11)
        if timeline is not timelines[-1]:
            clock.set_xlabel("")
            memory.set_xlabel("")
    figure.legend(handles=_legend(timelines), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    if isinstance(path_or_figure, (str, os.PathLike)):
        figure.savefig(path_or_figure, dpi=150)
    return [(clock, memory) for clock, memory in grid]


def _on_axes(path_or_ax: Target, size: tuple[float, float], draw: Any) -> Axes:
    """Draw into the axes that were given, or into a file."""
    if not isinstance(path_or_ax, (str, os.PathLike)):
        draw(path_or_ax)
        return path_or_ax
    figure = _figure(size)
    axes = figure.add_subplot()
    draw(axes)
    figure.savefig(path_or_ax, dpi=150)
    return axes


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise StageError(
            "Drawing a timeline needs matplotlib, which is not installed: pip install 'funcstage[demo]'."
        ) from missing
    # A figure of its own, outside pyplot, leaves no global state and needs no display.
    return Figure(figsize=size, layout="constrained")


def _draw_timeline(timeline: Timeline, axes: Axes, title: str, until: float | None = None) -> None:
    scale, unit = _clock(until or timeline.makespan)
    order = timeline.order
    end = (until or timeline.makespan) * scale or 1
    axes.set_xlim(0, end)
    axes.set_ylim(order.num_ranks - 0.5, -0.5)
    points = axes.get_window_extent().width / axes.figure.dpi * 72
    height = axes.get_window_extent().height / axes.figure.dpi * 72 / order.num_ranks
    widths = [stop - start for spans in timeline.ranks for _, start, stop in spans] or [0.0]
    edge: dict[str, Any] = {
        "edgecolor": "white",
        "linewidth": min(0.6, height / 40, statistics.median(widths) * scale / end * points / 10),
    }
    for rank, spans in enumerate(timeline.ranks):
        axes.broken_barh(
            [(0, timeline.makespan * scale)], (rank - _BOX_HEIGHT / 2, _BOX_HEIGHT), color=_IDLE, zorder=1
        )
        for chunk, stage in enumerate(order.stages_of(rank)):
            boxes = [
                (a.kind, start * scale, (stop - start) * scale)
                for a, start, stop in spans
                if a.stage == stage
            ]
            for kind, color in COLORS.items():
                axes.broken_barh(
                    [(left, width) for k, left, width in boxes if k == kind],
                    (rank - _BOX_HEIGHT / 2, _BOX_HEIGHT),
                    facecolor=color,
                    zorder=2,
                    **edge,
                )
            for i in range(chunk):
                # Bars under a box count the stages that the rank has before this one: seen in any colours.
                bottom = rank + _BOX_HEIGHT / 2 - (1.5 * i + 1) * _BAR_HEIGHT
                axes.broken_barh(
                    [box[1:] for box in boxes], (bottom, _BAR_HEIGHT), facecolor=_BAR, zorder=3, **edge
                )
        for action, start, stop in spans:
            label = str(action.microbatch)
            if (stop - start) * scale / end * points >= 5 * len(label) + 2 and height >= 9:
                axes.text(
                    (start + stop) / 2 * scale,
                    rank,
                    label,
                    color="white" if action.kind in _DARK else "black",
                    fontsize=7,
                    ha="center",
                    va="center",
                    zorder=4,
                )
    if height >= 20:
        axes.set_yticks(range(order.num_ranks), [_row_name(order, rank) for rank in range(order.num_ranks)])
    else:
        axes.set_ylabel("rank")
    axes.set_xlabel(f"time ({unit})")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)


def _draw_memory(timeline: Timeline, axes: Axes, scale: float, unit: str, until: float | None = None) -> None:
    from matplotlib import colormaps

    seconds, unit_of_time = _clock(until or timeline.makespan)
    ranks = timeline.order.num_ranks
    colors = colormaps[_RANKS].resampled(max(ranks, 2))
    for rank in range(ranks):
        # At a time when one action frees and the next one adds, only what is held from then on is drawn.
        curve = list(dict([*timeline.memory(rank), (timeline.makespan, 0)]).items())
        axes.step(
            [at * seconds for at, _ in curve],
            [held / scale for _, held in curve],
            where="post",
            color=colors(rank),
            linewidth=1.4,
            label=f"rank {rank}" if ranks <= _NAMED_RANKS or rank in (0, ranks - 1) else None,
        )
    axes.set_xlim(0, (until or timeline.makespan) * seconds or 1)
    axes.set_xlabel(f"time ({unit_of_time})")
    axes.set_ylabel(f"residuals ({unit})")
    axes.spines[["top", "right"]].set_visible(False)


def _row_name(order: Order, rank: int) -> str:
    stages = order.stages_of(rank)
    return f"rank {rank}\nstage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def _legend(timelines: Sequence[Timeline]) -> list[Any]:
    from matplotlib.patches import Patch

    orders = [timeline.order for timeline in timelines]
    used = {action.kind for order in orders for actions in order.ranks for action in actions}
    handles = [Patch(color=COLORS[kind], label=name) for kind, name in NAMES.items() if kind in used]
    if any(len(order.stages_of(rank)) > 1 for order in orders for rank in range(order.num_ranks)):
        handles.append(Patch(color=_BAR, label="barred: the rank's second stage"))
    return [*handles, Patch(facecolor=_IDLE, label="idle")]


def _title(timeline: Timeline) -> str:
    return f"{_numbers(timeline.order)}: bubble {timeline.bubble_fraction:.1%}"


def _numbers(order: Order) -> str:
    return (
        f"{order.schedule}, {order.num_stages} stages on {order.num_ranks} ranks, "
        f"{order.num_microbatches} microbatches"
    )


def _clock(seconds: float) -> tuple[float, str]:
    return (1e3, "ms") if seconds < 1 else (1.0, "s")


def _unit(size: float) -> tuple[int, str]:
    return next((scale, unit) for scale, unit in _UNITS if size >= scale or scale == 1)
