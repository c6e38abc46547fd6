"""A microbatch of a stage: what its forward is given, and what it leaves for the backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcstage import trees
from funcstage.dtensors import as_cotangent, zeros
from funcstage.pipelining.examples import example
from funcstage.pullback import Pullback
from funcstage.trees import PyTree


class Call(NamedTuple):
    """What the forward of a microbatch is given."""

    chunk: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """What F leaves for I.

    Attributes:
        pullback: of the microbatch.
        spec: the structure of the output.
        single: an example of the output, if that is one tensor, and its device.
        args: the first stage's arguments, through which autograd goes on.
        output_grads: the gradients of the output's leaves that have arrived.
    """

    pullback: Pullback
    spec: optree.PyTreeSpec
    single: tuple[Tensor, torch.device] | None
    args: tuple[Any, ...]
    output_grads: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, pullback: Pullback, output: PyTree, args: tuple[Any, ...]) -> Forward:
        single = (example(output), output.device) if trees.is_differentiable(output) else None
        return cls(pullback, trees.flatten(output)[1], single, args)

    def cotangents(self) -> PyTree:
        """The gradients as the pullback takes them."""
        grads = [self.output_grads.get(i) for i in range(self.spec.num_leaves)]
        # torch 2.11 sends a gradient of everything. To a pullback, one None alone would be ones.
        grads = [grad if trees.is_differentiable(grad) else None for grad in grads]
        if self.single is not None and grads == [None]:
            return zeros(as_cotangent(self.single[0]), self.single[1])
        return trees.unflatten(self.spec, grads)

    def awaiting_grad(self, i: int, leaf: Tensor) -> Tensor:
        """Let the gradient of a leaf of the output come here. A loss may write into what this returns."""
        arrived = self.output_grads

        def take(leaf: Tensor) -> None:
            arrived[i], leaf.grad = leaf.grad, None

        leaf = leaf.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(take)
        made: Tensor = _Itself.apply(leaf)
        return made


class _Itself(torch.autograd.Function):
    """A leaf of autograd as a result, in the same memory: only a result may be written in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
