"""How many layers of a stage are copied while it is traced."""

from __future__ import annotations

import pytest

from funcstage.engines.graph.layers import Layers


def counted_copies(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of copies with each trace from now on."""
    copies: list[int] = []
    forget = Layers.forget

    def forgetting(of: Layers) -> None:
        copies.append(len(of.copies))
        forget(of)

    patch.setattr(Layers, "forget", forgetting)
    return copies
