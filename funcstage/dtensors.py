"""DTensors, found without importing what they are made by, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def first_dtensor(leaves: Iterable[Any]) -> int | None:
    """The number of the first leaf that is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return None
    return next((i for i, leaf in enumerate(leaves) if isinstance(leaf, module.DTensor)), None)
