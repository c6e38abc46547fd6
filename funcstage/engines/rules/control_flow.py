"""Control flow as operators (`torch.cond`, `scan`), refused by name where no engine splits them."""

from __future__ import annotations

import traceback
from typing import Any

from funcstage._torch.operators import HigherOrderOperator

_PACKAGE = "torch._higher_order_ops."
_OPERATORS = ("cond", "while_loop", "scan", "associative_scan", "map")


def operator_behind(error: BaseException) -> str | None:
    """Return the name of the operator that an error comes from, or None for all other errors."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [module.removeprefix(_PACKAGE) for module in modules if module.startswith(_PACKAGE)]
    return next((name for name in names if name in _OPERATORS), None)


def operator_name(operator: Any) -> str | None:
    """Return the name of an operator that is control flow, or None for all others."""
    name = operator.name().removesuffix("_impl") if isinstance(operator, HigherOrderOperator) else ""
    return name if name in _OPERATORS else None


def refusal(owner: str, name: str, otherwise: str = "") -> str:
    """What to say, and to do instead."""
    return (
        f"{owner} calls the higher-order operator {name}, whose branches or steps have gradients that cannot "
        f"be split here. Write it in plain Python (an if, a loop), which the uncompiled `apply` follows"
        f"{otherwise}."
    )


COMPILED = ", or compile the stage, which handles cond, map and scan from torch 2.14 on"
