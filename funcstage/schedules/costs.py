"""What a microbatch costs a stage: given, or estimated from a compiled stage's plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from funcstage.schedules.orders import Action, ScheduleError

if TYPE_CHECKING:
    from funcstage.engines.graph.plan import Plan


class Costs(NamedTuple):
    """What one microbatch costs a stage; the whole backward takes `input + weight` seconds.

    Attributes:
        forward: seconds that F takes.
        input: seconds that I takes.
        weight: seconds that W takes.
        held_after_forward: bytes held between F and I.
        held_after_input: bytes held between I and W.
    """

    forward: float
    input: float
    weight: float
    held_after_forward: float = 0
    held_after_input: float = 0

    def of(self, action: Action, pieces: int = 1) -> float:
        """Return the seconds that an action of the stage takes, if W is in so many pieces."""
        backward = {"I": self.input, "W": self.weight / pieces, "B": self.input + self.weight}
        return self.forward if action.kind == "F" else backward[action.kind]

    def held(self, action: Action, pieces: int = 1) -> float:
        """Return by how many bytes an action changes what its rank holds once it is done.

        Args:
            action: of the stage.
            pieces: if W is in so many, each frees its share; the result is in units of so many to a byte,
                in which sums of whole numbers stay whole.
        """
        if action.kind == "F":
            return self.held_after_forward * pieces
        if action.kind == "I":
            return (self.held_after_input - self.held_after_forward) * pieces
        return -(self.held_after_forward * pieces if action.kind == "B" else self.held_after_input)


def planned_costs(plan: Plan, *, flops_per_second: float, bytes_per_second: float) -> Costs:
    """Estimate a stage's costs from its plan and a device's peak rates.

    A program takes as long as its FLOPs or its residuals' traffic, whichever is longer (the roofline of
    Williams, Waterman and Patterson, CACM 52(4), 2009). The traffic of parameters and of what a program
    keeps to itself is not in a plan, so this is a lower bound.

    Args:
        plan: from `CompiledStage.plan`.
        flops_per_second: peak rate of arithmetic in the stage's dtype.
        bytes_per_second: peak rate of memory.

    Returns:
        Seconds, and the bytes that the plan says are held.

    Raises:
        ScheduleError: if a rate is not positive.
    """
    if not (flops_per_second > 0 and bytes_per_second > 0):
        raise ScheduleError(
            f"Peak rates must be positive, got {flops_per_second} FLOP/s and {bytes_per_second} byte/s."
        )

    def seconds(flops: int, moved: int) -> float:
        return max(flops / flops_per_second, moved / bytes_per_second)

    return Costs(
        seconds(plan.forward.flops, plan.held_after_forward),
        seconds(plan.input_grad.flops, plan.input_grad.reads + plan.input_to_weight),
        seconds(plan.weight_grad.flops, plan.weight_grad.reads),
        plan.held_after_forward,
        plan.held_after_input,
    )
