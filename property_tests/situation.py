"""What a situation is: how it changes a stage, those who drive it, and plain eager autograd beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from funcstage import trees

VERBS = ("F", "I", "W")
"""Forward, input gradient and weight gradient."""


@dataclass
class World:
    """What a caller can reach between two passes of a microbatch.

    Attributes:
        module: the module whose stage is run.
        args: the tensors among its arguments.
        params: the parameters that it computes with.
        buffers: the buffers that it is given.
        cotangents: the tensors among the cotangents.
        output: the tensors that it returned last.
        input_grads: the gradients that I returned last.
    """

    module: nn.Module
    args: list[Tensor]
    params: list[Tensor]
    buffers: list[Tensor]
    cotangents: list[Tensor]
    output: list[Tensor]
    input_grads: list[Tensor]


@dataclass(frozen=True)
class Situation:
    """Nothing out of the ordinary; the others override what they change."""

    refusable: ClassVar[tuple[str, ...]] = ()
    """The engines that may refuse it."""

    refused: ClassVar[bool] = False
    """Whether every engine has to refuse it."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # how Hypothesis shows a failing example

    def build(self, module: nn.Module) -> nn.Module:
        """Wrap the module, or change it, before it becomes a stage."""
        return module

    def stage(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Change the stage function, which eager does not have."""
        return apply

    def around(self, verb: str) -> AbstractContextManager[object]:
        """What is entered around a pass."""
        return nullcontext()

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        """The same for eager."""
        return self.around(verb)

    def after(self, verb: str, world: World) -> None:
        """What the caller does after a pass."""

    def between(self, module: nn.Module) -> None:
        """What the caller changes between two microbatches."""

    def observed(self, module: nn.Module) -> list[Any]:
        """What is left behind beside results."""
        return []

    def held(self) -> Any:
        """What a caller holds throughout a run."""

    def keywords(self, held: Any, k: int) -> dict[str, Any]:
        """Arguments of microbatch `k` beside the stage's own."""
        return {}

    def handed(self, module: nn.Module, k: int) -> dict[str, Any]:
        """Arguments of a microbatch that the caller takes from the module."""
        return {}

    def left(self, held: Any) -> list[Any]:
        """What the stage left in what the caller holds."""
        return []

    def opened(self, output: Any) -> Any:
        """The output as a pytree that everybody knows."""
        return output

    def closed(self, cotangents: Any) -> Any:
        """Cotangents for the output as the stage returned it, given those for the opened one."""
        return cotangents


def map_differentiable(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Map `function` over those tensors of a tree that can have gradients."""
    return trees.map_leaves(lambda leaf: function(leaf) if trees.is_differentiable(leaf) else leaf, tree)


class Around(nn.Module):
    """A module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner
        self.train(inner.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
