"""Stages of ours under FSDP beside torch's own stage: gradients, dtypes, messages, memory, hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_modules import KINDS, WIDTH, force_sums, full
from one_process import one_process
from pipeline_ranks import run
from sharded_pipelines import Pipeline
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from funcstage.errors import StructureError
from funcstage.pipelining import FunctionalPipelineStage

pytestmark = pytest.mark.timeout(600)

ATEN = {"backend": "aten"}
COMPILE = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
MICROBATCHES = 3
IN_BFLOAT16 = ("mixed precision", "low precision alone", "output dtype", "grouped")


def alone() -> Any:
    """A group of this rank alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def squares(output: Tensor, target: Tensor) -> Tensor:
    """The loss; torch 2.11 has no gradient of one of two dtypes."""
    return F.mse_loss(output.float(), target)


def runner_of(stage: Any, schedule: str) -> Any:
    kind: Any = get_schedule_class(schedule)
    return kind(stage if schedule in ("GPipe", "1F1B") else [stage], MICROBATCHES, loss_fn=squares)


def one_stage(module: nn.Module, schedule: str, compile: Any = False, **options: Any) -> Any:
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=alone(), compile=compile, **options)
    return runner_of(stage, schedule)


def beside_torchs(rank: int, group: Any, kind: str, schedule: str, compile: Any) -> int:
    """Two steps of both, with updates in between; torch's stage does not split its backward."""
    make = KINDS[kind][1]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(force_sums(make()))
    module, twin = made
    ours = one_stage(module, schedule, compile)
    theirs = runner_of(PipelineStage(twin, 0, 1, torch.device("cpu"), group=alone()), "1F1B")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in made]
    for step in range(2):
        torch.manual_seed(10 + step + (rank // 2 if kind == "tensor parallel" else rank))
        x = torch.randn(2 * MICROBATCHES, WIDTH)
        target = torch.randn(2 * MICROBATCHES, 4 if kind in ("by columns", "tied") else 3)
        for runner in (ours, theirs):
            runner.step(x, target=target)
        expected = dict(twin.named_parameters())
        for name, parameter in module.named_parameters():
            wanted: Any = expected[name].grad
            grad: Any = parameter.grad
            assert type(parameter) is type(expected[name])
            assert type(grad) is type(wanted), name
            if wanted is None:
                continue
            assert grad.dtype is wanted.dtype
            rough = {"rtol": 2e-2, "atol": 1e-3} if compile and kind in IN_BFLOAT16 else {}
            text = f"{name} of {kind}, step {step}"
            torch.testing.assert_close(full(grad), full(wanted), msg=lambda m, t=text: f"{t}: {m}", **rough)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "compile"),
    [
        pytest.param("1F1B", False, id="1F1B-eager"),
        pytest.param("InterleavedZeroBubble", ATEN, id="zero bubble-aten"),
        pytest.param("1F1B", ATEN, id="1F1B-aten"),
        pytest.param("InterleavedZeroBubble", False, id="zero bubble-eager"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torchs_stage(kind: str, compile: Any, schedule: str) -> None:
    size = KINDS[kind][0]
    assert run(size, beside_torchs, kind, schedule, compile) == [1] * size


# Messages and memory.


def counted(rank: int, group: Any, how: str, schedule: str, policy: Any) -> tuple[int, int]:
    """How often FSDP gathers and reduces in a step, the second one."""
    pipeline = Pipeline(how, schedule, options={"reshard_after_forward": policy})
    pipeline.run(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        pipeline.run(1)
    counts = {event.key: event.count for event in profiled.key_averages()}
    return counts.get("c10d::_allgather_base_", 0), counts.get("c10d::_reduce_scatter_base_", 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "units"])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_a_step_gathers_and_reduces_each_unit_once(how: str, schedule: str) -> None:
    units = 2 * (1 if schedule == "1F1B" else 2)
    assert run(4, counted, how, schedule, False) == [(units, units)] * 4


@pytest.mark.slow
def test_what_is_to_be_let_go_of_after_each_forward_is_gathered_again() -> None:
    # Two blocks are, in each of four Fs and in the first I.
    assert run(4, counted, "fsdp", "GPipe", True) == [(2 * (4 + 1), 2)] * 4


def held_after(rank: int, group: Any, policy: Any, compile: Any) -> list[int]:
    """The bytes of whole parameters that a block has when the loss is computed, and after the step."""
    pipeline = Pipeline("fsdp", "GPipe", options={"reshard_after_forward": policy}, compile=compile)
    part = next(iter(pipeline.parts.values()))
    whole: list[Tensor] = []
    found: list[int] = []
    forward = pipeline.stages[0].forward_one_chunk

    def watched(*args: Any, **kwargs: Any) -> Any:
        if whole:
            found.append(sum(t.untyped_storage().nbytes() for t in whole))
        result = forward(*args, **kwargs)
        if not whole:
            part[0].unshard()
            whole.extend(p.data for p in part[0].parameters())
            pipeline.stages[0]._whole.let_go()
        return result

    pipeline.stages[0].forward_one_chunk = watched
    pipeline.run(0)
    found.append(sum(t.untyped_storage().nbytes() for t in whole))
    return found


@pytest.mark.slow
@COMPILE
def test_whole_parameters_are_held_as_the_policy_says(compile: Any) -> None:
    for found in run(4, held_after, False, compile):
        assert all(found[:-1])
        assert found[-1] == 0
    for found in run(4, held_after, True, compile):
        assert found == [0] * 4


# Hooks, and parameters that are not FSDP's.


class Scaled(nn.Module):
    """A layer, and a parameter that FSDP is to ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def hooked(rank: int, group: Any, kind: str, schedule: str) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    module = Scaled()
    fully_shard(module, mesh=mesh_of_all(), ignored_params={module.scale})
    force_sums(module)
    seen: dict[str, list[Tensor]] = {"layer": [], "scale": [], "after": []}
    parameter: Any = module.layer.weight
    parameter.register_post_accumulate_grad_hook(lambda p: seen["layer"].append(full(p.grad).clone()))
    module.scale.register_hook(lambda grad: seen["scale"].append(grad.clone()))
    module.scale.register_post_accumulate_grad_hook(lambda p: seen["after"].append(p.grad.clone()))
    if kind == "torch's":
        stage: Any = PipelineStage(module, 0, 1, torch.device("cpu"), group=alone())
        runner = runner_of(stage, schedule)
    else:
        runner = one_stage(module, schedule, compile=ATEN if kind == "aten" else False)
    x, target = batch(rank)
    runner.eval(x, target=target)
    for found in seen.values():
        found.clear()  # torch finds its shapes out by a backward
    runner.step(x, target=target)
    seen["grads"] = [full(p.grad) for p in module.parameters()]
    return seen


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(20 + rank)
    x, target = torch.randn(2, 2 * MICROBATCHES, WIDTH)
    return x, target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "aten"])
def test_hooks_run_as_often_as_under_torchs_stage_on_the_same_gradients(kind: str) -> None:
    both = [run(2, hooked, each, "1F1B") for each in ("torch's", kind)]
    for theirs, ours in zip(*both, strict=True):
        assert len(theirs["layer"]) == 1
        assert len(theirs["scale"]) == MICROBATCHES
        torch.testing.assert_close(ours, theirs)


# What happens around and in the midst of a step.


class Counting(nn.Module):
    """A layer whose buffer grows with every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().sum().view(1)])
        return self.layer(x) + self.seen.sum()


def made(kind: type[nn.Module] = Scaled) -> tuple[nn.Module, nn.Module]:
    """A module and its twin."""
    torch.manual_seed(0)
    module = kind()
    twin = kind()
    twin.load_state_dict(module.state_dict())
    return module, twin


def eager(twin: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The gradients of a step by the module that is not sharded."""
    twin.zero_grad()
    for rows, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        (F.mse_loss(twin(rows), wanted) / MICROBATCHES).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def check_step(module: nn.Module, runner: Any, expected: dict[str, Tensor]) -> None:
    runner.step(*[batch(0)[0]], target=batch(0)[1])
    found = {name: full(p.grad) for name, p in module.named_parameters()}
    torch.testing.assert_close(found, expected)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    with one_process():
        yield init_device_mesh("cpu", (1,))


@COMPILE
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_an_evaluation_before_a_step_leaves_it_right(mesh: DeviceMesh, schedule: str, compile: Any) -> None:
    module, twin = made()
    x, target = batch(0)
    expected, output = eager(twin, x, target), twin(x)
    fully_shard(module, mesh=mesh)
    runner = one_stage(module, schedule, compile)
    torch.testing.assert_close(runner.eval(x, target=target), output)
    assert all(isinstance(p, DTensor) for p in module.state_dict().values())
    check_step(module, runner, expected)


@COMPILE
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_a_step_that_failed_leaves_no_gradients_and_the_next_one_is_right(
    mesh: DeviceMesh, schedule: str, compile: Any
) -> None:
    module, twin = made()
    x, target = batch(0)
    expected = eager(twin, x, target)
    fully_shard(module, mesh=mesh)
    runner = one_stage(module, schedule, compile)
    fails = [False, True]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails and fails.pop(0):
            raise ArithmeticError("too large")
        return F.mse_loss(output, target)

    runner._loss_fn = loss
    with pytest.raises(ArithmeticError):
        runner.step(x, target=target)
    assert all(p.grad is None for p in module.parameters())
    fails.clear()
    check_step(module, runner, expected)


@pytest.mark.parametrize("scaled", [True, False])
def test_what_the_input_came_from_has_its_gradient_whether_or_not_it_is_scaled(
    mesh: DeviceMesh, scaled: bool
) -> None:
    module, twin = made()
    x, target = batch(0)
    leaf = x.clone().requires_grad_()
    parts = zip(leaf.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True)
    losses = [F.mse_loss(twin(part), wanted) for part, wanted in parts]
    torch.stack(losses).sum().div(MICROBATCHES if scaled else 1).backward()
    fully_shard(module, mesh=mesh)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=alone())
    source = x.clone().requires_grad_()
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=F.mse_loss, scale_grads=scaled)
    schedule.step(source * 1, target=target)
    torch.testing.assert_close(source.grad, leaf.grad)
    grads = {name: full(p.grad) for name, p in module.named_parameters()}
    torch.testing.assert_close(grads, {name: p.grad for name, p in twin.named_parameters()})


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
@pytest.mark.parametrize("policy", [True, False])
def test_buffers_may_grow_in_the_midst_of_a_step(mesh: DeviceMesh, schedule: str, policy: bool) -> None:
    module, twin = made(Counting)
    x, target = batch(0)
    expected = eager(twin, x, target)
    fully_shard(module.layer, mesh=mesh, reshard_after_forward=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=policy)
    runner = one_stage(module, schedule)
    check_step(module, runner, expected)
    torch.testing.assert_close(module.seen, twin.seen)


@COMPILE
@pytest.mark.parametrize("assigned", [False, True], ids=["sharded where it is", "assigned"])
def test_a_stage_takes_up_a_module_that_is_sharded_later(
    mesh: DeviceMesh, compile: Any, assigned: bool
) -> None:
    module, twin = made()
    expected = eager(twin, *batch(0))
    runner = one_stage(made()[0] if assigned else module, "InterleavedZeroBubble", compile)
    fully_shard(module, mesh=mesh)
    runner._stages[0].submod = module
    check_step(module, runner, expected)


def test_parameters_and_gradients_of_the_stage_are_shards_at_any_time(mesh: DeviceMesh) -> None:
    module, _ = made()
    fully_shard(module, mesh=mesh)
    runner = one_stage(module, "1F1B")
    stage = runner._stage
    seen: list[Any] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.extend([*stage.params.values(), *(g for g in stage.grads.values() if g is not None)])
        return F.mse_loss(output, target)

    runner._loss_fn = loss
    x, target = batch(0)
    runner.step(x, target=target)
    assert seen
    seen.extend(stage.grads.values())
    assert {type(value) for value in seen} == {DTensor}


@COMPILE
def test_a_step_reduces_gradients_even_if_fsdp_was_told_to_keep_them_back(
    mesh: DeviceMesh, compile: Any
) -> None:
    module, twin = made()
    expected = eager(twin, *batch(0))
    fully_shard(module, mesh=mesh).set_requires_gradient_sync(False)  # as torch's own stage does
    check_step(module, one_stage(module, "1F1B", compile), expected)


def test_a_parameter_of_two_stages_is_refused_where_fsdp_would_reduce_it_twice(mesh: DeviceMesh) -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    parts = [nn.Sequential(nn.Tanh(), shared), nn.Sequential(shared, nn.Tanh())]
    fully_shard(shared, mesh=mesh)
    group = alone()
    stages = [FunctionalPipelineStage(part, i, 2, "cpu", group=group) for i, part in enumerate(parts)]
    kind: Any = get_schedule_class("Interleaved1F1B")
    x, target = batch(0)
    with pytest.raises(StructureError, match=r"'1.bias' is a parameter of another stage .*ignored_params="):
        kind(stages, MICROBATCHES, loss_fn=F.mse_loss).step(x, target=target)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch 2.15 is the first to keep gradients back")
def test_gradients_that_are_to_be_kept_back_are_refused(mesh: DeviceMesh) -> None:
    module, twin = made()
    x, target = batch(0)
    expected = eager(twin, x, target)
    fully_shard(module, mesh=mesh)
    runner = one_stage(module, "InterleavedZeroBubble")
    with pytest.raises(StructureError, match=r"finalize_gradients=False .* in one"):
        runner.step(x, target=target, finalize_gradients=False)
    check_step(module, runner, expected)


# Checkpoints.


def resumed(rank: int, group: Any, how: str, schedule: str, compile: Any, folder: str) -> None:
    """Train three steps; load what the second left into a new pipeline, and do the third there."""
    first = Pipeline(how, schedule, compile=compile)
    first.train([0, 1])
    first.save(folder)
    wanted = first.train([2])
    second = Pipeline(how, schedule, compile=compile)
    second.load(folder)
    for found, expected in zip(second.train([2]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "schedule", "compile"),
    [("fsdp", "ZBVZeroBubble", ATEN), ("hsdp", "1F1B", False), ("fsdp+tensor", "Interleaved1F1B", ATEN)],
)
def test_training_goes_on_from_a_distributed_checkpoint(
    how: str, schedule: str, compile: Any, tmp_path: Path
) -> None:
    run(4, resumed, how, schedule, compile, str(tmp_path))


def handed_over(rank: int, group: Any, how: str, schedule: str, kinds: tuple[str, str], folder: str) -> None:
    """Train two steps with stages of one kind, and the third with those of the other and of the same."""
    first = Pipeline(how, schedule, kinds[0])
    first.train([0, 1])
    first.save(folder)
    wanted = first.train([2])
    second = Pipeline(how, schedule, kinds[1])
    second.load(folder)
    for found, expected in zip(second.train([2]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
# The second leaves one rank to the pipeline, where torch 2.11's stages would send messages to themselves.
@pytest.mark.parametrize(("how", "schedule"), [("fsdp", "Interleaved1F1B"), ("fsdp+tensor", "1F1B")])
@pytest.mark.parametrize(
    "kinds", [("torch's", "ours"), ("ours", "torch's")], ids=["from torch's", "to torch's"]
)
def test_checkpoints_go_from_torchs_stages_to_ours_and_back(
    kinds: tuple[str, str], how: str, schedule: str, tmp_path: Path
) -> None:
    run(4, handed_over, how, schedule, kinds, str(tmp_path))
