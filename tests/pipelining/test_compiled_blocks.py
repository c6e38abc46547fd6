"""Blocks that a trainer has given to torch.compile, in pipeline stages: the stage's engine takes over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleGPipe
from torch.nn import functional

from funcstage.pipelining import FunctionalPipelineStage


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(functional.gelu(self.inner(x)))


@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_blocks_under_torch_compile_train_as_without(compile: Any, sharded: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block()).double()
    plain = copy.deepcopy(module)
    x, target = torch.randn(2, 4, 4, dtype=torch.float64)
    for microbatch in zip(x.chunk(2), target.chunk(2), strict=True):
        functional.mse_loss(plain(microbatch[0]), microbatch[1], reduction="sum").backward()
    with one_process() as group:
        for block in module:
            block.compile(backend="eager", fullgraph=True)
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            for part in (*module, module):
                fully_shard(part, mesh=mesh, reshard_after_forward=False)
        stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=group, compile=compile)
        schedule = ScheduleGPipe(
            stage, 2, loss_fn=lambda y, t: functional.mse_loss(y, t, reduction="sum"), scale_grads=False
        )
        for _ in range(2):
            module.zero_grad()
            schedule.step(x, target=target)
            for found, expected in zip(module.parameters(), plain.parameters(), strict=True):
                grad = found.grad.full_tensor() if sharded else found.grad
                torch.testing.assert_close(grad, expected.grad)
