"""Stages of DTensors: their programs run on what this rank has, and here is what becomes of that outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from torch import Tensor

from funcstage import dtensors, trees
from funcstage.copies import Unpicklable
from funcstage.engines.base import Linearized
from funcstage.engines.graph import tapes
from funcstage.engines.graph.joint import Joint, Sharding
from funcstage.state.writes import Watch, Watching
from funcstage.tensors import added

OnListTape = TypeVar("OnListTape", bound=tapes.OnList)


def sharded(
    linearized: Linearized[tapes.InputTape], joint: Joint, given: Sequence[Any]
) -> Linearized[InputTape]:
    """Make DTensors of what F has returned, and have I and W take and return them.

    Args:
        linearized: what F has returned.
        joint: the graph, which knows which of the results are DTensors.
        given: the leaves of the call.
    """
    sharding = joint.sharding
    assert sharding is not None
    results, spec = trees.flatten((linearized.output, linearized.new_buffers))
    leaves = dtensors.wrapped(results, sharding.results)
    output, new_buffers = trees.unflatten(spec, leaves)
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    tensors += [leaves[i] for i in sharding.results]
    watch = _Both(linearized.tape.watch, Watch([], tensors, lambda: [*joint.given, *_names(joint)]))
    return Linearized(output, new_buffers, InputTape(linearized.tape, sharding, watch))


def _names(joint: Joint) -> list[str]:
    roots = ("output", joint.output_spec), ("new_buffers", joint.buffers_spec)
    names = [name for root, spec in roots for name in trees.leaf_names(spec, root)]
    return [] if joint.sharding is None else [names[i] for i in joint.sharding.results]


class _Both(NamedTuple):
    """Watches over what this rank has, and over the DTensors around it, which count their own writes."""

    local: Watching
    whole: Watching

    def written(self, reads: Callable[[], Iterable[Tensor]]) -> str | None:
        return self.local.written(reads) or self.whole.written(reads)

    def within(self, memory: Sequence[Tensor]) -> Watching:
        return _Both(self.local.within(memory), self.whole.within(memory))


@dataclass(slots=True, eq=False)
class OnRank(Unpicklable, Generic[OnListTape]):
    """What both tapes have in common.

    Attributes:
        tape: that of the programs.
        sharding: which cotangents and gradients are DTensors.
    """

    tape: OnListTape
    sharding: Sharding
    checks_nan: ClassVar = False
    differentiated: ClassVar = False

    @property
    def lent(self) -> bool:
        return self.tape.lent

    @property
    def intact(self) -> bool:
        return self.tape.intact

    def leaves(self) -> list[Tensor]:
        return self.tape.leaves()

    def share(self) -> list[Tensor]:
        return self.tape.share()

    def with_leaves(self, leaves: Sequence[Tensor]) -> Self:
        return replace(self, tape=self.tape.with_leaves(leaves))


@dataclass(slots=True, eq=False)
class InputTape(OnRank[tapes.InputTape]):
    """What F retains for I and W.

    Attributes:
        watch: over what I and W may read of the caller's.
    """

    watch: Any
    higher: ClassVar = False
    captured: ClassVar = ()

    def at_once(self) -> InputTape:
        """The same where W follows at once."""
        return replace(self, tape=self.tape.at_once())

    def input_vjp(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]:
        """Run I: return the gradient of every argument leaf, the tape of W, and the tape that is left."""
        local = dtensors.unwrapped(dtensors.placed_as(cotangents, self.sharding.cotangents))[0]
        grads, tape, left = self.tape.input_vjp(local, retain)
        grads = dtensors.wrapped(grads, self.sharding.input_grads)
        return grads, WeightTape(tape, self.sharding), None if left is None else self

    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterable[Tensor]:
        return self.tape.reads(cotangents)


class WeightTape(OnRank[tapes.WeightTape]):
    """What F and I retain for W."""

    __slots__ = ()

    @property
    def shares(self) -> Sequence[int] | None:
        return self.tape.shares

    def reads(self) -> Iterable[Tensor]:
        return self.tape.reads()

    def sites(self) -> None:
        return None

    def reached(self) -> Iterable[int]:
        return self.tape.reached()

    def split(self, parts: int) -> Sequence[WeightTape]:
        return [WeightTape(tape, self.sharding) for tape in self.tape.split(parts)]

    def weight_vjp(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]:
        """Run W: return the gradient of every parameter leaf, and the tape that is left."""
        grads, left = self.tape.weight_vjp(retain)
        return dtensors.wrapped(grads, self.sharding.param_grads), None if left is None else self

    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run W and add the gradients into `totals`, which are donated."""
        local, specs = dtensors.unwrapped(list(totals))
        grads = self.sharding.param_grads
        if any(i not in grads or spec.placements != grads[i].placements for i, spec in specs.items()):
            return added(totals, self.weight_vjp(retain=False)[0])
        sums = self.tape.add_into(local)
        kept = {i for i in specs if sums[i] is local[i]}
        wrapped = dtensors.wrapped(sums, {i: specs.get(i, spec) for i, spec in grads.items()})
        return [totals[i] if i in kept else total for i, total in enumerate(wrapped)]
