"""Symbolic sizes: torch's shape environment, its guards, and expressions over sizes as code and as nodes.

Private: what a symbolic number holds (`node`), the constructor of symbols, and sympy's way to Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node, Proxy
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

__all__ = [
    "SYMBOLIC",
    "ShapeEnv",
    "at_hints",
    "computed",
    "enable_python_dispatcher",
    "environment",
    "function_of",
    "guards",
    "hint",
    "is_number",
    "symbol",
]

Number: TypeAlias = "int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool"

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def environment(of_values: bool = False) -> ShapeEnv:
    """One in which sizes that depend on values are refused, as they are without any, or are symbols."""
    return ShapeEnv(allow_scalar_outputs=of_values, allow_dynamic_output_shape_ops=of_values)


def symbol(env: ShapeEnv, size: int, name: str) -> SymInt:
    """A size that is left open; `size` is what it is taken for where a decision needs a number."""
    from torch._dynamo.source import ConstantSource  # here, as it loads Dynamo

    source = ConstantSource(name)
    expression = env.create_symbol(size, source, DimDynamic.DYNAMIC)
    made = env.create_symintnode(expression, hint=size, source=source)
    assert isinstance(made, SymInt)
    return made


def hint(value: Number) -> Any:
    """The number that a symbolic one is taken for; nothing is specialised by asking."""
    return value.node.hint if isinstance(value, SYMBOLIC) else value


def is_number(node: Node) -> bool:
    """Tell whether a node's value is a number that depends on sizes."""
    return isinstance(node.meta.get("val"), SYMBOLIC)


def guards(env: ShapeEnv) -> list[Any]:
    """What was assumed of the symbols so far."""
    return [guard.expr for guard in env.guards]


def function_of(symbols: Sequence[SymInt], values: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """Numbers, symbolic ones or sympy's expressions among them, as a function of the sizes."""
    from torch.utils._sympy.printers import PythonPrinter

    names = ", ".join(str(size.node._expr) for size in symbols)
    expressions = [value.node.expr if isinstance(value, SYMBOLIC) else value for value in values]
    code = "".join(f"{PythonPrinter().doprint(expression)}, " for expression in expressions)
    function: Callable[..., tuple[Any, ...]] = eval(f"lambda {names}: ({code})", dict(_IN_CODE))
    return function


def computed(node: Node, value: Number, symbols: Sequence[SymInt], placeholders: Sequence[Node]) -> Any:
    """Compute a symbolic number from nodes that stand for the sizes, before `node` in its graph."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    if not isinstance(value, SYMBOLIC):
        return value
    known: dict[Any, Any] = {s.node._expr: Proxy(p) for s, p in zip(symbols, placeholders, strict=True)}
    before = node.prev
    with node.graph.inserting_before(node):
        found = sympy_interp(PythonReferenceAnalysis, known, value.node.expr)
    for made in _between(before, node):
        args = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in made.args]
        made.meta["val"] = made.target(*args)  # type: ignore[operator]
    return found.node if isinstance(found, Proxy) else found


def at_hints(value: object) -> object:
    """A tensor of symbolic sizes as one without memory that has the sizes it is taken for."""
    if not isinstance(value, Tensor) or not any(isinstance(size, SYMBOLIC) for size in value.shape):
        return hint(value) if isinstance(value, SYMBOLIC) else value
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")


def _between(first: Node, last: Node) -> list[Node]:
    found = []
    node = first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


_IN_CODE = {"math": math, "torch": torch}
