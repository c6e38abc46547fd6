"""Products of two dtypes fail on real tensors, but not on fake ones, which find out the shapes of a stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcstage._torch.operators import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS: dict[Any, tuple[int, ...]] = {
    _aten.mm: (0, 1),
    _aten.addmm: (0, 1, 2),
    _aten.bmm: (0, 1),
    _aten.baddbmm: (0, 1, 2),
    _aten.mv: (0, 1),
    _aten.addmv: (0, 1, 2),
    _aten.dot: (0, 1),
    _aten.convolution: (0, 1),
}
"""Operations whose operands must have one dtype, and which of the arguments those are."""


class SameDtypes(TorchDispatchMode):
    """Fail where a product of real tensors would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _PRODUCTS.get(getattr(func, "overloadpacket", None), ())
        found = [args[i].dtype for i in operands if i < len(args) and isinstance(args[i], Tensor)]
        if len(set(found)) > 1:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in found)
            raise RuntimeError(f"{func} of {names}: the operands must have the same dtype")
        return func(*args, **(kwargs or {}))
