"""Pass 2b, replay: random numbers of checkpointed regions are drawn again, rather than held.

A draw becomes two nodes: one that draws and returns the generator's state before it, and one that draws the
same again from that state, which is what everybody reads. The second may be computed again as anything else
in its region; where F has both, `drawn_once` leaves the first.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph

from funcstage._torch import tracing as tt
from funcstage._torch.pytree import tree_leaves
from funcstage.engines.graph.joint import CHECKPOINTED, Joint, is_random

_STATE_BYTES = {"cpu": 5056, "cuda": 16}
"""Of generators' states, which lie on the CPU."""


def replay(joint: Joint) -> Joint:
    """Let draws in checkpointed regions be repeated.

    Args:
        joint: a joint graph; rewritten in place.

    Returns:
        The same joint graph.
    """
    graph = joint.module.graph
    for node in list(graph.nodes):
        if not node.meta.get(CHECKPOINTED) or not is_random(node):
            continue
        value = node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        if first.device.type not in _STATE_BYTES:
            continue
        with graph.inserting_before(node):
            drawn = graph.call_function(tt.draw_and_save, (node.target, *node.args), node.kwargs)
            state = graph.call_function(operator.getitem, (drawn, 0))
            again = graph.call_function(tt.draw_again, (state, node.target, *node.args), node.kwargs)
        with first.fake_mode:
            state.meta["val"] = torch.empty(_STATE_BYTES[first.device.type], dtype=torch.uint8)
        drawn.meta["val"] = (state.meta["val"], value)
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
        graph.erase_node(node)
    joint.module.recompile()
    return joint


def drawn_once(graph: Graph) -> None:
    """Where a draw is made and repeated in one program, read what was drawn first."""
    for again in graph.find_nodes(op="call_function", target=tt.draw_again):
        state = again.args[0]
        if state.target is operator.getitem:
            with graph.inserting_before(again):
                first = graph.call_function(operator.getitem, (state.args[0], 1))
            first.meta = dict(again.meta)
            again.replace_all_uses_with(first)
            graph.erase_node(again)


def draws_in_graphs(joint: Joint) -> bool:
    """Tell whether CUDA graphs draw as the stage does: on the device, from its default generator."""
    return not any(
        is_random(node)
        and (
            node.kwargs.get("generator") is not None
            or any(isinstance(value, Tensor) and value.is_cpu for value in tree_leaves(node.meta.get("val")))
        )
        for node in joint.module.graph.nodes
    )
