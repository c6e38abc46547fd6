"""What the demo shows: progress, the table of costs, and the last line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from funcstage.demo.measure import StageCosts

_LINES = 10  # of progress, where the output is no terminal


@contextmanager
def progress(console: Console, steps: int, tokens_per_step: int) -> Iterator[Callable[[float], None]]:
    """Show a bar with loss and tokens/s, or plain lines where the output is no terminal."""
    start = time.perf_counter()
    done = 0

    def speed() -> str:
        return f"{done * tokens_per_step / (time.perf_counter() - start):,.0f} tokens/s"

    def print_line(loss: float) -> None:
        nonlocal done
        done += 1
        if done == steps or done % max(1, steps // _LINES) == 0:
            console.print(f"step {done}/{steps}  loss {loss:.3f}  {speed()}")

    if not console.is_terminal:
        yield print_line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, note="")

        def move_bar(loss: float) -> None:
            nonlocal done
            done += 1
            bar.update(task, advance=1, note=f"loss {loss:.3f}  {speed()}")

        yield move_bar


def cost_table(costs: Sequence[StageCosts]) -> Table:
    """Lay out what one microbatch costs each stage."""
    table = Table(
        title="\nWhat one microbatch costs each stage",
        title_justify="left",
        caption=(
            "FLOP as torch's FlopCounterMode counts them (on a CPU it leaves out fused attention).\n"
            "KiB of residuals held after F (for I and W) and after I (for W)."
        ),
        caption_justify="left",
    )
    for name in ("stage", "F", "I", "W", "F", "I", "W", "after F", "after I"):
        table.add_column(name, justify="right")
    units = ("", "ms", "ms", "ms", "MFLOP", "MFLOP", "MFLOP", "KiB", "KiB")
    table.add_row(*units, style="dim", end_section=True)
    for stage, (cost, flops) in enumerate(costs):
        seconds = (cost.forward, cost.input, cost.weight)
        held = (cost.held_after_forward, cost.held_after_input)
        table.add_row(
            str(stage),
            *_cells((1e3 * second for second in seconds), ".1f"),
            *_cells((count / 1e6 for count in flops), ",.1f"),
            *_cells((size / 1024 for size in held), ",.0f"),
        )
    return table


def _cells(values: Iterable[float], form: str) -> list[str]:
    return [format(value, form) for value in values]
