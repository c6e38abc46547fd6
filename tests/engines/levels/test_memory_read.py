"""What a forward reads of its tensors for others than torch: logs, pictures, files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

READERS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda y: y.detach().numpy().sum(),
    "on the host": lambda y: y.detach().cpu().double().numpy().sum(),
    "without gradients": lambda y: torch.no_grad()(torch.mean)(y, 0).numpy().sum(),
    "by force": lambda y: y.numpy(force=True).sum(),
    "as an array": lambda y: np.asarray(y.detach()).sum(),
    "as an array of another dtype": lambda y: np.array(y.detach(), dtype=np.float64).sum(),
    "a function of NumPy's": lambda y: np.histogram(y.detach())[1][0],
    "data": lambda y: y.data.numpy().max(),
    "a list": lambda y: y.detach().tolist()[0][0],
    "a list without gradients": lambda y: torch.no_grad()(torch.mean)(y, 0).tolist()[0],
    "a deep copy": lambda y: copy.deepcopy(y.detach()).numpy().sum(),
    "a file": lambda y: torch.save(y.detach(), io.BytesIO()) or 1.5,
    "a pointer": lambda y: 1.5 if y.detach().data_ptr() else 0.0,
    "the size of the memory": lambda y: float(y.detach().untyped_storage().nbytes()),
    "another library": lambda y: float(np.from_dlpack(y.detach()).sum()),
}


class Logs(nn.Module):
    """Computes with what it has read, which is a constant to autograd."""

    def __init__(self, read: Callable[[Tensor], Any], inside: str) -> None:
        super().__init__()
        self.proj, self.read, self.inside = nn.Linear(3, 3), read, inside

    def body(self, x: Tensor) -> Tensor:
        y = self.proj(x).tanh()
        return y * float(self.read(y) + self.read(self.proj.weight) + self.read(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.inside == "region" else self.body(x)


@pytest.mark.parametrize("inside", ["forward", "region"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_of_a_detached_tensor_is_what_eager_reads(name: str, inside: str) -> None:
    torch.manual_seed(0)
    module, x = Logs(READERS[name], inside), torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    dx, *dparams = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
    output, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
    torch.testing.assert_close(output, expected)
    (found,), weight_pullback = pullback(torch.ones_like(output))
    torch.testing.assert_close([found, *weight_pullback().values()], [dx, *dparams])


@pytest.mark.parametrize(
    "name", ["numpy", "as an array", "a list", "a deep copy", "a file", "another library"]
)
def test_a_compiled_stage_says_that_it_reads_a_value_and_runs_without_fullgraph(name: str) -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(Logs(READERS[name], "forward"))
    x = torch.randn(2, 3)
    with pytest.raises(fs.TraceError, match=r"reads the value of a tensor .*The uncompiled `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)
    with pytest.warns(UserWarning, match="It runs uncompiled"):
        output = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)[0]
    torch.testing.assert_close(output, apply(params, buffers, x)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_what_eager_refuses_to_read_is_eagers_error(compiled: bool) -> None:
    apply, params, buffers = fs.functionalize(Logs(lambda y: y.numpy().sum(), "forward"))
    stage = fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply
    with pytest.raises(RuntimeError, match=r"Can't call numpy\(\) on Tensor that requires grad"):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 3))


def test_copies_of_memory_are_refused_with_ways_out() -> None:
    apply, params, buffers = fs.functionalize(Logs(lambda y: copy.copy(y.detach()).sum(), "forward"))
    with pytest.raises(fs.StageError, match=r"memory of another, as copy\.copy.*write tensor\.detach\(\)"):
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 3))
    apply, params, buffers = fs.functionalize(Logs(lambda y: float(y.data_ptr()), "forward"))
    with pytest.raises(fs.StageError, match=r"memory of a tensor.*Read that of tensor\.detach\(\)"):
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 3))


def test_inference_mode_inside_is_refused_with_no_grad_as_the_way_out() -> None:
    class Within(nn.Module):
        def __init__(self, mode: Callable[[], Any]) -> None:
            super().__init__()
            self.proj, self.mode = nn.Linear(3, 3), mode

        def forward(self, x: Tensor) -> Tensor:
            with self.mode():
                total = self.proj(x).sum()
            return self.proj(x) + total.clone() * 1

    torch.manual_seed(0)
    x = torch.randn(2, 3)
    with pytest.raises(fs.StageError, match=r"inference_mode\(\) in its forward.*Write torch\.no_grad\(\)"):
        fs.stage_vjp(*fs.functionalize(Within(torch.inference_mode)), x)
    module = Within(torch.no_grad)
    torch.testing.assert_close(fs.stage_vjp(*fs.functionalize(module), x)[0], module(x))


class Quasi(nn.Module):
    """Multiplies by points of a Sobol sequence, whose kernels read and write memory."""

    def __init__(self, inside: bool, **options: Any) -> None:
        super().__init__()
        self.proj, self.inside, self.options = nn.Linear(3, 3), inside, options
        self.engine = torch.quasirandom.SobolEngine(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            return self.proj(x) * self.engine.draw(len(x)) + self.engine.draw(1)
        engine = torch.quasirandom.SobolEngine(3, **self.options)
        drawn = [engine.fast_forward(2).draw(len(x)), engine.draw(1), engine.reset().draw_base2(2)[:2]]
        return self.proj(x) * torch.stack([drawn[0], drawn[2]]).sum(0) + drawn[1]


@pytest.mark.parametrize("argnums", [None, ()])
@pytest.mark.parametrize("options", [{}, {"scramble": True, "seed": 2}, {"scramble": True}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_quasi_random_draws_go_on_as_in_eager(inside: bool, options: dict[str, Any], argnums: Any) -> None:
    torch.manual_seed(0)
    module, x = Quasi(inside, **options), torch.randn(2, 3)
    eager = copy.deepcopy(module)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = eager(x)
        dparams = torch.autograd.grad(expected.sum(), [*eager.parameters()])
        then = torch.get_rng_state()
        torch.manual_seed(seed)
        output, _, pullback = fs.stage_vjp(*fs.functionalize(module), x, argnums=argnums)
        assert torch.equal(torch.get_rng_state(), then)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        got = pullback(torch.ones_like(output))[1]()
        torch.testing.assert_close([*got.values()], [*dparams], rtol=0, atol=0)
    assert torch.equal(module.engine.quasi, eager.engine.quasi)
    assert module.engine.num_generated == eager.engine.num_generated
