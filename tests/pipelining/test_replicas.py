"""Data parallelism beside the pipeline, in four processes with gloo, against DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from pipeline_cases import Case, blocks, grads_of, make_schedule
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.pipelining import replicas as replicas_module

pytestmark = pytest.mark.timeout(600)

WIDTHS = (4, 7, 5, 6, 3)
MICROBATCHES = 4


def both_ways(rank: int, group: dist.ProcessGroup, case: Case, as_mesh: bool) -> dict[str, Any]:
    """Two steps without zeroing in between, by a pipeline of two ranks and by a whole model on every rank."""
    pipes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    replica, place = divmod(rank, 2)
    data: Any = columns[place]
    if as_mesh:
        data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))["data"]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(10 * step + replica)
        size = 2 * MICROBATCHES
        return torch.randn(size, WIDTHS[0]).double(), torch.randn(size, WIDTHS[-1]).double()

    whole = blocks(WIDTHS, 2).modules
    reference = DistributedDataParallel(nn.Sequential(*whole), process_group=columns[place])
    for step in range(2):
        x, y = batch(step)
        parts = list(zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True))
        for i, (part, target) in enumerate(parts):
            with reference.no_sync() if i + 1 < len(parts) else torch.enable_grad():
                functional.mse_loss(reference(part), target).backward()
        for parameter in reference.parameters():
            parameter.grad /= MICROBATCHES

    model = blocks(WIDTHS, 2)
    mine = case.stages_of(place, 2)
    if replica:  # starts from the values of the first
        with torch.no_grad():
            for module in model.modules:
                for parameter in module.parameters():
                    parameter.add_(1)
    stages = [
        FunctionalPipelineStage(
            model.modules[i], i, 4, "cpu", group=pipes[replica], compile=case.compile, data_parallel=data
        )
        for i in mine
    ]
    others_at_work: list[int] = []
    plain = dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):  # torch asks the ranks of a pipeline something in this way too
            others_at_work.append(len(stages[0]._replicas._running) - 1)
        return plain(*args, **kwargs)

    replicas_module.dist.all_reduce = all_reduce
    try:
        schedule = make_schedule(case, stages, functional.mse_loss)
        for step in range(2):
            x, y = batch(step)
            schedule.step(*([x] if 0 in mine else []), target=y if 3 in mine else None)
    finally:
        replicas_module.dist.all_reduce = plain
    wanted = {f"{i}.{name}": p.grad.clone() for i in mine for name, p in whole[i].named_parameters()}
    return {"found": grads_of(model, mine), "wanted": wanted, "others": others_at_work}


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_gradients_are_those_of_distributed_data_parallel(schedule: str, compile: Any) -> None:
    case = Case(schedule, 4, MICROBATCHES, compile=compile)
    for answer in run(4, both_ways, case, schedule == "Interleaved1F1B"):
        assert answer["found"].keys() == answer["wanted"].keys()
        torch.testing.assert_close(answer["found"], answer["wanted"], rtol=1e-10, atol=1e-12)
        assert len(answer["others"]) == 2 * len(answer["found"]), "each gradient goes round once a step"
        assert max(answer["others"]) == 1, "a stage's gradients go round while the other one computes"


def test_what_is_no_group_of_replicas_is_refused() -> None:
    with pytest.raises(fs.StageError, match="must be a process group or a device mesh, got int"):
        replicas_module.replicas_of(2)  # type: ignore[arg-type]
    with one_process(), pytest.raises(fs.StructureError, match="mesh of one dimension, got one of 2"):
        replicas_module.replicas_of(init_device_mesh("cpu", (1, 1)))


def test_values_are_handed_out_without_history(recwarn: pytest.WarningsRecorder) -> None:
    parameter = nn.Parameter(torch.ones(3))
    with one_process() as group:
        replicas_module.replicas_of(group).replicate([parameter])
    (parameter * 2).sum().backward()  # where torch would warn of messages between
    assert not recwarn.list
