"""What a run that is given up has changed, put back: random generators, modules, what arguments hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcstage._torch import functorch as ft
from funcstage.state.contents import Contents, Held
from funcstage.state.kept import holders, objects_among, refill


class Before(NamedTuple):
    """What a run that is given up has changed: random generators, and what modules and arguments hold.

    Attributes:
        generators: generators with their states.
        held: what the module held, if there is one.
        handed: containers among the arguments, with what they held.
    """

    generators: list[tuple[torch.Generator, Tensor]]
    held: Held | None
    handed: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: Any, leaves: Sequence[Any], contents: Any = None) -> Before:
        """Take note of a stage's module, if it has one, and of the generators of its tensors' devices.

        `contents` are the module's, where something is known of them.
        """
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        generators = [torch.default_generator]
        if devices and not torch.cuda.is_current_stream_capturing():
            generators += [torch.cuda.default_generators[device.index] for device in devices]
        held = None
        if isinstance(module, nn.Module):
            known = isinstance(contents, Contents) and not ft.current_level()  # whose tensors die with it
            held = (contents if known else Contents(module)).now()
        return cls(
            [(generator, generator.get_state()) for generator in generators],
            held,
            [(each, copy.copy(each)) for root in objects_among(leaves) for each in holders(root)],
        )

    def restore(self) -> None:
        """Put everything back."""
        for generator, state in self.generators:
            generator.set_state(state)
        if self.held is not None:
            self.held.restore()
        for container, contents in self.handed:
            refill(container, contents)
