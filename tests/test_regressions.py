"""Bugs that generated stages have found, each as the smallest stage that showed it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from funcstage.testing import check_stage


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
