"""What a run that is given up has changed, put back: random generators, modules, what arguments hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcstage._torch import functorch as ft
from funcstage.state.ambient import RandomState, of_process, of_torch
from funcstage.state.contents import Contents, Held
from funcstage.state.kept import State, objects_among


class Before(NamedTuple):
    """What a run that is given up has changed: random generators, and what modules and arguments hold.

    Attributes:
        generators: the random generators that all share: torch's, Python's and NumPy's.
        held: what the module held, if there is one.
        handed: what objects among the arguments held.
    """

    generators: RandomState
    held: Held | None
    handed: State

    @classmethod
    def of(cls, module: Any, leaves: Sequence[Any], contents: Any = None) -> Before:
        """Take note of a stage's module, if it has one, and of the generators of its tensors' devices.

        `contents` are the module's, where something is known of them.
        """
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        if devices and torch.cuda.is_current_stream_capturing():
            devices.clear()
        held = None
        if isinstance(module, nn.Module):
            known = isinstance(contents, Contents) and not ft.current_level()  # whose tensors die with it
            held = (contents if known else Contents(module)).now()
        return cls(
            RandomState((*of_torch(devices), *of_process())),
            held,
            State(None, objects_among(leaves)),
        )

    def restore(self) -> None:
        """Put everything back."""
        self.generators.restore()
        if self.held is not None:
            self.held.restore()
        self.handed.restore()
