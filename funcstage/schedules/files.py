"""Orders as files, in the CSV format of torch's schedules: a row for each rank, a cell for each action.

Pieces of W are an addition to it, which torch refuses to read: `1/2:3W0` is one of two pieces of `3W0`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from funcstage._torch.schedules import HOUSEKEEPING, MESSAGES
from funcstage.schedules.orders import Action, Kind, Order, ScheduleError

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")
_PIECE = re.compile(r"1/(\d+):(\d+W\d+)")
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")
_NO_WORK = re.compile(rf"\d+({'|'.join(MESSAGES)})\d+|\d+({'|'.join(HOUSEKEEPING)})|")


def write_order(order: Order, path: str | os.PathLike[str]) -> None:
    """Write an order in the CSV format of `torch.distributed.pipelining`.

    Args:
        order: the order. `read_order` reads the file; `torch_schedule` runs what it returns. Torch's own
            `_load_csv` reads it too, unless W is in pieces.
        path: the file.
    """

    def cell(action: Action) -> str:
        return f"1/{order.pieces}:{action}" if order.pieces > 1 and action.kind == "W" else str(action)

    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([cell(action) for action in actions] for actions in order.ranks)


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
    pieces: set[int] = set()
    with open(path, newline="") as file:
        rows = [
            tuple(
                a
                for column, cell in enumerate(row)
                for a in _read(cell.strip(), f"row {rank}, column {column}", pieces)
            )
            for rank, row in enumerate(csv.reader(file))
        ]
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError(f"{name}: there is no action in the file.")
    if len(pieces) > 1:
        raise ScheduleError(
            f"{name}: W is in {' and in '.join(map(str, sorted(pieces)))} pieces. Divide every W into "
            "equally many; pieces that follow one another cost no more than the whole."
        )
    order = Order(
        name,
        1 + max(action.stage for action in actions),
        1 + max(action.microbatch for action in actions),
        tuple(rows),
        max(pieces, default=1),
    )
    check_order(order)
    return order


def check_order(order: Order) -> None:
    """Check that each stage has one rank, and runs F and I and all of W, or B, once for each microbatch.

    Args:
        order: the order. `simulate` finds out whether its ranks wait for each other.

    Raises:
        ScheduleError: which action is wrong.
    """
    home: dict[int, int] = {}
    done: Counter[Action] = Counter()
    for rank, actions in enumerate(order.ranks):
        for action in actions:
            if home.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"{order.schedule}: {action} is on rank {rank}, but stage {action.stage} is on rank "
                    f"{home[action.stage]}. A stage has one rank."
                )
            for part in action.gives():
                done[part] += order.pieces if part.kind == "W" and action.kind == "B" else 1
                if done[part] > (order.pieces if part.kind == "W" else 1):
                    often = "twice" if order.pieces == 1 else f"more often than its {order.pieces} pieces"
                    raise ScheduleError(f"{order.schedule}: {part} occurs {often}. Leave one out.")
    for stage in range(order.num_stages):
        for microbatch in range(order.num_microbatches):
            for kind in ("F", "I", "W"):
                found = done[Action(kind, stage, microbatch)]
                if kind == "W" and 0 < found < order.pieces:
                    raise ScheduleError(
                        f"{order.schedule}: of the {order.pieces} pieces of {stage}W{microbatch} there are "
                        f"only {found}. Add the others."
                    )
                if not found:
                    raise ScheduleError(
                        f"{order.schedule}: {stage}{kind}{microbatch} is missing. Each of the "
                        f"{order.num_stages} stages needs F and I and W, or F and B, of each of the "
                        f"{order.num_microbatches} microbatches."
                    )


def _read(cell: str, where: str, pieces: set[int]) -> Iterator[Action]:
    """Read a cell, and note in how many pieces a W of it is."""
    piece = _PIECE.fullmatch(cell)
    if action := _ACTION.fullmatch(piece[2] if piece else cell):
        stage, kind, microbatch = action.groups()
        if kind == "W":
            pieces.add(int(piece[1]) if piece else 1)
        yield Action(cast(Kind, kind), int(stage), int(microbatch))
    elif overlapped := _OVERLAPPED.fullmatch(cell):
        for part in overlapped[1].split(";"):
            yield from _read(part.strip(), where, pieces)
    elif not _NO_WORK.fullmatch(cell):
        raise ScheduleError(f"{where}: {cell!r} is not an action. Write one as 2F0: stage, kind, microbatch.")
