"""What compiled stages read of tensors that are constants to them: `.data`, and tensors of other traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

CAPTURED = nn.Parameter(torch.randn(3))
LAYERS = [nn.Linear(3, 3)]


class Reads(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.proj, self.read = nn.Linear(3, 3), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x, self.proj(x))


READ: dict[str, Any] = {
    "a captured parameter": lambda self, x, y: y * CAPTURED.data,
    "a parameter of another module": lambda self, x, y: y @ LAYERS[0].weight.data,
    "its own parameter": lambda self, x, y: y * self.proj.weight.data.sum(),
    "an activation": lambda self, x, y: y * y.data,
    "an input": lambda self, x, y: y * x.data.sum(),
}


@pytest.mark.parametrize("backend", ["closures", "aten"])
@pytest.mark.parametrize("name", READ)
def test_data_is_a_constant_as_in_eager(name: str, backend: Any) -> None:
    torch.manual_seed(0)
    module, x = Reads(READ[name]), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if backend == "closures" else fs.compile(apply, backend=backend, fullgraph=True)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        expected = module(leaf)
        wanted = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close([dx, *weight_pullback().values()], [*wanted])
        with torch.no_grad():
            CAPTURED.mul_(2)
            LAYERS[0].weight.add_(1)


def test_what_is_captured_is_not_written_by_its_data() -> None:
    before = CAPTURED.detach().clone()
    apply, params, buffers = fs.functionalize(Reads(lambda self, x, y: y * CAPTURED.data.mul_(2)))
    with pytest.raises(fs.StageError, match=r"captured from outside|writes in place"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(2, 3))
    torch.testing.assert_close(CAPTURED.detach(), before)


def linearized(self: Any, x: Tensor, y: Tensor) -> Tensor:
    value, tangent_of = torch.func.linearize(torch.tanh, y)
    return value + tangent_of(torch.ones_like(y))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_linearize_in_a_compiled_stage_is_refused_by_name_and_works_uncompiled() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(2, 3), Reads(linearized)
    apply, params, buffers = fs.functionalize(module)
    # Before 2.13 torch's trace of it stops at an assertion of torch's.
    told = r"(trace inside, as torch.func.linearize|native::_fw_primal)(.|\n)*`apply` works"
    with pytest.raises(fs.TraceError, match=told):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])
    torch.testing.assert_close([dx, *weight_pullback().values()], [*expected])
