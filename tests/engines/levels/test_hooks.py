"""Hooks on modules and tensors fire when and as often as in eager, on both engines."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import funcstage as fs
from funcstage.testing import check_stage

aten = functools.partial(fs.compile, backend="aten")
ENGINES = pytest.mark.parametrize("engine", [None, aten], ids=["closures", "aten"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


Phases = dict[str, list[Any]]


def eager_run(module: nn.Module, x: Tensor, cotangent: Tensor, log: list[Any]) -> tuple[Phases, Phases]:
    """Forward and backward: what was logged, and the gradients."""
    x = x.clone().requires_grad_()
    output = module(x)
    logged = {"F": list(log)}
    log.clear()
    output.backward(cotangent)
    logged["B"] = list(log)
    log.clear()
    grads = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return logged, grads


def split_run(
    module: nn.Module, x: Tensor, cotangent: Tensor, log: list[Any], engine: Any = None
) -> tuple[Phases, Phases]:
    """F, I and W: what was logged in each, and the gradients."""
    apply, params, buffers = fs.functionalize(module)
    logged = {}
    _, _, pullback = fs.stage_vjp(engine(apply) if engine else apply, params, buffers, x)
    logged["F"] = list(log)
    log.clear()
    (dx,), weight_pullback = pullback(cotangent)
    logged["I"] = list(log)
    log.clear()
    grads = weight_pullback()
    logged["W"] = list(log)
    log.clear()
    return logged, {"x": dx, **grads}


def plain(value: Any) -> Any:
    """Free of wrappers, for a log."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


X, COTANGENT = torch.randn(5, 4).double(), torch.randn(5, 3).double()


def test_forward_hooks_see_and_change_what_they_do_in_eager() -> None:
    log: list[Any] = []
    module = network()

    def pre(owner: nn.Module, args: Any, kwargs: Any) -> Any:
        log.append(("pre", plain(args[0])))
        return (args[0] * 2,), kwargs

    def post(owner: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        log.append(("post", plain(output)))
        return output + args[0].sum()

    module[2].register_forward_pre_hook(pre, with_kwargs=True)
    module[2].register_forward_hook(post, with_kwargs=True, always_call=True)
    module[3].register_forward_pre_hook(lambda owner, args: log.append("observed"))
    logged, grads = eager_run(module, X, COTANGENT, log)
    split_logged, split_grads = split_run(module, X, COTANGENT, log)
    assert len(logged["F"]) == 3
    assert_same([e[1] for e in split_logged["F"][:2]], [e[1] for e in logged["F"][:2]])
    assert split_logged["F"][2] == logged["F"][2] == "observed"
    assert split_logged["I"] == split_logged["W"] == logged["B"] == []
    assert_same(split_grads, grads)


@pytest.mark.supports("forward hooks and pre-hooks of modules")
@ENGINES
def test_forward_hooks_with_keywords_change_both_gradients(engine: Any) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    module = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.Tanh()).double()
    module[1].register_forward_pre_hook(
        lambda owner, args, kwargs: ((args[0].tanh(),), {"scale": 3.0}), with_kwargs=True
    )
    module[1].register_forward_hook(lambda owner, args, output: output * owner.weight.sum())
    module[0].register_forward_hook(lambda owner, args, kwargs, output: output * 2, with_kwargs=True)
    check_stage(module, X, engines=engine or "closures")


@ENGINES
def test_a_hook_that_is_always_called_is_called_once_where_the_stage_raises(engine: Any) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("refused")

    called: list[Any] = []
    module = nn.Sequential(nn.Linear(4, 4), Refuses()).double()
    module[1].register_forward_hook(lambda owner, args, output: called.append(output), always_call=True)
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises((KeyError, fs.TraceError), match="refused"):
        fs.stage_vjp(engine(apply) if engine else apply, params, buffers, X)
    assert called == [None]


def test_full_backward_hooks_fire_once_in_i_with_the_gradients_of_eager() -> None:
    log: list[Any] = []
    module = network()
    for i in (2, 3):
        module[i].register_full_backward_pre_hook(
            lambda owner, grads, i=i: log.append((i, "pre", plain(grads)))
        )
        module[i].register_full_backward_hook(
            lambda owner, grads, outs, i=i: log.append((i, "post", plain(grads), plain(outs)))
        )
    logged, grads = eager_run(module, X, COTANGENT, log)
    split_logged, split_grads = split_run(module, X, COTANGENT, log)
    assert [entry[:2] for entry in split_logged["I"]] == [(3, "pre"), (3, "post"), (2, "pre"), (2, "post")]
    assert split_logged["F"] == split_logged["W"] == []
    for ours, eagers in zip(split_logged["I"], logged["B"], strict=True):
        assert_same(ours[2:], eagers[2:])
    assert_same(split_grads, grads)


def doubled(grads: Any) -> Any:
    return tuple(None if grad is None else 2 * grad for grad in grads)


HOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "full backward": lambda m: m[2].register_full_backward_hook(lambda owner, grads, outs: doubled(grads)),
    "full backward pre": lambda m: m[2].register_full_backward_pre_hook(lambda owner, grads: doubled(grads)),
    "of an activation": lambda m: m[2].register_forward_pre_hook(
        lambda owner, args: args[0].register_hook(lambda grad: grad * 3) and None
    ),
    "of an output": lambda m: m[4].register_forward_hook(
        lambda owner, args, output: output.register_hook(lambda grad: grad.clamp(-0.1, 0.1)) and None
    ),
    "of the input": lambda m: m[0].register_forward_pre_hook(
        lambda owner, args: args[0].register_hook(lambda grad: grad * 5) and None
    ),
    "of a linear's output": lambda m: m[0].register_forward_hook(
        lambda owner, args, output: output.register_hook(lambda grad: grad * grad) and None
    ),
}


@pytest.mark.supports(
    "backward hooks of modules, hooks of tensors", "once, in I", "what they do to gradients"
)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_changes_a_gradient_changes_what_eager_would_change(hook: str) -> None:
    module = network()
    without = eager_run(module, X, COTANGENT, [])[1]
    HOOKS[hook](module)
    expected = eager_run(module, X, COTANGENT, [])[1]
    changed = [name for name in expected if not torch.allclose(expected[name], without[name])]
    assert changed, "the hook does something"
    assert_same(split_run(module, X, COTANGENT, [])[1], expected)


def test_hooks_of_tensors_fire_once_in_i() -> None:
    log: list[Any] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y.register_hook(lambda grad: log.append(("site", plain(grad))))
            z = y.tanh()
            z.register_hook(lambda grad: log.append(("activation", plain(grad))))
            z.register_hook(lambda grad: grad * 2)
            out = self.second(z)
            out.register_hook(lambda grad: log.append(("output", plain(grad))))
            return out

    torch.manual_seed(0)
    module = Watched().double()
    logged, grads = eager_run(module, X, COTANGENT, log)
    split_logged, split_grads = split_run(module, X, COTANGENT, log)
    assert [name for name, _ in split_logged["I"]] == ["output", "activation", "site"]
    assert split_logged["F"] == split_logged["W"] == []
    for (_, ours), (_, eagers) in zip(split_logged["I"], logged["B"], strict=True):
        assert_same(ours, eagers)
    assert_same(split_grads, grads)


@contextmanager
def globally(log: list[Any]) -> Iterator[None]:
    """Hooks on all modules."""

    def linear(note: str) -> Callable[..., None]:
        def hook(owner: nn.Module, *values: Any) -> None:
            if isinstance(owner, nn.Linear):
                log.append((note, owner.out_features))

        return hook

    handles = [
        nn_module.register_module_forward_pre_hook(linear("pre")),
        nn_module.register_module_forward_hook(linear("post")),
        nn_module.register_module_full_backward_pre_hook(linear("backward pre")),
        nn_module.register_module_full_backward_hook(linear("backward")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_keep_nothing_alive_where_a_pullback_is_retained() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y.register_hook(lambda grad: grad * 2)
            return self.second(y)

    apply, params, buffers = fs.functionalize(Watched())
    _, _, pullback = fs.stage_vjp(apply, params, buffers, X)
    alive = []
    for _ in range(4):
        (dx,), weight_pullback = pullback(COTANGENT, retain=True)
        seen = weakref.ref(weight_pullback.sites[0].cotangent)
        weight_pullback()
        del dx, weight_pullback
        alive.append(seen() is not None)
    assert alive == [False] * 4


def test_global_hooks_fire_as_in_eager() -> None:
    log: list[Any] = []
    module = network()
    x = X.clone().requires_grad_()
    with globally(log):
        output = module(x)
        forward = list(log)
        log.clear()
        output.backward(COTANGENT)
        backward = list(log)
        log.clear()
        logged, _ = split_run(module, X, COTANGENT, log)
    assert len(forward) == len(backward) == 6
    assert logged == {"F": forward, "I": backward, "W": []}


def test_backward_hooks_of_a_first_stage_fire_once_in_w() -> None:
    """With no differentiated argument all of the backward is W."""
    log: list[Any] = []
    module = network()
    module[2].register_full_backward_hook(
        lambda owner, grads, outs: log.append((plain(grads), plain(outs))) or doubled(grads)
    )
    output = module(X)
    output.backward(COTANGENT)
    expected, wanted = list(log), {name: p.grad for name, p in module.named_parameters()}
    log.clear()
    apply, params, buffers = fs.functionalize(module)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, X, argnums=())
    _, weight_pullback = pullback(COTANGENT)
    assert log == []
    assert_same(weight_pullback(), wanted)
    assert len(log) == 1
    assert_same(log, expected)


# Compiled, hooks run when the stage is traced.


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_does_to_gradients_is_traced(hook: str) -> None:
    module = network()
    apply, params, buffers = fs.functionalize(module)
    compiled = aten(apply)
    fs.stage_vjp(compiled, params, buffers, X)
    handle = HOOKS[hook](module)
    expected = eager_run(module, X, COTANGENT, [])[1]
    for x in (X, X):  # traced for its hooks, and then not again
        output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
        (dx,), weight_pullback = pullback(COTANGENT)
        assert_same({"x": dx, **weight_pullback()}, expected)
    handle.remove()
    expected = eager_run(module, X, COTANGENT, [])[1]
    output, _, pullback = fs.stage_vjp(compiled, params, buffers, X)
    (dx,), weight_pullback = pullback(torch.ones_like(output) * COTANGENT)
    assert_same({"x": dx, **weight_pullback()}, expected)


def test_what_else_a_forward_hook_does_happens_in_every_f_of_a_compiled_stage() -> None:
    calls: list[str] = []
    module = network()
    module[2].register_forward_hook(lambda owner, args, output: calls.append("forward"))
    apply, params, buffers = fs.functionalize(module)
    compiled = aten(apply)
    for _ in range(3):
        _, _, pullback = fs.stage_vjp(compiled, params, buffers, X)
        pullback(COTANGENT)[1]()
    assert calls == ["forward"] * 3
    module[2].register_full_backward_hook(lambda owner, grads, outs: calls.append("backward"))
    with pytest.raises(fs.TraceError, match="in its backward"):  # would be done while it is traced alone
        fs.stage_vjp(aten(apply), params, buffers, X)


def test_a_hook_that_reads_values_is_refused_in_one_graph_and_runs_in_parts() -> None:
    module = network()
    module[2].register_full_backward_hook(
        lambda owner, grads, outs: doubled(grads) if float(outs[0].norm()) > 1 else None
    )
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(fs.TraceError, match="uncompiled"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, X)
    _, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=False), params, buffers, X)
    (dx,), weight_pullback = pullback(COTANGENT)
    whole = X.clone().requires_grad_()
    wanted = torch.autograd.grad(module(whole), [whole, *module.parameters()], COTANGENT)
    torch.testing.assert_close((dx, *weight_pullback().values()), wanted)
    assert_same(split_run(module, X, COTANGENT, [])[1], eager_run(module, X, COTANGENT, [])[1])
