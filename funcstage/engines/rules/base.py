"""What a rule is: when it applies to a call of an operation, and what runs instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of an operation, as an engine meets it.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        traced: whether it is recorded in a graph, rather than run under the levels.
        split: whether both of its gradients are wanted apart: it is a site, or recorded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: bool
    split: bool


class Rule(NamedTuple):
    """What is done about an operation that an engine must not run as it comes.

    Attributes:
        when: to which calls it applies.
        body: what runs instead, with the same arguments.
        writes: operands that the operation writes into, where its schema does not say so: positions, names.
        whole: whether the body is one operation to the engine, which otherwise sees what it consists of.
    """

    when: Callable[[Call], bool]
    body: Callable[..., Any]
    writes: tuple[tuple[int, str], ...] = ()
    whole: bool = False


def under_levels(call: Call) -> bool:
    """Always under the levels, which then need not look at the operands first."""
    return not call.traced


def traced(call: Call) -> bool:
    """Always in a trace."""
    return call.traced
