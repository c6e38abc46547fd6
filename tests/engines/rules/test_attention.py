"""Attention next to a mask that is learned: kernels are told that they are differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcstage as fs
from funcstage._torch import functorch as ft
from funcstage._torch import operators as ops
from funcstage.engines.rules import attention, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Biased(nn.Module):
    """Attention whose mask alone is a parameter, or whose query and key are computed from parameters, too."""

    def __init__(self, projects: bool, by_name: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6, 6))
        self.project = nn.Linear(8, 24) if projects else None
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x, x, x) if self.project is None else self.project(x).chunk(3, -1)
        q, k, v = (each[None, None].float() for each in (q, k, v))
        if self.by_name:
            return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=self.bias)[0, 0]
        return F.scaled_dot_product_attention(q, k, v, self.bias)[0, 0]


@pytest.mark.parametrize("engine", [None, "aten", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("projects", [False, True])
def test_a_learned_mask_has_eagers_gradients(
    projects: bool, by_name: bool, autocast: bool, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEEPS", ())
    torch.manual_seed(0)
    module = Biased(projects, by_name).to(DEVICE)
    x, cotangent = torch.randn(2, 6, 8, device=DEVICE)
    apply, params, _ = fs.functionalize(module)
    leaf = x.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected = module(leaf)
        grads = torch.autograd.grad(expected, [leaf, *module.parameters()], cotangent.to(expected.dtype))
        stage = apply if engine is None else fs.compile(apply, backend=engine)
        output, _, pullback = fs.stage_vjp(stage, params, {}, x)
        (dx,), weight_pullback = pullback(cotangent.to(output.dtype))
        of_weights = weight_pullback().values()
    tolerance = 3e-2 if autocast else 1e-5
    for ours, eagers in zip([output, dx, *of_weights], [expected.detach(), *grads], strict=True):
        torch.testing.assert_close(ours, eagers, rtol=tolerance, atol=tolerance)


def test_attention_is_called_with_an_operand_that_is_tracked_at_its_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "KEEPS", ())
    (rule, *_) = table.RULES[ops.scaled_dot_product_attention]
    seen = []
    attend = ops.scaled_dot_product_attention

    def kernel(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query.requires_grad, ft.level_of(query) == ft.current_level()))
        result: Tensor = attend(query, *args, **kwargs)
        return result

    monkeypatch.setattr(ops, "scaled_dot_product_attention", kernel)
    apply, params, _ = fs.functionalize(Biased(projects=False, by_name=False))
    fs.stage_vjp(apply, params, {}, torch.randn(6, 8))
    assert seen == [(True, True)]
    assert rule.whole
