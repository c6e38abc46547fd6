"""Lowering with TorchInductor, called directly: no Dynamo, so no guards on the call path.

All of torch's private Inductor API is imported here. Tried with torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from funcstage.graph.programs import Runner

_OPTIONS = {"fallback_random": True}
"""Random numbers as eager draws them, for the same seed."""


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that Inductor expects to have been made before it."""
    with config.patch(_OPTIONS):
        return select_decomp_table()


def lower(module: GraphModule) -> Runner:
    """Compile a program; the results keep the strides that the trace gave them.

    Args:
        module: a boxed program; left as it is.

    Returns:
        The compiled program, boxed as well.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    examples = [node.meta["val"] for node in nodes]
    graph = torch.fx.Graph()
    results = graph.graph_copy(module.graph, {})
    graph.output(results)
    graph.set_codegen(CodeGen())
    (output,) = graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    fake_mode = detect_fake_mode(examples)
    if not any(node.op == "call_function" for node in graph.nodes):
        return module.forward
    with config.patch(_OPTIONS), V.set_fake_mode(fake_mode), tracing(TracingContext(fake_mode)):
        compiled = compile_fx_inner(GraphModule(module, graph), examples, cudagraphs=BoxedBool(False))
    return compiled
