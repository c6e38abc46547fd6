"""What an engine is: a function from a call of a stage to its output and the tapes of I and W.

The levels of `torch.func`, a plain tape and a compiled stage's programs are engines. What they have in common
is written here, once; `choose` says which of them takes a call. None knows of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar
from weakref import ref

import optree
import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage.dtensors import Specs, unwrapped
from funcstage.errors import stage_name
from funcstage.functional import PLAIN_TENSORS, check_leaves
from funcstage.state.contents import Contents, Held
from funcstage.state.grad_mode import as_handed
from funcstage.state.identity import Twins
from funcstage.state.writes import Watch
from funcstage.trees import Buffers, Params, PyTree

Flat: TypeAlias = tuple[list[Any], optree.PyTreeSpec]
"""Leaves of a tree, and its structure."""


@dataclass(eq=False)
class StageCall:
    """One call of a stage function, whose trees are flattened once. Nobody changes it.

    Attributes:
        apply: the stage function.
        params: its parameters; floating and complex leaves are differentiated.
        buffers: its buffers.
        args: its positional arguments.
        kwargs: its keyword arguments.
        diff: indices of the differentiated leaves of `args`; None where nothing is, parameters included.
        arg_leaves: leaves of the positional arguments.
        args_spec: their structure.
    """

    apply: Callable[..., Any]
    params: Params
    buffers: Buffers
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    diff: Sequence[int] | None
    arg_leaves: list[Any]
    args_spec: optree.PyTreeSpec

    @classmethod
    def of(
        cls,
        apply: Callable[..., Any],
        params: Params,
        buffers: Buffers,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        diff: Sequence[int] | None,
    ) -> StageCall:
        """A call whose arguments nobody has flattened yet."""
        return cls(apply, params, buffers, args, kwargs, diff, *trees.flatten(args))

    def to(self, apply: Callable[..., Any]) -> StageCall:
        """The same call of another stage function."""
        return replace(self, apply=apply)

    @property
    def module(self) -> Any:
        """The module behind the stage function, or None."""
        return getattr(self.apply, "module", None)

    @property
    def name(self) -> str:
        """What to call the stage."""
        return stage_name(self.apply)

    @cached_property
    def given(self) -> dict[str, PyTree]:
        """What the caller owns, by kind."""
        return {
            "parameter": self.params,
            "buffer": self.buffers,
            "positional argument": self.args,
            "keyword argument": self.kwargs,
        }

    @cached_property
    def flat(self) -> tuple[Flat, Flat, Flat, Flat]:
        """Params, buffers, positional and keyword arguments, in leaves that nobody has looked at yet."""
        return (
            trees.flatten(self.params),
            trees.flatten(self.buffers),
            (self.arg_leaves, self.args_spec),
            trees.flatten(self.kwargs),
        )

    @cached_property
    def of_params(self) -> Flat:
        """Leaves of the parameters, and their structure."""
        return check_leaves("params", self.params, self.flat[0])

    @cached_property
    def of_buffers(self) -> Flat:
        """Leaves of the buffers, and their structure."""
        return check_leaves("buffers", self.buffers, self.flat[1])

    @property
    def of_kwargs(self) -> Flat:
        """Leaves of the keyword arguments, and their structure."""
        return self.flat[3]

    @property
    def whole(self) -> Flat:
        """Leaves of (params, buffers, args, kwargs), and their structure."""
        return trees.flatten((self.params, self.buffers, self.args, self.kwargs))

    @cached_property
    def local(self) -> tuple[list[Any], Specs]:
        """All leaves with what this rank has of DTensors in their places, and how these are sharded."""
        (params, _), (buffers, _), (args, _), (kwargs, _) = self.flat
        return unwrapped([*params, *buffers, *args, *kwargs])

    @property
    def leaves(self) -> list[Any]:
        """All leaves, for those who do not ask for the structure."""
        return [*self.of_params[0], *self.of_buffers[0], *self.argument_leaves]

    @property
    def argument_leaves(self) -> list[Any]:
        """Those of the arguments, by position and by keyword."""
        return [*self.arg_leaves, *self.of_kwargs[0]]

    @cached_property
    def twins(self) -> Twins:
        """Tensors that are there in several places."""
        (params, _), (buffers, _) = self.flat[:2]
        given = as_handed(self.argument_leaves)
        return Twins.of(self.apply, self.params, self.buffers, [*params, *buffers], given)

    def twins_with(self, held: Held | None) -> Twins:
        """The same with what the module holds in several places; `held` is what it holds, where known."""
        if held is None and isinstance(self.module, nn.Module):
            held = Contents(self.module).now()
        if held is None:
            return self.twins
        found, views = held.elsewhere(), held.walk.elsewhere.views
        return self.twins.with_elsewhere(self.apply, self.params, self.buffers, found, views)

    @property
    def state(self) -> list[Tensor]:
        """Tensors among parameters and buffers, which are no residuals: the caller holds them anyway."""
        return [leaf for leaf in (*self.of_params[0], *self.of_buffers[0]) if isinstance(leaf, Tensor)]


class Tape(Protocol):
    """What both tapes of an engine offer: their residuals, to look at, to give away and to replace."""

    @property
    def intact(self) -> bool:
        """Whether it can be run (again), after a run that failed too."""

    @property
    def lent(self) -> bool:
        """Whether its residuals lie in memory that others write into once it is gone."""

    @property
    def differentiated(self) -> bool:
        """Whether what it yields is differentiated in turn, so that its residuals lie on a tape of others."""

    def leaves(self) -> list[Tensor]: ...
    def share(self) -> list[Tensor]: ...
    def with_leaves(self, leaves: Sequence[Tensor]) -> Self: ...


class Place(NamedTuple):
    """A site on a tape.

    Attributes:
        name: of the operation.
        cotangent: what arrived there.
        inputs: the residuals behind it.
        reached: which parameter leaves are behind it.
        vjp: from a cotangent to the gradients of all parameter leaves.
    """

    name: str
    cotangent: Tensor
    inputs: list[Tensor]
    reached: list[int]
    vjp: Callable[[Tensor], list[Tensor | None]]


class Summed(Exception):
    """I has summed some gradients for W already, so that nothing is left of their sites."""

    def __init__(self, reached: Sequence[int]) -> None:
        super().__init__()
        self.reached = reached


class AddedDirectly(Exception):
    """A backward() within the stage's own backward has added gradients, of which no site knows."""

    def __init__(self, reached: Sequence[int]) -> None:
        super().__init__()
        self.reached = reached


class WeightTape(Tape, Protocol):
    """An engine's W.

    Attributes:
        shares: the numbers of those of I's cotangents, then of its results, whose memory it may hold; None
            where any may be.
        checks_nan: whether autograd runs it, which looks for NaN in anomaly mode.
    """

    @property
    def checks_nan(self) -> bool: ...
    @property
    def shares(self) -> Sequence[int] | None: ...
    def reads(self) -> Iterable[Tensor]: ...
    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]: ...
    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]: ...
    def sites(self) -> Iterable[Place] | None:
        """What W sums over, or None where that cannot be told.

        Raises:
            Summed: if I has summed some of it.
            AddedDirectly: if the stage's own backward has.
        """

    def reached(self) -> Iterable[int]:
        """Which parameters W may have gradients of."""

    def split(self, parts: int) -> Sequence[WeightTape]:
        """Divide W in at most `parts` tapes, each parameter's gradient in one of them; it is then used up."""


class InputTape(Tape, Protocol):
    """An engine's I.

    Attributes:
        watch: over what I and W may read of what the caller holds; None where that may be anything.
        captured: tensors that F has read without being handed them, where nothing else looks for writes.
        checks_nan: whether autograd runs it, which looks for NaN in anomaly mode.
        higher: whether what I and W yield can be differentiated in turn, or transformed.
    """

    @property
    def checks_nan(self) -> bool: ...
    @property
    def higher(self) -> bool: ...
    @property
    def watch(self) -> Watch | None: ...
    @property
    def captured(self) -> Sequence[ref[Tensor]]: ...
    def at_once(self) -> InputTape:
        """The same, for W to follow at once, so that I may compute it; not to be retained."""

    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterable[Tensor]: ...
    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]: ...


AnyInputTape = TypeVar("AnyInputTape", bound=InputTape)


class Linearized(NamedTuple, Generic[AnyInputTape]):
    """What F returns.

    Attributes:
        output: free of whatever the engine wrapped it in.
        new_buffers: likewise.
        tape: what I and W need.
    """

    output: PyTree
    new_buffers: Buffers
    tape: AnyInputTape


Engine: TypeAlias = Callable[[StageCall], Linearized[Any]]
"""Runs a stage once and retains what its two reverse passes need."""


def is_differentiated(leaves: Sequence[Any]) -> bool:
    """Tell whether somebody outside differentiates what is computed from these leaves."""
    if not torch.is_grad_enabled():
        return False
    if ft.current_level() > 0:
        return True
    if PLAIN_TENSORS.issuperset(map(type, leaves)):
        return any(map(_REQUIRES_GRAD, leaves))
    return any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))


_REQUIRES_GRAD = attrgetter("requires_grad")
