"""Programs of functions of tensors, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from funcstage.engines.graph.extract import Program, boxed


def program_of(function: Callable[..., Sequence[Tensor | None]], *args: Tensor) -> Program:
    """A program as W is one, which empties the list of its inputs."""
    module = make_fx(lambda *given: [*function(*given)], tracing_mode="fake")(*args)
    names = tuple(node.name for node in module.graph.find_nodes(op="placeholder"))
    (output,) = module.graph.find_nodes(op="output")
    results = tuple(None if node is None else node.name for node in output.args[0])
    graph = Graph()
    graph.output(tuple(graph.graph_copy(module.graph, {}) or ()))
    return Program(boxed(module, graph), names, results)


def ran(program: Program, given: dict[str, Tensor]) -> list[Tensor | None]:
    return list(program.module([given[name] for name in program.inputs]))
