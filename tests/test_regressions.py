"""Bugs that generated stages have found, each as the smallest stage that showed it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
