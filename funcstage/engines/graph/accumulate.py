"""Accumulation: W -> the same, whose last matrix products add into given accumulators.

Over many microbatches, a weight gradient that is first computed and then added costs a pass over three
tensors of the weight's size and memory for one. A matrix product adds into its result at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from funcstage.engines.graph.extract import Program, boxed, giving_away
from funcstage.engines.graph.joint import results_of
from funcstage.tensors import Gradients, added

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Product:
    """A weight gradient that is a matrix product, or a batch of them.

    Attributes:
        result: which of the gradients.
        transposed: whether the gradient is the product's transpose.
    """

    result: int
    transposed: bool


def accumulating(program: Program) -> tuple[Program, tuple[Product, ...]]:
    """Take the products that yield weight gradients out of W.

    Args:
        program: W; left as it is.

    Returns:
        A program with the results of W, `None` for those that are products, followed by both operands of
        each product; and the products. Its results may be its inputs: they are to be added, not kept.
    """
    program = giving_away(program, program.inputs)
    graph = Graph()
    copies: dict[Node, Node] = {}
    results: list[Any] = list(graph.graph_copy(program.module.graph, copies))  # type: ignore[arg-type]
    products, operands = [], []
    for i, result in enumerate(results_of(program.module.graph)):
        node, transposed = result, False
        while node is not None and _is_transpose(node) and len(node.users) == 1:
            node, transposed = node.args[0], not transposed
        if node is not None and node.target in _PRODUCTS and len(node.users) == 1:
            products.append(Product(i, transposed))
            operands += [copies[operand] for operand in node.args[:2]]
            results[i] = None
    graph.output((*results, *operands))
    graph.eliminate_dead_code()
    names = tuple(node.name for node in graph.find_nodes(op="placeholder"))
    return replace(program, module=boxed(program.module, graph), inputs=names), tuple(products)


def add_into(totals: Sequence[Tensor | None], results: list[Any], products: Sequence[Product]) -> Gradients:
    """Run the products of W, adding into `totals`.

    Args:
        totals: for each gradient what to add it to; donated.
        results: what the program of `accumulating` returned; emptied, so that operands are freed in turn.
        products: what it returned beside it.

    Returns:
        The sums.
    """
    for product in reversed(products):
        right, left = results.pop(), results.pop()
        total = totals[product.result]
        assert total is not None
        _add_product(total.t() if product.transposed else total, left, right)
    return added(totals, results)


def can_add_into(totals: Sequence[Tensor | None], program: Program) -> bool:
    """Tell whether there is something to add every result of W to, in place."""
    there = [total for total, name in zip(totals, program.results, strict=True) if name is not None]
    return all(
        total is not None and total.layout is torch.strided and not total.requires_grad for total in there
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        (total.addmm_ if total.dim() == 2 else total.baddbmm_)(left, right)
    elif total.is_cuda and total.dtype is torch.float32 and left.dtype in (torch.float16, torch.bfloat16):
        into = aten.addmm.dtype_out if total.dim() == 2 else aten.baddbmm.dtype_out
        into(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def _is_transpose(node: Node) -> bool:
    if node.target is aten.permute.default:  # what Inductor makes of it
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.target is aten.t.default


_PRODUCTS = (aten.mm.default, aten.bmm.default)
