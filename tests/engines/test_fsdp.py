"""Modules that FSDP2 shards, on both engines, against FSDP's own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from both_ways import ENGINES, stage_of
from fsdp_modules import KINDS, WIDTH, force_sums, full, model, nested
from pipeline_ranks import run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate

import funcstage as fs
from funcstage._torch import fsdp

pytestmark = pytest.mark.timeout(600)


def batch(rank: int) -> Tensor:
    torch.manual_seed(10 + rank)
    return torch.randn(5, WIDTH)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_whole_parameters_are_held_or_gathered_again_as_fsdp_was_told() -> None:
    (of_f, of_i, of_w), held = run(2, collectives_of, False)[0]
    assert (len(of_f), of_i, of_w) == (3, [], ["reduce_scatter_tensor"] * 3)
    (of_f, of_i, of_w), again = run(2, collectives_of, True)[0]
    gathers, sums = ["all_gather_into_tensor_coalesced"] * 2, ["reduce_scatter_tensor"] * 3
    assert (len(of_f), of_i, of_w) == (3, gathers, sums)
    assert again < held


def hidden(rank: int, group: Any) -> list[list[bool]]:
    """Of each message of F, I and W, in the order in which they are sent: are products computed meanwhile?"""
    apply, params, buffers = fs.functionalize(force_sums(nested()()))
    compiled = fs.compile(apply, backend="aten")
    fs.stage_vjp(compiled, params, buffers, batch(rank))
    found = []
    for program in compiled.programs(params, buffers, batch(rank)):
        nodes = [*program.graph.nodes]
        names = [node.name for node in nodes]
        messages = [node for node in nodes if node.name.startswith(("all_gather", "reduce_"))]
        waits = [node for node in nodes if node.name.startswith("wait")]
        spans = [
            names[nodes.index(m) : min(nodes.index(w) for w in waits if {w, *w.all_input_nodes} & {*m.users})]
            for m in messages
        ]
        found.append([any("mm" in name for name in span) for span in spans])
    return found


@pytest.mark.slow
def test_all_messages_but_the_first_gather_and_the_last_sum_travel_behind_products() -> None:
    of_f, of_i, of_w = run(2, hidden)[0]
    assert of_f == [False, True, True]
    assert of_i == [True, True]
    assert of_w == [True, True, False]


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_no_shard_is_refused() -> None:
    for messages in run(2, plain_parameters):
        assert all("FSDP shards" in message for message in messages)
