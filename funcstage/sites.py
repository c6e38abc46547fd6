"""Sites: where the parameters of a stage are read, each with what its weight gradient is made of.

What W computes is a sum over sites, of each site's own vjp at the cotangent that arrived there. Seen one by
one, sites yield what a second backward is run for elsewhere: norms of the gradients of single examples,
gradient noise, gradients from compressed cotangents, Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from funcstage import trees
from funcstage.copies import Unpicklable
from funcstage.errors import LeafError

Grads: TypeAlias = list[Tensor | None]
"""A gradient for each parameter leaf."""


@dataclass(frozen=True, eq=False)
class Site(Unpicklable):
    """One operation that reads parameters next to a differentiated activation.

    Attributes:
        name: of the operation, as autograd calls it: `"addmm"` for a linear layer.
        params: the parameters that its gradient reaches, as paths in the `params` pytree joined by dots. A
            weight that is computed from parameters (normalised, transposed, cast) stands for all of those.
        inputs: what was saved for its gradient, without parameters and buffers, as the kernel has it: for a
            linear layer the input, whose leading dimensions may be flattened into one.
        cotangent: what arrived at its output, with the shape of the kernel's output.
    """

    name: str
    params: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    _vjp: Callable[[Tensor], dict[str, Tensor]]

    def vjp(self, cotangent: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the site's part of the parameters' gradients.

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
                f"The cotangent of the site {self.name} must look like the one that arrived, "
                f"{trees.describe(wanted)}; got {trees.describe(cotangent)}."
            )
        return self._vjp(cotangent)

    def __copy__(self) -> Site:
        return self

    def __repr__(self) -> str:
        inputs = ", ".join(str(list(tensor.shape)) for tensor in self.inputs)
        return (
            f"<Site {self.name} of {', '.join(self.params)}, inputs {inputs or 'none'}, "
            f"cotangent {list(self.cotangent.shape)}>"
        )
