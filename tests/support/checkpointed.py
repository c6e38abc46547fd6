"""A small module with a checkpointed region."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Regions(nn.Module):
    """A region and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False)
        return self.last(y)
