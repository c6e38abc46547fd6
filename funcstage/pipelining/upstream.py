"""Where the pipeline's own inputs come from: modules outside of it, which train along.

The inputs of a batch are cut into microbatches of one autograd graph. A backward for each of these would run
through that graph many times, which autograd refuses. So the gradients are gathered, and go on once, after
the step's last backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage.trees import PyTree


class Upstream:
    """The gradients of the pipeline's inputs, gathered over the microbatches of a step."""

    def __init__(self) -> None:
        self._roots: list[Tensor] = []
        self._grads: list[Tensor] = []

    def clear(self) -> None:
        """Forget what an interrupted step has left."""
        self._roots, self._grads = [], []

    def gather(self, args: tuple[Any, ...], grads: tuple[PyTree, ...]) -> None:
        """Take the gradients of a microbatch's arguments.

        Args:
            args: the arguments.
            grads: the gradients, a tree like each argument.
        """
        for leaf, grad in zip(trees.flatten(args)[0], trees.flatten(grads)[0], strict=True):
            if grad is not None and isinstance(leaf, Tensor) and leaf.requires_grad:
                self._roots.append(leaf)
                self._grads.append(grad)

    def deliver(self, divisor: int) -> None:
        """Let autograd go on, through the graph that the inputs came out of.

        Inputs that are leaves get the sum over the microbatches, as from torch's stage, which scales the
        gradients of its module alone. As soon as one is the output of another module, which torch's stage
        cannot train, all are divided as the module's gradients are.

        Args:
            divisor: what the schedule divides gradients by.
        """
        roots, grads = self._roots, self._grads
        self.clear()
        if not roots:
            return
        if divisor != 1 and not all(map(_is_part_of_a_leaf, roots)):
            grads = [grad / divisor for grad in grads]
        torch.autograd.backward(roots, grads)


def _is_part_of_a_leaf(root: Tensor) -> bool:
    whole = root._base if root._base is not None else root
    return whole.is_leaf
