"""`value_and_grad` against plain autograd, and pullbacks as pytrees of torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import funcstage as fs

MODULE = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2)).double()
X, Y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)


def loss_of(module: nn.Module, *, aux: bool = False) -> tuple[Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)

    def loss(params: Any, buffers: Any, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Any:
        output, buffers = apply(params, buffers, x)
        value = scale * nn.functional.mse_loss(output, y)
        return ((value, {"output": output}) if aux else value), buffers

    return loss, params, buffers


def eager(module: nn.Module, microbatches: int, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, gradients and buffers of a loop over the microbatches, on a copy."""
    copy = type(module)(*module)
    copy.load_state_dict(before := {name: t.clone() for name, t in module.state_dict().items()})
    losses = [
        scale * nn.functional.mse_loss(copy(x), y)
        for x, y in zip(X.chunk(microbatches), Y.chunk(microbatches), strict=True)
    ]
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(copy.parameters()))
    found = dict(zip((name for name, _ in copy.named_parameters()), grads, strict=True))
    buffers = {name: b.clone() for name, b in copy.named_buffers()}
    module.load_state_dict(before)
    return loss.detach(), {**found, **buffers}


@pytest.mark.parametrize("backend", [None, "aten"])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_loss_gradients_and_buffers_are_eagers(backend: str | None, microbatches: int) -> None:
    loss, params, buffers = loss_of(MODULE)
    function = loss if backend is None else fs.compile(loss, backend=backend)
    step = fs.value_and_grad(function, microbatches=microbatches)
    value, new_buffers, grads = step(params, buffers, X, Y, scale=2.0)
    expected, of_each = eager(MODULE, microbatches, scale=2.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close({**grads, **new_buffers}, of_each)
    assert int(buffers["1.num_batches_tracked"]) == int(MODULE[1].num_batches_tracked)


def test_aux_is_returned_for_each_microbatch_and_not_differentiated() -> None:
    loss, params, buffers = loss_of(MODULE, aux=True)
    (value, aux), _, grads = fs.value_and_grad(loss, has_aux=True)(params, buffers, X, Y)
    expected, of_each = eager(MODULE, 1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, {name: of_each[name] for name in grads})
    assert aux["output"].shape == (8, 2)
    (_, several), _, _ = fs.value_and_grad(loss, has_aux=True, microbatches=2)(params, buffers, X, Y)
    assert [one["output"].shape for one in several] == [(4, 2), (4, 2)]


def test_parameters_may_be_nested_and_unused() -> None:
    def loss(params: Any, buffers: None, x: Tensor) -> tuple[Tensor, None]:
        first, second = params["layers"]
        return (x @ first["w"] @ second["w"]).square().mean(), buffers

    params = {
        "layers": [{"w": torch.randn(3, 4)}, {"w": torch.randn(4, 2)}],
        "unused": (torch.ones(2),),
    }
    x = torch.randn(6, 3)
    value, _, grads = fs.value_and_grad(loss, microbatches=3)(params, None, x)
    assert grads["unused"] == (None,)
    leaves = [layer["w"].clone().requires_grad_() for layer in params["layers"]]  # type: ignore[attr-defined]
    expected = (x @ leaves[0] @ leaves[1]).square().mean()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(
        [layer["w"] for layer in grads["layers"]], list(torch.autograd.grad(expected, leaves))
    )


@pytest.mark.parametrize(
    ("options", "output", "says"),
    [
        ({}, lambda x: x, r"a real scalar, a tensor of shape \[\], got float32\[4, 3\]"),
        ({}, lambda x: (x.sum(), x), "pass has_aux=True"),
        ({"has_aux": True}, lambda x: x.sum(), r"must be \(loss, aux\), got"),
        ({"microbatches": 3}, lambda x: x.sum(), "equal microbatches"),
    ],
)
def test_what_is_no_loss_is_refused(options: dict[str, Any], output: Any, says: str) -> None:
    def loss(params: Tensor, buffers: None, x: Tensor) -> Any:
        return output(x * params), buffers

    with pytest.raises(fs.StageError, match=says):
        fs.value_and_grad(loss, **options)(torch.ones(3), None, torch.ones(4, 3))


def test_what_is_no_stage_function_is_refused_at_once() -> None:
    with pytest.raises(fs.StructureError, match=r"funcstage\.functionalize"):
        fs.value_and_grad(MODULE)
    with pytest.raises(fs.StructureError, match="must be a positive integer, got 0"):
        fs.value_and_grad(lambda p, b: (p, b), microbatches=0)


@pytest.mark.parametrize("backend", [None, "aten"])
def test_torchs_pytrees_look_into_pullbacks(backend: str | None) -> None:
    apply, params, buffers = fs.functionalize(MODULE)
    function = apply if backend is None else fs.compile(apply, backend=backend)
    output, _, pullback = fs.stage_vjp(function, params, buffers, X)
    assert sum(leaf.nbytes for leaf in _pytree.tree_leaves(pullback)) >= pullback.nbytes > 0
    moved = _pytree.tree_map(torch.clone, pullback)
    (dx,), weight_pullback = moved(torch.ones_like(output))
    grads = _pytree.tree_map(torch.clone, weight_pullback)()
    x = X.clone().requires_grad_()
    eager_params = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected, _ = apply(eager_params, buffers, x)
    wanted = torch.autograd.grad(expected.sum(), [x, *eager_params.values()])
    torch.testing.assert_close([dx, *grads.values()], list(wanted))
