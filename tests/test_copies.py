"""Copies of pullbacks: used apart from the original, or refused in a sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.trees import map_leaves
from tests.support.checkpointed import Regions

ENGINES = ("closures", "none", "min_cut", "full")


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)),
    "regions": Regions,
}


def split(module: nn.Module, engine: str, x: Tensor) -> fs.Pullback:
    apply, params, buffers = fs.functionalize(module)
    if engine != "closures":
        apply = fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
    return fs.stage_vjp(apply, params, buffers, x)[2]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_and_originals_are_used_apart(copied: Any, name: str, engine: str) -> None:
    torch.manual_seed(0)
    module, x, grad = MODULES[name](), torch.randn(5, 3), torch.randn(5, 2)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf), [leaf, *module.parameters()], grad)

    def check(dx: Any, weight_pullback: fs.WeightPullback) -> None:
        torch.testing.assert_close([dx, *weight_pullback().values()], [*expected])

    pullback = split(module, engine, x)
    pullbacks = [copied(pullback), pullback, copied(pullback)]
    halves = []
    for one in pullbacks:
        (dx,), weight_pullback = one(grad)
        halves += [(dx, copied(weight_pullback)), (dx, weight_pullback)]
    for dx, weight_pullback in halves:
        check(dx, weight_pullback)
        assert weight_pullback.consumed
    assert copied(pullback).consumed


def test_a_deep_copy_has_residuals_of_its_own() -> None:
    for engine in ENGINES:
        x = torch.randn(5, 3)
        pullback = split(nn.Linear(3, 2), engine, x)
        shallow, deep = copy.copy(pullback), copy.deepcopy(pullback)
        x.zero_()
        deep(torch.ones(5, 2))[1]()
        with pytest.raises(fs.WrittenError):
            shallow(torch.ones(5, 2))[1]()


def test_copies_of_derived_pullbacks_are_used_apart() -> None:
    params = {"w": torch.randn(3)}
    _, pullback = fs.derive(lambda p: {"w": p["w"] * p["w"]}, params)
    for one in (copy.copy(pullback), copy.deepcopy(pullback), pullback):
        torch.testing.assert_close(one({"w": torch.ones(3)})["w"], 2 * params["w"])


@pytest.mark.parametrize("engine", ENGINES)
def test_pickling_is_refused_in_a_sentence_and_consumes_nothing(engine: str) -> None:
    pullback = split(nn.Linear(3, 2), engine, torch.randn(5, 3))
    tape = pullback._tape
    (_, weight_pullback) = pullback(torch.ones(5, 2), retain=True)
    values: list[Any] = [pullback, weight_pullback, fs.derive(lambda p: p * 1, torch.ones(2))[1], tape]
    values += weight_pullback.sites if engine == "closures" else ()
    for value in values:
        with pytest.raises(fs.StageError, match=r"cannot be pickled.*pickle the gradients"):
            pickle.dumps(value)
    with pytest.raises(fs.StageError, match="cannot be pickled"):
        copy.deepcopy(tape)
    assert not weight_pullback.consumed


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_what_is_differentiated_in_turn_is_not_copied(copied: Any) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    x = torch.randn(2, 3, requires_grad=True)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    with pytest.raises(fs.StageError, match=r"cannot be copied.*retain=True"):
        copied(pullback)
    (dx,), weight_pullback = pullback(torch.ones_like(output), retain=True)
    with pytest.raises(fs.StageError, match=r"cannot be copied.*retain=True"):
        copied(weight_pullback)
    (again,), _ = pullback(torch.ones_like(output))
    for grad in (dx, again):
        assert torch.autograd.grad(grad.sum(), x, retain_graph=True)[0].abs().sum() > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_step_of_value_and_grad_is_copied_and_pickled(copied: Any, compiled: bool) -> None:
    torch.manual_seed(0)
    module = Reduced()
    x = torch.randn(4, 3)
    module(x).backward()
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten") if compiled else apply
    value, _, grads = copied(fs.value_and_grad(stage, microbatches=2))(params, buffers, x)
    torch.testing.assert_close(value, module(x))
    torch.testing.assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


class Reduced(nn.Linear):
    """A scalar per microbatch, as a loss is."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))])
def test_a_pipeline_stage_is_copied_and_pickled_as_torchs_is(copied: Any, compile: Any, used: bool) -> None:
    def gradients(stage: FunctionalPipelineStage) -> list[Tensor | None]:
        schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
        schedule.step(torch.ones(4, 3), target=torch.zeros(4, 2))
        return [parameter.grad for parameter in stage.submod.parameters()]

    with one_process():
        stage = FunctionalPipelineStage(nn.Linear(3, 2), 0, 1, torch.device("cpu"), compile=compile)
        if used:
            gradients(stage)
            stage.submod.zero_grad()
        other = copied(stage)
        found = gradients(other)
        assert not any(parameter.grad is not None for parameter in stage.submod.parameters())
        torch.testing.assert_close(found, gradients(stage), rtol=0, atol=0)


@pytest.mark.parametrize("module", [nn.LSTM(3, 2), nn.Sequential(nn.Linear(3, 2))], ids=["lstm", "linear"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda apply: pickle.loads(pickle.dumps(apply))])
def test_a_copied_stage_function_looks_at_its_own_module(copied: Any, module: nn.Module) -> None:
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(4, 3)

    def results(apply: Any) -> Any:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = pullback(map_leaves(torch.ones_like, output))
        return output, dx, weight_pullback()

    copied_apply: Any = copied(apply)
    for layer in copied_apply.module.modules():  # as some libraries do, which the next call finds out
        layer._parameters = dict(layer._parameters)
    torch.testing.assert_close(results(copied_apply), results(apply))
