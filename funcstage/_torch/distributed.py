"""The store that all ranks share, which torch has no public name for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed import distributed_c10d

__all__ = ["default_store"]

default_store: Callable[[], Any] = distributed_c10d._get_default_store
