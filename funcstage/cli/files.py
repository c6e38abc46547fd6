"""What `funcstage timeline -o` writes: pictures, traces and torch's files, by their endings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from funcstage.cli import show
from funcstage.errors import StageError
from funcstage.pipelining import (
    Timeline,
    interactive_timeline,
    plot_timeline,
    write_chrome_trace,
    write_order,
)


def write(timelines: Sequence[Timeline], paths: Sequence[Path]) -> None:
    """Write each file. Pictures have all timelines on one clock; the others are about the first."""
    for path in show.progress(paths, "writing"):
        if path.suffix == ".json":
            write_chrome_trace(timelines[0], path)
        elif path.suffix == ".csv":
            write_order(timelines[0].order, path)
        elif path.suffix == ".html":
            interactive_timeline(timelines, path)
        else:
            _draw(timelines, path)


def _draw(timelines: Sequence[Timeline], path: Path) -> None:
    try:
        if len(timelines) == 1:
            plot_timeline(timelines[0], path)
        else:
            from matplotlib.figure import Figure

            figure = Figure(
                figsize=(12, sum(1.5 + 0.5 * len(t.ends) for t in timelines)), layout="constrained"
            )
            for axes, timeline in zip(figure.subplots(len(timelines), sharex=True), timelines, strict=True):
                plot_timeline(timeline, axes)
            figure.savefig(path, dpi=150)
    except ValueError as error:  # of matplotlib, to which the ending says nothing
        raise StageError(f"-o {path}: {error}.") from error
