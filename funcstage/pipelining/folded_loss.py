"""The loss of the last stage: as a part of its programs, or as the schedule computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.pipelining import (
    without_memory,
)
from funcstage.errors import LeafError, StructureError
from funcstage.pipelining.examples import LossFunction, StageFunction, requires_grad
from funcstage.pipelining.microbatch import Call
from funcstage.trees import Buffers, Params, PyTree, describe

if TYPE_CHECKING:
    from funcstage.pipelining.stage import FunctionalPipelineStage


class FoldedLoss:
    """A loss function that runs inside of the last stage's programs, where it is given that stage's output.

    Args:
        loss_fn: the plain function; other outputs are handed to it.
    """

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn

    def __call__(self, output: PyTree, target: PyTree, **loss_kwargs: Any) -> Tensor:
        """Compute the loss of a microbatch.

        Args:
            output: what the last stage returned.
            target: what it should have been.
            **loss_kwargs: further arguments of the loss function.

        Returns:
            The loss, a scalar.
        """
        for leaf in trees.flatten(output)[0]:
            if isinstance(leaf, StandIn) and leaf.pending.leaves is None:
                return leaf.pending.loss(target, loss_kwargs)
        return self.loss_fn(output, target, **loss_kwargs)


def with_loss(apply: StageFunction, loss: FoldedLoss) -> StageFunction:
    """Make a stage function of the last stage and its loss, whose output is (loss, output)."""

    def apply_with_loss(
        params: Params, buffers: Buffers, *args: Any, kwargs: dict[str, Any], target: PyTree, loss_kwargs: Any
    ) -> tuple[PyTree, Buffers]:
        output, new_buffers = apply(params, buffers, *args, **kwargs)
        value = loss.loss_fn(output, target, **loss_kwargs)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise LeafError(
                f"loss_fn must return a real scalar, a tensor of shape [], got {describe(value)}. Take the "
                "mean over the microbatch."
            )
        return (value, output), new_buffers

    apply_with_loss.__qualname__ = f"{apply.__qualname__} with its loss"
    apply_with_loss.module = apply.module  # type: ignore[attr-defined]  # whose mode a compiled stage looks at
    apply_with_loss.contents = apply.contents  # type: ignore[attr-defined]
    return apply_with_loss


class Pending:
    """The forward of a microbatch on the last stage; it can wait for the target, to run with the loss.

    Args:
        stage: the stage.
        call: what its forward is given.
        place: where among the stage's output chunks the output is to be put, if it is.
    """

    def __init__(self, stage: FunctionalPipelineStage, call: Call, place: int | None) -> None:
        self.stage = stage
        self.call = call
        self.place = place
        self.leaves: list[Any] | None = None

    def stand_in(self, output: PyTree) -> PyTree:
        """Make a stand-in for the output, of which examples are given."""
        leaves, spec = trees.flatten(output)
        made = [StandIn(self, i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        return trees.unflatten(spec, made)

    def output(self) -> PyTree:
        """Run the forward without the loss."""
        return self._finish(self.stage._forward(self.stage._apply, self.call), first_leaf=0)

    def loss(self, target: PyTree, loss_kwargs: dict[str, Any]) -> Tensor:
        """Run the forward with the loss."""
        assert self.stage._apply_with_loss is not None
        folded = {"kwargs": self.call.kwargs, "target": target, "loss_kwargs": loss_kwargs}
        call = self.call._replace(kwargs=folded)
        loss, output = self.stage._forward(self.stage._apply_with_loss, call)
        self._finish(output, first_leaf=1)
        return self.stage._forwards[call.chunk].awaiting_grad(0, loss)

    def _finish(self, output: PyTree, first_leaf: int) -> PyTree:
        """Hand the output over to the schedule, to compute with and to return."""
        if self.place is not None:
            self.stage.output_chunks[self.place] = output
        self.stage._pending.pop(self.call.chunk, None)
        leaves, spec = trees.flatten(output)
        if self.stage.has_backward:
            forward = self.stage._forwards[self.call.chunk]
            trainable = [requires_grad(example) for example in trees.flatten(self.stage._output)[0]]
            leaves = [
                forward.awaiting_grad(i, leaf) if wanted else leaf
                for i, (leaf, wanted) in enumerate(zip(leaves, trainable, strict=True), first_leaf)
            ]
        self.leaves = leaves
        return trees.unflatten(spec, leaves)


class StandIn(Tensor):
    """A leaf of an output that is computed when somebody computes with it, other than `FoldedLoss`."""

    pending: Pending
    number: int

    @staticmethod
    def __new__(cls, pending: Pending, number: int, example: Tensor) -> StandIn:
        made = without_memory(cls, example, pending.stage.device)
        made.pending, made.number = pending, number
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<output of {self.pending.stage._name}, not yet computed>"

    def computed(self) -> Tensor:
        if self.pending.leaves is None:
            self.pending.output()
        assert self.pending.leaves is not None
        leaf: Tensor = self.pending.leaves[self.number]
        return leaf

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KNOWN_BEFORE:
            return super().__torch_function__(func, types, args, kwargs or {})
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = trees.map_leaves(
            lambda leaf: leaf.computed() if isinstance(leaf, StandIn) else leaf, (args, kwargs or {})
        )
        return func(*args, **kwargs)


KNOWN_BEFORE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
}
"""What of an output is known before it is computed."""


def backward_of(stage: str, loss: Any, trains: bool) -> None:
    """Run the backward of what a schedule has computed with the output of its last stage.

    Args:
        stage: the stage's name.
        loss: of a microbatch.
        trains: whether the stage has anything that is trained; otherwise there may be no backward.

    Raises:
        StructureError: if the loss is no tensor, or has no gradient although something is trained.
    """
    if not isinstance(loss, Tensor):
        raise StructureError(f"{stage}: the schedule's loss must be a tensor, got {describe(loss)}.")
    if loss.requires_grad:
        torch.autograd.backward(loss)
    elif trains:
        raise StructureError(
            f"{stage}: the schedule's loss does not require grad, so that nothing would be trained. "
            "Compute it from the stage's output, without detach() and outside of no_grad()."
        )
