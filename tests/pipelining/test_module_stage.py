"""Modules that change between steps, or in the midst of one: taken up as eager would, or refused by name."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.func import functional_call
from torch.nn import functional

import funcstage as fs
from funcstage._torch.interception import intercepting
from funcstage._torch.pipelining import TAKES_GRADS_AND_MESHES
from funcstage.pipelining import FunctionalPipelineStage, module_stage

ATEN = {"backend": "aten"}
ENGINES = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
SCHEDULES = pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
across_stages = pytest.mark.skipif(not TAKES_GRADS_AND_MESHES, reason="DTensors cross from torch 2.12 on")
MICROBATCHES = 2


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_process():
        yield


class Net(nn.Module):
    """Two layers, and a buffer that backward does not read."""

    shift: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.register_buffer("shift", torch.ones(4))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.list:
            x = layer(x)
        return x + self.shift


class Once:
    """A loss that does something when it is first called: after the first microbatch's forward."""

    def __init__(self, event: Callable[[], Any]) -> None:
        self.event: Callable[[], Any] | None = event

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        event, self.event = self.event, None
        if event is not None:
            event()
        return functional.mse_loss(output, target)


def made(dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net(dtype), torch.randn(8, 4, dtype=dtype), torch.randn(8, 4, dtype=dtype)


def plain_step(module: nn.Module, x: Tensor, target: Tensor, loss: Any = functional.mse_loss) -> Tensor:
    outputs = []
    for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        outputs.append(module(part))
        (loss(outputs[-1], wanted) / MICROBATCHES).backward()
    return torch.cat(outputs).detach()


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def freeze(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)


def move(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


def replace(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().clone())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "the stage was given another module": lambda stage: setattr(stage, "submod", Net()),
    "a submodule was replaced": lambda stage: stage.submod.list.__setitem__(0, nn.Linear(4, 4).double()),
    "parameter 'first.weight' was replaced": lambda stage: replace(stage.submod.first),
    "parameter 'first.weight' was frozen": lambda stage: freeze(stage.submod.first.weight),
    "parameter 'list.0.bias' was given other memory": lambda stage: move(stage.submod.list[0].bias),
}


@ENGINES
@SCHEDULES
@pytest.mark.parametrize("said", REFUSED)
def test_another_structure_in_the_midst_of_a_step_is_refused_and_the_next_step_takes_it_up(
    said: str, schedule: Any, compile: Any
) -> None:
    module, x, target = made()
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile)
    run = schedule(stage, MICROBATCHES, loss_fn=Once(lambda: REFUSED[said](stage)))
    with pytest.raises(fs.StructureError, match=f"{said} in the middle of a step, before microbatch 1"):
        run.step(x, target=target)
    stage.submod.zero_grad()
    reference = copy.deepcopy(stage.submod)
    expected = plain_step(reference, x, target)
    torch.testing.assert_close(run.step(x, target=target), expected)
    torch.testing.assert_close(grads(stage.submod), grads(reference))


@ENGINES
def test_a_step_reads_its_module_while_no_other_threads_stage_has_lent_it_tensors(compile: Any) -> None:
    module, x, target = made()
    reference = copy.deepcopy(module)
    expected = plain_step(reference, x, target)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile)
    run = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss)
    apply, params, buffers = fs.functionalize(nn.Sequential(module.first))
    steps: list[Any] = []

    def step(*_: Any) -> None:
        if not steps:
            with intercepting(None):  # who waits for another thread in a stage is refused
                steps.append(pool.submit(run.step, x, target=target))
                with pytest.raises(TimeoutError):
                    steps[0].result(timeout=0.3)

    handle = module.first.register_forward_pre_hook(step)
    with ThreadPoolExecutor(1) as pool:
        fs.stage_vjp(apply, {name: p * 0 for name, p in params.items()}, buffers, x)
    handle.remove()
    torch.testing.assert_close(steps[0].result(), expected)
    torch.testing.assert_close(grads(module), grads(reference))


def lend(part: nn.Module) -> threading.Thread:
    """Let another thread run a stage of a part, which has tensors of that one for a while from now on."""
    lent = threading.Event()

    def hold(*_: Any) -> None:
        if not lent.is_set():
            lent.set()
            time.sleep(0.3)

    part.register_forward_pre_hook(hold)
    apply, params, buffers = fs.functionalize(nn.Sequential(part))
    zeros = [{name: tensor * 0 for name, tensor in state.items()} for state in (params, buffers)]
    thread = threading.Thread(target=apply, args=(*zeros, torch.ones(6, 4, dtype=torch.float64)))
    thread.start()
    assert lent.wait(60)
    return thread


@ENGINES
def test_a_step_goes_on_once_another_thread_has_given_back_what_its_module_shares(compile: Any) -> None:
    module, x, target = made()
    reference = copy.deepcopy(module)
    expected = plain_step(reference, x, target)
    threads: list[threading.Thread] = []
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile)
    loss = Once(lambda: threads.append(lend(module.first)))
    torch.testing.assert_close(
        ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss).step(x, target=target), expected
    )
    threads[0].join()
    torch.testing.assert_close(grads(module), grads(reference))


def test_buffers_are_updated_once_another_thread_has_given_back_what_its_module_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = nn.BatchNorm1d(4).double()
    reference, x = copy.deepcopy(norm), torch.randn(6, 4, dtype=torch.float64)
    threads: list[threading.Thread] = []

    def meanwhile(stage: Any, new: Any) -> None:
        threads.append(lend(norm))
        update_buffers(stage, new)

    update_buffers = FunctionalPipelineStage._update_buffers
    monkeypatch.setattr(FunctionalPipelineStage, "_update_buffers", meanwhile)
    stage = FunctionalPipelineStage(norm, 0, 1, "cpu")
    ScheduleGPipe(stage, 1, loss_fn=functional.mse_loss).step(x, target=x)
    threads[0].join()
    reference(x)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(reference.named_buffers()))


def write(module: Net) -> None:
    module.shift.mul_(3)


def assign(module: Net) -> None:
    module.shift = torch.full_like(module.shift, 3)


@ENGINES
@SCHEDULES
@pytest.mark.parametrize("change", [write, assign])
def test_a_buffer_that_changes_in_the_midst_of_a_step_is_read_by_the_microbatches_after_it(
    change: Callable[[Net], None], schedule: Any, compile: Any
) -> None:
    module, x, target = made()
    reference = copy.deepcopy(module)
    expected = plain_step(reference, x, target, Once(lambda: change(reference)))
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile)
    run = schedule(stage, MICROBATCHES, loss_fn=Once(lambda: change(module)))
    torch.testing.assert_close(run.step(x, target=target), expected)
    torch.testing.assert_close(grads(module), grads(reference))
    torch.testing.assert_close(module.shift, reference.shift)


class InBfloat16(nn.Module):
    """A module whose forward computes with parameters that are cast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        cast = {name: parameter.bfloat16() for name, parameter in self.inner.named_parameters()}
        output: Tensor = functional_call(self.inner, cast, (x,))
        return output


def in_two_dtypes() -> tuple[Net, Tensor, Tensor]:
    """A module in float32 whose buffer is in the dtype that the stage computes in."""
    module, x, target = made(torch.float32)
    module.shift = module.shift.bfloat16()
    return module, x.bfloat16(), target.bfloat16()


def scale_weight(module: Net) -> None:
    with torch.no_grad():
        module.first.weight.mul_(1.5)


@ENGINES
@SCHEDULES
def test_a_weight_written_in_the_midst_of_a_step_is_cast_again_for_the_microbatches_after_it(
    schedule: Any, compile: Any
) -> None:
    module, x, target = in_two_dtypes()
    reference = copy.deepcopy(module)
    expected = plain_step(InBfloat16(reference), x, target, Once(lambda: scale_weight(reference)))
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile, param_dtype=torch.bfloat16)
    run = schedule(stage, MICROBATCHES, loss_fn=Once(lambda: scale_weight(module)))
    torch.testing.assert_close(run.step(x, target=target), expected)
    torch.testing.assert_close(grads(module), grads(reference), rtol=1e-2, atol=1e-3)


@ENGINES
@pytest.mark.parametrize("change", [scale_weight, write, assign])
def test_what_a_stage_has_cast_is_read_again_between_steps(
    change: Callable[[Net], None], compile: Any
) -> None:
    module, x, target = in_two_dtypes()
    reference = copy.deepcopy(module)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile, param_dtype=torch.bfloat16)
    run = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss)
    for _ in range(2):
        module.zero_grad()
        reference.zero_grad()
        expected = plain_step(InBfloat16(reference), x, target)
        torch.testing.assert_close(run.step(x, target=target), expected)
        torch.testing.assert_close(grads(module), grads(reference), rtol=1e-2, atol=1e-3)
        change(module)
        change(reference)


@ENGINES
@pytest.mark.parametrize("scale_grads", [True, False])
def test_gradients_of_parameters_that_were_frozen_later_become_what_torchs_stage_makes_of_them(
    scale_grads: bool, compile: Any
) -> None:
    found = []
    for kind, options in ((PipelineStage, {}), (FunctionalPipelineStage, {"compile": compile})):
        module, x, target = made()
        stage = kind(module, 0, 1, torch.device("cpu"), **options)
        run = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss, scale_grads=scale_grads)
        for step in range(3):
            module.first.requires_grad_(step != 1)
            run.step(x, target=target)
        found.append(grads(module))
    torch.testing.assert_close(*found)


@ENGINES
def test_what_a_stage_refuses_in_its_forward_is_refused_as_it_is_when_schedules_prepare(compile: Any) -> None:
    class Views(Net):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Buffer(self.shift[:])

        def forward(self, x: Tensor) -> Tensor:
            self.shift += 1
            return super().forward(x) * self.row

    stage = FunctionalPipelineStage(Views(), 0, 1, "cpu", compile=compile)
    x = torch.randn(4, 4, dtype=torch.float64)
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss)
    with pytest.raises(
        fs.PurityError, match=r"^Stage 0 of 1 \(Views\): .*its buffer 'shift', with which 'row'"
    ):
        schedule.step(x, target=x)


@ENGINES
def test_a_buffer_that_requires_grad_is_refused_when_it_does(compile: Any) -> None:
    module, x, target = made()
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile)
    run = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss)
    run.step(x, target=target)
    before = grads(module)
    module.shift.requires_grad_()
    with pytest.raises(fs.StructureError, match="the buffer 'shift' requires grad"):
        run.step(x, target=target)
    torch.testing.assert_close(grads(module), before, rtol=0, atol=0)
    module.shift = module.shift.detach()
    run.step(x, target=target)


class Kept(nn.Module):
    """A module of which nobody knows beforehand how much it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:1] if x.isnan().any() else x


def placed(*shape: int) -> Tensor:
    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(torch.ones(shape), mesh, [Replicate()]).requires_grad_()


def in_the_middle(module: nn.Module, x: Tensor, **given: Any) -> FunctionalPipelineStage:
    """The second of three stages, which was told what it receives."""
    stage = FunctionalPipelineStage(module, 1, 3, "cpu", **given)
    stage.has_backward = True
    stage._input_examples, stage._output_examples = stage.infer((x,), {})
    return stage


@across_stages
def test_what_autograd_does_not_say_of_gradients_is_as_the_inputs_are() -> None:
    x = placed(2, 4)
    (grad,) = in_the_middle(Kept(), x, output_args=x).infer_grads((None,))
    assert isinstance(grad, DTensor)
    assert (grad.shape, grad.placements, grad.requires_grad) == (x.shape, x.placements, False)


@across_stages
def test_the_gradient_of_a_plain_input_looks_as_that_and_needs_none_itself() -> None:
    (grad,) = in_the_middle(nn.Linear(4, 3), torch.ones(2, 4, requires_grad=True)).infer_grads((None,))
    assert grad is not None
    assert (grad.shape, grad.requires_grad) == ((2, 4), False)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(fs.StructureError, match="only a tensor or a tuple of tensors can be sent"):
        in_the_middle(Named(), torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_stage_computes_with_what_was_traced(dtype: torch.dtype | None) -> None:
    module, x, target = made(torch.float32)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", compile=ATEN, param_dtype=dtype)
    ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss).step(x, target=target)
    assert "1 signature(s)" in repr(stage._apply)


def test_dtensors_that_torch_does_not_send_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_stage, "TAKES_GRADS_AND_MESHES", False)
    with pytest.raises(fs.StructureError, match=r"a DTensor crosses between stages .*Replicate"):
        in_the_middle(nn.Identity(), placed(2, 4))
