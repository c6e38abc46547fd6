"""Tapes whose residuals autograd's nodes hold: what the levels' and the plain tape's have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor

from funcstage.copies import Unpicklable
from funcstage.residuals import Home, Residual, replaced
from funcstage.tensors import added


class OnNodes(Unpicklable):
    """Either tape: autograd runs it, and nothing is ever written into its residuals."""

    __slots__ = ()
    checks_nan: ClassVar = True

    def leaves(self) -> list[Tensor]:
        """The residuals."""
        raise NotImplementedError

    def share(self) -> list[Tensor]:
        """The residuals, for others to hold."""
        return self.leaves()


class WeightsOnNodes(OnNodes):
    """A tape of W, which may hold memory of any cotangent or result of I."""

    __slots__ = ()
    shares: ClassVar = None

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], Any]:
        """Run W."""
        raise NotImplementedError

    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run W and add the gradients into `totals`, which are donated."""
        return added(totals, self.weight_vjp(retain=False)[0])


class InputsOnNodes(OnNodes):
    """A tape of I, all of whose residuals nodes hold; a dataclass with `origin` and `home`."""

    __slots__ = ()
    watch: ClassVar = None
    origin: Any
    home: Home

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes have saved."""
        return [residual.tensor for residual in self._saved()]

    def with_leaves(self, leaves: Sequence[Tensor]) -> Self:
        """The same tape over other residuals."""
        home = replaced(self._saved(), leaves, self.origin.switchboard, self.home)
        return replace(self, home=home)  # type: ignore[type-var]

    def _saved(self) -> list[Residual]:
        raise NotImplementedError
