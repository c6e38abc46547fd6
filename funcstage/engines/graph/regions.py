"""Checkpointed regions and gathered parameters, noted on what a trace records of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import Function
from torch.fx import Graph, Node

from funcstage._torch import tracing as tt
from funcstage._torch.recorded import recorded_since
from funcstage.engines.graph.joint import CHECKPOINTED, results_of
from funcstage.engines.levels.checkpoint import Call
from funcstage.engines.tape.reentrant import Leftovers
from funcstage.errors import TraceError


class Regions:
    """Notes the checkpointed regions of a stage while it is traced.

    They are recorded once, as everything else is; that they are to be computed again is for the partition.

    Attributes:
        is_open: whether one runs now.
        is_reentrant: whether that is a reentrant one.
        leftovers: what reentrant ones have left.
    """

    def __init__(self) -> None:
        self._policies: list[tt.Policy | None] = []
        self.is_open = self.is_reentrant = False
        self.leftovers = Leftovers()

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._policies)

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        asked = Call.of(call)
        if asked.constant or self.is_open or not torch.is_grad_enabled():
            return asked.run()
        context = asked.context_fn()[0]
        policy = tt.policy_of(context)
        before = tt.last_recorded()
        self.is_open, self.is_reentrant = True, asked.reentrant
        try:
            with nullcontext() if policy else context:
                result = self.leftovers.run(asked.run) if asked.reentrant else asked.run()
        finally:
            self.is_open = self.is_reentrant = False
        for node in recorded_since(before):
            node.meta[REGION] = len(self._policies)
        self._policies.append(policy)
        return result

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        return apply(*args)

    def thread(self) -> None:
        """Another thread cannot compute with tensors of the trace, and what else it does it would do once."""
        raise TraceError(
            "The stage starts a thread or gives one something to do, or waits for one, which a compiled "
            "stage cannot repeat in each call. Do it outside."
        )

    waits = thread

    @contextmanager
    def gathers(self, again: bool) -> Iterator[None]:
        """Parameters are gathered, which are not to be held."""
        before = tt.last_recorded()
        yield
        for node in recorded_since(before) if again else ():
            node.meta[GATHERED] = True

    def mark(self, graph: Graph, forward: set[Node]) -> None:
        """Mark all nodes of regions, apart those that the forward reads from outside or policies save."""
        results = {node for part in results_of(graph)[:2] for node in part}
        for node in graph.nodes:
            if node.meta.get(GATHERED) and node.op == "call_function":
                node.meta[CHECKPOINTED] = True  # whole parameters are not held
            region = node.meta.get(REGION)
            if region is not None and node.op == "call_function":
                policy = self._policies[region]
                saved = policy is not None and policy(node)
                leaves = any(user in forward and user.meta.get(REGION) != region for user in node.users)
                node.meta[CHECKPOINTED] = not (saved or leaves or node in results)


REGION = "region"
GATHERED = "gathered"
