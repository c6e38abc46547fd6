"""Pass 3, partition: the joint graph -> three graphs F, I, W and the residuals between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from torch.fx import Node

from funcstage.engines.graph.budget import within
from funcstage.engines.graph.crossing import Division, crossing
from funcstage.engines.graph.extract import Program, extract
from funcstage.engines.graph.joint import Joint, is_random
from funcstage.engines.graph.mincut import nbytes
from funcstage.errors import StructureError

Remat: TypeAlias = Literal["none", "min_cut", "full"] | float | Callable[[Node], bool]


def checked(remat: object) -> Remat:
    """What a user has asked to be held, or computed again.

    Raises:
        StructureError: if it is none of what can be asked for.
    """
    if isinstance(remat, str) and remat in ("none", "min_cut", "full"):
        return remat  # type: ignore[return-value]  # one of the literals
    if isinstance(remat, Real) and not isinstance(remat, bool) and 0 <= float(remat) <= 1:
        return float(remat)
    if callable(remat) and not isinstance(remat, type):
        return remat
    raise StructureError(
        "remat must be 'none', 'min_cut', 'full', a budget between 0 (holds what 'full' does) and 1 (at most "
        f"what 'none' does), or a policy of nodes; got {remat!r}."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Three programs and the residuals that pass between them, by their names in the joint graph.

    Attributes:
        forward: (state, args) -> outputs, new buffers, `after_forward`.
        input_grad: (state, residuals, cotangents) -> input gradients, `from_input`.
        weight_grad: (state, residuals) -> parameter gradients, each with memory of its own.
        after_forward: what F hands to I and W.
        from_input: what I hands to W.
        for_weight: what W reads, out of both.
        nbytes: the bytes that each residual keeps alive.
        linear: the residuals and inputs of the backward that it is linear in: cotangents and what I
            made of them.
        summed: what I hands on of gradients that it has summed for W.
        budget: how many bytes F may hand on, where that was asked for.
    """

    forward: Program
    input_grad: Program
    weight_grad: Program
    after_forward: tuple[str, ...]
    from_input: tuple[str, ...]
    for_weight: tuple[str, ...]
    nbytes: dict[str, int]
    linear: frozenset[str]
    summed: frozenset[str]
    budget: int | None = None


def partition(joint: Joint, remat: Remat, sites: bool = False) -> Partition:
    """Divide a joint graph in three.

    Args:
        joint: a separated joint graph; left as it is.
        remat: what may be computed again: "none" (views only), "min_cut" (what is cheap), "full"
            (everything, from the stage's inputs; W still gets matrix products from I), a policy that
            tells of a node whether its value is to be saved, or a budget: the share of the bytes between
            what "full" and "none" hold after F. Random operations never run twice.
        sites: whether W must sum all gradients itself, which I may do for it otherwise.

    Returns:
        The partition. Under "none" and "min_cut" no matrix product, attention, convolution or reduction
        is in two programs.
    """
    division = Division.of(joint, sites)
    budget = None
    if isinstance(remat, float):
        budget, remat = within(division, remat)
    after_forward, from_input, for_weight = crossing(division, remat)
    outputs, new_buffers, input_grads, param_grads = joint.results
    placeholders = joint.placeholders
    state, late, deferred = division.state, division.late, division.deferred
    constants = [node for node in state if node.op == "get_attr"]
    given = placeholders[: joint.n_state]
    end = joint.n_state + joint.n_args
    args, cotangents = placeholders[joint.n_state : end], placeholders[end:]
    anywhere = {*joint.module.graph.nodes}
    draws = [node for node in joint.module.graph.nodes if is_random(node) and node not in late]
    forward = extract(
        joint, constants, [*given, *args], anywhere, [*outputs, *new_buffers, *after_forward], draws
    )
    input_grad = extract(
        joint, constants, [*given, *after_forward, *cotangents], late, [*input_grads, *from_input]
    )
    weight_grad = extract(joint, constants, [*given, *for_weight], deferred, param_grads, own=True)
    return Partition(
        forward,
        input_grad,
        weight_grad,
        tuple(node.name for node in after_forward),
        tuple(node.name for node in from_input),
        tuple(node.name for node in for_weight),
        {node.name: nbytes(node) for node in (*after_forward, *from_input)},
        frozenset(node.name for node in (*cotangents, *from_input) if node in late),
        frozenset(node.name for node in from_input if node in deferred),
        budget,
    )
