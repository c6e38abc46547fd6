"""The contract of `stage_vjp` and its pullbacks, whatever the module: forms, None, single use, sums."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

NAMESPACE = "funcstage"


class Pair(NamedTuple):
    left: Any
    right: Any


@optree.dataclasses.dataclass(namespace=NAMESPACE)
class Batch:
    tokens: Tensor
    extra: Tensor | None
    name: str = optree.dataclasses.field(default="batch", pytree_node=False)


@pytest.fixture
def linear() -> tuple[nn.Linear, fs.FunctionalStage, Tensor]:
    module = nn.Linear(3, 2, dtype=torch.float64)
    return module, fs.functionalize(module), torch.randn(4, 3, dtype=torch.float64)


def eager_grads(output: Tensor, wanted: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(output, wanted, cotangent, allow_unused=True))


def test_the_two_halves_equal_eager_backward(linear: Any) -> None:
    module, (apply, params, buffers), x = linear
    cotangent = torch.randn(4, 2, dtype=torch.float64)
    output, new_buffers, pullback = fs.stage_vjp(apply, params, buffers, x)
    (dx,), weight_pullback = pullback(cotangent)
    grads = weight_pullback()
    leaf = x.clone().requires_grad_()
    expected = eager_grads(module(leaf), [leaf, module.weight, module.bias], cotangent)
    assert torch.equal(output, module(x))
    assert new_buffers == {}
    assert all(map(torch.equal, [dx, grads["weight"], grads["bias"]], expected))
    assert list(grads) == ["weight", "bias"]
    assert not output.requires_grad
    assert not dx.requires_grad


def test_any_pytree_goes_in_and_comes_out() -> None:
    def apply(params: Any, buffers: Any, batch: Batch, *, scale: float, names: list[str]) -> Any:
        h = batch.tokens @ params["w"][0]
        if batch.extra is not None:
            h = h + batch.extra
        return Pair({"h": h * scale, "names": names}, [batch, None, (h.argmax(-1), h[:1])]), buffers

    params = {"w": (torch.randn(3, 3, dtype=torch.float64), None, 7)}
    batch = Batch(torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    output, _, pullback = fs.stage_vjp(apply, params, (), batch, scale=2.0, names=["a"])
    assert isinstance(output, Pair)
    assert output.right[0].tokens is batch.tokens
    cotangents = optree.tree_map(
        lambda leaf: torch.ones_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else None,
        output,
        none_is_leaf=True,
        namespace=NAMESPACE,
    )
    (dbatch,), weight_pullback = pullback(cotangents)
    assert isinstance(dbatch, Batch)
    assert dbatch.name == "batch"
    x, e = (t.clone().requires_grad_() for t in (batch.tokens, batch.extra))
    w = params["w"][0].clone().requires_grad_()
    h = x @ w + e
    loss = (2 * h).sum() + x.sum() + e.sum() + h[:1].sum()
    expected = torch.autograd.grad(loss, [x, e, w])
    grads = weight_pullback()
    assert grads["w"][1:] == (None, None)
    for got, want in zip([dbatch.tokens, dbatch.extra, grads["w"][0]], expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize(
    "tree_map", [torch.utils._pytree.tree_map, lambda f, tree: optree.tree_map(f, tree, namespace=NAMESPACE)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_residuals_may_be_mapped_to_what_is_no_tensor_and_back(
    linear: Any, tree_map: Any, compiled: bool
) -> None:
    _, (apply, params, buffers), x = linear
    apply = fs.compile(apply, backend="aten") if compiled else apply
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    for value in (pullback, pullback(torch.ones(4, 2, dtype=torch.float64), retain=True)[1]):
        shapes = tree_map(lambda leaf: SimpleNamespace(shape=leaf.shape), value)
        assert "residuals replaced: [namespace(shape=torch.Size([4, " in repr(shapes)
        assert shapes.nbytes == 0
        assert "residuals replaced" in shapes._repr_html_()
        with pytest.raises(
            fs.StructureError, match=r"it is SimpleNamespace, and was float64\[4, \d\] on cpu\. Call the one"
        ):
            shapes()
    zeros = tree_map(lambda like: torch.zeros(like.shape, dtype=torch.float64), shapes)
    assert torch.equal(zeros()["weight"], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(value()["weight"], torch.ones(2, 4, dtype=torch.float64) @ x)


@pytest.mark.parametrize("backend", [None, "aten", "inductor"])
@pytest.mark.parametrize(
    ("change", "is_now"),
    [
        (torch.Tensor.float, r"float32\[4, \d\] on cpu"),
        (lambda leaf: leaf.to("meta"), r"float64\[4, \d\] on meta"),
        (lambda leaf: leaf.flatten().clone(), r"float64\[\d+\] on cpu"),
        (torch.Tensor.to_sparse, r"float64\[4, \d\] on cpu, sparse_coo"),
    ],
)
def test_residuals_that_became_others_are_refused_until_they_are_what_they_were(
    linear: Any, backend: Any, change: Any, is_now: str
) -> None:
    _, (apply, params, buffers), x = linear
    apply = apply if backend is None else fs.compile(apply, backend=backend)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    for half in (pullback, pullback(torch.ones(4, 2, dtype=torch.float64), retain=True)[1]):
        changed = optree.tree_map(change, half, namespace=NAMESPACE)
        with pytest.raises(
            fs.StructureError, match=rf"it is {is_now}, and was float64\[4, \d\] on cpu\. Call the one"
        ):
            changed()
        leaves = optree.tree_leaves(half, namespace=NAMESPACE)
        copies, held = [leaf.clone() for leaf in leaves], [*map(weakref.ref, leaves)]
    del half, pullback, leaves
    assert not any(ref() is not None and ref() is not x for ref in held)
    again = optree.tree_map(lambda _: copies.pop(0), changed, namespace=NAMESPACE)
    assert torch.equal(again()["weight"], torch.ones(2, 4, dtype=torch.float64) @ x)


def test_a_module_is_no_stage_function_however_it_is_called(linear: Any) -> None:
    module, stage, x = linear
    for arguments in ((module,), (module, x), (module, stage.params, stage.buffers, x)):
        with pytest.raises(fs.StructureError, match="got the module Linear: take apply, params, buffers = "):
            fs.stage_vjp(*arguments)
    with pytest.raises(fs.StructureError, match="a whole FunctionalStage: unpack it"):
        fs.stage_vjp(stage, x)  # type: ignore[call-arg]


def test_a_none_cotangent_is_zero_and_what_hangs_on_it_alone_gets_none() -> None:
    def apply(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        return (x * params["a"], y * params["b"]), buffers

    params = {"a": torch.randn(3), "b": torch.randn(3), "unused": torch.randn(3)}
    x, y = torch.randn(3), torch.randn(3)
    _, _, pullback = fs.stage_vjp(apply, params, {}, x, y)
    (dx, dy), weight_pullback = pullback((torch.ones(3), None))
    grads = weight_pullback()
    assert torch.equal(dx, params["a"])
    assert dy is None
    assert torch.equal(grads["a"], x)
    assert grads["b"] is None
    assert grads["unused"] is None


def test_an_unused_input_gets_none_like_autograd() -> None:
    apply = lambda params, buffers, x, y: (x * params, buffers)  # noqa: E731
    _, _, pullback = fs.stage_vjp(apply, torch.ones(2), (), torch.ones(2), torch.ones(2))
    (dx, dy), _ = pullback(torch.ones(2))
    assert dx is not None
    assert dy is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_cotangents_may_be_left_out_for_one_real_number(shape: tuple[int, ...]) -> None:
    apply = lambda params, buffers, x: ((x * params).sum().reshape(shape), buffers)  # noqa: E731
    x, w = torch.randn(3), torch.randn(3)
    _, _, pullback = fs.stage_vjp(apply, w, (), x)
    (dx,), weight_pullback = pullback()
    assert torch.equal(dx, w)
    assert torch.equal(weight_pullback(), x)


@pytest.mark.parametrize("argnums", [0, (0,), -2, [0]])
def test_argnums_chooses_what_is_differentiated(argnums: Any) -> None:
    apply = lambda params, buffers, x, y: (x * y * params, buffers)  # noqa: E731
    x, y, w = (torch.randn(3) for _ in range(3))
    _, _, pullback = fs.stage_vjp(apply, w, (), x, y, argnums=argnums)
    (dx, dy), weight_pullback = pullback(torch.ones(3))
    assert torch.equal(dx, y * w)
    assert dy is None
    assert torch.allclose(weight_pullback(), x * y)


def test_with_nothing_differentiated_w_is_the_whole_backward() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    apply, params, buffers = fs.functionalize(module)
    tokens = torch.randint(0, 11, (3, 5))
    output, _, pullback = fs.stage_vjp(apply, params, buffers, tokens)
    cotangent = torch.randn_like(output)
    with FlopCounterMode(display=False) as in_i:
        (dtokens,), weight_pullback = pullback(cotangent)
    assert dtokens is None
    assert in_i.get_total_flops() == 0
    grads = weight_pullback()
    expected = eager_grads(module(tokens), list(module.parameters()), cotangent)
    assert all(map(torch.equal, grads.values(), expected))


def test_the_same_tensor_passed_twice_has_two_gradients() -> None:
    apply = lambda params, buffers, x, y: (x * 2 + y * 3, buffers)  # noqa: E731
    x = torch.randn(3)
    _, _, pullback = fs.stage_vjp(apply, (), (), x, x)
    (dx, dy), _ = pullback(torch.ones(3))
    assert torch.equal(dx, torch.full((3,), 2.0))
    assert torch.equal(dy, torch.full((3,), 3.0))


def test_a_pullback_is_used_once_unless_retained(linear: Any) -> None:
    _, (apply, params, buffers), x = linear
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    cotangent = torch.ones(4, 2, dtype=torch.float64)
    (first,), w1 = pullback(cotangent, retain=True)
    (second,), w2 = pullback(2 * cotangent)
    with pytest.raises(fs.ConsumedError, match="retain=True"):
        pullback(cotangent)
    assert torch.equal(2 * first, second)
    grads2 = w2()
    grads1 = w1(retain=True)
    assert torch.equal(2 * grads1["weight"], grads2["weight"])
    assert torch.equal(w1()["weight"], grads1["weight"])
    with pytest.raises(fs.ConsumedError, match="retain=True"):
        w1()


def test_reprs_say_what_is_held_and_whether_it_was_used(linear: Any) -> None:
    _, (apply, params, buffers), x = linear
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    assert "Linear" in repr(pullback)
    assert "residuals" in repr(pullback)
    _, weight_pullback = pullback(torch.ones(4, 2, dtype=torch.float64))
    assert "consumed" in repr(pullback)
    assert "2 parameters" in repr(weight_pullback)


def test_the_three_verbs_equal_eager_accumulation_over_microbatches() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    apply, params, buffers = fs.functionalize(module)
    pending = []
    module.zero_grad()
    for _ in range(5):
        x = torch.randn(4, 3, dtype=torch.float64)
        cotangent = torch.randn(4, 3, dtype=torch.float64)
        _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = fs.stage_backward_input(pullback, cotangent)
        pending.append(weight_pullback)
        leaf = x.clone().requires_grad_()
        module(leaf).backward(cotangent)
        assert torch.equal(dx, leaf.grad)
    first, *rest = pending
    accumulate = fs.stage_backward_weight(first)
    storage = {name: grad.data_ptr() for name, grad in accumulate.items()}
    total = fs.stage_backward_weight(rest, accumulate)
    assert {name: grad.data_ptr() for name, grad in total.items()} == storage  # donated
    for name, param in module.named_parameters():
        assert torch.allclose(total[name], param.grad, rtol=1e-13, atol=1e-14)


def test_accumulators_may_be_wider_than_the_gradients() -> None:
    module = nn.Linear(3, 2, dtype=torch.bfloat16)
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    _, weight_pullback = pullback(torch.ones(4, 2, dtype=torch.bfloat16))
    total = fs.stage_backward_weight(weight_pullback, zeros)
    assert total["weight"] is zeros["weight"]
    assert total["weight"].dtype == torch.float32


def test_gradients_never_share_memory_with_each_other_or_a_cotangent() -> None:
    apply = lambda params, buffers, x: (x + params["a"] + params["b"], buffers)  # noqa: E731
    params = {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(3)}
    _, _, pullback = fs.stage_vjp(apply, params, (), torch.zeros(3))
    cotangent = torch.ones(3)
    _, weight_pullback = pullback(cotangent, retain=True)
    total = fs.stage_backward_weight(weight_pullback)
    for _ in range(2):
        _, weight_pullback = pullback(cotangent, retain=True)
        total = fs.stage_backward_weight(weight_pullback, total)
    assert torch.equal(total["a"], torch.full((3,), 3.0))
    assert torch.equal(total["b"], torch.full((3,), 3.0))
    assert total["c"] is None
    assert torch.equal(cotangent, torch.ones(3))


def test_late_weight_passes_in_any_order_give_the_same_numbers(linear: Any) -> None:
    module, (apply, params, buffers), _ = linear
    inputs = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
    cotangent = torch.ones(4, 2, dtype=torch.float64)
    pullbacks = [fs.stage_vjp(apply, params, buffers, x)[2] for x in inputs]
    pending = [pullback(cotangent)[1] for pullback in reversed(pullbacks)]
    with torch.no_grad():
        for param in module.parameters():
            param.mul_(1)  # the module's tensors changing version must not matter
    for x, weight_pullback in zip(inputs, reversed(pending), strict=True):
        assert torch.equal(weight_pullback()["weight"], cotangent.t() @ x)


def test_a_gradient_can_be_differentiated_in_turn() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    apply, params, buffers = fs.functionalize(module)

    def grads(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(params, weights, strict=True))
        output, _, pullback = fs.stage_vjp(apply, named, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return dx, *weight_pullback().values()

    inputs = [t.clone().requires_grad_() for t in (torch.randn(2, 3).double(), *params.values())]
    assert torch.autograd.gradcheck(grads, inputs)
    x = inputs[0].detach()
    per_example = torch.func.vmap(lambda row: grads(row, *params.values())[1])(x)
    for row, got in zip(x, per_example, strict=True):
        assert torch.allclose(grads(row, *params.values())[1], got)
    jacobian = torch.func.jacrev(lambda x: grads(x, *params.values())[0])(x)
    forward = torch.func.jacfwd(lambda x: grads(x, *params.values())[0])(x)
    assert torch.allclose(jacobian, forward)


def test_it_runs_the_same_under_no_grad(linear: Any) -> None:
    _, (apply, params, buffers), x = linear
    cotangent = torch.ones(4, 2, dtype=torch.float64)
    with torch.no_grad():
        _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
    assert torch.equal(dx, cotangent @ params["weight"])
    assert torch.equal(grads["bias"], cotangent.sum(0))


def test_a_dataclass_that_optree_does_not_know_is_a_leaf_and_passes_through() -> None:
    @dataclasses.dataclass
    class Config:
        factor: float

    apply = lambda params, buffers, x, config: (x * params * config.factor, buffers)  # noqa: E731
    _, _, pullback = fs.stage_vjp(apply, torch.ones(2), (), torch.ones(2), Config(3.0))
    (dx, dconfig), _ = pullback(torch.ones(2))
    assert torch.equal(dx, torch.full((2,), 3.0))
    assert dconfig is None


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_an_error_while_w_is_divided_comes_through_and_leaves_it_whole_or_consumed(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(3, 3))
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    weight_pullback = fs.stage_vjp(stage, params, buffers, torch.ones(2, 3))[2](torch.ones(2, 3))[1]
    monkeypatch.setattr(type(weight_pullback._tape), "split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weight_pullback.split(2)
    try:
        grads = weight_pullback()
    except fs.ConsumedError:
        assert engine == "closures"
    else:
        torch.testing.assert_close(grads, {"weight": torch.full((3, 3), 2.0), "bias": torch.full((3,), 2.0)})
