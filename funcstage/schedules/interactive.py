"""Timelines to zoom into, in a notebook or as one HTML file. Needs plotly, from the extra `interactive`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from funcstage.errors import StageError
from funcstage.schedules.orders import ScheduleError
from funcstage.schedules.plot import COLORS, NAMES
from funcstage.schedules.timeline import Timeline

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def interactive_timeline(
    timelines: Timeline | Sequence[Timeline], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw one timeline, or several on the same clock, to zoom into and to point at.

    Args:
        timelines: from `simulate` or `read_trace`.
        path: an HTML file to write, which needs no network; `None` writes none.

    Returns:
        A figure of plotly's, which a notebook shows.

    Raises:
        ScheduleError: if there is no timeline.
        StageError: if plotly is not installed.
    """
    every = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    if not every:
        raise ScheduleError("timelines must be one timeline or more, got none.")
    try:
        from plotly import graph_objects
    except ImportError as missing:
        raise StageError(
            "An interactive timeline needs plotly, not installed here: pip install 'funcstage[interactive]'."
        ) from missing
    scale, unit = (1e3, "ms") if max(timeline.makespan for timeline in every) < 1 else (1.0, "s")
    figure, prefixes = graph_objects.Figure(), _prefixes([timeline.order.schedule for timeline in every])
    for kind, name in NAMES.items():
        spans = [
            (f"{prefix}rank {rank}", span)
            for prefix, timeline in zip(prefixes, every, strict=True)
            for rank, of_rank in enumerate(timeline.ranks)
            for span in of_rank
            if span.action.kind == kind
        ]
        if not spans:
            continue
        figure.add_bar(
            name=name,
            orientation="h",
            y=[row for row, _ in spans],
            base=[span.start * scale for _, span in spans],
            x=[(span.end - span.start) * scale for _, span in spans],
            text=[str(span.action.microbatch) for _, span in spans],
            textposition="inside",
            insidetextanchor="middle",
            marker={"color": COLORS[kind], "line": {"color": "white", "width": 0.5}},
            customdata=[
                (f"stage {s.action.stage} {kind} mb {s.action.microbatch}", s.start * scale, s.end * scale)
                for _, s in spans
            ],
            hovertemplate=f"%{{customdata[0]}}<br>%{{customdata[1]:.4g}} to %{{customdata[2]:.4g}} {unit}"
            "<extra></extra>",
        )
    named = zip(prefixes, every, strict=True)
    rows = [f"{prefix}rank {rank}" for prefix, t in named for rank in range(t.order.num_ranks)]
    figure.update_layout(
        title={"text": "<br>".join(map(str, every)), "font": {"size": 14}, "x": 0.02},
        barmode="overlay",
        plot_bgcolor="#EDEDED",  # what stays of it is the bubble
        xaxis={"title": f"time ({unit})", "showgrid": False},
        yaxis={"categoryorder": "array", "categoryarray": rows[::-1], "showgrid": False},
        height=180 + 34 * len(rows) + 18 * len(every),
        # At the bottom, with room for a row each: on a telephone they stand one below the other.
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0.0, "x": 0.0},
        margin={"t": 40 + 18 * len(every), "b": 130, "r": 20},
    )
    if path is not None:
        figure.write_html(path)
    return figure


def _prefixes(schedules: Sequence[str]) -> list[str]:
    """What tells rows of several timelines apart: the schedule, with a number where one comes again."""
    if len(schedules) == 1:
        return [""]
    names = [f"{name} ({schedules[: i + 1].count(name)})" for i, name in enumerate(schedules)]
    return [f"{n if schedules.count(s) > 1 else s}: " for s, n in zip(schedules, names, strict=True)]
