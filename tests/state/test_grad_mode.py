"""The grad mode of the caller makes no difference to F, I and W, whatever it is around each of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
ENGINES: dict[str, Callable[[Any], Any]] = {
    "uncompiled": lambda apply: apply,
    "aten": lambda apply: fs.compile(apply, backend="aten"),
}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.second(y).tanh(), self.first(x).exp(), use_reentrant=False)


class CheckpointedLSTM(nn.Module):
    """Whose kernel takes another form where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.lstm(y)[0].sin(), x, use_reentrant=False)


class ReadsTheMode(nn.Module):
    """As eager would be with gradients on inside, which asking for gradients means."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if torch.is_grad_enabled() else 3.0
        with torch.no_grad():
            shift = self.linear(x).mean()
        return self.linear(x) * scale - shift


class HoldsAConstant(nn.Module):
    """With a tensor that is neither parameter nor buffer, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.bias.requires_grad_(False)
        self.factor = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sigmoid() * self.factor


SEQUENCE, BATCH = (3, 2, 4), (3, 4)
STAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(True)), BATCH),
    "a recurrent layer": (lambda: nn.LSTM(4, 3), SEQUENCE),
    "an attention layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), SEQUENCE),
    "a checkpoint": (Checkpointed, BATCH),
    "a recurrent layer in a checkpoint": (CheckpointedLSTM, SEQUENCE),
    "a stage that reads the mode": (ReadsTheMode, BATCH),
    "a constant": (HoldsAConstant, BATCH),
}


def copied(tree: Any) -> Any:
    return optree.tree_map(torch.clone, tree)


def eager(apply: Any, params: Any, buffers: Any, x: Tensor) -> tuple[list[Any], list[Any]]:
    """Outputs, new buffers and gradients of the plain tape, with gradients on and of ordinary tensors."""
    params, x = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    output, new_buffers = apply(params, copied(buffers), x)
    outputs = list(optree.tree_leaves(output))
    grads = torch.autograd.grad(outputs, [x, *params.values()], [leaf.detach().cos() for leaf in outputs])
    return [leaf.detach() for leaf in (*outputs, *new_buffers.values())], [*grads]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STAGES)
def test_the_split_is_the_same_under_every_mode_around_each_of_its_steps(name: str, engine: str) -> None:
    torch.manual_seed(0)
    make, shape = STAGES[name]
    apply, params, buffers = fs.functionalize(make())
    stage, x = ENGINES[engine](apply), torch.randn(shape)
    results, grads = eager(apply, params, buffers, x)
    with torch.inference_mode():
        frozen = copied((params, buffers, x))
    for given, modes in product(((params, buffers, x), frozen), product(MODES.values(), repeat=3)):
        with modes[0]():
            output, new_buffers, pullback = fs.stage_vjp(stage, *given)
        with modes[1]():
            (dx,), weight_pullback = pullback(optree.tree_map(torch.cos, output))
        with modes[2]():
            dw = weight_pullback()
        ours = [*optree.tree_leaves(output), *new_buffers.values(), dx, *dw.values()]
        for mine, wanted in zip(ours, [*results, *grads], strict=True):
            torch.testing.assert_close(mine, wanted)
            assert not mine.requires_grad
        assert not any(mine.is_inference() for mine in (ours[0], dx, *dw.values()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
def test_sums_over_microbatches_go_into_accumulators_under_every_mode(mode: str, engine: str) -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(STAGES["layers"][0]())
    stage, x = ENGINES[engine](apply), torch.randn(3, 4)
    wanted = eager(apply, params, buffers, x)[1][1:]
    with MODES[mode]():
        for accumulate in (None, optree.tree_map(torch.ones_like, params)):
            pending = []
            for _ in range(2):
                output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
                pending.append(pullback(output.cos())[1])
            total = fs.stage_backward_weight(pending, accumulate)
            for name, grad in zip(params, wanted, strict=True):
                torch.testing.assert_close(total[name], 2 * grad + (accumulate is not None))
                assert accumulate is None or total[name] is accumulate[name]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_state_that_requires_grad_is_recorded_by_nobody_else_under_a_mode(mode: str, engine: str) -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(STAGES["layers"][0]())
    x = torch.randn(3, 4)
    wanted = eager(apply, params, buffers, x)[1]
    leaves = optree.tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
    with MODES[mode]():
        output, _, pullback = fs.stage_vjp(ENGINES[engine](apply), leaves, buffers, x.clone())
        (dx,), weight_pullback = pullback(output.cos())
        dw = weight_pullback()
    for mine, grad in zip((dx, *dw.values()), wanted, strict=True):
        torch.testing.assert_close(mine, grad)
    assert not any(leaf.requires_grad for leaf in (output, dx, *dw.values()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_no_pullback_keeps_a_history_that_was_turned_off(mode: str, engine: str) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, history: Any) -> Tensor:
            ctx.history = history
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 2, None

    history = nn.Identity()
    reference = weakref.ref(history)
    params = Doubled.apply(torch.randn(3, requires_grad=True), history)
    stage = ENGINES[engine](lambda params, buffers, x: ((x * params).sin(), buffers))
    with MODES[mode]():
        pullback = fs.stage_vjp(stage, params, (), torch.randn(3))[2]
    del params, history
    gc.collect()
    assert reference() is None
    assert not pullback.consumed


@pytest.mark.parametrize("enabled", [True, False])
def test_a_buffer_that_a_stage_leaves_alone_is_the_callers_tensor_in_every_mode(enabled: bool) -> None:
    x, buffer = torch.ones(2), torch.ones(3)
    with torch.set_grad_enabled(enabled):
        _, new_buffers, _ = fs.stage_vjp(lambda p, buffers, x: (x * p, buffers), torch.ones(2), buffer, x)
    assert new_buffers is buffer


def test_one_trace_serves_all_modes() -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(4, 4))
    fast, x = fs.compile(apply, backend="aten"), torch.randn(3, 4)
    for mode in MODES.values():
        with mode():
            fs.stage_vjp(fast, params, buffers, x)
    assert "1 signature(s)" in repr(fast)


@pytest.mark.slow
def test_programs_of_inductor_serve_every_mode() -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    fast, x = fs.compile(apply), torch.randn(3, 4)
    wanted = eager(apply, params, buffers, x)[1]
    for mode in (*MODES.values(), torch.inference_mode):
        with mode():
            output, _, pullback = fs.stage_vjp(fast, params, buffers, x)
            (dx,), weight_pullback = pullback(output.cos())
            for mine, grad in zip((dx, *weight_pullback().values()), wanted, strict=True):
                torch.testing.assert_close(mine, grad)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_compiled_forward_alone_sees_the_callers_grad_mode(enabled: bool) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * params["w"] * (2 if torch.is_grad_enabled() else 3), buffers

    params, x = {"w": torch.randn(3)}, torch.randn(3)
    fast = fs.compile(apply, backend="aten")
    with torch.set_grad_enabled(enabled):
        torch.testing.assert_close(fast(params, {}, x)[0], apply(params, {}, x)[0])


@pytest.mark.parametrize("mode", MODES)
def test_tensors_with_a_history_are_computed_by_the_stage_itself_only_where_that_goes_on(mode: str) -> None:
    fast = fs.compile(lambda params, buffers, x: (x * params, buffers), backend="aten")
    params, x = torch.randn(3, requires_grad=True), torch.randn(3)
    with MODES[mode]():
        torch.testing.assert_close(fast(params, (), x)[0], x * params)
    assert f"{0 if mode == 'grad' else 1} signature(s)" in repr(fast)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_list_that_the_forward_fills_is_the_callers_in_every_mode(mode: Any) -> None:
    class Fills(nn.Linear):
        def forward(self, x: Tensor, seen: list[Tensor], *, table: dict[str, Any]) -> Tensor:
            y = super().forward(x)
            seen.append(y * 2)
            table["last"] = [y]
            return y

    module, x, seen, table = Fills(3, 3), torch.randn(2, 3), [], {}
    apply, params, buffers = fs.functionalize(module)
    with mode():
        output, _, _ = fs.stage_vjp(apply, params, buffers, x, seen, table=table)
    assert not output.requires_grad
    torch.testing.assert_close(seen, [output * 2])
    torch.testing.assert_close(table["last"], [output])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_plan_is_the_same_whatever_the_callers_mode(mode: Any) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.ones(2, 3)
    expected = str(fs.compile(apply, backend="aten").plan(params, buffers, x))
    with mode():
        stage = fs.compile(apply, backend="aten")
        assert str(stage.plan(params, buffers, x)) == expected
        programs = fs.compile(apply, backend="aten").programs(params, buffers, x)
    assert str(programs.weight_grad.graph) == str(stage.programs(params, buffers, x).weight_grad.graph)


_seen: list[bool] = []
LIBRARY = torch.library.Library("modes_seen_by_kernels", "DEF")
LIBRARY.define("twice(Tensor x) -> Tensor")


def _twice(x: Tensor) -> Tensor:
    _seen.append(torch.is_grad_enabled())
    return x * 2


LIBRARY.impl("twice", _twice, "CPU")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("argnums", [None, ()])
def test_kernels_see_gradients_on_whatever_the_callers_mode(mode: str, argnums: Any) -> None:
    twice = torch.ops.modes_seen_by_kernels.twice
    stages: tuple[Callable[..., Any], ...] = (
        lambda p, b, x: (twice(x) * p["w"], b),
        lambda p, b, x: (twice(p["w"]) * x, b),
    )
    for apply in stages:
        _seen.clear()
        with MODES[mode]():
            fs.stage_vjp(apply, {"w": torch.ones(3)}, {}, torch.ones(3), argnums=argnums)
        assert _seen == [True]  # as in eager: the fused LSTM, for one, keeps what its backward reads


@pytest.mark.parametrize("reentrant", [False, True])
def test_kernels_of_a_region_that_runs_again_see_gradients_on(reentrant: bool) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        def region(y: Tensor) -> Tensor:
            return torch.ops.modes_seen_by_kernels.twice(y.detach()) * y.sin() * params["w"]  # type: ignore[no-any-return]

        return checkpoint(region, x * 1, use_reentrant=reentrant), buffers

    _seen.clear()
    _, _, pullback = fs.stage_vjp(apply, {"w": torch.ones(3)}, {}, torch.ones(3))
    pullback(torch.ones(3))
    assert _seen == [not reentrant, True]  # as torch's own checkpoints have it


@pytest.mark.parametrize("argnums", [None, ()])
def test_under_a_transform_that_sees_no_gradients_the_split_has_them(argnums: Any) -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(3, 3))

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
            grads, weight_pullback = pullback(output.cos())
            return output, [grad for grad in grads if grad is not None], weight_pullback()

    xs = torch.randn(4, 2, 3)
    batched = torch.func.vmap(run)(xs)
    for i, x in enumerate(xs):
        torch.testing.assert_close(optree.tree_map(lambda leaf, i=i: leaf[i], batched), run(x))
