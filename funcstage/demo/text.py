"""Real text that every user has on disk: the source code of Python's standard library."""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from funcstage.errors import StageError

MAX_BYTES = 4_000_000
_HELD_OUT = 0.05
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib"}


class Text(NamedTuple):
    """A text as bytes, uint8 tensors of one dimension: most of it to train on, its tail held out."""

    train: Tensor
    held_out: Tensor
    files: int

    @property
    def unigram_entropy(self) -> float:
        """Nats per byte that are left when only the bytes' frequencies are known."""
        counts = torch.bincount(torch.cat([self.train, self.held_out]).long(), minlength=256).double()
        share = counts[counts > 0] / counts.sum()
        return -(share * share.log()).sum().item()


def standard_library(seed: int, folder: Path | None = None) -> Text:
    """Read Python's standard library, up to a few megabytes, the files in an order given by `seed`.

    Args:
        seed: the order of the files; what comes last is held out.
        folder: where to look for `.py` files instead.

    Raises:
        StageError: if there is too little text.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    # Tests, tables of characters and what was installed later are no typical source code.
    paths = sorted(p for p in folder.rglob("*.py") if not _LEFT_OUT.intersection(p.relative_to(folder).parts))
    random.Random(seed).shuffle(paths)
    data = bytearray()
    files = 0
    for path in paths:
        if len(data) >= MAX_BYTES:
            break
        data += path.read_bytes()
        files += 1
    if len(data) < 100_000:
        raise StageError(
            f"The demo reads the .py files of the standard library, but {folder} has only {len(data)} bytes. "
            "Run it under a Python whose standard library is installed as source files."
        )
    text = torch.frombuffer(data[:MAX_BYTES], dtype=torch.uint8)
    cut = int(len(text) * (1 - _HELD_OUT))
    return Text(text[:cut], text[cut:], files)


def random_batches(text: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, int64 `[batch, context]` on the CPU; targets are the inputs' next bytes."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        windows = text[starts + offsets].long()
        yield windows[:, :-1], windows[:, 1:]


def windows(text: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
    """Return up to `count` windows, evenly spread over the text, as inputs and targets."""
    count = min(count, (len(text) - 1) // context)
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)
