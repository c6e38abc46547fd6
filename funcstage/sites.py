"""Sites: where the parameters of a stage are read, each with what its weight gradient is made of.

What W computes is a sum over sites, of each site's own vjp at the cotangent that arrived there. Seen one by
one, sites yield what a second backward is run for elsewhere: norms of the gradients of single examples,
gradient noise, gradients from compressed cotangents, Kronecker factors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage import trees
from funcstage.closures import WeightTape, reverse
from funcstage.copies import Unpicklable
from funcstage.errors import LeafError
from funcstage.residuals import nodes_behind, residuals_of

Grads: TypeAlias = list[Tensor | None]
"""A gradient for each parameter leaf."""

_SHAPED = {
    "view",
    "unsafe_view",
    "reshape_alias",
    "t",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
    "expand",
}
"""Operations that are none of their own: the one behind them gives a site its name."""


@dataclass(frozen=True, eq=False)
class Site(Unpicklable):
    """One operation that reads parameters, with a differentiated activation beside them.

    Attributes:
        name: of the operation, as autograd calls it: `"addmm"` for a linear layer.
        params: the parameters that its gradient reaches, as paths in the `params` pytree joined by dots. A
            weight that is computed from parameters (normalised, transposed, cast) stands for all of those.
        inputs: what was saved for its gradient, parameters and buffers left out, as the kernel has it: of a
            linear layer the input, whose leading dimensions may be flattened into one.
        cotangent: what arrived at its output, of the shape that the kernel's output has.
    """

    name: str
    params: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    _pull: Callable[[Tensor], dict[str, Tensor]]

    def vjp(self, cotangent: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the site's share of the parameters' gradients.

        Args:
            cotangent: of the output of the site, with its shape, dtype and device, by default the one that
                arrived. The vjp is linear in it: that of one example alone gives the example's share.

        Returns:
            The share of each of `params` that the cotangent reaches, in memory that may be shared.

        Raises:
            ConsumedError: if the weight pullback was used in the meantime, without `retain=True`.
            LeafError: if the cotangent is not one of this site's output.
        """
        if cotangent is None:
            cotangent = self.cotangent
        wanted = self.cotangent
        if (
            not isinstance(cotangent, Tensor)
            or cotangent.shape != wanted.shape
            or (cotangent.dtype, cotangent.device) != (wanted.dtype, wanted.device)
        ):
            raise LeafError(
                f"The cotangent of the site {self.name} must look as the one that arrived, "
                f"{trees.describe(wanted)}; got {trees.describe(cotangent)}."
            )
        return self._pull(cotangent)

    def __copy__(self) -> Site:
        return self

    def __repr__(self) -> str:
        inputs = ", ".join(str(list(tensor.shape)) for tensor in self.inputs)
        return (
            f"<Site {self.name} of {', '.join(self.params)}, inputs {inputs or 'none'}, "
            f"cotangent {list(self.cotangent.shape)}>"
        )


class Place(NamedTuple):
    """A site on a tape.

    Attributes:
        edge: its output.
        cotangent: what arrived there.
        inputs: the residuals behind it.
        reached: which parameter leaves are behind it.
        pull: from a cotangent to the gradients of all parameter leaves.
    """

    edge: GradientEdge
    cotangent: Tensor
    inputs: list[Tensor]
    reached: list[int]
    pull: Callable[[Tensor], Grads]


def places_of(tape: WeightTape) -> Iterator[Place]:
    """Yield the sites of a tape, those of its checkpointed regions included.

    Args:
        tape: W's; it stays as it is.
    """
    origin = tape.origin

    def pull_from(edges: Sequence[GradientEdge], cotangents: Grads) -> Grads:
        seeds = [(edge, grad) for edge, grad in zip(edges, cotangents, strict=True) if grad is not None]
        grads: Grads = [None] * origin.n_params
        found = reverse(seeds, [leaf for _, leaf in origin.params], True, origin, tape.home)
        for (i, _), grad in zip(origin.params, found, strict=True):
            grads[i] = grad
        return grads

    def reached_from(edges: Sequence[GradientEdge]) -> list[int]:
        ends = [getattr(node, "variable", None) for node in nodes_behind(edges)]
        return [i for i, leaf in origin.params if any(end is leaf for end in ends)]

    for edge, cotangent in tape.seeds:
        saved = residuals_of([edge], origin.state, origin.switchboard, tape.home)
        yield Place(
            edge,
            cotangent,
            [residual.tensor for residual in saved],
            reached_from([edge]),
            lambda grad, edge=edge: pull_from([edge], [grad]),  # type: ignore[misc]
        )
    for outside, of_region in tape.regions:
        for place in places_of(of_region):
            yield place._replace(
                reached=reached_from([outside[i] for i in place.reached]),
                pull=lambda grad, inside=place.pull, outside=outside: pull_from(outside, inside(grad)),  # type: ignore[misc]
            )


def operation_of(node: Node) -> str:
    """Name an operation after its node on the tape: `"addmm"` for `AddmmBackward0`."""
    name = re.sub(r"Backward\d*$", "", node.name())
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    behind = [parent for parent, _ in node.next_functions if parent is not None]
    return operation_of(behind[0]) if name in _SHAPED and len(behind) == 1 else name
