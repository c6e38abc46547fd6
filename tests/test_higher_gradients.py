"""Gradients that are differentiated in turn: as eager's with `create_graph`, or refused, never cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funcstage as fs

COMPILED = [{"backend": "aten"}, {"backend": "aten", "remat": "full"}]


def apply(params: Any, buffers: Any, x: Tensor) -> Any:
    hidden = torch.tanh(x @ params["w"]) * params["s"]
    return {"y": hidden, "n": hidden.square().sum(1)}, buffers


def leaves() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    params = {"w": torch.randn(4, 3), "s": torch.randn(3)}
    return params, torch.randn(2, 4), {"y": torch.randn(2, 3), "n": torch.randn(2)}


def score(grads: Any) -> Tensor:
    return sum((grad**2).sum() for grad in grads)  # type: ignore[return-value]


def eagers(marked: str) -> tuple[Tensor, ...]:
    """The gradient of a score of the gradients, by what is marked."""
    params, x, cotangents = leaves()
    ends = [x.requires_grad_(), *(p.requires_grad_() for p in params.values())]
    given = [cotangents[name].requires_grad_(name == marked) for name in ("y", "n")]
    output, _ = apply(params, {}, x)
    grads = torch.autograd.grad([output["y"], output["n"]], ends, given, create_graph=True)
    wanted = {**params, **cotangents, "x": x}[marked]
    return torch.autograd.grad(score(grads), wanted)


@pytest.mark.parametrize("marked", ["y", "n", "x", "w", "s"])
def test_gradients_are_differentiated_by_cotangents_inputs_and_parameters(marked: str) -> None:
    params, x, cotangents = leaves()
    wanted = {**params, **cotangents, "x": x}[marked].requires_grad_()
    _, _, pullback = fs.stage_vjp(apply, params, {}, x)
    (dx,), weight_pullback = pullback(cotangents)
    found = torch.autograd.grad(score([dx, *weight_pullback().values()]), wanted)
    torch.testing.assert_close(found, eagers(marked))


@pytest.mark.parametrize("marked", ["x", "w", "s"])
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_a_compiled_stage_whose_inputs_are_differentiated_does_the_same(options: Any, marked: str) -> None:
    params, x, cotangents = leaves()
    wanted = {**params, "x": x}[marked].requires_grad_()
    _, _, pullback = fs.stage_vjp(fs.compile(apply, **options), params, {}, x)
    (dx,), weight_pullback = pullback(cotangents)
    found = torch.autograd.grad(score([dx, *weight_pullback().values()]), wanted)
    torch.testing.assert_close(found, eagers(marked))


@pytest.mark.parametrize("marked", ["y", "n"])
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_a_differentiated_cotangent_of_a_compiled_stage_is_refused_by_name_and_consumes_nothing(
    options: Any, marked: str
) -> None:
    params, x, cotangents = leaves()
    _, _, pullback = fs.stage_vjp(fs.compile(apply, **options), params, {}, x)
    cotangents[marked].requires_grad_()
    with pytest.raises(fs.StageError, match=rf"output_grads\['{marked}'\].*requires grad.*Detach"):
        pullback(cotangents)
    (dx,), weight_pullback = pullback({name: c.detach() for name, c in cotangents.items()})
    _, _, reference = fs.stage_vjp(apply, params, {}, x)
    (wanted_dx,), reference_weights = reference(cotangents)  # the way out
    torch.testing.assert_close(dx, wanted_dx.detach())
    torch.testing.assert_close(weight_pullback(), {n: g.detach() for n, g in reference_weights().items()})


def test_where_nothing_is_recorded_a_cotangent_may_require_grad() -> None:
    params, x, cotangents = leaves()
    _, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, {}, x)
    cotangents["y"].requires_grad_()
    with torch.no_grad():
        (dx,), _ = pullback(cotangents)
    assert not dx.requires_grad


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda dx, c: torch.func.grad(lambda c: score([dx(c)]))(c),
    "jvp": lambda dx, c: torch.func.jvp(dx, (c,), (torch.ones_like(c),))[1],
    "vmap": lambda dx, c: torch.func.vmap(dx)(torch.stack([c, 2 * c])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_around_a_pullback_is_right_or_refused(transform: str) -> None:
    params, x, cotangents = leaves()

    def input_grad(stage: Any) -> Callable[[Tensor], Tensor]:
        _, _, pullback = fs.stage_vjp(stage, params, {}, x)
        return lambda c: pullback({"y": c, "n": cotangents["n"]}, retain=True)[0][0]

    def eager(c: Tensor) -> Tensor:
        def outputs(x: Tensor) -> Any:
            return apply(params, {}, x)[0]

        return torch.func.vjp(outputs, x)[1]({"y": c, "n": cotangents["n"]})[0]

    found = TRANSFORMS[transform](input_grad(apply), cotangents["y"])
    torch.testing.assert_close(found, TRANSFORMS[transform](eager, cotangents["y"]))
    with pytest.raises(fs.StageError, match=r"transform of torch\.func.*uncompiled"):
        TRANSFORMS[transform](input_grad(fs.compile(apply, backend="aten")), cotangents["y"])
