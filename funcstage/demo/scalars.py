"""Scalars of the demo's steps, as files for TensorBoard."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from funcstage.pipelining.logged import Log


def to_tensorboard(folder: Path) -> Log | None:
    """Return what writes scalars to event files in a folder; `None` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(number: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, number)
        writer.flush()  # what is there can be looked at

    return log
