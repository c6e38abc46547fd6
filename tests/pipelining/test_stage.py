"""Stages on torch.distributed, in processes with gloo, against plain eager autograd on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    Case,
    Model,
    alike,
    assert_same,
    blocks,
    expected,
    gathered,
    growing,
    in_bfloat16,
    make_schedule,
    make_stages,
    train,
    uneven,
    with_everything,
)
from pipeline_ranks import GROUP_SECONDS, Raised, ranks, run
from torch import Tensor, nn
from torch.nn import functional

import funcstage as fs
from funcstage._torch import pipelining as private
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

ATEN = {"backend": "aten"}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ANSWERS_UPSTREAM = not private.EVERY_INPUT_RETURNS_A_GRADIENT
"""Whether a failure is told to the stages before it, or those wait until the group's timeout."""

PATIENCE = GROUP_SECONDS if ANSWERS_UPSTREAM else 15
"""The timeout where a rank may wait for one that has failed: time enough for a busy machine."""


def stages_for(schedule: str, world_size: int) -> int:
    return world_size if schedule in ONE_STAGE_A_RANK else 2 * world_size


def assert_trains_as_eager(world_size: int, case: Case, **tolerance: float) -> None:
    assert_same(gathered(run(world_size, train, case)), expected(case), **tolerance)


# Every schedule.


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_three_optimizer_steps_under_a_schedule_are_those_of_the_whole_model(
    schedule: str, compile: Any
) -> None:
    case = Case(schedule, stages_for(schedule, 2), 4, compile=compile, steps=3, folded=compile is not False)
    # LoopedBFS runs its microbatches backward in another order; compiled stages sum in the matrix product.
    tolerance = {} if compile is False and schedule != "LoopedBFS" else CLOSE
    assert_trains_as_eager(2, case, **tolerance)


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_on_four_ranks_is_that_of_the_whole_model(schedule: str, compile: Any) -> None:
    case = Case(schedule, stages_for(schedule, 4), 8, compile=compile, folded=compile is False)
    assert_trains_as_eager(4, case, **CLOSE)


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_integers_several_tensors_ties_buffers_and_keywords_go_through_a_pipeline(
    schedule: str, compile: Any
) -> None:
    case = Case(
        schedule,
        4,
        4,
        with_everything,
        size=3,
        compile=compile,
        steps=2,
        backwards=2,
        evals=True,
        folded=schedule != "1F1B",
    )
    assert_trains_as_eager(4 if schedule in ONE_STAGE_A_RANK else 2, case, **CLOSE)


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", ["GPipe", "InterleavedZeroBubble"])
def test_backward_reads_the_buffers_as_its_own_microbatch_found_them(schedule: str, compile: Any) -> None:
    case = Case(schedule, 2, 4, growing, compile=compile, steps=2, backwards=2)
    assert_trains_as_eager(2, case, **CLOSE)


def test_stages_compiled_by_inductor_train_under_a_split_schedule() -> None:
    case = Case("InterleavedZeroBubble", 2, 2, alike, compile=True, steps=2, folded=True)
    assert_trains_as_eager(2, case, **CLOSE)


def test_the_order_of_a_csv_file_is_followed() -> None:
    rows = (
        "0F0 0F1 0F2 0F3 2F0 2F1 2I0 2W0 2F2 2I1 0I0 2F3 2I2 2W1 0I1 0W1 2I3 0I2 2W2 2W3 0W0 0I3 0W2 0W3",
        "1F0 1F1 1F2 1F3 3F0 3I0 3F1 3W0 3I1 1I0 3F2 3I2 1W0 3F3 1I1 3I3 3W1 1I2 3W2 1W1 3W3 1I3 1W3 1W2",
    )
    assert_trains_as_eager(2, Case(rows, 4, 4, compile=ATEN), **CLOSE)


@pytest.mark.parametrize("torchs", [(0,), (1,), (3,), (1, 2)], ids=str)
def test_stages_of_torch_and_ours_share_a_pipeline(torchs: tuple[int, ...]) -> None:
    # In torch 2.11 its own stages cannot be neighbours on one rank, as they are in a V, with gloo.
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble", *["ZBVZeroBubble"] * ANSWERS_UPSTREAM):
        assert_trains_as_eager(2, Case(schedule, 4, 4, torchs=torchs, steps=2), **CLOSE)


# Gradients and losses.


def test_gradients_are_summed_over_steps_until_they_are_zeroed() -> None:
    assert_trains_as_eager(2, Case("1F1B", 2, 3, backwards=3, steps=2))


def test_gradients_of_a_summed_loss_are_not_scaled() -> None:
    case = Case("ZBVZeroBubble", 4, 4, options={"scale_grads": False})
    assert_trains_as_eager(2, case)


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
def test_bfloat16_gradients_are_summed_in_float32(compile: Any) -> None:
    case = Case(
        "GPipe", 2, 8, in_bfloat16, compile=compile, grad_dtype=torch.float32, options={"scale_grads": False}
    )
    (step,) = gathered(run(2, train, case))
    exact = {name: torch.zeros(grad.shape) for name, grad in step.grads.items() if grad is not None}
    model = case.build()
    chunks = zip(model.inputs[0].chunk(8), model.target.chunk(8), strict=True)
    for x, y in chunks:
        loss = functional.mse_loss(nn.Sequential(*model.modules)(x), y)
        named = {f"{i}.{name}": p for i, m in enumerate(model.modules) for name, p in m.named_parameters()}
        for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            exact[name] += grad
    assert {grad.dtype for grad in step.grads.values() if grad is not None} == {torch.float32}
    for name, grad in exact.items():
        # A compiled stage adds the unrounded products.
        torch.testing.assert_close(step.grads[name], grad, **({"rtol": 0, "atol": 0} if not compile else {}))


def clips(rank: int, group: dist.ProcessGroup, case: Case) -> tuple[float, float]:
    model = case.build()
    (stage,) = make_stages(case, model, rank, group)
    schedule = make_schedule(case, [stage], model.loss_fn)
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None)
    before = float(nn.utils.clip_grad_norm_(stage.submod.parameters(), 0.01))
    after = float(nn.utils.get_total_norm(list(stage.grads.values())))
    assert list(stage.params) == list(stage.grads) == [name for name, _ in stage.submod.named_parameters()]
    assert all(not param.requires_grad for param in stage.params.values())
    return before, after


def test_gradients_are_clipped_where_they_are() -> None:
    for before, after in run(2, clips, Case("1F1B", 2, 2)):
        assert before > 0.01
        assert after == pytest.approx(0.01, rel=1e-3)


def halves_the_loss(
    rank: int, group: dist.ProcessGroup, case: Case
) -> tuple[list[Tensor], dict[str, Tensor], list[str]]:
    model = case.build()
    stages = make_stages(case, model, rank, group)
    ran: list[str] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        ran.append(type(output).__name__)
        assert output.shape == target.shape  # known without computing it
        return stages[0].loss_fn(output, target) / 2 + output.square().sum()

    schedule = make_schedule(case, stages, loss)
    losses: list[Tensor] = []
    last = rank == group.size() - 1
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if last else None, losses=losses)
    return [loss.detach() for loss in losses], stages[0].grads, ran


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
def test_a_loss_in_the_programs_can_be_a_part_of_another(compile: Any) -> None:
    case = Case("GPipe", 2, 2, compile=compile, folded=True)
    _, (losses, grads, ran) = run(2, halves_the_loss, case)
    assert ran == ["StandIn"] * 2
    model = case.build()
    wanted = []
    for x, y in zip(model.inputs[0].chunk(2), model.target.chunk(2), strict=True):
        output = nn.Sequential(*model.modules)(x)
        loss = functional.mse_loss(output, y) / 2 + output.square().sum()
        (loss / 2).backward()
        wanted.append(loss.detach())
    torch.testing.assert_close(losses, wanted, **CLOSE)
    torch.testing.assert_close(
        grads, {name: p.grad for name, p in model.modules[1].named_parameters()}, **CLOSE
    )


def plain_loss(rank: int, group: dist.ProcessGroup, case: Case) -> list[Any]:
    """The stage is told of the loss, the schedule is given the plain function."""
    model = case.build()
    stages = make_stages(case, model, rank, group)
    schedule = make_schedule(case, stages, model.loss_fn)
    losses: list[Tensor] = []
    output = schedule.step(
        *(model.inputs if rank == 0 else ()), target=model.target if rank else None, losses=losses
    )
    return [output, [loss.detach() for loss in losses], stages[0].grads]


def test_a_schedule_may_compute_the_loss_that_a_stage_could() -> None:
    case = Case("1F1B", 2, 4, compile=ATEN, folded=True)
    (step,) = expected(case)
    answers = run(2, plain_loss, case)
    torch.testing.assert_close(answers[1][0], step.outputs[0], **CLOSE)
    torch.testing.assert_close(answers[1][1], step.losses, **CLOSE)
    for rank, (_, _, grads) in enumerate(answers):
        for name, grad in grads.items():
            torch.testing.assert_close(grad, step.grads[f"{rank}.{name}"], **CLOSE)


class Scaled(nn.Module):
    """A loss that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output * self.scale, target)


def scaled_loss(rank: int, group: dist.ProcessGroup, case: Case) -> Tensor | None:
    model = case.build()
    loss = Scaled()
    schedule = make_schedule(case, make_stages(case, model, rank, group), loss)
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None)
    return loss.scale.grad


def test_a_loss_with_parameters_gets_their_gradients() -> None:
    case = Case("1F1B", 2, 2)
    model, loss = case.build(), Scaled()
    for x, y in zip(model.inputs[0].chunk(2), model.target.chunk(2), strict=True):
        loss(nn.Sequential(*model.modules)(x), y).backward()
    torch.testing.assert_close(run(2, scaled_loss, case)[1], loss.scale.grad)


def input_grad(rank: int, group: dist.ProcessGroup, case: Case) -> Tensor | None:
    model = case.build()
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    x = model.inputs[0].clone().requires_grad_()
    schedule.step(*((x,) if rank == 0 else ()), target=model.target if rank else None)
    return x.grad


def test_autograd_goes_on_where_the_inputs_of_the_pipeline_came_from() -> None:
    case = Case("1F1B", 2, 2)
    model = case.build()
    x = model.inputs[0].clone().requires_grad_()
    for chunk, y in zip(x.chunk(2), model.target.chunk(2), strict=True):
        functional.mse_loss(nn.Sequential(*model.modules)(chunk), y).backward()
    torch.testing.assert_close(run(2, input_grad, case)[0], x.grad, **CLOSE)


# The module between steps.


def thaws(rank: int, group: dist.ProcessGroup, case: Case) -> list[dict[str, Tensor | None]]:
    """Freezes a parameter, thaws it, moves the parameters into other memory."""
    model = case.build()
    (stage,) = make_stages(case, model, rank, group)
    schedule = make_schedule(case, [stage], model.loss_fn)
    bias = stage.submod.first.bias
    seen = []

    def step() -> None:
        stage.submod.zero_grad()
        schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None)
        seen.append({name: p.grad for name, p in stage.submod.named_parameters()})

    bias.requires_grad_(False)
    step()
    bias.requires_grad_(True)
    step()
    stage.submod.load_state_dict({k: v * 2 for k, v in stage.submod.state_dict().items()}, assign=True)
    step()
    return seen


@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
def test_parameters_may_be_frozen_and_replaced_between_steps(compile: Any) -> None:
    case = Case("1F1B", 2, 2, compile=compile)
    answers = run(2, thaws, case)
    model = case.build()
    for step, (frozen, factor) in enumerate([(True, 1), (False, 1), (False, 2)]):
        for module in model.modules:
            module.zero_grad()
            if factor != 1:
                module.load_state_dict({k: v * factor for k, v in module.state_dict().items()})
            module.first.bias.requires_grad_(not frozen)
        for x, y in zip(model.inputs[0].chunk(2), model.target.chunk(2), strict=True):
            (functional.mse_loss(nn.Sequential(*model.modules)(x), y) / 2).backward()
        for rank, module in enumerate(model.modules):
            wanted = {name: p.grad for name, p in module.named_parameters()}
            torch.testing.assert_close(answers[rank][step], wanted, **CLOSE)


def thaws_a_stage(rank: int, group: dist.ProcessGroup, case: Case) -> None:
    model = case.build()
    (stage,) = make_stages(case, model, rank, group)
    schedule = make_schedule(case, [stage], model.loss_fn)
    for trained in (False, True):
        model.modules[0].requires_grad_(trained)
        schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None)


def test_a_stage_that_needed_no_gradients_cannot_be_trained_by_the_same_schedule() -> None:
    answers = ranks(2).run(thaws_a_stage, Case("1F1B", 2, 2), group_seconds=15)
    if ANSWERS_UPSTREAM:  # in torch 2.11 gradients are sent whether they are needed or not
        assert "StructureError" in answers[0].kinds
        assert "Make a new schedule" in answers[0].message


def only_forward(rank: int, group: dist.ProcessGroup, case: Case) -> tuple[Tensor | None, bool]:
    model = case.build()
    stages = make_stages(case, model, rank, group)
    schedule = make_schedule(case, stages, None)
    output = schedule.step(*(model.inputs if rank == 0 else ()))
    return output, any(grad is not None for grad in stages[0].grads.values())


@pytest.mark.parametrize("schedule", ["GPipe", "ZBVZeroBubble"])
def test_a_schedule_without_a_loss_only_runs_forward(schedule: str) -> None:
    case = Case(schedule, stages_for(schedule, 2), 4)
    outputs, with_grads = zip(*run(2, only_forward, case), strict=True)
    (output,) = (output for output in outputs if output is not None)
    assert not output.requires_grad
    assert not any(with_grads)
    torch.testing.assert_close(output, expected(case)[0].outputs[0], rtol=0, atol=0)


class Counting(nn.Module):
    """Counts its forwards, and keeps a tensor that it made in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kept is None:
            self.kept = torch.arange(4.0)
        return self.layer(x) + self.kept


def counted(num_stages: int, batch: int) -> Model:
    torch.manual_seed(0)
    modules: list[nn.Module] = [Counting() for _ in range(num_stages)]
    return Model(modules, (torch.randn(batch, 4),), torch.randn(batch, 4))


def counts(rank: int, group: dist.ProcessGroup, case: Case) -> tuple[int, bool, bool]:
    model = case.build()
    (stage,) = make_stages(case, model, rank, group)
    before = torch.get_rng_state()
    schedule = make_schedule(case, [stage], model.loss_fn)
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None)
    return stage.submod.calls, type(stage.submod.kept) is Tensor, torch.equal(before, torch.get_rng_state())


def test_shapes_are_found_out_without_running_or_touching_the_module() -> None:
    assert run(2, counts, Case("1F1B", 2, 3, counted)) == [(3, True, True)] * 2


# Refusals, which every rank must hear of.


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"stage_index": 2}, fs.LeafError, "stage_index must be one of the 2 stages"),
        ({"stage_index": -1}, fs.LeafError, "stage_index must be one of the 2 stages"),
        ({"device": "cuda:0"}, fs.LeafError, r"'weight' is float32\[3, 2\] on cpu, but .* cuda:0"),
        ({"dw_builder": lambda: None}, fs.StructureError, "dw_builder must be None"),
        ({"submodule": functional.relu}, fs.StructureError, "submodule must be an nn.Module"),
        (
            {"submodule": torch.compile(nn.Linear(2, 2))},
            fs.StructureError,
            "pass .*compile=True|compile=True",
        ),
        ({"loss_fn": Scaled()}, fs.StructureError, "loss_fn has parameters to train"),
        ({"loss_fn": 3}, fs.StructureError, "loss_fn must be a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_stage_that_cannot_be_is_refused(
    changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    options = {"submodule": nn.Linear(2, 3), "stage_index": 0, "num_stages": 2, "device": "cpu"}
    with pytest.raises(kind, match=message):
        FunctionalPipelineStage(**{**options, **changed})


def wrapped(rank: int, group: dist.ProcessGroup) -> None:
    module = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), process_group=group)
    FunctionalPipelineStage(module, rank, 2, "cpu", group=group)


def test_a_module_with_gradient_hooks_of_its_own_is_refused() -> None:
    for answer in ranks(2).run(wrapped):
        assert "StructureError" in answer.kinds
        assert "DistributedDataParallel" in answer.message


def mismatched(num_stages: int, batch: int) -> Model:
    """Stage 2 expects other inputs than stage 1 sends."""
    model = uneven(num_stages, batch)
    model.modules[2] = nn.Linear(17, 5).double()
    return model


def trains_with(
    rank: int, group: dist.ProcessGroup, case: Case, given: dict[int, dict[str, Any]], target: bool = True
) -> None:
    model = case.build()
    mine = case.stages_of(rank, group.size())
    stages = [
        FunctionalPipelineStage(
            model.modules[i],
            i,
            case.num_stages,
            "cpu",
            group=group,
            compile=case.compile,
            **given.get(i, {}),
        )
        for i in mine
    ]
    schedule = make_schedule(case, stages, model.loss_fn)
    schedule.step(
        *(model.inputs if 0 in mine else ()),
        target=model.target if target and case.num_stages - 1 in mine else None,
    )


def assert_all_refuse(
    world_size: int, case: Case, message: str, given: dict[int, dict[str, Any]] | None = None, **options: Any
) -> None:
    answers = ranks(world_size).run(trains_with, case, given or {}, group_seconds=PATIENCE, **options)
    heard = [answer for answer in answers if isinstance(answer, Raised) and "StageError" in answer.kinds]
    assert all(isinstance(answer, Raised) for answer in answers), answers
    assert all(message in answer.message for answer in heard), answers
    assert len(heard) == world_size if ANSWERS_UPSTREAM else heard, answers


@pytest.mark.parametrize("schedule", ["GPipe", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_stages_that_do_not_fit_together_are_refused_on_every_rank(schedule: str) -> None:
    case = Case(schedule, 4, 4, mismatched)
    message = "Stage 2 of 4 (Linear): its forward fails on the inputs that it gets, (float64[2, "
    assert_all_refuse(4 if schedule == "GPipe" else 2, case, message)


def test_examples_that_a_stage_does_not_live_up_to_are_refused_on_every_rank() -> None:
    wrong = torch.zeros(2, 3)
    for given in ({1: {"input_args": wrong}}, {0: {"output_args": (wrong,)}}):
        (option,) = (option for options in given.values() for option in options)
        assert_all_refuse(2, Case("1F1B", 2, 2), f"but {option} says (float32[2, 3])", given)


def test_a_missing_target_is_refused() -> None:
    for schedule in ("1F1B", "ZBVZeroBubble"):
        case = Case(schedule, stages_for(schedule, 2), 4)
        if ANSWERS_UPSTREAM:
            assert_all_refuse(2, case, "got no target", target=False)
        else:  # torch 2.11 fails on the last rank, without having asked the stage
            answers = ranks(2).run(trains_with, case, {}, target=False, group_seconds=PATIENCE)
            assert all(isinstance(answer, Raised) for answer in answers)


class Branching(nn.Linear):
    """Reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def branching(num_stages: int, batch: int) -> Model:
    model = blocks([3] * (num_stages + 1), batch)
    model.modules[1] = Branching(3, 3).double()
    return model


class Gathering(nn.Linear):
    """Reads values, of which its shapes are independent."""

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.sum(-1) > 0).nonzero()[:, 0]
        return x.index_add(0, rows, super().forward(x[rows])) * x.detach().sum().item()


def gathering(num_stages: int, batch: int) -> Model:
    model = blocks([3] * (num_stages + 1), batch)
    model.modules[1] = Gathering(3, 3).double()
    return model


def test_a_stage_that_reads_values_of_which_its_shapes_are_independent_needs_no_example() -> None:
    run(2, trains_with, Case("1F1B", 2, 2, gathering), {})


def test_a_stage_whose_shapes_depend_on_values_needs_an_example_of_its_output() -> None:
    case = Case("1F1B", 2, 2, branching)
    way_out = "output_args=torch.empty((2, 3), dtype=torch.float64)"
    assert_all_refuse(2, case, way_out)
    run(2, trains_with, case, {1: {"output_args": torch.zeros(2, 3, dtype=torch.float64)}})


def test_a_number_of_microbatches_that_torch_refuses_is_refused() -> None:
    for case in (Case("1F1B", 2, 1), Case("Interleaved1F1B", 4, 5)):
        for answer in ranks(2).run(trains_with, case, {}):
            assert "ValueError" in answer.kinds


def test_weight_gradients_that_nobody_made_are_refused() -> None:
    (answer, _) = ranks(2).run(out_of_order, Case("GPipe", 2, 2))
    assert "StructureError" in answer.kinds
    assert "has no I before it" in answer.message


def out_of_order(rank: int, group: dist.ProcessGroup, case: Case) -> None:
    (stage,) = make_stages(case, case.build(), rank, group)
    stage.has_backward = True
    stage.backward_weight_one_chunk(0)


def keyword_requires_grad(rank: int, group: dist.ProcessGroup, case: Case) -> None:
    model = case.build()
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    scale = torch.ones(12, 1, 1, dtype=torch.float64, requires_grad=rank == 0)
    schedule.step(*(model.inputs if rank == 0 else ()), target=model.target if rank else None, scale=scale)


def test_a_keyword_argument_that_requires_grad_is_refused() -> None:
    case = Case("GPipe", 2, 4, with_everything, size=3)
    answers = ranks(2).run(keyword_requires_grad, case, group_seconds=PATIENCE)
    for answer in answers if ANSWERS_UPSTREAM else answers[:1]:
        assert "only positional ones are differentiated" in answer.message
