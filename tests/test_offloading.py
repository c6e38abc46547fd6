"""Offloaded pullbacks: the gradients of eager, from residuals that went away and came back.

There is no second memory on the CPU. Here the host's own counts as a device's, so that residuals take all the
way there and back but for streams and pinned memory, which test_offloading_on_cuda.py is for.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage import away
from tests.support.checkpointed import Regions


class TakesGradients(nn.Module):
    """What only a plain tape can run."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        (force,) = torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)
        return self.last(force)


class Slices(nn.Module):
    """Residuals that are views of one memory, overlapping, apart, and of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        bits = y.detach().view(torch.int32)[:, 1:] % 2 == 0
        return y[:, :2] * self.a + y[:, 1:] * self.b + torch.where(bits, y[:, ::2] * self.c, 0)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)),
    "regions": Regions,
    "slices": Slices,
    "takes gradients": TakesGradients,
}
ENGINES = ("uncompiled", "none", "min_cut", "full")
CASES = [(name, engine) for name in MODULES for engine in ENGINES]


class Traffic:
    """Counts the bytes that go away and those that come back."""

    out = back = 0


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Let the CPU's memory be a device's."""
    traffic, sent, fetched = Traffic(), away._sent, away._fetched

    def send(memory: Tensor) -> Tensor:
        traffic.out += memory.nbytes
        return sent(memory)

    def fetch(memory: Tensor, device: torch.device) -> Tensor:
        traffic.back += memory.nbytes
        return fetched(memory, device)

    monkeypatch.setattr(away, "FAR", ("cpu",))
    monkeypatch.setattr(away, "_sent", send)
    monkeypatch.setattr(away, "_fetched", fetch)
    return traffic


class Split:
    """A stage after F, and what eager makes of it."""

    def __init__(self, name: str, engine: str) -> None:
        torch.manual_seed(0)
        self.module, self.x, self.grad = MODULES[name](), torch.randn(5, 3), torch.randn(5, 2)
        leaf = self.x.clone().requires_grad_()
        output = self.module(leaf)
        self.expected = [*torch.autograd.grad(output, [leaf, *self.module.parameters()], self.grad)]
        apply, self.params, buffers = fs.functionalize(self.module)
        if engine != "uncompiled":
            apply = fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
        self.output, _, self.pullback = fs.stage_vjp(apply, self.params, buffers, self.x)

    def check(self, input_grad: Any, param_grads: Any) -> None:
        found = [input_grad, *(param_grads[name] for name, _ in self.module.named_parameters())]
        torch.testing.assert_close(found, self.expected)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_offloaded_pullbacks_have_the_gradients_of_eager(far: Traffic, name: str, engine: str) -> None:
    split = Split(name, engine)
    held = split.pullback.nbytes
    offloaded = fs.offload(split.pullback)
    assert offloaded.nbytes == held
    assert held <= far.out <= held + 16 * len(optree.tree_leaves(offloaded, namespace="funcstage"))
    (dx,), weight_pullback = offloaded(split.grad)
    assert far.back == far.out
    waiting = fs.offload(weight_pullback)
    fs.prefetch(waiting)
    fs.prefetch(waiting)
    split.check(dx, waiting())
    assert far.back == far.out  # once, for all that was asked


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_offloaded_is_used_as_the_original_would_be(far: Traffic, engine: str) -> None:
    split = Split("layers", engine)
    offloaded = fs.offload(split.pullback)
    with pytest.raises(fs.ConsumedError, match="was offloaded: use what offload returned"):
        split.pullback(split.grad)
    with pytest.raises(fs.ConsumedError, match="was offloaded"):
        fs.offload(split.pullback)
    assert split.pullback.consumed
    assert "offloaded" in repr(offloaded)
    for _ in range(2):
        (dx,), weight_pullback = offloaded(split.grad, retain=True)
        waiting = fs.offload(weight_pullback)
        split.check(dx, waiting(retain=True))
        split.check(dx, waiting())
        with pytest.raises(fs.ConsumedError, match="was used before"):
            waiting()
        for verb in (fs.offload, fs.prefetch):
            with pytest.raises(fs.ConsumedError, match="was used before"):
                verb(waiting)
    assert "offloaded" not in repr(offloaded)


@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_sums_and_sites_of_offloaded_pullbacks_are_those_of_the_whole(
    far: Traffic, engine: str
) -> None:
    for way in ("pieces", "sum", "sites", "update", "copies"):
        split = Split("layers", engine)
        (dx,), weight_pullback = fs.offload(fs.offload(split.pullback))(split.grad)
        waiting = fs.offload(weight_pullback)
        if way == "pieces":
            split.check(dx, fs.stage_backward_weight(map(fs.offload, waiting.split(2))))
        elif way == "sum":
            split.check(dx, fs.stage_backward_weight(waiting))
        elif way == "sites":
            sums: dict[str, Tensor] = {}
            for site in waiting.sites:
                for name, grad in site.vjp(site.cotangent).items():
                    sums[name] = grad + sums.get(name, 0)
            split.check(dx, sums)
            split.check(dx, waiting())
        elif way == "update":
            updated, _ = fs.stage_backward_weight(
                waiting, update=lambda param, grad, state: (param - grad, state)
            )
            split.check(dx, {name: split.params[name] - updated[name] for name in updated})
        else:
            twin = copy.copy(waiting)
            deep = copy.deepcopy(twin)
            for one in (waiting, deep, twin):
                split.check(dx, one())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["layers", "regions"])
def test_a_first_stage_and_its_pieces_wait_as_well(far: Traffic, name: str, engine: str) -> None:
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(5, 3)
    expected = torch.autograd.grad(module(x).sum(), [*module.parameters()])
    apply, params, buffers = fs.functionalize(module)
    if engine != "uncompiled":
        apply = fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=())
    _, weight_pullback = fs.offload(pullback)(torch.ones_like(output))
    pieces = [fs.offload(piece) for piece in fs.offload(weight_pullback).split(2)]
    grads = fs.stage_backward_weight(pieces)
    torch.testing.assert_close([*grads.values()], [*expected])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["before", "after", "on its way back"])
def test_a_write_into_what_was_offloaded_is_noticed(far: Traffic, engine: str, when: str) -> None:
    split = Split("layers", engine)
    if when == "before":
        split.x.add_(1)
    offloaded = fs.offload(split.pullback)
    if when == "on its way back":
        fs.prefetch(offloaded)
    if when != "before":
        split.x.add_(1)
    with pytest.raises(fs.WrittenError, match=r"args\[0\] .* of \w+ was written in place after F"):
        offloaded(split.grad)[1]()
    assert not offloaded.consumed or engine == "full"


@pytest.mark.parametrize("engine", ENGINES)
def test_writes_into_what_nothing_reads_are_let_alone(far: Traffic, engine: str) -> None:
    split = Split("layers", engine)
    (dx,), weight_pullback = fs.offload(split.pullback)(split.grad)
    split.x.add_(1)  # I has run, on a copy that W goes on with
    split.output.add_(1)
    split.check(dx, fs.offload(weight_pullback)())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_into_a_parameter_is_noticed_as_ever(far: Traffic, engine: str) -> None:
    split = Split("layers", engine)
    offloaded = fs.offload(split.pullback)
    with torch.no_grad():
        split.params["3.weight"].add_(1)
    with pytest.raises(fs.WrittenError, match="written in place"):
        offloaded(split.grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_captured_tensor_that_was_offloaded_is_watched(far: Traffic, engine: str) -> None:
    scale = torch.randn(4, 3)

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * scale * params["w"], buffers

    function: Any = apply
    if engine != "uncompiled":
        function = fs.compile(function, backend="aten", remat=engine)  # type: ignore[arg-type]
    output, _, pullback = fs.stage_vjp(function, {"w": torch.randn(3)}, {}, torch.randn(4, 3))
    offloaded = fs.offload(pullback)
    scale.mul_(2)
    with pytest.raises(fs.WrittenError, match="scale"):
        offloaded(torch.ones_like(output))[1]()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["pullback", "weight pullback"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["layers", "regions"])
def test_nobody_holds_the_memory_of_what_was_offloaded(
    far: Traffic, name: str, engine: str, which: str
) -> None:
    module = MODULES[name]()
    apply, params, buffers = fs.functionalize(module)
    if engine != "uncompiled":
        apply = fs.compile(apply, backend="aten", remat=engine)  # type: ignore[arg-type]
    x = torch.randn(5, 3)
    output, _, found = fs.stage_vjp(apply, params, buffers, x)
    pullback: Any = found
    kept = [*params.values(), *buffers.values()]
    if which == "weight pullback":
        _, pullback = found(torch.ones_like(output))
    elif engine == "uncompiled":
        kept.append(x)  # the tape that I runs back over ends there
    mine = {tensor.untyped_storage()._cdata for tensor in kept}
    leaves: Any = optree.tree_leaves(pullback, namespace="funcstage")
    stays = [leaf.untyped_storage() for leaf in leaves if leaf.untyped_storage()._cdata not in mine]
    del output, found, x, kept, leaves
    memory = [weakref.ref(storage) for storage in stays]
    assert memory
    offloaded = fs.offload(pullback)
    del pullback, stays
    gc.collect()
    assert [storage() for storage in memory] == [None] * len(memory)
    assert not offloaded.consumed


def test_on_the_cpu_nothing_is_copied() -> None:
    split = Split("layers", "uncompiled")
    before = [leaf.data_ptr() for leaf in optree.tree_leaves(split.pullback, namespace="funcstage")]  # type: ignore[arg-type]
    offloaded = fs.offload(split.pullback)
    assert [leaf.data_ptr() for leaf in optree.tree_leaves(offloaded, namespace="funcstage")] == before  # type: ignore[arg-type]
    with pytest.raises(fs.ConsumedError, match="was offloaded"):
        split.pullback(split.grad)
    (dx,), weight_pullback = offloaded(split.grad)
    fs.prefetch(weight_pullback)
    split.check(dx, fs.offload(weight_pullback)())


def test_what_is_differentiated_in_turn_is_refused_and_stays_usable(far: Traffic) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    with pytest.raises(fs.StageError, match="are differentiated in turn: copies in host memory"):
        fs.offload(pullback)
    pullback(torch.ones_like(output))
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x.detach())
    offloaded = fs.offload(pullback)
    cotangent = torch.ones_like(output, requires_grad=True)
    (dx,), weight_pullback = offloaded(cotangent)
    (found,) = torch.autograd.grad(dx.sum(), cotangent, retain_graph=True)
    leaf = x.detach().requires_grad_()
    (input_grad,) = torch.autograd.grad(module(leaf), leaf, cotangent, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(input_grad.sum(), cotangent)[0])
    with pytest.raises(fs.StageError, match="are differentiated in turn: copies in host memory"):
        fs.offload(weight_pullback)


@pytest.mark.parametrize("verb", [fs.offload, fs.prefetch])
@pytest.mark.parametrize("value", [None, lambda: None, torch.ones(1), []])
def test_what_is_no_pullback_is_refused(verb: Any, value: Any) -> None:
    with pytest.raises(fs.StructureError, match=f"{verb.__name__} takes a pullback of stage_vjp"):
        verb(value)


def test_residuals_of_a_device_that_offload_does_not_know_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = Split("layers", "uncompiled")

    class Elsewhere:
        device = torch.device("xpu")

    monkeypatch.setattr(type(split.pullback._tape), "leaves", lambda tape: [Elsewhere()])
    with pytest.raises(fs.StageError, match="residuals on 'xpu', but offload moves only those on CUDA"):
        fs.offload(split.pullback)
    assert not split.pullback.consumed
