"""Outputs as the tensors that are sent, and examples of them without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage.trees import Buffers, PyTree

StageFunction = Callable[..., tuple[PyTree, Buffers]]


LossFunction = Callable[..., Tensor]


def as_tuple(output: PyTree) -> tuple[Any, ...]:
    """An output as the tensors that are sent, by torch's rule."""
    return tuple(output) if type(output) in (tuple, list) else (output,)


def tensors(tree: PyTree) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def looks(tensors: Sequence[Tensor]) -> str:
    """Describe tensors without their device, which in examples is none."""
    return f"({', '.join(map(trees.look, tensors))})"


def example(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)


def trainable(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if trees.is_differentiable(leaf) else leaf


def cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating and dtype is not None else leaf


def requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def any_requires_grad(tree: PyTree) -> bool:
    return any(map(requires_grad, trees.flatten(tree)[0]))
