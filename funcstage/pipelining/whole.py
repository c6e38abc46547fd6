"""The parameters of a stage that FSDP shards: whole from its first F of a step to its last W.

A schedule says by UNSHARD, RESHARD and REDUCE_GRAD when parameters are gathered, let go of and their
gradients reduced, and FSDP does all of it, as for torch's own stage. In between the stage computes with the
whole parameters, and sums their gradients up. Memory that FSDP lets go of and gathers again is the same for
whoever refers to it, pullbacks included, so that it only has to be there whenever F, I or W runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from funcstage.functional import ModuleFunction
from funcstage.gathered import is_sharded, sharded_parts
from funcstage.pipelining.examples import StageFunction


class WholeParameters:
    """Whole parameters of a step, and the sums of their gradients.

    Attributes:
        apply: the stage function, for whole parameters.
        names: of the parameters that FSDP shards.
        are_there: whether the step has gathered them.
        known_to_schedules: whether FSDP has worked on the module as a whole, so that schedules see it.
    """

    def __init__(self, module: nn.Module, function: ModuleFunction) -> None:
        function.reduces = False  # schedules see to that, whatever FSDP was told before
        self.apply: StageFunction = function.for_whole_parameters()
        self._module = module
        self._groups = function.gathering.groups
        self._parameters = {p.name: p for group in self._groups for p in group.parameters}
        self.names = self._parameters.keys()
        self.known_to_schedules = "" in sharded_parts(module)
        self.begin()

    def begin(self) -> None:
        """Begin a step, with shards."""
        self.are_there = False
        self._sums: dict[str, Tensor] = {}

    def go_on_from(self, before: WholeParameters | None) -> None:
        """Go on in the midst of a step, with the sums so far."""
        if before is not None:
            self._sums = {name: total for name, total in before._sums.items() if name in self.names}

    def gather(self, trains: bool) -> None:
        """Gather the parameters, if they are not there; `trains` says whether a backward follows."""
        from funcstage._torch.fsdp import gather_all

        gather_all(self._module, trains)
        self.are_there = True

    def let_go(self) -> None:
        """Let go of what `reshard_after_forward` says, until it is gathered again."""
        from funcstage._torch.fsdp import let_go

        let_go(self._module)

    def total(self, name: str) -> Tensor | None:
        """The sum of a parameter's gradients so far."""
        return self._sums.get(name)

    def take(self, name: str, grad: Tensor) -> None:
        """Take the sum of a parameter's gradients, in the dtype that FSDP sums in."""
        self._sums[name] = grad.to(self._parameters[name].summed_in)

    def hand_over(self) -> None:
        """Let FSDP have the sums, and reduce them where no schedule will."""
        from funcstage._torch.fsdp import reduce_all, roots_of

        for name, grad in self._sums.items():
            self._parameters[name].take(grad)
        for group in self._groups:
            group.await_reduction()
        self._sums = {}
        for root in () if self.known_to_schedules else roots_of(self._module):
            reduce_all(root)


def whole_parameters(module: nn.Module, function: Any) -> WholeParameters | None:
    """The whole parameters of a stage's module, if FSDP shards some.

    Args:
        module: the module.
        function: its `ModuleFunction`.
    """
    return WholeParameters(module, function) if is_sharded(module) else None
