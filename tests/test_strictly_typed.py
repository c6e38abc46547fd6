"""A user's script, which `mypy --strict` has nothing to complain of (`.ci/run` asks it), and which runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe

import funcstage as fs
from funcstage.pipelining import (
    SCHEDULES,
    Costs,
    FunctionalPipelineStage,
    captured,
    cut,
    pipeline_order,
    pipeline_value_and_grad,
    simulate,
)
from funcstage.testing import check_stage


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


def step(module: nn.Module, x: Tensor, *, compiled: bool) -> dict[str, Tensor]:
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten") if compiled else apply
    output, buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    assert isinstance(dx, Tensor)
    grads = fs.stage_backward_weight([weight_pullback], accumulate=None)
    return {name: p - 0.1 * grads[name] for name, p in params.items()}


def handwritten(params: tuple[Tensor, Tensor], buffers: None, x: Tensor) -> tuple[list[Tensor], None]:
    weight, bias = params
    return [x @ weight, bias * 2], None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_a_module(compiled: bool) -> None:
    params = step(nn.Linear(3, 2), torch.ones(4, 3), compiled=compiled)
    assert {name: tuple(p.shape) for name, p in params.items()} == {"weight": (2, 3), "bias": (2,)}


def test_a_stage_written_by_hand_has_the_types_of_its_own_trees() -> None:
    params = torch.ones(3, 2), torch.ones(2)
    (product, twice), _, pullback = fs.stage_vjp(handwritten, params, None, torch.ones(4, 3))
    _, weight_pullback = fs.stage_backward_input(pullback, [torch.ones(4, 2), torch.ones(2)])
    weight, bias = weight_pullback()
    assert (product.shape, twice.shape) == ((4, weight.shape[1]), bias.shape)


def without_buffers(
    params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    return (x @ params["w"]).sum(), buffers


@pytest.mark.parametrize("compiled", [False, True])
def test_an_empty_dict_of_buffers_is_one_of_the_stages_own(compiled: bool) -> None:
    params, x = {"w": torch.ones(3)}, torch.ones(4, 3)
    stage = fs.compile(without_buffers, backend="aten") if compiled else without_buffers
    loss, buffers, pullback = fs.stage_vjp(stage, params, {}, x, argnums=())
    assert (loss.item(), buffers.get("count")) == (12, None)
    _, grads = fs.stage_backward(pullback, torch.ones_like(loss))
    value, buffers, same = fs.value_and_grad(stage, microbatches=2)(params, {}, x)
    assert (value.item(), len(buffers)) == (6, 0)
    assert grads["w"].sum() == 2 * same["w"].sum() == 12


def test_a_stage_of_torchs_pipelines(tmp_path: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'group'}")
    try:
        stage = FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, torch.device("cpu"), compile=False)
        losses: list[Tensor] = []
        with pytest.warns(UserWarning, match="not as a CUDA graph"):
            step = captured(ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_fn))
        step.step(torch.ones(4, 2), target=torch.zeros(4, 2), losses=losses)
        shapes = {name: tuple(grad.shape) for name, grad in stage.grads.items() if grad is not None}
        assert shapes == {name: tuple(p.shape) for name, p in stage.params.items()}
    finally:
        dist.destroy_process_group()


def test_a_pipeline_and_its_schedule() -> None:
    stages = [fs.functionalize(stage) for stage in cut(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), at=["1"])]
    run = pipeline_value_and_grad(stages, loss_fn, schedule="1F1B", num_microbatches=2)
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    loss, buffers, grads = run(params, buffers, torch.ones(4, 2), torch.zeros(4, 2))
    assert loss.item() > 0
    assert grads[0]["0.weight"].shape == (2, 2)
    for name in SCHEDULES:  # their type is that of the argument
        assert pipeline_order(name, 4, 8).num_stages == 4
    assert simulate(pipeline_order("1F1B", 2, 4), [Costs(1.0, 1.0, 1.0)] * 2).makespan > 0
    assert not check_stage(nn.Linear(2, 2), torch.ones(3, 2), engines="closures").refusals
