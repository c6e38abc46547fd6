"""The parameters of a stage that FSDP shards: whole from its first F of a step to its last W.

A schedule says by UNSHARD, RESHARD and REDUCE_GRAD when parameters are gathered, let go of and their
gradients reduced, and FSDP does all of it, as for torch's own stage. In between the stage computes with the
whole parameters, and sums their gradients up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from funcstage.functional import ModuleFunction
from funcstage.gathered import sharded_parts
from funcstage.pipelining.examples import StageFunction


class WholeParameters:
    """Whole parameters of a step, and the sums of their gradients.

    Attributes:
        module: the module, on the whole of which FSDP has worked.
        apply: its stage function, for whole parameters.
        names: of the parameters that FSDP shards.
        are_there: whether the step has gathered them.
    """

    def __init__(self, module: Any, function: ModuleFunction) -> None:
        self.module = module
        self.apply: StageFunction = function.for_whole_parameters()
        self._groups = function.gathering.groups
        self._parameters = {p.name: p for group in self._groups for p in group.parameters}
        self.names = self._parameters.keys()
        self.are_there = False
        self._sums: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begin a step, with shards."""
        self.are_there = False
        self._sums = {}

    def gather(self, trains: bool) -> None:
        """Gather the parameters, if the schedule has not; `trains` says whether a backward follows."""
        from funcstage._torch.fsdp import gather_all

        gather_all(self.module, trains)
        self.are_there = True

    def total(self, name: str) -> Tensor | None:
        """The sum of a parameter's gradients so far."""
        return self._sums.get(name)

    def take(self, name: str, grad: Tensor) -> None:
        """Take the sum of a parameter's gradients, in the dtype that FSDP sums in."""
        self._sums[name] = grad.to(self._parameters[name].summed_in)

    def hand_over(self) -> None:
        """Let FSDP have the sums, which it is going to reduce."""
        for name, grad in self._sums.items():
            self._parameters[name].take(grad)
        for group in self._groups:
            group.await_reduction()
        self._sums = {}


def whole_parameters(module: nn.Module, function: Any) -> WholeParameters | None:
    """The whole parameters of a stage's module, where schedules take it for one of FSDP's.

    Args:
        module: the module.
        function: its `ModuleFunction`.
    """
    return WholeParameters(module, function) if "" in sharded_parts(module) else None
