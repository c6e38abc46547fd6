"""Pipelines of one process, which is all ranks: what schedules and users do to stages, against eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from one_process import one_process
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    V_SHAPED,
    Case,
    assert_same,
    expected,
    growing,
    make_schedule,
    train,
    uneven,
    with_everything,
)
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage

ATEN = {"backend": "aten"}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ENGINES = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    with one_process() as group:
        yield group


def stages_for(schedule: str) -> int:
    return 1 if schedule in ONE_STAGE_A_RANK else 2 if schedule in V_SHAPED else 3


@ENGINES
@pytest.mark.parametrize("folded", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_steps_of_an_optimizer_are_eagers(schedule: str, folded: bool, compile: Any, group: Any) -> None:
    case = Case(schedule, stages_for(schedule), 4, compile=compile, folded=folded, steps=2, evals=True)
    assert_same(train(0, group, case), expected(case), **CLOSE)


@ENGINES
@pytest.mark.parametrize("model", [with_everything, growing])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble"])
def test_whatever_a_stage_may_have_is_trained(schedule: str, model: Any, compile: Any, group: Any) -> None:
    case = Case(schedule, 3, 4, model, size=3, compile=compile, steps=2, backwards=2, folded=True)
    assert_same(train(0, group, case), expected(case), **CLOSE)


@ENGINES
@pytest.mark.parametrize("scale_grads", [True, False])
def test_gradients_add_up_to_what_is_there_and_are_scaled_with_it_as_torch_scales(
    scale_grads: bool, compile: Any, group: Any
) -> None:
    case = Case(
        "InterleavedZeroBubble", 3, 4, compile=compile, backwards=3, options={"scale_grads": scale_grads}
    )
    assert_same(train(0, group, case), expected(case), **CLOSE)


def alone(module: nn.Module, group: Any, loss: Any, microbatches: int = 2, **options: Any) -> Any:
    """A schedule of one stage, and that stage."""
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=group, **options)
    return ScheduleGPipe(stage, microbatches, loss_fn=loss or stage.loss_fn), stage


@ENGINES
def test_the_cpu_may_go_by_its_number(compile: Any, group: Any) -> None:
    module, x, target = nn.Linear(4, 2), torch.randn(6, 4), torch.randn(6, 2)
    expected = torch.autograd.grad(functional.mse_loss(module(x), target), list(module.parameters()))
    stage = FunctionalPipelineStage(module, 0, 1, "cpu:0", group=group, compile=compile)
    ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss).step(x, target=target)
    torch.testing.assert_close([p.grad for p in module.parameters()], list(expected))


@pytest.mark.parametrize("loss", [1.0, None, "loss"], ids=repr)
def test_a_loss_that_is_no_tensor_is_refused(loss: Any, group: Any) -> None:
    schedule, _ = alone(nn.Linear(4, 2), group, lambda output, target: loss)
    message = r"stage 0 of 1 \(Linear\): the schedule's loss must be a tensor"
    with pytest.raises(fs.StructureError, match=message):
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))


def test_a_loss_without_a_gradient_is_refused_where_something_would_be_trained(group: Any) -> None:
    schedule, _ = alone(nn.Linear(4, 2), group, lambda output, target: output.detach().sum())
    with pytest.raises(fs.StructureError, match=r"loss does not require grad.* without detach\(\)"):
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))


@ENGINES
@pytest.mark.parametrize("folded", [False, True], ids=["", "folded"])
def test_a_loss_that_does_not_read_the_output_leaves_no_gradients(
    folded: bool, compile: Any, group: Any
) -> None:
    factor = torch.ones((), requires_grad=True)
    options: dict[str, Any] = {"loss_fn": functional.mse_loss} if folded else {}
    module = nn.Linear(4, 2)
    schedule, _ = alone(module, group, lambda output, target: factor * 3, compile=compile, **options)
    output = schedule.step(torch.ones(4, 4), target=torch.randn(4, 2))
    torch.testing.assert_close(output, module(torch.ones(4, 4)))
    assert factor.grad == 6.0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@ENGINES
def test_the_loss_of_a_stage_may_be_used_inside_of_another_function(compile: Any, group: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x, target = torch.randn(4, 4), torch.randn(4, 3)
    stage = FunctionalPipelineStage(
        module, 0, 1, "cpu", group=group, compile=compile, loss_fn=functional.mse_loss
    )
    seen = []

    def scaled(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.shape, output.dtype, repr(output)))
        return stage.loss_fn(output, target) * 8 + output.square().sum()

    ScheduleGPipe(stage, 2, loss_fn=scaled).step(x, target=target)
    assert seen == [(torch.Size([2, 3]), torch.float32, seen[0][2])] * 2
    assert seen[0][2] == "<output of stage 0 of 1 (Sequential), not yet computed>"
    losses = [functional.mse_loss(y := module(a), b) * 8 + y.square().sum() for a, b in halves(x, target)]
    grads = torch.autograd.grad(sum(losses) / 2, list(module.parameters()))
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def halves(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.chunk(2) for tensor in tensors), strict=True)


@ENGINES
@pytest.mark.parametrize("reads_it_twice", [False, True])
def test_a_loss_may_compute_with_the_output_of_a_stage_that_has_one_of_its_own(
    reads_it_twice: bool, compile: Any, group: Any
) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    x, target = torch.randn(4, 4), torch.randn(4, 3)

    def plain(output: Tensor, target: Tensor) -> Tensor:
        loss = (output - target).abs().sum()
        return loss * output.mean() if reads_it_twice else loss

    schedule, _ = alone(module, group, plain, compile=compile, loss_fn=functional.mse_loss)
    losses: list[Tensor] = []
    schedule.step(x, target=target, losses=losses)
    wanted = [plain(module(a), b) for a, b in halves(x, target)]
    torch.testing.assert_close(losses, wanted)
    grads = torch.autograd.grad(sum(wanted) / 2, list(module.parameters()))
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


class Picky(nn.Module):
    """Takes one microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.seen > 1:
            raise KeyError("x")
        return self.linear(x)


def test_an_error_of_a_forward_says_which_stage_and_microbatch_it_was(group: Any) -> None:
    schedule, _ = alone(Picky(), group, functional.mse_loss)
    with pytest.raises(Exception, match="x") as caught:
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    notes = [note for error in chain for note in getattr(error, "__notes__", ())]
    assert any("This was stage 0 of 1 (Picky), in F of microbatch 1." in note for note in notes)


class Widening(nn.Module):
    """Returns another dtype from some microbatch on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.linear, self.after, self.seen = nn.Linear(4, 4), after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.linear(x)
        return y.double() if self.seen > self.after else y


def test_a_microbatch_that_does_not_look_as_its_stages_were_prepared_for_is_refused(group: Any) -> None:
    modules = [Widening(2), nn.Linear(4, 4)]
    stages = [FunctionalPipelineStage(m, i, 2, "cpu", group=group) for i, m in enumerate(modules)]
    schedule = ScheduleInterleaved1F1B(stages, 3, loss_fn=functional.mse_loss)
    x = torch.randn(6, 4)
    message = r"stage 0 of 2 .*: the output of microbatch 2 is \(?float64\[2, 4\].* prepared for \(?float32"
    with pytest.raises(fs.LeafError, match=message):
        schedule.step(x, target=x)
    schedule, stage = alone(nn.Linear(4, 4), group, functional.mse_loss, 3)
    schedule.step(x, target=x)
    message = r"stage 0 of 1 .*: the input of microbatch 1 is \(?float32\[3, 4\].* prepared for \(?float32\[2"
    with pytest.raises(fs.LeafError, match=message):
        stage.forward_one_chunk(1, (torch.randn(3, 4),), {})


@pytest.mark.parametrize(
    "value", [lambda loss: loss.expand(1), lambda loss: loss.long(), float, lambda loss: (loss, loss)]
)
def test_a_folded_loss_that_is_no_real_scalar_is_refused(value: Any, group: Any) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Any:
        return value(functional.mse_loss(output, target))

    schedule, _ = alone(nn.Linear(4, 2), group, None, loss_fn=loss_fn)
    with pytest.raises(fs.LeafError, match=r"loss_fn must return a real scalar.*Take the mean"):
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))


def test_an_error_of_the_modules_own_comes_as_it_is_before_the_first_step(group: Any) -> None:
    class Strict(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("three rows at least")

    schedule, _ = alone(Strict(4, 4), group, functional.mse_loss)
    with pytest.raises(ValueError, match=r"^three rows at least\n") as error:
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 4))
    assert not isinstance(error.value, fs.StageError)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, "bfloat16", float])
def test_a_dtype_to_compute_in_that_is_not_floating_is_refused(dtype: Any) -> None:
    with pytest.raises(fs.LeafError, match="param_dtype must be a floating dtype"):
        FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, torch.device("cpu"), param_dtype=dtype)


@pytest.mark.parametrize("outputs", [torch.empty(2, 3), torch.empty(3, 2), (torch.empty(2, 2),) * 2])
def test_output_args_that_the_stage_does_not_return_are_refused(outputs: Any, group: Any) -> None:
    schedule, _ = alone(nn.Linear(4, 2), group, functional.mse_loss, output_args=outputs)
    with pytest.raises(fs.LeafError, match=r"its output is .*, but output_args says .*Correct output_args"):
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))


def test_params_and_grads_are_those_of_the_module(group: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False))
    schedule, stage = alone(module, group, functional.mse_loss)
    assert list(stage.params) == list(stage.grads) == ["0.weight", "0.bias"]
    assert set(stage.grads.values()) == {None}
    schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))
    for name, parameter in module[0].named_parameters(prefix="0"):
        assert stage.grads[name] is parameter.grad
        assert stage.params[name].data_ptr() == parameter.data_ptr()
        assert not stage.params[name].requires_grad


def test_a_w_without_its_i_is_refused(group: Any) -> None:
    schedule, stage = alone(nn.Linear(4, 2), group, functional.mse_loss)
    schedule.step(torch.randn(4, 4), target=torch.randn(4, 2))
    with pytest.raises(fs.StructureError, match="W of microbatch 1 has no I before it"):
        stage.backward_weight_one_chunk(1)


@ENGINES
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B"])
def test_a_step_after_one_that_failed_in_a_forward_is_eagers(schedule: str, compile: Any, group: Any) -> None:
    # torch leaves the losses of a step that failed to the next one, whose backward went into them.
    class Failing(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails and (compile or bool(x.sum() > 5)):
                raise KeyError("the user's own")
            return super().forward(x).tanh()

    torch.manual_seed(0)
    modules = [Failing(3, 3) for _ in range(stages_for(schedule))]
    stages = [
        FunctionalPipelineStage(module, i, len(modules), "cpu", group=group, compile=compile)
        for i, module in enumerate(modules)
    ]
    pipeline = make_schedule(Case(schedule, len(modules), 2), stages, functional.mse_loss)
    x = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)])
    pipeline.step(x, target=torch.ones(4, 3))
    modules[0].fails = True
    with pytest.raises(Exception, match=r"failed|the user's own"):
        pipeline.step(x, target=torch.ones(4, 3))
    modules[0].fails = False
    for module in modules:
        module.zero_grad()
    x, target = torch.randn(4, 3), torch.randn(4, 3)
    losses: list[Tensor] = []
    pipeline.step(x, target=target, losses=losses)
    found = [p.grad for module in modules for p in module.parameters()]
    expected = functional.mse_loss(nn.Sequential(*modules)(x), target)
    grads = torch.autograd.grad(expected, [p for module in modules for p in module.parameters()])
    torch.testing.assert_close(found, [*grads])
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach())


class FailsAtFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.left = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.left:
            raise ValueError("not yet")
        return self.linear(x)


def test_a_modules_own_error_in_the_first_step_comes_as_it_is_and_the_next_step_runs(group: Any) -> None:
    module, x = FailsAtFirst(), torch.randn(4, 3)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=group)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: ((y - t) ** 2).mean())
    with pytest.raises(ValueError, match="not yet"):
        schedule.step(x, target=x)
    module.left = 0
    schedule.step(x, target=x)
    expected = torch.autograd.grad(((module(x) - x) ** 2).mean(), module.linear.weight)[0]
    torch.testing.assert_close(module.linear.weight.grad, expected)


class Logging(nn.Module):
    """Keeps something of every microbatch in a list, and in one within a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.log: list[Tensor] = []
        self.notes: dict[str, list[int]] = {"rows": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(x)
        self.log.append(y.detach().sum())
        self.notes["rows"].append(len(x))
        return y


@ENGINES
def test_finding_out_shapes_leaves_nothing_in_the_lists_of_a_module(compile: Any) -> None:
    module, x, target = Logging(), torch.randn(8, 4), torch.randn(8, 4)
    stage = FunctionalPipelineStage(module, 0, 1, torch.device("cpu"), compile=compile)
    ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss).step(x, target=target)
    expected = [module.last(rows).sum() for rows in x.chunk(4)]
    assert torch.equal(torch.stack(module.log), torch.stack(expected))
    assert module.notes == {"rows": [2, 2, 2, 2]}


@ENGINES
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_a_loss_may_write_into_the_output_that_it_is_given(schedule: str, compile: Any, group: Any) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        output.div_(2.0)
        output[..., 0] = 0.0
        return functional.mse_loss(output, target)

    def model(num_stages: int, batch: int) -> Any:
        return uneven(num_stages, batch)._replace(loss_fn=loss_fn)

    case = Case(schedule, stages_for(schedule), 4, model, compile=compile, steps=2)
    assert_same(train(0, group, case), expected(case), **CLOSE)
