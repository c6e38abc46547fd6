"""Bugs that generated stages have found, each as the smallest stage that showed it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcstage as fs
from funcstage import testing
from funcstage.testing.stages import Block, Stage, use

check_stage = functools.partial(testing.check_stage, engines=("closures", "aten"))


def test_weights_have_gradients_where_an_activation_overwrites_a_sequence_behind_a_linear_layer() -> None:
    # On three axes `linear` returns a view, whose place on the tape moves when it is overwritten.
    check_stage(nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True)), torch.randn(2, 3, 4))


def test_attention_runs_under_autocast() -> None:
    # Inside a transform torch's autocast acts below autograd, which then saves operands of the wrong dtype.
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.project(x)
                return F.scaled_dot_product_attention(y, y, y).float()

    check_stage(Attention(), torch.randn(2, 3, 4))


def test_a_gradient_that_cancels_out_to_nothing_may_leave_a_rounding_error() -> None:
    # A norm over one feature passes nothing on: eager's terms cancel exactly, ours to 1e-16.
    lstm = use("recurrent", kind="lstm", hidden=2, layers=2, both=True, states=False)
    bodies = (
        (lstm, use("custom function")),
        (use("linear", out=1, bias=False), use("layer norm", affine="weight")),
    )
    Stage(
        body=(
            Block(kind="branch", bodies=bodies, option=None),
            use("linear", out=2, bias=True),
            use("layer norm", affine="weight"),
            use("linear", out=0, bias=True),
        ),
        shape=(2, 3, 3),
        dtype=torch.float64,
        device="cpu",
        tokens="",
        layout="contiguous",
        inputs=(),
        keywords={},
        output=("hidden", "hidden"),
        argnums=None,
        training=True,
        seed=65535,
    ).check(engines=("closures", "aten"))


@pytest.mark.parametrize("attribute", ["real", "imag", "mT", "mH"])
def test_an_attribute_that_is_a_view_of_an_activation_in_a_parameters_memory_is_an_operation(
    attribute: str,
) -> None:
    # Found as an output of `hidden.real > 0`; the base of the view was taken for a second site.
    def written_into_weights(params: Any, buffers: Any, x: Tensor) -> Any:
        y = params["w"].expand(x.shape).clone()
        y += x
        z = getattr(y, attribute)
        return (y * params["w"], z.abs() * 2), buffers

    params = {"w": torch.randn(3, dtype=torch.complex128)}
    x = torch.randn(2, 3, dtype=torch.complex128)
    check_stage(written_into_weights, x, params=params, flops=False)


@pytest.mark.parametrize("joined", [True, False])
def test_meshgrid_is_split(joined: bool) -> None:
    # Its override check lies in a second function, which sent the engine round in circles.
    def grid(params: Any, buffers: Any, x: Tensor) -> Any:
        operands = [x, params["w"]]
        return (torch.meshgrid(operands) if joined else torch.meshgrid(*operands, indexing="xy")), buffers

    check_stage(grid, torch.randn(3), params={"w": torch.randn(2)})


def test_a_gradient_of_torchs_zeros_without_memory_has_memory() -> None:
    def sign(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * torch.sgn(params["w"]), buffers

    x, params = torch.randn(3), {"w": torch.randn(3)}
    check_stage(sign, x, params=params)
    for engine in (sign, fs.compile(sign, backend="aten")):
        _, _, pullback = fs.stage_vjp(engine, params, {}, x)
        grads = pullback(torch.ones(3))[1]()
        grads["w"].add_(1)  # as an accumulator
        assert grads["w"].tolist() == [1.0] * 3


def test_matrices_are_decomposed_in_a_trace_without_their_checks() -> None:
    def spectrum(params: Any, buffers: Any, x: Tensor) -> Any:
        matrix = x @ params["w"]
        return (torch.linalg.eigvals(matrix).abs(), torch.linalg.lu_factor(matrix)[0]), buffers

    check_stage(spectrum, torch.randn(3, 3).double(), params={"w": torch.randn(3, 3).double()}, flops=False)


def test_a_sparse_value_inside_of_a_stage_is_not_traced() -> None:
    # A trace lost its gradient without a word.
    def sparse(params: Any, buffers: Any, x: Tensor) -> Any:
        return (x * params["w"]).to_sparse().to_dense(), buffers

    x, params = torch.randn(3, 3), {"w": torch.randn(3)}
    report = check_stage(sparse, x, params=params)
    assert set(report.refusals) == {"aten"}
    assert "makes a tensor of sparse_coo layout" in str(report.refusals["aten"])


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_taken_inside_of_a_stage_goes_through_batch_norm(training: bool) -> None:
    # Where the forward's kernel says whether it trains, the backward's has a tensor without a truth value.
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=training)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.norm(point).sin().sum(), point)
            return gradient * self.norm(x)

    check_stage(Force().train(training), torch.randn(4, 3))
