"""Modules that FSDP2 shards, on both engines, against FSDP's own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from both_ways import ENGINES, stage_of
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import funcstage as fs
from funcstage._torch import fsdp

pytestmark = pytest.mark.timeout(600)

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


def batch(rank: int) -> Tensor:
    torch.manual_seed(10 + rank)
    return torch.randn(5, WIDTH)


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split(rank: int, group: Any, kind: str, engine: str) -> int:
    """Two microbatches in flight of the functional stage, beside a twin's own forward and backward."""
    make = KINDS[kind][1]
    data_rank = rank // 2 if kind == "tensor parallel" else rank
    torch.manual_seed(0)
    module = force_sums(make())
    torch.manual_seed(0)
    twin = force_sums(make())
    xs = [batch(data_rank), batch(data_rank + 10)]
    apply, params, buffers = fs.functionalize(module)
    assert all(isinstance(p, DTensor) for n, p in params.items()) == (kind != "one unit")
    stage = stage_of(apply, engine)
    forwards = [fs.stage_vjp(stage, params, buffers, x) for x in xs]
    pending = []
    expected = {}
    for x, (output, _, pullback) in zip(xs, forwards, strict=True):
        given = x.clone().requires_grad_()
        wanted = twin(given)
        torch.testing.assert_close(output, wanted.detach())
        wanted.sin().sum().backward()
        (dx,), weight_pullback = pullback(output.cos())
        torch.testing.assert_close(dx, given.grad, rtol=2e-2, atol=1e-3) if "precision" in kind else (
            torch.testing.assert_close(dx, given.grad)
        )
        pending.append(weight_pullback)
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    grads = fs.stage_backward_weight(pending)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        wanted_grad = expected[name]
        assert (grad is None) == (wanted_grad is None), name
        if grad is None:
            continue
        assert type(grad) is type(wanted_grad)
        assert getattr(grad, "placements", None) == getattr(wanted_grad, "placements", None)
        assert grad.dtype == wanted_grad.dtype
        torch.testing.assert_close(
            full(grad), full(wanted_grad), msg=lambda text, name=name: f"{name}: {text}"
        )
    # The module itself goes on as FSDP's.
    given = xs[0].clone().requires_grad_()
    module(given).sin().sum().backward()
    return 1


@pytest.mark.supports(
    "FSDP2 (`fully_shard`, `replicate`): nested, HSDP, with tensor parallelism, mixed precision"
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_that_fsdp_leaves(kind: str, engine: str) -> None:
    size = KINDS[kind][0]
    assert run(size, split, kind, engine) == [1] * size


def collectives_of(rank: int, group: Any, again: bool) -> tuple[list[list[str]], int]:
    """The collectives of F, I and W, and the bytes that F leaves."""
    module = force_sums((nested() if again else nested(reshard_after_forward=False))())
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten")
    _, _, pullback = fs.stage_vjp(compiled, params, buffers, batch(rank))
    programs = compiled.programs(params, buffers, batch(rank))
    names = [
        [
            node.target._opname
            for node in program.graph.nodes
            if getattr(node.target, "namespace", "") == "_c10d_functional" and "wait" not in node.name
        ]
        for program in programs
    ]
    return names, pullback.nbytes


def test_whole_parameters_are_held_or_gathered_again_as_fsdp_was_told() -> None:
    (of_f, of_i, of_w), held = run(2, collectives_of, False)[0]
    assert (len(of_f), of_i, of_w) == (3, [], ["reduce_scatter_tensor"] * 3)
    (of_f, of_i, of_w), again = run(2, collectives_of, True)[0]
    assert (len(of_f), of_i, of_w) == (3, ["all_gather_into_tensor"] * 2, ["reduce_scatter_tensor"] * 3)
    assert again < held


def trained(rank: int, group: Any, engine: str) -> int:
    """Three steps of AdamW with clipping, after an evaluation that left whole parameters, and state dicts."""
    module, twin = (force_sums(nested(reshard_after_forward=False)()) for _ in range(2))
    with torch.no_grad():
        module(batch(rank))
    apply, params, buffers = fs.functionalize(module)
    stage = stage_of(apply, engine)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (module, twin)]
    for step in range(3):
        x = batch(10 * step + rank)
        module.zero_grad()
        twin.zero_grad()
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        for name, grad in pullback(output.cos())[1]().items():
            module.get_parameter(name).grad = grad
        twin(x).sin().sum().backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (module, twin)]
        torch.testing.assert_close(*map(full, norms))
        for optimizer in optimizers:
            optimizer.step()
    for (name, ours), theirs in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        if not name.endswith("calls"):
            torch.testing.assert_close(full(ours), full(theirs))
    return 1


@pytest.mark.parametrize("engine", [*ENGINES, "inductor"])
def test_a_sharded_module_trains_as_by_its_own_backward(engine: str) -> None:
    assert run(2, trained, engine) == [1, 1]


def refusals(rank: int, group: Any) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []

    def refused(attempt: Callable[[], Any]) -> None:
        with pytest.raises(fs.StructureError) as error:
            attempt()
        messages.append(str(error.value))

    refused(
        lambda: fs.functionalize(
            fully_shard(model(), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        )
    )
    hooked = fully_shard(model(), mesh=mesh)
    for of_torch in fsdp._groups(hooked._get_fsdp_state()):  # its setter wants a GPU
        of_torch._all_reduce_hook = lambda grad: None
    refused(lambda: fs.functionalize(hooked))
    unsynced = fully_shard(model(), mesh=mesh)
    apply, params, buffers = fs.functionalize(unsynced)
    unsynced.set_requires_gradient_sync(False)
    for stage in (apply, fs.compile(apply, backend="aten")):
        refused(lambda stage=stage: fs.stage_vjp(stage, params, buffers, batch(rank)))
    unsynced.set_requires_gradient_sync(True)
    fs.stage_vjp(apply, params, buffers, batch(rank))
    return messages


def test_what_a_functional_stage_does_not_do_for_fsdp_is_refused() -> None:
    for messages in run(2, refusals):
        offloaded, hooked, *unsynced = messages
        assert "offload_policy" in offloaded
        assert "all-reduce hook" in hooked
        assert all("set_requires_gradient_sync(False)" in message for message in unsynced)


def plain_parameters(rank: int, group: Any) -> list[str]:
    """A module that FSDP shards after it was made functional, and shards that are none."""
    module = model()
    apply, params, buffers = fs.functionalize(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    sharded = fs.functionalize(module)
    replicas = {n: p.redistribute(placements=[Replicate()]) for n, p in sharded.params.items()}
    messages = []
    for stage, given in ((apply, params), (sharded.apply, params), (sharded.apply, replicas)):
        with pytest.raises(fs.LeafError) as error:
            fs.stage_vjp(stage, given, buffers, batch(rank))
        messages.append(str(error.value))
    return messages


def test_what_is_no_shard_is_refused() -> None:
    for messages in run(2, plain_parameters):
        assert all("FSDP shards" in message for message in messages)
