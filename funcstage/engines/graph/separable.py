"""The mode under which a stage is recorded: it opens what would hide the split from the graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage.effects import MARKS, refuse_effects, refused_mark
from funcstage.engines.graph import generators, norms
from funcstage.engines.graph.refusals import TRACED, captured
from funcstage.engines.levels.mode import is_in_place
from funcstage.engines.rules import recurrent
from funcstage.engines.rules.composites import in_order, opened
from funcstage.engines.rules.dtypes import linear, refuse_complex
from funcstage.engines.rules.flex import is_flex_attention, run_compiled
from funcstage.engines.rules.group_norm import contiguous_group_norm, crashes
from funcstage.engines.tape.reentrant import Leftovers


class Separable(TorchFunctionMode):
    """Replaces what would be recorded as one operation that cannot be separated or replayed.

    Recurrent layers are traced step by step, as their fused kernels yield all gradients at once. Linear
    algebra is traced without its checks, so that of a singular matrix the results are not finite. Batch
    norm is traced without cuDNN, whose operation writes the running statistics and does not say so. A linear
    layer keeps the dtype that eager gives it, also inside of attention.
    """

    def __init__(self, owner: str, leftovers: Leftovers) -> None:
        super().__init__()
        self.owner = owner
        self.given: dict[int, str] = {}  # state and differentiated arguments, by their ids
        self._leftovers = leftovers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._leftovers.cut((args, kwargs or {}))
        refuse_effects(func, args, kwargs)
        if func in MARKS:
            self._mark(*args, **kwargs)
        if is_in_place(func, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor) and not isinstance(ft.innermost(target), TRACED):
                raise captured(self.owner, trees.describe(target))  # which is real, and would be written
            if isinstance(target, Tensor):
                refuse_complex(getattr(func, "__name__", ""), target, *args, *kwargs.values())
        generators.check_kept(args, kwargs)
        if crashes(func, args, kwargs):
            return contiguous_group_norm(func, args, kwargs)
        if func in _COMPOSITES:
            body = opened(func)
            assert body is not None
            with self:
                return body(*args, **kwargs)
        if func is F.linear:
            return linear(*args, **kwargs)
        if func is torch.batch_norm:
            return norms.batch_norm(*args, **kwargs)
        if func is torch.instance_norm:
            return norms.instance_norm(*args, **kwargs)
        if is_flex_attention(func):
            return run_compiled(func, *args, backend="eager")
        if func in _RECURRENT:
            return _RECURRENT[func](*in_order(args, kwargs))
        return func(*args, **kwargs)

    def _mark(self, tensor: Tensor, requires_grad: bool = True) -> None:
        if id(tensor) in self.given and tensor.requires_grad != requires_grad:
            raise refused_mark(f"{self.given[id(tensor)]} ({trees.describe(tensor)})", requires_grad)


@torch.library.custom_op("funcstage::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bernoulli(like: Tensor, p: float) -> Tensor:
    """`torch.empty_like(like).bernoulli_(p)`: ATen's functional form draws in another order."""
    return torch.empty_like(like).bernoulli_(p)


@bernoulli.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like)


def _bernoulli(like: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    if generator is not None:
        return NotImplemented
    return torch.ops.funcstage.bernoulli.default(like, p)


OWN = {torch.ops.aten.bernoulli.p: _bernoulli}


_COMPOSITES = (F.batch_norm, F.instance_norm, F.multi_head_attention_forward)
"""Functions in Python that call what is replaced."""

_RECURRENT = {
    torch.lstm: recurrent.stacked(recurrent.lstm_step),
    torch.gru: recurrent.stacked(recurrent.gru_step),
    torch.rnn_tanh: recurrent.stacked(recurrent.tanh_step),
    torch.rnn_relu: recurrent.stacked(recurrent.relu_step),
}
