"""The joint graph of a stage and its backward, which the passes hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from funcstage._torch import tracing as tt
from funcstage._torch.operators import OpOverload, arguments_of
from funcstage.dtensors import Specs
from funcstage.engines.graph.asserted import Asserted
from funcstage.engines.graph.sizes import Sizes
from funcstage.state.kept import Changes


@dataclass(frozen=True, slots=True, eq=False)
class Sharding:
    """How those of a stage's results are sharded that are DTensors, of which the graph has this rank's part.

    Attributes:
        results: leaves of output and new buffers.
        cotangents: what I expects, by output leaf.
        input_grads: leaves of the input gradients.
        param_grads: leaves of the parameter gradients.
    """

    results: Specs
    cotangents: Specs
    input_grads: Specs
    param_grads: Specs


A_SIZE = "a size"
"""What placeholders of open sizes are called."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """The joint graph of a stage and its backward, with what its inputs and outputs are.

    The graph's placeholders are the tensor leaves of (params, buffers), of (args, kwargs) and the
    cotangents, in this order. Its output is a tuple of four tuples: output leaves, leaves of the new
    buffers, input gradients and parameter gradients, each a node or `None`.

    Attributes:
        module: the graph; every tensor node carries its fake value in `meta["val"]`.
        n_state: how many placeholders are parameters, buffers and open sizes, in this order.
        n_args: how many are arguments.
        cotangents: for each cotangent placeholder, the index of its output leaf.
        output_spec: the structure of the output.
        buffers_spec: the structure of the new buffers.
        constants: leaves of output and new buffers that are no tensors, by position among both.
        changes: what F asserts, and does to the module, if anything; the new buffers are then a pair, of
            which the second part is the tensors to look at, and those that stay on the module.
        given: what the placeholders of state and arguments are called by those who gave them.
        captured: tensors that the graph reads and are no placeholders, with their names.
        sharding: of DTensors; None where there are none.
        sizes: those that are left open, if any.
        written: which tensors among the leaves F has written into in place, with those which it saw as the
            same; in truth it has written into copies.
    """

    module: GraphModule
    n_state: int
    n_args: int
    cotangents: tuple[int, ...]
    output_spec: optree.PyTreeSpec
    buffers_spec: optree.PyTreeSpec
    constants: dict[int, Any]
    given: tuple[str, ...]
    changes: Changes | Asserted | None = None
    captured: dict[Tensor, str] = field(default_factory=dict)
    sharding: Sharding | None = None
    sizes: Sizes | None = None
    written: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """What those who gave them call the leaves that are tensors."""
        return [name for name in self.given if name != A_SIZE]

    @property
    def placeholders(self) -> list[Node]:
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def args(self) -> list[Node]:
        """Placeholders of the arguments."""
        return self.placeholders[self.n_state : self.n_state + self.n_args]

    @property
    def results(self) -> tuple[Sequence[Node | None], ...]:
        """Output leaves, new buffers, input gradients, parameter gradients."""
        return results_of(self.module.graph)


def results_of(graph: Graph) -> Any:
    """What a graph returns: nodes, and `None` in the place of what there is none for."""
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers; attention is one that may and does not, without dropout."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return target is tt.draw_and_save
    names = [argument.name for argument in arguments_of(target)]
    if "dropout_p" not in names:
        return True
    i = names.index("dropout_p")
    return bool(node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", 0))


CHECKPOINTED = "checkpointed"
"""Tells, in a node's `meta`, whether the stage wants it to be computed again for the backward, or held."""
