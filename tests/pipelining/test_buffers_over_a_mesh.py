"""DTensors among the buffers of a pipeline stage, as a decoder's rotary table over a mesh is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional

from funcstage.pipelining import FunctionalPipelineStage


class Decaying(nn.Module):
    """Scales by a table that halves in each call, and counts the calls; the table may be on a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.rand(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.table.mul_(0.5)
        self.calls.add_(1)
        table = self.table.full_tensor() if isinstance(self.table, DTensor) else self.table.clone()
        return self.layer(x) * table


@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=["whole", "sharded"])
def test_a_step_leaves_the_buffers_that_plain_microbatches_leave(compile: Any, placement: Any) -> None:
    torch.manual_seed(0)
    module = Decaying().double()
    plain = copy.deepcopy(module)
    x, target = torch.randn(2, 6, 4, dtype=torch.float64)
    for inputs, wanted in zip(x.chunk(3), target.chunk(3), strict=True):
        functional.mse_loss(plain(inputs), wanted, reduction="sum").backward()
    with one_process() as group:
        mesh = init_device_mesh("cpu", (1,))
        module.table = buffer = distribute_tensor(module.table, mesh, [placement])
        stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=group, compile=compile)
        schedule = ScheduleGPipe(
            stage, 3, loss_fn=lambda y, t: functional.mse_loss(y, t, reduction="sum"), scale_grads=False
        )
        schedule.step(x, target=target)
        assert module.table is buffer
        assert buffer.placements == (placement,)
        torch.testing.assert_close(buffer.full_tensor(), plain.table)
        torch.testing.assert_close(module.calls, plain.calls)
        torch.testing.assert_close(module.layer.weight.grad, plain.layer.weight.grad)
