"""Outputs as the tensors that are sent, and examples of them without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcstage import dtensors, trees
from funcstage.trees import Buffers, PyTree

StageFunction = Callable[..., tuple[PyTree, Buffers]]


LossFunction = Callable[..., Tensor]


def as_tuple(output: PyTree) -> tuple[Any, ...]:
    """An output as the tensors that are sent, by torch's rule."""
    return tuple(output) if type(output) in (tuple, list) else (output,)


def tensors(tree: PyTree) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors have the same shapes, dtypes and, if they are DTensors, meshes and placements."""
    return list(map(_key, found)) == list(map(_key, expected))


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, dtensors.placement(tensor)


def look(tensor: Tensor) -> str:
    """Describe a tensor without its device, which in examples is none."""
    placed = dtensors.placement(tensor)
    return trees.look(tensor) + (f" placed {placed[1]} over {placed[0]}" if placed else "")


def looks(tensors: Sequence[Tensor]) -> str:
    """Describe several."""
    return f"({', '.join(map(look, tensors))})"


def example(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = dtensors.example(leaf)
    if made is None:
        made = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return made.requires_grad_(leaf.requires_grad)


def sent_grad(grad: Tensor | None, example: Tensor | None, device: torch.device) -> Tensor | None:
    """What the previous stage waits for: zeros where there is no gradient, but could have been one."""
    if example is None:
        return None
    if grad is None:
        return dtensors.local_of(dtensors.zeros(example, device))
    [placed] = dtensors.placed_as([grad], dtensors.unwrapped([example])[1])
    return dtensors.local_of(dtensors.to_send(placed))


def trainable(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if trees.is_differentiable(leaf) else leaf


def cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating and dtype is not None else leaf


def requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def any_requires_grad(tree: PyTree) -> bool:
    return any(map(requires_grad, trees.flatten(tree)[0]))
