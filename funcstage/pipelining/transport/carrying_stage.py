"""A stage whose messages may be written straight into the memory of its peers.

A schedule asks its stages for the operations that send and receive. Where there is a route there are none:
what is to be sent is on its way when the schedule asks, and what is received is waited for where it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from funcstage._torch.pipelining import ExchangingStage, arriving, put_there, receive_there
from funcstage.pipelining.transport.choice import Transport
from funcstage.pipelining.transport.layout import Edge
from funcstage.pipelining.transport.route import Route, open_route


class CarryingStage(ExchangingStage):
    """What a stage does with its messages."""

    transport: Transport = "auto"
    route: Route | None = None
    """Where messages go; without one they go through the process group."""
    rehearses: bool = False
    """Whether the operations are given to whoever asks, who does not carry them out."""

    @property
    def _way(self) -> Route | None:
        return None if self.rehearses else self.route

    def _sent(self, to: int, chunk: int, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        if self._way is None:
            return ops
        self._way.send(Edge(self.stage_index, to), chunk, [operation.tensor for operation in ops])
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the operations that send the output."""
        return self._sent(self.stage_index + 1, fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the operations that send the gradients of the inputs."""
        return self._sent(self.stage_index - 1, bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the operations that receive the inputs."""
        self.raise_failure()
        return super().get_fwd_recv_ops(fwd_chunk_id) if self._way is None else []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the operations that receive the gradients of the outputs."""
        return super().get_bwd_recv_ops(bwd_chunk_id) if self._way is None else []

    def received(self, chunk: int) -> tuple[Tensor, ...]:
        """What the previous stage has sent of a microbatch; to be asked for once."""
        self._await(self.stage_index - 1, chunk, self.args_recv_info)
        return super().received(chunk)

    def received_grads(self, chunk: int) -> tuple[Tensor, ...]:
        """What the next stage has sent of a microbatch; to be asked for once."""
        self._await(self.stage_index + 1, chunk, self.grad_recv_info)
        return super().received_grads(chunk)

    def _await(self, source: int, chunk: int, infos: Mapping[int, Any]) -> None:
        if self._way is not None and not self._shares_rank_with(source):
            put_there(infos[chunk], self._way.receive(Edge(source, self.stage_index), chunk))

    def messages(self, microbatches: int, trains: bool) -> dict[Edge, list[list[Tensor]]]:
        """What other ranks send to this stage, on each edge for each microbatch, as examples."""
        places = {self.stage_index - 1: self.args_recv_info}
        if trains:
            places[self.stage_index + 1] = self.grad_recv_info
        return {
            Edge(source, self.stage_index): [arriving(infos[chunk]) for chunk in range(microbatches)]
            for source, infos in places.items()
            if source in self.stage_index_to_group_rank and not self._shares_rank_with(source)
        }

    def take_route(self, route: Route | None, microbatches: int, trains: bool) -> None:
        """Let messages go on a route, and receive no longer into memory of the stage's own."""
        self.route = route
        if route is None:
            return
        for edge in self.messages(microbatches, trains):
            infos = self.args_recv_info if edge.source < self.stage_index else self.grad_recv_info
            for chunk in range(microbatches):
                receive_there(infos[chunk], route.slots(edge, chunk))


def open_routes(stages: Sequence[Any], microbatches: int, trains: bool) -> None:
    """Let the messages of a rank's stages go on a route; all ranks of a pipeline do so at once."""
    messages = None
    if not any(stage.cannot_run for stage in stages):
        found = [stage.messages(microbatches, trains) for stage in stages]
        messages = {edge: of_chunks for each in found for edge, of_chunks in each.items()}
    route = open_route(stages, microbatches, messages)
    for stage in stages:
        stage.take_route(route, microbatches, trains)


def begin(stages: Sequence[Any]) -> None:
    """Begin a step of a rank's stages."""
    way = getattr(stages[0], "_way", None)
    if way is not None:
        way.begin()


def finish(stages: Sequence[Any]) -> None:
    """End a step of a rank's stages."""
    way = getattr(stages[0], "_way", None)
    if way is not None:
        way.finish()
