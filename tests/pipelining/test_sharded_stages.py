"""Pipelines of stages that are sharded: by tensor parallelism, by FSDP, by both, beside other stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from funcstage.pipelining import FunctionalPipelineStage, pipeline_order

pytestmark = pytest.mark.timeout(600)

WIDTH, HIDDEN, ROWS, MICROBATCHES, STEPS = 4, 8, 2, 4, 3
ATEN = {"backend": "aten"}


class Block(nn.Module):
    """A perceptron on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def blocks(n: int) -> list[nn.Module]:
    """Parts of two blocks each."""
    torch.manual_seed(0)
    return [nn.Sequential(Block(), Block()).double() for _ in range(n)]


def parallelized(part: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in part:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return part


def sharded(part: nn.Module, mesh: DeviceMesh, root: bool = True) -> nn.Module:
    """Each block a unit, and the whole; gloo has no means."""
    for block in part:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    if root:
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    for unit in part.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
    return part


def shard(part: nn.Module, how: str, index: int, mesh: DeviceMesh) -> nn.Module:
    match how:
        case "tensor":
            return parallelized(part, mesh)
        case "fsdp":
            return sharded(part, mesh)
        case "units":
            return sharded(part, mesh, root=False)
        case "some":
            return sharded(part, mesh) if index % 2 else part
    return part


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip(part: nn.Module) -> None:
    """Clip weights of the perceptrons and the rest apart: torch takes no norm of both kinds of tensors."""
    inner = [p for n, p in part.named_parameters() if ".norm." not in n]
    rest = [p for n, p in part.named_parameters() if ".norm." in n]
    for parameters in (inner, rest):
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def batch(step: int, data_rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + step + 100 * data_rank)
    x, target = torch.randn(2, MICROBATCHES * ROWS, WIDTH, dtype=torch.float64)
    return x, target


def trained(
    rank: int, group: Any, how: str, schedule: str, compile: Any, kinds: str = "ours"
) -> list[dict[str, Tensor]]:
    """What each step leaves: gradients, their norm, and at the end the parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "inner"))
    pipeline, inner = mesh["pipeline"], mesh["inner"]
    single = schedule in ("GPipe", "1F1B")
    n = 2 if single else 4
    data_rank = inner.get_local_rank() if how in ("fsdp", "units") else 0
    mine = pipeline_order(schedule, n, MICROBATCHES, num_ranks=2).stages_of(pipeline.get_local_rank())
    parts = {i: shard(part, how, i, inner) for i, part in enumerate(blocks(n)) if i in mine}
    stages: list[Any] = []
    for i, part in parts.items():
        if kinds == "torch's" or (kinds == "mixed" and i % 2):
            stages.append(PipelineStage(part, i, n, torch.device("cpu"), group=pipeline.get_group()))
        else:
            stages.append(
                FunctionalPipelineStage(part, i, n, "cpu", group=pipeline.get_group(), compile=compile)
            )
    make: Any = get_schedule_class(schedule)
    runner = make(stages[0] if single else stages, MICROBATCHES, loss_fn=F.mse_loss)
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts.values()]
    steps = []
    for step in range(STEPS):
        x, target = batch(step, data_rank)
        runner.step(*([x] if 0 in mine else []), target=target if n - 1 in mine else None)
        found = {f"{i}.{n}": full(p.grad).clone() for i, m in parts.items() for n, p in m.named_parameters()}
        assert all(type(p.grad) is type(p.data) for p in parameters)
        for part in parts.values():
            clip(part)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps.append(found)
    last = {f"{i}.{n}": full(p.data).clone() for i, m in parts.items() for n, p in m.named_parameters()}
    return [*steps, last]


def trained_whole(n: int, data_ranks: int) -> list[dict[str, Tensor]]:
    """The same by the unsharded model in one process."""
    parts = blocks(n)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts]
    steps = []
    for step in range(STEPS):
        for data_rank in range(data_ranks):
            x, target = batch(step, data_rank)
            for y, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
                for part in parts:
                    y = part(y)
                (F.mse_loss(y, wanted) / MICROBATCHES / data_ranks).backward()
        steps.append(named(parts, "grad"))
        for part in parts:
            clip(part)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [*steps, named(parts, "data")]


def named(parts: list[nn.Module], what: str) -> dict[str, Tensor]:
    return {
        f"{i}.{n}": getattr(p, what).clone()
        for i, part in enumerate(parts)
        for n, p in part.named_parameters()
    }


@pytest.mark.parametrize(
    ("how", "schedule", "compile", "kinds"),
    [
        ("tensor", "Interleaved1F1B", ATEN, "ours"),
        ("tensor", "ZBVZeroBubble", False, "ours"),
        ("fsdp", "Interleaved1F1B", False, "ours"),
        ("fsdp", "Interleaved1F1B", ATEN, "ours"),
        ("fsdp", "ZBVZeroBubble", False, "ours"),
        ("fsdp", "ZBVZeroBubble", ATEN, "ours"),
        ("fsdp", "1F1B", False, "ours"),
        ("fsdp", "GPipe", ATEN, "ours"),
        ("fsdp", "Interleaved1F1B", False, "mixed"),
        ("units", "ZBVZeroBubble", ATEN, "ours"),
        ("some", "Interleaved1F1B", ATEN, "ours"),
    ],
)
def test_sharded_stages_train_as_the_whole_model(how: str, schedule: str, compile: Any, kinds: str) -> None:
    answers = run(4, trained, how, schedule, compile, kinds)
    expected = trained_whole(2 if schedule in ("GPipe", "1F1B") else 4, 2 if how in ("fsdp", "units") else 1)
    for steps in answers:
        for found, wanted in zip(steps, expected, strict=True):
            assert found
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
