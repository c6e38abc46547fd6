"""Tapes whose residuals autograd's nodes hold: what the levels' and the plain tape's have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage.copies import Unpicklable
from funcstage.residuals import Home, Residual, Switchboard, replaced, residuals_of
from funcstage.state.module import ModuleState, locked_and_swapped
from funcstage.tensors import added


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What all tapes of one forward pass have in common.

    Attributes:
        n_args: the number of argument leaves.
        n_params: the number of parameter leaves.
        state: the parameters and buffers, which are no residuals: the caller holds them anyway.
        switchboard: where nodes look for residuals that were taken out of them.
        modules: what the stage's modules held, where Python functions may read it in the reverse passes.
    """

    n_args: int
    n_params: int
    state: list[Tensor]
    switchboard: Switchboard
    modules: list[ModuleState]

    @property
    def by_autograd(self) -> bool:
        """Whether autograd runs all of the reverse passes."""
        return True

    @contextmanager
    def reading(self, home: Home) -> Iterator[None]:
        """Let a reverse pass find residuals, and its Python functions what the modules held in F."""
        with self.switchboard.reading(home), locked_and_swapped(self.modules):
            yield

    def saved(self, edges: Iterable[GradientEdge], home: Home) -> list[Residual]:
        """The residuals that the nodes behind these places hold."""
        return residuals_of(edges, self.state, self.switchboard, home)


class OnNodes(Unpicklable):
    """Either tape: a dataclass with `origin` and `home`. Nothing is ever written into its residuals."""

    __slots__ = ()
    lent: ClassVar = False
    origin: Any
    home: Home

    @property
    def differentiated(self) -> bool:
        return False

    @property
    def checks_nan(self) -> bool:
        """Whether autograd runs it, which looks for NaN in anomaly mode."""
        return bool(self.origin.by_autograd)

    def leaves(self) -> list[Tensor]:
        """The residuals: what the nodes have saved, then what lies beside."""
        return [*(residual.tensor for residual in self._saved()), *self._beside()]

    def share(self) -> list[Tensor]:
        """The residuals, for others to hold."""
        return self.leaves()

    def with_leaves(self, leaves: Sequence[Tensor]) -> Self:
        """The same tape over other residuals."""
        saved, rest = self._saved(), iter(leaves)
        home = replaced(saved, [*islice(rest, len(saved))], self.origin.switchboard, self.home)
        return replace(self, home=home, **self._others(rest))  # type: ignore[type-var]

    def _saved(self) -> list[Residual]:
        raise NotImplementedError

    def _beside(self) -> Iterable[Tensor]:
        """Residuals that no node holds."""
        return ()

    def _others(self, rest: Iterator[Tensor]) -> dict[str, Any]:
        """The fields that hold those, with the next tensors of `rest` in their place."""
        return {}


class InputsOnNodes(OnNodes):
    """A tape of I."""

    __slots__ = ()
    watch: ClassVar = None

    def at_once(self) -> Self:
        """The same where W follows at once."""
        return self


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


def operation_of(node: Node) -> str:
    """Name an operation after its node on the tape: `"addmm"` for `AddmmBackward0`."""
    name = re.sub(r"Backward\d*$", "", node.name())
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    behind = [parent for parent, _ in node.next_functions if parent is not None]
    return operation_of(behind[0]) if name in _SHAPED and len(behind) == 1 else name


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
