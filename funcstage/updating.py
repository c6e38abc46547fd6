"""The optimizer in W: each parameter is updated as soon as its gradient is complete, which is then let go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
from torch import Tensor

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage.errors import StructureError

Update: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any] | None]
"""From a parameter, its gradient and its state to both anew, or `None` where it has written into them."""


@dataclass(slots=True, eq=False)
class Updating:
    """What is updated when, and what has become of it so far.

    Attributes:
        update: the caller's function.
        spec: the structure of the parameters.
        params: their leaves.
        states: the state of each.
        due: for each weight pullback, which parameters are to be updated after it.
        done: the parameters that were updated.
    """

    update: Update
    spec: optree.PyTreeSpec
    params: list[Any]
    states: list[Any]
    due: list[list[int]]
    done: list[int]

    @classmethod
    def of(
        cls,
        update: object,
        state: Any,
        spec: optree.PyTreeSpec,
        params: Sequence[Any],
        reached: Sequence[Collection[int]],
        reads: Sequence[Iterable[Tensor]],
    ) -> Updating:
        """Plan the updates, before anything runs.

        Args:
            update: the caller's function.
            state: a tree that has the state of each parameter in that one's place.
            spec: the structure of the parameters.
            params: their leaves.
            reached: which parameters each weight pullback may have gradients of.
            reads: what each of them reads.
        """
        if not callable(update):
            raise StructureError(
                "update must be a function of a parameter, its gradient and its state that returns parameter "
                f"and state, or None where it has written into them; got {trees.describe(update)}."
            )
        due: list[list[int]] = [[] for _ in reached]
        memory = [{*map(ft.storage_key, read)} for read in reads]
        for i, param in enumerate(params):
            if trees.is_differentiable(param):
                key = ft.storage_key(param)
                # What still reads the parameter must find it as it was.
                last = [k for k in range(len(due)) if i in reached[k] or key in memory[k]]
                due[max(last, default=0)].append(i)
        return cls(update, spec, list(params), _states(state, spec), due, [])

    def apply(self, k: int, totals: list[Tensor | None]) -> None:
        """Update what is due after the k-th weight pullback, and let go of its gradients."""
        for i in self.due[k]:
            grad, totals[i] = totals[i], None
            if grad is not None:
                self._update(i, grad)

    def _update(self, i: int, grad: Tensor) -> None:
        found = self.update(self.params[i], grad, self.states[i])
        if found is not None:
            if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
                raise StructureError(
                    f"update must return the parameter and its state, or None; for {self.name(i)} it "
                    f"returned {trees.describe(found)}."
                )
            self.params[i], self.states[i] = found
        self.done.append(i)

    def name(self, i: int) -> str:
        return trees.leaf_names(self.spec, "params")[i]

    def results(self) -> tuple[Any, Any]:
        """Parameters and states, those that had no gradient as they were."""
        return trees.unflatten(self.spec, self.params), trees.unflatten(self.spec, self.states)

    def __str__(self) -> str:
        names = ", ".join(map(self.name, self.done))
        return f"Updated by then: {names}." if names else "Nothing was updated."


def _states(state: Any, spec: optree.PyTreeSpec) -> list[Any]:
    if state is None:
        return [None] * spec.num_leaves
    try:
        return list(spec.flatten_up_to(state))
    except ValueError as error:
        raise StructureError(
            "state must have the structure of the parameters, with the state of each in its place "
            f"(a tensor, a tuple, anything): {error}."
        ) from None
