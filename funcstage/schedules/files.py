"""Orders as files, in the CSV format of torch's schedules: a row for each rank, a cell for each action."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from funcstage._torch.schedules import HOUSEKEEPING, MESSAGES
from funcstage.schedules.orders import Action, Kind, Order, ScheduleError

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")
_NO_WORK = re.compile(rf"\d+({'|'.join(MESSAGES)})\d+|\d+({'|'.join(HOUSEKEEPING)})|")


def write_order(order: Order, path: str | os.PathLike[str]) -> None:
    """Write an order for `torch.distributed.pipelining`'s `_PipelineScheduleRuntime._load_csv`.

    Args:
        order: the order; torch adds communication when it loads the file.
        path: the file.
    """
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(order.ranks)


def read_order(path: str | os.PathLike[str]) -> Order:
    """Read an order that `write_order` or torch's `_dump_csv` wrote, with or without communication.

    Args:
        path: the file.

    Returns:
        The order, named after the file. Communication and idle slots are left out, and pairs that are
        overlapped on a device stand one after the other.

    Raises:
        ScheduleError: if a cell is no action, an action is missing, there twice or on another rank than
            the rest of its stage.
    """
    name = Path(path).stem
    with open(path, newline="") as file:
        rows = [
            tuple(
                a
                for column, cell in enumerate(row)
                for a in _read(cell.strip(), f"row {rank}, column {column}")
            )
            for rank, row in enumerate(csv.reader(file))
        ]
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError(f"{name}: there is no action in the file.")
    order = Order(
        name,
        1 + max(action.stage for action in actions),
        1 + max(action.microbatch for action in actions),
        tuple(rows),
    )
    check_order(order)
    return order


def check_order(order: Order) -> None:
    """Check that each stage has one rank, and runs F and I and W, or B, once for each microbatch.

    Args:
        order: the order. `simulate` finds out whether its ranks wait for each other.

    Raises:
        ScheduleError: which action is wrong.
    """
    home: dict[int, int] = {}
    done: set[Action] = set()
    for rank, actions in enumerate(order.ranks):
        for action in actions:
            if home.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"{order.schedule}: {action} is on rank {rank}, but stage {action.stage} is on rank "
                    f"{home[action.stage]}. A stage has one rank."
                )
            for part in action.gives():
                if part in done:
                    raise ScheduleError(f"{order.schedule}: {part} is there twice; leave one out.")
                done.add(part)
    for stage in range(order.num_stages):
        for microbatch in range(order.num_microbatches):
            for kind in ("F", "I", "W"):
                if Action(kind, stage, microbatch) not in done:
                    raise ScheduleError(
                        f"{order.schedule}: {stage}{kind}{microbatch} is missing. Each of the "
                        f"{order.num_stages} stages needs F and I and W, or F and B, of each of the "
                        f"{order.num_microbatches} microbatches."
                    )


def _read(cell: str, where: str) -> Iterator[Action]:
    if action := _ACTION.fullmatch(cell):
        stage, kind, microbatch = action.groups()
        yield Action(cast(Kind, kind), int(stage), int(microbatch))
    elif overlapped := _OVERLAPPED.fullmatch(cell):
        for part in overlapped[1].split(";"):
            yield from _read(part.strip(), where)
    elif not _NO_WORK.fullmatch(cell):
        raise ScheduleError(
            f"{where}: {cell!r} is no action. One is written as 2F0: stage, kind, microbatch."
        )
