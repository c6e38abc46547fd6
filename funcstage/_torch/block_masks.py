"""FlexAttention's `BlockMask`s: what they hold, and which of them are parts of a batch's.

torch's pipelines cut a mask into microbatches. A part's mask function calls the whole mask's with the number
of its first sample added, a number that a trace would keep: here it becomes a tensor, which it does not.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch


def is_block_mask(kind: type) -> bool:
    """Tell whether a class is theirs, without importing it, which takes long."""
    home = sys.modules.get("torch.nn.attention.flex_attention")
    return home is not None and issubclass(kind, home.BlockMask)


def split(mask: Any, count: int) -> list[Any]:
    """Cut a mask along the batch, as torch's pipelines do: one for all samples stays whole."""
    from torch.distributed.pipelining.microbatch import _split_block_mask

    return _split_block_mask(mask, count)


def with_offset_as_tensor(mask_mod: FunctionType) -> FunctionType:
    """The function of a part of a mask with its offset as a tensor; any other function as it is."""
    if mask_mod.__qualname__ != "_split_block_mask.<locals>.create_mask_mod.<locals>.batch_offset_mask_mod":
        return mask_mod
    cells = zip(mask_mod.__code__.co_freevars, mask_mod.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    mask, first = held["block_mask"], held["idx"]
    device = mask.kv_num_blocks.device
    return _moved(mask, torch.full((), first, dtype=torch.int64, device=device))


def _moved(mask: Any, offset: torch.Tensor) -> Any:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return mask.mask_mod(b + offset, h, q, k)

    return mask_mod
