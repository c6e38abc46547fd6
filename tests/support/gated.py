"""A block whose split overwrites residuals, hands them on and sums up early, as many a real one does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    """A gated unit with a norm, whose backward recomputes much, joins two halves, and sums up early."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.both = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up).sin()
