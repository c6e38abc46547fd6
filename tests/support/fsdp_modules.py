"""Modules that FSDP2 shards in all of its ways, with the number of ranks that each is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

WIDTH = 4


class Block(nn.Module):
    """A perceptron on a residual branch, of sizes that the ranks do not divide."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks, and a head."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(hidden: int = 7) -> Model:
    torch.manual_seed(0)
    return Model(hidden)


def force_sums(module: nn.Module) -> nn.Module:
    """Gloo has no means."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
    return module


def nested(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        whole = model()
        mesh = init_device_mesh("cpu", (2,))
        for block in whole.blocks:
            fully_shard(block, mesh=mesh, **options)
        return fully_shard(whole, mesh=mesh, **options)

    return make


def nested_in_smaller_groups() -> nn.Module:
    """Resharded to pairs of the four ranks after the forward."""
    whole = model()
    mesh = init_device_mesh("cpu", (4,))
    for block in whole.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=2)
    return fully_shard(whole, mesh=mesh)


def in_other_dtype() -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    return fully_shard(model(), mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)


def root_alone() -> nn.Module:
    return fully_shard(model(), mesh=init_device_mesh("cpu", (2,)))


def one_unit() -> nn.Module:
    """A module that is sharded in part: the rest is whole on every rank."""
    whole = model()
    fully_shard(whole.blocks[0], mesh=init_device_mesh("cpu", (2,)))
    return whole


def grouped() -> nn.Module:
    whole = model()
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard([whole.blocks[0], whole.blocks[1]], mesh=mesh, mp_policy=policy)
    return fully_shard(whole, mesh=mesh)


def replicas_of_shards() -> nn.Module:
    whole = model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in whole.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def replicated() -> nn.Module:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model(), mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",)))


def by_columns() -> nn.Module:
    """Sharded along another dimension than the first."""
    return fully_shard(
        nn.Sequential(nn.Linear(WIDTH, 7, bias=False), nn.Tanh(), nn.Linear(7, 4, bias=False)),
        mesh=init_device_mesh("cpu", (2,)),
        shard_placement_fn=lambda p: Shard(1) if p.shape[1] % 2 == 0 else Shard(0),
    )


def frozen() -> nn.Module:
    whole = model()
    whole.blocks[0].up.weight.requires_grad_(False)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(whole.blocks[0], mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def tied() -> nn.Module:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    whole[2].weight = whole[0].weight
    return fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))


def divided() -> nn.Module:
    """The gradients are divided by another number than that of the ranks."""
    whole = fully_shard(model(), mesh=init_device_mesh("cpu", (2,)))
    whole.set_gradient_divide_factor(3.0)
    return whole


def with_tensor_parallel() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole = model(hidden=8)
    for block in whole.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(whole, mesh=mesh["data"])


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
KINDS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "nested": (2, nested()),
    "in smaller groups": (4, nested_in_smaller_groups),
    "held after the forward": (2, nested(reshard_after_forward=False)),
    "root alone": (2, root_alone),
    "one unit": (2, one_unit),
    "mixed precision": (2, nested(mp_policy=HALF)),
    "low precision alone": (2, nested(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))),
    "output dtype": (2, in_other_dtype),
    "grouped": (2, grouped),
    "replicate": (2, replicated),
    "by columns": (2, by_columns),
    "frozen": (2, frozen),
    "tied": (2, tied),
    "divided": (2, divided),
    "replicas of shards": (4, replicas_of_shards),
    "tensor parallel": (4, with_tensor_parallel),
}


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
