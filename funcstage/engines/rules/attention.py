"""Attention whose kernels keep what backward reads only where query, key or value requires grad.

`scaled_dot_product_attention` decides by those operands as they are at the innermost level. Where none of
them is tracked there (next to a learned mask, or around nothing of that level at all), the kernels of a GPU
leave out the logarithms of the sums that every level's backward reads: an illegal access to memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from funcstage._torch import functorch as ft
from funcstage._torch import operators as ops
from funcstage.engines.rules.base import Call, Rule

KEEPS = ("cpu", "meta")
"""Devices whose kernels always keep them."""

_NAMES = ("query", "key", "value", "attn_mask")


def remembering(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of attention, before the others that of a query that is tracked for no gradient."""

    def body(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        query = ft.make_leaf(query.view_as(query))
        call = Call((query, *args), kwargs, False, False)
        attend = next((rule.body for rule in rules if rule.when(call)), ops.scaled_dot_product_attention)
        return attend(query, *args, **kwargs)

    return (Rule(_forgets, body, whole=True), *rules)


def _forgets(call: Call) -> bool:
    """Tell whether a call is differentiated and its kernel would not know."""
    if call.traced or not (level := ft.current_level()):
        return False
    operands = [each for each in _operands(call.args, call.kwargs) if isinstance(each, Tensor)]
    return (
        operands[0].device.type not in KEEPS
        and not any(each.requires_grad and ft.level_of(each) == level for each in operands[:3])
        and any(map(ft.requires_grad, operands))
    )


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [*args[: len(_NAMES)], *(kwargs.get(name) for name in _NAMES[len(args) :])]
