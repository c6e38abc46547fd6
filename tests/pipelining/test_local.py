"""The pipeline in one process against plain eager autograd on the model as a whole."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import SCHEDULES, ScheduleError, pipeline_value_and_grad

# Microbatches are summed in another order than a batch is; float64 leaves nothing else to differ.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Block(nn.Module):
    """Widths differ from stage to stage, so that a mixed-up stage cannot go unnoticed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build(*modules: nn.Module) -> list[nn.Module]:
    return [module.double() for module in modules]


def uneven(num_stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    widths = [3 + (7 * i) % 5 for i in range(num_stages + 1)]
    return build(*(Block(a, b) for a, b in itertools.pairwise(widths)))


def ends(modules: list[nn.Module]) -> tuple[int, int]:
    return modules[0].layers[0].in_features, modules[-1].layers[2].out_features


def pipelined(
    modules: list[nn.Module], inputs: Any, targets: Any, *, loss_fn: Any = functional.mse_loss, **options: Any
) -> tuple[Tensor, list[Any], list[Any]]:
    stages = [fs.functionalize(module) for module in modules]
    step = pipeline_value_and_grad(stages, loss_fn, **options)
    return step([s.params for s in stages], [s.buffers for s in stages], inputs, targets)


def eager(modules: list[nn.Module], inputs: Any, targets: Any, loss_fn: Any = functional.mse_loss) -> Tensor:
    """Run the whole model on the whole batch; leaves the gradients in `.grad`."""
    value = inputs
    for module in modules:
        value = module(*value) if type(value) is tuple else module(value)
    loss = loss_fn(value, targets)
    loss.backward()
    return loss.detach()


def assert_grads_match(modules: list[nn.Module], param_grads: list[Any]) -> None:
    assert len(param_grads) == len(modules)
    for module, grads in zip(modules, param_grads, strict=True):
        assert list(grads) == [name for name, _ in module.named_parameters()]
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                assert grads[name] is None
            else:
                torch.testing.assert_close(grads[name], parameter.grad, **CLOSE)


def microbatches_for(schedule: str, num_stages: int) -> int:
    return max(4, num_stages)


# V-shaped schedules have two stages a rank.
POSSIBLE = [
    (schedule, num_stages)
    for schedule in SCHEDULES
    for num_stages in (1, 2, 3, 4, 6, 8)
    if num_stages % 2 == 0 or schedule not in ("ZBVZeroBubble", "DualPipeV")
]


@pytest.mark.parametrize(("schedule", "num_stages"), POSSIBLE)
def test_loss_and_gradients_are_those_of_the_whole_model(schedule: str, num_stages: int) -> None:
    modules = uneven(num_stages)
    count = microbatches_for(schedule, num_stages)
    fan_in, fan_out = ends(modules)
    x = torch.randn(3 * count, fan_in, dtype=torch.float64)
    y = torch.randn(3 * count, fan_out, dtype=torch.float64)
    loss, _, grads = pipelined(modules, x, y, schedule=schedule, num_microbatches=count)
    torch.testing.assert_close(loss, eager(modules, x, y), **CLOSE)
    assert_grads_match(modules, grads)


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5, 12])
def test_zero_bubble_takes_any_number_of_microbatches(num_microbatches: int) -> None:
    modules = uneven(4)
    fan_in, fan_out = ends(modules)
    x = torch.randn(2 * num_microbatches, fan_in, dtype=torch.float64)
    y = torch.randn(2 * num_microbatches, fan_out, dtype=torch.float64)
    loss, _, grads = pipelined(modules, x, y, num_microbatches=num_microbatches)
    torch.testing.assert_close(loss, eager(modules, x, y), **CLOSE)
    assert_grads_match(modules, grads)


def test_a_sum_loss_comes_out_divided_by_the_number_of_microbatches() -> None:
    modules = uneven(2)
    fan_in, fan_out = ends(modules)
    x, y = torch.randn(8, fan_in, dtype=torch.float64), torch.randn(8, fan_out, dtype=torch.float64)

    def sum_loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    loss, _, grads = pipelined(modules, x, y, loss_fn=sum_loss, num_microbatches=4)
    whole = eager(modules, x, y, lambda output, target: sum_loss(output, target) / 4)
    torch.testing.assert_close(loss, whole, **CLOSE)
    assert_grads_match(modules, grads)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_buffers_go_through_the_microbatches_in_turn(schedule: str) -> None:
    torch.manual_seed(0)
    modules = build(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(4)))
    x, y = torch.randn(2, 16, 3, dtype=torch.float64).unbind()
    before = [{name: b.clone() for name, b in module.named_buffers()} for module in modules]
    loss, buffers, grads = pipelined(modules, x, y, schedule=schedule, num_microbatches=4)
    for module, kept in zip(modules, before, strict=True):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, kept[name])
    losses = [eager(modules, *part) for part in zip(x.chunk(4), y.chunk(4), strict=True)]
    for module, new in zip(modules, buffers, strict=True):
        torch.testing.assert_close(new, dict(module.named_buffers()), **CLOSE)
        for parameter in module.parameters():
            parameter.grad /= 4
    torch.testing.assert_close(loss, torch.stack(losses).mean(), **CLOSE)
    assert_grads_match(modules, grads)


class Named(NamedTuple):
    left: Tensor
    right: Tensor


class Fork(nn.Module):
    """One tensor in, two out, and an integer tensor that only passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.left(x), self.right(x), torch.arange(x.shape[0])


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor, index: Tensor) -> Named:
        return Named(self.left(left), self.right(right)[index])


class Merge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, named: Named) -> dict[str, Tensor]:
        return {"sum": self.scale * (named.left + named.right)}


class Pick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, values: dict[str, Tensor]) -> Tensor:
        return self.layer(values["sum"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tuples_become_arguments_and_other_structures_stay_whole(schedule: str) -> None:
    torch.manual_seed(0)
    modules = build(Fork(), Join(), Merge(), Pick())
    x = torch.randn(8, 3, dtype=torch.float64)
    y = torch.randn(8, 2, dtype=torch.float64)
    loss, _, grads = pipelined(modules, x, y, schedule=schedule, num_microbatches=4)
    torch.testing.assert_close(loss, eager_by_parts(modules, x, y, 4), **CLOSE)
    assert_grads_match(modules, grads)


def eager_by_parts(modules: list[nn.Module], x: Tensor, y: Tensor, count: int) -> Tensor:
    parts = zip(x.chunk(count), y.chunk(count), strict=True)
    losses = [eager(modules, a, b, lambda o, t: functional.mse_loss(o, t) / count) for a, b in parts]
    return torch.stack(losses).sum()


class TokensAndMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        assert batch["name"] == "a constant"
        return self.embedding(batch["tokens"]) * batch["mask"][..., None]


def test_inputs_and_targets_may_be_dicts_of_tensors_and_constants() -> None:
    torch.manual_seed(0)
    modules = build(TokensAndMask(), nn.Linear(3, 11))
    inputs = {
        "tokens": torch.randint(11, (8, 5)),
        "mask": torch.rand(8, 5, dtype=torch.float64),
        "name": "a constant",
    }
    targets = {"next": torch.randint(11, (8, 5)), "smoothing": 0.1, "absent": None}

    def loss_fn(logits: Tensor, targets: dict[str, Any]) -> Tensor:
        return functional.cross_entropy(
            logits.flatten(0, 1), targets["next"].flatten(), label_smoothing=targets["smoothing"]
        )

    loss, _, grads = pipelined(modules, inputs, targets, loss_fn=loss_fn, num_microbatches=4)
    torch.testing.assert_close(loss, eager(modules, inputs, targets, loss_fn), **CLOSE)
    assert_grads_match(modules, grads)


def test_a_tuple_of_inputs_becomes_the_arguments_of_the_first_stage() -> None:
    torch.manual_seed(0)
    modules = build(nn.Bilinear(3, 2, 4), nn.Linear(4, 2))
    x = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    y = torch.randn(8, 2, dtype=torch.float64)
    loss, _, grads = pipelined(modules, x, y, num_microbatches=2)
    torch.testing.assert_close(loss, eager(modules, x, y), **CLOSE)
    assert_grads_match(modules, grads)


class Ignore(nn.Module):
    """Does not look at the values of its input, even where that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * 3


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum()


@pytest.mark.parametrize("first", [nn.Linear(3, 2), Total()], ids=["tensor", "scalar"])
def test_a_stage_that_nothing_depends_on_gets_no_gradient(first: nn.Module) -> None:
    modules = build(first, Ignore())
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    _, _, grads = pipelined(modules, x, y, loss_fn=lambda o, t: (o - t).square().mean(), num_microbatches=2)
    eager(modules, x, y, lambda o, t: (o - t).square().mean())
    torch.testing.assert_close(grads[1]["weight"], modules[1].weight.grad, **CLOSE)
    assert all(grad is None or not grad.any() for grad in grads[0].values())


def test_nothing_given_is_mutated_and_a_second_step_gives_the_same() -> None:
    modules = build(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    stages = [fs.functionalize(module) for module in modules]
    params, buffers = [s.params for s in stages], [s.buffers for s in stages]
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    given = [*(t for tree in (*params, *buffers) for t in tree.values()), x, y]
    kept = [t.clone() for t in given]
    step = pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=4)
    first = step(params, buffers, x, y)
    second = step(params, buffers, x, y)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_gradients_come_also_where_grad_mode_is_off() -> None:
    modules = uneven(2)
    fan_in, fan_out = ends(modules)
    x, y = torch.randn(4, fan_in, dtype=torch.float64), torch.randn(4, fan_out, dtype=torch.float64)
    with torch.no_grad():
        loss, _, grads = pipelined(modules, x, y, num_microbatches=2)
    torch.testing.assert_close(loss, eager(modules, x, y), **CLOSE)
    assert_grads_match(modules, grads)


def test_hand_written_stages_take_any_pytree_of_parameters() -> None:
    def scale(params: Any, buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
        return params[0] * x + params[1]["shift"], buffers + 1

    step = pipeline_value_and_grad([scale, scale], lambda o, t: (o * t).mean(), num_microbatches=2)
    params = [(torch.tensor(2.0), {"shift": torch.tensor(0.5)})] * 2
    loss, buffers, grads = step(params, [0, 10], torch.ones(4), torch.ones(4))
    assert (loss.item(), buffers) == (5.5, [2, 12])
    assert (grads[0][0].item(), grads[0][1]["shift"].item()) == (2.0, 2.0)
    assert (grads[1][0].item(), grads[1][1]["shift"].item()) == (2.5, 1.0)


def test_an_exception_of_a_stage_comes_through_unchanged() -> None:
    def broken(params: Any, buffers: Any, x: Tensor) -> Any:
        raise LookupError("of the user's own")

    step = pipeline_value_and_grad([broken, broken], functional.mse_loss, num_microbatches=2)
    with pytest.raises(LookupError, match="of the user's own"):
        step([{}, {}], [{}, {}], torch.ones(4), torch.ones(4))


def never(*_: Any) -> Any:
    raise AssertionError("a refused call must run nothing")


@pytest.mark.parametrize(
    ("stages", "options", "says"),
    [
        (4, {"schedule": "ZB-H1", "num_microbatches": 4}, "no schedule 'ZB-H1'.*GPipe.*DualPipeV"),
        (3, {"num_microbatches": 4}, "multiple of 2; got 3 stages"),
        (0, {"num_microbatches": 4}, "num_stages must be a positive integer"),
        (2, {"num_microbatches": 0}, "num_microbatches must be a positive integer, got 0"),
        (2, {"num_microbatches": 2.0}, "num_microbatches must be a positive integer, got 2.0"),
        (
            4,
            {"schedule": "1F1B", "num_microbatches": 3},
            r"torch says: Number of microbatches \(3\) must be gr",
        ),
        (4, {"schedule": "DualPipeV", "num_microbatches": 3}, "at least as many microbatches as stages"),
        (
            8,
            {"schedule": "Interleaved1F1B", "num_microbatches": 9},
            r"multiple of the number of rounds \(2\)",
        ),
    ],
)
def test_numbers_that_a_schedule_cannot_run_are_refused(
    stages: int, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ScheduleError, match=says) as refusal:
        pipeline_value_and_grad([never] * stages, never, **options)
    assert isinstance(refusal.value, fs.StageError)


def test_modules_are_refused_as_stages_with_advice() -> None:
    with pytest.raises(fs.StructureError, match=r"stages\[1\].*Linear.*functionalize"):
        pipeline_value_and_grad([never, nn.Linear(2, 2)], never, num_microbatches=2)  # type: ignore[list-item]
    with pytest.raises(fs.StructureError, match="loss_fn must be a function"):
        pipeline_value_and_grad([never, never], None, num_microbatches=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "inputs", "says"),
    [
        ([{}], torch.ones(4), "params must be a list with one entry for each of the 2 stages, got 1 entries"),
        ({}, torch.ones(4), "params must be a list.*got dict"),
        (
            [{}, {}],
            torch.ones(5, 3),
            r"inputs must be cut .* 2 equal microbatches, but has 5 along dimension 0",
        ),
        ([{}, {}], {"a": [torch.ones(4), torch.ones(7)]}, r"inputs\['a'\]\[1\] must be cut .* has 7"),
        ([{}, {}], torch.tensor(1.0), "has no dimension"),
    ],
)
def test_a_step_refuses_what_does_not_fit_before_it_runs(params: Any, inputs: Any, says: str) -> None:
    step = pipeline_value_and_grad([never, never], never, num_microbatches=2)
    with pytest.raises(fs.StageError, match=says):
        step(params, [{}, {}], inputs, torch.ones(4))


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    modules = build(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(fs.LeafError, match=r"real scalar.*float64\[2, 3\]"):
        pipelined(modules, x, x, loss_fn=torch.sub, num_microbatches=2)
