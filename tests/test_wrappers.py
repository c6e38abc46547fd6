"""Modules that are wrapped for data parallelism are refused by name, wherever they are given."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from both_ways import ENGINES, eager, split, stage_of
from one_process import one_process
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DataParallel, DistributedDataParallel

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.testing import check_stage


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    with one_process():
        yield


def mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def sharded(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=mesh())


def replicated_by_fsdp(module: nn.Module) -> nn.Module:
    from torch.distributed._composable.replicate_with_fsdp import replicate as by_fsdp

    return by_fsdp(module, mesh=mesh())


def fully_sharded(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "FSDP": (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
        "FullyShardedDataParallel",
    ),
    "DDP": (DistributedDataParallel, "DistributedDataParallel"),
    "DataParallel": (DataParallel, "DataParallel"),
    "replicate": (replicate, "replicate"),
}


@pytest.fixture(params=WRAPPERS, ids=str)
def wrapped(request: Any) -> tuple[nn.Module, str]:
    wrap, said = WRAPPERS[request.param]
    torch.manual_seed(0)
    return wrap(nn.Linear(4, 4)), said


@pytest.mark.parametrize("place", ["whole", "submodule", "deep"])
def test_a_wrapped_module_is_refused_by_name(wrapped: tuple[nn.Module, str], place: str) -> None:
    module, said = wrapped
    if place != "whole":
        module = nn.Sequential(nn.Linear(4, 4), module)
    if place == "deep":
        module = nn.ModuleDict({"part": module})
    for take in (
        fs.functionalize,
        lambda m: check_stage(m, torch.randn(2, 4)),
        lambda m: FunctionalPipelineStage(m, 0, 1, "cpu"),
        lambda m: FunctionalPipelineStage(m, 0, 1, "cpu", compile={"backend": "aten"}),
    ):
        with pytest.raises(fs.StructureError, match=said.split()[-1]) as refused:
            take(module)
        assert "data_parallel" in str(refused.value)  # the way out


class Aside(nn.Module):
    """Calls its submodule through a wrapper that is none of its submodules, in any of several places."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], place: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        wrapped = wrap(self.inner)
        self.call: Any = {
            "list": [wrapped],
            "partial": partial(wrapped),
            "method": wrapped.forward,
            "closure": lambda x: wrapped(x),
            "attribute": None,
        }[place]
        if place == "attribute":
            object.__setattr__(self, "call", wrapped)

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x) if isinstance(self.call, list) else self.call(x)


@pytest.mark.parametrize("place", ["list", "partial", "method", "closure", "attribute"])
@pytest.mark.parametrize("wrap", [DistributedDataParallel, DataParallel], ids=lambda wrap: wrap.__name__)
def test_a_wrapper_around_a_submodule_is_refused_that_is_kept_aside(wrap: Any, place: str) -> None:
    module = Aside(wrap, place)
    for take in (fs.functionalize, lambda m: FunctionalPipelineStage(m, 0, 1, torch.device("cpu"))):
        with pytest.raises(fs.StructureError, match=rf"'inner' is wrapped by {wrap.__name__}.*Call that sub"):
            take(module)
    module.call = module.inner
    assert set(fs.functionalize(module).params) == {"inner.weight", "inner.bias"}


def test_a_module_may_know_a_wrapper_around_itself() -> None:
    module = nn.Linear(4, 4)
    module.trainer = [DistributedDataParallel(module)]  # as trainers of libraries hold it
    assert set(fs.functionalize(module).params) == {"weight", "bias"}


class Renaming(nn.Module):
    """Wraps a module, and names its parameters, or its buffers, as that does."""

    def __init__(self, module: nn.Module, what: str) -> None:
        super().__init__()
        self.module, self.what = module, what

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        of = self.module if self.what == "parameters" else super()
        return of.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return (self.module if self.what == "buffers" else super()).named_buffers(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize(
    "wrapped",
    [
        checkpoint_wrapper(nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.BatchNorm1d(4))),
        Renaming(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "parameters"),
        Renaming(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "buffers"),
    ],
    ids=["checkpoints", "parameters", "buffers"],
)
def test_names_under_which_nothing_lies_are_refused_and_the_way_out_works(wrapped: nn.Module) -> None:
    for take in (fs.functionalize, lambda m: FunctionalPipelineStage(m, 0, 1, torch.device("cpu"))):
        with pytest.raises(fs.StructureError, match=r"holds none under that name: .* nn\.Sequential"):
            take(wrapped)
    check_stage(nn.Sequential(wrapped), torch.randn(3, 4))
    if isinstance(wrapped, Renaming):
        check_stage(wrapped.module, torch.randn(3, 4))


def test_a_wrapper_that_hides_a_prefix_is_taken_where_attributes_lead_on() -> None:
    check_stage(checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4))), torch.randn(3, 4))


@pytest.mark.parametrize("wrap", [sharded, replicated_by_fsdp])
def test_what_fully_shard_has_worked_on_is_taken_but_not_copied(wrap: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)))
    assert len(fs.functionalize(module).params) == 4
    FunctionalPipelineStage(module, 0, 1, "cpu")
    with pytest.raises(fs.StructureError, match="before fully_shard"):
        check_stage(module, torch.randn(2, 4))


@pytest.mark.parametrize("option", ["data_parallel", "param_dtype", "grad_dtype"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stage_does_not_do_what_fully_shard_does_a_second_time(option: str, when: str) -> None:
    options = {option: mesh() if option == "data_parallel" else torch.bfloat16}
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def step() -> None:
        stage = FunctionalPipelineStage(module, 0, 1, "cpu", **options)
        sharded(module[1])
        ScheduleGPipe(stage, 1, loss_fn=mse_loss).step(torch.randn(2, 4), target=torch.randn(2, 4))

    if when == "before":
        sharded(module[1])
    with pytest.raises(fs.StructureError, match=rf"'1' was given to fully_shard.* {option}= .* Leave that"):
        step()


@pytest.mark.parametrize("wrap", [DataParallel, DistributedDataParallel])
def test_the_module_inside_of_a_wrapper_is_taken(wrap: Any) -> None:
    module = wrap(nn.Linear(4, 4)).module
    assert set(fs.functionalize(module).params) == {"weight", "bias"}


def test_parameters_of_parallelize_module_are_taken() -> None:
    torch.manual_seed(0)
    module, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    plain.load_state_dict(module.state_dict())
    parallelize_module(module, mesh(), ColwiseParallel())
    x = torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    _, grads = fs.stage_backward(pullback, torch.ones_like(output))
    plain(x).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name].full_tensor(), parameter.grad)


def test_importing_funcstage_loads_no_library_of_wrappers() -> None:
    look = (
        "import sys, torch; before = set(sys.modules); import funcstage; "
        "print([m for m in set(sys.modules) - before if 'fsdp' in m or m == 'torch._dynamo'])"
    )
    assert subprocess.check_output([sys.executable, "-c", look], text=True).strip() == "[]"


# Hooks of parameters, which are another way to change gradients.


def on_accumulator(parameter: nn.Parameter) -> Any:
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: None)
    return node


@pytest.mark.parametrize(
    "put",
    [
        lambda p: p.register_hook(lambda grad: grad * 2),
        lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
        on_accumulator,
    ],
    ids=["before", "after", "on the accumulator"],
)
def test_a_functional_stage_refuses_hooks_that_would_not_run(put: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    held = put(module[1].weight)
    with pytest.raises(fs.StructureError, match=r"'1.weight' has hooks .* FunctionalPipelineStage"):
        fs.functionalize(module)
    assert held is not None


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_hooks_that_are_put_on_a_parameter_later_are_refused_until_they_are_gone(engine: str) -> None:
    module, x = nn.Linear(4, 4), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    fs.stage_vjp(stage, params, buffers, x)
    handle = module.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(fs.StructureError, match="'weight' has hooks"):
        fs.stage_vjp(stage, params, buffers, x)
    handle.remove()
    fs.stage_vjp(stage, params, buffers, x)


def test_hooks_that_are_removed_or_on_frozen_parameters_are_no_reason_to_refuse() -> None:
    module = nn.Linear(4, 4)
    module.weight.register_hook(lambda grad: grad).remove()
    module.bias.register_hook(lambda grad: grad)
    module.bias.requires_grad_(False)
    assert set(fs.functionalize(module).params) == {"weight"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("place", ["it", "its submodule '1'"])
@pytest.mark.parametrize("how", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 4))])
def test_modules_of_torchscript_are_refused_by_name(how: Any, place: str) -> None:
    made = how(nn.Linear(4, 4))
    module = made if place == "it" else nn.Sequential(nn.Linear(4, 4), made)
    for take in (fs.functionalize, lambda m: FunctionalPipelineStage(m, 0, 1, torch.device("cpu"))):
        with pytest.raises(
            fs.StructureError, match=rf"{place} was made by torch\.jit\.script.*Pass the module"
        ):
            take(module)


class ByProxy(nn.Module):
    """Holds modules a second time, by weak proxies, which torch takes for submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.scale = nn.Linear(3, 3), nn.Parameter(torch.rand(3))
        self.again = weakref.proxy(self.own)
        self.own.owner = weakref.proxy(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) * self.own.owner.scale


@pytest.mark.parametrize("engine", ENGINES)
def test_weak_proxies_of_modules_are_what_they_stand_for(engine: str) -> None:
    module, x = ByProxy(), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    assert list(params) == ["scale", "own.weight", "own.bias"]
    found = split(stage_of(apply, engine), params, buffers, x)
    torch.testing.assert_close(found, eager(module, x))
