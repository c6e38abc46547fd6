"""Hooks of parameters run in our stages as in torch's, as often and on the same, under every schedule.

The same job runs on torch's stages and on ours, and what the hooks saw is compared.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from pipeline_cases import ONE_STAGE_A_RANK, V_SHAPED, Case, Model, make_schedule, make_stages, uneven
from pipeline_ranks import Raised, ranks, run
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional

import funcstage as fs
from funcstage._torch import pipelining as private
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage
from funcstage.pipelining.hooks import accumulate, captured

pytestmark = pytest.mark.timeout(600)

ATEN = {"backend": "aten"}
ENGINES = pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
Event = tuple[str, str, Any, Any]


class Log:
    """Hooks of every kind on every parameter, and what they saw."""

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self.events: list[Event] = []
        self.held = []  # accumulators live as long as somebody holds them, and their hooks with them
        for i, module in modules.items():
            for name, parameter in module.named_parameters():
                self.watch(f"{i}.{name}", parameter)

    def watch(self, name: str, parameter: nn.Parameter) -> None:
        def note(kind: str, value: Tensor | None) -> None:
            grad = None if parameter.grad is None else parameter.grad.clone()
            self.events.append((kind, name, None if value is None else value.clone(), grad))

        def halve(grad: Tensor) -> Tensor:
            note("halves", grad)
            return grad / 2

        parameter.register_hook(lambda grad: note("sees", grad))
        parameter.register_hook(halve)
        parameter.register_post_accumulate_grad_hook(lambda p: note("after", None))
        accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        accumulator.register_prehook(lambda grads: note("before node", grads[0]))
        accumulator.register_hook(lambda *_: note("after node", None))
        self.held.append(accumulator)


def logged(rank: int, group: dist.ProcessGroup, case: Case) -> tuple[list[Event], dict[str, Tensor | None]]:
    model = case.build()
    mine = case.stages_of(rank, group.size())
    log = Log({i: model.modules[i] for i in mine})
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    for _ in range(2):  # the second adds to what is there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            schedule.step(
                *(model.inputs if 0 in mine else ()),
                target=model.target if case.num_stages - 1 in mine else None,
            )
    grads = {f"{i}.{name}": p.grad for i in mine for name, p in model.modules[i].named_parameters()}
    return log.events, grads


def by_parameter(events: list[Event]) -> dict[str, list[Event]]:
    return {name: [e for e in events if e[1] == name] for name in sorted({e[1] for e in events})}


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hooks_run_as_often_and_on_what_they_do_in_torchs_stage(schedule: str, compile: Any) -> None:
    if schedule in V_SHAPED and private.EVERY_INPUT_RETURNS_A_GRADIENT:
        pytest.skip("torch 2.11's own stages cannot be neighbours on one rank with gloo")
    num_stages = 2 if schedule in ONE_STAGE_A_RANK else 4
    ours = run(2, logged, Case(schedule, num_stages, 4, compile=compile))
    theirs = run(2, logged, Case(schedule, num_stages, 4, torchs=tuple(range(num_stages))))
    for (events, grads), (expected, wanted) in zip(ours, theirs, strict=True):
        assert Counter(e[:2] for e in events) == Counter(e[:2] for e in expected)
        found, reference = by_parameter(events), by_parameter(expected)
        for name in reference:  # in the same order, with the same gradients, and the same `.grad` meanwhile
            assert [e[0] for e in found[name]] == [e[0] for e in reference[name]]
            torch.testing.assert_close([e[2:] for e in found[name]], [e[2:] for e in reference[name]])
        torch.testing.assert_close(grads, wanted)


TABLE = {
    ("GPipe", 0): {"sees": 4, "halves": 4, "before node": 4, "after": 4, "after node": 4},
    ("GPipe", 1): {"sees": 4, "halves": 4, "before node": 4, "after": 4, "after node": 4},
    ("InterleavedZeroBubble", 0): {"sees": 4, "halves": 4, "before node": 4, "after": 4, "after node": 4},
    ("InterleavedZeroBubble", 1): {"sees": 4, "halves": 4},
    ("InterleavedZeroBubble", 3): {"sees": 4, "halves": 4},
    ("ZBVZeroBubble", 0): {"sees": 4, "halves": 4, "before node": 4, "after": 4, "after node": 4},
    ("ZBVZeroBubble", 2): {"sees": 4, "halves": 4},
}
"""How often hooks run in a step of four microbatches, by schedule and stage."""


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stage"), TABLE)
def test_how_often_hooks_run_is_what_the_table_says(schedule: str, stage: int) -> None:
    num_stages = 2 if schedule in ONE_STAGE_A_RANK else 4
    answers = run(2, logged, Case(schedule, num_stages, 4))
    name = f"{stage}.first.weight"
    (events,) = (events for events, _ in answers if any(e[1] == name for e in events))
    counts = Counter(kind for kind, of, *_ in events if of == name)
    assert counts == {kind: 2 * n for kind, n in TABLE[schedule, stage].items()}  # of two steps


@pytest.mark.slow
def test_hooks_run_in_the_order_of_a_backward_of_the_whole_stage() -> None:
    model = uneven(1, 4)
    log = Log({0: model.modules[0]})
    model.loss_fn(model.modules[0](*model.inputs), model.target).backward()
    expected = [e[:2] for e in log.events]
    (answer,) = run(1, logged, Case("GPipe", 1, 1))
    assert [e[:2] for e in answer[0]][: len(expected)] == expected


# One stage in this process.

Stage = Callable[..., Any]


@pytest.fixture(scope="module")
def alone() -> Any:
    """A process group of this process alone."""
    with one_process() as group:
        yield group


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target.to(output.dtype))  # torch 2.11 takes no mixed dtypes


def trained(module: nn.Module, kind: Stage, microbatches: int = 2, steps: int = 1, **options: Any) -> None:
    stage = kind(module, 0, 1, torch.device("cpu"), **options)
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=loss)
    torch.manual_seed(1)
    for _ in range(steps):
        schedule.step(torch.randn(4, 4), target=torch.randn(4, 4))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


OPTIONS = pytest.mark.parametrize("options", [{}, {"compile": ATEN}], ids=["eager", "aten"])


def masks(module: nn.Module) -> None:
    module[0].weight.register_hook(lambda grad: grad * torch.eye(4))


def masks_under_no_parameter_of_its_own(module: nn.Module) -> None:
    module[2].bias.register_hook(lambda grad: torch.ones(4))  # a new tensor, which may not be added into


KEPT = torch.full((4,), 2.0)


def returns_what_somebody_keeps(module: nn.Module) -> None:
    module[0].bias.register_hook(lambda grad: KEPT)


def clips_each_microbatch(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))


def removed_again(module: nn.Module) -> None:
    module[0].weight.register_hook(lambda grad: grad * 0).remove()


def several(module: nn.Module) -> None:
    for factor in (2, 3):
        module[0].weight.register_hook(lambda grad, factor=factor: grad * factor + 1)


def scales_what_is_accumulated(module: nn.Module) -> None:
    def scale(parameter: Tensor) -> None:
        parameter.grad.mul_(0.5)

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(scale)


def before_the_accumulator(module: nn.Module) -> None:
    node = module[0].weight.expand_as(module[0].weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda grads: (grads[0] * 3,))
    module.kept_node = (node,)


def on_a_frozen_parameter(module: nn.Module) -> None:
    module[0].weight.register_hook(lambda grad: grad * 0)
    module[0].weight.requires_grad_(False)


def retains_grad(module: nn.Module) -> None:
    module[0].weight.retain_grad()


HOOKS = [
    masks,
    masks_under_no_parameter_of_its_own,
    returns_what_somebody_keeps,
    clips_each_microbatch,
    removed_again,
    several,
    scales_what_is_accumulated,
    before_the_accumulator,
    on_a_frozen_parameter,
    retains_grad,
]


@OPTIONS
@pytest.mark.parametrize("put", HOOKS, ids=lambda hook: hook.__name__)
def test_gradients_are_what_hooks_make_of_them(put: Any, options: dict[str, Any], alone: Any) -> None:
    modules = [layers(), layers()]
    for module, kind, given in zip(
        modules, (PipelineStage, FunctionalPipelineStage), ({}, options), strict=True
    ):
        put(module)
        trained(module, kind, steps=2, **given)
    theirs, ours = ({n: p.grad for n, p in module.named_parameters()} for module in modules)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(KEPT, torch.full((4,), 2.0))


@OPTIONS
def test_a_hook_may_be_put_on_and_taken_off_between_steps(options: dict[str, Any], alone: Any) -> None:
    grads = []
    for kind, given in ((PipelineStage, {}), (FunctionalPipelineStage, options)):
        module = layers()
        stage = kind(module, 0, 1, torch.device("cpu"), **given)
        schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        torch.manual_seed(1)
        handle = None
        for _ in range(3):
            module.zero_grad()
            schedule.step(torch.randn(4, 4), target=torch.randn(4, 4))
            grads.append(module[0].weight.grad)
            if handle:
                handle.remove()
            else:
                handle = module[0].weight.register_hook(lambda grad: grad * torch.eye(4))
    torch.testing.assert_close(grads[3:], grads[:3])


@OPTIONS
def test_an_optimizer_in_the_backward_steps_once_a_microbatch(options: dict[str, Any], alone: Any) -> None:
    counts, weights = [], []
    for kind, given in ((PipelineStage, {}), (FunctionalPipelineStage, options)):
        module = nn.Linear(4, 4)
        with torch.no_grad():
            module.weight.copy_(torch.eye(4))
            module.bias.zero_()
        optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in module.parameters()}
        steps: list[Tensor] = []

        def step(p: Tensor, optimizers: Any = optimizers, steps: Any = steps) -> None:
            steps.append(p)
            optimizers[p].step()
            optimizers[p].zero_grad()

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        trained(module, kind, steps=2, **given)
        counts.append(len(steps))
        weights.append(dict(module.named_parameters()))
        assert all(parameter.grad is None for parameter in module.parameters())
    assert counts == [8, 8]
    torch.testing.assert_close(weights[1], weights[0])


class HookError(Exception):
    """Of a user's own."""


@OPTIONS
def test_the_error_of_a_hook_comes_through(options: dict[str, Any], alone: Any) -> None:
    def fail(grad: Tensor) -> None:
        raise HookError("of the user")

    module = layers()
    module[0].weight.register_hook(fail)
    with pytest.raises(HookError, match="of the user") as caught:
        trained(module, FunctionalPipelineStage, **options)
    assert "hooks of parameters in W of microbatch 0" in "".join(caught.value.__notes__)


def test_hooks_see_gradients_in_the_dtype_of_the_parameters(alone: Any) -> None:
    module = layers()
    seen = []
    module[0].weight.register_hook(lambda grad: seen.append(grad.dtype))
    trained(module, FunctionalPipelineStage, param_dtype=torch.bfloat16)
    assert seen == [torch.float32] * 2
    assert module[0].weight.grad.dtype == torch.float32


def test_wide_gradients_stay_wide_where_there_are_hooks(alone: Any) -> None:
    grads = []
    for hooked in (False, True):
        module = layers().bfloat16()
        if hooked:
            module[0].weight.register_hook(lambda grad: None)
        stage = FunctionalPipelineStage(module, 0, 1, "cpu", grad_dtype=torch.float32)
        torch.manual_seed(1)
        x = torch.randn(8, 4).bfloat16()
        ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss).step(x, target=torch.zeros_like(x))
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert all(grad.dtype == torch.float32 for grad in grads[1].values())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-3)


# Parameters that several stages of a process have, and replicas.


class Tied(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight).tanh()


def tied(num_stages: int, batch: int) -> Model:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4).double())
    modules: list[nn.Module] = [Tied(weight) for _ in range(num_stages)]
    return Model(modules, (torch.randn(batch, 4).double(),), torch.randn(batch, 4).double())


def hook_on_a_shared_parameter(rank: int, group: dist.ProcessGroup, kind: str) -> tuple[int, Tensor]:
    case = Case("InterleavedZeroBubble", 2, 2, tied)
    model = case.build()
    weight = model.modules[0].weight
    seen = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(1)
        return grad * torch.eye(4, dtype=grad.dtype)

    if kind == "before":
        weight.register_hook(hook)
    else:
        weight.register_post_accumulate_grad_hook(lambda p: None)
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    schedule.step(*model.inputs, target=model.target)
    return len(seen), weight.grad


@pytest.mark.slow
def test_a_hook_of_a_shared_parameter_sees_the_gradient_of_each_stage() -> None:
    ((seen, grad),) = run(1, hook_on_a_shared_parameter, "before")
    model = tied(2, 4)
    for x, y in zip(model.inputs[0].chunk(2), model.target.chunk(2), strict=True):
        (model.loss_fn(nn.Sequential(*model.modules)(x), y) / 2).backward()
    assert seen == 4
    torch.testing.assert_close(grad, model.modules[0].weight.grad * torch.eye(4).double())


@pytest.mark.slow
def test_hooks_that_see_an_unfinished_gradient_are_refused() -> None:
    (answer,) = ranks(1).run(hook_on_a_shared_parameter, "after")
    assert isinstance(answer, Raised)
    assert "StructureError" in answer.kinds
    assert "another stage of this process" in answer.message


def test_replicas_of_a_parameter_that_another_stage_has_too_are_refused(alone: Any) -> None:
    module = layers()
    other = FunctionalPipelineStage(module, 0, 1, "cpu")
    with pytest.raises(
        fs.StructureError, match=r"'0.bias' is also .* another stage .* Leave `data_parallel` out"
    ):
        trained(module, FunctionalPipelineStage, data_parallel=alone)
    del other
    trained(module, FunctionalPipelineStage, data_parallel=alone)


def test_hooks_that_would_see_a_gradient_before_it_is_averaged_are_refused(alone: Any) -> None:
    module = layers()
    module[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(fs.StructureError, match=r"'0.weight' .* averaged after that"):
        trained(module, FunctionalPipelineStage, data_parallel=alone)


@pytest.mark.slow
def test_a_hook_that_torch_would_leave_out_without_a_word_is_named(recwarn: Any) -> None:
    run(2, warned, Case("InterleavedZeroBubble", 4, 4))


def warned(rank: int, group: dist.ProcessGroup, case: Case) -> None:
    model = case.build()
    mine = case.stages_of(rank, group.size())
    for i in mine:
        model.modules[i].first.weight.register_post_accumulate_grad_hook(lambda p: None)
    schedule = make_schedule(case, make_stages(case, model, rank, group), model.loss_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule.step(
            *(model.inputs if 0 in mine else ()),
            target=model.target if case.num_stages - 1 in mine else None,
        )
    said = {str(warning.message).split()[1] for warning in caught if "do not run" in str(warning.message)}
    assert said == {str(i) for i in mine if i != 0}, said


HOOKS: dict[str, Callable[[nn.Parameter], Any]] = {
    "of gradients": lambda p: p.register_hook(lambda grad: grad * 2),
    "after accumulation": lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
}


@ENGINES
@pytest.mark.parametrize("kind", HOOKS)
def test_a_functional_stage_refuses_hooks_that_are_put_on_later(kind: str, compile: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4))
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, **compile) if compile else apply
    x = torch.randn(2, 4)
    for _ in range(2):
        expected, _, _ = fs.stage_vjp(stage, params, buffers, x)
    handle = HOOKS[kind](module[2].weight)
    for _ in range(2):
        with pytest.raises(fs.StructureError, match=r"'2\.weight' has hooks.*handle\.remove\(\)"):
            fs.stage_vjp(stage, params, buffers, x)
    handle.remove()
    output, _, _ = fs.stage_vjp(stage, params, buffers, x)
    assert torch.equal(output, expected)


@ENGINES
@pytest.mark.parametrize(
    "put", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_functional_stage_runs_hooks_of_modules_that_are_put_on_later(put: str, compile: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, **compile) if compile else apply
    x = torch.randn(2, 4)
    for _ in range(2):
        fs.stage_vjp(stage, params, buffers, x)
    hooks: dict[str, Any] = {
        "register_forward_hook": lambda module, args, output: output * 2,
        "register_forward_pre_hook": lambda module, args: (args[0] * 2,),
        "register_full_backward_hook": lambda module, input_grads, _: (input_grads[0] * 2,),
    }
    getattr(module[1], put)(hooks[put])
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    (input_grad,), weight_pullback = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    grads = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
    torch.testing.assert_close([output, input_grad, *weight_pullback().values()], [expected.detach(), *grads])


def test_hooks_run_in_the_callers_no_grad_too() -> None:
    parameter, seen = nn.Parameter(torch.ones(3)), []
    parameter.register_hook(seen.append)
    with torch.no_grad():
        accumulate({"p": parameter}, {"p": torch.full((3,), 2.0)})
        found = captured({"p": parameter}, {"p": torch.full((3,), 5.0)})
    torch.testing.assert_close(seen, [torch.full((3,), 2.0), torch.full((3,), 5.0)])
    torch.testing.assert_close(parameter.grad, torch.full((3,), 2.0))
    torch.testing.assert_close(found, {"p": torch.full((3,), 5.0)})


def test_what_hooks_made_of_gradients_lies_in_memory_that_nothing_else_has() -> None:
    parameter, grad = nn.Parameter(torch.ones(3)), torch.ones(3)
    captured({"p": parameter}, {"p": grad})["p"].zero_()
    assert torch.equal(grad, torch.ones(3))
