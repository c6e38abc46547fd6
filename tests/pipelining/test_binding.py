"""The module of a pipeline stage is changed between steps, or by its forward: the next step trains it."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.pipelining import ScheduleGPipe
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.pipelining.binding import Place, Structure, read, update

ATEN = {"backend": "aten"}
OPTIONS = pytest.mark.parametrize("options", [{}, {"compile": ATEN}], ids=["eager", "aten"])
MICROBATCHES = 2


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[Any]:
    """A process group of this process alone."""
    with one_process() as group:
        yield group


class Net(nn.Module):
    """A module with containers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.dict = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
        self.last: nn.Module = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)
        self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.list:
            x = layer(x)
        for layer in self.dict.values():
            x = layer(x)
        x = self.head(self.last(x))
        return x if self.scale is None else x * self.scale


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Wrapped(nn.Module):
    """Somebody's own wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.gain = nn.Parameter(torch.full((4,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.gain


def assigned(net: Net) -> nn.Module:
    return Net()


def wrapped(net: Net) -> nn.Module:
    return Wrapped(net)


def put_in_a_sequential(net: Net) -> nn.Module:
    return nn.Sequential(net, nn.Linear(4, 4))


def attribute_replaced(net: Net) -> None:
    net.first = nn.Linear(4, 4, bias=False)


def by_one_of_the_same_names(net: Net) -> None:
    net.first = nn.Linear(4, 4)


def entry_of_a_sequential_replaced(net: Net) -> None:
    net.last[1] = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))


def appended_to_a_sequential(net: Net) -> None:
    net.last.append(nn.Linear(4, 4))


def appended_to_a_list(net: Net) -> None:
    net.list.append(nn.Linear(4, 4))


def inserted_into_a_list(net: Net) -> None:
    net.list.insert(0, nn.Linear(4, 4))


def deleted_from_a_list(net: Net) -> None:
    del net.list[0]


def put_into_a_dict(net: Net) -> None:
    net.dict["b"] = nn.Linear(4, 4)


def wider_inside(net: Net) -> None:
    net.first, net.list[0] = nn.Linear(4, 7), nn.Linear(7, 4)


def submodule_wrapped(net: Net) -> None:
    net.first = Wrapped(net.first)


def low_rank_adapters(net: Net) -> None:
    net.requires_grad_(False)
    net.last[1] = Wrapped(net.last[1])


def parametrized(net: Net) -> None:
    parametrize.register_parametrization(net.first, "weight", Twice())


def weight_norm(net: Net) -> None:
    parametrizations.weight_norm(net.first)


def old_weight_norm(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.first)


def spectral_norm(net: Net) -> None:
    parametrizations.spectral_norm(net.first)


def frozen_in_part(net: Net) -> None:
    net.first.requires_grad_(False)


def frozen_but_for_the_head(net: Net) -> None:
    net.requires_grad_(False)
    net.head.requires_grad_(True)


def parameter_replaced(net: Net) -> None:
    net.first.weight = nn.Parameter(torch.randn(4, 4))


def parameter_of_another_shape(net: Net) -> None:
    net.first.weight = nn.Parameter(torch.randn(6, 4))
    net.first.bias = nn.Parameter(torch.randn(6))
    net.list[0] = nn.Linear(6, 4)


def parameter_where_there_was_none(net: Net) -> None:
    net.scale = nn.Parameter(torch.randn(4))


def parameter_taken_away(net: Net) -> None:
    net.first.bias = None


def tied(net: Net) -> None:
    net.first.weight = net.head.weight


def a_new_parameter_by_setattr_of_data(net: Net) -> None:
    net.first.weight.data = torch.randn(4, 4)


def loaded_by_assignment(net: Net) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()}, assign=True)


def loaded_in_place(net: Net) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()})


def buffer_replaced(net: Net) -> None:
    net.dict["norm"].running_mean = torch.ones(4)


def in_evaluation_mode(net: Net) -> None:
    net.dict["norm"].eval()


def activation_replaced(net: Net) -> None:
    net.list[1] = nn.ReLU()


def class_replaced(net: Net) -> None:
    net.__class__ = type("Doubling", (Net,), {"forward": lambda self, x: 2 * Net.forward(self, x)})


CHANGES = [
    assigned,
    wrapped,
    put_in_a_sequential,
    attribute_replaced,
    by_one_of_the_same_names,
    entry_of_a_sequential_replaced,
    appended_to_a_sequential,
    appended_to_a_list,
    inserted_into_a_list,
    deleted_from_a_list,
    put_into_a_dict,
    wider_inside,
    submodule_wrapped,
    low_rank_adapters,
    parametrized,
    weight_norm,
    old_weight_norm,
    spectral_norm,
    frozen_in_part,
    frozen_but_for_the_head,
    parameter_replaced,
    parameter_of_another_shape,
    parameter_where_there_was_none,
    parameter_taken_away,
    tied,
    a_new_parameter_by_setattr_of_data,
    loaded_by_assignment,
    loaded_in_place,
    buffer_replaced,
    in_evaluation_mode,
    activation_replaced,
    class_replaced,
]
Change = Callable[[Any], nn.Module | None]


def changed(module: nn.Module, change: Change | None) -> nn.Module:
    torch.manual_seed(11)  # both modules get the same
    new = change(module) if change else None
    return module if new is None else new


def plain_step(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    outputs = []
    for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
        outputs.append(module(part))
        (functional.mse_loss(outputs[-1], wanted) / MICROBATCHES).backward()
    return torch.cat(outputs).detach()


def assert_trains_through(module: nn.Module, changes: list[Change | None], options: dict[str, Any]) -> None:
    """Run a step after each change, and compare with the module on its own."""
    reference = copy.deepcopy(module)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", **options)
    loss_fn = functional.mse_loss
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss_fn)
    for change in changes:
        reference = changed(reference, change)
        stage.submod = changed(stage.submod, change)
        torch.manual_seed(5)
        x, target = torch.randn(8, 4), torch.randn(8, 4)
        for each in (reference, stage.submod):
            each.zero_grad()
        expected = plain_step(reference, x, target)
        output = schedule.step(x, target=target)
        torch.testing.assert_close(output, expected)
        found = {name: p.grad for name, p in stage.submod.named_parameters()}
        wanted = {name: p.grad for name, p in reference.named_parameters()}
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            {name: None if grad is None else grad for name, grad in stage.grads.items()},
            {name: wanted[name] for name in stage.params},
        )
        torch.testing.assert_close(dict(stage.submod.named_buffers()), dict(reference.named_buffers()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@OPTIONS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_taken_up(change: Change, options: dict[str, Any]) -> None:
    assert_trains_through(net(), [None, change, None], options)


READ_AS_BEFORE = {
    *(parameter_replaced, a_new_parameter_by_setattr_of_data, loaded_by_assignment, loaded_in_place),
    *(buffer_replaced, in_evaluation_mode),
}


@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda change: change and change.__name__)
def test_a_structure_is_equal_until_the_module_is_another_to_read(change: Change | None) -> None:
    module = net()
    before, parts = Structure.of(module), parts_of(module)
    new = changed(module, change)
    after = Structure.of(new)
    same = change is None or change in READ_AS_BEFORE
    assert (before == after) is same
    assert (before != after) is not same
    assert (hash(before) == hash(after)) is same
    assert before != before.key
    assert before.same_modules(after) is (parts == parts_of(new))


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module, type]]:
    return [(name, part, type(part)) for name, part in module.named_modules(remove_duplicate=False)]


@OPTIONS
def test_changes_may_follow_each_other(options: dict[str, Any]) -> None:
    def thaw(module: nn.Module) -> None:
        module.requires_grad_(True)

    steps = [None, frozen_but_for_the_head, thaw, appended_to_a_list, parametrized, wrapped, None, assigned]
    assert_trains_through(net(), steps, options)


@OPTIONS
@pytest.mark.parametrize("with_loss", [False, True])
def test_a_stage_that_is_wholly_frozen_and_thawed_trains_again(
    with_loss: bool, options: dict[str, Any]
) -> None:
    module = net()
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", **options)
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    module.requires_grad_(False)
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss if with_loss else None)
    schedule.step(x, **({"target": target} if with_loss else {}))
    assert all(p.grad is None for p in module.parameters())
    module.requires_grad_(True)
    ScheduleGPipe(stage, MICROBATCHES, loss_fn=functional.mse_loss).step(x, target=target)
    assert all(p.grad is not None for p in module.parameters())


@OPTIONS
def test_a_module_cast_between_steps_is_computed_in_its_new_dtype(options: dict[str, Any]) -> None:
    module = nn.Linear(4, 4)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", **options)
    x = torch.randn(4, 4)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: y.float().square().mean())
    schedule.step(x, target=x)
    module.bfloat16()
    with pytest.raises(fs.LeafError, match=r"its forward fails on the inputs that it gets, \(float32"):
        schedule.step(x, target=x)
    assert module.weight.grad.dtype == torch.bfloat16
    module.float().zero_grad()
    output = schedule.step(x, target=x)
    torch.testing.assert_close(output, module(x).detach())


class Casts(nn.Linear):
    """Computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


@OPTIONS
def test_a_last_stage_may_return_another_dtype_than_before(options: dict[str, Any]) -> None:
    module = Casts(4, 4)
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", **options)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: y.square().mean())
    x = torch.randn(4, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module.to(dtype).zero_grad()
        output = schedule.step(x, target=x)
        assert output.dtype == module.weight.grad.dtype == dtype


# What a forward does to buffers.


class Growing(nn.Module):
    """Keeps what it saw, up to a number of rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.seen.mean(0)
        self.seen = torch.cat([self.seen, x.detach()])[-self.rows :]
        return y


class Recasting(Growing):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.seen.mean(0).float()
        self.seen = self.seen.double() + 1
        return y


@OPTIONS
@pytest.mark.parametrize(
    "make",
    [lambda: Growing(100), lambda: Growing(6), lambda: Growing(1), lambda: Recasting(1)],
    ids=["grows", "grows, then moves", "stays", "another dtype"],
)
def test_a_buffer_may_change_its_shape_in_the_forward(make: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_trains_through(make(), [None, None, None], options)


class Registering(nn.Module):
    """Registers its buffer when it first runs, and updates it from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if "mean" not in self._buffers:
            self.register_buffer("mean", torch.zeros(4))
        else:
            self.mean.mul_(0.5).add_(1)
        return self.layer(x) + self.mean


def test_a_buffer_may_be_registered_in_the_forward() -> None:
    torch.manual_seed(0)
    assert_trains_through(Registering(), [None, None], {})


class Decaying(nn.Module):
    """A factor that the backward reads again, and the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("factor", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.factor
        self.factor = self.factor * 0.5
        return y


@pytest.mark.parametrize(
    "compile", [False, ATEN, ATEN | {"remat": "none"}, ATEN | {"remat": "full"}], ids=str
)
def test_each_microbatch_goes_backward_with_the_buffers_that_it_went_forward_with(compile: Any) -> None:
    torch.manual_seed(0)
    reference, module = Decaying(), Decaying()
    module.load_state_dict(reference.state_dict())
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    schedule = ScheduleGPipe(
        FunctionalPipelineStage(module, 0, 1, "cpu", compile=compile), 4, loss_fn=functional.mse_loss
    )
    for _ in range(2):
        module.zero_grad()
        reference.zero_grad()
        schedule.step(x, target=target)
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            (functional.mse_loss(reference(part), wanted) / 4).backward()
        torch.testing.assert_close(module.layer.weight.grad, reference.layer.weight.grad)
        torch.testing.assert_close(module.factor, reference.factor)


# The module of a functional stage, which lends its code alone.


OTHER_PARAMETERS = [
    attribute_replaced,
    appended_to_a_sequential,
    appended_to_a_list,
    inserted_into_a_list,
    deleted_from_a_list,
    put_into_a_dict,
    submodule_wrapped,
    low_rank_adapters,
    parametrized,
    weight_norm,
    old_weight_norm,
]


def engine(apply: Any, options: dict[str, Any]) -> Any:
    """A stage function, compiled where the options say so."""
    return fs.compile(apply, **options["compile"]) if options else apply


@OPTIONS
@pytest.mark.parametrize("change", OTHER_PARAMETERS, ids=lambda change: change.__name__)
def test_a_functional_stage_refuses_a_module_that_has_got_other_parameters(
    change: Change, options: dict[str, Any]
) -> None:
    module = net()
    apply, params, buffers = fs.functionalize(module)
    stage = engine(apply, options)
    x = torch.randn(8, 4)
    fs.stage_vjp(stage, params, buffers, x)
    change(module)
    with pytest.raises(fs.StructureError, match=r"changed after functionalize.* Call functionalize again"):
        fs.stage_vjp(stage, params, buffers, x)
    apply, params, buffers = fs.functionalize(module)
    output, _, _ = fs.stage_vjp(engine(apply, options), params, buffers, x)
    torch.testing.assert_close(output, module(x).detach())


@OPTIONS
@pytest.mark.parametrize("change", [by_one_of_the_same_names, parameter_replaced, activation_replaced])
def test_a_functional_stage_takes_the_code_of_a_module_that_has_the_same_parameters(
    change: Change, options: dict[str, Any]
) -> None:
    module = net()
    apply, params, buffers = fs.functionalize(module)
    stage = engine(apply, options)
    x = torch.randn(8, 4)
    fs.stage_vjp(stage, params, buffers, x)
    change(module)
    output, _, _ = fs.stage_vjp(stage, params, buffers, x)
    expected = torch.func.functional_call(module, {**params, **{n: b.clone() for n, b in buffers.items()}}, x)
    torch.testing.assert_close(output, expected)


class Tripled(Net):
    """Another class of the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Negated(nn.Linear):
    """Another layer of the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def class_assigned(module: Net) -> None:
    module.__class__ = Tripled


def class_of_a_submodule_assigned(module: Net) -> None:
    module.head.__class__ = Negated


def forward_assigned(module: Net) -> None:
    module.forward = types.MethodType(lambda self, x: self.head(x) * 3, module)


def forward_of_a_submodule_assigned(module: Net) -> None:
    module.head.forward = lambda x: x * 2


@OPTIONS
@pytest.mark.parametrize(
    "change",
    [class_assigned, class_of_a_submodule_assigned, forward_assigned, forward_of_a_submodule_assigned],
)
def test_a_functional_stage_takes_the_code_that_is_assigned_later(
    change: Change, options: dict[str, Any]
) -> None:
    module = net()
    apply, params, buffers = fs.functionalize(module)
    stage = engine(apply, options)
    x = torch.randn(8, 4)
    for _ in range(2):  # the second is recognised at a glance
        before, _, _ = fs.stage_vjp(stage, params, buffers, x)
    change(module)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    leaf = x.clone().requires_grad_()
    state = {**params, **{name: buffer.clone() for name, buffer in buffers.items()}}
    expected = torch.func.functional_call(module, state, leaf)
    torch.testing.assert_close(output, expected.detach())
    assert not torch.equal(output, before)
    (input_grad,), _ = pullback(torch.ones_like(output))
    torch.testing.assert_close(input_grad, torch.autograd.grad(expected.sum(), leaf)[0])


def a_bias_removed(module: Net) -> None:
    module.head.bias = None


def a_parameter_put_where_there_was_none(module: Net) -> None:
    module.scale = nn.Parameter(torch.ones(4))


@OPTIONS
@pytest.mark.parametrize("change", [a_bias_removed, a_parameter_put_where_there_was_none])
def test_a_functional_stage_refuses_a_module_with_a_parameter_more_or_less(
    change: Change, options: dict[str, Any]
) -> None:
    module = net()
    apply, params, buffers = fs.functionalize(module)
    stage = engine(apply, options)
    x = torch.randn(8, 4)
    for _ in range(2):
        fs.stage_vjp(stage, params, buffers, x)
    change(module)
    for _ in range(2):
        with pytest.raises(
            fs.StructureError, match=r"changed after functionalize.* Call functionalize again"
        ):
            fs.stage_vjp(stage, params, buffers, x)


# Refusals.


def offloaded(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)), offload_policy=CPUOffloadPolicy(False))


@OPTIONS
def test_a_module_that_is_wrapped_between_steps_is_refused_and_nothing_is_changed(
    options: dict[str, Any],
) -> None:
    stage = FunctionalPipelineStage(nn.Linear(4, 4), 0, 1, "cpu", **options)
    schedule = ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
    x = torch.randn(4, 4)
    schedule.step(x, target=x)
    plain = stage.submod
    for submod, said in (
        (offloaded(nn.Linear(4, 4)), "offload_policy"),
        (nn.DataParallel(nn.Linear(4, 4)), "DataParallel"),
        (torch.compile(nn.Linear(4, 4)), "torch.compile"),
        (functional.relu, "must be an nn.Module"),
    ):
        before = {name: p.grad.clone() for name, p in plain.named_parameters()}
        stage.submod = submod
        for _ in range(2):  # it is not taken for old the second time
            with pytest.raises(fs.StructureError, match=said):
                schedule.step(x, target=x)
        torch.testing.assert_close({name: p.grad for name, p in plain.named_parameters()}, before)
    stage.submod = plain
    schedule.step(x, target=x)


def test_buffers_are_put_into_the_module_as_values_of_its_own() -> None:
    module = nn.Module()
    module.register_buffer("same", torch.zeros(2))
    module.register_buffer("grown", torch.zeros(2))
    places = {name: Place(module, name) for name in ("same", "grown")}
    before, of = read(places), torch.ones(2, requires_grad=True)
    after = {"same": of * 2, "grown": torch.cat([of, of])}
    assert update(places, before, after)
    with torch.no_grad():
        for value in after.values():
            value.zero_()
    for name, wanted in (("same", torch.full((2,), 2.0)), ("grown", torch.ones(4))):
        found = module.get_buffer(name)
        assert not found.requires_grad
        assert torch.equal(found, wanted)
    assert module.get_buffer("same") is before["same"]
